# SPDX-License-Identifier: MIT
"""Answers as they are decoded: streams, stop strings, the reason of the end, the system prompt."""

from __future__ import annotations

import threading
import time

import pytest

import janusflow_min as jf
from janusflow_min.cli import main
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.sampling import PlainSampler

QUESTIONS = ["hi", "what is it, then?", "hello"]
OPTIONS = dict(max_new_tokens=24, seed=3)


@pytest.fixture(scope="module", params=[PlainSampler, GraphSampler])
def pipe(request, parity_dir) -> jf.Pipeline:
    pipe = jf.load(parity_dir, device="cpu", progress=False)
    pipe.sampler = request.param(pipe.model)
    return pipe


def threads() -> int:
    return sum(thread.name == "janusflow-stream" for thread in threading.enumerate())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_of_a_stream_are_the_answer(pipe, monkeypatch, temperature):
    """Stops: pieces lost, twice or of another row, half characters, other tokens than without a stream."""
    monkeypatch.setattr("janusflow_min.answering.MAX_BATCH", 2)
    wanted = [answer.text for answer in pipe.understand(QUESTIONS, temperature=temperature, **OPTIONS)]
    texts = [""] * 3
    for index, piece in pipe.stream(QUESTIONS, temperature=temperature, **OPTIONS):
        assert piece
        texts[index] += piece
    assert texts == wanted
    single = list(pipe.stream(QUESTIONS[0], **OPTIONS))
    assert "".join(single) == pipe.understand(QUESTIONS[0], **OPTIONS).text and len(single) > 1
    assert threads() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_depends_on_no_neighbour(pipe, monkeypatch, temperature):
    """Stops: a draw from a generator that the rows of a batch share, and a neighbour near the last position that ends
    everybody's answer."""
    tokenizer, limit = pipe.processor.tokenizer, pipe.model.config.llm.max_position_embeddings
    monkeypatch.setattr(tokenizer, "eos_id", -1)  # every answer is as long as it may be
    full = next(n for n in range(limit, 0, -1) if len(tokenizer.encode(" hi" * n)) < limit - 100)
    questions = ["hi", " hi" * full, "what is it, then?", "hello"]
    options = dict(max_new_tokens=90, temperature=temperature, top_k=0, top_p=1.0)
    together = [answer.token_ids for answer in pipe.understand(questions, seed=3, **options)]
    alone = [pipe.understand(text, seed=3 + k, **options).token_ids for k, text in enumerate(questions)]
    assert together == alone
    assert 0 < len(alone[1]) < 90 and [len(alone[k]) for k in (0, 2, 3)] == [90, 90, 90]


def test_a_character_of_several_tokens_comes_whole(pipe, monkeypatch):
    """Stops: the replacement character in a stream where a letter's bytes are several tokens."""
    tokenizer = pipe.processor.tokenizer
    ids = iter([*tokenizer.encode("a star \u2605 \u4e8c"), tokenizer.eos_id])

    def generate_tokens(batch, room, eos_id, sample_fn):
        import torch

        for token in ids:
            logits = torch.zeros(1, pipe.model.config.llm.vocab_size)
            logits[0, token] = 1
            sample_fn(logits)
        return [[]]

    monkeypatch.setattr(pipe.sampler, "generate_tokens", generate_tokens)
    pieces = list(pipe.stream("hi", **OPTIONS))
    assert "".join(pieces).strip() == "a star \u2605 \u4e8c" and not any(
        "\ufffd" in piece for piece in pieces
    )


def test_a_stream_that_is_closed_or_fails_leaves_no_thread(pipe, monkeypatch):
    """Stops: a model that runs on for nobody; an error that vanishes in a thread."""
    stream = pipe.stream(QUESTIONS, **OPTIONS)
    next(stream)
    stream.close()
    assert threads() == 0
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipe.stream("hi", max_new_tokens=0)  # at once, not at the first piece
    monkeypatch.setattr(pipe.sampler, "generate_tokens", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pipe.stream("hi", **OPTIONS))
    assert threads() == 0


