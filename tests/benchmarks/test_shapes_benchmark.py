# SPDX-License-Identifier: MIT
"""The benchmark of the default model's world: one small run, scored whole and damaged."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import shapes
from janusflow_min.benchmarks.runner import Settings
from janusflow_min.shapes import captions, scenes

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
    assert result["complete"] and result["n_scored"] == 17
    assert result["others"]["answers right"]["value"] >= 0.8  # the default answers nearly all of them rightly
    assert sorted(path.name for path in run.iterdir()) == [
        "answers",
        "edits",
        "images",
        "item_scores.jsonl",
        "manifest.json",
        "score.json",
    ]
    part = score(run, limit=5)
    assert part["n_scored"] == 15 and not part["complete"]


def test_a_dry_run_judges_nothing(run, capsys):
    """Stops: an option that is taken and ignored."""
    assert cli.main(["bench", "shapes", "score", "--out", str(run), "--dry-run", "--quiet"]) == 0
    assert "6 images, 6 answers and 5 edits" in capsys.readouterr().out
    assert not (run / "score.json").exists() and not (run / "item_scores.jsonl").exists()


def test_a_damaged_image_is_a_failure_by_name_and_made_again(run):
    """Stops: an image damaged in its middle, which ends scoring without a name or gets a grade."""
    path = run / "images" / "00002.png"
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 255]) + before[middle + 1 :])
    result = score(run)
    assert result["n_scored"] == 16 and "00002.png: the file is empty or damaged" in result["notes"][0]
    assert shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1)).complete
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[", "null", "{}", "[1, null, 2, 3]", "[]", '["a"]', "3"])
def test_damaged_answers_are_a_failure_by_name_and_made_again(run, content):
    """Stops: an empty file that counts as answered for ever, and fails every score."""
    path = run / "answers" / "00000.json"
    before = path.read_bytes()
    path.write_text(content)
    result = score(run)
    assert result["n_scored"] == 13 and "answers 0 to 3: " in result["notes"][0]
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


def test_edits_are_judged_beside_their_originals(run):
    """Stops: an edit judged as another, one that is missed when it is damaged, and one generated anew."""
    cases = shapes.edits(1)
    for i, case in enumerate(cases):
        path = run / "edits" / f"{i:05d}.png"
        source = path.with_name(f"{i:05d}-source.png")
        assert source.read_bytes() != path.read_bytes()
        scenes.to_pil(scenes.render(scenes.pack([case.target]))[0]).save(path)
    result = score(run)
    assert {result["others"][name]["value"] for name in ("edited", "kept")} == {1.0}
    shutil.copyfile(
        run / "edits" / "00000-source.png", run / "edits" / "00000.png"
    )  # colour: nothing is changed
    shutil.copyfile(run / "edits" / "00001.png", run / "edits" / "00002.png")  # add: another case's image
    scores = score(run)["scores"]
    seen = [scores[f"{kind} {what}"]["value"] for kind in ("colour", "add") for what in ("edited", "kept")]
    assert seen == [0.0, 1.0, 0.0, 0.0]
    (run / "edits" / "00003.png").write_bytes(b"")
    result = score(run)
    assert "edits/00003.png: the file is empty or damaged" in result["notes"][0] and not result["complete"]


def test_edits_are_resumed_and_follow_their_options(made, run, monkeypatch):
    """Stops: an edit that depends on the ones made with it before, or an option that is taken and ignored."""
    whole = {path.name: path.read_bytes() for path in (made / "edits").iterdir()}
    (run / "edits" / "00001.png").unlink()
    (run / "edits" / "00004-source.png").unlink()
    (run / "edits" / "00004.png").write_bytes(b"cut")
    shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1))
    assert {path.name: path.read_bytes() for path in (run / "edits").iterdir()} == whole
    for changed in ({"edit_method": "sdedit"}, {"edit_strength": 0.5}, {"edits": False}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            shapes.generate(SETTINGS, run, shapes.GenerateOptions(cases=1, **changed))
    monkeypatch.setattr(shapes, "load_pipe", lambda *_: pytest.fail("the model was loaded"))
    for wrong in ({"edit_method": "magic"}, {"edit_strength": 0.0}, {"edit_strength": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            shapes.generate(SETTINGS, run / "new", shapes.GenerateOptions(cases=1, **wrong))
        assert not (run / "new").exists()


def test_a_run_without_edits_is_whole(tmp_path):
    """Stops: a benchmark that misses what nobody asked it to make."""
    options = shapes.GenerateOptions(cases=1, edits=False)
    assert shapes.generate(SETTINGS, tmp_path / "run", options).complete
    result = score(tmp_path / "run")
    assert result["complete"] and result["n_scored"] == 12 and set(result["others"]) == {"answers right"}
    assert not (tmp_path / "run" / "edits").exists()


def test_true_renders_are_judged_right(run):
    """Stops: prompts and files out of step."""
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
