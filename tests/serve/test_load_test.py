# SPDX-License-Identifier: MIT
"""A short run of scripts/load_test.py, whose long one docs/serving.md reports."""

from __future__ import annotations

import os
import sys

import pytest
from serving import SCRIPTS, load_script

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "multipart"):
    pytest.importorskip(package)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process's metrics are read from /proc")


def test_many_requests_at_once_get_what_each_gets_alone(monkeypatch):
    """Stops: answers mixed up between requests, or changed by what runs beside them; threads, files or places that
    stay behind; a broken or hung-up request that disturbs the others."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("JANUSFLOW_API_KEY", raising=False)
    report = load_script("load_test").run(["--device", "cpu"], count=60, rounds=2)
    assert report["errors"] == [] and report["good"] == 48
    assert all(row["requests_in_hand"] == 0 for row in report["rounds"])
    assert report["rounds"][1]["bytes"] < report["rounds"][0]["bytes"] + 100e6
    assert os.environ["OMP_NUM_THREADS"] == "1"
