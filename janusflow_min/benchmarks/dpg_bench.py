# SPDX-License-Identifier: MIT
"""DPG-Bench: does the image hold what a long, dense prompt says, question by question?

Reads ELLA's `prompts/*.txt` and `dpg_bench.csv`, writes one 2 x 2 grid for each prompt, `<stem>.png`, and scores such
grids from a question answerer's yes and no. Formats and rules follow TencentQQGYLab/ELLA
(`dpg_bench/compute_dpg_bench.py`). --official-compat has its defects as well; both totals are always reported.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import sha256
from ..options import SubsetOptions, option
from . import report as reports
from .bootstrap import ItemScore
from .dpg_answers import answers
from .dpg_rules import (
    L1,
    Question,
    Raw,
    categories,
    group,
    headline,
    is_yes,
    item_of,
    item_score,
    level_1_names,
    remarks,
)
from .judges import QuestionAnswerer
from .reading import read_text
from .report import Published
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, run
from .scoring import ChatOptions, ScoringRun
from .scoring import ScoreOptions as CommonOptions

TITLE = "DPG-Bench"
SUMMARY = "dense prompts, judged by questions: 1,065 prompts, 4 images each in a grid"
PROMPTS = 1065
PROMPTS_SHA256 = "c3101b252062b4d637b7e2a0dfa6c220081418b436324d5e098aa5d7202f2739"  # of the published ones
TILES = 4
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of grids made elsewhere
# Of dpg_bench.csv, those that are used:
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
PUBLISHED = (
    Published(
        "JanusFlow-1.3B, paper",
        "table 3 of arXiv 2411.07975, mPLUG; sampling settings not given",
        dict(zip(L1, (87.03, 87.31, 87.39, 89.79, 88.10), strict=True)),
        80.09,
    ),
    Published("JanusFlow-1.3B, TorchUMM", "its README: seed 42, guidance 2, 30 steps, mPLUG", {}, 72.03),
)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SubsetOptions):
    data: Path = option("folder of prompts: dpg_bench/prompts of ELLA", kind=Path)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(GenerateOptions, ChatOptions, CommonOptions):
    questions: Path = option("dpg_bench.csv of ELLA", kind=Path)
    resolution: int | None = option("side of a tile in px (default: half the grid's)", None, kind=int)
    tiles: int = option("judged of each grid, from the top left; 1 for single images", TILES, rule=True)
    answers: Path | None = option("saved answers.jsonl instead of a judge", None, kind=Path)
    vqa: str | QuestionAnswerer | None = option("folder or hub id of a BLIP that answers questions", None)
    judge_model: str | None = option("name of a chat model that answers instead", None)
    judge_url: str | None = option("its endpoint, up to /v1 (default: OpenAI's)", None)
    device: str = option("of a BLIP", "auto")
    official_compat: bool = option("score exactly as the official scorer does, defects included", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tiles <= TILES:
            raise ValueError(f"tiles must lie in [1, {TILES}], got {self.tiles}")
        if sum(x is not None for x in (self.answers, self.vqa, self.judge_model)) != 1:
            raise ValueError("give one of --answers, --vqa and --judge-model")


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


# Reading -----------------------------------------------------------------------


def read(folder: str | Path, subset: bool = False) -> dict[str, str]:
    """stem -> prompt, numeric stems first by value, then the others by name. ValueError for what does not fit."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data must be the folder of prompts, dpg_bench/prompts; {folder} is not a folder"
        )
    prompts = {}
    for path in sorted(folder.glob("*.txt"), key=lambda p: order(p.stem)):
        if "." in path.stem:
            raise ValueError(f"{path}: the official scorer cuts names at the first dot; rename it")
        prompts[path.stem] = read_text(path).strip()
        if not prompts[path.stem]:
            raise ValueError(f"{path}:1: the prompt is empty")
    if not prompts or (not subset and len(prompts) != PROMPTS):
        raise ValueError(
            f"{folder} holds {len(prompts)} prompts, DPG-Bench has {PROMPTS}; --subset accepts it"
        )
    return prompts


def order(stem: str) -> tuple[bool, int, str]:
    return (False, int(stem), stem) if stem.isdecimal() else (True, 0, stem)


