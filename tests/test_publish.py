# SPDX-License-Identifier: MIT
"""Uploading a pipeline with its card. The hub is `hub_server.py`."""

from __future__ import annotations

import json

import pytest
from hub_server import TOKEN, run, serve
from PIL import Image
from safetensors.torch import load_file

import janusflow_min as jf
from janusflow_min.official import INDEX, WEIGHTS
from janusflow_min.publish import model_card
from janusflow_min.training.config import Config, LoraConfig, ReportConfig, SourceConfig
from janusflow_min.training.settings import to_toml

PUSH = """import janusflow_min as jf
pipe = jf.load({source!r}, device="cpu", progress=False, {options})
print(jf.push_to_hub(pipe, "someone/mine", {arguments}))"""


@pytest.fixture
def training(tmp_path):
    """The OUTPUT folder of a run, as training leaves it."""
    folder = tmp_path / "secret" / "run"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "samples" / "step-00000002.png")
    data = SourceConfig("generation", manifest=str(tmp_path / "secret" / "dogs.jsonl"))
    hub = SourceConfig("understanding", dataset="someone/questions")
    config = Config(
        (data, hub), model="deepseek-ai/JanusFlow-1.3B", output=str(folder), lora=LoraConfig(rank=4), steps=2, seed=7,
        report=ReportConfig(questions=("Who?",), images=(str(tmp_path / "secret" / "rex.png"),)),
    )  # fmt: skip
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    rows = {"loss": 0.75}, {"loss": 0.5, "sheet": "samples/step-00000002.png"}, {"answered": ["Rex"]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_model_goes_to_the_hub_and_comes_back(parity_dir, training, tmp_path):
    """Stops: a repository that `load` cannot read, or that lacks what the card shows; shards of an older upload beside
    the new weights; other people's files deleted."""
    there = tmp_path / "hub" / "someone" / "mine"
    there.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", INDEX, "notes.txt"):
        (there / name).write_text("older")
    arguments = f"run={str(training)!r}, license='mit'"
    code = PUSH.format(source=str(parity_dir), options="", arguments=arguments)
    with serve(tmp_path / "hub") as (endpoint, _):
        done = run(code, tmp_path / "cache", endpoint, token=TOKEN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{endpoint}/someone/mine/commit/")
        back = f"jf.save(jf.load('someone/mine', progress=False), {str(tmp_path / 'back')!r})"
        done = run(f"import janusflow_min as jf; {back}", tmp_path / "cache", endpoint)
        assert done.returncode == 0, done.stderr
    names = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert {WEIGHTS, "config.json", "README.md", "samples.png", "notes.txt", "vae/config.json"} < names
    assert not {"model-00001-of-00002.safetensors", INDEX} & names
    mine, returned = (load_file(folder / WEIGHTS) for folder in (parity_dir, tmp_path / "back"))
    assert mine.keys() == returned.keys() and all((mine[key] == returned[key]).all() for key in mine)
    assert Image.open(there / "samples.png").getpixel((0, 0)) == (255, 0, 0)


def test_the_card_says_how_the_model_came_about(training, tmp_path):
    """Stops: a card without base model, licence, data or settings; one that publishes folders of somebody's machine."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text, samples = model_card("someone/mine", training, "mit")
    about = huggingface_hub.ModelCard(text).data
    assert about.license == "mit" and about.base_model == "deepseek-ai/JanusFlow-1.3B"
    assert samples == training / "samples" / "step-00000002.png" and "![Samples](samples.png)" in text
    for words in (
        'jf.load("someone/mine")', "Licence: mit", "LoRA of rank 4, merged, 2 steps of", "validation loss was 0.5",
        'manifest = "dogs.jsonl"', 'dataset = "someone/questions"', 'images = ["rex.png"]', "seed = 7",
    ):  # fmt: skip
        assert words in text, words
    assert "secret" not in text and str(tmp_path) not in text
    bare, samples = model_card("someone/mine", None, None)
    assert samples is None and "Licence: not stated" in bare and "## Training" not in bare
    assert huggingface_hub.ModelCard(bare).data.license is None


def test_what_cannot_be_uploaded_leaves_nothing(parity_dir, tmp_path):
    """Stops: minutes of writing weights before a missing login is told; an empty repository that stays behind."""
    cases = {
        ("", "", ""): "It needs a network, and a token that may write there: `hf auth login`",
        ("", "", "hf_another"): "'someone/mine' was not written",
        ("parts='understanding'", "", TOKEN): "only 'understanding' was loaded",
        ("", "run='nowhere'", TOKEN): "nowhere",
    }
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub") as (endpoint, _):
        for (options, arguments, token), words in cases.items():
            code = PUSH.format(source=str(parity_dir), options=options, arguments=arguments)
            done = run(code, tmp_path / "cache", endpoint, token=token)
            assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not list((tmp_path / "hub").iterdir())


@pytest.mark.parametrize("name", ["mine", "a/b/c", "", "some one/mine", "../mine", 3])
def test_a_name_that_is_none_is_refused(name):
    """Stops: a repository under another name than was meant, or a library's own error."""
    with pytest.raises(ValueError, match="repository must be owner/name, got"):
        jf.push_to_hub(None, name)
