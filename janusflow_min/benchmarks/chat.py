# SPDX-License-Identifier: MIT
"""Judges behind a chat endpoint: the client, one retry loop, and many questions asked at once.

The endpoint is reached through the openai client (extra `bench`), imported when first needed.
"""

from __future__ import annotations

import base64
import email.utils
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from PIL import Image

from .judges import Chat, NoAnswer, Records, TryAgain, bar, prompt_hash, strip_thinking

LONGEST_WAIT = 600.0  # seconds, whatever a server's Retry-After says
Messages = Sequence[Mapping[str, Any]]
Parse = Callable[[str], "Mapping[str, Any] | None"]


@dataclass
class OpenAIChat:
    """Any server with OpenAI's `/chat/completions`: the original, vLLM, llama.cpp, …

    base_url: up to and including `/v1`; None is OpenAI's own. api_key: else OPENAI_API_KEY, else "EMPTY", which local
    servers take. thinking: False asks a reasoning model not to, in vLLM's and SGLang's form; None says nothing.
    extra: further fields of the request's body.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = None
    temperature: float = 0.0
    max_tokens: int = 2000
    timeout: float = 300.0  # seconds of one request
    thinking: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError(
                "a chat judge needs the openai client: pip install 'janusflow-min[bench]'"
            ) from None
        if self.thinking is not None:
            template = dict(self.extra.get("chat_template_kwargs", {})) | {"enable_thinking": self.thinking}
            self.extra = dict(self.extra) | {"chat_template_kwargs": template}
        key = self.api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        # Retries are `Asking`'s: there they count attempts together with answers that make no sense.
        self.client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=0)

    @property
    def name(self) -> str:
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """What moves its answers."""
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "extra": dict(self.extra)}

    def ask(self, messages: Messages) -> str:
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=cast(Any, list(messages)),
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                extra_body=dict(self.extra),
            )
        except (openai.APIConnectionError, openai.APIResponseValidationError) as error:  # timeouts included
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (408, 409, 429) or status >= 500:
                raise TryAgain(f"HTTP {status}", _retry_after(error.response.headers)) from error
            if status in (400, 413, 422):  # a content filter, a prompt that is too long
                raise NoAnswer(f"the judge refuses, HTTP {status}: {error.message[:300]}") from error
            raise RuntimeError(f"the judge refuses, HTTP {status}: {error.message}") from error
        except (ValueError, RecursionError) as error:  # a body that is not JSON, or nested too deeply
            raise TryAgain(f"not JSON: {error}") from error
        try:
            choice = reply.choices[0]
            text, finish = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            text, finish = None, None
        if isinstance(text, str) and (text.strip() or finish != "length"):
            return text
        if finish == "length":
            reason = f"no text within {self.max_tokens} tokens; allow more, or turn thinking off"
            raise TryAgain(reason, answered=True)
        raise TryAgain(f"an answer without a text: {str(reply)[:200]}")


def judge_settings(judge: Any) -> dict[str, Any]:
    """A judge's settings that move its answers, {} where it names none."""
    return dict(getattr(judge, "settings", {}))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for: it holds a number or a date."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        date = email.utils.parsedate_tz(text)
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return min(max(0.0, seconds), LONGEST_WAIT) if seconds == seconds else 0.0


