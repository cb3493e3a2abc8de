# SPDX-License-Identifier: MIT
"""Mazes and sliding puzzles as images: reading their boards back, and the frames that right moves give.

Pure numpy, no model. Colours, thresholds and the order of the tests are Uni-MMMU's (Vchitect/Uni-MMMU b5200b2,
eval_ummmu.py). One difference: a board in an image that is not square is kept inside the image; with official_compat
it is not, as in the original.

Legend: H W image, K colours, R C rows and columns of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Grid = list[list[str]]
Cell = tuple[int, int]

FLOOR, WALL, START, GOAL, PATH, WHITE = "#f4efe6", "#1f2937", "#2563eb", "#22c55e", "#ef4444", "#ffffff"
TILES = (
    "#e41a1c",
    "#377eb8",
    "#4daf4a",
    "#984ea3",
    "#ff7f00",
    "#ffff33",
    "#a65628",
    "#f781bf",
    "#999999",
)  # 1 to 9
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
MAZE_SIDE, PUZZLE_SIDE = 6, 3  # tiles
TOLERANCE = 0.75  # share of a maze's tile that must be of one kind
START_SHARE, GOAL_SHARE = TOLERANCE * 0.25, TOLERANCE * 0.75
# Enough for the best tile where no tile has the shares above; a float32 as the shares are, in every numpy.
FAINT_START, FAINT_GOAL = np.float32(0.08), 0.25
PUZZLE_TOLERANCE = 0.80
MARGIN = 2  # px around a board
MAX_PIXELS = 1 << 24  # of an image; official ones have less than a million


@dataclass(frozen=True)
class Maze:
    """A parsed maze: "#" wall, " " floor, "S" agent, "G" goal, "SG" both, "?" unclear."""

    grid: Grid
    start: Cell | None
    goal: Cell | None

    @property
    def walls(self) -> list[list[bool]]:
        return [[cell == "#" for cell in row] for row in self.grid]


def parse_maze(image: Image.Image, official_compat: bool = False) -> Maze:
    """Read a maze of 6 x 6 tiles from an image, which may have a white or floor-coloured surround.

    ValueError for more than MAX_PIXELS pixels.
    """
    content, around = (WALL, START, GOAL, PATH), (WHITE, FLOOR)
    board = _board(_pixels(image), content, around, 0.003, official_compat, swapped=True)
    shares = _shares(board, (FLOOR, WALL, START, GOAL), MAZE_SIDE)  # (R, C, K)
    grid: Grid = []
    start = goal = None
    for r in range(MAZE_SIDE):
        row = []
        for c in range(MAZE_SIDE):
            floor, wall, blue, green = shares[r, c]
            if blue >= START_SHARE:
                start = (r, c)
            if green >= GOAL_SHARE:
                goal = (r, c)
            here = ("S" if blue >= START_SHARE else "") + ("G" if green >= GOAL_SHARE else "")
            row.append(here or ("#" if wall >= TOLERANCE else " " if floor >= TOLERANCE else "?"))
        grid.append(row)
    if start is None:
        r, c = best = _best(shares[:, :, 2])
        if shares[r, c, 2] >= FAINT_START:
            start, grid[r][c] = best, "S"
    if goal is None:
        r, c = best = _best(shares[:, :, 3])
        if shares[r, c, 3] >= FAINT_GOAL:
            goal, grid[r][c] = best, "SG" if grid[r][c] == "S" else "G"
    if start is not None and start == goal:
        grid[start[0]][start[1]] = "SG"
    return Maze(grid, start, goal)


def expected_frames(first: Maze, moves: Sequence[str]) -> list[Grid]:
    """The grid after each move from the first image's state; a move into a wall or out of the maze stays put."""
    if first.start is None:
        return []
    (r, c), walls = first.start, first.walls
    frames = []
    for move in moves:
        down, right = MOVES.get(move, (0, 0))
        r2, c2 = r + down, c + right
        if 0 <= r2 < len(walls) and 0 <= c2 < len(walls[0]) and not walls[r2][c2]:
            r, c = r2, c2
        grid = [["#" if wall else " " for wall in row] for row in walls]
        if first.goal is not None:
            grid[first.goal[0]][first.goal[1]] = "G"
        grid[r][c] = "SG" if (r, c) == first.goal else "S"
        frames.append(grid)
    return frames


