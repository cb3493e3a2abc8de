# SPDX-License-Identifier: MIT
"""DPG-Bench: does the picture hold what a long, dense prompt says, question by question?

Reads ELLA's `prompts/*.txt` and `dpg_bench.csv`, writes one 2 x 2 grid for each prompt, `<stem>.png`, and scores such
grids from a question answerer's yes and no. Formats and rules follow TencentQQGYLab/ELLA
(`dpg_bench/compute_dpg_bench.py`). Its known defects are offered as `--official-compat`: the headline is always told
both ways, the categories one.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import report as reports
from .report import Published
from .runner import Coverage, Item, Option, RunFolder, Settings, read_json, run, sha256

if TYPE_CHECKING:
    from .judges import QuestionAnswerer

TITLE = "DPG-Bench"
SUMMARY = "dense prompts, judged by questions: 1,065 prompts, 4 images each in a grid"
PROMPTS = 1065
TILES = 4
COLUMNS = (
    "item_id",
    "proposition_id",
    "dependency",
    "tuple",
    "question_natural_language",
)  # those that are used
L1 = ("global", "entity", "attribute", "relation", "other")
PUBLISHED = (
    Published(
        "JanusFlow-1.3B, paper",
        "table 3 of arXiv 2411.07975, mPLUG; sampling settings not given",
        dict(zip(L1, (87.03, 87.31, 87.39, 89.79, 88.10), strict=True)),
        80.09,
    ),
    Published("JanusFlow-1.3B, TorchUMM", "its README: seed 42, guidance 2, 30 steps, mPLUG", {}, 72.03),
)
SUBSET = Option(
    "--subset", "accept another number of prompts than the benchmark's; no headline then", False, bool
)
DATA = Option("--data", "folder of prompts: dpg_bench/prompts of ELLA", kind=Path, required=True)
OPTIONS = {
    "generate": (DATA, SUBSET),
    "score": (
        DATA,
        Option("--questions", "dpg_bench.csv of ELLA", kind=Path, required=True),
        SUBSET,
        Option("--images", "folder of grids made elsewhere, instead of the run's", kind=Path),
        Option("--resolution", "side of a tile in px; without: half the grid's", kind=int),
        Option("--tiles", "judged of each grid, from the top left; 1 for single images", TILES, int),
        Option("--answers", "saved answers.jsonl instead of a judge", kind=Path),
        Option("--vqa", "folder or hub id of a BLIP that answers questions"),
        Option("--judge-model", "name of a chat model that answers instead"),
        Option("--judge-url", "its endpoint, up to /v1; without: OpenAI's"),
        Option("--concurrency", "requests at once to it", 8, int),
        Option("--attempts", "for each question to it", 3, int),
        Option("--device", "of the judge", "auto"),
        Option("--official-compat", "categories as the official scorer computes them", False, bool),
    ),
    "report": (),
}


# Reading -----------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: int  # 1-based within its item
    parents: tuple[int, ...]
    l1: str
    l2: str
    text: str


def read(folder: str | Path, subset: bool = False) -> dict[str, str]:
    """stem -> prompt, numeric stems first by value, then the others by name. ValueError for what does not fit."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data must be the folder of prompts, dpg_bench/prompts; {folder} is none")
    prompts = {}
    for path in sorted(folder.glob("*.txt"), key=lambda p: order(p.stem)):
        if "." in path.stem:
            raise ValueError(f"{path}: the official scorer cuts names at the first dot; rename it")
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:1: not UTF-8 text: {error}") from None
        if not text:
            raise ValueError(f"{path}:1: the prompt is empty")
        prompts[path.stem] = text
    if not prompts or (not subset and len(prompts) != PROMPTS):
        raise ValueError(
            f"{folder} holds {len(prompts)} prompts, DPG-Bench has {PROMPTS}; --subset accepts it"
        )
    return prompts


def order(stem: str) -> tuple[bool, int, str]:
    return (False, int(stem), stem) if stem.isdecimal() else (True, 0, stem)


def prompts_sha256(prompts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(prompts), ensure_ascii=False).encode()).hexdigest()


