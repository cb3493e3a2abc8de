# SPDX-License-Identifier: MIT
"""Hub ids: what is asked for, what is downloaded, what works without a network. The hub is `hub_server.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from adapters import write_adapter
from hub_server import run, serve
from safetensors.torch import load_file, save_file

import janusflow_min as jf
from janusflow_min.hub import resolve, resolve_vae
from janusflow_min.official import INDEX, PROCESSOR_FILES, WEIGHTS

VAE = ["config.json", "diffusion_pytorch_model.safetensors"]
LOAD = "import janusflow_min as jf; jf.load('someone/model', device='cpu', progress=False)"
FILL = "import huggingface_hub; huggingface_hub.snapshot_download('stabilityai/sdxl-vae', allow_patterns="


@pytest.fixture
def hub(parity_dir, tmp_path):
    """A hub with someone/model, which has a training run's leftovers and no VAE, and SDXL's VAE with other files."""
    root, model = tmp_path / "hub", tmp_path / "hub" / "someone" / "model"
    shutil.copytree(parity_dir, model, ignore=shutil.ignore_patterns("expected*", "images", "vae"))
    shutil.copytree(parity_dir / "vae", root / "stabilityai" / "sdxl-vae")
    (model / "checkpoint-500").mkdir()
    for name in (
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "checkpoint-500/model.safetensors",
        "notes.json",
    ):
        (model / name).write_bytes(b"not to be read")
    for name in ("sdxl_vae.safetensors", "diffusion_pytorch_model.bin"):
        (root / "stabilityai" / "sdxl-vae" / name).write_bytes(b"not to be read")
    return root


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_files_that_are_read_are_downloaded(hub, tmp_path, sharded):
    """Stops: pickles, other precisions and a training run's checkpoints downloaded by the gigabyte; bars although
    none were asked for; a cache that is not enough without a network."""
    model, wanted = hub / "someone" / "model", {"config.json", *PROCESSOR_FILES, WEIGHTS, *VAE}
    if sharded:
        tensors = load_file(model / WEIGHTS)
        weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, model / file)
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        wanted = wanted - {WEIGHTS} | {INDEX, "part-0.safetensors", "part-1.safetensors"}
    with serve(hub) as (endpoint, asked):
        done = run(LOAD, tmp_path / "cache", endpoint)
        assert done.returncode == 0, done.stderr
        assert set(asked) == wanted
        large = [name for name in asked if name.endswith(".safetensors")]
        assert len(large) == len(set(large)), "weights come twice"
        assert not {"Fetching", "Downloading"} & set(
            done.stderr.split()
        )  # old transformers note something else
    done = run(LOAD, tmp_path / "cache", "http://127.0.0.1:9", offline=True)
    assert done.returncode == 0, done.stderr


def test_a_cache_of_the_vae_s_two_files_is_enough(hub, tmp_path):
    """Stops: a VAE that is there refused offline, because files that nobody reads are not."""
    with serve(hub) as (endpoint, _):
        done = run(f"{FILL}{VAE!r})", tmp_path / "cache", endpoint)
        assert done.returncode == 0, done.stderr
        done = run(
            LOAD.replace("jf.load(", "jf.load(parts='understanding', source="), tmp_path / "cache", endpoint
        )
        assert done.returncode == 0, done.stderr
    done = run(LOAD, tmp_path / "cache", "http://127.0.0.1:9", offline=True)
    assert done.returncode == 0, done.stderr


def test_another_model_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    """Stops: Janus-Pro, or its VAE, downloaded by the gigabyte to be told that it is another model."""
    (hub / "someone" / "model" / "config.json").write_text(json.dumps({"gen_vision_config": {}}))
    with serve(hub) as (endpoint, asked):
        done = run(LOAD, tmp_path / "cache", endpoint)
    assert done.returncode == 1 and "this looks like Janus or Janus-Pro" in done.stderr
    assert not [name for name in asked if name.endswith(".safetensors")]


def test_what_the_hub_lacks_is_said(hub, tmp_path):
    """Stops: a hundred lines of a network library for a mistyped name."""
    with serve(hub) as (endpoint, _):
        done = run(LOAD.replace("someone/model", "someone/modell"), tmp_path / "cache", endpoint)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Check its name" in done.stderr, last


def test_an_interrupted_download_goes_on(hub, tmp_path):
    """Stops: gigabytes from the start again for a line that broke, and files that are there fetched once more. (A file
    of which a process that ended had a part is begun anew: the hub's client no longer keeps such parts.)"""
    weights, cache, mega = hub / "someone" / "model" / WEIGHTS, tmp_path / "cache", 2**20
    padding = {"vision_und_enc_model.vision_tower.attn_pool.padding": torch.zeros(6 * mega)}
    save_file({name: tensor.clone() for name, tensor in load_file(weights).items()} | padding, weights)
    assert weights.stat().st_size > 24 * mega
    with serve(hub, cut=mega) as (endpoint, asked):
        done = run(LOAD, cache, endpoint)
    assert done.returncode == 1 and "could not be downloaded" in done.stderr
    assert {"config.json", "tokenizer.json"} < set(asked)
    with serve(hub, cut=11 * mega) as (endpoint, again):  # the client writes 10 MiB at once
        done = run(LOAD, cache, endpoint)
        # Before 1.0 the client gives up where the line breaks, and goes on in the next process.
        for _ in range(3 if version("huggingface_hub") < "1" else 0):
            done = run(LOAD, cache, endpoint) if done.returncode else done
    assert done.returncode == 0, done.stderr
    assert set(again) == {WEIGHTS, *VAE} and again.count(WEIGHTS) > 1
    assert again.sent < 1.2 * weights.stat().st_size, "the weights are sent from the start again"


def test_a_revision_is_loaded_and_kept_apart(hub, tmp_path):
    """Stops: `revision` left out on the way to the hub, or a cache of one commit used for another."""
    branch = hub / "someone" / "model@v2"
    shutil.copytree(hub / "someone" / "model", branch)
    tensors = {name: tensor.clone() for name, tensor in load_file(branch / WEIGHTS).items()}
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, branch / WEIGHTS)
    code = f"print(float(({LOAD.partition(';')[2].strip()}).model.llm.norm.weight.sum()))"
    total = float(tensors["language_model.model.norm.weight"].sum())
    with serve(hub) as (endpoint, _):
        for more, factor in (("", 1), (", revision='v2'", 2), (", revision='main'", 1)):
            done = run(
                f"import janusflow_min as jf; {code.replace('progress=False', 'progress=False' + more)}",
                tmp_path / "cache",
                endpoint,
            )
            assert done.returncode == 0, done.stderr
            assert abs(float(done.stdout) - factor * total) < 1e-3
        done = run(LOAD.replace("progress", "revision='v3', progress"), tmp_path / "cache", endpoint)
    assert done.returncode == 1 and "It has no branch, tag or commit 'v3'" in done.stderr


