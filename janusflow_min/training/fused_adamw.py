# SPDX-License-Identifier: MIT
"""`optimizer.update` for all tensors of a model in one launch of a Triton kernel.

Launched tensor by tensor, the update of a model of 280 tensors keeps the host busy for 40 ms a step and more, longer
than the GPU needs for it. Here a table on the GPU says where each tensor's parts lie, and a list of chunks which
tensor, and what of it, each program updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of one program
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COLUMNS = tl.constexpr(7)  # of the table: elements, then where master, gradient, m, v, average and weight lie


@triton.jit
def _update(
    table, rates, chunks, numbers, share1, share2, eps,
    GRAD: tl.constexpr, AVERAGE: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Line by line `optimizer.update`. GRAD and WEIGHT are types, the latter None where the master computes."""
    which = tl.load(chunks + 2 * tl.program_id(0))
    i = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = table + COLUMNS * which
    elements = tl.load(row)
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    inside = i < elements
    master_at = _part(row + 1, tl.float32, ALIGNED) + i
    m_at, v_at = _part(row + 3, tl.float32, ALIGNED) + i, _part(row + 4, tl.float32, ALIGNED) + i
    scale, good, factor = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    correct_m, correct_v, blend = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    master, m, v = tl.load(master_at, inside), tl.load(m_at, inside), tl.load(v_at, inside)
    g = tl.load(_part(row + 2, GRAD, ALIGNED) + i, inside).to(tl.float32) * scale
    g = tl.where(good > 0, g, 0.0)
    m = tl.where(good > 0, m + (g - m) * share1, m)
    v = tl.where(good > 0, v + (g * g - v) * share2, v)
    rate = tl.load(rates + 2 * which) * factor * good
    master *= 1 - rate * tl.load(rates + 2 * which + 1)
    master -= rate * (m / correct_m) / (tl.sqrt_rn(v / correct_v) + eps)
    tl.store(m_at, m, inside)
    tl.store(v_at, v, inside)
    tl.store(master_at, master, inside)
    if AVERAGE:
        average_at = _part(row + 5, tl.float32, ALIGNED) + i
        average = tl.load(average_at, inside)
        tl.store(average_at, average + (master - average) * blend * good, inside)
    if WEIGHT is not None:
        tl.store(_part(row + 6, WEIGHT, ALIGNED) + i, master.to(WEIGHT), inside)


@triton.jit
def _part(cell, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(cell).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def update_all(
    tensors: Sequence[Sequence[Any]],
    rates: Sequence[tuple[float, float]],
    numbers: Tensor,
    schedule: Sequence[Any],
    betas: tuple[float, ...],
    eps: float,
) -> None:
    """One step of every tensor, in place.

    tensors: for each master, gradient, m, v, average and weight (None where there is none), contiguous, on one
    device; rates: learning rate and weight decay of each; the rest as in `optimizer.update`. A CUDA graph can capture
    it after a step with the same tensors, for then nothing is copied from the host.
    """
    device = numbers.device
    if isinstance(schedule[0], Tensor):
        numbers = torch.cat([numbers, torch.stack([*schedule])])
    else:
        numbers = torch.cat([numbers, to_device(np.array(schedule, np.float32), device)])
    scalars = [float(x) for x in (1 - betas[0], 1 - betas[1], eps)]
    groups: dict[tuple, list[int]] = {}
    rows = [[parts[0].numel(), *(0 if x is None else x.data_ptr() for x in parts)] for parts in tensors]
    for k, (row, parts) in enumerate(zip(rows, tensors, strict=True)):
        weight = None if parts[5] is None else parts[5].dtype
        aligned = not any(number % 16 for number in row)  # then four elements are read at once
        groups.setdefault((parts[1].dtype, parts[4] is not None, weight, aligned), []).append(k)
    for (grad, average, weight, aligned), members in groups.items():
        chunks = chunks_of(tuple(rows[k][0] for k in members), device)
        if not len(chunks):
            continue
        _update[(len(chunks),)](
            table_of(tuple(tuple(rows[k]) for k in members), np.int64, device),
            table_of(tuple(rates[k] for k in members), np.float32, device),
            chunks,
            numbers,
            *scalars,
            GRAD=TYPES[grad],
            AVERAGE=average,
            WEIGHT=TYPES.get(weight),
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=8,
        )


@lru_cache(maxsize=16)
def table_of(rows: tuple[tuple[float, ...], ...], dtype: type, device: torch.device) -> Tensor:
    return to_device(np.array(rows, dtype), device)


@lru_cache(maxsize=16)
def chunks_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(C, 2) int32: of every chunk its tensor, and which of the tensor's chunks it is."""
    counts = np.array([-(-size // BLOCK) for size in sizes], np.int64)
    which = np.repeat(np.arange(len(sizes)), counts)
    part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return to_device(np.stack([which, part], 1).astype(np.int32), device)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """From pinned memory: the host does not wait for the kernels already queued."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
