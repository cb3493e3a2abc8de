# SPDX-License-Identifier: MIT
"""A training run: on the CPU, on a GPU or, under torchrun, on several. What one step computes is in `step.py`.

Called again, a run continues from its newest complete checkpoint with the same samples, times and noise, and ends with
the same weights to the last bit.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import load_model
from ..devices import pick_dtype
from ..files import atomic_write
from ..hub import resolve, resolve_vae
from ..pipeline import Pipeline
from ..progress import progress_bar
from ..vae import load_vae
from . import checkpoints
from .batch import BadRowsError, StepDataset, explain_loader_error, load_steps, unpack
from .check import check, compare
from .config import COMPONENTS, Config
from .distill import DistillStep
from .export import export
from .losses import MixedBatch
from .metrics import Report, Tracker, curves, means, memory_gib, plain_line, read_lines
from .nft import NftStep
from .optimizer import rate_factor
from .ranks import start, whole_tensor
from .rounds import RoundStep
from .rows import BadRow
from .sample import Cache, SampleBuilder, checksum
from .settings import to_toml
from .step import TrainStep, add_metrics

MAX_SKIPPED = 20  # steps in a row whose loss is not finite


class Waiting(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    sums: dict[str, Tensor]
    tokens: int  # of this rank
    padded: int


class Trainer:
    """One run. `run` trains to the end, from the newest complete checkpoint if there is one."""

    def __init__(
        self, config: Config, fresh: bool = False, progress: bool = True, tracker: Tracker | None = None
    ):
        """fresh: start over; old checkpoints are deleted once the new run has saved one. progress: a bar (or lines)
        and notes on stderr. tracker: receives the metrics, in place of the one in the settings. Raises what
        `check.check` raises; ValueError if the output holds a different run; RuntimeError if another process is
        writing to it."""
        self.progress = progress
        self.device, self.rank, self.world, self.parallel = start(config)
        self.plan = check(config, self.world, True, self.shown)
        self.config = self.plan.config
        self.dtype = pick_dtype(config.dtype, self.device)
        self.folder = Path(self.config.output)
        self.checkpoints, self.replaced = self.folder / "checkpoints", self.folder / "checkpoints.replaced"
        for note in self.plan.notes:
            self.tell(f"note: {note}")
        self.index, self.last_saved, self.skipped, self.stop_requested = 0, -1, 0, False
        self.lock: checkpoints.Lock | None = None
        self.report: Report | None = None
        try:
            self.build(self.find(fresh), fresh, tracker)
        except BaseException:
            self.release()
            raise

    def find(self, fresh: bool) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to continue from, the same on all ranks, after comparing its settings and data with ours."""
        found: list[Any] = [None]
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoints.Lock(self.folder)
            checkpoints.clean(self.folder)
            if not fresh:
                found = [checkpoints.newest(self.checkpoints, self.tell)]
        if self.world > 1:
            dist.broadcast_object_list(found)
        if found[0] is None and checkpoints.found(self.checkpoints) and not fresh:
            raise ValueError(f"no checkpoint in {self.checkpoints} is complete; --fresh starts over")
        if found[0] is not None:
            try:
                for text in compare(found[0][1], self.config, self.plan.sources):
                    self.tell(f"note: {text}")
            except ValueError as error:
                raise ValueError(f"{found[0][0]} {error}; choose another output, or use --fresh") from None
        return found[0]

    def build(
        self, checkpoint: tuple[Path, dict[str, Any]] | None, fresh: bool, tracker: Tracker | None
    ) -> None:
        config = self.config
        self.tell(f"loading {config.model}")
        self.source = resolve(config.model, self.shown)
        self.vae = load_vae(resolve_vae(self.source, config.vae or None, self.shown), self.device, self.dtype)
        # What stays frozen is rounded on the way, so that the device never holds it in fp32.
        frozen = config.lora.rank or not all(map(config.rate, COMPONENTS))
        first = torch.device("cpu") if frozen and self.parallel != "fsdp" else self.device
        model: Any = load_model(self.source, first, torch.float32, progress=self.shown)
        self.model = model
        self.processor = self.plan.processor
        parts = self.model, self.device, self.dtype, self.parallel, self.world
        cache = None
        if config.loader.cache:
            cache = Cache(config.loader.cache, checksum(self.vae, model.siglip))
        # Features only where they stay the same; outside its forward pass a sharded SigLIP is not whole.
        self.cache_features = cache is not None and not config.rate("siglip") and self.parallel != "fsdp"
        # From the step on the model may be sharded.
        if config.in_rounds:
            method = {"nft": NftStep, "distill": DistillStep}[config.stage]
            self.rounds: RoundStep = method(config, *parts, self.processor, self.vae)
            self.train_step: TrainStep = self.rounds
        else:
            builder = SampleBuilder(config, self.processor, self.model, cache)
            self.dataset = StepDataset(config, self.plan.sources, builder, self.rank, self.world)
            self.train_step = TrainStep(config, *parts)
        self.optimizer = self.train_step.optimizer
        asked = any(source.kind == "understanding" for source in config.data)
        encoders = [self.vae, *([model.siglip] if self.cache_features and not asked else [])]
        # What a cache makes needless leaves the device to the LLM.
        self.parked: list[nn.Module] = encoders if cache and self.device.type != "cpu" else []
        for module in self.parked:
            module.to("cpu")
        if checkpoint is not None:
            checkpoints.load(checkpoint[0], self.optimizer.state())
            self.optimizer.load()
            self.index = self.last_saved = checkpoint[1]["step"]
            self.tell(f"continuing from {checkpoint[0]}")
        elif self.rank == 0:
            if fresh and checkpoints.found(self.checkpoints):
                shutil.rmtree(self.replaced, ignore_errors=True)
                os.rename(self.checkpoints, self.replaced)
            (self.folder / "bad_rows.jsonl").unlink(missing_ok=True)
        if self.rank == 0:
            atomic_write(self.folder / "config.toml", to_toml(config))
            self.report = Report(self.folder, config, tracker, self.index)
        self.best, self.stale = float("inf"), 0
        for row in read_lines(self.folder / "samples.jsonl"):
            self.is_best(row.get("loss"))
        self.bad = self.written_bad()
        for source in self.plan.sources:
            self.note_bad(source.bad, everywhere=True)

    def prepare(self, keys: list[list[str]], i: int, batch: MixedBatch) -> MixedBatch:
        """Micro-batch i of a step on the device, with latents; keys: of the cache, for each micro-batch's images."""
        return self.encode(batch.to(self.device), keys[i])

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
            return replace(batch, latents=self.vae.encode(batch.vae_pixels).float())
        # One at a time, so that what is stored depends on nothing but the image.
        found = {"latents": batch.latents}
        with self.encoders():
            if batch.latents is None:
                found["latents"] = torch.cat([self.vae.encode(p[None]).float() for p in batch.vae_pixels])
            if self.cache_features:
                siglip: Any = self.model.siglip
                found["features"] = torch.cat([siglip(p[None].to(self.dtype)) for p in batch.pixels])
        for i, key in enumerate(keys):
            cache.put(key, {name: tensor[i] for name, tensor in found.items()})
        return replace(batch, **found)

    @contextmanager
    def encoders(self) -> Iterator[None]:
        """VAE and SigLIP on the device, also where they are parked in the host's memory."""
        away = [module for module in self.parked if next(module.parameters()).device != self.device]
        for module in away:
            module.to(self.device)
        try:
            yield
        finally:
            for module in away:
                module.to("cpu")

    # The run -----------------------------------------------------------------------

    def run(self) -> Path:
        """Train, then export; returns the exported folder. KeyboardInterrupt, after saving, when asked to stop."""
        config, every = self.config, self.config.report.every
        waiting: list[Waiting] = []
        self.bar = progress_bar(
            self.shown, total=config.steps, initial=self.index, desc="Training", unit="step"
        )
        self.began, self.first, self.mark = time.perf_counter(), self.index, time.perf_counter()
        try:
            left = range(self.index, config.steps)
            if config.in_rounds:
                steps = self.rounds.prompts_of(left)
            else:
                steps = load_steps(self.dataset, left, self.device.type == "cuda")
            with self.signals(), closing(steps):
                while self.index < config.steps and not self.settled():
                    data = next(steps)
                    sums, stop = self.train_step.step(
                        self.index,
                        data.batches,
                        functools.partial(self.prepare, data.keys),
                        self.stop_requested,
                    )
                    if self.world == 1:  # else ranks act on what all of them know
                        stop = self.stop_requested
                    self.index += 1
                    self.note_bad(data.bad)
                    waiting.append(Waiting(self.index, sums, data.tokens, data.padded_tokens))
                    done = self.index == config.steps
                    save_now = done or stop or self.index % config.save_every == 0
                    show = every and (done or self.index % every == 0)
                    if save_now or show or len(waiting) >= config.report.log or self.device.type == "cpu":
                        self.flush(waiting)
                    if save_now:
                        self.save()
                    if stop:
                        raise KeyboardInterrupt
                    if show:
                        self.evaluate()
                    if save_now or show:
                        self.mark = time.perf_counter()
                    self.bar.update()
                return self.finish()
        except BadRowsError as error:
            self.note_bad(error.rows)
            raise
        except RuntimeError as error:  # a worker's death is raised wherever the main process is
            if "DataLoader" not in str(error):
                raise
            if self.stop_requested:  # it went to the workers too
                raise KeyboardInterrupt from error
            reason = explain_loader_error(error, config.loader)
            raise RuntimeError(f"before step {self.index + 1}: {reason}. {self.kept()}") from error
        finally:
            self.bar.close()
            self.release()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step. Only the main thread may handle them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop after this step; a second Ctrl-C stops at once."""
        if self.stop_requested and number == signal.SIGINT and self.world == 1:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.tell("stopping after this step")

    def flush(self, waiting: list[Waiting]) -> None:
        """Fetch the numbers of the waiting steps from the device and report them; stop if they are not finite."""
        c, names = self.config, list(waiting[0].sums)
        table = torch.stack([torch.stack(list(w.sums.values())) for w in waiting]).tolist()
        seconds = (time.perf_counter() - self.mark) / len(waiting)
        for (step, _, tokens, padded), numbers in zip(waiting, table, strict=True):
            row: dict[str, Any] = means(dict(zip(names, numbers, strict=True)))
            norm = row["norm"] = row.pop("norm")
            finite = all(abs(x) < float("inf") for x in (row["loss"], norm))
            self.skipped = 0 if finite else self.skipped + 1
            row["lr"] = c.optimizer.lr * rate_factor(c.optimizer, step * c.updates - 1, c.steps * c.updates)
            row |= {"epoch": self.plan.epochs(step), "padding": round(1 - tokens / max(1, padded), 4)}
            row |= {} if finite else {"skipped": True}
            row |= {
                "samples_per_second": round(c.batch / seconds, 2),
                "tokens_per_second": round(tokens * self.world / seconds),
                "memory_gib": memory_gib(self.device),
                "time": round(time.time(), 3),
            }
            if self.report is not None:
                self.report.metrics(step, row)
            if not finite and (c.on_nan == "stop" or self.skipped >= MAX_SKIPPED):
                stop = c.on_nan == "stop"
                advice = 'on_nan = "skip" skips such steps' if stop else "try a lower learning rate"
                others = f", as in {self.skipped - 1} steps before it" if self.skipped > 1 else ""
                raise FloatingPointError(
                    f"the loss of step {step} is {row['loss']}, its gradient norm {norm}{others}; it changed no "
                    f"weight. {self.kept()} {advice}"
                )
            if self.shown and self.bar.disable and (step % c.report.log == 0 or step == c.steps):
                left = (time.perf_counter() - self.began) / (step - self.first) * (c.steps - step)
                self.tell(plain_line(step, c.steps, row, left))
        self.bar.set_postfix({k: f"{row[k]:.4g}" for k in curves(row) if row[k] is not None and k != "lr"})
        self.mark = time.perf_counter()
        waiting.clear()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Validation loss, images and answers of the averaged weights; exports them if they are the best so far."""
        with self.encoders():
            loss = self.show()
        if self.is_best(loss["loss"] if loss is not None else None) and self.config.report.keep_best:
            self.tell(f"the best validation loss so far, {self.best:.4g}: exported to {self.export('best')}")
        if self.settled():
            self.tell(f"no better validation loss in {self.stale} validations: this run ends")

    def show(self) -> dict[str, float | None] | None:
        """The validation loss, if it is wanted; images and answers are reported."""
        objective: Any = self.train_step.loss.eval()  # FSDP2 gives it two more methods
        try:
            with self.optimizer.computing_with(self.optimizer.average):
                if self.config.in_rounds:
                    loss = self.rounds.validation_loss() if self.config.rounds.validation else None
                else:
                    loss = self.validation_loss() if self.config.report.validation else None
                if self.parallel == "fsdp":
                    objective.unshard()
                if self.report is not None or self.parallel == "fsdp":
                    report = self.report or Report(None, self.config)
                    with self.encoders():
                        report.show(Pipeline(self.model, self.processor, self.vae), self.index, loss)
                if self.parallel == "fsdp":
                    objective.reshard()
                return loss
        finally:
            objective.train()

    def is_best(self, loss: float | None) -> bool:
        """Whether a validation loss is the lowest so far; also counts those since the lowest."""
        if loss is None:
            return False
        better = loss < self.best
        self.best, self.stale = (loss, 0) if better else (self.best, self.stale + 1)
        return better

    def settled(self) -> bool:
        """Whether `report.patience` ends the run."""
        return 0 < self.config.report.patience <= self.stale

    def validation_loss(self) -> dict[str, float | None]:
        """Over the first rows of the validation manifest."""
        data, sums = self.dataset.validation(whole=self.parallel == "fsdp"), dict[str, Tensor]()
        self.note_bad(data.bad)
        for batch, keys in zip(data.batches, data.keys, strict=True):
            add_metrics(sums, self.train_step.loss(self.encode(batch.to(self.device), keys)).metrics())
        parts = [{name: pair.tolist() for name, pair in sums.items()}]
        if self.world > 1 and self.parallel != "fsdp":
            parts *= self.world
            dist.all_gather_object(parts, parts[0])  # a rank without a good row has no names
        if not any(parts):
            raise ValueError("report.validation: none of its rows can be used; bad_rows.jsonl says why")
        total = dict.fromkeys((name for part in parts for name in part), (0.0, 0.0))
        for name in total:
            pairs = [part[name] for part in parts if name in part]
            total[name] = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        row = means(total)
        return {name: row[name] for name in curves(row)}

    def save(self) -> None:
        if self.last_saved == self.index:
            return
        about = {"config": self.config.to_dict(), "data": [s.fingerprint for s in self.plan.sources]}
        checkpoints.save(self.checkpoints, self.index, self.optimizer.state(), about, self.config.keep)
        self.last_saved = self.index
        if self.rank == 0:
            shutil.rmtree(self.replaced, ignore_errors=True)

    def export(self, name: str) -> Path:
        """Export the averaged weights (the newest ones if there is no average) in the official layout."""
        target = self.folder / name
        weights = self.optimizer.average or self.optimizer.master
        whole = {key: whole_tensor(tensor) for key, tensor in weights.items()}
        if self.rank == 0:
            export(self.config, self.source, whole, self.processor, self.vae, target)
        return target

    def finish(self) -> Path:
        """Export to the official layout, and plot the curves."""
        target = self.export("export")
        if self.report is not None:
            self.report.plot()
            which, losses = "the last weights", ""
            if decay := self.config.optimizer.ema_decay:
                which = f"the average of the weights (optimizer.ema_decay = {decay:g})"
                losses = "; the training losses are those of the weights before averaging"
            self.tell(f"exported {which} to {target}{losses}")
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        return target

    # Remarks -----------------------------------------------------------------------

    def note_bad(self, rows: list[BadRow], everywhere: bool = False) -> None:
        """Record each bad row once, restarts included. everywhere: all ranks found them, and the first one writes."""
        if rows and self.world > 1:  # another rank may have found them
            self.bad |= self.written_bad()
        new = {(row.source, row.line): row for row in rows if (row.source, row.line) not in self.bad}
        self.bad |= new.keys()
        if new:
            with (self.folder / "bad_rows.jsonl").open("a", encoding="utf-8") as f:
                for row in new.values() if self.rank == 0 or not everywhere else []:
                    print(json.dumps(row._asdict(), ensure_ascii=False), file=f)
            more = f" ({len(self.bad)} bad rows so far)" if len(self.bad) > 1 else ""
            text = f"bad row: {next(iter(new.values()))}{more}"
            if self.config.loader.on_bad_row == "stop":
                raise ValueError(text)
            self.tell(text)

    def written_bad(self) -> set[tuple[str, int]]:
        return {(row["source"], row["line"]) for row in read_lines(self.folder / "bad_rows.jsonl")}

    def kept(self) -> str:
        left = checkpoints.found(self.checkpoints)
        return f"The last checkpoint is {left[0]}." if left else "There is no checkpoint yet."

    def release(self) -> None:
        """Close the tracker, and free the output for other runs."""
        if self.report is not None:
            self.report.close()
        if self.lock is not None:
            self.lock.release()

    @property
    def shown(self) -> bool:
        return self.progress and self.rank == 0

    def tell(self, text: str) -> None:
        if self.shown and sys.stderr is not None:
            tqdm.write(text, file=sys.stderr)
