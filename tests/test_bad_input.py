# SPDX-License-Identifier: MIT
"""What the public calls refuse, and how. Each docstring names the mistake that its test stops.

What the processor refuses by itself is in `test_processor.py`, broken checkpoints are in `test_checkpoint.py` and
`test_config.py`. Here: that nothing is computed for input that cannot be right, and that the error says what is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import janusflow_min as jf
from janusflow_min import loading
from janusflow_min.tokenizer import BOS, EOS


@pytest.fixture
def idle(pipe, monkeypatch):
    """Fails the test where the model is run at all."""

    def forward(*args, **kwargs):
        raise AssertionError("the model was run on input that should have been refused")

    monkeypatch.setattr(pipe.model.llm, "forward", forward)
    return pipe


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


QUIET = {"num_inference_steps": 2, "parallel_size": 1, "progress": False}
USER = {"role": "User", "content": "hi"}


# Prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n\t", [""], ["a cat", " "]])
def test_an_empty_prompt_makes_no_image(idle, prompt):
    """Stops: an image of nothing, also where only one prompt of several is empty."""
    with pytest.raises(ValueError, match="the prompt must be text"):
        idle.generate(prompt, **QUIET)


NO_TEXT = [
    None,
    5,
    5.0,
    True,
    b"a cat",
    {"prompt": "a cat"},
    {"a cat"},
    (x for x in ["a cat"]),
    iter(["a cat"]),
]
NO_TEXT += [np.array(["a cat"]), torch.zeros(2), Path("a cat"), range(2), object(), {}.keys()]


@pytest.mark.parametrize("prompt", NO_TEXT, ids=lambda value: type(value).__name__)
def test_what_is_no_text_is_no_prompt(idle, prompt):
    """Stops: an image of a dict's keys or of one letter after another."""
    for value in (prompt, ["a cat", prompt]):
        name = "prompt" if value is prompt else r"prompt\[1\]"
        with pytest.raises(ValueError, match=f"^{name} must be a str") as error:
            idle.generate(value, **QUIET)
        assert "\n" not in str(error.value) and "got" in str(error.value)
        if prompt is not None:
            with pytest.raises(ValueError, match=f"^{name} must be a str"):
                idle.understand(value)


@pytest.mark.parametrize("call", ["generate", "understand"])
def test_an_empty_list_of_prompts_is_refused(idle, call):
    """Stops: an IndexError, or an empty result that hides a bug of the caller."""
    with pytest.raises(ValueError, match="prompt is an empty list"):
        getattr(idle, call)([])


@pytest.mark.parametrize("prompt", ["", " ", None])
def test_an_empty_question_needs_an_image(idle, prompt):
    """Stops: an answer to no question about nothing."""
    with pytest.raises(ValueError, match=r"^prompt is empty and there is no image"):
        idle.understand(prompt)
    with pytest.raises(ValueError, match=r"^prompt\[1\] is empty and there is no image"):
        idle.understand(["hi", prompt])


@pytest.mark.parametrize(
    "tag", [BOS, EOS, "<image_placeholder>", "<｜begin▁of▁generation｜>", "<begin_of_image>"]
)
def test_special_tags_in_a_prompt_are_refused(idle, tag, parity_dir):
    """Stops: a prompt that ends the turn, forges a role, or opens an image of its own."""
    text = f"a cat {tag} a dog"
    with pytest.raises(ValueError, match="special tokens") as error:
        idle.generate(["fine", text], **QUIET)
    assert tag in str(error.value)
    with pytest.raises(ValueError, match="special tokens"):
        idle.understand(text, images=str(parity_dir / "images" / "wide.png"))
    if tag != "<image_placeholder>":
        with pytest.raises(ValueError, match="special tokens"):
            idle.chat([{"role": "User", "content": text}])


# Conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", [[], [[]], [[USER], []]])
def test_an_empty_conversation_is_refused(idle, conversation):
    """Stops: an answer to the system prompt."""
    with pytest.raises(ValueError, match="the conversation is empty"):
        idle.chat(conversation)


@pytest.mark.parametrize("conversation", [None, "hi", USER, {"messages": [USER]}, 5])
def test_what_is_no_list_is_no_conversation(idle, conversation):
    """Stops: a KeyError or TypeError for one message given where a list of them is meant."""
    with pytest.raises(ValueError, match="a conversation is a list of messages, got"):
        idle.chat(conversation)


