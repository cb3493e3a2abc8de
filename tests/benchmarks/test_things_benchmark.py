# SPDX-License-Identifier: MIT
"""The benchmark of the world of things, on invented sprites: a small run, and what a right model would get."""

from __future__ import annotations

import random

import pytest
from sprites import invented

from janusflow_min.benchmarks import things
from janusflow_min.benchmarks.runner import Settings
from janusflow_min.shapes.scenes import to_pil
from janusflow_min.things import scenes
from janusflow_min.things.atlas import save_atlas

SETTINGS = Settings(num_inference_steps=1, batch_size=4, device="cpu", progress=False)


@pytest.fixture
def atlas(tmp_path):
    save_atlas(invented(), tmp_path / "things.npz")
    return str(tmp_path / "things.npz")


def test_a_run_is_scored_and_true_renders_are_right(tmp_path, atlas):
    """Stops: prompts and files out of step; answers judged against other questions; a share that is not asked for."""
    run, options = tmp_path / "run", things.GenerateOptions(cases=1, atlas=atlas)
    assert things.generate(SETTINGS, run, options).complete
    result = things.score(run, things.ScoreOptions(progress=False, atlas=atlas))
    assert result["complete"] and result["n_scored"] == 6 + 7
    assert result["headline"]["value"] < 1.0  # the default has never seen these
    world = scenes.World(invented())
    for i, family in enumerate(scenes.FAMILIES):
        scene = world.sample_scene(random.Random(f"prompt {family} 0 0"), family, "held_out")
        to_pil(world.render(world.pack([scene]))[0]).save(run / "images" / f"{i:05d}.png")
    result = things.score(run, things.ScoreOptions(progress=False, atlas=atlas, at_least=1.0))
    assert result["headline"]["value"] == 1.0
    with pytest.raises(ValueError, match=r"of 7 answers are right, at least 100\.0% are needed"):
        things.score(run, things.ScoreOptions(progress=False, atlas=atlas, answers_at_least=1.0))
    save_atlas(invented(seed=1), tmp_path / "other.npz")
    with pytest.raises(ValueError, match="another atlas"):
        things.score(run, things.ScoreOptions(progress=False, atlas=str(tmp_path / "other.npz")))


def test_a_missing_atlas_is_named_before_the_model_is_loaded(tmp_path, monkeypatch):
    """Stops: a model loaded for a benchmark that cannot be drawn."""
    monkeypatch.setattr(things, "load_pipe", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError, match=r"none\.npz is missing.*things_atlas"):
        things.generate(
            SETTINGS, tmp_path / "run", things.GenerateOptions(cases=1, atlas=str(tmp_path / "none.npz"))
        )
    assert not (tmp_path / "run").exists()
