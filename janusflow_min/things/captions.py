# SPDX-License-Identifier: MIT
"""What is said about a scene of things: captions, questions with their answers, and the grammar that reads them.

Plain captions have the forms of GenEval's prompts, its plurals ("knifes") too; others say more and speak as people do
("two knives", "a cat on a rainbow"). All that is said is true by the rules of `scenes.py`. `shapes.captions` holds what
both worlds share.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations

from ..shapes.captions import (
    COUNTS,
    KINDS,
    NAMED_WHOLE,
    QA,
    Grammar,
    Spec,
    _describe_groups,
    _join,
    _unique,
    _where,
    plural,
)
from ..shapes.scenes import OPPOSITE, RELATIONS, _pick, clear_relation
from .concepts import ICONS, STYLES, Kind
from .scenes import BACKGROUNDS, Object, Scene, World, held_out_reasons, holds_out_relation, size_word

THING_KINDS = (*KINDS, "style")
OPENINGS = ("a photo of", "an image of", "a picture of")
LINKS = {"on": "above", "over": "above", "under": "below"}  # beside `RELATIONS`: how people say it
NOUNS = tuple(dict.fromkeys(noun for _, noun in ICONS))
COLOURS = tuple(dict.fromkeys(colour for colour, _ in ICONS if colour))
_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "die": "dice",
    "fish": "fish",
    "leaf": "leaves",
    "wolf": "wolves",
}


def proper_plural(noun: str) -> str:
    """As English has it: "two knives", where GenEval's rule (`plural`) says "two knifes"."""
    *front, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last = f"{last}es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last = f"{last}s"
    return " ".join((*front, last))


GRAMMAR = Grammar(
    NOUNS,
    {form(noun): noun for noun in NOUNS for form in (proper_plural, plural)},
    COLOURS,
    BACKGROUNDS,
    {**{relation: relation for relation in RELATIONS}, **LINKS},
    STYLES,
    OPENINGS,
)


def _noun(count: int, kind: Kind, size: str | None = None, people: bool = False) -> str:
    """ "an orange cat", "a small dog", "three knifes" (where `people` speak, "three knives")."""
    colour, noun = kind
    many = proper_plural if people else plural
    words = [word for word in (size, colour, noun if count == 1 else many(noun)) if word]
    article = COUNTS[count] if count > 1 else "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _nouns(objects: Iterable[Object], coloured: bool, people: bool = False) -> list[str]:
    """Things alike are one noun, in the order of their first."""
    groups = Counter([thing.kind if coloured else (None, thing.shape) for thing in objects])
    return [_noun(count, kind, None, people) for kind, count in groups.items()]


def caption(scene: Scene, family: str, rng: random.Random, style: str = "train") -> str:
    """A true sentence that names every thing of the scene.

    style: "plain": GenEval's form; of a held-out scene it says what makes it so. "train": that in half of the cases,
    otherwise freer, with some more that is true.
    """
    objects: Sequence[Object] = scene.objects
    plain = style == "plain" or rng.random() < 0.5
    coloured = family in ("colors", "color_attr") or (not plain and rng.random() < 0.5)
    relation = clear_relation(*objects) if len(objects) == 2 else None
    if plain:
        told = style == "plain" and family in (*NAMED_WHOLE, "colors") and bool(held_out_reasons(scene))
        if family == "position":
            if relation is None:
                raise ValueError("expected two things in a clear relation")
            subject, other = (_noun(1, (None, thing.shape)) for thing in objects)
            return f"a photo of {subject} {relation} {other}"
        if told and len(objects) == 1:
            noun = _noun(1, objects[0].kind, size_word(objects[0].size))
            return f"a photo of {noun} on a {scene.background} background"
        return f"a photo of {_join(_nouns(objects, coloured or told))}"
    opening = "" if rng.random() < 0.25 else f"{_pick(rng, OPENINGS)} "
    ending = f" on a {scene.background} background" if rng.random() < 0.4 else ""
    ending += f" in {scene.style} style" if rng.random() < 0.4 else ""
    if len(objects) == 1:
        thing = objects[0]
        size = size_word(thing.size) if rng.random() < 0.6 else None
        return f"{opening}{_noun(1, thing.kind if coloured else (None, thing.shape), size)}{ending}"
    if relation and (family == "position" or rng.random() < 0.6):
        a, b = objects
        if rng.random() < 0.5:
            a, b, relation = b, a, OPPOSITE[relation]
        first, second = (_noun(1, thing.kind if coloured else (None, thing.shape)) for thing in (a, b))
        words = [relation, *(link for link, meant in LINKS.items() if meant == relation)]
        return f"{opening}{first} {_pick(rng, words)} {second}{ending}"
    objects = rng.sample(objects, len(objects))
    return f"{opening}{_join(_nouns(objects, coloured, people=True))}{ending}"


# ---- questions ---------------------------------------------------------------------------------------------


