# SPDX-License-Identifier: MIT
"""Folders and keys that are no checkpoint's: what lies there, and what to do; and models that must not be saved."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import janusflow_min as jf
from janusflow_min.checkpoint import load_model
from janusflow_min.cli import main
from janusflow_min.official import INDEX, LEFTOVERS, VAE_FILES, WEIGHTS
from janusflow_min.vae import load_vae


@pytest.fixture
def pipe(parity_dir) -> jf.Pipeline:
    """One that a test may wrap."""
    return jf.load(parity_dir, device="cpu", progress=False)


def load(folder: Path) -> jf.Pipeline:
    return jf.load(folder, device="cpu", progress=False)


def edit(path: Path, *keys: str, **changes) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    node = data
    for key in keys:
        node = node[key]
    node.update(changes)
    path.write_text(json.dumps(data), encoding="utf-8")


# Folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, what",
    [
        ("adapter_model.safetensors", r"a LoRA adapter \(adapter_model.*Pipeline.load_lora"),
        ("adapter_config.json", r"a LoRA adapter .*Pipeline.load_lora"),
        ("pytorch_model.bin", r"pickled weights, which can run code .*convert them"),
        ("model.pt", "pickled weights"),
        ("model-Q4_K.gguf", r"llama\.cpp"),
        (
            "model.fp16.safetensors",
            rf"under another name \(model.fp16.safetensors\): rename the file to {WEIGHTS}",
        ),
        ("model-00001-of-00002.safetensors", rf"shards without their index .*download {INDEX}"),
        ("flax_model.msgpack", "another framework"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_something_else_is_explained(folder, name, what, config):
    """Stops: "holds neither" for a folder that holds something well known."""
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=what):
        load(folder)
    with pytest.raises(FileNotFoundError, match=what):
        load_model(folder, progress=False)


@pytest.mark.parametrize("inside", ["export", "checkpoint-500", "snapshots/0123abc"])
def test_the_folder_below_is_named(folder, tmp_path, inside):
    """Stops: a training run's OUTPUT, or the hub's cache, refused without a word about where its checkpoint is."""
    outer = tmp_path / "run"
    (outer / inside).parent.mkdir(parents=True)
    folder.rename(outer / inside)
    with pytest.raises(FileNotFoundError, match=rf"a checkpoint lies in .*run/{inside}: give that folder"):
        load(outer)


@pytest.mark.parametrize(
    "file",
    (
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "preprocessor_config.json",
        *(f"vae/{name}" for name in VAE_FILES),
    ),
)
@pytest.mark.parametrize(
    "content, what",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    ],
)
def test_a_pointer_or_a_page_in_place_of_a_file_is_explained(folder, file, content, what):
    """Stops: "not valid JSON" for a clone without its large files, and for a page that asks to log in."""
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{Path(file).name} .*{what}"):
        load(folder)


def test_a_vae_of_another_kind_of_file_is_refused(folder):
    """Stops: pickled weights unpacked, and another precision read without being asked for."""
    vae = folder / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"rename the file to diffusion_pytorch_model\.safetensors"):
        load(folder)
    (vae / "diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save({}, vae / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights"):
        load(folder)


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None]
)
def test_an_index_stays_in_its_folder(folder, file):
    """Stops: a downloaded index that reads other files of this machine."""
    shutil.copy(folder / WEIGHTS, folder.parent / "other.safetensors")
    (folder / WEIGHTS).unlink()
    names = find_weights_of(folder.parent / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(
        ValueError, match=rf"{INDEX}: .* is not the name of a safetensors file in the same folder"
    ):
        load(folder)


def find_weights_of(path: Path) -> list[str]:
    return list(load_file(path))


# Keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"_orig_mod.{k}",
        lambda k: f"module.{k}",
        lambda k: f"model.{k}",
        lambda k: f"base_model.model.{k}",
        lambda k: f"module._orig_mod.{k}",
        lambda k: k.replace("language_model.", "language_model._orig_mod."),
        lambda k: k.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module."),
        lambda k: k.replace("vision_gen_dec_model.", "vision_gen_dec_model.module."),
    ],
    ids=["compiled", "parallel", "model", "peft", "both", "a part", "checkpointed", "a part parallel"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_wrapper_s_prefix_is_named_and_taken_off(folder, rename, sharded):
    """Stops: two lists of twenty keys for weights that are all there, under a prefix that another tool wrote."""
    tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}  # not a view of the file
    wrapped = {rename(k): v for k, v in tensors.items()}
    if sharded:
        (folder / WEIGHTS).unlink()
        for i in range(2):
            save_file(dict(list(wrapped.items())[i::2]), folder / f"model-{i}.safetensors")
        weight_map = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(wrapped)}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(wrapped, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"bear a wrapper's prefix; '.*' is read as '"):
        model = load_model(folder, progress=False)
    assert torch.equal(model.und_begin, tensors["beg_of_und_embed"])
    assert torch.equal(model.llm.norm.weight, tensors["language_model.model.norm.weight"])


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_what_older_tools_write_is_left_out(folder, leftover):
    """Stops: a refusal for the rotary frequencies and positions that old versions of transformers saved."""
    tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}  # not a view of the file
    extra = {f"language_model.model.layers.{i}.self_attn{leftover}": torch.zeros(8) for i in range(3)}
    extra[f"vision_und_enc_model.vision_tower.embeddings{leftover}"] = torch.zeros(1, 4, dtype=torch.int64)
    save_file(tensors | extra, folder / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(folder, progress=False).extra_tensors.keys() <= tensors.keys()


ATTENTION = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "extra, what",
    [
        (
            {f"{ATTENTION}.lora_A.default.weight": (2, 64)},
            r"LoRA adapters that are not merged.*merge_and_unload",
        ),
        ({f"{ATTENTION}.base_layer.weight": (64, 64)}, "LoRA adapters that are not merged"),
        ({f"{ATTENTION}.weight.absmax": (4,), f"{ATTENTION}.weight.quant_map": (16,)}, "bitsandbytes"),
        ({f"{ATTENTION}.SCB": (64,)}, "bitsandbytes"),
        ({f"{ATTENTION}.qweight": (4, 4), f"{ATTENTION}.qzeros": (4, 4)}, "quantised weights"),
        ({f"{ATTENTION}.weight_scale": (1,)}, "quantised weights"),
        ({f"{ATTENTION}.parametrizations.weight.original0": (1,)}, "remove_parametrizations"),
    ],
)
def test_keys_of_known_tools_are_explained(folder, extra, what):
    """Stops: lists of keys where one sentence says what was saved, and how to save it better."""
    tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}  # not a view of the file
    del tensors[f"{ATTENTION}.weight"]
    save_file(tensors | {name: torch.zeros(shape) for name, shape in extra.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=what) as error:
        load(folder)
    assert f"{ATTENTION}.weight" in str(error.value)


def test_this_library_s_own_names_are_explained(folder, pipe):
    """Stops: a saved `model.state_dict()` refused without a word about `save`."""
    save_file(pipe.model.state_dict(), folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"the names inside this library: write checkpoints with janusflow_min\.save"
    ):
        load(folder)


def test_keys_reach_no_terminal_as_they_are(folder, capsys):
    """Stops: a file's key that clears the screen or writes a false line, in errors and in `info`."""
    key = "evil\x1b[2J\rall is well"
    save_file(load_file(folder / WEIGHTS) | {key: torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert main(["info", str(folder)]) == 1
    assert main(["generate", "a", "--model", str(folder), "--out", str(folder / "out")]) == 2
    captured = capsys.readouterr()
    for text in (str(error.value), captured.out, captured.err):
        assert r"evil\x1b[2J\rall is well" in text and "\x1b" not in text and "\r" not in text


# Numbers that would hang or fill the memory ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [10**9, 2**31 - 1, 2**31, 10**18])
@pytest.mark.parametrize(
    "keys, key",
    [
        (("language_config",), "num_hidden_layers"),
        (("language_config",), "vocab_size"),
        (("language_config",), "intermediate_size"),
        (("vision_und_enc_config", "params"), "layers"),
        (("vision_und_enc_config", "params"), "image_size"),
        (("vision_gen_enc_config", "params"), "layers_in_middle"),
        (("vision_gen_dec_config", "params"), "layers_in_middle"),
        (("vision_gen_dec_config", "params"), "in_channels"),
    ],
)
def test_counts_are_compared_with_the_weights_first(folder, capsys, keys, key, count):
    """Stops: a configuration that keeps load, or `info`, busy for ever, or asks for the machine's memory."""
    edit(folder / "config.json", *keys, **{key: count})
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"config\.json"):
        load(folder)
    assert main(["info", str(folder)]) == 1
    assert "config.json" in capsys.readouterr().out.split("missing or wrong")[1]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [2**20] * 4},
        {"block_out_channels": [8] * 5000},
        {"block_out_channels": [2**40] * 4},
        {"block_out_channels": 8},
        {"block_out_channels": []},
        {"layers_per_block": 10**9},
        {"layers_per_block": "2"},
        {"latent_channels": 2**40},
        {"latent_channels": 8},
        {"in_channels": 1},
        {"out_channels": 4},
        {"norm_num_groups": 0},
        {"down_block_types": ["NoSuchBlock"] * 4},
        {"scaling_factor": 0},
        {"scaling_factor": -0.13},
        {"scaling_factor": float("nan")},
        {"scaling_factor": float("inf")},
        {"scaling_factor": None},
        {"scaling_factor": "0.13"},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0, 0.1, 0.2, 0.3]},
        {"latents_std": [1.0, 1.0, 1.0, 2.0]},
    ],
    ids=str,
)
def test_a_vae_s_configuration_is_held_to_what_is_computed(folder, capsys, changes):
    """Stops: gigabytes of random weights for wild sizes; a scale that turns every image black after all steps;
    settings that are read by nobody; `info` that finds nothing wrong."""
    edit(folder / "vae" / "config.json", **changes)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"vae"):
        load_vae(folder, "cpu", torch.float32, 4)
    assert main(["info", str(folder)]) == 1
    assert "vae" in capsys.readouterr().out.split("missing or wrong: 1")[1]
    assert time.perf_counter() - start < 10


