# SPDX-License-Identifier: MIT
"""LoRA adapters on a loaded pipeline, in peft's format on disk, without peft: W = W₀ + Σ scale · alpha / r · B A.

An adapter is merged into the weights where they lie, so the plain and the fast path, captured graphs included, compute
at full speed. W₀ of the layers that are changed is kept beside them, which is how swapping and unloading restore every
bit. In bfloat16 the sum is formed in fp32 and rounded once, as an exported merge is.

Follows: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), and the files and merging of huggingface/peft.
Legend: r rank, A (r, in) and B (out, r) of a linear layer; of a convolution A (r, in, k, k) and B (out, r, 1, 1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks
from .files import public_name, read_json
from .hub import find_folder
from .model import JanusFlow
from .official import from_official
from .weights import read_header, read_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# What in adapter_config.json says how it was trained, or is read here; any other option that is set is refused.
KNOWN = (
    "peft_type peft_version r lora_alpha use_rslora init_lora_weights target_modules exclude_modules layers_pattern "
    "layers_to_transform lora_dropout base_model_name_or_path revision task_type inference_mode auto_mapping "
    "megatron_core qalora_group_size eva_config ephemeral_gpu_offload runtime_config"
)
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to start that leave W₀ as it is
MERGE = "merge the adapter into its base model with peft (merge_and_unload) and load the result"


@dataclass(frozen=True)
class Adapter:
    scaling: float  # alpha / r, or alpha / √r
    factors: dict[str, tuple[Tensor, Tensor]]  # a weight's name in the model: A and B, fp32 on the CPU

    def delta(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """What is added to a weight (out, in) or (out, in, k, k), fp32."""
        down, up = (factor.to(weight.device).flatten(1) for factor in self.factors[name])
        return (up @ down * (scale * self.scaling)).view(weight.shape)


def read_adapter(folder: Path, model: JanusFlow) -> Adapter:
    """The adapter in a folder for the parts of a model that are loaded. FileNotFoundError for missing files;
    ValueError for options that are not computed here, and for tensors that do not fit, which names the key."""
    path, config = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    settings = read_json(config)
    for key, value in settings.items():
        if key not in KNOWN.split() and value not in (None, False, "none", [], {}):
            raise ValueError(f"{config}: {key} = {checks.shown(value)} is not supported; {MERGE}")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f'{config}: peft_type must be "LORA", got {checks.shown(settings.get("peft_type"))}')
    if (start := settings.get("init_lora_weights")) not in KEEPS_BASE:
        raise ValueError(
            f"{config}: init_lora_weights = {checks.shown(start)} changes the base model too; {MERGE}"
        )
    rank = checks.whole(f"{config}: r", settings.get("r"))
    alpha = checks.number(f"{config}: lora_alpha", settings.get("lora_alpha"))
    scaling = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    if not (stored := read_header(path)):
        hint = " (adapter_model.bin is a pickle: save it again with safetensors)"
        hint = hint if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{path} " + ("does not exist" + hint if stored is None else "is empty"))
    base = f"the adapter was made for {settings.get('base_model_name_or_path') or 'a model that it does not name'}"
    with torch.device("meta"):
        whole = JanusFlow(model.config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items() if tensor.ndim in (2, 4)}
    keys: dict[tuple[str, str], str] = {}
    for key, entry in stored.items():
        if (match := KEY.fullmatch(key)) is None:
            raise ValueError(f"{path}: {key} is no factor of a linear layer or a convolution; {MERGE}")
        name = f"{match[1]}.weight"
        try:
            shape = shapes[name if name in shapes else (name := from_official(name))]
        except (KeyError, ValueError):
            raise ValueError(f"{path}: this model has no layer for {key}; {base}") from None
        ends = (1,) * len(shape[2:])
        wanted = (rank, *shape[1:]) if match[2] == "A" else (shape[0], rank, *ends)
        if entry.shape != wanted:
            raise ValueError(
                f"{path}: {key} is {list(entry.shape)}; this model and r = {rank} of {config.name} ask for "
                f"{list(wanted)}; {base}"
            )
        keys[name, match[2]] = key
    layers = {name for name, _ in keys}
    if lone := sorted(layers - {n for n in layers if (n, "A") in keys and (n, "B") in keys}):
        raise ValueError(f"{path}: {lone[0]} has only one of its factors lora_A and lora_B")
    tensors = dict(read_tensors(stored, "cpu", torch.float32))
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinite values")
    here = layers & model.state_dict().keys() if model.parts != "all" else layers
    return Adapter(scaling, {n: (tensors[keys[n, "A"]], tensors[keys[n, "B"]]) for n in sorted(here)})


def find_lora(text: str) -> dict[str, Any]:
    """[NAME=]SOURCE[:SCALE], as the command line takes it -> arguments of `load_lora`, the files in place. ValueError
    or FileNotFoundError, before a model is loaded for it."""
    match = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?::([-+]?\d*\.?\d+))?", text)
    if match is None:
        raise ValueError(f"--lora must be a folder or a hub id, as NAME=PATH:SCALE or less, got {text!r}")
    name, source, scale = match.groups()
    folder = find_folder("--lora", source, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    return {"source": folder, "name": name or default_name(source), "scale": float(scale or 1)}


def default_name(source: str | Path) -> str:
    return public_name(str(source)).rpartition("/")[2]


class LoraMixin:
    """The methods of `Pipeline` for adapters. Not to be called while another thread uses the pipeline."""

    model: JanusFlow

    def __init__(self) -> None:
        self._loras: dict[str, Adapter] = {}
        self._scales: dict[str, float] = {}  # of the active ones
        self._base: dict[str, Tensor] = {}  # W₀ of every weight that is not its own now

    @property
    def adapters(self) -> dict[str, float]:
        """The adapters by name, with the scale that each has now: 0 for one that is loaded but not active."""
        return {name: self._scales.get(name, 0.0) for name in self._loras}

    def load_lora(
        self, source: str | Path, name: str | None = None, scale: float = 1.0, revision: str | None = None
    ) -> str:
        """Load an adapter beside those that are there and make it active, unless scale is 0; returns its name.

        source: a folder with adapter_config.json and adapter_model.safetensors, as peft and training write them, or a
        hub id. name: by default the folder's own. Raises FileNotFoundError or ValueError, and nothing has changed.
        """
        if name is None:
            name = default_name(source)
        if not isinstance(name, str) or not name or name in self._loras:
            raise ValueError(
                f"name must be text, and another one than {[*self._loras]}; got {checks.shown(name)}"
            )
        checks.number("scale", scale)
        folder = find_folder("lora", source, [ADAPTER_CONFIG, ADAPTER_WEIGHTS], revision=revision)
        before = self._loras
        self._loras = before | {name: read_adapter(folder, self.model)}
        try:
            self._activate(self._scales | {name: scale})
        except BaseException:
            self._loras = before
            raise
        return name

    def set_adapters(self, names: str | Sequence[str], scales: float | Sequence[float] = 1.0) -> None:
        """Make these loaded adapters active, with these scales (one, or one each), and no others; [] for none."""
        names = [names] if isinstance(names, str) else list(names)
        values = [scales] * len(names) if isinstance(scales, int | float) else list(scales)
        if len(values) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{names} need a scale each, and no name twice; got the scales {values}")
        self._known(names)
        self._activate({n: checks.number("scales", v) for n, v in zip(names, values, strict=True)})

    def unload_lora(self, name: str | None = None) -> None:
        """Forget an adapter, or all; the weights are to the bit what they would be without it."""
        gone = [*self._loras] if name is None else [name]
        self._known(gone)
        self._activate({n: scale for n, scale in self._scales.items() if n not in gone})
        for n in gone:
            del self._loras[n]

    def fuse_lora(self) -> None:
        """Make the active adapters part of the weights for good, and forget all; W₀'s memory becomes free."""
        self._loras, self._scales, self._base = {}, {}, {}

    def _known(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self._loras]:
            raise ValueError(f"no adapter {checks.shown(unknown[0])} is loaded; there are {[*self._loras]}")

    def _activate(self, scales: dict[str, float]) -> None:
        scales = {name: scales[name] for name in self._loras if scales.get(name)}  # one order, one result
        if scales == self._scales:
            return
        try:
            self._write(scales)
        except BaseException:  # memory that is short, Ctrl-C
            self._write(self._scales)
            raise
        self._scales = scales

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, scales: dict[str, float]) -> None:
        """Give every weight its value, in place: graphs and views of the fast path read it where it lies."""
        weights = dict(self.model.named_parameters())
        changed = {layer for name in scales for layer in self._loras[name].factors}
        if lost := sorted((changed | self._base.keys()) - weights.keys()):
            raise ValueError(
                f"the model has no {lost[0]}: it is wrapped (peft, torch.compile) or quantized: load it again without"
            )
        for layer in sorted(self._base.keys() - changed):
            weights[layer].copy_(self._base[layer])
            del self._base[layer]
        for layer in sorted(changed):
            if layer not in self._base:
                self._base[layer] = weights[layer].clone()
            value = self._base[layer].float()
            for name, scale in scales.items():
                if layer in self._loras[name].factors:
                    value = value + self._loras[name].delta(layer, value, scale)
            weights[layer].copy_(value)