def prompts_sha256(prompts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(prompts), ensure_ascii=False).encode()).hexdigest()


def read_rows(path: str | Path) -> list[tuple[str, Question]]:
    """(item id, question) of every row. ValueError with file and line."""
    found = []
    rows = csv.DictReader(io.StringIO(read_text(path)))
    lacking = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if lacking:
        raise ValueError(
            f"{path}:1: the columns {', '.join(lacking)} are missing; there are {rows.fieldnames}"
        )
    try:
        for row in rows:
            found.append((row["item_id"], _question(row, f"{path}:{rows.line_num}")))
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no question; dpg_bench.csv has 14,391 or so")
    return found


def _question(row: Mapping[str, Any], place: str) -> Question:
    if empty := [name for name in COLUMNS if not (row[name] or "").strip()]:
        raise ValueError(f"{place}: {', '.join(empty)} must not be empty")
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(part) for part in row["dependency"].split(","))
    except ValueError:
        raise ValueError(
            f"{place}: proposition_id and dependency must be whole numbers, the latter separated by commas, got "
            f"{row['proposition_id']!r} and {row['dependency']!r}"
        ) from None
    l2 = row["tuple"].split("(")[0].strip()
    l1 = l2.split("-")[0].strip()
    return Question(number, tuple(p for p in parents if p != 0), l1, l2, row["question_natural_language"])


def items(prompts: Mapping[str, str]) -> list[Item]:
    return [Item(i, prompt, (f"{stem}.png",)) for i, (stem, prompt) in enumerate(prompts.items())]


