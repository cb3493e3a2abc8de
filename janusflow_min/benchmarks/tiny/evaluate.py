# SPDX-License-Identifier: MIT
"""How well a model paints and answers in the tiny world, on combinations that training never saw.

Prompts: `cases` for each of the six families, every one from a scene that the family's held-out rule keeps from
training; the picture is judged by `reader`, which knows nothing of the model. Questions: `cases` for each of the
six kinds, about true renders of held-out scenes, judged by `language.answer_is_right`. Each case has its own
generator, made of family or kind, number and seed, so batches and order change nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from ...pipeline import Pipeline
from . import language, reader, scenes


@dataclass(frozen=True)
class Case:
    """One judged picture or answer."""

    group: str  # family or kind of question
    prompt: str
    right: bool
    reason: str  # why it is wrong; or, of an answer, what was expected and what came


@dataclass(frozen=True)
class Score:
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / max(1, self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.96, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def score(cases: Sequence[Case]) -> dict[str, Score]:
    """Per group, in order of appearance, and "all"."""
    groups = list(dict.fromkeys(case.group for case in cases))
    of = {group: [case.right for case in cases if case.group == group] for group in groups}
    of["all"] = [case.right for case in cases]
    return {group: Score(sum(rights), len(rights)) for group, rights in of.items()}


def prompts(cases: int, seed: int = 0) -> list[tuple[str, str]]:
    """(family, prompt), `cases` for each family."""
    drawn = []
    for family in scenes.FAMILIES:
        for i in range(cases):
            rng = random.Random(f"prompt {family} {i} {seed}")
            scene = scenes.sample_scene(rng, family, "held_out")
            drawn.append((family, language.caption(scene, family, rng, "plain")))
    return drawn


def questions(cases: int, seed: int = 0) -> list[tuple[language.QA, Image.Image]]:
    """A question and the picture it is about, `cases` for each kind, families in turn where they have such one."""
    drawn = []
    for kind in language.KINDS:
        for i in range(cases):
            rng = random.Random(f"question {kind} {i} {seed}")
            while True:
                scene = scenes.sample_scene(rng, rng.choice(scenes.FAMILIES), "held_out")
                fitting = [qa for qa in language.questions(scene, rng) if qa.kind == kind]
                if fitting:
                    break
            picture = scenes.to_pil(scenes.render(scenes.pack([scene]))[0])
            drawn.append((rng.choice(fitting), picture))
    return drawn


def paint(
    pipe: Pipeline,
    cases: int = 100,
    cfg_weight: float = 2.0,
    num_inference_steps: int = 30,
    seed: int = 0,
    batch: int = 25,
    progress: bool = True,
) -> tuple[list[Case], list[Image.Image]]:
    """Paint and judge: cases in the order of `prompts`, and their pictures. Image k has seed `seed` + k."""
    wanted = prompts(cases, seed)
    judged, pictures = [], []
    for start in tqdm(range(0, len(wanted), batch), desc="Painting", unit="batch", disable=not progress):
        part = wanted[start : start + batch]
        out = pipe.generate(
            [prompt for _, prompt in part],
            parallel_size=1,
            cfg_weight=cfg_weight,
            num_inference_steps=num_inference_steps,
            seed=seed + start,
            progress=False,
        )
        for (family, prompt), picture in zip(part, out.images, strict=True):
            right, reason = reader.check(picture, prompt)
            judged.append(Case(family, prompt, right, reason))
            pictures.append(picture)
    return judged, pictures


def answer(
    pipe: Pipeline, cases: int = 100, seed: int = 0, batch: int = 25, progress: bool = True
) -> tuple[list[Case], list[Image.Image]]:
    """Ask and judge: cases in the order of `questions`, and the pictures they are about."""
    asked = questions(cases, seed)
    judged = []
    for start in tqdm(range(0, len(asked), batch), desc="Asking", unit="batch", disable=not progress):
        part = asked[start : start + batch]
        answers = pipe.understand(
            [qa.question for qa, _ in part], [picture for _, picture in part], max_new_tokens=48
        )
        for (qa, _), given in zip(part, answers, strict=True):
            right = language.answer_is_right(qa.kind, qa.answer, given.text)
            reason = f"expected {qa.answer!r}, got {given.text.strip()!r}"
            judged.append(Case(qa.kind, qa.question, right, reason))
    return judged, [picture for _, picture in asked]
