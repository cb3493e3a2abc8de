# SPDX-License-Identifier: MIT
"""A rule-based judge: what shapes, colours and places an image shows, and whether a prompt asks for them.

It sees pixels only and knows nothing of the model that generated them. The background is the named colour that
most of the image has; what differs from it falls into connected components. A component's colour is that of
its inner pixels; its shape is the one whose outline (`scenes.py`), fitted to the component's centre and area,
differs least from it. Where no outline fits, or two fit alike, it is "unknown", and no prompt is satisfied.

Dimensions: S side of the image, h w height and width of a cut-out; pixels 0..255.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch

from .captions import Item, Spec, parse_prompt, plural
from .scenes import BACKGROUNDS, MAX_OBJECTS, SIZE, WORLD, Box, World, relations

UNKNOWN = "unknown"
SPECK = 25.0  # px; components of a smaller area are noise
DIFFERENT = 32.0  # distance in rgb from the background's colour from which a pixel belongs to an object
SAME_BACKGROUND = 28.0  # distance in rgb within which the background has a name
SAME_COLOUR = 45.0  # distance in rgb within which a colour has a name: half of orange to yellow
UNIFORM = 0.9  # share of an object's inner pixels that are of its colour, at least


@dataclass(frozen=True)
class Seen:
    """One component: names or "unknown"; box (x1, y1, x2, y2), centre, area and radius (as in scenes), px.

    colour: None where a thing has none to tell; styles: those that it could be of, in worlds that have styles.
    """

    shape: str
    colour: str | None
    box: Box
    centre: tuple[float, float]
    area: float
    radius: float
    styles: tuple[str, ...] = ()

    @property
    def size(self) -> str | None:
        return size_of(self.radius)


@dataclass(frozen=True)
class Reading:
    """The background's name or "unknown", and all that lies on it, from left to right."""

    background: str
    objects: tuple[Seen, ...]


# ---- from pixels to components -----------------------------------------------------------------------------


def _components(mask: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """The 8-connected components of a mask (S, S), as runs (row, first, last + 1): union-find over runs."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)  # (S, S + 1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # the first run that may still touch the current one from the row above
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start):
            above += 1
        j = above
        while j < i and runs[j][0] == row - 1 and runs[j][1] <= end:
            parent[root(j)] = root(i)
            j += 1
    found: dict[int, list[tuple[int, int, int]]] = {}
    for i, run in enumerate(runs):
        found.setdefault(root(i), []).append(run)
    return list(found.values())


def _nearest(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]], limit: float) -> str:
    distance, name = min((float(np.linalg.norm(colour - rgb)), name) for name, rgb in names.items())
    return name if distance <= limit else UNKNOWN


def _erode(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (h, w) whose four neighbours are in it too."""
    m = np.pad(mask, 1)
    return mask & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]


# ---- outlines ----------------------------------------------------------------------------------------------


