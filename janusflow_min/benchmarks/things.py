# SPDX-License-Identifier: MIT
"""The world of things as a benchmark: combinations that training never saw, as `benchmarks.shapes` does for shapes.

Prompts: `cases` for each of GenEval's six families; the images are judged by `things.judge`, which compares them with
the rendered emoji. Questions: `cases` for each of seven kinds, about true renders. Both need the atlas of
`scripts/things_atlas.py`, which is no part of the package.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..options import option
from . import report as reports
from . import shapes
from .ranks import RankInfo
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, generate_images, load_pipe, open_run

if TYPE_CHECKING:
    from ..shapes.captions import QA

TITLE = "Things"
SUMMARY = "emoji in two styles: held-out prompts and questions; needs the atlas of scripts/things_atlas.py"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    cases: int = option("prompts for each of six families, questions of seven kinds", 100)
    draw_seed: int = option("from which prompts and questions are drawn", 0)
    atlas: str | None = option("file of rendered emoji, if not in its default place", None, kind=str)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(shapes.ScoreOptions):
    atlas: str | None = option("file of rendered emoji, if not in its default place", None, kind=str)


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


def _inputs(captioned: Sequence[tuple[str, str]], asked: Sequence[tuple[QA, Image.Image]]) -> dict[str, str]:
    """The images are in it too: another atlas is another benchmark."""
    digest = hashlib.sha256(json.dumps([captioned, [(qa.question, qa.answer) for qa, _ in asked]]).encode())
    for _, image in asked:
        digest.update(image.tobytes())
    return {"drawn": digest.hexdigest()}


def generate(settings: Settings, out: str | Path, options: GenerateOptions = GenerateOptions()) -> Coverage:
    """Generate `out`/images/NNNNN.png, and answer into `out`/answers/NNNNN.json, a block of questions each."""
    from ..worlds import open_world

    cases, draw_seed = options.cases, options.draw_seed
    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    world = open_world("things", options.atlas)
    captioned = shapes.prompts(cases, draw_seed, world)
    asked = shapes.questions(cases, draw_seed, world)
    items = [Item(i, prompt, (f"{i:05d}.png",)) for i, (_, prompt) in enumerate(captioned)]
    pipe = functools.cache(lambda: load_pipe(settings, "all"))
    choices = {"images_per_prompt": 1, "cases": cases, "draw_seed": draw_seed}
    with open_run("things", _inputs(captioned, asked), out, settings, choices) as folder:
        found = generate_images(pipe, folder, items, 1, settings)
        shapes._answer(pipe, folder, asked, settings, RankInfo.from_environment())
    return found


def score(run: str | Path, options: ScoreOptions = ScoreOptions()) -> dict[str, Any]:
    """Judge images and answers; writes item_scores.jsonl and score.json into `run`. ValueError below a given share."""
    from ..worlds import open_world

    manifest = RunFolder(run).read_manifest()
    cases, draw_seed = (manifest["settings"][key] for key in ("cases", "draw_seed"))
    world = open_world("things", options.atlas)
    captioned = shapes.prompts(cases, draw_seed, world)
    asked = shapes.questions(cases, draw_seed, world)
    if _inputs(captioned, asked) != manifest["inputs_sha256"]:
        raise ValueError(f"{run} was generated with another atlas than {options.atlas or 'the default'}")
    return shapes.score_world(run, options, world, captioned, asked)


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
