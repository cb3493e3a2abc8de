# SPDX-License-Identifier: MIT
"""The building blocks of `ops.py` as GPU kernels: Triton, and torch's own flash attention. Same names, same meaning.

What they save: every intermediate is read and written once; nothing is masked, concatenated or made contiguous; one
row's products with the weights (decoding) run at the bandwidth of the memory, norm and activation included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import linear
from .ops import linear_add as linear_add_rows

CHUNK = 64  # keys that one program of the decoding attention reads


@triton.jit
def _rms_norm(x, weight, out, dim, eps, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    a = tl.load(x + row * dim + i, mask=i < dim, other=0.0)
    y = a.to(tl.float32)
    y = (y * tl.rsqrt(tl.sum(y * y) / dim + eps)).to(a.dtype).to(tl.float32)
    w = tl.load(weight + i, mask=i < dim, other=0.0).to(tl.float32)
    tl.store(out + row * dim + i, y * w, mask=i < dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    _rms_norm[(rows,)](x, weight, out, dim, eps, BLOCK=block, num_warps=min(8, max(1, block // 512)))
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate_up + row * 2 * width + i, mask=i < width, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=i < width, other=0.0)
    gate = a.to(tl.float32)
    act = (gate * tl.sigmoid(gate)).to(a.dtype).to(tl.float32)
    tl.store(out + row * width + i, act * up.to(tl.float32), mask=i < width)


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul[(rows, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _rope_store(
    qkv, cos, sin, position, slot, q_out, keys, values,
    prefix_keys, prefix_values, source, length,
    tokens, slots, prefix_slots,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    HB: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, DB)[None, :]  # half a head
    g = tl.arange(0, GB)[:, None]
    inside = (g < G) & (j < HALF)
    into = tl.load(slot + row)
    if c >= tokens:  # copy one entry of the prefix
        n, i = tl.load(length + row), c - tokens
        if i < n:
            read = (tl.load(source + row).to(tl.int64) * prefix_slots + i) * G * 2 * HALF + g * 2 * HALF + j
            write = (row * slots + into - n + i) * G * 2 * HALF + g * 2 * HALF + j
            tl.store(keys + write, tl.load(prefix_keys + read, mask=inside), mask=inside)
            tl.store(keys + write + HALF, tl.load(prefix_keys + read + HALF, mask=inside), mask=inside)
            tl.store(values + write, tl.load(prefix_values + read, mask=inside), mask=inside)
            tl.store(values + write + HALF, tl.load(prefix_values + read + HALF, mask=inside), mask=inside)
    else:
        where = tl.load(position + row) + c
        co = tl.load(cos + where * HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
        si = tl.load(sin + where * HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
        base = qkv + (row * tokens + c) * (H + 2 * G) * 2 * HALF
        # queries
        h = tl.arange(0, HB)[:, None]
        mask = (h < H) & (j < HALF)
        a = tl.load(base + h * 2 * HALF + j, mask=mask, other=0.0)
        b = tl.load(base + h * 2 * HALF + HALF + j, mask=mask, other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        first = (x * co).to(a.dtype).to(tl.float32) - (y * si).to(a.dtype).to(tl.float32)
        second = (y * co).to(a.dtype).to(tl.float32) + (x * si).to(a.dtype).to(tl.float32)
        to = q_out + (row * tokens + c) * H * 2 * HALF + h * 2 * HALF + j
        tl.store(to, first, mask=mask)
        tl.store(to + HALF, second, mask=mask)
        # keys and values
        a = tl.load(base + (H + g) * 2 * HALF + j, mask=inside, other=0.0)
        b = tl.load(base + (H + g) * 2 * HALF + HALF + j, mask=inside, other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        first = (x * co).to(a.dtype).to(tl.float32) - (y * si).to(a.dtype).to(tl.float32)
        second = (y * co).to(a.dtype).to(tl.float32) + (x * si).to(a.dtype).to(tl.float32)
        write = (row * slots + into + c) * G * 2 * HALF + g * 2 * HALF + j
        tl.store(keys + write, first, mask=inside)
        tl.store(keys + write + HALF, second, mask=inside)
        a = tl.load(base + (H + G + g) * 2 * HALF + j, mask=inside, other=0.0)
        b = tl.load(base + (H + G + g) * 2 * HALF + HALF + j, mask=inside, other=0.0)
        tl.store(values + write, a, mask=inside)
        tl.store(values + write + HALF, b, mask=inside)


def rope_store(qkv, cos, sin, position, slot, keys, values, heads, prefix=None) -> Tensor:
    rows, tokens, _ = qkv.shape
    _, slots, groups, dim = keys.shape
    q = qkv.new_empty(rows, tokens, heads, dim)
    # Unused pointers without a prefix: any tensor will do.
    prefix_keys, prefix_values, source, length = (keys, values, slot, slot) if prefix is None else prefix
    extra = 0 if prefix is None else prefix_keys.shape[1]
    _rope_store[(rows, tokens + extra)](
        qkv, cos, sin, position, slot, q, keys, values, prefix_keys, prefix_values, source, length,
        tokens, slots, prefix_keys.shape[1], H=heads, G=groups, HALF=dim // 2,
        HB=triton.next_power_of_2(heads), GB=triton.next_power_of_2(groups), DB=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )  # fmt: skip
    return q


def attend(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor, cumulative: Tensor
) -> Tensor:
    """Flash attention over rows of different lengths."""
    rows, tokens, heads, dim = q.shape
    out = torch.ops.aten._flash_attention_forward(
        q.view(-1, heads, dim), keys.view(-1, *keys.shape[2:]), values.view(-1, *values.shape[2:]),
        cumulative, start, tokens, keys.shape[1], 0.0, True, False, seqused_k=used,
    )[0]  # fmt: skip
    return out.view(rows, tokens, heads * dim)


@triton.jit
def _attend_one(
    q, keys, values, length, part, top, total, scale, slots, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, h, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n = tl.load(length + row) + 1
    if s * CHUNK < n:
        i, j = s * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DB)
        at = ((row * slots + i[:, None]) * G + h // (H // G)) * D + j[None, :]
        mask = (i[:, None] < n) & (j[None, :] < D)
        query = tl.load(q + (row * H + h) * D + j, mask=j < D, other=0.0).to(tl.float32)
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(i < n, tl.sum(k * query[None, :], 1) * scale, -1e30)
        best = tl.max(score)
        p = tl.where(i < n, tl.exp(score - best), 0.0)
        place = (row * H + h) * splits + s
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(part + place * D + j, tl.sum(p[:, None] * v, 0), mask=j < D)
        tl.store(top + place, best)
        tl.store(total + place, tl.sum(p))


@triton.jit
def _combine(part, top, total, length, out, splits, D: tl.constexpr, DB: tl.constexpr, SB: tl.constexpr,
             CHUNK: tl.constexpr, H: tl.constexpr):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    n = tl.load(length + place // H) + 1
    s, j = tl.arange(0, SB), tl.arange(0, DB)
    there = s * CHUNK < n
    best = tl.load(top + place * splits + s, mask=there, other=-1e30)
    weight = tl.exp(best - tl.max(best)) * there.to(tl.float32)
    sums = tl.load(total + place * splits + s, mask=there, other=0.0)
    mask = there[:, None] & (j[None, :] < D)
    parts = tl.load(part + (place * splits + s[:, None]) * D + j[None, :], mask=mask, other=0.0)
    y = tl.sum(parts * weight[:, None], 0) / tl.sum(sums * weight)
    tl.store(out + place * D + j, y, mask=j < D)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Each program reads a chunk of one head's keys, those behind the length idle; a second kernel adds up."""
    rows, heads, dim = q.shape
    slots, groups = keys.shape[1], keys.shape[2]
    splits = triton.cdiv(slots, CHUNK)
    part = torch.empty(rows, heads, splits, dim, device=q.device, dtype=torch.float32)
    top, total = (torch.empty(rows, heads, splits, device=q.device, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(rows, heads * dim)
    block = triton.next_power_of_2(dim)
    _attend_one[(rows, heads, splits)](
        q, keys, values, length, part, top, total, dim**-0.5, slots, splits,
        H=heads, G=groups, D=dim, DB=block, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    _combine[(rows * heads,)](
        part, top, total, length, out, splits,
        D=dim, DB=block, SB=triton.next_power_of_2(splits), CHUNK=CHUNK, H=heads, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gemv(
    x, weight, norm, residual, out, dim, count, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    XB: tl.constexpr, KB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * NB + tl.arange(0, NB)
    rows, up_rows = n.to(tl.int64)[:, None] * dim, (n + count).to(tl.int64)[:, None] * dim
    ty = x.dtype.element_ty
    if NORM:
        i = tl.arange(0, XB)
        whole = tl.load(x + i, mask=i < dim, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(whole * whole) / dim + eps)
    sums = tl.zeros([NB, KB], dtype=tl.float32)
    ups = tl.zeros([NB, KB], dtype=tl.float32)
    for k in range(0, dim, KB):
        i = k + tl.arange(0, KB)
        a = tl.load(x + i, mask=i < dim, other=0.0).to(tl.float32)
        if NORM:
            w = tl.load(norm + i, mask=i < dim, other=0.0).to(tl.float32)
            a = ((a * inverse).to(ty).to(tl.float32) * w).to(ty).to(tl.float32)
        mask = (n[:, None] < count) & (i[None, :] < dim)
        sums += tl.load(weight + rows + i[None, :], mask=mask, other=0.0).to(tl.float32) * a[None, :]
        if GATED:
            ups += tl.load(weight + up_rows + i[None, :], mask=mask, other=0.0).to(tl.float32) * a[None, :]
    y = tl.sum(sums, 1).to(ty).to(tl.float32)
    if GATED:
        y = (y * tl.sigmoid(y)).to(ty).to(tl.float32) * tl.sum(ups, 1).to(ty).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + n, mask=n < count, other=0.0).to(tl.float32)
    tl.store(out + n, y, mask=n < count)


def gemv(x, weight, norm=None, eps=0.0, residual=None, gated=False) -> Tensor:
    """One row by a matrix: (1, D) by (N, D) -> (1, N), norm before, SiLU gate or residual after."""
    dim = x.shape[1]
    count = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(1, count)
    many, long = count > 16384, dim > 4096
    block = 4 if many or long else 2
    _gemv[(triton.cdiv(count, block),)](
        x, weight, weight if norm is None else norm, x if residual is None else residual, out, dim, count, eps,
        NORM=norm is not None, GATED=gated, RESIDUAL=residual is not None,
        XB=triton.next_power_of_2(dim), KB=min(1024, triton.next_power_of_2(dim)), NB=block, num_warps=4,
    )  # fmt: skip
    return out


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return gemv(x, weight, residual=residual) if len(x) == 1 else linear_add_rows(x, weight, residual)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    return gemv(x, weight, norm, eps) if len(x) == 1 else linear(rms_norm(x, norm, eps), weight)


def norm_mlp(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    if len(x) == 1:
        return gemv(x, gate_up, norm, eps, gated=True)
    return silu_mul(linear(rms_norm(x, norm, eps), gate_up))
