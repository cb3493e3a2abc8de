# SPDX-License-Identifier: MIT
"""The processor against the reference's records, and what the records leave open."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from janusflow_min.pixels import open_image
from janusflow_min.processor import CLIP_MEAN, CLIP_STD, ImageProcessor, Processor
from janusflow_min.tokenizer import BOS, EOS, PAD, Tokenizer

ROWS = 640  # of the tiny checkpoint's embedding
TAGS = ["<image_placeholder>", "<｜begin▁of▁generation｜>", "<begin_of_image>", "<end_of_image>"]
NAMES = ["grey", "large", "palette", "rgba", "sliver", "square", "tall", "tiny", "wide"]
CONVERSATIONS = ["one_image", "two_images", "multi_turn", "whitespace", "text_only"]
JSON_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
]


@pytest.fixture
def folder(parity_dir, tmp_path) -> Path:
    """A copy of the JSON files that a test may edit."""
    for name in JSON_FILES:
        shutil.copyfile(parity_dir / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; the value ... removes a key."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    value = {key: item for key, item in value.items() if item is not ...}
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def drop_tokens(folder: Path, *names: str) -> int:
    """Take added tokens out of tokenizer.json and close the gaps; returns the last id left."""
    path = folder / "tokenizer.json"
    tokens = [
        t for t in json.loads(path.read_text(encoding="utf-8"))["added_tokens"] if t["content"] not in names
    ]
    tokens = [token | {"id": 448 + i} for i, token in enumerate(tokens)]
    edit(path, added_tokens=tokens)
    return tokens[-1]["id"]


def messages(expected, parity_dir, name: str) -> list[dict]:
    """A recorded conversation with its images' paths in the first message."""
    record = expected["conversations"][name]
    paths = [str(parity_dir / "images" / f"{image}.png") for image in record["images"]]
    first, *others = record["conversation"]
    return [first | {"images": paths}, *others]


def ask(text: str, *images) -> list[dict]:
    return [{"role": "User", "content": text, "images": list(images)}, {"role": "Assistant", "content": ""}]


# Recorded


def check_pixels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bit for bit with Pillow 13, which made the recording. The bicubic filter of Pillow 10 to 12 rounds otherwise: in
    at most 5 % of the values (there 3.4 %, in one image of nine), and by no more than one of 255 steps."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert torch.equal(ours, theirs)
        return
    difference = (ours - theirs).abs()
    assert difference.max() <= 2 / 255 + 1e-6 and (difference > 1e-6).float().mean() <= 0.05


def test_tokenization_is_the_reference_s(processor, expected):
    """Stops: clean-up of spaces, a lost or doubled BOS, another split of digits, newlines or UTF-8."""
    for record in expected["tokenize"]:
        assert processor.tokenizer.encode(record["text"]) == record["ids"]
        assert processor.tokenizer.decode(record["ids"]) == record["decoded"]


def test_special_ids_are_looked_up(processor, expected):
    """Stops: swapped begin and end tags, PAD taken for EOS."""
    tokenizer, ids = processor.tokenizer, expected["ids"]
    assert {name: getattr(tokenizer, f"{name}_id") for name in ids} == ids


