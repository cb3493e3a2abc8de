# SPDX-License-Identifier: MIT
"""Images in and out. What the reference's path needs of it is in `test_processor.py`."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janusflow_min.pixels import check_image_source, open_image, to_pixels, to_uint8
from janusflow_min.prefetch import resize

HALVES = np.kron(
    np.array([[0, 255]], np.uint8), np.ones((4, 4), np.uint8)
)  # black on the left, white on the right


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(HALVES).save(buffer, "PNG")
    return buffer.getvalue()


def grey(image: Image.Image) -> list[int]:
    """The levels of the first row; all channels must agree."""
    levels = np.asarray(image)
    assert image.mode == "RGB" and (levels == levels[..., :1]).all()
    return levels[0, :, 0].tolist()


# Sources --------------------------------------------------------------------------------------------------------


def test_bytes_and_file_objects_are_images(png, tmp_path, monkeypatch):
    """Stops: an upload or a download that must be written to a file before it can be asked about."""
    (tmp_path / "a.png").write_bytes(png)
    monkeypatch.setenv("HOME", str(tmp_path))
    with open(tmp_path / "a.png", "rb") as file:
        sources = [png, io.BytesIO(png), file, tmp_path / "a.png", str(tmp_path / "a.png"), "~/a.png"]
        for source in sources:
            check_image_source(source)
            assert grey(open_image(source)) == HALVES[0].tolist()


@pytest.mark.parametrize(
    "source, name",
    [
        (torch.zeros(3, 4, 4), "torch.Tensor"),
        ([[0]], "list"),
        (None, "NoneType"),
        (5, "int"),
        ({"bytes": b""}, "dict"),
        (bytearray(4), "bytearray"),
        (np.zeros((4, 4)), r"float64 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]"),
    ],
)
def test_other_types_are_refused_by_name(source, name):
    """Stops: a tensor or a list that is iterated, and guesses about an array's layout and range."""
    with pytest.raises(ValueError, match=f"an image.* must be .*{name}"):
        open_image(source)


@pytest.mark.parametrize(
    "text, hint",
    [
        ("data:image/png;base64,", "base64.b64decode"),
        ("", "base64.b64decode"),
        ("https://example.org/a.png?", "download it first"),
        ("\x1b[2J\0", ""),
    ],
)
def test_text_that_is_no_path_is_not_repeated_whole(text, hint, png):
    """Stops: a megabyte of base64 in an error, escape sequences in a terminal, and no word about what to do."""
    long = text + base64.b64encode(png * 200).decode()
    with pytest.raises(FileNotFoundError, match="no image file at") as error:
        open_image(long)
    assert len(str(error.value)) < 400 and hint in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "start, hint",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC: convert it to JPEG or PNG, or .*pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "vector format: render it"),
        (b"%PDF-1.7\n", "vector format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "vector format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "empty"),
        (b"nothing", "not one of the formats"),
    ],
)
def test_what_is_no_raster_image_is_named(tmp_path, monkeypatch, start, hint):
    """Stops: Ghostscript run for a file called .png, and "cannot identify image file" for a phone's photo."""
    import subprocess

    def run(*args, **options):
        raise AssertionError("another program was run")

    monkeypatch.setattr(subprocess, "Popen", run)
    (tmp_path / "cat.png").write_bytes(start)
    for source in (tmp_path / "cat.png", start):
        with pytest.raises(ValueError, match=f"cannot be read as an image: .*{hint}"):
            open_image(source)


def test_a_remedy_is_named_for_too_many_pixels(tmp_path, monkeypatch):
    """Stops: a refusal that does not say what to do with a large scan."""
    Image.new("1", (300, 300)).save(tmp_path / "scan.png")
    for limit in (80_000, 20_000):  # PIL itself warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(
                ValueError, match=r"scan\.png .*scale it down first, or raise .*MAX_IMAGE_PIXELS"
            ):
                open_image(tmp_path / "scan.png")


# Grey images of many bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I;16")]
)
def test_sixteen_bits_are_scaled(tmp_path, form, mode):
    """Stops: PIL's clipping, which leaves black and white of a 16-bit scan, in whatever format it came."""
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    file = tmp_path / f"deep.{form.lower()}"
    if form == "PPM":
        file.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        order = ">u2" if mode.endswith("B") else "<u2"
        Image.frombytes(mode, (4, 1), values.astype(order).tobytes()).save(file)
    assert grey(open_image(file)) == grey(open_image(file.read_bytes())) == [0, 1, 128, 255]


