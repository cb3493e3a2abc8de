# SPDX-License-Identifier: MIT
"""From rows on disk to mixed batches: sources, samples, micro-batches.

A row is a generation pair {"image", "text"}, a conversation {"conversation": [messages in the reference's form]} or
plain {"text"}. Slot i of a run has its source, its row and a generator of its own, all functions of the seed and i
alone: neither the number of GPUs nor a restart changes what step s learns from. A bad row is told and its slot takes
the source's next good one. Image preparation as in the paper (section 4.1): what is asked about as the processor
does it (long side, padded); what is painted: short side to size, a square crop.

Legend: B rows of a micro-batch, T tokens, N image tokens, C h w latent, S image side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import open_weights
from ..files import atomic_write
from ..flow import sample_time
from ..model import JanusFlow
from ..pixels import open_image, to_pixels
from ..processor import SYSTEM_PROMPT, Processor
from .config import Config, SourceConfig
from .losses import IGNORE, MixedBatch


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


def generator(*key: Any) -> torch.Generator:
    """A CPU generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# Sources -----------------------------------------------------------------------


@dataclass(frozen=True)
class BadRow:
    source: str
    line: int  # counted from 1
    reason: str


class Manifest:
    """The rows of one kind (None: of any) of a JSON-lines file; only the places of its lines are kept in memory."""

    def __init__(self, path: str | Path, kind: str | None = None):
        self.path, self.bad = Path(path), []
        if not self.path.is_file():
            raise FileNotFoundError(f"no manifest at {path}")
        lines, offset = [], 0
        with self.path.open("rb") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    try:
                        found = kind_of(json.loads(line))
                        if kind in (None, found):
                            lines.append((number, offset))
                    except ValueError as error:
                        self.bad.append(BadRow(str(self.path), number, str(error)))
                offset += len(line)
        self.lines = np.array(lines, dtype=np.int64).reshape(-1, 2)  # (rows, line number and byte)
        if not lines:
            raise ValueError(f"{path} holds no good row of kind {kind}; bad ones: {len(self.bad)}")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        """(line number, row), paths of images made to count from the manifest's folder."""
        number, offset = (int(x) for x in self.lines[index])
        with self.path.open("rb") as f:
            f.seek(offset)
            row = json.loads(f.readline())

        def place(image: Any) -> Any:
            return str(self.path.parent / image) if isinstance(image, str) else image

        if "image" in row:
            row["image"] = place(row["image"])
        for message in row["conversation"] if isinstance(row.get("conversation"), list) else []:
            if isinstance(message, dict) and isinstance(message.get("images"), list):
                message["images"] = [place(image) for image in message["images"]]
        return number, row


def kind_of(row: Any) -> str:
    """The kind of a manifest's row. ValueError where it is none."""
    if isinstance(row, dict):
        for key, kind in (("conversation", "understanding"), ("image", "generation"), ("text", "text")):
            if key in row:
                return kind
    raise ValueError(f"a row is an object with image and text, conversation, or text; got {row!s:.80}")


