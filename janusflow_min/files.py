# SPDX-License-Identifier: MIT
"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well and vanishes if not.

    FileExistsError where something is there already, unless `overwrite`; then the old folder goes last.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already and is not an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    temporary, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("writing", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        for path in (temporary, old):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
