# SPDX-License-Identifier: MIT
"""Scenes of one to four things on a plain background: what is in them, which are held out, and how they are drawn.

As in `shapes.scenes` a scene is plain data, `pack` makes a tensor of scenes, and `render` draws it on any device; here
by compositing sprites of an `Atlas`. The families are GenEval's. A scene has one style.

Pixels: x to the right, y downward. Dimensions: B scenes, 4 slots for things, S = 128 side of an image in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..shapes.scenes import BACKGROUNDS as PLAIN
from ..shapes.scenes import (
    CLEAR,
    FAMILIES,
    MARGIN,
    MAX_OBJECTS,
    OPPOSITE,
    RELATIONS,
    SIZE,
    Box,
    _between,
    _digest,
    _jitter,
    _pick,
    relations,
)
from .atlas import FILLED, LEVELS, SIDE, Atlas
from .concepts import STYLES, Kind

BACKGROUNDS = {
    **PLAIN,
    "blue": (173, 205, 242),
    "green": (190, 228, 180),
    "pink": (248, 203, 218),
}
SIZES = {"small": (38.0, 48.0), "large": (88.0, 112.0)}  # px, longer side of a single thing
MEDIUM = (60.0, 76.0)  # px, a single thing that no size word fits
CROWDED = {2: (40.0, 52.0), 3: (38.0, 46.0), 4: (38.0, 44.0)}  # px, longer side by the number of things
GAP = 8.0  # px between the bounding boxes of two things, at least
TURN = 8.0  # degrees, at most
MIRRORED, TURNED = 0.25, 0.25  # shares of the things
HELD_OUT_SHARE = 6  # one combination in so many
DIFFERENT = 32.0  # distance in rgb (0..255) from which a pixel stands out from the background
CLEARLY_DIFFERENT = 44.0  # the same, with room for what a VAE blurs
STANDS_OUT = 0.75  # share of a sprite that must, for it to be drawn on that background
NARROW = 0.06  # of the longer side: by less may the outline of what stands out miss the sprite's

HELD_OUT_RULE = {  # the rule that the held-out scenes of a family break
    "single_object": "look",  # thing and size, or thing and background
    "two_object": "pair",
    "counting": "count",
    "colors": "look",
    "position": "relation",
    "color_attr": "pair",
}


@dataclass(frozen=True, slots=True)
class Object:
    """One thing: noun, its colour where it exists in several, centre, longer side and bounding box in px."""

    shape: str
    colour: str | None
    x: float
    y: float
    size: float
    box: Box
    mirrored: bool = False
    turn: float = 0.0  # degrees, clockwise

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """A background (name and rgb in 0..255), a style, and one to four things, none overlapping."""

    background: str
    background_rgb: tuple[int, int, int]
    style: str
    objects: tuple[Object, ...]


def name(kind: Kind) -> str:
    """ "car", "red car"."""
    return " ".join(word for word in kind if word)


def size_word(size: float) -> str | None:
    """ "small" or "large" for the longer side (px) of a single thing, None between the two."""
    return next((word for word, (low, high) in SIZES.items() if low <= size <= high), None)


# ---- what is held out of training: combinations, never a drawing ---------------------------------------------


def _held_out(*words: str) -> bool:
    return _digest("things", *words) % HELD_OUT_SHARE == 0


def holds_out_look(kind: Kind, background: str, size: str | None) -> bool:
    """A thing alone, on this background or of this size; the other size of a thing is always shown."""
    if _held_out("background", name(kind), background):
        return True
    held_out = [word for word in SIZES if _held_out("size", name(kind), word)]
    return size in held_out[:1]


def holds_out_pair(a: Kind, b: Kind) -> bool:
    return _held_out("pair", *sorted((name(a), name(b))))


def holds_out_relation(a: Kind, relation: str, b: Kind) -> bool:
    """Of this triple and its mirror image (b, opposite relation, a), together."""
    first, second = name(a), name(b)
    if second < first:
        first, relation, second = second, OPPOSITE[relation], first
    return _held_out("relation", first, relation, second)


def _kind_reasons(kinds: Sequence[Kind], background: str, size: str | None) -> set[str]:
    """The rules that a scene breaks wherever its things are; size: the word that fits a single thing."""
    if len(kinds) == 1:
        return {"look"} if holds_out_look(kinds[0], background, size) else set()
    if len(set(kinds)) == 1:
        return {"count"} if _held_out("count", name(kinds[0]), str(len(kinds))) else set()
    return {"pair"} if any(holds_out_pair(a, b) for a, b in combinations(kinds, 2) if a != b) else set()


def held_out_reasons(scene: Scene) -> set[str]:
    """The rules (values of `HELD_OUT_RULE`) that keep a scene out of training; empty for a training scene."""
    things = scene.objects
    word = size_word(things[0].size) if len(things) == 1 else None
    reasons = _kind_reasons([thing.kind for thing in things], scene.background, word)
    for a, b in combinations(things, 2):
        if a.kind != b.kind:
            for relation in relations(a.box, b.box):
                if holds_out_relation(a.kind, relation, b.kind):
                    reasons.add("relation")
    return reasons


# ---- sampling ----------------------------------------------------------------------------------------------


def _place(rng: random.Random, halves: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Uniform centres (px) of boxes of these half widths and heights, `GAP` apart, by rejection."""
    while True:
        placed: list[tuple[float, float, float, float]] = []
        for w, h in halves:
            for _ in range(20):
                x = _between(rng, w + MARGIN, SIZE - w - MARGIN)
                y = _between(rng, h + MARGIN, SIZE - h - MARGIN)
                if all(abs(x - x2) > w + w2 + GAP or abs(y - y2) > h + h2 + GAP for x2, y2, w2, h2 in placed):
                    placed.append((x, y, w, h))
                    break
            else:
                break  # no room: start again
        else:
            return [(x, y) for x, y, _, _ in placed]


