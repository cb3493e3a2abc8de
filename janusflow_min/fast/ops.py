# SPDX-License-Identifier: MIT
"""The fast path's building blocks in plain PyTorch: what each kernel of `kernels.py` computes, on any device.

Rounding follows the plain path (`llama.py`) operation by operation, so in bf16 the two differ by summation order.

Legend: R rows of the batch, T new tokens a row, M tokens in all, D hidden size, F MLP width, H heads, G key/value
heads, d head size, C slots of a row's cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(M, D) -> (M, D), as `llama.RMSNorm`."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """(M, 2F), gate then up -> (M, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(M, D) by (N, D) -> (M, N)."""
    return F.linear(x, weight)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual (M, N) + x (M, D) by weight (N, D); on a GPU with one rounding instead of two."""
    return torch.addmm(residual, x, weight.t()) if x.is_cuda else residual + F.linear(x, weight)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    return linear(rms_norm(x, norm, eps), weight)


def norm_mlp(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
    """The MLP up to its down projection: (M, D), gate_up (2F, D) -> (M, F)."""
    return silu_mul(linear(rms_norm(x, norm, eps), gate_up))


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    prefix: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Turn queries and keys, put keys and values into the cache, return the queries (R, T, H, d).

    qkv (R, T, (H + 2G)·d); cos, sin (positions, d/2); position, slot (R,) of each row's first token; keys, values
    (R, C, G, d). prefix = keys (P, L, G, d), values, source (R,), length (R,): in front of its slot, row r also
    gets the first length[r] entries of prefix row source[r].
    """
    rows, tokens, _ = qkv.shape
    groups, half = keys.shape[2], cos.shape[1]
    q, k, v = qkv.unflatten(2, (heads + 2 * groups, 2 * half)).split([heads, groups, groups], dim=2)
    steps = torch.arange(tokens, device=qkv.device)
    where = position[:, None] + steps  # (R, T)
    c, s = cos[where][:, :, None], sin[where][:, :, None]  # (R, T, 1, d/2)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    into = (slot[:, None] + steps, torch.arange(rows, device=qkv.device)[:, None])
    keys[into[1], into[0]], values[into[1], into[0]] = turn(k), v
    if prefix is not None:
        prefix_keys, prefix_values, source, length = prefix
        for r in range(rows):
            n, end, row = int(length[r]), int(slot[r]), int(source[r])
            keys[r, end - n : end], values[r, end - n : end] = prefix_keys[row, :n], prefix_values[row, :n]
    return turn(q)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, used: Tensor, cumulative: Tensor
) -> Tensor:
    """Causal attention of each row's T last tokens to its used[r] keys from a start slot on.

    q (R, T, H, d), keys, values (R, C, G, d) -> (R, T, H·d). start (R + 1,): r·C plus the slot, then R·C; used
    (R,); cumulative (R + 1,): 0, T, 2T, …; all int32, as flash attention wants them.
    """
    rows, tokens, heads, _ = q.shape
    slots = torch.arange(keys.shape[1], device=q.device)
    first = start[:-1] - keys.shape[1] * torch.arange(rows, device=q.device)
    last = (
        (first + used)[:, None] - tokens + torch.arange(tokens, device=q.device)
    )  # (R, T): slot of each query
    mask = (slots >= first[:, None, None]) & (slots <= last[:, :, None])  # (R, T, C)
    mask |= slots == last[:, :, None]
    k, v = (x.transpose(1, 2).repeat_interleave(heads // keys.shape[2], 1) for x in (keys, values))
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None])
    return y.transpose(1, 2).flatten(2)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Attention of one token a row, which lies in slot length[r], to slots 0 to length[r]: (R, H, d) -> (R, H·d)."""
    start = keys.shape[1] * torch.arange(len(q) + 1, device=q.device)
    return attend(q[:, None], keys, values, start, length + 1, start)[:, 0]
