# SPDX-License-Identifier: MIT
"""`config.json` in and out: what is read, what is ignored, what is refused and how."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, replace

import pytest

from janusflow_min.config import (
    JanusFlowConfig,
    LlamaConfig,
    SiglipConfig,
    UViTConfig,
)
from janusflow_min.files import read_json

# As the published config.json of JanusFlow-1.3B reads: most values of the language model are left to defaults.
OFFICIAL = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "language_config": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "vision_und_enc_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision_und_enc",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
        },
    },
    "vision_gen_enc_config": {
        "cls": "ShallowUViTEncoder",
        "model_type": "vision_gen_enc",
        "params": {
            "block_out_channels": [768],
            "dropout": 0.0,
            "elementwize_affine": True,
            "hidden_size": 2048,
            "input_channels": 4,
            "kernel_size": 2,
            "layers_in_middle": 2,
            "norm_eps": 1e-6,
            "num_extra_tensors": 5,
            "padding": 0,
            "stride": 2,
            "use_bias": True,
            "use_mid_block": True,
        },
    },
    "vision_gen_dec_config": {
        "cls": "ShallowUViTDecoder",
        "model_type": "vision_gen_dec",
        "params": {
            "block_out_channels": [768],
            "dropout": 0.0,
            "elementwise_affine": True,
            "hidden_size": 2048,
            "in_channels": 768,
            "layers_in_middle": 2,
            "norm_eps": 1e-6,
            "out_channels": 4,
            "upsamples": 1,
            "use_bias": True,
            "use_mid_block": True,
        },
    },
}
UND, ENC, DEC = "vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config"


def changed(section: str, drop: tuple[str, ...] = (), **values) -> dict:
    """The official content with values of one section set or dropped."""
    data = copy.deepcopy(OFFICIAL)
    place = data[section] if section == "language_config" else data[section]["params"]
    place.update(values)
    for key in drop:
        del place[key]
    return data


# Reading --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_released_model():
    """Stops: a default that drifts from JanusFlow-1.3B."""
    config = JanusFlowConfig()
    assert JanusFlowConfig.from_dict(OFFICIAL) == config
    llm = config.llm
    assert (llm.num_key_value_heads, llm.head_dim, llm.rms_norm_eps, llm.rope_theta) == (16, 128, 1e-6, 1e4)
    assert config.siglip.num_patches == 576 and config.latent_channels == 4 and config.latent_stride == 2
    assert config.uvit_decoder == UViTConfig(in_channels=768, out_channels=4)


def test_missing_keys_of_the_language_model_are_the_usual_llama():
    """Stops: missing keys that take JanusFlow's own sizes although the reference falls back to Llama's."""
    data = copy.deepcopy(OFFICIAL)
    data["language_config"] = {"model_type": "llama"}
    for section in (ENC, DEC):
        data[section]["params"]["hidden_size"] = 4096
    llm = JanusFlowConfig.from_dict(data).llm
    assert llm == LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    assert llm.num_key_value_heads == 32 and llm.rms_norm_eps == 1e-6 and llm.rope_theta == 10000.0


def test_null_means_missing():
    """Stops: `"head_dim": null`, as transformers writes it, taken for a value."""
    data = changed("language_config", head_dim=None, num_key_value_heads=None, rope_scaling=None)
    assert JanusFlowConfig.from_dict(data) == JanusFlowConfig()


def test_grouped_heads_and_other_values_are_read():
    """Stops: a key that is read nowhere, or from another section."""
    llm = JanusFlowConfig.from_dict(
        changed("language_config", num_key_value_heads=4, rope_theta=500000, rms_norm_eps=1e-5, head_dim=128)
    ).llm
    assert (llm.num_key_value_heads, llm.rope_theta, llm.rms_norm_eps, llm.head_dim) == (4, 500000, 1e-5, 128)
    enc = JanusFlowConfig.from_dict(
        changed(ENC, layers_in_middle=3, norm_eps=1e-5, use_bias=False)
    ).uvit_encoder
    assert (enc.num_blocks, enc.norm_eps, enc.bias) == (3, 1e-5, False)
    dec = JanusFlowConfig.from_dict(changed(DEC, use_mid_block=False)).uvit_decoder
    assert dec.num_blocks == 0


@pytest.mark.parametrize(
    "name, size, wanted",
    [
        ("siglip_large_patch16_384", 384, SiglipConfig()),
        ("siglip_large_patch16_256", 256, SiglipConfig(image_size=256)),
        (
            "siglip_so400m_patch14_384",
            384,
            SiglipConfig(patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
        ),
        (
            "siglip_so400m_patch14_224",
            224,
            SiglipConfig(image_size=224, patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
        ),
    ],
)
def test_presets(name, size, wanted):
    """Stops: a preset of the reference that is missing or has other sizes."""
    config = JanusFlowConfig.from_dict(changed(UND, model_name=name, image_size=size))
    assert config.siglip == wanted
    assert config.to_dict()[UND]["params"]["model_name"] == name


def test_explicit_sizes_override_the_preset():
    """Stops: sizes in the file that lose against `model_name`, and presets that others then find changed."""
    assert JanusFlowConfig.from_dict(changed(UND, layers=5, mlp_ratio=2)).siglip == SiglipConfig(
        layers=5, mlp_ratio=2
    )
    assert JanusFlowConfig.from_dict(OFFICIAL) == JanusFlowConfig()


def test_an_unknown_preset_needs_all_sizes():
    """Stops: an unknown encoder silently taken for the default one."""
    with pytest.raises(ValueError, match=r"model_name 'clip'.*siglip_large_patch16_384.*mlp_ratio"):
        JanusFlowConfig.from_dict(changed(UND, model_name="clip", width=8, layers=1, heads=1, patch_size=4))
    data = changed(
        UND, model_name="clip", width=8, layers=1, heads=1, patch_size=4, mlp_ratio=2, image_size=8
    )
    assert JanusFlowConfig.from_dict(data).siglip == SiglipConfig(8, 4, 8, 1, 1, 2)


@pytest.mark.parametrize("select, layers", [(-1, 24), (-2, 23), (-24, 1), (3, 3), (24, 24)])
def test_select_layer_drops_the_last_layers(select, layers):
    """Stops: -1 that drops a layer, -k that drops k."""
    assert JanusFlowConfig.from_dict(changed(UND, select_layer=select)).siglip.layers == layers


def test_select_layer_s_default_is_the_reference_s():
    """Stops: a missing `select_layer` taken for -1: the reference's default is -2."""
    assert JanusFlowConfig.from_dict(changed(UND, drop=("select_layer",))).siglip.layers == 23


