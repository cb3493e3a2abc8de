# SPDX-License-Identifier: MIT
"""The server's engine without HTTP: lanes, slices, and results that do not depend on what runs beside them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from adapters import write_adapter
from PIL import Image
from serving import endless, wait_until

import janusflow_min as jf
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.serve import engine as engine_module
from janusflow_min.serve.engine import Engine, ImageRequest, Question, settled


@pytest.fixture(scope="module")
def pipe():
    return jf.load("tiny", device="cpu", progress=False)


@pytest.fixture
def engine(pipe):
    engine = Engine(pipe)
    engine.start()
    yield engine
    if engine.is_alive:
        engine.stop()


@pytest.fixture(scope="module")
def star(pipe) -> Image.Image:
    return pipe.generate("a photo of a red star", 1, num_inference_steps=4, seed=0, progress=False).images[0]


def messages(text: str, *images: Image.Image) -> list[dict]:
    return [
        {"role": "User", "content": "<image_placeholder>\n" * len(images) + text, "images": list(images)},
        {"role": "Assistant", "content": ""},
    ]


def question(
    pipe, text: str, *images: Image.Image, max_new_tokens: int = 40, seed: int = 0, **options
) -> Question:
    ids, _, images = pipe.processor.conversation(messages(text, *images))
    made = Question(ids, images, max_new_tokens, **options)
    made.generator.manual_seed(seed)
    return made


TEXTS = ("What is in the picture?", "How many objects are there?", "Is there a star? Answer yes or no.", "hi")


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("slice_tokens", [1, 16])
def test_answers_equal_those_given_alone(pipe, star, monkeypatch, fast, slice_tokens):
    """Stops: an answer that depends on its neighbours, on where a slice ended, or on another request's draws."""
    monkeypatch.setattr(engine_module, "SLICE", slice_tokens)
    options = [
        dict(temperature=0.0),
        dict(temperature=1.5, top_k=0, top_p=1.0, seed=3),
        dict(temperature=0.7, seed=4),
    ]
    cases = [(text, images, o) for text in TEXTS for images in ((), (star,), (star, star)) for o in options]
    alone = [pipe.chat(messages(text, *images), max_new_tokens=12, **o) for text, images, o in cases]
    if fast:
        pipe.sampler = GraphSampler(pipe.model)
    engine = Engine(pipe, max_batch=12)
    engine.round_rows = fast  # to 16
    asked = [question(pipe, text, *images, max_new_tokens=12, **o) for text, images, o in cases]
    for each in asked:
        engine.submit(each)
    engine.start()
    try:
        for one, other in zip(asked, alone, strict=True):
            assert one.future.result(60).tokens == other.token_ids
            assert one.text == other.text.strip()
            assert one.finish_reason == (
                "stop" if other.token_ids[-1] == pipe.processor.tokenizer.eos_id else "length"
            )
    finally:
        pipe.sampler = None
        engine.stop()
    assert engine.counts["question_rows"] / engine.counts["question_batches"] > 8


def test_a_short_question_overtakes_a_long_answer(pipe, engine):
    """Stops: a newcomer that waits until an answer of hundreds of tokens is over."""
    with endless(pipe, seconds=0.002):
        long = [question(pipe, "hi", max_new_tokens=600) for _ in range(20)]  # more than run at once
        for each in long:
            engine.submit(each)
        wait_until(lambda: all(each.tokens for each in long))  # even the last four have had a turn
        short = question(pipe, "What is this?", max_new_tokens=3)
        engine.submit(short)
        assert len(short.future.result(60).tokens) == 3
        assert not any(each.future.done() for each in long)
        for each in long:
            each.future.cancel()


def test_a_question_is_answered_between_two_steps_of_an_image(pipe, engine):
    """Stops: a question that waits for an image; an image that a question between its steps changes."""
    settings = dict(num_inference_steps=12, cfg_weight=2.0)
    alone = pipe.generate("a photo of a red star", 1, seed=5, progress=False, **settings).images[0]
    painted = ImageRequest("a photo of a red star", [5], settings)
    engine.submit(painted)
    wait_until(lambda: painted.started)
    asked = question(pipe, "hi")
    engine.submit(asked)
    assert asked.future.result(60).text
    assert not painted.future.done()
    [image] = painted.future.result(60)
    assert np.array_equal(np.asarray(image), np.asarray(alone))


