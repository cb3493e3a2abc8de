# SPDX-License-Identifier: MIT
"""What is DeepSeek's in a checkpoint folder: names of files, names of weights, and the dialect of `config.json`.

`config.json` holds `language_config` (a Llama configuration) and three sections of the form `{cls, params}`. Unknown
keys are ignored, as the reference does; values that would change the numbers and are not computed here are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from .checks import shown, whole

# Files -----------------------------------------------------------------------

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
VAE_FILES = (CONFIG, "diffusion_pytorch_model.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR_FILES = (*_TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json")


def is_checkpoint_entry(name: str) -> bool:
    """Whether a file or folder of this name belongs to a checkpoint, and may be replaced with it."""
    return name in (CONFIG, WEIGHTS, INDEX, "vae", *PROCESSOR_FILES) or fnmatch(name, SHARDS)


# Weights -----------------------------------------------------------------------

PREFIXES = {  # official: ours; what follows the prefix is the same in both
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
    return _swap(name, PREFIXES)


def to_official(name: str) -> str:
    """Our key -> the official one; `from_official` read backwards."""
    return _swap(name, {ours: official for official, ours in PREFIXES.items()})


def _swap(name: str, table: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    if not fitting:
        raise ValueError(f"{name!r} is not a key of a JanusFlow checkpoint")
    longest = max(fitting, key=len)  # llm.lm_head. before llm.
    return table[longest] + name[len(longest) :]


# config.json -----------------------------------------------------------------------

_LARGE = dict(width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4.0)
_SO400M = dict(width=1152, layers=27, heads=16, patch_size=14, mlp_ratio=3.7362)
SIGLIP_PRESETS: dict[str, Any] = {  # the reference's SigLIP_MODEL_CONFIG; image_size comes from `params`
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
_UVIT_KEYS = {"hidden_size": "hidden_size", "norm_eps": "norm_eps", "use_bias": "bias"}  # theirs: ours


def config_from_json(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The content of `config.json` -> the arguments of `LlamaConfig`, `SiglipConfig` and both `UViTConfig`s.

    ValueError for another model's file, and for what is not computed here.
    """
    missing = [name for name in ("language_config", *SECTIONS) if not isinstance(data.get(name), Mapping)]
    if missing:
        kind = data.get("model_type", "unknown")
        hint = " (this looks like Janus or Janus-Pro)" if "gen_vision_config" in data else ""
        what = f"not a JanusFlow configuration: model_type {shown(kind)}{hint}"
        raise ValueError(f"{what}, section {', '.join(missing)} missing")
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
        common = {theirs: part[ours] for theirs, ours in _UVIT_KEYS.items()}
        blocks = {"layers_in_middle": part["num_blocks"], "use_mid_block": part["num_blocks"] > 0}
        return {"block_out_channels": [part["channels"]], "dropout": 0.0} | common | blocks | more

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
            raise ValueError(f"{where}: {key} = {shown(params[key])} is not supported, only {values[0]!r}")


def _params(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    name, params = data[section].get("cls", ""), data[section].get("params", {})
    if SECTIONS[section] not in str(name):
        raise ValueError(f"{section}: cls must be {SECTIONS[section]!r}, got {shown(name)}")
    if not isinstance(params, Mapping):
        raise ValueError(f"{section}: params must be an object, got {shown(params)}")
    return params


def _llama(data: Mapping[str, Any]) -> dict[str, Any]:
    where = "language_config"
    _only(where, data, model_type=("llama",), hidden_act=("silu", "swish"), tie_word_embeddings=(False,))
    _only(where, data, attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,))
    rope = data.get("rope_parameters") or {}  # how transformers 5 writes rope_theta and rope_scaling
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters must be an object, got {shown(rope)}")
    _only(where, rope, rope_type=("default",))
    given = {"rope_theta": rope.get("rope_theta")} | {k: v for k, v in data.items() if v is not None}
    return _LLAMA_DEFAULTS | {key: given[key] for key in _LLAMA_DEFAULTS if given.get(key) is not None}


def _siglip(params: Mapping[str, Any]) -> dict[str, Any]:
    where, name = "vision_und_enc_config", params.get("model_name", "siglip_large_patch16_384")
    _only(where, params, pixel_mean=(None,), pixel_std=(None,), select_layers=(None,))
    if not isinstance(name, str):
        raise ValueError(f"{where}: model_name must be str, got {shown(name)}")
    explicit = {key: params[key] for key in _LARGE if key in params}
    if name not in SIGLIP_PRESETS and len(explicit) < len(_LARGE):
        known = f"one of {', '.join(SIGLIP_PRESETS)}, and {', '.join(_LARGE)} are not all given"
        raise ValueError(f"{where}: model_name {shown(name)} is not {known}")
    sizes = SIGLIP_PRESETS.get(name, {}) | explicit
    layers, select = sizes["layers"], params.get("select_layer", -2)
    for key, value in (("layers", layers), ("select_layer", select)):
        whole(f"{where}: {key}", value, -(2**31), 2**31 - 1)
    kept = min(layers, layers + select + 1 if select <= 0 else select)
    return sizes | {"layers": kept, "image_size": params.get("image_size", 336)}


def _uvit(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What both parts have in common."""
    channels = params.get("block_out_channels", [768])
    if not isinstance(channels, list | tuple) or len(channels) != 1:
        raise ValueError(f"{where}: block_out_channels must hold one width, got {shown(channels)}")
    _only(where, params, dropout=(0.0,))
    blocks = params.get("layers_in_middle", 2) if params.get("use_mid_block", True) else 0
    given = {ours: params[theirs] for theirs, ours in _UVIT_KEYS.items() if theirs in params}
    return {"channels": channels[0], "num_blocks": blocks} | given


def _uvit_encoder(params: Mapping[str, Any]) -> dict[str, Any]:
    params = {"input_channels": 3, "kernel_size": 7, "stride": 4, "padding": None} | dict(params)
    form = {key: params[key] for key in ("kernel_size", "stride", "padding")}
    if form["padding"] is None:
        form["padding"] = form["kernel_size"] - form["stride"]
    common = _uvit(params, "vision_gen_enc_config")
    return common | form | {"in_channels": params["input_channels"], "out_channels": common["channels"]}


def _uvit_decoder(params: Mapping[str, Any]) -> dict[str, Any]:
    where = "vision_gen_dec_config"
    if "upsamples" not in params:
        default = "the reference's default, 2, does not fit"
        raise ValueError(f"{where}: upsamples is missing ({default}); 1 is supported")
    _only(where, params, upsamples=(1,))
    ends = {"in_channels": params.get("in_channels", 768), "out_channels": params.get("out_channels", 3)}
    return _uvit(params, where) | ends
