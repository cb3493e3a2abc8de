# SPDX-License-Identifier: MIT
"""Answering questions: `Pipeline.understand`, `Pipeline.stream` and `Pipeline.chat`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch

from . import checks
from .prefetch import ahead
from .processor import SYSTEM_PROMPT, Batch
from .sampling import MAX_BATCH, AnswerWatch, fresh_seed, sample

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .pipeline import Pipeline

DEFAULT_QUESTION = "Describe the image."
Message = Mapping[str, Any]  # "role", "content" and, if there are any, "images"


class AnswerOptions(TypedDict, total=False):
    """`chat` says what each means, `prepare` what it is by default."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    system_prompt: str | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class Answer:
    text: str  # without special tokens
    sft_format: str  # the prompt as the model read it
    token_ids: list[int]  # the EOS that ended it included
    finish_reason: str = "stop"  # "length" where max_new_tokens or the model's positions cut it off

    def __hash__(self) -> int:
        return hash((self.text, self.sft_format, tuple(self.token_ids)))


@overload
def understand(
    pipe: Pipeline, prompt: str | None, images: Any = None, **options: Unpack[AnswerOptions]
) -> Answer: ...
@overload
def understand(
    pipe: Pipeline,
    prompt: list[str] | list[str | None] | tuple[str | None, ...],
    images: Any = None,
    **options: Unpack[AnswerOptions],
) -> list[Answer]: ...
@checks.known_arguments(*AnswerOptions.__annotations__)
def understand(pipe: Pipeline, prompt: Any, images: Any = None, **options: Any) -> Any:
    """Answer a question, about images or none.

    prompt: one question or a list. images: for one question an image (path, bytes of a file, file object, PIL
    image or uint8 array [H, W, 3]) or a list of them; for a list of questions a list with an image, a list of
    images or None for each. An empty question about images means "Describe the image." options: those of `chat`.
    """
    single, conversations = _conversations(pipe, prompt, images)
    answers = prepare(pipe, conversations, **options)()
    return answers[0] if single else answers


@checks.known_arguments(*AnswerOptions.__annotations__)
def stream(
    pipe: Pipeline, prompt: Any, images: Any = None, **options: Unpack[AnswerOptions]
) -> Iterator[Any]:
    """As `understand`, but yields the answer's text while it is decoded, whole characters alone: pieces of it, or
    (index of the question, piece) for a list. The pieces add up to the answer's text.

    Arguments are checked at once, the model runs from the first `next` on, in a thread of its own; closing the
    iterator ends it at the next token.
    """
    single, conversations = _conversations(pipe, prompt, images)
    pieces = iterate(prepare(pipe, conversations, **options))
    return (text for _, text in pieces) if single else pieces


@overload
def chat(pipe: Pipeline, conversation: Sequence[Message], **options: Unpack[AnswerOptions]) -> Answer: ...
@overload
def chat(
    pipe: Pipeline, conversation: Sequence[Sequence[Message]], **options: Unpack[AnswerOptions]
) -> list[Answer]: ...
@checks.known_arguments(*AnswerOptions.__annotations__)
def chat(pipe: Pipeline, conversation: Any, **options: Any) -> Any:
    """Answer a conversation, or each of a list of them.

    A conversation is a list of messages in the reference's form: {"role": "User" or "Assistant", "content":
    text with an <image_placeholder> for each image, "images": [...]}; an empty message of the assistant is added
    where it does not end in one.
    max_new_tokens: most tokens of an answer, 512; the model's positions are a limit too. temperature: 0 is greedy, and
    the default; above it: temperature, top_k (50; 0 keeps all tokens), top_p (0.95), then one draw a step, for answer k
    from a CPU generator of its own with the seed `seed` + k (None: fresh ones). system_prompt: None is the usual one,
    "" none at all. stop: a string or several; the answer ends before the first of them. More than 16 conversations run
    in batches of 16.
    Raises ValueError for conversations that do not fit, before any image is decoded; FloatingPointError where
    the logits become NaN or infinite.
    """
    if not isinstance(conversation, list | tuple):
        raise ValueError(f"a conversation is a list of messages, got {checks.shown(conversation)}")
    if not conversation:
        raise ValueError("the conversation is empty")
    single = isinstance(conversation[0], Mapping)
    conversations = [conversation] if single else conversation
    for messages in conversations:
        if not isinstance(messages, list | tuple):
            raise ValueError(f"a conversation is a list of messages, got {checks.shown(messages)}")
    answers = prepare(pipe, [list(c) for c in conversations], **options)()
    return answers[0] if single else answers


def _conversations(pipe: Pipeline, prompt: Any, images: Any) -> tuple[bool, list[list[Any]]]:
    """Whether it is one question, and a conversation for each."""
    single = prompt is None or isinstance(prompt, str)
    if not single and not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt must be a str or a list of str, got {checks.shown(prompt)}")
    prompts = [prompt] if single else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list")
    if single:
        groups = [_as_list(images)]
    elif images is None:
        groups = [[] for _ in prompts]
    elif isinstance(images, list | tuple) and len(images) == len(prompts):
        groups = [_as_list(group) for group in images]
    else:
        raise ValueError(
            f"{len(prompts)} prompts need a list of {len(prompts)} images, lists of images or None, got "
            + (f"{len(images)}" if isinstance(images, list | tuple) else checks.shown(images))
        )
    conversations = []
    for i, (text, group) in enumerate(zip(prompts, groups, strict=True)):
        name = "prompt" if single else f"prompt[{i}]"
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be a str or None, got {checks.shown(text)}")
        if text is None or not text.strip():
            if not group:
                raise ValueError(f"{name} is empty and there is no image to describe")
            text = DEFAULT_QUESTION
        pipe.processor.tokenizer.reject_special_tokens(text)
        content = f"{pipe.processor.tokenizer.image_tag}\n" * len(group) + text
        conversations.append([{"role": "User", "content": content, "images": group}])
    return single, conversations


