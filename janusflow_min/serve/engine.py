# SPDX-License-Identifier: MIT
"""One thread that owns the model: it answers questions and generates images for many requests at once.

Two lanes. Questions that wait are decoded together, in slices: when others wait, a slice ends after `SLICE` tokens,
its unfinished questions go to the end of the lane, and the next slice reads them again together with the newcomers.
So a short question waits for one slice, not for a long answer. Images with the same settings are generated together,
and between two steps of the solver the questions get a slice.

A request's tokens, seeds and noise are its own, so its result does not depend on what it was batched with; only the
last bits of a sum do, as in every batch. Handlers hold a `Future`: cancelling it is how a client goes away.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..pixels import ImageSource
from ..sampling import MAX_BATCH, check_logits, sample
from ..sampling import settled as settled_text

if TYPE_CHECKING:
    from ..pipeline import Pipeline

SLICE = 16  # tokens that a question gets before another one's turn
# For the metrics.
COUNTS = ("tokens", "images", "question_batches", "question_rows", "image_batches", "image_rows")
RUN = 256  # tokens at most between two readings of a prompt, which bounds the cache


@dataclass(eq=False)
class Question:
    """A conversation to answer. `future` becomes this question, its fields below `future` filled in."""

    ids: list[int]  # the prompt, as the processor makes it
    images: list[ImageSource]
    max_new_tokens: int  # the model's positions leave at least as many
    seed: int = 0
    stop: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 50
    lora: str | None = None  # the adapter; None: the model as it is
    on_text: Callable[[str], None] | None = None  # gets each new piece of the text in the engine's thread
    future: Future = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)  # the EOS that ended the answer included
    text: str = ""
    finish_reason: str = ""  # "stop" or "length"

    def __post_init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(self.seed)

    def choose(self, logits: Tensor) -> int:
        """fp32 logits (1, V) -> the next token's id."""
        return int(sample(logits, self.temperature, self.top_p, self.top_k, [self.generator]))

    def append(self, token: int, eos_id: int, decode: Callable[[list[int]], str]) -> None:
        """One more token of the answer, which may end it."""
        self.tokens.append(token)
        if token == eos_id:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason or self.stop or self.on_text:
            text, stopped = settled(decode(self.tokens), self.stop, bool(self.finish_reason))
            self.finish_reason = "stop" if stopped else self.finish_reason
            new, self.text = text[len(self.text) :], text
            if new and self.on_text:
                self.on_text(new)
        if self.finish_reason:
            resolve(self.future, self)


@dataclass(eq=False)
class ImageRequest:
    """Images to make, one for each seed. `future` becomes their list."""

    prompt: str
    seeds: list[int]
    settings: dict[str, Any]  # arguments of `generate` or `edit`
    source: Image.Image | None = None  # the image to edit
    mask: Image.Image | None = None  # white may change
    lora: str | None = None  # the adapter; None: the model as it is
    future: Future = field(default_factory=Future)
    images: list[Image.Image] = field(default_factory=list)
    started: int = 0  # images that are done or being made

    def batches_with(self, other: ImageRequest) -> bool:
        alone = self.source is not None or other.source is not None
        same = self.settings == other.settings and self.lora == other.lora
        return self is other or (not alone and same)


class Abandoned(Exception):
    """Nobody waits for these images any more."""


