# SPDX-License-Identifier: MIT
"""Uni-MMMU's rules without a model: answers out of text, judges' replies into numbers, numbers into the table.

Follows the official evaluation (Vchitect/Uni-MMMU, read through TorchUMM 083395e). Deliberate differences, each
named where a score is stored: a judge's <think> block is dropped before its JSON is looked for (`strip_think`), and
truth values may come as "0" and "false" (the original counts every text that is not empty as true).
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
COLUMNS = (  # of the official table, in its order; the key of ours, what it is, its highest value
    ("jigsaw_image", "Jigsaw image score, 1 - DreamSim distance", 1),
    ("jigsaw_text", "Jigsaw text accuracy", 1),
    ("maze_image", "Maze image accuracy by frame", 1),
    ("maze_text", "Maze text accuracy by step", 1),
    ("sliding_image", "Sliding image accuracy by frame", 1),
    ("sliding_text", "Sliding text accuracy by step", 1),
    ("math_overlay", "Geometry overlay accuracy", 1),
    ("math_text", "Geometry text accuracy", 1),
    ("science_reasoning", "Science text, reasoning", 1),
    ("science_result", "Science text, result", 1),
    ("science_image", "Science image accuracy", 1),
    ("code_text", "SVG text match", 1),
    ("code_shape_color", "SVG image, shapes and colours", 5),
    ("code_position", "SVG image, positions", 5),
)


# Answers -----------------------------------------------------------------------


def moves(text: str) -> list[str]:
    """The array in the last <ANSWER_JSON> block, lower case; [] where there is none or it is no JSON."""
    found = re.findall(r"<ANSWER_JSON>\s*(\[.*?\])\s*</ANSWER_JSON>", text, re.IGNORECASE | re.DOTALL)
    try:
        answer = json.loads(found[-1]) if found else []
    except json.JSONDecodeError:
        return []
    if answer and isinstance(answer[0], list):  # one list too many around it
        answer = answer[0]
    return [str(word).strip().lower() for word in answer]


def choice(text: str) -> tuple[int | None, str]:
    """(0, 1 or None, status) of the first <FINAL_ANSWER_JSON> block."""
    found = re.search(
        r"<FINAL_ANSWER_JSON>\s*(\{.*?\})\s*</FINAL_ANSWER_JSON>", text, re.IGNORECASE | re.DOTALL
    )
    if found is None:
        return None, "no FINAL_ANSWER_JSON block"
    try:
        picked = json.loads(found[1]).get("choice")
    except json.JSONDecodeError:
        return None, "the block is no JSON"
    good = isinstance(picked, int | float) and not isinstance(picked, bool) and picked in (0, 1)
    return (int(picked), "ok") if good else (None, f"choice must be 0 or 1, got {picked!r}")


def render_summary(text: str) -> str:
    """What stands in the first <RENDER_SUMMARY> block; "" where there is none."""
    found = re.search(r"<RENDER_SUMMARY>\s*(.*?)\s*</RENDER_SUMMARY>", text, re.IGNORECASE | re.DOTALL)
    return found[1].strip() if found else ""


def score_moves(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """`text_exact`, and `text_frame_acc`: places that agree, of the truth's length. Without a truth both are 0."""
    if not truth:
        return {"text_exact": 0, "text_frame_acc": 0.0}
    right = sum(p == t for p, t in zip(predicted, truth, strict=False))
    return {"text_exact": int(list(predicted) == list(truth)), "text_frame_acc": right / len(truth)}


def score_maze_frames(frames: Sequence[Grid], first: Maze, truth: Sequence[str]) -> dict[str, float]:
    """Painted frames against those that the true moves give: all 36 cells of a frame must agree."""
    expected = expected_frames(first, truth)
    if not expected:
        return {"img_exact": 0, "img_frame_acc": 0.0, "parse_frame_success": 0.0, "parse_all_ok": 0}
    right = sum(a == b for a, b in zip(frames, expected, strict=False))
    valid = [is_maze_of(frame, first.walls) for frame in frames]
    return {
        "img_exact": int(len(frames) == len(expected) == right),
        "img_frame_acc": right / len(expected),
        "parse_frame_success": float(np.mean(valid)) if valid else 0.0,
        "parse_all_ok": int(bool(valid) and all(valid)),
    }


def score_puzzle_frames(frames: Sequence[Grid], expected: Sequence[Grid]) -> dict[str, float]:
    """Painted frames against the data's own; without any, right is to have painted none."""
    if not expected:
        return {"img_exact": int(not frames), "img_frame_acc": float(not frames)}
    right = sum(a == b for a, b in zip(frames, expected, strict=False))
    return {"img_exact": int(list(frames) == list(expected)), "img_frame_acc": right / len(expected)}


# Judges' replies -----------------------------------------------------------------------


