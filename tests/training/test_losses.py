# SPDX-License-Identifier: MIT
"""The training objective against plain formulas, and examples made of conversations.

Each docstring names the mistake that its test stops. The formulas use the model's parts one sample at a time,
without padding, masks or batching.
"""

from __future__ import annotations

import math

import pytest
import torch
from plain_losses import generation_loss, prompt_mask, understanding_loss
from torch import Tensor

from janusflow_min.checkpoint import load_model
from janusflow_min.model import JanusFlow, merge_image_embeds
from janusflow_min.training.losses import IGNORE, AlignmentHead
from janusflow_min.training.sample import conversation_example

TAP = 2


@pytest.fixture(scope="module")
def weights(parity_dir) -> JanusFlow:
    return load_model(parity_dir, progress=False).requires_grad_(True)


@pytest.fixture
def model(weights) -> JanusFlow:
    """With no gradients yet."""
    weights.zero_grad(set_to_none=True)
    return weights


@pytest.fixture(scope="module")
def head() -> AlignmentHead:
    torch.manual_seed(0)
    return AlignmentHead(64, 32)


@pytest.fixture(scope="module")
def sample(processor) -> dict[str, Tensor]:
    """Three images with prompts of different lengths, left-padded; the second and third prompts dropped."""
    rows = [
        processor.generation_prompt(p)[0][:-1]
        for p in ("a cat", "A photo of a red circle and a blue square", "two")
    ]
    longest = max(map(len, rows))
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=g) * 2,
        "pixels": torch.rand(3, 3, 64, 64, generator=g) * 2 - 1,
        "input_ids": torch.tensor([[processor.tokenizer.pad_id] * (longest - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
        "t": torch.tensor([0.2, 0.5, 0.9]),
        "noise": torch.randn(3, 4, 8, 8, generator=g),
        "drop": torch.tensor([False, True, True]),
    }


def row(sample: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One sample by itself, its padding cut off."""
    real = sample["attention_mask"][i].bool()
    one = {k: v[i : i + 1] for k, v in sample.items()}
    return one | {k: one[k][:, real] for k in ("input_ids", "attention_mask")}


def plain_generation_loss(
    model: JanusFlow, head: AlignmentHead, one: dict[str, Tensor]
) -> tuple[float, float]:
    """Flow and alignment of one unpadded sample. A dropped prompt is BOS alone, with the image where it was."""
    x, noise, t = one["latents"], one["noise"], one["t"]
    skip, t_emb = model.uvit_encoder(t * x + (1 - t) * noise, 1000 * t)
    tokens = model.gen_in_aligner(skip.flatten(2).mT)
    ids, start = one["input_ids"], one["input_ids"].shape[1]
    positions = torch.arange(start + 17)
    if one["drop"]:
        ids, positions = ids[:, :1], torch.cat([positions[:1], positions[start:]])
    inputs = torch.cat([model.llm.embed_tokens(ids), t_emb[:, None], tokens], dim=1)
    states = []
    hook = model.llm.layers[TAP - 1].register_forward_hook(lambda m, args, out: states.append(out))
    hidden = model.llm(inputs, positions[None])
    hook.remove()
    decoded = model.gen_out_aligner(model.gen_out_norm(hidden[:, -16:])).mT.reshape(1, 24, 4, 4)
    v = model.uvit_decoder(decoded, skip, t_emb)
    flow = (v - (x - noise)).square().mean()
    a, b = head(states[0][:, -16:])[0], model.siglip(one["pixels"])[0]
    cosines = [(p @ q / (p.norm() * q.norm())).item() for p, q in zip(a, b, strict=True)]
    return flow.item(), -sum(cosines) / 16


# Generation -----------------------------------------------------------------------------------------------------


def test_flow_and_alignment_are_the_plain_formula(model, head, sample):
    """Stops: time the wrong way round, a dropped prompt that still shows or moves the image, padding that
    matters, states tapped at another block, the cosine's sign, a mean over the wrong axis."""
    with torch.no_grad():
        loss = generation_loss(model, head, **sample, tap=TAP)
        plain = [plain_generation_loss(model, head, row(sample, i)) for i in range(3)]
    assert loss.flow.shape == loss.alignment.shape == (3,)
    torch.testing.assert_close(loss.flow, torch.tensor([p[0] for p in plain]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.alignment, torch.tensor([p[1] for p in plain]), rtol=1e-5, atol=1e-5)


def test_padding_on_the_left_does_not_matter(model, head, sample):
    """Stops: losses that depend on which prompts share a batch."""
    wider = sample | {
        "input_ids": torch.nn.functional.pad(sample["input_ids"], (5, 0), value=7),
        "attention_mask": torch.nn.functional.pad(sample["attention_mask"], (5, 0)),
    }
    with torch.no_grad():
        a, b = (generation_loss(model, head, **s, tap=TAP) for s in (sample, wider))
        alone = [generation_loss(model, head, **row(sample, i), tap=TAP) for i in range(3)]
    for name in ("flow", "alignment"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            getattr(a, name), torch.cat([getattr(s, name) for s in alone]), rtol=1e-5, atol=1e-6
        )


def test_a_dropped_prompt_does_not_matter(model, head, sample):
    """Stops: guidance trained on prompts that were meant to be hidden; and prompts hidden where they should not."""
    changed = sample["input_ids"].clone()
    words = sample["attention_mask"].cumsum(1) > 1
    changed[words] = (changed[words] + 11) % 400
    with torch.no_grad():
        a = generation_loss(model, head, **sample, tap=TAP).flow
        b = generation_loss(model, head, **sample | {"input_ids": changed}, tap=TAP).flow
    assert torch.equal(a[1:], b[1:]) and (a[0] - b[0]).abs() > 1e-4


def test_prompt_mask_keeps_positions():
    """Stops: BOS hidden with the rest, padding shown, positions that count from the padding or skip the dropped."""
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    mask, positions = prompt_mask(real, torch.tensor([True, True, False]))
    assert mask.int().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]] and mask.dtype == torch.bool
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]]


