# SPDX-License-Identifier: MIT
"""Makes a model ready for training: what trains and how fast, adapters, recomputation, compilation, sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model import JanusFlow
from .config import Config
from .losses import AlignmentHead, JanusFlowLoss

FSDP_UNIT = 2**28  # parameters that FSDP2 gathers at once, at least: 0.5 GiB in bf16


def trainable(config: Config, model: JanusFlow) -> tuple[JanusFlowLoss, dict[str, float]]:
    """The loss of a model, adapters added, and each parameter's learning rate (0: frozen).

    ValueError if the settings do not fit the model, which may be on the meta device.
    """
    llm, layer = model.config.llm, config.objective.alignment_layer
    device = next(model.parameters()).device
    if layer > llm.num_hidden_layers:
        raise ValueError(
            f"objective.alignment_layer must be one of the model's blocks, 1 to {llm.num_hidden_layers}; got {layer}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            head = AlignmentHead(llm.hidden_size, model.config.siglip.width)
        if config.lora.rank:
            add_lora(model, config)
    loss = JanusFlowLoss(model, head.to(device), config.objective)
    rates = {}
    for name, p in loss.named_parameters():
        part = component(name)
        adapted = config.lora.rank and part in config.lora.components
        rates[name] = 0.0 if adapted and "lora_" not in name else config.rate(part)
        p.requires_grad_(rates[name] > 0)
    return loss, rates


def component(name: str) -> str:
    """The component (`config.COMPONENTS`) of a parameter of `JanusFlowLoss`."""
    part = name.removeprefix("model.").split(".")[0]
    aligners = {"und_begin": "und_aligner", "head": "alignment_head"}
    return "gen_aligners" if part.startswith("gen_") else aligners.get(part, part)


# Adapters -----------------------------------------------------------------------


def add_lora(model: JanusFlow, config: Config) -> None:
    """Add adapters to the layers that the settings name."""
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise ImportError("lora.rank needs the package peft: pip install 'janusflow-min[train]'") from None
    inject_adapter_in_model(lora_settings(config, adapted_layers(model, config)), model)


def lora_settings(config: Config, layers: list[str]) -> Any:
    """peft's configuration of adapters for these layers."""
    from peft import LoraConfig

    c = config.lora
    return LoraConfig(
        r=c.rank,
        lora_alpha=c.alpha,  # type: ignore[arg-type]  # peft takes a float as well
        target_modules=layers,
        lora_dropout=c.dropout,
        use_dora=c.dora,
    )


def adapted_layers(model: JanusFlow, config: Config) -> list[str]:
    """The names of the layers that get adapters. ValueError for unknown targets lists the known ones."""
    lora = config.lora
    layers = {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and component(name) in lora.components
    }
    if missing := sorted(set(lora.targets) - set(layers.values())):
        raise ValueError(
            f"lora.targets: {', '.join(lora.components)} has no layer {', '.join(missing)}; there are "
            f"{', '.join(sorted(set(layers.values())))}"
        )
    if lora.targets:
        return [name for name, last in layers.items() if last in lora.targets]
    modules = dict(model.named_modules())
    return [n for n, last in layers.items() if isinstance(modules[n], nn.Linear) and last != "lm_head"]


@torch.no_grad()
def plain_state(trained: Mapping[str, Tensor], model: JanusFlow, config: Config) -> dict[str, Tensor]:
    """The weights of a model after loading `trained` (names as in `JanusFlowLoss`) and merging its adapters."""
    if config.lora.rank:
        add_lora(model, config)
    parameters = dict(model.named_parameters())
    for name, tensor in trained.items():
        if not name.startswith("head."):
            parameters[name.removeprefix("model.")].copy_(tensor)
    if not config.lora.rank:
        return model.state_dict()
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)  # refuses weights that are not finite
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


# Speed and memory -----------------------------------------------------------------------


def prepare_blocks(model: JanusFlow, config: Config) -> None:
    """Recompute each LLM block in the backward pass, compile all blocks: in training only, sampling stays as it is."""
    blocks: list[nn.Module] = [*model.llm.layers]
    parts: Any = model  # loaded whole: none of them is None
    if config.compile:
        # Of each block one for a fixed length, one for any, the same for a single row, all again for FSDP2's views.
        torch._dynamo.config.cache_size_limit = max(32, torch._dynamo.config.cache_size_limit)
        blocks += [*parts.siglip.blocks, *parts.uvit_encoder.mid_block.res_blocks]
        blocks += parts.uvit_decoder.mid_block.res_blocks
    for i, block in enumerate(blocks):
        plain = block.forward
        fast = torch.compile(plain) if config.compile else plain
        recompute = config.gradient_checkpointing and i < len(model.llm.layers)
        block.forward = training_forward(plain, fast, recompute, config.lora.dropout > 0)


def training_forward(plain: Callable, fast: Callable, recompute: bool, random: bool) -> Callable:
    """A block's forward pass; random: it uses dropout, so recomputation must repeat the same masks."""

    def forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args)
        if not recompute:
            return fast(*args)
        return checkpoint(fast, *args, use_reentrant=False, preserve_rng_state=random)

    return forward


def shard(loss: JanusFlowLoss, dtype: torch.dtype) -> None:
    """FSDP2 over all ranks: fp32 shards, gathered in `dtype` a few blocks at a time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for unit in units(loss.model.llm.layers):
        fully_shard(unit, mp_policy=policy)
    fully_shard(loss, mp_policy=policy)


def units(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Groups of consecutive blocks that FSDP2 gathers and frees together: few and large, because between GPUs of one
    host a gather takes less time than launching it."""
    found: list[list[nn.Module]] = [[]]
    size = 0
    for block in blocks:
        if size >= FSDP_UNIT:
            found.append([])
            size = 0
        found[-1].append(block)
        size += sum(p.numel() for p in block.parameters())
    return found
