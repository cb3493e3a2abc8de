# SPDX-License-Identifier: MIT
"""`janusflow-min ui`: the page in a browser."""

from __future__ import annotations

import argparse
import signal
import threading

from ..files import public_name
from ..options import whole
from ..serve import Limits, listen
from .common import Command, Option, load_pipeline, model_options, say


def add_parser(command: Command, option: Option) -> None:
    new = command(
        ui,
        "generate, ask and edit in a browser",
        "Serve a page with three tabs: generate, ask, edit. Needs the extra `ui`: pip install 'janusflow-min[ui]'.\n"
        "Only this machine reaches it, unless --host or --share says otherwise. SIGTERM or Ctrl-C ends it.",
        """  janusflow-min ui
  janusflow-min ui --model deepseek-ai/JanusFlow-1.3B --device cuda --port 9000""",
    )
    model_options(new, option, vae=True)
    option(new, "--host", "ADDRESS", "0.0.0.0 is every network of the machine", "127.0.0.1")
    option(new, "--port", "N", "0 is a free one", 7860, whole(0, 65535))
    option(new, "--max-queue", "N", "runs that may wait; one more is refused", Limits.max_queue, whole())
    new.add_argument("--share", action="store_true", help="a public address too, through Gradio's servers")


def ui(args: argparse.Namespace) -> int:
    try:
        from ..webui import Page
    except ImportError as error:
        raise ImportError(f"{error}; the page needs: pip install 'janusflow-min[ui]'") from None
    with listen(args.host, args.port) as sock:  # before the model, which takes long; Gradio opens its own
        port = sock.getsockname()[1]
    page = Page(load_pipeline(args, "all"), public_name(args.model), Limits(max_queue=args.max_queue))
    _, _, public = page.launch(args.host, port, args.share)
    say(f"{public_name(args.model)} at http://{args.host}:{port}" + (f" and {public}" if public else ""))
    if args.share or args.host not in ("127.0.0.1", "::1", "localhost"):
        say("everyone who can reach this address can use it", args.quiet, remark=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    page.demo.close(verbose=False)
    return 0
