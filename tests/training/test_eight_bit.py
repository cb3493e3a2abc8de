# SPDX-License-Identifier: MIT
"""AdamW with moments of 8 bits, beside the one with fp32."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from janusflow_min.training import eight_bit
from janusflow_min.training.check import check
from janusflow_min.training.config import OptimizerConfig
from janusflow_min.training.metrics import Report
from janusflow_min.training.optimizer import AdamW
from janusflow_min.training.trainer import Trainer

SHAPES = {"whole": (4, 4096), "thin": (3, 100), "norm": (256,)}  # only the first is large enough for codes


@pytest.fixture(autouse=True)
def torchao():
    return pytest.importorskip("torchao")


def optimizer(states="8bit", dtype=torch.float32, **options) -> AdamW:
    draw = torch.Generator().manual_seed(0)
    named = [(name, nn.Parameter(torch.randn(shape, generator=draw))) for name, shape in SHAPES.items()]
    config = OptimizerConfig(lr=1e-3, warmup=0, states=states, max_grad_norm=1e9, **options)
    return AdamW(named, dict.fromkeys(SHAPES, 1e-3), config, 100, dtype)


def gradients(step: int, sparse: bool = False) -> dict[str, torch.Tensor]:
    """Of a step; sparse: only one row of four has any, as in a table of embeddings."""
    draw = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    if sparse:
        found["whole"] *= torch.arange(4)[:, None] == step % 4
    return found


def run(adamw: AdamW, steps: int, sparse: bool = False) -> dict[str, torch.Tensor]:
    """How far each weight moved."""
    before = {name: p.clone() for name, p in adamw.master.items()}
    for step in range(steps):
        adamw.step(adamw.schedule(step), gradients(step, sparse))
    return {name: p - before[name] for name, p in adamw.master.items()}


@pytest.mark.parametrize("sparse", [False, True])
def test_the_steps_are_those_of_fp32(sparse):
    """Stops: a moment read with the other's map or scale, and steps that blow up where the second moment's code is 0
    and the first one's is not."""
    expected, found = run(optimizer("fp32"), 40, sparse), run(optimizer(), 40, sparse)
    assert all(torch.equal(found[name], expected[name]) for name in ("thin", "norm"))
    apart = (found["whole"] - expected["whole"]).norm() / expected["whole"].norm()
    assert 0 < apart < 0.03
    assert (found["whole"] - expected["whole"]).abs().max() < 0.5 * expected["whole"].abs().max()


def test_the_moments_take_a_quarter(settings, tmp_path):
    """Stops: codes that are kept beside the numbers they stand for."""

    def size(adamw: AdamW) -> int:
        parts = ("m", "v", "m_scale", "v_scale")
        return sum(t["whole"].nbytes for name, t in adamw.state().items() if name in parts)

    assert size(optimizer()) == size(optimizer("fp32")) * (0.25 + 1 / 256)
    plain, eight = (check(settings(optimizer={"states": states})) for states in ("fp32", "8bit"))
    assert eight.memory["optimizer"] / plain.memory["optimizer"] == pytest.approx((10 + 1 / 32) / 16)


def test_pieces_change_nothing(monkeypatch):
    """Stops: a piece that is given its neighbour's scales."""
    expected = run(optimizer(), 3)
    monkeypatch.setattr(eight_bit, "PIECE", 1024)
    assert torch.equal(run(optimizer(), 3)["whole"], expected["whole"])


def test_a_step_that_is_not_finite_changes_nothing():
    """Stops: moments that are rounded once more by a step that is left out."""
    adamw = optimizer(dtype=torch.bfloat16)
    run(adamw, 3)
    before = {key: {n: t.clone() for n, t in tensors.items()} for key, tensors in adamw.state().items()}
    bad = gradients(3)
    bad["norm"][0] = float("nan")
    adamw.step(adamw.schedule(3), bad)
    for key, tensors in adamw.state().items():
        assert all(torch.equal(tensor, before[key][name]) for name, tensor in tensors.items()), key


def test_a_resumed_run_is_the_same_run(settings, tmp_path, monkeypatch):
    """Stops: a checkpoint without the scales, or with the moments of fp32."""
    monkeypatch.setattr(Report, "plot", lambda self: None)
    exports = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for stop in stops:
            config = settings(
                tmp_path / name, steps=stop, export_dtype="float32", optimizer={"states": "8bit"}
            )
            trainer = Trainer(config, progress=False)
            trainer.run()
        assert trainer.optimizer.m_scale
        exports.append(load_file(Path(config.output) / "export" / "model.safetensors"))
    assert all(torch.equal(tensor, exports[1][name]) for name, tensor in exports[0].items())


def test_what_cannot_be_is_said_first(settings, monkeypatch):
    """Stops: shards of codes that no checkpoint can hold, or a missing package found after the model was loaded."""
    with pytest.raises(ValueError, match=r"optimizer\.states must be .fp32. with parallel"):
        settings(parallel="fsdp", optimizer={"states": "8bit"})
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("janusflow_min.training.check.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"janusflow-min\[torchao\]"):
        check(settings(optimizer={"states": "8bit"}))


@pytest.mark.gpu
def test_compiled_pieces_compute_the_same():
    """Stops: a compiled step that reads the table of numbers by another index."""
    pairs = []
    for kernel in (False, True):
        adamw = optimizer()
        for table in (
            adamw.params,
            adamw.master,
            adamw.m,
            adamw.v,
            adamw.average,
            adamw.m_scale,
            adamw.v_scale,
        ):
            for name, tensor in table.items():
                table[name] = tensor.detach().cuda()
        adamw.kernel = kernel
        for step in range(10):
            adamw.step(adamw.schedule(step), {name: g.cuda() for name, g in gradients(step).items()})
        pairs.append(adamw.master["whole"])
    assert (pairs[0] - pairs[1]).abs().max() < 1e-5


@pytest.mark.gpu
def test_encoders_wait_off_the_device(settings, tmp_path, monkeypatch):
    """Stops: encoders that a cache spares and that fill the device all the same, or are away where they are needed:
    for the images of a first epoch, for samples and answers on the way."""
    monkeypatch.setattr(Report, "plot", lambda self: None)
    options = dict(device="cuda", dtype="float32", optimizer={"lr_by_component": {"siglip": 0.0}})
    options |= dict(loader={"cache": str(tmp_path / "cache"), "crop": "fixed"}, export_dtype="float32")
    options["report"] = {"every": 3, "prompts": ["a star"], "questions": ["hi"]}
    exports = []
    for name in ("parked", "there"):
        config = settings(tmp_path / name, **options)
        only = [source for source in config.data if source.kind == "generation"]
        trainer = Trainer(dataclasses.replace(config, data=tuple(only)), progress=False)
        assert [next(m.parameters()).device.type for m in trainer.parked] == ["cpu", "cpu"]
        if name == "there":
            for module in trainer.parked:
                module.to(trainer.device)
        exports.append(load_file(trainer.run() / "model.safetensors"))
    assert {next(m.parameters()).device.type for m in trainer.parked} == {"cuda"}
    for key, tensor in exports[0].items():
        torch.testing.assert_close(tensor, exports[1][key], rtol=1e-4, atol=1e-5)
