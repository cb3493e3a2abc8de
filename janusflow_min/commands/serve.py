# SPDX-License-Identifier: MIT
"""`janusflow-min serve`: a server that speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from ..files import public_name
from ..options import whole
from ..serve import Limits, listen
from .common import Command, Option, load_pipeline, model_options, say

if TYPE_CHECKING:
    from ..serve.app import Server


def add_parser(command: Command, option: Option) -> None:
    new = command(
        serve,
        "serve chat and images to any client of OpenAI's API",
        "Serve /v1/chat/completions, /v1/images/generations and edits, /v1/models, /health and /metrics. Needs the\n"
        "extra `serve`: pip install 'janusflow-min[serve]'. Requests that wait run together. The log on stderr holds\n"
        "sizes and times, nothing of what is asked. SIGTERM or Ctrl-C: the server does what it has accepted, and ends.",
        """  janusflow-min serve
  janusflow-min serve --model deepseek-ai/JanusFlow-1.3B --device cuda --port 9000 --name janusflow
  janusflow-min serve --lora pixel=runs/mine/export-adapter:0.8  # requests may ask for "pixel" as lora""",
    )
    model_options(new, option, vae=True)
    option(new, "--host", "ADDRESS", "0.0.0.0 is every network of the machine", "127.0.0.1")
    option(new, "--port", "N", "0 is a free one", 8000, whole(0, 65535))
    option(new, "--name", "NAME", "the model's name for clients (default: MODEL, of a folder its name)")
    option(new, "--api-key", "KEY", "what clients must send (default: $JANUSFLOW_API_KEY, else none)")
    new.add_argument(
        "--allow-urls", metavar="HOST", nargs="+", default=[],
        help="hosts, as name or name:port, from which images may be fetched; others must be sent as data URLs",
    )  # fmt: skip
    option(new, "--max-batch", "N", "images or questions that run at once", 16, whole(1, 256))
    for limit in fields(Limits):
        flag = f"--{limit.name.replace('_', '-')}"
        option(new, flag, "N", limit.metadata["help"], limit.default, whole())


def make_server(args: argparse.Namespace) -> Server:
    """The server that a command line describes, with its model."""
    try:
        import uvicorn  # noqa: F401

        from ..serve.app import Server
        from ..serve.engine import Engine
    except ImportError as error:
        raise ImportError(f"{error}; the server needs: pip install 'janusflow-min[serve]'") from None
    key = args.api_key or os.environ.get("JANUSFLOW_API_KEY")
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    log = partial(say, quiet=args.quiet, remark=True)
    if key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
        log("everyone who can reach this address can use it; --api-key asks for a key")
    engine = Engine(load_pipeline(args, "all"), args.max_batch)
    return Server(engine, args.name or public_name(args.model), limits, key, frozenset(args.allow_urls), log)


def serve(args: argparse.Namespace) -> int:
    with listen(args.host, args.port) as sock:  # before the model, which takes long; nobody is let in yet
        server = make_server(args)
        import uvicorn

        say(f"{server.name} at http://{args.host}:{sock.getsockname()[1]}/v1")
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends by raising its signal again
            signal.signal(number, lambda *_: None)
        config = uvicorn.Config(server.app, log_level="error", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[sock])
    return 0
