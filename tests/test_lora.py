# SPDX-License-Identifier: MIT
"""Adapters on a pipeline: peft is the witness of what they compute and of how they lie on disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import janusflow_min as jf
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PROMPT = "a photo of a red star"


def load(parity_dir, dtype="float32", **options):
    return jf.load(parity_dir, device="cpu", dtype=dtype, progress=False, **options)


def weights(pipe):
    return {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def latents(pipe):
    return pipe.generate(
        PROMPT, parallel_size=1, num_inference_steps=2, seed=0, progress=False, output_type="latent"
    ).latents


@pytest.fixture(scope="module")
def adapters(parity_dir, tmp_path_factory):
    """Folders that peft has written: name -> (folder, the weights after peft's merge_and_unload)."""
    peft = pytest.importorskip("peft")
    root, found = tmp_path_factory.mktemp("adapters"), {}
    options = {
        "one": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6},
        "two": {"target_modules": ["q_proj", "o_proj"], "r": 2, "lora_alpha": 8, "use_rslora": True},
        "images": {"target_modules": ["in_conv", "qkv", "proj"], "r": 4, "lora_alpha": 4},
    }
    for seed, (name, settings) in enumerate(options.items()):
        model = load(parity_dir).model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
        adapted.save_pretrained(root / name)
        merged = adapted.merge_and_unload(safe_merge=True).state_dict()
        found[name] = root / name, {key: tensor.clone() for key, tensor in merged.items()}
    return found


@pytest.mark.parametrize("name", ["one", "two", "images"])
def test_peft_merges_the_same_weights(parity_dir, adapters, name):
    """Stops: A and B exchanged, another scale, rsLoRA's root forgotten, a convolution's factors in another order."""
    pipe = load(parity_dir)
    base = weights(pipe)
    folder, merged = adapters[name]
    assert pipe.load_lora(folder) == name and pipe.adapters == {name: 1.0}
    mine = weights(pipe)
    assert {key for key in mine if not torch.equal(mine[key], base[key])}
    for key, value in merged.items():
        if value.ndim == 4:
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine[key], value), key
    pipe.unload_lora()
    assert same(weights(pipe), base) and pipe.adapters == {} and not pipe._base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [False, True])
def test_swapping_and_unloading_restore_every_bit(parity_dir, adapters, dtype, fast):
    """Stops: weights that drift with each swap; a sampler that goes on with the weights that it fused before."""
    pipe = load(parity_dir, dtype)
    if fast:
        pipe.sampler = GraphSampler(pipe.model)
    before, sampler = latents(pipe), pipe.sampler
    base = weights(pipe)
    for name, (folder, _) in adapters.items():
        pipe.load_lora(folder, name, scale=0)
    assert same(weights(pipe), base) and set(pipe.adapters.values()) == {0.0}
    seen = {}
    for names, scales in (("one", 1), (["one", "two"], [0.5, 2]), ("two", 1), (["two", "one"], [2, 0.5])):
        pipe.set_adapters(names, scales)
        alone = load(parity_dir, dtype)
        for name, scale in pipe.adapters.items():
            if scale:
                alone.load_lora(adapters[name][0], scale=scale)
        if fast:
            alone.sampler = GraphSampler(alone.model)
        assert same(weights(pipe), weights(alone))
        seen[str(names)] = latents(pipe)
        assert torch.equal(seen[str(names)], latents(alone))
        assert not torch.equal(seen[str(names)], before)
    assert torch.equal(seen["['one', 'two']"], seen["['two', 'one']"])
    assert pipe.sampler is sampler, "weights are written in place: nothing is built anew"
    pipe.unload_lora("one")
    pipe.set_adapters([])
    assert (
        same(weights(pipe), base)
        and torch.equal(latents(pipe), before)
        and [*pipe.adapters] == ["two", "images"]
    )


@pytest.mark.gpu
def test_captured_graphs_read_the_merged_weights(parity_dir, adapters):
    """Stops: graphs that were captured before an adapter came and go on with the old weights."""
    pipe, alone = (jf.load(parity_dir, device="cuda", dtype="bfloat16", progress=False) for _ in range(2))
    before, sampler = latents(pipe), pipe.sampler
    assert isinstance(sampler, GraphSampler) and sampler.graphs
    for one in (pipe, alone):
        one.load_lora(adapters["one"][0])
    adapted = latents(pipe)
    assert not torch.equal(adapted, before) and pipe.sampler is sampler
    torch.testing.assert_close(adapted, latents(alone))
    pipe.unload_lora()
    assert torch.equal(latents(pipe), before) and pipe.sampler is sampler


def test_a_fused_adapter_stays_and_can_be_saved(parity_dir, adapters, tmp_path):
    """Stops: a fused adapter that unloading takes out again, or that a saved checkpoint lacks."""
    pipe = load(parity_dir)
    folder, merged = adapters["one"]
    pipe.load_lora(folder)
    pipe.fuse_lora()
    pipe.unload_lora()
    assert same(weights(pipe), merged) and not pipe.adapters
    jf.save(pipe, tmp_path / "fused")
    assert same(weights(load(tmp_path / "fused")), merged)


def test_adapters_go_with_the_pipeline(parity_dir, adapters):
    """Stops: W₀ left in the old dtype, or a sum that is rounded twice, after `to`."""
    pipe = load(parity_dir)
    pipe.load_lora(adapters["one"][0], scale=0.5)
    pipe.to("bfloat16")
    there = load(parity_dir, "bfloat16")
    there.load_lora(adapters["one"][0], scale=0.5)
    assert same(weights(pipe), weights(there)) and pipe.adapters == {"one": 0.5}
    pipe.unload_lora()
    assert same(weights(pipe), weights(load(parity_dir, "bfloat16")))