@pytest.mark.parametrize(
    "conversation, message",
    [
        (["hi"], "a conversation is a list of messages, got 'hi'"),
        ([5], "a conversation is a list of messages, got 5"),
        ([USER, "hi"], "a message must be a dict"),
        ([{"role": "User"}], "a message must be a dict with role and content"),
        ([{"content": "hi"}], "a message must be a dict with role and content"),
        ([{"role": "System", "content": "hi"}], "role must be 'User' or 'Assistant'"),
        ([{"role": "User", "content": [{"type": "text"}]}], "content must be a str"),
        (
            [{"role": "User", "content": "hi", "image": "a.png"}],
            "keys must be role, content and images, got 'image'",
        ),
        ([{"role": "User", "content": "hi", "images": "a.png"}], "images must be a list"),
        (
            [{"role": "User", "content": "hi", "images": np.zeros((4, 4, 3), np.uint8)}],
            "images must be a list",
        ),
    ],
)
def test_malformed_messages_are_refused(idle, conversation, message):
    """Stops: a stack trace from inside for another library's message form."""
    with pytest.raises(ValueError, match=message):
        idle.chat(conversation)


@pytest.mark.parametrize(
    "tags, count",
    [(0, 1), (1, 0), (1, 2), (3, 2)],
)
def test_placeholders_and_images_must_agree(idle, parity_dir, tags, count):
    """Stops: features of one image landing at the place of another, in a batch of good ones too."""
    images = [str(parity_dir / "images" / "wide.png")] * count
    bad = [{"role": "User", "content": "<image_placeholder>" * tags + "hi", "images": images}]
    for conversation in (bad, [[USER], bad]):
        with pytest.raises(ValueError, match=f"{tags} image placeholders .* but {count} images"):
            idle.chat(conversation)


def test_questions_and_groups_of_images_must_agree(idle, parity_dir):
    """Stops: the second question answered without its image, or one image cut into rows."""
    path = str(parity_dir / "images" / "square.png")
    array = np.zeros((2, 8, 3), np.uint8)
    for images in ([path], [path] * 3, path, Path(path), Image.open(path), array):
        with pytest.raises(ValueError, match="2 prompts need a list of 2 images"):
            idle.understand(["a", "b"], images=images)


# Positions ------------------------------------------------------------------------------------------------------


def test_a_prompt_past_the_last_position_is_refused(idle):
    """Stops: positions the model never saw, and an error that does not say how far too long it is."""
    words = "cat " * 2100
    with pytest.raises(ValueError, match=r"17 image tokens need \d{4} positions; the model has 2048"):
        idle.generate(["a cat", words], **QUIET)
    with pytest.raises(
        ValueError, match=r"conversation's \d{4} tokens and an answer need \d{4} positions.* 2048"
    ):
        idle.understand(words)
    with pytest.raises(ValueError, match="positions; the model has 2048"):
        idle.chat([USER, {"role": "Assistant", "content": words}, USER])


def test_the_last_position_may_be_used(pipe, monkeypatch):
    """Stops: a limit that is one position too strict or too lax."""
    prompt_ids = len(pipe.processor.generation_prompt("a cat")[0]) - 1
    question_ids = len(pipe.processor.conversation([USER, {"role": "Assistant", "content": ""}])[0])

    def limit(positions):
        llm = replace(pipe.model.config.llm, max_position_embeddings=positions)
        monkeypatch.setattr(pipe.model, "config", replace(pipe.model.config, llm=llm))

    limit(prompt_ids + 17)
    assert len(pipe.generate("a cat", **QUIET).images) == 1
    limit(prompt_ids + 16)
    with pytest.raises(
        ValueError, match=f"need {prompt_ids + 17} positions; the model has {prompt_ids + 16}"
    ):
        pipe.generate("a cat", **QUIET)
    limit(question_ids + 1)
    assert len(pipe.understand("hi").token_ids) == 1
    limit(question_ids)
    with pytest.raises(ValueError, match=f"need {question_ids + 1} positions; the model has {question_ids}"):
        pipe.understand("hi")


# Images ---------------------------------------------------------------------------------------------------------


