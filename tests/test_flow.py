# SPDX-License-Identifier: MIT
"""Rectified flow on problems with a known answer: no model is needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from janusflow_min.flow import (
    TIME_SCALE,
    classifier_free_guidance,
    flow_loss,
    interpolate,
    rescale_guidance,
    sample_time,
)
from janusflow_min.sampling import guided_velocity
from janusflow_min.solvers import SOLVERS, euler, time_grid


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NOISE, DATA = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)


def test_time_runs_from_noise_to_data():
    """Stops: the likeliest silent fault of a port, the other direction of time (Stable Diffusion 3, Flux)."""
    at_zero, target = interpolate(DATA, NOISE, torch.zeros(2))
    at_one, _ = interpolate(DATA, NOISE, torch.ones(2))
    assert torch.equal(at_zero, NOISE) and torch.equal(at_one, DATA)
    assert torch.equal(target, DATA - NOISE)
    assert TIME_SCALE == 1000.0


def test_interpolation_by_the_formula():
    """Stops: one time for the whole batch, or t and 1 - t swapped."""
    t = torch.tensor([0.25, 0.9])
    z, _ = interpolate(DATA, NOISE, t)
    for b, weight in enumerate(t.tolist()):
        assert_close(z[b], weight * DATA[b] + (1 - weight) * NOISE[b], atol=1e-6, rtol=1e-6)


def test_interpolation_s_slope_is_the_target():
    """Stops: a target of the other sign or scale than the path has."""
    t, h = torch.tensor([0.3, 0.6], dtype=torch.float64), 1e-4
    ahead, target = interpolate(DATA.double(), NOISE.double(), t + h)
    behind, _ = interpolate(DATA.double(), NOISE.double(), t - h)
    assert_close((ahead - behind) / (2 * h), target, atol=1e-8, rtol=1e-8)


# Euler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_constant_velocity_is_integrated_exactly(steps):
    """Stops: a step too many or too few, or one of the wrong length."""
    v = draw(2, 4, 3, 3, seed=2)
    assert_close(euler(lambda z, t: v, NOISE, time_grid(steps)), NOISE + v, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_the_straight_line_is_transported_exactly(steps):
    """Stops: sampling that runs against training: the true velocity to one picture must lead to it."""

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        return (DATA - z) / (1 - t)  # E[x - noise | z_t] where there is one x

    assert_close(euler(velocity, NOISE, time_grid(steps)), DATA, atol=1e-5, rtol=0)


def test_the_error_falls_with_the_first_power_of_the_step():
    """Stops: a step from the wrong state or at the wrong time: dz/dt = z has z_1 = e·z_0, and Euler (1 + 1/n)^n."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        end = euler(lambda z, t: z, start, time_grid(steps)).item()
        assert end == pytest.approx((1 + 1 / steps) ** steps, rel=1e-12)
        errors.append(math.e - end)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_the_velocity_is_taken_at_the_step_s_start():
    """Stops: midpoints or ends in place of starts: dz/dt = t gives (n - 1) / 2n, in the limit 1/2."""
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    end = euler(lambda z, t: torch.full_like(z, t), start, time_grid(10))
    assert end.item() == pytest.approx(0.45, rel=1e-12)


