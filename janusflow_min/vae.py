# SPDX-License-Identifier: MIT
"""The picture's latent space: diffusers' AutoencoderKL (SDXL's VAE officially), frozen. The only import of
diffusers, made when a VAE is first loaded.

Legend: B batch, C h w latent, H W pixels.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import read_json

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class VAE(nn.Module):
    """Encodes to, and decodes from, latents in the flow's scale (times `scaling_factor`)."""

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scaling_factor = float(autoencoder.config.scaling_factor)
        self.latent_channels = int(autoencoder.config.latent_channels)
        self._decode = self.autoencoder.decode
        self.downscale = 2 ** (len(autoencoder.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the flow -> pixels (B, 3, H, W), about [-1, 1], in the VAE's dtype."""
        # Divide before casting, as the reference does: in bf16 the order matters for the last bit.
        return self._decode((latents / self.scaling_factor).to(self.dtype), return_dict=False)[0]

    def compile_decoder(self) -> None:
        """torch.compile the decoder; it compiles at its first call."""
        self._decode = torch.compile(self.autoencoder.decode, dynamic=False)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents of the flow (B, C, h, w): the mean, or with a CPU `generator`
        a sample of the posterior."""
        posterior = self.autoencoder.encode(pixels.to(self.dtype)).latent_dist
        z = posterior.mean
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator).to(z)
            z = z + posterior.std * noise
        return z * self.scaling_factor


def check_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        reason = ": SDXL's VAE overflows in it, and pictures turn black" if dtype == torch.float16 else ""
        raise ValueError(
            f"the VAE runs in bfloat16 or float32, not {str(dtype).removeprefix('torch.')}{reason}"
        )
    return dtype


def load_vae(folder: str | Path, device: torch.device, dtype: torch.dtype) -> VAE:
    """From a folder in diffusers' layout (config.json, diffusion_pytorch_model.safetensors), or one that holds it
    as `vae/`. Strict: missing, unexpected or mis-shaped weights raise ValueError."""
    check_vae_dtype(dtype)
    folder = Path(folder)
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not folder.is_dir():
        raise FileNotFoundError(f"no VAE at {folder}; vae_path takes a folder with diffusers' AutoencoderKL")
    kind = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"{folder / 'config.json'} describes a {kind}; an AutoencoderKL is needed")
    if not any(folder.glob("diffusion_pytorch_model*")):
        raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors")
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    if (autoencoder := _build(AutoencoderKL, folder, device, dtype)) is not None:
        return VAE(autoencoder)
    try:
        options = dict(torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False)
        with _quiet(logging):
            autoencoder, info = AutoencoderKL.from_pretrained(
                str(folder), output_loading_info=True, **options
            )
    except Exception as error:  # of many kinds, and all mean that the folder is not usable
        raise ValueError(f"the VAE in {folder} cannot be loaded: {error}") from error
    problems = [f"{kind.removesuffix('_keys')}: {keys}" for kind, keys in info.items() if keys]
    if problems:
        raise ValueError(f"the VAE in {folder} does not fit its config.json; {'; '.join(problems)}")
    return VAE(autoencoder.to(device))


def _build(kind: type, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """The autoencoder without the time to draw random weights first; None where the file is not one whole set of
    its weights under today's names, which diffusers then converts or explains."""
    try:
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        with torch.device("meta"):
            autoencoder = kind.from_config(read_json(folder / "config.json"))
        state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
        autoencoder.load_state_dict(state, strict=True, assign=True)
    except Exception:
        return None
    return autoencoder


@contextlib.contextmanager
def _quiet(logging):
    """diffusers warns about what the check after it reports."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