def test_a_missing_image_is_named(idle, tmp_path, parity_dir):
    """Stops: an answer about the images that are there, as if the other had never been asked about."""
    good, missing = str(parity_dir / "images" / "wide.png"), str(tmp_path / "nothing.png")
    for images in (missing, [good, missing], tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no image file at .*(nothing|test_a_missing)"):
            idle.understand("What?", images=images)
    with pytest.raises(FileNotFoundError, match=r"nothing.png"):
        idle.understand(["a", "b"], images=[good, missing])
    with pytest.raises(FileNotFoundError, match=r"nothing.png"):
        idle.chat([{"role": "User", "content": "<image_placeholder>", "images": [missing]}])


def test_unreadable_images_are_named(idle, tmp_path, parity_dir, monkeypatch):
    """Stops: PIL's own errors, grey lower halves, and gigabytes unpacked from a small file."""
    text, cut, bomb = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "bomb.png"
    text.write_text("not an image")
    Image.effect_noise((64, 64), 50).convert("RGB").save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (300, 300)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for path, what in (
        (text, "cannot be read as an image"),
        (cut, "cannot be decoded"),
        (bomb, "bomb|pixels"),
    ):
        with pytest.raises(ValueError, match=what) as error:
            idle.understand("What?", images=path)
        assert path.name in str(error.value)


@pytest.mark.parametrize(
    "image",
    [
        5,
        b"bytes",
        object(),
        {"a.png"},
        {"a": 1},
        torch.zeros(3, 4, 4),
        np.zeros((4, 4)),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(idle, image):
    """Stops: guesses about arrays of other shapes and ranges, and a TypeError that names nothing."""
    for images in (image, [image]):
        with pytest.raises(ValueError, match="image"):
            idle.understand("What?", images=images)


# Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parallel_size", "num_inference_steps", "img_size"])
@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, 1.5, float("nan"), "4"])
def test_sizes_and_steps_are_whole_and_positive(idle, name, value):
    """Stops: an empty list of images, noise shown as a picture, true read as 1."""
    with pytest.raises(ValueError, match=f"{name} must be a whole number .*, got"):
        idle.generate("a cat", **QUIET | {name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_guidance_is_finite(idle, value):
    """Stops: thirty steps to a picture of NaN."""
    with pytest.raises(ValueError, match="cfg_weight must be a finite number"):
        idle.generate("a cat", cfg_weight=value, **QUIET)


@pytest.mark.parametrize(
    "options, message",
    [({"max_new_tokens": v}, "max_new_tokens must be a whole number from 1") for v in (0, -1, True, 2.0)]
    + [
        ({"temperature": v}, "temperature must be a finite number of at least 0")
        for v in (-0.1, float("nan"), float("inf"))
    ]
    + [
        ({"top_p": v}, "top_p must be a finite number above 0 and of at most 1")
        for v in (0.0, -1.0, 1.1, float("nan"))
    ]
    + [({"top_k": v}, "top_k must be a whole number") for v in (-1, 2.5, True)]
    + [({"seed": v}, "seed must be a whole number") for v in (-1, 1.5, "1", True, 2**63)],
)
def test_decoding_options_are_checked(idle, options, message):
    """Stops: a temperature that turns the ranking round, a top-p that leaves no token, an endless answer."""
    with pytest.raises(ValueError, match=message):
        idle.understand("hi", **options)
    with pytest.raises(ValueError, match=message):
        idle.chat([USER], **options)


ODD = ["2", b"2", torch.tensor(2), np.array(2), np.array([2.0]), [2], {2: 2}, (2,), 2j, object(), lambda: 2]
OPTIONS = {
    "generate": (
        "parallel_size",
        "cfg_weight",
        "num_inference_steps",
        "img_size",
        "seed",
        "latents",
        "progress",
    ),
    "understand": ("max_new_tokens", "temperature", "top_p", "top_k", "seed"),
}


@pytest.mark.parametrize("call, name", [(call, name) for call in OPTIONS for name in OPTIONS[call]])
@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_options_of_another_type_are_refused_by_name(idle, call, name, value):
    """Stops: an error of numpy's or torch's own for text, tensors, lists: each names the argument, what it must be
    and what it was, in one line."""
    if name == "seed" and isinstance(value, list | tuple) and call == "generate":
        value = [value]  # a list of seeds is welcome, a list of lists is not
    if name == "seed" and isinstance(value, np.ndarray) and value.ndim:
        pytest.skip("an array of seeds; its values are checked")
    prompt = {"generate": "a cat", "understand": "hi"}[call]
    options = (QUIET if call == "generate" else {}) | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}(\[0\])? must be .*got ") as error:
        getattr(idle, call)(prompt, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name", ["parallel_size", "num_inference_steps", "img_size", "seed", "max_new_tokens"]
)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_whole_numbers_of_numpy_are_numbers(pipe, name, kind):
    """Stops: a refusal of what comes out of every array."""
    value = kind(1 if name != "img_size" else 32)
    if name == "max_new_tokens":
        assert len(pipe.understand("hi", max_new_tokens=value, temperature=np.float32(0)).token_ids) == 1
    else:
        options = QUIET | {"num_inference_steps": 1, name: value, "cfg_weight": np.float32(2)}
        assert len(pipe.generate("a cat", **options).images) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parallel_size": 99_999_999_999}, r"99,999,999,999 images of 64x64 px are more than the 4 GiB"),
        ({"img_size": 1_000_000}, "img_size must be a whole number from 1 to 8192, got 1000000"),
        ({"img_size": 8192, "parallel_size": 50}, "50 images of 8192x8192 px .* holds 21 of them"),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be a whole number from 1 to 10000"),
        ({"num_inference_steps": 10**5000}, "num_inference_steps must be a whole number .*, got a number of"),
        ({"cfg_weight": 10**400}, "cfg_weight must be a finite number"),
        ({"seed": 10**5000}, "seed must be a whole number"),
    ],
)
def test_sizes_are_bounded_before_anything_is_made(idle, options, message):
    """Stops: terabytes asked for, and the machine with them, for a slip of the key."""
    with pytest.raises(ValueError, match=message):
        idle.generate("a cat", **QUIET | options)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number from 1 to"):
        idle.understand("hi", max_new_tokens=10**12)


