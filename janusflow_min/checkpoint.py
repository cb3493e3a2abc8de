# SPDX-License-Identifier: MIT
"""Weights from and to the official files, strictly.

All that can be checked is checked against the files' headers before anything is built: one error lists every
missing, unexpected and mis-shaped key. Then the tensors go straight to device and dtype, one by one, into a model
that was built on the meta device. SigLIP's pooling head is in the official file and used by nobody: it is kept aside
and written back.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checks import shown, whole
from .config import JanusFlowConfig
from .diagnose import WRAPPERS, common_prefix, explain_folder
from .files import printable, read_json, set_default_mode
from .model import JanusFlow, Parts
from .official import CONFIG, INDEX, LEFTOVERS, POOLING_HEAD, WEIGHTS, from_official, to_official
from .progress import progress_bar
from .weights import Stored, build_module, check_state, listing, read_header, read_tensors


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
    wanted = {to_official(name) for name in model.state_dict()}
    tensors = read_tensors({name: stored[name] for name in stored if name in wanted}, device, dtype)
    bar = progress_bar(progress, iterable=tensors, total=len(wanted), desc="Loading weights", unit="tensor")
    model.load_state_dict({from_official(name): x for name, x in bar}, strict=True, assign=True)
    kept = [name for name in stored if name.startswith(POOLING_HEAD) and parts == "all"]
    model.extra_tensors = dict(read_tensors({name: stored[name] for name in kept}, "cpu", dtype))
    return model.eval().requires_grad_(False)


def save_model(model: JanusFlow, folder: str | Path, max_shard_size: int | None = None) -> None:
    """Write config.json and the weights into an existing folder, under official names.

    One `model.safetensors`; where the weights have more than max_shard_size bytes, shards and their index.
    Raises ValueError, before anything is written, for a model that could not be loaded again: one that was loaded
    in parts, or is compiled, adapted (peft) or offloaded (accelerate).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    if model.parts != "all":
        raise ValueError(f'only {model.parts!r} was loaded; load with parts="all" to save a whole checkpoint')
    if max_shard_size is not None:
        whole("max_shard_size", max_shard_size)
    check_state("the model", model, lambda: JanusFlow(model.config))
    folder, dtype = Path(folder), str(model.dtype).removeprefix("torch.")
    _write_json(folder / CONFIG, model.config.to_dict() | {"torch_dtype": dtype})
    tensors = {to_official(k): v.detach().contiguous() for k, v in model.state_dict().items()}
    tensors |= getattr(model, "extra_tensors", {})
    limit = max_shard_size or sum(t.nbytes for t in tensors.values())
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    set_default_mode(folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
    found = {name: entry for name, entry in stored.items() if not name.startswith(POOLING_HEAD)}
    built = build_module(folder / CONFIG, lambda: JanusFlow(config), counts, found, to_official)
    if parts == "all":
        return built
    with torch.device("meta"):
        return JanusFlow(config, parts)