def test_unknown_keys_are_ignored():
    """Stops: a refusal of the official file, which holds keys nobody uses."""
    data = changed(ENC, num_extra_tensors=99, anything=[1]) | {"new": 1}
    data["language_config"]["use_cache"] = True
    assert JanusFlowConfig.from_dict(data) == JanusFlowConfig()


# Writing --------------------------------------------------------------------------------------------------------


def variants() -> list[JanusFlowConfig]:
    base = JanusFlowConfig()
    llm = replace(base.llm, num_key_value_heads=4, rope_theta=5e5, rms_norm_eps=1e-5, vocab_size=10)
    enc = replace(base.uvit_encoder, num_blocks=0, bias=False, norm_eps=1e-4, channels=8, out_channels=8)
    dec = replace(base.uvit_decoder, channels=8, in_channels=5, num_blocks=3)
    return [
        base,
        replace(base, llm=llm),
        replace(base, siglip=SiglipConfig(32, 8, 24, 3, 4, 3.5)),
        replace(base, siglip=SiglipConfig(layers=23)),
        replace(base, siglip=SiglipConfig(image_size=512)),
        replace(base, uvit_encoder=enc, uvit_decoder=dec),
    ]


@pytest.mark.parametrize("config", variants(), ids=range(6))
def test_what_is_written_is_read_back(config):
    """Stops: a value that is lost or renamed when a model is saved."""
    text = json.dumps(config.to_dict())
    assert JanusFlowConfig.from_dict(json.loads(text)) == config


def test_the_official_values_are_written_under_the_official_keys():
    """Stops: a file that only we can read: every key that the reference reads must hold what it held."""
    written = JanusFlowConfig.from_dict(OFFICIAL).to_dict()
    for section in ("language_config", UND, ENC, DEC):
        ours, theirs = written[section], OFFICIAL[section]
        if section != "language_config":
            assert (ours["cls"], ours["model_type"]) == (theirs["cls"], theirs["model_type"])
            ours, theirs = ours["params"], theirs["params"]
        unused = {"torch_dtype", "num_extra_tensors", "elementwize_affine", "elementwise_affine"}
        assert {k: v for k, v in ours.items() if k in theirs and k not in unused} == {
            k: v for k, v in theirs.items() if k not in unused
        }
    assert (written["model_type"], written["architectures"]) == ("multi_modality", ["MultiModalityCausalLM"])


