# SPDX-License-Identifier: MIT
"""Uni-MMMU's scoring: rules at once, judges where they are given, one table of 14 numbers and no total.

A *leg* is one task's texts or images. A leg without its judge, or whose images the mode does not generate, is not
run. A case that is not there, or about which a judge gave no answer, is left out and makes its leg partial: the leg
then has a value with its counts, and an empty place in the table. A judge's answer without usable JSON counts 0, as
officially, where judges are greedy and asked once.

Files, official names: `eval/TASK/eval_summary.json` with eval_details.json (math, science, code) or `summary.json` with
a CSV (jigsaw, maze, sliding), `eval/all_tasks_summary.json` and .csv.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import read_json
from ..bootstrap import ItemScore
from ..official_prompts import fill
from ..reading import read_image
from ..run_folder import RunFolder
from . import boards, rules
from .generation import is_done
from .judging import Job, Judging
from .readers import Case

Record = dict[str, Any]


def score_task(task: str, cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    """A record for every case, of maze and sliding for every candidate. generates: its images are the model's.

    A key that a leg did not measure is absent; "status" is ok, missing or what is wrong.
    """
    return SCORERS[task](cases, generates, judging)


def _start(cases: Sequence[Case], judging: Judging) -> tuple[list[Record], dict[str, Record], list[Case]]:
    """All records, those of cases that are there by name, and these cases.

    There is what the run marked as done. official_compat: every case that has a folder, of the jigsaw every one that
    the run's own summary lists.
    """
    records, there = [], []
    listed = (
        _listed(judging.folder) if judging.options.official_compat and cases[0].task == "jigsaw" else None
    )
    for case in cases:
        if not judging.options.official_compat:
            done = case.usable and is_done(judging.folder, case)
        elif listed is not None:
            done = case.fields["id"] in listed
        else:
            done = (judging.folder.root / case.folder).is_dir()
        records.append({"id": case.name, "status": "ok" if done else "missing"})
        if done:
            there.append(case)
        elif not case.usable:
            records[-1]["status"] = "no image or no condition in the data"
    return records, {record["id"]: record for record in records}, there


def _listed(folder: RunFolder) -> set[str]:
    summary = read_json(folder.root / "jigsaw" / "summary.json")
    return {item["id"] for item in summary.get("per_item", [])}


def _text(case: Case, judging: Judging) -> str | None:
    path = judging.folder.root / case.folder / "model_text.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _images(case: Case, judging: Judging) -> list[Path]:
    return sorted((judging.folder.root / case.folder).glob("model_image_*.*"))


def _code(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    references = {case.name: _reference(case, judging) for case in there}
    if "code_text" in judging.chats:
        jobs = []
        for case in there:
            summary = rules.render_summary(_text(case, judging) or "")
            reference = references[case.name]
            if summary and reference:
                after = f"Candidate description:\n{summary}"
                jobs.append(Job(case.name, judging.texts["code_text"], [reference], after))
            else:
                by_name[case.name]["text_semantic_match"] = 0
        judging.judge("code_text", jobs, by_name)
    if "code_image" in judging.chats:
        images = {case.name: _images(case, judging) if references[case.name] else [] for case in there}
        jobs = [
            Job(f"{name}#{i}", judging.texts["code_image"], [reference, path])
            for name, paths in images.items()
            if (reference := references[name]) is not None
            for i, path in enumerate(paths)
        ]
        replies = judging.ask("code_image", jobs)
        for name, paths in images.items():
            keys = [f"{name}#{i}" for i in range(len(paths))]
            if all(key in replies for key in keys):
                by_name[name] |= rules.best_of(
                    [replies[key] for key in keys], judging.options.official_compat
                )
    return records


def _reference(case: Case, judging: Judging) -> Path | None:
    """The rendering to compare with: the data's own, else the SVG rendered with cairosvg; None where that fails."""
    if case.truth["png"] is not None:
        return case.truth["png"]
    try:
        import cairosvg
    except (ImportError, OSError):  # without the Cairo library it raises OSError
        raise ImportError(
            f"{case.name} has no PNG in the data; cairosvg would render it: pip install cairosvg"
        ) from None
    path = judging.folder.root / "eval" / "code" / "references" / f"{case.name}.png"
    if not path.is_file():
        try:
            with judging.folder.writing(path) as temporary:
                cairosvg.svg2png(bytestring=case.truth["svg"].read_bytes(), write_to=str(temporary))
        except Exception:  # whatever a broken SVG raises
            return None
    return path


