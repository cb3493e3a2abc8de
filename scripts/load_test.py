# SPDX-License-Identifier: MIT
"""`janusflow-min serve` under load: many requests of every kind at once, one of ten broken, one of ten hung up on.

    python scripts/load_test.py --requests 200 --model tiny

The good requests go to a server that runs each alone, then to one that batches; then all go there, in rounds. Every
answer must equal the one given alone: text to the letter, images to one of 255 levels. `--url` tests a server that
runs already instead, for instance replicas that scripts/serve_ray.py has started. Prints a JSON object; exit
status 1 if an answer differs, a broken request is not refused, or requests, threads or files are left over.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext

import httpx
import numpy as np
from PIL import Image

from janusflow_min.serve.app import PREPARING

CHAT, IMAGES = "chat/completions", "images/generations"
BROKEN = [(CHAT, {"messages": []}), (IMAGES, {"prompt": "a star", "n": 1000}), (IMAGES, "no object")]
QUESTIONS = ("hi", "What is in the picture?", "Describe the picture.", "How many objects are there?")


def make_requests(count, seed):
    """(kind, path, body) of each."""
    draw, file, made = random.Random(seed), io.BytesIO(), []
    Image.effect_noise((96, 64), 60).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for k in range(count):
        content = [{"type": "image_url", "image_url": {"url": url}}] * draw.choice([0, 1, 1, 2])
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": draw.choice(QUESTIONS)}]}]
        path, body = CHAT, {"messages": messages, "stream": draw.random() < 0.3, "seed": k}
        body |= {"max_tokens": draw.choice([4, 64]), "temperature": draw.choice([0.0, 1.0])}
        if draw.random() < 0.2:
            path, body = IMAGES, {"prompt": "a red star", "n": draw.choice([1, 2]), "seed": k}
            body["num_inference_steps"] = 4
        kind = {0: "broken", 1: "hung up"}.get(k % 10, "good")
        made.append((kind, *(BROKEN[k // 10 % 3] if kind == "broken" else (path, body))))
    return made


@contextmanager
def serve(*options):
    """The URL of a server in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "janusflow_min",
        "serve",
        "--port",
        "0",
        "--max-queue",
        "10000",
        *options,
    ]
    with subprocess.Popen([*command, "--quiet"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            asyncio.run(send(url, make_requests(8, seed=1)))  # the first calls are slower
            yield url
        finally:
            process.terminate()


async def send(url, work):
    """Send all at once. (status or 0 for a client that hung up, answer, seconds) of each; the seconds of all."""
    transport = httpx.AsyncHTTPTransport(retries=5, limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(base_url=url, timeout=None, transport=transport) as client:

        async def one(k, kind, path, body):
            begin = time.perf_counter()
            try:
                done = await asyncio.wait_for(
                    client.post(path, json=body), k % 7 / 5 if kind == "hung up" else None
                )
            except asyncio.TimeoutError:
                return 0, None, 0.0
            return done.status_code, read(path, body, done), time.perf_counter() - begin

        begin = time.perf_counter()
        got = await asyncio.gather(*(one(k, *request) for k, request in enumerate(work)))
        return got, time.perf_counter() - begin


def read(path, body, done):
    """Text, or pixels (n, H, W, 3); None where there is no answer."""
    if done.status_code != 200:
        return None
    if path == IMAGES:
        files = [io.BytesIO(base64.b64decode(data["b64_json"])) for data in done.json()["data"]]
        return np.stack([np.asarray(Image.open(file), dtype=int) for file in files])
    if not body["stream"]:
        return done.json()["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in done.text.split("\n\n") if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def equal(one, other):
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.shape == other.shape:
        return abs(one - other).max() <= 1
    return isinstance(one, str) and one == other


def read_metrics(url):
    """What the server holds now."""
    lines = [line.split() for line in httpx.get(url.replace("/v1", "/metrics")).text.splitlines()]
    now = {name: float(value) for name, value, *more in lines if name[0] != "#" and not more}
    held = {key: now[f"janusflow_{key}"] for key in ("requests_in_hand", "threads")}
    return held | {"files": now["process_open_fds"], "bytes": now["process_resident_memory_bytes"]}


def settle(url, idle):
    """What is left over, and what the server holds, once it is back at rest or 20 s have passed.

    Its threads that prepare images stay for the next request, `PREPARING` at most; a connection closes a while after
    its client. So a leak is what goes on after that, not what one round holds more than another.
    """
    most = {"requests_in_hand": 0, "threads": idle["threads"] + PREPARING, "files": idle["files"] + 2}
    for _ in range(40):
        time.sleep(0.5)
        now = read_metrics(url)
        if not (
            over := [f"{key} left over: {now[key]}, not {most[key]}" for key in most if now[key] > most[key]]
        ):
            break
    return over, now


def run(options, count, rounds, url=None):
    """The report; its "errors" should be empty. At `url` runs the server to test; by default one is started."""
    work, errors, table = make_requests(count, seed=0), [], []
    good = [request for request in work if request[0] == "good"]
    with serve(*options, "--max-batch", "1") as single:
        alone, one_at_a_time = asyncio.run(send(single, good))
    with nullcontext(url) if url else serve(*options) as tested:
        idle = read_metrics(tested) if url is None else None  # one process's
        batched = asyncio.run(send(tested, good))[1]
        for _ in range(rounds):
            got, seconds = asyncio.run(send(tested, work))
            mine = [result for result, (kind, *_) in zip(got, work, strict=True) if kind == "good"]
            errors += ["an answer differs" for a, b in zip(alone, mine, strict=True) if not equal(a[1], b[1])]
            refused = [result[0] for result, (kind, *_) in zip(got, work, strict=True) if kind == "broken"]
            errors += [f"a broken request got {status}" for status in refused if status != 400]
            times = sorted(result[2] for result in mine)
            row = {"requests a second": count / seconds, "p95 in s": times[int(0.95 * len(times))]}
            over, now = settle(tested, idle) if idle else ([], {})
            errors += over
            table.append(row | now)
    times = {"one at a time": one_at_a_time, "batched": batched, "factor": one_at_a_time / batched}
    return {"good": len(good), "errors": errors, "rounds": table, "seconds": times}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=200, help="of a round (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument(
        "--url", help="a server of the same model that runs already, as http://127.0.0.1:8000/v1; its --max-queue"
        " must hold a round's requests, and what it leaves over is not looked at",
    )  # fmt: skip
    args = parser.parse_args()
    options = ["--model", args.model, "--device", args.device]
    report = run(options, args.requests, args.rounds, args.url)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["errors"] else 0)
