# SPDX-License-Identifier: MIT
"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from janusflow_min import files
from janusflow_min.files import (
    atomic_directory,
    atomic_file,
    check_folder,
    printable,
    read_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_atomic_directory_appears_when_it_is_whole(tmp_path):
    """Stops: a target that others see while it is being written."""
    target = tmp_path / "a" / "b"
    with atomic_directory(target) as temporary:
        (temporary / "file").write_text("new")
        assert not target.exists() and temporary.parent == target.parent
    assert names(target) == ["file"] and names(target.parent) == ["b"]


def test_an_empty_folder_may_be_filled(tmp_path):
    """Stops: a refusal of the folder that the caller has just made."""
    with atomic_directory(tmp_path / "made") as first:
        first.joinpath("x").touch()
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path) == ["empty", "made"] and names(tmp_path / "empty") == ["file"]


def test_what_is_there_is_kept_unless_overwritten(tmp_path):
    """Stops: the user's data lost, or the refusal after minutes of writing."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileExistsError, match="target exists already"), atomic_directory(target):
        raise AssertionError("entered")
    assert names(tmp_path) == ["target"]
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "new").touch()
        assert (target / "old").exists() and not (target / "new").exists()
    assert names(tmp_path) == ["target"] and names(target) == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path, overwrite):
    """Stops: somebody's file deleted because a folder was to have its name."""
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "target", overwrite):
        raise AssertionError("entered")
    assert (tmp_path / "target").read_text() == "mine"


def test_only_owned_entries_give_way(tmp_path):
    """Stops: a checkpoint saved into a repository's clone, or a home directory, deleting everything else there."""
    for name in ("weights", "thesis.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("old")
    with atomic_directory(tmp_path, overwrite=True, owned=lambda name: name == "weights") as temporary:
        (temporary / "config").write_text("new")
    assert names(tmp_path) == [".git", "config", "thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == (tmp_path / ".git" / "HEAD").read_text() == "old"


def test_a_folder_keeps_its_identity(tmp_path, monkeypatch):
    """Stops: a working directory, a link or a mount point that is no longer the folder that others hold."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").touch()
    link.symlink_to("real")
    number = real.stat().st_ino
    with atomic_directory(link, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert link.is_symlink() and names(real) == ["new"] and names(tmp_path) == ["link", "real"]
    monkeypatch.chdir(real)
    with atomic_directory(".", overwrite=True) as temporary:
        (temporary / "newer").touch()
    assert names(Path(".")) == ["newer"] and real.stat().st_ino == number


def test_a_link_to_nothing_is_followed(tmp_path):
    """Stops: a folder in place of a link that points to where the data should go."""
    (tmp_path / "link").symlink_to("elsewhere")
    with atomic_directory(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["elsewhere", "link"] and (tmp_path / "link" / "new").exists()


def test_home_is_expanded(tmp_path, monkeypatch):
    """Stops: a folder that is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with atomic_directory("~/saved") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["saved"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_new_files(tmp_path, mask):
    """Stops: files that only their owner can read because some writer makes them so, or readable by all against
    the user's umask."""
    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "target") as temporary:
            (temporary / "vae").mkdir()
            for name in ("a", "vae/b"):
                (temporary / name).touch()
            (temporary / "a").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_what_cannot_become_a_folder_is_said_early(tmp_path):
    """Stops: minutes of work for a result that has no place."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=r"--out .*file.* is a file"):
            check_folder(path, "--out")
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and names(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="the path is empty"):
        check_folder("")


@pytest.mark.parametrize("work", [None, "work"])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, work):
    """Stops: half a file under its final name, and leftovers of a failure."""
    path, work = tmp_path / "a" / "file.txt", work and tmp_path / work
    with atomic_file(path, work) as temporary:
        temporary.write_text("é", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), atomic_file(path, work) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == "é".encode() and names(path.parent) == ["file.txt"]
    assert work is None or names(work) == []


@pytest.mark.parametrize(
    "content, what",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "too deeply nested"),
        ("[]", "must hold a JSON object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("<!DOCTYPE html><html>", "web page"),
        ("\0" * 9, "not valid JSON"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, content, what):
    """Stops: a parser's error without the file, and a RecursionError for a file of brackets."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json .*{what}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")
    assert read_json(tmp_path / "b.json", required=False) == {}
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_json(tmp_path, required=False)


def test_a_byte_order_mark_is_no_error(tmp_path):
    """Stops: a refusal of what Windows' editors write."""
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_text_for_the_terminal_moves_no_cursor():
    """Stops: a key of a file that clears the screen, hides text or writes another's line."""
    assert printable("\x1b[2J\x07\r\x9b1m\u202e\udc80\x00") == r"\x1b[2J\x07\r\x9b1m\u202e\udc80\x00"
    assert printable("a\n\tgrün 星 👩‍👩‍👧 \u00a0") == "a\n\tgrün 星 👩‍👩‍👧 \u00a0"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_folder_vanishes_and_the_old_one_stays(tmp_path, error, there):
    """Stops: leftovers after Ctrl-C."""
    target = tmp_path / "target"
    if there:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), atomic_directory(target, overwrite=True) as temporary:
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
        if Path(source).name == "new":
            raise PermissionError("busy")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", stubborn)
    with pytest.raises(PermissionError, match="busy"), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "first").touch()
        (temporary / "new").touch()
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_a_relative_target_stays_where_it_was_meant(tmp_path, monkeypatch):
    """Stops: a folder written elsewhere because the block changes the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_directory("target"):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "target"]
