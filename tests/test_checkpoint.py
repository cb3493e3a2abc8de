# SPDX-License-Identifier: MIT
"""Weights in and out: the table of prefixes, strict loading, exact saving."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import janusflow_min as jf
from janusflow_min import checkpoint, weights
from janusflow_min.checkpoint import (
    load_model,
    save_model,
)
from janusflow_min.hub import resolve
from janusflow_min.official import (
    INDEX,
    POOLING_HEAD,
    PREFIXES,
    PROCESSOR_FILES,
    WEIGHTS,
    from_official,
    to_official,
)


@pytest.fixture(scope="module")
def tensors(parity_dir) -> dict[str, Tensor]:
    """The tiny checkpoint's tensors under their official names, fp32."""
    return load_file(parity_dir / WEIGHTS)


@pytest.fixture
def folder(tmp_path, parity_dir) -> Path:
    """A folder that holds the tiny checkpoint's config.json and, until a test changes it, its weights."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(parity_dir / name, path)
    return path


def load(folder: Path, **options) -> jf.JanusFlow:
    return load_model(folder, progress=False, **options)


def official(model: jf.JanusFlow) -> dict[str, Tensor]:
    return {to_official(k): v for k, v in model.state_dict().items()} | model.extra_tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    """In place of the one file: shards that take the keys in turn, so that no part lies in one of them."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = dict(list(tensors.items())[i::count])
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


# Names ----------------------------------------------------------------------------------------------------------


def test_the_table_of_prefixes_is_one_to_one(parity_dir):
    """Stops: two official keys under one name of ours, or a name that does not lead back."""
    keys = json.loads((parity_dir.parent / "official_keys.json").read_text(encoding="utf-8"))
    ours = {key: from_official(key) for key in keys}
    assert len(set(ours.values())) == len(keys) == 587
    assert all(to_official(name) == key for key, name in ours.items())
    assert len(set(PREFIXES.values())) == len(PREFIXES)
    assert from_official("language_model.lm_head.weight") == "llm.lm_head.weight"
    assert from_official("vision_gen_dec_aligner_norm.weight") == "gen_out_norm.weight"
    assert from_official("beg_of_und_embed") == "und_begin"


@pytest.mark.parametrize("name", ["gen_vision_model.x", "lm_head.weight", ""])
def test_foreign_names_are_no_keys(name):
    """Stops: keys of other models that pass through unchanged."""
    with pytest.raises(ValueError, match="not a key of a JanusFlow checkpoint"):
        from_official(name)


# Loading --------------------------------------------------------------------------------------------------------


def test_every_tensor_is_loaded_as_it_lies_there(model, tensors):
    """Stops: a tensor that is transposed, split, or left at its initial value."""
    assert same(official(model), tensors)
    assert sum(name.startswith(POOLING_HEAD) for name in tensors) == 13
    assert set(model.extra_tensors) == {name for name in tensors if name.startswith(POOLING_HEAD)}
    assert not any("attn_pool" in name for name in model.state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_other_float_types_are_cast(folder, tensors, stored, wanted):
    """Stops: a model of mixed dtypes, or one of the file's dtype whatever was asked for."""
    save_file({k: v.to(stored) for k, v in tensors.items()}, folder / WEIGHTS)
    model = load(folder, dtype=wanted)
    assert model.dtype == wanted
    assert same(official(model), {k: v.to(stored).to(wanted) for k, v in tensors.items()})


def test_a_mix_of_types_in_one_file_is_cast_too(folder, tensors):
    """Stops: one dtype taken for the whole file."""
    mixed = {k: v.bfloat16() if i % 2 else v for i, (k, v) in enumerate(tensors.items())}
    save_file(mixed, folder / WEIGHTS)
    assert {v.dtype for v in official(load(folder)).values()} == {torch.float32}


def test_shards_are_as_good_as_one_file(folder, tensors, model):
    """Stops: shards that are read in part, or in an order that matters."""
    write_shards(folder, tensors)
    assert same(official(load(folder)), official(model))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("parts", ["generation", "understanding"])
def test_parts_read_and_hold_no_more_than_they_need(folder, tensors, monkeypatch, parts, sharded):
    """Stops: memory and time for the half that is not wanted, its pooling head included."""
    if sharded:
        write_shards(folder, tensors)
    read, original = [], weights.check_float
    monkeypatch.setattr(weights, "check_float", lambda *a: read.append(a[1]) or original(*a))
    model = load(folder, parts=parts)
    unwanted = {
        "generation": ("vision_und_", "beg_of_und_embed", "language_model.lm_head."),
        "understanding": ("vision_gen_",),
    }[parts]
    wanted = {name for name in tensors if not name.startswith((*unwanted, POOLING_HEAD))}
    assert set(read) == wanted and len(read) == len(wanted)
    assert same(official(model), {name: tensors[name] for name in wanted})
    assert model.extra_tensors == {}


def test_parts_are_as_strict_as_the_whole(folder, tensors):
    """Stops: a broken half that only the other task would notice."""
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("vision_gen_dec_aligner.")}, folder / WEIGHTS
    )
    with pytest.raises(ValueError, match=r"2 missing: vision_gen_dec_aligner\.bias"):
        load(folder, parts="understanding")


