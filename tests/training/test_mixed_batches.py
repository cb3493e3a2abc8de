# SPDX-License-Identifier: MIT
"""The objective of mixed batches against plain formulas, and the draws that it is fed.

The formulas take one sample at a time, without padding, masks or batching; gradients are compared parameter by
parameter in fp32.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from plain_losses import generation_loss, understanding_loss
from torch import Tensor

from janusflow_min.checkpoint import load_model
from janusflow_min.processor import Processor
from janusflow_min.training.batch import collate, unpack
from janusflow_min.training.config import ObjectiveConfig
from janusflow_min.training.losses import IGNORE, AlignmentHead, JanusFlowLoss, MixedBatch, by_time
from janusflow_min.training.rows import seeded_generator
from janusflow_min.training.sample import SampleBuilder

TAP = 2
KINDS = ("generation", "hidden", "understanding", "text", "mixed")


@pytest.fixture(scope="module")
def objective(parity_dir) -> JanusFlowLoss:
    model = load_model(parity_dir, progress=False).requires_grad_(True)
    torch.manual_seed(0)
    return JanusFlowLoss(model, AlignmentHead(64, 32), ObjectiveConfig(alignment_layer=TAP))


@pytest.fixture
def builder(settings, processor, objective) -> SampleBuilder:
    return SampleBuilder(settings(), processor, objective.model)


@pytest.fixture
def samples(builder, manifest) -> dict[str, list]:
    """Three samples of each kind."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        if "image" in row:
            row["image"] = str(manifest.parent / row["image"])
        for message in row.get("conversation", []):
            message["images"] = [str(manifest.parent / name) for name in message.get("images", [])]

    def made(which: list[dict], kind: str, drop: float) -> list:
        found = [builder(row, kind, seeded_generator("test", i), drop) for i, row in enumerate(which)]
        for i, sample in enumerate(found):
            if kind == "generation":
                g = torch.Generator().manual_seed(i)
                sample.cached["latents"] = torch.randn(4, 8, 8, generator=g) * 2
        return found

    found = {
        "generation": made(rows[2:5], "generation", 0.0),
        "hidden": made(rows[4:7], "generation", 1.0),
        "understanding": made(rows[13:16], "understanding", 0.0),
        "text": made(rows[20:23], "text", 0.0),
    }
    return found | {"mixed": [found[kind][i] for i, kind in enumerate(KINDS[:3])] + found["text"][:1]}


def batch_of(samples: list, processor: Processor) -> MixedBatch:
    """What the objective takes."""
    return unpack(collate(samples, processor), processor.image_processor)


def plain(objective: JanusFlowLoss, sample, processor: Processor) -> Tensor:
    """One sample's loss."""
    model, head = objective.model, objective.head
    ids = torch.tensor(sample.ids)
    embeds = model.llm.embed_tokens(ids)
    states = []
    hook = model.llm.layers[TAP - 1].register_forward_hook(lambda m, args, out: states.append(out[0]))
    if sample.kind == "generation":
        x, noise, t = sample.cached["latents"], sample.noise, sample.t
        skip, t_emb = model.uvit_encoder((t * x + (1 - t) * noise)[None], 1000 * t)
        tokens = model.gen_in_aligner(skip[0].flatten(1).T)
        embeds = torch.cat([embeds[: -1 - len(tokens)], t_emb, tokens])
    batch = batch_of([sample], processor)
    image = iter(batch.und_pixels if sample.und_images else [])
    parts = list(embeds)
    for start in [i for i, index in enumerate(sample.ids) if index == processor.tokenizer.image_start_id]:
        features = model.und_aligner(model.siglip(next(image)[None]))[0]
        parts[start : start + 17] = [model.und_begin[0], *features]
    hidden = model.llm(torch.stack(parts)[None], torch.tensor([sample.positions]))[0]
    hook.remove()
    if sample.kind == "generation":
        decoded = model.gen_out_aligner(model.gen_out_norm(hidden[-16:])).T.reshape(1, 24, 4, 4)
        v = model.uvit_decoder(decoded, skip, t_emb)[0]
        with torch.no_grad():
            wanted = model.siglip(batch.pixels)[0]
        cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(head(states[0][-16:]), wanted, strict=True)]
        return (v - (x - noise)).square().mean() - sum(cosines) / 16
    logits = hidden @ model.llm.lm_head.weight.T
    terms = [
        logits[k - 1].logsumexp(0) - logits[k - 1, label]
        for k, label in enumerate(sample.labels)
        if label != IGNORE
    ]
    return sum(terms) / len(terms)


def gradients(objective: JanusFlowLoss, loss: Tensor) -> dict[str, Tensor | None]:
    objective.zero_grad(set_to_none=True)
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in objective.named_parameters()}


