# SPDX-License-Identifier: MIT
"""Whole runs on the tiny random checkpoint: resuming, faults, export, LoRA, several processes."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

import janusflow_min as jf
from janusflow_min.training import checkpoints
from janusflow_min.training.config import Config, OptimizerConfig
from janusflow_min.training.metrics import CLOCK, Report, read_lines
from janusflow_min.training.optimizer import AdamW, Schedule, rate_factor
from janusflow_min.training.rows import seeded_generator
from janusflow_min.training.sample import SampleBuilder
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer


def train(config: Config, **options) -> Path:
    return Trainer(config, progress=False, **options).run()


def metrics(folder: str | Path) -> list[dict]:
    """Every step's numbers, but for the clock."""
    return [
        {k: v for k, v in row.items() if k not in CLOCK} for row in read_lines(Path(folder) / "metrics.jsonl")
    ]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "export" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing the curves takes longer than the run."""
    monkeypatch.setattr(Report, "plot", lambda self: None)


@pytest.fixture(scope="module")
def undisturbed(settings_for, tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    config = settings_for(tmp_path_factory.mktemp("undisturbed"), export_dtype="float32")
    train(config)
    return metrics(config.output), weights(config.output)


# Resuming -----------------------------------------------------------------------


def test_a_resumed_run_is_the_same_run(settings, undisturbed):
    """Stops: losses or weights that depend on a restart: data position, generators, moments, average, schedule."""
    for stop in (2, 4):
        train(settings(steps=stop, export_dtype="float32"))
    config = settings(export_dtype="float32")
    train(config)
    expected, final = undisturbed
    assert metrics(config.output) == expected and len(expected) == 6
    assert same(weights(config.output), final)
    left = checkpoints.found(Path(config.output) / "checkpoints")
    assert [path.name for path in left] == ["step-00000006", "step-00000004"]


def test_another_run_is_not_gone_on_with(settings):
    """Stops: a changed learning rate that takes over another run's weights unseen."""
    train(settings(steps=2))
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.001, is 0\.002"):
        Trainer(settings(optimizer={"lr": 2e-3, "warmup": 2}), progress=False)
    config = settings(optimizer={"lr": 2e-3, "warmup": 2}, steps=2)
    train(config, fresh=True)
    assert [row["step"] for row in metrics(config.output)] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    ["cut short", *(pytest.param(d, marks=pytest.mark.slow) for d in ("a flipped byte", "no description"))],
)
def test_a_damaged_checkpoint_is_passed_over(settings, undisturbed, damage, capsys):
    """Stops: a run that goes on from half a file, or that cannot go on at all."""
    config = settings(steps=4, export_dtype="float32")
    train(config)
    newest = checkpoints.found(Path(config.output) / "checkpoints")[0]
    file = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "cut short":
        file.write_bytes(content[:-100])
    elif damage == "a flipped byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (newest / checkpoints.META).unlink()
    Trainer(settings(export_dtype="float32")).run()
    told = capsys.readouterr().err
    assert "step-00000004 is damaged" in told and "continuing from" in told and "step-00000002" in told
    assert metrics(config.output) == undisturbed[0] and same(weights(config.output), undisturbed[1])


def test_no_whole_checkpoint_is_an_error(settings):
    """Stops: hours of training that silently start again from nothing."""
    config = settings(steps=2)
    train(config)
    for path in checkpoints.found(Path(config.output) / "checkpoints"):
        (path / checkpoints.META).write_text("{}")
    with pytest.raises(ValueError, match="--fresh"):
        Trainer(config, progress=False)


CHILD = """
import json, os, shutil, signal, sys, torch
torch.set_num_threads(1)
from janusflow_min.training import checkpoints
from janusflow_min.training.config import Config
from janusflow_min.training.settings import read
from janusflow_min.training.metrics import Report
from janusflow_min.training.trainer import Trainer

config, point = json.loads(sys.argv[1]), int(sys.argv[2])
calls = iter(range(10**9))

def counted(function):
    def call(*args, **options):
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

for owner, name in ((checkpoints.dcp, "save"), (checkpoints, "crc"), (checkpoints, "sync_folder"), (os, "rename"),
                    (shutil, "rmtree")):
    setattr(owner, name, counted(getattr(owner, name)))
Report.plot = lambda self: None
print("ready", flush=True)
sys.stdin.readline()
Trainer(read(Config, config), progress=False).run()
"""


