# SPDX-License-Identifier: MIT
"""A run's configuration: the paper's values, strict reading, errors that name the key."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest

from janusflow_min.training.config import COMPONENTS, Config, OptimizerConfig, SourceConfig, load_config
from janusflow_min.training.settings import read, to_toml

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


def test_short_names_of_dtypes_are_the_full_ones():
    """Stops: "bf16", which every other command takes, refused here, or a run that it makes a different one."""
    short = read(Config, {"data": DATA, "dtype": "bf16", "export_dtype": "fp32"})
    assert short == read(Config, {"data": DATA, "dtype": "bfloat16", "export_dtype": "float32"})
    with pytest.raises(ValueError, match="export_dtype must be one of float32"):
        read(Config, {"data": DATA, "export_dtype": "fp16"})


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
        ({"steps": 0}, ["steps", "from 1 to"]),
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
        ({"data": [DATA[0] | {"streaming": True}]}, ["data.0.streaming", "no effect"]),
        ({"data": [DATA[0] | {"split": "test"}]}, ["data.0.split", "no effect"]),
        ({"data": [DATA[0] | {"shuffle_buffer": 9}]}, ["data.0.shuffle_buffer", "no effect"]),
        (
            {"data": [{"kind": "generation", "folder": "a", "columns": {"text": "b"}}]},
            ["data.0.columns", "no effect"],
        ),
        ({"data": [{"kind": "text", "folder": "a"}]}, ["data.0.kind", "generation"]),
        ({"data": [{"kind": "video", "manifest": "a"}]}, ["data.0.kind", "generation"]),
        ({"data": [*DATA, {**DATA[0], "ratio": 2}]}, ["data.*.ratio"]),
        ({"data": [{**DATA[0], "ratio": 0}]}, ["data.0.ratio", "above 0"]),
        ({"loader": {"cache": "x"}}, ["loader.crop", "fixed"]),
        ({"loader": {"on_bad_row": "ignore"}}, ["loader.on_bad_row", "skip, stop"]),
        ({"report": {"questions": ["a"], "images": ["b", "c"]}}, ["report.images"]),
        ({"objective": {"prompt_dropout": 1.5}}, ["objective.prompt_dropout", "from 0 to 1"]),
        ({"steps": 3, "epochs": 2}, ["epochs", "left out"]),
        ({"stage": "adaptation", "data": [{"kind": "text", "manifest": "a"}]}, ["data.*.ratio", "no share"]),
        ({"lora": {"rank": 4}, "stage": "adaptation"}, ["optimizer.lr_by_component.llm", "adaptation"]),
        ({"report": {"keep_best": True}}, ["report.keep_best", "report.validation"]),
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


NUMBERS = {  # every number of a configuration, with values that lie outside its limits
    "seed": [-1, 2**63],
    "steps": [0, -5, 10**10],
    "epochs": [0.0, -1.0],
    "batch": [0, 10**8],
    "micro_batch": [0],
    "save_every": [0],
    "keep": [0],
    "objective.prompt_dropout": [-0.1, 1.5],
    "objective.logit_mean": [math.inf],
    "objective.logit_std": [0.0, -1.0],
    "objective.alignment_layer": [0],
    "objective.alignment_weight": [-1.0],
    "objective.answer_weight": [-1.0],
    "optimizer.lr": [0.0, -1.0, 10**400],
    "optimizer.lr_by_component": [{"llm": -1.0}, {"llm": math.nan}],
    "optimizer.betas": [[0.9, 1.0], [-0.1, 0.9], [0.9]],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.weight_decay": [-0.1],
    "optimizer.max_grad_norm": [0.0],
    "optimizer.warmup": [-1, 10**10],
    "optimizer.min_lr_ratio": [-0.1, 1.1],
    "optimizer.ema_decay": [-0.1, 1.0],
    "lora.rank": [-1, 10**6],
    "lora.alpha": [0.0],
    "lora.dropout": [-0.1, 1.0],
    "loader.max_tokens": [0],
    "loader.max_padding": [0.0],
    "loader.workers": [-1, 10**6],
    "report.log": [0],
    "report.every": [-1, 10**10],
    "report.validation_rows": [0],
    "report.num_inference_steps": [0, 10**7],
    "report.cfg_weight": [math.nan],
    "loader.timeout": [0],
    "report.patience": [-1, 10**6],
    "nft.group": [0, 10**8],
    "nft.passes": [0],
    "nft.updates": [0],
    "nft.beta": [0.0, -1.0],
    "nft.pull": [-1.0],
    "nft.validation": [-1, 10**6],
    "nft.cfg_weight": [math.nan],
    "nft.num_inference_steps": [0, 10**7],
    "nft.timestep_shift": [0.0],
    "distill.passes": [0],
    "distill.updates": [0],
    "distill.validation": [-1, 10**6],
    "distill.cfg_weight": [math.nan],
    "distill.num_inference_steps": [0, 10**7],
    "distill.timestep_shift": [0.0],
}


def numbers(cls: type, where: str = "") -> set[str]:
    """The keys of a configuration's tables that hold numbers."""
    found = set()
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= numbers(hint, f"{where}{key}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            found.add(where + key)
    return found


def test_every_number_has_limits():
    """Stops: a rate below zero that shows as an error of autograd, a standard deviation of 0, a batch of a billion."""
    assert set(NUMBERS) >= numbers(Config)
    for key, values in NUMBERS.items():
        *table, last = key.split(".")
        for value in values:
            change = {table[0]: {last: value}} if table else {last: value}
            with pytest.raises(ValueError, match=key):
                read(Config, {"data": DATA} | change)
    with pytest.raises(ValueError, match=r"optimizer\.eps must be above 0"):  # made in Python as well
        Config(data=(SourceConfig("text", manifest="a"),), optimizer=OptimizerConfig(eps=0.0))


def test_paths_count_from_the_file_that_names_them(tmp_path, monkeypatch):
    """Stops: an output folder, alone of all paths, that counts from the caller's; a folder named ~; a data set's name
    that becomes a path because the caller has a folder of that name."""
    (tmp_path / "here" / "parquet").mkdir(parents=True)
    (tmp_path / "file").mkdir()
    path = tmp_path / "file" / "a.toml"
    source = 'kind = "text"\ndataset = "parquet"\nfiles = ["b.parquet", "~/c.parquet"]\n'
    path.write_bytes(
        b"\xef\xbb\xbf" + f'output = "out"\n[[data]]\n{source}[loader]\ncache = "~/x"\n'.encode()
    )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(path, ["loader.crop=fixed"])
    assert (config.output, config.loader.cache) == (
        str(tmp_path / "file" / "out"),
        str(tmp_path / "home" / "x"),
    )
    assert config.data[0].dataset == "parquet"
    assert config.data[0].files == (
        str(tmp_path / "file" / "b.parquet"),
        str(tmp_path / "home" / "c.parquet"),
    )
    changed = load_config(path, ["loader.crop=fixed", "output=out", 'data.0.files=["d"]', "model=~/m"])
    assert changed.output == str(tmp_path / "here" / "out") and changed.model == "~/m"
    assert changed.data[0].files == (str(tmp_path / "here" / "d"),)


def test_settings_are_written_as_they_are_read(tmp_path):
    """Stops: a record of a run's settings that makes another run."""
    odd = 'a "quoted" \\ line\nbreak, an ünïcode 猫 and a \x7f'
    data = [
        {"kind": "text", "manifest": "/b.jsonl", "columns": {"text": odd}},
        {"kind": "text", "manifest": "/c"},
    ]
    report = {"prompts": [odd, ""], "questions": [odd]}
    config = read(Config, {"data": data, "report": report, "optimizer": {"lr_by_component": {"llm": 1e-7}}})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    written = load_config(path)
    assert dataclasses.replace(written, output=config.output) == config


def test_short_runs_warm_up_shortly():
    """Stops: a run of 40 steps that ends before the stage's 1,000 steps of warm-up let it learn anything."""
    made = {steps: read(Config, {"data": DATA, "steps": steps}).optimizer.warmup for steps in (1, 40, 26_000)}
    assert made == {1: 0, 40: 8, 26_000: 1000}
    assert read(Config, {"data": DATA, "steps": 40, "optimizer": {"warmup": 100}}).optimizer.warmup == 100


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    """Stops: an example that its own reader refuses."""
    assert load_config(path).steps > 0


def test_the_page_s_whole_file_is_one(tmp_path):
    """Stops: a first file to copy that its own reader refuses."""
    page = (EXAMPLES.parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    configs = []
    for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        (tmp_path / "mine.toml").write_text(block, encoding="utf-8")
        configs.append(load_config(tmp_path / "mine.toml"))
    assert configs[0].output == str(tmp_path / "runs" / "mine") and len(configs[0].data) == 2
    assert [len(config.data) for config in configs[1:]] == [3]