def test_decode_skips_what_is_no_text(processor, expected):
    """Stops: EOS in an answer, a crash on the embedding's spare rows, which a model may choose."""
    tokenizer = processor.tokenizer
    assert tokenizer.decode([tokenizer.bos_id, 447, 382, 429, 639, tokenizer.eos_id]) == "Describe this image"
    assert tokenizer.decode(torch.tensor([447, 382, 429])) == "Describe this image"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_the_reference_s(processor, expected, recorded, parity_dir, name):
    """Stops: a wrong prompt form, wrong stripping, images at other places, masks one off, other dtypes."""
    record = expected["conversations"][name]
    batch = processor.batch([messages(expected, parity_dir, name)])
    assert batch.sft_format == [record["sft_format"]]
    assert batch.input_ids.tolist() == [record["input_ids"]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.attention_mask.all()
    if not record["images"]:  # nothing recorded: one empty slot
        assert batch.pixel_values.shape == (1, 1, 3, 64, 64) and not batch.pixel_values.any()
        assert not batch.images_seq_mask.any() and not batch.images_emb_mask.any()
        return
    check_pixels(batch.pixel_values, recorded[f"{name}.pixel_values"])
    for key in ("images_seq_mask", "images_emb_mask"):
        assert torch.equal(getattr(batch, key), recorded[f"{name}.{key}"])


@pytest.mark.parametrize(
    "key, names", [("batch", ["one_image", "multi_turn"]), ("mixed", ["two_images", "one_image"])]
)
def test_batches_are_the_reference_s(processor, expected, recorded, parity_dir, key, names):
    """Stops: right-padding, padding seen by attention, a missing image's slot that isn't empty."""
    batch = processor.batch([messages(expected, parity_dir, name) for name in names])
    fields = "input_ids", "attention_mask", "pixel_values", "images_seq_mask", "images_emb_mask"
    fields = [field for field in fields if f"fp32.{key}.{field}" in recorded]
    assert {"input_ids", "attention_mask"} <= set(fields)
    for field in fields:
        check = check_pixels if field == "pixel_values" else torch.testing.assert_close
        check(getattr(batch, field), recorded[f"fp32.{key}.{field}"])
    for row, name in enumerate(names):
        theirs = recorded[f"{name}.images_seq_mask"][0]
        assert torch.equal(batch.images_seq_mask[row, -len(theirs) :], theirs)
        assert not batch.images_seq_mask[row, : -len(theirs)].any()
    assert batch.sft_format == [expected["conversations"][name]["sft_format"] for name in names]


@pytest.mark.parametrize("name", ["cat", "long"])
def test_generation_prompts_are_the_reference_s(processor, expected, name):
    """Stops: a system prompt in front of a generation, a lost generation tag."""
    record = expected["generation"][name]
    assert processor.generation_prompt(record["prompt"]) == (record["input_ids"], record["sft_format"])


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_the_reference_s(processor, recorded, parity_dir, name):
    """Stops: another filter, rounding, centring or colour; height and width swapped; float64 arithmetic."""
    pixels = processor.image_processor(Image.open(parity_dir / "images" / f"{name}.png"))
    check_pixels(pixels, recorded[f"pixels.{name}"])
    levels = torch.cat([recorded[f"pixels.{name}"].flatten() for name in NAMES]).unique()
    assert len(levels) == 256 and torch.isin(pixels, levels).all()  # each of the 256 bit for bit


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factor", [1 / 255, 0.00392156862745098, 1 / 127.5, 1.0, 0.0173])
@pytest.mark.parametrize(
    "values", [([0.5] * 3, [0.5] * 3), (CLIP_MEAN, CLIP_STD), ([0.1, 0.7, 1], [1e-6, 3, 9.9])]
)
def test_every_level_is_the_reference_s_to_the_bit(normalize, factor, values):
    """Stops: a last bit lost by a table, or by a device that divides in its own way."""
    mean, std = values
    images = ImageProcessor(16, 14, mean, std, factor, normalize)
    square = (
        np.arange(16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16).transpose(1, 2, 0)
    )  # 256 levels a channel
    wanted = (square * np.float64(factor)).astype(np.float32)  # image_processing_vlm.py, line by line
    if normalize:
        wanted = (wanted - np.array(mean, np.float32)) / np.array(std, np.float32)
    assert wanted.dtype == np.float32
    pixels = images(square)
    assert pixels.dtype == torch.float32 and np.array_equal(pixels.numpy(), wanted.transpose(2, 0, 1))
    assert all(len(np.unique(channel)) == 256 for channel in square.transpose(2, 0, 1))


def test_a_batch_s_pixels_are_the_same_on_every_way(processor, parity_dir):
    """Stops: features of another image, of an empty slot, or of pixels that a caller has changed since."""
    paths = sorted((parity_dir / "images").glob("*.png"))[:3]
    talks = [
        ask("two<image_placeholder><image_placeholder>", *paths[:2]),
        ask("none"),
        ask("one<image_placeholder>", paths[2]),
    ]
    batch = processor.batch(talks)
    short = batch.image_pixels(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(short, torch.stack([processor.image_processor(path) for path in paths]).bfloat16())
    assert "pixel_values" not in vars(batch)  # fp32 pixels cross no bus
    assert torch.equal(batch.pixel_values[[0, 0, 2], [0, 1, 0]].bfloat16(), short)
    assert not batch.pixel_values[1].any() and not batch.pixel_values[2, 1].any()
    batch.pixel_values[2, 0] = 0.25
    assert (batch.image_pixels(torch.device("cpu"), torch.float32)[2] == 0.25).all()


def test_images_are_prepared_in_threads_as_one_by_one(processor, parity_dir, monkeypatch):
    """Stops: images in another order, one file read by two threads at once, an error of a later image raised first,
    threads that stay."""
    paths = sorted((parity_dir / "images").glob("*.png")) * 2
    images, before = processor.image_processor, set(threading.enumerate())
    with open(paths[0], "rb") as file, Image.open(paths[1]) as lazy:
        sources = [*paths, file, lazy, file, paths[2].read_bytes(), lazy, np.asarray(open_image(paths[3]))]
        found = images.levels(sources)
    with open(paths[0], "rb") as file, Image.open(paths[1]) as lazy:
        sources[len(paths) : len(paths) + 3], sources[-2] = [file, lazy, file], lazy
        monkeypatch.setattr("janusflow_min.prefetch.thread_count", lambda: 1)
        assert torch.equal(found, torch.cat([images.levels([source]) for source in sources]))
    monkeypatch.undo()
    for wrong in (["a.png", "b.png"], ["b.png", "a.png"]):
        with pytest.raises(FileNotFoundError, match=wrong[0]):
            images.levels([*paths, *wrong])
    assert set(threading.enumerate()) == before
    assert images.levels([]).shape == (0, 3, 64, 64)


# Text


def test_offsets_point_into_the_text(processor):
    """Stops: labels of a training example that sit on the wrong characters."""
    text = "User: Bären two"
    (bos, span), *tokens = processor.tokenizer.encode_with_offsets(text)
    assert (bos, span) == (processor.tokenizer.bos_id, (0, 0))
    assert [i for i, _ in tokens] == processor.tokenizer.encode(text)[1:]
    assert text[tokens[0][1][0] : tokens[0][1][1]] == "User" and tokens[-1][1][1] == len(text)


def test_bos_comes_once_whatever_the_post_processor_does(folder, expected):
    """Stops: BOS twice where tokenizer.json adds one itself, or where the text brings one."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [448], "tokens": [BOS]}},
    }
    edit(folder / "tokenizer.json", post_processor=template)
    tokenizer = Tokenizer(folder, ROWS)
    for record in expected["tokenize"]:
        assert tokenizer.encode(record["text"]) == record["ids"]
    assert tokenizer.encode(BOS + "hi").count(448) == 1
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer(folder, ROWS).encode("Describe this image") == [447, 382, 429]


@pytest.mark.parametrize("value, bos", [(False, 0), (True, 1), (..., 1), (None, 1)])
def test_add_bos_token_decides(folder, value, bos):
    """Stops: a hard-wired BOS, and a missing key read as false."""
    edit(folder / "tokenizer_config.json", add_bos_token=value)
    processor = Processor.from_folder(folder, ROWS)
    assert processor.tokenizer.encode("hi").count(448) == bos
    assert processor.generation_prompt("hi")[0].count(448) == bos


def test_truncation_and_padding_of_the_file_are_off(folder):
    """Stops: a tokenizer.json saved with truncation that cuts prompts silently."""
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=truncation)
    assert len(Tokenizer(folder, ROWS).encode("one two three four five six seven")) > 8


def test_missing_tags_are_added_in_order(folder):
    """Stops: tags added in another order than the reference's, which shifts every image embedding."""
    last = drop_tokens(folder, *TAGS)
    t = Tokenizer(folder, last + 5)
    assert [t.image_id, t.image_gen_id, t.image_start_id, t.image_end_id] == [last + i for i in (1, 2, 3, 4)]
    assert t.encode("a<begin_of_image>b")[2] == t.image_start_id
    assert t.decode([t.image_id, 447, t.image_end_id]) == "Describe"
    with pytest.raises(ValueError, match="<end_of_image>") as error:
        Tokenizer(folder, last + 4)
    assert str(folder) in str(error.value)
    with pytest.raises(ValueError, match="<image_placeholder>"):
        Tokenizer(folder, last + 1)


def test_a_tag_of_the_plain_vocabulary_keeps_its_id(folder):
    """Stops: a tag listed in the vocabulary alone, which the tokenizer would split into letters."""
    drop_tokens(folder, "<|Assistant|>", "<|User|>", "<end_of_image>")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    model["vocab"] |= {"<end_of_image>": 448}
    edit(folder / "tokenizer.json", model=model)
    tokenizer = Tokenizer(folder, ROWS)
    assert tokenizer.image_end_id == 448 and tokenizer.encode("<end_of_image>")[-1] == 448


def test_vocabulary_beyond_the_embedding_is_refused(folder):
    """Stops: an index error deep inside the embedding for a rare token."""
    with pytest.raises(ValueError, match=r"Assistant.*456.*456 rows"):
        Tokenizer(folder, 456)
    assert Tokenizer(folder, 457).eos_id == 449


def test_without_pad_eos_pads(folder, expected, parity_dir):
    """Stops: a padding id of None or 0."""
    drop_tokens(folder, PAD)
    processor = Processor.from_folder(folder, ROWS)
    assert processor.tokenizer.pad_id == processor.tokenizer.eos_id == 449
    batch = processor.batch([messages(expected, parity_dir, name) for name in ("text_only", "multi_turn")])
    assert batch.input_ids[0, 0] == 449 and batch.attention_mask[0, 0] == 0


@pytest.mark.parametrize("token", [BOS, EOS])
def test_without_bos_or_eos_the_folder_is_refused(folder, token):
    """Stops: a made-up BOS or EOS that the model never saw."""
    drop_tokens(folder, token)
    with pytest.raises(ValueError, match=f"lacks.*{token}") as error:
        Tokenizer(folder, ROWS)
    assert str(folder) in str(error.value)


def test_bos_and_eos_may_have_other_names(folder):
    """Stops: hard-wired strings, and special tokens given as objects instead of strings."""
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace(BOS, "<s>").replace(EOS, "</s>"), encoding="utf-8")
    edit(folder / "special_tokens_map.json", bos_token={"content": "<s>", "special": True}, eos_token=...)
    edit(folder / "tokenizer_config.json", eos_token="</s>")
    processor = Processor.from_folder(folder, ROWS)
    assert (processor.tokenizer.bos_id, processor.tokenizer.eos_id) == (448, 449)
    said = [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]
    assert processor.template(said, "") == "User: a\n\nAssistant: b</s>"


def test_only_tokenizer_and_preprocessor_files_are_a_must(folder):
    """Stops: a folder refused for want of files that have defaults."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
        (folder / name).unlink()
    processor = Processor.from_folder(folder, ROWS)
    assert processor.num_image_tokens == 576 and processor.tokenizer.encode("")[0] == 448
    assert set(processor.files) == {"tokenizer.json", "preprocessor_config.json"}


def test_files_are_kept_verbatim(processor, parity_dir):
    """Stops: a saved checkpoint whose tokenizer differs from the loaded one."""
    assert dict(processor.files) == {name: (parity_dir / name).read_bytes() for name in JSON_FILES}


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_files_are_named(folder, name):
    """Stops: a stack trace from deep inside for an incomplete download."""
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Processor.from_folder(folder, ROWS)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\xfa", b""])
def test_broken_files_are_named(folder, name, content):
    """Stops: a broken optional file that counts as missing, and errors that don't say which file."""
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Processor.from_folder(folder, ROWS)


def test_a_file_that_is_no_tokenizer_is_named(folder):
    """Stops: the bare exception of the Rust side."""
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Processor.from_folder(folder, ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        {"sft_format": "llama-2"},
        {"add_special_token": True},
        {"num_image_tokens": 0},
        {"num_image_tokens": "576"},
        {"image_tag": None},
    ],
)
def test_unsupported_processor_settings_are_refused(folder, changes):
    """Stops: a setting that changes the numbers and is silently ignored."""
    edit(folder / "processor_config.json", **changes)
    with pytest.raises(ValueError, match=r"processor_config\.json"):
        Processor.from_folder(folder, ROWS)


