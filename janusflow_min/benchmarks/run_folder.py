# SPDX-License-Identifier: MIT
"""A run's folder: files that are whole or not there at all.

`images/` in it is the layout that the benchmark's official scorer lists, so nothing else is ever written there: images
are made in `.work/` beside it, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import atomic_file, read_json
from .reading import UnreadableImage, read_image

PNG = b"\x89PNG\r\n\x1a\n"


class RunFolder:
    """A run's folder: `images/` for scorers, everything else beside it.

    root: may be relative or begin with `~`; kept absolute, so that a path inside it means one thing.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is a file, not a folder")
        self.images = self.root / "images"
        self.work = self.root / ".work"
        self.manifest = self.root / "manifest.json"

    @contextmanager
    def writing(self, path: str | Path) -> Iterator[Path]:
        """A temporary path with the suffix of `path`, renamed to it when the block ends well: in `.work/` for what
        goes into `images/`, beside `path` for all else.

        path: absolute, or relative to the run's folder (not to the current one); on the same file system, or the
        rename fails.
        """
        path = self.root / path
        with atomic_file(path, self.work if path.is_relative_to(self.images) else None) as temporary:
            yield temporary

    def write_text(self, path: str | Path, text: str) -> None:
        """A lone surrogate, which UTF-8 does not have, is written as JSON's escape of it."""
        with self.writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_json(self, path: str | Path, value: Any) -> None:
        self.write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def write_image(self, path: str | Path, image: Image.Image) -> None:
        with self.writing(path) as temporary:
            image.save(temporary)

    def read_manifest(self) -> dict[str, Any]:
        """ValueError for what is no manifest, FileNotFoundError where there is none."""
        if not self.manifest.is_file():
            raise FileNotFoundError(f"{self.manifest} is missing: run the stage `generate` first")
        manifest = read_json(self.manifest)
        for key, kind in {"benchmark": str, "inputs_sha256": dict, "settings": dict}.items():
            if not isinstance(manifest.get(key), kind):
                raise ValueError(
                    f"{self.manifest} is no manifest of a run: its {key} is {manifest.get(key)!r}"
                )
        return manifest

    def tidy(self) -> None:
        """Drop what killed processes left; call it when nothing is missing any more."""
        shutil.rmtree(self.work, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether a file is there and not empty; an image must not be damaged either: a PNG by its checksums, any other by
    decoding it."""
    if not path.is_file():
        return False
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        return path.stat().st_size > 0
    content = path.read_bytes()
    if content.startswith(PNG):
        return _png_is_whole(content)
    try:
        read_image(path)
    except UnreadableImage:
        return False
    return True


def _png_is_whole(content: bytes) -> bool:
    """Every chunk (length, kind, data, checksum of kind and data) is as it was written, and the last one is IEND."""
    start = len(PNG)
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if zlib.crc32(content[start + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            return False
        if content[start + 4 : start + 8] == b"IEND":
            return end == len(content)
        start = end
    return False
