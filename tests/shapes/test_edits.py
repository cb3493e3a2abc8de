# SPDX-License-Identifier: MIT
"""Edits of scenes: cases, and their judge on true renders of sources, targets and spoilt targets."""

from dataclasses import replace

import pytest

from janusflow_min.shapes import edits, judge, scenes
from janusflow_min.shapes.captions import parse_prompt


def read(scene):
    return judge.read(scenes.to_uint8(scenes.render(scenes.pack([scene])))[0])


@pytest.mark.parametrize("kind", edits.EDIT_KINDS)
def test_true_targets_are_edited_and_kept_and_sources_only_kept(kind):
    """Stops: a judge that fails right edits, or passes an image that nobody changed."""
    cases = [edits.edit_case(kind, i) for i in range(40)]
    targets = [
        (edits.is_edited(case, seen), edits.is_kept(case, seen))
        for case in cases
        for seen in [read(case.target)]
    ]
    assert targets.count((True, True)) >= 39
    sources = [
        (edits.is_edited(case, seen), edits.is_kept(case, seen))
        for case in cases
        for seen in [read(case.source)]
    ]
    assert sources.count((False, True)) >= 39


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_an_edit_elsewhere_is_none(kind):
    """Stops: an object that vanished, beside a new one in another corner, taken for one that changed."""
    for i in range(10):
        case = edits.edit_case(kind, i)
        thing, (other,) = case.target.objects[case.index], case.unchanged
        for way, expected in ((0.8, True), (1.2, False)):
            moved = replace(thing, y=thing.y + way * thing.radius * (1 if thing.y < 64 else -1))
            reading = read(replace(case.target, objects=(moved,)))
            assert edits.is_edited(case, reading) == expected, (case, way)
        assert not edits.is_edited(case, read(replace(case.target, objects=(other,))))


@pytest.mark.parametrize("kind", edits.EDIT_KINDS)
def test_a_rest_that_changed_is_not_kept(kind):
    """Stops: an edit that moves, resizes, repaints or drops what it should leave alone, and passes."""
    for i in range(10):
        case = edits.edit_case(kind, i)
        other = case.unchanged[0]
        rest = tuple(thing for thing in case.target.objects if thing != other)
        colour = next(name for name in scenes.COLOURS if name not in {o.colour for o in case.target.objects})
        shape = next(name for name in scenes.SHAPES if name not in {o.shape for o in case.target.objects})
        spoilt = [
            (replace(other, colour=colour, rgb=scenes.COLOURS[colour]),),
            (replace(other, shape=shape),),
            (replace(other, radius=0.7 * other.radius),),
            (replace(other, x=other.x + (10 if other.x < 64 else -10), radius=other.radius),),
            (),
        ]
        for things in spoilt:
            assert not edits.is_kept(case, read(replace(case.target, objects=(*rest, *things)))), (
                case,
                things,
            )
        if kind != "background":
            name = next(name for name in scenes.BACKGROUNDS if name != case.target.background)
            seen = read(replace(case.target, background=name, background_rgb=scenes.BACKGROUNDS[name]))
            assert not edits.is_kept(case, seen)


def test_cases_depend_on_kind_number_and_seed_and_their_prompts_are_true():
    """Stops: prompts out of step with their scenes, and cases that repeat."""
    cases = [edits.edit_case(kind, i, seed) for kind in edits.EDIT_KINDS for i in range(5) for seed in (0, 1)]
    assert cases == [
        edits.edit_case(kind, i, s) for kind in edits.EDIT_KINDS for i in range(5) for s in (0, 1)
    ]
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert scenes.held_out_reasons(case.source)
        assert judge.judge(read(case.target), parse_prompt(case.prompt))[0]
        assert judge.judge(read(case.source), parse_prompt(case.source_prompt))[0]
    with pytest.raises(ValueError, match="kind must be one of colour"):
        edits.edit_case("color", 0)
