# SPDX-License-Identifier: MIT
"""scripts/serve_ray.py: two replicas on this machine, one of which is killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import SCRIPTS, load_script

pytest.importorskip("ray.serve")
for package in ("fastapi", "uvicorn", "prometheus_client", "multipart"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.ray

CHAT, IMAGES = "chat/completions", "images/generations"
ASKED = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, SCRIPTS / "serve_ray.py", "--min-replicas", "2", "--max-queue", "40"]
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1", "JANUSFLOW_API_KEY": ""}
    with (
        open(tmp_path_factory.mktemp("ray") / "log", "w") as log,
        subprocess.Popen(
            [*command, "--device", "cpu", "--port", port],
            env=env,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            assert line.strip() == f"tiny at http://127.0.0.1:{port}/v1", Path(log.name).read_text()
            yield line.split()[-1], process
        finally:
            process.terminate()
            process.wait(120)


@pytest.fixture
def url(running) -> str:
    return running[0]


def replicas() -> list[int]:
    """The processes of the replicas."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ServeReplica:default:Replica" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def post(url: str, path: str, **body):
    return httpx.post(f"{url}/{path}", json=body, timeout=120)


def test_a_killed_replica_loses_no_request(url):
    """Stops: status 500 for what the other replica could have answered; an answer that depends on the replica."""
    load_test = load_script("load_test")
    work = [request for request in load_test.make_requests(80, seed=0) if request[0] == "good"]
    for _, _, body in work:
        body["stream"] = False  # what a client has read of a stream cannot be sent again
    quiet, _ = asyncio.run(load_test.send(url, work))
    before = replicas()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: asyncio.run(load_test.send(url, work)))
        time.sleep(0.7)
        os.kill(before[0], signal.SIGKILL)
        assert not sent.done()
        answers, _ = sent.result()
    assert [status for status, _, _ in answers] == [200] * len(work)
    assert all(load_test.equal(a[1], b[1]) for a, b in zip(quiet, answers, strict=True))
    for _ in range(120):
        if len(now := replicas()) == 2:
            break
        time.sleep(0.5)
    assert len(now) == 2 and before[0] not in now, "Ray starts no other replica"


def test_the_door_answers_as_the_server_does(url):
    """Stops: a stream, a refusal or a limit that Ray changes; a body without limit in the door's memory."""
    with httpx.stream("POST", f"{url}/{CHAT}", json=ASKED | {"stream": True}, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 3
    assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}
    assert post(url, CHAT, messages=[]).json()["error"]["param"] == "messages"
    large = httpx.post(f"{url}/{CHAT}", content=(b" " * 2**20 for _ in range(17)))
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
    with ThreadPoolExecutor(120) as pool:  # a place for 40 at each of two replicas
        asked = [pool.submit(post, url, IMAGES, prompt="a star", num_inference_steps=5) for _ in range(120)]
        status = [done.result().status_code for done in asked]
    assert set(status) == {200, 429}


def test_a_client_that_goes_away_is_not_answered(url):
    """Stops: places and engines that go on for clients that have hung up."""
    body = {"prompt": "a star", "n": 10, "num_inference_steps": 60}
    begin = time.monotonic()
    assert post(url, IMAGES, **body).status_code == 200
    one = time.monotonic() - begin
    for _ in range(8):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/{IMAGES}", json=body, timeout=0.3)
    begin = time.monotonic()
    assert post(url, IMAGES, prompt="a star", num_inference_steps=2).status_code == 200
    assert time.monotonic() - begin < 2 * one, "the replicas still work on what nobody waits for"


def test_sigterm_lets_what_is_in_hand_end(running):
    """Stops: answers cut off where replicas are restarted; replicas that go on."""
    url, process = running
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, url, IMAGES, prompt="a star", num_inference_steps=60) for _ in range(4)]
        time.sleep(0.5)
        process.terminate()
        assert [done.result().status_code for done in asked] == [200] * 4
    assert process.wait(120) == 0 and not replicas()