def read_questions(path: str | Path, skip_first: bool = False) -> dict[str, list[Question]]:
    """item id -> its questions in the file's order. ValueError with file and line.

    skip_first: without the first row of data, as the official scorer reads it (ELLA issue 61). Questions may then
    depend on what is not there.
    """
    path, questions = Path(path), {}
    first = None
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        lacking = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{path}:1: the columns {', '.join(lacking)} are missing; there are {rows.fieldnames}"
            )
        for row in rows:
            place = f"{path}:{rows.line_num}"
            question = _question(row, place)
            known = questions.setdefault(row["item_id"], [])
            if any(question.id == other.id for other in known):
                raise ValueError(f"{place}: {row['item_id']} has a question {question.id} already")
            known.append(question)
            first = first or (row["item_id"], question)
    if first is None:
        raise ValueError(f"{path} holds no question; dpg_bench.csv has 14,391 or so")
    for item, known in questions.items():
        ids = {question.id for question in known}
        for question in known:
            if absent := set(question.parents) - ids:
                raise ValueError(
                    f"{path}: question {question.id} of {item} depends on {sorted(absent)}, which {item} lacks"
                )
    if skip_first:
        questions[first[0]] = questions[first[0]][1:]
    return questions


def _question(row: Mapping[str, str | None], place: str) -> Question:
    if any(row[name] is None or not row[name].strip() for name in COLUMNS):
        raise ValueError(
            f"{place}: {', '.join(n for n in COLUMNS if not (row[n] or '').strip())} must not be empty"
        )
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(part) for part in row["dependency"].split(","))
    except ValueError:
        raise ValueError(
            f"{place}: proposition_id and dependency must be whole numbers, the latter separated by commas, got "
            f"{row['proposition_id']!r} and {row['dependency']!r}"
        ) from None
    l2 = row["tuple"].split("(")[0].strip()
    return Question(
        number,
        tuple(p for p in parents if p != 0),
        l2.split("-")[0].strip(),
        l2,
        row["question_natural_language"],
    )


def items(prompts: Mapping[str, str]) -> list[Item]:
    return [Item(i, prompt, (f"{stem}.png",)) for i, (stem, prompt) in enumerate(prompts.items())]


def generate(settings: Settings, out: str | Path, data: str | Path, subset: bool = False) -> Coverage:
    """Paint `out`/images/<stem>.png, four images as one grid."""
    prompts = read(data, subset)
    inputs = {"prompts": prompts_sha256(prompts)}
    return run("dpg_bench", items(prompts), inputs, out, TILES, settings, compose=lambda four: [grid(four)])


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Four images as 2 x 2: top left, top right, bottom left, bottom right, without a margin."""
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, 2 * height))
    for i, image in enumerate(images):
        whole.paste(image, (i % 2 * width, i // 2 * height))
    return whole


def tiles(whole: Image.Image, count: int, resolution: int | None = None) -> list[Image.Image]:
    """The first tiles of a grid. ValueError where the resolution is not the grid's, which the official scorer would
    cut silently."""
    across = 1 if count == 1 and resolution == whole.width else 2
    side = whole.width // across if resolution is None else resolution
    if whole.width != whole.height or whole.width != across * side:
        raise ValueError(
            f"a grid of tiles of {side} px must be {2 * side} px wide and high, got {whole.size}"
        )
    return [
        whole.crop((x, y, x + side, y + side))
        for x, y in [(0, 0), (side, 0), (0, side), (side, side)][:count]
    ]


# Rules -----------------------------------------------------------------------


def is_yes(answer: str, compat: bool = False) -> bool:
    """compat: exactly "yes", as the official scorer has it; else its first word, case and punctuation aside."""
    if compat:
        return answer == "yes"
    words = answer.strip().lower().split()
    return bool(words) and words[0].strip(".,;:!\"'*") == "yes"


def propagate(questions: Sequence[Question], raw: Mapping[int, int]) -> dict[int, int]:
    """A question any of whose parents has 0 gets 0: in the file's order and in place, so failures cascade forward."""
    scores = {question.id: raw[question.id] for question in questions}
    for question in questions:
        if any(scores[parent] == 0 for parent in question.parents):
            scores[question.id] = 0
    return scores


def item_score(questions: Sequence[Question], raw: Sequence[Mapping[int, int]]) -> list[float]:
    """The score of every tile: the mean over questions after `propagate`."""
    return [float(np.mean(list(propagate(questions, tile).values()))) for tile in raw]


def categories(
    questions: Mapping[str, Sequence[Question]],
    raw: Mapping[str, Sequence[Mapping[int, int]]],
    level: str,
    compat: bool = False,
) -> dict[str, tuple[float, int]]:
    """category -> (score of 100, questions asked), a mean over pooled questions.

    level: "l1" or "l2". compat: raw answers of the last tile alone, as the official scorer has it (ELLA issue 60);
    else all tiles, dependencies applied.
    """
    pooled: dict[str, list[int]] = {}
    for item, by_tile in raw.items():
        if not _whole(questions[item]):
            continue
        for tile in by_tile[-1:] if compat else by_tile:
            scores = tile if compat else propagate(questions[item], tile)
            for question in questions[item]:
                pooled.setdefault(getattr(question, level), []).append(scores[question.id])
    return {name: (100 * float(np.mean(values)), len(values)) for name, values in pooled.items()}


