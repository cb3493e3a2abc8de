# SPDX-License-Identifier: MIT
"""Uni-MMMU: rules, boards, readers, generation in both modes, scoring with a chat endpoint on loopback.

All data is invented here, in the shape of the released files.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from chat_server import ChatServer
from PIL import Image, ImageDraw

from janusflow_min.benchmarks import uni_mmmu
from janusflow_min.benchmarks.runner import Settings, World
from janusflow_min.benchmarks.uni_mmmu import boards, generation, prompts, readers, rules, scoring
from janusflow_min.cli import main
from janusflow_min.loading import load

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


# Data -----------------------------------------------------------------------------------------------------------


def save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 40), colour)


MAZE_2 = ["######", "# S ##", "## ###", "##  G#", "######", "######"]
SQUARE = '<svg width="8" height="8"><rect width="4" height="4" fill="#E74C3C"/></svg>'


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Invented data in the released layout: two cases of each task, and a maze and a sample that are left out."""
    root = tmp_path_factory.mktemp("uni") / "data"
    samples = []
    for name in ("A_0001", "B/0002"):
        stem = name.replace("/", "")
        save(plain("red"), root / f"svg/pngs/{stem}.png")
        (root / "svg/svgs").mkdir(exist_ok=True)
        (root / f"svg/svgs/{stem}.svg").write_text(SQUARE)
        samples.append({"id": name, "difficulty": "A", "svg": f"svgs/{stem}.svg", "png": f"pngs/{stem}.png"})
    write(root / "svg/metadata.json", {"samples": samples})

    def sample(k: int) -> dict:
        save(plain("blue"), root / f"science/imgs/{k}.png")
        return {
            "input_image_file_path_list": [f"./data/science/imgs/{k}.png"],
            "input_prompt": f" It is heated {k} times. ",
            "output_prompt": "It has melted.",
        }

    unusable = {"input_image_file_path_list": [], "input_prompt": "x", "output_prompt": "y"}
    blocks = [{"level_1_category": "Physics", "level_2_category": "Heat", "samples": [sample(1), unusable]}]
    write(root / "science/dim_all.json", [*blocks, {"samples": [sample(3)]}])

    def problem(k: int) -> dict:
        return {
            "type": "calculation" if k else "proof",
            "problem_text_en": f"Find x. {{braces}} {k}",
            "choices_en": ["3", "4"],
            "auxiliary_text_en": "Connect B and D.",
            "original_image": save(plain("white"), root / f"math_data/{k}.png"),
            "auxiliary_image": save(plain("grey"), root / f"math_data/{k}_aux.png"),
            "solution_en": "x = 4",
        }

    write(root / "math_data/filtered.json", {"set A": {"1": problem(0), "2": problem(1)}})

    items = []
    jigsaw = root / "jigsaw_dataset_2x2ref"
    for k in (0, 1):
        here = jigsaw / f"ex_{k}"
        for name, colour in {
            "ref": "red",
            "c0": "green",
            "c1": "blue",
            "right": "navy",
            "wrong": "tan",
        }.items():
            save(plain(colour), here / f"{name}.png")
        item = {"id": f"ex_{k}", "label": k, "ref_panel": {"ref_image_path": f"ex_{k}/ref.png"}}
        item["candidate_paths"] = [f"ex_{k}/c0.png", f"ex_{k}/c1.png"]
        for key, name in (("gt_completed_2x2_path", "right"), ("gt_wrong_2x2_path", "wrong")):
            item[key] = f"./data/jigsaw_dataset_2x2ref/ex_{k}/{name}.png"
        items.append(item)
    write(jigsaw / "metadata.json", {"items": items})

    for number in ("00003", "00015", "00020"):
        for k, rows in enumerate((MAZE, MAZE_2)):
            save(draw_maze(rows), root / f"maze/maze_6x6_{number}_steps/maze_step_{k:04d}.png")
        write(root / f"maze/maze_6x6_steps_{number}.json", {"steps_long": ["Right"]})

    items = []
    for number in ("00001", "00002"):
        for k, rows in enumerate((["123", "456", "789"], ["123", "456", "798"])):
            save(draw_puzzle(rows), root / f"sliding/demo_3x3_{number}_steps/demo_step_{k:04d}.png")
        write(root / f"sliding/demo_3x3_steps_words_{number}.json", {"steps_words": ["left"]})
        words = f"data/sliding/demo_3x3_steps_words_{number}.json"
        items.append({"steps_dir": f"data/sliding/demo_3x3_{number}_steps", "steps_words_json": words})
    write(root / "sliding/summary_steps_le_8.json", {"items": items})
    return root


