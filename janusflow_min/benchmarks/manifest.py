# SPDX-License-Identifier: MIT
"""`manifest.json`: what a run was generated from and how. A rerun with anything else is refused."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import public_name, sha256
from ..sampling_options import SamplingOptions
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .runner import Settings


def write_manifest(
    folder: RunFolder,
    benchmark: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    checkpoint: Mapping[str, str],
    seed_rule: str,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Write the manifest, or compare it with the one there; returns it.

    inputs: name -> sha256. settings: everything that changes output, the benchmark's own choices included. Raises
    ValueError, naming every difference, where the folder was made from other inputs, settings or weights; other
    versions or another device are only reported, since they change last bits at most. All ranks may call this at once.
    """
    new = {
        "benchmark": benchmark,
        "inputs_sha256": dict(inputs),
        "settings": dict(settings),
        "seed_rule": seed_rule,
        "checkpoint": dict(checkpoint),
        "versions": versions(),
    }
    new = json.loads(json.dumps(new))  # tuples become lists, as they are when read
    if not folder.manifest.exists():
        folder.write_json(folder.manifest, new)
    old = folder.read_manifest()
    # A run from before there was an option of sampling has its default.
    usual = json.loads(json.dumps(SamplingOptions().resolved()))
    defaults = {name: value for name, value in usual.items() if name in new["settings"]}
    then = old | {"settings": defaults | old["settings"]}
    other = [line for line in differences(then, new) if not line.startswith("versions.")]
    if other:
        raise ValueError(
            f"{folder.root} was made with other settings; take another --out, or these: {'; '.join(other)}"
        )
    if old.get("versions") != new["versions"]:
        what = "; ".join(differences(then, new))
        log(f"{folder.root} was begun elsewhere, so last bits may differ between its images: {what}")
    return old


def differences(old: Any, new: Any, name: str = "", words: tuple[str, str] = ("there", "now")) -> list[str]:
    """What differs between two values as JSON holds them, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."), words)
        ]
    return [] if old == new else [f"{name}: {json.dumps(old)} {words[0]}, {json.dumps(new)} {words[1]}"]


def versions() -> dict[str, str]:
    """Of what computes pixels. Other versions or devices may change the last bits."""
    import torch

    from .. import __version__

    cuda = torch.cuda.is_available()
    return {
        "janusflow_min": __version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
    }


def checkpoint_identity(settings: Settings) -> dict[str, str]:
    """The names and hashes of the configuration and weights of the checkpoint, the VAE and adapters."""
    from ..hub import SDXL_VAE, resolve, resolve_vae
    from ..lora import find_lora

    folder = resolve(settings.model, revision=settings.revision)
    adapters = [find_lora(text) for text in settings.lora or ()]
    used = {f"lora {a['name']}:{a['scale']:g} sha256": _weights_sha256(a["source"]) for a in adapters}
    vae = resolve_vae(folder, settings.vae)
    return {
        "model": public_name(settings.model),
        "model_sha256": _weights_sha256(folder),
        "vae": "the checkpoint's" if vae == folder / "vae" else public_name(settings.vae or SDXL_VAE),
        "vae_sha256": _weights_sha256(vae),
        **used,
    }


def _weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def generation_settings(settings: Settings) -> dict[str, Any]:
    """What of `settings` changes pixels, "auto" resolved on this machine."""
    from ..devices import pick_device, pick_dtype

    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    usual = "float32" if _name(dtype) == "float16" else _name(dtype)
    return {
        **settings.resolved(),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "upstream_rounding": settings.upstream_rounding,
        "device_type": device.type,
        "dtype": _name(dtype),
        "vae_dtype": usual if settings.vae_dtype is None else _name(pick_dtype(settings.vae_dtype, device)),
        **({"quantization": settings.quantization} if settings.quantization else {}),
        "fast": settings.fast,
        "compile": settings.compile,
        "threads": settings.threads if device.type == "cpu" else None,
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
