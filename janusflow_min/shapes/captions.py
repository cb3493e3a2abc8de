# SPDX-License-Identifier: MIT
"""What is said about a scene: captions, questions with their answers, and the way back from text to a `Spec`.

Plain captions have the forms of GenEval's prompts. Every caption names every object of its scene, and all
that is said is true by the rules of `scenes.py`; questions are asked only where the answer is beyond doubt.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_COUNT,
    HELD_OUT_RELATION,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    TRAIN_FAMILIES,
    Object,
    Scene,
    clear_relation,
    held_out_reasons,
    sample_scene,
    size_word,
)

COUNTS = ("zero", "one", "two", "three", "four")


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


PLURAL = {shape: plural(shape) for shape in SHAPES}
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CELL_MARGIN = 5.0  # px; a centre nearer than this to a line of the 3x3 grid is not asked for
ORDER_MARGIN = 8.0  # px; objects whose centres differ by less in x are not put in order
KINDS = ("what", "color", "count", "where", "yes_no", "describe")
# Held-out captions say more than their family's form.
NAMED_WHOLE = ("single_object", "two_object", "counting")
RELATIVE = {"left of": "left", "right of": "right", "above": "above", "below": "below"}

_COLOURS = tuple(COLOURS)


# ---- captions ----------------------------------------------------------------------------------------------


def _noun(count: int, shape: str, colour: str | None = None, size: str | None = None) -> str:
    """ "an orange star", "a small star", "three red stars"."""
    words = [word for word in (size, colour) if word]
    words.append(shape if count == 1 else PLURAL[shape])
    article = COUNTS[count] if count > 1 else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _nouns(objects: Iterable[Object], coloured: bool) -> list[str]:
    """Objects alike (in shape, and in colour where `coloured`) are one noun, in the order of their first."""
    groups = Counter([(thing.shape, thing.colour if coloured else None) for thing in objects])
    return [_noun(count, shape, colour) for (shape, colour), count in groups.items()]


def caption(scene: Scene, family: str, rng: random.Random, style: str = "train") -> str:
    """A true sentence that names every object of the scene.

    Args:
        scene: what is told.
        family: decides the plain form (see `TRAIN_FAMILIES`); "colors" and "color_attr" name the colours,
            "position" the relation. Of a held-out scene whatever makes it so: the size and background of a
            "single_object", the colours of "two_object" and "counting".
        rng: source of the choices of style "train".
        style: "plain": GenEval's form. "train": that in 55 % of cases, otherwise some more that is true.
    """
    objects: Sequence[Object] = scene.objects
    if style == "plain" or rng.random() < 0.55:
        coloured = family in ("colors", "color_attr")
        # Training has none, so it need not ask, which is slow.
        held_out = style == "plain" and family in NAMED_WHOLE and bool(held_out_reasons(scene))
        if family == "position":
            a, b = objects
            relation = clear_relation(a, b)
            if relation is None:
                raise ValueError("expected two objects in a clear relation")
            return f"a photo of {_noun(1, a.shape)} {relation} {_noun(1, b.shape)}"
        if held_out and family == "single_object":
            noun = _noun(1, objects[0].shape, None, size_word(objects[0].radius))
            return f"a photo of {noun} on a {scene.background} background"
        return f"a photo of {_join(_nouns(objects, coloured or held_out))}"
    where = f" on a {scene.background} background" if rng.random() < 0.5 else ""
    coloured = family in ("colors", "color_attr") or rng.random() < 0.6
    if len(objects) == 1:
        size = size_word(objects[0].radius) if rng.random() < 0.6 else None
        colour = objects[0].colour if coloured else None
        return f"a photo of {_noun(1, objects[0].shape, colour, size)}{where}"
    if len(objects) == 2 and objects[0].shape != objects[1].shape:
        a, b = objects if rng.random() < 0.5 else objects[::-1]
        link = clear_relation(a, b) if family == "position" or rng.random() < 0.6 else None
        first, second = (_noun(1, thing.shape, thing.colour if coloured else None) for thing in (a, b))
        return f"a photo of {first} {link or 'and'} {second}{where}"
    if family == "mixed":
        objects = rng.sample(objects, len(objects))
    return f"a photo of {_join(_nouns(objects, coloured))}{where}"


def plain_description(scene: Scene) -> str:
    """Objects with their colours, in the scene's order, and the background."""
    return f"{_join(_nouns(scene.objects, True))} on a {scene.background} background"


