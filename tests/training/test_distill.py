# SPDX-License-Identifier: MIT
"""Distillation: its targets against plain formulas, and whole runs, on the tiny random checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from janusflow_min.flow import interpolate
from janusflow_min.sampling import PlainSampler, guided_velocity
from janusflow_min.solvers import ab2, time_grid
from janusflow_min.training.config import Config
from janusflow_min.training.metrics import CLOCK, Report, read_lines
from janusflow_min.training.trainer import Trainer

ASKED = [(0, "a cat"), (1, "a small yellow bird"), (2, "a dog")]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing the curves takes longer than the run."""
    monkeypatch.setattr(Report, "plot", lambda self: None)


@pytest.fixture
def settings(rounds_for):
    """`rounds_for` with this stage's table."""
    own = {"cfg_weight": 3.0, "passes": 2, "num_inference_steps": 3}

    def make(output: str = "run", batch: int = 4, **changes) -> Config:
        return rounds_for("distill", own, batch, output, **changes)

    return make


def metrics(config: Config) -> list[dict]:
    rows = read_lines(Path(config.output) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def test_guidance_is_the_teacher_s(settings):
    """Stops: a student of unguided velocities, of its own moving ones, or of another prompt's."""
    step = Trainer(settings(), progress=False).rounds
    sampler, texts = PlainSampler(step.pipe.model), [text for _, text in ASKED]
    ids = step.pipe.check_prompts(texts)
    with torch.no_grad():
        noise = step.noise_of([0, 1, 2])
        x = ab2(guided_velocity(sampler, ids, 3.0), noise, time_grid(3, shift=2.0))
        expected = []
        points = step.points(texts, [0, 1, 2], x, "image point")
        z, _ = interpolate(points.x, points.noise, points.t)
        for k in range(6):  # one by one: each has a time of its own
            velocity = guided_velocity(sampler, [ids[k % 3]], 3.0)
            expected.append(velocity(z[k : k + 1], float(points.t[k])))
        for p in step.optimizer.params.values():  # the student has moved
            p.add_(0.1)
        collected, _ = step.collect(ASKED)
    torch.testing.assert_close(collected.x, points.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(collected.target, torch.cat(expected), rtol=1e-3, atol=1e-4)
    assert not torch.equal(collected.noise[:3], noise)


def test_reflow_keeps_the_pairs(settings):
    """Stops: images that are matched with noise that they were not made from, which straightens nothing."""
    step = Trainer(settings(distill={"target": "reflow"}), progress=False).rounds
    with torch.no_grad():
        points, _ = step.collect(ASKED)
        noise = step.noise_of([0, 1, 2])
        x = step.generate([text for _, text in ASKED], noise)
    for one in range(2):
        part = points.pick(torch.arange(3 * one, 3 * one + 3))
        assert (
            torch.equal(part.noise, noise) and torch.equal(part.x, x) and torch.equal(part.target, x - noise)
        )
    assert len(set(points.t.tolist())) == 6


@pytest.mark.parametrize("target", ["guidance", "reflow"])
def test_the_student_nears_the_teacher(settings, target):
    """Stops: a run that learns nothing: its validation, at points of its own, is of the student's present weights."""
    rates = {"lr": 3e-3, "ema_decay": 0.5, "warmup": 0}
    report = {"every": 8, "keep_best": True}
    distill = {"target": target, "validation": 8, "updates": 4}
    config = settings(steps=16, batch=8, micro_batch=16, optimizer=rates, distill=distill, report=report)
    Trainer(config, progress=False).run()
    first, last = (row["loss"] for row in read_lines(Path(config.output) / "samples.jsonl"))
    rows = metrics(config)
    assert last < first and rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert (Path(config.output) / "best" / "model.safetensors").is_file()


def test_a_resumed_run_is_the_same_run(settings):
    """Stops: a teacher that is the student of before the restart."""
    whole, parts = settings("whole"), settings("parts")
    Trainer(whole, progress=False).run()
    Trainer(replace(parts, steps=2), progress=False).run()
    Trainer(parts, progress=False).run()
    assert metrics(parts) == metrics(whole) and len(metrics(whole)) == 4
    a, b = (load_file(Path(c.output) / "export" / "model.safetensors") for c in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distill": {"target": "speed"}}, "distill.target"),
        ({"distill": {"updates": 9}}, "distill.updates must be at most batch x passes, 8"),
        ({"parallel": "fsdp"}, 'with stage = "distill"'),
        ({"distill": {"cfg_weight": 1.0}}, "distill.cfg_weight"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, changes, message):
    """Stops: a mistake that shows after hours, or never: a teacher without guidance has nothing to teach."""
    with pytest.raises(ValueError, match=message):
        settings(**changes)
