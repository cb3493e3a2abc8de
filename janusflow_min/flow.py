# SPDX-License-Identifier: MIT
"""Rectified flow, for sampling and for training. Imports no model: `velocity` is any callable.

The convention, everywhere in this library: t runs from 0 to 1, z_0 is noise and z_1 is data,
z_t = t·x + (1 - t)·noise, the velocity is v = x - noise, a step is z <- z + dt·v, and the network takes the time
as `timestep` = 1000·t. Guidance: v = w·v_cond - (w - 1)·v_uncond. (Stable Diffusion 3, Flux and minRF run time the
other way round.) Paper section 3.1; the reference's `demo/app_janusflow.py`.

Legend: B batch, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TIME_SCALE = 1000.0  # timestep = TIME_SCALE * t
Velocity = Callable[[Tensor, Tensor], Tensor]  # z (B, C, h, w), timestep (B,) in [0, 1000] -> (B, C, h, w)
OnStep = Callable[[int, Tensor], None]  # called with the number of each finished step, from 0, and the new z
Solver = Callable[[Velocity, Tensor, Sequence[float], OnStep | None], Tensor]  # as `euler`


def classifier_free_guidance(v_cond: Tensor, v_uncond: Tensor, cfg_weight: float) -> Tensor:
    """cfg_weight 1 is the conditional velocity alone."""
    return cfg_weight * v_cond - (cfg_weight - 1.0) * v_uncond


def time_grid(num_inference_steps: int, start: float = 0.0) -> list[float]:
    """The times from `start` to 1 between equal steps, both ends included: num_inference_steps + 1 of them."""
    return [start + (1 - start) * i / num_inference_steps for i in range(num_inference_steps + 1)]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Integrate z from times[0] to times[-1], one evaluation of the velocity a step.

    To start late, pass z = `interpolate(x, noise, t)[0]` and `time_grid(n, t)`. Everything happens in z's dtype:
    fp32 is closest to the ODE; bf16 rounds time, step and latents just as the published sampler does.
    """
    for i, (now, then) in enumerate(pairwise(times)):
        timestep = torch.full((z.shape[0],), now * TIME_SCALE, dtype=z.dtype, device=z.device)
        step = torch.tensor(then - now, dtype=z.dtype, device="cpu")  # a scalar of the CPU: no transfer
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
    normal = torch.randn(count, generator=generator, device=device, dtype=torch.float32)
    return torch.sigmoid(mean + std * normal)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise (B, C, h, w), t (B,) in [0, 1] -> z_t and the target velocity, both (B, C, h, w)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return t * x + (1 - t) * noise, x - noise


def flow_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32: (B, C, h, w) twice -> (B,)."""
    return (v.float() - target.float()).square().flatten(1).mean(1)