def test_images_are_counted_before_they_are_opened(idle, parity_dir, monkeypatch):
    """Stops: 200 photos decoded at full size, only to say that their tokens are too many."""
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened"))
    path = str(parity_dir / "images" / "wide.png")
    with pytest.raises(ValueError, match="positions; the model has 2048"):
        idle.understand("What?", images=[path] * 200)
    with pytest.raises(ValueError, match="positions; the model has 2048"):
        idle.understand(["a", "b"], images=[path, [path] * 200])
    with pytest.raises(FileNotFoundError, match="gone"):
        idle.understand(["a"] * 40, images=[path] * 39 + ["gone.png"])


def test_weights_elsewhere_are_named(parity_dir):
    """Stops: errors from inside torch for a model that accelerate has moved out of memory."""
    pipe = load(parity_dir)
    pipe.model.to("meta")
    for call in (lambda: pipe.generate("a cat", **QUIET), lambda: pipe.understand("hi")):
        with pytest.raises(ValueError, match="meta device"):
            call()
    with pytest.raises(ValueError, match='device "meta" holds no weights'):
        jf.load(device="meta")


# Seeds and latents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1", 2**63, [-1, 0], [0, 1.5], [0, None], [True, 1]])
def test_seeds_are_whole_and_not_negative(idle, seed):
    """Stops: a seed cut to an integer, and two numbers that mean the same noise."""
    with pytest.raises(ValueError, match=r"seed(\[\d\])? must be a whole number"):
        idle.generate("a cat", seed=seed, **QUIET | {"parallel_size": 2})


def test_the_last_of_the_seeds_must_fit_too(idle):
    """Stops: an overflow in the middle of a call, where only the first seed was checked."""
    with pytest.raises(ValueError, match="seed must be a whole number"):
        idle.generate("a cat", seed=2**63 - 1, **QUIET | {"parallel_size": 2})


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_there_are_as_many_seeds_as_images(idle, count):
    """Stops: seeds repeated or dropped in silence."""
    with pytest.raises(ValueError, match=f"4 images need 4 seeds, got {count}"):
        idle.generate(["a", "b"], seed=list(range(count)), **QUIET | {"parallel_size": 2})