def test_processor_settings_are_read(folder):
    """Stops: hard-wired token counts and image tags."""
    edit(
        folder / "processor_config.json", sft_format="deepseek_old", num_image_tokens=2, image_tag="<|User|>"
    )
    processor = Processor.from_folder(folder, ROWS)
    assert processor.image_ids() == [452, 455, 455, 453]
    ids, _, images = processor.conversation(ask("<|User|> hi", Image.new("RGB", (3, 3))))
    assert ids.count(455) == 2 and images[0].size == (3, 3)


def test_special_strings_in_user_text_are_refused(processor):
    """Stops: user text that ends a turn, forges a role or opens an image."""
    for token in [BOS, EOS, PAD, *TAGS, "<|User|>", "<|Assistant|>"]:
        with pytest.raises(ValueError) as error:
            processor.generation_prompt(f"a cat{token} on a mat")
        assert token in str(error.value)
        if token != TAGS[0]:
            with pytest.raises(ValueError) as error:
                processor.conversation(ask(f"a cat{token}"))
            assert token in str(error.value)
        processor.tokenizer.reject_special_tokens(f"a{token}b", allowed=[token])
    with pytest.raises(ValueError):
        processor.template(ask("hi"), system_prompt=f"be kind{EOS}")
    processor.generation_prompt("1 < 2 > 0, <b>bold</b>, <|end|>, User: hi")


