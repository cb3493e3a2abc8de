# SPDX-License-Identifier: MIT
"""Synthetic scenes of one to four flat shapes: what is in them, which are held out, and how they are drawn.

A scene is plain data, sampled from a `random.Random` in pure Python; `pack` turns scenes into one tensor,
which `render` draws on any device with antialiased signed-distance functions. The families are GenEval's
(Ghosh et al. 2023, arXiv:2310.11513); "left of" and its kin follow GenEval's rule on bounding boxes.

Pixels: x to the right, y downward, (0, 0) the upper left corner of the image, centres of pixels at +0.5.
Dimensions: B scenes, K = 4 slots for objects, S = 128 side of an image in pixels.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 128  # px, side of an image
MAX_OBJECTS = 4
MARGIN = 3.0  # px between an object's circle and the edge of the image, at least
GAP = 5.0  # px between two objects' circles, at least
JITTER = 6  # each channel of a colour moves by at most this much, of 255
CLEAR = 1.6  # a relation is clear where the larger offset is at least this many times the smaller one

COLOURS = {
    "red": (220, 40, 40),
    "orange": (242, 130, 25),
    "yellow": (248, 222, 40),
    "green": (40, 160, 70),
    "blue": (45, 90, 220),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
    "black": (35, 35, 35),
}
BACKGROUNDS = {"white": (248, 248, 248), "grey": (195, 195, 195), "cream": (247, 231, 188)}
SIZES = {"small": (14.0, 18.0), "large": (28.0, 38.0)}  # px, radius of a single object
MEDIUM = (21.0, 25.0)  # px, a single object that no size word fits
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAIN_FAMILIES = (*FAMILIES, "mixed")

# Every shape lies within the circle of `radius` around (x, y), and (x, y) is the centre of its bounding box.
# Lengths below are in units of the radius.
CIRCLE = 0.88
SQUARE = math.sqrt(0.5)  # half side
TRIANGLE = (0.768, 0.64)  # half width, half height
STAR = 1 / math.hypot(math.sin(math.pi / 5), (1 + math.cos(math.pi / 5)) / 2)  # centre to tip
STAR_INNER = 0.45  # centre to inner corner, in units of STAR
STAR_DOWN = STAR * (1 - math.cos(math.pi / 5)) / 2  # the star's own centre lies this far below its box's
CROSS = (0.92, 0.3)  # half length, half width of a bar
RING = (0.9, 0.5)  # outer, inner radius


def _circle(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    return (x * x + y * y).sqrt() - CIRCLE * r


def _square(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - SQUARE * r


def _triangle(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    w, h = TRIANGLE
    return torch.maximum((2 * h * x.abs() - w * (y + h * r)) / math.hypot(2 * h, w), y - h * r)


def _star(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    """Folds the plane into half a tip (y upward, tip at the top); then the distance to its straight edge."""
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    px, py = x.abs(), STAR_DOWN * r - y
    fold = 2 * (c * px - s * py).clamp(min=0)
    px, py = px - c * fold, py + s * fold
    fold = 2 * (-c * px - s * py).clamp(min=0)
    px, py = (px + c * fold).abs(), py + s * fold
    tip = STAR * r
    ex, ey = STAR_INNER * s, STAR_INNER * c - 1  # from the tip to the inner corner, in units of `tip`
    return ((py - tip) * ex - px * ey) / math.hypot(ex, ey)


def _cross(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    (long, thin), ax, ay = CROSS, x.abs(), y.abs()
    bar = torch.maximum(ax - long * r, ay - thin * r)
    return torch.minimum(bar, torch.maximum(ax - thin * r, ay - long * r))


def _ring(x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    outer, inner = RING
    return ((x * x + y * y).sqrt() - (outer + inner) / 2 * r).abs() - (outer - inner) / 2 * r


class Outline(NamedTuple):
    """A shape's area and half width and height of its bounding box for radius 1, and its signed distance.

    `distance(x, y, r)`: px to the edge of the shape of radius r around (0, 0), negative inside. Straight edges are
    exact; beyond a corner it may be too small, which keeps the corners sharp.
    """

    area: float
    half_box: tuple[float, float]
    distance: Callable[[Tensor, Tensor, Tensor | float], Tensor]


_STAR_BOX = (STAR * math.sin(2 * math.pi / 5), STAR * (1 + math.cos(math.pi / 5)) / 2)
OUTLINES = {
    "circle": Outline(math.pi * CIRCLE**2, (CIRCLE, CIRCLE), _circle),
    "square": Outline(4 * SQUARE**2, (SQUARE, SQUARE), _square),
    "triangle": Outline(2 * TRIANGLE[0] * TRIANGLE[1], TRIANGLE, _triangle),
    "star": Outline(5 * STAR**2 * STAR_INNER * math.sin(math.pi / 5), _STAR_BOX, _star),
    "cross": Outline(8 * CROSS[0] * CROSS[1] - 4 * CROSS[1] ** 2, (CROSS[0], CROSS[0]), _cross),
    "ring": Outline(math.pi * (RING[0] ** 2 - RING[1] ** 2), (RING[0], RING[0]), _ring),
}
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class World:
    """The colours (name -> rgb, 0..255) and outlines (shape -> `Outline`) that are rendered and judged."""

    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=lambda: COLOURS)
    outlines: Mapping[str, Outline] = field(default_factory=lambda: OUTLINES)


WORLD = World()


@dataclass(frozen=True, slots=True)
class Object:
    """One flat shape: names from `SHAPES` and `COLOURS`, centre and radius in px, rgb in 0..255."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (x1, y1, x2, y2) in px."""
        half_width, half_height = OUTLINES[self.shape].half_box
        w, h = half_width * self.radius, half_height * self.radius
        return self.x - w, self.y - h, self.x + w, self.y + h


