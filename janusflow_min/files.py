# SPDX-License-Identifier: MIT
"""Files and folders that are there whole or not at all; JSON, hashes, and text that is safe to print."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def expand(path: str | os.PathLike) -> Path:
    """The path with `~` expanded. ValueError for "" (which would mean the current folder)."""
    if not os.fspath(path):
        raise ValueError('the path is empty; "." is the current folder')
    return Path(os.path.expanduser(path))


def public_name(source: str) -> str:
    """A hub id as it is; of a folder its own name: a path says nothing on another machine."""
    local = expand(source)
    return local.resolve().name if local.is_dir() else source


# Control characters but tab and new line, marks that turn the direction of the text, lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text from a file or a model, made safe for a terminal: what could move the cursor is shown as an escape."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


# Reading -----------------------------------------------------------------------


def read_json(path: str | Path, required: bool = True) -> dict[str, Any]:
    """A JSON object; {} for a missing file that is not required. FileNotFoundError or ValueError name the file."""
    path = Path(path)
    if not path.is_file():
        if not required and not path.exists():
            return {}
        raise FileNotFoundError(f"{path} " + ("is not a file" if path.exists() else "does not exist"))
    data = parse_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def parse_json(path: str | Path) -> Any:
    """Whatever a JSON file holds. ValueError names the file where it is no JSON."""
    content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not valid JSON: {reason}{content_hint(content)}") from None


def content_hint(content: bytes) -> str:
    """What a file that cannot be read really is, and what to do, as the end of an error; "" where nobody knows."""
    start = content[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            "; it is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file again"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return "; it is a web page, not the file itself: download it again, logged in if the page asks for it"
    return ""


def sha256(path: str | Path) -> str:
    """Of a file; of a folder: of the relative names and contents of all its files, in order."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# Writing -----------------------------------------------------------------------


def check_folder(path: str | os.PathLike, name: str = "the folder") -> Path:
    """The expanded path, if it is a folder or can become one: to be asked before long work.

    Raises NotADirectoryError where the path or one above it is a file; PermissionError where it cannot be written.
    """
    path = expand(path)
    full = Path(os.path.realpath(path))
    there = next(p for p in (full, *full.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise NotADirectoryError(f"{name} {path} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} {path} cannot be written: no permission in {there}")
    return path


@contextmanager
def atomic_file(path: str | Path, work: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes if not.

    It has the suffix of `path` and lies beside it, or in `work` on the same file system. Folders are made.
    sync: flush the file to the disk first, so that it is whole after a loss of power too. IsADirectoryError where
    `path` is a folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but a file of that name is to be written: move it away")
    for folder in {path.parent, work or path.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    name = f".{path.stem[:40]}.writing-{secrets.token_hex(6)}{path.suffix}"
    temporary = (work or path.parent) / name
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write a whole file or nothing; text as UTF-8. The rest as in `atomic_file`."""
    with atomic_file(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_directory(
    target: str | os.PathLike, overwrite: bool = False, owned: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes if not.

    `~` is expanded and links are followed. FileExistsError where `target` is a file, or a folder that holds
    something, unless `overwrite`: then the entries whose names are `owned` give way to the new ones, at the very
    end, and all else in the folder stays. Files get the mode that new files have in that folder.
    """
    target = Path(os.path.realpath(expand(target)))
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise FileExistsError(f"{target} exists already and is not an empty folder")
    check_folder(target)
    # In the folder itself where it is there: it may be a mount point, or the only place that may be written.
    parent = target if target.is_dir() else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{target.name[:40]}.writing-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        set_default_mode(temporary)
        if target.is_dir():
            _replace_entries(temporary, target, owned)
        else:
            os.rename(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _replace_entries(source: Path, target: Path, owned: Callable[[str], bool]) -> None:
    """Move all entries of `source` into `target`, whose own ones of that kind go; all of them or none."""
    new = sorted(path.name for path in source.iterdir())
    old = [p.name for p in target.iterdir() if p != source and (p.name in new or owned(p.name))]
    aside = target / f"{source.name}.old"
    aside.mkdir()
    moves = [(target / name, aside / name) for name in old] + [(source / name, target / name) for name in new]
    try:
        for start, end in moves:
            os.rename(start, end)
    except BaseException:
        for start, end in reversed(moves):
            if os.path.lexists(end) and not os.path.lexists(start):
                os.rename(end, start)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def set_default_mode(folder: Path) -> None:
    """Give all files below `folder` the mode of new ones (the umask's); safetensors hides them from other users."""
    probe = folder / f".mode-{secrets.token_hex(4)}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
