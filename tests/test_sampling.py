# SPDX-License-Identifier: MIT
"""The seam between the calls and the model: what both samplers promise, and what a user may build on it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import janusflow_min as jf
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.flow import interpolate
from janusflow_min.sampling import PlainSampler, guided_velocity, plan_rows
from janusflow_min.solvers import euler, time_grid

A, B, LONG = [0, 5, 6], [0, 9], [0, 5, 6, 7, 8]
SAMPLERS = {"plain": PlainSampler, "fast": GraphSampler}
QUIET = {"num_inference_steps": 2, "seed": 1, "progress": False}


@pytest.fixture(params=SAMPLERS)
def sampled(request, parity_dir) -> jf.Pipeline:
    """A pipeline of its own, which a test may break, with either sampler."""
    pipe = jf.load(parity_dir, device="cpu", progress=False)
    pipe.sampler = SAMPLERS[request.param](pipe.model)
    return pipe


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_two_calls(sampler, shape: tuple[int, ...], device: str = "cpu") -> None:
    """Results of one velocity, and of two alive at once, survive every later call."""
    z, other = (draw(2, *shape, seed=k).to(device) for k in range(2))
    start, middle = 0.0, 0.5
    for weight in (1.0, 2.0):
        first = guided_velocity(sampler, [A, B], weight)
        one = first(z, start)
        kept = one.clone()
        two = first(other, middle)
        assert torch.equal(one, kept) and not torch.equal(one, two)
        second = guided_velocity(sampler, [B, A], weight)  # of the same shape: the same buffers
        three = second(z, start)
        assert torch.equal(one, kept) and not torch.equal(three, kept)
        torch.testing.assert_close(first(z, start), kept, atol=0.02 if device == "cuda" else 1e-5, rtol=0)
        low = first(z.bfloat16(), start)  # on a GPU the buffers' own dtype
        kept = low.clone()
        first(other.bfloat16(), middle)
        assert low.dtype == torch.bfloat16 and torch.equal(low, kept)


def test_two_calls_of_a_velocity_do_not_share_memory(sampled):
    """Stops: a buffer handed out as a result, so that a solver with two evaluations a step is silently wrong, and a
    second velocity whose prompts replace the first's."""
    check_two_calls(sampled.sampler, sampled.model.latent_shape)


@pytest.mark.gpu
def test_two_calls_of_a_velocity_on_a_gpu(parity_dir):
    """Stops: the same with graphs, whose buffers are fixed."""
    pipe = jf.load(parity_dir, device="cuda", dtype="bfloat16", progress=False)
    assert isinstance(pipe.sampler, GraphSampler)
    check_two_calls(pipe.sampler, pipe.model.latent_shape, "cuda")


def test_a_solver_of_two_evaluations_gives_the_same_with_both_samplers(pipe):
    """Stops: a seam that only Euler can use: here is a midpoint solver, written as a user would."""

    def midpoint(velocity, z, times, on_step=None):
        for i, (now, then) in enumerate(pairwise(times)):
            step = then - now
            early = velocity(z, now)
            late = velocity(z + step / 2 * early, now + step / 2)
            assert not torch.equal(early, late)
            z = z + step * late
            if on_step is not None:
                on_step(i, z)
        return z

    results = []
    for sampler in (PlainSampler(pipe.model), GraphSampler(pipe.model)):
        pipe.sampler = sampler
        for weight in (1.0, 2.0):
            out = pipe.generate("a cat", 2, weight, **QUIET, solver=midpoint)
            results.append(out.latents)
    pipe.sampler = None
    torch.testing.assert_close(results[:2], results[2:], atol=1e-5, rtol=0)
    assert not torch.equal(results[1], pipe.generate("a cat", 2, 2.0, **QUIET).latents)


def test_starting_late_goes_on_where_the_whole_run_was(pipe):
    """Stops: a grid that always begins at 0, so that no image can be edited."""
    noise = draw(1, *pipe.model.latent_shape)
    with torch.inference_mode():
        velocity = guided_velocity(pipe.sampler, [A], 2.0)
        states: list[Tensor] = []
        whole = euler(velocity, noise, time_grid(4), lambda i, z: states.append(z))
        late = euler(velocity, states[1], time_grid(2, start=0.5))
    torch.testing.assert_close(late, whole, atol=1e-5, rtol=0)
    z, _ = interpolate(torch.zeros_like(noise), noise, torch.tensor([0.5]))
    torch.testing.assert_close(z, noise / 2)


def test_the_plan_of_rows():
    """Stops: unconditional rows with the prompt's keys or positions of their own, a prompt that is read twice."""
    plan = plan_rows([A, LONG, A], guided=True)
    assert plan.prompts == [tuple(A), tuple(LONG), (0,)]
    assert plan.source == [0, 1, 0, 2, 2, 2] and plan.position == [3, 5, 3] * 2 and plan.images == 3
    plan = plan_rows([A, LONG, A], guided=False)
    assert plan.source == [0, 1, 0] and plan.position == [3, 5, 3]


def test_a_plan_with_other_unconditional_rows_runs_on_both_samplers(pipe, monkeypatch):
    """Stops: a negative prompt that needs more than one edit: here one is put into the plan, longer than the
    prompts, and one for each image."""
    z, t = draw(2, *pipe.model.latent_shape), 0.0
    negative = [[0, 3, 3, 3, 3, 3, 4], [0, 7]]
    plan = plan_rows([A, B], guided=True)
    changed = type(plan)(
        [tuple(A), tuple(B), *map(tuple, negative)], [0, 1, 2, 3], [len(p) for p in [A, B, *negative]], 2
    )
    monkeypatch.setattr("janusflow_min.sampling.plan_rows", lambda *args: changed)
    plain, fast = (guided_velocity(s(pipe.model), [A, B], 2.0)(z, t) for s in (PlainSampler, GraphSampler))
    torch.testing.assert_close(plain, fast, atol=1e-5, rtol=0)
    monkeypatch.undo()
    assert not torch.allclose(plain, guided_velocity(pipe.sampler, [A, B], 2.0)(z, t), atol=1e-3)


# Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_answer(sampled, temperature, value):
    """Stops: '!!!' from broken weights or an overflow in half precision, told as if it were an answer."""
    with torch.no_grad():
        sampled.model.llm.lm_head.weight[7] = value
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        sampled.understand(["hi", "what?"], max_new_tokens=3, temperature=temperature, seed=1)


def test_a_good_answer_follows_a_broken_one(sampled):
    """Stops: a buffer that remembers the fault of the call before."""
    weight = sampled.model.llm.lm_head.weight
    good = sampled.understand("hi", max_new_tokens=3)
    with torch.no_grad():
        row = weight[7].clone()
        weight[7] = float("nan")
        with pytest.raises(FloatingPointError):
            sampled.understand("hi", max_new_tokens=3)
        weight[7] = row
    assert sampled.understand("hi", max_new_tokens=3) == good


def test_many_questions_are_answered_in_batches(sampled, monkeypatch):
    """Stops: one batch of 2,000 rows, gigabytes of keys and values; answers that depend on where the list is cut."""
    rows = []
    generate = sampled.sampler.generate_tokens

    def note(batch, *args):
        rows.append(len(batch.input_ids))
        return generate(batch, *args)

    monkeypatch.setattr(sampled.sampler, "generate_tokens", note)
    questions = [f"how many {'red ' * (i % 5)}stars?" for i in range(35)]
    answers = sampled.understand(questions, max_new_tokens=5)
    assert rows == [16, 16, 3]
    assert answers == [sampled.understand(q, max_new_tokens=5) for q in questions]
