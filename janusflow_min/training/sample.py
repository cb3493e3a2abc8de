# SPDX-License-Identifier: MIT
"""From a row to a sample: conversations, captions, images, and what is drawn at random.

A row is {"image", "text"} (generation), {"text"}, or a conversation: {"conversation": [messages in the reference's
form]}, {"messages": [OpenAI's]} or {"conversations": [ShareGPT's]}, its images in the messages or beside them.
Images are prepared as in the paper (section 4.1): what is asked about as the processor does it (long side, padded),
what is generated with its short side to size and cropped to a square.

Legend: C h w latent, S image side.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..files import atomic_write
from ..flow import sample_time
from ..model import JanusFlow
from ..pixels import open_image
from ..processor import SYSTEM_PROMPT, Processor
from ..weights import open_weights
from .config import Config
from .losses import IGNORE
from .rows import CONVERSATIONS

ROLES = {"human": "User", "gpt": "Assistant"}  # ShareGPT's names; others as they are


# Rows -----------------------------------------------------------------------


def read_conversation(row: Mapping[str, Any], image_tag: str) -> list[dict[str, Any]]:
    """Messages in the reference's form, from any of the three forms; images beside them go to the first.

    ValueError where there is none. A system message stays, as the first.
    """
    messages = next((row[key] for key in CONVERSATIONS if row.get(key) is not None), None)
    if isinstance(messages, bytes | str):
        with contextlib.suppress(ValueError):
            messages = json.loads(messages)
    if isinstance(messages, Mapping):
        inner = next((messages[key] for key in CONVERSATIONS if messages.get(key) is not None), None)
        if inner is None and all(isinstance(values, list) for values in messages.values()):
            # Lists by key are what an old `datasets.Sequence` makes of messages.
            inner = [
                dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)
            ]
        messages = inner
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"a conversation must be a list of messages, got {messages!r:.80}")
    found = [read_message(message, image_tag) for message in messages]
    beside = row.get("images") if row.get("images") is not None else row.get("image")
    if beside is not None and found:
        found[0]["images"] = list(beside) if isinstance(beside, list | tuple) else [beside]
    if any(m["images"] for m in found) and not any(image_tag in m["content"] for m in found):
        found = [m | {"content": m["content"].replace("<image>", image_tag)} for m in found]
    return found


def read_message(message: Mapping[str, Any], image_tag: str) -> dict[str, Any]:
    role = message.get("role") or message.get("from")
    content = message.get("content") or message.get("value") or ""
    images = list(message.get("images") or [])
    if isinstance(content, list | tuple):  # OpenAI's parts
        text = ""
        for part in content:
            kind = part.get("type")
            if kind not in ("text", "image", "image_url"):
                raise ValueError(f"a part of a message must be text, image or image_url, got {part!r:.80}")
            text += part["text"] if kind == "text" else image_tag + "\n"
            image = part.get(kind) if kind != "text" else None
            image = image.get("url", image) if isinstance(image, Mapping) else image
            images += [] if image is None else [image]  # one beside the conversation otherwise
        content = text
    if not isinstance(content, str):
        raise ValueError(f"a message's content must be text or parts, got {content!r:.80}")
    return {"role": ROLES.get(str(role).lower(), role), "content": content, "images": images}


def conversation_example(
    processor: Processor, messages: Sequence[Mapping[str, Any]], system_prompt: str = SYSTEM_PROMPT
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, images expanded, and labels of the same length.

    Labels are the ids of each answer and of the EOS behind it, and `IGNORE` elsewhere (the paper trains on the
    response alone).
    """
    text = processor.template(messages, system_prompt)
    spans, start = [], 0  # character spans of the answers, EOS included
    eos = processor.tokenizer.eos_token
    for message in messages:
        if message["role"].lower() == "assistant" and message["content"].strip():
            answer = "Assistant: " + message["content"].strip() + eos
            begin = text.index(answer, start) + len("Assistant:")
            start = begin + len(answer) - len("Assistant:")
            spans.append((begin, start))
    ids, labels = [], []
    tokenizer = processor.tokenizer
    for token, (first, last) in tokenizer.encode_with_offsets(text):
        if token == tokenizer.image_id:
            expanded = processor.image_ids()
            ids += expanded
            labels += [IGNORE] * len(expanded)
            continue
        ids.append(token)
        inside = last > first and any(begin <= first and last <= end for begin, end in spans)
        labels.append(token if inside else IGNORE)
    return ids, labels