def image_part(image: str | Path | Image.Image) -> dict[str, Any]:
    """An image as a part of a user's message: a file's own bytes as a data URL, anything else as PNG."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    else:
        kind = "png" if Path(image).suffix.lower() == ".png" else "jpeg"
        content = Path(image).read_bytes()
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class JudgeDown(RuntimeError):
    """So many items in a row got no answer that asking on would waste time and money."""


class Asking:
    """One judge, asked from several threads: how often an item is tried, and when to give up on the judge.

    Between attempts it waits `wait`, 2 · wait, 4 · wait … seconds, give or take a half, or as long as the server asks.
    """

    def __init__(self, chat: Chat, attempts: int = 3, wait: float = 1.0, stop_after: int = 10):
        if attempts < 1 or stop_after < 1:
            raise ValueError(f"attempts and stop_after must be at least 1, got {attempts} and {stop_after}")
        self.chat, self.attempts, self.wait, self.stop_after = chat, attempts, wait, stop_after
        self.stop = threading.Event()  # set together with `error`; waiting threads wake up
        self.error: BaseException | None = None  # what ended the run
        self.lock = threading.Lock()
        self.failed_in_a_row = 0
        self.answered = False  # whether the judge ever said anything
        self.last_reason = ""  # why the last item had no answer

    def ask(self, messages: Messages, parse: Parse) -> tuple[str, Mapping[str, Any]]:
        """The answer and its values. parse: None where an answer makes no sense, which counts as an attempt.

        Raises NoAnswer for this item, JudgeDown where `stop_after` items in a row had none, and whatever else the
        judge raises, a wrong key for instance. After the latter two every later call raises the same.
        """
        if self.error is not None:
            raise self.error
        try:
            found = self._attempts(messages, parse)
        except NoAnswer as error:
            with self.lock:
                self.failed_in_a_row += 1
                self.last_reason = str(error)
                if self.failed_in_a_row < self.stop_after:
                    raise
            self.end(
                JudgeDown(
                    f"{self.stop_after} items in a row got no answer from {self.chat.name}, the last because: {error}. "
                    "What it answered is kept, and the next run goes on; --stop-after sets the limit"
                )
            )
        except BaseException as error:
            self.end(error)  # here, not where the result is read: other threads would go on asking until then
        with self.lock:
            self.failed_in_a_row = 0
        return found

    def check_answered(self) -> None:
        """At the end: JudgeDown where items were asked and the judge never said anything, not even a refusal."""
        if self.failed_in_a_row and not self.answered:
            raise JudgeDown(
                f"no answer at all from {self.chat.name}, the last time because: {self.last_reason}"
            )

    def end(self, error: BaseException) -> NoReturn:
        """Make this and every later call raise `error`, or the one that came first."""
        with self.lock:
            self.error = self.error or error
        self.stop.set()
        raise self.error

    def _attempts(self, messages: Messages, parse: Parse) -> tuple[str, Mapping[str, Any]]:
        reason = ""
        for attempt in range(self.attempts):
            if self.stop.is_set():
                break
            after = 0.0
            try:
                text = self.chat.ask(messages)
            except TryAgain as error:
                reason, after = str(error), error.after
                self.answered = self.answered or error.answered
            except NoAnswer:
                self.answered = True
                raise
            else:
                self.answered = True
                values = parse(text)
                if values is not None:
                    return text, values
                reason = f"makes no sense: {text[:200]!r}"
            if attempt + 1 < self.attempts:
                self.stop.wait(max(after, self.wait * 2**attempt * random.uniform(0.5, 1.5)))
        raise NoAnswer(reason)


@dataclass(frozen=True)
class Question:
    """Something to judge. sha256: of everything that the judge sees of it."""

    key: Any
    sha256: str
    messages: Callable[[], Messages]  # made when it is its turn: images are big


def judge_all(
    chat: Chat,
    questions: Sequence[Question],
    parse: Parse,
    records: Records,
    concurrency: int = 8,
    attempts: int = 3,
    progress: bool = True,
    wait: float = 1.0,
    stop_after: int = 10,
) -> dict[Any, str]:
    """Ask about all that `records` lacks; returns key -> reason for those that stay without an answer.

    parse, attempts, wait, stop_after and errors: see `Asking`. An item without an answer is left out, never given a
    number; the next run asks again. When an error ends the run, answers under way are still waited for and kept.
    JudgeDown also where the judge never answered at all, however few the items are.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    todo = records.todo(questions)
    asking = Asking(chat, attempts, wait, stop_after)
    failures: dict[Any, str] = {}

    def one(question: Question) -> None:
        try:
            text, values = asking.ask(question.messages(), parse)
        except NoAnswer as error:
            failures[question.key] = str(error)
        else:
            records.add(question.key, question.sha256, {"answer": text} | dict(values))

    with ThreadPoolExecutor(concurrency) as pool:
        jobs = [pool.submit(one, question) for question in todo]
        try:
            for job in bar(as_completed(jobs), "Judging", progress, len(jobs)):
                job.result()
        except BaseException as error:
            for job in jobs:
                job.cancel()
            asking.end(error)
    asking.check_answered()
    return failures


class ChatVQA:
    """A chat endpoint that is asked a question about an image, to be answered by yes or no."""

    INSTRUCTION = "Look at the image and answer the question with one word, yes or no.\nQuestion: "

    def __init__(self, chat: Chat, attempts: int = 3, wait: float = 1.0, stop_after: int = 10):
        self.asking = Asking(chat, attempts, wait, stop_after)
        self.name = f"{chat.name}, asked for one word (prompt sha256 {prompt_hash(self.INSTRUCTION)[:16]})"
        self.settings = judge_settings(chat)

    def answer(self, image: Image.Image, question: str) -> str:
        """The answer without its thinking; its first word is yes or no. NoAnswer where no attempt had one."""
        parts = [{"type": "text", "text": self.INSTRUCTION + question}, image_part(image)]
        return self.asking.ask([{"role": "user", "content": parts}], _yes_or_no)[1]["answer"]


def _yes_or_no(text: str) -> dict[str, str] | None:
    answer = strip_thinking(text)
    return {"answer": answer} if re.match(r"(?i)[^\w]*(yes|no)\b", answer) else None
