# SPDX-License-Identifier: MIT
"""What a row may look like: conversations in three forms, captions, and images however they come."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janusflow_min.processor import Processor
from janusflow_min.training.batch import StepDataset, unpack
from janusflow_min.training.config import SourceConfig
from janusflow_min.training.dataset import open_sources
from janusflow_min.training.hf_rows import open_dataset
from janusflow_min.training.losses import IGNORE
from janusflow_min.training.rows import seeded_generator
from janusflow_min.training.sample import (
    Sample,
    SampleBuilder,
    conversation_example,
    read_conversation,
    read_image,
    square,
)

TAG = "<image_placeholder>"


@pytest.fixture
def build(settings, processor, model):
    """A row as a sample."""

    def make(row: dict, kind: str = "understanding", number: int = 0, **options) -> Sample:
        builder = SampleBuilder(settings(**options), processor, model)
        return builder(row, kind, seeded_generator(number), 0.0, None)

    return make


def png(colour: str, size: tuple[int, int] = (50, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")
URL = "data:image/png;base64," + base64.b64encode(RED).decode()
USER = {"role": "User", "content": f"{TAG}\nWhat is it?"}
ANSWER = {"role": "Assistant", "content": "A red one."}
FORMS = {
    "reference": {"conversation": [USER | {"images": [RED]}, ANSWER]},
    "beside": {"conversation": [USER, ANSWER], "images": [RED]},
    "OpenAI, text": {"messages": [{"role": "user", "content": "<image>\nWhat is it?"},
                                  {"role": "assistant", "content": "A red one."}], "images": [RED]},
    "OpenAI, parts": {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}},
                                     {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red one."}]}]},
    "OpenAI, parts, image beside": {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A red one."}], "image": RED},
    "parts as a table has them": {"messages": [
        {"role": "user", "content": [{"type": "image", "text": None, "image": {"bytes": RED, "path": None}},
                                     {"type": "text", "text": "What is it?", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red one.", "image": None}]}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                   {"from": "gpt", "value": "A red one."}], "image": RED},
    "JSON text": {"conversations": json.dumps([{"from": "human", "value": "<image>\nWhat is it?"},
                                               {"from": "gpt", "value": "A red one."}]), "image": RED},
    "JSON bytes": {"conversation": json.dumps([USER, ANSWER]).encode(), "image": RED},
    "an object of it": {"conversation": {"id": 3, "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]}, "image": RED},
    "columns of a Sequence": {"conversations": {
        "from": ["human", "gpt"], "value": ["<image>\nWhat is it?", "A red one."]}, "image": RED},
    "empty images in it": {"messages": [USER | {"images": None}, ANSWER | {"images": []}], "images": [RED]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_conversations_of_every_form_are_one_sample(build, name):
    """Stops: another trainer's form that is refused, or read as another conversation than it is."""
    expected, sample = build(FORMS["reference"]), build(FORMS[name])
    assert (sample.ids, sample.labels) == (expected.ids, expected.labels)
    assert len(sample.und_images) == 1 and torch.equal(sample.und_images[0], expected.und_images[0])


@pytest.mark.parametrize("form", ["bytes", "dict", "path dict", "path", "PIL", "list", "data URL"])
@pytest.mark.parametrize("key", ["image", "images"])
def test_one_image_beside_a_conversation(build, tmp_path, key, form):
    """Stops: "2 images" where a dict is counted, "6 images" where a string is, none where WebDataset has them."""
    (tmp_path / "a.png").write_bytes(RED)
    path = str(tmp_path / "a.png")
    image = {"bytes": RED, "dict": {"bytes": RED, "path": None}, "path dict": {"bytes": None, "path": path},
             "path": path, "PIL": Image.open(path), "list": [RED], "data URL": URL}[form]  # fmt: skip
    sample = build({"conversation": [USER, ANSWER], key: image})
    assert torch.equal(sample.und_images[0], build(FORMS["reference"]).und_images[0])