def test_images_equal_those_made_alone(pipe):
    """Stops: noise, guidance or prompts that get mixed up where requests are batched, split or of other settings."""
    engine = Engine(pipe)
    prompts = ("a photo of a red star", "a photo of a blue ring left of a green square")
    requests = [
        ImageRequest(prompt, list(range(k, k + count)), dict(num_inference_steps=steps, cfg_weight=weight))
        for k, (prompt, count, steps, weight) in enumerate(
            [
                (prompts[0], 3, 2, 2.0),
                (prompts[1], 15, 2, 2.0),
                (prompts[1], 1, 3, 2.0),
                (prompts[0], 2, 2, 1.0),
            ]
        )
    ]
    for request in requests:
        engine.submit(request)
    engine.start()
    for request in requests:
        images = request.future.result(120)
        alone = pipe.generate(
            request.prompt, len(images), seed=request.seeds[0], progress=False, **request.settings
        )
        for image, other in zip(images, alone.images, strict=True):  # bytes are cut off, so rounding may show
            assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1
    engine.stop()
    assert engine.counts["image_batches"] == 4 and engine.counts["images"] == 21  # 16, 2, 1 and 2


def test_whoever_has_gone_is_not_worked_for(pipe, engine):
    """Stops: tokens and steps for clients that have hung up."""
    with endless(pipe, seconds=0.002):
        asked, painted = (
            question(pipe, "hi", max_new_tokens=900),
            ImageRequest("a star", [1], dict(num_inference_steps=99)),
        )
        engine.submit(asked)
        wait_until(lambda: asked.tokens)
        asked.future.cancel()
        engine.submit(painted)
        wait_until(lambda: painted.started)
        painted.future.cancel()
        waiting = ImageRequest("a star", [1], {})
        engine.submit(waiting)
        waiting.future.cancel()
        engine.submit(after := question(pipe, "hi", max_new_tokens=2))
        after.future.result(30)
    assert len(asked.tokens) < 900 and not painted.images and not waiting.started
    wait_until(lambda: not engine.questions and not engine.images)
    with pytest.raises(CancelledError):
        asked.future.result()


def test_a_request_that_fails_fails_alone(pipe, engine, monkeypatch):
    """Stops: one request's error handed to those that were batched with it; an engine that an error ends."""
    real = pipe.generate

    def generate(prompt, **options):
        if "bad" in prompt:
            raise FloatingPointError("not finite")
        return real(prompt, **options)

    monkeypatch.setattr(pipe, "generate", generate)
    settings = dict(num_inference_steps=1)
    requests = [ImageRequest(prompt, [1, 2], settings) for prompt in ("a star", "bad", "a ring")]
    nan = question(pipe, "hi", temperature=1.0)
    nan.choose = lambda logits: (_ for _ in ()).throw(FloatingPointError("logits"))
    asked = [question(pipe, "hi"), nan, question(pipe, "hi", temperature=1.0)]
    for request in (*requests, *asked):
        engine.submit(request)
    for request in (requests[0], requests[2]):
        assert len(request.future.result(60)) == 2
    for question_ in (asked[0], asked[2]):
        assert question_.future.result(60).finish_reason
    for failed in (requests[1], nan):
        with pytest.raises(FloatingPointError):
            failed.future.result(60)
    assert engine.is_alive


def test_a_token_that_stands_for_images_is_text_when_it_is_read_again(pipe, monkeypatch):
    """Stops: a slice's second reading that takes an image's place for a token which the model itself has chosen."""
    monkeypatch.setattr(engine_module, "SLICE", 1)
    image_id = pipe.processor.tokenizer.image_id
    asked = [question(pipe, "hi", max_new_tokens=6), question(pipe, "hi", max_new_tokens=6)]
    for each in asked:
        each.temperature, each.choose = 1.0, lambda logits: image_id
    engine = Engine(pipe)
    for each in asked:
        engine.submit(each)
    engine.submit(question(pipe, "hi"))
    engine.start()
    for each in asked:
        assert each.future.result(60).tokens == [image_id] * 6
    engine.stop()


def test_an_answer_ends_at_the_model_s_last_position(pipe, engine):
    """Stops: a long neighbour's prompt that shortens an answer, and a cache that overflows."""
    limit = pipe.model.config.llm.max_position_embeddings
    with endless(pipe):
        long = question(pipe, "star " * 930)
        long.max_new_tokens = limit - len(long.ids)
        asked = question(pipe, "hi", max_new_tokens=100)
        engine.submit(long)
        engine.submit(asked)
        assert len(long.future.result(60).tokens) == long.max_new_tokens < 100
        assert len(asked.future.result(60).tokens) == 100


