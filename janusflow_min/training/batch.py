# SPDX-License-Identifier: MIT
"""From samples to mixed batches, and the processes that prepare them.

Sample i of a run has its row and a generator of its own, both functions of the seed and i alone. A bad row is reported
and replaced by its source's next good one.

Legend: B rows of a micro-batch, T tokens, N image tokens, C h w latent, S image side.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..pixels import look_up, to_pixels
from ..processor import ImageProcessor, Processor
from .config import STAGES, Config, LoaderConfig
from .dataset import Mixture, Source
from .losses import ABSENT, IGNORE, MixedBatch
from .rows import BadRow, Manifest, Row, cause, kind_of, seeded_generator
from .sample import Sample, SampleBuilder

MAX_BAD = 1000  # rows of a source in a row


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
    index, gen_index, labels, weights = list[int](), list[int](), list[int](), list[float]()
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
    generated: list[Any] = [s for s in samples if s.kind == "generation"]
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
    """The batch with its uint8 images in the two forms that the VAE and SigLIP take, on its device."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # every level once
    siglip, vae = image_processor.table, to_pixels(grey.convert("RGB"))[:, 0]  # (3, 256)
    new: dict[str, Tensor] = {}
    if batch.und_pixels is not None:
        new["und_pixels"] = look_up(batch.und_pixels, siglip)
    if batch.images is not None and batch.latents is None:
        new["vae_pixels"] = look_up(batch.images, vae)
    if batch.images is not None and batch.features is None:
        new["pixels"] = look_up(batch.images, siglip)
    return replace(batch, images=ABSENT, **new)


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


class BadRowsError(ValueError):
    """A sample cannot be made of any of these rows."""

    def __init__(self, message: str, rows: list[BadRow]):
        super().__init__(message, rows)
        self.rows = rows

    def __str__(self) -> str:
        return self.args[0]


class StepDataset(Dataset):
    """step -> `StepBatches` of this rank: every `world`-th sample of the step's."""

    def __init__(
        self, config: Config, sources: Sequence[Source], builder: SampleBuilder, rank: int = 0, world: int = 1
    ):
        assert config.batch is not None  # the stage's where none was given
        self.batch, early = config.batch, STAGES[config.stage].early_steps * config.batch
        self.mixture = Mixture(config.ratios(), config.ratios(early=True), early)
        self.config, self.sources, self.builder = config, sources, builder
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> StepBatches:
        """BadRowsError where there is no good row."""
        bad: list[BadRow] = []
        numbers = range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
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
        source, dropout = self.sources[index], self.config.objective.prompt_dropout
        for further in range(MAX_BAD):
            row = source(position + further, keep=position)
            generator = seeded_generator(self.config.seed, "sample", number)
            sample = self.build(row, source.config.kind, generator, dropout, bad)
            if sample is not None:
                return sample
        raise BadRowsError(f"{MAX_BAD:,} bad rows in a row, the last: {bad[-1]}", bad)

    def build(
        self, row: Row, kind: str | None, generator: torch.Generator, dropout: float, bad: list[BadRow]
    ) -> Sample | None:
        """None for a row that cannot be used; with `on_bad_row = "stop"` a ValueError. kind None: the row's own."""
        try:
            if isinstance(row.values, Exception):
                raise row.values
            return self.builder(row.values, kind or kind_of(row.values), generator, dropout, row.folder)
        except MemoryError:
            raise
        except Exception as error:  # whatever lies in the data
            bad.append(BadRow(row.source, row.line, f"{type(error).__name__}: {error}"[:500]))
            if self.config.loader.on_bad_row == "stop":
                raise BadRowsError(f"a bad row: {bad[-1]}", bad) from error
            return None

    def validation(self, whole: bool) -> StepBatches:
        """The first rows of the validation manifest, this rank's or the `whole`, with times and noise of their own and
        no prompt hidden."""
        report, bad, samples = self.config.report, list[BadRow](), list[Sample]()
        rows = Manifest(report.validation, limit=report.validation_rows)
        for i in range(len(rows)) if whole else range(self.rank, len(rows), self.world):
            generator = seeded_generator("validation", i)
            sample = self.build(rows[i], None, generator, 0.0, bad)
            samples += [] if sample is None else [sample]
        return self.pack(0, samples, bad)


class _Worker(Dataset):
    """The data set as a worker has it: an error is handed over as it is, not as a glued traceback."""

    def __init__(self, dataset: StepDataset):
        self.dataset = dataset

    def __getitem__(self, step: int) -> StepBatches:
        try:
            return self.dataset[step]
        except Exception as error:
            # Errors of other libraries may not survive the way through a pipe.
            plain = isinstance(error, BadRowsError) or type(error).__module__ == "builtins"
            return StepBatches(step, [], [], 0, 0, 0, [], error if plain else RuntimeError(cause(error)))


def load_steps(
    dataset: StepDataset, steps: range, pin_memory: bool = False
) -> Generator[StepBatches, None, None]:
    """Steps of this rank, prepared by as many processes as the configuration says.

    Workers are spawned, for a fork of a process that computed may hang; they send bytes through pipes (see
    `MixedBatch.__reduce__`) and outlast Ctrl-C and SIGTERM, which the trainer acts on. Raises what `dataset[step]`
    raises; RuntimeError where a worker dies or is too slow: see `explain_loader_error`. Closing it ends the workers.
    """
    settings, options = dataset.config.loader, dict[str, Any]()
    if settings.workers:
        options = dict(multiprocessing_context="spawn", worker_init_fn=follow_parent)
        options |= dict(prefetch_factor=2, timeout=settings.timeout)
    options |= dict(num_workers=settings.workers, pin_memory=pin_memory)
    # With a generator of its own the loader leaves torch's alone.
    options["generator"] = torch.Generator("cpu")
    loader = DataLoader(_Worker(dataset), batch_size=None, sampler=steps, **options)
    with torch.device("cpu"), signals_blocked() if settings.workers else contextlib.nullcontext():
        try:
            prepared = iter(loader)
        except OSError as error:  # even a lock takes a few bytes of shared memory
            reason = f"the data workers cannot start ({error})"
            raise OSError(f"{reason}: is /dev/shm full? loader.workers = 0 does without") from error
    for data in prepared:
        if data.error is not None:
            raise data.error
        yield data


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started here inherit that Ctrl-C and SIGTERM do not reach them (see `follow_parent`)."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would let Ctrl-C through again
    told_apart = hasattr(signal, "sigwaitinfo")  # not on macOS
    blocked = [signal.SIGINT, signal.SIGTERM] if told_apart else [signal.SIGINT]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(worker: int) -> None:
    """End this worker when its parent is gone (it may be writing to a pipe that nobody reads any more) or ends it.

    SIGTERM from anyone else went to the whole process group, as clusters and containers send it: the parent then
    finishes its step and saves, and needs this worker until it has.
    """
    parent: Any = multiprocessing.parent_process()

    def wait_for_end() -> None:
        parent.join()
        os._exit(1)

    def wait_for_signal() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_end, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=wait_for_signal, daemon=True).start()


def explain_loader_error(error: RuntimeError, settings: LoaderConfig) -> str:
    """What a RuntimeError of the data loader means, which reaches the main process wherever it happens to be."""
    if "timed out" in str(error):
        return f"no data came within loader.timeout = {settings.timeout} s; a slow stream needs a longer one"
    return (
        f"a data worker died ({error}): often there is too little memory, so try fewer loader.workers; or a script "
        'calls the trainer outside of `if __name__ == "__main__":`'
    )
