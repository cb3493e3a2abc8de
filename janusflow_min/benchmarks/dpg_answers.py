# SPDX-License-Identifier: MIT
"""DPG-Bench's answers: of a BLIP, a chat model or a saved file, to every question about every tile of a grid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..files import sha256
from .chat import ChatVQA, judge_settings
from .dpg_rules import Question, item_of
from .judge_models import BlipVQA
from .judges import NoAnswer, QuestionAnswerer, Records, bar
from .reading import UnreadableImage, json_lines, read_image
from .scoring import ScoringRun

if TYPE_CHECKING:
    from .dpg_bench import ScoreOptions

ANSWER_TOKENS = 20  # of a chat judge


def answers(
    scoring: ScoringRun,
    options: ScoreOptions,
    files: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
) -> tuple[str, dict[str, list[dict[str, str]]]]:
    """From the saved file or the judge of `options`: its name, and file -> answers of every tile by question."""
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
    said = GridQuestions(scoring, options, questions, judge, at_once).ask(files)
    if isinstance(judge, ChatVQA):
        judge.asking.check_answered()
    return judge.name, said


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


@dataclass
class GridQuestions:
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
        said = {}
        path = self.scoring.folder.root / "answers.jsonl"
        with closing(Records(path, "file", identity)) as records, ThreadPoolExecutor(self.at_once) as pool:
            for file in bar(files, "Asking", self.options.progress):
                try:
                    said[file] = self._grid(file, records, pool)
                except (UnreadableImage, NoAnswer) as error:  # left out, never given a number
                    self.scoring.failures[file] = str(error)
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