def test_cases(data):
    """Stops: folder names or an order that the official scorers would not find."""
    names = {task: [case.name for case in readers.read(data.parent, task)] for task in readers.TASKS}
    assert names == {
        "science": ["case_01", "case_02", "case_03"],
        "math": ["set_A__1", "set_A__2"],
        "jigsaw": ["ex_0", "ex_1"],
        "maze": ["case_00003", "case_00020"],
        "sliding": ["case_demo_3x3_00001_steps", "case_demo_3x3_00002_steps"],
        "code": ["case_01_A_0001", "case_02_B_0002"],
    }
    science = readers.read(data, "science")
    assert [case.usable for case in science] == [True, False, True]
    assert science[2].fields["condition"] == "It is heated 3 times."
    right, wrong = (data / f"jigsaw_dataset_2x2ref/ex_1/{name}.png" for name in ("right", "wrong"))
    assert readers.read(data, "jigsaw")[1].truth["slots"] == (wrong, right)
    mazes = readers.read(data, "maze", demonstration=True)
    assert [case.name for case in mazes] == ["case_00003", "case_00015", "case_00020"]
    assert mazes[2].index == readers.read(data, "maze")[1].index == 2  # seeds do not move with the mode
    assert mazes[0].truth["moves"] == ["right"]
    sliding = readers.read(data, "sliding")[0]
    assert [path.name for path in sliding.truth["frames"]] == ["demo_step_0001.png"]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("svg/metadata.json", lambda d: d["samples"][1].pop("svg"), r"samples\[1\]: svg must be a text"),
        ("svg/metadata.json", lambda d: d["samples"][1].update(svg="no.svg"), "no.svg is not there; tried"),
        ("svg/metadata.json", lambda d: d.pop("samples"), "samples must be a list"),
        ("science/dim_all.json", lambda d: d[1].pop("samples"), "block 1: samples must be a list"),
        (
            "math_data/filtered.json",
            lambda d: d["set A"]["2"].pop("problem_text_en"),
            "set A/2: problem_text",
        ),
        (
            "jigsaw_dataset_2x2ref/metadata.json",
            lambda d: d["items"][0].update(label=2),
            "label must be 0 or 1",
        ),
        ("jigsaw_dataset_2x2ref/metadata.json", lambda d: d["items"][0].update(id="ex_1"), "several cases"),
        ("maze/maze_6x6_steps_00003.json", lambda d: d.update(steps_long=[]), "steps_long must be a list"),
        (
            "sliding/summary_steps_le_8.json",
            lambda d: d["items"][0].pop("steps_words_json"),
            "items.0.: steps_w",
        ),
    ],
)
def test_data_that_does_not_fit(data, tmp_path, file, change, message):
    """Stops: a KeyError where the data are of another version; it must say which file and entry."""
    root = shutil.copytree(data, tmp_path / "data")
    value = json.loads((root / file).read_text())
    change(value)
    write(root / file, value)
    task = next(task for task, source in readers.SOURCES.items() if file.startswith(source.split("/")[0]))
    with pytest.raises(ValueError, match=message):
        readers.read(root, task)


def test_no_data_and_unknown_tasks(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="holds none of"):
        readers.data_folder(tmp_path)
    assert readers.tasks_of(["code_rendering", "math_geo"]) == ("math", "code")
    with pytest.raises(ValueError, match="got chess"):
        readers.tasks_of(["chess"])


# Generation -----------------------------------------------------------------------------------------------------

FAST = Settings(
    model="tiny", device="cpu", dtype="float32", num_inference_steps=1, batch_size=4, progress=False
)


