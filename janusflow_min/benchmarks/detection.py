# SPDX-License-Identifier: MIT
"""What an object detector and a colour classifier tell GenEval's rules: names and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
