# SPDX-License-Identifier: MIT
"""AdamW's moments in 8 bits instead of 32 (Dettmers et al. 2021, arXiv 2110.02861), by torchao's quantization.

A value is one of 256 numbers in [-1, 1] times a scale that it shares with its neighbours. The step itself is
`optimizer.update`, on pieces that are fp32 for its duration. Of the second moment the root is kept: it spans as many
decades as the first moment, where the square would vanish first, and dividing by it would blow the step up (on the
sparse gradients of the test torchao's own AdamW8bit, which keeps it, goes 300 times the way of fp32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # values of one scale
LEAST = 4096  # values; smaller tensors keep fp32, as torchao's optimizers do
PIECE = 2**24  # values that are fp32 at once


def fits(p: Tensor) -> bool:
    return p.numel() >= LEAST and p.numel() % BLOCK == 0


def zeros(p: Tensor) -> tuple[Tensor, Tensor]:
    """A moment of the tensor: codes of its shape, and scales (numel / BLOCK,)."""
    return torch.zeros_like(p, dtype=torch.uint8), p.new_zeros(p.numel() // BLOCK, dtype=torch.float32)


@functools.cache
def code_map(signed: bool, device: torch.device) -> Tensor:
    """(256,) the numbers that codes stand for, in order."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), dtype=torch.float32, device=device)


def update_pieces(
    update: Callable[..., None],
    tensors: Sequence[Any],
    scales: tuple[Tensor, Tensor],
    rate: float,
    decay: float,
    numbers: Tensor,
    schedule: Any,
    compiled: bool,
    **constants: Any,
) -> None:
    """One tensor's step, as `optimizer.update`; m and v are codes with these scales, the schedule () tensors."""
    maps = code_map(True, numbers.device), code_map(False, numbers.device)
    own = torch.full((), rate, dtype=torch.float32, device=numbers.device)
    flat: list[Any] = [None if x is None else x.view(-1) for x in tensors]
    step = compiled_step() if compiled else step_piece
    for start in range(0, flat[0].numel(), PIECE):
        piece, blocks = slice(start, start + PIECE), slice(start // BLOCK, (start + PIECE) // BLOCK)
        parts = [None if x is None else x[piece] for x in flat]
        both = [scale[blocks] for scale in scales]
        step(update, parts, both, maps, own, decay, numbers, schedule, **constants)


@functools.cache
def compiled_step() -> Callable[..., None]:
    return torch.compile(step_piece, dynamic=True)


def step_piece(
    update: Callable[..., None],
    tensors: Sequence[Any],
    scales: Sequence[Tensor],
    maps: tuple[Tensor, Tensor],
    rate: Tensor,
    decay: float,
    numbers: Tensor,
    schedule: Any,
    **constants: Any,
) -> None:
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    master, grad, *codes, average, weight = tensors
    m, root = (dequant_with_qmap(*each) for each in zip(codes, maps, scales, strict=True))
    v = root.square()
    update((master, grad, m, v, average, weight), rate, decay, numbers, schedule, **constants)
    good = numbers[1] > 0  # rounded anew, the moments would change in a step that must change nothing
    for values, code, of_code, scale in zip((m, v.sqrt()), codes, maps, scales, strict=True):
        scaled, new = scale_tensor(values, BLOCK)
        code.copy_(torch.where(good, quantize_8bit_with_qmap(scaled, of_code), code))
        scale.copy_(torch.where(good, new, scale))