def is_maze_of(grid: Grid, walls: Sequence[Sequence[bool]]) -> bool:
    """Whether a parsed grid has nothing unclear, these walls, and exactly one S and one G, or one SG."""
    cells = [cell for row in grid for cell in row]
    if "?" in cells or [[cell == "#" for cell in row] for row in grid] != [list(row) for row in walls]:
        return False
    return (cells.count("S"), cells.count("G"), cells.count("SG")) in ((1, 1, 0), (0, 0, 1))


def parse_puzzle(image: Image.Image, official_compat: bool = False) -> Grid:
    """Read a sliding puzzle of 3 x 3 tiles: "1" to "9" by colour, "?" where none covers 80 % of a tile.

    ValueError for more than MAX_PIXELS pixels.
    """
    board = _board(_pixels(image), TILES, (WHITE,), 0.002, official_compat)
    shares = _shares(board, TILES, PUZZLE_SIDE)  # (R, C, K)
    best, most = shares.argmax(-1), shares.max(-1)
    tiles = range(PUZZLE_SIDE)
    return [
        [str(best[r, c] + 1) if float(most[r, c]) >= PUZZLE_TOLERANCE else "?" for c in tiles] for r in tiles
    ]


# Pixels -----------------------------------------------------------------------


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width} x {image.height} px is no board; {MAX_PIXELS:,} px are allowed"
        )
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255.0


def _colour(text: str) -> np.ndarray:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32) / 255.0


def _distances(pixels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Euclidean distance of every pixel (..., 3) to every colour -> (..., K)."""
    return np.stack([np.linalg.norm(pixels - _colour(colour), axis=-1) for colour in colours], axis=-1)


def _board(
    pixels: np.ndarray,
    content: Sequence[str],
    around: Sequence[str],
    share: float,
    official_compat: bool,
    swapped: bool = False,
) -> np.ndarray:
    """The square with the board: around the rows and columns with more than `share` of content, and a margin.

    official_compat: a square larger than the image begins before it, which a slice counts from the end. swapped: then
    also the rows end at the width and the columns at the height.
    """
    height, width = pixels.shape[:2]
    inside = _distances(pixels, content).min(-1) + 0.01 < _distances(pixels, around).min(-1)  # (H, W)
    top, bottom = _span(inside.mean(1) > share, height)
    left, right = _span(inside.mean(0) > share, width)
    side = max(bottom - top, right - left) + 1
    if official_compat and swapped:
        height, width = width, height
    y, x = (
        min(size, max(0, (first + last) // 2 - side // 2) + side) - side
        for first, last, size in ((top, bottom, height), (left, right, width))
    )
    if not official_compat:
        y, x = max(0, y), max(0, x)
    return pixels[y : y + side, x : x + side]


def _span(some: np.ndarray, size: int) -> tuple[int, int]:
    """First and last index that is true, a margin around them; everything where none is."""
    found = np.flatnonzero(some)
    first, last = (int(found[0]), int(found[-1])) if len(found) else (0, size - 1)
    return max(0, first - MARGIN), min(size - 1, last + MARGIN)


def _shares(board: np.ndarray, colours: Sequence[str], tiles: int) -> np.ndarray:
    """(R, C, K): of each tile, the share of pixels nearest to each colour. An empty tile has none."""
    nearest = _distances(board, colours).argmin(-1)  # (H, W)
    height, width = nearest.shape
    rows = [round(i * height / tiles) for i in range(tiles + 1)]
    columns = [round(i * width / tiles) for i in range(tiles + 1)]
    shares = np.zeros((tiles, tiles, len(colours)), dtype=np.float64)
    for r in range(tiles):
        for c in range(tiles):
            tile = nearest[rows[r] : rows[r + 1], columns[c] : columns[c + 1]]
            if tile.size:
                shares[r, c] = [(tile == k).mean() for k in range(len(colours))]
    return shares


def _best(values: np.ndarray) -> Cell:
    r, c = np.unravel_index(int(values.argmax()), values.shape)
    return int(r), int(c)
