# SPDX-License-Identifier: MIT
"""`janusflow-min understand`: a question about images, or about none."""

from __future__ import annotations

import argparse
import json
import sys

from ..checks import MAX_NEW_TOKENS
from ..files import printable
from ..options import finite, whole
from .common import Command, Option, load_pipeline, model_options, say, seed


def add_parser(command: Command, option: Option) -> None:
    new = command(
        understand,
        "ask about images",
        "Answer a question about one or more images, or about none. The answer goes to stdout.",
        """  janusflow-min understand "How many objects are there?" --image star.png
  janusflow-min understand "What is different?" --image A.png --image B.png --json
  janusflow-min understand --image A.png --temperature 0.7 --seed 1""",
    )
    new.add_argument(
        "question",
        metavar="QUESTION",
        nargs="?",
        default="",
        help='default, with an image: "Describe the image."',
    )
    new.add_argument("--image", metavar="FILE", action="append", default=[], help="may be repeated")
    model_options(new, option, vae=False)
    option(
        new, "--max-new-tokens", "N",
        f"most tokens of the answer, at most {MAX_NEW_TOKENS:,}; the model's positions are a limit too", 512,
        whole(1, MAX_NEW_TOKENS),
    )  # fmt: skip
    option(new, "--temperature", "T", "0 always takes the likeliest token", 0.0, finite(0))
    option(
        new,
        "--top-p",
        "P",
        "keep the likeliest tokens up to probability P, if T > 0",
        0.95,
        finite(0, 1, True),
    )
    option(new, "--top-k", "K", "keep the K likeliest tokens, 0 keeps all, if T > 0", 50, whole(0))
    option(new, "--seed", "N", "repeats an answer of a temperature above 0 (default: random)", None, seed)
    option(new, "--system-prompt", "TEXT", 'in the place of the usual one; "" is none', None)
    new.add_argument(
        "--stop", metavar="TEXT", action="append", help="ends the answer before TEXT; may be repeated"
    )
    new.add_argument("--stream", action="store_true", help="print the answer while it is decoded")
    new.add_argument("--json", action="store_true", help="answer, prompt, token ids and settings as JSON")


def understand(args: argparse.Namespace) -> int:
    from ..pixels import open_image

    images = [open_image(path) for path in args.image]  # a broken file is named before the weights are read
    if not args.question.strip() and not images:
        raise ValueError("no question and no --image")
    if args.stream and args.json:
        raise ValueError("--stream prints text, so it cannot go with --json")
    pipe = load_pipeline(args, "understanding")
    names = ("temperature", "top_p", "top_k", "seed", "max_new_tokens", "system_prompt", "stop")
    options = {key: getattr(args, key) for key in names}
    if args.stream:
        for piece in pipe.stream(args.question, images=images, **options):
            print(printable(piece), end="", flush=True)
        print()
        return 0
    answer = pipe.understand(args.question, images=images, **options)
    if not args.json:
        say(answer.text.strip())
        return 0
    record = {"question": args.question, "images": args.image, "model": args.model} | options
    record |= {"lora": pipe.adapters} if pipe.adapters else {}
    record |= {"answer": answer.text, "sft_format": answer.sft_format, "token_ids": answer.token_ids}
    record["finish_reason"] = answer.finish_reason
    text = json.dumps(record, ensure_ascii=False, indent=2)
    if printable(text) != text or not _encodable(text):
        text = json.dumps(record, indent=2)  # JSON's own escapes
    print(text)
    return 0


def _encodable(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