def test_conversations_from_tables_and_archives(settings, processor, model, tmp_path, datasets):
    """Stops: conversations with one image a row, the usual layout, that WebDataset or parquet cannot give."""
    import tarfile

    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": RED, "path": None}] * 3, "conversations": [talk] * 3}
    )
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "one.parquet")
    chat = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A red one."},
    ]
    images = [[{"bytes": RED, "path": None}]] * 3
    lists = datasets.Dataset.from_dict({"images": images, "messages": [chat] * 3})
    feature = datasets.Features({"images": [datasets.Image()], "messages": lists.features["messages"]})
    lists.cast(feature).to_parquet(tmp_path / "list.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            for name, content in (
                (f"{i}.png", RED),
                (f"{i}.json", json.dumps({"conversations": talk}).encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    expected = SampleBuilder(settings(), processor, model)(FORMS["reference"], "understanding", None, 0.0)
    web = {"columns": {"image": "png", "conversation": "json"}}
    dotted = {"columns": {"image": "png", "conversations": "json.conversations"}}
    for file, kind, more in (("one.parquet", "parquet", {}), ("list.parquet", "parquet", {}),
                             ("a.tar", "webdataset", web), ("a.tar", "webdataset", dotted)):  # fmt: skip
        for streaming in (False, True):
            source = {"kind": "understanding", "dataset": kind, "files": [str(tmp_path / file)], **more}
            config = settings(data=[source | {"streaming": streaming}], batch=2)
            steps = StepDataset(config, open_sources(config), SampleBuilder(config, processor, model))
            bad: list = []
            sample = steps.sample(0, bad)
            assert (sample.ids, sample.labels, bad) == (expected.ids, expected.labels, [])
            assert torch.equal(sample.und_images[0], expected.und_images[0])


def test_a_system_message_takes_the_place_of_the_default(build, processor):
    """Stops: a system message that is refused, learned, or added to the default one."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    sample = build({"messages": [{"role": "system", "content": "Be short."}, *turns]})
    text = processor.tokenizer.decode([i for i in sample.ids if i != processor.tokenizer.bos_id])
    assert text.startswith("Be short.\n\nUser: Hi") and "helpful" not in text
    kept = processor.tokenizer.decode([i for i in sample.labels if i != IGNORE])
    assert kept.strip() == "Hello"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hello"}, "a list of messages, got 'hello'"),
        ({"messages": None}, "a list of messages, got None"),
        ({"messages": ["a", "b"]}, "a list of messages"),
        ({"messages": [USER | {"content": 3}]}, "content must be text or parts, got 3"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be 'User' or 'Assistant', got 'tool'"),
        ({"messages": [USER | {"content": [{"type": "audio"}]}]}, "audio"),
        ({"conversation": [USER, ANSWER], "image": "https://a.b/c.png"}, "nothing is downloaded: https://a.b/c.png"),
        ({"conversation": [USER, ANSWER], "image": 3}, "must be a path, bytes, .* got builtins.int"),
        ({"conversation": [USER, ANSWER], "image": "data:image/png;base64,###"}, "image"),
        ({"conversation": [USER, ANSWER], "images": [RED, BLUE]}, "1 image placeholders, but 2 images"),
    ],
)  # fmt: skip
def test_conversations_that_are_none(build, row, words):
    """Stops: a bad row whose reason is Python's, or does not say what lies there."""
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=words):
        build(row)


# Labels -----------------------------------------------------------------------


def test_labels_keep_white_space_whatever_the_post_processor(parity_dir, tmp_path, processor):
    """Stops: indentation that is not learned where a tokenizer's post-processor trims the offsets of its tokens."""
    for path in parity_dir.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    trimming = Processor.from_folder(tmp_path, 640)
    messages = [
        {"role": "User", "content": "Write  it \n  down"},
        {"role": "Assistant", "content": "def f(x):\n    if x:\n\n        return  1\n    return\t2 "},
        {"role": "User", "content": " again"},
        {"role": "Assistant", "content": "  x\n\n  y"},
    ]
    expected = conversation_example(processor, messages)
    assert conversation_example(trimming, messages) == expected
    answers = [m["content"].strip() for m in messages[1::2]]
    kept = processor.tokenizer._bpe.decode([i for i in expected[1] if i != IGNORE], skip_special_tokens=False)
    assert kept == "".join(f" {answer}{processor.tokenizer.eos_token}" for answer in answers)


# Captions -----------------------------------------------------------------------


def test_one_of_several_captions_by_the_samples_number(build, processor):
    """Stops: captions that are never taken, or another one after a restart; a list of one that changes the draws."""
    row = {"image": RED, "text": ["one", "two", "three"]}
    drawn = [build(row, "generation", number) for number in range(30)]
    starts = Counter(tuple(s.ids[: s.start]) for s in drawn)
    assert len(starts) == 3 and min(starts.values()) > 3
    again = build(row, "generation", 7)
    assert again.ids == drawn[7].ids and torch.equal(again.noise, drawn[7].noise)
    one, plain = (build({"image": RED, "text": text}, "generation") for text in (["a cat"], "a cat"))
    assert one.ids == plain.ids and torch.equal(one.noise, plain.noise)
    for text in ([], [""], None, 3):
        with pytest.raises(ValueError, match="text"):
            build({"image": RED, "text": text}, "generation")


# Images -----------------------------------------------------------------------


def upright() -> tuple[np.ndarray, bytes]:
    """A photograph as a phone stores it: turned, with the orientation beside it."""
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:24] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(pixels)).save(buffer, "PNG", exif=exif)
    return pixels, buffer.getvalue()