def test_stopping_finishes_what_has_been_submitted(pipe, engine):
    """Stops: a request lost when the server ends; one that is taken in after."""
    asked, painted = question(pipe, "hi"), ImageRequest("a star", [1], dict(num_inference_steps=1))
    engine.submit(asked)
    engine.submit(painted)
    engine.stop()
    assert asked.future.done() and painted.future.done() and not engine.is_alive
    with pytest.raises(RuntimeError, match="stopping"):
        engine.submit(question(pipe, "hi"))
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    "text, stop, final, wanted",
    [
        (" a red star ", [], True, ("a red star", False)),
        (" a red ", [], False, ("a red", False)),
        ("a \ufffd\ufffd", [], False, ("a", False)),
        ("a \ufffd", [], True, ("a \ufffd", False)),
        ("one. two. three", [". t"], True, ("one", True)),
        ("one\n", ["\n\nUser"], False, ("one", False)),
        ("one Us", ["User:"], False, ("one", False)),
        ("one Us", ["User:"], True, ("one Us", False)),
        ("b then a", ["a", "b"], False, ("", True)),
    ],
)
def test_only_settled_text_is_handed_out(text, stop, final, wanted):
    """Stops: half a character, part of a stop string, or text that a later token takes back."""
    assert settled(text, stop, final) == wanted


def test_pieces_of_a_stream_are_the_text(pipe, engine):
    """Stops: pieces that are lost, doubled, or changed after they have been sent."""
    with endless(pipe):
        pieces = [[] for _ in range(4)]
        warm = dict(temperature=1.8, top_k=0, top_p=1.0, max_new_tokens=80)
        asked = [question(pipe, TEXTS[k], seed=k, on_text=pieces[k].append, **warm) for k in range(4)]
        for each in asked:
            engine.submit(each)
        for each, got in zip(asked, pieces, strict=True):
            each.future.result(60)
            assert "".join(got) == each.text == pipe.processor.tokenizer.decode(each.tokens).strip()
            assert len(got) > 5
    assert torch.get_num_threads() == 1


def test_batching_is_faster(pipe):
    """Stops: a server that batches for nothing: answers of 60 tokens, 16 at once, against one after the other."""

    def seconds(max_batch: int) -> float:
        engine, asked = Engine(pipe, max_batch), [question(pipe, "hi", max_new_tokens=60) for _ in range(16)]
        for each in asked:
            engine.submit(each)
        begin = time.perf_counter()
        engine.start()
        engine.stop()
        assert all(len(each.tokens) == 60 for each in asked)
        return time.perf_counter() - begin

    with endless(pipe):
        seconds(16)
        assert seconds(1) > 1.5 * seconds(16)  # 4 to 5 times where nothing else runs


# Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_share_neither_a_batch_nor_weights(tmp_path):
    """Stops: an answer or an image with another request's adapter, whatever came beside or in the middle of it; a
    base model that is changed for those who asked for no adapter."""
    pipe = jf.load("tiny", device="cpu", progress=False)
    text, names, images = "What is in the picture?", (None, "a", "b"), {}
    alone = {name: pipe for name in names[:1]}
    for name, size in zip(names[1:], (0.2, 0.25), strict=True):
        write_adapter(tmp_path / name, pipe.model, size=size)
        alone[name] = jf.load("tiny", device="cpu", progress=False)
        alone[name].load_lora(tmp_path / name, scale=0.5)
    expected = {name: one.understand(text, max_new_tokens=12) for name, one in alone.items()}
    for name, one in alone.items():
        images[name] = one.generate("a red star", 1, num_inference_steps=3, seed=3, progress=False).images[0]
    assert len({answer.text for answer in expected.values()}) == 3, "the adapters must make a difference"
    served = jf.load("tiny", device="cpu", progress=False)
    for name in names[1:]:
        served.load_lora(tmp_path / name, scale=0.5)
    engine = Engine(served)
    assert not any(served.adapters.values())
    work = [
        ImageRequest("a red star", [3], {"num_inference_steps": 3}, lora=name) for name in (*names, *names)
    ]
    asked = [question(served, text, max_new_tokens=12, lora=name) for name in names * 3]
    for one in (*work, *asked):
        engine.submit(one)
    engine.start()  # all of them wait, so questions get their slices between the images' steps
    for one in asked:
        assert one.future.result(120).text == expected[one.lora].text.strip()
    for one in work:
        made = np.asarray(one.future.result(120)[0], int)
        assert np.abs(made - np.asarray(images[one.lora], int)).max() <= 1
    assert engine.counts["question_rows"] > engine.counts["question_batches"], "equal ones run together"
    engine.stop()
