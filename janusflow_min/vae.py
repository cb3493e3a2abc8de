# SPDX-License-Identifier: MIT
"""The image's latent space: diffusers' AutoencoderKL (SDXL's VAE officially), frozen.

The only import of diffusers, made when a VAE is first loaded; its weights are read here, as strictly as the model's.

Legend: B batch, C h w latent, H W pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import number, shown, whole
from .diagnose import explain_folder
from .files import printable, read_json, set_default_mode
from .official import VAE_FILES
from .weights import Header, Stored, build_module, check_state, read_header, read_tensors

CONFIG, WEIGHTS = VAE_FILES
# diffusers before 0.15 -> today
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NOT_COMPUTED = ("shift_factor", "latents_mean", "latents_std")  # of other models' latents
DEFAULTS = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4}
DEFAULTS |= {"block_out_channels": (64,), "layers_per_block": 1, "scaling_factor": 0.18215}  # diffusers'


class VAE(nn.Module):
    """Encodes to, and decodes from, latents in the flow's scale (times `scaling_factor`)."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.autoencoder: Any = autoencoder.eval().requires_grad_(False)
        self.scaling_factor = float(autoencoder.config.scaling_factor)
        self.latent_channels = int(autoencoder.config.latent_channels)
        self._compiled: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.decoder.parameters()).device

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the flow -> pixels (B, 3, H, W), about [-1, 1], in the VAE's dtype."""
        # Divide before casting, as the reference does: in bf16 the order matters for the last bit.
        z = (latents / self.scaling_factor).to(self.dtype)
        if self._compiled is None:
            return self.autoencoder.decode(z, return_dict=False)[0]
        decode, count = self._compiled
        pixels = []
        for part in z.split(count):
            full = torch.cat([part, part[-1:].expand(count - len(part), -1, -1, -1)])
            pixels.append(decode(full, return_dict=False)[0][: len(part)])
        return torch.cat(pixels)

    def compile_decoder(self, images: int) -> None:
        """torch.compile the decoder, at its first call and for so many images at once: others are filled up to that."""
        self._compiled = torch.compile(self.autoencoder.decode, dynamic=False), images

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents of the flow (B, C, h, w): the mean, or with a CPU `generator`
        a sample of the posterior."""
        if next(self.autoencoder.encoder.parameters()).device != self.device:  # it has waited on the CPU
            with torch.inference_mode(False), torch.no_grad():
                self.autoencoder.to(self.device)
        posterior = self.autoencoder.encode(pixels.to(self.dtype)).latent_dist
        z = posterior.mean
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, dtype=torch.float32, device="cpu").to(z)
            z = z + posterior.std * noise
        return z * self.scaling_factor


def check_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, if the VAE can run in it. ValueError if not."""
    if dtype not in (torch.float32, torch.bfloat16):
        reason = ": SDXL's VAE overflows in it, and images turn black" if dtype == torch.float16 else ""
        raise ValueError(
            f"the VAE runs in bfloat16 or float32, not {str(dtype).removeprefix('torch.')}{reason}"
        )
    return dtype


def load_vae(
    folder: str | Path, device: torch.device | str, dtype: torch.dtype, latent_channels: int | None = None
) -> VAE:
    """From a folder in diffusers' layout (config.json, diffusion_pytorch_model.safetensors), or one that holds it
    as `vae/`. latent_channels: the model's, where it is known. Its encoder waits on the CPU until something is encoded.
    Strict: see `build_vae`."""
    check_vae_dtype(dtype)
    autoencoder, stored = build_vae(folder, latent_channels)
    wanted = {name: stored[name] for name in autoencoder.state_dict()}
    encoder = {
        name: wanted.pop(name) for name in list(wanted) if name.startswith(("encoder.", "quant_conv."))
    }
    tensors = dict(read_tensors(wanted, device, dtype)) | dict(read_tensors(encoder, "cpu", dtype))
    autoencoder.load_state_dict(tensors, strict=True, assign=True)
    return VAE(autoencoder)


def save_vae(vae: VAE, folder: str | Path) -> None:
    """Write the folder in diffusers' layout. ValueError for a wrapped or offloaded one, before anything is written."""
    check_state("the VAE", vae.autoencoder, lambda: _autoencoder(vae.autoencoder.config))
    vae.autoencoder.save_pretrained(folder)
    set_default_mode(Path(folder))


def build_vae(
    folder: str | Path, latent_channels: int | None = None, header: Header = read_header
) -> tuple[Any, dict[str, Stored]]:
    """AutoencoderKL on the meta device, and where its weights lie; only JSON and headers are read.

    Raises FileNotFoundError for missing files; ValueError for broken ones, for weights that do not fit, and for
    settings that are not computed here.
    """
    # Before torch's default device is meta, where old versions cannot be imported.
    from diffusers import AutoencoderKL

    folder = Path(folder)
    if (folder / "vae" / CONFIG).is_file():
        folder = folder / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(f"no VAE at {folder}; vae_path takes a folder with diffusers' AutoencoderKL")
    path = folder / CONFIG
    config = DEFAULTS | read_json(path)
    if config["_class_name"] != AutoencoderKL.__name__:
        kind = printable(str(config["_class_name"]))
        raise ValueError(f"{path} describes a {kind:.80}; an AutoencoderKL is needed")
    for key in NOT_COMPUTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} = {shown(config[key])} is not supported, only null")
    number(f"{path}: scaling_factor", config["scaling_factor"], 0, above=True)
    for key in ("in_channels", "out_channels"):
        whole(f"{path}: {key}", config[key], 3, 3)
    channels = whole(f"{path}: latent_channels", config["latent_channels"])
    if latent_channels not in (None, channels):
        raise ValueError(f"the VAE in {folder} has {channels} latent channels, the model {latent_channels}")
    if not isinstance(widths := config["block_out_channels"], list | tuple):
        raise ValueError(f"{path}: block_out_channels must be a list, got {shown(widths)}")
    counts = {"layers_per_block": whole(f"{path}: layers_per_block", config["layers_per_block"])}
    counts["the number of block_out_channels"] = len(widths)
    if (found := header(folder / WEIGHTS)) is None:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{explain_folder(folder, WEIGHTS)}")
    stored = {_today(name): entry for name, entry in found.items()}
    return build_module(path, lambda: _autoencoder(config), counts, stored), stored


def _autoencoder(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    known = inspect.signature(AutoencoderKL).parameters
    return AutoencoderKL(**{key: value for key, value in config.items() if key in known})


def _today(name: str) -> str:
    """The name that diffusers gives a weight of the attention today."""
    before, attention, part = name.partition(".attentions.0.")
    old, dot, rest = part.partition(".")
    return f"{before}{attention}{OLD_NAMES[old]}{dot}{rest}" if old in OLD_NAMES else name
