# SPDX-License-Identifier: MIT
"""The script that makes the default model: its batches of fixed shape and the trainer's own objective."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from plain_losses import generation_loss, understanding_loss
from sprites import invented

from janusflow_min.checkpoint import load_model
from janusflow_min.hub import TINY
from janusflow_min.model import JanusFlow
from janusflow_min.processor import Processor
from janusflow_min.shapes import scenes
from janusflow_min.things.atlas import save_atlas
from janusflow_min.training.config import ObjectiveConfig
from janusflow_min.training.losses import AlignmentHead, JanusFlowLoss
from janusflow_min.training.optimizer import Schedule
from janusflow_min.training.step import TrainStep
from janusflow_min.worlds import SHAPES, open_world


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        return importlib.import_module("train_shapes")


@pytest.fixture(scope="module")
def data(script) -> ModuleType:
    return importlib.import_module("shapes_data")


def test_the_default_learns_by_the_trainer_s_objective(data):
    """Stops: a default made by another objective; a prompt that is hidden otherwise, an image at other positions, a
    label too late; shapes that depend on the data, which no CUDA graph can hold."""
    recipe = replace(data.Recipe(), conversation_length=192)
    pairs = data.make_chunk(("shapes", "generation", 0, 4, recipe, TINY, None))
    talks = data.make_chunk(("shapes", "conversation", 0, 2, recipe, TINY, None))
    model = load_model(TINY, progress=False).requires_grad_(True)
    torch.manual_seed(0)
    head = AlignmentHead(256, 128)
    tokenizer = Processor.from_folder(TINY, model.config.llm.vocab_size).tokenizer
    ids, pad = torch.from_numpy(pairs["ids"])[:, 0].long(), tokenizer.pad_id
    images = scenes.render(torch.from_numpy(pairs["packed"]))
    asked, labels = (torch.from_numpy(talks[key]).long() for key in ("ids", "labels"))
    about = scenes.render(torch.from_numpy(talks["packed"]))
    places = (asked == tokenizer.image_start_id) | (asked == tokenizer.image_id)
    g = torch.Generator().manual_seed(1)
    t, drop = torch.rand(4, generator=g), torch.tensor([False, True, False, True])
    latents, noise = (torch.randn(4, *model.latent_shape, generator=g) for _ in range(2))

    left = torch.stack([row.roll(int((row == pad).sum())) for row in ids])
    one = generation_loss(model, head, latents, images, left, left != pad, t, noise, drop, tap=2)
    answers = understanding_loss(model, asked, labels, places, about)
    wanted = one.flow.mean() + 0.5 * one.alignment.mean() + 0.25 * answers
    settings = ObjectiveConfig(alignment_layer=2, alignment_weight=0.5, answer_weight=0.25)
    objective = JanusFlowLoss(model, head, settings)

    def losses() -> torch.Tensor:
        count = model.num_image_tokens
        first = objective(data.generation_batch(ids, pad, drop, count, t, noise, latents, images))
        second = objective(data.conversation_batch(asked, labels, places, about, weight=len(ids)))
        return (first.total + second.total) / len(ids)

    parameters = [*model.parameters(), *head.parameters()]
    expected = torch.autograd.grad(wanted, parameters, allow_unused=True)
    found = torch.autograd.grad(losses(), parameters, allow_unused=True)
    torch.testing.assert_close(losses(), wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-8)
    torch.testing.assert_close(
        torch.compile(losses, backend="eager", fullgraph=True)(), wanted, rtol=1e-5, atol=1e-6
    )


@pytest.fixture
def training(script, data, tmp_path):
    """The model's training over a few scenes, on the CPU."""
    recipe = replace(data.Recipe(), **data.SMOKE)
    shutil.copytree(TINY, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("vae", "*.safetensors"))
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    for kind, count in (("generation", 20), ("conversation", 5)):
        chunk = data.make_chunk(("shapes", kind, 0, count, recipe, TINY, None))
        np.savez(tmp_path / f"{kind}-shapes.npz", **chunk)
    worlds = [SHAPES]
    return lambda **options: script.ModelTraining(
        recipe, worlds, tmp_path, torch.device("cpu"), **{"compiled": False, "init": None, **options}
    )


def test_the_default_is_trained_by_the_trainer_s_step(training, tmp_path):
    """Stops: a default trained by a second trainer; a checkpoint that another step goes on from; an export that does
    not open."""
    whole = training(init=TINY)
    lines = []
    for i in range(4):
        whole.set_schedule()
        metrics = whole.update()
        whole.step += 1
        lines.append(whole.numbers(metrics))
        if i == 1:
            whole.save()
    again = training()
    assert again.step == 2
    for line in lines[2:]:
        again.set_schedule()
        metrics = again.update()
        again.step += 1
        assert again.numbers(metrics) == line
    for name, tensor in whole.optimizer.master.items():
        assert torch.equal(tensor, again.optimizer.master[name]), name
    assert load_model(tmp_path / "tiny", progress=False).config == whole.model.config