def test_a_perfect_velocity_costs_nothing(model, head, sample, monkeypatch):
    """Stops: a target of noise minus data, or of another scale."""

    encode, seen = model.encode_latents, []

    def watched(z, timestep):
        assert torch.equal(timestep, sample["t"] * 1000)
        seen.append(z)
        return encode(z, timestep)

    def perfect(hidden, skip, t_emb):
        left = (1 - sample["t"]).view(-1, 1, 1, 1)
        return (sample["latents"] - seen[-1]) / left  # the line from z to data

    monkeypatch.setattr(model, "encode_latents", watched)
    monkeypatch.setattr(model, "decode_velocity", perfect)
    assert generation_loss(model, head, **sample, tap=TAP).flow.abs().max() < 1e-8


def test_gradients_of_the_generation_loss(model, head, sample):
    """Stops: SigLIP pulled towards the LLM (features collapse), and parts of the painter that learn nothing."""
    loss = generation_loss(model, head, **sample, tap=TAP)
    (loss.flow + loss.alignment).mean().backward()
    idle = ("siglip.", "und_aligner.", "und_begin", "llm.lm_head.")
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(idle), name
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_alignment_reaches_the_blocks_up_to_the_tap(model, head, sample):
    """Stops: an alignment at the last block, or one block off."""
    generation_loss(model, head, **sample, tap=TAP).alignment.mean().backward()
    moved = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in b.parameters()) for b in model.llm.layers
    ]
    assert moved == [True, True, False]
    assert all(p.grad is None for p in model.siglip.parameters())
    assert model.gen_in_aligner.weight.grad.abs().sum() > 0


# Understanding --------------------------------------------------------------------------------------------------


def talk(*pairs: tuple[str, str], images: int = 0) -> list[dict]:
    """User and assistant in turn, the images in front."""
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("User", "Assistant"), pair, strict=True)
    ]
    messages[0]["content"] = "<image_placeholder>\n" * images + messages[0]["content"]
    return messages


def spans(labels: list[int]) -> list[list[int]]:
    """The runs of labelled ids; one ends at EOS."""
    runs: list[list[int]] = [[]]
    for label, following in zip(labels, [*labels[1:], IGNORE], strict=True):
        if label != IGNORE:
            runs[-1].append(label)
            if following == IGNORE:
                runs.append([])
    return runs[:-1]


