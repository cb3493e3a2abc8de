# SPDX-License-Identifier: MIT
"""The building blocks of `ops.py` as GPU kernels in Triton. Same names, same meaning.

What they save: every intermediate is read and written once; nothing is masked, concatenated or made contiguous; one
row's products with the weights (decoding) run at the bandwidth of the memory, norm and activation included.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ops import Weight, linear
from .ops import attend as attend_any
from .ops import linear_add as linear_add_rows
from .products import ahead, gdc_launch_dependents, gdc_wait, gemv, matmul, quantize_rows
from .quantized import Quantized

CHUNK = 128  # keys that one program of the decoding attention reads
# Of `attend_image`, measured on an H100: queries, keys, keys of the prompt, warps, stages.
BLOCKS = (64, 32, 32, 4, 3)


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
def _apply_rotary(first, second, cos, sin):
    """Rotate the two halves of heads, rounding every operation as the plain path does."""
    ty = first.dtype
    x, y, c, s = first.to(tl.float32), second.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    rotated = (x * c).to(ty).to(tl.float32) - (y * s).to(ty).to(tl.float32)
    other = (y * c).to(ty).to(tl.float32) + (x * s).to(ty).to(tl.float32)
    return rotated.to(ty), other.to(ty)


@triton.jit
def _rotate_heads(read, write, cos, sin, mask, HALF: tl.constexpr):
    """Rotate heads on their way from one place to another, which may be the same."""
    first, second = tl.load(read, mask=mask, other=0.0), tl.load(read + HALF, mask=mask, other=0.0)
    first, second = _apply_rotary(first, second, cos, sin)
    tl.store(write, first, mask=mask)
    tl.store(write + HALF, second, mask=mask)


@triton.jit
def _rope_store(
    qkv, cos, sin, position, q_out, keys, values, tokens, slots,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    HB: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, h, g = tl.arange(0, DB)[None, :], tl.arange(0, HB)[:, None], tl.arange(0, GB)[:, None]
    where = tl.load(position + row) + c
    co = tl.load(cos + where * HALF + j, mask=j < HALF, other=0.0)
    si = tl.load(sin + where * HALF + j, mask=j < HALF, other=0.0)
    base = qkv + (row * tokens + c) * (H + 2 * G) * 2 * HALF
    # queries
    at = h * 2 * HALF + j
    _rotate_heads(
        base + at, q_out + (row * tokens + c) * H * 2 * HALF + at, co, si, (h < H) & (j < HALF), HALF
    )
    # keys and values
    mask, at = (g < G) & (j < HALF), g * 2 * HALF + j
    to = (row * slots + where) * G * 2 * HALF + at
    base += H * 2 * HALF
    _rotate_heads(base + at, keys + to, co, si, mask, HALF)
    base += G * 2 * HALF
    tl.store(values + to, tl.load(base + at, mask=mask, other=0.0), mask=mask)
    tl.store(values + to + HALF, tl.load(base + HALF + at, mask=mask, other=0.0), mask=mask)


def rope_store(qkv, cos, sin, position, keys, values, heads) -> Tensor:
    rows, tokens, _ = qkv.shape
    _, slots, groups, dim = keys.shape
    q = qkv.new_empty(rows, tokens, heads, dim)
    _rope_store[(rows, tokens)](
        qkv, cos, sin, position, q, keys, values, tokens, slots, H=heads, G=groups, HALF=dim // 2,
        HB=triton.next_power_of_2(heads), GB=triton.next_power_of_2(groups), DB=triton.next_power_of_2(dim // 2),
        num_warps=4, **ahead(qkv),
    )  # fmt: skip
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's flash attention, never cuDNN's, which torch may prefer: it is no more precise, and training with it met
    gradients of NaN (`scripts/train_shapes.py`)."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return attend_any(q, keys, values)


@triton.jit
def _rotate_keys(
    qkv, cos, sin, position, tokens,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, g = tl.arange(0, DB)[None, :], tl.arange(0, GB)[:, None]
    mask = (g < G) & (j < HALF)
    where = tl.load(position + row) + c
    co = tl.load(cos + where * HALF + j, mask=j < HALF, other=0.0)
    si = tl.load(sin + where * HALF + j, mask=j < HALF, other=0.0)
    at = qkv + ((row * tokens + c) * (H + 2 * G) + H + g) * 2 * HALF + j
    _rotate_heads(at, at, co, si, mask, HALF)


@triton.jit
def _attend_block(
    q1, q2, keys, values, stride, first, count, last, scale, best, total, sums,
    HALF: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys first to first + BN of one head, of which query i sees those before count and up to last[i]."""
    e, j, w = first + tl.arange(0, BN), tl.arange(0, DB), tl.arange(0, VB)
    at_k = keys + e[None, :] * stride + j[:, None]  # (DB, BN)
    at_v = values + e[:, None] * stride + w[None, :]  # (BN, VB)
    if MASKED or HALF != DB:
        mask_k, mask_v = (
            (e[None, :] < count) & (j[:, None] < HALF),
            (e[:, None] < count) & (w[None, :] < 2 * HALF),
        )
        k1 = tl.load(at_k, mask=mask_k, other=0.0)
        k2 = tl.load(at_k + HALF, mask=mask_k, other=0.0)
        v = tl.load(at_v, mask=mask_v, other=0.0)
    else:
        k1, k2, v = tl.load(at_k), tl.load(at_k + HALF), tl.load(at_v)
    score = tl.dot(q2, k2, tl.dot(q1, k1)) * scale  # (BM, BN), in powers of 2
    if MASKED:
        score = tl.where((e[None, :] < count) & (e[None, :] <= last[:, None]), score, -1e30)
    new = tl.maximum(best, tl.max(score, 1))
    p, old = tl.exp2(score - new[:, None]), tl.exp2(best - new)
    total = total * old + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, sums * old[:, None])
    return new, total, sums


