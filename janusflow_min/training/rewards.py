# SPDX-License-Identifier: MIT
"""What training in rounds (`rounds.py`) asks for, and how `nft.py` rates what comes: prompts and rewards.

A reward is any function (images, prompts) -> numbers in [0, 1], one for each image.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..pipeline import Pipeline
from ..processor import Processor
from ..selection import find_checker, named_function, score_all
from ..worlds import NAMES, open_world
from .config import Config
from .rows import seeded_generator
from .settings import naming, require

# Images and the prompt of each -> rewards in [0, 1].
Reward = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]
MIX = {  # of a world's prompts: as in the default's training
    **{"single_object": 10, "two_object": 18, "counting": 24, "colors": 6, "position": 14},
    **{"color_attr": 22, "mixed": 10},
}


class Prompts:
    """Prompt n of a run, for any n: of a file, in an order drawn anew each time through, or of a world, about a scene
    that training may see."""

    def __init__(self, source: str, *key: Any):
        """source: a world's name or a file, see `read_prompts`. key: of what is drawn."""
        self.key, self.texts = key, [] if source in NAMES else read_prompts(Path(source))
        self.world: Any = open_world(source, device=None) if source in NAMES else None

    def __getitem__(self, n: int) -> str:
        if self.texts:
            epoch, index = divmod(n, len(self.texts))
            generator = seeded_generator(*self.key, epoch)
            return self.texts[int(torch.randperm(len(self.texts), generator=generator, device="cpu")[index])]
        rng = random.Random(repr((*self.key, n)))
        family = rng.choices([*MIX], [*MIX.values()])[0]
        return self.world.caption(self.world.sample_scene(rng, family, "train"), family, rng, "train")


def read_prompts(path: Path) -> list[str]:
    """A prompt on each line, as it is or as {"text": prompt}. FileNotFoundError, or ValueError that names the line."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, and no world of that name ({', '.join(NAMES)})")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        text: Any = line.strip()
        if text.startswith("{"):
            try:
                text = json.loads(text)["text"]
            except (ValueError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f'{path}, line {number}: no object with a "text" ({reason})') from None
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: the text must be a string, got {text!r:.80}")
        found += [text] if text.strip() else []
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def rules(world: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 for an image in which the world's rule-based judge finds just what its prompt says, else 0."""
    check = open_world(world).checker()
    return [float(check(image, prompt)[0]) for image, prompt in zip(images, prompts, strict=True)]


def own_answers(
    pipe: Pipeline, checker: str, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """How likely the model finds that each image shows its prompt: see `Pipeline.score`. checker "": none."""
    return score_all(pipe, images, prompts, find_checker(checker or None))


def find_reward(name: str, checker: str, pipe: Pipeline | None = None) -> Reward:
    """A reward: a world's rules by its name, "answers", or "module:function". ValueError for an unknown one."""
    known = {"answers": f"{__name__}:own_answers"} | dict.fromkeys(NAMES, f"{__name__}:rules")
    with naming("nft.reward"):
        function = named_function("it", known, name)
    with naming("nft.checker"):
        find_checker(checker or None)
    if name in NAMES:
        return functools.partial(function, name)
    return functools.partial(function, pipe, checker) if name == "answers" else function


def check_rounds(config: Config, processor: Processor, longest: int) -> None:
    """ValueError or FileNotFoundError for reward or prompts that do not fit. longest: prompt, in tokens."""
    find_reward(config.nft.reward, config.nft.checker)
    named = config.nft.reward if config.stage == "nft" and config.nft.reward in NAMES else None
    parse = open_world(named, device=None).grammar.parse if named else None
    with naming(f"{config.stage}.prompts"):
        for text in Prompts(config.rounds.prompts).texts:
            length = len(processor.generation_prompt(text)[0])
            require(length <= longest, "each", f"at most {longest} tokens long", text)
            known = parse is None or parse(text) is not None
            require(known, "each", f'of the world "{named}", whose rules are the reward', text)