def see_through() -> tuple[np.ndarray, bytes]:
    """A red disc's corner: what alpha hides is black."""
    pixels = np.zeros((48, 64, 4), dtype=np.uint8)
    pixels[:24] = (255, 0, 0, 255)
    shown = np.full((48, 64, 3), 255, dtype=np.uint8)
    shown[:24] = (255, 0, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return shown, buffer.getvalue()


@pytest.mark.parametrize("made", [upright, see_through])
def test_a_file_is_one_image_however_it_comes(made, tmp_path, datasets):
    """Stops: a photograph that trains lying on its side, what alpha hides as the colour to learn, and a file that is
    one image as a column and another in a list, as a path, or as bytes."""
    shown, content = made()
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.png").write_bytes(content)
    encoded = {"bytes": content, "path": None}
    features = datasets.Features(
        {"image": datasets.Image(), "images": [datasets.Image()], "path": datasets.Image()}
    )
    table = {"image": [encoded], "images": [[encoded]], "path": [str(tmp_path / "a.png")]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), content, Image.open(tmp_path / "a.png"), encoded]
    for streaming in (False, True):
        columns = {"conversation": "path"}  # any column stays that is named
        config = SourceConfig("understanding", dataset="parquet", files=(str(tmp_path / "a.parquet"),),
                              streaming=streaming, columns=columns)  # fmt: skip
        opened = open_dataset(config, (0,), True)
        row = opened.row_at(0, 0).values if streaming else opened[0].values
        assert isinstance(row["image"], dict) and isinstance(row["images"][0], dict)  # not decoded
        images += [row["image"], row["images"][0], row["path"]]
    for image in images:
        assert np.array_equal(np.asarray(read_image(image)), shown)
    assert np.array_equal(np.asarray(read_image("a.png", tmp_path / "b")), shown)


