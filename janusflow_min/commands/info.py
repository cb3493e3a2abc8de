# SPDX-License-Identifier: MIT
"""`janusflow-min info`: what a checkpoint holds, and what it lacks, from JSON files and headers alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_parser(
    command: Callable[..., argparse.ArgumentParser], option: Callable[..., None], model_help: str
) -> None:
    """Add `info` to the command line; `command` and `option` are the parser's own helpers."""
    new = command(
        info,
        "what a checkpoint holds, and what it lacks",
        "Parts, parameters and dtypes of a checkpoint, its sizes, tokenizer and VAE, and what is missing or does\n"
        "not fit; only the files' headers are read (a hub id is downloaded first). Exit code 1 if something is.",
        "  janusflow-min info\n  janusflow-min info path/to/JanusFlow-1.3B --vae path/to/sdxl-vae",
    )
    new.add_argument("model", metavar="MODEL", nargs="?", default="tiny", help=model_help)
    option(new, "--vae", "PATH", "the VAE's folder or hub id; without: the checkpoint's vae/")


def info(args: argparse.Namespace) -> int:
    """Report on a checkpoint from its headers; 1 where something is missing or does not fit."""
    from ..hub import resolve, resolve_vae

    folder = resolve(args.model)
    lines, problems = inspect_checkpoint(folder, args.vae and resolve_vae(folder, args.vae))
    print("\n".join(lines))
    print(f"\nmissing or wrong: {len(problems) or 'nothing'}")
    for problem in problems:
        print(f"  - {problem}")
    return 1 if problems else 0


def inspect_checkpoint(folder: Path, vae: Path | None = None) -> tuple[list[str], list[str]]:
    """(lines of the report, problems) of a checkpoint folder. Only JSON files and safetensors headers are read.

    vae: folder of the VAE; by default the checkpoint's `vae/`, which the official repository leaves to the hub.
    """
    from ..config import JanusFlowConfig

    lines, problems = [f"checkpoint {folder}"], []
    config = _attempt(problems, lambda: JanusFlowConfig.from_file(folder / "config.json"))
    _report_weights(folder, config, lines, problems)
    if config is not None:
        llm, siglip, enc = config.llm, config.siglip, config.uvit_encoder
        grid = siglip.image_size // siglip.patch_size
        lines += [
            "\nsizes (config.json)",
            f"  LLM     {llm.num_hidden_layers} layers of width {llm.hidden_size}, {llm.num_attention_heads} heads "
            f"({llm.num_key_value_heads} of keys), MLP {llm.intermediate_size}, vocabulary {llm.vocab_size}, "
            f"{llm.max_position_embeddings} positions",
            f"  SigLIP  {siglip.layers} layers of width {siglip.width}, {siglip.heads} heads; images of "
            f"{siglip.image_size} px in patches of {siglip.patch_size} px",
            f"  UViT    {enc.num_blocks} + {config.uvit_decoder.num_blocks} blocks of {enc.channels} channels; latents "
            f"{config.latent_channels} x {grid * config.latent_stride} x {grid * config.latent_stride}, "
            f"{grid * grid} image tokens",
        ]
    _report_processor(folder, config, lines, problems)
    _report_vae(folder / "vae" if vae is None else vae, vae is not None, config, lines, problems)
    return lines, problems


