# SPDX-License-Identifier: MIT
"""Safetensors files and modules: what a file's header says, whether it fits a module, and the way in between.

Shared by the model (`checkpoint.py`) and the VAE (`vae.py`). Whatever can be checked is checked against headers and
a module on the meta device, before memory is taken.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .checks import shown
from .diagnose import WRAPPERS, common_prefix, explain_folder, explain_keys
from .files import content_hint, printable, read_json
from .official import INDEX, LEFTOVERS, WEIGHTS

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as the file's header describes it."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "F32", "BF16", ...


Header: TypeAlias = Callable[[Path], "dict[str, Stored] | None"]  # of a file, as `read_header`


def find_weights(folder: Path, header: Header | None = None) -> dict[str, Stored]:
    """The official name of every tensor -> where it lies, from the files' headers, which `header` reads.

    A prefix that all keys share, and the marks of wrappers, are taken off with a warning; what older tools write
    and nobody needs is left out. FileNotFoundError for absent files, ValueError for broken ones.
    """
    header = header or read_header
    if (found := header(folder / WEIGHTS)) is None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{explain_folder(folder)}")
        weight_map = read_index(folder)
        shards = {file: header(folder / file) for file in dict.fromkeys(weight_map.values())}
        if absent := [file for file, entries in shards.items() if entries is None]:
            names = f"{folder / INDEX} names {len(absent)} files that are absent: {listing(absent)}"
            raise FileNotFoundError(f"{names}; download them, too")
        found = {
            name: entry for name, file in weight_map.items() if (entry := (shards[file] or {}).get(name))
        }
        if lost := [name for name in weight_map if name not in found]:
            file = folder / weight_map[lost[0]]
            raise ValueError(f"{file} lacks keys that {INDEX} says are there: {listing(lost)}")
    plain = {name: WRAPPERS.sub("", name) for name in found if not name.endswith(LEFTOVERS)}
    prefix = common_prefix(plain.values())
    plain = {name: official.removeprefix(prefix) for name, official in plain.items()}
    if len(set(plain.values())) < len(plain):
        return found
    if changed := [name for name, official in plain.items() if name != official]:
        example = f"{printable(changed[0])!r} is read as {plain[changed[0]]!r}"
        warnings.warn(f"{folder}: {len(changed)} keys bear a wrapper's prefix; {example}", stacklevel=2)
    return {official: found[name] for name, official in plain.items()}


def read_index(folder: Path) -> dict[str, str]:
    """The index's map from keys to the names of shards. ValueError for none, and for files outside the folder."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise ValueError(
                f"{path}: {shown(file)} is not the name of a safetensors file in the same folder"
            )
    return weight_map


def read_header(path: Path) -> dict[str, Stored] | None:
    """Every tensor of a file, none of them read; None where there is no file."""
    if not path.is_file():
        return None
    with open_weights(path) as f:
        slices = ((name, f.get_slice(name)) for name in f.keys())  # noqa: SIM118 (no mapping)
        return {n: Stored(path, n, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices}


def read_tensors(
    stored: Mapping[str, Stored], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names of `stored`, one after another, file by file.

    Copies: safetensors' own tensors are a mapping of the file, which would keep its pages in memory, and would
    change, or end the process, with the file. A GPU converts them itself. The largest come first, and the file is
    opened anew for every twentieth of its bytes, so that what has been read does not stay mapped beside its copy:
    loading takes hardly more memory than the weights. ValueError for whole numbers.
    """
    largest = sorted(stored.items(), key=lambda item: -math.prod(item[1].shape))
    for path in dict.fromkeys(entry.path for entry in stored.values()):
        rest = [(name, entry) for name, entry in largest if entry.path == path]
        while rest:
            with open_weights(path) as f:
                room = path.stat().st_size / 20
                while rest and room > 0:
                    name, entry = rest.pop(0)
                    tensor = check_float(path, entry.name, f.get_tensor(entry.name))
                    room -= tensor.nbytes
                    yield name, tensor.to(device).to(dtype, copy=True)
                    del tensor


@contextmanager
def open_weights(path: Path) -> Iterator:
    """`safe_open` with errors that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        f = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            hint = content_hint(raw.read(200)) or "; download it again"
        raise ValueError(f"{path} is not a whole safetensors file ({printable(str(error))}){hint}") from None
    with f:
        yield f


# Checks -----------------------------------------------------------------------


def build_module(
    config: Path,
    build: Callable[[], Module],
    counts: Mapping[str, int],
    stored: Mapping[str, Stored],
    name_in_file: Callable[[str], str] = str,
) -> Module:
    """What `build` makes, on the meta device, once the stored weights are known to be its own.

    config: the file that the sizes come from, for errors. counts: its numbers of layers, by key. ValueError for
    sizes that cannot be, and one for all that is missing, unexpected or mis-shaped.
    """
    for key, count in counts.items():
        if count > max(len(stored), 200):  # building so many would take for ever
            raise ValueError(f"{config}: {key} is {count}, but the weights are only {len(stored)} tensors")
    try:
        with torch.device("meta"):
            module = build()
    except Exception as error:  # whatever torch and diffusers raise for sizes and types that cannot be
        raise ValueError(f"{config}: no model can be built of it ({printable(str(error)):.300})") from error
    shapes = {name_in_file(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    kinds = {
        "missing": shapes.keys() - stored.keys(),
        "unexpected": stored.keys() - shapes.keys(),
        "mis-shaped": {
            f"{name} is {list(stored[name].shape)}, {config.name} asks for {list(shapes[name])}"
            for name in stored.keys() & shapes.keys()
            if stored[name].shape != shapes[name]
        },
    }
    if lines := [f"{len(names)} {kind}: {listing(sorted(names))}" for kind, names in kinds.items() if names]:
        if what := explain_keys([entry.name for entry in stored.values()]):
            lines.insert(0, what)
        title = f"the weights in {config.parent} do not fit its {config.name}:"
        raise ValueError("\n  ".join([title, *lines]))
    return module


def check_state(what: str, module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """ValueError where a module's weights are not those of the plain module that `build` makes, or not in memory."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build().state_dict().items()}
    state = module.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    why = f"{what} cannot be saved:"
    if other := sorted({name for name, _ in shapes.items() ^ expected.items()}, key=lambda n: n in expected):
        reason = explain_keys(state) or "merge or unwrap first"
        raise ValueError(f"{why} {reason} (other weights than a plain one's: {listing(other, 3)})")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"{why} {name} is not in memory (meta device); where accelerate offloaded it, call "
                "accelerate.hooks.remove_hook_from_submodules first, or load it again"
            )
        check_float(what, name, tensor)


def check_float(where: str | Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {printable(name)} holds {tensor.dtype}; weights must be of a float type")
    return tensor


def listing(names: list[str], most: int = 20) -> str:
    text = ", ".join(printable(name[:200]) for name in names[:most])
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