def test_the_next_batch_is_prepared_while_the_model_answers(pipe, parity_dir, monkeypatch, tmp_path):
    """Stops: a GPU that waits for Pillow, answers that differ for it, an error raised before its turn or lost, a
    thread that outlives its call."""
    images = [*sorted((parity_dir / "images").glob("*.png"))[:4], str(tmp_path / "torn.png")]
    wanted = [pipe.understand("what?", image, **OPTIONS) for image in images[:4]]
    monkeypatch.setattr("janusflow_min.answering.MAX_BATCH", 1)
    collated, prepare, answer = [], type(pipe.processor).collate, pipe.sampler.generate_tokens

    def collate(processor, rows):
        collated.append(threading.current_thread().name)
        return prepare(processor, rows)

    def generate_tokens(*args):
        until = time.monotonic() + 20
        while len(collated) < min(4, started[0] + 2) and time.monotonic() < until:
            time.sleep(0.001)  # the next batch comes without our help
        started[0] += 1
        return answer(*args)

    started = [0]
    monkeypatch.setattr(type(pipe.processor), "collate", collate)
    monkeypatch.setattr(pipe.sampler, "generate_tokens", generate_tokens)
    before = threading.active_count()
    assert pipe.understand(["what?"] * 4, images[:4], **OPTIONS) == wanted
    assert [name == threading.current_thread().name for name in collated] == [True, False, False, False]
    monkeypatch.setattr(pipe.sampler, "generate_tokens", answer)
    (tmp_path / "torn.png").write_bytes(b"torn")
    pieces = []
    with pytest.raises(ValueError, match=r"torn\.png cannot be read as an image"):
        for piece in pipe.stream(["what?"] * 5, images, **OPTIONS):
            pieces.append(piece)
    assert ["".join(text for i, text in pieces if i == k) for k in range(4)] == [a.text for a in wanted]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.sampler, "generate_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.understand(["what?"] * 4, images[:4], **OPTIONS)
    assert threading.active_count() == before, caught  # the traceback is still held


def test_a_stop_string_ends_its_own_row(pipe):
    """Stops: a stop string in the text, one that ends other rows, a reason that says otherwise."""
    whole = pipe.understand(QUESTIONS, **OPTIONS)
    assert {answer.finish_reason for answer in whole} <= {"stop", "length"}
    for answer in whole:
        assert (answer.finish_reason == "stop") == (answer.token_ids[-1] == pipe.processor.tokenizer.eos_id)
    stop = whole[0].text[3:6]
    cut = pipe.understand(QUESTIONS, stop=stop, **OPTIONS)
    assert cut[0].text == whole[0].text[: whole[0].text.index(stop)] and cut[0].finish_reason == "stop"
    for now, before in zip(cut, whole, strict=True):
        assert now.text == before.text.partition(stop)[0]
        assert stop in before.text or now == before
    assert "".join(pipe.stream(QUESTIONS[0], stop=stop, **OPTIONS)) == cut[0].text


def test_the_system_prompt_is_an_argument(pipe):
    """Stops: words that decide an answer and cannot be changed, or "" read as the usual ones."""
    usual, own, none = (
        pipe.understand("hi", max_new_tokens=2, system_prompt=p).sft_format for p in (None, "Be brief.", "")
    )
    assert usual == pipe.understand("hi", max_new_tokens=2).sft_format and usual.startswith(
        "You are a helpful"
    )
    assert own == "Be brief.\n\nUser: hi\n\nAssistant:" and none == "User: hi\n\nAssistant:"
    chat = pipe.chat([{"role": "User", "content": "hi"}], max_new_tokens=2, system_prompt="")
    assert chat.sft_format == none


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop": ""}, "stop must be text"),
        ({"stop": [3]}, r"stop\[0\] must be a str"),
        ({"stop": 3}, "stop must be a str or a list of str, got 3"),
        ({"system_prompt": 3}, "system_prompt must be a str or None, got 3"),
    ],
)
def test_wrong_options_of_answers_are_refused_at_once(pipe, monkeypatch, options, message):
    """Stops: an error after the answer has been decoded."""
    monkeypatch.setattr(pipe.sampler, "generate_tokens", lambda *a: 1 / 0)
    for call in (pipe.understand, pipe.stream):
        with pytest.raises(ValueError, match=message):
            call("hi", **options)


def test_the_command_line_streams_the_answer(parity_dir, capsys):
    """Stops: options that are taken and dropped, a stream that prints something else."""
    argv = ["understand", "hi", "--model", str(parity_dir), "--max-new-tokens", "12", "--quiet"]
    argv += ["--device", "cpu", "--system-prompt", ""]
    assert main(argv) == 0
    whole = capsys.readouterr().out
    assert main([*argv, "--stream"]) == 0
    assert capsys.readouterr().out.strip() == whole.strip() != ""
    assert main([*argv, "--stream", "--json"]) == 2
    assert "--stream prints text" in capsys.readouterr().err