def test_the_recorded_checkpoint_s_file_is_read(parity_dir):
    """Stops: `from_file` that reads another form than the official files have."""
    config = JanusFlowConfig.from_file(parity_dir / "config.json")
    assert (config.llm.hidden_size, config.llm.num_hidden_layers, config.llm.vocab_size) == (64, 3, 640)
    assert config.siglip == SiglipConfig(64, 16, 32, 2, 2, 4)
    assert config.uvit_encoder == UViTConfig(4, 24, 24, 2, 64)


def test_configurations_are_frozen():
    """Stops: a component that edits the configuration others share."""
    with pytest.raises(FrozenInstanceError):
        JanusFlowConfig().llm.vocab_size = 5


# Refusing -------------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    ("language_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("language_config", "attention_bias", True),
    ("language_config", "mlp_bias", True),
    ("language_config", "tie_word_embeddings", True),
    ("language_config", "hidden_act", "gelu"),
    ("language_config", "model_type", "qwen2"),
    (ENC, "dropout", 0.1),
    (DEC, "dropout", 0.1),
    (DEC, "upsamples", 2),
    (ENC, "block_out_channels", [768, 768]),
    (DEC, "block_out_channels", []),
    (ENC, "kernel_size", 4),
    (ENC, "stride", 4),
    (ENC, "padding", 1),
    (UND, "select_layers", [1, 2]),
    (UND, "pixel_mean", [0.5, 0.5, 0.5]),
]


@pytest.mark.parametrize("section, key, value", UNSUPPORTED, ids=lambda v: str(v)[:24])
def test_values_that_we_do_not_compute_are_refused_by_name(section, key, value):
    """Stops: a model that loads and computes other numbers than it was trained with."""
    with pytest.raises(ValueError) as error:
        JanusFlowConfig.from_dict(changed(section, **{key: value}))
    assert key in str(error.value) and section in str(error.value)


WRONG = [
    ("language_config", "vocab_size", "640"),
    ("language_config", "vocab_size", 0),
    ("language_config", "hidden_size", -2048),
    ("language_config", "num_hidden_layers", 2.5),
    ("language_config", "num_hidden_layers", True),
    ("language_config", "num_attention_heads", 0),
    ("language_config", "max_position_embeddings", 0),
    ("language_config", "rope_theta", "1e4"),
    ("language_config", "rope_theta", 0),
    ("language_config", "rms_norm_eps", -1e-6),
    ("language_config", "num_key_value_heads", 3),
    ("language_config", "num_key_value_heads", -1),
    ("language_config", "head_dim", 64),
    (UND, "image_size", 0),
    (UND, "image_size", "384"),
    (UND, "width", 0),
    (UND, "heads", 7),
    (UND, "patch_size", 0),
    (UND, "patch_size", 1000),
    (UND, "layers", 0),
    (UND, "mlp_ratio", "4"),
    (UND, "mlp_ratio", 0),
    (ENC, "input_channels", 0),
    (ENC, "hidden_size", 0),
    (ENC, "layers_in_middle", -1),
    (ENC, "norm_eps", 0),
    (ENC, "use_bias", 1),
    (DEC, "in_channels", None),
    (DEC, "out_channels", 0),
]


@pytest.mark.parametrize("section, key, value", WRONG, ids=lambda v: str(v)[:24])
def test_wrong_types_and_sizes_are_refused_by_name(section, key, value):
    """Stops: a stack trace from deep inside PyTorch in place of the key's name."""
    names = {"input_channels": "channels", "use_bias": "bias", "layers_in_middle": "num_blocks"}
    with pytest.raises(ValueError) as error:
        JanusFlowConfig.from_dict(changed(section, **{key: value}))
    assert names.get(key, key) in str(error.value) and section.split("_config")[0] in str(error.value)