# ---- questions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QA:
    """A question about a scene, of one of `KINDS`, with its only right answer."""

    kind: str
    question: str
    answer: str


def _unique(scene: Any) -> list[Any]:
    """The objects whose shape is there only once."""
    shapes = Counter([thing.shape for thing in scene.objects])
    return [thing for thing in scene.objects if shapes[thing.shape] == 1]


def _what(scene: Scene, rng: random.Random) -> list[QA]:
    colours = Counter([thing.colour for thing in scene.objects])
    found = [
        QA("what", f"What shape is the {thing.colour} object?", thing.shape)
        for thing in scene.objects
        if colours[thing.colour] == 1
    ]
    if len(scene.objects) == 1:
        thing = scene.objects[0]
        found.append(QA("what", "What is in the picture?", _noun(1, thing.shape, thing.colour)))
    return found


def _color(scene: Scene, rng: random.Random) -> list[QA]:
    return [QA("color", f"What color is the {thing.shape}?", thing.colour) for thing in _unique(scene)]


def _count(scene: Scene, rng: random.Random) -> list[QA]:
    """Every shape that is there, one that is not, and all objects."""
    shapes = Counter([thing.shape for thing in scene.objects])
    absent = [shape for shape in SHAPES if shape not in shapes]
    asked = [*shapes, absent[int(rng.random() * len(absent))]]
    found = [QA("count", f"How many {PLURAL[shape]} are there?", COUNTS[shapes[shape]]) for shape in asked]
    return [*found, QA("count", "How many objects are there?", COUNTS[len(scene.objects)])]


def cell(x: float, y: float) -> str | None:
    """The cell of the 3x3 grid that a point (px) lies clearly in, else None."""
    third = SIZE / 3
    for line in (third, 2 * third):
        if abs(x - line) < CELL_MARGIN or abs(y - line) < CELL_MARGIN:
            return None
    return CELLS[3 * int(y / third) + int(x / third)]


def _where(scene: Any, rng: random.Random) -> list[QA]:
    unique = _unique(scene)
    found = []
    for thing in unique:
        place = cell(thing.x, thing.y)
        if place:
            found.append(QA("where", f"Where is the {thing.shape}?", place))
    for a, b in permutations(unique, 2):
        relation = clear_relation(a, b)
        if relation:
            question = f"Where is the {a.shape} relative to the {b.shape}?"
            found.append(QA("where", question, RELATIVE[relation]))
    return found


def _yes_and_no(scene: Scene, rng: random.Random) -> tuple[list[QA], list[QA]]:
    """Questions answered yes and questions answered no.

    The noes are near misses: the same shape in another colour (of the scene, if there is one), the same
    colour in another shape, the opposite relation, or a relation along the other axis that is not there at
    all. They never speak of a held-out combination: else "no" would be its only answer in training.
    """
    kinds = dict.fromkeys([(thing.colour, thing.shape) for thing in scene.objects])
    yes, no = [], []
    for colour, shape in kinds:
        yes.append(f"Is there {_noun(1, shape, colour)}?")
        others = [c for c, _ in kinds] if len(kinds) > 1 and rng.random() < 0.6 else []
        near = [(c, shape) for c in others if (c, shape) not in kinds]
        if not near:
            near = [(_COLOURS[int(rng.random() * 8)], shape), (colour, SHAPES[int(rng.random() * 6)])]
        near = [kind for kind in near if kind not in kinds]
        if len(scene.objects) == 1:
            near = [kind for kind in near if (1, *kind) not in HELD_OUT_COUNT]
        if near:
            colour, shape = near[int(rng.random() * len(near))]
            no.append(f"Is there {_noun(1, shape, colour)}?")
    for a, b in permutations(_unique(scene), 2):
        relation = clear_relation(a, b)
        if relation:
            yes.append(f"Is the {a.shape} {relation} the {b.shape}?")
            wrong = OPPOSITE[relation]
            if rng.random() < 0.4:
                if relation in ("left of", "right of"):
                    wrong = "above" if a.y > b.y else "below"
                else:
                    wrong = "left of" if a.x > b.x else "right of"
            if (a.shape, wrong, b.shape) not in HELD_OUT_RELATION:
                no.append(f"Is the {a.shape} {wrong} the {b.shape}?")
    return [QA("yes_no", text, "yes") for text in yes], [
        QA("yes_no", text, "no") for text in dict.fromkeys(no)
    ]


