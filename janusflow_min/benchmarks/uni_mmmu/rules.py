# SPDX-License-Identifier: MIT
"""Uni-MMMU's rules without a model: answers out of text, judges' replies into numbers, numbers into the table.

Follows the official evaluation (Vchitect/Uni-MMMU b5200b2, eval_ummmu.py). official_compat: its every reading, to
the letter. The default differs where that one takes a slip of form for a wrong answer, or nonsense for a right one;
docs/benchmarks.md lists each difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..judges import strip_thinking
from .boards import Grid, Maze, expected_frames, is_maze_of

CANDIDATES = "\n\n\n-----\n\n\n"  # between the texts of several candidates
# The official table in its order: key of ours, what it is, its highest value, task, key of the task's records.
COLUMNS = (
    ("jigsaw_image", "Jigsaw image score, 1 - DreamSim distance", 1, "jigsaw", "d_mean"),
    ("jigsaw_text", "Jigsaw text accuracy", 1, "jigsaw", "text_correct"),
    ("maze_image", "Maze image accuracy by frame", 1, "maze", "img_frame_acc"),
    ("maze_text", "Maze text accuracy by step", 1, "maze", "text_frame_acc"),
    ("sliding_image", "Sliding image accuracy by frame", 1, "sliding", "img_frame_acc"),
    ("sliding_text", "Sliding text accuracy by step", 1, "sliding", "text_frame_acc"),
    ("math_overlay", "Geometry overlay accuracy", 1, "math", "overlay_ok"),
    ("math_text", "Geometry text accuracy", 1, "math", "text_ok"),
    ("science_reasoning", "Science text, reasoning", 1, "science", "reasoning_correct"),
    ("science_result", "Science text, result", 1, "science", "result_correct"),
    ("science_image", "Science image accuracy", 1, "science", "image_correct"),
    ("code_text", "SVG text match", 1, "code", "text_semantic_match"),
    ("code_shape_color", "SVG image, shapes and colours", 5, "code", "shape_color_accuracy"),
    ("code_position", "SVG image, positions", 5, "code", "position_accuracy"),
)
VERDICTS = {  # leg -> the yes or no that its judge gives
    "science_text": ("reasoning_correct", "result_correct"),
    "science_image": ("image_correct",),
    "math_overlay": ("overlay_ok",),
    "math_text": ("reasoning_rigorous", "conclusion_correct", "text_ok"),
    "code_text": ("text_semantic_match",),
}
Reply = Mapping[str, Any]  # a judge's JSON, {} where it had none


# Answers -----------------------------------------------------------------------


def moves(text: str, official_compat: bool = False) -> list[str]:
    """The array in the last <ANSWER_JSON> block, lower case; [] where there is none or it is not JSON.

    One list too many around it is taken off; official_compat leaves it, so that nothing in it is right.
    """
    found = re.findall(r"<ANSWER_JSON>\s*(\[.*?\])\s*</ANSWER_JSON>", text, re.IGNORECASE | re.DOTALL)
    answer = (_json(found[-1]) if found else None) or []
    if isinstance(answer[0] if answer else None, list) and not official_compat:
        answer = answer[0]
    return [str(word).strip().lower() for word in answer]


def choice(text: str, official_compat: bool = False) -> tuple[int | None, str]:
    """(0, 1 or None, status) of the first <FINAL_ANSWER_JSON> block. official_compat: true is 1 and false is 0."""
    found = re.search(
        r"<FINAL_ANSWER_JSON>\s*(\{.*?\})\s*</FINAL_ANSWER_JSON>", text, re.IGNORECASE | re.DOTALL
    )
    if found is None:
        return None, "no FINAL_ANSWER_JSON block"
    block = _json(found[1])
    if block is None:
        return None, "the block is not JSON"
    picked = block.get("choice")
    if picked in (0, 1) and (official_compat or not isinstance(picked, bool)):
        return int(picked), "ok"
    return None, f"choice must be 0 or 1, got {picked!r:.80}"


def render_summary(text: str) -> str:
    """What stands in the first <RENDER_SUMMARY> block; "" where there is none."""
    found = re.search(r"<RENDER_SUMMARY>\s*(.*?)\s*</RENDER_SUMMARY>", text, re.IGNORECASE | re.DOTALL)
    return found[1].strip() if found else ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def score_moves(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """`text_exact`, and `text_frame_acc`: places that agree, of the truth's length. Without a truth both are 0."""
    if not truth:
        return {"text_exact": 0, "text_frame_acc": 0.0}
    right = sum(p == t for p, t in zip(predicted, truth, strict=False))
    return {"text_exact": int(list(predicted) == list(truth)), "text_frame_acc": right / len(truth)}


