# SPDX-License-Identifier: MIT
"""Settings as frozen dataclasses: read from TOML or plain data, checked against their annotations, written as TOML.

An annotation is a type and, in `Annotated`, the limits of a number or the marker of a path. Errors name the key.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union


class Limit(NamedTuple):
    wanted: str  # in the words of the error
    holds: Callable[[Any], bool]


Positive = Annotated[float, Limit("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Limit("0 or above", lambda x: x >= 0)]
Share = Annotated[float, Limit("from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Limit("0 or above and below 1", lambda x: 0 <= x < 1)]
Steps = Annotated[int, Limit("from 1 to 1,000,000,000", lambda x: 1 <= x <= 10**9)]
Seed = Annotated[int, Limit("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)]
Interval = Annotated[int, Limit("from 0 to 1,000,000,000", lambda x: 0 <= x <= 10**9)]  # in steps; 0: never
Count = Annotated[int, Limit("from 1 to 100,000", lambda x: 1 <= x <= 10**5)]
UpTo1000 = Annotated[int, Limit("from 0 to 1,000", lambda x: 0 <= x <= 1000)]
SolverSteps = Annotated[int, Limit("from 1 to 10,000", lambda x: 1 <= x <= 10**4)]
PathText = Annotated[str, "path"]  # relative to the file that names it
PathOrName = Annotated[str, "path or name"]  # a path if it exists, else a hub id or another name


def to_toml(config: Any) -> str:
    """The settings as TOML that `load_config` reads back; None is left out."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
            return f'"{"".join(escaped)}"'
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{text(key)} = {text(v)}" for key, v in value.items()) + " }"
        return f"[{', '.join(map(text, value))}]" if isinstance(value, list | tuple) else repr(value)

    def lines(title: str, table: Any) -> list[str]:
        pairs = ((f.name, getattr(table, f.name)) for f in dataclasses.fields(table))
        plain = [f"{k} = {text(v)}" for k, v in pairs if v is not None and not _has_tables(v)]
        return [title, *plain, ""]

    found = lines("# every setting of this run", config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found += lines(f"[{f.name}]", value)
        elif _has_tables(value):
            found += [line for table in value for line in lines(f"[[{f.name}]]", table)]
    return "\n".join(found)


def _has_tables(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, tuple) and any(map(_has_tables, value)))


def parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def load_toml(cls: type, path: Path, overrides: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    """A dataclass from a TOML file and KEY=VALUE overrides, whose paths are relative to the current folder."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        data = parse_toml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    data = anchored(cls, {**defaults, **data}, path.parent)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
        _put(cls, data, key.strip(), value.strip())
    try:
        return read(cls, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _put(kind: Any, data: dict[str, Any], key: str, text: str) -> None:
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text  # a bare word is a string
    table: Any = data
    *way, last = key.split(".")
    for part in way:
        try:
            table = table[int(part)] if isinstance(table, list) else table.setdefault(part, {})
        except (ValueError, IndexError, AttributeError):
            raise ValueError(f"--set {key}: there is no {part!r}") from None
        kind = _inside(kind, part)
    if not isinstance(table, dict):
        raise ValueError(f"--set {key}: {'.'.join(way)} has no keys")
    table[last] = anchored(_inside(kind, last), value, Path())


def _inside(kind: Any, key: str) -> Any:
    """The type of a dataclass's field, or of a tuple's items."""
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind, include_extras=True).get(key)
    return next(iter(typing.get_args(kind)), None)


def anchored(kind: Any, value: Any, folder: Path) -> Any:
    """Plain data of a type with its paths made absolute, relative to `folder`; `~` is the home folder."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        others = kind.not_paths(value, folder) if hasattr(kind, "not_paths") else ()
        return {k: v if k in others else anchored(_inside(kind, k), v, folder) for k, v in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return [anchored(_inside(kind, ""), item, folder) for item in value]
    if kind in (PathText, PathOrName) and isinstance(value, str) and value and "://" not in value:
        path = folder / Path(value).expanduser()
        if kind == PathText or path.exists():
            return str(path.resolve())
    return value


def read(cls: type, data: Any, where: str = "") -> Any:
    """A dataclass from plain data, strictly. ValueError names the key and what is expected."""
    require(isinstance(data, Mapping), where or "the configuration", "a table", data)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    dot = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            raise ValueError(f"unknown key {dot}{key}; the keys there are {', '.join(fields)}")
    for f in fields.values():
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in data:
            raise ValueError(f"{dot}{f.name} is missing")
    return cls(**_checked_fields(cls, data, dot))


def _checked_fields(cls: type, data: Mapping[str, Any], dot: str) -> dict[str, Any]:
    """The checked values of a dataclass's fields; None is allowed where it is the default."""
    hints = typing.get_type_hints(cls, include_extras=True)
    optional = {f.name for f in dataclasses.fields(cls) if f.default is None}
    return {
        key: None if value is None and key in optional else checked(hints[key], value, dot + key)
        for key, value in data.items()
    }


def checked(kind: Any, value: Any, where: str = "") -> Any:
    """The value, converted to its annotated type. ValueError names the key."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, typing.cast(type, kind)):
            return read(typing.cast(type, kind), value, where)
        _checked_fields(type(value), vars(value), f"{where}." if where else "")
        return value
    if origin in (Union, types.UnionType):  # X | None
        return checked(inner[0], value, where)
    if origin is Annotated:
        value, limit = checked(inner[0], value, where), inner[1]
        if isinstance(limit, Limit):
            require(limit.holds(value), where, limit.wanted, value)
        return value
    if origin is Literal:
        require(value in inner and isinstance(value, str), where, f"one of {', '.join(inner)}", value)
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), where, "a list", value)
        return tuple(checked(inner[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, Mapping), where, "a table", value)
        places = {key: f"{where}.{key}" for key in value}
        return {checked(inner[0], k, places[k]): checked(inner[1], v, places[k]) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    good = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    require(good and (kind is not float or math.isfinite(value)), where, names[kind], value)
    return value


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a setting's name in front of errors."""
    try:
        yield
    except (ValueError, OSError) as error:
        kinds = (FileNotFoundError, PermissionError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{key}: {error}") from error


def require(good: bool, key: str, wanted: str, got: Any) -> None:
    if not good:
        raise ValueError(f"{key} must be {wanted}, got {got!r:.120}")
