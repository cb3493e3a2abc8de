# SPDX-License-Identifier: MIT
"""A judge of images of things: which of the rendered emoji an image shows, found by matching, size and place free.

It sees pixels only and knows nothing of the model that generated them. What differs from the background falls into
components, whose parts may lie a few pixels apart. Each is cut out along its bounding box, brought to one size, and
compared with every sprite, mirrored or not, at several turns, laid on the background's colour and cut out likewise. The
nearest sprite names the thing, if it is near enough and no other thing is as near; else it is "unknown".

Dimensions: T templates, G = 24 side of a cut-out brought to size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, max_pool2d

from ..shapes.judge import SPECK, UNKNOWN, Reading, Seen, _components, _pixels, background, judge
from ..shapes.scenes import MAX_OBJECTS, SIZE
from .atlas import Atlas, resized
from .captions import parse_prompt
from .concepts import STYLES, Kind
from .scenes import BACKGROUNDS, DIFFERENT, SIZES

GRID = 24
TURNS = (-8.0, -4.0, 0.0, 4.0, 8.0)  # degrees
JOIN = 3  # px; parts up to twice as far apart are one thing
RING = 2  # px of the border, where nothing but background is
ASPECT = (0.06, 3.0)  # a box's sides may differ from a template's by this share and so many px
MISFIT = 0.30  # squared difference from a template, as a share of the template's from the bare background
CLEARLY = 0.92  # the misfit is at most this share of the next thing's
AS_NEAR = 1.35  # a style whose misfit is at most so many times the best is possible too


@dataclass(frozen=True)
class SeenThing(Seen):
    """As `Seen`; radius: half of the longer side, px. With its misfit, and the runner-up's name and misfit."""

    misfit: float = 0.0
    second: Kind | None = None
    second_misfit: float = math.inf

    @property
    def size(self) -> str | None:
        """ "small" or "large", with half of the gap to the medium sizes as tolerance."""
        longer = 2 * self.radius
        if longer <= (SIZES["small"][1] + 60) / 2:
            return "small"
        return "large" if longer >= (SIZES["large"][0] + 76) / 2 else None


def _templates(atlas: Atlas, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Premultiplied RGBA (T, 4, G, G) in 0..255, each sprite's at all turns, then mirrored; numbers of sprites (T,);
    width and height (T, 2) in units of the sprite's square."""
    sprites = resized(atlas.pixels.flatten(0, 1).float(), 64).to(device).float()  # (N, 4, 64, 64)
    count, found, sides = len(sprites), [], []
    axis = torch.linspace(-1, 1, 64, device=device)
    steps = (torch.arange(2 * GRID, device=device) + 0.5) / (2 * GRID)
    for turn in TURNS:
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))

        def source(x: Tensor, y: Tensor, c: float = c, s: float = s) -> Tensor:
            return torch.stack([c * x + s * y, c * y - s * x], -1)

        whole = source(axis.view(1, 1, -1), axis.view(1, -1, 1)).expand(count, -1, -1, -1)
        alpha = grid_sample(sprites[:, 3:], whole, align_corners=True)[:, 0] > 100
        ends = []
        for dim in (1, 2):
            line = alpha.any(dim).float()
            low, high = line.argmax(1), 63 - line.flip(1).argmax(1)
            ends += [(low - 0.5) / 31.5 - 1, (high + 0.5) / 31.5 - 1]
        left, right, top, bottom = ends  # (N,)
        x = left[:, None] + (right - left)[:, None] * steps  # (N, 2G)
        y = top[:, None] + (bottom - top)[:, None] * steps
        cut = grid_sample(
            sprites, source(*torch.broadcast_tensors(x[:, None], y[:, :, None])), align_corners=True
        )
        cut = torch.nn.functional.avg_pool2d(cut, 2)
        found += [cut, cut.flip(3)]
        sides += [torch.stack([right - left, bottom - top], -1)] * 2
    numbers = torch.arange(count, device=device).repeat(2 * len(TURNS))
    return torch.cat(found), numbers, torch.cat(sides) / 2


