# SPDX-License-Identifier: MIT
"""From rows to mixed batches: samples, padding, and the processes that prepare them.

A row is {"image", "text"} (generation), {"text"}, or a conversation: {"conversation": [messages in the reference's
form]}, {"messages": [OpenAI's]} or {"conversations": [ShareGPT's]}, its images in the messages or beside them.
Sample i of a run has its row and a generator of its own, both functions of the seed and i alone. A bad row is told and
replaced by its source's next good one. Images are prepared as in the paper (section 4.1): what is asked about as the
processor does it (long side, padded), what is generated with its short side to size and cropped to a square.

Legend: B rows of a micro-batch, T tokens, N image tokens, C h w latent, S image side.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checkpoint import open_weights
from ..files import atomic_write
from ..flow import sample_time
from ..model import JanusFlow
from ..pixels import open_image
from ..processor import SYSTEM_PROMPT, ImageProcessor, Processor
from .config import STAGES, Config, LoaderConfig
from .dataset import CONVERSATIONS, BadRow, Mixture, Source, seeded_generator
from .losses import IGNORE, MixedBatch

MAX_BAD = 1000  # rows of a source in a row
ROLES = {"human": "User", "gpt": "Assistant"}  # ShareGPT's names; others as they are


# Rows -----------------------------------------------------------------------


def read_conversation(row: Mapping[str, Any], image_tag: str) -> list[dict[str, Any]]:
    """Messages in the reference's form, from any of the three forms; images beside them go to the first.

    ValueError where there is none. A system message stays, as the first.
    """
    key = next((key for key in CONVERSATIONS if row.get(key) is not None), CONVERSATIONS[0])
    messages = row.get(key)
    if isinstance(messages, bytes | str):
        with contextlib.suppress(ValueError):
            messages = json.loads(messages)
    if isinstance(
        messages, Mapping
    ):  # an object around the list, or the columns of an old `datasets.Sequence`
        inner = next((messages[k] for k in CONVERSATIONS if k in messages), None)
        messages = inner or [
            dict(zip(messages, m, strict=True)) for m in zip(*messages.values(), strict=True)
        ]
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"a conversation must be a list of messages, got {messages!r:.80}")
    found = []
    for message in messages:
        role, content = (
            message.get(a) or message.get(b) for a, b in (("role", "from"), ("content", "value"))
        )
        images = list(message.get("images") or [])
        if isinstance(content, list | tuple):  # OpenAI's parts
            texts = []
            for part in content:
                kind = part.get("type")
                if kind not in ("text", "image", "image_url"):
                    raise ValueError(
                        f"a part of a message must be text, image or image_url, got {part!r:.80}"
                    )
                texts.append(part["text"] if kind == "text" else image_tag + "\n")
                image = part.get(kind) if kind != "text" else None
                image = image.get("url", image) if isinstance(image, Mapping) else image
                images += [] if image is None else [image]
            content = "".join(texts)
        if not isinstance(content, str | None):
            raise ValueError(f"a message's content must be text or parts, got {content!r:.80}")
        found.append({"role": ROLES.get(role, role), "content": content or "", "images": images})
    beside = row.get("images") if row.get("images") is not None else row.get("image")
    if beside is not None and found:
        found[0]["images"] = list(beside) if isinstance(beside, list | tuple) else [beside]
    if any(m["images"] for m in found) and not any(image_tag in m["content"] for m in found):
        found = [m | {"content": m["content"].replace("<image>", image_tag)} for m in found]
    return found


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
        scale = image.width / width, image.height / height
        source = tuple(min(box[k] * scale[k % 2], image.size[k % 2]) for k in range(4))
        return image.resize((side, side), Image.Resampling.BICUBIC, box=source)
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
        atomic_write(self.path(key), content, sync=False)


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
        ids = self._plain(as_text(row.get("text")))
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
        settings, processor, text = self.config.objective, self.processor, row.get("text")
        if isinstance(text, list | tuple) and text:  # several captions, one of which is drawn
            text = text[
                int(torch.randint(len(text), (1,), generator=generator, device="cpu")) if len(text) > 1 else 0
            ]
        if settings.prompt_form == "chat":
            prompt = processor.generation_prompt(as_text(text))[0][:-1]  # t_emb takes the tag's place
        else:
            prompt = self._plain(as_text(text))
        side, fixed = processor.image_processor.image_size, self.config.loader.crop == "fixed"
        image = square(read_image(row.get("image"), folder), side, None if fixed else generator)
        if (
            self.config.loader.random_flip
            and torch.rand(1, generator=generator, dtype=torch.float32, device="cpu") < 0.5
        ):
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


def as_text(value: Any) -> Any:
    return value.decode("utf-8-sig") if isinstance(value, bytes) else value


def as_tensor(image: Image.Image) -> Tensor:
    """(3, S, S) uint8"""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


# Micro-batches -----------------------------------------------------------------------


def bucket(samples: Sequence[Sample], most: int, max_padding: float = 0.1) -> list[list[Sample]]:
    """Samples of similar length together, at most `most`, so that no group has a larger share of padding."""
    groups: list[list[Sample]] = []
    tokens = 0
    for sample in sorted(samples, key=lambda s: -len(s.ids)):  # stable: equal lengths keep their order
        if groups and len(groups[-1]) < most:
            area = (len(groups[-1]) + 1) * len(groups[-1][0].ids)
            if area - tokens - len(sample.ids) <= max_padding * area:
                groups[-1].append(sample)
                tokens += len(sample.ids)
                continue
        groups.append([sample])
        tokens = len(sample.ids)
    return groups


def collate(samples: Sequence[Sample], processor: Processor) -> MixedBatch:
    """Samples as one right-padded batch, images still uint8: see `unpack`."""
    tokenizer, count = processor.tokenizer, processor.num_image_tokens
    length = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), length), tokenizer.pad_id, dtype=torch.int64, device="cpu")  # (B, T)
    positions = torch.zeros(len(samples), length, dtype=torch.int64, device="cpu")
    gen_places = torch.zeros(len(samples), length, dtype=torch.bool, device="cpu")
    index, labels, weights, gen_index = [], [], [], []
    for row, s in enumerate(samples):
        ids[row, : len(s.ids)] = torch.tensor(s.ids, device="cpu")
        positions[row, : len(s.ids)] = torch.tensor(s.positions, device="cpu")
        here = [k for k, label in enumerate(s.labels) if label != IGNORE]
        index += [row * length + k - 1 for k in here]  # the token before says the next
        labels += [s.labels[k] for k in here]
        weights += [1 / max(1, len(here))] * len(here)
        if s.kind == "generation":
            gen_places[row, s.start : s.start + 1 + count] = True
            first = row * length + s.start + 1
            gen_index += range(first, first + count)
    batch: dict[str, Any] = {}
    if labels:
        batch |= dict(
            label_index=torch.tensor(index, device="cpu"), labels=torch.tensor(labels, device="cpu")
        )
        batch["label_weight"] = torch.tensor(weights, dtype=torch.float32, device="cpu")
    if images := [image for s in samples for image in s.und_images]:
        places = (ids == tokenizer.image_id) | (ids == tokenizer.image_start_id)
        batch |= dict(und_pixels=torch.stack(images), und_places=places & ~gen_places)
    generated = [s for s in samples if s.kind == "generation"]
    if generated:
        batch |= dict(gen_places=gen_places, gen_index=torch.tensor(gen_index, device="cpu"))
        batch |= dict(t=torch.cat([s.t for s in generated]), noise=torch.stack([s.noise for s in generated]))
        for name in ("latents", "features"):
            if all(name in s.cached for s in generated):
                batch[name] = torch.stack([s.cached[name] for s in generated])
        if "latents" not in batch or "features" not in batch:
            batch["images"] = torch.stack([s.image for s in generated])
    return MixedBatch(ids, positions, **batch)


def unpack(batch: MixedBatch, image_processor: ImageProcessor) -> MixedBatch:
    """The batch with its uint8 images in the two forms that the VAE and SigLIP take, on its device.

    By table, one value for each of a channel's 256 levels: the same bits as on the CPU, whatever device divides.
    """
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)  # (256, 3)
    siglip, vae = image_processor.normalize(levels), levels.astype(np.float32) / 127.5 - 1

    def look_up(images: Tensor, table: np.ndarray) -> Tensor:
        values = torch.from_numpy(table).to(images.device)
        return torch.stack([values[:, c][images[:, c].int()] for c in range(3)], dim=1)  # (K, 3, S, S)

    new: dict[str, Tensor] = {}
    if batch.und_pixels is not None:
        new["und_pixels"] = look_up(batch.und_pixels, siglip)
    if batch.images is not None and batch.latents is None:
        new["pictures"] = look_up(batch.images, vae)
    if batch.images is not None and batch.features is None:
        new["pixels"] = look_up(batch.images, siglip)
    return replace(batch, images=None, **new)


# Steps -----------------------------------------------------------------------


@dataclass(eq=False)
class StepBatches:
    """What one rank computes in one step."""

    step: int
    batches: list[MixedBatch]
    keys: list[list[str]]  # of the cache, for each batch's images
    samples: int
    tokens: int  # padding not counted
    padded_tokens: int
    bad: list[BadRow]
    error: Exception | None = None  # why there is nothing else here

    def pin_memory(self) -> StepBatches:  # the data loader calls it
        self.batches = [batch.pin_memory() for batch in self.batches]
        return self


class StepDataset(Dataset):
    """step -> `StepBatches` of this rank: every `world`-th sample of the step's."""

    def __init__(
        self, config: Config, sources: Sequence[Source], builder: SampleBuilder, rank: int = 0, world: int = 1
    ):
        early = STAGES[config.stage].early_steps * config.batch
        self.mixture = Mixture(config.ratios(), config.ratios(early=True), early)
        self.config, self.sources, self.builder = config, sources, builder
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> StepBatches:
        """ValueError where there is no good row."""
        batch, bad = self.config.batch, []
        numbers = range(step * batch + self.rank, (step + 1) * batch, self.world)
        return self.pack(step, [self.sample(number, bad) for number in numbers], bad)

    def pack(self, step: int, samples: Sequence[Sample], bad: list[BadRow]) -> StepBatches:
        groups = bucket(samples, self.config.micro_batch, self.config.loader.max_padding)
        batches = [collate(group, self.builder.processor) for group in groups]
        keys = [[s.key for s in group if s.kind == "generation"] for group in groups]
        tokens, padded = sum(len(s.ids) for s in samples), sum(b.input_ids.numel() for b in batches)
        return StepBatches(step, batches, keys, len(samples), tokens, padded, bad)

    def sample(self, number: int, bad: list[BadRow]) -> Sample:
        """The run's sample of that number; rows that cannot be used are added to `bad`."""
        index, position = self.mixture(number)
        source, stop = self.sources[index], self.config.loader.on_bad_row == "stop"
        for further in range(MAX_BAD):
            row = source(position + further, keep=position)
            try:
                if isinstance(row.values, Exception):
                    raise row.values
                generator = seeded_generator(self.config.seed, "sample", number)
                dropout = self.config.objective.prompt_dropout
                return self.builder(row.values, source.config.kind, generator, dropout, row.folder)
            except MemoryError:
                raise
            except Exception as error:  # whatever lies in the data
                bad.append(BadRow(row.source, row.line, f"{type(error).__name__}: {error}"))
                if stop:
                    raise ValueError(f"a bad row: {bad[-1]}") from error
        raise ValueError(f"{MAX_BAD:,} bad rows in a row, the last: {bad[-1]}")


