# SPDX-License-Identifier: MIT
"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from janusflow_min import files
from janusflow_min.files import new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    """Stops: a target that others see while it is being written."""
    target = tmp_path / "a" / "b"
    with new_folder(target) as temporary:
        (temporary / "file").write_text("new")
        assert not target.exists() and temporary.parent == target.parent
    assert names(target) == ["file"] and names(target.parent) == ["b"]


def test_an_empty_folder_may_be_filled(tmp_path):
    """Stops: a refusal of the folder that the caller has just made."""
    with new_folder(tmp_path / "made") as first:
        first.joinpath("x").touch()
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path) == ["empty", "made"] and names(tmp_path / "empty") == ["file"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_kept_unless_overwritten(tmp_path, kind):
    """Stops: the user's data lost, or the refusal after minutes of writing."""
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(FileExistsError, match="target exists already"), new_folder(target):
        raise AssertionError("entered")
    assert names(tmp_path) == ["target"]
    with new_folder(target, overwrite=True) as temporary:
        (temporary / "new").touch()
        assert target.exists()
    assert names(tmp_path) == ["target"] and names(target) == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_folder_vanishes_and_the_old_one_stays(tmp_path, error, there):
    """Stops: leftovers after Ctrl-C."""
    target = tmp_path / "target"
    if there:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), new_folder(target, overwrite=True) as temporary:
        (temporary / "half").touch()
        raise error("stopped")
    assert names(tmp_path) == (["target"] if there else [])
    assert not there or names(target) == ["old"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    """Stops: neither the old folder nor the new one after a failure between two renames."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = files.os.rename

    def stubborn(source, destination):
        if ".writing-" in str(source):
            raise PermissionError("busy")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", stubborn)
    with pytest.raises(PermissionError, match="busy"), new_folder(target, overwrite=True):
        pass
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_a_relative_target_stays_where_it_was_meant(tmp_path, monkeypatch):
    """Stops: a folder written elsewhere because the block changes the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_folder("target"):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "target"]