def test_a_pipeline_in_parts_takes_its_share(parity_dir, adapters):
    """Stops: an adapter of the whole model refused, because the part that it also adapts was not loaded."""
    whole, part = load(parity_dir), load(parity_dir, parts="understanding")
    for pipe in (whole, part):
        pipe.load_lora(adapters["images"][0], "images")
        pipe.load_lora(adapters["one"][0])
    mine, all_of_it = weights(part), weights(whole)
    assert all(torch.equal(value, all_of_it[key]) for key, value in mine.items())


def edited(folder, tmp_path, config=None, tensors=None):
    """A copy of an adapter with other options and tensors; None takes one away."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    about = json.loads((copy / ADAPTER_CONFIG).read_text()) | (config or {})
    (copy / ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    found = load_file(copy / ADAPTER_WEIGHTS)
    for end, change in (tensors or {}).items():
        [key] = [key for key in found if key.endswith(end)]
        value = found.pop(key)
        found |= change(key, value)
    save_file(found, copy / ADAPTER_WEIGHTS)
    return copy


Q = "layers.1.self_attn.q_proj.lora_A.weight"
BAD = {
    "dora": ({"use_dora": True}, {}, r"use_dora = True is not supported; merge .*merge_and_unload"),
    "bias": ({"bias": "lora_only"}, {}, "bias = 'lora_only' is not supported"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save = a list is not supported"),
    "patterns": ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
    "tomorrow's": ({"use_tomorrow": True}, {}, "use_tomorrow = True is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights = 'pissa' changes the base model"),
    "another kind": ({"peft_type": "LOHA"}, {}, "peft_type must be \"LORA\", got 'LOHA'"),
    "no rank": ({"r": None}, {}, "adapter_config.json: r must be a whole number"),
    "no alpha": ({"lora_alpha": "much"}, {}, "lora_alpha must be a finite number"),
    "another rank": ({"r": 8}, {}, r"lora_A.weight is \[4, 176\]; this model and r = 8 .*\[8, 176\]"),
    "wider": ({}, {Q: lambda k, v: {k: torch.zeros(4, 65)}}, rf"{Q} is \[4, 65\].*\[4, 64\]"),
    "deeper": ({}, {Q: lambda k, v: {k.replace(".1.", ".7."): v}}, "no layer for .*layers.7.self_attn.q_proj"),
    "another model's": ({}, {Q: lambda k, v: {f"base_model.model.unet.{Q}": v}}, f"no layer for .*unet.{Q}"),
    "a norm": ({}, {Q: lambda k, v: {"llm.norm.lora_A.weight": v[:, 0].clone()}}, "no layer for llm.norm.lora_A"),
    "half": ({}, {Q: lambda k, v: {}}, "layers.1.self_attn.q_proj.weight has only one of its factors"),
    "an embedding": ({}, {Q: lambda k, v: {"llm.embed_tokens.lora_embedding_A": v}}, "lora_embedding_A is no factor"),
    "NaN": ({}, {Q: lambda k, v: {k: v * float("nan")}}, f"{Q} holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(parity_dir, adapters, tmp_path, name):
    """Stops: an adapter computed otherwise than it was trained, half of one, or an error that names no key."""
    pipe = load(parity_dir)
    pipe.load_lora(adapters["two"][0])
    before = weights(pipe)
    config, tensors, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        pipe.load_lora(edited(adapters["one"][0], tmp_path, config, tensors))
    assert same(weights(pipe), before) and pipe.adapters == {"two": 1.0}


def test_what_is_missing_is_named(parity_dir, adapters, tmp_path):
    """Stops: a checkpoint, a pickle or an empty folder taken for an adapter; a name that is not there or is taken."""
    pipe = load(parity_dir)
    copy = shutil.copytree(adapters["one"][0], tmp_path / "copy")
    (copy / ADAPTER_WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist \(.*a pickle"):
        pipe.load_lora(copy)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json does not exist"):
        pipe.load_lora(parity_dir)
    with pytest.raises(FileNotFoundError, match=r"lora '\./none' is neither a folder nor a hub id"):
        pipe.load_lora("./none")
    pipe.load_lora(adapters["one"][0])
    with pytest.raises(ValueError, match=r"another one than \['one'\]; got 'one'"):
        pipe.load_lora(adapters["two"][0], "one")
    for call in (pipe.set_adapters, pipe.unload_lora):
        with pytest.raises(ValueError, match=r"no adapter 'three' is loaded; there are \['one'\]"):
            call("three")
    with pytest.raises(ValueError, match="need a scale each"):
        pipe.set_adapters(["one"], [1, 2])
    with pytest.raises(ValueError, match="scale must be a finite number"):
        pipe.load_lora(adapters["two"][0], scale=float("nan"))


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_what_ends_in_the_middle_leaves_the_old_weights(parity_dir, adapters, monkeypatch, failure):
    """Stops: half of an adapter in the weights after Ctrl-C or where memory is short."""
    from janusflow_min.lora import Adapter

    pipe = load(parity_dir)
    pipe.load_lora(adapters["one"][0])
    before, plain, calls = weights(pipe), Adapter.delta, []

    def delta(self, name, *rest):
        calls.append(name)
        if len(calls) == 5:
            raise failure
        return plain(self, name, *rest)

    monkeypatch.setattr(Adapter, "delta", delta)
    with pytest.raises(failure):
        pipe.load_lora(adapters["two"][0])
    assert same(weights(pipe), before) and pipe.adapters == {"one": 1.0}
    pipe.unload_lora()
    assert same(weights(pipe), weights(load(parity_dir)))
