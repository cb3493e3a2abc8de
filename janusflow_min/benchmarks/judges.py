# SPDX-License-Identifier: MIT
"""Who judges: detector, colour classifier, question answerer and chat endpoint, each behind a small Protocol.

Anything with the Protocol's methods may stand in. The models here come through transformers, the endpoint through
the openai client (extra `bench`); both are imported when first needed. The detector follows mmdet's Mask2Former
instance recipe (its 3.x head `mask2former_head.py` and `maskformer_fusion_head.py`), because that is what GenEval's
official scorer runs; transformers' own post-processing thresholds before it upsamples. What a judge says is kept in
JSON lines with the judge's name and the hash of what it saw, so an interrupted scoring goes on where it was.

Legend: B batch, Q queries, K classes, h w mask grid, H W image.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

    from .geneval import Detection

T = TypeVar("T")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of bytes
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of [0, 1]


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

    def answer(self, image: Image.Image, question: str) -> str: ...


class Chat(Protocol):
    """A judge that reads messages in OpenAI's form."""

    name: str

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """One attempt. Raises `TryAgain` for what may pass, anything else for what will not."""


class TryAgain(RuntimeError):
    """A timeout, a dropped connection, a server that is busy or broken, an answer that makes no sense."""


# Kept answers -----------------------------------------------------------------------