def test_ten_and_twelve_bits_are_scaled(tmp_path):
    """Stops: a medical or camera image that turns black because its white is 1023 or 4095."""
    (tmp_path / "ten.pgm").write_bytes(b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes())
    assert grey(open_image(tmp_path / "ten.pgm")) == [0, 128, 255]
    strip = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 2048, 4095, 0 of 12 bits each
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 1, 279: len(strip)}
    entries = b"".join(
        tag.to_bytes(2, "little")
        + (4).to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    header = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    (tmp_path / "twelve.tif").write_bytes(header + entries + bytes(4) + strip)
    assert grey(open_image(tmp_path / "twelve.tif")) == [0, 128, 255, 0]


@pytest.mark.parametrize(
    "dtype, values, levels",
    [
        (np.int32, [0, 100, 255], [0, 100, 255]),  # as PIL and the reference read it
        (np.int32, [0, 257, 65535], [0, 1, 255]),
        (np.float32, [0, 0.5, 1], [0, 127, 255]),
        (np.float32, [0, 100.9, 255], [0, 100, 255]),  # as PIL and the reference read it
        (np.int32, [0, 0, 2**20], None),
        (np.int32, [-1, 0, 1], None),
        (np.float32, [0, 0, 256], None),
        (np.float32, [-0.5, 0, 0.5], None),
        (np.float32, [0, 0, np.nan], None),
        (np.float32, [0, 0, np.inf], None),
    ],
)
@pytest.mark.parametrize("file", [False, True])
def test_wide_modes_are_read_right_or_refused(tmp_path, dtype, values, levels, file):
    """Stops: two levels left of a picture of 32 bits, and a black one of floats from 0 to 1."""
    source = Image.fromarray(np.array([values], dtype))
    assert source.mode in ("I", "F")
    if file:
        source.save(tmp_path / "wide.tiff")
        source = tmp_path / "wide.tiff"
    if levels is None:
        with pytest.raises(ValueError, match=r"mode [IF] with values from .*convert it to mode L"):
            open_image(source)
    else:
        assert grey(open_image(source)) == levels


# Orientation and transparency -----------------------------------------------------------------------------------


def test_upright_turns_what_a_phone_took(tmp_path):
    """Stops: portraits learned lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(HALVES).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").size == (8, 4)  # the reference ignores it
    turned = np.asarray(open_image(tmp_path / "a.png", upright=True))[..., 0]
    assert turned.shape == (8, 4) and (turned == np.rot90(HALVES, -1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_background_shows_through_what_is_transparent(tmp_path, mode):
    """Stops: colours that alpha hides, such as a logo's black, taken for the image."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "logo.png")
    assert grey(open_image(tmp_path / "logo.png", background="white")) == [255, 0]
    assert grey(open_image(tmp_path / "logo.png")) == [0, 0]  # the reference drops alpha


def test_options_change_nothing_for_a_plain_image(png):
    """Stops: an opaque upright image that training and answering see differently."""
    plain = open_image(png).tobytes()
    assert open_image(png, upright=True, background="white").tobytes() == plain


# Pixels ---------------------------------------------------------------------------------------------------------


def test_pixels_and_bytes_are_the_published_formulas():
    """Stops: a shift of half a level between what is encoded and what is decoded, and rounding for truncation."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 127.5 - 1)
    assert to_uint8(torch.tensor([-2.0, -1, 0, 0.9999, 1, 2]).expand(1, 3, 1, 6))[0, 0, :, 0].tolist() == [
        0, 0, 127, 254, 255, 255
    ]  # fmt: skip


@pytest.mark.parametrize(
    "size", [(1024, 1024), (997, 1013), (2500, 231), (210, 2600), (700, 1400), (700, 1401)]
)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_a_resize_in_bands_is_pillow_s(size, threads):
    """Stops: seams between bands, and pixels that depend on the number of cores."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for small in ((384, 384), (383, 47), (14, 500), (1300, 200), size):
        wanted = image.resize(small, Image.Resampling.BICUBIC)
        assert resize(image, small, threads).tobytes() == wanted.tobytes()


def test_torch_s_defaults_change_no_pixel(png, parity_dir):
    """Stops: other seeds, masks or pixels for a program that works in float64 or on another default device."""
    from janusflow_min.processor import Processor

    processor = Processor.from_folder(parity_dir, 640)
    talk = [
        {"role": "User", "content": "<image_placeholder>What?", "images": [png]},
        {"role": "Assistant", "content": ""},
    ]
    wanted = processor.batch([talk])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found, pixels = processor.batch([talk]), to_pixels(open_image(png))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert pixels.device.type == "cpu" and pixels.dtype == torch.float32
    for name in ("input_ids", "attention_mask", "pixel_values", "images_seq_mask", "images_emb_mask"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_the_package_opens_images_in_one_place():
    """Stops: a second reading of images, with Ghostscript, clipped scans or PIL's own errors."""
    import janusflow_min

    package = Path(janusflow_min.__file__).parent
    opening = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    ours = {"pixels.py"}
    assert opening >= ours
    others = {"serve/protocol.py"}  # its size, before it is decoded
    assert {name for name in opening if not name.startswith("benchmarks")} <= ours | others