@pytest.mark.parametrize(
    "shape", [(4, 8, 8), (1, 4, 8, 8), (3, 4, 8, 8), (2, 3, 8, 8), (2, 4, 8, 7), (2, 4, 16, 16), (0, 4, 8, 8)]
)
def test_latents_of_another_shape_are_refused(idle, shape):
    """Stops: latents broadcast over the batch, and a shape error from inside the UViT."""
    with pytest.raises(ValueError, match=r"latents must be .* \[2, 4, 8, 8\].*got .*\[") as error:
        idle.generate("a cat", latents=torch.zeros(shape), **QUIET | {"parallel_size": 2})
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_are_finite(idle, value):
    """Stops: NaN that goes in and comes out as a black picture."""
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="latents hold NaN or infinite values"):
        idle.generate("a cat", latents=latents, **QUIET)


def test_seed_and_latents_exclude_each_other(idle):
    """Stops: a seed that is reported but had no effect."""
    with pytest.raises(ValueError, match="either seed or latents"):
        idle.generate("a cat", seed=1, latents=torch.zeros(1, 4, 8, 8), **QUIET)


@pytest.fixture
def decoded(pipe, monkeypatch) -> list:
    """What the VAE was given."""
    given, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z: given.append(z) or decode(z))
    return given


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_become_nan_are_reported_never_painted(pipe, decoded, monkeypatch, value):
    """Stops: black or grey squares from broken weights or an overflow, saved as if they were pictures."""
    weight = pipe.model.gen_in_aligner.weight.data
    broken = weight.clone()
    broken[0, 0] = value
    monkeypatch.setattr(pipe.model.gen_in_aligner.weight, "data", broken)
    with pytest.raises(
        FloatingPointError, match=r"the latents of 'a cat', 'a dog' are not finite.*torch.float32"
    ):
        pipe.generate(["a cat", "a dog"], seed=1, **QUIET)
    assert decoded == []


def test_only_the_prompts_at_fault_are_named(pipe, decoded, monkeypatch):
    """Stops: an error that blames every prompt of a batch for one."""

    def euler(velocity, noise, times, on_step):
        z = noise.clone()
        z[3, 0, 0, 0] = float("nan")
        return z

    with pytest.raises(FloatingPointError, match="the latents of 'a dog' are not finite"):
        pipe.generate(["a cat", "a dog"], **QUIET | {"parallel_size": 2}, solver=euler)
    assert decoded == []


def test_pixels_that_become_nan_are_reported_never_painted(pipe, monkeypatch):
    """Stops: a VAE that overflows and turns good latents into a black picture."""
    parameter = next(p for n, p in pipe.vae.named_parameters() if n.endswith("decoder.conv_out.bias"))
    monkeypatch.setattr(parameter, "data", torch.full_like(parameter.data, float("nan")))
    with pytest.raises(FloatingPointError, match=r"the VAE, in torch.float32, turns the latents of 'a cat'"):
        pipe.generate("a cat", **QUIET)


# load: options and the VAE ----------------------------------------------------------------------------------------


def test_a_float16_vae_is_refused_with_the_reason(parity_dir):
    """Stops: black pictures; and four gigabytes loaded before the error."""
    for dtype in ("float16", torch.float16, "torch.float16"):
        with pytest.raises(ValueError, match="bfloat16 or float32, not float16: SDXL's VAE overflows"):
            jf.load(parity_dir, device="cpu", vae_dtype=dtype, progress=False)
    with pytest.raises(ValueError, match="float16"):
        jf.load("/nowhere/at/all", device="cpu", vae_dtype="float16")  # before anything is read


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu cpu", None, 1.5, "xpu:0:0"])
def test_a_wrong_device_is_refused(parity_dir, device):
    """Stops: a silent fall back to the CPU, and an assertion of torch's in place of an error."""
    with pytest.raises(ValueError, match=r"device .* is not usable here"):
        jf.load(parity_dir, device=device, progress=False)


@pytest.mark.parametrize("name", ["dtype", "vae_dtype"])
@pytest.mark.parametrize("value", ["half", "f32", "int8", torch.int8, torch.float64, "", 32])
def test_a_wrong_dtype_is_refused(parity_dir, name, value):
    """Stops: a typing error that ends in another dtype, or weights rounded to integers."""
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16"):
        jf.load(parity_dir, device="cpu", progress=False, **{name: value})


