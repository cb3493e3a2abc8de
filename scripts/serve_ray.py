# SPDX-License-Identifier: MIT
"""`janusflow-min serve` over several GPUs and hosts: replicas of the server under Ray Serve.

    python scripts/serve_ray.py --min-replicas 2 --max-replicas 8 --device cuda --api-key "$KEY"

Needs the extra `serve-ray`. Takes the options of `janusflow-min serve`, which hold for each replica, and those below.
A replica is the same application with a model of its own. The door is a small process that reads requests, hands
each to the replica with the least to do, and to another one if that replica dies before it has answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.routing import Mount

from janusflow_min.cli import build_parser
from janusflow_min.commands.serve import make_server
from janusflow_min.files import public_name
from janusflow_min.options import whole
from janusflow_min.serve.app import read_body
from janusflow_min.serve.protocol import Problem

GRACE = 600  # seconds for a process that is told to end to do what it has
TRIES = 4  # replicas that may die under a request
# What the ASGI application reads of a request; Ray's proxy adds objects that stay where they are.
SCOPE = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)
Json = dict[str, Any]


class Replica:
    """The server with its model. Its engine makes the batches: unlike `serve.batch`, which waits for a batch and then
    for all of its answers, it takes newcomers between two tokens and lets each answer go when it is done."""

    def __init__(self, args: argparse.Namespace):
        self.server = make_server(args)
        self.server.engine.start()

    async def respond(self, scope: Json, body: bytes) -> AsyncIterator[Json]:
        """The ASGI messages of a response. Ray cancels this when the client goes away."""
        request = [{"type": "http.request", "body": body, "more_body": False}]
        messages: asyncio.Queue[Json | None] = asyncio.Queue()

        async def receive() -> Any:
            return request.pop() if request else await asyncio.Future()

        task = asyncio.ensure_future(self.server.app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()

    def check_health(self) -> None:
        if not self.server.engine.is_alive:
            raise RuntimeError("the engine has ended")  # Ray starts another replica


class Door:
    """An ASGI application that hands requests to replicas: at most `most` at once, of `max_body` bytes."""

    def __init__(self, replicas: Any, most: int, max_body: int):
        self.replicas, self.most, self.max_body = replicas.options(stream=True), most, max_body
        self.in_hand = 0

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        self.in_hand += 1
        try:
            if self.in_hand > self.most:
                message = f"{self.most} requests are in hand already; try again later"
                raise Problem(429, message, "queue_full", headers={"Retry-After": "1"})
            body = await read_body(scope, receive, self.max_body) if scope["method"] == "POST" else b""
            await self.forward(scope, body, send)
        except Problem as problem:
            await problem.response(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.in_hand -= 1

    async def forward(self, scope: Json, body: bytes, send: Any) -> None:
        scope = {key: scope[key] for key in SCOPE}
        for tries_left in reversed(range(TRIES)):
            messages = self.replicas.respond.remote(scope, body)
            try:
                start, first = await anext(messages), await anext(messages)
                break
            except RayActorError:  # the replica died, and the client has nothing of its answer
                if not tries_left:
                    raise
        for message in (start, first):
            await send(message)
        async for message in messages:
            await send(message)


def build(args: argparse.Namespace, extra: argparse.Namespace) -> serve.Application:
    on_gpu = args.device.startswith("cuda")
    scaling = {"min_replicas": extra.min_replicas, "max_replicas": extra.max_replicas}
    replicas = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": 1, "num_gpus": float(on_gpu)},
        max_ongoing_requests=args.max_queue,
        autoscaling_config={**scaling, "target_ongoing_requests": args.max_batch},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=GRACE,
    )

    def door() -> Starlette:
        handle = serve.get_deployment_handle("Replica", "default")
        most = args.max_queue * extra.max_replicas
        return Starlette(routes=[Mount("/", Door(handle, most, args.max_body))])

    ingress = serve.deployment(
        serve.ingress(door)(),
        name="Door",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10**6,
        graceful_shutdown_timeout_s=GRACE,
    )
    return ingress.bind(replicas.bind(args))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--min-replicas", type=whole(), default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--max-replicas", type=whole(), metavar="N", help="(default: as --min-replicas)")
    parser.add_argument("--address", help="a Ray cluster's; without it one starts here")
    extra, rest = parser.parse_known_args()
    extra.max_replicas = extra.max_replicas or extra.min_replicas
    args = build_parser().parse_args(["serve", *rest])
    args.api_key = args.api_key or os.environ.get("JANUSFLOW_API_KEY")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = {} if extra.address else {"include_dashboard": False}
    ray.init(extra.address, log_to_driver=not args.quiet, **here)
    serve.start(proxy_location="EveryNode", http_options={"host": args.host, "port": args.port})
    serve.run(build(args, extra), logging_config={"enable_access_log": False})
    print(f"{args.name or public_name(args.model)} at http://{args.host}:{args.port}/v1", flush=True)
    told_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told_to_end.set())
    told_to_end.wait()
    serve.delete("default")  # waits for what is in hand
    serve.shutdown()


if __name__ == "__main__":
    main()
