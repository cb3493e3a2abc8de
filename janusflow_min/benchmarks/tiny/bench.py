# SPDX-License-Identifier: MIT
"""The tiny world as a benchmark that runs anywhere: held-out prompts painted, held-out questions answered.

No data and no judge from outside: prompts and questions are drawn from a seed, pictures are read by `reader`, answers
by `language.answer_is_right`. What is asked is `evaluate`'s; the stages are those of every benchmark here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .. import report as reports
from ..bootstrap import ItemScore
from ..options import option
from ..runner import (
    Coverage,
    Item,
    RankInfo,
    RunFolder,
    Settings,
    blocks,
    check_settings,
    checkpoint_identity,
    cpu_threads,
    is_whole,
    load_pipe,
    paint,
    paint_settings,
    read_json,
    shard,
    write_manifest,
)
from ..scoring import ScoreOptions as CommonOptions
from ..scoring import ScoringRun

TITLE = "The tiny world"
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


def read(cases: int = 100, draw_seed: int = 0) -> tuple[list[tuple[str, str]], list]:
    """(family, prompt) pairs, and (question, picture) pairs."""
    from . import evaluate

    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    return evaluate.prompts(cases, draw_seed), evaluate.questions(cases, draw_seed)


def generate(settings: Settings, out: str | Path, options: GenerateOptions = GenerateOptions()) -> Coverage:
    """Generate `out`/images/NNNNN.png and answer into `out`/answers/NNNNN.json, a block of questions each."""
    cases, draw_seed = options.cases, options.draw_seed
    world, folder = RankInfo.from_environment(), RunFolder(out)
    check_settings(settings)
    prompts, questions = read(cases, draw_seed)
    asked = json.dumps([prompts, [(qa.kind, qa.question, qa.answer) for qa, _ in questions]])
    write_manifest(
        folder,
        "tiny",
        {"drawn": hashlib.sha256(asked.encode()).hexdigest()},
        paint_settings(settings) | {"images_per_prompt": 1, "cases": cases, "draw_seed": draw_seed},
        checkpoint_identity(settings),
    )
    items = [Item(i, prompt, (f"{i:05d}.png",)) for i, (_, prompt) in enumerate(prompts)]
    pipes: list = []

    def pipe():
        if not pipes:
            pipes.append(load_pipe(settings, world, "all"))
        return pipes[0]

    with cpu_threads(settings.threads):
        found = paint(pipe, folder, items, 1, settings, world)
        _answer(pipe, folder, questions, settings, world)
    return found


def _answer(
    pipe: Callable[[], Any], folder: RunFolder, questions: Sequence, settings: Settings, world: RankInfo
) -> None:
    share = shard(list(enumerate(blocks(questions, 1, settings.batch_size))), world.rank, world.size)
    hidden = not settings.progress or world.local_rank != 0
    for i, block in tqdm(share, desc="Answering", unit="batch", disable=hidden):
        path = folder.root / "answers" / f"{i:05d}.json"
        if path.is_file() or (settings.limit is not None and i * settings.batch_size >= settings.limit):
            continue
        answers = pipe().understand(
            [qa.question for qa, _ in block], [picture for _, picture in block], max_new_tokens=ANSWER_TOKENS
        )
        folder.write_json(path, [answer.text for answer in answers])


def score(run: str | Path, options: ScoreOptions = ScoreOptions()) -> dict[str, Any]:
    """Judge images and answers; writes item_scores.jsonl and score.json into `run`. ValueError below a given share."""
    from . import language, reader

    folder = RunFolder(run)
    if not folder.manifest.is_file():
        raise FileNotFoundError(f"{folder.manifest} is missing: run the stage `generate` first")
    manifest = read_json(folder.manifest)
    scoring = ScoringRun("tiny", run, options, manifest["inputs_sha256"], published=True)
    settings = manifest["settings"]
    prompts, questions = read(settings["cases"], settings["draw_seed"])
    items = []
    for i, (family, prompt) in enumerate(
        tqdm(prompts[: options.limit], desc="Judging", disable=not options.progress)
    ):
        path = scoring.images / f"{i:05d}.png"
        if is_whole(path):
            with Image.open(path) as image:
                right, reason = reader.check(image.convert("RGB"), prompt)
            parts = {group: (float(right), 1) for group in (family, "images")}
            items.append(ItemScore(path.name, parts, prompt, [str(path)], reason))
    size = settings["batch_size"]
    for k, block in enumerate(blocks(questions[: options.limit], 1, size)):
        path = folder.root / "answers" / f"{k:05d}.json"
        for i, ((qa, _), text) in enumerate(
            zip(block, read_json(path) if path.is_file() else [], strict=False)
        ):
            right = language.answer_is_right(qa.kind, qa.answer, text)
            parts = {group: (float(right), 1) for group in (f"answer: {qa.kind}", "answers")}
            reason = f"expected {qa.answer!r}, got {text.strip()!r}"
            items.append(ItemScore(f"question {k * size + i:05d}", parts, qa.question, (), reason))
    if not items:
        raise FileNotFoundError(f"neither images nor answers in {folder.root}")

    def share(group: str) -> tuple[float | None, int, int]:
        values = [item.parts[group][0] for item in items if group in item.parts]
        return sum(values) / len(values) if values else None, len(values), settings["cases"]

    groups = dict.fromkeys(
        [*(family for family, _ in prompts), *(f"answer: {qa.kind}" for qa, _ in questions)]
    )
    images, answers = share("images"), share("answers")
    result = scoring.write(
        headline=("images right", images[0]),
        scale=1.0,
        scores={group: share(group) for group in groups},
        n_expected=len(prompts) + len(questions),
        n_scored=len(items),
        judge={"rules": "of this package"},
        items=items,
        totals={"images right": {"images": 1.0}, "answers right": {"answers": 1.0}},
        options={"cases": settings["cases"], "draw_seed": settings["draw_seed"]},
        others={"answers right": answers[0]},
    )
    for name, (value, n, _), least in (
        ("images", images, options.at_least),
        ("answers", answers, options.answers_at_least),
    ):
        if least is not None and (not result["complete"] or (value or 0.0) < least):
            raise ValueError(
                f"{value or 0.0:.1%} of {n} {name} are right, at least {least:.1%} are needed"
                + ("" if result["complete"] else f"; {reports.summary(result)}")
            )
    return result


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
