# SPDX-License-Identifier: MIT
"""The training run: one CPU, one GPU or, under torchrun, many. What a step computes is in `step.py`.

A run reads, learns, reports and saves; called again it goes on where its newest whole checkpoint stands, with the
same samples, times and noise, and ends with the same weights to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..checkpoint import load_model
from ..hub import resolve, resolve_vae
from ..loading import pick_device, pick_dtype, save
from ..model import JanusFlow
from ..pipeline import Pipeline
from ..processor import Processor, check_processor_matches
from ..vae import load_vae
from . import checkpoints
from .batch import StepDataset, explain_loader_error, load_steps, unpack
from .config import Config
from .dataset import open_sources
from .losses import MixedBatch
from .metrics import Report
from .metrics import rows as read_lines
from .optimizer import rate_factor
from .rows import BadRow, Manifest, kind_of, seeded_generator
from .sample import Cache, SampleBuilder
from .step import BINS, TrainStep, sums_of


class Trainer:
    """A run of a configuration. `run` trains to the end, from the newest whole checkpoint where there is one."""

    def __init__(self, config: Config, fresh: bool = False, progress: bool = True):
        self.config, self.progress = config, progress
        self.device, self.rank, self.world, self.parallel = start(config)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.folder = Path(config.output)
        self.checkpoints = self.folder / "checkpoints"
        self.tell(f"reading {config.model}")
        self.source = resolve(config.model, self.shown)
        self.model = load_model(self.source, self.device, torch.float32, progress=self.shown)
        self.processor = Processor.from_folder(self.source, self.model.config.llm.vocab_size)
        check_processor_matches(self.source, self.model.config, self.processor)
        self.vae = load_vae(resolve_vae(self.source, config.vae or None, self.shown), self.device, self.dtype)
        cache = None
        if config.loader.cache:
            cache = Cache(config.loader.cache, fingerprint(self.vae, self.model.siglip))
        # Features only where they stay the same; outside its forward pass a sharded SigLIP is not whole.
        self.cache_features = cache is not None and not config.rate("siglip") and self.parallel != "fsdp"
        sources = open_sources(config)
        builder = SampleBuilder(config, self.processor, self.model, cache)
        self.dataset = StepDataset(config, sources, builder, self.rank, self.world)
        parts = self.model, self.device, self.dtype, self.parallel, self.world
        self.train_step = TrainStep(config, *parts)  # from here on the model may be sharded
        self.optimizer = self.train_step.optimizer
        self.index, self.last_saved, self.signal = 0, -1, 0
        self.bad: set[tuple[str, int]] | None = None
        found = [None]
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = [None if fresh else checkpoints.newest(self.checkpoints, self.tell)]
        if self.world > 1:
            dist.broadcast_object_list(found)
        if found[0] is None and checkpoints.found(self.checkpoints) and not fresh:
            raise ValueError(f"no checkpoint in {self.checkpoints} is whole; --fresh starts anew")
        if found[0] is not None:
            self.resume(*found[0])
        elif self.rank == 0:
            for old in checkpoints.found(self.checkpoints):
                shutil.rmtree(old)
        self.report = Report(self.folder, config, self.processor, self.index) if self.rank == 0 else None
        for source in sources:
            self.note_bad(source.bad, everywhere=True)

    @torch.no_grad()
    def encode(self, batch: MixedBatch, keys: list[str]) -> MixedBatch:
        """The images' latents, from the frozen VAE or from the cache, which is filled here."""
        batch = unpack(batch, self.processor.image_processor)
        if batch.t is None or (
            batch.latents is not None and (batch.features is not None or not self.cache_features)
        ):
            return batch
        cache = self.dataset.builder.cache
        if cache is None:
            return replace(batch, latents=self.vae.encode(batch.pictures).float())
        # One at a time, so that what is stored depends on nothing but the picture.
        found = {"latents": batch.latents}
        if batch.latents is None:
            found["latents"] = torch.cat([self.vae.encode(p[None]).float() for p in batch.pictures])
        if self.cache_features:
            found["features"] = torch.cat([self.model.siglip(p[None].to(self.dtype)) for p in batch.pixels])
        for i, key in enumerate(keys):
            cache.put(key, {name: tensor[i] for name, tensor in found.items()})
        return replace(batch, **found)

    # The run -----------------------------------------------------------------------

    def run(self) -> Path:
        """Train, then export; returns the exported folder. KeyboardInterrupt, after saving, when told to stop."""
        config = self.config
        before = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        waiting: list[tuple[int, Tensor, dict]] = []  # steps whose numbers are still on the device
        bar = tqdm(
            total=config.steps,
            initial=self.index,
            desc="Training",
            unit="step",
            disable=not self.shown,
            leave=False,
        )
        try:
            steps = load_steps(self.dataset, range(self.index, config.steps), self.device.type == "cuda")
            while self.index < config.steps:
                index, data = self.index, next(steps)
                batches, keys = data.batches, data.keys
                sums, told = self.train_step.step(
                    index,
                    batches,
                    lambda i, b, keys=keys: self.encode(b.to(self.device), keys[i]),
                    self.signal,
                )
                stop = told if self.world > 1 else self.signal  # ranks act on what all of them know
                self.index += 1
                self.note_bad(data.bad)
                padding = round(1 - data.tokens / max(1, data.padded_tokens), 4)  # of this rank's samples
                waiting.append((index, sums, {"padding": padding, "time": round(time.time(), 3)}))
                done = self.index == config.steps
                save_now = done or stop or self.index % config.save_every == 0
                show = config.report.every and (done or self.index % config.report.every == 0)
                if save_now or show or len(waiting) >= config.report.log or self.device.type == "cpu":
                    self.flush(waiting, bar)
                if save_now:
                    self.save()
                if stop:
                    raise KeyboardInterrupt
                if show:
                    self.evaluate()
                bar.update()
            return self.finish()
        except RuntimeError as error:  # a worker's death is told wherever the trainer happens to be
            if "DataLoader" not in str(error):
                raise
            if self.signal:  # it went to the workers too
                raise KeyboardInterrupt from error
            told = explain_loader_error(error, config.loader)
            raise RuntimeError(f"before step {self.index + 1}: {told}. {self.kept()}") from error
        finally:
            bar.close()
            for which, handler in before.items():
                signal.signal(which, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop after this step; a second Ctrl-C at once."""
        if self.signal and number == signal.SIGINT and self.world == 1:
            raise KeyboardInterrupt
        self.signal = 1
        self.tell("stopping after this step")

    def flush(self, waiting: list[tuple[int, Tensor, dict]], bar: tqdm) -> None:
        """Bring the waiting steps' numbers to the host and write them down; stop at one that is not finite."""
        c, table = self.config, torch.stack([sums for _, sums, _ in waiting]).tolist()
        for (index, _, more), numbers in zip(waiting, table, strict=True):
            row = describe(numbers, c.batch)
            row |= {"lr": c.optimizer.lr * rate_factor(c.optimizer, index, c.steps), **more}
            finite = row["loss"] - row["loss"] == 0 and row["norm"] - row["norm"] == 0
            if self.report is not None:
                self.report.metrics(index + 1, row)
            if not finite and self.config.on_nan == "stop":
                raise FloatingPointError(
                    f"the loss of step {index + 1} is {row['loss']}, its gradient's norm {row['norm']}; no weight took "
                    f'it over. {self.kept()} on_nan = "skip" leaves such steps out'
                )
        bar.set_postfix(
            {k: f"{row[k]:.4g}" for k in ("loss", "flow", "answers", "norm") if row.get(k) is not None}
        )
        waiting.clear()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Validation loss, pictures and answers of the averaged weights."""
        self.optimizer.swap(average=True)
        try:
            loss = self.validation_loss() if self.config.report.validation else None
            if self.parallel == "fsdp":
                self.train_step.loss.unshard()
            pipe = Pipeline(self.model, self.processor, self.vae)
            if self.report is not None or self.parallel == "fsdp":
                report = self.report or Report(None, self.config, self.processor, self.index)
                report.show(pipe, self.index, loss)
            if self.parallel == "fsdp":
                self.train_step.loss.reshard()
        finally:
            self.optimizer.swap(average=False)

    def validation_loss(self) -> dict[str, float]:
        """Over the first rows of the validation manifest, with times and noise of their own, no prompt hidden."""
        report, sums = self.config.report, torch.zeros(6 + 2 * BINS, dtype=torch.float32, device=self.device)
        rows = Manifest(report.validation, limit=report.validation_rows)
        count = len(rows)
        samples = []
        for i in range(count if self.parallel == "fsdp" else 0) or range(self.rank, count, self.world):
            row = rows[i]
            generator = seeded_generator("validation", i)
            kind, folder = kind_of(row.values), row.folder
            samples.append(self.dataset.builder(row.values, kind, generator, 0.0, folder))
        data = self.dataset.pack(0, samples, [])
        for batch, keys in zip(data.batches, data.keys, strict=True):
            batch = self.encode(batch.to(self.device), keys)
            sums += sums_of(self.train_step.loss(batch), batch)
        if self.world > 1 and self.parallel != "fsdp":
            dist.all_reduce(sums)
        row = describe([*sums.tolist(), 0.0], count)
        return {k: row[k] for k in ("loss", "flow", "alignment", "answers")}

    def save(self) -> None:
        if self.last_saved != self.index:
            about = {"config": self.config.to_dict()}
            checkpoints.save(self.checkpoints, self.index, self.optimizer.state(), about, self.config.keep)
            self.last_saved = self.index

    def resume(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. ValueError where the run was another one."""
        differ = differences(about["config"], json.loads(json.dumps(self.config.to_dict())))
        if differ:
            raise ValueError(
                f"{folder} belongs to a run with other settings ({'; '.join(differ)}); take another output, or --fresh"
            )
        checkpoints.load(folder, self.optimizer.state())
        self.optimizer.load()
        self.index = self.last_saved = about["step"]
        self.tell(f"going on from {folder}")

    def finish(self) -> Path:
        """Export to the official layout, and plot the curves."""
        target = self.folder / "export"
        weights = self.optimizer.average or self.optimizer.master
        whole = {name: whole_tensor(tensor) for name, tensor in weights.items()}
        if self.rank == 0:
            dtype = getattr(torch, self.config.export_dtype)
            clean = load_model(self.source, "cpu", torch.float32, progress=False)
            merge(clean, whole, self.model)
            clean = clean.to(dtype)
            clean.extra_tensors = {name: t.to(dtype) for name, t in clean.extra_tensors.items()}
            save(Pipeline(clean, self.processor, self.vae), target, overwrite=True)
            self.report.plot()
            self.tell(f"exported to {target}")
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        return target

    def note_bad(self, rows: list[BadRow], everywhere: bool = False) -> None:
        """Write each bad row down once, restarts included. everywhere: all ranks found them; the first one writes."""
        path = self.folder / "bad_rows.jsonl"
        if self.bad is None:
            self.bad = {(row["source"], row["line"]) for row in read_lines(path)}
        new = [row for row in rows if (row.source, row.line) not in self.bad]
        self.bad |= {(row.source, row.line) for row in new}
        if new:
            with path.open("a", encoding="utf-8") as f:
                for row in new if self.rank == 0 or not everywhere else []:
                    print(json.dumps(row._asdict(), ensure_ascii=False), file=f)
            more = f" ({len(self.bad)} bad rows so far)" if len(self.bad) > 1 else ""
            text = f"bad row: {new[0]}{more}"
            if self.config.loader.on_bad_row == "stop":
                raise ValueError(text)
            self.tell(text)

    def kept(self) -> str:
        left = checkpoints.found(self.checkpoints)
        return f"The last checkpoint is {left[0]}." if left else "There is no checkpoint yet."

    @property
    def shown(self) -> bool:
        return self.progress and self.rank == 0

    def tell(self, text: str) -> None:
        if self.shown:
            tqdm.write(text, file=sys.stderr)


# Numbers and settings -----------------------------------------------------------------------


def describe(numbers: list[float], samples: int) -> dict[str, float | None]:
    """The means of a step's sums; None where no sample had such a loss."""
    total, flow, painted, alignment, answers, answered, *rest = numbers
    painted, answered = round(painted), round(answered)
    row = {"loss": total / samples, "flow": flow / painted if painted else None}
    row |= {"alignment": alignment / painted if painted else None}
    row |= {"answers": answers / answered if answered else None, "norm": rest[-1]}
    for k in range(BINS):
        row[f"flow_t{k / BINS:.2f}"] = rest[k] / rest[BINS + k] if rest[BINS + k] else None
    return row


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that decide the result and are not the same."""
    free = {
        "output",
        "steps",
        "report",
        "save_every",
        "keep",
        "export_dtype",
        "workers",
        "device",
        "parallel",
        "on_nan",
    }
    found = []
    for key in sorted((old.keys() | new.keys()) - free):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} was {a!r}, is {b!r}")
    return found


# Beginning and end -----------------------------------------------------------------------


def start(config: Config) -> tuple[torch.device, int, int, str]:
    """Device, rank, number of ranks and the form of parallelism; under torchrun the process group is made."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch < world:
        raise ValueError(f"batch must be at least the number of ranks, {world}; got {config.batch}")
    device, parallel = pick_device(config.device), config.parallel
    if world == 1 or parallel == "none":
        if world > 1:
            raise ValueError('parallel must be "auto", "replicate" or "fsdp" under torchrun, got "none"')
        return device, 0, 1, "none"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), world, "replicate" if parallel == "auto" else parallel


@torch.no_grad()
def merge(clean: JanusFlow, trained: Mapping[str, Tensor], model: JanusFlow) -> None:
    """Put trained weights (names of `JanusFlowLoss`) into a plain model; adapters are added to what they adapt."""
    plain = dict(clean.named_parameters())
    modules = dict(model.named_modules())
    for name, tensor in trained.items():
        name = name.removeprefix("model.")
        if ".lora_A." in name:
            where = name.partition(".lora_A.")[0]
            b = trained["model." + name.replace(".lora_A.", ".lora_B.")]
            plain[f"{where}.weight"] += modules[where].scaling["default"] * (b.float() @ tensor.float()).cpu()
        elif ".lora_B." not in name and not name.startswith("head."):
            plain[name].copy_(tensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def fingerprint(*modules: nn.Module) -> str:
    """A checksum of weights: another encoder, another cache."""
    value = 0
    for module in modules:
        for p in module.parameters():
            value = zlib.crc32(p.detach().float().cpu().numpy().tobytes(), value)
    return f"{value:08x}"
