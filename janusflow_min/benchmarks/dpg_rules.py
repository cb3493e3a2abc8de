# SPDX-License-Identifier: MIT
"""DPG-Bench's rules: from the answers about the tiles of a grid to its score, the categories and the headline.

They follow TencentQQGYLab/ELLA (`dpg_bench/compute_dpg_bench.py`). `official_compat` is its defects as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

L1 = ("global", "entity", "attribute", "relation", "other")
Raw = Sequence[Mapping[int, int]]  # of each tile: question -> 1 for yes, else 0


@dataclass(frozen=True)
class Question:
    id: int  # usually from 1 within its item
    parents: tuple[int, ...]
    l1: str
    l2: str
    text: str


def group(rows: Sequence[tuple[str, Question]], official_compat: bool = False) -> dict[str, list[Question]]:
    """item id -> its questions in the order of the rows. Of rows with one id in one item, the last one counts.

    official_compat: without the first row (ELLA issue 61), and of an item whose rows are not in one block the last
    block alone, as the official scorer reads the file.
    """
    grouped: dict[str, dict[int, Question]] = {}
    previous = None
    for item, question in rows[1:] if official_compat else rows:
        if official_compat and item != previous:
            grouped[item] = {}
        grouped.setdefault(item, {})[question.id] = question
        previous = item
    return {item: list(by_id.values()) for item, by_id in grouped.items()}


def remarks(rows: Sequence[tuple[str, Question]], prompts: Mapping[str, str]) -> list[str]:
    """What is wrong with a file of questions, for the report."""
    questions = group(rows)
    count = Counter((item, question.id) for item, question in rows)
    found = {
        "questions are there twice, the last one counts": [
            f"{item} {number}" for (item, number), n in count.items() if n > 1
        ],
        "items have a question that depends on one that is not there; they are left out of the mean": [
            item for item, own in questions.items() if not _whole(own)
        ],
        "prompts have no question and are left out": [stem for stem in prompts if stem not in questions],
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    ]


def level_1_names(questions: Mapping[str, Sequence[Question]]) -> list[str]:
    """The first-level categories that the questions have, the published order first."""
    there = dict.fromkeys(q.l1 for own in questions.values() for q in own)
    return [name for name in L1 if name in there] + [name for name in there if name not in L1]


def is_yes(answer: str, official_compat: bool = False) -> bool:
    """Whether the first word is yes, in any case; official_compat: whether the answer is exactly "yes"."""
    return answer == "yes" if official_compat else re.match(r"(?i)\W*yes\b", answer) is not None


def propagate(questions: Sequence[Question], raw: Mapping[int, int]) -> dict[int, int]:
    """A question any of whose parents has 0 gets 0: in the file's order and in place, so failures cascade forward.

    KeyError for a parent that is not there, unless an earlier parent of the question has 0 already.
    """
    scores = {question.id: raw[question.id] for question in questions}
    for question in questions:
        if any(scores[parent] == 0 for parent in question.parents):
            scores[question.id] = 0
    return scores


def item_score(questions: Sequence[Question], raw: Raw, official_compat: bool = False) -> list[float] | None:
    """The score of every tile: the mean over questions after `propagate`. None for an item without questions, or with
    one that depends on a question that is not there; official_compat: only where that one is looked up."""
    if not questions or not (official_compat or _whole(questions)):
        return None
    try:
        return [float(np.mean(list(propagate(questions, tile).values()))) for tile in raw]
    except KeyError:
        return None


def categories(
    questions: Mapping[str, Sequence[Question]],
    raw: Mapping[str, Raw],
    level: str,
    official_compat: bool = False,
) -> dict[str, tuple[float, int]]:
    """category -> (score of 100, questions asked), a mean over pooled questions.

    raw: by the grid's file or its item. level: "l1" or "l2". official_compat: raw answers of the last tile alone
    (ELLA issue 60); else all tiles, dependencies applied.
    """
    pooled: dict[str, list[int]] = {}
    for name, by_tile in raw.items():
        own = questions.get(item_of(name), ())
        if item_score(own, by_tile, official_compat) is None:
            continue
        for tile in by_tile[-1:] if official_compat else by_tile:
            scores = tile if official_compat else propagate(own, tile)
            for question in own:
                pooled.setdefault(getattr(question, level), []).append(scores[question.id])
    return {name: (100 * float(np.mean(values)), len(values)) for name, values in pooled.items()}


def headline(
    questions: Mapping[str, Sequence[Question]], raw: Mapping[str, Raw], official_compat: bool = False
) -> float | None:
    """Mean of the items' scores, of 100, without those that `item_score` leaves out. raw: as `categories` has it."""
    tiles = [
        item_score(questions.get(item_of(name), ()), by_tile, official_compat)
        for name, by_tile in raw.items()
    ]
    scores = [float(np.mean(each)) for each in tiles if each is not None]
    return 100 * float(np.mean(scores)) if scores else None


def item_of(name: str) -> str:
    """What a grid is of: its file's name up to the first dot."""
    return name.split(".")[0]


def _whole(questions: Sequence[Question]) -> bool:
    ids = {question.id for question in questions}
    return all(set(question.parents) <= ids for question in questions)
