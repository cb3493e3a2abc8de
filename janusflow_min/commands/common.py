# SPDX-License-Identifier: MIT
"""What the commands share: options, their types, loading a model, text for the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import printable, public_name
from ..options import whole

if TYPE_CHECKING:
    from ..pipeline import Pipeline

Command = Callable[..., argparse.ArgumentParser]  # makes a command's parser
Option = Callable[..., None]  # adds an option to one
MODEL_HELP = (
    '"tiny" (the trained default inside the package), a folder in the official layout, or a hub id such as '
    "deepseek-ai/JanusFlow-1.3B"
)


def model_options(new: argparse.ArgumentParser, option: Option, vae: bool) -> None:
    option(new, "--model", "MODEL", MODEL_HELP, "tiny")
    option(new, "--revision", "NAME", "branch, tag or commit of a MODEL that is a hub id")
    new.add_argument(
        "--lora", metavar="[NAME=]PATH[:SCALE]", action="append", default=[],
        help="an adapter for the model, in peft's format: a folder or a hub id; may be repeated",
    )  # fmt: skip
    option(new, "--device", "NAME", "cpu, cuda, cuda:1 or mps; auto is CUDA, then MPS, then the CPU", "auto")
    option(
        new,
        "--dtype",
        "NAME",
        "float32, bfloat16 or float16; auto is bfloat16 on CUDA and where memory is short, else float32",
        "auto",
    )
    if vae:
        option(
            new, "--vae", "PATH", "folder or hub id of the VAE (default: the checkpoint's vae/, else SDXL's)"
        )
        option(new, "--vae-dtype", "NAME", "float32 or bfloat16 (default: as --dtype)")
    new.add_argument(
        "--upstream-rounding",
        action="store_true",
        help="round where the published code does, for comparisons",
    )
    help = "the LLM's matrices in 8 bits: half their memory, and faster on a GPU"
    new.add_argument("--quantization", choices=("int8", "fp8"), help=help)
    new.add_argument("--quiet", action="store_true", help="no progress bars, no remarks")


def load_pipeline(args: argparse.Namespace, parts: str) -> Pipeline:
    from ..loading import load
    from ..lora import find_lora

    if args.lora and args.quantization:
        raise ValueError("--lora does not go with --quantization: load a model saved with the adapter in it")
    adapters = [find_lora(text) for text in args.lora]
    options: dict[str, Any] = dict(device=args.device, dtype=args.dtype, parts=parts, progress=not args.quiet)
    same = ("upstream_rounding", "quantization", "revision")
    options |= {name: getattr(args, name) for name in same}
    if parts != "understanding":
        options |= dict(vae_path=args.vae, vae_dtype=args.vae_dtype)
    pipe = load(args.model, **options)
    for adapter in adapters:
        pipe.load_lora(**adapter)
    return pipe


def model_record(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    """What an image's file says of the model that made it."""
    record = {"model": public_name(args.model), "revision": args.revision, "janusflow_min": __version__}
    record |= {"lora": " ".join(f"{name}:{scale:g}" for name, scale in pipe.adapters.items()) or None}
    record |= {"dtype": dtype_name(pipe.model.dtype), "quantization": pipe.model.llm.quantization}
    return {key: value for key, value in record.items() if value is not None}


seed = whole(0)


def say(text: str, quiet: bool = False, remark: bool = False) -> None:
    """Print a result on stdout, or a remark on stderr; what a model or a file name holds cannot move the cursor."""
    if not quiet:
        print(printable(text), file=sys.stderr if remark else sys.stdout, flush=True)


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
