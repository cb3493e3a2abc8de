# SPDX-License-Identifier: MIT
"""Painted pictures on disk: file names, PNG files that carry their settings, contact sheets.

Nothing here knows the model; `cli.py` uses it, and Pillow is all it needs.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

GAP = 8  # px between the pictures of a sheet
ACROSS = 6  # pictures side by side in a sheet, at most
CAPTION_LINES = 3
SHEET_PIXELS = 40_000_000  # a sheet's pictures together; more of them means smaller ones


def slug(text: str, longest: int = 40) -> str:
    """ "A café, at night!" -> "a-cafe-at-night": lower-case ASCII for a file name; "prompt" where none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:longest].rstrip("-") or "prompt"


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG with `metadata` as its text chunks; returns the path it got.

    Written under a temporary name, then renamed: there is a whole file or none. A file that is there already
    stays: the new one becomes `name-2.png`, `name-3.png`, … Raises OSError.
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
    """Create the first of path, stem-2, stem-3, … that is not there yet."""
    others = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(2))
    for free in itertools.chain([path], others):
        try:
            free.touch(exist_ok=False)
            return free
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks that `save_png` wrote. FileNotFoundError; ValueError for what is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {key: str(value) for key, value in image.text.items()}
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG file") from None


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy no larger than side × side px, of the same shape."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def sheet_side(count: int, largest: int = 256) -> int:
    """The side in px that `count` pictures get in a sheet, so that a sheet of thousands still opens."""
    return max(16, min(largest, int((SHEET_PIXELS / max(count, 1)) ** 0.5)))


def contact_sheet(
    groups: Sequence[tuple[str, Sequence[Image.Image]]], side: int | None = None
) -> Image.Image:
    """One RGB picture of all: each group's pictures in rows of at most six, its caption below.

    groups: (caption, pictures). side: of a picture's cell in px; by default the largest's, up to `sheet_side`.
    Small groups stand side by side. Letters that Pillow's own font lacks, Chinese ones for instance, are boxes in
    the caption; the files' metadata has them whole. Raises ValueError for no pictures.
    """
    count = sum(len(images) for _, images in groups)
    if not count:
        raise ValueError("a contact sheet needs at least one picture")
    if side is None:
        side = min(sheet_side(count), max(max(image.size) for _, images in groups for image in images))
    across = min(max(len(images) for _, images in groups), ACROSS)
    columns = max(1, min(len(groups), ACROSS // across))
    width = across * (side + GAP) - GAP  # of a group
    font = _font(max(11, min(18, side // 9)))
    captions = [_wrap(caption, width, font) for caption, _ in groups]
    line = int(1.35 * (font.getbbox("Ag")[3]))
    cells = [
        (
            captions[i],
            groups[i][1],
            (-(-len(groups[i][1]) // across)) * (side + GAP) + len(captions[i]) * line,
        )
        for i in range(len(groups))
    ]
    bands = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(height for _, _, height in band) + GAP for band in bands]
    outer = 2 * GAP  # around each group
    sheet = Image.new(
        "RGB", (columns * (width + outer) + outer, sum(h + GAP for h in heights) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    top = outer
    for band, height in zip(bands, heights, strict=True):
        for column, (lines, images, _) in enumerate(band):
            left = outer + column * (width + outer)
            for i, image in enumerate(images):
                small = thumbnail(image, side)
                x = left + i % across * (side + GAP) + (side - small.width) // 2
                y = top + i // across * (side + GAP) + (side - small.height) // 2
                sheet.paste(small, (x, y))
            below = top + -(-len(images) // across) * (side + GAP) - GAP // 2
            for i, text in enumerate(lines):
                draw.text((left, below + i * line), text, fill=(40, 40, 40), font=font)
        top += height + GAP
    return sheet


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font: no file of the system is needed. Without FreeType it has one small size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0
        return ImageFont.load_default()


def _wrap(text: str, width: int, font) -> list[str]:
    """Lines of at most `width` px, at most CAPTION_LINES, then an ellipsis."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # the bitmap font knows Latin-1 alone
        text = text.encode("latin-1", "replace").decode("latin-1")
    lines, current = [], ""
    words = " ".join(text.split())[:1000].split(" ")
    while words and len(lines) <= CAPTION_LINES:
        word = words.pop(0)
        longer = f"{current} {word}".strip()
        if font.getlength(longer) <= width:
            current = longer
        elif current:
            lines.append(current)
            words, current = [word, *words], ""
        else:  # a word wider than the line is broken
            fits = next(k for k in range(1, len(word) + 1) if font.getlength(word[: k + 1]) > width)
            lines.append(word[:fits])
            words = [word[fits:], *words]
    lines.append(current)
    if len(lines) > CAPTION_LINES:
        last = lines[CAPTION_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: CAPTION_LINES - 1], last + "..."]
    return lines