def _outline(
    alpha: np.ndarray, box: tuple[int, int, int, int], area: float, world: World
) -> tuple[str, float]:
    """The shape whose outline fits a cover map (h, w) best, or "unknown", and its radius in px.

    Every outline gets the component's area and is tried around the centre of its box, moved by up to half a
    pixel. The misfit is the area in which the two differ, as a share of the component's. Blur costs an
    outline about a pixel all around, which is more for a small one, and rounds the tips of triangles and
    stars.
    """
    x1, y1, x2, y2 = box
    x = torch.arange(alpha.shape[1], dtype=torch.float64)[None] + 0.5 - (x1 + x2) / 2  # (1, w)
    y = torch.arange(alpha.shape[0], dtype=torch.float64)[:, None] + 0.5 - (y1 + y2) / 2  # (h, 1)
    misfits = []
    for shape, outline in world.outlines.items():
        radius = math.sqrt(area / outline.area)
        tried = []
        for dx, dy in ((0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
            cover = (0.5 - outline.distance(x - dx, y - dy, radius)).clamp(0, 1).numpy()
            tried.append(float(np.abs(alpha - cover).sum()) / area)
        misfits.append((min(tried), shape, radius))
    (best, shape, radius), (second, *_), *_ = sorted(misfits)
    if best > 0.10 + 1.6 / radius or best > 0.7 * second:
        return UNKNOWN, radius
    half_width, half_height = world.outlines[shape].half_box
    slack = 1.5 + 0.05 * radius
    tips = 2.0 if shape in ("triangle", "star") else 0.0
    for side, expected in ((x2 - x1, 2 * half_width * radius), (y2 - y1, 2 * half_height * radius)):
        if not -slack - tips <= side - expected <= slack:
            return UNKNOWN, radius
    return shape, radius


# ---- reading -----------------------------------------------------------------------------------------------


def _pixels(image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.dtype != np.uint8 or pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected uint8 ({SIZE}, {SIZE}, 3), got {pixels.dtype} {pixels.shape}")
    return pixels.astype(np.float32)


def _object(
    pixels: np.ndarray, ground: np.ndarray, runs: list[tuple[int, int, int]], world: World
) -> Seen | None:
    """A component (its runs) of an image (S, S, 3) whose background is `ground` (3,); None for a speck."""
    top, bottom = max(runs[0][0] - 2, 0), min(runs[-1][0] + 3, SIZE)
    left, right = max(min(run[1] for run in runs) - 2, 0), min(max(run[2] for run in runs) + 2, SIZE)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for row, start, end in runs:
        mask[row - top, start - left : end - left] = True
    if mask.sum() < SPECK:
        return None
    patch = pixels[top:bottom, left:right]  # (h, w, 3)
    inner = _erode(_erode(mask))
    if inner.sum() < 12:
        inner = mask
    inside = patch[inner]  # (n, 3)
    colour = np.median(inside, axis=0)
    uniform = float((np.linalg.norm(inside - colour, axis=1) < SAME_COLOUR).mean())
    name = _nearest(colour, world.colours, SAME_COLOUR) if uniform >= UNIFORM else UNKNOWN
    # An edge pixel is a mixture: the object's share of it is its place between the two colours.
    way = colour - ground
    near = np.pad(mask, 1)
    near = near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:] | mask
    alpha = np.clip(((patch - ground) @ way) / float(way @ way), 0, 1) * near
    alpha[inner] = 1
    area = float(alpha.sum())
    solid = alpha >= 0.5
    if area < SPECK or not solid.any():
        return None
    rows, columns = np.nonzero(solid.any(1))[0], np.nonzero(solid.any(0))[0]
    x1, x2, y1, y2 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
    shape, radius = _outline(alpha, (x1, y1, x2, y2), area, world)
    box = (left + x1, top + y1, left + x2, top + y2)
    return Seen(shape, name, box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), area, radius)


def background(
    pixels: np.ndarray, names: Mapping[str, tuple[int, int, int]], least: float
) -> tuple[str, np.ndarray] | None:
    """The background of most of the pixels (n, 3), and their median colour (3,); None for less than a share of them."""
    shares = {
        name: np.linalg.norm(pixels - np.array(rgb, np.float32), axis=1) < SAME_BACKGROUND
        for name, rgb in names.items()
    }
    likely = max(shares, key=lambda name: int(shares[name].sum()))
    if shares[likely].mean() < least:
        return None
    return likely, np.median(pixels[shares[likely]], axis=0)


def read(image, world: World = WORLD) -> Reading:
    """What an image shows.

    Args:
        image: uint8 (128, 128, 3), or a PIL image of that size.
    """
    pixels = _pixels(image)
    if (likely := background(pixels.reshape(-1, 3), BACKGROUNDS, 0.25)) is None:
        return Reading(UNKNOWN, ())
    name, ground = likely
    mask = np.linalg.norm(pixels - ground, axis=2) > DIFFERENT
    found = [_object(pixels, ground, runs, world) for runs in _components(mask)]
    objects = sorted((thing for thing in found if thing is not None), key=lambda thing: thing.centre)
    return Reading(name, tuple(objects))


# ---- judging -----------------------------------------------------------------------------------------------


def size_of(radius: float) -> str | None:
    """ "small" or "large", with half of the gap to the medium sizes as tolerance (px); None between."""
    if radius <= 19.5:
        return "small"
    return "large" if radius >= 26.5 else None


def _is(thing: Seen, item: Item) -> bool:
    return (
        thing.shape == item.shape and item.colour in (None, thing.colour) and item.size in (None, thing.size)
    )


def _words(item: Item) -> str:
    return " ".join(word for word in (item.size, item.colour, item.shape) if word)


def judge(reading: Reading, spec: Spec, world: World = WORLD) -> tuple[bool, str]:
    """Whether an image shows exactly what is asked: these objects and no others. If so, the reason is ""."""
    things = reading.objects
    slots = [item for item in spec.items for _ in range(item.count)]
    if reading.background == UNKNOWN or spec.background not in (None, reading.background):
        return False, f"background: expected {spec.background or 'a known one'}, seen {reading.background}"
    if any(thing.shape == UNKNOWN for thing in things):
        return False, "an object of no known shape"
    if any(thing.colour == UNKNOWN for thing in things):
        return False, "an object of no known colour"
    if len(things) != len(slots):
        return False, f"objects: expected {len(slots)}, seen {len(things)}"
    if spec.style and not all(spec.style in thing.styles for thing in things):
        return False, f"not in {spec.style} style"
    expected, seen = Counter(item.shape for item in slots), Counter(thing.shape for thing in things)
    if expected != seen:
        shape = next(shape for shape in (*world.outlines, *expected, *seen) if expected[shape] != seen[shape])
        return False, f"{plural(shape)}: expected {expected[shape]}, seen {seen[shape]}"
    for item in slots:
        if not any(_is(thing, item) for thing in things):
            return False, f"no {_words(item)}"
    reason = "the objects are not those that are asked for"
    for order in permutations(things):  # at most 4! = 24
        if all(_is(thing, item) for thing, item in zip(order, slots, strict=True)):
            if spec.relation is None:
                return True, ""
            first, count = spec.items[0], spec.items[0].count
            if all(spec.relation in relations(a.box, b.box) for a in order[:count] for b in order[count:]):
                return True, ""
            reason = f"the {_words(first)} is not {spec.relation} the {_words(spec.items[1])}"
    return False, reason


def check(image, prompt: str) -> tuple[bool, str]:
    """Whether an image is a right answer to a prompt, and if not, why.

    Strict: exactly the objects that the prompt names, each of a clear shape and colour, with the colours,
    size, background and relation (GenEval's rule on the boxes) that the prompt tells.

    Args:
        image: uint8 (128, 128, 3), a PIL image of that size, or a `Reading`.
        prompt: any caption of this world.
    """
    spec = parse_prompt(prompt)
    if spec is None or sum(item.count for item in spec.items) > MAX_OBJECTS:
        raise ValueError(f"not a prompt of this world: {prompt!r}")
    return judge(image if isinstance(image, Reading) else read(image), spec)