def _report_weights(folder: Path, config: Any, lines: list[str], problems: list[str]) -> None:
    import torch

    from ..checkpoint import (
        INDEX,
        POOLING_HEAD,
        WEIGHTS,
        check_keys,
        from_official,
        to_official,
        weight_files,
    )
    from ..files import read_json
    from ..model import JanusFlow

    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        shards = (_attempt(problems, lambda: read_json(folder / INDEX)) or {}).get("weight_map")
        named = {str(file) for file in shards.values()} if isinstance(shards, dict) else set()
        if absent := sorted(file for file in named if not (folder / file).is_file()):
            problems.append(f"{INDEX} names {len(absent)} files that are absent: {', '.join(absent)}")
            return
    files = _attempt(problems, lambda: weight_files(folder))
    if files is None:
        return
    parts = ["llm", "siglip", "siglip attn_pool (unused)", "und_aligner", "und_begin", "uvit_encoder"]
    parts += ["gen_in_aligner", "gen_out_norm", "gen_out_aligner", "uvit_decoder", "(unknown)"]
    table: dict[str, list[tuple[int, str, int]]] = {part: [] for part in parts}  # (parameters, dtype, bytes)
    for path, names in files.items():
        headers = _headers(path)
        for name in names:
            try:
                part = parts[2] if name.startswith(POOLING_HEAD) else from_official(name).split(".")[0]
            except ValueError:
                part = "(unknown)"
            count, dtype = math.prod(headers[name][0]), headers[name][1]
            table[part if part in table else "(unknown)"].append((count, dtype, count * _bytes(dtype)))
    lines.append(f"\n{'part':<26}{'tensors':>8}{'parameters':>16}{'MB':>10}  dtype on disk")
    table["together"] = [tensor for tensors in table.values() for tensor in tensors]
    for part, tensors in table.items():
        if not tensors:
            continue
        dtypes = ", ".join(sorted({dtype for _, dtype, _ in tensors}))
        count, size = sum(n for n, _, _ in tensors), sum(b for _, _, b in tensors) / 1e6
        lines.append(f"{part:<26}{len(tensors):>8}{count:>16,}{size:>10,.2f}  {dtypes}")
    lines += [f"  {path.name}  {path.stat().st_size / 1e6:,.2f} MB" for path in files]
    if config is not None:
        with torch.device("meta"):
            state = JanusFlow(config).state_dict()
        expected = {to_official(name): tuple(tensor.shape) for name, tensor in state.items()}
        _attempt(problems, lambda: check_keys(folder, files, expected))


def _report_processor(folder: Path, config: Any, lines: list[str], problems: list[str]) -> None:
    from ..processor import FILES, Processor, check_processor_matches

    lines.append("\ntokenizer and processor")
    absent = [name for name in FILES if not (folder / name).is_file()]
    needed = [name for name in absent if name in ("tokenizer.json", "preprocessor_config.json")]
    problems += [f"{folder / name} is missing" for name in needed]
    if optional := sorted(set(absent) - set(needed)):
        lines.append(f"  absent, the defaults are used: {', '.join(optional)}")
    if needed or config is None:
        return
    processor = _attempt(problems, lambda: Processor.from_folder(folder, config.llm.vocab_size))
    if processor is None:
        return
    names = ("bos_id", "eos_id", "pad_id", "image_id", "image_gen_id", "image_start_id", "image_end_id")
    ids = ", ".join(f"{name.removesuffix('_id')} {getattr(processor.tokenizer, name)}" for name in names)
    lines.append(f"  special ids  {ids}")
    image = processor.image_processor
    lines.append(f"  images  {image.image_size} px, {processor.num_image_tokens} tokens each")
    _attempt(problems, lambda: check_processor_matches(folder, config, processor))


def _report_vae(folder: Path, given: bool, config: Any, lines: list[str], problems: list[str]) -> None:
    from ..files import read_json
    from ..hub import SDXL_VAE

    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    lines.append("\nVAE")
    if not folder.is_dir():
        if given:
            problems.append(f"no VAE at {folder}")
        lines.append(f"  none inside; {SDXL_VAE} of the hub is used unless --vae names another")
        return
    about = _attempt(problems, lambda: read_json(folder / "config.json"))
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        problems.append(f"{folder / 'diffusion_pytorch_model.safetensors'} is missing")
    for path in files:
        tensors = _attempt(problems, lambda path=path: _headers(path))
        if tensors:
            count = sum(math.prod(shape) for shape, _ in tensors.values())
            dtypes = ", ".join(sorted({dtype for _, dtype in tensors.values()}))
            lines.append(f"  {path.name}  {path.stat().st_size / 1e6:,.2f} MB")
            lines.append(f"  {len(tensors)} tensors, {count:,} parameters  {dtypes}")
    if about is None:
        return
    channels, blocks = about.get("latent_channels", 4), about.get("block_out_channels", [64])
    lines.append(
        f"  {about.get('_class_name', 'AutoencoderKL')}: {channels} latent channels, 1/{2 ** (len(blocks) - 1)} of the "
        f"side, scaling factor {about.get('scaling_factor', 0.18215)}"
    )
    if config is not None and channels != config.latent_channels:
        problems.append(f"the VAE has {channels} latent channels, the model {config.latent_channels}")


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype as safetensors writes it)."""
    from ..checkpoint import open_weights

    with open_weights(path) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        return {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}


def _bytes(dtype: str) -> int:
    """Bytes of one number: "BF16" -> 2, "F8_E4M3" -> 1."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return max(1, int(digits or 8) // 8)


def _attempt(problems: list[str], step: Any) -> Any:
    """What `step()` returns; None where it fails, with the reason among the problems."""
    try:
        return step()
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
        return None
