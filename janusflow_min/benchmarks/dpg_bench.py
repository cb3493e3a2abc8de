# SPDX-License-Identifier: MIT
"""DPG-Bench: does the image hold what a long, dense prompt says, question by question?

Reads ELLA's `prompts/*.txt` and `dpg_bench.csv`, writes one 2 x 2 grid for each prompt, `<stem>.png`, and scores such
grids from a question answerer's yes and no. Formats and rules follow TencentQQGYLab/ELLA
(`dpg_bench/compute_dpg_bench.py`). --official-compat has its defects as well; the headline is always told both ways.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import sha256
from ..options import SubsetOptions, option
from . import report as reports
from .bootstrap import ItemScore
from .chat import ChatVQA, judge_settings
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
from .judge_models import BlipVQA
from .judges import NoAnswer, QuestionAnswerer, Records, bar
from .reading import UnreadableImage, json_lines, read_image, read_text
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
ANSWER_TOKENS = 20  # of a chat judge
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of grids made elsewhere
COLUMNS = (
    "item_id",
    "proposition_id",
    "dependency",
    "tuple",
    "question_natural_language",
)  # those that are used
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
    resolution: int | None = option("side of a tile in px; without: half the grid's", None, kind=int)
    tiles: int = option("judged of each grid, from the top left; 1 for single images", TILES, rule=True)
    answers: Path | None = option("saved answers.jsonl instead of a judge", None, kind=Path)
    vqa: str | QuestionAnswerer | None = option("folder or hub id of a BLIP that answers questions", None)
    judge_model: str | None = option("name of a chat model that answers instead", None)
    judge_url: str | None = option("its endpoint, up to /v1; without: OpenAI's", None)
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


def read_questions(path: str | Path, official_compat: bool = False) -> dict[str, list[Question]]:
    """item id -> its questions in the file's order. ValueError with file and line. See `group`."""
    return group(read_rows(path), official_compat)


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


def cut(
    whole: Image.Image, count: int, resolution: int | None = None, official_compat: bool = False
) -> list[Image.Image]:
    """The first `count` tiles of a grid. ValueError where the resolution is not the grid's, which the official scorer
    would cut silently, with black where the grid ends."""
    across = 1 if count == 1 and resolution == whole.width else 2
    side = whole.width // across if resolution is None else resolution
    if not official_compat and (whole.width != whole.height or whole.width != across * side):
        raise ValueError(
            f"a grid of tiles of {side} px must be {2 * side} px wide and high, got {whole.size}"
        )
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:count]
    return [whole.crop((x, y, x + side, y + side)).convert("RGB") for x, y in corners]


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
    judge, said = _answers(scoring, options, files, asked)
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


def _answers(
    scoring: ScoringRun,
    options: ScoreOptions,
    files: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
) -> tuple[str, dict[str, list[dict[str, str]]]]:
    """The judge's name, and file -> answers of every tile by question."""
    if options.answers is not None:
        by_item = read_answers(options.answers, questions, options.tiles)
        said = {file: by_item[item_of(file)] for file in files if item_of(file) in by_item}
        return f"saved answers, sha256 {sha256(options.answers)}", said
    at_once = 1
    judge: Any = options.vqa
    if options.judge_model is not None:
        chat = options.chat(options.judge_model, options.judge_url, ANSWER_TOKENS)
        judge = ChatVQA(chat, options.attempts, options.wait, options.stop_after)
        at_once = options.concurrency
    elif isinstance(judge, str):
        judge = BlipVQA(judge, options.device)
    said = Asking(scoring, options, questions, judge, at_once).ask(files)
    if isinstance(judge, ChatVQA):
        judge.asking.check_answered()
    return judge.name, said


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


def read_answers(
    path: str | Path, questions: Mapping[str, Sequence[Question]], count: int
) -> dict[str, list[dict[str, str]]]:
    """item id -> answers of every tile by question, of a JSON-lines file of {"item_id", "answers": [{"1": "yes", …},
    …]}; lines that an answer is missing from are left out where they say so by "missing". ValueError with file and
    line for a tile or a question that lacks an answer."""
    said: dict[str, list[dict[str, str]]] = {}
    for place, record in json_lines(path):
        try:
            item, by_tile = record["item_id"], record["answers"]
            by_tile = [{str(q): str(text) for q, text in tile.items()} for tile in by_tile]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{place}: a line needs {{"item_id", "answers": [{{"1": "yes", …}}, …]}}: {error!r}'
            ) from None
        if item not in questions:
            raise ValueError(f"{place}: no question about {item!r}")
        if record.get("missing"):
            said.pop(item, None)
            continue
        lacking = [q.id for q in questions[item] for tile in by_tile[:count] if str(q.id) not in tile]
        if len(by_tile) < count or lacking:
            raise ValueError(
                f"{place}: {count} tiles with answers to questions {[q.id for q in questions[item]]} are needed, got "
                f"{len(by_tile)} tiles{f', question {lacking[0]} is missing' if lacking else ''}"
            )
        said[item] = by_tile[:count]
    return said


@dataclass
class Asking:
    """Asks every question about every tile; answers on disk are taken where they are about the same."""

    scoring: ScoringRun
    options: ScoreOptions
    questions: Mapping[str, Sequence[Question]]
    judge: QuestionAnswerer
    at_once: int

    def ask(self, files: Sequence[str]) -> dict[str, list[dict[str, str]]]:
        """file -> answers of every tile by question. Files that lack one are failures of `scoring`; a dry run gives
        those that lack none."""
        identity = {"judge": self.judge.name, "tiles": self.options.tiles}
        identity |= {"settings": judge_settings(self.judge)}
        records = Records(self.scoring.folder.root / "answers.jsonl", "file", identity)
        said = {}
        try:
            with ThreadPoolExecutor(self.at_once) as pool:
                for file in bar(files, "Asking", self.options.progress):
                    try:
                        said[file] = self._grid(file, records, pool)
                    except (UnreadableImage, NoAnswer) as error:  # left out, never given a number
                        self.scoring.failures[file] = str(error)
        finally:
            records.close()
        return said

    def _grid(self, file: str, records: Records, pool: ThreadPoolExecutor) -> list[dict[str, str]]:
        """UnreadableImage, or NoAnswer where a question has none; what was answered is kept."""
        own, path = self.questions[item_of(file)], self.scoring.images / file
        whole, options = read_image(path), self.options
        try:
            tiles = cut(whole, options.tiles, options.resolution, options.official_compat)
        except ValueError as error:
            raise UnreadableImage(f"{path}: {error}") from None
        about = f"{sha256(path)} {options.resolution} {own}"
        seen = hashlib.sha256(about.encode()).hexdigest()
        known = records.entries[file]["answers"] if records.has(file, seen) else [{} for _ in tiles]
        todo = [(i, q) for i, tile in enumerate(known) for q in own if str(q.id) not in tile]
        reasons: list[str] = []

        def one(pair: tuple[int, Question]) -> None:
            tile, question = pair
            try:
                known[tile][str(question.id)] = self.judge.answer(tiles[tile], question.text)
            except NoAnswer as error:
                reasons.append(str(error))

        if not todo:
            return known
        if options.dry_run:
            raise NoAnswer("a dry run")
        try:
            list(pool.map(one, todo))
        finally:
            missing = sum(str(q.id) not in tile for tile in known for q in own)
            values = {"item_id": item_of(file), "answers": known, "missing": missing}
            records.add(file, seen, values)
        if reasons:
            raise NoAnswer(f"{missing} questions got no answer: {reasons[0]}")
        return known
