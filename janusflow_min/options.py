# SPDX-License-Identifier: MIT
"""Options: fields of a dataclass, from which the command line makes its arguments, and the types of their values.

    @dataclass(frozen=True, kw_only=True)
    class ScoreOptions:
        data: Path = option("evaluation_metadata.jsonl of djghosh13/geneval", kind=Path)
        threshold: float = option("a detection's score must be above it", 0.3, rule=True)

A field made otherwise is for Python callers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import checks

T = TypeVar("T")


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    kind: Callable[[str], Any] | None = None,
    choices: Sequence[str] = (),
    repeat: bool = False,
    rule: bool = False,
) -> Any:
    """A field with its command-line argument: `--` and the field's name, dashes for underscores.

    default: none makes it required. kind: what turns the text into a value; otherwise the default's type, and `bool`
    makes --name and --no-name. repeat: the value is a list. rule: a headline needs its default, the benchmark's own.
    """
    if kind is None:
        kind = str if default in (None, dataclasses.MISSING) else type(default)
    about = {"help": help, "kind": kind, "choices": tuple(choices), "repeat": repeat, "rule": rule}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Of the stages of a benchmark whose number of prompts is known."""

    subset: bool = option("accept another number of prompts than the benchmark's; no headline then", False)


def whole(least: int = 1, most: int = checks.LARGEST) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        digits = text.strip()
        value = int(digits) if digits.lstrip("+-").isdecimal() and len(digits) < 20 else text
        try:
            return checks.whole("", value, least, most)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    parse.__name__ = "N"  # as --help shows it
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

    parse.__name__ = "X"
    return parse


def json_object(text: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """An argument for each field made by `option`."""
    for field in dataclasses.fields(options):
        if not field.metadata:
            continue
        about, flag = field.metadata, "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        shown = "" if default is None else f" (default: {default})"
        common: dict[str, Any] = {"default": default, "help": (about["help"] + shown).replace("%", "%%")}
        if about["kind"] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        common |= {"type": _expanded if about["kind"] is Path else about["kind"], "required": required}
        if about["choices"]:
            common["choices"] = about["choices"]
        else:
            common["metavar"] = {json_object: "JSON"}.get(about["kind"], about["kind"].__name__.upper())
        parser.add_argument(flag, action="append" if about["repeat"] else "store", **common)


def read_options(options: type[T], args: argparse.Namespace, **more: Any) -> T:
    """An object of the class `options` from parsed arguments. more: fields without an argument."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(options) if f.metadata}  # type: ignore[arg-type]
    return options(**given | more)


def departures(options: Any) -> list[str]:
    """Which rules differ from the benchmark's own, in words."""
    return [
        f"{field.name} is {getattr(options, field.name)}, the benchmark's is {field.default}"
        for field in dataclasses.fields(options)
        if field.metadata.get("rule") and getattr(options, field.name) != field.default
    ]


def _expanded(text: str) -> Path:
    return Path(text).expanduser()
