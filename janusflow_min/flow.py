# SPDX-License-Identifier: MIT
"""Rectified flow, for sampling and for training. Imports no model: `velocity` is any callable.

The convention, everywhere in this library: t runs from 0 to 1, z_0 is noise and z_1 is data,
z_t = t·x + (1 - t)·noise, the velocity is v = x - noise, a step is z <- z + v/n, and the network is told the time
as `timestep` = 1000·t. Guidance: v = w·v_cond - (w - 1)·v_uncond. (Stable Diffusion 3, Flux and minRF run time the
other way round.) Paper section 3.1; the reference's `demo/app_janusflow.py`.

Legend: B batch, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIME_SCALE = 1000.0  # timestep = TIME_SCALE * t


def guide(v_cond: Tensor, v_uncond: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance; weight 1 is the conditional velocity alone."""
    return weight * v_cond - (weight - 1.0) * v_uncond


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from noise to data in `num_steps` equal steps.

    velocity(z (B, C, h, w), timestep (B,) in [0, 1000)) -> (B, C, h, w). `on_step(i, z)` is told each new z.
    Everything happens in the noise's dtype: fp32 is closest to the ODE; bf16 rounds time, step and latents just as
    the published sampler does.
    """
    z, step = noise, torch.tensor(1.0 / num_steps, dtype=noise.dtype)
    for i in range(num_steps):
        timestep = torch.full((z.shape[0],), i / num_steps * TIME_SCALE, dtype=z.dtype, device=z.device)
        z = z + step * velocity(z, timestep).to(z.dtype)
        if on_step is not None:
            on_step(i, z)
    return z


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
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise (B, C, h, w), t (B,) in [0, 1] -> z_t and the target velocity, both (B, C, h, w)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return t * x + (1 - t) * noise, x - noise


def flow_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32: (B, C, h, w) twice -> (B,)."""
    return (v.float() - target.float()).square().flatten(1).mean(1)
