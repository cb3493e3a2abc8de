# SPDX-License-Identifier: MIT
"""The rendered emoji: one file outside the package, written by `scripts/things_atlas.py`.

Dimensions: K kinds, Y = 2 styles, K * Y sprites of side A = 128 px. A sprite is premultiplied RGBA, 0..255; its longer
side fills the square but for `BORDER`, and the centre of its bounding box is that of the square.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import atomic_file
from .concepts import STYLES, Kind

SIDE = 128
BORDER = 2  # px of a sprite's square that stay empty on each side
FILLED = SIDE - 2 * BORDER
LEVELS = (
    128,
    96,
    64,
    48,
    32,
)  # sides at which a sprite is kept for drawing: each size is taken from the next larger
DEFAULT_PATH = Path.home() / ".cache" / "janusflow-min" / "things.npz"


@dataclass(frozen=True, eq=False)
class Atlas:
    """kinds: K names; pixels: (K, Y, 4, A, A) uint8."""

    kinds: tuple[Kind, ...]
    pixels: Tensor

    @cached_property
    def extents(self) -> np.ndarray:
        """(K, Y, 2): half width and half height, in units of the longer side."""
        alpha = self.pixels[:, :, 3] > 64
        sides = [alpha.any(axis).sum(-1).numpy() for axis in (2, 3)]  # width, height
        longest = np.maximum(*sides)
        return np.stack([side / (2 * longest) for side in sides], -1)

    @cached_property
    def levels(self) -> Tensor:
        """(P, 4) uint8: the texels of all levels, each of K * Y sprites, row by row."""
        flat = self.pixels.flatten(0, 1).float()
        kept = [resized(flat, side) for side in LEVELS]
        return torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 4) for level in kept])


def resized(pixels: Tensor, side: int) -> Tensor:
    """(N, 4, A, A) -> (N, 4, side, side) uint8, antialiased."""
    if side != pixels.shape[-1]:
        pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def save_atlas(atlas: Atlas, path: Path) -> None:
    names = np.array([[colour or "", noun] for colour, noun in atlas.kinds])
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, kinds=names, pixels=atlas.pixels.numpy())


def load_atlas(path: str | Path | None = None) -> Atlas:
    """path: the file, or its default place. FileNotFoundError where there is none, ValueError for another file."""
    path = Path(path) if path is not None else DEFAULT_PATH
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the pictures of things are no part of the package; "
            "`python scripts/things_atlas.py` fetches and renders them"
        )
    try:
        with np.load(path) as data:
            names, pixels = data["kinds"], torch.from_numpy(data["pixels"])
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no atlas of things ({error}); write it again") from error
    if pixels.shape != (len(names), len(STYLES), 4, SIDE, SIDE) or pixels.dtype != torch.uint8:
        raise ValueError(f"{path} is no atlas of things: its pixels are {pixels.dtype} {tuple(pixels.shape)}")
    return Atlas(tuple((str(colour) or None, str(noun)) for colour, noun in names), pixels)
