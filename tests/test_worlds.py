# SPDX-License-Identifier: MIT
"""Both worlds by the one interface that training and benchmarks use."""

from __future__ import annotations

import random

import pytest
import torch
from sprites import invented

from janusflow_min.shapes.captions import answer_is_right
from janusflow_min.shapes.scenes import FAMILIES, to_uint8
from janusflow_min.things.atlas import save_atlas
from janusflow_min.worlds import NAMES, open_world


@pytest.mark.parametrize("name", NAMES)
def test_a_world_says_and_judges_what_it_draws(name, tmp_path):
    """Stops: a world whose words, images and judge do not belong together; a question of no kind of its grammar."""
    save_atlas(invented(), tmp_path / "things.npz")
    world = open_world(name, tmp_path / "things.npz")
    check, text = world.checker(), " ".join(world.corpus())
    for i, family in enumerate(FAMILIES * 2):
        rng = random.Random(f"{name} {i}")
        scene = world.sample_scene(rng, family, ("train", "held_out")[i % 2])
        image = world.render(world.pack([scene]))[0]
        assert image.shape == (3, 128, 128) and image.abs().max() <= 1 + 1e-5 and image.dtype == torch.float32
        said = world.caption(scene, family, rng, "plain")
        assert world.grammar.parse(said) is not None
        assert check(to_uint8(image), said) == (True, ""), said
        assert not check(to_uint8(torch.ones_like(image)), said)[0]
        found = world.questions(scene, rng)
        assert {qa.kind for qa in found} <= set(world.grammar.kinds)
        assert len(world.some_questions(scene, rng, 3)) == 3
        for qa in found:
            assert answer_is_right(qa.kind, qa.answer, f" {qa.answer}. ", world.grammar)
            assert set(qa.question.rstrip("?.").lower().split()) <= set(text.lower().replace("?", "").split())


def test_an_unknown_world_is_named():
    """Stops: a world taken for another because of its name."""
    with pytest.raises(ValueError, match="one of shapes, things, got 'thing'"):
        open_world("thing")