class Records:
    """JSON lines that can be resumed: one record a key, the last one counts.

    identity: the judge's name, prompt hash and so on, in every record; a file with others is refused, for numbers of
    two judges must not be mixed. A line that an interruption cut off is dropped. keep: the records stay in memory,
    as `entries`; without, their hashes alone.
    """

    def __init__(self, path: Path, key: str, identity: Mapping[str, Any], keep: bool = True):
        self.path, self.key, self.identity, self.keep = path, key, dict(identity), keep
        self.entries: dict[Any, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._load()
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

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
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}:{number}: no record of a judge: {error!r}") from None
        if found != self.identity:
            raise ValueError(
                f"{self.path}:{number} is of another judge: {found} there, {self.identity} now; move the file away"
            )
        self.entries[key] = record if self.keep else {"sha256": sha256}

    def has(self, key: Any, sha256: str) -> bool:
        """Whether there is an answer about exactly this."""
        return key in self.entries and self.entries[key]["sha256"] == sha256

    def add(self, key: Any, sha256: str, values: Mapping[str, Any]) -> None:
        record = {self.key: key, "sha256": sha256} | self.identity | dict(values)
        self.entries[key] = record if self.keep else {"sha256": sha256}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def bar(items: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    return tqdm(items, desc=what, disable=not progress)


# Chat -----------------------------------------------------------------------


@dataclass
class OpenAIChat:
    """Any server with OpenAI's `/chat/completions`: the original, vLLM, llama.cpp, …

    base_url: up to and with `/v1`; None is OpenAI's own. api_key: else OPENAI_API_KEY, else "EMPTY", which local
    servers take. extra: further fields of the request, `chat_template_kwargs` for instance.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = None
    temperature: float = 0.0
    max_tokens: int = 2000
    timeout: float = 300.0  # seconds of one request
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError(
                "a chat judge needs the openai client: pip install 'janusflow-min[bench]'"
            ) from None
        key = self.api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        # Retries are `judge_all`'s: there they count attempts together with answers that make no sense.
        self.client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=0)

    @property
    def name(self) -> str:
        return self.model

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=list(messages),
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                extra_body=dict(self.extra),
            )
        except (openai.APIConnectionError, openai.APIResponseValidationError) as error:  # timeouts included
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise TryAgain(f"HTTP {error.status_code}") from error
            raise RuntimeError(f"the judge refuses, HTTP {error.status_code}: {error.message}") from error
        except ValueError as error:  # a body that is no JSON
            raise TryAgain(f"no JSON: {error}") from error
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TryAgain(f"an answer without a text: {str(reply)[:200]}")
        return text


def image_part(path: str | Path) -> dict[str, Any]:
    """An image file as a part of a user's message: its own bytes as a data URL."""
    kind = "png" if Path(path).suffix.lower() == ".png" else "jpeg"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def strip_thinking(text: str) -> str:
    """Without <think>…</think>, closed or left open at the start."""
    return re.sub(r"(?s)<think>.*?</think>|\A.*?</think>", "", text).strip()


def prompt_hash(*texts: str) -> str:
    """Of a judge's own wording, which moves the numbers."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """Something to judge. sha256: of everything that the judge sees of it."""

    key: Any
    sha256: str
    messages: Callable[[], Sequence[Mapping[str, Any]]]  # made when it is its turn: images are big


def judge_all(
    chat: Chat,
    questions: Sequence[Question],
    parse: Callable[[str], Mapping[str, Any] | None],
    records: Records,
    concurrency: int = 8,
    attempts: int = 3,
    progress: bool = True,
    wait: float = 1.0,
) -> dict[Any, str]:
    """Ask about all that `records` lacks; returns key -> reason for those that stay without an answer.

    parse: the answer's values, None where it makes no sense, which counts as an attempt like a timeout. Between
    attempts it waits `wait`, 2 · wait, 4 · wait … seconds, give or take a half. An item without an answer is left
    out, never given a number; the next run asks again. What no repetition cures, a wrong key for instance, is raised
    and nothing more is asked.
    """
    if concurrency < 1 or attempts < 1:
        raise ValueError(f"concurrency and attempts must be at least 1, got {concurrency} and {attempts}")
    todo = [q for q in questions if not records.has(q.key, q.sha256)]
    failures: dict[Any, str] = {}
    stop = threading.Event()

    def one(question: Question) -> tuple[str, Mapping[str, Any]] | str:
        reason = ""
        for attempt in range(attempts):
            if stop.is_set():
                return "stopped"
            try:
                text = chat.ask(question.messages())
            except TryAgain as error:
                reason = str(error)
            except BaseException:
                stop.set()  # here, not where the result is read: the other threads would go on asking until then
                raise
            else:
                values = parse(text)
                if values is not None:
                    return text, values
                reason = f"makes no sense: {text[:200]!r}"
            if attempt + 1 < attempts:
                stop.wait(wait * 2**attempt * random.uniform(0.5, 1.5))
        return reason

    with ThreadPoolExecutor(concurrency) as pool:
        jobs = {pool.submit(one, question): question for question in todo}
        try:
            for job in bar(as_completed(jobs), "Judging", progress):
                question, result = jobs[job], job.result()
                if isinstance(result, str):
                    failures[question.key] = result
                else:
                    text, values = result
                    records.add(question.key, question.sha256, {"answer": text} | dict(values))
        except BaseException:
            stop.set()
            for job in jobs:
                job.cancel()
            raise
    return failures


# Detector -----------------------------------------------------------------------


class Mask2FormerDetector:
    """A Mask2Former for COCO instances, facebook/mask2former-swin-small-coco-instance for one.

    Labels are mapped by their index, 0 to 79, since names differ between label maps.
    """

    def __init__(
        self, source: str | Path, device: str = "auto", short: int = 800, long: int = 1333, best: int = 100
    ):
        transformers = _transformers()
        self.model, self.device = _place(transformers.Mask2FormerForUniversalSegmentation, source, device)
        self.short, self.long, self.best = short, long, best
        labels = self.model.config.num_labels
        if labels != 80:
            raise ValueError(f"the detector in {source} knows {labels} classes; COCO's 80 are needed")
        self.name = f"Mask2Former {_model_name(source)}, mmdet's recipe at {short}/{long} px"

    def detect(self, image: Image.Image) -> list[Detection]:
        import torch

        from .geneval import CLASSES, Detection

        pixels, size = prepare_for_mmdet(image, self.short, self.long)
        with torch.inference_mode():
            out = self.model(pixel_values=pixels.to(self.device, self.model.dtype))
        scores, labels, boxes, masks = instances(
            out.class_queries_logits[0].float(),
            out.masks_queries_logits[0].float(),
            tuple(pixels.shape[-2:]),
            size,
            (image.height, image.width),
            self.best,
        )
        scores, labels, boxes, masks = (x.cpu().numpy() for x in (scores, labels, boxes, masks))
        return [
            Detection(CLASSES[labels[i]], tuple(float(v) for v in boxes[i]), float(scores[i]), masks[i])
            for i in range(len(scores))
        ]


def prepare_for_mmdet(image: Image.Image, short: int, long: int) -> tuple[Tensor, tuple[int, int]]:
    """An RGB image -> pixels (1, 3, H', W') as mmdet's test pipeline makes them, and (height, width) without padding.

    Scaled, keeping its shape, until its shorter side is `short` or its longer one `long`; bilinear without
    antialiasing; normalised; padded with 0 on the right and below to multiples of 32.
    """
    import torch
    import torch.nn.functional as F

    height, width = image.height, image.width
    scale = min(short / min(height, width), long / max(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (pixels - mean) / std
    return F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32)), size


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
    best: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mmdet's instance post-processing: (Q, K + 1) and (Q, h, w) -> scores (n,), labels (n,), boxes (n, 4), masks
    (n, H, W) bool.

    The best (query, class) pairs by probability, so a query may give several classes. Masks are upsampled as logits,
    padding is cut off, and only then is the threshold 0. score = probability · mean mask probability inside the mask.
    Sizes are (height, width): of the network's input with and without padding, of the image.
    """
    import torch
    import torch.nn.functional as F

    scores = class_logits.softmax(-1)[:, :-1]  # (Q, K), without "nothing"
    classes = scores.shape[1]
    scores, order = scores.flatten().topk(min(best, scores.numel()))
    labels, queries = order % classes, order // classes
    masks = F.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : size[0], : size[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]  # (Q, H, W)
    inside = masks > 0
    certainty = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for i, mask in enumerate(inside):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):  # an empty mask keeps a box of zeros
            boxes[i] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    return scores * certainty[queries], labels, boxes[queries], inside[queries]