def _describe_groups(objects: Iterable[Any]) -> list[tuple[int, tuple[Any, str]]] | None:
    """(count, (colour, shape)) of what is alike, left to right by the mean centre; None where the order is unclear."""
    groups: dict[tuple[str, str], list[float]] = {}
    for thing in objects:
        groups.setdefault((thing.shape, thing.colour), []).append(thing.x)
    ordered = sorted((sum(xs) / len(xs), len(xs), kind) for kind, xs in groups.items())
    if any(b[0] - a[0] < ORDER_MARGIN for a, b in pairwise(ordered)):
        return None
    return [(count, (colour, shape)) for _, count, (shape, colour) in ordered]


def _describe(scene: Scene, rng: random.Random) -> list[QA]:
    ordered = _describe_groups(scene.objects)
    if ordered is None:
        return []
    things = _join([_noun(count, shape, colour) for count, (colour, shape) in ordered])
    return [QA("describe", "Describe the picture.", f"{things} on a {scene.background} background")]


_ASK = {"what": _what, "color": _color, "count": _count, "where": _where, "describe": _describe}


def questions(scene: Scene, rng: random.Random) -> list[QA]:
    """All kinds of question that the scene answers beyond doubt, as many answered yes as no.

    `rng` chooses the absent shape that is counted and the near misses that are answered no.
    """
    yes, no = _yes_and_no(scene, rng)
    balance = min(len(yes), len(no))
    found = [qa for ask in _ASK.values() for qa in ask(scene, rng)]
    return found + rng.sample(yes, balance) + rng.sample(no, balance)


def sample_questions(scene: Scene, rng: random.Random, n: int) -> list[QA]:
    """n different questions (fewer only where the scene has no more), spread over the kinds.

    Any scene has at least four; "yes" is as likely as "no".
    """
    found: dict[str, QA] = {}
    kinds: list[str] = []
    pools: dict[str, list[QA]] = {}
    while len(found) < n:
        if not kinds:
            kinds = rng.sample(KINDS, len(KINDS)) if not pools else [kind for kind in pools if pools[kind]]
            if not kinds:
                break
        kind = kinds.pop()
        if kind not in pools:
            if kind == "yes_no":
                yes, no = _yes_and_no(scene, rng)
                pools[kind] = yes if rng.random() < 0.5 or not no else no
            else:
                pools[kind] = _ASK[kind](scene, rng)
        pool = pools[kind]
        if pool:
            qa = pool.pop(int(rng.random() * len(pool)))
            found[qa.question] = qa
    return list(found.values())


# ---- from text back to a scene's description ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """So many objects of one shape, all of this colour and size where those are told."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """What a caption says: items, the relation of the first to the second, background, style (None: not told)."""

    items: tuple[Item, ...]
    relation: str | None = None
    background: str | None = None
    style: str | None = None


