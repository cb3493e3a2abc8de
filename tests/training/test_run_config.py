# SPDX-License-Identifier: MIT
"""A run's configuration: the paper's values, strict reading, errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from janusflow_min.training.config import COMPONENTS, Config, load_config, read

DATA = [{"kind": "generation", "manifest": "a.jsonl"}]
EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.mark.parametrize(
    ("stage", "lr", "warmup", "steps", "batch", "mix", "early", "trains", "form"),
    [
        ("adaptation", 1e-4, 2000, 10_000, 512, (50, 50, 0), (50, 50, 0), COMPONENTS[2:], "plain"),
        (
            "pretraining",
            1e-4,
            2000,
            390_000,
            512,
            (14, 80, 6),
            (30, 50, 20),
            ("llm", *COMPONENTS[2:]),
            "plain",
        ),
        ("finetuning", 2e-5, 1000, 26_000, 256, (21, 70, 9), (21, 70, 9), COMPONENTS, "chat"),
    ],
)
def test_stages_are_the_papers(stage, lr, warmup, steps, batch, mix, early, trains, form):
    """Stops: a stage that trains something else, or at another rate, than the paper's table says."""
    kinds = ("understanding", "generation", "text")
    config = read(Config, {"stage": stage, "data": [{"kind": k, "manifest": "a"} for k in kinds]})
    assert (config.optimizer.lr, config.optimizer.warmup, config.steps, config.batch) == (
        lr,
        warmup,
        steps,
        batch,
    )
    assert tuple(config.ratios()) == mix and tuple(config.ratios(early=True)) == early
    assert {name for name in COMPONENTS if config.rate(name)} == set(trains)
    assert config.objective.prompt_form == form


def test_defaults_are_the_papers():
    """Stops: another share of hidden prompts, time distribution, layer, weight, moment or average as the default."""
    config = read(Config, {"data": DATA})
    o = config.objective
    assert (
        o.prompt_dropout,
        o.logit_mean,
        o.logit_std,
        o.alignment_layer,
        o.alignment_weight,
        o.answer_weight,
    ) == (
        0.1,
        0,
        1,
        6,
        1,
        1,
    )
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.max_grad_norm, optimizer.ema_decay) == ((0.9, 0.95), 1.0, 0.99)
    assert optimizer.schedule == "constant" and config.loader.max_tokens == 4096


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 3}, ["unknown key stepz", "steps"]),
        ({"optimizer": {"lrr": 1}}, ["unknown key optimizer.lrr"]),
        ({"steps": "many"}, ["steps", "whole number", "many"]),
        ({"steps": True}, ["steps", "whole number"]),
        ({"steps": 0}, ["steps", "above 0"]),
        ({"compile": 1}, ["compile", "true or false"]),
        ({"stage": "third"}, ["stage", "adaptation", "third"]),
        ({"optimizer": {"lr": "high"}}, ["optimizer.lr", "number"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "number"]),
        ({"optimizer": {"lr_by_component": {"llama": 1.0}}}, ["optimizer.lr_by_component.llama", "siglip"]),
        ({"optimizer": {"lr_by_component": {"llm": -1.0}}}, ["optimizer.lr_by_component.llm", "0 or above"]),
        (
            {"optimizer": {"lr_by_component": dict.fromkeys(COMPONENTS, 0)}},
            ["optimizer.lr_by_component", "one component"],
        ),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas"]),
        ({"optimizer": 3}, ["optimizer", "table"]),
        ({"data": []}, ["data", "at least one source"]),
        ({"data": [{"kind": "generation"}]}, ["data.0", "a manifest, a folder or a dataset"]),
        ({"data": [{"manifest": "a"}]}, ["data.0.kind is missing"]),
        ({"data": [{"kind": "video", "manifest": "a"}]}, ["data.0.kind", "generation"]),
        ({"data": [*DATA, {**DATA[0], "ratio": 2}]}, ["data.*.ratio"]),
        ({"data": [{**DATA[0], "ratio": 0}]}, ["data.0.ratio", "above 0"]),
        ({"loader": {"cache": "x"}}, ["loader.crop", "fixed"]),
        ({"loader": {"on_bad_row": "ignore"}}, ["loader.on_bad_row", "skip, stop"]),
        ({"report": {"questions": ["a"], "images": ["b", "c"]}}, ["report.images"]),
        ({"objective": {"prompt_dropout": 1.5}}, ["objective.prompt_dropout", "from 0 to 1"]),
    ],
)
def test_errors_name_the_key(change, words):
    """Stops: a misspelt key that is ignored, a wrong type that shows hours later."""
    with pytest.raises(ValueError) as caught:
        read(Config, {"data": DATA} | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_overrides(tmp_path):
    """Stops: --set that is read as a string, or that reaches another table."""
    path = tmp_path / "a.toml"
    path.write_text('steps = 5\n[[data]]\nkind = "text"\nmanifest = "b.jsonl"\n')
    config = load_config(
        path, ["steps=7", "optimizer.lr=1e-3", "stage=pretraining", "data.0.ratio=2", "compile=true"]
    )
    assert (config.steps, config.optimizer.lr, config.stage, config.compile) == (7, 1e-3, "pretraining", True)
    assert config.data[0].ratio == 2 and config.data[0].manifest == str(tmp_path / "b.jsonl")
    for wrong, word in (("steps", "KEY=VALUE"), ("data.3.ratio=1", "data.3.ratio"), ("steps.x=1", "steps")):
        with pytest.raises(ValueError, match=word):
            load_config(path, [wrong])
    path.write_text("steps = ")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    """Stops: an example that its own reader refuses."""
    assert load_config(path).steps > 0