def headline(
    questions: Mapping[str, Sequence[Question]], raw: Mapping[str, Sequence[Mapping[int, int]]]
) -> float | None:
    """Mean of the items' scores, of 100. An item whose questions depend on one that is not there, or that has none,
    is dropped, as the official scorer drops it."""
    whole = {item: by_tile for item, by_tile in raw.items() if _whole(questions[item])}
    scores = [float(np.mean(item_score(questions[item], by_tile))) for item, by_tile in whole.items()]
    return 100 * float(np.mean(scores)) if scores else None


def _whole(questions: Sequence[Question]) -> bool:
    ids = {question.id for question in questions}
    return bool(ids) and all(set(question.parents) <= ids for question in questions)


# Scoring -----------------------------------------------------------------------


def score(
    run: str | Path,
    data: str | Path,
    questions: str | Path,
    subset: bool = False,
    images: str | Path | None = None,
    resolution: int | None = None,
    tiles: int = TILES,
    answers: str | Path | None = None,
    vqa: str | QuestionAnswerer | None = None,
    judge_model: str | None = None,
    judge_url: str | None = None,
    device: str = "auto",
    official_compat: bool = False,
    concurrency: int = 8,
    attempts: int = 3,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge a folder of grids; writes answers.jsonl, items.json and score.json into `run` and returns the score."""
    if not 1 <= tiles <= TILES:
        raise ValueError(f"tiles must lie in [1, {TILES}], got {tiles}")
    folder = RunFolder(run)
    root = folder.images if images is None else Path(images)
    prompts, asked = read(data, subset), read_questions(questions)
    without = [stem for stem in prompts if stem not in asked]
    if without:
        raise ValueError(f"{questions} has no question about {len(without)} prompts, {without[0]} for one")
    inputs = {"prompts": prompts_sha256(prompts), "dpg_bench.csv": sha256(questions)}
    manifest = read_json(folder.manifest) if folder.manifest.is_file() and images is None else None
    reports.check_inputs(manifest, "dpg_bench", inputs, folder.root)
    there = [stem for stem in prompts if (root / f"{stem}.png").is_file()]
    if not there:
        raise FileNotFoundError(
            f"no image named after a prompt, {next(iter(prompts))}.png for one, in {root}"
        )
    if sum(x is not None for x in (answers, vqa, judge_model)) != 1:
        raise ValueError("give one of --answers, --vqa and --judge-model")
    if answers is not None:
        said, name, failures = (
            read_answers(answers, asked, tiles),
            f"saved answers, sha256 {sha256(answers)}",
            {},
        )
    else:
        judge, at_once = _judge(vqa, judge_model, judge_url, device, concurrency, attempts)
        name = judge.name
        said, failures = _ask(folder, root, there, asked, resolution, tiles, judge, at_once, progress)
    there = [stem for stem in there if stem in said]
    if not there:
        reason = f": {next(iter(failures.values()))}" if failures else ""
        raise ValueError(f"no answers about the images of {root}{reason}")
    raw, raw_compat = (
        {
            stem: [{int(q): int(is_yes(text, compat)) for q, text in tile.items()} for tile in said[stem]]
            for stem in there
        }
        for compat in (False, True)
    )
    compat_questions = read_questions(questions, skip_first=True)
    ours, official = headline(asked, raw), headline(compat_questions, raw_compat)
    chosen, answered = (compat_questions, raw_compat) if official_compat else (asked, raw)
    l1 = categories(chosen, answered, "l1", official_compat)
    l2 = categories(chosen, answered, "l2", official_compat)
    per_tile = 1 if official_compat else tiles
    of = {
        name: per_tile * sum(q.l1 == name for stem in prompts for q in chosen[stem]) for name in _names(asked)
    }
    folder.write_json(
        folder.root / "items.json",
        {
            "judge": name,
            "items": [
                {
                    "item_id": stem,
                    "tile_scores": (tile_scores := item_score(asked[stem], raw[stem])),
                    "score": float(np.mean(tile_scores)),
                    "answers": said[stem],
                }
                for stem in there
            ],
            "l1": l1,
            "l2": l2,
        },
    )
    notes = [f"{key}: {value:.2f} ({n:,} answers)" for key, (value, n) in sorted(l2.items())]
    if "mplug" not in name.lower():
        notes.insert(0, "not judged by mPLUG, as every published number is: not comparable with them")
    if failures:
        some = "; ".join(f"{stem}: {reason}" for stem, reason in list(failures.items())[:3])
        notes.insert(
            0, f"{len(failures)} grids got no answers and are left out; the next run asks again. {some}"
        )
    if tiles != TILES:
        notes.insert(0, f"{tiles} of the {TILES} tiles judged")
    return reports.write_score(
        folder,
        reports.Score(
            "dpg_bench",
            headline=("DPG-Bench score", official if official_compat else ours),
            scale=100.0,
            standard=len(prompts) == PROMPTS,
            n_expected=len(prompts),
            n_scored=len(there),
            scores={key: (l1.get(key, (None, 0))[0], l1.get(key, (None, 0))[1], of[key]) for key in of},
            judge={"vqa": name},
            options={
                "tiles": tiles,
                "resolution": resolution,
                "official_compat": official_compat,
                "yes": 'exactly "yes"' if official_compat else "first word, case and punctuation aside",
            },
            inputs=inputs,
            manifest=manifest,
            notes=notes,
            others={
                "score by the rules as they are meant": ours,
                "score as the official scorer computes it (first row skipped, exact yes)": official,
            },
        ),
    )


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, PUBLISHED)


def _names(questions: Mapping[str, Sequence[Question]]) -> list[str]:
    """The first-level categories that the questions have, the published order first."""
    there = dict.fromkeys(q.l1 for group in questions.values() for q in group)
    return [name for name in L1 if name in there] + [name for name in there if name not in L1]


def read_answers(
    path: str | Path, questions: Mapping[str, Sequence[Question]], count: int
) -> dict[str, list[dict[str, str]]]:
    """item id -> answers of every tile by question, of a JSON-lines file of {"item_id", "answers": [{"1": "yes", …},
    …]}. ValueError with file and line for a tile or a question that lacks an answer."""
    path, said = Path(path), {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
            item, by_tile = record["item_id"], record["answers"]
            by_tile = [{str(q): str(text) for q, text in tile.items()} for tile in by_tile]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{place}: a line needs {{"item_id", "answers": [{{"1": "yes", …}}, …]}}: {error!r}'
            ) from None
        if item not in questions:
            raise ValueError(f"{place}: no question about {item!r}")
        lacking = [q.id for q in questions[item] for tile in by_tile[:count] if str(q.id) not in tile]
        if len(by_tile) < count or lacking:
            raise ValueError(
                f"{place}: {count} tiles with answers to questions {[q.id for q in questions[item]]} are needed, got "
                f"{len(by_tile)} tiles{f', question {lacking[0]} is missing' if lacking else ''}"
            )
        said[item] = by_tile[:count]
    return said


def _judge(
    vqa: str | QuestionAnswerer | None,
    judge_model: str | None,
    judge_url: str | None,
    device: str,
    concurrency: int,
    attempts: int,
) -> tuple[QuestionAnswerer, int]:
    """The judge, and how many questions it may be asked at once."""
    from .chat import ChatVQA, OpenAIChat
    from .judge_models import BlipVQA

    if judge_model is not None:
        return ChatVQA(OpenAIChat(judge_model, judge_url, max_tokens=20), attempts), concurrency
    return (BlipVQA(vqa, device) if isinstance(vqa, str) else vqa), 1


def _ask(
    folder: RunFolder,
    root: Path,
    stems: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
    resolution: int | None,
    count: int,
    vqa: QuestionAnswerer,
    at_once: int,
    progress: bool,
) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Every question about every tile of every grid, answers on disk taken where they are about the same; and the
    reasons why grids got none."""
    from concurrent.futures import ThreadPoolExecutor

    from . import judges

    records = judges.Records(folder.root / "answers.jsonl", "item_id", {"judge": vqa.name, "tiles": count})
    seen = {
        stem: hashlib.sha256(
            f"{sha256(root / f'{stem}.png')} {resolution} {questions[stem]}".encode()
        ).hexdigest()
        for stem in stems
    }
    failures: dict[str, str] = {}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            todo = [stem for stem in stems if not records.has(stem, seen[stem])]
            for stem in judges.bar(todo, "Asking", progress):
                with Image.open(root / f"{stem}.png") as opened:
                    cut = tiles(opened.convert("RGB"), count, resolution)
                pairs = [(tile, question) for tile in cut for question in questions[stem]]
                try:
                    texts = list(pool.map(lambda pair: vqa.answer(pair[0], pair[1].text), pairs))
                except judges.NoAnswer as error:  # left out, never given a number
                    failures[stem] = str(error)
                    continue
                n = len(questions[stem])
                ids = [str(question.id) for question in questions[stem]]
                by_tile = [dict(zip(ids, texts[i * n : i * n + n], strict=True)) for i in range(len(cut))]
                records.add(stem, seen[stem], {"answers": by_tile})
    finally:
        records.close()
    said = {stem: records.entries[stem]["answers"] for stem in stems if records.has(stem, seen[stem])}
    return said, failures