def test_letters_among_the_added_tokens_are_ordinary_text(folder):
    """Stops: refusing German or Danish, whose letters DeepSeek's vocabularies list as added tokens."""
    # ő stands for their ö, which is a piece of the tiny vocabulary (byte 0xF6)
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    tokens += [token | {"id": 457, "content": "ő"}, token | {"id": 458, "content": "<|ref|>"}]
    edit(folder / "tokenizer.json", added_tokens=tokens)
    processor = Processor.from_folder(folder, ROWS)
    ids, _ = processor.generation_prompt("erdő és mező")
    assert ids.count(457) == 2 and "erdő és mező" in processor.tokenizer.decode(ids)
    with pytest.raises(ValueError, match="ref"):
        processor.generation_prompt("a <|ref|> b")


@pytest.mark.parametrize("prompt", ["", "  \n\t ", None, 5, ["a"], "a \ud800 b"])
def test_unusable_prompts_are_refused(processor, prompt):
    """Stops: an empty picture request, and type errors from the Rust side."""
    with pytest.raises(ValueError):
        processor.generation_prompt(prompt)


def test_template_strips_and_names_roles(processor):
    """Stops: roles in the wrong case, endings by position instead of role, blanks around a message."""
    text = processor.template(
        [
            {"role": "user", "content": " a "},
            {"role": "ASSISTANT", "content": "\nb"},
            {"role": "User", "content": ""},
        ],
        "sys",
    )
    assert text == f"sys\n\nUser: a\n\nAssistant: b{EOS}User:"


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        {},
        "hi",
        None,
        ["hi"],
        [{"role": "User"}],
        [{"content": "hi"}],
        [{"role": "system", "content": "hi"}],
        [{"role": "<|User|>", "content": "hi"}],
        [{"role": "User", "content": None}],
        [{"role": "User", "content": "hi", "images": "a.png"}],
    ],
)
def test_malformed_conversations_are_refused(processor, conversation):
    """Stops: a stack trace, or a silently different prompt, for a message in another library's form."""
    with pytest.raises(ValueError):
        processor.conversation(conversation)
    with pytest.raises(ValueError):
        processor.batch([conversation])


