# SPDX-License-Identifier: MIT
"""The UViT's parts against diffusers' time embedding and against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from janusflow_min.config import UViTConfig
from janusflow_min.uvit import (
    ConvNextBlock,
    GlobalResponseNorm,
    ShallowUViTDecoder,
    ShallowUViTEncoder,
    TimeEmbedding,
    Unpatchify,
    timestep_embedding,
)

ENCODER = UViTConfig(in_channels=4, out_channels=6, channels=6, hidden_size=10, norm_eps=1e-2)
DECODER = UViTConfig(in_channels=5, out_channels=4, channels=6, hidden_size=10, norm_eps=1e-2)
TOLERANCE = dict(atol=5e-6, rtol=1e-5)


@pytest.fixture(autouse=True)
def the_global_generator_stays():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def fill(module: nn.Module) -> nn.Module:
    """Every weight far from its initial value."""
    for p in module.parameters():
        p.copy_(torch.randn(p.shape) * 0.4)
    return module.eval().requires_grad_(False)


# Plain formulas, float64, channels last ---------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())


def plain_rms(norm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def plain_response(norm: GlobalResponseNorm, x: Tensor) -> Tensor:
    """x (B, h, w, C): b + (w·n + 1)·x, n = the channel's norm over the grid / (mean over channels + 1e-6)."""
    out = torch.empty_like(x)
    weight, bias = norm.weight.double().flatten(), norm.bias.double().flatten()
    for b in range(len(x)):
        norms = [sum(float(v) ** 2 for v in x[b, :, :, c].flatten()) ** 0.5 for c in range(x.shape[-1])]
        mean = sum(norms) / len(norms)
        for c in range(x.shape[-1]):
            out[b, :, :, c] = bias[c] + (weight[c] * norms[c] / (mean + 1e-6) + 1) * x[b, :, :, c]
    return out


def plain_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """x (B, h, w, C), a 7x7 window of its own for each channel, zeros around."""
    padded = torch.zeros(x.shape[0], x.shape[1] + 6, x.shape[2] + 6, x.shape[3], dtype=x.dtype)
    padded[:, 3:-3, 3:-3] = x
    out = torch.zeros_like(x) + (0 if conv.bias is None else conv.bias.double())
    for i in range(7):
        for j in range(7):
            out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] * conv.weight[:, 0, i, j].double()
    return out


def plain_block(block: ConvNextBlock, x: Tensor, t_emb: Tensor) -> Tensor:
    """x (B, h, w, C), t_emb (B, D)."""
    y = plain_rms(block.norm, plain_depthwise(block.depthwise, x))
    y = plain_response(block.channelwise_norm, gelu(plain_linear(block.channelwise_linear_1, y)))
    x = x + plain_linear(block.channelwise_linear_2, y)
    scale_shift = plain_linear(block.cond_embeds_mapper, silu(t_emb))[:, None, None]
    scale, shift = scale_shift[..., : x.shape[-1]], scale_shift[..., x.shape[-1] :]
    return x * (1 + scale) + shift


def last(x: Tensor) -> Tensor:
    """(B, C, h, w) -> float64 (B, h, w, C)."""
    return x.double().permute(0, 2, 3, 1)


# Time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 24, 768])
def test_sinusoids_are_diffusers_s(channels):
    """Stops: sines first, a frequency shift, another period, time in [0, 1]."""
    timesteps = pytest.importorskip("diffusers.models.embeddings").Timesteps
    witness = timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    t = torch.tensor([0.0, 1.0, 33.3333, 500.0, 966.6667, 1000.0])
    ours = timestep_embedding(t, channels)
    assert_close(ours, witness(t), atol=1e-6, rtol=1e-5)
    assert ours.shape == (6, channels) and ours[0].tolist() == [1.0] * (channels // 2) + [0.0] * (
        channels // 2
    )


def test_sinusoids_are_float32_for_a_bfloat16_time():
    """Stops: angles up to 1000 computed in bfloat16, whose steps there are 4."""
    t = torch.tensor([33.25, 968.0], dtype=torch.bfloat16)
    ours = timestep_embedding(t, 16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, timestep_embedding(t.float(), 16))


def test_time_embedding_is_diffusers_s():
    """Stops: another activation between the two layers, or one behind them."""
    module = pytest.importorskip("diffusers.models.embeddings").TimestepEmbedding(8, 12)
    ours = fill(TimeEmbedding(8, 12, bias=True))
    module.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 8)
    assert_close(ours(x), module(x), **TOLERANCE)


# Blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (3, 5, 2, 8)])
def test_response_norm_by_the_formula(shape):
    """Stops: norms over the channels instead of the grid, a mean over the grid or the batch, a lost residual."""
    norm = fill(GlobalResponseNorm(shape[-1]))
    x = torch.randn(shape)
    assert_close(norm(x).double(), plain_response(norm, x.double()), **TOLERANCE)


def test_response_norm_of_zeros_is_its_bias():
    """Stops: a division by zero."""
    norm = fill(GlobalResponseNorm(3))
    assert torch.equal(norm(torch.zeros(2, 4, 4, 3)), norm.bias.expand(2, 4, 4, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (9, 5)])