class _Worker(Dataset):
    """The data set as a worker has it: an error is handed over as it is, not as a glued traceback."""

    def __init__(self, dataset: StepDataset):
        self.dataset = dataset

    def __getitem__(self, step: int) -> StepBatches:
        try:
            return self.dataset[step]
        except Exception as error:
            return StepBatches(step, [], [], 0, 0, 0, [], error)


def load_steps(dataset: StepDataset, first: int, pin_memory: bool = False) -> Iterator[StepBatches]:
    """The steps from `first` to the run's end, prepared by as many processes as the configuration says.

    Workers are spawned, for a fork of a process that computed may hang; they send bytes through pipes (see
    `MixedBatch.__reduce__`) and do not hear Ctrl-C, which the trainer acts on. Raises what `dataset[step]` raises;
    RuntimeError where a worker dies or is too slow: see `explain_loader_error`.
    """
    settings, options = dataset.config.loader, {}
    if settings.workers:
        options = dict(multiprocessing_context="spawn", prefetch_factor=2, timeout=settings.timeout)
    steps = range(first, dataset.config.steps)
    options |= dict(num_workers=settings.workers, pin_memory=pin_memory)
    loader = DataLoader(_Worker(dataset), batch_size=None, sampler=steps, **options)
    if settings.workers and hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # it would let Ctrl-C through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            prepared = iter(loader)  # its processes inherit the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        prepared = iter(loader)
    for data in prepared:
        if data.error is not None:
            raise data.error
        yield data


def explain_loader_error(error: RuntimeError, settings: LoaderConfig) -> str:
    """What a RuntimeError of the data loader means, which reaches the main process wherever it happens to be."""
    if "timed out" in str(error):
        return f"no data came within loader.timeout = {settings.timeout} s; a slow stream needs a longer one"
    return f"a data worker died ({error}); often there is too little memory: try fewer loader.workers"
