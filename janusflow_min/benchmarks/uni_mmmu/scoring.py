# SPDX-License-Identifier: MIT
"""Uni-MMMU's scoring: rules at once, judges where they are given, one table of 14 numbers and no total.

A *leg* is one task's texts or pictures. A leg without its judge, or whose pictures the mode does not paint, is not
run. A case that is not generated, or about which a judge was never reached, is left out and makes its leg partial: the
leg then has a value with its counts, and an empty place in the table. A judge's answer without usable JSON counts 0,
as officially, where judges are greedy and asked once.

Files, official names: `eval/TASK/eval_summary.json` with eval_details.json (math, science, code) or `summary.json` with
a CSV (jigsaw, maze, sliding), `eval/all_tasks_summary.json` and .csv.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ..runner import RunFolder, sha256
from . import boards, rules
from .generation import is_done
from .prompts import fill, prompts_hash
from .readers import Case

if TYPE_CHECKING:
    from ..judges import Chat

WIDEST = 2048  # px of an image that a judge is sent
ANSWER_TOKENS = {"science_text": 1024, "math_text": 32767}  # of a judge's answer; other legs have 512
TEXT_LEGS = ("math_text",)  # judged by the language model; the others by the one that sees
MEASURED = {  # column of the table -> task, key of its records
    "jigsaw_image": ("jigsaw", "d_mean"),
    "jigsaw_text": ("jigsaw", "text_correct"),
    "maze_image": ("maze", "img_frame_acc"),
    "maze_text": ("maze", "text_frame_acc"),
    "sliding_image": ("sliding", "img_frame_acc"),
    "sliding_text": ("sliding", "text_frame_acc"),
    "math_overlay": ("math", "overlay_ok"),
    "math_text": ("math", "text_ok"),
    "science_reasoning": ("science", "reasoning_correct"),
    "science_result": ("science", "result_correct"),
    "science_image": ("science", "image_correct"),
    "code_text": ("code", "text_semantic_match"),
    "code_shape_color": ("code", "shape_color_accuracy"),
    "code_position": ("code", "position_accuracy"),
}
Record = dict[str, Any]


class Distance(Protocol):
    """How different two pictures look: 0 is the same, 1 the penalty for a picture that is not there."""

    name: str

    def __call__(self, a: Image.Image, b: Image.Image) -> float: ...


class DreamSim:
    """DreamSim's ensemble, the official distance. Needs `pip install dreamsim`, which downloads its weights."""

    name = "DreamSim ensemble"

    def __init__(self, cache: str | Path, device: str = "auto"):
        from ...loading import pick_device

        try:
            from dreamsim import dreamsim
        except ImportError:
            raise ImportError("the jigsaw's pictures need DreamSim: pip install dreamsim") from None
        self.device = pick_device(device)
        self.model, self.prepare = dreamsim(pretrained=True, device=str(self.device), cache_dir=str(cache))

    def __call__(self, a: Image.Image, b: Image.Image) -> float:
        import torch

        pair = [self.prepare(image.convert("RGB")).to(self.device) for image in (a, b)]
        with torch.inference_mode():
            return float(self.model(*pair).item())


@dataclass(frozen=True)
class Job:
    """One question to a judge. key: unique in its leg."""

    key: str
    text: str
    images: Sequence[Path] = ()
    after: str = ""  # text behind the images