def test_a_bomb_in_a_list_of_images_is_a_bad_row(settings, processor, model, tmp_path, datasets, monkeypatch):
    """Stops: a traceback out of `datasets` for a row whose image is over Pillow's limit, in a list or alone."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    talk = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A red one."},
    ]
    images = [[{"bytes": png("red", (200, 200) if i == 1 else (50, 50)), "path": None}] for i in range(3)]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": [datasets.Image()], "messages": [message]})
    table = datasets.Dataset.from_dict({"images": images, "messages": [talk] * 3}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        source = {"kind": "understanding", "dataset": "parquet", "files": [str(tmp_path / "a.parquet")]}
        config = settings(data=[source | {"streaming": streaming, "shuffle": False}], batch=3)
        data = StepDataset(config, open_sources(config), SampleBuilder(config, processor, model))[0]
        assert data.samples == 3 and {row.line for row in data.bad} == {2}
        assert "40" in data.bad[0].reason or "pixels" in data.bad[0].reason


def test_a_long_strip_is_cut_before_it_is_enlarged(tmp_path, monkeypatch):
    """Stops: 2 GB for a file of 436 bytes; a crop outside the strip; a strip that is cut elsewhere than others are."""
    Image.new("RGB", (60_000, 2), "red").save(tmp_path / "a.png")
    strip = read_image(tmp_path / "a.png")
    plain, areas = Image.Image.resize, []
    resize = lambda self, size, *args, **options: areas.append(size) or plain(self, size, *args, **options)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", resize)
    for number in (None, 1, 2):
        cut = square(strip, 384, None if number is None else seeded_generator(number))
        assert cut.size == (384, 384) and cut.getextrema() == ((255, 255), (0, 0), (0, 0))
    assert areas == [(384, 384)] * 3
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 900, dtype=np.uint8), (100, 1)))
    wide, shorter = (
        square(ramp.convert("RGB"), 64, None),
        square(ramp.convert("RGB").crop((100, 0, 800, 100)), 64, None),
    )
    assert np.abs(np.asarray(wide, dtype=int) - np.asarray(shorter)).max() <= 1  # 9:1 as a strip, 7:1 whole


def test_half_of_the_images_are_mirrored(build):
    """Stops: a flip that is on unasked, that never happens, or that another run of the same sample does not repeat;
    one that mirrors the images of questions."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :32] = 255
    row = {"image": Image.fromarray(pixels), "text": "left"}
    flipped = [
        bool(build(row, "generation", n, loader={"random_flip": True}).image[0, 0, 0] == 0) for n in range(60)
    ]
    assert 15 < sum(flipped) < 45
    again = [
        bool(build(row, "generation", n, loader={"random_flip": True}).image[0, 0, 0] == 0) for n in range(60)
    ]
    assert flipped == again
    assert all(build(row, "generation", n).image[0, 0, 0] == 255 for n in range(10))
    talk = {"conversation": [USER, ANSWER], "image": Image.fromarray(pixels)}
    for n in range(8):
        assert build(talk, number=n, loader={"random_flip": True}).und_images[0][0, 0, 0] == 255


def test_paths_count_from_the_folder_of_their_file(settings, processor, model, tmp_path, monkeypatch):
    """Stops: images beside a conversation, or in its messages, that are looked for in the caller's folder; `~` that
    is a folder's name."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.png").write_bytes(RED)
    (tmp_path / "home.png").write_bytes(RED)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    inside = [{"type": "image", "image": "sub/a.png"}, {"type": "text", "text": "What is it?"}]
    rows = [
        {"conversation": [USER, ANSWER], "images": ["sub/a.png"]},
        {"conversation": [USER, ANSWER], "image": "sub/a.png"},
        {"conversation": [USER | {"images": ["sub/a.png"]}, ANSWER]},
        {"messages": [{"role": "user", "content": inside}, ANSWER]},
        {"conversation": [USER, ANSWER], "image": "~/home.png"},
    ]
    path = tmp_path / "data" / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(data=[{"kind": "understanding", "manifest": "data/a.jsonl"}], batch=5)
    data = StepDataset(config, open_sources(config), SampleBuilder(config, processor, model))[0]
    assert data.samples == 5 and not data.bad
    assert read_conversation(rows[0], TAG)[0]["images"] == ["sub/a.png"] and Path("data").is_dir()


def test_ambient_settings_change_nothing(settings, processor, model, manifest):
    """Stops: samples that depend on the default dtype or device of whoever calls."""

    def digest() -> list[bytes]:
        config = settings(batch=12)
        data = StepDataset(config, open_sources(config), SampleBuilder(config, processor, model))[1]
        batches = (vars(unpack(batch, processor.image_processor)).values() for batch in data.batches)
        return [value.numpy().tobytes() for batch in batches for value in batch if value is not None]

    expected = digest()
    torch.set_default_dtype(torch.float64)
    try:
        assert digest() == expected
        torch.set_default_device("meta")
        assert digest() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
