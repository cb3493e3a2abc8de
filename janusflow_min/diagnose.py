# SPDX-License-Identifier: MIT
"""What lies there in place of a checkpoint, and what to do about it: the ends of `checkpoint.py`'s errors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from .files import printable
from .official import INDEX, PREFIXES, SHARDS, WEIGHTS

_MARKS = "_orig_mod. _fsdp_wrapped_module. _checkpoint_wrapped_module. _forward_module. module."
WRAPPERS = re.compile("|".join(re.escape(mark) for mark in _MARKS.split()))  # in the names of weights
FILES = (  # patterns of names, what they are, what to do; the first that fits counts
    ("adapter_config.json adapter_model.*", "a LoRA adapter", "load its base model, and then the adapter "
     "with --lora or Pipeline.load_lora"),
    ("model_index.json", "a pipeline of diffusers", "JanusFlow's own checkpoint is needed"),
    (SHARDS, "shards without their index", f"download {INDEX}, too"),
    ("*.safetensors", "weights under another name", "rename the file to {} if it holds the whole model"),
    ("*.gguf", "weights for llama.cpp", "they cannot be read here: get the safetensors"),
    ("*.bin *.pt *.pth *.ckpt", "pickled weights, which can run code and are never read", "convert them to "
     "safetensors where you trust them"),
    ("*.h5 *.msgpack *.onnx", "weights of another framework", "get the safetensors"),
)  # fmt: skip
KEYS = (  # parts of names of weights, what they mean, what to do
    ("lora_ .base_layer. .modules_to_save.", "LoRA adapters that are not merged", "merge them first "
     "(merge_and_unload of peft)"),
    (".absmax .quant_map .quant_state .nested_absmax .SCB .weight_format", "weights quantised by bitsandbytes",
     "save the model in bfloat16 or float32"),
    (".qweight .qzeros .scales .g_idx weight_scale _scale_inv", "quantised weights", "save the model in bfloat16 or "
     "float32"),
    ("parametrizations.", "parametrized weights", "call torch.nn.utils.parametrize.remove_parametrizations first"),
    (_MARKS, "a wrapped module (torch.compile, FSDP, DataParallel)", "unwrap it first, as in "
     "model.llm = model.llm._orig_mod"),
)  # fmt: skip


def explain_folder(folder: Path, weights: str = WEIGHTS) -> str:
    """ "; it holds ...: do ..." for a folder that lacks its files, `weights` above all; "" where nobody knows."""
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "; it is empty"
    inside = sorted(
        path.parent for form in ("*", "snapshots/*") for path in folder.glob(f"{form}/config.json")
    )
    found = [p for p in inside if p.name != "vae" and ((p / WEIGHTS).is_file() or (p / INDEX).is_file())]
    if found:
        return f"; a checkpoint lies in {' and in '.join(printable(str(p)) for p in found[:3])}: give that folder"
    for patterns, what, remedy in FILES:
        if fitting := [name for name in names if any(fnmatch(name, p) for p in patterns.split())]:
            return f"; it holds {what} ({printable(fitting[0])}): {remedy.format(weights)}"
    return ""


def explain_keys(names: Iterable[str]) -> str:
    """What names of weights that do not fit say about their origin, and what to do; "" where nobody knows."""
    names = list(names)
    for marks, what, remedy in KEYS:
        if any(mark in name for name in names for mark in marks.split()):
            return f"these are {what}: {remedy}"
    if names and sum(name.startswith(tuple(PREFIXES.values())) for name in names) > len(names) / 2:
        return "these are the names inside this library: write checkpoints with janusflow_min.save"
    return ""


def common_prefix(names: Iterable[str]) -> str:
    """What stands in front of every official name, such as "model."; "" where nothing does."""
    names = list(names)
    first = min(names, default="")
    starts = {first[:i] for key in PREFIXES if (i := first.find(key)) > 0 and first[i - 1] == "."}
    fitting = [start for start in starts if all(name.startswith(start) for name in names)]
    return min(fitting, key=len, default="")
