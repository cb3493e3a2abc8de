# SPDX-License-Identifier: MIT
"""The script that makes the default model: its batches of fixed shape and the trainer's own objective."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain_losses import generation_loss, understanding_loss

from janusflow_min.checkpoint import load_model
from janusflow_min.hub import TINY
from janusflow_min.processor import Processor
from janusflow_min.shapes import scenes
from janusflow_min.training.config import ObjectiveConfig
from janusflow_min.training.losses import AlignmentHead, JanusFlowLoss


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        return importlib.import_module("train_shapes")


def test_the_default_learns_by_the_trainer_s_objective(script):
    """Stops: a default made by another objective; a prompt that is hidden otherwise, an image at other positions, a
    label too late; shapes that depend on the data, which no CUDA graph can hold."""
    recipe = script.replace(script.Recipe(), conversation_length=192)
    pairs = script.make_chunk(("generation", 0, 4, recipe, TINY))
    talks = script.make_chunk(("conversation", 0, 2, recipe, TINY))
    model = load_model(TINY, progress=False).requires_grad_(True)
    torch.manual_seed(0)
    head = AlignmentHead(256, 128)
    pad = Processor.from_folder(TINY, model.config.llm.vocab_size).tokenizer.pad_id
    ids = torch.from_numpy(pairs["ids"])[:, 0].long()
    images = scenes.render(torch.from_numpy(pairs["packed"]))
    asked, labels = (torch.from_numpy(talks[key]).long() for key in ("ids", "labels"))
    about = scenes.render(torch.from_numpy(talks["packed"]))
    places = (asked[..., None] == torch.tensor(script.image_token_ids(TINY))).any(-1)
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
        first = objective(script.generation_batch(ids, pad, drop, count, t, noise, latents, images))
        second = objective(script.conversation_batch(asked, labels, places, about))
        return first.total / len(ids) + second.total

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