@triton.jit
def _attend_image(
    qkv, cos, sin, position, prefix_keys, prefix_values, source, length, out, tokens, prefix_slots, scale,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PN: tl.constexpr,
):  # fmt: skip
    m, h, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, stride = h // (H // G), (H + 2 * G) * 2 * HALF
    i, j, w = m * BM + tl.arange(0, BM), tl.arange(0, DB), tl.arange(0, VB)
    mask = (i[:, None] < tokens) & (j[None, :] < HALF)
    base = qkv + row * tokens * stride
    at = base + i[:, None] * stride + h * 2 * HALF + j[None, :]
    where = (tl.load(position + row) + i)[:, None] * HALF + j[None, :]
    q1, q2 = _apply_rotary(
        tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0),
        tl.load(cos + where, mask=mask, other=0.0), tl.load(sin + where, mask=mask, other=0.0),
    )  # fmt: skip
    best = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, VB], tl.float32)
    # the prompt, seen whole
    n = tl.load(length + row)
    begin = (tl.load(source + row).to(tl.int64) * prefix_slots * G + group) * 2 * HALF
    for s in range(0, n, PN):
        best, total, sums = _attend_block(
            q1, q2, prefix_keys + begin, prefix_values + begin, G * 2 * HALF, s, n, i + n, scale,
            best, total, sums, HALF, DB, VB, PN, True,
        )  # fmt: skip
    # the image, up to the query
    keys = base + (H + group) * 2 * HALF
    values = keys + G * 2 * HALF
    full = m * BM // BN * BN
    for s in range(0, full, BN):
        best, total, sums = _attend_block(
            q1, q2, keys, values, stride, s, tokens, i, scale, best, total, sums, HALF, DB, VB, BN, False
        )
    for s in range(full, tl.minimum(tokens, m * BM + BM), BN):
        best, total, sums = _attend_block(
            q1, q2, keys, values, stride, s, tokens, i, scale, best, total, sums, HALF, DB, VB, BN, True
        )
    to = out + ((row * tokens + i[:, None]) * H + h) * 2 * HALF + w[None, :]
    tl.store(to, sums / total[:, None], mask=(i[:, None] < tokens) & (w[None, :] < 2 * HALF))


def attend_image(qkv, cos, sin, position, heads, prefix) -> Tensor:
    """Flash attention straight from the products: only the keys are written back, rotated; queries are rotated on
    the way."""
    prefix_keys, prefix_values, source, length = prefix
    (rows, tokens, _), (_, slots, groups, dim) = qkv.shape, prefix_keys.shape
    half = triton.next_power_of_2(dim // 2)
    _rotate_keys[(rows, tokens)](
        qkv, cos, sin, position, tokens, H=heads, G=groups, HALF=dim // 2,
        GB=triton.next_power_of_2(groups), DB=half, num_warps=4,
    )  # fmt: skip
    out = qkv.new_empty(rows * tokens, heads * dim)
    queries, width, prompt, warps, stages = BLOCKS
    _attend_image[(triton.cdiv(tokens, queries), heads, rows)](
        qkv, cos, sin, position, prefix_keys, prefix_values, source, length, out, tokens, slots,
        dim**-0.5 / math.log(2),
        H=heads, G=groups, HALF=dim // 2, DB=max(16, half), VB=max(16, triton.next_power_of_2(dim)),
        BM=queries, BN=width, PN=prompt, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _attend_one(
    q, keys, values, length, part, top, total, scale, slots, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
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
             CHUNK: tl.constexpr, H: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
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
        H=heads, G=groups, D=dim, DB=block, CHUNK=CHUNK, num_warps=4, **ahead(q),
    )  # fmt: skip
    _combine[(rows * heads,)](
        part, top, total, length, out, splits,
        D=dim, DB=block, SB=triton.next_power_of_2(splits), CHUNK=CHUNK, H=heads, num_warps=4, **ahead(q),
    )  # fmt: skip
    return out


def linear_add(x: Tensor | Quantized, weight: Weight, residual: Tensor) -> Tensor:
    if len(residual) == 1:
        return gemv(x, weight, residual=residual)
    if isinstance(weight, Quantized):
        rows = quantize_rows(x, weight.values.dtype) if isinstance(x, Tensor) else x
        return matmul(rows, weight, residual.dtype, residual)
    assert isinstance(x, Tensor)
    return linear_add_rows(x, weight, residual)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight) -> Tensor:
    if len(x) == 1:
        return gemv(x, weight, norm, eps)
    if isinstance(weight, Quantized):
        return matmul(quantize_rows(x, weight.values.dtype, norm, eps), weight, x.dtype)
    return linear(rms_norm(x, norm, eps), weight)


def norm_mlp(x: Tensor, norm: Tensor, eps: float, gate_up: Weight) -> Tensor | Quantized:
    if len(x) == 1:
        return gemv(x, gate_up, norm, eps, gated=True)
    y = norm_linear(x, norm, eps, gate_up)
    return (
        quantize_rows(y, gate_up.values.dtype, gated=True) if isinstance(gate_up, Quantized) else silu_mul(y)
    )