def score_maze_frames(frames: Sequence[Grid], first: Maze, truth: Sequence[str]) -> dict[str, float]:
    """Frames against those that the true moves give: all 36 cells of a frame must agree."""
    expected = expected_frames(first, truth)
    if not expected:
        return {"img_exact": 0, "img_frame_acc": 0.0, "parse_frame_success": 0.0, "parse_all_ok": 0}
    right = sum(a == b for a, b in zip(frames, expected, strict=False))
    valid = [is_maze_of(frame, first.walls) for frame in frames]
    return {
        "img_exact": int(len(frames) == len(expected) == right),
        "img_frame_acc": right / len(expected),
        "parse_frame_success": sum(valid) / len(valid) if valid else 0.0,
        "parse_all_ok": int(bool(valid) and all(valid)),
    }


def score_puzzle_frames(frames: Sequence[Grid], expected: Sequence[Grid]) -> dict[str, float]:
    """Frames against the data's own; without any, right is to have none."""
    if not expected:
        return {"img_exact": int(not frames), "img_frame_acc": float(not frames)}
    right = sum(a == b for a, b in zip(frames, expected, strict=False))
    return {"img_exact": int(list(frames) == list(expected)), "img_frame_acc": right / len(expected)}


# Judges' replies -----------------------------------------------------------------------


def first_object(text: str, official_compat: bool = False) -> dict[str, Any] | None:
    """The first balanced {…} in a reply, as JSON; None where there is none. Braces in strings do not count.

    It is looked for behind the <think> block. official_compat: in all of the text, so that a brace inside the
    reasoning, LaTeX for instance, is taken for the answer.
    """
    text = text.strip() if official_compat else strip_thinking(text)
    start = text.find("{")
    depth, in_string, escaped = 0, False, False
    for i in range(start, len(text)) if start >= 0 else ():
        character = text[i]
        if character == '"' and not escaped:
            in_string = not in_string
        if not in_string and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return _json(text[start : i + 1])
        escaped = character == "\\" and not escaped
    return None


def verdicts(leg: str, reply: Reply, official_compat: bool = False) -> dict[str, int]:
    """The leg's yes and no as 1 and 0. 1, 1.0, true, "1", "yes" and "true" are yes; anything else is no.

    official_compat: of science and code, whatever Python takes for true, "0" and "no" too. Of geometry, what int()
    makes 1; where int() fails for one of a leg's values, the whole judgement is 0.
    """
    keys = VERDICTS[leg]
    if not official_compat:
        return {key: _is_yes(reply.get(key)) for key in keys}
    if not leg.startswith("math"):
        return {key: int(bool(reply.get(key))) for key in keys}
    try:
        return {key: int(int(reply.get(key, 0)) == 1) for key in keys}
    except (TypeError, ValueError, OverflowError):
        return dict.fromkeys(keys, 0)


def _is_yes(value: Any) -> int:
    if isinstance(value, str):
        return int(value.strip().lower() in ("1", "1.0", "yes", "true"))
    return int(isinstance(value, bool | int | float) and value == 1)


