# SPDX-License-Identifier: MIT
"""AdamW over fp32 master weights, with clipping and a moving average, in one pass over memory.

The weights that compute may be bfloat16: then each has an fp32 master copy here, which alone accumulates. One
elementwise function, `update`, steps moments, master, average and computing weight; on a GPU one kernel does the same
to all tensors (`fused_adamw.py`), so that each is read and written once. The moments may have 8 bits
(`eight_bit.py`). Sharded weights (DTensor) are updated shard by shard. A step whose gradient is not finite changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import eight_bit
from .config import OptimizerConfig


class Schedule(NamedTuple):
    """What changes from step to step: numbers, or () tensors on the device, which a captured CUDA graph reads anew at
    each replay."""

    factor: Any  # of the learning rates
    correct_m: Any  # 1 - beta^k
    correct_v: Any
    blend: Any  # share of the new weights in the average


def update(
    tensors: Sequence[Any],
    rate: float,
    decay: float,
    numbers: Tensor,
    schedule: Schedule,
    betas: tuple[float, ...],
    eps: float,
) -> None:
    """One tensor's step, in place.

    tensors: master, gradient, m, v, average (None where there is none), weight (None where the master itself computes);
    numbers (2,): factor of the gradient, and 1 where it is finite.
    """
    master, grad, m, v, average, weight = tensors
    scale, good = numbers
    g = torch.where(good > 0, grad.float() * scale, 0.0)
    m.copy_(torch.where(good > 0, torch.lerp(m, g, 1 - betas[0]), m))
    v.copy_(torch.where(good > 0, torch.lerp(v, g * g, 1 - betas[1]), v))
    if decay:
        master *= 1 - rate * schedule.factor * good * decay
    step = (m / schedule.correct_m) / ((v / schedule.correct_v).sqrt() + eps)
    master -= rate * schedule.factor * good * step
    if average is not None:
        average.lerp_(master, schedule.blend * good)
    if weight is not None:
        weight.copy_(master)


class AdamW:
    """Over named parameters; each tensor's state lies under its name, so a checkpoint needs no order."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        rates: Mapping[str, float],
        config: OptimizerConfig,
        steps: int,
        dtype: torch.dtype = torch.float32,
        kernel: bool = False,
    ):
        """named: fp32 parameters, which become `dtype` here; rates: learning rate of each; steps: of the whole run,
        for the cosine; kernel: update all tensors in one launch (needs triton). In fp32 a parameter is its own
        master."""
        self.total, self.config = steps, config
        self.params = dict(named)
        self.rates = {name: rates[name] for name in self.params}
        self.decays = {n: config.weight_decay if decays(n, p) else 0.0 for n, p in self.params.items()}
        self.master = {name: p.detach() for name, p in self.params.items()}
        if dtype != torch.float32:
            for p in self.params.values():
                p.data = p.data.to(dtype)
        small = [name for name, p in self.master.items() if config.states == "8bit" and eight_bit.fits(p)]
        self.m, self.v = (
            {n: torch.zeros_like(p) for n, p in self.master.items() if n not in small} for _ in "mv"
        )
        self.m_scale, self.v_scale = dict[str, Tensor](), dict[str, Tensor]()  # of what is 8-bit codes
        for name in small:
            self.m[name], self.m_scale[name] = eight_bit.zeros(self.master[name])
            self.v[name], self.v_scale[name] = eight_bit.zeros(self.master[name])
        self.average = {n: p.clone() for n, p in self.master.items()} if config.ema_decay else {}
        self.others: Mapping[str, Tensor] = {}  # what computes in the place of the newest weights
        self.sums: dict[str, Tensor] = {}  # fp32 gradients of earlier micro-batches, in the buffers
        self.buffers: dict[str, Tensor] = {}  # the same memory in every step, as a captured graph needs it
        self.kernel = kernel

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds. Loading fills these tensors in place; `load` then updates the parameters."""
        found = {"master": self.master, "m": self.m, "v": self.v, "average": self.average}
        scales = {"m_scale": self.m_scale, "v_scale": self.v_scale}
        return found | {name: tensors for name, tensors in scales.items() if tensors}

    @torch.no_grad()
    def load(self) -> None:
        for name, p in self.params.items():
            p.copy_(self.master[name])

    @contextmanager
    def computing_with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other weights, `average` for instance, and afterwards with those from before again."""
        own, before = {name: self.params[name].detach() for name in weights}, self.others
        # fp32 parameters are their own masters.
        masters = {**self.master, **before}
        kept = {n: p.clone() if p.dtype == torch.float32 else masters[n] for n, p in own.items()}
        try:
            self.others = {**before, **weights}
            for name, p in own.items():
                p.copy_(weights[name])
            yield
        finally:
            self.others = before
            for name, p in own.items():
                p.copy_(kept[name])

    @torch.no_grad()
    def accumulate(self) -> None:
        """Before another micro-batch: add the gradients to the sums, in fp32."""
        for name, p in self.params.items():
            if p.grad is not None:
                if name in self.sums:
                    self.sums[name].add_(p.grad)
                else:
                    if name not in self.buffers:
                        self.buffers[name] = torch.empty_like(p, dtype=torch.float32)
                    self.sums[name] = self.buffers[name].copy_(p.grad)
                p.grad = None

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the whole step by name, without frozen and unused parameters."""
        if self.sums:
            self.accumulate()
            return self.sums
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}

    def schedule(self, index: int) -> Schedule:
        """Of step `index`, counted from 0."""
        c, k = self.config, index + 1
        blend = 1 - min(c.ema_decay, (1 + index) / (10 + index))  # soon forgets where it started
        return Schedule(rate_factor(c, index, self.total), 1 - c.betas[0] ** k, 1 - c.betas[1] ** k, blend)

    @torch.no_grad()
    def step(self, schedule: Schedule, gradients: Mapping[str, Tensor]) -> Tensor:
        """Apply one step. Returns the gradient's norm (), before clipping."""
        c = self.config
        names = list(gradients)
        norm = self.norm([gradients[name] for name in names])
        numbers = torch.stack(
            [(c.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), torch.isfinite(norm).float()]
        )
        common: dict[str, Any] = dict(numbers=numbers, schedule=schedule, betas=c.betas, eps=c.eps)
        tensors: list[list[Any]] = []
        for name in names:
            weight = self.params[name] if self.params[name].dtype != torch.float32 else None
            grad, average = gradients[name].contiguous(), self.average.get(name)
            parts = (self.master[name], grad, self.m[name], self.v[name], average, weight)
            tensors.append([None if x is None else local(x) for x in parts])
        rates = [(self.rates[name], self.decays[name]) for name in names]
        whole = [k for k, name in enumerate(names) if name not in self.m_scale]
        if self.kernel:
            from .fused_adamw import update_all

            update_all([tensors[k] for k in whole], [rates[k] for k in whole], **common)
        else:
            for k in whole:
                update(tensors[k], *rates[k], **common)
        if self.m_scale:  # on the device once, not for each tensor
            common["schedule"] = Schedule(*(norm.new_zeros(()) + x for x in schedule))
        for k, name in enumerate(names):
            if name in self.m_scale:
                scales = self.m_scale[name], self.v_scale[name]
                eight_bit.update_pieces(update, tensors[k], scales, *rates[k], compiled=self.kernel, **common)
        self.zero()
        return norm

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Euclidean norm over all, shards of other ranks included: ()."""
        if not gradients:
            return torch.zeros((), dtype=torch.float32, device=next(iter(self.master.values())).device)
        norms = torch._foreach_norm([local(g) for g in gradients], 2, torch.float32)
        square = torch.stack(norms).square().sum()
        if isinstance(gradients[0], DTensor):  # then all are
            torch.distributed.all_reduce(square)
        return square.sqrt()

    def zero(self) -> None:
        self.sums = {}
        for p in self.params.values():
            p.grad = None


def decays(name: str, p: Tensor) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to norms, biases and embeddings."""
    return sum(size > 1 for size in p.shape) > 1 and "embed_tokens" not in name and "pos_embed" not in name


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def rate_factor(config: OptimizerConfig, index: int, total: int) -> float:
    """The factor of the learning rates at step `index`, from 0: linear warm-up, then constant or cosine."""
    if index < config.warmup:
        return (index + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    share = min(1.0, (index - config.warmup) / max(1, total - config.warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))
