# SPDX-License-Identifier: MIT
"""Solvers of the flow: functions that follow a velocity from noise (t = 0) to data (t = 1), and their times.

Each takes velocity(z, t), z (B, C, h, w), the times, and a function that is told each finished step; everything
happens in z's dtype: fp32 is closest to the ODE; bf16 rounds time, step and latents just as the published sampler does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .flow import Velocity

OnStep = Callable[[int, Tensor], None]  # called with the number of each finished step, from 0, and the new z
Solver = Callable[[Velocity, Tensor, Sequence[float], OnStep | None], Tensor]  # as `euler`


def time_grid(num_inference_steps: int, start: float = 0.0, shift: float = 1.0) -> list[float]:
    """The num_inference_steps + 1 times from `start` to 1, both included.

    shift 1: equal steps. Above it more of them near the noise, by diffusers' rule for its flow schedulers:
    s' = shift·s / (1 + (shift - 1)·s) with s = 1 - t.
    """
    if shift == 1:
        return [start + (1 - start) * i / num_inference_steps for i in range(num_inference_steps + 1)]
    first = (1 - start) / (shift - (shift - 1) * (1 - start))  # what becomes 1 - start
    even = [first * (1 - i / num_inference_steps) for i in range(1, num_inference_steps + 1)]
    return [start, *(1 - shift * s / (1 + (shift - 1) * s) for s in even)]


def euler(velocity: Velocity, z: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Integrate z from times[0] to times[-1], one evaluation of the velocity a step: the published solver. First order.

    To start late, pass z = `flow.interpolate(x, noise, t)[0]` and `time_grid(n, t)`.
    """
    for i, (now, then) in enumerate(pairwise(times)):
        z = _advance(z, then - now, velocity(z, now))
        if on_step is not None:
            on_step(i, z)
    return z


def midpoint(velocity: Velocity, z: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """As `euler`, by the velocity in the middle of each step: two evaluations. Second order."""
    for i, (now, then) in enumerate(pairwise(times)):
        half = _advance(z, (then - now) / 2, velocity(z, now))
        z = _advance(z, then - now, velocity(half, (now + then) / 2))
        if on_step is not None:
            on_step(i, z)
    return z


def heun(velocity: Velocity, z: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """As `euler`, by the mean of the velocities at both ends of each step: two evaluations. Second order."""
    for i, (now, then) in enumerate(pairwise(times)):
        first = velocity(z, now)
        second = velocity(_advance(z, then - now, first), then)
        z = _advance(z, then - now, (first + second) / 2)
        if on_step is not None:
            on_step(i, z)
    return z


def ab2(velocity: Velocity, z: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """As `euler`, by Adams and Bashforth's two-step rule: one evaluation a step, and the one before. Second order."""
    before: Tensor | None = None
    last_step = 1.0
    for i, (now, then) in enumerate(pairwise(times)):
        v, step = velocity(z, now), then - now
        ahead = v if before is None else v + (v - before) * (step / last_step / 2)
        z, before, last_step = _advance(z, step, ahead), v, step
        if on_step is not None:
            on_step(i, z)
    return z


SOLVERS: dict[str, Solver] = {"euler": euler, "midpoint": midpoint, "heun": heun, "ab2": ab2}


def find_solver(solver: str | Solver) -> Solver:
    """A solver by its name, or the function itself."""
    return SOLVERS[solver] if isinstance(solver, str) else solver


def _advance(z: Tensor, step: float, v: Tensor) -> Tensor:
    scalar = torch.tensor(step, dtype=z.dtype, device="cpu")  # on the CPU: no transfer
    return z + scalar * v.to(z.dtype)
