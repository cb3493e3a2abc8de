# SPDX-License-Identifier: MIT
"""Generated images on disk: file names, PNG files that carry their settings, contact sheets. Needs Pillow alone."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

GAP = 8  # px between the images of a sheet
ACROSS = 6  # images side by side in a sheet, at most
CAPTION_LINES = 3
SHEET_PIXELS = 40_000_000  # all images of a sheet together; more of them are shown smaller


def slug(text: str) -> str:
    """ "A café, at night!" -> "a-cafe-at-night": lower-case ASCII for a file name; "prompt" where none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].rstrip("-") or "prompt"


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG with `metadata` as its text chunks; returns the path it got.

    There is a whole file or none. A file that exists is kept: the new one becomes `name-2.png`, `name-3.png`, …
    Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))  # UTF-8, whatever the prompt's language
    temporary = path.with_name(f".{path.stem[:40]}.writing-{secrets.token_hex(4)}.png")
    try:
        image.save(temporary, "PNG", pnginfo=info)
        free = _reserve(path)
        try:
            os.replace(temporary, free)
        except BaseException:
            free.unlink(missing_ok=True)
            raise
    finally:
        temporary.unlink(missing_ok=True)
    return free


def _reserve(path: Path) -> Path:
    """Create the first of path, stem-2, stem-3, … that does not exist."""
    others = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(2))
    for free in itertools.chain([path], others):
        try:
            free.touch(exist_ok=False)
            return free
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy of the same shape, no larger than side x side px."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def sheet_side(count: int) -> int:
    """The side in px that each of `count` images gets in a sheet, so that a sheet of thousands still opens."""
    return max(16, min(256, int((SHEET_PIXELS / max(count, 1)) ** 0.5)))


def contact_sheet(groups: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """One RGB image of all: each group's images in rows of at most six, its caption below.

    groups: (caption, images). An image's cell is as large as the largest image, up to `sheet_side`. Small groups
    stand side by side. Letters that Pillow's own font lacks, Chinese ones for instance, become boxes
    in the caption; the files' metadata has them whole. Raises ValueError for no images.
    """
    images = [image for _, group in groups for image in group]
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    side = min(sheet_side(len(images)), max(max(image.size) for image in images))
    across = min(max(len(group) for _, group in groups), ACROSS)
    font = _font(max(11, min(18, side // 9)))
    blocks = []
    for caption, group in groups:
        cells = [ImageOps.pad(thumbnail(image, side), (side, side), color="white") for image in group]
        pictures, text = _grid(cells, across, GAP), _caption(caption, across * (side + GAP) - GAP, font)
        block = Image.new("RGB", (text.width, pictures.height + GAP // 2 + text.height), "white")
        block.paste(pictures, (0, 0))
        block.paste(text, (0, pictures.height + GAP // 2))
        blocks.append(block)
    return ImageOps.expand(_grid(blocks, min(len(blocks), ACROSS // across), 2 * GAP), 2 * GAP, "white")


def _grid(images: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Images of one width, row by row."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + gap for row in rows]
    width = (images[0].width + gap if images else gap) * columns - gap
    grid = Image.new("RGB", (width, max(0, sum(heights) - gap)), "white")
    for row, top in zip(rows, itertools.accumulate(heights, initial=0), strict=False):
        for column, image in enumerate(row):
            grid.paste(image, (column * (image.width + gap), top))
    return grid


def _caption(text: str, width: int, font: Any) -> Image.Image:
    """At most CAPTION_LINES lines of text, `width` px wide; what does not fit ends in "..."."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # the bitmap font has Latin-1 alone
        text = text.encode("latin-1", "replace").decode("latin-1")
    letters = max(4, int(width / font.getlength("e")))
    words = " ".join(text.split())[:1000]
    lines = textwrap.wrap(words, letters, max_lines=CAPTION_LINES, placeholder="...") or [""]
    line_height = int(1.35 * font.getbbox("Ag")[3])
    strip = Image.new("RGB", (width, len(lines) * line_height), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((0, i * line_height), line, fill=(40, 40, 40), font=font)
    return strip


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, so that none of the system is needed. Without FreeType it has one small size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0
        return ImageFont.load_default()
