# SPDX-License-Identifier: MIT
"""Answers out of text, judges' replies into numbers, numbers into the table."""

from __future__ import annotations

import pytest
from invented_uni import MAZE, answer, draw_maze

from janusflow_min.benchmarks.uni_mmmu import boards, rules


@pytest.mark.parametrize(
    "text, expected",
    [
        (answer("Right", " down "), ["right", "down"]),
        (answer("up") + " no: " + answer("down"), ["down"]),
        ("<answer_json>\n[1, 2]\n</answer_json>", ["1", "2"]),
        ('<ANSWER_JSON>[["up", "left"]]</ANSWER_JSON>', ["up", "left"]),
        ("<ANSWER_JSON>[up]</ANSWER_JSON>", []),
        ("right, down", []),
        ("", []),
    ],
)
def test_moves(text, expected):
    """Stops: the first block taken for the last; capitals or spaces that cost a right answer."""
    assert rules.moves(text) == expected


def test_the_original_leaves_one_list_too_many():
    """Stops: --official-compat that gives marks for [["up"]]."""
    assert rules.moves('<ANSWER_JSON>[["up", "left"]]</ANSWER_JSON>', official_compat=True) == [
        "['up', 'left']"
    ]


def test_moves_are_scored_by_place():
    """Stops: another denominator than the truth's length. The vector of the specification."""
    score = rules.score_moves(["right", "up", "down", "left"], ["right", "down", "down"])
    assert score == {"text_exact": 0, "text_frame_acc": pytest.approx(2 / 3)}
    assert rules.score_moves(["up"], ["up"]) == {"text_exact": 1, "text_frame_acc": 1.0}
    assert rules.score_moves(["up"], []) == {"text_exact": 0, "text_frame_acc": 0.0}


@pytest.mark.parametrize(
    "inside, expected",
    [
        ('{"choice": 1, "rationale": "x"}', 1),
        ('{"choice": 0}', 0),
        ('{"choice": 2}', None),
        ('{"choice": "1"}', None),
        ('{"choice": true}', None),
        ("{choice: 1}", None),
    ],
)
def test_a_jigsaw_s_choice(inside, expected):
    """Stops: a default choice for an answer that is none."""
    assert rules.choice(f"so <final_answer_json>\n{inside}\n</final_answer_json>")[0] == expected
    assert rules.choice(inside)[0] is None


def test_the_original_takes_true_for_1():
    """Stops: --official-compat that refuses {"choice": true}."""
    block = '<FINAL_ANSWER_JSON>{"choice": true}</FINAL_ANSWER_JSON>'
    assert rules.choice(block)[0] is None and rules.choice(block, official_compat=True) == (1, "ok")


def test_the_render_summary():
    assert rules.render_summary("a <render_summary>\n red\nsquare </RENDER_SUMMARY> b") == "red\nsquare"
    assert rules.render_summary("a red square") == ""


# Judges' replies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('Sure: {"a": 1} and {"a": 2}', {"a": 1}),
        ('```json\n{"a": {"b": "}"}, "c": "\\"{"}\n```', {"a": {"b": "}"}, "c": '"{'}),
        ("{a: 1}", None),
        ('{"a": 1', None),
        ("none", None),
        ('<think>\\frac{1}{2}</think>{"a": 1}', {"a": 1}),
        ("<think>it goes on {", None),
    ],
)
def test_the_first_object_of_a_reply(reply, expected):
    """Stops: braces in texts that end the JSON too soon; braces of a reasoning taken for it."""
    assert rules.first_object(reply) == expected


def test_the_original_takes_the_reasoning_s_brace():
    """Stops: the flag that restores the original's behaviour doing nothing."""
    assert rules.first_object('<think>\\frac{1}{2}</think>{"a": 1}', official_compat=True) is None


