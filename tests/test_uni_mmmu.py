# SPDX-License-Identifier: MIT
"""Uni-MMMU: rules, boards, readers, generation in both modes, scoring with a chat endpoint on loopback.

All data is invented here, in the shape of the released files.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from janusflow_min.benchmarks.uni_mmmu import boards, rules

MAZE = ["######", "#S  ##", "## ###", "##  G#", "######", "######"]


def draw_maze(rows, side: int = 30, pad: int = 0, size=None) -> Image.Image:
    """In the benchmark's colours: the agent is a dot, the goal a square of its own."""
    image = Image.new("RGB", size or (6 * side + 2 * pad, 6 * side + 2 * pad), "white")
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            x, y = pad + c * side, pad + r * side
            box = [x, y, x + side - 1, y + side - 1]
            draw.rectangle(box, fill={"#": boards.WALL, "G": boards.GOAL}.get(cell, boards.FLOOR))
            if cell == "S":
                m = side * 0.2
                draw.ellipse([x + m, y + m, x + side - m, y + side - m], fill=boards.START)
    return image


def draw_puzzle(rows, side: int = 60, pad: int = 8) -> Image.Image:
    image = Image.new("RGB", (3 * side + 2 * pad, 3 * side + 2 * pad), "white")
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            x, y = pad + c * side, pad + r * side
            draw.rectangle([x, y, x + side - 1, y + side - 1], fill=boards.TILES[int(cell) - 1])
    return image


# Boards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 2, 11])
def test_a_maze_is_read_back(pad):
    """Stops: a board that is found a few pixels off, so that every tile is unclear."""
    maze = boards.parse_maze(draw_maze(MAZE, pad=pad))
    assert ["".join(row) for row in maze.grid] == MAZE
    assert (maze.start, maze.goal) == ((1, 1), (3, 4))


def test_a_board_in_a_wide_picture():
    """Stops: the width limited by the height, an empty board then."""
    maze = boards.parse_maze(draw_maze(MAZE, size=(400, 180)))
    assert ["".join(row) for row in maze.grid] == MAZE


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_what_is_no_board_is_unclear(size):
    """Stops: an exception from a picture that a model painted."""
    image = Image.new("RGB", size, "#f781bf")
    assert len(boards.parse_maze(image).grid) == 6
    assert len(boards.parse_puzzle(image)) == 3


def test_thresholds_of_a_maze_s_tiles():
    """Stops: >= read as >; the fallbacks for a faint agent or goal left out. Shares of a 20 x 20 tile."""

    def symbol(colour: str, share: float) -> str:
        image = draw_maze(["######", "#    #", "#    #", "#    #", "#    #", "######"], side=20)
        pixels = np.asarray(image).copy()
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        tile = pixels[40:60, 40:60].reshape(-1, 3)
        tile[: round(share * 400)] = rgb
        pixels[40:60, 40:60] = tile.reshape(20, 20, 3)
        return boards.parse_maze(Image.fromarray(pixels)).grid[2][2]

    assert symbol(boards.START, 0.1875) == "S" and symbol(boards.START, 0.08) == "S"
    assert symbol(boards.START, 0.0775) == " "
    assert symbol(boards.GOAL, 0.5625) == "G" and symbol(boards.GOAL, 0.25) == "G"
    assert symbol(boards.GOAL, 0.2475) == " " and symbol(boards.WALL, 0.75) == "#"
    assert symbol(boards.WALL, 0.2525) == "?" and symbol(boards.WALL, 0.25) == " "


def test_expected_frames():
    """Stops: an agent that walks through walls, or a goal that is lost when it is reached."""
    first = boards.parse_maze(draw_maze(MAZE))
    frames = boards.expected_frames(first, ["right", "up", "down", "down", "right", "right"])
    agents = [next((r, c) for r in range(6) for c in range(6) if "S" in frame[r][c]) for frame in frames]
    assert agents == [(1, 2), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4)]
    assert frames[-1][3][4] == "SG" and frames[0][3][4] == "G"
    assert all(boards.is_maze_of(frame, first.walls) for frame in frames)
    assert boards.expected_frames(boards.Maze(first.grid, None, None), ["up"]) == []


def test_a_puzzle_is_read_back():
    """Stops: colours numbered from 0, or a mixed tile given to its majority."""
    rows = ["123", "456", "789"]
    image = draw_puzzle(rows)
    assert ["".join(row) for row in boards.parse_puzzle(image)] == rows
    ImageDraw.Draw(image).rectangle([8, 8, 67, 24], fill=boards.TILES[1])
    assert boards.parse_puzzle(image)[0][0] == "?"


# Text -----------------------------------------------------------------------------------------------------------


def answer(*words) -> str:
    return f"<ANSWER_JSON>{json.dumps(words)}</ANSWER_JSON>"


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
    assert rules.first_object('<think>\\frac{1}{2}</think>{"a": 1}', strip_think=False) is None


@pytest.mark.parametrize("value", [1, True, 1.0, "1", "yes", "True"])
def test_yes(value):
    assert rules.truth({"ok": value}, "ok") == 1


@pytest.mark.parametrize("value", [0, False, "0", "no", None, "", [1], 2, {}])
def test_no(value):
    """Stops: the text "0" counted as right, as the original does."""
    assert rules.truth({"ok": value}, "ok") == 0
    assert rules.truth(None, "ok") == rules.truth({}, "ok") == 0


def test_points():
    """Stops: points beyond the scale, or a judge's nonsense as an exception."""
    given = [3, "4.5", 6, -1, "x", None, [1], float("nan")]
    assert [rules.points({"p": value}, "p") for value in given] == [3, 4.5, 0, 0, 0, 0, 0, 0]


def test_the_best_of_several_pictures():
    """Stops: the match of one picture lost because another has more points."""
    one = {"shape_color_accuracy": 4, "position_accuracy": 4, "verdict": "match"}
    two = {"shape_color_accuracy": 5, "position_accuracy": 4, "verdict": "partial"}
    best = {"shape_color_accuracy": 5, "position_accuracy": 4, "image_match_binary": 1}
    assert rules.best_of([one, two, None]) == best
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
    assert rules.table({}) == dict.fromkeys(key for key, _, _ in rules.COLUMNS)
    assert len(rules.COLUMNS) == 14
    science = rules.summarize_science([{"reasoning_correct": 1, "result_correct": 0}] * 2)
    table = rules.table({"science": science})
    assert table["science_reasoning"] == 1 and table["science_result"] == 0
    assert table["science_image"] is None and table["code_text"] is None


def test_geometry_divides_by_the_folders_that_are_there():
    """Stops: the official denominator changed silently."""
    records = [{"status": "ok", "text_ok": 1}, {"status": "ok", "text_ok": 0}, {"status": "missing"}]
    summary = rules.summarize_math(records)
    assert (summary["total_items"], summary["scored_items"], summary["text_acc"]) == (3, 2, 0.5)
    assert summary["overlay_acc"] is None
