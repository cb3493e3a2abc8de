# SPDX-License-Identifier: MIT
"""Uni-MMMU's released data as cases, in the order and with the folder names that its scorers expect.

`data/` of the dataset Vchitect/Uni-MMMU-Eval holds svg, science, math_data, jigsaw_dataset_2x2ref, maze and sliding.
Stored paths may be absolute, relative to the folder above `data/`, or to the task's own folder. Only the fields that
are used are looked at: the files hold more. Raises ValueError, which names the entry, for what does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import parse_json

SOURCES = {  # task, named as its output folder -> what it is read from
    "science": "science/dim_all.json",
    "math": "math_data/filtered.json",
    "jigsaw": "jigsaw_dataset_2x2ref/metadata.json",
    "maze": "maze",
    "sliding": "sliding/summary_steps_le_8.json",
    "code": "svg/metadata.json",
}
TASKS = tuple(SOURCES)
OTHER_NAMES = {"math_geo": "math", "geometry": "math", "code_rendering": "code"}  # TorchUMM's and the paper's
# Second-hand.
RELEASED = {"science": 157, "math": 140, "jigsaw": 150, "maze": 149, "sliding": 84, "code": 200}
MOST_MOVES = 99
DEMONSTRATION = "00015"  # the maze that the official run shows as its example and so leaves out


@dataclass(frozen=True)
class Case:
    """One case. images: what the model is shown, in order; truth: what only scoring may see."""

    task: str
    index: int  # in the file's own order, unfiltered: folder names and seeds come from it
    name: str  # of its folder
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Path, ...] = ()
    truth: Mapping[str, Any] = field(default_factory=dict)
    usable: bool = True  # a science sample without image or condition keeps its number and is not run

    @property
    def folder(self) -> str:
        return f"{self.task}/{self.name}"


def tasks_of(names: Sequence[str]) -> tuple[str, ...]:
    """Known tasks in this module's order; none named means all. ValueError for an unknown one."""
    chosen = {OTHER_NAMES.get(name, name) for name in names}
    if unknown := chosen - set(TASKS):
        raise ValueError(f"tasks are {', '.join(TASKS)}; got {', '.join(sorted(unknown))}")
    return tuple(task for task in TASKS if task in chosen or not chosen)


def data_folder(data: str | Path) -> Path:
    """The folder that holds the tasks' folders: `data` itself, or `data/` in it."""
    data = Path(data).expanduser().resolve()
    for folder in (data, data / "data"):
        if any((folder / source).exists() for source in SOURCES.values()):
            return folder
    raise FileNotFoundError(f"{data} holds none of {', '.join(SOURCES.values())}")


def read(data: str | Path, task: str, demonstration: bool = False) -> list[Case]:
    """All cases of a task. demonstration: keep the maze that the official run leaves out, as TorchUMM does."""
    root = data_folder(data)
    source = root / SOURCES[task]
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing; the task {task} needs it")
    cases = list(READERS[task](root, source))
    if task == "maze" and not demonstration:
        cases = [case for case in cases if case.name != f"case_{DEMONSTRATION}"]
    if not cases:
        raise ValueError(f"{source} holds no case")
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source}: several cases would be written to {', '.join(twice[:5])}")
    return cases


def safe_name(text: str) -> str:
    """Of a folder: other characters than A-Z a-z 0-9 _ . - become _, at most 120."""
    return re.sub(r"[^A-Za-z0-9_.\-]+", "_", (text or "").strip())[:120] or "item"


# Tasks -----------------------------------------------------------------------


def _code(root: Path, source: Path) -> Iterator[Case]:
    for i, sample in enumerate(_list(_json(source), "samples", source)):
        place = f"{source}, samples[{i}]"
        identity, svg = _text(sample, "id", place), _text(sample, "svg", place)
        png = _optional(sample, "png", place)
        path = _path(root, source.parent, svg, place)
        reference = _find(root, source.parent, png)[0] if png else None
        fields = {"svg": svg, "png": png, "difficulty": sample.get("difficulty", "")}
        yield Case(
            "code",
            i,
            f"case_{i + 1:02d}_{safe_name(identity)}",
            fields,
            truth={"svg": path, "png": reference},
        )


