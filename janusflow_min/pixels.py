# SPDX-License-Identifier: MIT
"""Images in and out: whatever holds one -> RGB, RGB -> pixels in [-1, 1], pixels -> bytes.

Everything that reads an image reads it here. By default as the reference does (PIL's own conversion to RGB: alpha is
dropped, the EXIF orientation ignored, the first frame counts), except for grey images of more than 8 bits, which PIL
would clip. Legend: B batch, H W pixels.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import IO, Any, TypeAlias, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from .files import content_hint, expand, printable

ImageSource: TypeAlias = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray
# Raster formats that Pillow decodes itself: no EPS, which starts Ghostscript, and none of other programs' formats.
FORMATS = (
    "AVIF BLP BMP CUR DCX DDS DIB GIF HEIF ICNS ICO IM JPEG JPEG2000 MPO MSP PCX PNG PPM PSD QOI SGI SUN "
)
FORMATS += "TGA TIFF WEBP XBM XPM"
BIG = "scale it down first, or raise PIL.Image.MAX_IMAGE_PIXELS for a file that you trust"
HINTS = (  # first bytes, the format that reads them, what it is and what to do
    (b"ftypheic ftypheix ftypmif1 ftyphevc ftypmsf1", "HEIF", "HEIC: convert it to JPEG or PNG, or `pip install "
     "pillow-heif` and call pillow_heif.register_heif_opener() first"),
    (b"ftypavif ftypavis", "AVIF", "AVIF, which needs Pillow 11.3 or newer: convert it to JPEG or PNG"),
    (b"%PDF %!PS \xc5\xd0\xd3\xc6 <svg", "", "a vector format: render it to PNG first"),
)  # fmt: skip


def check_image_source(source: Any) -> None:
    """ValueError for a type that `open_image` does not take, FileNotFoundError for a path without a file."""
    if isinstance(source, str | os.PathLike):
        _existing(source)
    elif not isinstance(source, bytes | Image.Image | np.ndarray) and not hasattr(source, "read"):
        raise ValueError(
            "an image must be a path, bytes, a file object, a PIL image or a uint8 array [H, W, 3], "
            f"got {type(source).__module__}.{type(source).__qualname__}"
        )


def open_image(
    source: ImageSource, upright: bool = False, background: str | None = None, copy: bool = True
) -> Image.Image:
    """An RGB image from a path, a file's bytes, a file object, a PIL image of any mode, or a uint8 array [H, W, 3].

    upright: turn it as its EXIF orientation says. background: the colour behind transparent pixels; None drops
    alpha, so that the colours it hides appear. Grey of 9 to 16 bits is scaled to 8; PIL's modes I and F count as
    8 bits where the values fit, else as 16 bits (I) or as 0 to 1 (F), and are refused beyond that.
    The source stays as it is. copy: False may return a PIL image itself, for who only reads it.
    Raises FileNotFoundError for a path without a file; ValueError for what is no image, truncated, empty, or beyond
    `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    check_image_source(source)
    name, file = "the image", cast(IO[bytes] | str, source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            form = f"{source.dtype} {list(source.shape)}"
            raise ValueError(f"an image array must be uint8 [H, W, 3], got {form}")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, str(getattr(source, "filename", "") or name), upright, background, copy)
    if isinstance(source, str | os.PathLike):
        name, file = printable(str(source)), _existing(source)
    elif isinstance(source, bytes):
        file = io.BytesIO(source)
    with _named(name, "cannot be read as an image", file):
        Image.init()  # all of Pillow's formats, and what others have registered
        image = Image.open(file, formats=[kind for kind in FORMATS.split() if kind in Image.OPEN])
    with image:
        return _to_rgb(image, name, upright, background, copy)


def _existing(source: str | os.PathLike) -> str:
    text = os.fspath(source)
    with contextlib.suppress(OSError, ValueError):  # a name too long, a null character, an empty path
        if (path := expand(text)).is_file():
            return str(path)
    shown, hint = printable(text[:200]), ""
    if "://" in text[:10]:
        hint = "; download it first"
    elif text.startswith("data:") or len(text) > 1000:
        hint = "; if it is an encoded image, pass its bytes: base64.b64decode(...)"
    raise FileNotFoundError(f"no image file at {shown!r}{'...' if len(text) > 200 else ''}{hint}")


@contextlib.contextmanager
def _named(name: str, what: str, file: Any = None) -> Iterator[None]:
    """Whatever PIL and its plugins raise, as a ValueError that names the image."""
    try:
        yield
    except Exception as error:
        hint = ""
        if isinstance(error, Image.DecompressionBombError):
            hint = f"; {BIG}"
        elif isinstance(error, Image.UnidentifiedImageError):
            error, hint = ValueError("not one of the formats known here"), _hint(file)
        raise ValueError(f"{name} {what}: {printable(str(error)) or type(error).__name__}{hint}") from error


def _hint(file: str | IO[bytes]) -> str:
    """What a file that is no image is, and what to do, by its first bytes."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as f:
            f.seek(0)
            start = f.read(200)
        if not start:
            return "; it is empty"
        for marks, form, text in HINTS:
            if form not in Image.OPEN and any(mark in start[:16] for mark in marks.split()):
                return f"; it is {text}"
        return content_hint(start)
    return ""


def _to_rgb(image: Image.Image, name: str, upright: bool, background: str | None, copy: bool) -> Image.Image:
    (width, height), limit = image.size, Image.MAX_IMAGE_PIXELS or math.inf
    if not 0 < width * height <= limit:
        remedy = f"; {BIG}" if width * height else ""
        raise ValueError(f"{name} must have 1 to {limit} pixels, got {width}x{height}{remedy}")
    with _named(name, "cannot be decoded"):
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode[:1] in ("I", "F"):
            image = Image.fromarray(_grey_levels(image))
        elif background is not None and ("transparency" in image.info or image.mode[-1] in ("A", "a")):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        elif image.mode == "P" and "transparency" in image.info:
            image = image.copy()
            del image.info["transparency"]  # the pixels are the same, but PIL would warn
        return image.convert("RGB") if copy or image.mode != "RGB" else image


def _grey_levels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of a grey image in one of PIL's wide modes."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")  # in Pillow 10
    if sixteen or image.mode.startswith("I;16"):
        white = 4095 if tags.get(258) == (12,) else 65535
    elif high <= 255:
        white = 1 if image.mode == "F" and high <= 1 else 255
    else:
        white = 65535 if image.mode == "I" else 0
    if not 0 <= low <= high <= white:
        raise ValueError(
            f"mode {image.mode} with values from {low:g} to {high:g}: which of them is white is not known; "
            "scale the values to 0 to 255 and convert it to mode L"
        )
    if image.mode == "F":
        levels = (values * (255 / white)).astype(np.uint8)  # cut off, as PIL does
    else:
        table = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
        levels = np.stack([table[row] for row in values])  # row by row: indices take eight bytes each
    # A TIFF may call 0 white, which PIL knows for 8 bits only.
    return 255 - levels if tags.get(262) == 0 else levels


def look_up(levels: Tensor, table: Tensor) -> Tensor:
    """Bytes (K, 3, H, W) -> pixels of the same shape, on the bytes' device: table (3, 256) has a channel's values.

    The same bits everywhere, whatever a device makes of a division.
    """
    table = table.to(levels.device)
    channel = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=levels.device)[:, None, None]
    return table.flatten().index_select(0, (levels + channel).flatten()).view(levels.shape)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> float32 (3, H, W) in [-1, 1], on the CPU: what the VAE encodes."""
    return torch.from_numpy(rearrange(np.array(image, dtype=np.float32), "h w c -> c h w") / 127.5 - 1)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in about [-1, 1] -> bytes (B, H, W, 3): clipped, then truncated as the reference does."""
    pixels = rearrange(pixels.float().clamp(-1, 1), "b c h w -> b h w c")
    return ((pixels + 1) / 2 * 255).to(torch.uint8).cpu().numpy()
