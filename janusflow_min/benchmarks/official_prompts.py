# SPDX-License-Identifier: MIT
"""Wording for judges and models from a user's file: the official script of his own checkout, or JSON.

The official texts belong to their authors and are not in this package. `read_prompts` takes the strings out of the
script as it lies in the checkout; the script is parsed, never run or imported. Placeholders are {name} throughout:
`check_placeholders` refuses a text that would hide something from the judge, `fill` puts the values in.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..files import read_json


def read_prompts(path: str | Path, places: Mapping[str, str]) -> dict[str, str]:
    """Name -> text, of a `.py` file all of `places`, of a `.json` object those names of `places` that it has.

    places: name -> where the script has the text, parts separated by dots. The first part is a variable, an attribute
    (`geometry` for `self.geometry = {...}`) or a function, which stands for what it returns; the others are keys of
    dictionaries and indices of lists: "build_messages.1.content.0.text". An f-string's {expression} becomes {name},
    the last key, attribute or variable in it: {data['Prompt']} is {Prompt}. `Template("...")` is its text.

    Raises FileNotFoundError, and ValueError naming the file and the place for what cannot be taken.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    if path.suffix == ".json":
        return _read_json(path, places)
    if path.suffix != ".py":
        raise ValueError(
            f"{path}: prompts come from the official .py file of a checkout, or from a .json file"
        )
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is not Python source: {error}") from None
    return {name: _take(tree, place, path) for name, place in places.items()}


def _read_json(path: Path, names: Iterable[str]) -> dict[str, str]:
    known, found = ", ".join(names), read_json(path)
    for name, text in found.items():
        if name not in names:
            raise ValueError(f"{path}: unknown name {name!r}; the names are {known}")
        if not isinstance(text, str):
            raise ValueError(f"{path}: {name} must be a string, got {type(text).__name__}")
    return found


def check_placeholders(text: str, names: Iterable[str], where: str) -> None:
    """ValueError unless `text` has {name} for every name. where: says in the error which text it is."""
    lacking = [f"{{{name}}}" for name in names if f"{{{name}}}" not in text]
    if lacking:
        there = ", ".join(dict.fromkeys(re.findall(r"\{\w+\}", text))) or "none"
        raise ValueError(f"{where} must have the placeholders {', '.join(lacking)}; it has {there}")


def fill(text: str, **values: object) -> str:
    """`text` with each {name} of `values` replaced, in one pass, so no value is searched; other braces stay."""
    if not values:
        return text
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: str(values[match[1]]), text)


# The script -----------------------------------------------------------------------


def _take(tree: ast.Module, place: str, path: Path) -> str:
    first, *rest = place.split(".")
    texts, reasons = set(), []
    for node in _candidates(tree, first):
        try:
            texts.add(_text(_descend(node, rest)))
        except LookupError as error:
            reasons.append(f"line {node.lineno}: {error}")
    if len(texts) == 1:
        return texts.pop()
    if texts:
        raise ValueError(f"{path}: {len(texts)} different texts are found at {place}")
    why = "; ".join(reasons[:3]) or f"nothing is named {first}"
    raise ValueError(f"{path}: no text at {place} ({why}); is it the official file?")


def _candidates(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """What is assigned to variables and attributes of this name, and what functions of this name return."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if getattr(target, "id", getattr(target, "attr", None)) == name:
                    yield node.value


def _descend(node: ast.expr, parts: Iterable[str]) -> ast.expr:
    for part in parts:
        if isinstance(node, ast.Dict):
            values = [
                v for k, v in zip(node.keys, node.values, strict=True) if getattr(k, "value", None) == part
            ]
            if not values:
                raise LookupError(f"no key {part!r}")
            node = values[-1]
        elif isinstance(node, (ast.List, ast.Tuple)) and part.isdecimal() and int(part) < len(node.elts):
            node = node.elts[int(part)]
        else:
            raise LookupError(f"no part {part!r} in a {type(node).__name__}")
    return node


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        return f"{{{_last_name(node.value)}}}"
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Template" and len(node.args) == 1:
        return _text(node.args[0])
    raise LookupError(f"{ast.unparse(node)[:60]!r} is no text")


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    raise LookupError(f"{{{ast.unparse(node)[:60]}}} has no name")