@dataclass
class Judging:
    """What scoring has at hand, and what it met. chats: leg -> its judge; a leg without one is not run."""

    folder: RunFolder
    texts: Mapping[str, str]  # as prompts.JUDGES
    chats: Mapping[str, Chat] = field(default_factory=dict)
    distance: Distance | None = None
    strip_think: bool = True
    concurrency: int = 8
    attempts: int = 3
    wait: float = 1.0
    progress: bool = True
    failures: dict[str, str] = field(default_factory=dict)  # leg/key -> why there is no answer
    unusable: list[str] = field(default_factory=list)  # leg/key of answers without JSON

    def ask(self, leg: str, jobs: Sequence[Job]) -> dict[str, Mapping[str, Any] | None]:
        """key -> the reply's JSON, None where it had none. Keys without any answer are absent."""
        from ..chat import Question, judge_all
        from ..judges import Records

        wording = {name: text for name, text in self.texts.items() if name in (leg, f"{leg}_system")}
        identity = {
            "judge": self.chats[leg].name,
            "prompt_sha256": prompts_hash(wording),
            "strip_think": self.strip_think,
        }

        def parse(text: str) -> dict[str, Any]:
            reply = rules.first_object(text, self.strip_think)
            return {"reply": reply if isinstance(reply, dict) else None}

        records = Records(self.folder.root / "eval" / f"judge_{leg}.jsonl", "key", identity)
        questions = [
            Question(job.key, _seen(job), lambda job=job: _messages(job, wording.get(f"{leg}_system")))
            for job in jobs
        ]
        try:
            failures = judge_all(
                self.chats[leg],
                questions,
                parse,
                records,
                self.concurrency,
                self.attempts,
                self.progress,
                self.wait,
            )
        finally:
            records.close()
        self.failures |= {f"{leg}/{key}": reason for key, reason in failures.items()}
        replies = {q.key: records.entries[q.key]["reply"] for q in questions if records.has(q.key, q.sha256)}
        self.unusable += [f"{leg}/{key}" for key, reply in replies.items() if reply is None]
        return replies


def _seen(job: Job) -> str:
    content = "\0".join([job.text, *map(sha256, job.images), job.after])
    return hashlib.sha256(content.encode()).hexdigest()


def _messages(job: Job, system: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": job.text}, *map(image_part, job.images)]
    if job.after:
        parts.append({"type": "text", "text": job.after})
    content = parts if job.images else job.text
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": content},
    ]


def image_part(path: Path) -> dict[str, Any]:
    """An image file for a judge: at most 2048 px wide; PNG stays PNG and what is transparent becomes it."""
    with Image.open(path) as image:
        form = "PNG" if image.format == "PNG" or image.mode in ("RGBA", "LA", "P") else "JPEG"
        if image.width > WIDEST:
            image = image.resize((WIDEST, max(1, int(image.height * WIDEST / image.width))), Image.LANCZOS)
        buffer = io.BytesIO()
        (image if form == "PNG" else image.convert("RGB")).save(buffer, form)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{form.lower()};base64,{data}"}}


# Tasks -----------------------------------------------------------------------