class World:
    """The things of an atlas: scenes of them, sampled and drawn. Training may go on with some of its kinds only."""

    def __init__(self, atlas: Atlas):
        self.atlas = atlas
        self.index = {kind: i for i, kind in enumerate(atlas.kinds)}
        self.nouns = tuple(dict.fromkeys(noun for _, noun in atlas.kinds))
        self.coloured = tuple(kind for kind in atlas.kinds if kind[0])

    @cached_property
    def visible(self) -> np.ndarray:
        """(K, Y, backgrounds) bool: whether a sprite stands out as a whole from a background.

        Most of it does, and the outline of what does is the sprite's, drawn as small as it ever is.
        """
        side = 32
        small = torch.nn.functional.avg_pool2d(self.atlas.pixels.flatten(0, 1).float(), SIDE // side)
        rgb, alpha = small[:, :3], small[:, 3:] / 255
        solid = alpha[:, 0] > 0.5
        found = []
        for colour in BACKGROUNDS.values():
            ground = torch.tensor(colour, dtype=torch.float32)[:, None, None]
            stands = ((rgb + (1 - alpha) * ground - ground).norm(dim=1) > CLEARLY_DIFFERENT) & solid
            whole = (stands.sum((1, 2)) / solid.sum((1, 2))) >= STANDS_OUT
            for axis in (1, 2):
                a, b = (mask.any(axis).float() for mask in (stands, solid))
                for line, other in ((a, b), (a.flip(1), b.flip(1))):
                    whole &= (line.argmax(1) - other.argmax(1)).abs() <= NARROW * side
            found.append(whole)
        return torch.stack(found, -1).view(*self.atlas.pixels.shape[:2], -1).numpy()

    def _draw(self, rng: random.Random, family: str, rule: str | None) -> Scene | None:
        """One scene of a family; None where its kinds break another rule, or cannot be seen."""
        style, background, relation = int(rng.random() * 2), int(rng.random() * len(BACKGROUNDS)), None
        kinds: list[Kind]
        low, high = MEDIUM
        if family in ("single_object", "colors"):
            kinds = [_pick(rng, self.coloured if family == "colors" else self.atlas.kinds)]
            low, high = _pick(rng, (*SIZES.values(), MEDIUM))
        elif family == "counting":
            kinds = [_pick(rng, self.atlas.kinds)] * (2 + int(3 * rng.random()))
        elif family == "mixed":  # two of one thing and one of another
            first, second = _pick(rng, self.atlas.kinds), _pick(rng, self.atlas.kinds)
            kinds = [first, second, first]
        else:
            options = self.coloured if family == "color_attr" else self.atlas.kinds
            kinds = [_pick(rng, options), _pick(rng, options)]
            relation = _pick(rng, RELATIONS) if family == "position" else None
        nouns = len({noun for _, noun in kinds})
        if nouns != len(set(kinds)) or (nouns == 1) != (family in ("single_object", "colors", "counting")):
            return None
        if not all(self.visible[self.index[kind], style, background] for kind in kinds):
            return None
        if len(kinds) > 1:
            low, high = CROWDED[len(kinds)]
        size = _between(rng, low, high)
        title = tuple(BACKGROUNDS)[background]
        if (_kind_reasons(kinds, title, size_word(size)) ^ {rule}) - {None, "relation"}:
            return None
        if relation and holds_out_relation(kinds[0], relation, kinds[1]) != (rule == "relation"):
            return None
        sizes = [min(max(size * _between(rng, 0.95, 1.05), low), high) for _ in kinds]
        mirrored = [rng.random() < MIRRORED for _ in kinds]
        turns = [_between(rng, -TURN, TURN) if rng.random() < TURNED else 0.0 for _ in kinds]
        halves = [self._half_box(*each, style) for each in zip(kinds, sizes, turns, strict=True)]
        for i, half in enumerate(halves):  # a turned thing takes no more room than `high`
            shrunk = min(1.0, high / (2 * max(half)))
            sizes[i], halves[i] = sizes[i] * shrunk, (half[0] * shrunk, half[1] * shrunk)
        places = self._place_related(rng, halves, relation) if relation else _place(rng, halves)
        things = [
            Object(noun, colour, x, y, side, (x - w, y - h, x + w, y + h), flipped, turn)
            for (colour, noun), (x, y), (w, h), side, flipped, turn in zip(
                kinds, places, halves, sizes, mirrored, turns, strict=True
            )
        ]
        return Scene(title, _jitter(rng, BACKGROUNDS[title]), STYLES[style], tuple(things))

    def _half_box(self, kind: Kind, size: float, turn: float, style: int) -> tuple[float, float]:
        """Half width and height in px; of a turned thing those of its turned bounding box, a little too large."""
        w, h = self.atlas.extents[self.index[kind], style] * size
        c, s = math.cos(math.radians(turn)), abs(math.sin(math.radians(turn)))
        return float(w * c + h * s), float(h * c + w * s)

    def _place_related(
        self, rng: random.Random, halves: Sequence[tuple[float, float]], relation: str
    ) -> list[tuple[float, float]]:
        """Centres of two boxes, the first clearly in this relation to the second."""
        while True:
            (x1, y1), (x2, y2) = _place(rng, halves)
            if (abs(x1 - x2) > abs(y1 - y2)) != (relation in ("left of", "right of")):
                continue
            if max(abs(x1 - x2), abs(y1 - y2)) < CLEAR * min(abs(x1 - x2), abs(y1 - y2)):
                continue
            if (x1 > x2) != (relation == "right of") and relation in ("left of", "right of"):
                x1, x2 = SIZE - x1, SIZE - x2
            if (y1 > y2) != (relation == "below") and relation in ("above", "below"):
                y1, y2 = SIZE - y1, SIZE - y2
            (w1, h1), (w2, h2) = halves
            boxes = [(x1 - w1, y1 - h1, x1 + w1, y1 + h1), (x2 - w2, y2 - h2, x2 + w2, y2 + h2)]
            if relations(*boxes) == [relation]:
                return [(x1, y1), (x2, y2)]

    def sample_scene(self, rng: random.Random, family: str, split: str = "train") -> Scene:
        """One scene of a family (of `FAMILIES`; "mixed", three things, in the training split alone).

        split: "train": breaks no held-out rule. "held_out": breaks the family's own rule and no other.
        """
        families = {"train": (*FAMILIES, "mixed"), "held_out": FAMILIES}
        if family not in families.get(split, ()):
            raise ValueError(f"expected a family of a split, {families}; got {family!r}, {split!r}")
        rule = HELD_OUT_RULE[family] if split == "held_out" else None
        wanted = {rule} if rule else set()
        while True:
            scene = self._draw(rng, family, rule)
            if scene is not None and held_out_reasons(scene) == wanted:
                return scene

    # ---- drawing -------------------------------------------------------------------------------------------

    def pack(self, scenes: Sequence[Scene]) -> Tensor:
        """Scenes as numbers, for `render`.

        Returns:
            (B, 27) float32 on the CPU: background rgb (0..255), then for each of 4 slots the sprite's number, x, y,
            longer side (px), -1 where mirrored else 1, and turn (degrees). An empty slot lies far outside the image.
        """
        rows: list[float] = []
        for scene in scenes:
            if len(scene.objects) > MAX_OBJECTS:
                raise ValueError(f"expected at most {MAX_OBJECTS} things, got {len(scene.objects)}")
            rows.extend(scene.background_rgb)
            for thing in scene.objects:
                sprite = len(STYLES) * self.index[thing.kind] + STYLES.index(scene.style)
                rows.extend((sprite, thing.x, thing.y, thing.size, 1 - 2 * thing.mirrored, thing.turn))
            rows.extend((0, -1000.0, -1000.0, 48.0, 1, 0.0) * (MAX_OBJECTS - len(scene.objects)))
        return torch.tensor(rows, dtype=torch.float32).view(len(scenes), 3 + 6 * MAX_OBJECTS)

    def render(self, packed: Tensor, size: int = SIZE, levels: Tensor | None = None) -> Tensor:
        """Draws packed scenes; no control flow depends on the data.

        Each sprite is read bilinearly from the smallest level that is as large as it is drawn (times 0.8).

        Args:
            packed: (B, 27) from `pack`, on any device.
            size: side of the images in px; the scene is scaled with it.
            levels: `atlas.levels` on the same device, if not on the CPU.

        Returns:
            (B, 3, size, size) float32 in [-1, 1].
        """
        texels = self.atlas.levels if levels is None else levels
        device, count = packed.device, len(STYLES) * len(self.atlas.kinds)
        axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (SIZE / size)
        x, y = axis.view(1, 1, size), axis.view(1, size, 1)
        image = packed[:, :3, None, None].expand(-1, -1, size, size)  # (B, 3, S, S)
        for slot in range(MAX_OBJECTS):
            sprite, cx, cy, longer, mirror, turn = packed[:, 3 + 6 * slot : 9 + 6 * slot, None, None].unbind(
                1
            )
            across = longer * (SIDE / FILLED)  # px in the image for a sprite's square
            drawn = across * (0.8 * size / SIZE)
            side, first = torch.full_like(drawn, LEVELS[0]), torch.zeros_like(sprite, dtype=torch.long)
            start = count * LEVELS[0] ** 2
            for level in LEVELS[1:]:
                enough = drawn <= level
                side = torch.where(enough, level, side)
                first = torch.where(enough, start, first)
                start += count * level**2
            first = first + (sprite * side * side).long()  # the sprite's first texel
            angle = turn * (math.pi / 180)
            c, s = angle.cos(), angle.sin()
            dx, dy = x - cx, y - cy
            u = mirror * (c * dx + s * dy) * (side / across) + side / 2 - 0.5  # (B, S, S), texels
            v = (c * dy - s * dx) * (side / across) + side / 2 - 0.5
            left, top = u.floor(), v.floor()
            rgba = torch.zeros((), device=device)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                column, row = left + j, top + i
                weight = (1 - (u - column).abs()) * (1 - (v - row).abs())
                inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
                place = (row * side + column).clamp(min=0).minimum(side * side - 1).long() + first
                rgba = rgba + texels[place].float() * (weight * inside)[..., None]  # (B, S, S, 4)
            rgba = rgba.permute(0, 3, 1, 2)
            image = rgba[:, :3] + (1 - rgba[:, 3:] / 255) * image
        return image / 127.5 - 1