def read_image(image: Any, folder: Path | None = None) -> Image.Image:
    """Upright and RGB, from a path, a data URL, bytes, a PIL image, or what `datasets` hands out undecoded."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image.startswith("data:"):
        image = base64.b64decode(image.partition(",")[2])
    elif isinstance(image, str):
        if "://" in image:
            raise ValueError(f"an image must be here already; nothing is downloaded: {image:.80}")
        image = (folder or Path()) / Path(image).expanduser()
    return open_image(image, upright=True, background="white")


def square(image: Image.Image, side: int, generator: torch.Generator | None) -> Image.Image:
    """Short side to `side` px, then a square: at a random place, or the middle where there is no generator."""
    shortest = min(image.size)
    width, height = (max(side, round(length * side / shortest)) for length in image.size)
    room = width - side, height - side
    if generator is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(r + 1, (1,), generator=generator, device="cpu")) for r in room)
    box = left, top, left + side, top + side
    if max(width, height) > 8 * side:  # a long strip may be too large as a whole
        x, y = image.width / width, image.height / height
        right, bottom = min((left + side) * x, image.width), min((top + side) * y, image.height)
        return image.resize((side, side), Image.Resampling.BICUBIC, box=(left * x, top * y, right, bottom))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop(box)


# Samples -----------------------------------------------------------------------


@dataclass(eq=False)
class Sample:
    """One row's tokens, and what its images and its loss need."""

    kind: str
    ids: list[int]
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    und_images: list[Tensor] = field(default_factory=list)  # (3, S, S) uint8 each, asked about
    start: int = 0  # of t_emb
    image: Tensor | None = None  # (3, S, S) uint8, to be generated
    t: Tensor | None = None  # (1,)
    noise: Tensor | None = None  # (C, h, w)
    cached: dict[str, Tensor] = field(default_factory=dict)  # latents, features
    key: str = ""  # of the cache


