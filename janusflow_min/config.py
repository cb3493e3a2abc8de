# SPDX-License-Identifier: MIT
"""What a checkpoint's `config.json` says, as frozen dataclasses.

Defaults are the released JanusFlow-1.3B, and every size of every module follows from here. Follows the reference's
`modeling_vlm.py` (`MultiModalityConfig`), the presets of `siglip_vit.py` and the arguments of `uvit.py`.

The file holds `language_config` (a Llama configuration) and three sections of the form `{cls, params}`. Unknown keys
are ignored, as the reference does; values that would change the numbers and that we do not compute are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import read_json

_LARGE = dict(width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4.0)
_SO400M = dict(width=1152, layers=27, heads=16, patch_size=14, mlp_ratio=3.7362)
SIGLIP_PRESETS = {  # the reference's SigLIP_MODEL_CONFIG; image_size comes from `params`
    "siglip_large_patch16_384": _LARGE,
    "siglip_large_patch16_256": _LARGE,
    "siglip_so400m_patch14_384": _SO400M,
    "siglip_so400m_patch14_224": _SO400M,
}
SECTIONS = {  # of config.json: the class that each must name
    "vision_und_enc_config": "CLIPVisionTower",
    "vision_gen_enc_config": "ShallowUViTEncoder",
    "vision_gen_dec_config": "ShallowUViTDecoder",
}


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
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JanusFlowConfig:
        """From the content of the official `config.json`; see the module's first lines."""
        missing = [name for name in ("language_config", *SECTIONS) if not isinstance(data.get(name), Mapping)]
        if missing:
            kind = data.get("model_type", "unknown")
            hint = " (this looks like Janus or Janus-Pro)" if "gen_vision_config" in data else ""
            raise ValueError(
                f"not a JanusFlow configuration: model_type {kind!r}{hint}, section {', '.join(missing)} missing"
            )
        und, enc, dec = (_params(data, section) for section in SECTIONS)
        return cls(_llama(data["language_config"]), _siglip(und), _uvit_encoder(enc), _uvit_decoder(dec))

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json` for this model; `from_dict` reads it back."""
        siglip, enc, dec = self.siglip, self.uvit_encoder, self.uvit_decoder
        und = {"image_size": siglip.image_size, "select_feature": "same", "select_layer": -1}
        sizes = {f.name: getattr(siglip, f.name) for f in fields(siglip) if f.name != "image_size"}
        fits = [n for n, p in SIGLIP_PRESETS.items() if p == sizes and n.endswith(f"_{siglip.image_size}")]
        # Explicit sizes override the preset: an extension of the official format, for models of other sizes.
        und |= {"model_name": fits[0]} if fits else {"model_name": "siglip_custom"} | sizes

        def uvit(part: UViTConfig, **more: Any) -> dict[str, Any]:
            common = {"block_out_channels": [part.channels], "hidden_size": part.hidden_size, "dropout": 0.0}
            blocks = {"layers_in_middle": part.num_blocks, "use_mid_block": part.num_blocks > 0}
            return common | blocks | {"norm_eps": part.norm_eps, "use_bias": part.bias} | more

        form = {"kernel_size": enc.kernel_size, "stride": enc.stride, "padding": enc.padding}
        params = (
            und,
            uvit(enc, input_channels=enc.in_channels, elementwize_affine=True, **form),
            uvit(
                dec,
                in_channels=dec.in_channels,
                out_channels=dec.out_channels,
                upsamples=1,
                elementwise_affine=True,
            ),
        )
        sections = {
            name: {"cls": cls, "model_type": name.removesuffix("_config"), "params": values}
            for (name, cls), values in zip(SECTIONS.items(), params, strict=True)
        }
        llm = {"model_type": "llama"} | {f.name: getattr(self.llm, f.name) for f in fields(self.llm)}
        kind = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality"}
        return kind | {"language_config": llm} | sections


def _check_numbers(config: Any, where: str, zero: tuple[str, ...] = ()) -> None:
    """Every field of its default's type, and above 0 but for those that may be 0."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (
            (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))
            or (kind is float and whole)
        ):
            raise ValueError(f"{where}: {f.name} must be {kind.__name__}, got {value!r}")
        if kind is not bool and not (0 < value < float("inf") or (value == 0 and f.name in zero)):
            raise ValueError(f"{where}: {f.name} must be above 0 and finite, got {value!r}")


def _only(where: str, params: Mapping[str, Any], **supported: tuple) -> None:
    """Refuse values that would change the numbers and that this library does not compute."""
    for key, values in supported.items():
        if key in params and params[key] not in values:
            raise ValueError(f"{where}: {key} = {params[key]!r} is not supported, only {values[0]!r}")


def _params(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    name, params = data[section].get("cls", ""), data[section].get("params", {})
    if SECTIONS[section] not in str(name):
        raise ValueError(f"{section}: cls must be {SECTIONS[section]!r}, got {name!r}")
    if not isinstance(params, Mapping):
        raise ValueError(f"{section}: params must be an object, got {params!r}")
    return params


def _llama(data: Mapping[str, Any]) -> LlamaConfig:
    where = "language_config"
    _only(where, data, model_type=("llama",), hidden_act=("silu", "swish"), tie_word_embeddings=(False,))
    _only(where, data, attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,))
    rope = data.get("rope_parameters") or {}  # how transformers 5 writes rope_theta and rope_scaling
    _only(where, rope, rope_type=("default",))
    defaults = {  # transformers' LlamaConfig, which the reference falls back to
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
    if "rope_theta" in rope:
        defaults["rope_theta"] = rope["rope_theta"]
    return LlamaConfig(
        **defaults | {f.name: data[f.name] for f in fields(LlamaConfig) if data.get(f.name) is not None}
    )


def _siglip(params: Mapping[str, Any]) -> SiglipConfig:
    where, name = "vision_und_enc_config", params.get("model_name", "siglip_large_patch16_384")
    _only(where, params, pixel_mean=(None,), pixel_std=(None,), select_layers=(None,))
    if not isinstance(name, str):
        raise ValueError(f"{where}: model_name must be str, got {name!r}")
    explicit = {key: params[key] for key in _LARGE if key in params}
    if name not in SIGLIP_PRESETS and len(explicit) < len(_LARGE):
        raise ValueError(
            f"{where}: model_name {name!r} is not one of {', '.join(SIGLIP_PRESETS)}, "
            f"and {', '.join(_LARGE)} are not all given"
        )
    sizes = SIGLIP_PRESETS.get(name, {}) | explicit
    layers, select = sizes["layers"], params.get("select_layer", -2)
    for key, value in (("layers", layers), ("select_layer", select)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be int, got {value!r}")
    kept = min(layers, layers + select + 1 if select <= 0 else select)
    return SiglipConfig(**sizes | {"layers": kept, "image_size": params.get("image_size", 336)})


def _uvit_common(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    channels = params.get("block_out_channels", [768])
    if not isinstance(channels, list | tuple) or len(channels) != 1:
        raise ValueError(f"{where}: block_out_channels must hold one width, got {channels!r}")
    _only(where, params, dropout=(0.0,))
    return dict(
        channels=channels[0],
        num_blocks=params.get("layers_in_middle", 2) if params.get("use_mid_block", True) else 0,
        hidden_size=params.get("hidden_size", 2048),
        norm_eps=params.get("norm_eps", 1e-6),
        bias=params.get("use_bias", True),
    )


def _uvit_encoder(params: Mapping[str, Any]) -> UViTConfig:
    common = _uvit_common(params, "vision_gen_enc_config")
    form = {"kernel_size": params.get("kernel_size", 7), "stride": params.get("stride", 4)}
    padding = params.get("padding")
    form["padding"] = form["kernel_size"] - form["stride"] if padding is None else padding
    return UViTConfig(params.get("input_channels", 3), common["channels"], **common, **form)


def _uvit_decoder(params: Mapping[str, Any]) -> UViTConfig:
    where = "vision_gen_dec_config"
    if "upsamples" not in params:
        raise ValueError(
            f"{where}: upsamples is missing (the reference's default, 2, does not fit); 1 is supported"
        )
    _only(where, params, upsamples=(1,))
    return UViTConfig(
        params.get("in_channels", 768), params.get("out_channels", 3), **_uvit_common(params, where)
    )
