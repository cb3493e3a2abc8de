# SPDX-License-Identifier: MIT
"""`janusflow-min serve` as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JANUSFLOW_API_KEY": ""}
COMMAND = [sys.executable, "-m", "janusflow_min", "serve", "--device", "cpu", "--port", "0"]
ASKED = {"messages": [{"role": "user", "content": "hi"}]}


@contextmanager
def started(*options: str, **env: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its URL."""
    with subprocess.Popen(
        [*COMMAND, *options], env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, process.stderr.read()
            url = line.split()[-1]
            for _ in range(200):
                try:
                    httpx.get(url.replace("/v1", "/health"))
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield process, url
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process at once there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_when_what_it_has_accepted_is_done(number):
    """Stops: answers cut off by a restart; a server that goes on, takes more, or ends in an error."""
    with started("--max-batch", "2") as (process, url), ThreadPoolExecutor(4) as pool:
        paint = {"prompt": "a star", "n": 2, "num_inference_steps": 40}
        running = [
            pool.submit(httpx.post, f"{url}/images/generations", json=paint, timeout=60) for _ in range(2)
        ]
        running.append(pool.submit(httpx.post, f"{url}/chat/completions", json=ASKED, timeout=60))
        for _ in range(500):
            text = httpx.get(url.replace("/v1", "/metrics")).text
            if "janusflow_requests_in_hand 2.0" in text and "janusflow_image_batches_total 1.0" in text:
                break
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("/v1", "/health"))
        assert [done.result().status_code for done in running] == [200] * 3
        assert process.wait(30) == 0
        lines = process.stderr.read().splitlines()
    log = r"/\S+ 200, \d+\.\d{3} s, \d+ bytes in, \d+ bytes out"
    assert len(lines) > 3 and all(re.fullmatch(log, line) for line in lines), lines


def test_a_key_from_the_environment_and_a_name(tmp_path):
    """Stops: a key that can only be given where every user of the machine can read it."""
    with started("--name", "mine", "--quiet", JANUSFLOW_API_KEY="secret") as (process, url):
        assert httpx.get(f"{url}/models").status_code == 401
        listed = httpx.get(f"{url}/models", headers={"Authorization": "Bearer secret"}).json()
        assert listed["data"][0]["id"] == "mine"
        process.terminate()
        process.wait(30)
        assert process.stderr.read() == ""


def test_what_cannot_be_served_is_said_at_once():
    """Stops: minutes of loading before an address that is taken; a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {("--port", port): "in use", ("--host", "no.such.host.example"): "no.such.host"}
        cases |= {
            ("--port", "70000"): "65535",
            ("--max-queue", "0"): "at least 1",
            ("--model", "/nowhere"): "nowhere",
        }
        for options, words in cases.items():
            done = subprocess.run([*COMMAND, *options], env=ENV, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, (
                done.stderr
            )


def test_without_its_packages_the_command_says_what_to_install(tmp_path):
    """Stops: an ImportError that leaves its reader alone."""
    (tmp_path / "fastapi.py").write_text("raise ImportError('No module named fastapi')")
    env = ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'janusflow-min[serve]'" in done.stderr