def best_of(replies: Sequence[Reply], official_compat: bool = False) -> dict[str, float]:
    """Of several images' judgements the points of the one with the largest sum; a match if any matches.

    Points lie in [0, 5]; anything else is 0. official_compat: any number that float() makes counts, 7 and -1 too;
    where it fails ("5/5"), both points are 0 and the verdict is no match.
    """
    scored: list[tuple[float, float]] = []
    match = False
    for reply in replies:
        shape_color, position = (
            _float(reply.get(f"{key}_accuracy", 0)) for key in ("shape_color", "position")
        )
        broken = shape_color is None or position is None
        if official_compat:
            scored.append((0.0, 0.0) if shape_color is None or position is None else (shape_color, position))
        else:
            scored.append((_in_range(shape_color), _in_range(position)))
        match |= reply.get("verdict") == "match" and not (official_compat and broken)
    best = max(scored, key=sum, default=(0.0, 0.0))
    return {"shape_color_accuracy": best[0], "position_accuracy": best[1], "image_match_binary": int(match)}


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _in_range(points: float | None) -> float:
    return points if points is not None and 0 <= points <= 5 else 0.0


# Summaries of a task, with the official files' names -----------------------------------------------------------

Records = Sequence[Mapping[str, Any]]
FRAMES = {
    "text_accuracy_exact": "text_exact",
    "text_accuracy_frame_macro": "text_frame_acc",
    "img_accuracy_exact": "img_exact",
    "img_accuracy_frame_macro": "img_frame_acc",
}
MEANS = {  # task -> number in its summary -> key of the records
    "maze": FRAMES
    | {"parse_accuracy_all_ok": "parse_all_ok", "parse_accuracy_frame_macro": "parse_frame_success"},
    "sliding": FRAMES,
    "math": {"overlay_acc": "overlay_ok", "text_acc": "text_ok"},
    "science": {
        "text_reasoning_acc": "reasoning_correct",
        "text_result_acc": "result_correct",
        "image_acc": "image_correct",
    },
    "code": {
        "image_match_binary_rate": "image_match_binary",
        "avg_shape_color_accuracy": "shape_color_accuracy",  # on its scale of 0 to 5
        "avg_position_accuracy": "position_accuracy",
        "text_semantic_match_rate": "text_semantic_match",
    },
}
SUMS = {
    "math": {"ok_overlay": "overlay_ok", "ok_text": "text_ok"},
    "science": {
        "text_reasoning_correct": "reasoning_correct",
        "text_result_correct": "result_correct",
        "image_correct": "image_correct",
    },
}
TOTALS = {"maze": "total_candidates", "sliding": "total_candidates", "math": "total_items"}


def summarize(task: str, records: Records) -> dict[str, Any]:
    """A task's official summary; a number that no record has is None. Geometry divides by the cases that were
    scored: whoever reports its numbers must say how many these were."""
    total = {TOTALS.get(task, "total_cases"): len(records)}
    if task == "jigsaw":
        return _summarize_jigsaw(records)
    if task == "math":
        records = [record for record in records if record["status"] == "ok"]
        total["scored_items"] = len(records)
    sums = {name: _sum(records, key) for name, key in SUMS.get(task, {}).items()}
    return total | sums | {name: _mean(records, key) for name, key in MEANS[task].items()}


def _summarize_jigsaw(records: Records) -> dict[str, Any]:
    distance = _mean(records, "d_mean")
    return {
        "counts": {
            "total_items": len(records),
            "image_ok": sum(record.get("image_status") == "ok" for record in records),
            "text_parsed": sum(record.get("text_status") == "ok" for record in records),
        },
        "metrics": {
            "mean_distance_penalized": distance,
            "image_score_penalized": None if distance is None else 1.0 - distance,
            "text_accuracy": _mean(records, "text_correct"),
        },
    }


def _values(records: Records, key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _mean(records: Records, key: str) -> float | None:
    values = _values(records, key)
    return float(np.mean(values)) if values else None


def _sum(records: Records, key: str) -> float | None:
    values = _values(records, key)
    return sum(values) if values else None


def table(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The 14 numbers, keyed as in COLUMNS, of the tasks' summaries; None is not run. There is no overall number."""
    jigsaw = summaries.get("jigsaw", {}).get("metrics", {})
    values = {"d_mean": jigsaw.get("image_score_penalized"), "text_correct": jigsaw.get("text_accuracy")}
    number: dict[str, float | None] = {}
    for column, _, _, task, key in COLUMNS:
        if task == "jigsaw":
            number[column] = values[key]
        else:
            name = next(name for name, of in MEANS[task].items() if of == key)
            number[column] = summaries.get(task, {}).get(name)
    return number