@pytest.mark.parametrize("parts", ["paint", "", None, ["generation"]])
def test_wrong_parts_are_refused(parity_dir, parts):
    """Stops: a typing error that loads everything."""
    with pytest.raises(ValueError, match="parts must be one of all, generation, understanding"):
        jf.load(parity_dir, parts=parts)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "~/nothing-here"])
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    """Stops: a mistyped path that is looked up on the hub."""
    with pytest.raises(FileNotFoundError, match=r"source .* neither a folder nor a hub id"):
        jf.load(source, device="cpu")


def test_a_hub_id_that_cannot_be_had_says_what_to_do(monkeypatch, parity_dir):
    """Stops: a page of network errors in place of the way out."""
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"source 'a/b'.*ConnectionError: no route.*copy the repository's"
    ):
        jf.load("a/b", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"vae_path 'a/b'.*copy the repository's"):
        jf.load(parity_dir, vae_path="a/b", device="cpu", progress=False)


def test_a_file_in_place_of_a_folder_is_refused(parity_dir):
    """Stops: a single weights file taken for a checkpoint."""
    with pytest.raises(FileNotFoundError, match="is a file"):
        jf.load(parity_dir / "model.safetensors", device="cpu")


def load(folder: Path, **options) -> jf.Pipeline:
    return jf.load(folder, device="cpu", progress=False, **options)


def test_the_vae_must_be_there(folder, tmp_path, monkeypatch):
    """Stops: another VAE taken from the hub, or four gigabytes loaded, before the missing one is noticed."""
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("the weights were read first"))
    for path in (tmp_path / "nothing", "nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match=r"vae_path .*nothing.* neither a folder nor a hub id"):
            load(folder, vae_path=path)


def test_an_empty_vae_folder_is_refused(folder, tmp_path):
    """Stops: an error about the hub for a folder that is there."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty.config.json does not exist"):
        load(folder, vae_path=tmp_path / "empty")


def test_a_vae_without_weights_is_refused(folder):
    """Stops: a VAE of random weights."""
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae has no diffusion_pytorch_model.safetensors"):
        load(folder)


def test_a_vae_with_other_keys_is_refused(folder):
    """Stops: missing weights left at random, which diffusers only warns about."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    key = "decoder.conv_out.bias"
    save_file({k: v for k, v in weights.items() if k != key}, path)
    with pytest.raises(ValueError, match=rf"vae do not fit its config.json:\n  1 missing: {key}"):
        load(folder)
    save_file(weights | {"decoder.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"unexpected: .*decoder.extra.weight"):
        load(folder)
    save_file(weights | {key: torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=key):
        load(folder)


def test_a_broken_vae_file_is_named(folder):
    """Stops: an error of safetensors that does not say which of the two files is truncated."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"vae/{path.name} is not a whole safetensors file"):
        load(folder)


def test_another_kind_of_vae_is_refused(folder):
    """Stops: a tiny or video autoencoder read as far as its keys happen to fit."""
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(
        ValueError, match=r"config.json describes a AutoencoderTiny; an AutoencoderKL is needed"
    ):
        load(folder)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config.json is not valid JSON"):
        load(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json"):
        load(folder)


def test_a_vae_of_other_latents_is_refused(folder, tmp_path):
    """Stops: a 16-channel VAE (Flux, SD3) that fails at the first decoded picture, thirty steps later."""
    from diffusers import AutoencoderKL

    config = json.loads((folder / "vae" / "config.json").read_text())
    AutoencoderKL.from_config(config | {"latent_channels": 16}).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"the VAE in .*wide has 16 latent channels, the model 4"):
        load(folder, vae_path=tmp_path / "wide")


def test_the_processor_must_fit_the_encoder(folder):
    """Stops: images that land shifted in the prompt, or at another resolution, without an error."""
    edit(folder / "processor_config.json", num_image_tokens=15)
    with pytest.raises(
        ValueError, match=r"processor_config.json: num_image_tokens is 15, .* makes 16 of an image"
    ):
        load(folder)
    edit(folder / "processor_config.json", num_image_tokens=16)
    edit(folder / "preprocessor_config.json", image_size=32)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_size is 32, .*config.json 64"):
        load(folder)