# Colours -----------------------------------------------------------------------


class ClipColours:
    """Zero-shot colour names by CLIP, openai/clip-vit-large-patch14 officially."""

    def __init__(self, source: str | Path, device: str = "auto"):
        transformers = _transformers()
        self.model, self.device = _place(transformers.CLIPModel, source, device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.name = f"CLIP {_model_name(source)}"
        self.heads: dict[str, Tensor] = {}

    def colours(self, views: Sequence[Image.Image], label: str) -> list[str]:
        import torch

        from .geneval import COLOURS

        with torch.inference_mode():
            if label not in self.heads:
                self.heads[label] = torch.stack([self._text(colour, label) for colour in COLOURS])  # (10, W)
            side = self.model.config.vision_config.image_size
            pixels = torch.stack([_clip_pixels(view, side) for view in views]).to(
                self.device, self.model.dtype
            )
            features = self.model.visual_projection(
                self.model.vision_model(pixel_values=pixels).pooler_output
            )
            return [COLOURS[i] for i in (_unit(features) @ self.heads[label].T).argmax(-1).tolist()]

    def _text(self, colour: str, label: str) -> Tensor:
        """The normalised mean of the three sentences' normalised embeddings."""
        texts = [f"a photo of a {colour} {label}", f"a photo of a {colour}-colored {label}"]
        texts.append(f"a photo of a {colour} object")
        ids = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        pooled = self.model.text_model(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).pooler_output
        return _unit(_unit(self.model.text_projection(pooled)).mean(0))


def _clip_pixels(image: Image.Image, side: int, square: bool = False) -> Tensor:
    """CLIP's transform -> (3, side, side): shorter side to `side` by bicubic, centre cut; `square` squeezes instead."""
    import torch

    image = image.convert("RGB")
    scale = side / min(image.size)
    size = (side, side) if square else tuple(max(side, int(v * scale)) for v in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((v - side) / 2) for v in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Questions -----------------------------------------------------------------------


class BlipVQA:
    """BLIP for visual questions, Salesforce/blip-vqa-capfilt-large for one; a stand-in for mPLUG."""

    def __init__(self, source: str | Path, device: str = "auto"):
        transformers = _transformers()
        self.model, self.device = _place(transformers.BlipForQuestionAnswering, source, device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.name = f"BLIP {_model_name(source)}"

    def answer(self, image: Image.Image, question: str) -> str:
        import torch

        side = self.model.config.vision_config.image_size
        pixels = _clip_pixels(image, side, square=True)[None].to(self.device, self.model.dtype)
        ids = self.tokenizer(question, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.input_ids,
                pixel_values=pixels,
                attention_mask=ids.attention_mask,
                max_new_tokens=10,
            )
        return self.tokenizer.decode(out[0], skip_special_tokens=True).strip()


class ChatVQA:
    """A chat endpoint that is asked for one word."""

    INSTRUCTION = "Look at the image and answer the question with one word, yes or no.\nQuestion: "

    def __init__(self, chat: Chat, attempts: int = 3, wait: float = 1.0):
        self.chat, self.attempts, self.wait = chat, attempts, wait
        self.name = f"{chat.name}, asked for one word (prompt sha256 {prompt_hash(self.INSTRUCTION)[:16]})"

    def answer(self, image: Image.Image, question: str) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts = [{"type": "text", "text": self.INSTRUCTION + question}]
        parts.append({"type": "image_url", "image_url": {"url": url}})
        for attempt in range(self.attempts):
            try:
                return strip_thinking(self.chat.ask([{"role": "user", "content": parts}]))
            except TryAgain:
                if attempt + 1 == self.attempts:
                    raise
                time.sleep(self.wait * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")


# Models -----------------------------------------------------------------------


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ImportError("this judge needs transformers: pip install 'janusflow-min[bench]'") from None
    return transformers


def _place(kind: Any, source: str | Path, device: str):
    """The model, ready to judge, in fp32, and its device."""
    from ..pipeline import pick_device

    chosen = pick_device(device)
    model = kind.from_pretrained(source).float()
    return model.to(chosen).eval().requires_grad_(False), chosen


def _model_name(source: str | Path) -> str:
    """A hub id, or a folder's name and the hash of its weights."""
    from .runner import sha256

    folder = Path(source).expanduser()
    if not folder.is_dir():
        return str(source)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = prompt_hash(*(sha256(file) for file in weights))
    return f"{folder.resolve().name} (sha256 {digest[:16]})"
