# SPDX-License-Identifier: MIT
"""Weights from and to the official files, strictly.

All that can be checked is checked against the files' headers before anything is built: one error lists every
missing, unexpected and mis-shaped key. Then the tensors go straight to device and dtype, one by one, into a model
that was built on the meta device. SigLIP's pooling head is in the official file and used by nobody: it is kept aside
and written back. The names are in `official.py`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checks import shown
from .config import JanusFlowConfig
from .diagnose import WRAPPERS, common_prefix, explain_folder, explain_keys
from .files import content_hint, printable, read_json, set_default_mode
from .model import JanusFlow, Parts
from .official import CONFIG, INDEX, LEFTOVERS, POOLING_HEAD, WEIGHTS, from_official, to_official
from .progress import progress_bar

Shape = tuple[int, ...]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as the file's header describes it."""

    path: Path
    name: str  # in the file
    shape: Shape
    dtype: str  # as safetensors writes it: "F32", "BF16", ...


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Parts = "all",
    progress: bool = True,
) -> JanusFlow:
    """Build the model of a checkpoint folder and fill it.

    Raises FileNotFoundError for missing files, ValueError for broken ones and for keys that do not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = find_weights(folder)
    model = build_model(folder, config, stored, parts)
    names = [to_official(name) for name in model.state_dict()]
    tensors = read_tensors({name: stored[name] for name in names}, device, dtype)
    bar = progress_bar(progress, iterable=tensors, total=len(names), desc="Loading weights", unit="tensor")
    model.load_state_dict({from_official(name): x for name, x in bar}, strict=True, assign=True)
    model.extra_tensors = {}  # official names; kept for save_model
    if parts == "all":
        pooling = {name: entry for name, entry in stored.items() if name.startswith(POOLING_HEAD)}
        model.extra_tensors = dict(read_tensors(pooling, "cpu", dtype))
    return model.eval().requires_grad_(False)


def save_model(model: JanusFlow, folder: str | Path, max_shard_size: int | None = None) -> None:
    """Write config.json and the weights into an existing folder, under official names.

    One `model.safetensors`; where the weights have more than max_shard_size bytes, shards and their index.
    Raises ValueError, before anything is written, for a model that could not be loaded again: one that was loaded
    in parts, or is compiled, adapted (peft) or offloaded (accelerate).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    if model.parts != "all":
        raise ValueError(f'only {model.parts!r} was loaded; load with parts="all" to save a whole checkpoint')
    check_state("the model", model, lambda: JanusFlow(model.config))
    config = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {to_official(k): v.detach().contiguous() for k, v in model.state_dict().items()}
    tensors |= getattr(model, "extra_tensors", {})
    total = sum(t.nbytes for t in tensors.values())
    limit = total if max_shard_size is None else max_shard_size
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    set_default_mode(folder)


# Checks -----------------------------------------------------------------------


def read_config(folder: Path) -> JanusFlowConfig:
    """The folder's configuration. FileNotFoundError or ValueError where it is none of JanusFlow's."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist{explain_folder(folder)}")
    return JanusFlowConfig.from_file(path)


def find_weights(folder: Path) -> dict[str, Stored]:
    """The official name of every tensor -> where it lies, from the files' headers.

    A prefix that all keys share, and the marks of wrappers, are taken off with a warning; what older tools write
    and nobody needs is left out.
    """
    found: dict[str, Stored] = {}
    for path, listed in weight_files(folder).items():
        entries = read_header(path)
        if absent := sorted(set(listed or ()) - entries.keys()):
            raise ValueError(f"{path} lacks keys that {INDEX} says are there: {listing(absent)}")
        found |= {name: entries[name] for name in listed or entries}
    renamed = {name: name for name in found if not name.endswith(LEFTOVERS)}
    for mark in WRAPPERS:
        renamed = {name: official.replace(mark, "") for name, official in renamed.items()}
    prefix = common_prefix(list(renamed.values()))
    renamed = {name: official[len(prefix) :] for name, official in renamed.items()}
    if len(set(renamed.values())) < len(renamed):
        return found
    if changed := [name for name, official in renamed.items() if name != official]:
        told = f"{printable(changed[0])!r} is read as {renamed[changed[0]]!r}"
        warnings.warn(f"{folder}: {len(changed)} keys bear a wrapper's prefix; {told}", stacklevel=2)
    return {official: found[name] for name, official in renamed.items()}


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The checkpoint's files and the keys to read from each; None: all."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{explain_folder(folder)}")
    weight_map = read_index(folder)
    files = dict.fromkeys(weight_map.values())
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder / INDEX} names {len(absent)} files that are absent: {listing(absent)}; download them, too"
        )
    return {folder / file: [name for name, f in weight_map.items() if f == file] for file in files}


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


def build_model(
    folder: Path, config: JanusFlowConfig, stored: Mapping[str, Stored], parts: Parts = "all"
) -> JanusFlow:
    """The model on the meta device, once the weights are known to be those of its configuration. ValueError if not."""
    counts = {
        "language_config: num_hidden_layers": config.llm.num_hidden_layers,
        "vision_und_enc_config: layers": config.siglip.layers,
        "vision_gen_enc_config: layers_in_middle": config.uvit_encoder.num_blocks,
        "vision_gen_dec_config: layers_in_middle": config.uvit_decoder.num_blocks,
    }
    check_counts(folder / CONFIG, counts, stored)
    found = {name: entry for name, entry in stored.items() if not name.startswith(POOLING_HEAD)}
    whole = build_on_meta(folder / CONFIG, lambda: JanusFlow(config))
    check_keys(
        folder, found, {to_official(name): tensor.shape for name, tensor in whole.state_dict().items()}
    )
    return whole if parts == "all" else build_on_meta(folder / CONFIG, lambda: JanusFlow(config, parts))


def check_counts(path: Path, counts: Mapping[str, int], stored: Mapping[str, Stored]) -> None:
    """ValueError where a configuration asks for so many layers that it would take long to build them."""
    for name, count in counts.items():
        if count > max(len(stored), 200):  # fewer are built, and all that is missing is listed
            raise ValueError(f"{path}: {name} is {count}, but the weights are only {len(stored)} tensors")


def build_on_meta(path: Path, build: Callable[[], Module]) -> Module:
    """What `build` makes, without memory for its weights. ValueError, which names the file, for impossible sizes."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # whatever torch and diffusers raise for sizes and types that cannot be
        raise ValueError(f"{path}: no model can be built of it ({printable(str(error)):.300})") from error


