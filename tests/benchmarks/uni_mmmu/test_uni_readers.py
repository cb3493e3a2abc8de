# SPDX-License-Identifier: MIT
"""The released files as cases."""

from __future__ import annotations

import json
import shutil

import pytest
from invented_uni import write

from janusflow_min.benchmarks.uni_mmmu import readers


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
        (
            "maze/maze_6x6_steps_00003.json",
            lambda d: d.update(steps_long=["up"] * 100),
            "1 to 99 moves, got 100",
        ),
        ("math_data/filtered.json", lambda d: d["set A"]["1"].update(type=5), "set A/1: type must be a text"),
        ("svg/metadata.json", lambda d: d["samples"].append("x"), r"samples\[2\] must be an object, got str"),
        ("science/dim_all.json", lambda d: d.append(5), "block 2 must be an object, got int"),
        ("math_data/filtered.json", lambda d: d["set A"]["1"].update(type="\ud800"), "half of a UTF-16 pair"),
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_saved_by_another_editor(data, tmp_path, encoding):
    """Stops: a byte-order mark that makes released files unreadable."""
    root = shutil.copytree(data, tmp_path / "data")
    for path in root.rglob("*.json"):
        path.write_text(path.read_text(), encoding=encoding)
    for task in readers.TASKS:
        assert [c.name for c in readers.read(root, task)] == [c.name for c in readers.read(data, task)]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff\xfe\x00", b""])
def test_data_that_is_not_json(data, tmp_path, content):
    """Stops: a traceback, or an error that names no file."""
    root = shutil.copytree(data, tmp_path / "data")
    (root / "svg/metadata.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"svg/metadata\.json is not valid JSON"):
        readers.read(root, "code")


def test_no_data_and_unknown_tasks(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="holds none of"):
        readers.data_folder(tmp_path)
    assert readers.tasks_of(["code_rendering", "math_geo"]) == ("math", "code")
    with pytest.raises(ValueError, match="got chess"):
        readers.tasks_of(["chess"])