def check(objective: JanusFlowLoss, samples: list, processor: Processor) -> None:
    """Loss and gradients of a batch are those of the plain formula."""
    total = objective(batch_of(samples, processor)).total
    expected = sum(plain(objective, sample, processor) for sample in samples)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(objective, total), gradients(objective, expected)
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            scale = max(1e-3, float(grad.abs().max()))
            torch.testing.assert_close(
                ours[name], grad, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_plain_formula(objective, samples, processor, kind):
    """Stops: padding, other rows or other kinds that show through; a wrong target, layer, sign, mean or shift; a
    hidden prompt that is seen or that moves its image; a parameter that learns nothing or too much."""
    check(objective, samples[kind], processor)


def test_a_hidden_prompt_is_left_out_and_its_image_stays(samples):
    """Stops: a hidden prompt in another form than guidance uses when it samples."""
    for shown, hidden in zip(samples["generation"][2:], samples["hidden"][:1], strict=True):
        assert shown.start > 1 and hidden.start == 1 and hidden.ids[0] == shown.ids[0]
        assert hidden.positions == [0, *shown.positions[shown.start :]]


MUTATIONS = ("alignment layer", "sign of the velocity", "hidden prompt moves the image", "a label too late")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(objective, samples, processor, mutation, monkeypatch):
    """Stops: a check that would pass whatever the objective computes."""
    kind = {"hidden prompt moves the image": "hidden", "a label too late": "text"}.get(mutation, "generation")
    batch = batch_of(samples[kind], processor)
    expected = sum(plain(objective, sample, processor).item() for sample in samples[kind])
    if mutation == "alignment layer":
        monkeypatch.setattr(objective, "settings", ObjectiveConfig(alignment_layer=TAP + 1))
    elif mutation == "sign of the velocity":
        object.__setattr__(batch, "noise", -batch.noise)
    elif mutation == "hidden prompt moves the image":
        object.__setattr__(
            batch, "position_ids", torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        )
    else:
        object.__setattr__(batch, "label_index", batch.label_index + 1)
    with torch.no_grad():
        assert abs(float(objective(batch).total) - expected) > 1e-3


def test_the_two_forms_of_the_objective_agree(objective, samples, processor):
    """Stops: masked batches of one kind and mixed batches that learn different things."""
    batch, model = batch_of(samples["mixed"], processor), objective.model
    painted = [s for s in samples["mixed"] if s.kind == "generation"]
    prompts = [s.ids[: s.start] for s in painted]
    longest = max(len(p) for p in prompts)
    with torch.no_grad():
        losses = objective(batch)
        for i, (sample, prompt) in enumerate(zip(painted, prompts, strict=True)):
            if sample.positions == list(range(len(sample.positions))):
                ids = [0] * (longest - len(prompt)) + prompt
                one = generation_loss(
                    model,
                    objective.head,
                    sample.cached["latents"][None],
                    batch_of([sample], processor).pixels,
                    torch.tensor([ids]),
                    torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt)]),
                    sample.t,
                    sample.noise[None],
                    torch.tensor([False]),
                    tap=TAP,
                )
                torch.testing.assert_close(
                    losses.terms["flow"].values[i : i + 1], one.flow, rtol=1e-4, atol=1e-5
                )
                torch.testing.assert_close(
                    losses.terms["alignment"].values[i : i + 1], one.alignment, rtol=1e-4, atol=1e-5
                )
        text = samples["mixed"][-1]
        one = understanding_loss(model, torch.tensor([text.ids]), torch.tensor([text.labels]))
        mine = objective(batch_of([text], processor))
    assert mine.total.item() == pytest.approx(one.item(), rel=1e-5)


def draws(builder: SampleBuilder, manifest, count: int) -> tuple[Tensor, float]:
    """Times and the share of hidden prompts of many slots."""
    row = {"image": str(manifest.parent / "0.png"), "text": "a red cat"}
    made = [
        builder(row, "generation", seeded_generator(0, "sample", i), builder.config.objective.prompt_dropout)
        for i in range(count)
    ]
    return torch.cat([s.t for s in made]), sum(s.start == 1 for s in made) / count


@pytest.mark.parametrize(
    "change", [{}, {"logit_mean": 0.3}, {"logit_std": 0.8}, {"prompt_dropout": 0.2}, {"uniform": True}]
)
def test_times_and_hiding_are_the_papers(
    builder, manifest, change, settings, processor, objective, monkeypatch
):
    """Stops: uniform times, another mean or deviation, prompts hidden more or less often; each change is seen."""
    if "uniform" in change:
        monkeypatch.setattr(
            "janusflow_min.training.sample.sample_time", lambda n, m, s, g: torch.rand(n, generator=g)
        )
    elif change:
        builder = SampleBuilder(
            settings(objective={"alignment_layer": 2, **change}), processor, objective.model
        )
    count = 700
    t, hidden = draws(builder, manifest, count)
    logit = torch.log(t / (1 - t))
    good = abs(logit.mean()) < 3.3 / math.sqrt(count) and abs(logit.std() - 1) < 3.3 / math.sqrt(2 * count)
    good = good and abs(hidden - 0.1) < 3.3 * math.sqrt(0.09 / count)
    assert good == (not change)


def test_the_flow_loss_by_time():
    """Stops: a loss in the wrong bin, or one at t = 1 in none."""
    sums, counts = by_time(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.2, 0.6, 1.0]))
    assert sums.tolist() == [3, 0, 3, 4] and counts.tolist() == [2, 0, 1, 1]


def test_touched_parameters_get_zeros(objective, samples, processor):
    """Stops: sharded ranks that wait for each other because their samples are of different kinds."""
    batch = batch_of(samples["text"], processor)
    usual = gradients(objective, objective(batch).total)
    touched = gradients(objective, objective(batch, ("model.uvit_", "head.")).total)
    for name, grad in touched.items():
        if name.startswith(("model.uvit_", "head.")):
            assert usual[name] is None and not grad.any()
        else:
            assert (grad is None) == (usual[name] is None) and (
                grad is None or torch.equal(grad, usual[name])
            )
