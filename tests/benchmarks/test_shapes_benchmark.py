# SPDX-License-Identifier: MIT
"""The benchmark of the default model's world: one small run, scored whole and damaged."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import shapes
from janusflow_min.benchmarks.runner import Settings

SETTINGS = Settings(num_inference_steps=1, batch_size=4, device="cpu", progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "run"
    assert shapes.generate(SETTINGS, folder, shapes.GenerateOptions(cases=1)).complete
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def score(run, **options):
    return shapes.score(run, shapes.ScoreOptions(progress=False, **options))


def test_a_whole_run_is_scored_and_leaves_no_working_files(run):
    """Stops: answers judged against other questions, and folders of temporary files that stay."""
    result = score(run)
    assert result["complete"] and result["n_scored"] == 12
    assert result["others"]["answers right"]["value"] >= 0.8  # the default answers nearly all of them rightly
    assert sorted(path.name for path in run.iterdir()) == [
        "answers",
        "images",
        "item_scores.jsonl",
        "manifest.json",
        "score.json",
    ]
    part = score(run, limit=5)
    assert part["n_scored"] == 10 and not part["complete"]


def test_a_dry_run_judges_nothing(run, capsys):
    """Stops: an option that is taken and ignored."""
    assert cli.main(["bench", "shapes", "score", "--out", str(run), "--dry-run", "--quiet"]) == 0
    assert "6 images and 6 answers" in capsys.readouterr().out
    assert not (run / "score.json").exists() and not (run / "item_scores.jsonl").exists()


def test_a_damaged_image_is_a_failure_by_name_and_made_again(run):
    """Stops: an image damaged in its middle, which ends scoring without a name or gets a grade."""
    path = run / "images" / "00002.png"
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 255]) + before[middle + 1 :])
    result = score(run)
    assert result["n_scored"] == 11 and "00002.png: the file is empty or damaged" in result["notes"][0]
    assert shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1)).complete
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[", "null", "{}", "[1, null, 2, 3]", "[]", '["a"]', "3"])
def test_damaged_answers_are_a_failure_by_name_and_made_again(run, content):
    """Stops: an empty file that counts as answered for ever, and fails every score."""
    path = run / "answers" / "00000.json"
    before = path.read_bytes()
    path.write_text(content)
    result = score(run)
    assert result["n_scored"] == 8 and "answers 0 to 3: " in result["notes"][0]
    assert str(path) in result["notes"][0] and not result["complete"]
    shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1))
    assert path.read_bytes() == before and score(run)["complete"]


def test_a_folder_in_the_place_of_a_file_is_named_before_the_model_is_loaded(run, monkeypatch):
    """Stops: "[Errno 21] Is a directory" after minutes of work."""
    monkeypatch.setattr(shapes, "load_pipe", lambda *_: pytest.fail("the model was loaded"))
    path = run / "images" / "00003.png"
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"00003\.png is a folder.*move it away"):
        shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1))
    path.rmdir()
    shutil.rmtree(run / "images")
    (run / "images").write_text("")
    with pytest.raises(NotADirectoryError, match="images"):
        shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1))


def test_true_renders_are_judged_right(run):
    """Stops: prompts and files out of step."""
    import random

    from janusflow_min.shapes import captions, scenes

    for i, family in enumerate(scenes.FAMILIES):
        rng = random.Random(f"prompt {family} 0 0")
        scene = scenes.sample_scene(rng, family, "held_out")
        assert captions.caption(scene, family, rng, "plain") == shapes.prompts(1)[i][1]
        scenes.to_pil(scenes.render(scenes.pack([scene]))[0]).save(run / "images" / f"{i:05d}.png")
    result = score(run, at_least=1.0)
    assert result["headline"]["value"] == 1.0
    Image.new("RGB", (128, 128)).save(run / "images" / "00000.png")
    with pytest.raises(ValueError, match=r"83.3% of 6 images are right, at least 100.0% are needed"):
        score(run, at_least=1.0)
    assert json.loads((run / "score.json").read_text())["headline"]["value"] == pytest.approx(5 / 6)