def test_a_batch_needs_conversations(processor):
    """Stops: one conversation given where a list of them is meant."""
    for wrong in ([], None, ask("hi")):
        with pytest.raises(ValueError):
            processor.batch(wrong)


@pytest.mark.parametrize("tags, images", [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_placeholders_must_match_images(processor, tags, images):
    """Stops: features of one image landing at the place of another."""
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=rf"{tags} image placeholders.*{images} images"):
        processor.conversation(ask(f"{TAGS[0]} what?" if tags == 1 else TAGS[0] * tags, *[picture] * images))


def test_images_keep_their_order_over_messages(processor):
    """Stops: images sorted or taken from the first message only."""
    colours = ["red", "green", "blue"]
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in colours)
    talk = ask(f"{TAGS[0]}{TAGS[0]} a", red, green) + ask(f"{TAGS[0]} b", np.asarray(blue))
    batch = processor.batch([ask("text only"), talk])
    assert batch.pixel_values.shape == (2, 3, 3, 64, 64)
    assert batch.pixel_values[1].mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    assert batch.images_emb_mask.sum((1, 2)).tolist() == [0, 3 * 17]
    assert batch.images_seq_mask.sum(1).tolist() == [0, 3 * 17]


# Images


def test_background_follows_the_mean(folder):
    """Stops: a hard-wired grey border, the file's `background_color`, rounding instead of truncation."""
    edit(folder / "preprocessor_config.json", image_mean=[0.1, 0.5, 0.999], background_color=[1, 2, 3])
    prepare = ImageProcessor.from_folder(folder)
    assert prepare.background == (25, 127, 254)
    pixels = prepare(Image.new("RGB", (64, 32), "white"))
    corner = (np.float64([25, 127, 254]) / 255 - [0.1, 0.5, 0.999]) / 0.5
    np.testing.assert_allclose(pixels[:, 0, 0], corner, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 32, 32], (1 - np.float64([0.1, 0.5, 0.999])) / 0.5, atol=1e-6)


