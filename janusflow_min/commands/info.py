# SPDX-License-Identifier: MIT
"""`janusflow-min info`: what a checkpoint holds, and what it lacks, from JSON files and headers alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..processor import ImageProcessor
    from ..weights import Header, Stored

T = TypeVar("T")
UNDERSTANDING = ("siglip", "siglip attn_pool (unused)", "und_aligner", "und_begin")
GENERATION = ("uvit_encoder", "gen_in_aligner", "gen_out_norm", "gen_out_aligner", "uvit_decoder")
# Of JanusFlow-1.3B's preprocessor_config.json: of the usual values only these make its 439 bytes. Not confirmed.
PUBLISHED = {"do_normalize": False, "mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}
PARTS = ("llm", *UNDERSTANDING, *GENERATION, "(unknown)")


def add_parser(
    command: Callable[..., argparse.ArgumentParser], option: Callable[..., None], model_help: str
) -> None:
    """Add `info` to the command line; `command` and `option` are the parser's own helpers."""
    new = command(
        info,
        "what a checkpoint holds, and what it lacks",
        "Show a checkpoint's parts, parameters and dtypes, its sizes, tokenizer and VAE, and whatever is missing or\n"
        "does not fit. Only JSON files and headers are read, and downloaded from the hub. Exit code 1 if anything is\n"
        "missing or wrong.",
        "  janusflow-min info\n  janusflow-min info path/to/JanusFlow-1.3B --vae path/to/sdxl-vae",
    )
    new.add_argument("model", metavar="MODEL", nargs="?", default="tiny", help=model_help)
    option(new, "--vae", "PATH", "folder or hub id of the VAE (default: the checkpoint's vae/)")


def info(args: argparse.Namespace) -> int:
    """Report on a checkpoint from its headers; 1 where something is missing or does not fit."""
    from ..files import printable
    from ..hub import header_reader, resolve, resolve_vae

    folder, own = resolve(args.model, weights=False), header_reader(args.model)
    vae = resolve_vae(folder, args.vae, weights=False) if args.vae else None
    lines, problems = inspect_checkpoint(folder, own, vae, header_reader(args.vae) if args.vae else own)
    lines += [
        "",
        f"missing or wrong: {len(problems) or 'nothing'}",
        *(f"  - {problem}" for problem in problems),
    ]
    print(printable("\n".join(lines)))
    return 1 if problems else 0