class Engine:
    """Runs requests for a pipeline. Call `start` before and `stop` after."""

    def __init__(self, pipe: Pipeline, max_batch: int = MAX_BATCH):
        self.pipe, self.max_batch = pipe, max_batch
        self.loras = pipe.adapters  # by name, with their scales; none is active until a request asks for it
        pipe.set_adapters([])
        self.round_rows = pipe.device.type == "cuda"  # to a power of two: graphs belong to a number of rows
        self.questions: deque[Question] = deque()
        self.images: deque[ImageRequest] = deque()
        self.counts = dict.fromkeys(COUNTS, 0)
        self._changed = threading.Condition()  # guards both lanes and `_stopping`
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="janusflow-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End when what has been submitted is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Question | ImageRequest) -> None:
        with self._changed:
            if self._stopping:
                raise RuntimeError("the server is stopping")
            (self.questions if isinstance(request, Question) else self.images).append(request)  # type: ignore
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.questions or self.images or self._stopping)
                if not self.questions and not self.images:
                    return
            if self.images:
                self._run_images()
            else:
                self._answer_slice(lambda: bool(self.questions or self.images))

    def _use(self, lora: str | None) -> None:
        """Give the model the weights that a request asks for; what has them already costs nothing."""
        self.pipe.set_adapters([] if lora is None else [lora], self.loras.get(lora or "", 1.0))

    # Questions ----------------------------------------------------------------------------

    def _answer_slice(self, others_wait: Callable[[], bool]) -> None:
        """Answer the first questions of the lane until they end or, after a slice, `others_wait`."""
        with self._changed:
            first = self.questions[0]
            alike = [q for q in self.questions if q.lora == first.lora]
            length = len(first.ids)  # others of about its length: shorter ones are padded
            taken = sorted(alike, key=lambda q: abs(len(q.ids) - length))[: self.max_batch]
            for question in taken:
                self.questions.remove(question)
        running = [question for question in taken if not question.future.done()]
        if running:
            isolate(self._decode, running, others_wait)
        with self._changed:
            self.questions += [question for question in running if not question.future.done()]

    def _decode(self, running: list[Question], others_wait: Callable[[], bool]) -> None:
        self._use(running[0].lora)
        processor, limit = self.pipe.processor, self.pipe.model.config.llm.max_position_embeddings
        tokenizer, eos_id = processor.tokenizer, processor.tokenizer.eos_id
        rows = [(q.ids + q.tokens, "", q.images) for q in running]
        spare = (1 << (len(rows) - 1).bit_length()) - len(rows) if self.round_rows else 0
        batch = processor.collate(rows + rows[:1] * spare)
        for row, question in enumerate(running):
            if question.tokens:  # whatever they are, they stand for no image
                batch.images_seq_mask[row, -len(question.tokens) :] = False
        room = min(
            RUN, limit - batch.input_ids.shape[1], max(q.max_new_tokens - len(q.tokens) for q in running)
        )
        begin = time.perf_counter()
        times: list[float] = []  # of each token of the slice

        def next_tokens(logits: Tensor) -> Tensor:
            times.append(time.perf_counter())
            best, greedy = logits.max(-1)
            finite, ids = torch.isfinite(best).tolist(), greedy.tolist()
            for row, question in enumerate(running):
                if question.future.done():
                    continue
                self.counts["tokens"] += 1
                try:
                    if not finite[row]:
                        check_logits(best[row])
                    if question.temperature > 0:
                        ids[row] = question.choose(logits[row : row + 1])
                    question.append(ids[row], eos_id, tokenizer.decode)
                except Exception as error:
                    resolve(question.future, error)
            reading, decoding = times[0] - begin, times[-1] - times[0]
            paused = len(times) >= SLICE and decoding >= 2 * reading and others_wait()
            ended = [paused or question.future.done() for question in running] + [True] * spare
            ids = [eos_id if end else token for end, token in zip(ended, ids, strict=True)]
            return torch.tensor(ids, device=logits.device)

        self.counts["question_batches"] += 1
        self.counts["question_rows"] += len(running)
        with torch.inference_mode():
            self.pipe.sampler.generate_tokens(batch, room, eos_id, next_tokens)

    # Images ----------------------------------------------------------------------------

    def _run_images(self) -> None:
        """Make one batch: images of the first request in the lane, and of others with the same settings."""
        batch: list[tuple[ImageRequest, int]] = []  # a request, and which of its images
        with self._changed:
            first = self.images[0]
            for request in list(self.images):
                if request.future.done():
                    self.images.remove(request)
                    continue
                if not batch:
                    first = request
                while request.batches_with(first) and request.started < len(request.seeds):
                    if len(batch) == self.max_batch:
                        break
                    batch.append((request, request.started))
                    request.started += 1
                if request.started == len(request.seeds):
                    self.images.remove(request)
        if batch:
            isolate(self._generate, batch)

    def _generate(self, batch: list[tuple[ImageRequest, int]]) -> None:
        first, _ = batch[0]
        self._use(first.lora)
        settings = dict(first.settings)
        settings["callback_on_step_end"] = self._considerate([r.future for r, _ in batch], first.lora)
        prompts = [request.prompt for request, _ in batch]
        seeds = [request.seeds[k] for request, k in batch]
        self.counts["image_batches"] += 1
        self.counts["image_rows"] += len(batch)
        with suppress(Abandoned):
            options = dict(seed=seeds, progress=False, **settings)
            if first.source is None:
                made = self.pipe.generate(prompts, parallel_size=1, **options).images
            else:
                made = self.pipe.edit([first.source] * len(batch), prompts, mask=first.mask, **options)
            for (request, _), image in zip(batch, made, strict=True):
                request.images.append(image)
                self.counts["images"] += 1
                if len(request.images) == len(request.seeds):
                    resolve(request.future, request.images)

    def _considerate(self, futures: list[Future], lora: str | None) -> Callable[..., None]:
        """A callback after each step: questions that wait get a slice, and nothing goes on that nobody wants."""

        def after_step(*_: Any) -> None:
            if all(future.done() for future in futures):
                raise Abandoned
            if self.questions:
                self._answer_slice(lambda: True)
                self._use(lora)

        return after_step


def isolate(run: Callable[..., None], batch: list[Any], *arguments: Any) -> None:
    """Run a batch; where it fails, each of its requests alone, so that one fails for itself only."""
    try:
        run(batch, *arguments)
    except Exception as error:
        if len(batch) > 1:
            for item in batch:
                isolate(run, [item], *arguments)
        else:
            request = batch[0][0] if isinstance(batch[0], tuple) else batch[0]
            resolve(request.future, error)


def resolve(future: Future, result: Any) -> None:
    """Set a future's result or exception, unless it has been cancelled."""
    with suppress(Exception):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def settled(text: str, stop: Sequence[str], final: bool) -> tuple[str, bool]:
    """As `sampling.settled`, without white space around the text: at its end it waits."""
    text, stopped = settled_text(text, stop, final)
    return text.strip(), stopped
