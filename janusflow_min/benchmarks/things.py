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
import random
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
from .scoring import ScoringRun, means

if TYPE_CHECKING:
    from ..shapes.captions import QA
    from ..things.scenes import World

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


@functools.lru_cache(1)
def _world(atlas: str | None) -> World:
    from ..things.atlas import load_atlas
    from ..things.scenes import World

    return World(load_atlas(atlas))


def prompts(world: World, cases: int, seed: int = 0) -> list[tuple[str, str]]:
    """(family, prompt), `cases` for each family."""
    from ..things.captions import caption
    from ..things.scenes import FAMILIES

    drawn = []
    for family in FAMILIES:
        for i in range(cases):
            rng = random.Random(f"prompt {family} {i} {seed}")
            drawn.append((family, caption(world.sample_scene(rng, family, "held_out"), family, rng, "plain")))
    return drawn


def questions(world: World, cases: int, seed: int = 0) -> list[tuple[QA, Image.Image]]:
    """A question and the image it is about, `cases` for each kind."""
    from ..shapes.scenes import to_pil
    from ..things.captions import THING_KINDS
    from ..things.captions import questions as asked_of
    from ..things.scenes import FAMILIES

    drawn = []
    for kind in THING_KINDS:
        for i in range(cases):
            rng = random.Random(f"question {kind} {i} {seed}")
            fitting: list[QA] = []
            while not fitting:
                scene = world.sample_scene(rng, rng.choice(FAMILIES), "held_out")
                fitting = [qa for qa in asked_of(scene, world.nouns, rng) if qa.kind == kind]
            drawn.append((rng.choice(fitting), to_pil(world.render(world.pack([scene]))[0])))
    return drawn


def _inputs(captioned: list[tuple[str, str]], asked: list[tuple[QA, Image.Image]]) -> dict[str, str]:
    """The images are in it too: another atlas is another benchmark."""
    digest = hashlib.sha256(json.dumps([captioned, [(qa.question, qa.answer) for qa, _ in asked]]).encode())
    for _, image in asked:
        digest.update(image.tobytes())
    return {"drawn": digest.hexdigest()}


def generate(settings: Settings, out: str | Path, options: GenerateOptions = GenerateOptions()) -> Coverage:
    """Generate `out`/images/NNNNN.png, and answer into `out`/answers/NNNNN.json, a block of questions each."""
    if options.cases < 1:
        raise ValueError(f"cases must be at least 1, got {options.cases}")
    world, about = _world(options.atlas), {"cases": options.cases, "draw_seed": options.draw_seed}
    captioned, asked = prompts(world, *about.values()), questions(world, *about.values())
    items = [Item(i, prompt, (f"{i:05d}.png",)) for i, (_, prompt) in enumerate(captioned)]
    pipe = functools.cache(lambda: load_pipe(settings, "all"))
    choices = {"images_per_prompt": 1, **about}
    with open_run("things", _inputs(captioned, asked), out, settings, choices) as folder:
        found = generate_images(pipe, folder, items, 1, settings)
        shapes._answer(pipe, folder, asked, settings, RankInfo.from_environment())
    return found


def score(run: str | Path, options: ScoreOptions = ScoreOptions()) -> dict[str, Any]:
    """Judge images and answers; writes item_scores.jsonl and score.json into `run`. ValueError below a given share."""
    manifest = RunFolder(run).read_manifest()
    scoring = ScoringRun("things", run, options, manifest["inputs_sha256"], published=True)
    about = {key: manifest["settings"][key] for key in ("cases", "draw_seed")}
    world = _world(options.atlas)
    captioned, asked = prompts(world, *about.values()), questions(world, *about.values())
    if _inputs(captioned, asked) != manifest["inputs_sha256"]:
        raise ValueError(f"{run} was generated with another atlas than {options.atlas or 'the default'}")
    there = scoring.whole([f"{i:05d}.png" for i in range(len(captioned[: options.limit]))], "NNNNN.png")
    answers = shapes._read_blocks(scoring, len(asked), manifest["settings"]["batch_size"])
    if options.dry_run:
        what = f"{len(there):,} images and {len(answers):,} answers, judged by rules"
        return {"benchmark": "things", "dry_run": what}
    from ..things.captions import GRAMMAR
    from ..things.judge import Judge

    items = shapes._judge_images(scoring, captioned, there, Judge(world.atlas).check, options.progress)
    items += shapes._judge_answers(asked[: options.limit], answers, GRAMMAR)
    groups = dict.fromkeys([*(family for family, _ in captioned), *(f"answer: {qa.kind}" for qa, _ in asked)])
    shares = means(items, dict.fromkeys(("images", "answers"), about["cases"]))
    result = scoring.write(
        headline=("images right", shares["images"][0]),
        scale=1.0,
        scores=means(items, dict.fromkeys(groups, about["cases"])),
        n_expected=len(captioned) + len(asked),
        n_scored=len(items),
        judge={"rules": "of this package"},
        items=items,
        totals={"images right": {"images": 1.0}, "answers right": {"answers": 1.0}},
        options=about,
        others={"answers right": shares["answers"][0]},
    )
    shapes._check_shares(result, shares, options)
    return result


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
