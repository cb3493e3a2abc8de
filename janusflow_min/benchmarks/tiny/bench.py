# SPDX-License-Identifier: MIT
"""The tiny world as a benchmark that runs anywhere: held-out prompts painted, held-out questions answered.

No data and no judge from outside: prompts and questions are drawn from a seed, pictures are read by `reader`, answers
by `language.answer_is_right`. What is asked is `evaluate`'s; the stages are those of every benchmark here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .. import report as reports
from ..runner import (
    Coverage,
    Item,
    Option,
    RunFolder,
    Settings,
    World,
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

TITLE = "The tiny world"
SUMMARY = "the default's world: held-out prompts and questions, no data needed"
ANSWER_TOKENS = 48
CASES = Option("--cases", "prompts for each of six families, questions for each of six kinds", 100, int)
DRAW = Option("--draw-seed", "from which prompts and questions are drawn", 0, int)
OPTIONS = {
    "generate": (CASES, DRAW),
    "score": (
        Option("--at-least", "fail where a smaller share of the pictures is right", None, float),
        Option("--answers-at-least", "fail where a smaller share of the answers is right", None, float),
    ),
    "report": (),
}


def read(cases: int = 100, draw_seed: int = 0) -> tuple[list[tuple[str, str]], list]:
    """(family, prompt) pairs, and (question, picture) pairs."""
    from . import evaluate

    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    return evaluate.prompts(cases, draw_seed), evaluate.questions(cases, draw_seed)


def generate(settings: Settings, out: str | Path, cases: int = 100, draw_seed: int = 0) -> Coverage:
    """Paint `out`/images/NNNNN.png and answer into `out`/answers/NNNNN.json, a block of questions each."""
    world, folder = World.from_environment(), RunFolder(out)
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


def _answer(pipe, folder: RunFolder, questions: list, settings: Settings, world: World) -> None:
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


def score(
    run: str | Path,
    at_least: float | None = None,
    answers_at_least: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge pictures and answers; writes cases.json and score.json into `run`. ValueError below a given share."""
    from . import evaluate, language, reader

    folder = RunFolder(run)
    if not folder.manifest.is_file():
        raise FileNotFoundError(f"{folder.manifest} is missing: run the stage `generate` first")
    manifest = read_json(folder.manifest)
    settings = manifest["settings"]
    prompts, questions = read(settings["cases"], settings["draw_seed"])
    painted, answered = [], []
    for i, (family, prompt) in enumerate(tqdm(prompts, desc="Judging", disable=not progress)):
        path = folder.images / f"{i:05d}.png"
        if is_whole(path):
            with Image.open(path) as picture:
                right, reason = reader.check(picture.convert("RGB"), prompt)
            painted.append(evaluate.Case(family, prompt, right, reason))
    for i, block in enumerate(blocks(questions, 1, settings["batch_size"])):
        path = folder.root / "answers" / f"{i:05d}.json"
        if path.is_file():
            for (qa, _), text in zip(block, read_json(path), strict=True):
                right = language.answer_is_right(qa.kind, qa.answer, text)
                reason = f"expected {qa.answer!r}, got {text.strip()!r}"
                answered.append(evaluate.Case(qa.kind, qa.question, right, reason))
    if not painted and not answered:
        raise FileNotFoundError(f"neither pictures nor answers in {folder.root}")
    pictures, answers = evaluate.score(painted), evaluate.score(answered)
    rows = {
        f"{what}{group}": (s.share if s.total else None, s.total, settings["cases"])
        for what, scores, groups in (
            ("", pictures, dict.fromkeys(family for family, _ in prompts)),
            ("answer: ", answers, dict.fromkeys(qa.kind for qa, _ in questions)),
        )
        for group, s in ((group, scores.get(group, evaluate.Score(0, 0))) for group in groups)
    }
    folder.write_json(
        folder.root / "cases.json",
        {"pictures": [vars(case) for case in painted], "answers": [vars(case) for case in answered]},
    )
    notes = []
    for name, s in (("pictures", pictures["all"]), ("answers", answers["all"])):
        low, high = s.interval
        notes.append(f"{name}: {s.right} of {s.total} right, 95 % interval {low:.1%} to {high:.1%}")
    result = reports.write_score(
        folder,
        reports.Score(
            "tiny",
            headline=("pictures right", pictures["all"].share),
            scale=1.0,
            standard=True,
            n_expected=len(prompts) + len(questions),
            n_scored=len(painted) + len(answered),
            scores=rows,
            judge={"reader": "the rules of benchmarks/tiny"},
            options={"cases": settings["cases"], "draw_seed": settings["draw_seed"]},
            inputs=manifest["inputs_sha256"],
            manifest=manifest,
            notes=notes,
            others={"answers right": answers["all"].share},
        ),
    )
    for name, s, least in (("pictures", pictures, at_least), ("answers", answers, answers_at_least)):
        if least is not None and (not result["complete"] or s["all"].share < least):
            raise ValueError(
                f"{s['all'].share:.1%} of {s['all'].total} {name} are right, at least {least:.1%} are needed"
                + ("" if result["complete"] else f"; {reports.summary(result)}")
            )
    return result


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
