# SPDX-License-Identifier: MIT
"""The processes that prepare steps: how they start, what they send, and how their faults are told."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions
from torch.utils.data import get_worker_info

from janusflow_min.checkpoint import load_model
from janusflow_min.processor import Processor
from janusflow_min.training import config as training_config
from janusflow_min.training.batch import StepDataset, explain_loader_error, load_steps
from janusflow_min.training.dataset import open_sources, summarize
from janusflow_min.training.metrics import Report, read_lines
from janusflow_min.training.sample import SampleBuilder
from janusflow_min.training.trainer import Trainer


class Slow(SampleBuilder):
    """A builder that never ends in a worker."""

    def __call__(self, *args):
        if get_worker_info() is not None:
            time.sleep(600)
        return super().__call__(*args)


@pytest.fixture
def dataset(settings, parity_dir):
    model, processor = load_model(parity_dir, progress=False), Processor.from_folder(parity_dir, 640)

    def make(builder=SampleBuilder, **changes) -> StepDataset:
        config = settings(**changes)
        return StepDataset(config, open_sources(config), builder(config, processor, model))

    return make


def test_batches_travel_without_shared_memory(dataset, monkeypatch):
    """Stops: a run that hangs for ever in a container, whose /dev/shm is 64 MB, and images sent twice, in fp32."""
    data = dataset(batch=12)[0]

    def refuse(*args):
        raise AssertionError("a tensor goes through shared memory")

    for name in ("reduce_tensor", "reduce_storage"):
        monkeypatch.setattr(reductions, name, refuse)
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, refuse)
    content = bytes(ForkingPickler.dumps(data))
    images = sum(len(b.images) if b.images is not None else 0 for b in data.batches)
    images += sum(len(b.und_pixels) if b.und_pixels is not None else 0 for b in data.batches)
    assert images and len(content) < 1.3 * images * 3 * 64 * 64 + 12 * 4096
    back = ForkingPickler.loads(content)
    for ours, theirs in zip(data.batches, back.batches, strict=True):
        for name, value in vars(ours).items():
            other = getattr(theirs, name)
            assert (value is None and other is None) or (
                torch.equal(value, other) and value.dtype == other.dtype
            )
    assert [b.images.dtype for b in data.batches if b.images is not None]


def test_workers_are_spawned(dataset, monkeypatch):
    """Stops: forked workers, which hang or die in a process that has computed gradients."""
    seen = {}

    class Loader:
        def __init__(self, *args, **options):
            seen.update(options)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr("janusflow_min.training.batch.DataLoader", Loader)
    assert list(load_steps(dataset(loader={"workers": 3, "timeout": 7}), range(2))) == []
    assert (seen["multiprocessing_context"], seen["num_workers"], seen["timeout"]) == ("spawn", 3, 7)


def test_workers_that_cannot_start(dataset, monkeypatch):
    """Stops: "No space left on device" where the disk has space, and Ctrl-C that stays held back."""

    class Loader:
        def __init__(self, *args, **options):
            pass

        def __iter__(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("janusflow_min.training.batch.DataLoader", Loader)
    with pytest.raises(OSError, match=r"No space left.* is /dev/shm full\? loader\.workers = 0"):
        list(load_steps(dataset(loader={"workers": 2}), range(2)))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_error_in_a_worker_is_one_line(dataset, tmp_path):
    """Stops: a traceback of another process glued into the message."""
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    data = [{"kind": "text", "manifest": str(tmp_path / "a.jsonl"), "shuffle": False}]
    steps = load_steps(dataset(data=data, loader={"workers": 1, "on_bad_row": "stop"}), range(2))
    with pytest.raises(ValueError) as caught:
        list(steps)
    assert str(caught.value) == (
        f"a bad row: {tmp_path / 'a.jsonl'}, line 2: ValueError: text must be a string that is not empty, got ''"
    )


@pytest.mark.slow
def test_a_worker_that_gives_nothing_is_given_up(dataset, monkeypatch):
    """Stops: a run that waits for ever."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    steps = load_steps(dataset(Slow, loader={"workers": 1, "timeout": 20}), range(2))
    with pytest.raises(RuntimeError, match="timed out") as caught:
        next(steps)
    assert "loader.timeout = 20 s" in explain_loader_error(caught.value, steps_settings(20))


