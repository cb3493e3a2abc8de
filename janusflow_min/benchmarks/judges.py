# SPDX-License-Identifier: MIT
"""What may judge, each kind behind a small Protocol, and the record of what was judged.

Anything with a Protocol's methods may stand in; `judge_models` and `chat` have the usual ones. Every judgement is
kept as a line of JSON with the judge's name and the hash of what it saw, so interrupted scoring resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from PIL import Image

from ..files import atomic_file
from ..progress import progress_bar

if TYPE_CHECKING:
    from .detection import Detection

T = TypeVar("T")


class Detector(Protocol):
    """GenEval's instance segmenter."""

    name: str

    def detect(self, image: Image.Image) -> list[Detection]:
        """Of an RGB image, faint ones included; order does not matter."""


class ColourJudge(Protocol):
    """GenEval's colour classifier."""

    name: str

    def colours(self, views: Sequence[Image.Image], label: str) -> list[str]:
        """The colour of each view of an object of the class `label`."""


class QuestionAnswerer(Protocol):
    """DPG-Bench's judge."""

    name: str

    def answer(self, image: Image.Image, question: str) -> str:
        """Raises NoAnswer where there is none: that question stays open, and is never counted as a no."""


class Chat(Protocol):
    """A judge that reads messages in OpenAI's form."""

    @property
    def name(self) -> str:
        """The model's, as the score names it."""

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """One attempt. Raises TryAgain for what may pass, NoAnswer for what concerns this item alone, anything else
        for what would fail for every item."""


class TryAgain(RuntimeError):
    """A timeout, a dropped connection, a busy or broken server. after: seconds that the server asks to wait. answered:
    the judge itself said something, only nothing of use."""

    def __init__(self, reason: str, after: float = 0.0, answered: bool = False):
        super().__init__(reason)
        self.after, self.answered = after, answered


class NoAnswer(RuntimeError):
    """The judge has no answer about this one item: it refuses it, or all attempts failed or made no sense."""


class Records:
    """JSON lines that can be resumed: one record per key, the last one counts. Threads may share it.

    identity: the judge's name, prompt hash and so on, part of every record; a file with another identity is refused,
    since numbers of two judges must not be mixed. A line that an interruption cut off is dropped. keep: hold the
    records in memory, as `entries`; otherwise only their hashes.
    """

    def __init__(self, path: Path, key: str, identity: Mapping[str, Any], keep: bool = True):
        self.path, self.key, self.keep = path, key, keep
        self.identity = json.loads(json.dumps(dict(identity)))  # as it is when read
        self.entries: dict[Any, dict[str, Any]] = {}
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO | None = None  # opened by the first record: nothing asked leaves no file
        if path.exists():
            self._load()

    def _load(self) -> None:
        with open(self.path, "rb+") as f:
            for number, line in enumerate(f, 1):
                if not line.endswith(b"\n"):
                    f.truncate(f.seek(0, os.SEEK_END) - len(line))
                    break
                self._read(line, number)

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            found = {name: record[name] for name in self.identity}
            key, sha256 = record[self.key], record["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}:{number}: not a judge's record: {error!r}") from None
        if found != self.identity:
            raise ValueError(
                f"{self.path}:{number} is of another judge: {found} there, {self.identity} now; move the file away"
            )
        self.entries[key] = record if self.keep else {"sha256": sha256}

    def has(self, key: Any, sha256: str) -> bool:
        """Whether there is a record about exactly this."""
        return key in self.entries and self.entries[key]["sha256"] == sha256

    def todo(self, questions: Sequence[Any]) -> list[Any]:
        """Those of the questions (with key and sha256) that have no record."""
        return [question for question in questions if not self.has(question.key, question.sha256)]

    def add(self, key: Any, sha256: str, values: Mapping[str, Any]) -> None:
        record = {self.key: key, "sha256": sha256} | self.identity | dict(values)
        with self.lock:
            self.entries[key] = record if self.keep else {"sha256": sha256}
            if self.file is None:
                # A lone surrogate, which UTF-8 does not have, becomes JSON's own escape of it.
                self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def rank_file(path: Path, rank: int) -> Path:
    """Where one of several ranks keeps the records that will belong to `path`."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def merge_ranks(path: Path) -> None:
    """Add the records of all ranks' files, those of a run that was killed too, to `path`; the files go."""
    parts = sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))
    if not parts:
        return
    with atomic_file(path) as temporary, open(temporary, "wb") as whole:
        for part in [path, *parts]:
            if part.is_file():
                with open(part, "rb") as lines:
                    whole.writelines(line for line in lines if line.endswith(b"\n"))
    for part in parts:
        part.unlink()


def prompt_hash(*texts: str) -> str:
    """Of a judge's wording, which moves the numbers."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def strip_thinking(text: str) -> str:
    """Without <think>…</think>. An unclosed <think> takes everything after it, a lone </think> everything before."""
    text = re.sub(r"(?is)<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", "", text)
    return re.split(r"(?i)</think(?:ing)?>", text)[-1].strip()


def bar(items: Iterable[T], what: str, progress: bool, total: int | None = None) -> Iterable[T]:
    return progress_bar(progress, iterable=items, desc=what, total=total)