def score_task(task: str, cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    """A record for every case, of maze and sliding for every candidate. paints: its pictures are the model's.

    A key that a leg did not measure is absent; "status" is ok, missing or what is wrong.
    """
    return SCORERS[task](cases, paints, judging)


def _start(cases: Sequence[Case], judging: Judging) -> tuple[list[Record], dict[str, Record], list[Case]]:
    """All records, those of cases that are there by name, and these cases."""
    records, there = [], []
    for case in cases:
        done = case.usable and is_done(judging.folder, case)
        records.append({"id": case.name, "status": "ok" if done else "missing"})
        if done:
            there.append(case)
        elif not case.usable:
            records[-1]["status"] = "no image or no condition in the data"
    return records, {record["id"]: record for record in records}, there


def _text(case: Case, judging: Judging) -> str:
    path = judging.folder.root / case.folder / "model_text.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _images(case: Case, judging: Judging) -> list[Path]:
    return sorted((judging.folder.root / case.folder).glob("model_image_*.*"))


def _code(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    references = {case.name: _reference(case, judging) for case in there}
    if "code_text" in judging.chats:
        jobs = []
        for case in there:
            summary = rules.render_summary(_text(case, judging))
            if summary and references[case.name]:
                after = f"Candidate description:\n{summary}"
                jobs.append(Job(case.name, judging.texts["code_text"], [references[case.name]], after))
            else:
                by_name[case.name]["text_semantic_match"] = 0
        for name, reply in judging.ask("code_text", jobs).items():
            by_name[name]["text_semantic_match"] = rules.truth(reply, "text_semantic_match")
    if "code_image" in judging.chats:
        pictures = {case.name: _images(case, judging) if references[case.name] else [] for case in there}
        jobs = [
            Job(f"{name}#{i}", judging.texts["code_image"], [references[name], path])
            for name, paths in pictures.items()
            for i, path in enumerate(paths)
        ]
        replies = judging.ask("code_image", jobs)
        for name, paths in pictures.items():
            keys = [f"{name}#{i}" for i in range(len(paths))]
            if all(key in replies for key in keys):
                by_name[name] |= rules.best_of([replies[key] for key in keys])
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


def _science(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    unusable = [case.name for case in cases if not case.usable]
    if "science_text" in judging.chats:
        for name in unusable:  # the official scorer counts every sample
            by_name[name] |= {"reasoning_correct": 0, "result_correct": 0}
        jobs = []
        for case in there:
            text, truth = _text(case, judging), case.truth["text"]
            if text.strip() and truth:
                filled = fill(
                    judging.texts["science_text"],
                    condition=case.fields["condition"],
                    truth=truth,
                    candidate=text,
                )
                jobs.append(Job(case.name, filled))
            else:
                by_name[case.name] |= {"reasoning_correct": 0, "result_correct": 0}
        for name, reply in judging.ask("science_text", jobs).items():
            keys = ("reasoning_correct", "result_correct")
            by_name[name] |= {key: rules.truth(reply, key) for key in keys}
    if paints and "science_image" in judging.chats:
        for name in unusable:
            by_name[name]["image_correct"] = 0
        jobs = []
        for case in there:
            paths = _images(case, judging)
            if paths:
                filled = fill(
                    judging.texts["science_image"],
                    condition=case.fields["condition"],
                    truth=case.truth["text"],
                )
                jobs.append(Job(case.name, filled, [case.images[0], paths[0]]))
            else:
                by_name[case.name]["image_correct"] = 0
        for name, reply in judging.ask("science_image", jobs).items():
            by_name[name]["image_correct"] = rules.truth(reply, "image_correct")
    return records


def _math(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    if paints and "math_overlay" in judging.chats:
        jobs = []
        for case in there:
            paths, truth = _images(case, judging), case.truth["overlay"]
            if truth is None:  # officially an error of the data, not scored
                by_name[case.name]["status"] = "no auxiliary_image in the data"
            elif paths:
                auxiliary = case.fields["auxiliary"] or "(none)"
                filled = fill(judging.texts["math_overlay"], auxiliary=auxiliary)
                jobs.append(Job(case.name, filled, [case.images[0], truth, paths[0]]))
            else:
                by_name[case.name]["overlay_ok"] = 0
        for name, reply in judging.ask("math_overlay", jobs).items():
            by_name[name]["overlay_ok"] = rules.truth(reply, "overlay_ok")
    if "math_text" in judging.chats:
        jobs = []
        for case in there:
            kind = "CALCULATION" if case.fields["type"].lower().startswith("calc") else "PROVING"
            filled = fill(
                judging.texts["math_text"],
                type=kind,
                problem=case.fields["problem"],
                truth=case.truth["text"],
                candidate=_text(case, judging),
            )
            jobs.append(Job(case.name, filled))
        for name, reply in judging.ask("math_text", jobs).items():
            keys = ("reasoning_rigorous", "conclusion_correct", "calc_numeric_match", "text_ok")
            by_name[name] |= {key: rules.truth(reply, key) for key in keys}
    return records


def _jigsaw(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    for case in there:
        choice, status = rules.choice(_text(case, judging))
        record = by_name[case.name]
        record |= {"label": case.truth["label"], "choice": choice, "text_status": status}
        record["text_correct"] = int(choice == case.truth["label"])
        if paints and judging.distance is not None:
            paths, slots = _images(case, judging), case.truth["slots"]
            if None in slots:
                raise ValueError(f"{case.name}: the finished pictures are not in the data")
            if len(paths) == 2:
                pairs = [
                    judging.distance(Image.open(a), Image.open(b)) for a, b in zip(paths, slots, strict=True)
                ]
                record |= {"image_status": "ok", "d0": pairs[0], "d1": pairs[1], "d_mean": sum(pairs) / 2}
            else:
                record |= {"image_status": f"{len(paths)} images, 2 are needed", "d_mean": 1.0}
    return records


def _candidates(case: Case, judging: Judging) -> list[tuple[str, list[Path]]]:
    """(text, frames) of each candidate."""
    here = judging.folder.root / case.folder
    texts = _text(case, judging).split(rules.CANDIDATES)
    folders = sorted(path for path in here.glob("cand_*") if path.is_dir())
    return [
        (
            texts[i] if i < len(texts) else "",
            sorted(folders[i].glob("*.*")) if i < len(folders) else [],
        )
        for i in range(max(len(texts), len(folders)))
    ]


def _maze(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    for case in there:
        first = boards.parse_maze(Image.open(case.images[0]))
        if first.start is None:  # officially skipped
            by_name[case.name]["status"] = f"no agent found in {case.images[0]}"
            continue
        records.remove(by_name[case.name])
        for i, (text, paths) in enumerate(_candidates(case, judging), 1):
            truth = case.truth["moves"]
            record = {"id": case.name, "status": "ok", "cand_idx": i}
            record |= rules.score_moves(rules.moves(text), truth)
            if paints:
                frames = [boards.parse_maze(Image.open(path)).grid for path in paths]
                record |= rules.score_maze_frames(frames, first, truth)
            records.append(record)
    return records


def _sliding(cases: Sequence[Case], paints: bool, judging: Judging) -> list[Record]:
    records, by_name, there = _start(cases, judging)
    for case in there:
        records.remove(by_name[case.name])
        expected = [boards.parse_puzzle(Image.open(path)) for path in case.truth["frames"]] if paints else []
        for i, (text, paths) in enumerate(_candidates(case, judging), 1):
            record = {"id": case.name, "status": "ok", "cand_idx": i}
            record |= rules.score_moves(rules.moves(text), case.truth["moves"])
            if paints:
                frames = [boards.parse_puzzle(Image.open(path)) for path in paths]
                record |= rules.score_puzzle_frames(frames, expected)
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
SUMMARIES = {
    "science": rules.summarize_science,
    "math": rules.summarize_math,
    "jigsaw": rules.summarize_jigsaw,
    "maze": lambda records: rules.summarize_frames(records, maze=True),
    "sliding": lambda records: rules.summarize_frames(records, maze=False),
    "code": rules.summarize_code,
}


# Together -----------------------------------------------------------------------


def write_task(folder: RunFolder, task: str, records: Sequence[Record]) -> dict[str, Any]:
    """The official summary and details of a task under `eval/`; returns the summary."""
    here = folder.root / "eval" / task
    measured = [record for record in records if record["status"] == "ok" or len(record) > 2]
    summary = SUMMARIES[task](records if task == "math" else measured)
    if task in ("math", "science", "code"):
        folder.write_json(here / "eval_summary.json", summary)
        folder.write_json(here / "eval_details.json", list(records))
    else:
        folder.write_json(here / "summary.json", summary)
        name = "per_item.csv" if task == "jigsaw" else "manifest_eval.csv"
        folder.write_text(here / name, _csv(records))
    return summary


def counts(records: Mapping[str, Sequence[Record]], cases: Mapping[str, Sequence[Case]]) -> dict[str, tuple]:
    """column -> (cases scored, cases of the task); (0, 0) for a task that is not part of this."""
    result = {}
    for column, (task, key) in MEASURED.items():
        scored = {record["id"] for record in records.get(task, ()) if record.get(key) is not None}
        result[column] = (len(scored), len(cases.get(task, ())))
    return result


def write_table(folder: RunFolder, table: Mapping[str, float | None]) -> None:
    """The 14 numbers as JSON and as CSV with the columns' long names; null and empty are not, or not wholly, run."""
    folder.write_json(folder.root / "eval" / "all_tasks_summary.json", dict(table))
    row = {name: table[key] for key, name, _ in rules.COLUMNS}
    folder.write_text(folder.root / "eval" / "all_tasks_summary.csv", _csv([row]))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
