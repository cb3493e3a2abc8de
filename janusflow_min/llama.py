# SPDX-License-Identifier: MIT
"""The language model: a Llama decoder with an explicit key/value cache.

It reads text, image features and noisy image tokens alike, always as embeddings and always causally. Computes what
`transformers` 4.46 `LlamaForCausalLM` computes, which the reference wraps (`modeling_vlm.py`), under the same
weight names below `llm.`.

Legend: B batch, T new tokens, S cached + new tokens, D hidden size, H heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: computed in fp32, cast back, then times the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_cos_sin(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype, upstream_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, computed in fp32 and then cast.

    position_ids (B, T) or (1, T), whole numbers from 0 -> two tensors (B, 1, T, d). upstream_rounding: round the
    frequencies to `dtype` first. The published code casts the whole model to bf16 and this buffer with it, which
    costs it more accuracy than all the rest of bf16.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1.0 / theta**exponent  # (d/2,)
    if upstream_rounding:
        frequencies = frequencies.to(dtype).float()
    angles = position_ids[..., None].float() * frequencies  # (B, T, d/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, T, d): element i pairs with i + d/2
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys x (B, H, T, d) by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of every layer, in buffers of fixed capacity.

    `length` tokens are valid. A forward pass writes behind them and moves `length` on. Where it is `fixed`, what comes
    later is seen and not kept, which is how the flow's sampler keeps a prompt, and nothing else, over all its steps.
    """

    fixed = False

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, G, capacity, d)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, d) behind the valid tokens of `layer`; returns all its keys and values (B, G, S, d)."""
        if self.fixed:
            past = self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
            return torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the key/value cache holds {self.capacity} tokens; {end} are needed")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor, capacity: int) -> KVCache:
        """A new cache with the given rows (indices (B',), repeats allowed) and room for `capacity` tokens."""
        new, end = object.__new__(KVCache), self.length
        layers, _, groups, _, d = self.keys.shape
        new.keys = self.keys.new_zeros(layers, len(rows), groups, capacity, d)
        new.values, new.length = torch.zeros_like(new.keys), end
        new.keys[:, :, :, :end] = self.keys[:, rows, :, :end]
        new.values[:, :, :, :end] = self.values[:, rows, :, :end]
        return new


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.repeats = config.num_attention_heads // config.num_key_value_heads
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = apply_rotary(self.q_proj(x).view(split).transpose(1, 2), *rope)  # (B, H, T, d)
        k = apply_rotary(self.k_proj(x).view(split).transpose(1, 2), *rope)  # (B, G, T, d)
        v = self.v_proj(x).view(split).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (B, G, S, d)
        if self.repeats > 1:
            k, v = k.repeat_interleave(self.repeats, dim=1), v.repeat_interleave(self.repeats, dim=1)
        causal = mask is None and (cache is None or length > 1)  # compiled for any length: no symbol
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embedding table, blocks, final norm and, where `lm_head` is wanted, the output projection.

    upstream_rounding: see `rotary_cos_sin`; quantization: the format of the linear layers where `fast/quantized.py`
    has replaced them. `load` sets both.
    """

    def __init__(self, config: LlamaConfig, lm_head: bool = True):
        super().__init__()
        self.config, self.upstream_rounding = config, False
        self.quantization: str | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        width, rows = config.hidden_size, config.vocab_size
        self.lm_head: nn.Linear = nn.Linear(width, rows, bias=False) if lm_head else None  # type: ignore

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        hidden_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states after the final norm.

        inputs_embeds (B, T, D). position_ids (B, T) or (1, T); by default they count on from the cache.
        attention_mask (B, S), true for tokens that may be seen, the cache's included; None: all of them.
        With `hidden_layer` = k also the states after the k-th block, counted from 1, before the final norm: both
        (B, T, D).
        """
        if hidden_layer is not None and not 1 <= hidden_layer <= len(self.layers):
            raise ValueError(
                f"hidden_layer must lie in 1 to {len(self.layers)}, the number of blocks; got {hidden_layer}"
            )
        length, past = inputs_embeds.shape[1], 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        rope = rotary_cos_sin(position_ids, head_dim, theta, inputs_embeds.dtype, self.upstream_rounding)
        mask = causal_mask(length, past, attention_mask, inputs_embeds.device)
        x, hidden = inputs_embeds, None
        for i, block in enumerate(self.layers, start=1):
            x = block(x, rope, mask, cache)
            if i == hidden_layer:
                hidden = x
        if cache is not None and not cache.fixed:
            cache.length += length
        x = self.norm(x)
        return x if hidden is None else (x, hidden)


def causal_mask(length: int, past: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of S = past + length keys each of `length` queries sees: bool (B or 1, 1, T, S).

    None where plain causal attention, or attention of one query to everything, says the same. A query always sees
    itself: a row of padding would otherwise turn into NaN, and NaN leaks through values that are masked.
    """
    if attention_mask is None and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    mask = (keys <= queries)[None]  # (1, T, S)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, :].bool() | (keys == queries)
    return mask[:, None]


def mask_positions(attention_mask: Tensor) -> Tensor:
    """Position of each token, counted from the first real one of its row: mask (B, T) -> (B, T), 0 at padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