def test_null_settings_of_a_vae_are_fine(folder):
    """Stops: a refusal of SDXL's own configuration, which says null."""
    edit(
        folder / "vae" / "config.json", shift_factor=None, latents_mean=None, latents_std=None, unknown_key=3
    )
    load_vae(folder, "cpu", torch.float32)


def test_old_names_of_a_vae_s_attention_are_read(folder):
    """Stops: a refusal of VAEs that diffusers wrote before it renamed its attention; diffusers is the witness."""
    from diffusers import AutoencoderKL

    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    renamed = dict(tensors)
    for today, before in old.items():
        renamed = {name.replace(today, before): tensor for name, tensor in renamed.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    ours = load_vae(folder, "cpu", torch.float32).autoencoder.state_dict()
    theirs = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).state_dict()
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loaded_vae_computes_what_diffusers_does(parity_dir):
    """Stops: a part that is left on the meta device or at another default when weights are assigned."""
    from diffusers import AutoencoderKL

    ours = load_vae(parity_dir, "cpu", torch.float32)
    theirs = AutoencoderKL.from_pretrained(parity_dir / "vae").eval()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample)
    assert dict(ours.autoencoder.config).keys() >= {"block_out_channels", "scaling_factor"}


# Saving ---------------------------------------------------------------------------------------------------------