def _science(root: Path, source: Path) -> Iterator[Case]:
    blocks = _json(source)
    if not isinstance(blocks, list):
        raise ValueError(f"{source}: an array of blocks is needed, got {type(blocks).__name__}")
    samples = []
    for b, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise ValueError(f"{source}, block {b} must be an object, got {type(block).__name__}")
        levels = {"level_1": block.get("level_1_category"), "level_2": block.get("level_2_category")}
        for s, sample in enumerate(_list(block, "samples", f"{source}, block {b}")):
            samples.append((sample, levels, f"{source}, block {b}, samples[{s}]"))
    for i, (sample, levels, place) in enumerate(samples):
        paths = sample.get("input_image_file_path_list")
        condition = _optional(sample, "input_prompt", place).strip()
        first = paths[0] if isinstance(paths, list) and paths else None
        usable = first is not None and bool(condition)
        images = (_path(root, source.parent, first, place),) if usable else ()
        fields = {"condition": condition, "meta": levels}
        truth = {"text": _optional(sample, "output_prompt", place)}
        yield Case("science", i, f"case_{i + 1:02d}", fields, images, truth, usable)


def _math(root: Path, source: Path) -> Iterator[Case]:
    groups = _json(source)
    entries = [
        (big, small, item)
        for big, group in (groups.items() if isinstance(groups, dict) else ())
        for small, item in (group.items() if isinstance(group, dict) else ())
    ]
    for i, (big, small, item) in enumerate(entries):
        place = f"{source}, {big}/{small}"
        if not isinstance(item, dict):
            raise ValueError(f"{place}: an object is needed, got {type(item).__name__}")
        problem = _optional(item, "problem_text_en", place) or _optional(item, "problem_text", place)
        if not problem:
            raise ValueError(f"{place}: problem_text_en and problem_text are both missing")
        choices = item.get("choices_en")
        fields = {
            "big_key": big,
            "small_key": small,
            "type": _optional(item, "type", place),
            "problem": problem,
            "choices": [str(choice) for choice in choices] if isinstance(choices, list) else [],
            "auxiliary": _optional(item, "auxiliary_text_en", place).strip(),
        }
        overlay = _optional(item, "auxiliary_image", place)
        truth = {
            "text": _optional(item, "solution_en", place) or _optional(item, "solution", place),
            "overlay": _find(root, source.parent, overlay)[0] if overlay else None,
        }
        image = _path(root, source.parent, _text(item, "original_image", place), place)
        yield Case("math", i, f"{safe_name(big)}__{safe_name(small)}", fields, (image,), truth)


def _jigsaw(root: Path, source: Path) -> Iterator[Case]:
    for i, item in enumerate(_list(_json(source), "items", source)):
        place = f"{source}, items[{i}]"
        identity, label = _text(item, "id", place), item.get("label")
        candidates = item.get("candidate_paths")
        if label not in (0, 1) or isinstance(label, bool):
            raise ValueError(f"{place}: label must be 0 or 1, got {label!r}")
        if not isinstance(candidates, list) or len(candidates) != 2:
            raise ValueError(f"{place}: candidate_paths must be two paths, got {candidates!r}")
        panel = item.get("ref_panel")
        reference = _text(panel if isinstance(panel, dict) else {}, "ref_image_path", f"{place}, ref_panel")
        images = tuple(_path(root, source.parent, path, place) for path in (reference, *candidates))
        finished = [
            _find(root, source.parent, str(item[key]))[0] if item.get(key) else None
            for key in ("gt_completed_2x2_path", "gt_wrong_2x2_path")
        ]
        # What the images with candidate 0 and 1 should show.
        slots = finished if label == 0 else finished[::-1]
        truth = {"label": label, "slots": tuple(slots)}
        yield Case("jigsaw", i, safe_name(identity), {"id": identity}, images, truth)


def _maze(root: Path, source: Path) -> Iterator[Case]:
    for i, first in enumerate(sorted(source.rglob("*/maze_step_0000.png"))):
        match = re.fullmatch(r"(maze_\d+x\d+)_(\d{5})_steps", first.parent.name)
        if match is None:
            raise ValueError(f"{first.parent}: a folder like maze_6x6_00015_steps is needed")
        answer = first.parent.parent / f"{match[1]}_steps_{match[2]}.json"
        steps = _json(answer)
        moves = _moves(steps, ("steps_long", "steps"), answer)
        truth = {"moves": [move.lower() for move in moves]}
        yield Case("maze", i, f"case_{match[2]}", {"steps": len(moves)}, (first,), truth)