def _science(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    lost = [
        case.name
        for case in cases
        if case not in there and (judging.options.official_compat or not case.usable)
    ]
    if "science_text" in judging.chats:
        for name in lost:  # the official scorer counts every sample
            by_name[name] |= {"reasoning_correct": 0, "result_correct": 0}
        jobs = []
        for case in there:
            text, truth = _text(case, judging), case.truth["text"]
            if truth and (text is not None if judging.options.official_compat else (text or "").strip()):
                filled = fill(
                    judging.texts["science_text"],
                    scene="(none)",
                    condition=case.fields["condition"] or "(none)",
                    gt_text=truth,
                    pred_text=text,
                )
                jobs.append(Job(case.name, filled))
            else:
                by_name[case.name] |= {"reasoning_correct": 0, "result_correct": 0}
        judging.judge("science_text", jobs, by_name)
    if generates and "science_image" in judging.chats:
        for name in lost:
            by_name[name]["image_correct"] = 0
        jobs = []
        for case in there:
            paths = _images(case, judging)
            if paths and case.images:
                filled = fill(
                    judging.texts["science_image"],
                    condition=case.fields["condition"],
                    gt_text=case.truth["text"],
                )
                jobs.append(Job(case.name, filled, [case.images[0], paths[0]]))
            else:
                by_name[case.name]["image_correct"] = 0
        judging.judge("science_image", jobs, by_name)
    return records


def _math(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    if generates or judging.options.official_compat:  # officially an error of the data, not scored
        for case in there:
            if case.truth["overlay"] is None:
                by_name[case.name]["status"] = "no auxiliary_image in the data"
        there = [case for case in there if case.truth["overlay"] is not None]
    if generates and "math_overlay" in judging.chats:
        jobs = []
        for case in there:
            paths = _images(case, judging)
            if paths:
                filled = fill(judging.texts["math_overlay"], aux_en=case.fields["auxiliary"] or "(none)")
                jobs.append(Job(case.name, filled, [case.images[0], case.truth["overlay"], paths[0]]))
            else:
                by_name[case.name]["overlay_ok"] = 0
        judging.judge("math_overlay", jobs, by_name)
    if "math_text" in judging.chats:
        jobs = []
        for case in there:
            kind = "CALCULATION" if case.fields["type"].lower().startswith("calc") else "PROVING"
            filled = fill(
                judging.texts["math_text"],
                task_type=kind,
                problem=case.fields["problem"],
                gt_text=case.truth["text"],
                cand_text=_text(case, judging) or "",
            )
            jobs.append(Job(case.name, filled))
        judging.judge("math_text", jobs, by_name)
    return records


def _jigsaw(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    for case in there:
        choice, status = rules.choice(_text(case, judging) or "", judging.options.official_compat)
        record = by_name[case.name]
        record |= {"label": case.truth["label"], "choice": choice, "text_status": status}
        record["text_correct"] = int(choice == case.truth["label"])
        if generates and judging.distance is not None:
            record |= _jigsaw_distance(case, judging)
    return records


def _jigsaw_distance(case: Case, judging: Judging) -> Record:
    """1, the penalty, where there are not two images. An image that cannot be read: {}, officially the penalty."""
    paths, slots = _images(case, judging), case.truth["slots"]
    if len(paths) != 2:
        return {"image_status": f"{len(paths)} images, 2 are needed", "d_mean": 1.0}
    assert judging.distance is not None
    if None in slots:
        judging.failures[f"jigsaw/{case.name}"] = "the finished images are not in the data"
    opened = [judging.open(path) for path in (*paths, *slots) if path is not None]
    images = [image for image in opened if image is not None]
    if len(images) < 4:
        return {"image_status": "unreadable", "d_mean": 1.0} if judging.options.official_compat else {}
    d0, d1 = judging.distance(images[0], images[2]), judging.distance(images[1], images[3])
    return {"image_status": "ok", "d0": d0, "d1": d1, "d_mean": (d0 + d1) / 2}


def _candidates(case: Case, judging: Judging) -> list[tuple[str, list[Path]]]:
    """(text, frames) of each candidate."""
    here = judging.folder.root / case.folder
    text = _text(case, judging)
    texts = [] if text is None else text.split(rules.CANDIDATES)
    folders = sorted(path for path in here.glob("cand_*") if path.is_dir())
    return [
        (
            texts[i] if i < len(texts) else "",
            sorted(folders[i].glob("*.*")) if i < len(folders) else [],
        )
        for i in range(max(len(texts), len(folders)))
    ]


def _grids(
    paths: Sequence[Path], judging: Judging, read: Callable[[Image.Image], boards.Grid], unclear: bool
) -> list[boards.Grid] | None:
    """The boards in the images; where one cannot be read, it is unclear, or all is None."""
    grids: list[boards.Grid] = []
    for path in paths:
        try:
            grids.append(read(read_image(path)))
        except ValueError as error:
            judging.failures[str(path)] = str(error)
            if not unclear:
                return None
            grids.append([["?"]])
    return grids


def _maze(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    compat = judging.options.official_compat
    for case in there:
        image = judging.open(case.images[0])
        first = boards.parse_maze(image, compat) if image else boards.Maze([], None, None)
        if first.start is None:  # officially skipped too
            by_name[case.name]["status"] = f"no agent found in {case.images[0]}"
            continue
        records.remove(by_name[case.name])
        for i, (text, paths) in enumerate(_candidates(case, judging), 1):
            truth = case.truth["moves"]
            record: Record = {"id": case.name, "status": "ok", "cand_idx": i}
            record |= rules.score_moves(rules.moves(text, compat), truth)
            if generates:
                frames = _grids(paths, judging, lambda image: boards.parse_maze(image, compat).grid, compat)
                record |= {} if frames is None else rules.score_maze_frames(frames, first, truth)
            records.append(record)
    return records


def _sliding(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)

    def read(image: Image.Image) -> boards.Grid:
        return boards.parse_puzzle(image, judging.options.official_compat)

    for case in there:
        expected = _grids(case.truth["frames"] if generates else (), judging, read, unclear=False)
        if expected is None:
            by_name[case.name]["status"] = "an image of the data cannot be read"
            continue
        records.remove(by_name[case.name])
        for i, (text, paths) in enumerate(_candidates(case, judging), 1):
            record: Record = {"id": case.name, "status": "ok", "cand_idx": i}
            record |= rules.score_moves(
                rules.moves(text, judging.options.official_compat), case.truth["moves"]
            )
            if generates:
                frames = _grids(paths, judging, read, judging.options.official_compat)
                record |= {} if frames is None else rules.score_puzzle_frames(frames, expected)
            records.append(record)
    return records


SCORERS = {
    "science": _science,
    "math": _math,
    "jigsaw": _jigsaw,
    "maze": _maze,
    "sliding": _sliding,
    "code": _code,
}


# Together -----------------------------------------------------------------------


def write_task(folder: RunFolder, task: str, records: Sequence[Record]) -> dict[str, Any]:
    """The official summary and details of a task under `eval/`; returns the summary."""
    here = folder.root / "eval" / task
    measured = [record for record in records if record["status"] == "ok" or len(record) > 2]
    summary = rules.summarize(task, records if task == "math" else measured)
    if task in ("math", "science", "code"):
        folder.write_json(here / "eval_summary.json", summary)
        folder.write_json(here / "eval_details.json", list(records))
    else:
        folder.write_json(here / "summary.json", summary)
        name = "per_item.csv" if task == "jigsaw" else "manifest_eval.csv"
        folder.write_text(here / name, _csv(records))
    return summary


def counts(
    records: Mapping[str, Sequence[Record]], cases: Mapping[str, Sequence[Case]]
) -> dict[str, tuple[int, int]]:
    """column -> (cases scored, cases of the task); (0, 0) for a task that is not part of this."""
    result = {}
    for column, _, _, task, key in rules.COLUMNS:
        scored = {record["id"] for record in records.get(task, ()) if record.get(key) is not None}
        result[column] = (len(scored), len(cases.get(task, ())))
    return result


def item_scores(
    folder: RunFolder, records: Mapping[str, Sequence[Record]], cases: Mapping[str, Sequence[Case]]
) -> list[ItemScore]:
    """Each case with the columns that were measured; of several candidates the mean counts."""
    items = []
    for task, of_task in cases.items():
        for case in of_task:
            own = [record for record in records[task] if record["id"] == case.name]
            parts = {}
            for column, _, _, where, key in rules.COLUMNS:
                values = [float(r[key]) for r in own if where == task and r.get(key) is not None]
                values = [value for value in values if math.isfinite(value)]
                if key == "d_mean":
                    values = [1 - value for value in values]
                if values:
                    parts[column] = sum(values), len(values)
            if parts:
                images = sorted((folder.root / case.folder).rglob("*.png"))
                reason = "; ".join(str(r["status"]) for r in own if r["status"] != "ok")
                text = str(case.fields.get("problem") or case.fields.get("condition") or "")
                items.append(ItemScore(case.folder, parts, text, [str(path) for path in images], reason))
    return items


def write_table(folder: RunFolder, table: Mapping[str, float | None]) -> None:
    """The 14 numbers as JSON and as CSV with the columns' long names; null and empty are not, or not wholly, run."""
    folder.write_json(folder.root / "eval" / "all_tasks_summary.json", dict(table))
    row = {column[1]: table[column[0]] for column in rules.COLUMNS}
    folder.write_text(folder.root / "eval" / "all_tasks_summary.csv", _csv([row]))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
