# SPDX-License-Identifier: MIT
"""The understanding encoder against transformers' SiglipVisionModel."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from janusflow_min.config import SiglipConfig
from janusflow_min.official import SIGLIP_PRESETS
from janusflow_min.siglip import Siglip

SIZES = {
    "square grid": dict(image_size=32, patch_size=8, width=24, layers=3, heads=4, mlp_ratio=4.0),
    "one head": dict(image_size=28, patch_size=14, width=16, layers=1, heads=1, mlp_ratio=2.0),
    "broken ratio": dict(image_size=30, patch_size=7, width=20, layers=2, heads=2, mlp_ratio=3.7362),
}


def build(**sizes) -> Siglip:
    """With every weight far from its initial value, norms and biases included."""
    torch.manual_seed(0)
    model = Siglip(SiglipConfig(**sizes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


@pytest.fixture(autouse=True)
def the_global_generator_stays():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


def witness(model: Siglip, sizes: dict):
    """transformers' encoder with our weights: timm's names in, its names out, `qkv` taken apart."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=int(sizes["width"] * sizes["mlp_ratio"]),
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        attn_implementation="eager",
    )
    theirs = transformers.SiglipVisionModel(config).eval()
    renamed = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    }
    renamed |= {"attn.proj": "self_attn.out_proj", "blocks": "encoder.layers"}
    prefix = next(iter(theirs.state_dict())).split("embeddings.")[0]  # "vision_model." in some versions
    state = {}
    for name, p in model.state_dict().items():
        if name == "pos_embed":
            state["embeddings.position_embedding.weight"] = p[0]
        elif name.startswith("norm."):
            state[name.replace("norm.", "post_layernorm.")] = p
        else:
            for old, new in renamed.items():
                name = name.replace(old, new)
            if "attn.qkv" in name:
                parts = zip("qkv", p.chunk(3), strict=True)
                state |= {name.replace("attn.qkv", f"self_attn.{x}_proj"): part for x, part in parts}
            else:
                state[name] = p
    theirs.load_state_dict({prefix + name: p for name, p in state.items()}, strict=True)
    return theirs


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_transformers_computes_the_same(sizes):
    """Stops: q, k and v in another order, tanh GELU, another eps, no final norm, positions added after a block,
    patches read by columns, an MLP width that is rounded instead of cut."""
    model = build(**sizes)
    pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
    wanted = witness(model, sizes)(pixel_values=pixels).last_hidden_state
    out = model(pixels)
    assert out.shape == (2, (sizes["image_size"] // sizes["patch_size"]) ** 2, sizes["width"])
    assert_close(out, wanted, atol=5e-6, rtol=1e-5)


def test_images_of_a_batch_are_apart():
    """Stops: attention or norms over the batch."""
    model = build(**SIZES["square grid"])
    pixels = torch.randn(3, 3, 32, 32)
    for i in range(3):
        assert_close(model(pixels)[i], model(pixels[i : i + 1])[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SIGLIP_PRESETS)
def test_presets_have_the_published_sizes(name):
    """Stops: a preset whose weights would not fit: so400m's MLP is 4304 wide, its grid 27 (of 384) or 16."""
    size = int(name.rsplit("_", 1)[1])
    with torch.device("meta"):
        model = Siglip(SiglipConfig(image_size=size, **SIGLIP_PRESETS[name]))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    large = "large" in name
    width, hidden, layers = (1024, 4096, 24) if large else (1152, 4304, 27)
    patches = {"large_384": 576, "large_256": 256, "so400m_384": 729, "so400m_224": 256}
    assert shapes["blocks.0.mlp.fc1.weight"] == (hidden, width)
    assert shapes["pos_embed"] == (1, patches[f"{'large' if large else 'so400m'}_{size}"], width)
    assert f"blocks.{layers - 1}.norm1.weight" in shapes and f"blocks.{layers}.norm1.weight" not in shapes


def test_the_pooling_head_is_not_built():
    """Stops: memory and keys for what nobody computes."""
    assert not [name for name in build(**SIZES["one head"]).state_dict() if "pool" in name]