class Source:
    """Rows in the order that a run takes them: position p of any epoch, drawn without replacement from the seed."""

    def __init__(self, config: SourceConfig, seed: int, name: str):
        self.config, self.seed, self.name = config, seed, config.manifest or config.dataset
        self.key, self.rows = name, None
        if config.manifest:
            self.rows = Manifest(config.manifest, config.kind)
        else:
            self.rows = open_dataset(config)
        self.bad = list(getattr(self.rows, "bad", []))
        self._epoch, self._order = -1, None
        self._stream, self._next, self._ahead = None, 0, OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # iterators stay behind; a worker starts its own
        return self.__dict__ | {"_stream": None, "_next": 0, "_ahead": OrderedDict()}

    def __call__(self, position: int) -> tuple[int, dict[str, Any]]:
        """(line, row) at a position, 0 and up without end."""
        if self.config.streaming:
            return self._streamed(position)
        epoch, index = divmod(position, len(self.rows))
        if self.config.shuffle:
            if epoch != self._epoch:
                order = torch.randperm(len(self.rows), generator=generator(self.seed, self.key, epoch))
                self._epoch, self._order = epoch, order
            index = int(self._order[index])
        if self.config.manifest:
            return self.rows[index]
        return index + 1, self._named(self.rows[index])

    def _streamed(self, position: int) -> tuple[int, dict[str, Any]]:
        """Reads on to the position; rows passed over are not decoded. The last 4096 rows read stay at hand."""
        if position not in self._ahead and position < self._next:
            self._stream, self._next, self._ahead = None, 0, OrderedDict()
        if self._stream is None:
            self._stream = self._endless()
        while position not in self._ahead:
            self._ahead[self._next] = next(self._stream)
            self._next += 1
            if len(self._ahead) > 4096:
                self._ahead.popitem(last=False)
        return position + 1, self._named(self._ahead[position])

    def _endless(self):
        epoch = 0
        while True:
            rows = self.rows
            if self.config.shuffle:
                rows = rows.shuffle(seed=self.seed + epoch, buffer_size=1000)
            count = 0
            for row in rows:
                count += 1
                yield row
            if not count:
                raise ValueError(f"the dataset {self.name} is empty")
            epoch += 1

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Our names of the columns, text and JSON out of bytes."""
        new = {ours: row.get(theirs) for ours, theirs in self.config.columns.items()}
        row = {k: v for k, v in row.items() if k not in self.config.columns.values()} | new
        for key in ("text", "conversation"):
            if isinstance(row.get(key), bytes):
                row[key] = row[key].decode("utf-8")
        if isinstance(row.get("conversation"), str):
            row["conversation"] = json.loads(row["conversation"])
        return row


def open_dataset(config: SourceConfig) -> Any:
    """A Hugging Face dataset whose images stay encoded until they are needed."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "a source with `dataset` needs the package datasets: pip install 'janusflow-min[train]'"
        ) from None
    if (Path(config.dataset) / "dataset_info.json").is_file() or (
        Path(config.dataset) / "state.json"
    ).is_file():
        rows = datasets.load_from_disk(config.dataset)
        rows = rows.to_iterable_dataset() if config.streaming else rows
    else:
        files = list(config.files) or None
        rows = datasets.load_dataset(
            config.dataset, data_files=files, split=config.split, streaming=config.streaming
        )
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


