# SPDX-License-Identifier: MIT
"""The default model's world as a benchmark that runs anywhere: combinations that training never saw.

Prompts: `cases` for each of the six families, every one from a scene that the family's held-out rule keeps from
training; the images are judged by `shapes.judge`, which knows nothing of the model. Questions: `cases` for each of
the six kinds, about true renders of held-out scenes. Each case has a generator of its own, made of family or kind,
number and seed, so batches and order change nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..files import parse_json
from ..options import option
from . import report as reports
from .bootstrap import ItemScore
from .ranks import RankInfo, shard
from .reading import read_image
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, blocks, generate_images, load_pipe, open_run
from .scoring import ScoreOptions as CommonOptions
from .scoring import ScoringRun, means

if TYPE_CHECKING:
    from ..shapes.captions import QA

TITLE = "Shapes"
SUMMARY = "the default's world: held-out prompts and questions, no data needed"
ANSWER_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    cases: int = option("prompts for each of six families, questions for each of six kinds", 100)
    draw_seed: int = option("from which prompts and questions are drawn", 0)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CommonOptions):
    at_least: float | None = option("fail where a smaller share of the images is right", None, kind=float)
    answers_at_least: float | None = option(
        "fail where a smaller share of the answers is right", None, kind=float
    )


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


def prompts(cases: int, seed: int = 0) -> list[tuple[str, str]]:
    """(family, prompt), `cases` for each family."""
    from ..shapes import captions, scenes

    drawn = []
    for family in scenes.FAMILIES:
        for i in range(cases):
            rng = random.Random(f"prompt {family} {i} {seed}")
            scene = scenes.sample_scene(rng, family, "held_out")
            drawn.append((family, captions.caption(scene, family, rng, "plain")))
    return drawn


def questions(cases: int, seed: int = 0) -> list[tuple[QA, Image.Image]]:
    """A question and the image it is about, `cases` for each kind, families in turn where they have such a one."""
    from ..shapes import captions, scenes

    drawn = []
    for kind in captions.KINDS:
        for i in range(cases):
            rng = random.Random(f"question {kind} {i} {seed}")
            while True:
                scene = scenes.sample_scene(rng, rng.choice(scenes.FAMILIES), "held_out")
                fitting = [qa for qa in captions.questions(scene, rng) if qa.kind == kind]
                if fitting:
                    break
            image = scenes.to_pil(scenes.render(scenes.pack([scene]))[0])
            drawn.append((rng.choice(fitting), image))
    return drawn


def generate(settings: Settings, out: str | Path, options: GenerateOptions = GenerateOptions()) -> Coverage:
    """Generate `out`/images/NNNNN.png and answer into `out`/answers/NNNNN.json, a block of questions each."""
    cases, draw_seed = options.cases, options.draw_seed
    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    captioned, asked = prompts(cases, draw_seed), questions(cases, draw_seed)
    drawn = json.dumps([captioned, [(qa.kind, qa.question, qa.answer) for qa, _ in asked]])
    inputs = {"drawn": hashlib.sha256(drawn.encode()).hexdigest()}
    choices = {"images_per_prompt": 1, "cases": cases, "draw_seed": draw_seed}
    items = [Item(i, prompt, (f"{i:05d}.png",)) for i, (_, prompt) in enumerate(captioned)]
    pipe = functools.cache(lambda: load_pipe(settings, "all"))
    with open_run("shapes", inputs, out, settings, choices) as folder:
        found = generate_images(pipe, folder, items, 1, settings)
        _answer(pipe, folder, asked, settings, RankInfo.from_environment())
    return found


def read_answers(path: Path, count: int) -> list[str] | None:
    """The `count` answers that a file holds, None where there is none. ValueError for anything else in it."""
    if not path.exists():
        return None
    answers = parse_json(path)
    if (
        not isinstance(answers, list)
        or len(answers) != count
        or not all(isinstance(answer, str) for answer in answers)
    ):
        raise ValueError(f"{path} must hold a list of {count} answers")
    return answers


def _answer(
    pipe: Callable[[], Any], folder: RunFolder, questions: Sequence, settings: Settings, world: RankInfo
) -> None:
    share = shard(list(enumerate(blocks(questions, 1, settings.batch_size))), world.rank, world.size)
    hidden = not settings.progress or world.local_rank != 0
    for i, block in tqdm(share, desc="Answering", unit="batch", disable=hidden):
        path = folder.root / "answers" / f"{i:05d}.json"
        if settings.limit is not None and i * settings.batch_size >= settings.limit:
            continue
        with suppress(ValueError):  # a damaged file is written again
            if read_answers(path, len(block)) is not None:
                continue
        answers = pipe().understand(
            [qa.question for qa, _ in block], [image for _, image in block], max_new_tokens=ANSWER_TOKENS
        )
        folder.write_json(path, [answer.text for answer in answers])


def score(run: str | Path, options: ScoreOptions = ScoreOptions()) -> dict[str, Any]:
    """Judge images and answers; writes item_scores.jsonl and score.json into `run`. ValueError below a given share."""
    manifest = RunFolder(run).read_manifest()
    scoring = ScoringRun("shapes", run, options, manifest["inputs_sha256"], published=True)
    about = {key: manifest["settings"][key] for key in ("cases", "draw_seed")}
    captioned, asked = prompts(*about.values()), questions(*about.values())
    there = scoring.whole([f"{i:05d}.png" for i in range(len(captioned[: options.limit]))], "NNNNN.png")
    answers = _read_blocks(scoring, len(asked), manifest["settings"]["batch_size"])
    if options.dry_run:
        what = f"{len(there):,} images and {len(answers):,} answers, judged by rules"
        return {"benchmark": "shapes", "dry_run": what}
    items = _judge_images(scoring, captioned, there, options.progress)
    items += _judge_answers(asked[: options.limit], answers)
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
    for name, least in (("images", options.at_least), ("answers", options.answers_at_least)):
        value, n, _ = shares[name]
        if least is not None and (not result["complete"] or (value or 0.0) < least):
            raise ValueError(
                f"{value or 0.0:.1%} of {n} {name} are right, at least {least:.1%} are needed"
                + ("" if result["complete"] else f"; {reports.summary(result)}")
            )
    return result


def _read_blocks(scoring: ScoringRun, count: int, batch_size: int) -> dict[int, str]:
    """Place of a question -> its answer, of all blocks that are there; a damaged one becomes a failure."""
    found: dict[int, str] = {}
    for k, places in enumerate(blocks(range(count), 1, batch_size)):
        try:
            answers = read_answers(scoring.folder.root / "answers" / f"{k:05d}.json", len(places))
        except ValueError as error:
            scoring.failures[f"answers {places[0]} to {places[-1]}"] = str(error)
        else:
            found |= zip(places, answers or (), strict=False)
    return found


def _judge_images(
    scoring: ScoringRun, captioned: Sequence[tuple[str, str]], names: Sequence[str], progress: bool
) -> list[ItemScore]:
    from ..shapes import judge

    items = []
    for name in tqdm(names, desc="Judging", disable=not progress):
        family, prompt = captioned[int(Path(name).stem)]
        path = scoring.images / name
        right, reason = judge.check(read_image(path).convert("RGB"), prompt)
        parts = {group: (float(right), 1) for group in (family, "images")}
        items.append(ItemScore(name, parts, prompt, [str(path)], reason))
    return items


def _judge_answers(asked: Sequence[tuple[QA, Image.Image]], answers: Mapping[int, str]) -> list[ItemScore]:
    from ..shapes import captions

    items = []
    for place, (qa, _) in enumerate(asked):
        if (text := answers.get(place)) is not None:
            right = captions.answer_is_right(qa.kind, qa.answer, text)
            parts = {group: (float(right), 1) for group in (f"answer: {qa.kind}", "answers")}
            reason = f"expected {qa.answer!r}, got {text.strip()!r}"
            items.append(ItemScore(f"question {place:05d}", parts, qa.question, (), reason))
    return items


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
