# SPDX-License-Identifier: MIT
"""What an object detector and a colour classifier tell GenEval's rules: names and boxes, in memory and on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAVED_ABOVE = 0.05  # score of the faintest detections that are kept on disk, unless a threshold is below it

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLASSES = tuple(  # COCO's 80 in their contiguous order, three of them under the benchmark's names
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n   ", "").split(", ")
)


@dataclass(frozen=True)
class Detection:
    """One object that a detector found: the rules' only input."""

    label: str  # one of CLASSES
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in px, y downward
    score: float
    mask: np.ndarray | None = None  # (H, W) bool, the whole image's size


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    flat = np.asarray(mask, bool).flatten(order="F")
    change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], change, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode_mask(record: Mapping[str, Any]) -> np.ndarray:
    height, width = record["size"]
    counts = np.asarray(record["counts"], dtype=np.int64)
    if counts.sum() != height * width:
        raise ValueError(f"a mask of {height} x {width} needs {height * width} pixels, got {counts.sum()}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def detection_record(found: Sequence[Detection], above: float = SAVED_ABOVE) -> list[dict[str, Any]]:
    """Those whose score is over `above`."""
    return [
        {
            "class": d.label,
            "box": [float(v) for v in d.box],
            "score": float(d.score),
            **({} if d.mask is None else {"mask": encode_mask(d.mask)}),
        }
        for d in found
        if d.score > above
    ]


class SavedDetections(Mapping[str, list[Detection]]):
    """file name -> detections of a detections.jsonl, read when asked for: with their masks they are large.

    A line has `filename` and `detections` (class, box, score and, where there is one, mask); the last of a file name
    counts. faintest: score above which detections are needed; a line that says by `saved_above` that it has not all
    of them is refused. ValueError with file and line for what does not fit.
    """

    FORM = '{"filename": "00000/samples/0.png", "detections": [{"class", "box": [x1, y1, x2, y2], "score"}]}'

    def __init__(self, path: str | Path, faintest: float = math.inf):
        self.path, self.faintest = Path(path), faintest
        self.lines: dict[str, tuple[int, int]] = {}  # file name -> (number of the line, where it starts)
        self.seen: dict[str, str] = {}  # file name -> sha256 of the image, of lines that have it
        with open(self.path, "rb") as f:
            number, start = 1, 0
            for line in f:
                if line.strip():
                    record = self._record(line, number)
                    self.lines[record["filename"]] = (number, start)
                    self.seen[record["filename"]] = str(record.get("sha256", ""))
                number, start = number + 1, start + len(line)

    def __getitem__(self, name: str) -> list[Detection]:
        number, start = self.lines[name]
        with open(self.path, "rb") as f:
            f.seek(start)
            record = self._record(f.readline(), number)
        try:
            masks = [decode_mask(d["mask"]) if d.get("mask") else None for d in record["detections"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}:{number}: not a mask: {error}") from None
        return [
            Detection(d["class"], tuple(d["box"]), d["score"], mask)
            for d, mask in zip(record["detections"], masks, strict=True)
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        place = f"{self.path}:{number}"
        try:
            record = json.loads(line)
            for d in record["detections"]:
                numbers = [*map(float, d["box"]), float(d["score"])]
                if d["class"] not in CLASSES or len(numbers) != 5 or not all(map(math.isfinite, numbers)):
                    raise ValueError(f"class, box or score of {d}")
            if not isinstance(record["filename"], str):
                raise ValueError(f"the filename {record['filename']!r}")
            saved_above = float(record.get("saved_above", -math.inf))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{place}: a line needs {self.FORM}: {type(error).__name__}: {str(error)[:200]}"
            ) from None
        if saved_above > self.faintest:
            raise ValueError(
                f"{place} has the detections above {saved_above} alone, but those above {self.faintest} are needed: "
                "detect again"
            )
        return record
