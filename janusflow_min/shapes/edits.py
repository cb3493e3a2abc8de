# SPDX-License-Identifier: MIT
"""Edits of scenes: source and target as captions and as scenes, and a judge of what an edit changed and kept.

A case is a held-out scene of two objects with one change of `EDIT_KINDS`. Its target is a scene too, so the judge can
be measured on true renders of targets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import scenes
from .captions import plain_description
from .judge import Reading, Seen
from .scenes import BACKGROUNDS, COLOURS, SHAPES, Object, Scene

EDIT_KINDS = ("colour", "shape", "add", "remove", "background")
PLACE = 6.0  # px; an object to be kept whose centre moved by less is in its place
RESIZED = 0.15  # an object whose radius changed by a smaller share has its size


@dataclass(frozen=True, slots=True)
class EditCase:
    """An edit of `kind`; the object that changes is at `index` in source and target ("add": in the target alone)."""

    kind: str
    source: Scene
    target: Scene
    index: int = 0

    @property
    def source_prompt(self) -> str:
        return f"a photo of {plain_description(self.source)}"

    @property
    def prompt(self) -> str:
        return f"a photo of {plain_description(self.target)}"

    @property
    def unchanged(self) -> tuple[Object, ...]:
        """The objects that source and target share."""
        return tuple(thing for thing in self.source.objects if thing in self.target.objects)


def edit_case(kind: str, number: int, seed: int = 0) -> EditCase:
    """The case of a kind with this number; the same for the same seed. ValueError for an unknown kind."""
    if kind not in EDIT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(EDIT_KINDS)}, got {kind!r}")
    rng = random.Random(f"edit {kind} {number} {seed}")
    while True:
        source = scenes.sample_scene(rng, "color_attr", "held_out")
        index = rng.randrange(2)
        if (target := _change(rng, kind, source, index)) is not None:
            return EditCase(kind, source, target, 2 if kind == "add" else index)


def _change(rng: random.Random, kind: str, source: Scene, index: int) -> Scene | None:
    """The target; None where there is no room for one more object."""
    things = list(source.objects)
    if kind == "background":
        name = rng.choice([name for name in BACKGROUNDS if name != source.background])
        return replace(source, background=name, background_rgb=BACKGROUNDS[name])
    if kind == "remove":
        return replace(source, objects=(things[1 - index],))
    colour = rng.choice([name for name in COLOURS if name not in {thing.colour for thing in things}])
    shape = rng.choice([name for name in SHAPES if name not in {thing.shape for thing in things}])
    if kind == "colour":
        things[index] = replace(things[index], colour=colour, rgb=COLOURS[colour])
    elif kind == "shape":
        things[index] = replace(things[index], shape=shape)
    else:
        radius = rng.uniform(16.0, 22.0)
        edge = radius + scenes.MARGIN
        x, y = rng.uniform(edge, scenes.SIZE - edge), rng.uniform(edge, scenes.SIZE - edge)
        if any((x - o.x) ** 2 + (y - o.y) ** 2 < (radius + o.radius + scenes.GAP) ** 2 for o in things):
            return None
        things.append(Object(shape, colour, x, y, radius, COLOURS[colour]))
    return replace(source, objects=tuple(things))


def _is_kind(seen: Seen, thing: Object) -> bool:
    return (seen.shape, seen.colour) == (thing.shape, thing.colour)


def _is_near(seen: Seen, thing: Object) -> bool:
    return max(abs(seen.centre[0] - thing.x), abs(seen.centre[1] - thing.y)) < PLACE


def is_edited(case: EditCase, reading: Reading) -> bool:
    """Whether the change is there: a new colour or shape whose centre lies within the old object, one more object, one
    less, the background."""
    if case.kind == "background":
        return reading.background == case.target.background
    if case.kind == "remove":
        return not any(_is_kind(seen, case.source.objects[case.index]) for seen in reading.objects)
    thing = case.target.objects[case.index]
    return any(
        _is_kind(seen, thing)
        and (case.kind == "add" or math.dist(seen.centre, (thing.x, thing.y)) < thing.radius)
        for seen in reading.objects
    )


def is_kept(case: EditCase, reading: Reading) -> bool:
    """Whether the rest is as it was: shape, colour, place and size of every other object, background, none besides.

    The object to change may be there in any state; where the background changes, its name is not asked for.
    """
    if case.kind != "background" and reading.background != case.source.background:
        return False
    left: Sequence[Seen] = reading.objects
    for thing in case.unchanged:
        found = [
            seen
            for seen in left
            if _is_kind(seen, thing)
            and _is_near(seen, thing)
            and abs(seen.radius - thing.radius) < RESIZED * thing.radius
        ]
        if not found:
            return False
        left = [seen for seen in left if seen is not found[0]]
    return len(left) <= (case.kind != "background")
