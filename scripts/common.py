# SPDX-License-Identifier: MIT
"""What the scripts that measure have in common: timers, random checkpoints, the reference's helper. Not run itself."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from janusflow_min.checkpoint import save_model
from janusflow_min.config import JanusFlowConfig, LlamaConfig, SiglipConfig, UViTConfig
from janusflow_min.hub import TINY
from janusflow_min.model import JanusFlow


def log(text: str) -> None:
    """A line with the time, from the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def name_of(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give back the memory of models that nobody holds any longer."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reset_peak() -> None:
    """Begin to watch memory anew: the GPU's, or on Linux the process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Most memory since `reset_peak`, GiB: allocated on the GPU, or resident; 0 where nobody counts it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20 if status.exists() else 0.0


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def median(work: Callable[[], Any], runs: int) -> float:
    """After one run that does not count."""
    work()
    return statistics.median(seconds(work) for _ in range(runs))


def pyplot() -> ModuleType:
    """matplotlib's, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# Models -----------------------------------------------------------------------


def helper() -> ModuleType:
    """`tests/reference.py`, which is no part of the package."""
    path = Path(__file__).resolve().parents[1] / "tests" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(layers: int = 4) -> JanusFlowConfig:
    uvit = UViTConfig(in_channels=4, out_channels=48, channels=48, hidden_size=128)
    return JanusFlowConfig(
        llm=LlamaConfig(1000, 128, 352, layers, 4),
        siglip=SiglipConfig(image_size=128, patch_size=16, width=64, layers=4, heads=4),
        uvit_encoder=uvit,
        uvit_decoder=UViTConfig(in_channels=48, out_channels=4, channels=48, hidden_size=128),
    )


@torch.no_grad()
def save_random(
    config: JanusFlowConfig, folder: Path, device: str, seed: int, janus_root: Path | None
) -> None:
    """A bf16 checkpoint: matrices of gain 1 (queries and keys 1.5, so that attention is far from uniform),
    norms about 1, biases and response norms not 0. Drawn on the device: other devices draw other weights. With
    `janus_root` also the tensors that the reference has and we do not build."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith("bias") or "channelwise_norm" in name:
            noise = noise * 0.1
        elif len(shape) == 1:
            noise = 1 + 0.2 * noise
        elif name not in ("llm.embed_tokens.weight", "siglip.pos_embed", "und_begin"):
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            noise = noise * gain * shape[1:].numel() ** -0.5
        return noise.bfloat16()

    with torch.device("meta"):
        model = JanusFlow(config)
    model.load_state_dict({name: draw(name, p.shape) for name, p in model.state_dict().items()}, assign=True)
    theirs = {} if janus_root is None else helper().build(config.to_dict(), janus_root).state_dict()
    model.extra_tensors = {name: draw(name, p.shape) for name, p in theirs.items() if ".attn_pool." in name}
    save_model(model, folder)


def small_config() -> JanusFlowConfig:
    uvit = UViTConfig(in_channels=4, out_channels=128, channels=128, hidden_size=512)
    return JanusFlowConfig(
        llm=LlamaConfig(4096, 512, 1408, 8, 8),
        siglip=SiglipConfig(image_size=128, patch_size=16, width=256, layers=6, heads=4),
        uvit_encoder=uvit,
        uvit_decoder=UViTConfig(in_channels=128, out_channels=4, channels=128, hidden_size=512),
    )


def random_checkpoint(size: str, folder: Path, device: str, janus_root: Path | None) -> None:
    """Random weights, "official" or "small", with the default's tokenizer and a VAE of SDXL's shape."""
    if (folder / "vae").is_dir():
        return
    from diffusers import AutoencoderKL

    log(f"writing {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    config = JanusFlowConfig() if size == "official" else small_config()
    save_random(config, folder, device, 0, janus_root)
    for path in TINY.glob("*.json"):
        if path.name in ("config.json", "recipe.json"):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "processor_config.json":
            content["num_image_tokens"] = config.siglip.num_patches
        if path.name == "preprocessor_config.json":
            content["image_size"] = config.siglip.image_size
        (folder / path.name).write_text(json.dumps(content), encoding="utf-8")
    channels = (128, 256, 512, 512) if size == "official" else (32, 64, 64, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
        sample_size=config.siglip.image_size,
    )
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