class Mixture:
    """Which source slot i takes from, and which of that source's rows: a closed form, so any step can be the first.

    Sources take turns as evenly as their ratios allow. `early` ratios hold for the first `early_slots`.
    """

    def __init__(self, ratios: Sequence[float], early: Sequence[float] = (), early_slots: int = 0):
        self.late, self.early, self.early_slots = whole(ratios), whole(early or ratios), early_slots

    def __call__(self, slot: int) -> tuple[int, int]:
        """Slot -> (source, position in it)."""
        if slot < self.early_slots:
            return self._place(slot, self.early)
        source, position = self._place(slot - self.early_slots, self.late)
        return source, position + self._count(self.early_slots, self.early, source)

    @staticmethod
    def _place(slot: int, weights: list[int]) -> tuple[int, int]:
        left = sum(weights)
        for source, weight in enumerate(weights):
            taken, after = ((2 * i * weight + left) // (2 * left) for i in (slot, slot + 1))
            if after > taken:
                return source, taken
            slot, left = slot - taken, left - weight
        raise AssertionError("unreachable")

    @staticmethod
    def _count(slots: int, weights: list[int], source: int) -> int:
        """How many of the first slots go to a source."""
        left = sum(weights)
        for weight in weights[:source]:
            slots, left = slots - (2 * slots * weight + left) // (2 * left), left - weight
        weight = weights[source]
        return (2 * slots * weight + left) // (2 * left) if weight else 0


def whole(ratios: Sequence[float]) -> list[int]:
    """Whole numbers in the same ratios."""
    parts = [Fraction(ratio).limit_denominator(10**6) for ratio in ratios]
    if not sum(parts) > 0:
        raise ValueError("the stage's mix has no share for any of the sources; give them a ratio")
    common = math.lcm(*(part.denominator for part in parts))
    return [int(part * common) for part in parts]


# Samples -----------------------------------------------------------------------


@dataclass(eq=False)
class Sample:
    """One row's tokens, and what its images and its loss need."""

    kind: str
    ids: list[int]
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # (3, S, S) each, asked about
    start: int = 0  # of t_emb
    picture: Tensor | None = None  # (3, S, S) in [-1, 1]
    pixels: Tensor | None = None  # (3, S, S) as SigLIP wants it
    t: Tensor | None = None  # (1,)
    noise: Tensor | None = None  # (C, h, w)
    cached: dict[str, Tensor] = field(default_factory=dict)  # latents, features
    key: str = ""  # of the cache


class Cache:
    """Latents and features by the content of the picture and the weights that made them: one small file each.

    A changed picture, size or encoder has another key, so nothing stale is ever found. Files are renamed into place;
    one that cannot be read is made again.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder, self.fingerprint = Path(folder), fingerprint

    def key(self, picture: Image.Image) -> str:
        text = f"1 {self.fingerprint} {picture.size} ".encode()
        return hashlib.sha256(text + picture.tobytes()).hexdigest()

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


class Reader:
    """Rows to samples, all randomness from the generator that is handed in."""

    def __init__(self, config: Config, processor: Processor, model: JanusFlow, cache: Cache | None = None):
        self.config, self.processor, self.cache = config, processor, cache
        self.latent_shape, self.num_image_tokens = model.latent_shape, model.num_image_tokens
        self.limit = min(config.loader.max_tokens, model.config.llm.max_position_embeddings)

    def __call__(self, row: Mapping[str, Any], kind: str, dice: torch.Generator, drop: float) -> Sample:
        """Raises ValueError or OSError, which say what is wrong with the row."""
        made = getattr(self, kind)(row, dice, drop)
        made.positions = made.positions or list(range(len(made.ids)))
        if made.positions[-1] >= self.limit:
            raise ValueError(f"too long: {made.positions[-1] + 1} tokens, {self.limit} are allowed")
        return made

    def text(self, row: Mapping[str, Any], dice: torch.Generator, drop: float) -> Sample:
        ids = self._plain(row.get("text"))
        ids.append(self.processor.tokenizer.eos_id)
        return Sample("text", ids, labels=[IGNORE, *ids[1:]])

    def understanding(self, row: Mapping[str, Any], dice: torch.Generator, drop: float) -> Sample:
        messages, processor = row.get("conversation"), self.processor
        processor.template(messages)  # for its errors
        messages = [dict(message) for message in messages]
        if row.get("images"):  # beside the conversation, as datasets have it
            messages[0]["images"] = list(row["images"])
        ids, labels = conversation_example(processor, messages)
        answers = [m["content"].strip() for m in messages if m["role"].lower() == "assistant"]
        if not answers or not all(answers):
            raise ValueError("empty answer" if answers else "no answer")
        images = [image for message in messages for image in message.get("images") or []]
        places = ids.count(processor.tokenizer.image_id) // self.num_image_tokens
        if places != len(images):
            raise ValueError(f"{places} image placeholders, but {len(images)} images")
        pixels = [processor.image_processor(decode(image)) for image in images]
        return Sample("understanding", ids, labels=labels, images=pixels)

    def generation(self, row: Mapping[str, Any], dice: torch.Generator, drop: float) -> Sample:
        settings, processor = self.config.objective, self.processor
        if settings.prompt_form == "chat":
            prompt = processor.generation_prompt(row.get("text"))[0][:-1]  # t_emb takes the tag's place
        else:
            prompt = self._plain(row.get("text"))
        side, fixed = processor.image_processor.image_size, self.config.loader.crop == "fixed"
        picture = square(decode(row.get("image")), side, None if fixed else dice)
        t = sample_time(1, settings.logit_mean, settings.logit_std, dice)
        hidden = bool(torch.rand(1, generator=dice) < drop)
        noise = torch.randn(self.latent_shape, generator=dice)
        image_tokens = 1 + self.num_image_tokens
        positions = list(range(len(prompt) + image_tokens))
        if hidden:
            positions, prompt = [0, *positions[len(prompt) :]], prompt[:1]
        ids = prompt + [processor.tokenizer.pad_id] * image_tokens
        made = Sample("generation", ids, positions, start=len(prompt), t=t, noise=noise)
        if self.cache is not None:
            made.key = self.cache.key(picture)
            made.cached = self.cache.get(made.key)
        made.picture = to_pixels(picture)
        made.pixels = processor.image_processor(picture)
        return made

    def _plain(self, text: Any) -> list[int]:
        tokenizer = self.processor.tokenizer
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must be a string that is not empty, got {text!r:.80}")
        tokenizer.reject_special_tokens(text)
        ids = tokenizer.encode(text.strip())
        return ids if ids[0] == tokenizer.bos_id else [tokenizer.bos_id, *ids]


def decode(image: Any) -> Image.Image:
    """A path, a PIL image, bytes, or what `datasets` hands out undecoded -> RGB."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    return open_image(image)


def square(image: Image.Image, side: int, dice: torch.Generator | None) -> Image.Image:
    """Short side to `side` px, then a square: at a random place, or the middle where there is no generator."""
    shortest = min(image.size)
    width, height = (max(side, round(length * side / shortest)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    room = width - side, height - side
    if dice is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(r + 1, (1,), generator=dice)) for r in room)
    return image.crop((left, top, left + side, top + side))


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
    """Samples as one right-padded batch."""
    tokenizer, count = processor.tokenizer, processor.num_image_tokens
    length = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), length), tokenizer.pad_id)  # (B, T)
    positions = torch.zeros(len(samples), length, dtype=torch.int64)
    gen_places = torch.zeros(len(samples), length, dtype=torch.bool)
    index, labels, weights, gen_index = [], [], [], []
    for row, s in enumerate(samples):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        positions[row, : len(s.ids)] = torch.tensor(s.positions)
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
        batch |= dict(label_index=torch.tensor(index), labels=torch.tensor(labels))
        batch["label_weight"] = torch.tensor(weights)
    if images := [image for s in samples for image in s.images]:
        places = (ids == tokenizer.image_id) | (ids == tokenizer.image_start_id)
        batch |= dict(und_pixels=torch.stack(images), und_places=places & ~gen_places)
    painted = [s for s in samples if s.kind == "generation"]
    if painted:
        batch |= dict(gen_places=gen_places, gen_index=torch.tensor(gen_index))
        batch |= dict(t=torch.cat([s.t for s in painted]), noise=torch.stack([s.noise for s in painted]))
        for name in ("latents", "features"):
            if all(name in s.cached for s in painted):
                batch[name] = torch.stack([s.cached[name] for s in painted])
        if "latents" not in batch:
            batch["pictures"] = torch.stack([s.picture for s in painted])
        if "features" not in batch:
            batch["pixels"] = torch.stack([s.pixels for s in painted])
    return MixedBatch(ids, positions, **batch)


