# SPDX-License-Identifier: MIT
"""The sizes of every module, as frozen dataclasses; the defaults are the released JanusFlow-1.3B.

Follows the reference's `modeling_vlm.py` (`MultiModalityConfig`), the presets of `siglip_vit.py` and the arguments of
`uvit.py`. How a checkpoint's `config.json` says them is in `official.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .checks import flag, number, whole
from .files import read_json
from .official import config_from_json, config_to_json


@dataclass(frozen=True)
class LlamaConfig:
    """The language model. 0 for key/value heads or head_dim means the usual: all heads, hidden_size / heads."""

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        where, heads = "language_config", self.num_attention_heads
        _check_numbers(self, where, zero=("num_key_value_heads", "head_dim"))
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if heads * self.head_dim != self.hidden_size or self.head_dim % 2:
            raise ValueError(
                f"{where}: {heads} heads of {self.head_dim} do not make hidden_size {self.hidden_size} "
                "(head_dim must be even)"
            )


@dataclass(frozen=True)
class SiglipConfig:
    """The understanding encoder, a ViT without class token. `layers` already has `select_layer` applied."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_numbers(self, "vision_und_enc_config")
        if self.width % self.heads or self.image_size < self.patch_size:
            raise ValueError(
                f"vision_und_enc_config: width {self.width} must be a multiple of heads {self.heads}, and "
                f"image_size {self.image_size} at least patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class UViTConfig:
    """ShallowUViT encoder or decoder. `channels` is the width at the token grid (`block_out_channels`).

    Encoder: `in_channels` latent channels in, `channels` features out, one strided convolution of `stride`.
    Decoder: `in_channels` from the aligner plus a skip of `channels`, `out_channels` of velocity out.
    """

    in_channels: int = 4
    out_channels: int = 768
    channels: int = 768
    num_blocks: int = 2
    hidden_size: int = 2048  # of t_emb
    norm_eps: float = 1e-6
    bias: bool = True
    kernel_size: int = 2
    stride: int = 2
    padding: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, "vision_gen_enc_config or vision_gen_dec_config", zero=("padding", "num_blocks"))


@dataclass(frozen=True)
class JanusFlowConfig:
    """The whole model. `JanusFlowConfig()` is JanusFlow-1.3B; `from_file` reads any other."""

    llm: LlamaConfig = field(default_factory=LlamaConfig)
    siglip: SiglipConfig = field(default_factory=SiglipConfig)
    uvit_encoder: UViTConfig = field(default_factory=UViTConfig)
    uvit_decoder: UViTConfig = field(default_factory=lambda: UViTConfig(in_channels=768, out_channels=4))

    def __post_init__(self) -> None:
        enc, dec, width = self.uvit_encoder, self.uvit_decoder, self.llm.hidden_size
        if not enc.hidden_size == dec.hidden_size == width:
            raise ValueError(
                f"config: t_emb takes a place in the LLM, so hidden_size of both UViT parts "
                f"({enc.hidden_size}, {dec.hidden_size}) must be the LLM's, {width}"
            )
        if enc.in_channels != dec.out_channels:
            raise ValueError(
                f"config: the encoder reads {enc.in_channels} latent channels, the decoder writes {dec.out_channels}"
            )
        if enc.channels != dec.channels:
            raise ValueError(
                f"config: the long skip carries {enc.channels} channels, the decoder expects {dec.channels}"
            )
        if (enc.kernel_size, enc.stride, enc.padding) != (2, 2, 0):
            raise ValueError(
                "vision_gen_enc_config: kernel_size, stride, padding must be 2, 2, 0 (the decoder doubles the grid "
                f"once), got {enc.kernel_size}, {enc.stride}, {enc.padding}"
            )

    @property
    def latent_channels(self) -> int:
        return self.uvit_encoder.in_channels

    @property
    def latent_stride(self) -> int:
        """Latent cells per image token and side."""
        return self.uvit_encoder.stride

    @classmethod
    def from_file(cls, path: str | Path) -> JanusFlowConfig:
        """Read `config.json`. Raises FileNotFoundError or ValueError, which names the file and the key."""
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JanusFlowConfig:
        """From the content of the official `config.json`."""
        llm, siglip, encoder, decoder = config_from_json(data)
        return cls(LlamaConfig(**llm), SiglipConfig(**siglip), UViTConfig(**encoder), UViTConfig(**decoder))

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json` for this model; `from_dict` reads it back."""
        parts = (self.llm, self.siglip, self.uvit_encoder, self.uvit_decoder)
        return config_to_json(*(asdict(part) for part in parts))


def _check_numbers(config: Any, where: str, zero: tuple[str, ...] = ()) -> None:
    """Every field of its default's type, and above 0 but for those that may be 0."""
    for f in fields(config):
        name, value = f"{where}: {f.name}", getattr(config, f.name)
        if isinstance(f.default, bool):
            flag(name, value)
        elif isinstance(f.default, int):
            whole(name, value, 0 if f.name in zero else 1, 2**31 - 1)
        else:
            number(name, value, 0, above=True)
