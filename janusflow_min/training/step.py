# SPDX-License-Identifier: MIT
"""One training step on one page: `TrainStep.step`. `prepare.py` makes the model ready for it.

`replicate` is one sum of the gradients over the ranks after the last micro-batch (a step's micro-batches differ in
the parameters they use, which DistributedDataParallel cannot accumulate over); `fsdp` is FSDP2's `fully_shard` of
a few blocks at a time and of the rest, computing in bf16 over fp32 shards. Paper section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from ..model import JanusFlow
from .config import Config
from .losses import MixedBatch
from .optimizer import AdamW, Schedule
from .prepare import prepare_blocks, shard, trainable

KIND_PARTS = {  # field of a batch: what it alone makes use of
    "und_pixels": ("model.siglip.", "model.und_"),
    "t": ("model.uvit_", "model.gen_", "head."),
    "labels": ("model.llm.lm_head.",),
}


class TrainStep:
    """Loss and optimizer of a configuration, on this rank's device."""

    def __init__(
        self,
        config: Config,
        model: JanusFlow,
        device: torch.device,
        dtype: torch.dtype,
        parallel: str = "none",
        world: int = 1,
    ):
        """model: fp32, on the device if it is to be sharded; modified in place, and moved there. dtype: of computing.
        parallel: none, replicate or fsdp."""
        self.config, self.device, self.parallel, self.world = config, device, parallel, world
        self.loss, rates = trainable(config, model)
        for name, p in self.loss.named_parameters():
            if not rates[name] and parallel != "fsdp":
                p.data = p.data.to(dtype)
        self.loss.to(device)
        prepare_blocks(model, config)
        self.loss.train()  # adapters drop out
        if parallel == "fsdp":
            shard(self.loss, dtype)
            dtype = torch.float32  # of the shards
        trained = ((name, p) for name, p in self.loss.named_parameters() if rates[name])
        kernel = device.type == "cuda" and find_spec("triton") is not None
        self.optimizer = AdamW(trained, rates, config.optimizer, config.steps * config.updates, dtype, kernel)

    def step(
        self,
        index: int,
        batches: Sequence[MixedBatch],
        prepare: Callable[[int, MixedBatch], MixedBatch] = lambda i, batch: batch,
        stop_requested: bool = False,
        schedule: Schedule | None = None,
    ) -> tuple[dict[str, Tensor], bool]:
        """Make step `index` from its micro-batches; `prepare` completes each one when its turn comes. With a `schedule`
        of tensors, which takes the place of the configuration's, a CUDA graph can capture a step of several
        micro-batches of fixed shapes, after two that are not captured.

        Returns the metrics as name: (sum, count), (2,) each and still on the device, and whether any rank was asked
        to stop.
        """
        optimizer, sharded = self.optimizer, self.parallel == "fsdp"
        count, stop_requested, unused = self.sync_ranks(batches, stop_requested)
        metrics: dict[str, Tensor] = {}
        for i in range(count):
            real = float(i < len(batches))  # sharded ranks make equally many passes; the last may be idle
            if real:
                batch = prepare(i, batches[i])
            with self.dropout_masks(index, i):
                losses = self.loss(batch, unused)
                # Every sample weighs the same, wherever it is; FSDP takes the mean over ranks, not the sum.
                share = real / self.config.batch * (self.world if sharded else 1)
                (losses.total * share).backward()
            if i + 1 < count and not sharded:
                optimizer.accumulate()
            add_metrics(metrics, losses.metrics(), real)
        norm = self.update(schedule or optimizer.schedule(index))
        if self.world > 1:
            reduce_metrics(metrics)
        return metrics | {"norm": torch.stack([norm, torch.ones_like(norm)])}, stop_requested

    def update(self, schedule: Schedule) -> Tensor:
        """One step of the optimizer by the gradients of all ranks. Returns their norm (), before clipping."""
        gradients = self.optimizer.gradients()
        if self.parallel == "replicate":
            gradients = self.sum_over_ranks(gradients)
        return self.optimizer.step(schedule, gradients)

    @contextmanager
    def dropout_masks(self, index: int, micro_batch: int) -> Iterator[None]:
        """Dropout masks of adapters depend only on the seed, the step, the micro-batch and the rank."""
        if not self.config.lora.dropout:
            yield
            return
        rank = dist.get_rank() if self.world > 1 else 0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(hash((self.config.seed, index, micro_batch, rank)) % 2**63)
            yield

    def sync_ranks(
        self, batches: Sequence[MixedBatch], stop_requested: bool
    ) -> tuple[int, bool, tuple[str, ...]]:
        """How many passes to make, whether any rank was asked to stop, and what must get a gradient in each pass."""
        if self.world == 1:
            return len(batches), stop_requested, ()
        kinds = [any(getattr(b, name) is not None for b in batches) for name in KIND_PARTS]
        numbers = torch.tensor([len(batches), stop_requested, *kinds], dtype=torch.int64, device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX)  # on the CPU: the GPU's queue is not waited for
        most, stop, *used = numbers.tolist()
        if self.parallel != "fsdp":
            return len(batches), bool(stop), ()
        parts = zip(KIND_PARTS.values(), used, strict=True)
        return most, bool(stop), tuple(name for names, there in parts if there for name in names)

    def sum_over_ranks(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums in fp32, in buckets of 64 M numbers; a rank that lacks a gradient contributes zeros."""
        names = list(self.optimizer.params)
        here = torch.tensor([name in gradients for name in names], dtype=torch.int32, device="cpu")
        dist.all_reduce(here, dist.ReduceOp.MAX)
        used = [name for name, anywhere in zip(names, here.tolist(), strict=True) if anywhere]
        summed: dict[str, Tensor] = {}
        bucket: list[str] = []
        for k, name in enumerate(used):
            bucket.append(name)
            if k + 1 == len(used) or sum(self.optimizer.params[n].numel() for n in bucket) > 2**26:
                shapes = [self.optimizer.params[n].shape for n in bucket]
                zeros = (torch.zeros(s, dtype=torch.float32, device=self.device) for s in shapes)
                parts = [
                    gradients[n].float() if n in gradients else z for n, z in zip(bucket, zeros, strict=True)
                ]
                flat = torch.cat([part.flatten() for part in parts])
                dist.all_reduce(flat)
                pieces = flat.split([s.numel() for s in shapes])
                summed |= {n: p.view(s) for n, p, s in zip(bucket, pieces, shapes, strict=True)}
                bucket = []
        return summed


def add_metrics(
    into: dict[str, Tensor], metrics: Mapping[str, tuple[Tensor, Tensor]], share: float = 1.0
) -> None:
    """Add the (sum, count) pairs of a batch, in place."""
    stacked = share * torch.stack([torch.stack(pair) for pair in metrics.values()])  # (names, 2)
    for name, pair in zip(metrics, stacked, strict=True):
        into[name] = into[name] + pair if name in into else pair


def reduce_metrics(metrics: dict[str, Tensor]) -> None:
    """Sum over all ranks, in place; all have the same names."""
    table = torch.stack(list(metrics.values()))
    dist.all_reduce(table)
    metrics.update(zip(metrics, table, strict=True))
