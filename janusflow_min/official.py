# SPDX-License-Identifier: MIT
"""What is DeepSeek's in a checkpoint folder: names of files, names of weights, and the dialect of `config.json`.

Inside the modules the official names stay, but for the ten prefixes of `PREFIXES`; the table is read in both
directions. `config.json` holds `language_config` (a Llama configuration) and three sections of the form
`{cls, params}`. Unknown keys are ignored, as the reference does; values that would change the numbers and that are
not computed here are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

# Files -----------------------------------------------------------------------

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
VAE_FILES = (CONFIG, "diffusion_pytorch_model.safetensors")
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def is_checkpoint_entry(name: str) -> bool:
    """Whether a file or folder of this name belongs to a checkpoint, and may be replaced with it."""
    return name in (CONFIG, WEIGHTS, INDEX, "vae", *PROCESSOR_FILES) or fnmatch(name, SHARDS)


# Weights -----------------------------------------------------------------------

PREFIXES = {  # official: ours
    "language_model.model.": "llm.",
    "language_model.lm_head.": "llm.lm_head.",
    "vision_und_enc_model.vision_tower.": "siglip.",
    "vision_und_enc_aligner.": "und_aligner.",
    "beg_of_und_embed": "und_begin",
    "vision_gen_enc_model.": "uvit_encoder.",
    "vision_gen_enc_aligner.": "gen_in_aligner.",
    "vision_gen_dec_aligner_norm.": "gen_out_norm.",
    "vision_gen_dec_aligner.": "gen_out_aligner.",
    "vision_gen_dec_model.": "uvit_decoder.",
}
POOLING_HEAD = "vision_und_enc_model.vision_tower.attn_pool."  # in the official file, used by nobody
LEFTOVERS = (".rotary_emb.inv_freq", ".position_ids")  # buffers that older tools write and nobody needs


def from_official(name: str) -> str:
    """Official key -> ours. ValueError where no prefix fits."""
    return _swap(name, PREFIXES.items())


def to_official(name: str) -> str:
    """Our key -> the official one; `from_official` read backwards."""
    return _swap(name, ((ours, official) for official, ours in PREFIXES.items()))


def _swap(name: str, table: Iterable[tuple[str, str]]) -> str:
    fitting = [(old, new) for old, new in table if name.startswith(old)]
    if not fitting:
        raise ValueError(f"{name!r} is not a key of a JanusFlow checkpoint")
    old, new = max(fitting, key=lambda pair: len(pair[0]))  # llm.lm_head. before llm.
    return new + name[len(old) :]


# config.json -----------------------------------------------------------------------

_LARGE = dict(width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4.0)
_SO400M = dict(width=1152, layers=27, heads=16, patch_size=14, mlp_ratio=3.7362)
SIGLIP_PRESETS: dict[
    str, dict[str, Any]
] = {  # the reference's SigLIP_MODEL_CONFIG; image_size comes from `params`
    "siglip_large_patch16_384": _LARGE,
    "siglip_large_patch16_256": _LARGE,
    "siglip_so400m_patch14_384": _SO400M,
    "siglip_so400m_patch14_224": _SO400M,
}
SECTIONS = {  # the class that each must name
    "vision_und_enc_config": "CLIPVisionTower",
    "vision_gen_enc_config": "ShallowUViTEncoder",
    "vision_gen_dec_config": "ShallowUViTDecoder",
}
_LLAMA_DEFAULTS: dict[str, Any] = {  # transformers' LlamaConfig, which the reference falls back to
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 0,  # all of them
    "head_dim": 0,  # hidden_size / heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def config_from_json(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The content of `config.json` -> the arguments of `LlamaConfig`, `SiglipConfig` and both `UViTConfig`s.

    ValueError for another model's file, and for what is not computed here.
    """
    missing = [name for name in ("language_config", *SECTIONS) if not isinstance(data.get(name), Mapping)]
    if missing:
        kind = data.get("model_type", "unknown")
        hint = " (this looks like Janus or Janus-Pro)" if "gen_vision_config" in data else ""
        raise ValueError(
            f"not a JanusFlow configuration: model_type {kind!r:.80}{hint}, section {', '.join(missing)} missing"
        )
    und, enc, dec = (_params(data, section) for section in SECTIONS)
    return _llama(data["language_config"]), _siglip(und), _uvit_encoder(enc), _uvit_decoder(dec)


