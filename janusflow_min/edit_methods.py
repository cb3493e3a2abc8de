# SPDX-License-Identifier: MIT
"""The mathematics of editing by a flow, over latents: `editing.py` handles images, prompts and masks.

FlowEdit: Kulikov et al. 2024, arXiv 2412.08629, algorithm 1. Legend: B images, C h w latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .flow import TIME_SCALE, Velocity, classifier_free_guidance, interpolate
from .sampling import Sampler, draw_noise, plan_rows

INVERSION_ITERATIONS = 4  # evaluations for each step that is undone; docs/editing.md compares


def undo_euler(
    velocity: Velocity, x: Tensor, times: Sequence[float], iterations: int = INVERSION_ITERATIONS
) -> Tensor:
    """The z at times[0] from which `euler` goes to x (B, C, h, w) at times[-1].

    Each step's start is the fixed point of z = end - dt·v(z, t), found from z = end by the secant method: Anderson's
    acceleration (1965) with a memory of one, for each image. Without it the moves overshoot where v changes fast.
    """
    dims = tuple(range(1, x.ndim))
    for now, then in reversed(list(pairwise(times))):
        end = x
        x = last_moved = end - (then - now) * velocity(end, now)
        last_residual = x - end
        for _ in range(iterations - 1):
            moved = end - (then - now) * velocity(x, now)
            residual = moved - x
            change = residual - last_residual
            length = change.square().sum(dims, keepdim=True).clamp_min(1e-30)
            x = moved - (residual * change).sum(dims, keepdim=True) / length * (moved - last_moved)
            last_moved, last_residual = moved, residual
    return x


def flowedit_velocity(
    sampler: Sampler,
    x: Tensor,
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    weights: tuple[float, float],
    generators: Sequence[torch.Generator],
) -> Velocity:
    """FlowEdit's velocity (algorithm 1) for images x (B, C, h, w), their prompts (token ids) and guidance of target
    and source. Every evaluation draws fresh noise, and is one forward pass."""
    guided = weights != (1.0, 1.0)
    rows_velocity = sampler.prefill(plan_rows([*target, *source], guided))
    count = len(x)
    weight = x.new_tensor([weights[0]] * count + [weights[1]] * count).view(-1, 1, 1, 1)

    def velocity(z: Tensor, t: float) -> Tensor:
        noise = draw_noise(x.shape[1:], generators).to(x)
        z_source = interpolate(x, noise, x.new_full((count,), t))[0]
        timestep = x.new_full((2 * count,), t * TIME_SCALE)
        v = rows_velocity(torch.cat([z + z_source - x, z_source]), timestep)
        if guided:
            v_cond, v_uncond = v.chunk(2)
            v = classifier_free_guidance(v_cond, v_uncond, weight)
        return v[:count] - v[count:]

    return velocity


def hold_outside(velocity: Velocity, inside: Tensor, start: Tensor, x: Tensor, strength: float) -> Velocity:
    """The velocity where `inside` (B, 1, h, w) is true; elsewhere a straight line from the start to the image x, which
    for FlowEdit, whose start is the image, is no move at all."""
    hold = (x - start) / strength

    def held(z: Tensor, t: float) -> Tensor:
        return torch.where(inside, velocity(z, t), hold)

    return held