def check_keys(folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, Shape]) -> None:
    """One error with all that is missing, unexpected or mis-shaped."""
    lines = []
    if missing := sorted(expected.keys() - stored.keys()):
        lines.append(f"{len(missing)} missing: {listing(missing)}")
    if unexpected := sorted(stored.keys() - expected.keys()):
        lines.append(f"{len(unexpected)} unexpected: {listing(unexpected)}")
    shapes = {name: (stored[name].shape, expected[name]) for name in sorted(stored.keys() & expected.keys())}
    if wrong := [
        f"{k} is {list(a)}, {CONFIG} asks for {list(b)}" for k, (a, b) in shapes.items() if a != tuple(b)
    ]:
        lines.append(f"{len(wrong)} mis-shaped: {listing(wrong)}")
    if lines:
        if what := explain_keys([entry.name for entry in stored.values()]):
            lines.insert(0, what)
        raise ValueError(f"the weights in {folder} do not fit its {CONFIG}:\n  " + "\n  ".join(lines))


def check_state(what: str, module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """ValueError where a module's weights are not those of the plain module that `build` makes anew."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build().state_dict().items()}
    state = module.state_dict()
    other = sorted(state.keys() - expected.keys()) or sorted(expected.keys() - state.keys())
    other = other or [name for name in state if state[name].shape != expected[name]]
    if other:
        reason = explain_keys(state) or "merge or unwrap first"
        raise ValueError(
            f"{what} cannot be saved: {reason} (other weights than a plain one's: {listing(other, 3)})"
        )
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"{what} cannot be saved: {name} is not in memory (meta device); where accelerate offloaded it, call "
                "accelerate.hooks.remove_hook_from_submodules first, or load it again"
            )
        check_float(what, name, tensor)


# Files -----------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, none of them read."""
    with open_weights(path) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        return {
            name: Stored(path, name, tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()
        }


def read_tensors(
    stored: Mapping[str, Stored], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names of `stored`, one after another, each file opened once.

    Copies: safetensors' own tensors are a mapping of the file, which would keep its pages in memory, and would
    change, or end the process, with the file. A GPU converts them itself. ValueError for whole numbers.
    """
    for path in dict.fromkeys(entry.path for entry in stored.values()):
        with open_weights(path) as f:
            for name, entry in stored.items():
                if entry.path == path:
                    tensor = check_float(path, entry.name, f.get_tensor(entry.name))
                    yield name, tensor.to(device).to(dtype, copy=True)


@contextmanager
def open_weights(path: Path, device: torch.device | str = "cpu") -> Iterator:
    """`safe_open` with errors that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        f = safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            hint = content_hint(raw.read(200)) or "; download it again"
        raise ValueError(f"{path} is not a whole safetensors file ({printable(str(error))}){hint}") from None
    with f:
        yield f


def check_float(where: str | Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {printable(name)} holds {tensor.dtype}; weights must be of a float type")
    return tensor


def listing(names: list[str], most: int = 20) -> str:
    text = ", ".join(printable(name[:200]) for name in names[:most])
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
