# SPDX-License-Identifier: MIT
"""The world of things, on invented sprites: what is held out, captions, questions, drawing, and the judge."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from sprites import KINDS, invented

from janusflow_min.shapes.scenes import FAMILIES, SIZE, relations, to_uint8
from janusflow_min.things import captions, scenes
from janusflow_min.things.atlas import BORDER, SIDE, load_atlas, save_atlas
from janusflow_min.things.concepts import ICONS, STYLES
from janusflow_min.things.judge import Judge


@pytest.fixture(scope="module")
def world() -> scenes.World:
    return scenes.World(invented())


def drawn(world, count=40, split="train"):
    families = FAMILIES if split == "held_out" else (*FAMILIES, "mixed")
    for i in range(count):
        rng = random.Random(f"test {split} {i}")
        family = families[i % len(families)]
        yield family, world.sample_scene(rng, family, split), rng


def test_each_split_keeps_its_rules(world):
    """Stops: a combination of the test that training has seen; a test scene that breaks another family's rule."""
    for _, scene, _ in drawn(world):
        assert scenes.held_out_reasons(scene) == set()
    for family, scene, _ in drawn(world, split="held_out"):
        assert scenes.held_out_reasons(scene) == {scenes.HELD_OUT_RULE[family]}, family


def test_no_drawing_is_held_out(world):
    """Stops: a thing that training never shows in one of its styles, which nobody can guess."""
    shown = set()
    for i in range(600):
        scene = world.sample_scene(random.Random(i), "single_object")
        shown.add((scene.objects[0].kind, scene.style))
    assert shown == {(kind, style) for kind in KINDS for style in STYLES}


def test_held_out_combinations_are_a_share_of_all():
    """Stops: a rule that holds out nothing or nearly all; a relation whose mirror image training tells."""
    kinds = list(ICONS)[:60]
    for rule in (
        [scenes.holds_out_look(kind, ground, None) for kind in ICONS for ground in scenes.BACKGROUNDS],
        [scenes.holds_out_pair(a, b) for a in kinds for b in kinds if a != b],
        [scenes.holds_out_relation(a, "above", b) for a in kinds for b in kinds if a != b],
    ):
        assert 0.12 < sum(rule) / len(rule) < 0.22
    for a, b in ((a, b) for a in kinds for b in kinds if a != b):
        assert scenes.holds_out_relation(a, "above", b) == scenes.holds_out_relation(b, "below", a)
    assert not any(
        all(scenes.holds_out_look(kind, "white", size) for size in scenes.SIZES)
        for kind in ICONS
        if not scenes.holds_out_look(kind, "white", None)
    )


def test_things_lie_apart_inside_the_image_and_in_the_relation_told(world):
    """Stops: things that overlap or leave the image; "left of" that GenEval's rule denies."""
    for family, scene, rng in drawn(world, 120):
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            assert min(x1, y1) >= 2.9 and max(x2, y2) <= SIZE - 2.9
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                across = max(a.box[0] - b.box[2], b.box[0] - a.box[2])
                down = max(a.box[1] - b.box[3], b.box[1] - a.box[3])
                assert max(across, down) >= scenes.GAP - 1e-6
        if family == "position":
            spec = captions.parse_prompt(captions.caption(scene, family, rng, "plain"))
            assert relations(*(thing.box for thing in scene.objects)) == [spec.relation]


def test_captions_name_every_thing_and_are_read_back(world):
    """Stops: a caption that the grammar cannot read, or that says another count, colour, relation or background."""
    told = Counter()
    for family, scene, rng in drawn(world, 300):
        text = captions.caption(scene, family, rng)
        spec = captions.parse_prompt(text)
        assert spec is not None, text
        said = Counter()
        for item in spec.items:
            said[item.shape] += item.count
            if item.colour:
                assert (item.colour, item.shape) in {thing.kind for thing in scene.objects}, text
        assert said == Counter(thing.shape for thing in scene.objects), text
        assert spec.background in (None, scene.background) and spec.style in (None, scene.style)
        told.update(word for word in ("background", "style", "relation") if getattr(spec, word))
    assert len(told) == 3


@pytest.mark.parametrize(
    "text, items",
    [
        ("A photo of four knifes.", [(4, "knife", None)]),
        ("two knives", [(2, "knife", None)]),
        (
            "an image of an orange cat on a rainbow in noto style",
            [(1, "cat", "orange"), (1, "rainbow", None)],
        ),
        ("three people and an orange", [(3, "person", None), (1, "orange", None)]),
    ],
)
def test_the_grammar_reads_geneval_s_words_and_plain_english(text, items):
    """Stops: GenEval's own prompts, or a person's, called no sentence of this world."""
    spec = captions.parse_prompt(text)
    assert [(item.count, item.shape, item.colour) for item in spec.items] == items
    assert captions.parse_prompt("a photo of a fire hydrant") is None
    assert captions.parse_prompt("two knife") is None and captions.parse_prompt("a knives") is None