@dataclass(frozen=True, slots=True)
class Scene:
    """A background (name and rgb in 0..255) and one to four objects, none overlapping."""

    background: str
    background_rgb: tuple[int, int, int]
    objects: tuple[Object, ...]


# ---- what is held out of training --------------------------------------------------------------------------
#
# Whole combinations, so that a right answer on them is not remembered, while each of their parts occurs in other
# company: else training would teach that it cannot be. No scene of the training split holds:

HELD_OUT_SINGLE = frozenset(  # nothing but an object of this size and shape on this background: 6 of 36
    {
        ("small", "star", "white"),
        ("large", "circle", "white"),
        ("small", "cross", "grey"),
        ("large", "triangle", "grey"),
        ("small", "square", "cream"),
        ("large", "ring", "cream"),
    }
)
HELD_OUT_COUNT = frozenset(  # nothing but so many objects, all of this colour and shape: 32 of 192
    (count, colour, shape)
    for count in range(1, MAX_OBJECTS + 1)
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
    if (count + i + j) % 6 == 0
)


def _digest(*words: str) -> int:
    """A number that depends on the words alone: the same on every machine, in every run."""
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")


def _held_out_relations() -> frozenset[tuple[str, str, str]]:
    """Triples (A, relation, B), 10 of 60, and their mirror images (B, opposite relation, A).

    Five along each axis, at most one of a pair's four.
    """
    options = [
        (_digest(a, relation, b), a, relation, b)
        for pair in combinations(SHAPES, 2)
        for a, b in (pair, pair[::-1])
        for relation in ("left of", "above")
    ]
    chosen: dict[frozenset[str], tuple[str, str, str]] = {}
    for _, a, relation, b in sorted(options):
        if frozenset((a, b)) not in chosen and [r for _, r, _ in chosen.values()].count(relation) < 5:
            chosen[frozenset((a, b))] = (a, relation, b)
    return frozenset(chosen.values()) | {(b, OPPOSITE[relation], a) for a, relation, b in chosen.values()}


Kind = tuple[str, str]  # (colour, shape)


def _held_out_bindings() -> frozenset[tuple[Kind, Kind]]:
    """Unordered couples of (colour, shape) of different shapes, in both orders: about one in six of 960."""
    found: set[tuple[Kind, Kind]] = set()
    for a, b in combinations(SHAPES, 2):
        for one in COLOURS:
            for two in COLOURS:
                if _digest(one, a, two, b) % 6 == 0:
                    found |= {((one, a), (two, b)), ((two, b), (one, a))}
    return frozenset(found)


HELD_OUT_RELATION = _held_out_relations()  # A in this relation to B (by GenEval's rule)
HELD_OUT_BINDING = _held_out_bindings()  # one object of the first kind and one of the second