def test_convnext_block_by_the_formula(bias, grid):
    """Stops: scale and shift swapped, a lost 1 in the scale, the residual taken after it, tanh GELU, a dense 7x7, a
    norm over the grid, SiLU forgotten."""
    config = UViTConfig(channels=6, hidden_size=10, norm_eps=1e-2, bias=bias)
    block = fill(ConvNextBlock(6, config))
    assert (block.depthwise.bias is not None) == bias
    x, t_emb = torch.randn(2, 6, *grid), torch.randn(2, 10)
    wanted = plain_block(block, last(x), t_emb.double())
    assert_close(last(block(x, t_emb)), wanted, atol=2e-5, rtol=1e-5)


def test_affine_forms_are_rounded_once_in_bfloat16():
    """Stops: x·(1 + scale) rounded before the shift is added, which bit equality does not survive."""
    norm = fill(GlobalResponseNorm(16)).bfloat16()
    x = torch.randn(2, 4, 4, 16).bfloat16()
    n = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    n = n / (n.mean(-1, keepdim=True) + 1e-6)
    factor = norm.weight * n + 1
    once = (norm.bias.double() + factor.double() * x.double()).bfloat16()
    twice = norm.bias + factor * x
    assert not torch.equal(once, twice)
    assert (norm(x) == once).float().mean() > 0.999  # float32 inside the fused form can round a tie otherwise


def test_unpatchify_by_the_formula():
    """Stops: another order of the pixel shuffle, a norm over the grid."""
    head = fill(Unpatchify(7, DECODER))
    x = torch.randn(2, 7, 3, 5)
    y = plain_rms(head.norm, last(x)) @ head.unpatch_conv.weight[:, :, 0, 0].double().T
    y = y + head.unpatch_conv.bias.double()  # (B, h, w, 4·C): channel c, row i, column j at 4c + 2i + j
    wanted = torch.empty(2, 4, 6, 10, dtype=torch.float64)
    for c in range(4):
        for i in range(2):
            for j in range(2):
                wanted[:, c, i::2, j::2] = y[..., 4 * c + 2 * i + j]
    assert_close(head(x).double(), wanted, **TOLERANCE)


# The two ends -----------------------------------------------------------------------------------------------------


def test_encoder_by_the_formula():
    """Stops: blocks before the convolution, t_emb from another width, features that are not what the blocks give."""
    encoder = fill(ShallowUViTEncoder(ENCODER))
    z, t = torch.randn(2, 4, 6, 8), torch.tensor([0.0, 750.0])
    features, t_emb = encoder(z, t)
    assert features.shape == (2, 6, 3, 4) and t_emb.shape == (2, 10)
    time = plain_linear(encoder.time_embed.linear_1, timestep_embedding(t, 6).double())
    time = plain_linear(encoder.time_embed.linear_2, silu(time))
    assert_close(t_emb.double(), time, **TOLERANCE)
    patches = last(z).unfold(1, 2, 2).unfold(2, 2, 2)  # (B, h/2, w/2, C, 2, 2)
    x = torch.einsum("bhwcij,ocij->bhwo", patches, encoder.in_conv.weight.double())
    x = x + encoder.in_conv.bias.double()
    for block in encoder.mid_block.res_blocks:
        x = plain_block(block, x, time)
    assert_close(last(features), x, atol=5e-5, rtol=1e-4)


def test_decoder_by_the_formula():
    """Stops: skip in front of the hidden states, the norm over both, the time left out."""
    decoder = fill(ShallowUViTDecoder(DECODER))
    hidden, skip, t_emb = torch.randn(2, 5, 3, 4), torch.randn(2, 6, 3, 4), torch.randn(2, 10)
    x = torch.cat([plain_rms(decoder.input_norm, last(hidden)), last(skip)], -1)
    for block in decoder.mid_block.res_blocks:
        x = plain_block(block, x, t_emb.double())
    wanted = decoder.double().out_convs[0](x.permute(0, 3, 1, 2))
    velocity = decoder.float()(hidden, skip, t_emb)
    assert velocity.shape == (2, 4, 6, 8)
    assert_close(velocity.double(), wanted, atol=5e-5, rtol=1e-4)


def test_without_blocks_the_ends_still_fit():
    """Stops: `layers_in_middle` 0, or no mid block, as an error."""
    encoder = fill(ShallowUViTEncoder(UViTConfig(channels=6, out_channels=6, hidden_size=10, num_blocks=0)))
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(encoder(z, torch.zeros(1))[0], encoder.in_conv(z))


def test_the_time_of_each_row_is_its_own():
    """Stops: the first row's time for the whole batch."""
    encoder = fill(ShallowUViTEncoder(ENCODER))
    z, t = torch.randn(1, 4, 4, 4).repeat(2, 1, 1, 1), torch.tensor([100.0, 900.0])
    features, _ = encoder(z, t)
    assert not torch.allclose(features[0], features[1], atol=1e-2)
    for i in range(2):
        assert_close(features[i], encoder(z[:1], t[i : i + 1])[0][0], **TOLERANCE)
