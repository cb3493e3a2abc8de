# SPDX-License-Identifier: MIT
"""One invented data set and one run of each mode, shared by all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from invented_uni import FAST, generate_in, make_data

from janusflow_min.loading import load


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("uni") / "data")


@pytest.fixture(scope="session")
def pipe():
    return load("tiny", device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="session")
def native(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("native") / "run"
    coverage = generate_in(FAST, run, data, max_new_tokens=6)
    assert coverage.complete and coverage.expected == 12
    return run


@pytest.fixture(scope="session")
def torchumm_run(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("torchumm") / "run"
    assert generate_in(FAST, run, data, uni_mode="torchumm", max_new_tokens=6).expected == 13
    return run
