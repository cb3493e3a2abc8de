# SPDX-License-Identifier: MIT
"""Fixtures every test may use: the tiny random checkpoint and what the reference computes for it.

`tests/fixtures/parity/tiny` is a checkpoint folder in the official layout; `expected.json` and
`expected.safetensors` in it hold the reference's recorded outputs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import janusflow_min as jf
from janusflow_min.checkpoint import load_model
from janusflow_min.processor import Processor

FORKS: list[str] = []  # where this process forked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: FORKS.append("".join(traceback.format_stack())))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that threads cost more than they save, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_forks():
    """Stops: a test that forks this process, which has used torch: the child may hang, or end in an error about
    autograd's threads, by torch's version. A child must be a process of its own (subprocess, or spawn)."""
    FORKS.clear()
    yield
    assert not FORKS, "this test forked:\n" + FORKS[0]


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The tiny checkpoint folder, not to be written to."""
    return Path(__file__).parent / "fixtures" / "parity" / "tiny"


@pytest.fixture
def folder(parity_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    target = tmp_path / "checkpoint"
    shutil.copytree(parity_dir, target, ignore=shutil.ignore_patterns("expected.*", "images"))
    return target


@pytest.fixture(scope="module")
def pipe(parity_dir: Path) -> jf.Pipeline:
    return jf.load(parity_dir, device="cpu", progress=False)


@pytest.fixture(scope="module")
def model(parity_dir: Path) -> jf.JanusFlow:
    return load_model(parity_dir, progress=False)


@pytest.fixture(scope="module")
def processor(parity_dir: Path) -> Processor:
    return Processor.from_folder(parity_dir, 640)


@pytest.fixture(scope="session")
def expected(parity_dir: Path) -> dict:
    """Recorded ids, strings and settings."""
    return json.loads((parity_dir / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def recorded(parity_dir: Path) -> dict[str, Tensor]:
    """Recorded tensors."""
    return load_file(parity_dir / "expected.safetensors")


@pytest.fixture
def interpret(request) -> Callable[[str], None]:
    """Runs Python code that may import torch and the test's own module, in a process where Triton's kernels are
    interpreted: no GPU is needed."""
    if find_spec("triton") is None:
        pytest.skip("needs triton, which comes with torch for CUDA")
    here = [str(request.path.parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]

    def run(code: str) -> None:
        env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(here)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    return run
