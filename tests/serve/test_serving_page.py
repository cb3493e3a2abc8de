# SPDX-License-Identifier: MIT
"""What docs/serving.md tells a reader to type, against a server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")

from PIL import Image
from serving import Running

import janusflow_min as jf
from janusflow_min.serve import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server():
    with Running(jf.load("tiny", device="cpu", progress=False)) as server:
        yield server


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_curl_s_lines(server):
    """Stops: an example that the server refuses."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    lines = "".join(blocks("sh")).replace("\\\n", " ").replace(ADDRESS, server.root).splitlines()
    lines = [line for line in lines if line.startswith("curl")]
    assert len(lines) >= 2
    for line in lines:
        done = subprocess.run([*shlex.split(line), "-sSf"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and json.loads(done.stdout)["created"], done.stderr


def test_python_s_blocks(server, tmp_path, monkeypatch, capsys):
    """Stops: an example that the openai package or the server refuses."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block.replace(ADDRESS, server.root), "serving.md", "exec"), names)
    assert Image.open("star.png").size == (128, 128) and capsys.readouterr().out.strip()


def test_limits_are_those_of_the_page():
    """Stops: a table of limits that are no longer the server's."""
    limits = Limits()
    for name in vars(limits):
        assert f"`--{name.replace('_', '-')}`" in PAGE
    shown = (
        f"| {limits.max_queue} |",
        f"{limits.max_body >> 20} MiB",
        f"{limits.max_image_pixels // 10**6} million",
    )
    shown += (f"| {limits.max_tokens:,} |", f"| {limits.max_n}, {limits.max_steps}, {limits.max_size:,} px |")
    assert all(text in PAGE for text in shown)