HELD_OUT_RULE = {  # the rule that the held-out scenes of a family break
    "single_object": "size_shape_background",
    "two_object": "binding",  # both objects of one colour
    "counting": "count_colour_shape",
    "colors": "colour_shape",
    "position": "relation",
    "color_attr": "binding",  # of two
}


def _kind_reasons(kinds: Sequence[Kind]) -> set[str]:
    """The rules that a scene breaks by its colours and shapes alone."""
    reasons = set()
    if len(set(kinds)) == 1 and (len(kinds), *kinds[0]) in HELD_OUT_COUNT:
        reasons.add("colour_shape" if len(kinds) == 1 else "count_colour_shape")
    if any(couple in HELD_OUT_BINDING for couple in combinations(kinds, 2)):
        reasons.add("binding")
    return reasons


def held_out_reasons(scene: Scene) -> set[str]:
    """The rules (values of `HELD_OUT_RULE`) that keep a scene out of training; empty for a training scene."""
    objects = scene.objects
    reasons = _kind_reasons([(thing.colour, thing.shape) for thing in objects])
    if len(objects) == 1:
        thing = objects[0]
        if (size_word(thing.radius), thing.shape, scene.background) in HELD_OUT_SINGLE:
            reasons.add("size_shape_background")
    for a, b in combinations(objects, 2):
        if a.shape != b.shape:
            for relation in relations(a.box, b.box):
                if (a.shape, relation, b.shape) in HELD_OUT_RELATION:
                    reasons.add("relation")
    return reasons


# ---- sizes and relations -----------------------------------------------------------------------------------


def size_word(radius: float) -> str | None:
    """ "small" or "large" for the radius (px) of a single object, None between the two."""
    for word, (low, high) in SIZES.items():
        if low <= radius <= high:
            return word
    return None


Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in px


def relations(a: Box, b: Box) -> list[str]:
    """GenEval's relations of box a to box b: none, one or two of `RELATIONS`.

    What exceeds a tenth of the summed sizes counts, and has to be over half of the offset's length.
    """
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    x = math.copysign(max(abs(dx) - 0.1 * (a[2] - a[0] + b[2] - b[0]), 0), dx)
    y = math.copysign(max(abs(dy) - 0.1 * (a[3] - a[1] + b[3] - b[1]), 0), dy)
    found = []
    if max(abs(x), abs(y)) >= 1e-3:
        half = 0.5 * math.hypot(dx, dy)
        if abs(x) > half:
            found.append("left of" if x < 0 else "right of")
        if abs(y) > half:
            found.append("above" if y < 0 else "below")
    return found


def clear_relation(a: Any, b: Any) -> str | None:
    """The one relation of a to b where one axis clearly dominates (by `CLEAR`), else None. Objects of any world."""
    x, y = abs(a.x - b.x), abs(a.y - b.y)
    if max(x, y) < CLEAR * min(x, y):
        return None
    found = relations(a.box, b.box)
    return found[0] if len(found) == 1 else None


# ---- sampling ----------------------------------------------------------------------------------------------

_COLOURS, _BACKGROUNDS = tuple(COLOURS), tuple(BACKGROUNDS)
_ORDERED_HELD_OUT: dict[str, list[Any]] = {  # sorted, so that a seed picks the same element in every process
    "single_object": sorted(HELD_OUT_SINGLE),
    "two_object": sorted((one, two) for one, two in HELD_OUT_BINDING if one[0] == two[0]),
    "counting": sorted(kind for kind in HELD_OUT_COUNT if kind[0] > 1),
    "colors": sorted(kind[1:] for kind in HELD_OUT_COUNT if kind[0] == 1),
    "position": sorted(HELD_OUT_RELATION),
    "color_attr": sorted((one, two) for one, two in HELD_OUT_BINDING if one[0] != two[0]),
}