class Child:
    """A training process that has imported everything and waits; `point`: which call of the checkpoint's writing
    kills it, -1: none does."""

    def __init__(self, config: Config, point: int):
        command = [sys.executable, "-c", CHILD, json.dumps(config.to_dict()), str(point)]
        path = os.pathsep.join([str(Path(jf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, seconds: float | None = None) -> int:
        """Let it train, and kill it after so many seconds; the exit code."""
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        try:
            _, errors = self.process.communicate("go\n", timeout=120 if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, errors = self.process.communicate()
        assert self.process.returncode in (0, -signal.SIGKILL), errors
        return self.process.returncode


def killed_runs(settings, kills: int, seed: int) -> tuple[Config, list[str]]:
    """Kill a run `kills` times, in turn at a random moment and within the writing of a checkpoint, then finish it."""
    config, rng, log = settings(export_dtype="float32"), random.Random(seed), []
    points = [rng.randrange(1, 24) if i % 2 else -1 for i in range(kills)]
    children = [Child(config, points[0])]
    for i, point in enumerate(points):
        if i + 1 < kills:  # the next one starts up meanwhile
            children.append(Child(config, points[i + 1]))
        code = children[i].run(rng.uniform(0.05, 1.2) if point < 0 else None)
        log.append(f"{point}: {code}")
        if code == 0:  # it was done before its end came: the next kills need something to do
            shutil.rmtree(config.output)
    train(config)
    return config, log


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_weights(settings, undisturbed, kills):
    """Stops: SIGKILL at any moment, within the writing of a checkpoint too, that loses more than the steps since."""
    config, log = killed_runs(settings, kills, seed=kills)
    assert sum(line.endswith("-9") for line in log) >= kills // 2, log
    assert metrics(config.output) == undisturbed[0] and same(weights(config.output), undisturbed[1]), log
    assert not list((Path(config.output) / "checkpoints").glob(".writing-*-x"))


@pytest.mark.parametrize("which", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_first(settings, undisturbed, which, monkeypatch):
    """Stops: Ctrl-C, or a cluster's notice, that throws the last steps away."""
    config, plain = settings(export_dtype="float32"), Trainer.encode

    def interrupted(self, *args):
        if self.index == 3 and not self.stop_requested:
            os.kill(os.getpid(), which)
        return plain(self, *args)

    monkeypatch.setattr(Trainer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoints.found(Path(config.output) / "checkpoints")[0].name == "step-00000004"
    monkeypatch.undo()
    train(config)
    assert metrics(config.output) == undisturbed[0] and same(weights(config.output), undisturbed[1])


# Faults -----------------------------------------------------------------------


def test_a_full_disk(settings):
    """Stops: a checkpoint that cannot be written and takes the last good one with it, or says nothing clear."""
    config = settings(steps=2)
    train(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step 4 cannot be written .*disk full.*step-00000002"):
            train(settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (Path(config.output) / "checkpoints").iterdir()] == ["step-00000002"]
    train(settings())


@pytest.mark.parametrize("answer", ["stop", "skip"])
def test_a_loss_that_is_not_a_number(settings, answer, monkeypatch):
    """Stops: weights that turn into NaN, a checkpoint of them, a report that does not say when."""
    plain = SampleBuilder.generation

    def poisoned(self, row, generator, *options):
        sample = plain(self, row, generator, *options)
        third = [seeded_generator(0, "sample", slot).initial_seed() for slot in range(12, 18)]
        if generator.initial_seed() in third:  # the third step's, of six slots each
            sample.noise[0, 0, 0] = math.nan
        return sample

    monkeypatch.setattr(SampleBuilder, "generation", poisoned)
    config = settings(on_nan=answer)
    if answer == "stop":
        with pytest.raises(FloatingPointError, match=r"loss of step 3 is nan.*step-00000002"):
            train(config)
        assert checkpoints.found(Path(config.output) / "checkpoints")[0].name == "step-00000002"
    else:
        train(config)
        assert [row["loss"] is None for row in metrics(config.output)] == [i == 2 for i in range(6)]
        assert all(tensor.isfinite().all() for tensor in weights(config.output).values())


class Dying(SampleBuilder):
    """A builder whose worker process is killed at the fourth step."""

    def __call__(self, row, kind, generator, *options):
        seeds = [seeded_generator(0, "sample", slot).initial_seed() for slot in range(18, 24)]
        if get_worker_info() is not None and generator.initial_seed() in seeds:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row, kind, generator, *options)


@pytest.mark.slow
def test_a_worker_that_dies(settings, monkeypatch):
    """Stops: a run that hangs, or an error that does not say what died and what is kept."""
    monkeypatch.setattr("janusflow_min.training.trainer.SampleBuilder", Dying)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config = settings(loader={"workers": 1})
    with pytest.raises(RuntimeError, match=r"a data worker died .*checkpoint"):
        train(config)


def test_workers_change_nothing(settings, undisturbed):
    """Stops: an order of rows that depends on which process reads them."""
    config = settings(loader={"workers": 1}, export_dtype="float32")
    train(config)
    assert metrics(config.output) == undisturbed[0]


# What comes out -----------------------------------------------------------------------


def test_the_export_is_a_checkpoint(settings, parity_dir, manifest):
    """Stops: an export that jf.load cannot open, that lost what was not trained, or that is not the average."""
    config = settings(
        optimizer={"lr": 1e-3, "warmup": 2, "lr_by_component": {"siglip": 0, "uvit_encoder": 0}}
    )
    trainer = Trainer(config, progress=False)
    pipe = jf.load(trainer.run(), device="cpu", progress=False)
    before, after = load_file(parity_dir / "model.safetensors"), weights(config.output)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    for name, tensor in before.items():
        frozen = "vision_tower" in name or "vision_gen_enc_model" in name
        assert torch.equal(tensor.bfloat16(), after[name]) >= frozen, name
    average = trainer.optimizer.average["model.llm.layers.0.mlp.up_proj.weight"]
    assert torch.equal(average.bfloat16(), after["language_model.model.layers.0.mlp.up_proj.weight"])
    out = pipe.generate("a cat", parallel_size=1, num_inference_steps=2, seed=0, progress=False)
    assert out.images[0].size == (64, 64)
    assert isinstance(pipe.understand("What?", str(manifest.parent / "0.png"), max_new_tokens=3).text, str)


@pytest.mark.reference
def test_the_export_opens_in_the_reference(settings):
    """Stops: a fine-tuned model that nobody else can load."""
    import reference

    out = train(settings())
    model = reference.load(out, os.environ["JANUS_ROOT"])
    mine = jf.load(out, device="cpu", dtype="float32", progress=False).model
    ids = torch.arange(10)[None]
    theirs = model.language_model.model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(mine.llm(mine.llm.embed_tokens(ids)), theirs, rtol=1e-4, atol=1e-4)


def test_lora_is_merged(settings, parity_dir):
    """Stops: an export without its low-rank matrices, or scaled otherwise; a base that trains along."""
    pytest.importorskip("peft")
    rates = dict.fromkeys(("siglip", "und_aligner", "gen_aligners", "uvit_encoder", "uvit_decoder"), 0.0)
    config = settings(
        lora={"rank": 4, "alpha": 8.0},
        export_dtype="float32",
        gradient_checkpointing=True,
        optimizer={"lr": 1e-2, "warmup": 0, "lr_by_component": rates, "ema_decay": 0.0},
    )
    trainer = Trainer(config, progress=False)
    trained = [name for name in trainer.optimizer.params if not name.startswith("head.")]
    assert trained and all("lora_" in name for name in trained)
    out = trainer.run()
    merged = jf.load(out, device="cpu", dtype="float32", progress=False).model
    base = jf.load(parity_dir, device="cpu", dtype="float32", progress=False).model
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted, plain, old = (model.llm(embeds) for model in (trainer.model, merged, base))
    torch.testing.assert_close(plain, adapted, rtol=1e-4, atol=1e-5)
    assert (plain - old).abs().max() > 0.01
    changed = {k for k, v in merged.state_dict().items() if not torch.equal(v, base.state_dict()[k])}
    assert changed and all("_proj." in name for name in changed)


def test_checkpointing_changes_nothing(settings, undisturbed):
    """Stops: recomputed blocks that compute something else."""
    config = settings(gradient_checkpointing=True)
    train(config)
    assert metrics(config.output) == undisturbed[0]


def test_reports(settings, undisturbed, manifest, monkeypatch):
    """Stops: a run that shows nothing: pictures, answers, validation, curves; and one that looking changes."""
    monkeypatch.undo()
    report = {
        "every": 3,
        "prompts": ["a cat", "a dog"],
        "questions": ["What?"],
        "images": [str(manifest.parent / "0.png")],
        "validation": str(manifest),
        "validation_rows": 20,
        "num_inference_steps": 2,
        "tracker": "none",
    }
    config = settings(report=report)
    train(config)
    folder = Path(config.output)
    shown = read_lines(folder / "samples.jsonl")
    assert [row["step"] for row in shown] == [3, 6]
    assert all(row["loss"] and row["flow"] and row["answers"] for row in shown)
    assert all((folder / row["sheet"]).is_file() and len(row["answered"]) == 1 for row in shown)
    assert (folder / "curves.png").is_file() == (find_spec("matplotlib") is not None)
    row = metrics(folder)[0]
    assert {"loss", "flow", "alignment", "answers", "norm", "lr", "padding", "flow_t0.25"} <= row.keys()
    assert metrics(folder) == undisturbed[0]


def test_a_cache_changes_nothing(settings, tmp_path, monkeypatch):
    """Stops: cached latents or features that are others than those computed anew."""
    options = dict(
        optimizer={"lr": 1e-3, "warmup": 2, "lr_by_component": {"siglip": 0}},
        data=[{"kind": "generation", "manifest": settings().data[0].manifest}],
        batch=4,
        micro_batch=1,
    )
    plain = settings(**options, output=str(tmp_path / "plain"), loader={"crop": "fixed", "workers": 0})
    train(plain)
    cached = {"crop": "fixed", "workers": 0, "cache": str(tmp_path / "cache")}
    once = settings(**options, output=str(tmp_path / "once"), loader=cached)
    train(once)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 12
    monkeypatch.setattr("janusflow_min.vae.VAE.encode", lambda *args: pytest.fail("encoded again"))
    twice = settings(**options, output=str(tmp_path / "twice"), loader=cached)
    train(twice)
    assert metrics(plain.output) == metrics(once.output) == metrics(twice.output)


# Optimizer -----------------------------------------------------------------------


def check_adamw(
    dtype: torch.dtype, kernel: bool = False, device: str = "cpu", on_device: bool = False
) -> None:
    """Ten steps as torch's AdamW makes them over fp32 copies; one gradient that is not finite between them. on_device:
    the schedule as a captured graph reads it."""
    config = read(
        OptimizerConfig,
        {"lr": 1e-2, "warmup": 0, "ema_decay": 0.9, "max_grad_norm": 0.5, "weight_decay": 0.1},
    )
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (7,), (70, 101), (1, 1, 1, 16), (4096,))
    start = [torch.randn(shape, generator=g).to(device) for shape in shapes]
    ours = {str(i): torch.nn.Parameter(p.clone()) for i, p in enumerate(start)}
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    mine = AdamW(ours.items(), dict.fromkeys(ours, 1e-2), config, 10, dtype, kernel)
    groups = [
        {"params": [p for p in theirs if sum(size > 1 for size in p.shape) < 2], "weight_decay": 0.0},
        {"params": [p for p in theirs if sum(size > 1 for size in p.shape) > 1], "weight_decay": 0.1},
    ]
    other = torch.optim.AdamW(groups, 1e-2, betas=(0.9, 0.95))
    average = [p.detach().clone() for p in theirs]
    for i in range(10):
        grads = [torch.randn(p.shape, generator=g).to(device, dtype) for p in theirs]
        for k, (p, q, grad) in enumerate(zip(ours.values(), theirs, grads, strict=True)):
            odd = grad.new_empty(grad.numel() + 1)[k % 2 :][: grad.numel()].view_as(grad)  # not aligned
            p.grad, q.grad = odd.copy_(grad), grad.float()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        other.step()
        schedule = mine.schedule(i)
        if on_device:
            schedule = Schedule(*torch.tensor(schedule, device=device))
        found = mine.step(schedule, mine.gradients())
        assert float(found) == pytest.approx(float(norm), rel=1e-5)
        average = [
            a.lerp(q.detach(), 1 - min(0.9, (1 + i) / (10 + i))) for a, q in zip(average, theirs, strict=True)
        ]
        if i == 4:
            for p in ours.values():
                p.grad = torch.full_like(p, torch.nan)
            assert not mine.step(mine.schedule(i), mine.gradients()).isfinite()
    for name, q, a in zip(ours, theirs, average, strict=True):
        torch.testing.assert_close(mine.master[name], q.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.average[name], a, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[name].detach(), mine.master[name].to(dtype))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype, on_device):
    """Stops: another bias correction, epsilon or clipping than AdamW's; an average that lags by a step; small steps
    that bf16 weights round away; NaN that spreads."""
    check_adamw(dtype, on_device=on_device)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # interpreted bfloat16 is not rounded
def test_adamw_in_one_launch_is_torchs_interpreted(interpret, dtype):
    """Stops: a kernel that updates another tensor's part or beyond a tensor's end, found without a GPU."""
    check = "import torch, test_runs; test_runs.check_adamw"
    interpret(f"{check}(torch.{dtype}, kernel=True)")
    interpret(f"{check}(torch.{dtype}, kernel=True, on_device=True)")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_one_launch_is_torchs(dtype):
    check_adamw(dtype, kernel=True, device="cuda")
    check_adamw(dtype, kernel=True, device="cuda", on_device=True)


def test_schedules(settings):
    """Stops: a warm-up that starts at zero or jumps, a cosine that ends elsewhere."""
    constant = settings(optimizer={"lr": 1.0, "warmup": 4}).optimizer
    assert [rate_factor(constant, i, 100) for i in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = settings(optimizer={"lr": 1.0, "warmup": 4, "schedule": "cosine", "min_lr_ratio": 0.1}).optimizer
    factors = [rate_factor(cosine, i, 104) for i in (3, 4, 54, 104)]
    assert factors == pytest.approx([1, 1, 0.55, 0.1])


# Several processes -----------------------------------------------------------------------

LAUNCH = """
import json, sys, torch
torch.set_num_threads(1)
from janusflow_min.training.config import Config
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer
Trainer(read(Config, json.load(open(sys.argv[1]))), progress=False).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_two_processes_learn_what_one_learns(settings, undisturbed, tmp_path, parallel):
    """Stops: gradients that are means where sums are needed, ranks that wait for each other, samples drawn twice;
    a checkpoint of two that one cannot go on from."""
    launch = tmp_path / "launch.py"
    launch.write_text(LAUNCH)
    for steps in (4, 6):
        told = settings(parallel=parallel, steps=steps, export_dtype="float32", batch=6).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(told))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        command += [str(20_000 + os.getpid() % 20_000), str(launch), str(tmp_path / "config.json")]
        path = os.pathsep.join([str(Path(jf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    config = settings()
    for mine, one in zip(metrics(config.output), undisturbed[0], strict=True):
        for key in ("loss", "flow", "alignment", "answers", "norm"):
            assert mine[key] == pytest.approx(one[key], rel=2e-4), (mine["step"], key)
    for name, tensor in weights(config.output).items():
        torch.testing.assert_close(tensor, undisturbed[1][name], rtol=1e-3, atol=2e-4)
