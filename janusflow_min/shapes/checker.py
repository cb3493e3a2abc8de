# SPDX-License-Identifier: MIT
"""Questions about an image of a prompt of this world: the `Checker` of the default model for `best_of` and `score`.

The default was never asked for sizes, so no question tells a small star from a large one, but its flow does.
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

from .captions import COUNTS, PLURAL, RELATIVE, Item, _join, _noun, parse_prompt
from .scenes import BACKGROUNDS, COLOURS, SIZES

MAX_DESCRIPTIONS = 16  # a description is asked for where so few say what the prompt says


def questions(prompt: str) -> list[tuple[str, list[str]] | str]:
    """(question, right answers) for everything that the prompt says, but of sizes the prompt with the other one; none
    where it is no prompt of this world."""
    spec = parse_prompt(prompt)
    if spec is None:
        return []
    shapes = Counter[str]()
    for item in spec.items:
        shapes[item.shape] += item.count
    asked: list[tuple[str, list[str]] | str] = [
        ("How many objects are there?", [COUNTS[sum(shapes.values())]])
    ]
    asked += [(f"How many {PLURAL[shape]} are there?", [COUNTS[n]]) for shape, n in shapes.items()]
    for item in spec.items:
        if item.colour and shapes[item.shape] == 1:
            asked.append((f"What color is the {item.shape}?", [item.colour]))
        elif item.colour:
            asked.append((f"Is there {_noun(1, item.shape, item.colour)}?", ["yes"]))
        asked += [prompt.replace(item.size, size) for size in SIZES if item.size and size != item.size]
    if spec.relation:
        a, b = (item.shape for item in spec.items)
        asked.append((f"Where is the {a} relative to the {b}?", [RELATIVE[spec.relation]]))
        asked.append((f"Is the {a} {spec.relation} the {b}?", ["yes"]))
    described = descriptions(list(spec.items), spec.background)
    if len(described) <= MAX_DESCRIPTIONS:
        asked.append(("Describe the picture.", described))
    return asked


def descriptions(items: list[Item], background: str | None) -> list[str]:
    """Every description, left to right, of images that show just these items."""
    colours = [[item.colour] if item.colour else list(COLOURS) for item in items]
    grounds = [background] if background else list(BACKGROUNDS)
    found = []
    for chosen, ground in product(product(*colours), grounds):
        nouns = [_noun(item.count, item.shape, c) for item, c in zip(items, chosen, strict=True)]
        found += [f"{_join(list(order))} on a {ground} background" for order in permutations(nouns)]
    return found