def test_the_reference_s_defaults_are_ours(folder):
    """Stops: mean 0.5 where the file is silent; the reference takes CLIP's."""
    (folder / "preprocessor_config.json").write_text('{"image_size": 32}')
    prepare = ImageProcessor.from_folder(folder)
    assert prepare.background == (122, 116, 104) and prepare.min_size == 14
    expected = (200 / 255 - np.float64(prepare.image_mean)) / np.float64(prepare.image_std)
    np.testing.assert_allclose(prepare(Image.new("RGB", (9, 9), (200,) * 3))[:, 5, 5], expected, atol=1e-6)


def test_do_normalize_false_only_rescales(folder):
    """Stops: normalising regardless, and a missing mean that turns everything into NaN."""
    edit(folder / "preprocessor_config.json", do_normalize=False, image_mean=None, image_std=None)
    pixels = ImageProcessor.from_folder(folder)(Image.new("RGB", (10, 2), (51, 102, 255)))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 64, 64)
    np.testing.assert_allclose(pixels[:, 32, 32], [0.2, 0.4, 1.0], atol=1e-7)
    np.testing.assert_allclose(pixels[:, 0, 0], [127 / 255] * 3, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": ...},
        {"image_size": 0},
        {"image_size": "384"},
        {"min_size": 65},
        {"min_size": 0},
        {"image_mean": None},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": 0.5},
        {"rescale_factor": "1/255"},
    ],
)
def test_bad_preprocessor_settings_are_refused(folder, changes):
    """Stops: NaN pixels and shape errors that come from a bad file."""
    edit(folder / "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(folder)


def test_every_source_gives_the_same_pixels(processor, parity_dir):
    """Stops: BGR or transposed arrays, and a path that only works as one type."""
    path = parity_dir / "images" / "wide.png"
    array = np.asarray(Image.open(path).convert("RGB"))
    sources = [path, str(path), Image.open(path), array, np.asfortranarray(array)]
    first, *others = (processor.image_processor(source) for source in sources)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (4000, 1), (1, 4000)])