def _what(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    found = []
    if len({thing.kind for thing in scene.objects}) == 1:
        count = len(scene.objects)
        question = "What is it?" if count == 1 else "What are they?"
        found.append(QA("what", question, _noun(count, scene.objects[0].kind)))
    for a, b in permutations(_unique(scene), 2):
        relation = clear_relation(a, b)
        if relation and len(scene.objects) == 2:
            found.append(QA("what", f"What is {relation} the {b.shape}?", _noun(1, a.kind)))
    return found


def _color(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    return [
        QA("color", f"What color is the {thing.shape}?", thing.colour)
        for thing in _unique(scene)
        if thing.colour
    ]


def _count(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    """Every noun that is there, one that is not, and all things."""
    shapes = Counter([thing.shape for thing in scene.objects])
    asked = [*shapes, *([absent] if (absent := _pick(rng, nouns)) not in shapes else [])]
    found = [QA("count", f"How many {plural(noun)} are there?", COUNTS[shapes[noun]]) for noun in asked]
    return [*found, QA("count", "How many objects are there?", COUNTS[len(scene.objects)])]


def _yes_and_no(scene: Scene, nouns: Sequence[str], rng: random.Random) -> tuple[list[QA], list[QA]]:
    """Questions answered yes and no; none of the noes speaks of a held-out relation."""
    shapes = list(dict.fromkeys(thing.shape for thing in scene.objects))
    yes = [f"Is there {_noun(1, (None, noun))}?" for noun in shapes]
    absent = [noun for noun in (_pick(rng, nouns) for _ in shapes) if noun not in shapes]
    no = [f"Is there {_noun(1, (None, noun))}?" for noun in absent]
    for thing in scene.objects:
        if thing.colour:
            yes.append(f"Is there {_noun(1, thing.kind)}?")
            other = (_pick(rng, COLOURS), thing.shape)
            if other not in {each.kind for each in scene.objects}:
                no.append(f"Is there {_noun(1, other)}?")
    for a, b in permutations(_unique(scene), 2):
        relation = clear_relation(a, b)
        if relation:
            yes.append(f"Is the {a.shape} {relation} the {b.shape}?")
            if not holds_out_relation(a.kind, OPPOSITE[relation], b.kind):
                no.append(f"Is the {a.shape} {OPPOSITE[relation]} the {b.shape}?")
    pairs = ((dict.fromkeys(yes), "yes"), (dict.fromkeys(no), "no"))
    found = [[QA("yes_no", text, answer) for text in texts] for texts, answer in pairs]
    return found[0], found[1]


def _places(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    return _where(scene, rng)


def _describe(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    ordered = _describe_groups(scene.objects)
    if ordered is None:
        return []
    things = _join([_noun(count, (colour, shape)) for count, (colour, shape) in ordered])
    text = f"{things} on a {scene.background} background in {scene.style} style"
    return [QA("describe", "Describe the picture.", text)]


def _style(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    return [QA("style", "Which style is it?", scene.style)]


_ASK = {
    "what": _what,
    "color": _color,
    "count": _count,
    "where": _places,
    "describe": _describe,
    "style": _style,
}


def questions(scene: Scene, nouns: Sequence[str], rng: random.Random) -> list[QA]:
    """All kinds of question that the scene answers beyond doubt, as many answered yes as no.

    `rng` chooses the absent nouns, of `nouns`.
    """
    yes, no = _yes_and_no(scene, nouns, rng)
    balance = min(len(yes), len(no))
    found = [qa for ask in _ASK.values() for qa in ask(scene, nouns, rng)]
    return found + rng.sample(yes, balance) + rng.sample(no, balance)


def sample_questions(scene: Scene, nouns: Sequence[str], rng: random.Random, n: int) -> list[QA]:
    """Up to n different questions, spread over the kinds; "yes" is as likely as "no"."""
    pools: dict[str, list[QA]] = {}
    for kind in rng.sample(THING_KINDS, len(THING_KINDS)):
        if kind == "yes_no":
            yes, no = _yes_and_no(scene, nouns, rng)
            pools[kind] = yes if rng.random() < 0.5 or not no else no
        else:
            pools[kind] = _ASK[kind](scene, nouns, rng)
    found: dict[str, QA] = {}
    while len(found) < n and any(pools.values()):
        for pool in pools.values():
            if pool and len(found) < n:
                qa = pool.pop(int(rng.random() * len(pool)))
                found[qa.question] = qa
    return list(found.values())


def parse_prompt(text: str) -> Spec | None:
    """What a caption or a description of this world says, or None where it is no sentence of it."""
    return GRAMMAR.parse(text)


def corpus(world: World, count: int = 6000, seed: int = 0) -> list[str]:
    """Captions, questions and answers of training scenes, every noun among them, to train a tokenizer on."""
    from .scenes import FAMILIES

    rng, found = random.Random(seed), []
    for index in range(count):
        family = (*FAMILIES, "mixed")[index % (len(FAMILIES) + 1)]
        scene = world.sample_scene(rng, family)
        found.append(caption(scene, family, rng))
        for qa in sample_questions(scene, world.nouns, rng, 3):
            found += [qa.question, qa.answer]
    for noun in world.nouns:
        found += [f"a photo of a {noun}"] * 3 + [f"two {plural(noun)}", f"two {proper_plural(noun)}"]
    return found
