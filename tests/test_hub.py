# SPDX-License-Identifier: MIT
"""Hub ids: what is asked for, what is downloaded, what works without a network. The hub is `hub_server.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serve
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


def run(code: str, cache: Path, endpoint: str, offline: bool = False) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    root = str(Path(__file__).resolve().parents[1])
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": root}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    return done


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
