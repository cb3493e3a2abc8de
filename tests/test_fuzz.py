# SPDX-License-Identifier: MIT
"""Damaged files, by the thousand: every one is read or refused with a documented error, in bounded time and memory.

The cases run in processes of their own (`fuzz_worker.py`). `JANUSFLOW_FUZZ=20` makes 20 cases of each file instead of
500.
"""

from __future__ import annotations

import ast
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

CASES = int(os.environ.get("JANUSFLOW_FUZZ", "500"))
SECONDS, MEGABYTES = 10, 1024  # for each case
DOCUMENTED = ("fine", "ValueError", "FileNotFoundError", "FloatingPointError")
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "model.safetensors",
)
FILES += ("tokenizer_config.json", "special_tokens_map.json")
FILES += ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
FORMATS = [
    "AVIF",
    "BLP",
    "BMP",
    "DDS",
    "DIB",
    "GIF",
    "ICNS",
    "ICO",
    "IM",
    "JPEG",
    "JPEG2000",
    "MPO",
    "MSP",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
    "XBM",
]


class Worker:
    """A process that takes cases; it is replaced when it dies or does not answer."""

    def __init__(self, checkpoint: Path, scratch: Path):
        self.checkpoint, self.scratch, self.count = checkpoint, scratch, 0
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.count += 1
        folder = self.scratch / str(self.count)
        folder.mkdir()
        script = Path(__file__).with_name("fuzz_worker.py")
        root = str(Path(__file__).resolve().parents[1])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "RUST_BACKTRACE": "0"}
        self.process = subprocess.Popen(
            [sys.executable, script, self.checkpoint, folder, str(MEGABYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()
        assert self.answers.get(timeout=120) == "ready\n", "the worker did not start"

    @staticmethod
    def _listen(process: subprocess.Popen, answers: queue.Queue) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")  # it ended

    def __call__(self, target: str, seed: int) -> str:
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{target} {seed}\n")
        self.process.stdin.flush()
        try:
            if answer := self.answers.get(timeout=SECONDS):
                return ast.literal_eval(answer)
            verdict = f"DIED: exit code {self.process.wait()}"
        except queue.Empty:
            verdict = f"HANGS: no answer in {SECONDS} s"
        self.stop()
        return verdict

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def worker(parity_dir, tmp_path_factory):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's limits on memory")
    made = Worker(parity_dir, tmp_path_factory.mktemp("fuzz"))
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.parametrize("target", [*FILES, *FORMATS])
def test_damaged_files_are_read_or_refused(worker, target):
    """Stops: a hang, a crash, gigabytes, or an undocumented error for a broken or hostile file."""
    if target in FORMATS:
        Image.init()
        if target not in Image.SAVE:
            pytest.skip(f"this Pillow writes no {target}")
    verdicts = {seed: worker(target, seed) for seed in range(CASES)}
    kinds = Counter(verdict.split(":")[0] for verdict in verdicts.values())
    wrong = {seed: v for seed, v in verdicts.items() if v.split(":")[0] not in DOCUMENTED}
    assert not wrong, f"{target}: {dict(kinds)}; {dict(list(wrong.items())[:10])}"
    assert kinds["fine"] < CASES and sum(kinds.values()) == CASES, kinds


def test_the_fuzz_runs(worker):
    """Stops: a fuzz that nobody notices to be broken, since it is slow and rarely run."""
    assert {worker("config.json", seed).split(":")[0] for seed in range(12)} >= {"fine", "ValueError"}
    assert {worker("PNG", seed).split(":")[0] for seed in range(12)} >= {"ValueError"}
