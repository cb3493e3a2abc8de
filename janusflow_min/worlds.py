# SPDX-License-Identifier: MIT
"""Worlds by one interface, for training and benchmarks: scenes, their images, what is said of them, and a judge."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shapes import captions, scenes
from .shapes import judge as shape_judge
from .shapes.captions import QA, Grammar
from .things import captions as thing_captions
from .things.atlas import load_atlas
from .things.judge import Judge
from .things.scenes import World as Things

NAMES = ("shapes", "things")


@dataclass(frozen=True)
class World:
    """Functions of a world; the families of both are `shapes.scenes.FAMILIES`.

    sample_scene(rng, family, split); pack(scenes): (B, P); render(packed): (B, 3, S, S) in [-1, 1]; caption(scene,
    family, rng, style); questions(scene, rng): all; some_questions(scene, rng, n); corpus(): text with every word;
    checker(): a function of image and prompt, whether it is right and if not why.
    """

    name: str
    grammar: Grammar
    sample_scene: Callable[..., Any]
    pack: Callable[..., Tensor]
    render: Callable[[Tensor], Tensor]
    caption: Callable[..., str]
    questions: Callable[..., list[QA]]
    some_questions: Callable[..., list[QA]]
    corpus: Callable[[], list[str]]
    checker: Callable[[], Callable[[Any, str], tuple[bool, str]]]


SHAPES = World(
    "shapes",
    captions.GRAMMAR,
    scenes.sample_scene,
    scenes.pack,
    scenes.render,
    captions.caption,
    captions.questions,
    captions.sample_questions,
    captions.corpus,
    lambda: shape_judge.check,
)


@functools.lru_cache(2)
def _things(atlas: str | None) -> Things:
    return Things(load_atlas(atlas))


def open_world(
    name: str, atlas: str | Path | None = None, device: torch.device | str | None = "cpu"
) -> World:
    """A world by its name. atlas: file of the rendered things, if not in its default place; device: of its images, None
    where none are rendered."""
    if name == "shapes":
        return SHAPES
    if name != "things":
        raise ValueError(f"a world is one of {', '.join(NAMES)}, got {name!r}")
    things = _things(None if atlas is None else str(atlas))
    levels = None if device is None else things.atlas.levels.to(device)
    return World(
        name,
        thing_captions.GRAMMAR,
        things.sample_scene,
        things.pack,
        lambda packed: things.render(packed, levels=levels),
        thing_captions.caption,
        lambda scene, rng: thing_captions.questions(scene, things.nouns, rng),
        lambda scene, rng, n: thing_captions.sample_questions(scene, things.nouns, rng, n),
        lambda: thing_captions.corpus(things),
        lambda: Judge(things.atlas, device or "cpu").check,
    )
