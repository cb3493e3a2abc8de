# SPDX-License-Identifier: MIT
"""An atlas of invented sprites, in place of the emoji, which are no part of the repository."""

from __future__ import annotations

import numpy as np
import torch

from janusflow_min.things.atlas import BORDER, FILLED, SIDE, Atlas
from janusflow_min.things.concepts import GENEVAL, STYLES

KINDS = (*list(GENEVAL)[:10], ("black", "cat"), ("green", "apple"), ("red", "apple"), ("blue", "book"))


def invented(kinds=KINDS, seed=0) -> Atlas:
    """Each sprite: two dark coloured blocks of its own sizes on a coloured bar that is as wide as the square."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((len(kinds), len(STYLES), 4, SIDE, SIDE), np.uint8)
    for sprite in pixels.reshape(-1, 4, SIDE, SIDE):
        top, left, width = rng.integers(BORDER, 40), rng.integers(BORDER, 60), rng.integers(20, 60)
        colours = rng.integers(0, 130, (3, 3, 1, 1))
        for colour, place in (
            (colours[0], np.s_[:, 60 : 60 + rng.integers(20, 60), BORDER : BORDER + FILLED]),
            (colours[1], np.s_[:, top:64, left : left + width]),
            (colours[2], np.s_[:, 50:80, 30 : 30 + width]),
        ):
            sprite[place][:3] = colour
            sprite[place][3] = 255
    return Atlas(kinds, torch.from_numpy(pixels))
