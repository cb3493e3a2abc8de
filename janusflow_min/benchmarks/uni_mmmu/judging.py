# SPDX-License-Identifier: MIT
"""Uni-MMMU's judges: what each leg's one is sent, and what comes back. See `scoring` for what a leg is."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ...files import sha256
from ..chat import Question
from ..judges import Chat, Records
from ..reading import read_image
from ..run_folder import RunFolder
from . import rules
from .prompts import prompts_hash

if TYPE_CHECKING:
    from . import ScoreOptions

WIDEST = 2048  # px of an image that a judge is sent
ANSWER_TOKENS = {"science_text": 1024, "math_text": 32767}  # of a judge's answer; other legs have 512
TEXT_LEGS = ("math_text",)  # judged by the language model; the others by the one that sees


class Distance(Protocol):
    """How different two images look: 0 is the same, 1 the penalty for an image that is not there."""

    name: str

    def __call__(self, a: Image.Image, b: Image.Image) -> float: ...


class DreamSim:
    """DreamSim's ensemble, the official distance. Needs `pip install dreamsim`, which downloads its weights."""

    name = "DreamSim ensemble"

    def __init__(self, cache: str | Path, device: str = "auto"):
        from ...devices import pick_device

        try:
            from dreamsim import dreamsim
        except ImportError:
            raise ImportError("the jigsaw's images need DreamSim: pip install dreamsim") from None
        self.device = pick_device(device)
        self.model, self.prepare = dreamsim(pretrained=True, device=str(self.device), cache_dir=str(cache))

    def __call__(self, a: Image.Image, b: Image.Image) -> float:
        import torch

        pair = [self.prepare(image.convert("RGB")).to(self.device) for image in (a, b)]
        with torch.inference_mode():
            return float(self.model(*pair).item())


@dataclass(frozen=True)
class Job:
    """One question to a judge. key: unique in its leg."""

    key: str
    text: str
    images: Sequence[Path] = ()
    after: str = ""  # text behind the images


@dataclass
class Judging:
    """What scoring has at hand, and what it met. chats: leg -> its judge; a leg without one is not run."""

    folder: RunFolder
    texts: Mapping[str, str]  # as prompts.JUDGES
    options: ScoreOptions
    chats: Mapping[str, Chat]
    distance: Distance | None = None
    planned: list[Question] = field(default_factory=list)  # of a dry run, which asks nothing
    failures: dict[str, str] = field(default_factory=dict)  # leg/key or file -> why it is left out
    unusable: list[str] = field(default_factory=list)  # leg/key of answers without JSON

    def ask(self, leg: str, jobs: Sequence[Job]) -> dict[str, rules.Reply]:
        """key -> the reply's JSON, {} where it had none. Keys without any answer are absent.

        So is a job with an image that cannot be read; official_compat: its reply is {}.
        """
        wording = {name: text for name, text in self.texts.items() if name in (leg, f"{leg}_system")}
        identity = {"judge": self.chats[leg].name, "prompt_sha256": prompts_hash(wording)}
        records = Records(self.folder.root / "eval" / f"judge_{leg}.jsonl", "key", identity)
        replies: dict[str, rules.Reply] = {}
        questions = []
        for job in jobs:
            if all([self.open(path) for path in job.images]):
                make = functools.partial(_messages, job, wording.get(f"{leg}_system"))
                questions.append(Question(job.key, _seen(job), make))
            elif self.options.official_compat:
                replies[job.key] = {}
        if self.options.dry_run:
            self.planned += records.todo(questions)
            records.close()
            return {}
        try:
            progress = self.options.progress
            failures = self.options.ask(self.chats[leg], questions, lambda text: {}, records, progress)
        finally:
            records.close()
        self.failures |= {f"{leg}/{key}": reason for key, reason in failures.items()}
        for question in questions:
            if records.has(question.key, question.sha256):
                answer = records.entries[question.key]["answer"]
                reply = rules.first_object(answer, self.options.official_compat)
                replies[question.key] = reply or {}
                if reply is None:
                    self.unusable.append(f"{leg}/{question.key}")
        return replies

    def open(self, path: Path) -> Image.Image | None:
        """The image; None, with the reason in `failures`, where it cannot be read."""
        try:
            return read_image(path)
        except ValueError as error:
            self.failures[str(path)] = str(error)
            return None


def _seen(job: Job) -> str:
    content = "\0".join([job.text, *map(sha256, job.images), job.after])
    return hashlib.sha256(content.encode()).hexdigest()


def _messages(job: Job, system: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": job.text}]
    parts += [{"type": "image_url", "image_url": {"url": image_url(path)}} for path in job.images]
    if job.after:
        parts.append({"type": "text", "text": job.after})
    content = parts if job.images else job.text
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": content},
    ]


def image_url(path: Path) -> str:
    """An image file as the official scorer sends it: at most 2048 px wide, PNG where its name says so or where it is
    transparent, else JPEG; its own bytes where its mode cannot be written so. Raises UnreadableImage."""
    image = read_image(path)
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    transparent = image.mode in ("RGBA", "LA") or (image.mode == "P" and "transparency" in image.info)
    form = "PNG" if kind == "image/png" or transparent else "JPEG"
    buffer = io.BytesIO()
    try:
        if image.width > WIDEST:
            height = max(1, int(image.height * (WIDEST / image.width)))
            image = image.resize((WIDEST, height), Image.Resampling.LANCZOS)
        (image if form == "PNG" or image.mode == "RGB" else image.convert("RGB")).save(buffer, form)
        kind, content = f"image/{form.lower()}", buffer.getvalue()
    except (OSError, ValueError):  # CMYK in a file that is named .png, for instance
        content = path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