@pytest.mark.parametrize(
    "section, key, value",
    [
        (UND, "select_layer", "-1"),
        (UND, "select_layer", None),
        (UND, "select_layer", -25),
        (UND, "layers", "24"),
        (UND, "layers", None),
        (ENC, "kernel_size", "2"),
        (ENC, "kernel_size", None),
        (ENC, "block_out_channels", [None]),
        (ENC, "block_out_channels", 768),
        (UND, "model_name", ["siglip_large_patch16_384"]),
    ],
    ids=lambda v: str(v)[:24],
)
def test_odd_values_end_in_an_error_that_names_the_file(tmp_path, section, key, value):
    """Stops: arithmetic on what is no number, reported without the file that holds it."""
    (tmp_path / "config.json").write_text(json.dumps(changed(section, **{key: value})))
    with pytest.raises(ValueError, match=r"config\.json"):
        JanusFlowConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("key, section", [("hidden_size", ENC), ("hidden_size", DEC), ("out_channels", DEC)])
def test_parts_must_fit_together(key, section):
    """Stops: parts of different widths, found only when tensors meet."""
    with pytest.raises(ValueError, match=key if key == "hidden_size" else "latent channels"):
        JanusFlowConfig.from_dict(changed(section, **{key: 1024}))


def test_the_long_skip_must_fit():
    """Stops: an encoder whose skip the decoder cannot take."""
    with pytest.raises(ValueError, match="skip"):
        JanusFlowConfig.from_dict(changed(ENC, block_out_channels=[512]))


def test_upsamples_must_be_given():
    """Stops: the reference's own default, 2, which fits nothing."""
    with pytest.raises(ValueError, match="upsamples"):
        JanusFlowConfig.from_dict(changed(DEC, drop=("upsamples",)))


def test_janus_pro_is_named():
    """Stops: a sister model's file that fails on some key deep inside."""
    data = {
        "model_type": "multi_modality",
        "language_config": OFFICIAL["language_config"],
        "vision_config": {"cls": "CLIPVisionTower", "params": {}},
        "gen_vision_config": {"cls": "VQ-16", "params": {}},
    }
    with pytest.raises(ValueError, match=r"not a JanusFlow.*Janus-Pro.*vision_gen_enc_config"):
        JanusFlowConfig.from_dict(data)


@pytest.mark.parametrize(
    "data", [OFFICIAL["language_config"], {}, {"language_config": 5}], ids=["llama", "{}", "5"]
)
def test_another_model_is_named(data):
    """Stops: a plain Llama read as a JanusFlow whose other parts take defaults."""
    with pytest.raises(ValueError, match=r"not a JanusFlow.*language_config.*vision_und_enc_config"):
        JanusFlowConfig.from_dict(data)


@pytest.mark.parametrize("section", [UND, ENC, DEC])
def test_another_class_is_refused(section):
    """Stops: a part of another architecture under our keys."""
    data = copy.deepcopy(OFFICIAL)
    data[section]["cls"] = "VQ-16"
    with pytest.raises(ValueError, match=rf"{section}: cls must be .* 'VQ-16'"):
        JanusFlowConfig.from_dict(data)
    data[section] = OFFICIAL[section] | {"params": [1]}
    with pytest.raises(ValueError, match=rf"{section}: params must be an object"):
        JanusFlowConfig.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"null"], ids=str)
def test_a_broken_file_is_named(tmp_path, content):
    """Stops: a decoder's message without the file that caused it."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        JanusFlowConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    """Stops: defaults in place of a file that is not there."""
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        JanusFlowConfig.from_file(tmp_path / "none.json")
    assert read_json(tmp_path / "none.json", required=False) == {}


def test_the_newer_form_of_rope_settings():
    """Stops a rotary base, or a scaling, that transformers 5 wrote from being dropped in silence."""
    data = JanusFlowConfig().to_dict()
    del data["language_config"]["rope_theta"]
    data["language_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert JanusFlowConfig.from_dict(data).llm.rope_theta == 5e5
    data["language_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope_type"):
        JanusFlowConfig.from_dict(data)


@pytest.mark.parametrize("key, value", [("select_layer", "-1"), ("select_layer", None), ("model_name", [1])])
def test_siglip_values_of_a_wrong_type(key, value):
    """Stops an error that does not name the key."""
    data = JanusFlowConfig().to_dict()
    data["vision_und_enc_config"]["params"][key] = value
    with pytest.raises(ValueError, match=key):
        JanusFlowConfig.from_dict(data)
