# SPDX-License-Identifier: MIT
"""Exports trained weights: a checkpoint in the official layout, and adapters by themselves in peft's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import load_model, read_config
from ..config import JanusFlowConfig
from ..files import atomic_directory
from ..hub import resolve, resolve_vae
from ..loading import save
from ..model import JanusFlow
from ..official import to_official
from ..pipeline import Pipeline
from ..processor import Processor
from ..vae import VAE, load_vae
from . import checkpoints
from .config import Config
from .prepare import adapted_layers, lora_settings, plain_state, trainable
from .settings import read


def export(
    config: Config, source: Path, trained: Mapping[str, Tensor], processor: Processor, vae: VAE, target: Path
) -> Path:
    """Write trained weights (fp32 on the CPU, by their names in `JanusFlowLoss`) in the official layout.

    source: the folder that the run started from. With LoRA the adapters are merged, and also written to
    `target`-adapter in peft's form, under official names.
    """
    dtype = getattr(torch, config.export_dtype)
    model: Any = load_model(source, "cpu", torch.float32, progress=False)
    plain = {name: tensor.to(dtype) for name, tensor in plain_state(trained, model, config).items()}
    extra = {name: tensor.to(dtype) for name, tensor in model.extra_tensors.items()}
    with torch.device("meta"):
        model = JanusFlow(model.config)
    model.load_state_dict(plain, assign=True)
    model.extra_tensors = extra
    save(Pipeline(model, processor, vae), target, overwrite=True)
    if config.lora.rank:
        save_adapter(config, model.config, trained, target.with_name(f"{target.name}-adapter"))
    return target


def save_adapter(config: Config, sizes: JanusFlowConfig, trained: Mapping[str, Tensor], target: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, which peft loads into the official model."""
    with torch.device("meta"):
        layers = adapted_layers(JanusFlow(sizes), config)
    settings = lora_settings(config, [to_official(name) for name in layers])
    tensors = {}
    for name, tensor in trained.items():
        if "lora_" in name:
            plain = name.removeprefix("model.").replace(".default", "")
            if plain.endswith("lora_magnitude_vector.weight"):
                plain = plain.removesuffix(".weight")
            tensors[f"base_model.model.{to_official(plain)}"] = tensor.contiguous()
    about = settings.to_dict() | {"base_model_name_or_path": config.model, "inference_mode": True}
    about = {key: sorted(value) if isinstance(value, set) else value for key, value in about.items()}
    with atomic_directory(target, overwrite=True) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def export_checkpoint(folder: str | Path) -> Path:
    """Export any checkpoint of a run, OUTPUT/checkpoints/step-N, to OUTPUT/export-step-N."""
    folder = Path(folder).expanduser()
    about = checkpoints.describe(folder)
    config = read(Config, about["config"])
    source = resolve(config.model, progress=False)
    with torch.device("meta"):
        loss, rates = trainable(config, JanusFlow(read_config(source)))
    shapes = {name: p.shape for name, p in loss.named_parameters() if rates[name]}
    which = "average" if config.optimizer.ema_decay else "master"
    trained = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoints.load(folder, {which: trained})
    processor = Processor.from_folder(source, loss.model.config.llm.vocab_size)
    vae = load_vae(resolve_vae(source, config.vae or None, False), torch.device("cpu"), torch.float32)
    return export(config, source, trained, processor, vae, folder.parents[1] / f"export-{folder.name}")
