# SPDX-License-Identifier: MIT
"""The command line: `janusflow-min demo | generate | edit | understand | info | serve | ui | train | bench | torchumm`.

Results (file names, answers, reports) go to stdout, progress and remarks to stderr. Exit codes: 0 done, 1 `info`
found something missing or wrong, 2 an error, told in one line, 130 interrupted, 141 whoever read the output has gone.
What needs torch is imported inside the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .commands import bench, demo, edit, generate, info, serve, torchumm, train, ui, understand
from .commands.common import MODEL_HELP
from .files import printable

PROG = "janusflow-min"
ERRORS = (ValueError, OSError, ArithmeticError, ImportError, RuntimeError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. argv: without the program's name, by default this process's."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the terminal lacks is escaped, and ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        _discard_output()
        return 141


def _run(argv: list[str]) -> int:
    try:
        try:
            args = build_parser().parse_args(argv)
            return args.run(args)
        finally:
            _flush()  # here, and not at Python's end, where nothing could be said
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; every file that has been written is complete", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except ERRORS as error:
        if "--debug" in argv:
            raise
        text = " ".join(printable(str(error)).split()) or type(error).__name__
        print(f"{PROG}: error: {text}", file=sys.stderr)
        return 2


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_output()
        raise


def _discard_output() -> None:
    """Let what is still buffered go nowhere when Python ends, instead of failing once more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to its function."""
    parser = _Parser(
        prog=PROG,
        description="JanusFlow: one model that generates images from text and answers questions about images.",
        epilog="""start here:
  janusflow-min demo                                  images and answers of the small model inside the package
  janusflow-min generate "a photo of a red star"      images of your own prompt
  janusflow-min understand "What is this?" --image A.png
  janusflow-min info deepseek-ai/JanusFlow-1.3B       what a checkpoint holds

`janusflow-min COMMAND --help` explains a command. Errors are one line; --debug shows the traceback.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        run: Callable[[argparse.Namespace], int], summary: str, description: str, examples: str
    ) -> argparse.ArgumentParser:
        new = commands.add_parser(
            run.__name__,
            help=summary,
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        new.set_defaults(run=run)
        new.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return new

    def option(new: Any, flag: str, meta: str, help: str, default: Any = None, kind: Any = str) -> None:
        help += "" if default is None else f" (default: {default})"
        new.add_argument(flag, metavar=meta, type=kind, default=default, help=help)

    for module in (demo, generate, edit, understand):
        module.add_parser(command, option)
    info.add_parser(command, option, MODEL_HELP)
    train.add_parser(command)
    serve.add_parser(command, option)
    ui.add_parser(command, option)
    bench.add_parser(commands, argparse.RawDescriptionHelpFormatter)
    torchumm.add_parser(command, option)
    return parser