class Network:
    """A sampler that notes the times it is told and answers with the same velocity."""

    def __init__(self, v: torch.Tensor):
        self.v, self.seen = v, []

    def prefill(self, plan):
        def velocity(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert timestep.shape == (len(z),) and timestep.dtype == z.dtype
            self.seen.append(timestep[0].item())
            return self.v

        return velocity

    def guided(self):
        return guided_velocity(self, [[0, 1]] * len(self.v), 1.0)


def test_the_times_that_the_network_is_told():
    """Stops: t in [0, 1], a last time of 1000, a shifted grid, or one time for all rows as a scalar."""
    network = Network(torch.zeros_like(NOISE))
    euler(network.guided(), NOISE, time_grid(4))
    assert network.seen == [0.0, 250.0, 500.0, 750.0]
    network.seen.clear()
    euler(network.guided(), NOISE, time_grid(30))
    assert len(network.seen) == 30
    assert network.seen[29] == torch.tensor(29 / 30 * 1000.0).item()


def test_each_step_is_told():
    """Stops: progress that misses steps, or is told the state before the step."""
    told = []
    end = euler(lambda z, t: torch.ones_like(z), NOISE, time_grid(3), lambda i, z: told.append((i, z)))
    assert [i for i, _ in told] == [0, 1, 2]
    assert_close(told[0][1], NOISE + 1 / 3)
    assert told[2][1] is end or torch.equal(told[2][1], end)


def test_the_noise_is_left_as_it_was():
    """Stops: a step in place, which spoils the caller's latents."""
    noise = NOISE.clone()
    euler(lambda z, t: torch.ones_like(z), noise, time_grid(2))
    assert torch.equal(noise, NOISE)


def test_bfloat16_rounds_as_the_published_sampler():
    """Stops: a time of 29/30 computed in bfloat16, or kept in float32: 966.67 must become 968; and a step or sum
    rounded elsewhere than after each operation."""
    v = draw(2, 4, 3, 3, seed=3).bfloat16()
    network, latents = Network(v), []
    euler(network.guided(), NOISE.bfloat16(), time_grid(30), lambda i, z: latents.append(z))
    seen = network.seen
    assert seen[29] == 968.0
    assert seen == [torch.tensor(i / 30 * 1000.0).bfloat16().item() for i in range(30)]
    z = NOISE.bfloat16()
    step = torch.tensor(1 / 30).bfloat16()
    for after in latents:
        change = (step.float() * v.float()).bfloat16()
        z = (z.float() + change.float()).bfloat16()
        assert torch.equal(after, z)


def test_latents_stay_float32_under_a_bfloat16_network():
    """Stops: the network's dtype that creeps into the state: 30 roundings instead of none."""
    v = draw(2, 4, 3, 3, seed=4).bfloat16()
    end = euler(lambda z, t: v, NOISE, time_grid(30))
    assert end.dtype == torch.float32
    assert_close(end, NOISE + v.float(), atol=2e-6, rtol=0)


# Other solvers and grids ------------------------------------------------------------------------------------------

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_of_each_solver(name, shift):
    """Stops: a coefficient, a time or a state that is off, on equal steps or on shifted ones: the error of dz/dt =
    -2tz, whose z_1 is z_0/e, and of dz/dt = cos(3t) falls by 2 to the power of the order where steps double."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    problems = [
        (lambda z, t: -2 * t * z, math.exp(-1)),
        (lambda z, t: 0 * z + math.cos(3 * t), 1 + math.sin(3) / 3),
    ]
    for velocity, true in problems:
        errors = [
            abs(SOLVERS[name](velocity, start, time_grid(steps, shift=shift)).item() - true)
            for steps in (200, 400)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_counts_its_evaluations_and_tells_its_steps(name):
    """Stops: work that nobody asked for, and progress that stands still."""
    times, told = [], []

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return DATA - NOISE

    end = SOLVERS[name](velocity, NOISE, time_grid(6), lambda i, z: told.append((i, z)))
    assert len(times) == {"midpoint": 12, "heun": 12}.get(name, 6) and min(times) == 0 and max(times) <= 1
    assert [i for i, _ in told] == list(range(6)) and told[-1][1] is end
    assert_close(end, DATA, atol=2e-6, rtol=0)
    assert SOLVERS[name](lambda z, t: NOISE, NOISE.bfloat16(), time_grid(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_the_shifted_grid_is_diffusers(start, shift):
    """Stops: a shift the other way round, or one that moves the ends."""
    times = time_grid(10, start, shift)
    assert len(times) == 11 and times[0] == start and times[-1] == 1.0 and times == sorted(times)
    if shift == 1:
        assert times == [start + (1 - start) * i / 10 for i in range(11)]
    if start == 0:
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.array([1 - i / 10 for i in range(10)]))
        assert_close(
            1 - scheduler.sigmas.double(), torch.tensor(times, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_rescaled_guidance_has_the_spread_of_the_conditional_velocity():
    """Stops: a spread over the batch, or the ratio upside down."""
    cond, uncond = draw(2, 4, 3, 3, seed=5), draw(2, 4, 3, 3, seed=6)
    cond[1] *= 3
    v = classifier_free_guidance(cond, uncond, 5.0)
    whole = rescale_guidance(v, cond, 1.0)
    assert_close(whole.flatten(1).std(1), cond.flatten(1).std(1))
    assert_close(rescale_guidance(v, cond, 0.3), 0.3 * whole + 0.7 * v)


# Guidance -------------------------------------------------------------------------------------------------------


def test_guidance_by_the_formula():
    """Stops: conditional and unconditional swapped, or w where w - 1 belongs."""
    assert torch.equal(classifier_free_guidance(DATA, NOISE, 1.0), DATA)
    assert torch.equal(classifier_free_guidance(DATA, NOISE, 0.0), NOISE)
    assert_close(
        classifier_free_guidance(DATA, NOISE, 5.0), NOISE + 5.0 * (DATA - NOISE), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("weight", [1.5, 2.0, 7.0])
def test_guidance_leads_away_from_the_unconditional(weight):
    """Stops: the other sign, which washes pictures out instead of sharpening them."""
    cond, uncond = torch.tensor(1.0), torch.tensor(0.5)
    assert classifier_free_guidance(cond, uncond, weight) > cond
    assert classifier_free_guidance(cond, cond, weight).item() == pytest.approx(1.0)


# Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_training_times_are_logit_normal(mean, std):
    """Stops: uniform times, a deviation used as a variance, a mean on the wrong side of one half."""
    t = sample_time(200_000, mean, std, generator=torch.Generator().manual_seed(0))
    assert t.shape == (200_000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, rel=0.02)
    normal = torch.distributions.Normal(mean, std)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        point = torch.sigmoid(normal.icdf(torch.tensor(level)))
        assert (t <= point).float().mean().item() == pytest.approx(level, abs=0.005)


def test_training_times_come_from_the_generator_given():
    """Stops: draws from the global generator, which no seed of the caller's repeats."""
    before = torch.random.get_rng_state()
    a, b = (sample_time(5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(a, sample_time(5, generator=torch.Generator().manual_seed(8)))
    assert sample_time(5, device="meta").device.type == "meta"


def test_the_loss_is_each_sample_s_mean_square():
    """Stops: one number for the batch, a sum in place of the mean, a loss in bfloat16."""
    loss = flow_loss(DATA, NOISE)
    wanted = [((DATA[b] - NOISE[b]) ** 2).sum() / DATA[b].numel() for b in range(2)]
    assert_close(loss, torch.stack(wanted))
    low = flow_loss(DATA.bfloat16(), NOISE)
    assert low.dtype == torch.float32
    assert_close(low, flow_loss(DATA.bfloat16().float(), NOISE))


def test_the_true_velocity_has_no_loss():
    """Stops: a target that differs from what the sampler integrates."""
    z, target = interpolate(DATA, NOISE, torch.tensor([0.2, 0.7]))
    assert flow_loss((DATA - z) / (1 - torch.tensor([0.2, 0.7])).view(2, 1, 1, 1), target).max() < 1e-10