def inspect_checkpoint(
    folder: Path, header: Header, vae: Path | None, vae_header: Header
) -> tuple[list[str], list[str]]:
    """(lines of the report, problems) of a checkpoint folder, by the checks that loading makes.

    vae: folder of the VAE; None: the checkpoint's `vae/`, which the official repository leaves to the hub. header and
    vae_header read the headers of their weights.
    """
    from ..checkpoint import build_model, read_config
    from ..hub import SDXL_VAE
    from ..official import PROCESSOR_FILES
    from ..processor import Processor, check_processor_matches
    from ..vae import build_vae
    from ..weights import find_weights

    lines, problems = [f"checkpoint {folder}"], []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except (ValueError, OSError) as error:
            problems.append(" ".join(str(error).split()))
            return None

    config = attempt(lambda: read_config(folder))
    stored = attempt(lambda: find_weights(folder, header))
    if stored is not None:
        lines += weights_table(stored)
        matrices = [e for name, e in stored.items() if name.endswith(("_proj.weight", "lm_head.weight"))]
        size = sum(math.prod(entry.shape) for entry in matrices) / 1e6
        lines.append(f"  the LLM's matrices: {size:,.2f} MB where --quantization made each of them 8 bits")
        if config is not None:
            attempt(lambda: build_model(folder, config, stored))
    if config is not None:
        llm, siglip, enc = config.llm, config.siglip, config.uvit_encoder
        channels, side, _ = (
            config.latent_channels,
            *[siglip.image_size // siglip.patch_size * enc.stride] * 2,
        )
        lines += [
            "\nsizes (config.json)",
            f"  LLM     {llm.num_hidden_layers} layers of width {llm.hidden_size}, {llm.num_attention_heads} heads "
            f"({llm.num_key_value_heads} of keys), MLP {llm.intermediate_size}, vocabulary {llm.vocab_size}, "
            f"{llm.max_position_embeddings} positions",
            f"  SigLIP  {siglip.layers} layers of width {siglip.width}, {siglip.heads} heads; images of "
            f"{siglip.image_size} px in patches of {siglip.patch_size} px",
            f"  UViT    {enc.num_blocks} + {config.uvit_decoder.num_blocks} blocks of {enc.channels} channels; latents "
            f"{channels} x {side} x {side}, {siglip.num_patches} image tokens",
        ]
        lines.append("\ntokenizer and processor")
        absent = [name for name in PROCESSOR_FILES if not (folder / name).is_file()]
        needed = [name for name in absent if name in ("tokenizer.json", "preprocessor_config.json")]
        problems += [f"{folder / name} is missing" for name in needed]
        if absent != needed:
            lines.append(f"  absent, the defaults are used: {', '.join(sorted(set(absent) - set(needed)))}")
        if (
            not needed
            and (processor := attempt(lambda: Processor.from_folder(folder, llm.vocab_size))) is not None
        ):
            names = (
                "bos_id",
                "eos_id",
                "pad_id",
                "image_id",
                "image_gen_id",
                "image_start_id",
                "image_end_id",
            )
            ids = (f"{name.removesuffix('_id')} {getattr(processor.tokenizer, name)}" for name in names)
            lines.append(f"  special ids  {', '.join(ids)}")
            size = processor.image_processor.image_size
            lines.append(f"  images  {size} px, {processor.num_image_tokens} tokens each")
            lines += normalization(processor.image_processor)
            attempt(lambda: check_processor_matches(folder, config, processor))
    lines.append("\nVAE")
    if vae is None and not (folder / "vae").is_dir():
        lines.append(f"  none inside; {SDXL_VAE} of the hub is used unless --vae names another")
    elif (
        built := attempt(
            lambda: build_vae(vae or folder / "vae", config.latent_channels if config else None, vae_header)
        )
    ) is not None:
        about = built[0].config
        lines.append(
            f"  AutoencoderKL: {about.latent_channels} latent channels, "
            f"1/{2 ** (len(about.block_out_channels) - 1)} of the side, scaling factor {about.scaling_factor}"
        )
        lines += [
            row for row in weights_table(built[1], ("AutoencoderKL",)) if not row.startswith("together")
        ]
    return lines, problems


def weights_table(stored: dict[str, Stored], parts: Iterable[str] = PARTS) -> list[str]:
    """Tensors, parameters, megabytes and dtypes of each part, then the files."""
    rows: dict[str, list[Stored]] = {part: [] for part in parts}
    for name, entry in stored.items():
        rows[part_of(name) if "llm" in rows else "AutoencoderKL"].append(entry)
    lines = [f"\n{'part':<26}{'tensors':>8}{'parameters':>16}{'MB':>10}  dtype on disk"]
    for part, entries in [*rows.items(), ("together", list(stored.values()))]:
        if entries:
            counts = [(math.prod(entry.shape), entry.dtype) for entry in entries]
            megabytes = sum(count * bytes_of(dtype) for count, dtype in counts) / 1e6
            dtypes = ", ".join(sorted({dtype for _, dtype in counts}))
            total = sum(count for count, _ in counts)
            lines.append(f"{part:<26}{len(entries):>8}{total:>16,}{megabytes:>10,.2f}  {dtypes}")
    files: dict[str, int] = {}
    for entry in stored.values():
        size = math.prod(entry.shape) * bytes_of(entry.dtype)
        files[entry.path.name] = files.get(entry.path.name, 0) + size
    return lines + [f"  {name}  {size / 1e6:,.2f} MB" for name, size in files.items()]


def normalization(images: ImageProcessor) -> list[str]:
    """What `preprocessor_config.json` says of it, beside what the published file is taken to say."""
    values = {"do_normalize": images.do_normalize, "mean": images.image_mean, "deviation": images.image_std}
    other = [key for key, value in values.items() if not _same(value, PUBLISHED[key])]
    verdict = f"differs in {', '.join(other)}" if other else "the same"
    return [
        "  " + ", ".join(f"{key} {_short(value)}" for key, value in values.items()),
        f"  JanusFlow-1.3B's file (inferred from its size, not confirmed): {verdict}",
        *([f"    {', '.join(f'{key} {_short(PUBLISHED[key])}' for key in other)}"] if other else []),
    ]


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(value, other, strict=True))
    return bool(value == other)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(f'{number:.6g}' for number in value)})"
    return "none" if value is None else str(value).lower()


def part_of(name: str) -> str:
    """The part of the model that an official key belongs to."""
    from ..official import POOLING_HEAD, from_official

    try:
        return PARTS[2] if name.startswith(POOLING_HEAD) else from_official(name).split(".")[0]
    except ValueError:
        return PARTS[-1]


def bytes_of(dtype: str) -> int:
    """Bytes of one number: "BF16" -> 2, "F8_E4M3" -> 1."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return max(1, int(digits or 8) // 8)
