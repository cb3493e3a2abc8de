# SPDX-License-Identifier: MIT
"""Fixtures every test may use: the tiny random checkpoint and what the reference computes for it.

`tests/fixtures/parity/tiny` is a checkpoint folder in the official layout; `expected.json` and
`expected.safetensors` in it hold the reference's recorded outputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that threads cost more than they save, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """The tiny checkpoint folder, not to be written to."""
    return Path(__file__).parent / "fixtures" / "parity" / "tiny"


@pytest.fixture(scope="session")
def expected(parity_dir: Path) -> dict:
    """Recorded ids, strings and settings."""
    return json.loads((parity_dir / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def recorded(parity_dir: Path) -> dict[str, Tensor]:
    """Recorded tensors."""
    return load_file(parity_dir / "expected.safetensors")