@dataclass(eq=False)
class StepData:
    """What one rank computes in one step."""

    step: int
    batches: list[MixedBatch]
    keys: list[list[str]]  # of the cache, for each batch's pictures
    samples: int
    tokens: int  # padding not counted
    places: int  # padding counted
    bad: list[BadRow]

    def pin_memory(self) -> StepData:  # the data loader calls it
        self.batches = [batch.pin_memory() for batch in self.batches]
        return self


class Steps(torch.utils.data.Dataset):
    """step -> `StepData` of this rank: every `world`-th slot of the step's."""

    def __init__(
        self, config: Config, sources: Sequence[Source], reader: Reader, rank: int = 0, world: int = 1
    ):
        from .config import STAGES

        early = STAGES[config.stage].early_steps * config.batch
        self.mixture = Mixture(config.ratios(), config.ratios(early=True), early)
        self.config, self.sources, self.reader = config, sources, reader
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> StepData:
        batch, bad = self.config.batch, []
        slots = range(step * batch + self.rank, (step + 1) * batch, self.world)
        return self.pack(step, [self.sample(slot, bad) for slot in slots], bad)

    def pack(self, step: int, samples: Sequence[Sample], bad: list[BadRow]) -> StepData:
        groups = bucket(samples, self.config.micro_batch, self.config.loader.max_padding)
        batches = [collate(group, self.reader.processor) for group in groups]
        keys = [[s.key for s in group if s.kind == "generation"] for group in groups]
        tokens, places = sum(len(s.ids) for s in samples), sum(b.input_ids.numel() for b in batches)
        return StepData(step, batches, keys, len(samples), tokens, places, bad)

    def sample(self, slot: int, bad: list[BadRow]) -> Sample:
        index, position = self.mixture(slot)
        source = self.sources[index]
        for further in range(1000):
            line, row = 0, None
            try:
                line, row = source(position + further)
                dice = generator(self.config.seed, "sample", slot)
                return self.reader(row, source.config.kind, dice, self.config.objective.prompt_dropout)
            except (ValueError, OSError, KeyError, TypeError) as error:
                bad.append(BadRow(source.name, line, f"{type(error).__name__}: {error}"))
                if self.config.loader.on_bad_row == "stop":
                    break
        told = bad[-1]
        what = "a bad row" if self.config.loader.on_bad_row == "stop" else "1,000 bad rows in a row, the last"
        raise ValueError(f"{what}: {told.source}, line {told.line}: {told.reason}")
