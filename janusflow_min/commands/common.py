# SPDX-License-Identifier: MIT
"""What the commands share: options, their types, loading a model, text for the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import checks
from ..files import printable

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
    option(new, "--device", "NAME", "cpu, cuda, cuda:1 or mps; auto is CUDA, then MPS, then the CPU", "auto")
    option(
        new, "--dtype", "NAME", "float32, bfloat16 or float16; auto is bfloat16 on CUDA, else float32", "auto"
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
    new.add_argument("--quiet", action="store_true", help="no progress bars, no remarks")


def load_pipeline(args: argparse.Namespace, parts: str) -> Pipeline:
    from ..loading import load

    options: dict[str, Any] = dict(device=args.device, dtype=args.dtype, parts=parts, progress=not args.quiet)
    options["upstream_rounding"] = args.upstream_rounding
    if parts != "understanding":
        options |= dict(vae_path=args.vae, vae_dtype=args.vae_dtype)
    return load(args.model, **options)


def whole(least: int = 1, most: int = checks.LARGEST) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        digits = text.strip()
        value = int(digits) if digits.lstrip("+-").isdecimal() and len(digits) < 20 else text
        try:
            return checks.whole("", value, least, most)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    return parse


def finite(
    least: float = float("-inf"), most: float = float("inf"), above: bool = False
) -> Callable[[str], float]:
    """The type of an option that is a finite number from `least` to `most`; above: not `least` itself."""

    def parse(text: str) -> float:
        value: Any = text
        with contextlib.suppress(ValueError):
            value = float(text)
        try:
            return checks.number("", value, least, most, above)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    return parse


seed = whole(0)


def say(text: str, quiet: bool = False, remark: bool = False) -> None:
    """Print a result on stdout, or a remark on stderr; what a model or a file name holds cannot move the cursor."""
    if not quiet:
        print(printable(text), file=sys.stderr if remark else sys.stdout, flush=True)


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
