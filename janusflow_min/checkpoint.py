# SPDX-License-Identifier: MIT
"""Weights from and to the official files: checked against the files' headers first, then read one by one.

SigLIP's pooling head is in the official file and used by nobody: it is kept aside and written back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checks import whole
from .config import JanusFlowConfig
from .diagnose import explain_folder
from .files import set_default_mode
from .model import JanusFlow, Parts
from .official import CONFIG, INDEX, POOLING_HEAD, from_official, to_official
from .progress import progress_bar
from .weights import Stored, build_module, check_state, find_weights, read_tensors


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
    wanted = {official: stored[official] for name in model.state_dict() if (official := to_official(name))}
    tensors = read_tensors(wanted, device, dtype)
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
    tensors |= model.extra_tensors
    limit = max_shard_size or sum(t.nbytes for t in tensors.values())
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    set_default_mode(folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> JanusFlowConfig:
    """The folder's configuration. FileNotFoundError or ValueError where it is none of JanusFlow's."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist{explain_folder(folder)}")
    return JanusFlowConfig.from_file(path)


def count_parameters(folder: Path, config: JanusFlowConfig, parts: Parts = "all") -> int:
    """Of what `load_model` builds. Raises what it raises for weights that do not fit."""
    model = build_model(folder, config, find_weights(folder), parts)
    return sum(p.numel() for p in model.parameters())


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
