# SPDX-License-Identifier: MIT
"""Reading what users bring: text with or without a byte-order mark and with either line ending, and images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


def read_text(path: str | Path) -> str:
    """UTF-8 text without its byte-order mark, lines ending in \\n. ValueError naming the file for other bytes."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def text_sha256(path: str | Path) -> str:
    """Of `read_text`: equal for copies of a published file whose line endings or byte-order mark differ."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("FILE:3", value) of each line that is not blank. ValueError naming file and line for what is not JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not JSON: {error}") from None


class UnreadableImage(ValueError):
    """An image file that is empty, cut off, damaged, too large or of the wrong size; the text names it."""


def read_image(path: str | Path) -> Image.Image:
    """The whole image, decoded. Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError and struct.error among them
        raise UnreadableImage(f"{path} cannot be read as an image: {type(error).__name__}: {error}") from None
    return image