def _pick(rng: random.Random, options: Sequence):
    return options[int(rng.random() * len(options))]  # several times faster than rng.choice


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _jitter(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    width = 2 * JITTER + 1
    r, g, b = rgb
    return (
        r - JITTER + int(width * rng.random()),
        g - JITTER + int(width * rng.random()),
        b - JITTER + int(width * rng.random()),
    )


def _place(rng: random.Random, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Uniform centres (px) for circles of these radii, `GAP` apart and `MARGIN` inside, by rejection."""
    random_ = rng.random
    while True:
        placed: list[tuple[float, float, float]] = []
        for radius in radii:
            low, span = radius + MARGIN, SIZE - 2 * (radius + MARGIN)
            for _ in range(20):
                x, y = low + span * random_(), low + span * random_()
                for x2, y2, reach in placed:
                    if (x - x2) ** 2 + (y - y2) ** 2 < (radius + reach) ** 2:
                        break
                else:
                    placed.append((x, y, radius + GAP))
                    break
            else:
                break  # no room: start again
        else:
            return [(x, y) for x, y, _ in placed]


def _place_related(rng: random.Random, radii: Sequence[float], relation: str) -> list[tuple[float, float]]:
    """Centres (px) of two circles, the first clearly in this relation to the second.

    The image is symmetric, so one clear pair of places is turned until it shows the relation.
    """
    while True:
        (x1, y1), (x2, y2) = _place(rng, radii)
        if max(abs(x1 - x2), abs(y1 - y2)) >= CLEAR * min(abs(x1 - x2), abs(y1 - y2)):
            break
    if (abs(x1 - x2) > abs(y1 - y2)) != (relation in ("left of", "right of")):
        x1, y1, x2, y2 = y1, x1, y2, x2
    if (x1 > x2) != (relation == "right of") and relation in ("left of", "right of"):
        x1, x2 = SIZE - x1, SIZE - x2
    if (y1 > y2) != (relation == "below") and relation in ("above", "below"):
        y1, y2 = SIZE - y1, SIZE - y2
    return [(x1, y1), (x2, y2)]


def _two_shapes(rng: random.Random) -> tuple[str, str]:
    first = int(6 * rng.random())
    return SHAPES[first], SHAPES[(first + 1 + int(5 * rng.random())) % 6]


def _two_colours(rng: random.Random) -> tuple[str, str]:
    first = int(8 * rng.random())
    return _COLOURS[first], _COLOURS[(first + 1 + int(7 * rng.random())) % 8]


def _draw(rng: random.Random, family: str, rule: str | None) -> Scene | None:
    """One scene of a family; `rule`: the held-out rule to break. The other rules are checked later.

    None where the kinds of object break another rule: known before they are placed, which takes the longest.
    """
    background, relation = _pick(rng, _BACKGROUNDS), None
    shapes: tuple[str, ...]
    held_out = _pick(rng, _ORDERED_HELD_OUT[family]) if rule else None
    if family in ("single_object", "colors"):
        size, shape, colour = (
            _pick(rng, ("small", "large", "medium")),
            _pick(rng, SHAPES),
            _pick(rng, _COLOURS),
        )
        if family == "single_object" and size == "medium" and rng.random() < 0.5:
            size = _pick(rng, ("small", "large"))
        if held_out and family == "single_object":
            size, shape, background = held_out
        elif held_out:
            colour, shape = held_out
        kinds, radii = [(colour, shape)], [_between(rng, *SIZES.get(size, MEDIUM))]
    elif family == "counting":
        count, colour, shape = held_out or (
            2 + int(3 * rng.random()),
            _pick(rng, _COLOURS),
            _pick(rng, SHAPES),
        )
        one_colour = held_out or rng.random() < 0.85
        kinds = [(colour if one_colour else _pick(rng, _COLOURS), shape) for _ in range(count)]
        low, high = (16.0, 26.0) if count == 2 else (13.0, 19.0)
        radius = _between(rng, low, high)
        radii = [min(max(radius + _between(rng, -1, 1), low), high) for _ in range(count)]
    elif family == "mixed":
        shapes = (*_two_shapes(rng), _pick(rng, SHAPES))
        kinds = [(_pick(rng, _COLOURS), shape) for shape in shapes]
        radii = [_between(rng, 13.0, 19.0) for _ in kinds]
    else:
        shapes, colours = _two_shapes(rng), (_pick(rng, _COLOURS), _pick(rng, _COLOURS))
        if family == "color_attr":
            colours = _two_colours(rng)
        if family == "position":
            relation = _pick(rng, RELATIONS)
            if held_out:
                shape, relation, shape2 = held_out
                shapes = (shape, shape2)
        elif held_out:
            (colour, shape), (colour2, shape2) = held_out
            shapes, colours = (shape, shape2), (colour, colour2)
        kinds = list(zip(colours, shapes, strict=True))
        radii = [_between(rng, 16.0, 26.0), _between(rng, 16.0, 26.0)]
    if _kind_reasons(kinds) - {rule}:
        return None
    if relation and rule is None and (shapes[0], relation, shapes[1]) in HELD_OUT_RELATION:
        return None
    places = _place_related(rng, radii, relation) if relation else _place(rng, radii)
    return Scene(
        background,
        _jitter(rng, BACKGROUNDS[background]),
        tuple(
            Object(shape, colour, x, y, radius, _jitter(rng, COLOURS[colour]))
            for (colour, shape), (x, y), radius in zip(kinds, places, radii, strict=True)
        ),
    )


def sample_scene(rng: random.Random, family: str, split: str = "train") -> Scene:
    """One scene of a family; the same scene for the same state of `rng`.

    Args:
        rng: source of all randomness.
        family: one of `FAMILIES`, or "mixed" (three objects of two or three shapes; training split only).
        split: "train": breaks no held-out rule. "held_out": breaks the family's own rule and no other.
    """
    families = {"train": TRAIN_FAMILIES, "held_out": FAMILIES}
    if family not in families.get(split, ()):
        raise ValueError(f"expected a family of a split, {families}; got {family!r}, {split!r}")
    rule = HELD_OUT_RULE[family] if split == "held_out" else None
    wanted = {rule} if rule else set()
    while True:
        scene = _draw(rng, family, rule)
        if scene is not None and held_out_reasons(scene) == wanted:
            return scene


# ---- drawing -----------------------------------------------------------------------------------------------


def pack(scenes: Sequence[Scene], world: World = WORLD) -> Tensor:
    """Scenes as numbers, for `render`.

    Returns:
        (B, 31) float32 on the CPU: background rgb (0..255), then for each of 4 slots the index in `world.outlines`,
        x, y, radius (px) and rgb (0..255). An empty slot is a circle of radius 0 far outside the image.
    """
    index = {shape: i for i, shape in enumerate(world.outlines)}
    rows: list[float] = []
    for scene in scenes:
        if len(scene.objects) > MAX_OBJECTS:
            raise ValueError(f"expected at most {MAX_OBJECTS} objects, got {len(scene.objects)}")
        rows.extend(scene.background_rgb)
        for thing in scene.objects:
            rows.extend((index[thing.shape], thing.x, thing.y, thing.radius, *thing.rgb))
        rows.extend(_EMPTY * (MAX_OBJECTS - len(scene.objects)))
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(scenes), 3 + 7 * MAX_OBJECTS))


_EMPTY = (0, -1000.0, -1000.0, 0.0, 0, 0, 0)


def render(packed: Tensor, size: int = SIZE, world: World = WORLD) -> Tensor:
    """Draws packed scenes, with antialiased edges one pixel wide; no control flow depends on the data.

    Args:
        packed: (B, 31) from `pack`, on any device.
        size: side of the images in px; the scene is scaled with it.

    Returns:
        (B, 3, size, size) float32 in [-1, 1].
    """
    scale = SIZE / size
    axis = (torch.arange(size, device=packed.device, dtype=torch.float32) + 0.5) * scale
    x, y = axis.view(1, 1, size), axis.view(1, size, 1)
    image = packed[:, :3, None, None].expand(-1, -1, size, size)  # (B, 3, S, S)
    for slot in range(MAX_OBJECTS):
        shape, cx, cy, r, *_ = packed[:, 3 + 7 * slot : 10 + 7 * slot, None, None].unbind(1)  # each (B, 1, 1)
        rgb = packed[:, 7 + 7 * slot : 10 + 7 * slot, None, None]  # (B, 3, 1, 1)
        every = [outline.distance(x - cx, y - cy, r) for outline in world.outlines.values()]  # each (B, S, S)
        distance = every[0]
        for index in range(1, len(every)):
            distance = torch.where(shape == index, every[index], distance)
        cover = (0.5 - distance / scale).clamp(0, 1)[:, None]  # (B, 1, S, S)
        image = torch.lerp(image, rgb.expand_as(image), cover.expand_as(image))
    return image / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., 3, S, S) in [-1, 1] -> (..., S, S, 3) uint8."""
    pixels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).numpy()


def to_pil(image: Tensor):
    """One image, (3, S, S) in [-1, 1], as a PIL image."""
    from PIL import Image

    return Image.fromarray(to_uint8(image))