@pytest.fixture(scope="module")
def pipe():
    return load("tiny", device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def native(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("native") / "run"
    coverage = uni_mmmu.generate(FAST, run, data, max_new_tokens=6)
    assert coverage.complete and coverage.expected == 12
    return run


@pytest.fixture(scope="module")
def painted(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("torchumm") / "run"
    assert uni_mmmu.generate(FAST, run, data, uni_mode="torchumm", max_new_tokens=6).expected == 13
    return run


def tree(run: Path, *ends: str) -> list[str]:
    ends = ends or (".png",)
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.name.endswith(ends))


def test_native_paints_code_alone(native):
    """Stops: a picture painted without its input counted as an edit."""
    assert tree(native) == [f"code/case_0{i}/model_image_01.png" for i in ("1_A_0001", "2_B_0002")]
    assert len(tree(native, "_done.ok")) == len(tree(native, "model_text.txt")) == 12
    assert not (native / ".work").exists()


def test_the_torchumm_layout(painted):
    """Stops: files under names that the official scorer does not look for."""
    pictures = [f"code/case_0{i}/model_image_01.png" for i in ("1_A_0001", "2_B_0002")]
    pictures += [f"science/case_0{i}/model_image_01.png" for i in (1, 3)]
    pictures += [f"math/set_A__{i}/model_image_01.png" for i in (1, 2)]
    pictures += [f"jigsaw/ex_{i}/model_image_0{k}.png" for i in (0, 1) for k in (1, 2)]
    pictures += [f"maze/case_{i}/cand_01/maze_step_0000_step_0001.png" for i in ("00003", "00015", "00020")]
    pictures += [f"sliding/case_demo_3x3_0000{i}_steps/cand_01/demo_step_0000_step_0001.png" for i in (1, 2)]
    assert tree(painted) == sorted(pictures)
    assert len({(painted / name).read_bytes() for name in pictures}) == len(pictures)  # own seeds


def test_what_scorers_read_in_result_json(painted, data):
    """Stops: references that the official scorers cannot find."""

    def record(folder: str) -> dict:
        return json.loads((painted / folder / "result.json").read_text())

    code = record("code/case_02_B_0002")
    assert (code["svg"], code["png"]) == ("svgs/B0002.svg", "pngs/B0002.png")
    maze = record("maze/case_00003")
    assert Path(maze["step0"]).is_absolute() and Path(maze["step0"]).is_file()
    assert (
        [Path(p).is_file() for p in maze["images_saved_flatten"]]
        == [True]
        == [True] * maze["expected_image_count"]
    )
    assert Path(record("sliding/case_demo_3x3_00001_steps")["init_png"]).is_file()
    summary = json.loads((painted / "jigsaw/summary.json").read_text())
    assert [item["id"] for item in summary["per_item"]] == ["ex_0", "ex_1"]
    assert (painted / "jigsaw/ex_0/_done.ok").read_text() == "ok"


def test_shards_and_holes_change_nothing(native, data, tmp_path, monkeypatch):
    """Stops: answers or pictures that depend on the shard or on what was there already."""
    for rank in (1, 0):
        monkeypatch.setattr(World, "from_environment", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        uni_mmmu.generate(FAST, tmp_path / "run", data, max_new_tokens=6)
    monkeypatch.undo()
    (tmp_path / "run/code/case_01_A_0001/_done.ok").unlink()
    (tmp_path / "run/code/case_02_B_0002/model_image_01.png").unlink()
    shutil.rmtree(tmp_path / "run/maze/case_00003")
    assert uni_mmmu.generate(FAST, tmp_path / "run", data, max_new_tokens=6).complete
    names = tree(native, ".png", "model_text.txt", "summary.json", "manifest.csv")
    assert names == tree(tmp_path / "run", ".png", "model_text.txt", "summary.json", "manifest.csv")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (native / name).read_bytes(), name


def test_nothing_missing_loads_nothing(native, data, monkeypatch):
    """Stops: a minute of loading to find out that all is there."""
    from janusflow_min.benchmarks import runner

    monkeypatch.setattr(runner, "load_pipe", lambda *args: pytest.fail("loaded"))
    assert uni_mmmu.generate(FAST, native, data, max_new_tokens=6).complete


def test_other_settings_are_refused(native, data):
    """Stops: a folder with answers of two modes."""
    with pytest.raises(ValueError, match=r"settings.uni_mode: \"native\" there, \"torchumm\" now"):
        uni_mmmu.generate(FAST, native, data, uni_mode="torchumm", max_new_tokens=6)


def test_tasks_one_after_another(data, tmp_path):
    """Stops: a folder that takes no second task; seeds that depend on which tasks were asked for."""
    for task in ("code", "science"):
        assert uni_mmmu.generate(FAST, tmp_path, data, tasks=[task], max_new_tokens=2).complete
    record = json.loads((tmp_path / "code/case_02_B_0002/result.json").read_text())
    assert record["seeds"] == [100_000 * readers.TASKS.index("code") + 100]
    assert "task number" in json.loads((tmp_path / "manifest.json").read_text())["seed_rule"]


def test_a_limit_counts_for_each_task(data, tmp_path):
    """Stops: a trial run that sees the first task alone."""
    limited = Settings(**{**FAST.__dict__, "limit": 1})
    coverage = uni_mmmu.generate(limited, tmp_path, data, tasks=["science", "maze"], max_new_tokens=2)
    assert coverage.missing == ("science/case_03", "maze/case_00020")


class Fake:
    """A pipeline that records what it is asked; answers are numbered."""

    def __init__(self, pipe, texts=()):
        self.processor, self.model = pipe.processor, pipe.model
        self.asked, self.painted, self.texts = [], [], list(texts)

    def chat(self, conversations, max_new_tokens):
        self.asked += [(c[0]["content"], c[0]["images"]) for c in conversations]
        answers = [self.texts.pop(0) if self.texts else f"answer {len(self.asked)}" for _ in conversations]
        return [type("Answer", (), {"text": text}) for text in answers]

    def generate(self, texts, **options):
        self.painted += list(zip(texts, options["seed"], strict=True))
        return type("Generation", (), {"images": [plain("red") for _ in texts]})


def run_one(fake, case, mode, texts=prompts.PROMPTS):
    (run,) = generation.run_block(fake, [case], mode, texts, FAST, 6)
    return run


def test_native_shows_every_image_in_its_place(pipe, data):
    """Stops: the candidates that the model never sees."""
    fake = Fake(pipe)
    run = run_one(fake, readers.read(data, "jigsaw")[0], "native")
    ((content, images),) = fake.asked
    tag = pipe.processor.tokenizer.image_tag
    assert f"The picture:\n{tag}\nCandidate 0:\n{tag}\nCandidate 1:\n{tag}\n" in content
    assert [path.name for path in images] == ["ref.png", "c0.png", "c1.png"]
    assert run.text == "answer 1" and not run.images


def test_torchumm_calls_in_its_order(pipe, data):
    """Stops: another order of calls, images that its adapter would not read, a plan that is not shortened."""
    fake = Fake(pipe, ["plan " * 100])
    run = run_one(fake, readers.read(data, "sliding")[0], "torchumm")
    tag = pipe.processor.tokenizer.image_tag
    assert [content.count(tag) for content, _ in fake.asked] == [1, 1]
    assert all(content.startswith(tag) for content, _ in fake.asked)
    assert [[path.name for path in images] for _, images in fake.asked] == [["demo_step_0000.png"]] * 2
    ((text, seed),) = fake.painted
    assert tag not in text and ("plan " * 100)[:200] in text and "plan " * 41 not in text
    assert seed == 100_000 * readers.TASKS.index("sliding")
    assert run.text == "answer 2" and list(run.images) == ["cand_01/demo_step_0000_step_0001.png"]


def test_the_explanation_is_shortened_and_the_source_never(pipe, data, capsys):
    """Stops: a prompt beyond the model's positions, or an SVG cut off to make it fit."""
    fake = Fake(pipe, ["word " * 3000])
    case = readers.read(data, "code")[0]
    run = run_one(fake, case, "native")
    ((text, _),) = fake.painted
    limit = pipe.model.config.llm.max_position_embeddings
    needed = len(pipe.processor.generation_prompt(text)[0]) + pipe.model.num_image_tokens
    assert limit - 3 <= needed <= limit
    assert SQUARE in text and text.endswith(prompts.PROMPTS["code_image"])
    (told,) = run.shortened
    assert 0 < told["kept"] < told["of"]


def test_a_source_that_is_too_long(pipe, data, tmp_path):
    """Stops: a case that stops the run, or that is tried again at every call."""
    root = shutil.copytree(data / "svg", tmp_path / "data/svg").parent
    (root / "svg/svgs/A_0001.svg").write_text("<svg>" + "<g></g>" * 2000 + "</svg>")
    assert uni_mmmu.generate(FAST, tmp_path / "run", root, tasks=["code"], max_new_tokens=2).complete
    record = json.loads((tmp_path / "run/code/case_01_A_0001/result.json").read_text())
    assert record["status"] == "error" and "the model has 1024" in record["errors"][0]
    assert (tmp_path / "run/code/case_01_A_0001/model_text.txt").read_text() == ""


def test_special_tokens_in_a_model_s_own_text(pipe, data):
    """Stops: a tag in an answer that stops the run, or that is read as an image."""
    tag = pipe.processor.tokenizer.image_tag
    fake = Fake(pipe, [f"see {tag} there"])
    run_one(fake, readers.read(data, "code")[0], "native")
    assert tag not in fake.painted[0][0]


def test_prompts_of_another_wording(tmp_path):
    path = tmp_path / "prompts.json"
    write(path, {"maze": "Go {step}."})
    assert prompts.override(prompts.PROMPTS, path)["maze"] == "Go {step}."
    write(path, {"chess": "x"})
    with pytest.raises(ValueError, match="names are science"):
        prompts.override(prompts.PROMPTS, path)
    assert prompts.fill('{a} {b} {"c": 1}', a="{b}", b=2) == '{b} 2 {"c": 1}'


# Scoring --------------------------------------------------------------------------------------------------------


class Judge:
    """A judge that sees nothing and says the same to all."""

    name = "always yes"

    def __init__(self, text: str):
        self.text, self.messages = text, []

    def ask(self, messages):
        self.messages.append(messages)
        return self.text


YES = json.dumps(
    dict.fromkeys(
        (
            "reasoning_correct",
            "result_correct",
            "image_correct",
            "overlay_ok",
            "text_ok",
            "text_semantic_match",
        ),
        1,
    )
    | {"shape_color_accuracy": 5, "position_accuracy": 4, "verdict": "match"}
)


class Same:
    name = "equal bytes"

    def __call__(self, a, b) -> float:
        return float(a.convert("RGB").tobytes() != b.convert("RGB").tobytes())


def copy(run: Path, tmp_path: Path, **texts: str) -> Path:
    """A copy of a run, with the texts of some tasks replaced."""
    new = shutil.copytree(run, tmp_path / "run")
    for task, text in texts.items():
        for path in (new / task).glob("*/model_text.txt"):
            path.write_text(text)
    return new


def test_native_scores(native, data, tmp_path):
    """Stops: a number for what was not painted; texts that no judge is needed for left out."""
    run = copy(native, tmp_path, maze=answer("right"), sliding=answer("left", "up"), code="no block")
    for name, choice in (("ex_0", 0), ("ex_1", 0)):
        block = f'<FINAL_ANSWER_JSON>{{"choice": {choice}}}</FINAL_ANSWER_JSON>'
        (run / f"jigsaw/{name}/model_text.txt").write_text(block)
    vl, text = Judge(YES), Judge("<think>{x}</think>" + YES)
    result = uni_mmmu.score(run, data, vl_model=vl, text_model=text, dreamsim=Same(), progress=False)
    table = json.loads((run / "eval/all_tasks_summary.json").read_text())
    assert table == {
        "jigsaw_image": None,
        "jigsaw_text": 0.5,
        "maze_image": None,
        "maze_text": 1.0,
        "sliding_image": None,
        "sliding_text": 1.0,
        "math_overlay": None,
        "math_text": 1.0,
        "science_reasoning": pytest.approx(2 / 3),  # officially, the sample without an image counts 0
        "science_result": pytest.approx(2 / 3),
        "science_image": None,
        "code_text": 0.0,
        "code_shape_color": 5.0,
        "code_position": 4.0,
    }
    assert result["headline"] is None and result["complete"] and result["departures"]
    assert any("visual scaffold" in note.replace("\n", " ") for note in result["notes"])
    row = next(csv.DictReader((run / "eval/all_tasks_summary.csv").open()))
    assert list(row) == [name for _, name, _ in rules.COLUMNS] and row["Maze text accuracy by step"] == "1.0"
    assert json.loads((run / "eval/sliding/summary.json").read_text())["text_accuracy_exact"] == 0
    shown = [[part["type"] for part in m[-1]["content"]] for m in vl.messages if len(m) == 1]
    assert shown == [["text", "image_url", "image_url"]] * 2  # code: rubric, reference, candidate


def test_torchumm_scores_and_perfect_frames(painted, data, tmp_path):
    """Stops: pictures judged against the wrong truth: slots swapped, the first frame for the last."""
    run = copy(painted, tmp_path, maze=answer("right"))
    for number in ("00003", "00015", "00020"):
        shutil.copy(
            data / f"maze/maze_6x6_{number}_steps/maze_step_0001.png",
            run / f"maze/case_{number}/cand_01/maze_step_0000_step_0001.png",
        )
    for case in readers.read(data, "sliding"):
        shutil.copy(case.truth["frames"][0], run / case.folder / "cand_01/demo_step_0000_step_0001.png")
    for case in readers.read(data, "jigsaw"):
        for k, path in enumerate(case.truth["slots"], 1):
            shutil.copy(path, run / case.folder / f"model_image_{k:02d}.png")
    (run / "jigsaw/ex_1/model_image_02.png").unlink()
    (run / "jigsaw/ex_1/result.json").write_text("{}")
    uni_mmmu.score(run, data, vl_model=Judge(YES), dreamsim=Same(), progress=False)
    table = json.loads((run / "eval/all_tasks_summary.json").read_text())
    assert table["maze_image"] == table["sliding_image"] == table["math_overlay"] == 1.0
    assert table["jigsaw_image"] == 0.5  # one item without two pictures costs the whole distance
    assert table["science_image"] == pytest.approx(2 / 3) and table["math_text"] is None
    maze = json.loads((run / "eval/maze/summary.json").read_text())
    assert maze["total_candidates"] == 3 and maze["parse_accuracy_all_ok"] == 1


def test_a_missing_case_is_no_zero_and_no_number(native, data, tmp_path):
    """Stops: a table from half of the cases that looks whole."""
    run = copy(native, tmp_path, maze=answer("right"))
    (run / "maze/case_00003/_done.ok").unlink()
    result = uni_mmmu.score(run, data, tasks=["maze"], progress=False)
    assert {"value": 1.0, "n_scored": 1, "n_expected": 2}.items() <= result["scores"]["maze_text"].items()
    assert not result["complete"]
    assert json.loads((run / "eval/all_tasks_summary.json").read_text())["maze_text"] is None


def test_answers_without_json_count_zero_and_are_told(native, data, tmp_path):
    """Stops: a judge's nonsense left out, which would raise the score; officially it is 0."""
    run = copy(native, tmp_path)
    result = uni_mmmu.score(run, data, tasks=["math"], text_model=Judge("I cannot."), progress=False)
    assert result["scores"]["math_text"]["value"] == 0.0
    assert any("2 judgements had no usable JSON" in note for note in result["notes"])


def test_the_official_reading_of_a_thinking_judge(native, data, tmp_path):
    """Stops: the flag without effect."""
    run = copy(native, tmp_path)
    judge = Judge("<think>\\frac{1}{2}</think>" + YES)
    result = uni_mmmu.score(run, data, tasks=["math"], text_model=judge, strip_think=False, progress=False)
    assert result["scores"]["math_text"]["value"] == 0.0


def test_an_endpoint_that_fails_in_the_usual_ways(native, data, tmp_path):
    """Stops: a dropped connection counted as a wrong answer; requests asked again that were answered."""
    pytest.importorskip("openai")

    def reply(request: dict, before: int):
        text = json.dumps(request["messages"])
        if "heated 1 times" in text:  # fails twice, then answers
            return [("drop", 0), ("status", 503), YES][before] if before < 3 else YES
        return ("status", 500) if "heated 3 times" in text and reply.broken else YES

    reply.broken = True
    run = copy(native, tmp_path)
    with ChatServer(reply) as server:
        options = dict(tasks=["science"], vl_model="judge-7b", vl_url=server.url, progress=False, wait=0.01)
        result = uni_mmmu.score(run, data, **options)
        entry = result["scores"]["science_reasoning"]
        assert (entry["n_scored"], entry["n_expected"]) == (2, 3) and not result["complete"]
        assert any("1 got no judgement" in note and "HTTP 500" in note for note in result["notes"])
        asked, reply.broken = len(server.requests), False
        result = uni_mmmu.score(run, data, **options)
        assert result["complete"] and len(server.requests) == asked + 1
    assert result["scores"]["science_reasoning"]["value"] == pytest.approx(2 / 3)
    assert result["judge"]["vl"] == "judge-7b" and server.requests[0]["max_tokens"] == 1024


def test_another_judge_s_records_are_refused(native, data, tmp_path):
    """Stops: one number from two judges."""
    run = copy(native, tmp_path)
    uni_mmmu.score(run, data, tasks=["math"], text_model=Judge(YES), progress=False)
    other = Judge(YES)
    other.name = "another"
    with pytest.raises(ValueError, match="is of another judge"):
        uni_mmmu.score(run, data, tasks=["math"], text_model=other, progress=False)


def test_images_for_judges(tmp_path):
    """Stops: pictures wider than 2048 px, or transparency lost to JPEG."""
    import base64
    import io

    def sent(image: Image.Image, name: str) -> Image.Image:
        save(image, tmp_path / name)
        url = scoring.image_part(tmp_path / name)["image_url"]["url"]
        kind, data = url.split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == f"data:image/{image.format.lower()}"
        return image

    assert sent(Image.new("RGB", (4096, 100)), "a.png").size == (2048, 50)
    assert sent(Image.new("RGB", (10, 10)), "b.jpg").format == "JPEG"
    assert sent(Image.new("RGBA", (10, 10)), "c.webp").format == "PNG"


def test_a_rendering_where_the_data_has_none(native, data, tmp_path):
    """Stops: a case without a reference that passes silently."""
    pytest.importorskip("cairosvg")
    root = shutil.copytree(data, tmp_path / "data")
    for path in (root / "svg/pngs").iterdir():
        path.unlink()
    run = copy(native, tmp_path)
    judge = Judge(YES)
    result = uni_mmmu.score(run, root, tasks=["code"], vl_model=judge, progress=False)
    assert result["scores"]["code_shape_color"]["value"] == 5
    assert Image.open(run / "eval/code/references/case_01_A_0001.png").size == (8, 8)


def test_the_command_line(native, data, tmp_path, capsys):
    """Stops: options that do not reach the functions; a report that cannot be written."""
    run = copy(native, tmp_path, maze=answer("right"))
    of, fast = ["--data", str(data)], ["--device", "cpu", "--dtype", "float32", "--num-inference-steps", "1"]
    fast += ["--batch-size", "4", "--max-new-tokens", "6", "--quiet"]
    assert main(["bench", "uni_mmmu", "generate", *of, "--out", str(run), *fast]) == 0
    assert main(["bench", "uni_mmmu", "score", *of, "--tasks", "maze", "--out", str(run), "--quiet"]) == 0
    assert main(["bench", "uni_mmmu", "report", "--out", str(run)]) == 0
    text = (run / "report.md").read_text()
    assert "Janus-Pro-7B" in text and "maze_text" in text
    out = capsys.readouterr().out
    assert "all 12 files are there" in out and "report.json" in out


# The official scorers -------------------------------------------------------------------------------------------


@pytest.mark.torchumm
@pytest.mark.skipif("TORCHUMM_ROOT" not in os.environ, reason="TORCHUMM_ROOT names no checkout of TorchUMM")
def test_the_official_scorers_read_our_layout_and_agree(painted, data, tmp_path, monkeypatch):
    """Stops: a layout, a rule or a denominator that only our own scorer knows. Judges and DreamSim are constants."""
    pytest.importorskip("pandas")
    fakes = {
        "transformers": (
            "AutoModelForCausalLM",
            "AutoTokenizer",
            "Qwen2_5_VLForConditionalGeneration",
            "AutoProcessor",
        ),
        "qwen_vl_utils": ("process_vision_info",),
        "dreamsim": ("dreamsim",),
    }
    for name, members in fakes.items():  # what the file imports for its judges
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(members, lambda **_: (None, None)))
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(os.environ["TORCHUMM_ROOT"]) / "eval/generation/uni_mmmu/eval_ummmu.py"
    spec = importlib.util.spec_from_file_location("eval_ummmu", path)
    theirs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "eval_ummmu", theirs)
    spec.loader.exec_module(theirs)

    run = copy(
        painted,
        tmp_path,
        maze=answer("right"),
        sliding=answer("left", "up"),
        code="<RENDER_SUMMARY>red</RENDER_SUMMARY>",
        jigsaw='<FINAL_ANSWER_JSON>{"choice": 0}</FINAL_ANSWER_JSON>',
    )
    frame = "maze/case_00003/cand_01/maze_step_0000_step_0001.png"
    shutil.copy(data / "maze/maze_6x6_00003_steps/maze_step_0001.png", run / frame)
    case = readers.read(data, "sliding")[0]
    shutil.copy(case.truth["frames"][0], run / case.folder / "cand_01/demo_step_0000_step_0001.png")
    uni_mmmu.score(run, data, vl_model=Judge(YES), text_model=Judge(YES), dreamsim=Same(), progress=False)

    judge = SimpleNamespace(generate_json=lambda **_: json.loads(YES))
    monkeypatch.setattr(theirs.JigsawEvaluator, "_dreamsim_distance", lambda self, a, b: Same()(a, b))
    words = dict.fromkeys(
        ("text_system", "image_system", "system_overlay", "system_text", "image_prompt", "text_prompt"), ""
    )
    words |= dict.fromkeys(("text_user_tmpl", "image_user_tmpl", "overlay_user_tmpl"), "")
    science, math = data / "science/dim_all.json", data / "math_data/filtered.json"
    jobs = {
        "maze": (theirs.MazeEvaluator, {"evaluate_images": True, "parser_params": {"tolerance": 0.75}}, 0),
        "sliding": (theirs.SlidingPuzzleEvaluator, {"evaluate_images": True}, 0),
        "jigsaw": (theirs.JigsawEvaluator, {"dataset_dir": str(data / "jigsaw_dataset_2x2ref")}, 0),
        "code": (theirs.CodeSVGEvaluator, {"dataset_dir": str(data / "svg")}, 1),
        "science": (theirs.ScienceEvaluator, {"data_json": str(science)}, 1),
        "math": (theirs.GeometryEvaluator, {"filtered_json": str(math)}, 2),
    }
    for task, (kind, config, judges) in jobs.items():
        out = str(tmp_path / "theirs" / task)
        config |= words | {"max_retries": 1, "penalty_distance": 1.0, "dreamsim_cache": ""}
        config |= dict.fromkeys(("run_root", "sample_root", "out_dir"), str(run / task))
        config |= dict.fromkeys(("eval_dir", "eval_root", "eval_out_dir", "out_eval_dir"), out)
        config["out_root"] = str(run / task) if task == "jigsaw" else out
        evaluator = kind(config, *[judge] * judges)
        evaluator.evaluate()
        evaluator.summarize()
        name = "summary.json" if task in ("maze", "sliding", "jigsaw") else "eval_summary.json"
        ours = json.loads((run / "eval" / task / name).read_text())
        assert json.loads((tmp_path / "theirs" / task / name).read_text()) == ours, task
