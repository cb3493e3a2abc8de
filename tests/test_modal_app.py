# SPDX-License-Identifier: MIT
"""`scripts/modal_app.py` through local calls: with a stand-in for the modal package, and with it where installed.

Nothing here reaches Modal. Each docstring names the mistake that its test stops.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "modal_app.py"


class Function:
    """What `@app.function` makes: called here instead of there."""

    def __init__(self, run, options):
        self.local = self.remote = run
        self.options = options

    def starmap(self, calls, return_exceptions=False):
        for call in calls:
            try:
                yield self.local(*call)
            except Exception as error:
                if not return_exceptions:
                    raise
                yield error


class Image:
    def __init__(self):
        self.steps = {}

    def __getattr__(self, name):
        def step(*args, **options):
            self.steps[name] = (args, options)
            return self

        return step


def stand_in() -> ModuleType:
    modal = ModuleType("modal")
    modal.App = lambda name: SimpleNamespace(
        function=lambda **options: lambda run: Function(run, options),
        local_entrypoint=lambda: lambda run: run,
    )
    modal.Image = SimpleNamespace(debian_slim=lambda **_: Image())
    modal.Volume = SimpleNamespace(from_name=lambda name, **_: name)
    modal.Secret = SimpleNamespace(from_name=lambda name: name)
    modal.is_local = lambda: True
    return modal


def load(monkeypatch, modal=None):
    if modal is not None:
        monkeypatch.setitem(sys.modules, "modal", modal)
    spec = importlib.util.spec_from_file_location("modal_app", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def app(monkeypatch):
    return load(monkeypatch, stand_in())


@pytest.fixture
def commands(app, monkeypatch) -> list:
    """The command lines that would run, with the ranks' environment; rank 1 fails where the list says so."""
    seen = []

    def run(arguments):
        seen.append((arguments, os.environ["RANK"], os.environ["WORLD_SIZE"]))
        return 2 if "--fail" in arguments and os.environ["RANK"] == "1" else 0

    monkeypatch.setattr("janusflow_min.cli.main", run)
    return seen


def test_the_seed_s_command(app, commands, monkeypatch):
    """Stops: weights fetched on a GPU, a command line that `janusflow-min bench` does not know."""
    fetched = []
    monkeypatch.setattr(app.fetch, "remote", fetched.append)
    app.main(model="janus_flow", eval_config="geneval")
    ((arguments, rank, world),) = commands
    assert fetched == [["deepseek-ai/JanusFlow-1.3B", "stabilityai/sdxl-vae"]] and (rank, world) == ("0", "1")
    assert arguments[:5] == ["bench", "geneval", "generate", "--out", "/outputs/geneval/janus_flow"]
    assert arguments[5:] == [
        *("--data", "/data/geneval/evaluation_metadata.jsonl"),
        *("--model", "deepseek-ai/JanusFlow-1.3B"),
    ]


def test_every_plan_is_a_command_line(app):
    """Stops: options that a benchmark does not have; parsed here, not run."""
    from janusflow_min.cli import build_parser

    for name in app.INPUTS:
        for arguments in app.stages("janus_flow", name, "full", limit=3):
            args = build_parser().parse_args(arguments)
            assert args.stage == arguments[2]


def test_ranks(app, commands):
    """Stops: containers that all generate the same share; scoring on many; an environment left behind."""
    before = dict(os.environ)
    app.main(model="tiny", eval_config="shapes", mode="full", gpus=3)
    assert [(a[2], rank, world) for a, rank, world in commands] == [
        *(("generate", str(rank), "3") for rank in range(3)),
        ("score", "0", "1"),
        ("report", "0", "1"),
    ]
    assert dict(os.environ) == before


def test_a_rank_that_fails(app, commands):
    """Stops: the others stopped by it; scoring half of the work."""
    with pytest.raises(RuntimeError, match=r"1 of 3 failed, the others' work is kept.*exit code 2"):
        app.main(model="tiny", eval_config="shapes", mode="full", gpus=3, options="--fail")
    assert len(commands) == 3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eval_config": "imagenet"}, "must be one of geneval, .* got 'imagenet'"),
        ({"mode": "all"}, "--mode must be one of generate"),
        ({"model": "janusflow"}, "or a hub id like owner/name, got 'janusflow'"),
        ({"gpus": 0}, "--gpus must be at least 1"),
    ],
)
def test_what_is_not_known(app, commands, wrong, message):
    """Stops: a GPU that is rented to find a typing error."""
    with pytest.raises(ValueError, match=message):
        app.main(**{"model": "tiny", "eval_config": "shapes"} | wrong)
    assert not commands


def test_the_image_and_the_volumes(app):
    """Stops: an image without the library or with the checkout's own outputs; work that no volume keeps."""
    steps = app.image.steps
    assert steps["run_commands"][0] == ("pip install '/root/janusflow-min[bench]'",)
    (source, target), options = steps["add_local_dir"]
    assert (source / "pyproject.toml").is_file() and target == "/root/janusflow-min" and options["copy"]
    assert {".git", ".venv", "outputs"} <= set(options["ignore"])
    assert steps["env"][0] == ({"HF_HOME": "/models"},)
    assert set(app.stage.options["volumes"]) == {"/models", "/data", "/outputs"}
    assert app.stage.options["gpu"] == "H100" and "gpu" not in app.fetch.options


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "modal"])
def test_the_default_through_the_local_call(real, monkeypatch, tmp_path):
    """Stops: a function that cannot be called. The embedded default generates one item as rank 0 of 1."""
    if real:
        pytest.importorskip("modal")
    app = load(monkeypatch, None if real else stand_in())
    fast = "--num-inference-steps 1 --batch-size 1 --quiet"
    (arguments,) = app.stages("tiny", "shapes", "generate", limit=1, options=fast)
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    app.stage.local([*arguments, "--device", "cpu"])
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["num_inference_steps"] == 1
    assert list((tmp_path / "images").rglob("*.png"))
    with pytest.raises(RuntimeError, match="exit code 2"):
        app.stage.local(["bench", "nothing"])