def prepare(
    pipe: Pipeline,
    conversations: Sequence[list[Any]],
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 0.95,
    top_k: int = 50,
    seed: int | None = None,
    system_prompt: str | None = None,
    stop: str | Sequence[str] | None = None,
) -> Callable[..., list[Answer]]:
    """Checks all; returns what then runs the model: on_text(index, text) -> answers. See `AnswerWatch`."""
    pipe._need("understanding")
    max_new_tokens = checks.whole("max_new_tokens", max_new_tokens, most=checks.MAX_NEW_TOKENS)
    temperature = checks.number("temperature", temperature, least=0)
    top_p = checks.number("top_p", top_p, least=0, most=1, above=True)
    top_k = checks.whole("top_k", top_k, least=0)
    seed = fresh_seed() if seed is None else checks.seed("seed", seed)
    system_prompt = SYSTEM_PROMPT if system_prompt is None else system_prompt
    if not isinstance(system_prompt, str):
        raise ValueError(f"system_prompt must be a str or None, got {checks.shown(system_prompt)}")
    stops = [] if stop is None else checks.texts("stop", stop)
    if "" in stops:
        raise ValueError("stop must be text, got an empty string")
    rows = []
    for messages in conversations:  # all of them before the first image is decoded
        if not messages:
            raise ValueError("the conversation is empty")
        last = messages[-1] if isinstance(messages[-1], Mapping) else {}  # the processor says what is wrong
        if str(last.get("role", "")).lower() != "assistant" or str(last.get("content", "")).strip():
            messages.append({"role": "Assistant", "content": ""})
        row = pipe.processor.conversation(messages, system_prompt)
        count = len(row[0])
        pipe._check_length(count + 1, f"the conversation's {count} tokens and an answer")
        rows.append(row)
    limit, tokenizer = pipe.model.config.llm.max_position_embeddings, pipe.processor.tokenizer
    seeds = [checks.seed("seed", seed + k) for k in range(len(rows))]
    rooms = [min(max_new_tokens, limit - len(row[0])) for row in rows]
    # Near the last position a long row leaves its neighbours less room, so what has less is a batch of its own.
    alike = [list(group) for _, group in groupby(range(len(rows)), rooms.__getitem__)]
    groups = [group[i : i + MAX_BATCH] for group in alike for i in range(0, len(group), MAX_BATCH)]

    def run(on_text: Callable[[int, str], None] | None = None) -> list[Answer]:
        asked = [[rows[k] for k in group] for group in groups]
        with contextlib.closing(ahead(pipe.processor.collate, asked)) as batches:
            return answer(batches, on_text)

    def answer(batches: Iterator[Batch], on_text: Callable[[int, str], None] | None) -> list[Answer]:
        answers: list[Answer] = []
        for group, batch in zip(groups, batches, strict=True):
            start = len(answers)
            generators = [torch.Generator("cpu").manual_seed(seeds[k]) for k in group]
            watch, sample_fn = (
                None,
                functools.partial(
                    sample, temperature=temperature, top_p=top_p, top_k=top_k, generator=generators
                ),
            )
            if stops or on_text is not None:

                def tell(row: int, text: str, start: int = start) -> None:
                    if on_text is not None:
                        on_text(start + row, text)

                watch = AnswerWatch(len(group), sample_fn, tokenizer.eos_id, tokenizer.decode, stops, tell)
            with torch.inference_mode():
                tokens = pipe.sampler.generate_tokens(
                    batch, rooms[start], tokenizer.eos_id, watch or (sample_fn if temperature > 0 else None)
                )
            if watch is not None:
                watch.finish()
                tokens = watch.tokens
            for row, (ids, sft_format) in enumerate(zip(tokens, batch.sft_format, strict=True)):
                text = tokenizer.decode(ids) if watch is None else watch.texts[row]
                ended = ids[-1] == tokenizer.eos_id if watch is None else watch.ended[row]
                answers.append(Answer(text, sft_format, ids, "stop" if ended else "length"))
        return answers

    return run


class Closed(Exception):
    """Nobody reads the stream any more."""


def iterate(run: Callable[[Callable[[int, Any], None]], Any]) -> Iterator[tuple[int, Any]]:
    """What `run`, in a thread of its own, hands to the function that it is given."""
    pieces: SimpleQueue = SimpleQueue()
    closed = threading.Event()

    def tell(index: int, piece: Any) -> None:
        if closed.is_set():
            raise Closed
        pieces.put((index, piece))

    def work() -> None:
        try:
            run(tell)
        except Closed:
            pass
        except BaseException as error:  # raised where the stream is read
            pieces.put(error)
        finally:
            pieces.put(None)

    thread = threading.Thread(target=work, name="janusflow-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        thread.join()


def _as_list(images: Any) -> list[Any]:
    """An image or a list of them, as a list; what is no image is refused where it is opened."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
