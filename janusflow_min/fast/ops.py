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

from .quantized import Weight, linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(M, D) -> (M, D), as `llama.RMSNorm`."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """(M, 2F), gate then up -> (M, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add(x: Tensor, weight: Weight, residual: Tensor) -> Tensor:
    """residual (M, N) + x (M, D) by weight (N, D); on a GPU in the residual's place and with one rounding less."""
    if x.is_cuda and isinstance(weight, Tensor):
        return residual.addmm_(x, weight.t())
    return residual + linear(x, weight)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight) -> Tensor:
    return linear(rms_norm(x, norm, eps), weight)


def norm_mlp(x: Tensor, norm: Tensor, eps: float, gate_up: Weight) -> Tensor:
    """The MLP up to its down projection: (M, D), gate_up (2F, D) -> (M, F)."""
    return silu_mul(linear(rms_norm(x, norm, eps), gate_up))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Rotate queries or keys (R, T, H, d); position (R,) of each row's first token."""
    where = position[:, None] + torch.arange(x.shape[1], device=x.device)  # (R, T)
    c, s = cos[where][:, :, None], sin[where][:, :, None]  # (R, T, 1, d/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
) -> Tensor:
    """Rotate queries and keys, put keys and values into the cache, return the queries (R, T, H, d).

    qkv (R, T, (H + 2G)·d); cos, sin (positions, d/2); position (R,) of each row's first token, in the cache too;
    keys, values (R, C, G, d).
    """
    rows, tokens, _ = qkv.shape
    q, k, v = qkv.unflatten(2, (-1, keys.shape[3])).split([heads, keys.shape[2], keys.shape[2]], dim=2)
    row = torch.arange(rows, device=qkv.device)[:, None]
    into = position[:, None] + torch.arange(tokens, device=qkv.device)
    keys[row, into], values[row, into] = apply_rotary(k, cos, sin, position), v
    return apply_rotary(q, cos, sin, position)


def attention(q: Tensor, keys: Tensor, values: Tensor, **options) -> Tensor:
    """torch's: q (R, T, H, d), keys, values (R, S, G, d) -> (R·T, H·d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of T tokens a row, which lie in the first T slots: q (R, T, H, d), keys, values (R, C, G, d)
    -> (R·T, H·d)."""
    tokens = q.shape[1]
    return attention(q, keys[:, :tokens], values[:, :tokens], is_causal=True)


def attend_image(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    heads: int,
    prefix: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Rotate queries and keys; then causal attention of each row's tokens among themselves and to all of its prompt.

    qkv (R, T, (H + 2G)·d), which may be overwritten; position (R,) of each row's first token. prefix = keys
    (P, L, G, d), rotated, values, source (R,), length (R,): row r continues the first length[r] tokens of prompt
    source[r]. -> (R·T, H·d)
    """
    prefix_keys, prefix_values, source, length = prefix
    (rows, tokens, _), (_, slots, groups, dim) = qkv.shape, prefix_keys.shape
    q, k, v = qkv.unflatten(2, (-1, dim)).split([heads, groups, groups], dim=2)
    k = torch.cat([prefix_keys[source], apply_rotary(k, cos, sin, position)], dim=1)  # (R, L + T, G, d)
    v = torch.cat([prefix_values[source], v], dim=1)
    mask = torch.ones(rows, tokens, slots + tokens, dtype=torch.bool, device=qkv.device).tril(slots)
    mask[:, :, :slots] = (torch.arange(slots, device=qkv.device) < length[:, None])[:, None]
    return attention(apply_rotary(q, cos, sin, position), k, v, attn_mask=mask[:, None])


def attend_one(q: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Attention of one token a row, which lies in slot length[r], to slots 0 to length[r]: (R, H, d) -> (R, H·d)."""
    mask = torch.arange(keys.shape[1], device=q.device) <= length[:, None]  # (R, C)
    return attention(q[:, None], keys, values, attn_mask=mask[:, None, None])