def test_every_mode_and_shape_becomes_pixels(processor, mode, size):
    """Stops: a side of 0 pixels for slivers, and modes that PIL cannot paste."""
    pixels = processor.image_processor(Image.new(mode, size))
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    """Stops: PIL's clipping, which turns nearly every 16-bit image white."""
    values = np.array([[0, 257, 32896, 65535, 128, 129]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    for source in (tmp_path / f"deep.{suffix}", Image.fromarray(values)):
        image = np.asarray(open_image(source))
        assert image[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1] and (image == image[..., :1]).all()


def test_transparency_is_dropped_quietly(tmp_path):
    """Stops: PIL's warning about palettes, a changed source, and alpha painted over a colour."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=bytes([128, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(tmp_path / "p.png") as source:
            assert open_image(source).getpixel((0, 0)) == (200, 100, 50)
            assert source.mode == "P" and "transparency" in source.info
        assert open_image(Image.new("RGBA", (2, 2), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
        assert open_image(Image.new("LA", (2, 2), (9, 0))).getpixel((0, 0)) == (9, 9, 9)


def test_exif_orientation_is_ignored(tmp_path):
    """Stops: a rotation that the reference doesn't do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (8, 4)


def test_the_source_is_left_alone(parity_dir):
    """Stops: an opened image that shares memory with the caller's."""
    image = Image.new("RGB", (2, 2), "red")
    open_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files_are_named(tmp_path, parity_dir):
    """Stops: grey lower halves of truncated files, and PIL's errors that name no file."""
    data = (parity_dir / "images" / "large.png").read_bytes()
    Image.open(parity_dir / "images" / "large.png").save(tmp_path / "whole.jpg")
    contents = {
        "cut.png": data[: len(data) // 2],
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:3000],
        "damaged.png": data[:200] + bytes(200) + data[400:],
        "text.png": b"not an image",
        "empty.png": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / name)
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(ValueError, match=r"cut\.png"):
        open_image(lazy)
    for missing in (tmp_path / "none.png", str(tmp_path / "none.png"), tmp_path):
        with pytest.raises(FileNotFoundError, match=Path(missing).name):
            open_image(missing)


@pytest.mark.parametrize("limit", [39, 19])  # 40 pixels: PIL warns above 39 and raises above 2·19
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    """Stops: a small file that unpacks to gigabytes; PIL alone only warns up to twice its limit."""
    Image.new("RGB", (10, 4)).save(tmp_path / "bomb.png")
    open_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(ValueError, match=r"bomb\.png"):
                open_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "bomb.png").size == (10, 4)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 5)),
        b"bytes",
        None,
        3,
    ],
)
def test_what_is_no_image_is_refused(source):
    """Stops: guesses about arrays in other layouts or ranges."""
    with pytest.raises(ValueError):
        open_image(source)


# An independent witness


@pytest.mark.parametrize("case", ["as it is", "adds BOS itself"])
def test_transformers_tokenizes_the_same(folder, expected, case):
    """Stops: a misreading of tokenizer.json that our own records would share."""
    transformers = pytest.importorskip("transformers")
    if case == "adds BOS itself":
        single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {BOS: {"id": BOS, "ids": [448], "tokens": [BOS]}}
        template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
        edit(folder / "tokenizer.json", post_processor=template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    ours = Tokenizer(folder, ROWS)
    texts = [record["text"] for record in expected["tokenize"]] + [
        "x\r\n\ty 1.5e3 ½ é e\u0301 👩‍👩‍👧 \u00a0 \u200b "
    ]
    for text in texts + [record["sft_format"] for record in expected["conversations"].values()]:
        ids = theirs.encode(text, add_special_tokens=case == "adds BOS itself")
        assert ours.encode(text) == (ids if case == "adds BOS itself" else [448, *ids])
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