def test_a_gated_repository_says_where_to_ask(hub, tmp_path):
    """Stops: a page of a network library for a licence that has to be accepted."""
    with serve(hub, gated="someone/model") as (endpoint, _):
        done = run(LOAD, tmp_path / "cache", endpoint)
    assert done.returncode == 1
    assert "Ask for access on https://huggingface.co/someone/model, then `hf auth login`" in done.stderr


def test_an_empty_cache_offline_says_what_to_do(tmp_path):
    """Stops: a machine without a network that waits, or that tells nothing of copying the files there."""
    done = run(LOAD, tmp_path / "cache", "http://127.0.0.1:9", offline=True)
    assert done.returncode == 1 and "Without a network, copy the repository's files" in done.stderr


def test_an_adapter_comes_from_the_hub(hub, tmp_path, parity_dir):
    """Stops: adapters that only a folder may hold, or a whole repository fetched for one."""
    model = jf.load(parity_dir, device="cpu", progress=False).model
    folder = write_adapter(hub / "someone" / "dog", model)
    (folder / "optimizer.pt").write_bytes(b"not to be read")
    use = f"pipe = jf.load({str(parity_dir)!r}, device='cpu', progress=False); "
    use = f"import janusflow_min as jf; {use}print(pipe.load_lora('someone/dog'), pipe.adapters)"
    with serve(hub) as (endpoint, asked):
        done = run(use, tmp_path / "cache", endpoint)
    assert done.stdout == "dog {'dog': 1.0}\n", done.stderr
    assert sorted(asked) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run(use, tmp_path / "cache", "http://127.0.0.1:9", offline=True).stdout == done.stdout