def generate(settings: Settings, out: str | Path, options: GenerateOptions) -> Coverage:
    """Make `out`/images/<stem>.png, four images as one grid."""
    prompts = read(options.data, options.subset)
    inputs = {"prompts": prompts_sha256(prompts)}
    return run("dpg_bench", items(prompts), inputs, out, TILES, settings, compose=lambda four: [grid(four)])


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Four images as 2 x 2: top left, top right, bottom left, bottom right, without a margin."""
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, 2 * height))
    for i, image in enumerate(images):
        whole.paste(image, (i % 2 * width, i // 2 * height))
    return whole


# Scoring -----------------------------------------------------------------------


def find_grids(root: Path, stems: Iterable[str], official_compat: bool = False) -> list[str]:
    """The files that are grids of `stems`, in their order. ValueError for two of one; official_compat: both count."""
    place = {stem: i for i, stem in enumerate(stems)}
    there = [path.name for path in root.iterdir() if path.is_file()] if root.is_dir() else []
    found = [name for name in there if item_of(name) in place]
    if not official_compat:
        found = [name for name in found if Path(name).suffix.lower() in SUFFIXES]
        twice = [stem for stem, n in Counter(map(item_of, found)).items() if n > 1]
        if twice:
            names = sorted(name for name in found if item_of(name) == twice[0])
            raise ValueError(f"{root} has several images of {twice[0]}: {', '.join(names)}")
    if not found:
        raise FileNotFoundError(f"no image named after a prompt, {next(iter(place))}.png for one, in {root}")
    return sorted(found, key=lambda name: (place[item_of(name)], name))


def score(run: str | Path, options: ScoreOptions) -> dict[str, Any]:
    """Judge a folder of grids; writes answers.jsonl, items.json and score.json into `run` and returns the score."""
    compat, tiles = options.official_compat, options.tiles
    prompts, rows = read(options.data, options.subset), read_rows(options.questions)
    asked, asked_officially = group(rows), group(rows, official_compat=True)
    if not any(stem in asked for stem in prompts):
        raise ValueError(
            f"{options.questions} has no question about any prompt, {next(iter(prompts))} for one"
        )
    digest = prompts_sha256(prompts)
    inputs = {"prompts": digest, "dpg_bench.csv": sha256(options.questions)}
    scoring = ScoringRun("dpg_bench", run, options, inputs, published=digest == PROMPTS_SHA256)
    prompts = dict(list(prompts.items())[: options.limit])
    stems = asked if compat and options.limit is None else [stem for stem in prompts if stem in asked]
    files = scoring.whole(find_grids(scoring.images, stems, compat), "after a prompt")
    judge, said = answers(scoring, options, files, asked)
    if options.dry_run:
        requests = sum(len(asked[item_of(file)]) for file in files if file not in said) * tiles
        return {"benchmark": "dpg_bench", "dry_run": f"{requests:,} questions to ask"}
    if not said:
        reason = f": {next(iter(scoring.failures.values()))}" if scoring.failures else ""
        raise ValueError(f"no answers about the images of {scoring.images}{reason}")
    raw, raw_officially = (
        {
            file: [{int(q): int(is_yes(text, exactly)) for q, text in tile.items()} for tile in by_tile]
            for file, by_tile in said.items()
        }
        for exactly in (False, True)
    )
    totals = {
        "score by the rules as they are meant": headline(asked, raw),
        "score as the official scorer computes it (first row skipped, exact yes)": headline(
            asked_officially, raw_officially, official_compat=True
        ),
    }
    chosen, answered = (asked_officially, raw_officially) if compat else (asked, raw)
    l1, l2 = (categories(chosen, answered, level, compat) for level in ("l1", "l2"))
    expected = Counter(q.l1 for stem in prompts for q in chosen.get(stem, ()))
    if any(item_of(file) not in prompts for file in said):
        scoring.departures.append("there are images of other prompts")
    scoring.notes += [*remarks(rows, prompts), *_notes(judge, said)]
    scoring.notes += [f"{name}: {value:.2f} ({n:,} answers)" for name, (value, n) in sorted(l2.items())]
    per_tile = 1 if compat else tiles
    return scoring.write(
        headline=("DPG-Bench score", list(totals.values())[compat]),
        scale=100.0,
        scores={name: (*l1.get(name, (None, 0)), per_tile * expected[name]) for name in level_1_names(asked)},
        n_expected=len(prompts),
        n_scored=len({item_of(file) for file in said} & set(prompts)),
        judge={"vqa": judge},
        items=_items(scoring, chosen, answered, said, compat, prompts, {"l1": l1, "l2": l2}),
        totals={"DPG-Bench score": {"item": 1.0}},
        options={"resolution": options.resolution, "official_compat": compat},
        others=totals,
    )


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, PUBLISHED)


def _items(
    scoring: ScoringRun,
    questions: Mapping[str, Sequence[Question]],
    raw: Mapping[str, Raw],
    said: Mapping[str, Any],
    official_compat: bool,
    prompts: Mapping[str, str],
    levels: Mapping[str, Any],
) -> list[ItemScore]:
    """What the table is made of, by the same rules; written to items.json as well."""
    records, items = [], []
    for file, by_tile in raw.items():
        own, item = questions.get(item_of(file), ()), item_of(file)
        scores = item_score(own, by_tile, official_compat)
        mean = None if scores is None else float(np.mean(scores))
        about = {"item_id": item, "file": file, "tile_scores": scores, "score": mean}
        records.append(about | {"answers": said[file]})
        if mean is not None:
            pooled = categories(questions, {file: by_tile}, "l1", official_compat)
            parts = {"item": (100 * mean, 1)} | {name: (v * n, n) for name, (v, n) in pooled.items()}
            failed = [q.text for q in own if not all(tile[q.id] for tile in by_tile)]
            path = str(scoring.images / file)
            items.append(ItemScore(file, parts, prompts.get(item, ""), [path], "\n".join(failed)))
    whole = {"official_compat": official_compat, "items": records} | dict(levels)
    scoring.folder.write_json("items.json", whole)
    return items


def _notes(judge: str, said: Mapping[str, Any]) -> list[str]:
    notes = []
    if "mplug" not in judge.lower():
        notes.append("not judged by mPLUG, as every published number is: not comparable with them")
    texts = [text for by_tile in said.values() for tile in by_tile for text in tile.values()]
    neither = [text for text in texts if not re.match(r"(?i)\W*(yes|no)\b", text)]
    if neither:
        notes.append(
            f"{len(neither):,} of {len(texts):,} answers are neither yes nor no and count as no: {neither[0][:50]!r}"
        )
    return notes
