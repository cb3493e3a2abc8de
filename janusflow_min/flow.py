# SPDX-License-Identifier: MIT
"""Rectified flow, for sampling and for training. Imports no model: `velocity` is any callable.

The convention, everywhere in this library: t runs from 0 to 1, z_0 is noise and z_1 is data,
z_t = t·x + (1 - t)·noise, the velocity is v = x - noise, a step is z <- z + dt·v, and the network takes the time
as `timestep` = 1000·t. So z + (1 - t)·v estimates the data at any time. Guidance: v = w·v_cond - (w - 1)·v_uncond.
(Stable Diffusion 3, Flux and minRF run time the other way round.) Paper section 3.1; the reference's
`demo/app_janusflow.py`.

Legend: B batch, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIME_SCALE = 1000.0  # timestep = TIME_SCALE * t
Velocity = Callable[[Tensor, float], Tensor]  # z (B, C, h, w), t in [0, 1] -> (B, C, h, w)


def classifier_free_guidance(v_cond: Tensor, v_uncond: Tensor, cfg_weight: float | Tensor) -> Tensor:
    """cfg_weight 1 is the conditional velocity alone."""
    return cfg_weight * v_cond - (cfg_weight - 1.0) * v_uncond


def rescale_guidance(v: Tensor, v_cond: Tensor, rescale: float) -> Tensor:
    """The guided velocity (B, C, h, w) with the spread of the conditional one, of each image, by `rescale` in [0, 1]:
    much guidance makes images too vivid (arXiv 2305.08891, section 3.4)."""
    ratio = v_cond.flatten(1).std(1) / v.flatten(1).std(1)
    return v * (1 + rescale * (ratio - 1)).view(-1, 1, 1, 1)


def sample_time(
    count: int,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times t (count,) in (0, 1), logit-normal (paper section 3.4; mean and deviation not stated there).

    `generator` lives on `device`.
    """
    normal = torch.randn(count, generator=generator, device=device, dtype=torch.float32)
    return torch.sigmoid(mean + std * normal)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise (B, C, h, w), t (B,) in [0, 1] -> z_t and the target velocity, both (B, C, h, w)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return t * x + (1 - t) * noise, x - noise


def flow_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32: (B, C, h, w) twice -> (B,)."""
    return (v.float() - target.float()).square().flatten(1).mean(1)
