# SPDX-License-Identifier: MIT
"""One training step, whole, on one page: `TrainStep.step`. Below it, how the model is made ready for it.

`replicate` here is one sum of the gradients over the ranks after the last micro-batch (a step's micro-batches differ in
the parameters they use, which DistributedDataParallel cannot accumulate over); `fsdp` is FSDP2's `fully_shard` of
a few blocks at a time and of the rest, computing in bf16 over fp32 shards. Paper section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model import JanusFlow
from .config import Config
from .losses import AlignmentHead, JanusFlowLoss, Losses, MixedBatch, by_time
from .optimizer import AdamW

LLM_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BINS = 4  # of t, in the metrics
UNIT = 2**28  # parameters that FSDP2 gathers at once, at least: 0.5 GiB in bf16
KIND_PARTS = {  # field of a batch: what it alone makes use of
    "und_pixels": ("model.siglip.", "model.und_"),
    "t": ("model.uvit_", "model.gen_", "head."),
    "labels": ("model.llm.lm_head.",),
}


class TrainStep:
    """JanusFlowLoss and optimizer of a configuration, on this rank's device."""

    def __init__(
        self,
        config: Config,
        model: JanusFlow,
        device: torch.device,
        dtype: torch.dtype,
        parallel: str = "none",
        world: int = 1,
    ):
        """model: fp32, on the device; changed in place. dtype: of computing. parallel: none, replicate or fsdp."""
        self.config, self.device, self.parallel, self.world = config, device, parallel, world
        llm, settings, sharded = model.config.llm, config.objective, parallel == "fsdp"
        if sharded and config.lora.rank:
            raise ValueError(
                'lora.rank must be 0 with parallel = "fsdp"; LoRA fits one GPU, or use "replicate"'
            )
        if settings.alignment_layer > llm.num_hidden_layers:
            raise ValueError(
                f"objective.alignment_layer must be one of the model's blocks, 1 to {llm.num_hidden_layers}; "
                f"got {settings.alignment_layer}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = AlignmentHead(llm.hidden_size, model.config.siglip.width).to(device)
            if config.lora.rank:
                add_lora(model, config)
        weights = settings.alignment_weight, settings.answer_weight
        self.loss = JanusFlowLoss(model, head, settings.alignment_layer, *weights)
        rates = {}
        for name, p in self.loss.named_parameters():
            part = component(name)
            base = config.lora.rank and part == "llm" and "lora_" not in name
            rates[name] = 0.0 if base else config.rate(part)
            p.requires_grad_(rates[name] > 0)
            if not rates[name] and not sharded:
                p.data = p.data.to(dtype)
        prepare_blocks(model, config.gradient_checkpointing, config.compile)
        if sharded:
            try:
                from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            except ImportError:
                raise ImportError(
                    f'parallel = "fsdp" needs torch 2.6 or newer, here is {torch.__version__}'
                ) from None
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            for unit in units(model.llm.layers):
                fully_shard(unit, mp_policy=policy)
            fully_shard(self.loss, mp_policy=policy)
            dtype = torch.float32  # of the shards
        trained = ((name, p) for name, p in self.loss.named_parameters() if rates[name])
        kernel = device.type == "cuda" and find_spec("triton") is not None
        self.optimizer = AdamW(trained, rates, config.optimizer, config.steps, dtype, kernel)

    def step(
        self,
        index: int,
        batches: Sequence[MixedBatch],
        prepare: Callable[[int, MixedBatch], MixedBatch] = lambda i, batch: batch,
        signal: int = 0,
    ) -> tuple[Tensor, int]:
        """Learn step `index` from its micro-batches, of which `prepare` makes each ready when it is its turn.

        Returns the step's numbers, still on the device (see `sums_of`; the gradient's norm comes last), and whether
        any rank was told to stop.
        """
        optimizer, sharded = self.optimizer, self.parallel == "fsdp"
        count, signal, grad_for_unused = self.sync_ranks(batches, signal)
        sums = torch.zeros(6 + 2 * BINS, dtype=torch.float32, device=self.device)
        for i in range(count):
            real = float(i < len(batches))  # sharded ranks make equally many passes; the last may be idle
            if real:
                batch = prepare(i, batches[i])
            losses = self.loss(batch, grad_for_unused)
            # Every sample weighs the same, wherever it is; FSDP takes the mean over ranks, not the sum.
            share = real / self.config.batch * (self.world if sharded else 1)
            (losses.total * share).backward()
            if i + 1 < count and not sharded:
                optimizer.accumulate()
            sums += real * sums_of(losses, batch)
        gradients = optimizer.gradients()
        if self.parallel == "replicate":
            gradients = self.sum_over_ranks(gradients)
        norm = optimizer.step(index, gradients)
        if self.world > 1:
            dist.all_reduce(sums)
        return torch.cat([sums, norm[None]]), signal

    def sync_ranks(self, batches: Sequence[MixedBatch], signal: int) -> tuple[int, int, tuple[str, ...]]:
        """How many passes to make, whether any rank was told to stop, and what must get a gradient in each pass."""
        if self.world == 1:
            return len(batches), signal, ()
        kinds = [any(getattr(b, name) is not None for b in batches) for name in KIND_PARTS]
        numbers = torch.tensor([len(batches), signal, *kinds], dtype=torch.int64, device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX)  # on the CPU: the GPU's queue is not waited for
        most, signal, *kinds = numbers.tolist()
        if self.parallel != "fsdp":
            return len(batches), signal, ()
        parts = zip(KIND_PARTS.values(), kinds, strict=True)
        return most, signal, tuple(name for names, there in parts if there for name in names)

    def sum_over_ranks(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """fp32 sums, in buckets of 64 M numbers. A rank without a gradient that others have gives zeros."""
        names = list(self.optimizer.params)
        here = torch.tensor([name in gradients for name in names], dtype=torch.int32, device="cpu")
        dist.all_reduce(here, dist.ReduceOp.MAX)
        used = [name for name, anywhere in zip(names, here.tolist(), strict=True) if anywhere]
        summed, bucket = {}, []
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


def sums_of(losses: Losses, batch: MixedBatch) -> Tensor:
    """total, flow, painted samples, alignment, cross-entropy, answered samples, then flow and samples by t."""
    device = losses.total.device
    answers, answered = (torch.zeros((), dtype=torch.float32, device=device) for _ in range(2))
    if batch.labels is not None:
        answers, answered = (losses.cross_entropy * batch.label_weight).sum(), batch.label_weight.sum()
    t = batch.t if batch.t is not None else losses.flow
    painted = torch.full((), float(len(losses.flow)), dtype=torch.float32, device=device)
    parts = [losses.total, losses.flow.sum(), painted, losses.alignment.sum(), answers, answered]
    return torch.cat([torch.stack([part.detach().float() for part in parts]), *by_time(losses.flow, t, BINS)])


# Making ready -----------------------------------------------------------------------


def component(name: str) -> str:
    """The component (`config.COMPONENTS`) of a parameter of `JanusFlowLoss`."""
    part = name.removeprefix("model.").split(".")[0]
    aligners = {"und_begin": "und_aligner", "head": "alignment_head"}
    return "gen_aligners" if part.startswith("gen_") else aligners.get(part, part)


def prepare_blocks(model: JanusFlow, checkpointing: bool, compiled: bool) -> None:
    """Recompute each LLM block in the backward pass, compile all blocks: in training only, sampling stays as it is."""
    blocks: list[nn.Module] = [*model.llm.layers]
    if compiled:
        # Of each block one for a fixed length, one for any, the same for a single row, all again for FSDP2's views.
        torch._dynamo.config.cache_size_limit = max(32, torch._dynamo.config.cache_size_limit)
        blocks += [*model.siglip.blocks, *model.uvit_encoder.mid_block.res_blocks]
        blocks += model.uvit_decoder.mid_block.res_blocks
    for block in blocks:
        plain = block.forward
        fast = torch.compile(plain) if compiled else plain
        again = checkpointing and block in list(model.llm.layers)
        block.forward = training_forward(plain, fast, again)


def units(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Consecutive blocks, which FSDP2 gathers and frees together: few and large, for between GPUs of one host a
    gathering takes less time than the host needs to start it."""
    found, size = [[]], 0
    for block in blocks:
        if size >= UNIT:
            found.append([])
            size = 0
        found[-1].append(block)
        size += sum(p.numel() for p in block.parameters())
    return found


def training_forward(plain: Callable, fast: Callable, again: bool) -> Callable:
    def forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args)
        return (
            checkpoint(fast, *args, use_reentrant=False, preserve_rng_state=False) if again else fast(*args)
        )

    return forward


def add_lora(model: JanusFlow, config: Config) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("lora.rank needs the package peft: pip install 'janusflow-min[train]'") from None
    lora = config.lora
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets) or LLM_LAYERS, lora_dropout=0.0
    )
    inject_adapter_in_model(settings, model.llm)
