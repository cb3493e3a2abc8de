# SPDX-License-Identifier: MIT
"""ShallowUViT: the thin convolutional ends of the generation path, around the LLM.

The encoder turns noisy latents into features at half their resolution, the decoder turns the LLM's hidden states
and the encoder's features (one long skip) back into a velocity. Both are conditioned on the time embedding, which
also takes a place of its own in the LLM's sequence. Follows the reference's `uvit.py`; paper section 3.2.

Legend: B batch, C channels, h w latent grid, D the LLM's hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UViTConfig
from .llama import RMSNorm


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the time in [0, 1000]: (B,) -> fp32 (B, dim), cosines first, no frequency shift."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, channels: int, hidden_size: int, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's response norm on (B, h, w, C): each channel's L2 norm over the grid, against their mean."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        norm = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.bias, self.weight * norm + 1, x)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, a channel MLP with response norm, a residual; then scale and shift from the time."""

    def __init__(self, channels: int, config: UViTConfig):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=config.bias)
        self.norm = RMSNorm(channels, config.norm_eps)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels, bias=config.bias)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels, bias=config.bias)
        self.cond_embeds_mapper = nn.Linear(config.hidden_size, 2 * channels, bias=config.bias)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        # Contiguous, or the products would copy their weights for every row of pixels.
        y = self.depthwise(x).permute(0, 2, 3, 1).contiguous()  # (B, h, w, C)
        y = self.channelwise_linear_1(self.norm(y))
        y = self.channelwise_linear_2(self.channelwise_norm(F.gelu(y)))
        x = x + y.permute(0, 3, 1, 2)  # (B, C, h, w)
        scale, shift = self.cond_embeds_mapper(F.silu(t_emb))[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)  # fused: in bf16 one rounding, as the reference has it


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: UViTConfig):
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNextBlock(channels, config) for _ in range(config.num_blocks))

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, t_emb)
        return x


class ShallowUViTEncoder(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        self.time_embed = TimeEmbedding(config.channels, config.hidden_size, config.bias)
        self.in_conv = nn.Conv2d(
            config.in_channels, config.channels, config.kernel_size, config.stride, config.padding
        )
        self.mid_block = MidBlock(config.channels, config)

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w), timestep (B,) in [0, 1000] -> features (B, C', h/2, w/2), t_emb (B, D).

        The features are the long skip too.
        """
        channels = self.time_embed.linear_1.in_features
        t_emb = self.time_embed(timestep_embedding(timestep, channels).to(latents.dtype))
        return self.mid_block(self.in_conv(latents), t_emb), t_emb


class Unpatchify(nn.Module):
    """RMSNorm, 1x1 convolution, pixel shuffle: twice the grid."""

    def __init__(self, in_channels: int, config: UViTConfig):
        super().__init__()
        self.norm = RMSNorm(in_channels, config.norm_eps)
        self.unpatch_conv = nn.Conv2d(in_channels, 4 * config.out_channels, 1, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unpatch_conv(channel_norm(self.norm, x)), 2)


class ShallowUViTDecoder(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        width = config.in_channels + config.channels
        self.input_norm = RMSNorm(config.in_channels, config.norm_eps)
        self.mid_block = MidBlock(width, config)
        self.out_convs = nn.ModuleList([Unpatchify(width, config)])

    def forward(self, hidden: Tensor, skip: Tensor, t_emb: Tensor) -> Tensor:
        """Hidden (B, C, h/2, w/2), the encoder's features as skip, t_emb (B, D) -> velocity (B, C_latent, h, w)."""
        x = torch.cat([channel_norm(self.input_norm, hidden), skip], dim=1)
        return self.out_convs[0](self.mid_block(x, t_emb))


def channel_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """A norm over the channels of (B, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