def first_object(text: str, strip_think: bool = True) -> dict[str, Any] | None:
    """The first balanced {…} in a reply, as JSON; None where there is none. Braces in strings do not count.

    strip_think: look behind the <think> block. False is the original, which takes a brace inside the reasoning,
    LaTeX for instance, for the answer.
    """
    text = strip_thinking(text) if strip_think else text
    start = text.find("{")
    depth, in_string, escaped = 0, False, False
    for i in range(start, len(text)) if start >= 0 else ():
        character = text[i]
        if character == '"' and not escaped:
            in_string = not in_string
        if not in_string and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                try:
                    return json.loads(text[start : i + 1])
                except json.JSONDecodeError:
                    return None
        escaped = character == "\\" and not escaped
    return None


def truth(reply: Mapping[str, Any] | None, key: str) -> int:
    """A judge's yes or no as 1 or 0: 1, true, "1", "yes" and "true" are yes; an absent or other value is no."""
    value = (reply or {}).get(key, 0)
    if isinstance(value, str):
        return int(value.strip().lower() in ("1", "1.0", "yes", "true"))
    return int(isinstance(value, bool | int | float) and value == 1)


def points(reply: Mapping[str, Any] | None, key: str) -> float:
    """A judge's 0 to 5; 0 for an absent value, and for one that is no number or out of range."""
    try:
        value = float((reply or {}).get(key, 0))
    except (TypeError, ValueError):
        return 0.0
    return value if 0 <= value <= 5 else 0.0


# Summaries of a task, with the official files' names -----------------------------------------------------------


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def summarize_frames(records: Sequence[Mapping[str, Any]], maze: bool) -> dict[str, Any]:
    """Maze and sliding: means over candidates. A leg that was not run is None."""
    summary = {
        "total_candidates": len(records),
        "text_accuracy_exact": _mean(records, "text_exact"),
        "text_accuracy_frame_macro": _mean(records, "text_frame_acc"),
        "img_accuracy_exact": _mean(records, "img_exact"),
        "img_accuracy_frame_macro": _mean(records, "img_frame_acc"),
    }
    if maze:
        summary["parse_accuracy_all_ok"] = _mean(records, "parse_all_ok")
        summary["parse_accuracy_frame_macro"] = _mean(records, "parse_frame_success")
    return summary


def summarize_jigsaw(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def summarize_math(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The original divides by the cases whose folder exists; whoever reports these must say how many that were."""
    done = [record for record in records if record["status"] == "ok"]
    return {
        "total_items": len(records),
        "scored_items": len(done),
        "ok_overlay": _sum(done, "overlay_ok"),
        "ok_text": _sum(done, "text_ok"),
        "overlay_acc": _mean(done, "overlay_ok"),
        "text_acc": _mean(done, "text_ok"),
    }


def summarize_science(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "total_cases": len(records),
        "text_reasoning_correct": _sum(records, "reasoning_correct"),
        "text_result_correct": _sum(records, "result_correct"),
        "image_correct": _sum(records, "image_correct"),
        "text_reasoning_acc": _mean(records, "reasoning_correct"),
        "text_result_acc": _mean(records, "result_correct"),
        "image_acc": _mean(records, "image_correct"),
    }


def summarize_code(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Points stay on their scale of 0 to 5."""
    return {
        "total_cases": len(records),
        "image_match_binary_rate": _mean(records, "image_match_binary"),
        "avg_shape_color_accuracy": _mean(records, "shape_color_accuracy"),
        "avg_position_accuracy": _mean(records, "position_accuracy"),
        "text_semantic_match_rate": _mean(records, "text_semantic_match"),
    }


def best_of(replies: Sequence[Mapping[str, Any] | None]) -> dict[str, float]:
    """Of several pictures' judgements the one with the largest sum; a match if any matches; zeros without one."""
    scored = [(points(r, "shape_color_accuracy"), points(r, "position_accuracy")) for r in replies]
    shape_color, position = max(scored, key=sum, default=(0.0, 0.0))
    match = any((reply or {}).get("verdict") == "match" for reply in replies)
    return {
        "shape_color_accuracy": shape_color,
        "position_accuracy": position,
        "image_match_binary": int(match),
    }


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) if values else None


def table(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The 14 numbers, keyed as in COLUMNS, of the tasks' summaries; None is not run. There is no overall number."""
    of = {
        task: summaries.get(task) or {} for task in ("jigsaw", "maze", "sliding", "math", "science", "code")
    }
    jigsaw = of["jigsaw"].get("metrics") or {}
    values = (
        jigsaw.get("image_score_penalized"),
        jigsaw.get("text_accuracy"),
        of["maze"].get("img_accuracy_frame_macro"),
        of["maze"].get("text_accuracy_frame_macro"),
        of["sliding"].get("img_accuracy_frame_macro"),
        of["sliding"].get("text_accuracy_frame_macro"),
        of["math"].get("overlay_acc"),
        of["math"].get("text_acc"),
        of["science"].get("text_reasoning_acc"),
        of["science"].get("text_result_acc"),
        of["science"].get("image_acc"),
        of["code"].get("text_semantic_match_rate"),
        of["code"].get("avg_shape_color_accuracy"),
        of["code"].get("avg_position_accuracy"),
    )
    return {key: value for (key, _, _), value in zip(COLUMNS, values, strict=True)}