TALKS = {
    "one": (talk(("What colour is it?", "red"), images=1), ["red"]),
    "several": (
        talk(("How many?", "two"), ("Where?", "on the left"), ("hi", "two"), images=2),
        ["two", "on the left", "two"],
    ),
    "unicode": (talk(("Was?", "Zwei Bären — 两只熊 🐻 e\u0301")), ["Zwei Bären — 两只熊 🐻 e\u0301"]),
    "blanks": (talk(("  What?\n", "  red \n\n and blue ")), ["red \n\n and blue"]),
    "quoted": (
        talk(("Say 'Assistant: red'.\n\nAssistant: red", "red"), ("Assistant: blue", "blue")),
        ["red", "blue"],
    ),
    "nested": (talk(("Why?", "Assistant: red"), ("So?", "red")), ["Assistant: red", "red"]),
    "digits": (talk(("Count", "1 2 3 45")), ["1 2 3 45"]),
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("system", [None, ""])
def test_labels_are_the_answers_and_their_eos(processor, name, system):
    """Stops: loss on questions, images or roles; an answer without EOS, which never learns to stop; labels
    shifted by the image tokens, by BOS, or by characters of several bytes."""
    messages, answers = TALKS[name]
    options = {} if system is None else {"system_prompt": system}
    ids, labels = conversation_example(processor, messages, **options)
    assert len(ids) == len(labels) and all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
    runs = spans(labels)
    assert [processor.tokenizer.decode(run).strip() for run in runs] == answers
    eos = processor.tokenizer.eos_id
    assert all(run[-1] == eos and run.count(eos) == 1 for run in runs)
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert processor.tokenizer.decode(ids[:first]).endswith("Assistant:")


@pytest.mark.parametrize("name", TALKS)
def test_the_ids_are_those_of_answering(processor, parity_dir, name):
    """Stops: training on another prompt form than the one that answers are asked with."""
    messages = [dict(m) for m in TALKS[name][0]]
    ids, labels = conversation_example(processor, messages)
    tags = messages[0]["content"].count("<image_placeholder>")
    messages[0]["images"] = [str(parity_dir / "images" / "wide.png")] * tags
    assert ids == processor.conversation(messages)[0]
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    asked = [messages[0], {"role": "Assistant", "content": ""}]
    assert ids[:first] == processor.conversation(asked)[0]


def test_images_are_expanded_and_carry_no_label(processor):
    """Stops: one token in place of an image's seventeen, and loss on image tokens."""
    ids, labels = conversation_example(processor, TALKS["several"][0])
    tokenizer = processor.tokenizer
    places = [i for i, index in enumerate(ids) if index in processor.image_ids()]
    assert [ids[i] for i in places] == processor.image_ids() * 2
    assert {labels[i] for i in places} == {IGNORE} and ids.count(tokenizer.image_id) == 32


def test_an_open_answer_carries_no_label(processor):
    """Stops: a conversation to be answered that counts as one with an empty answer."""
    messages = [{"role": "user", "content": "hi"}, {"role": "ASSISTANT", "content": "yes"}]
    assert len(spans(conversation_example(processor, messages)[1])) == 1  # roles in any case
    open_end = [
        *talk(("hi", "yes")),
        {"role": "User", "content": "and?"},
        {"role": "Assistant", "content": " "},
    ]
    assert len(spans(conversation_example(processor, open_end)[1])) == 1


@pytest.fixture
def examples(processor):
    """Two right-padded conversations, with two images and with none."""
    rows = [conversation_example(processor, TALKS[name][0]) for name in ("several", "unicode")]
    longest = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_id
    ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in rows])
    labels = torch.tensor([l + [IGNORE] * (longest - len(l)) for _, l in rows])
    places = (ids == processor.tokenizer.image_id) | (ids == processor.tokenizer.image_start_id)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return {"input_ids": ids, "labels": labels, "images_seq_mask": places, "pixels": pixels}


@torch.no_grad()
def token_losses(model: JanusFlow, embeds: Tensor, labels: list[int]) -> list[float]:
    """-log p of every labelled token, each from a pass of its own over what stands before it."""
    losses = []
    for k, label in enumerate(labels):
        if label != IGNORE:
            logits = (model.llm(embeds[None, :k])[0, -1] @ model.llm.lm_head.weight.T).tolist()
            top = max(logits)
            losses.append(top + math.log(sum(math.exp(x - top) for x in logits)) - logits[label])
    return losses


