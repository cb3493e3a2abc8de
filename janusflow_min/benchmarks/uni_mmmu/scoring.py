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

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...checks import MAX_IMG_SIZE
from ...files import read_json
from ..bootstrap import ItemScore
from ..official_prompts import fill
from ..reading import read_image
from ..run_folder import RunFolder
from . import boards, rules
from .generation import csv_text, is_done
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


def _judge(
    leg: str,
    cases: Sequence[Case],
    job_of: Callable[[Case], Job | None],
    by_name: Mapping[str, Record],
    judging: Judging,
) -> None:
    """Add the leg's verdicts to the cases' records; a case without a job has nothing to judge, and all no."""
    if leg not in judging.chats:
        return
    jobs = []
    for case in cases:
        if (job := job_of(case)) is not None:
            jobs.append(job)
        else:
            by_name[case.name].update(dict.fromkeys(rules.VERDICTS[leg], 0))
    for key, reply in judging.ask(leg, jobs).items():
        by_name[key].update(rules.verdicts(leg, reply, judging.options.official_compat))


def _code(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    references = {case.name: _reference(case, judging) for case in there}

    def description(case: Case) -> Job | None:
        summary, reference = rules.render_summary(_text(case, judging) or ""), references[case.name]
        if not summary or reference is None:
            return None
        after = f"Candidate description:\n{summary}"
        return Job(case.name, judging.texts["code_text"], [reference], after)

    _judge("code_text", there, description, by_name, judging)
    if "code_image" in judging.chats:
        jobs = {
            case.name: [
                Job(f"{case.name}#{i}", judging.texts["code_image"], [reference, path])
                for i, path in enumerate(_images(case, judging))
                if (reference := references[case.name]) is not None
            ]
            for case in there
        }
        replies = judging.ask("code_image", [job for of_case in jobs.values() for job in of_case])
        for name, of_case in jobs.items():
            if all(job.key in replies for job in of_case):
                best = [replies[job.key] for job in of_case]
                by_name[name] |= rules.best_of(best, judging.options.official_compat)
    return records


def _reference(case: Case, judging: Judging) -> Path | None:
    """The rendering to compare with: the data's own, else the SVG rendered with cairosvg; None where that fails."""
    if case.truth["png"] is not None:
        return case.truth["png"]
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):  # without the Cairo library it raises OSError
        raise ImportError(
            f"{case.name} has no PNG in the data; cairosvg would render it: pip install cairosvg"
        ) from None
    path = judging.folder.root / "eval" / "code" / "references" / f"{case.name}.png"
    if not path.is_file():
        try:
            with judging.folder.writing(path) as temporary:
                render_svg(case.truth["svg"].read_bytes(), temporary)
        except Exception:  # whatever a broken SVG raises
            return None
    return path


def render_svg(content: bytes, path: Path) -> None:
    """Write an SVG as PNG, in the size that it names: at most `MAX_IMG_SIZE` a side, which is checked before memory is
    taken. ValueError beyond that; whatever cairosvg raises for a broken one."""
    from cairosvg.surface import PNGSurface

    class Bounded(PNGSurface):
        def _create_surface(self, width: float, height: float) -> Any:
            if not max(width, height) <= MAX_IMG_SIZE:
                raise ValueError(
                    f"the SVG is {width:g}x{height:g} px; at most {MAX_IMG_SIZE} a side are rendered"
                )
            return super()._create_surface(width, height)

    Bounded.convert(bytestring=content, write_to=str(path))


def _science(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    compat = judging.options.official_compat
    # The official scorer counts every sample.
    counted = [case for case in cases if case in there or compat or not case.usable]

    def explanation(case: Case) -> Job | None:
        text, truth = _text(case, judging), case.truth["text"]
        if case not in there or not truth or text is None or not (compat or text.strip()):
            return None
        condition = case.fields["condition"] or "(none)"
        texts = dict(scene="(none)", condition=condition, gt_text=truth, pred_text=text)
        return Job(case.name, fill(judging.texts["science_text"], **texts))

    def image(case: Case) -> Job | None:
        paths = _images(case, judging)
        if case not in there or not paths or not case.images:
            return None
        texts = dict(condition=case.fields["condition"], gt_text=case.truth["text"])
        filled = fill(judging.texts["science_image"], **texts)
        return Job(case.name, filled, [case.images[0], paths[0]])

    _judge("science_text", counted, explanation, by_name, judging)
    if generates:
        _judge("science_image", counted, image, by_name, judging)
    return records


def _math(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    if generates or judging.options.official_compat:  # officially an error of the data, not scored
        for case in there:
            if case.truth["overlay"] is None:
                by_name[case.name]["status"] = "no auxiliary_image in the data"
        there = [case for case in there if case.truth["overlay"] is not None]

    def overlay(case: Case) -> Job | None:
        paths = _images(case, judging)
        filled = fill(judging.texts["math_overlay"], aux_en=case.fields["auxiliary"] or "(none)")
        return Job(case.name, filled, [case.images[0], case.truth["overlay"], paths[0]]) if paths else None

    def solution(case: Case) -> Job:
        filled = fill(
            judging.texts["math_text"],
            task_type="CALCULATION" if case.fields["type"].lower().startswith("calc") else "PROVING",
            problem=case.fields["problem"],
            gt_text=case.truth["text"],
            cand_text=_text(case, judging) or "",
        )
        return Job(case.name, filled)

    if generates:
        _judge("math_overlay", there, overlay, by_name, judging)
    _judge("math_text", there, solution, by_name, judging)
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


def _candidate_records(
    case: Case,
    judging: Judging,
    read: Callable[[Image.Image], boards.Grid] | None,
    score_frames: Callable[[list[boards.Grid]], Record],
) -> Iterator[Record]:
    """read: a frame's board; None where the frames are not the model's, and not scored."""
    compat = judging.options.official_compat
    for i, (text, paths) in enumerate(_candidates(case, judging), 1):
        record: Record = {"id": case.name, "status": "ok", "cand_idx": i}
        record |= rules.score_moves(rules.moves(text, compat), case.truth["moves"])
        frames = None if read is None else _grids(paths, judging, read, compat)
        yield record | ({} if frames is None else score_frames(frames))


def _maze(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    compat = judging.options.official_compat

    def read(image: Image.Image) -> boards.Grid:
        return boards.parse_maze(image, compat).grid

    for case in there:
        image, moves = judging.open(case.images[0]), case.truth["moves"]
        first = boards.parse_maze(image, compat) if image else boards.Maze([], None, None)
        if first.start is None:  # officially skipped too
            by_name[case.name]["status"] = f"no agent found in {case.images[0]}"
            continue
        score = functools.partial(rules.score_maze_frames, first=first, truth=moves)
        records.remove(by_name[case.name])
        records += _candidate_records(case, judging, read if generates else None, score)
    return records


def _sliding(cases: Sequence[Case], generates: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    read = functools.partial(boards.parse_puzzle, official_compat=judging.options.official_compat)
    for case in there:
        expected = _grids(case.truth["frames"] if generates else (), judging, read, unclear=False)
        if expected is None:
            by_name[case.name]["status"] = "an image of the data cannot be read"
            continue
        score = functools.partial(rules.score_puzzle_frames, expected=expected)
        records.remove(by_name[case.name])
        records += _candidate_records(case, judging, read if generates else None, score)
    return records


SCORERS = dict(science=_science, math=_math, jigsaw=_jigsaw, maze=_maze, sliding=_sliding, code=_code)


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
        folder.write_text(here / name, csv_text(records))
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
    folder.write_text(folder.root / "eval" / "all_tasks_summary.csv", csv_text([row]))
