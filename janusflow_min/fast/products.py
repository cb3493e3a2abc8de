# SPDX-License-Identifier: MIT
"""Products with the LLM's matrices as GPU kernels in Triton: one row by any matrix, many rows by an 8-bit one.

One row runs at the bandwidth of the memory, norm and activation included. Of many, `quantized.py` says what is
computed: rows are rounded to 8 bits by the kernel that makes them (norm, gate), and scales and residual are the last
thing that the product's kernel does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantized import LARGEST, Quantized, Weight

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None


def ahead(x: Tensor) -> dict[str, bool]:
    """A launch's options: from Hopper on its programs start while the kernel before is still at work, and wait for
    its results at `gdc_wait` (programmatic dependent launch)."""
    able = gdc_wait is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"AHEAD": True, "launch_pdl": True} if able else {"AHEAD": False}


@triton.jit
def _gemv(
    x, weight, scale, norm, residual, out, dim, count, eps,
    SCALED: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    KB: tl.constexpr, NB: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n, i = tl.program_id(0) * NB + tl.arange(0, NB), tl.arange(0, KB)
    mask = (n[:, None] < count) & (i[None, :] < dim)
    if AHEAD:
        gdc_launch_dependents()
    rows = tl.load(weight + n.to(tl.int64)[:, None] * dim + i[None, :], mask=mask, other=0.0)
    if GATED:
        up_rows = tl.load(weight + (n + count).to(tl.int64)[:, None] * dim + i[None, :], mask=mask, other=0.0)
    if AHEAD:  # the weights are on their way; what the kernel before writes is read from here on
        gdc_wait()
    ty = x.dtype.element_ty
    a = tl.load(x + i, mask=i < dim, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(norm + i, mask=i < dim, other=0.0).to(tl.float32)
        a = ((a * tl.rsqrt(tl.sum(a * a) / dim + eps)).to(ty).to(tl.float32) * w).to(ty).to(tl.float32)
    y = tl.sum(rows.to(tl.float32) * a[None, :], 1)
    if SCALED:
        y *= tl.load(scale + n, mask=n < count, other=0.0)
    if GATED:
        up = tl.sum(up_rows.to(tl.float32) * a[None, :], 1)
        if SCALED:
            up *= tl.load(scale + count + n, mask=n < count, other=0.0)
        y = y.to(ty).to(tl.float32)
        y = (y * tl.sigmoid(y)).to(ty).to(tl.float32) * up.to(ty).to(tl.float32)
    if RESIDUAL:
        y = y.to(ty).to(tl.float32) + tl.load(residual + n, mask=n < count, other=0.0).to(tl.float32)
    tl.store(out + n, y, mask=n < count)


def gemv(x, weight: Weight, norm=None, eps=0.0, residual=None, gated=False) -> Tensor:
    """One row by a matrix: (1, D) by (N, D) -> (1, N), norm before, SiLU gate or residual after."""
    dim, scaled = x.shape[1], isinstance(weight, Quantized)
    count = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(1, count)
    values, scale = (weight.values, weight.scale) if isinstance(weight, Quantized) else (weight, weight)
    block, warps = gemv_sizes(dim, count, gated, scaled)
    _gemv[(triton.cdiv(count, block),)](
        x, values, scale, x if norm is None else norm, x if residual is None else residual, out, dim, count, eps,
        SCALED=scaled, NORM=norm is not None, GATED=gated, RESIDUAL=residual is not None,
        KB=triton.next_power_of_2(dim), NB=block, num_warps=warps, **ahead(x),
    )  # fmt: skip
    return out


def gemv_sizes(dim: int, count: int, gated: bool, scaled: bool) -> tuple[int, int]:
    """Rows of a program and its warps; measured on an H100."""
    if scaled:
        return (4, 4) if gated else (8, 4) if count > 6000 else (2, 8 if dim > 4096 else 4)
    return 4 if count > 6000 and not gated else 2, 4


@triton.jit
def _quantize_rows(
    x, weight, values, scale, dim, eps, largest,
    NORM: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = x + row * (2 * dim if GATED else dim) + i
    a = tl.load(at, mask=i < dim, other=0.0)
    y = a.to(tl.float32)
    if NORM:
        y = (y * tl.rsqrt(tl.sum(y * y) / dim + eps)).to(a.dtype).to(tl.float32)
        y *= tl.load(weight + i, mask=i < dim, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(at + dim, mask=i < dim, other=0.0).to(tl.float32)
        y = (y * tl.sigmoid(y)).to(a.dtype).to(tl.float32) * up
    y = y.to(a.dtype).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(y)), 1e-30) / largest
    y = y / s
    if WHOLE:  # to the nearest whole number, halves to even ones: fp32 has no room for less than 1 there
        y = (y + 12582912.0) - 12582912.0
    tl.store(values + row * dim + i, y.to(values.dtype.element_ty), mask=i < dim)
    tl.store(scale + row, s)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False
) -> Quantized:
    """x (M, K), after an RMS norm if there is one; gated: x (M, 2K), gate then up."""
    rows, dim = x.shape[0], x.shape[1] // (2 if gated else 1)
    result = Quantized(
        torch.empty(rows, dim, dtype=dtype, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
    )
    block = triton.next_power_of_2(dim)
    _quantize_rows[(rows,)](
        x, x if norm is None else norm, result.values, result.scale, dim, eps, LARGEST[dtype],
        NORM=norm is not None, GATED=gated, WHOLE=dtype == torch.int8, BLOCK=block,
        num_warps=min(8, max(1, block // 512)), **ahead(x),
    )  # fmt: skip
    return result


@triton.jit
def _matmul(
    a, b, a_scale, b_scale, residual, out, rows, count, dim,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    # Programs in bands of BAND blocks of rows, so that those at work together share what they read.
    across, down = tl.cdiv(count, BN), tl.cdiv(rows, BM)
    place = tl.program_id(0) % (BAND * across)
    first = tl.program_id(0) // (BAND * across) * BAND
    high = tl.minimum(down - first, BAND)
    i = (first + place % high) * BM + tl.arange(0, BM)
    j = place // high * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at_a = a + (i % rows).to(tl.int64)[:, None] * dim + k[None, :]
    at_b = b + (j % count).to(tl.int64)[None, :] * dim + k[:, None]
    kind = tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([BM, BN], dtype=kind)
    for start in range(0, dim, BK):
        left = tl.load(at_a, mask=k[None, :] < dim - start, other=0.0)
        right = tl.load(at_b, mask=k[:, None] < dim - start, other=0.0)
        sums = tl.dot(left, right, sums, out_dtype=kind)
        at_a += BK
        at_b += BK
    y = sums.to(tl.float32) * tl.load(a_scale + i, mask=i < rows, other=0.0)[:, None]
    y *= tl.load(b_scale + j, mask=j < count, other=0.0)[None, :]
    to, mask = i.to(tl.int64)[:, None] * count + j[None, :], (i[:, None] < rows) & (j[None, :] < count)
    if RESIDUAL:
        y += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, y, mask=mask)


def matmul(x: Quantized, weight: Quantized, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    """(M, K) by (N, K) -> (M, N), added to the residual in its place if there is one."""
    (rows, dim), count = x.shape, weight.shape[0]
    out = torch.empty(rows, count, dtype=dtype, device=x.values.device) if residual is None else residual
    m, n, k, warps, stages = block_sizes(rows)
    _matmul[(triton.cdiv(rows, m) * triton.cdiv(count, n),)](
        x.values, weight.values, x.scale, weight.scale, out, out, rows, count, dim,
        RESIDUAL=residual is not None, BM=m, BN=n, BK=k, BAND=8, num_warps=warps, num_stages=stages,
        **ahead(out),
    )  # fmt: skip
    return out


def block_sizes(rows: int) -> tuple[int, int, int, int, int]:
    """Rows, outputs and inputs of a block, warps, stages; measured on an H100."""
    if rows <= 16:
        return 16, 16, 256, 2, 5
    return (64, 32, 256, 4, 4) if rows <= 64 else (128, 128, 128, 4, 3)