class Grammar:
    """The sentences of a world: which words its captions and descriptions are made of.

    plurals: plural -> noun; links: words between two nouns -> the relation they tell.
    """

    def __init__(
        self,
        nouns: Iterable[str],
        plurals: Mapping[str, str],
        colours: Iterable[str],
        backgrounds: Iterable[str],
        links: Mapping[str, str],
        styles: Iterable[str] = (),
        openings: Iterable[str] = ("a photo of",),
    ):
        self.nouns, self.plurals, self.links = frozenset(nouns), plurals, links
        self.kinds = (*KINDS, "style") if styles else KINDS  # of questions
        longest = sorted({*self.nouns, *plurals}, key=len, reverse=True)
        self.item = re.compile(
            rf"(a|an|two|three|four)(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(colours)}))? ({'|'.join(longest)})"
        )
        self.opening = re.compile(rf"(?:{'|'.join(openings)}) ")
        self.ground = re.compile(rf"(.*) on a ({'|'.join(backgrounds)}) background")
        self.style = re.compile(rf"(.*) in ({'|'.join(styles)}) style") if styles else None
        self.link = re.compile(rf" ({'|'.join(links)}) (?=(?:a|an|two|three|four) )")

    def parse_item(self, text: str) -> Item | None:
        match = self.item.fullmatch(text)
        if not match:
            return None
        article, size, colour, noun = match.groups()
        count = COUNTS.index(article) if article in COUNTS else 1
        if noun not in (self.plurals if count > 1 else self.nouns):
            return None
        return Item(count, self.plurals[noun] if count > 1 else noun, colour, size)

    def parse(self, text: str) -> Spec | None:
        """What a caption or a description says, or None where it is no sentence of this world.

        Upper case, white space, a full stop at the end and a missing opening do not matter.
        """
        text = _normal(text)
        if opening := self.opening.match(text):
            text = text[opening.end() :]
        style = background = relation = None
        if self.style and (told := self.style.fullmatch(text)):
            text, style = told.groups()
        if ground := self.ground.fullmatch(text):
            text, background = ground.groups()
        if link := self.link.search(text):
            relation, parts = self.links[link.group(1)], [text[: link.start()], text[link.end() :]]
        else:
            *first, last = text.split(" and ")
            parts = [*first[0].split(", "), last] if len(first) == 1 else [text]
        items = tuple(item for item in map(self.parse_item, parts) if item)
        if len(items) < len(parts) or sum(item.count for item in items) > len(COUNTS) - 1:
            return None
        return Spec(items, relation, background, style)


GRAMMAR = Grammar(
    SHAPES, {many: shape for shape, many in PLURAL.items()}, COLOURS, BACKGROUNDS, {r: r for r in RELATIONS}
)


def _normal(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def parse_prompt(text: str) -> Spec | None:
    """`Grammar.parse` of the world of shapes."""
    return GRAMMAR.parse(text)


def answer_is_right(kind: str, expected: str, given: str, grammar: Grammar = GRAMMAR) -> bool:
    """Whether an answer says the expected thing; case, white space and a final full stop do not matter.

    For "describe" the order of the objects does not matter either, nor how they are grouped.
    """
    if kind not in grammar.kinds:
        raise ValueError(f"expected a kind of {grammar.kinds}, got {kind!r}")
    if _normal(expected) == _normal(given):
        return True
    if kind != "describe":
        return False
    said = []
    for text in (expected, given):
        spec = grammar.parse(text)
        if spec is None or spec.relation or _normal(text).startswith("a photo"):
            return False
        counts: Counter = Counter()
        for item in spec.items:
            counts[item.shape, item.colour, item.size] += item.count
        said.append((counts, spec.background, spec.style))
    return said[0] == said[1]


def corpus(scenes: int = 3000, seed: int = 0) -> list[str]:
    """Captions, questions and answers of training scenes: text with every word, to train a tokenizer on.

    The same list for the same arguments. At the end come the shapes, colours, places and sizes once each, so
    that no word depends on the draw.
    """
    rng = random.Random(seed)
    found = []
    for index in range(scenes):
        family = TRAIN_FAMILIES[index % len(TRAIN_FAMILIES)]
        scene = sample_scene(rng, family)
        found.append(caption(scene, family, rng))
        for qa in sample_questions(scene, rng, 3):
            found += [qa.question, qa.answer]
    for shape in SHAPES:
        found += [f"a photo of {_noun(count, shape)}" for count in range(1, 5)]
    found += [_noun(1, "circle", colour, size) for colour in COLOURS for size in SIZES]
    found += [f"a circle on a {background} background" for background in BACKGROUNDS]
    return [
        *found,
        *(f"a circle {relation} a square" for relation in RELATIONS),
        *CELLS,
        *COUNTS,
        "yes",
        "no",
    ]
