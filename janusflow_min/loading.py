# SPDX-License-Identifier: MIT
"""From files to a `Pipeline` and back: `load` and `save`."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import count_parameters, load_model, read_config, save_model
from .checks import one_of
from .devices import pick_device, pick_dtype
from .fast.quantized import QUANTIZATIONS, quantize_llm, refuse_quantized
from .files import atomic_directory, expand
from .hub import resolve, resolve_vae
from .model import PARTS, Parts
from .official import is_checkpoint_entry
from .pipeline import Pipeline
from .processor import Processor, check_processor_matches
from .vae import check_vae_dtype, load_vae, save_vae


def load(
    source: str | Path = "tiny",
    vae_path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_dtype: str | torch.dtype | None = None,
    parts: Parts = "all",
    progress: bool = True,
    fast: bool = True,
    compile: bool = False,
    upstream_rounding: bool = False,
    quantization: str | None = None,
    revision: str | None = None,
) -> Pipeline:
    """Load a checkpoint in the official layout.

    source: "tiny" (the trained default inside this package), a folder, or a hub id such as
    "deepseek-ai/JanusFlow-1.3B". vae_path: folder or hub id; by default the checkpoint's own `vae/`, else
    stabilityai/sdxl-vae from the hub. device "auto": CUDA, then MPS, then the CPU. dtype "auto": bfloat16 on CUDA, and
    (with a warning) on a CPU with too little free memory for float32; else float32. vae_dtype: the model's where that
    is possible. parts: "all", or "generation" or "understanding" to load only what that task needs. progress: bars,
    where stderr is a terminal.
    fast: on an NVIDIA GPU in bfloat16 use the kernels and CUDA graphs of `fast/`; False is the plain path. compile:
    torch.compile what those leave over (UViT, SigLIP, VAE), a minute or more at the first use, then from torch's
    cache on disk. upstream_rounding: round time, step, latents and rotary frequencies to the model's dtype as the
    published code does; by default they stay in fp32, which is closer to the true flow. quantization: "int8" or "fp8"
    rounds the LLM's matrices to 8 bits (`fast/quantized.py`), for good: no `save`, no adapters, no other dtype.
    revision: a branch, tag or commit of a hub id.
    Raises FileNotFoundError or ValueError, which name what is wrong.
    """
    if parts not in PARTS:
        raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
    if quantization is not None:
        one_of("quantization", quantization, QUANTIZATIONS)
    device = pick_device(device)
    asked, dtype = dtype, pick_dtype(dtype, device)
    its_dtype = torch.float32 if dtype == torch.float16 else dtype  # float16 is no dtype for the VAE
    if parts != "understanding":
        its_dtype = check_vae_dtype(its_dtype if vae_dtype is None else pick_dtype(vae_dtype, device))
    folder = resolve(source, progress, revision=revision)
    config = read_config(folder)  # the commonest mistake first: not a JanusFlow checkpoint
    processor = Processor.from_folder(folder, config.llm.vocab_size)
    check_processor_matches(folder, config, processor)
    if asked == "auto" and device.type == "cpu":
        dtype = pick_dtype(asked, device, count_parameters(folder, config, parts))
        its_dtype = dtype if vae_dtype is None else its_dtype
    vae = None
    if parts != "understanding":  # before the weights, which take long
        vae = load_vae(resolve_vae(folder, vae_path, progress), device, its_dtype, config.latent_channels)
        if compile:
            vae.compile_decoder(2 if device.type == "cuda" else 1)
    model = load_model(folder, device if quantization is None else "cpu", dtype, parts, progress)
    if quantization is not None:
        quantize_llm(model, quantization, device)
    model.llm.upstream_rounding = bool(upstream_rounding)
    return Pipeline(model, processor, vae, fast, compile)


def save(
    pipe: Pipeline, folder: str | Path, overwrite: bool = False, max_shard_size: int | None = None
) -> Path:
    """Write the pipeline in the official layout, VAE included, in its present dtypes; returns the folder.

    The folder appears only when everything is written. FileExistsError where something is there already, unless
    `overwrite`: then a checkpoint's files give way, and whatever else the folder holds stays. max_shard_size in
    bytes splits the weights. ValueError for a pipeline that was loaded in parts, and for a model that is wrapped
    (torch.compile, peft, accelerate), whose weights nobody could load.
    """
    refuse_quantized(pipe.model, "save it")
    with atomic_directory(folder, overwrite, is_checkpoint_entry) as temporary:
        if pipe.vae is not None:
            save_vae(pipe.vae, temporary / "vae")
        save_model(pipe.model, temporary, max_shard_size)
        for name, content in pipe.processor.files.items():
            (temporary / name).write_bytes(content)
    return expand(folder)