def compiled(pipe: jf.Pipeline) -> None:
    pipe.model.llm = torch.compile(pipe.model.llm, backend="eager")


def compiled_vae(pipe: jf.Pipeline) -> None:
    pipe.vae.autoencoder.decoder = torch.compile(pipe.vae.autoencoder.decoder, backend="eager")


def adapted(pipe: jf.Pipeline) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), pipe.model)


def replaced(pipe: jf.Pipeline) -> None:
    pipe.model.llm.lm_head = torch.nn.Linear(64, 7, bias=False)


def extended(pipe: jf.Pipeline) -> None:
    pipe.model.head = torch.nn.Linear(2, 2)


def offloaded(pipe: jf.Pipeline) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.model)


def offloaded_vae(pipe: jf.Pipeline) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.vae.autoencoder)


def quantised(pipe: jf.Pipeline) -> None:
    weight = pipe.model.llm.lm_head.weight
    pipe.model.llm.lm_head.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    "change, what",
    [
        (compiled, r"the model cannot be saved: .*wrapped module .*unwrap it first"),
        (compiled_vae, r"the VAE cannot be saved: .*unwrap it first"),
        (adapted, r"the model cannot be saved: .*LoRA adapters.*merge them first"),
        (replaced, r"the model cannot be saved: .*llm\.lm_head\.weight"),
        (extended, r"the model cannot be saved: .*head\.bias"),
        (offloaded, r"the model cannot be saved: .*not in memory .*accelerate"),
        (offloaded_vae, r"the VAE cannot be saved: .*not in memory .*accelerate"),
        (quantised, r"the model.*lm_head.weight holds torch\.int8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_could_not_be_loaded_is_not_saved(pipe, tmp_path, change, what):
    """Stops: a good checkpoint replaced by one with keys that nobody can load, and success reported."""
    target = tmp_path / "good"
    jf.save(pipe, target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    change(pipe)
    with pytest.raises(ValueError, match=what):
        jf.save(pipe, target, overwrite=True)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_compiled_pipeline_is_saved(parity_dir, tmp_path):
    """Stops: `load(compile=True)`, which wraps functions and no module, refused."""
    compiling = jf.load(parity_dir, device="cpu", compile=True, progress=False)
    load(jf.save(compiling, tmp_path / "saved"))


def test_a_checkpoint_in_a_clone_is_replaced_alone(pipe, tmp_path, monkeypatch):
    """Stops: `save(pipe, ".", overwrite=True)` deleting the repository around the checkpoint."""
    monkeypatch.chdir(tmp_path)
    jf.save(pipe, ".", max_shard_size=400_000)
    assert (tmp_path / INDEX).is_file()
    for name in ("README.md", "train.py"):
        Path(name).write_text("mine")
    Path(".git").mkdir()
    jf.save(pipe, ".", overwrite=True)
    assert not list(Path(".").glob("model-*")) and not Path(INDEX).exists()
    assert Path("README.md").read_text() == Path("train.py").read_text() == "mine" and Path(".git").is_dir()
    load(Path("."))


def test_a_link_to_a_folder_is_written_through(pipe, tmp_path):
    """Stops: a link to a large disk replaced by a folder on the small one, and the old checkpoint left beside it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        jf.save(pipe, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert not [p.name for p in (tmp_path / "disk").iterdir() if p.name.startswith(".")]
    load(tmp_path / "disk")


def test_all_saved_files_have_one_mode(pipe, tmp_path):
    """Stops: a VAE that only its owner can read beside a model that everybody can."""
    folder = jf.save(pipe, tmp_path / "saved", max_shard_size=400_000)
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_home_is_expanded(pipe, tmp_path, monkeypatch):
    """Stops: a folder that is called ~, and a path in the answer that is not where the checkpoint is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert jf.save(pipe, "~/ck") == tmp_path / "ck"
    jf.load("~/ck", device="cpu", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


@pytest.mark.parametrize("device", ["meta", "meta:0", torch.device("meta")])
def test_the_meta_device_is_refused(parity_dir, device):
    """Stops: an AssertionError, or a model without weights."""
    with pytest.raises(ValueError, match='device "meta" holds no weights'):
        jf.load(parity_dir, device=device, progress=False)