def config_to_json(
    llm: Mapping[str, Any], siglip: Mapping[str, Any], encoder: Mapping[str, Any], decoder: Mapping[str, Any]
) -> dict[str, Any]:
    """The official `config.json` of these sizes; `config_from_json` reads it back."""
    und = {"image_size": siglip["image_size"], "select_feature": "same", "select_layer": -1}
    sizes = {key: value for key, value in siglip.items() if key != "image_size"}
    fits = [n for n, p in SIGLIP_PRESETS.items() if p == sizes and n.endswith(f"_{siglip['image_size']}")]
    # Explicit sizes override the preset: an extension of the official format, for models of other sizes.
    und |= {"model_name": fits[0]} if fits else {"model_name": "siglip_custom"} | sizes

    def uvit(part: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        common = {
            "block_out_channels": [part["channels"]],
            "hidden_size": part["hidden_size"],
            "dropout": 0.0,
        }
        blocks = {"layers_in_middle": part["num_blocks"], "use_mid_block": part["num_blocks"] > 0}
        return common | blocks | {"norm_eps": part["norm_eps"], "use_bias": part["bias"]} | more

    form = {key: encoder[key] for key in ("kernel_size", "stride", "padding")}
    ends = {key: decoder[key] for key in ("in_channels", "out_channels")}
    params = (
        und,
        uvit(encoder, input_channels=encoder["in_channels"], elementwize_affine=True, **form),
        uvit(decoder, **ends, upsamples=1, elementwise_affine=True),
    )
    sections = {
        name: {"cls": cls, "model_type": name.removesuffix("_config"), "params": values}
        for (name, cls), values in zip(SECTIONS.items(), params, strict=True)
    }
    kind = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality"}
    return kind | {"language_config": {"model_type": "llama"} | dict(llm)} | sections


def _only(where: str, params: Mapping[str, Any], **supported: tuple) -> None:
    """Refuse values that would change the numbers and that are not computed here."""
    for key, values in supported.items():
        if key in params and params[key] not in values:
            raise ValueError(f"{where}: {key} = {params[key]!r:.80} is not supported, only {values[0]!r}")


def _params(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    name, params = data[section].get("cls", ""), data[section].get("params", {})
    if SECTIONS[section] not in str(name):
        raise ValueError(f"{section}: cls must be {SECTIONS[section]!r}, got {name!r:.80}")
    if not isinstance(params, Mapping):
        raise ValueError(f"{section}: params must be an object, got {params!r:.80}")
    return params


def _llama(data: Mapping[str, Any]) -> dict[str, Any]:
    where = "language_config"
    _only(where, data, model_type=("llama",), hidden_act=("silu", "swish"), tie_word_embeddings=(False,))
    _only(where, data, attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,))
    rope = data.get("rope_parameters") or {}  # how transformers 5 writes rope_theta and rope_scaling
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters must be an object, got {rope!r:.80}")
    _only(where, rope, rope_type=("default",))
    given = {"rope_theta": rope.get("rope_theta")} | {k: v for k, v in data.items() if v is not None}
    return _LLAMA_DEFAULTS | {key: given[key] for key in _LLAMA_DEFAULTS if given.get(key) is not None}


def _siglip(params: Mapping[str, Any]) -> dict[str, Any]:
    where, name = "vision_und_enc_config", params.get("model_name", "siglip_large_patch16_384")
    _only(where, params, pixel_mean=(None,), pixel_std=(None,), select_layers=(None,))
    if not isinstance(name, str):
        raise ValueError(f"{where}: model_name must be str, got {name!r:.80}")
    explicit = {key: params[key] for key in _LARGE if key in params}
    if name not in SIGLIP_PRESETS and len(explicit) < len(_LARGE):
        raise ValueError(
            f"{where}: model_name {name!r:.80} is not one of {', '.join(SIGLIP_PRESETS)}, "
            f"and {', '.join(_LARGE)} are not all given"
        )
    sizes = SIGLIP_PRESETS.get(name, {}) | explicit
    layers, select = sizes["layers"], params.get("select_layer", -2)
    for key, value in (("layers", layers), ("select_layer", select)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be int, got {value!r:.80}")
    kept = min(layers, layers + select + 1 if select <= 0 else select)
    return sizes | {"layers": kept, "image_size": params.get("image_size", 336)}


def _uvit_common(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    channels = params.get("block_out_channels", [768])
    if not isinstance(channels, list | tuple) or len(channels) != 1:
        raise ValueError(f"{where}: block_out_channels must hold one width, got {channels!r:.80}")
    _only(where, params, dropout=(0.0,))
    return dict(
        channels=channels[0],
        num_blocks=params.get("layers_in_middle", 2) if params.get("use_mid_block", True) else 0,
        hidden_size=params.get("hidden_size", 2048),
        norm_eps=params.get("norm_eps", 1e-6),
        bias=params.get("use_bias", True),
    )


def _uvit_encoder(params: Mapping[str, Any]) -> dict[str, Any]:
    where = "vision_gen_enc_config"
    form = {"kernel_size": params.get("kernel_size", 7), "stride": params.get("stride", 4)}
    form["padding"] = params.get("padding")
    if form["padding"] is None:
        form["padding"] = form["kernel_size"] - form["stride"]
    common = _uvit_common(params, where)
    return (
        common | form | {"in_channels": params.get("input_channels", 3), "out_channels": common["channels"]}
    )


def _uvit_decoder(params: Mapping[str, Any]) -> dict[str, Any]:
    where = "vision_gen_dec_config"
    if "upsamples" not in params:
        raise ValueError(
            f"{where}: upsamples is missing (the reference's default, 2, does not fit); 1 is supported"
        )
    _only(where, params, upsamples=(1,))
    ends = {"in_channels": params.get("in_channels", 768), "out_channels": params.get("out_channels", 3)}
    return _uvit_common(params, where) | ends