class Cache:
    """Latents and features by the content of the image and the weights that made them: one small file each.

    A changed image, size or encoder has another key, so nothing stale is ever found. Files are renamed into place;
    one that cannot be read is made again.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder, self.fingerprint = Path(folder), fingerprint

    def key(self, image: Image.Image) -> str:
        text = f"1 {self.fingerprint} {image.size} ".encode()
        return hashlib.sha256(text + image.tobytes()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor]:
        try:
            with open_weights(self.path(key)) as f:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        except (ValueError, OSError):
            return {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        content = save({k: v.contiguous().cpu() for k, v in tensors.items()})
        try:
            atomic_write(self.path(key), content, sync=False)
        except OSError as error:
            reason = f"{self.folder} (loader.cache) cannot be written: {error.strerror or error}"
            raise OSError(f"{reason}; is the disk full? Without a cache the run can go on") from error


def checksum(*modules: nn.Module) -> str:
    """Of weights, for `Cache`: another encoder makes other latents."""
    value = 0
    for module in modules:
        for p in module.parameters():
            value = zlib.crc32(p.detach().float().cpu().numpy().tobytes(), value)
    return f"{value:08x}"


class SampleBuilder:
    """Rows to samples, all randomness from the generator that is handed in."""

    def __init__(self, config: Config, processor: Processor, model: JanusFlow, cache: Cache | None = None):
        self.config, self.processor, self.cache = config, processor, cache
        self.latent_shape, self.num_image_tokens = model.latent_shape, model.num_image_tokens
        self.limit = min(config.loader.max_tokens, model.config.llm.max_position_embeddings)

    def __call__(
        self,
        row: Mapping[str, Any],
        kind: str,
        generator: torch.Generator,
        prompt_dropout: float,
        folder: Path | None = None,
    ) -> Sample:
        """folder: where relative paths count from. ValueError or OSError says what is wrong with the row."""
        if kind == "generation":
            sample = self.generation(row, generator, prompt_dropout, folder)
        else:
            sample = self.understanding(row, folder) if kind == "understanding" else self.text(row)
        sample.positions = sample.positions or list(range(len(sample.ids)))
        if sample.positions[-1] >= self.limit:
            raise ValueError(f"too long: {sample.positions[-1] + 1} tokens, {self.limit} are allowed")
        return sample

    def text(self, row: Mapping[str, Any]) -> Sample:
        ids = self._plain(as_text(value_of(row, "text")))
        ids.append(self.processor.tokenizer.eos_id)
        return Sample("text", ids, labels=[IGNORE, *ids[1:]])

    def understanding(self, row: Mapping[str, Any], folder: Path | None) -> Sample:
        processor, system_prompt = self.processor, SYSTEM_PROMPT
        messages = read_conversation(row, processor.tokenizer.image_tag)
        if messages and str(messages[0]["role"]).lower() == "system":
            system_prompt = messages[0]["content"].strip()
            messages[1:2] = [m | {"images": messages[0]["images"] + m["images"]} for m in messages[1:2]]
            messages = messages[1:]
        ids, labels = conversation_example(processor, messages, system_prompt)
        answers = [m["content"].strip() for m in messages if m["role"].lower() == "assistant"]
        if not answers or not all(answers):
            raise ValueError("empty answer" if answers else "no answer")
        images = [image for message in messages for image in message["images"]]
        places = ids.count(processor.tokenizer.image_id) // self.num_image_tokens
        if places != len(images):
            raise ValueError(f"{places} image placeholders, but {len(images)} images")
        squares = [processor.image_processor.pad(read_image(image, folder)) for image in images]
        return Sample("understanding", ids, labels=labels, und_images=[as_tensor(image) for image in squares])

    def generation(
        self, row: Mapping[str, Any], generator: torch.Generator, prompt_dropout: float, folder: Path | None
    ) -> Sample:
        settings, processor, text = self.config.objective, self.processor, value_of(row, "text")
        if isinstance(text, list | tuple) and text:  # captions, of which one is drawn
            several = len(text) > 1  # a single one leaves the generator alone
            text = text[
                int(torch.randint(len(text), (1,), generator=generator, device="cpu")) if several else 0
            ]
        if settings.prompt_form == "chat":
            prompt = processor.generation_prompt(as_text(text))[0][:-1]  # t_emb takes the tag's place
        else:
            prompt = self._plain(as_text(text))
        side, fixed = processor.image_processor.image_size, self.config.loader.crop == "fixed"
        image = square(read_image(value_of(row, "image"), folder), side, None if fixed else generator)
        if self.config.loader.random_flip and torch.randint(2, (1,), generator=generator, device="cpu"):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        t = sample_time(1, settings.logit_mean, settings.logit_std, generator)
        hidden = bool(torch.rand(1, generator=generator, dtype=torch.float32, device="cpu") < prompt_dropout)
        noise = torch.randn(self.latent_shape, generator=generator, dtype=torch.float32, device="cpu")
        image_tokens = 1 + self.num_image_tokens
        positions = list(range(len(prompt) + image_tokens))
        if hidden:
            positions, prompt = [0, *positions[len(prompt) :]], prompt[:1]
        ids = prompt + [processor.tokenizer.pad_id] * image_tokens
        sample = Sample("generation", ids, positions, start=len(prompt), t=t, noise=noise)
        if self.cache is not None:
            sample.key = self.cache.key(image)
            sample.cached = self.cache.get(sample.key)
        sample.image = as_tensor(image)
        return sample

    def _plain(self, text: Any) -> list[int]:
        tokenizer = self.processor.tokenizer
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must be a string that is not empty, got {text!r:.80}")
        tokenizer.reject_special_tokens(text)
        ids = tokenizer.encode(text.strip())
        return ids if ids[0] == tokenizer.bos_id else [tokenizer.bos_id, *ids]


def value_of(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        has = ", ".join(str(name) for name, value in row.items() if value is not None)
        raise ValueError(f"there is no {key}, but {has or 'nothing'}; say with columns which it is")
    return row[key]


def as_text(value: Any) -> Any:
    return value.decode("utf-8-sig") if isinstance(value, bytes) else value


def as_tensor(image: Image.Image) -> Tensor:
    """(3, S, S) uint8"""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
