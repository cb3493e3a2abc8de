# SPDX-License-Identifier: MIT
"""Weights from and to the official files.

Inside the module the official names stay, but for the ten top-level prefixes below; the table is read in both
directions. `model.safetensors`, or shards with `model.safetensors.index.json`, goes straight to device and dtype,
tensor by tensor, into a model that was built on the meta device. Strict: one error lists every missing,
unexpected and mis-shaped key. SigLIP's pooling head is in the official file and used by nobody: it is kept aside
and written back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import JanusFlowConfig
from .files import read_json
from .model import JanusFlow, Parts
from .progress import progress_bar

PREFIXES = {  # official: ours
    "language_model.model.": "llm.",
    "language_model.lm_head.": "llm.lm_head.",
    "vision_und_enc_model.vision_tower.": "siglip.",
    "vision_und_enc_aligner.": "und_aligner.",
    "beg_of_und_embed": "und_begin",
    "vision_gen_enc_model.": "uvit_encoder.",
    "vision_gen_enc_aligner.": "gen_in_aligner.",
    "vision_gen_dec_aligner_norm.": "gen_out_norm.",
    "vision_gen_dec_aligner.": "gen_out_aligner.",
    "vision_gen_dec_model.": "uvit_decoder.",
}
POOLING_HEAD = "vision_und_enc_model.vision_tower.attn_pool."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def from_official(name: str) -> str:
    """Official key -> ours. ValueError where no prefix fits."""
    return _swap(name, PREFIXES.items())


def to_official(name: str) -> str:
    """Our key -> the official one; `from_official` read backwards."""
    return _swap(name, ((ours, official) for official, ours in PREFIXES.items()))


def _swap(name: str, table: Iterable[tuple[str, str]]) -> str:
    fitting = [(old, new) for old, new in table if name.startswith(old)]
    if not fitting:
        raise ValueError(f"{name!r} is not a key of a JanusFlow checkpoint")
    old, new = max(fitting, key=lambda pair: len(pair[0]))  # llm.lm_head. before llm.
    return new + name[len(old) :]


def read_tensors(
    files: Mapping[Path, list[str]], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of each file, with their names, one after another.

    Copies: safetensors' own tensors are a mapping of the file, which would keep its pages in memory, and would
    change, or end the process, with the file. A GPU converts them itself. ValueError for whole numbers.
    """
    for path, names in files.items():
        with open_weights(path) as f:
            for name in names:
                yield name, check_float(path, name, f.get_tensor(name)).to(device).to(dtype, copy=True)


def check_float(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} holds {tensor.dtype}; weights must be of a float type")
    return tensor


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
    config = JanusFlowConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = JanusFlow(config, parts)
        whole = model if parts == "all" else JanusFlow(config)
    files = weight_files(folder)
    check_keys(folder, files, {to_official(k): tuple(v.shape) for k, v in whole.state_dict().items()})

    wanted = {to_official(name) for name in model.state_dict()}
    chosen = {path: [name for name in names if name in wanted] for path, names in files.items()}
    tensors = read_tensors(chosen, device, dtype)
    options = dict(iterable=tensors, total=len(wanted), desc="Loading weights", unit="tensor")
    bar = progress_bar(progress, **options)
    model.load_state_dict({from_official(name): x for name, x in bar}, strict=True, assign=True)
    left = [k for k, p in model.state_dict().items() if p.is_meta]
    assert not left, f"still on the meta device: {left}"
    model.extra_tensors = {}  # official names; kept for save_model
    if parts == "all":
        pooling = {path: [n for n in names if n.startswith(POOLING_HEAD)] for path, names in files.items()}
        model.extra_tensors = dict(read_tensors(pooling, "cpu", dtype))
    return model.eval().requires_grad_(False)


def save_model(model: JanusFlow, folder: str | Path, max_shard_size: int | None = None) -> None:
    """Write config.json and the weights into an existing folder, under official names.

    One `model.safetensors`; where the weights have more than max_shard_size bytes, shards and their index.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    if model.parts != "all":
        raise ValueError(f'only {model.parts!r} was loaded; load with parts="all" to save a whole checkpoint')
    config = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {to_official(k): v.detach().contiguous() for k, v in model.state_dict().items()}
    tensors |= getattr(model, "extra_tensors", {})
    total = sum(t.nbytes for t in tensors.values())
    limit = total if max_shard_size is None else max_shard_size
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # newer safetensors leave it readable by its owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_config(folder: Path) -> JanusFlowConfig:
    """The folder's configuration; FileNotFoundError or ValueError where it is none of JanusFlow's."""
    return JanusFlowConfig.from_file(folder / "config.json")


def is_checkpoint_entry(name: str) -> bool:
    """Whether a file or folder of this name is the model's or the VAE's part of a checkpoint."""
    return name in ("config.json", WEIGHTS, INDEX, "vae") or fnmatch(name, "model-*-of-*.safetensors")


def index_files(folder: Path) -> list[str]:
    """The names of the shards that the index lists, in order. ValueError for an index without any."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    return sorted({str(file) for file in weight_map.values()})


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The checkpoint's files and the keys to read from each."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        with open_weights(single) as f:
            return {single: list(f.keys())}
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(folder / str(file), []).append(name)
    for path, names in files.items():
        with open_weights(path) as f:
            absent = sorted(set(names) - set(f.keys()))
        if absent:
            raise ValueError(f"{path} lacks keys that {INDEX} says are there: {_listing(absent)}")
    return files


@contextmanager
def open_weights(path: Path, device: torch.device | str = "cpu") -> Iterator:
    """`safe_open` with errors that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        f = safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    with f:
        yield f


def check_keys(folder: Path, files: dict[Path, list[str]], expected: dict[str, tuple[int, ...]]) -> None:
    """One error with all that is missing, unexpected or mis-shaped."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, names in files.items():
        with open_weights(path) as f:
            shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in names}
    found = {name for name in shapes if not name.startswith(POOLING_HEAD)}
    wrong = {k: (shapes[k], expected[k]) for k in sorted(found & expected.keys()) if shapes[k] != expected[k]}
    lines = []
    if missing := sorted(expected.keys() - found):
        lines.append(f"{len(missing)} missing: {_listing(missing)}")
    if unexpected := sorted(found - expected.keys()):
        lines.append(f"{len(unexpected)} unexpected: {_listing(unexpected)}")
    if wrong:
        texts = [f"{k} is {list(a)}, config.json asks for {list(b)}" for k, (a, b) in wrong.items()]
        lines.append(f"{len(wrong)} mis-shaped: {_listing(texts)}")
    if lines:
        raise ValueError(f"the weights in {folder} do not fit its config.json:\n  " + "\n  ".join(lines))


def _listing(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