def steps_settings(timeout: int) -> training_config.LoaderConfig:
    return training_config.LoaderConfig(timeout=timeout)


def test_bad_rows_are_written_down_once(settings, tmp_path, manifest, monkeypatch):
    """Stops: the same bad rows in bad_rows.jsonl after every restart, and once for every epoch."""
    monkeypatch.setattr(Report, "plot", lambda self: None)
    lines = manifest.read_text().splitlines()
    path = tmp_path / "a.jsonl"
    none = ['{"image": "none.png", "text": "a"}', '{"image": "none.png", "text": "b"}']
    path.write_text("\n".join(['{"text": ', *lines[:3], *none]) + "\n")
    for line in lines[:3]:
        name = json.loads(line)["image"]
        (tmp_path / name).write_bytes((manifest.parent / name).read_bytes())
    for steps in (2, 4):
        config = settings(data=[{"kind": "generation", "manifest": str(path)}], steps=steps, batch=4)
        Trainer(config, progress=False).run()
    written = [
        (row["line"], row["reason"][:12]) for row in read_lines(Path(config.output) / "bad_rows.jsonl")
    ]
    assert sorted(written) == [(1, "JSONDecodeEr"), (5, "FileNotFound"), (6, "FileNotFound")]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_ends_a_run_is_written_down(settings, tmp_path, workers):
    """Stops: a run that ends for want of good rows and keeps to itself why each of them was bad."""
    lines = [json.dumps({"image": f"{i}.png", "text": "a"}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    data = [{"kind": "generation", "manifest": str(tmp_path / "a.jsonl")}]
    with pytest.raises(
        ValueError, match=r"1,000 bad rows in a row, the last: .*a.jsonl, line .: FileNotFoundError"
    ):
        Trainer(settings(data=data, loader={"workers": workers}), progress=False).run()
    written = read_lines(tmp_path / "run" / "bad_rows.jsonl")
    assert sorted(row["line"] for row in written) == [1, 2, 3]


def test_a_bad_validation_row_is_skipped(settings, tmp_path, manifest, monkeypatch):
    """Stops: a run that ends at its first evaluation, hours in, for one broken image among the validation rows."""
    monkeypatch.setattr(Report, "plot", lambda self: None)
    lines = [json.dumps(json.loads(line) | {"image": str(manifest.parent / "0.png")})
             for line in manifest.read_text().splitlines()[:3]]  # fmt: skip
    path = tmp_path / "validation.jsonl"
    losses = []
    for bad in ([], ['{"image": "none.png", "text": "a"}', '{"image": ']):
        path.write_text("\n".join(lines + bad) + "\n")
        report = {"every": 2, "validation": str(path), "tracker": "none"}
        config = settings(tmp_path / f"run {len(bad)}", steps=2, report=report)
        Trainer(config, progress=False).run()
        losses.append(read_lines(Path(config.output) / "samples.jsonl")[0]["loss"])
    assert losses[0] == losses[1]
    assert [row["line"] for row in read_lines(Path(config.output) / "bad_rows.jsonl")] == [4]
    path.write_text('{"image": "none.png", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"report\.validation: none of its rows"):
        Trainer(settings(tmp_path / "none", steps=2, report=report), progress=False).run()


def test_what_a_run_learns_from(settings, manifest, tmp_path):
    """Stops: a dry run that counts other rows or shares than the run has; changed data that nobody notices."""
    folder = tmp_path / "captions"
    folder.mkdir()
    shutil.copy(manifest.parent / "0.png", folder)
    (folder / "0.txt").write_text("a cat\na small cat\n")
    data = [
        {"kind": "generation", "manifest": str(manifest), "ratio": 3},
        {"kind": "generation", "folder": str(folder), "ratio": 1},
    ]
    config = settings(data=data)
    first = summarize(config, open_sources(config))
    assert [(s["kind"], s["rows"], s["bad"], s["share"]) for s in first] == [
        ("generation", 12, 0, 0.75), ("generation", 1, 0, 0.25)]  # fmt: skip
    assert [s["fingerprint"] for s in summarize(config, open_sources(config))] == [
        s["fingerprint"] for s in first
    ]
    (folder / "0.txt").write_text("a cat\na small dog\n")
    again = summarize(config, open_sources(config))
    assert [a["fingerprint"] == b["fingerprint"] for a, b in zip(first, again, strict=True)] == [True, False]


RUN = """
import sys
from janusflow_min.training.config import Config
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer
import json
if __name__ == "__main__":
    Trainer(read(Config, json.loads(sys.argv[1])), progress=False).run()
"""


def start(tmp_path: Path, config, *prefix: str, **options) -> subprocess.Popen:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [*prefix, sys.executable, str(script), json.dumps(config.to_dict())],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.mark.slow
def test_ctrl_c_while_workers_start_is_an_interruption(settings, tmp_path):
    """Stops: Ctrl-C in the first seconds that is told as a worker's death for lack of memory."""
    for delay in (0.0, 0.7, 2.0):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        config = settings(loader={"workers": 2}, steps=100_000, save_every=100_000)
        process = start(tmp_path, config)
        while not (
            tmp_path / "run" / "metrics.jsonl"
        ).exists():  # the report is there just before the workers start
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=120)
        assert process.returncode != 0 and told.strip().splitlines()[-1] == "KeyboardInterrupt", told
        assert "memory" not in told


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not say who sent a signal")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_to_every_process_saves_first(settings, tmp_path, ranks):
    """Stops: a cluster's or a container's SIGTERM, which goes to data workers too, that ends a run without its last
    checkpoint; workers that outlive it."""
    config = settings(loader={"workers": 2}, steps=100_000, save_every=100_000, batch=4)
    port = ["--master-port", str(20_000 + os.getpid() % 20_000)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port, "--no-python"]
    process = start(tmp_path, config, *(launcher if ranks == 2 else []))
    written = tmp_path / "run" / "metrics.jsonl"
    while len(read_lines(written)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    every = descendants(process.pid)
    assert len(every) >= 3 * ranks
    for pid in [
        *every,
        process.pid,
    ]:  # children first: workers that die are noticed before the run hears of it
        os.kill(pid, signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in told and "data worker" not in told, told
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{read_lines(written)[-1]['step']:08d}"
    for _ in range(100):
        left = [pid for pid in every if (Path("/proc") / str(pid)).exists()]
        if not left:
            break
        time.sleep(0.1)
    assert not left, "processes are still there"


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, deepest first, without those that ended."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
            parents[int(path.parent.name)] = None if state == "Z" else int(parent)
    children = [child for child, parent in parents.items() if parent == pid]
    return [each for child in children for each in [*descendants(child), child]]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_workers(settings, tmp_path):
    """Stops: workers that outlive a killed run, and a run that goes on with other workers and learns other rows."""
    common = {"steps": 40, "save_every": 4, "batch": 6}
    Trainer(settings(tmp_path / "whole", **common), progress=False).run()
    for count in (2, 1):
        config = settings(loader={"workers": count}, **common)
        process = start(tmp_path, config)
        seen = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
        while len(read_lines(tmp_path / "run" / "metrics.jsonl")) < seen + 6:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.kill()
        process.wait()
        for _ in range(200):  # of the session, which is the run's own
            left = subprocess.run(
                ["pgrep", "-s", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            if not left:
                break
            time.sleep(0.1)
        assert not left, "workers are still there"
    Trainer(settings(loader={"workers": 0}, **common), progress=False).run()
    whole, run = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert [row["loss"] for row in run] == [row["loss"] for row in whole]


def test_a_full_disk_under_the_cache(settings, tmp_path, monkeypatch):
    """Stops: half a file of latents that is believed later, or an error that does not say which folder is full."""
    monkeypatch.setattr(Report, "plot", lambda self: None)
    config = settings(loader={"cache": str(tmp_path / "cache"), "crop": "fixed"}, steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = Trainer(config, progress=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cache \(loader\.cache\) cannot be written: .*disk full"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    Trainer(config, progress=False).run()
    assert [p.suffix for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.slow
def test_a_small_dev_shm(settings, tmp_path):
    """Stops: a run that hangs or dies where /dev/shm is small."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c",
             'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]  # fmt: skip
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    config = settings(loader={"workers": 2}, batch=48, steps=4)
    process = start(tmp_path, config, *mount)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 4
