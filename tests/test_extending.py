# SPDX-License-Identifier: MIT
"""docs/extending.md, taken at its word: its blocks are run as printed, and what they make does what the page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from janusflow_min import cli, official, sampling
from janusflow_min.benchmarks import MODULES
from janusflow_min.config import JanusFlowConfig
from janusflow_min.hub import TINY
from janusflow_min.solvers import euler

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FAST = dict(parallel_size=1, seed=0, progress=False)


@pytest.fixture(scope="module")
def page() -> dict:
    """The names that the page's Python blocks define, one after the other."""
    presets, names = dict(official.SIGLIP_PRESETS), {"__name__": "extending"}
    sys.modules["extending"] = ModuleType("extending")
    for k, block in enumerate(PAGE.read_text(encoding="utf-8").split("```python\n")[1:]):
        exec(compile(block.partition("```")[0], f"{PAGE.name}, block {k + 1}", "exec"), names)
    names["presets"] = dict(official.SIGLIP_PRESETS)
    official.SIGLIP_PRESETS.clear()
    official.SIGLIP_PRESETS.update(presets)
    return names


def test_the_solver_is_of_second_order(page):
    """Stops: a page whose solver runs and integrates something else."""
    pipe, ralston = page["pipe"], page["ralston"]

    def latents(steps, solver):
        return pipe.generate(
            "a photo of a red star", num_inference_steps=steps, solver=solver, **FAST
        ).latents

    true = latents(150, ralston)
    coarse, fine = ((latents(steps, ralston) - true).norm() for steps in (15, 30))
    assert coarse < (latents(30, euler) - true).norm() and fine < coarse / 1.9


def test_other_rows_of_guidance_are_one_edit(page, monkeypatch):
    """Stops: a second place that has to know of it; a change where there is no guidance."""
    pipe, prompt = page["pipe"], "a photo of a red star"

    def latents(cfg_weight):
        return pipe.generate(prompt, num_inference_steps=2, cfg_weight=cfg_weight, **FAST).latents

    before = latents(1.0), latents(3.0)
    monkeypatch.setattr(sampling, "plan_rows", page["from_an_empty_conversation"])
    torch.testing.assert_close(latents(1.0), before[0], atol=1e-5, rtol=0)
    assert (latents(3.0) - before[1]).abs().max() > 0.01


def test_the_benchmark_runs_from_the_command_line(page, monkeypatch, tmp_path, capsys):
    """Stops: a protocol that the page describes and the command line does not take."""
    module = ModuleType("janusflow_min.benchmarks.brightness")
    module.__dict__.update({name: page[name] for name in ("TITLE", "SUMMARY", "OPTIONS")})
    module.__dict__.update({name: page[name] for name in ("generate", "score", "report")})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(MODULES, "brightness", "brightness")
    start = ["bench", "brightness"]
    fast = ["--num-inference-steps", "4", "--device", "cpu", "--quiet"]
    assert cli.main([*start, "generate", "--out", str(tmp_path), *fast, "--shown", "bright"]) == 0
    assert cli.main([*start, "score", "--out", str(tmp_path)]) == 0
    assert cli.main([*start, "report", "--out", str(tmp_path)]) == 0
    assert "brighter: 1.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["shown"] == "bright"


def test_the_preset_makes_a_config(page, monkeypatch):
    """Stops: a preset that the reading of config.json does not know."""
    data = json.loads((TINY / "config.json").read_text())
    monkeypatch.setitem(
        official.SIGLIP_PRESETS, "siglip_base_patch16_224", page["presets"]["siglip_base_patch16_224"]
    )
    data["vision_und_enc_config"]["params"] = {
        "model_name": "siglip_base_patch16_224",
        "image_size": 224,
        "select_layer": -1,
    }
    siglip = JanusFlowConfig.from_dict(data).siglip
    assert (siglip.width, siglip.layers, siglip.num_patches) == (768, 12, 196)