class Judge:
    """Reads images by the sprites of an atlas; on a GPU about fifty times as fast as on a CPU's thread."""

    def __init__(self, atlas: Atlas, device: torch.device | str = "cpu"):
        self.atlas, self.device = atlas, torch.device(device)
        self.templates, self.numbers, self.sides = _templates(atlas, self.device)

    def read(self, image: Any) -> Reading:
        """What an image shows: uint8 (128, 128, 3), or a PIL image of that size."""
        pixels = _pixels(image)
        inner = np.zeros((SIZE, SIZE), bool)
        inner[RING:-RING, RING:-RING] = True
        if (likely := background(pixels[~inner], BACKGROUNDS, 0.5)) is None:
            return Reading(UNKNOWN, ())
        name, ground = likely
        difference = np.linalg.norm(pixels - ground, axis=2)
        found = self._things(pixels, ground, difference, difference > DIFFERENT, JOIN)
        return Reading(name, tuple(sorted(found, key=lambda thing: thing.centre)))

    def _things(
        self, pixels: np.ndarray, ground: np.ndarray, difference: np.ndarray, mask: np.ndarray, join: int
    ) -> list[SeenThing]:
        """What the components of a mask (S, S) are. One that is nothing known may have a side that hardly differs from
        the background, or be several that nearly touch."""
        joined = max_pool2d(torch.from_numpy(mask)[None].float(), 2 * join + 1, 1, join)[0].numpy() > 0
        found = []
        for runs in _components(joined):
            region = np.zeros_like(mask)
            for row, start, end in runs:
                region[row, start:end] = True
            part = region & mask
            if part.sum() < SPECK:
                continue
            thing = self._match(pixels, ground, part)
            if thing.shape == UNKNOWN:
                wider = self._match(pixels, ground, region & (difference > DIFFERENT / 2))
                thing = wider if wider.shape != UNKNOWN else thing
            if thing.shape == UNKNOWN and join:
                apart = self._things(pixels, ground, difference, part, join - 1)
                if len(apart) > 1 and all(each.shape != UNKNOWN for each in apart):
                    found += apart
                    continue
            found.append(thing)
        return found

    def _match(self, pixels: np.ndarray, ground: np.ndarray, part: np.ndarray) -> SeenThing:
        """The thing that a component (its mask, (S, S)) of an image (S, S, 3) on a background (3,) is."""
        rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
        x1, x2, y1, y2 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
        width, height = x2 - x1, y2 - y1
        patch = torch.from_numpy(pixels[y1:y2, x1:x2]).to(self.device).permute(2, 0, 1)[None]
        cut = interpolate(patch, (GRID, GRID), mode="bilinear", antialias=True)  # (1, 3, G, G)
        base = torch.tensor(ground, dtype=torch.float32, device=self.device)[:, None, None]
        # What fits the box by its longer side may not miss it by the other.
        scale = torch.maximum(width / self.sides[:, 0], height / self.sides[:, 1])
        missed = (
            (self.sides * scale[:, None] - torch.tensor([width, height], device=self.device)).abs().amax(1)
        )
        possible = torch.nonzero(missed <= ASPECT[0] * max(width, height) + ASPECT[1])[:, 0]
        box = (x1, y1, x2, y2)
        centre, radius = ((x1 + x2) / 2, (y1 + y2) / 2), max(width, height) / 2
        if not len(possible):
            return SeenThing(UNKNOWN, None, box, centre, float(part.sum()), radius, misfit=math.inf)
        templates = self.templates[possible]
        laid = templates[:, :3] + (1 - templates[:, 3:] / 255) * base  # (n, 3, G, G)
        misfits = (laid - cut).square().sum((1, 2, 3)) / (laid - base).square().sum((1, 2, 3)).clamp(min=1)
        best = torch.full((len(self.atlas.kinds) * len(STYLES),), math.inf, device=self.device)
        best.scatter_reduce_(0, self.numbers[possible], misfits, "amin")
        styles = best.view(-1, len(STYLES)).cpu()  # (K, Y)
        (first, second), (i, j) = (part.tolist() for part in styles.amin(1).topk(2, largest=False))
        colour, noun = self.atlas.kinds[i]
        if first > MISFIT or first > CLEARLY * second:
            noun = UNKNOWN
        near = tuple(
            style
            for style, misfit in zip(STYLES, styles[i].tolist(), strict=True)
            if misfit <= AS_NEAR * first
        )
        return SeenThing(
            noun, colour, box, centre, float(part.sum()), radius, near, first, self.atlas.kinds[j], second
        )

    def check(self, image: Any, prompt: str) -> tuple[bool, str]:
        """Whether an image (or its `Reading`) is a right answer to a prompt, and if not, why.

        Strict: exactly the things that the prompt names, with the colours, size, background, style and relation
        (GenEval's rule on the boxes) that it tells. ValueError for a prompt of another world.
        """
        spec = parse_prompt(prompt)
        if spec is None or sum(item.count for item in spec.items) > MAX_OBJECTS:
            raise ValueError(f"not a prompt of this world: {prompt!r}")
        return judge(image if isinstance(image, Reading) else self.read(image), spec)