@pytest.mark.parametrize(
    "text", ["{" * 100_000 + "}" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\ud800"}']
)
def test_replies_that_json_chokes_on(text):
    """Stops: a judge's or a model's rubble that ends the run."""
    assert rules.first_object(text) in (None, {"a": "\ud800"})
    assert rules.choice(f"<FINAL_ANSWER_JSON>{text}</FINAL_ANSWER_JSON>")[0] is None
    assert rules.moves(f"<ANSWER_JSON>[{text}]</ANSWER_JSON>") in ([], [str(rules.first_object(text))])


# What the official scorer makes of it: science and code by truth, geometry by int().
YES_OR_NO = [
    (1, 1, 1, 1),
    (True, 1, 1, 1),
    (1.0, 1, 1, 1),
    ("1", 1, 1, 1),
    ("yes", 1, 1, 0),
    ("True", 1, 1, 0),
    (0, 0, 0, 0),
    (False, 0, 0, 0),
    ("0", 0, 1, 0),
    ("no", 0, 1, 0),
    (None, 0, 0, 0),
    ("", 0, 0, 0),
    ([1], 0, 1, 0),
    (2, 0, 1, 0),
    ({}, 0, 0, 0),
    (1.9, 0, 1, 1),
]


@pytest.mark.parametrize("value, ours, science, geometry", YES_OR_NO)
def test_yes_and_no(value, ours, science, geometry):
    """Stops: the text "0" counted as right, as the original does; --official-compat without that."""
    for leg, official in (("science_image", science), ("code_text", science), ("math_overlay", geometry)):
        (key,) = rules.VERDICTS[leg]
        assert rules.verdicts(leg, {key: value}) == {key: ours}
        assert rules.verdicts(leg, {key: value}, official_compat=True) == {key: official}
        assert rules.verdicts(leg, {}) == rules.verdicts(leg, {}, official_compat=True) == {key: 0}


def test_one_value_that_is_no_number_costs_geometry_the_judgement():
    """Stops: another reading than the official one of {"reasoning_rigorous": null, "text_ok": 1}."""
    reply = {"reasoning_rigorous": None, "conclusion_correct": 1, "text_ok": 1}
    assert rules.verdicts("math_text", reply)["text_ok"] == 1
    assert set(rules.verdicts("math_text", reply, official_compat=True).values()) == {0}


@pytest.mark.parametrize(
    "value, ours, official",
    [
        (3, 3, 3),
        ("4.5", 4.5, 4.5),
        (7, 0, 7),
        (-1, 0, -1),
        ("5/5", 0, 0),
        (None, 0, 0),
        ([1], 0, 0),
        (10**400, 0, 0),
    ],
)
def test_points(value, ours, official):
    """Stops: points beyond the scale, or a judge's nonsense as an exception."""
    reply = {"shape_color_accuracy": value, "position_accuracy": 2, "verdict": "match"}
    best, theirs = rules.best_of([reply]), rules.best_of([reply], official_compat=True)
    assert (best["shape_color_accuracy"], best["position_accuracy"], best["image_match_binary"]) == (
        ours,
        2,
        1,
    )
    broken = value in ("5/5", None, [1], 10**400)
    assert theirs["shape_color_accuracy"] == official
    assert (theirs["position_accuracy"], theirs["image_match_binary"]) == ((0, 0) if broken else (2, 1))


def test_the_best_of_several_images():
    """Stops: the match of one image lost because another has more points."""
    one = {"shape_color_accuracy": 4, "position_accuracy": 4, "verdict": "match"}
    two = {"shape_color_accuracy": 5, "position_accuracy": 4, "verdict": "partial"}
    best = {"shape_color_accuracy": 5, "position_accuracy": 4, "image_match_binary": 1}
    assert rules.best_of([one, two, {}]) == rules.best_of([one, two, {}], official_compat=True) == best
    assert set(rules.best_of([]).values()) == {0}


# Frames and tables ----------------------------------------------------------------------------------------------


def test_maze_frames_are_scored_whole():
    """Stops: credit for a frame with one cell wrong; an exact match of too many frames."""
    first = boards.parse_maze(draw_maze(MAZE))
    truth = ["right", "down"]
    right = boards.expected_frames(first, truth)
    assert rules.score_maze_frames(right, first, truth)["img_exact"] == 1
    wrong = [right[0], first.grid, right[1]]
    assert rules.score_maze_frames(wrong, first, truth) == {
        "img_exact": 0,
        "img_frame_acc": 0.5,
        "parse_frame_success": 1.0,
        "parse_all_ok": 1,
    }
    assert set(rules.score_maze_frames([], first, truth).values()) == {0}
    assert set(rules.score_maze_frames(right, first, []).values()) == {0}


def test_puzzle_frames():
    a, b = [["1"]], [["2"]]
    assert rules.score_puzzle_frames([a, b], [a, b]) == {"img_exact": 1, "img_frame_acc": 1.0}
    assert rules.score_puzzle_frames([b, b], [a, b]) == {"img_exact": 0, "img_frame_acc": 0.5}
    assert rules.score_puzzle_frames([], []) == {"img_exact": 1, "img_frame_acc": 1.0}
    assert rules.score_puzzle_frames([a], []) == {"img_exact": 0, "img_frame_acc": 0.0}


def test_the_table_has_14_numbers_and_no_total():
    """Stops: a 0 for a leg that was not run, columns in another order, an average of what cannot be averaged."""
    assert rules.table({}) == dict.fromkeys(column[0] for column in rules.COLUMNS)
    assert len(rules.COLUMNS) == 14
    science = rules.summarize("science", [{"reasoning_correct": 1, "result_correct": 0}] * 2)
    table = rules.table({"science": science})
    assert table["science_reasoning"] == 1 and table["science_result"] == 0
    assert table["science_image"] is None and table["code_text"] is None


def test_geometry_divides_by_the_folders_that_are_there():
    """Stops: the official denominator changed silently."""
    records = [{"status": "ok", "text_ok": 1}, {"status": "ok", "text_ok": 0}, {"status": "missing"}]
    summary = rules.summarize("math", records)
    assert (summary["total_items"], summary["scored_items"], summary["text_acc"]) == (3, 2, 0.5)
    assert summary["overlay_acc"] is None