def test_a_step_can_be_captured_in_a_graph(training):
    """Stops: a training step that waits for the GPU or keeps its sums elsewhere each time, which no CUDA graph can
    hold. Meta tensors stand for the GPU's: asking one for its value is an error."""
    setup, meta = training(init=TINY), torch.device("meta")
    batches = [batch.to(meta) for batch in setup.batches(*setup.draw())]
    step = TrainStep(setup.recipe.settings(), JanusFlow(setup.model.config).to(meta), meta, torch.bfloat16)
    schedule, places = Schedule(*torch.zeros(4, device=meta)), []
    for i in range(3):
        metrics, _ = step.step(i, batches, schedule=schedule)
        places.append({name: id(buffer) for name, buffer in step.optimizer.buffers.items()})
    with pytest.raises(RuntimeError, match="meta"):
        metrics["loss"].tolist()
    assert metrics.keys() >= {"loss", "flow", "answers", "norm"}
    assert places[0] and places[0] == places[1] == places[2]


def test_two_worlds_share_a_step(script, data, tmp_path):
    """Stops: images of one world with the latents or the words of another; a world that a batch leaves out; a model
    that opens with other sizes than its recipe's."""
    save_atlas(invented(), tmp_path / "things.npz")
    small = dict(hidden_size=64, intermediate_size=64, layers=2, siglip_width=32, uvit_channels=16)
    recipe = replace(data.THINGS, **{**data.SMOKE, **small, "vae_seconds": 0.01, "vae_batch": 4})
    cpu, atlas = torch.device("cpu"), tmp_path / "things.npz"
    worlds = [open_world(name, atlas, cpu) for name, _ in recipe.worlds]
    corpus = [text for world in worlds for text in world.corpus()]
    data.make_tokenizer(tmp_path / "tokenizer", recipe.vocabulary, corpus)
    for name, _ in recipe.worlds:
        for kind in ("generation", "conversation"):
            chunk = data.make_chunk((name, kind, 0, 6, recipe, tmp_path / "tokenizer", atlas))
            np.savez(tmp_path / f"{kind}-{name}.npz", **chunk)
    script.train_vae(recipe, worlds, tmp_path / "vae", cpu, compiled=False)
    assert set(script.measure_vae(worlds, tmp_path / "vae", cpu, 4)) == {"things", "shapes", "flat"}
    setup = script.ModelTraining(recipe, worlds, tmp_path, cpu, compiled=False, init=None)
    packed, latents, ids, *_ = drawn = setup.draw()
    assert [len(part) for part in packed] == list(data.shares(recipe, recipe.batch).values()) == [6, 2]
    vae = script.load_frozen_vae(tmp_path / "vae", cpu)
    pixels = torch.cat([world.render(part) for world, part in zip(worlds, packed, strict=True)])
    torch.testing.assert_close(latents, vae.encode(pixels), atol=0.05, rtol=0.05)  # kept in bfloat16
    tokenizer = Processor.from_folder(tmp_path / "tokenizer", setup.model.config.llm.vocab_size).tokenizer
    words = [tokenizer.decode(row[row != setup.pad].tolist()).lower() for row in ids]
    assert len(words) == 8
    shown = [sum(shape in text for shape in scenes.SHAPES) for text in words]
    assert not any(shown[:6]) and all(shown[6:])
    first, second = torch.compile(setup.batches, backend="eager", fullgraph=True)(*drawn)
    torch.testing.assert_close(first.pixels, pixels)
    assert len(second.und_pixels) == sum(data.shares(recipe, recipe.conversation_batch).values())
    setup.set_schedule()
    assert torch.isfinite(setup.update()["loss"][0])
    setup.save()
    config = load_model(tmp_path / "tiny", progress=False).config
    assert (config.latent_channels, config.llm.hidden_size, config.siglip.width) == (8, 64, 32)


def test_no_caption_is_too_long(data):
    """Stops: a run that ends, or a caption that is cut, because of one in a million that is longer than expected."""
    recipe = replace(data.Recipe(), prompt_length=4, conversation_length=8)
    for kind, least in (("generation", 4), ("conversation", 8)):
        short, long = (
            data.make_chunk(("shapes", kind, 0, 3, replace(recipe, **lengths), TINY, None))["ids"]
            for lengths in ({}, {"prompt_length": 60, "conversation_length": 400})
        )
        width = short.shape[-1]
        assert least < width < long.shape[-1] in (60, 400)
        np.testing.assert_array_equal(data.joined([short], -1), short)
        both = data.joined([short, long], -1)
        np.testing.assert_array_equal(both[3:], long)
        np.testing.assert_array_equal(both[:3, ..., :width], long[..., :width])
        assert (both[:3, ..., width:] == -1).all()


def test_flat_images_are_of_any_colour(data):
    """Stops: a VAE that is taught nothing but the worlds' colours, or values outside [-1, 1]."""
    torch.manual_seed(0)
    images = data.flat_images(40, torch.device("cpu"))
    assert images.shape == (40, 3, scenes.SIZE, scenes.SIZE) and images.abs().max() <= 1 + 1e-5
    means = images.mean((2, 3))
    assert means.std(0).min() > 0.2 and (images.amax((2, 3)) - images.amin((2, 3))).mean() > 0.5