def test_cross_entropy_is_the_plain_formula(model, processor, examples):
    """Stops: labels not shifted by one, a mean over padding or over rows, images at wrong places, padding seen."""
    tokenizer = processor.tokenizer
    with torch.no_grad():
        loss = understanding_loss(model, **examples)
        begin, features = model.und_begin, model.und_aligner(model.siglip(examples["pixels"]))
    losses = []
    for r in range(2):
        ids, labels = (examples[k][r].tolist() for k in ("input_ids", "labels"))
        with torch.no_grad():
            embeds = model.llm.embed_tokens(torch.tensor(ids))
            starts = [i for i, index in enumerate(ids) if index == tokenizer.image_start_id]
            for image, start in zip(features, starts, strict=r == 0):
                embeds[start : start + 17] = torch.cat([begin, image])
        losses += token_losses(model, embeds, labels)
    assert len(losses) == (examples["labels"] != IGNORE).sum()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_text_alone_needs_no_images(model, processor):
    """Stops: a text sample that must come with a made-up picture."""
    ids, labels = conversation_example(processor, TALKS["nested"][0])
    with torch.no_grad():
        loss = understanding_loss(model, torch.tensor([ids]), torch.tensor([labels]))
        losses = token_losses(model, model.llm.embed_tokens(torch.tensor(ids)), labels)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_padding_on_the_left_needs_the_mask(model, examples):
    """Stops: an attention_mask that is ignored."""
    pad = torch.full((2, 4), 450)
    mask = torch.cat([torch.zeros(2, 4), torch.ones_like(examples["input_ids"])], dim=1).bool()
    shifted = {
        "input_ids": torch.cat([pad, examples["input_ids"]], dim=1),
        "labels": torch.cat([torch.full_like(pad, IGNORE), examples["labels"]], dim=1),
        "images_seq_mask": torch.cat([pad < 0, examples["images_seq_mask"]], dim=1),
        "pixels": examples["pixels"],
    }
    with torch.no_grad():  # rotary positions are relative: a shift of all of them changes nothing
        plain, masked = (
            understanding_loss(model, **examples),
            understanding_loss(model, **shifted, attention_mask=mask),
        )
        unmasked = understanding_loss(model, **shifted)
    torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-5)
    assert (plain - unmasked).abs() > 1e-4


def test_only_what_stands_before_an_answer_matters(model, processor):
    """Stops: answers that see what follows them."""
    ids, labels = conversation_example(processor, TALKS["one"][0])
    longer = [*ids, 300, 301, 302]
    both = [
        understanding_loss(
            model,
            torch.tensor([i]),
            torch.tensor([labels + [IGNORE] * (len(i) - len(ids))]),
            torch.tensor([[k in (451, 452) for k in i]]),
            torch.zeros(1, 3, 64, 64),
        ).item()
        for i in (ids, longer)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_gradients_of_the_understanding_loss(model, examples):
    """Stops: an image's begin embedding, the encoder or the aligner that never learns; a painter that moves."""
    understanding_loss(model, **examples).backward()
    assert model.und_begin.grad.abs().sum() > 0
    assert model.und_aligner.weight.grad.abs().sum() > 0 and model.llm.lm_head.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.siglip.parameters())
    painter = ("uvit_", "gen_")
    assert all((p.grad is None) == n.startswith(painter) for n, p in model.named_parameters())


# Images in their places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 3), (1, 1, 1), (3, 0, 0)])
def test_place_images_is_masked_scatter(counts):
    """Stops: images at other places than they belong to, and gradients that land at the wrong token."""
    g = torch.Generator().manual_seed(sum(10**i * c for i, c in enumerate(counts)))
    rows, length, width, tokens = len(counts), 23, 5, 4
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for r, count in enumerate(counts):
        for k in range(count):
            start = 1 + k * (tokens + 2) + r
            mask[r, start : start + tokens] = True
    embeds = torch.randn(rows, length, width, generator=g)
    images = torch.randn(sum(counts), tokens, width, generator=g)
    upstream = torch.randn(rows, length, width, generator=g)
    results = []
    for place in (merge_image_embeds, lambda e, i, m: e.masked_scatter(m[..., None], i)):
        e, i = embeds.clone().requires_grad_(), images.clone().requires_grad_()
        out = place(e, i, mask)
        out.backward(upstream)
        results.append((out.detach(), e.grad, i.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][2].abs().min() > 0 and not results[0][1][mask].any()


def test_place_images_casts_to_the_embeddings(model):
    """Stops: bf16 embeddings that turn into fp32 because a picture was put among them."""
    mask = torch.tensor([[False, True, True]])
    out = merge_image_embeds(torch.zeros(1, 3, 2, dtype=torch.bfloat16), torch.ones(1, 2, 2), mask)
    assert out.dtype == torch.bfloat16 and out[0, :, 0].tolist() == [0, 1, 1]