def test_the_pooling_head_may_be_absent(folder, tensors):
    """Stops: a refusal of checkpoints that were trained without it."""
    without = {k: v for k, v in tensors.items() if not k.startswith(POOLING_HEAD)}
    save_file(without, folder / WEIGHTS)
    assert same(official(load(folder)), without)


def test_the_files_may_be_deleted(folder, model):
    """Stops: a model that goes back to its files after loading."""
    loaded = load(folder)
    shutil.rmtree(folder)
    assert same(official(loaded), official(model))


# Refusing -------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_error(folder, tensors):
    """Stops: one fault a run, which makes the reader load the model again and again."""
    broken = dict(tensors)
    del broken["beg_of_und_embed"], broken["language_model.model.norm.weight"]
    broken["language_model.model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)
    broken["something.else"] = torch.zeros(1)
    broken["language_model.lm_head.weight"] = torch.zeros(640, 63)
    broken["vision_gen_enc_aligner.bias"] = torch.zeros(64, 1)
    save_file(broken, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        load(folder)
    text = str(error.value)
    assert str(folder) in text
    assert "2 missing: beg_of_und_embed, language_model.model.norm.weight" in text
    assert "2 unexpected: language_model.model.layers.3.mlp.up_proj.weight, something.else" in text
    assert "2 mis-shaped" in text
    assert "language_model.lm_head.weight is [640, 63], config.json asks for [640, 64]" in text
    assert "vision_gen_enc_aligner.bias is [64, 1], config.json asks for [64]" in text


def test_another_configuration_does_not_fit(folder):
    """Stops: layers left uninitialised, or weights dropped, where config.json and weights disagree."""
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"9 missing: language_model\.model\.layers\.3\."):
        load(folder)
    config["language_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"9 unexpected: language_model\.model\.layers\.2\."):
        load(folder)


def test_long_lists_are_cut(folder, tensors):
    """Stops: hundreds of keys that hide what matters."""
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"\d+ missing: .* and \d+ more\n.*1 unexpected: x"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: b"\xff" * 64,
        lambda data: data[:8] + b"?" + data[9:],
        lambda data: data + b"\0",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=[
        "half",
        "one byte short",
        "header cut",
        "length cut",
        "empty",
        "zeros",
        "ones",
        "no JSON",
        "longer",
        "lfs",
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_broken_file_is_named(folder, tensors, change, sharded):
    """Stops: a decoder's error that names no file, and half a download that loads."""
    path = folder / WEIGHTS
    if sharded:
        path = folder / write_shards(folder, tensors)["beg_of_und_embed"]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole safetensors file"):
        load(folder)


def test_a_folder_without_weights_or_config_is_named(folder):
    """Stops: an empty model in place of a missing file."""
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder.name} holds neither {WEIGHTS} nor {INDEX}"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(folder)


def test_an_index_must_name_files_and_keys_that_are_there(folder, tensors):
    """Stops: shards that were not all downloaded, and an index of another version."""
    weight_map = write_shards(folder, tensors)
    file = weight_map["beg_of_und_embed"]
    shard = load_file(folder / file)
    save_file({k: v for k, v in shard.items() if k != "beg_of_und_embed"}, folder / file)
    with pytest.raises(ValueError, match=rf"{file} lacks keys that {INDEX} says are there: beg_of_und_embed"):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{INDEX} names 1 files that are absent: {file}"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_a_map_is_named(folder, content):
    """Stops: an empty index that loads nothing."""
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_whole_numbers_are_no_weights(folder, tensors, dtype):
    """Stops: quantised files cast to floats as if their scale were 1."""
    key = "vision_gen_enc_aligner.bias"
    save_file(tensors | {key: torch.zeros(64, dtype=dtype)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {key} holds {dtype}"):
        load(folder)


# Saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 10**9, 400_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_again_every_tensor_is_the_same(parity_dir, tmp_path, dtype, size):
    """Stops: a tensor lost, renamed or rounded on its way, the pooling head above all."""
    model = load(parity_dir, dtype=dtype)
    save_model(model, tmp_path, max_shard_size=size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    one = size is None or size == 10**9  # more than all of it
    assert (tmp_path / INDEX).exists() != one
    if one:
        assert files == [WEIGHTS]
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in official(model).values())
        for file in files:
            shard = load_file(tmp_path / file)
            assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= size
    again = load(tmp_path, dtype=dtype)
    assert same(official(again), official(model)) and again.config == model.config
    stored = json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert stored == str(dtype).removeprefix("torch.")


def test_one_shard_a_tensor_is_many_files(model, tmp_path):
    """Stops: `max_shard_size` that is not kept."""
    save_model(model, tmp_path, max_shard_size=1)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == len(official(model))


@pytest.mark.parametrize("parts", ["generation", "understanding"])
def test_a_part_cannot_be_saved(parity_dir, tmp_path, parts):
    """Stops: half a checkpoint in the form of a whole one."""
    with pytest.raises(ValueError, match=rf"only '{parts}' was loaded"):
        save_model(load(parity_dir, parts=parts), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_save_leaves_nothing_behind(pipe, tmp_path, monkeypatch, overwrite):
    """Stops: half a folder that looks like a checkpoint, and an old one lost to a full disk."""
    target = tmp_path / "saved"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("old")

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        jf.save(pipe, target, overwrite=overwrite)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["saved", "saved/old"] if overwrite else [])


def test_a_save_never_mixes_with_what_was_there(pipe, tmp_path):
    """Stops: shards of an older checkpoint beside a new single file."""
    target = tmp_path / "saved"
    jf.save(pipe, target, max_shard_size=400_000)
    assert (target / INDEX).exists()
    with pytest.raises(FileExistsError, match="exists already"):
        jf.save(pipe, target)
    assert (target / INDEX).exists() and not (target / WEIGHTS).exists()
    jf.save(pipe, target, overwrite=True)
    assert not list(target.glob("model-*")) and not (target / INDEX).exists() and (target / WEIGHTS).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_checkpoint_may_be_saved_over_itself(parity_dir, tmp_path, tensors):
    """Stops: weights that are still mapped from the file that is being written."""
    target = tmp_path / "own"
    shutil.copytree(parity_dir, target)
    own = jf.load(target, device="cpu", progress=False)
    jf.save(own, target, overwrite=True)
    assert same(official(own.model), tensors) and same(load_file(target / WEIGHTS), tensors)


# The hub --------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_and_loaded(parity_dir, monkeypatch):
    """Stops: other files than a checkpoint's fetched: pickles, other formats, the checkpoints of a training run."""
    asked = []

    def download(repo, allow_patterns, revision):
        asked.append((repo, set(allow_patterns)))
        return str(parity_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipe = jf.load("someone/some-model", device="cpu", progress=False)
    small = {"config.json", INDEX, "vae/config.json", *PROCESSOR_FILES}
    large = {WEIGHTS, "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert asked == [("someone/some-model", small), ("someone/some-model", large)]
    assert pipe.model.config.llm.vocab_size == 640


def test_offline_says_what_to_do(monkeypatch):
    """Stops: a hundred lines of a network library."""

    def offline(*args, **options):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        resolve("deepseek-ai/JanusFlow-1.3B")
    for part in (
        "deepseek-ai/JanusFlow-1.3B",
        "name or service not known",
        "Without a network",
        "*.safetensors",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("source", ["janusflow", "a/b/c", "./a/b", "/a/b", "~/a", "../a"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch, source):
    """Stops: a mistyped path sent to a server."""

    def asked(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        resolve(source)


# Memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from janusflow_min.checkpoint import load_model

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

def use(folder):
    model = load_model(folder, progress=False)
    for p in model.state_dict().values():
        p.sum()  # pages of a mapped file count once they are used
    return model

use(sys.argv[1])  # what PyTorch itself loads when it is first used
before = kilobytes("VmRSS")
model = use(sys.argv[2])
print(kilobytes("VmHWM") - before, sum(p.nbytes for p in model.state_dict().values()) // 1024)
"""


@pytest.mark.slow  # resident memory depends on what else the machine does
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, parity_dir):
    """Stops: the weights twice in memory: initialised and then replaced, a whole file read before it is copied, or
    still mapped beside its copies."""
    config = json.loads((parity_dir / "config.json").read_text())
    config["language_config"].update(
        vocab_size=8_000, hidden_size=640, intermediate_size=1760, num_hidden_layers=8
    )
    for section in ("vision_gen_enc_config", "vision_gen_dec_config"):
        config[section]["params"]["hidden_size"] = 640  # no tensor above a tenth, as officially
    model = jf.JanusFlow(jf.JanusFlowConfig.from_dict(config))
    save_model(model, tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size / 1024
    assert size > 190_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(parity_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    peak, held = map(int, done.stdout.split())
    assert held > 0.99 * size
    assert 0.8 * size < peak <= 1.1 * size, f"{peak} KiB for {size:.0f} KiB of weights"


def test_a_loaded_model_does_not_depend_on_its_file(parity_dir, tmp_path):
    """Stops weights that stay mapped to the file: they would change, or end the process, when it is overwritten."""
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((parity_dir / name).read_bytes())
    model = load_model(tmp_path, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "r+b") as f:
        f.write(bytes(size))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_saved_weights_can_be_read_by_others(parity_dir, tmp_path):
    """Stops files that nobody but their owner can open on a shared machine."""
    save_model(load_model(parity_dir, progress=False), tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o044 == 0o044
