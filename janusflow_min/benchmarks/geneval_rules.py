# SPDX-License-Identifier: MIT
"""GenEval's rules: from the objects that a detector found in an image to right or wrong, and to the benchmark's number.

They follow djghosh13/geneval (`evaluation/evaluate_images.py`, `summary_scores.py`) and are pure Python: their only
input are `Detection`s. They compute in float32, as the official scorer does on mmdet's boxes, so edges and ties fall
alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..options import option
from .detection import CLASSES, Detection

TAGS = {  # lines of each in the published file
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The official scorer's options and their defaults."""

    threshold: float = option("a detection's score must be above it", 0.3, rule=True)
    counting_threshold: float = option("the same for counting prompts", 0.9, rule=True)
    max_objects: int = option("best detections kept of a class", 16, rule=True)
    max_overlap: float = option(
        "IoU from which a fainter box of the class is dropped; 1 keeps all", 1.0, rule=True
    )
    position_threshold: float = option("share of the sizes by which objects must be apart", 0.1, rule=True)
    bgcolor: str = option("colour around an object for CLIP, or original", "#999", rule=True)
    crop: bool = option("show CLIP the object's box alone", True, rule=True)


def keep(detections: Sequence[Detection], tag: str, rules: Rules = Rules()) -> dict[str, list[Detection]]:
    """The detections that count, best first, by class in the order of CLASSES."""
    limit = rules.counting_threshold if tag == "counting" else rules.threshold
    kept = {}
    for label in CLASSES:
        own = [d for d in detections if d.label == label]
        rows = np.array([[*d.box, d.score] for d in own], np.float32).reshape(-1, 5)
        order = np.argsort(rows[:, 4])[::-1]  # of equal scores the later one first
        best = order[rows[order, 4] > limit][: rules.max_objects].tolist()
        if rules.max_overlap != 1:
            best = suppress(rows, best, rules.max_overlap)
        if best:
            kept[label] = [own[i] for i in best]
    return kept


def suppress(boxes: np.ndarray, order: Sequence[int], limit: float) -> list[int]:
    """Greedy non-maximum suppression of one class: of `order`, best first, those whose IoU with every better one that
    stays is below `limit`."""
    kept: list[int] = []
    for candidate in order:
        if all(iou(boxes[better], boxes[candidate]) < limit for better in kept):
            kept.append(candidate)
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose last pixel is part of them."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - both
    return both / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where box `a` lies as seen from box `b`: none, one or two of RELATIONS."""
    boxes = np.array([a[:4], b[:4]], np.float32)
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, np.abs(boxes[:, 2:] - boxes[:, :2])
    offset = centres[0] - centres[1]
    apart = np.maximum(np.abs(offset) - threshold * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)  # by the length before the sizes were taken off
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def judge(
    metadata: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    colours: Callable[[str, Sequence[Detection]], Sequence[str]],
    position_threshold: float = 0.1,
) -> tuple[bool, str]:
    """(correct, reasons, one a line) of one image.

    objects: by class, best first, as `keep` gives them. colours: (class, detections) -> the colour of each; asked
    only where a clause names one.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        label, count = clause["class"], clause["count"]
        found = list(objects.get(label, ()))[:count]
        wrong = ""
        if len(found) < count:
            wrong = f"expected {label}>={count}, found {len(found)}"
        elif "color" in clause:
            seen = list(colours(label, found))
            if seen.count(clause["color"]) < count:
                names = ", ".join(f"{n} {name}" for name, n in Counter(seen).items())
                wrong = f"expected {clause['color']} {label}>={count}, found {seen.count(clause['color'])} ({names})"
        if not wrong and "position" in clause:
            wrong = _misplaced(clause, found, groups, metadata["include"], position_threshold)
        if wrong:
            reasons.append(wrong)
        groups.append(None if wrong else found)
    for clause in metadata.get("exclude", ()):
        there = len(objects.get(clause["class"], ()))
        if there >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {there}")
    return not reasons, "\n".join(reasons)


def _misplaced(clause, found, groups, include, threshold: float) -> str:
    relation, index = clause["position"]
    target = groups[index]
    name = include[index]["class"]
    if target is None:
        return f"no target {name} for {clause['class']} to be {relation}"
    for thing in found:
        for other in target:
            seen = relations(thing.box, other.box, threshold)
            if relation not in seen:
                found_at = " and ".join(sorted(seen)) or "in no relation to it"
                return f"expected {clause['class']} {relation} {name}, found it {found_at}"
    return ""


def aggregate(results: Sequence[Mapping[str, Any]], official_compat: bool = False) -> dict[str, Any]:
    """Accuracy by tag over images, their unweighted mean, and what the official summary prints beside it.

    results: records with tag, correct and metadata. A tag without an image is None, and so is the mean then;
    official_compat: the mean is over the other tags.
    """
    tags = {tag: [bool(r["correct"]) for r in results if r["tag"] == tag] for tag in TAGS}
    means = {tag: float(np.mean(values)) if values else None for tag, values in tags.items()}
    prompts: dict[str, bool] = {}
    for r in results:
        prompts[r["metadata"]] = prompts.get(r["metadata"], False) or bool(r["correct"])
    there = [mean for mean in means.values() if mean is not None]
    whole = len(there) == len(TAGS) or (official_compat and there)
    return {
        "tags": means,
        "overall": float(np.mean(there)) if whole else None,
        "images": len(results),
        "prompts": len(prompts),
        "correct_images": float(np.mean([bool(r["correct"]) for r in results])) if results else None,
        "correct_prompts": float(np.mean(list(prompts.values()))) if prompts else None,
    }
