# SPDX-License-Identifier: MIT
"""Adapters in peft's format with random factors, for any checkpoint. A helper, not a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from janusflow_min.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from janusflow_min.model import JanusFlow
from janusflow_min.official import to_official


def write_adapter(folder: Path, model: JanusFlow, seed: int = 0, size: float = 0.1, rank: int = 4) -> Path:
    """An adapter of the LLM's query and down projections; `size` is the deviation of its factors."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            layer = f"base_model.model.{to_official(name).removesuffix('.weight')}"
            for end, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                tensors[f"{layer}.lora_{end}.weight"] = torch.randn(shape, generator=generator) * size
    folder.mkdir(parents=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(about))
    return folder