INFO = "import sys; from janusflow_min.cli import main; sys.exit(main(['info', 'someone/model', *{!r}]))"


@pytest.mark.parametrize("sharded", [False, True])
def test_info_on_a_hub_id_reads_headers_alone(hub, tmp_path, sharded):
    """Stops: four gigabytes downloaded to see what a repository holds; a report other than the folder's own."""
    model, vae = hub / "someone" / "model", hub / "stabilityai" / "sdxl-vae"
    padding = torch.zeros(3_000_000)  # so that the weights are larger than what the client asks for at once
    content = load_file(model / WEIGHTS) | {"vision_und_enc_model.vision_tower.attn_pool.padding": padding}
    if sharded:
        weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(content)}
        for file in set(weight_map.values()):
            save_file({k: v for k, v in content.items() if weight_map[k] == file}, model / file)
        (model / WEIGHTS).unlink()
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(content, model / WEIGHTS)
    with serve(hub) as (endpoint, asked):
        done = run(INFO.format(["--vae", "stabilityai/sdxl-vae"]), tmp_path / "cache", endpoint)
    assert done.returncode == 0, done.stderr + done.stdout
    small = sum(p.stat().st_size for p in model.glob("*.json")) + (vae / "config.json").stat().st_size
    assert small < asked.sent <= small + 3 * 100_001 < padding.nbytes
    assert "missing or wrong: nothing" in done.stdout
    folder = subprocess.run(
        [sys.executable, "-m", "janusflow_min", "info", str(model), "--vae", str(vae)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert folder.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]


def test_info_says_what_a_repository_lacks(hub, tmp_path):
    """Stops: a repository without weights, with a page in their place, or that is not there, called whole."""
    weights = hub / "someone" / "model" / WEIGHTS
    for damage, what in (
        (
            lambda: weights.write_bytes(b"<html>" * 100),
            f"{WEIGHTS} in 'someone/model' is not a whole safetensors",
        ),
        (weights.unlink, f"holds neither {WEIGHTS} nor {INDEX}"),
    ):
        damage()
        with serve(hub) as (endpoint, _):
            done = run(INFO.format([]), tmp_path / "cache", endpoint)
        assert done.returncode == 1 and what in done.stdout, done.stdout + done.stderr
    with serve(hub) as (endpoint, _):
        done = run(INFO.format([]).replace("e/model", "e/modell"), tmp_path / "cache", endpoint)
    assert done.returncode == 2 and "Check its name" in done.stderr, done.stderr


@pytest.mark.parametrize("source", ["", "~/nothing/here", "./none", "a/b/c", "model.safetensors"])
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source):
    """Stops: "" meaning the current folder, and a weights file taken for a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=r"empty|neither a folder nor a hub id"):
        jf.load(source)


def test_a_janus_pro_folder_asks_no_hub(parity_dir, tmp_path, monkeypatch):
    """Stops: 335 MB of a VAE fetched for a folder whose configuration is another model's."""

    def asked(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "multi_modality", "gen_vision_config": {}})
    )
    with pytest.raises(ValueError, match="Janus-Pro"):
        jf.load(tmp_path, device="cpu")


def test_one_rule_finds_the_vae(parity_dir, tmp_path):
    """Stops: loading, training and benchmarks that look for the VAE in different places."""
    assert resolve_vae(parity_dir) == parity_dir / "vae"
    assert resolve_vae(tmp_path, parity_dir) == parity_dir / "vae"
    assert resolve_vae(tmp_path, parity_dir / "vae") == parity_dir / "vae"
    assert resolve("tiny").name == "tiny" and resolve_vae(resolve("tiny")) == resolve("tiny") / "vae"