def test_questions_are_true_and_yes_is_as_likely_as_no(world):
    """Stops: a wrong answer taught as right; a yes that can be guessed."""
    answers = Counter()
    for _, scene, rng in drawn(world, 150):
        nouns = Counter(thing.shape for thing in scene.objects)
        for qa in captions.questions(scene, world.nouns, rng):
            if qa.kind == "yes_no":
                answers[qa.answer] += 1
            if qa.question.startswith("How many") and "objects" not in qa.question:
                noun = captions.GRAMMAR.plurals[
                    qa.question.removeprefix("How many ").removesuffix(" are there?")
                ]
                assert captions.COUNTS[nouns[noun]] == qa.answer
            if qa.question.startswith("Is there"):
                item = captions.GRAMMAR.parse_item(qa.question.removeprefix("Is there ").removesuffix("?"))
                there = any(item.shape == o.shape and item.colour in (None, o.colour) for o in scene.objects)
                assert (qa.answer == "yes") == there, qa
            if qa.kind in ("describe", "what"):
                spec = captions.parse_prompt(qa.answer)
                assert spec is not None, qa
        asked = captions.sample_questions(scene, world.nouns, rng, 4)
        assert len({qa.question for qa in asked}) == len(asked) == 4
    assert answers["yes"] == answers["no"] > 50


def test_a_scene_is_drawn_where_it_says(world):
    """Stops: sprites of another size, place, side or number; an empty slot that shows."""
    kind = KINDS[3]
    half = 30.0
    thing = scenes.Object(kind[1], kind[0], 70.0, 50.0, 2 * half, (40.0, 20.0, 100.0, 80.0))
    scene = scenes.Scene("white", (250, 250, 250), "fluent", (thing,))
    image = world.render(world.pack([scene]))[0]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
    sprite = world.atlas.pixels[3, 1, :, BORDER : SIDE - BORDER, BORDER : SIDE - BORDER].float()
    small = torch.nn.functional.interpolate(sprite[None], (60, 60), mode="bilinear", antialias=True)[0]
    expected = (small[:3] + (1 - small[3:] / 255) * 250) / 127.5 - 1
    found = image[:, 20:80, 40:100]
    assert (found - expected).abs().mean() < 0.03
    outside = image.clone()
    outside[:, 18:82, 38:102] = 250 / 127.5 - 1
    assert (outside - (250 / 127.5 - 1)).abs().max() < 1e-5
    mirrored = scenes.Object(kind[1], kind[0], 70.0, 50.0, 60.0, thing.box, mirrored=True)
    flipped = world.render(world.pack([scenes.Scene("white", (250, 250, 250), "fluent", (mirrored,))]))[0]
    assert (flipped[:, 20:80, 40:100].flip(2) - found).abs().max() < 0.02


def test_drawing_compiles_with_fixed_shapes(world):
    """Stops: drawing that depends on the data, which no CUDA graph can hold; a batch that changes its images."""
    packed = world.pack([scene for _, scene, _ in drawn(world, 6)])
    levels = world.atlas.levels
    compiled = torch.compile(lambda p: world.render(p, levels=levels), backend="eager", fullgraph=True)
    whole = world.render(packed)
    torch.testing.assert_close(compiled(packed), whole)
    torch.testing.assert_close(torch.cat([world.render(row[None]) for row in packed]), whole)


def test_the_judge_reads_true_renders(world):
    """Stops: a judge that misses what is there, or takes one thing, count, side, background or style for another."""
    judge, right, wrong = Judge(world.atlas), [], []
    for family, scene, rng in drawn(world, 60, "held_out"):
        image = to_uint8(world.render(world.pack([scene])))[0]
        reading = judge.read(image)
        plain = captions.caption(scene, family, rng, "plain")
        right.append(judge.check(reading, plain)[0])
        assert reading.background == scene.background
        others = [kind for kind in KINDS if kind[1] not in {thing.shape for thing in scene.objects}]
        wrong.append(judge.check(reading, f"a photo of a {rng.choice(others)[1]}")[0])
        if len(scene.objects) == 1:
            wrong.append(judge.check(reading, f"two {captions.plural(scene.objects[0].shape)}")[0])
    assert np.mean(right) >= 0.95 and not any(wrong)
    with pytest.raises(ValueError, match="not a prompt of this world"):
        judge.check(image, "a photo of a star")


def test_the_judge_knows_no_blob(world):
    """Stops: a judge that finds a thing in whatever stands out."""
    judge = Judge(world.atlas)
    y, x = np.mgrid[:SIZE, :SIZE]
    image = np.full((SIZE, SIZE, 3), 248, np.uint8)
    image[(x - 60) ** 2 + (y - 70) ** 2 < 900] = (250, 60, 200)
    reading = judge.read(image)
    assert [thing.shape for thing in reading.objects] == ["unknown"]
    assert judge.read(np.full((SIZE, SIZE, 3), 90, np.uint8)).background == "unknown"


def test_an_atlas_is_kept_and_checked(tmp_path, world):
    """Stops: another file taken for an atlas; a missing one that does not say what to do."""
    save_atlas(world.atlas, tmp_path / "things.npz")
    again = load_atlas(tmp_path / "things.npz")
    assert again.kinds == world.atlas.kinds and torch.equal(again.pixels, world.atlas.pixels)
    with pytest.raises(FileNotFoundError, match=r"scripts/things_atlas\.py"):
        load_atlas(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", kinds=np.zeros((2, 2)), pixels=np.zeros((1, 2)))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match="no atlas of things"):
            load_atlas(tmp_path / name)
