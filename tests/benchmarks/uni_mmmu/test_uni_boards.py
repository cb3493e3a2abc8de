# SPDX-License-Identifier: MIT
"""Mazes and sliding puzzles read back from images."""

from __future__ import annotations

import numpy as np
import pytest
from invented_uni import MAZE, draw_maze, draw_puzzle
from PIL import Image, ImageDraw

from janusflow_min.benchmarks.uni_mmmu import boards


@pytest.mark.parametrize("pad", [0, 2, 11])
def test_a_maze_is_read_back(pad):
    """Stops: a board that is found a few pixels off, so that every tile is unclear."""
    maze = boards.parse_maze(draw_maze(MAZE, pad=pad))
    assert ["".join(row) for row in maze.grid] == MAZE
    assert (maze.start, maze.goal) == ((1, 1), (3, 4))


def test_a_board_in_a_wide_image():
    """Stops: the width limited by the height, an empty board then."""
    maze = boards.parse_maze(draw_maze(MAZE, size=(400, 180)))
    assert ["".join(row) for row in maze.grid] == MAZE


def test_the_original_loses_a_board_in_a_wide_image():
    """Stops: --official-compat without the original's limits, which let a wide image's board fall out."""
    wide = draw_maze(MAZE, size=(400, 180))
    assert boards.parse_maze(wide, official_compat=True).start is None


def test_an_agent_at_the_threshold():
    """Stops: 2 of 25 pixels taken for less than 0.08, as numpy 1 compares a float32 with a Python number."""
    image = draw_maze(["######", "#    #", "#    #", "#    #", "#   G#", "######"], side=5)
    for x in (10, 11):
        image.putpixel((x, 10), (37, 99, 235))
    assert boards.parse_maze(image).start == (2, 2)


def test_hostile_sizes():
    """Stops: gigabytes of distances for an image that cannot be a board."""
    for parse in (boards.parse_maze, boards.parse_puzzle):
        with pytest.raises(ValueError, match="no board; 16,777,216 px are allowed"):
            parse(Image.new("L", (5000, 5000)))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
def test_what_is_no_board_is_unclear(size):
    """Stops: an exception from an image that a model made."""
    image = Image.new("RGB", size, "#f781bf")
    assert len(boards.parse_puzzle(image, official_compat=True)) == 3
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