def _sliding(root: Path, source: Path) -> Iterator[Case]:
    def first_of(item: Mapping[str, Any], *keys: str) -> Any:
        return next((item[key] for key in keys if item.get(key)), None)

    for i, item in enumerate(_list(_json(source), "items", source)):
        place = f"{source}, items[{i}]"
        where = first_of(item, "steps_dir", "step_dir", "steps_path")
        frames: list[Path] = []
        if where is not None:
            folder = _path(root, source.parent, where, place, folder=True)
            frames = sorted(folder.glob("demo_step_*.png"))
            name = folder.name
        else:
            name = str(first_of(item, "case_name", "id") or f"{i:05d}")
        if len(frames) >= 2:
            images: tuple[Path, ...] = (frames[0], frames[-1])
        else:
            keys = (("initial_png", "init_png", "init"), ("final_png", "goal_png", "final"))
            named = [first_of(item, *names) for names in keys]
            if None in named:
                raise ValueError(
                    f"{place}: neither two demo_step_*.png in steps_dir nor initial and final image"
                )
            images = tuple(_path(root, source.parent, path, place) for path in named)
        answer = first_of(item, "steps_words_json", "gt_json", "json")
        if answer is None:
            raise ValueError(f"{place}: steps_words_json is missing")
        path = _path(root, source.parent, answer, place)
        moves = _moves(_json(path), ("steps_words",), path)
        truth = {
            "moves": moves,
            "frames": tuple(f for f in sorted(images[0].parent.glob("*.png")) if "0000" not in f.name),
        }
        yield Case("sliding", i, f"case_{safe_name(name)}", {"steps": len(moves)}, images, truth)


READERS = dict(science=_science, math=_math, jigsaw=_jigsaw, maze=_maze, sliding=_sliding, code=_code)


# Files -----------------------------------------------------------------------


def _json(path: Path) -> Any:
    value = parse_json(path)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} holds half of a UTF-16 pair, which is no text") from None
    return value


def _list(value: Any, key: str, place: Any) -> list[dict[str, Any]]:
    """A list of objects."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{place}: {key} must be a list, got {type(found).__name__}")
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"{place}: {key}[{i}] must be an object, got {type(item).__name__}")
    return found


def _moves(value: Any, keys: Sequence[str], place: Any) -> list[str]:
    """Texts; seeds allow so many images a case."""
    found = next((value[key] for key in keys if value.get(key)), None) if isinstance(value, dict) else None
    if not isinstance(found, list) or len(found) > MOST_MOVES:
        got = f"{len(found)}" if isinstance(found, list) else repr(found)[:80]
        raise ValueError(f"{place}: {keys[0]} must be a list of 1 to {MOST_MOVES} moves, got {got}")
    return [str(move) for move in found]


def _text(value: Mapping[str, Any], key: str, place: str) -> str:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, str) or not found:
        raise ValueError(f"{place}: {key} must be a text that is not empty, got {found!r}")
    return found


def _optional(value: Mapping[str, Any], key: str, place: str) -> str:
    found = value.get(key) or ""
    if not isinstance(found, str):
        raise ValueError(f"{place}: {key} must be a text, got {type(found).__name__}")
    return found


def _path(root: Path, beside: Path, stored: Any, place: str, folder: bool = False) -> Path:
    """A stored path on this machine. ValueError where nothing is there."""
    found, tried = _find(root, beside, str(stored), folder)
    if found is None:
        raise ValueError(f"{place}: {stored} is not there; tried {', '.join(map(str, tried))}")
    return found


def _find(root: Path, beside: Path, stored: str, folder: bool = False) -> tuple[Path | None, list[Path]]:
    """(where it lies, where it was looked for)."""
    path = Path(stored)
    inner = re.sub(r"^(\./)?data/", "", path.as_posix())
    tried = [path] if path.is_absolute() else [root / inner, beside / path]
    for candidate in tried:
        if candidate.is_dir() if folder else candidate.is_file():
            return candidate, tried
    return None, tried
