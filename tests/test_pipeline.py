# SPDX-License-Identifier: MIT
"""The public calls: load, generate, understand, chat, save. Each docstring names the mistake that its test stops."""

from __future__ import annotations

import io
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import janusflow_min as jf
from janusflow_min import devices, loading, pipeline
from janusflow_min.answering import DEFAULT_QUESTION
from janusflow_min.sampling import sample
from janusflow_min.solvers import euler

SHORT = "a cat"
LONG = "A photo of a red circle and a blue square on a green background"
STEPS = 3


@pytest.fixture(scope="module")
def bf16(parity_dir) -> jf.Pipeline:
    return jf.load(parity_dir, device="cpu", dtype="bfloat16", progress=False)


@pytest.fixture
def paint(pipe):
    """`generate`, short and quiet unless told otherwise."""
    return lambda prompt=SHORT, *args, **options: pipe.generate(
        prompt, *args, **{"num_inference_steps": STEPS, "parallel_size": 1, "progress": False} | options
    )


@pytest.fixture(scope="module")
def image(parity_dir):
    return lambda name: str(parity_dir / "images" / f"{name}.png")


def noise_of(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


def near_bytes(a: Image.Image, b: Image.Image) -> bool:
    return bool((np.asarray(a).astype(int) - np.asarray(b).astype(int)).__abs__().max() <= 1)


# Generation: the numbers ----------------------------------------------------------------------------------------


@torch.inference_mode()
def recompute(pipe: jf.Pipeline, prompt: str, noise: torch.Tensor, weight: float, steps: int) -> torch.Tensor:
    """The published loop without any cache: the whole prompt at every step, guidance by masking all but BOS."""
    model = pipe.model
    ids = torch.tensor(pipe.processor.generation_prompt(prompt)[0][:-1])  # t_emb takes the tag's place
    text = model.llm.embed_tokens(ids)[None].repeat(2, 1, 1)
    count = len(ids) + 1 + model.num_image_tokens
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, 1 : len(ids)] = False
    # The unconditional row counts its positions from BOS, as the prompt's tokens did not exist for it.
    positions = torch.arange(count).repeat(2, 1)
    z = noise[None]
    for i in range(steps):
        timestep = torch.tensor([i / steps * 1000.0])
        v = model.velocity(z, timestep, text_embeds=text, position_ids=positions, attention_mask=mask)
        z = z + (weight * v[:1] - (weight - 1) * v[1:]) / steps
    return z[0]


@pytest.mark.parametrize("weight", [1.0, 2.0, 5.0])
def test_the_cached_prompt_equals_recomputing_it(pipe, paint, weight):
    """Stops: stale keys between steps, guidance rows at wrong positions, a mask that shows the dropped prompt."""
    for prompt, seed in ((SHORT, 1), (LONG, 2)):
        latents = paint(prompt, seed=seed, cfg_weight=weight).latents[0]
        torch.testing.assert_close(
            latents, recompute(pipe, prompt, noise_of(seed), weight, STEPS), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_batch_of_prompts_equals_one_at_a_time(paint, weight):
    """Stops: padding seen by attention, positions counted through padding, rows in another order."""
    prompts = [SHORT, LONG, "two", LONG]  # one twice: its keys are computed once
    together = paint(prompts, parallel_size=2, seed=10, cfg_weight=weight)
    assert together.prompts == [p for p in prompts for _ in range(2)]
    for k, prompt in enumerate(prompts):
        alone = paint(prompt, parallel_size=2, seed=10 + 2 * k, cfg_weight=weight)
        rows = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(together.latents[rows], alone.latents, atol=1e-5, rtol=0)
        assert all(map(near_bytes, together.images[rows], alone.images))


def test_a_seed_gives_its_image_anywhere(paint):
    """Stops: one generator for the whole batch, whose images depend on their place and number."""
    alone = paint(seed=5)
    for size, place in ((2, 0), (3, 2), (4, 1)):
        seeds = [100 + k for k in range(size)]
        seeds[place] = 5
        many = paint(parallel_size=size, seed=seeds)
        torch.testing.assert_close(many.latents[place], alone.latents[0], atol=1e-5, rtol=0)
        assert near_bytes(many.images[place], alone.images[0])


def test_seeds_count_on_from_the_first(paint):
    """Stops: the same seed for every image of a call, or a stride that skips seeds."""
    out = paint([SHORT, "a dog"], parallel_size=2, seed=7)
    assert out.seeds == [7, 8, 9, 10]
    given = paint([SHORT, "a dog"], parallel_size=2, seed=[7, 8, 9, 10])
    assert torch.equal(given.latents, out.latents) and given.seeds == out.seeds
    assert not torch.equal(out.latents[0], out.latents[1])


def test_numpy_seeds_are_seeds(paint):
    """Stops: a TypeError, or another picture, for the integers that come out of numpy."""
    assert paint(seed=np.int64(7)).seeds == [7]
    out = paint(parallel_size=2, seed=np.array([3, 1]))
    assert out.seeds == [3, 1] and all(type(s) is int for s in out.seeds)


def test_the_noise_is_torch_s_cpu_noise(paint):
    """Stops: noise drawn in the model's dtype or on its device, which makes a seed mean many pictures."""
    out = paint(seed=3)
    assert torch.equal(paint(latents=noise_of(3)[None]).latents, out.latents)


def test_drawn_seeds_are_told_and_repeat_the_pictures(paint):
    """Stops: a good picture that nobody can paint again, and the same picture on every unseeded call."""
    first, second = paint(parallel_size=2), paint(parallel_size=2)
    assert first.seeds[1] == first.seeds[0] + 1 and first.seeds != second.seeds
    assert torch.equal(paint(parallel_size=2, seed=first.seeds[0]).latents, first.latents)
    assert torch.equal(paint(parallel_size=2, seed=first.seeds).latents, first.latents)


def test_given_latents_start_the_flow(paint):
    """Stops: latents ignored, changed in place, or mixed up between prompts."""
    noise = torch.stack([noise_of(1), noise_of(2)])
    before = noise.clone()
    out = paint([SHORT, LONG], latents=noise)
    assert out.seeds is None and torch.equal(noise, before)
    assert torch.equal(out.latents, paint([SHORT, LONG], latents=noise.numpy()).latents)
    torch.testing.assert_close(out.latents[1:], paint(LONG, latents=noise[1:]).latents, atol=1e-5, rtol=0)


def test_the_prompt_matters(paint):
    """Stops: a prompt that never reaches the picture."""
    a, b = paint(SHORT, seed=1), paint("a dog", seed=1)
    assert (a.latents - b.latents).abs().max() > 1e-3


def test_guidance_matters_and_one_is_none(paint):
    """Stops: guidance with the wrong sign or offset; weight 1 has to be the conditional flow alone."""
    one, nearly, two = (paint(seed=1, cfg_weight=w).latents for w in (1.0, 1.0 + 1e-6, 2.0))
    torch.testing.assert_close(one, nearly, atol=1e-4, rtol=0)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("weight, rows", [(1.0, 3), (2.0, 6)])
def test_guidance_one_runs_half_the_rows(pipe, paint, weight, rows):
    """Stops: paying for unconditional rows that guidance 1 throws away."""
    seen = []
    hook = pipe.model.llm.layers[0].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    try:
        paint(parallel_size=3, cfg_weight=weight)
    finally:
        hook.remove()
    assert [shape[0] for shape in seen[1:]] == [rows] * STEPS


def test_the_prompt_is_computed_once(pipe, paint):
    """Stops: the prompt's keys recomputed at every step or for every image of it."""
    seen = []
    hook = pipe.model.llm.layers[0].register_forward_hook(
        lambda m, args, out: seen.append(tuple(out.shape[:2]))
    )
    try:
        paint([LONG, LONG, SHORT], parallel_size=2)
    finally:
        hook.remove()
    tokens = len(pipe.processor.generation_prompt(LONG)[0]) - 1
    assert seen[0] == (3, tokens)  # two distinct prompts and BOS
    assert seen[1:] == [(12, 1 + pipe.model.num_image_tokens)] * STEPS


def test_upstream_rounding_changes_bf16_alone(pipe, bf16, parity_dir):
    """Stops: an option without effect, or one that also changes fp32."""
    options = {"parallel_size": 1, "num_inference_steps": STEPS, "seed": 1, "progress": False}
    rounding = [
        jf.load(parity_dir, device="cpu", dtype=dtype, upstream_rounding=True, progress=False)
        for dtype in ("float32", "bfloat16")
    ]
    exact, rounded = (p.generate(LONG, **options).latents for p in (pipe, rounding[0]))
    assert torch.equal(exact, rounded)
    ours, published = (p.generate(LONG, **options).latents for p in (bf16, rounding[1]))
    assert not torch.equal(ours, published)
    assert torch.equal(published, published.bfloat16().float())  # latents kept in bf16
    assert not torch.equal(ours, ours.bfloat16().float())  # and in fp32 by default
    assert (ours - exact).norm() < 0.1 * exact.norm()


# Generation: what comes out -----------------------------------------------------------------------------------------


def test_what_generate_returns(paint, bf16):
    """Stops: latents on a device, in half precision or with a graph; images of another mode or number."""
    for out in (
        paint([SHORT, LONG], parallel_size=2),
        bf16.generate([SHORT, LONG], 2, num_inference_steps=1, progress=False),
    ):
        assert out.latents.shape == (4, 4, 8, 8) and out.latents.dtype == torch.float32
        assert out.latents.device.type == "cpu" and not out.latents.requires_grad
        assert len(out.images) == 4 and {(i.mode, i.size) for i in out.images} == {("RGB", (64, 64))}
        assert out.prompts == [SHORT, SHORT, LONG, LONG] and len(out.seeds) == 4


def test_latents_are_a_tensor_like_any_other(paint):
    """Stops: an inference tensor, through which no gradient flows."""
    latents = paint().latents
    assert not latents.is_inference()
    weight = torch.ones((), requires_grad=True)
    (latents * weight).sum().backward()
    assert weight.grad == latents.sum()
    latents += 1  # in place, too


def test_a_generation_prints_compares_and_hashes(paint):
    """Stops: a ValueError from comparing tensors, a TypeError from hashing lists, pages of numbers in a terminal."""
    one, two = paint(seed=1), paint(seed=1)
    assert one == one and one != two and len({one, two, one}) == 2
    assert repr(one) == "Generation(1 images of 64x64, seeds=[1], prompts=['a cat'])"


def test_an_answer_compares_and_hashes(pipe):
    """Stops: answers that cannot be counted in a set."""
    one, two = (pipe.understand("hi", max_new_tokens=2) for _ in range(2))
    assert one == two and len({one, two}) == 1 and len({one, pipe.understand("why", max_new_tokens=2)}) == 2


def test_the_images_are_the_decoded_latents(pipe, paint):
    """Stops: images that are not those of `latents`, rounding instead of the published truncation."""
    out = paint(parallel_size=2, seed=4)
    with torch.inference_mode():
        pixels = torch.cat([pipe.vae.autoencoder.decode(z[None] / 0.13025).sample for z in out.latents])
    expected = ((pixels.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    for image, array in zip(out.images, expected, strict=True):
        assert (np.asarray(image) != array).mean() < 1e-3  # rounding would change half of them


@pytest.mark.parametrize("size", [20, 96, 64])
def test_other_sizes_are_a_lanczos_resize(paint, size):
    """Stops: another filter, and a size that changes what is painted."""
    native, sized = paint(seed=2), paint(seed=2, img_size=size)
    expected = native.images[0].resize((size, size), Image.Resampling.LANCZOS)
    assert sized.images[0].tobytes() == expected.tobytes()
    assert torch.equal(native.latents, sized.latents)


def test_defaults_are_the_published_demo_s(pipe, monkeypatch):
    """Stops: other defaults than 5 images, guidance 2, 30 steps, which the seed API's users rely on."""
    weights, times = [], []
    guided = pipeline.guided_velocity

    def note(sampler, prompts, weight, *others):
        weights.append((len(prompts), weight, *others))
        return guided(sampler, prompts, weight, *others)

    def solver(velocity, z, grid, on_step):
        times.append(grid)
        return z

    monkeypatch.setattr(pipeline, "guided_velocity", note)
    pipe.generate(SHORT, progress=False, solver=solver)
    assert weights == [(5, 2.0, None, (0.0, 1.0), 0.0)] and times == [[i / 30 for i in range(31)]]
    assert pipe.generate(SHORT, parallel_size=1, seed=1, progress=False).latents.equal(
        pipe.generate(SHORT, parallel_size=1, seed=1, progress=False, solver=euler).latents
    )


def test_progress_is_for_terminals_and_may_be_silent(paint, capfd, monkeypatch):
    """Stops: bars in logs, and at those who asked for none; prints left behind; a crash where there is no stderr."""
    paint(progress=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as in Python without a console
        paint(progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    paint(progress=False)
    assert capfd.readouterr() == ("", "")
    paint(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Generating" in err and f"/{STEPS}" in err


def test_global_random_state_is_left_alone(pipe, paint):
    """Stops: seeding, or drawing from, the generators of the caller's own program."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    paint(seed=1)
    paint()
    pipe.understand("hi", temperature=1.0, seed=3, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


# Understanding --------------------------------------------------------------------------------------------------


def test_recorded_answer_through_the_public_call(pipe, expected, image):
    """Stops: a public call that builds another prompt than the one in parity with the reference."""
    for name in ("one_image", "two_images"):
        case = expected["conversations"][name]
        question = case["conversation"][0]["content"].replace("<image_placeholder>\n", "")
        answer = pipe.understand(question, images=[image(n) for n in case["images"]], max_new_tokens=24)
        assert answer.sft_format == case["sft_format"] and answer.token_ids == case["greedy_fp32"]


def test_a_batch_of_questions_equals_one_at_a_time(pipe, image):
    """Stops: padding that leaks into answers, images that go to another row, a row that loses its own."""
    questions = ["hi", "What is in the pictures, and how many are there of each?", "Which colour?", "why"]
    images = [None, [image("wide"), image("tall")], image("square"), []]
    together = pipe.understand(questions, images=images, max_new_tokens=10)
    alone = [pipe.understand(q, images=i, max_new_tokens=10) for q, i in zip(questions, images, strict=True)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.sft_format for a in together] == [a.sft_format for a in alone]
    assert isinstance(together, list) and len({tuple(a.token_ids) for a in together}) > 1


def test_a_batch_without_images(pipe):
    """Stops: a crash, or a phantom image, where no row has one."""
    together = pipe.understand(["hi", "what is a rainbow?"], max_new_tokens=6)
    assert [a.token_ids for a in together] == [
        pipe.understand(q, max_new_tokens=6).token_ids for q in ("hi", "what is a rainbow?")
    ]


def test_every_image_and_its_order_matters(pipe, image):
    """Stops: only the first image used, or images taken in another order."""
    options = {"max_new_tokens": 8}
    both, other, swapped, one = (
        pipe.understand("What is it?", images=[image(n) for n in names], **options).token_ids
        for names in (("tall", "square"), ("tall", "rgba"), ("square", "tall"), ("tall",))
    )
    assert len({tuple(ids) for ids in (both, other, swapped, one)}) == 4


def test_images_come_in_any_form(pipe, image, monkeypatch):
    """Stops: a path, a picture or an array that counts as a list of images."""
    path = image("square")
    picture = Image.open(path).convert("RGB")
    data = Path(path).read_bytes()
    monkeypatch.setenv("HOME", str(Path(path).parent))
    forms = [path, Path(path), picture, np.asarray(picture), [picture], (path,)]
    forms += [data, io.BytesIO(data), [io.BytesIO(data)], f"~/{Path(path).name}"]
    answers = [pipe.understand("What?", images=form, max_new_tokens=4).token_ids for form in forms]
    assert answers == [answers[0]] * len(forms)
    batched = pipe.understand(["What?"], images=[picture], max_new_tokens=4)
    assert [a.token_ids for a in batched] == answers[:1]


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_an_image_without_a_question_is_described(pipe, image, empty):
    """Stops: an empty question sent to the model as it is."""
    answer = pipe.understand(empty, images=image("square"), max_new_tokens=2)
    assert answer.sft_format.endswith(f"User: <image_placeholder>\n{DEFAULT_QUESTION}\n\nAssistant:")
    assert pipe.understand([empty, "hi"], [image("square"), None], max_new_tokens=2)[0] == answer


def test_the_answer_s_text_is_its_tokens(pipe):
    """Stops: a text that holds the prompt, special tokens, or blanks trimmed away from inside."""
    answer = pipe.understand("hi", max_new_tokens=12)
    tokenizer = pipe.processor.tokenizer
    assert answer.text == tokenizer.decode(answer.token_ids)
    assert "Assistant" not in answer.text and all(type(i) is int for i in answer.token_ids)
    assert answer.sft_format.startswith("You are a helpful") and answer.sft_format.endswith(
        "User: hi\n\nAssistant:"
    )


def test_several_turns(pipe, expected, image):
    """Stops: a conversation cut to its last question, roles lost, EOS missing behind an earlier answer."""
    case = expected["conversations"]["multi_turn"]
    first, *rest = case["conversation"]
    conversation = [first | {"images": [image("grey")]}, *rest]
    answer = pipe.chat(conversation, max_new_tokens=24)
    assert answer.sft_format == case["sft_format"] and answer.token_ids == case["greedy_fp32"]
    lower = [message | {"role": message["role"].lower()} for message in conversation[:-1]]
    assert pipe.chat(lower, max_new_tokens=24) == answer  # the assistant's empty message may be left out


def test_a_later_turn_depends_on_the_first(pipe):
    """Stops: history that shows in `sft_format` but not in the model."""
    turns = [{"role": "User", "content": "red"}, {"role": "Assistant", "content": "yes"}]
    question = {"role": "User", "content": "why?"}
    with_history, without = (
        pipe.chat(c, max_new_tokens=6).token_ids for c in ([*turns, question], [question])
    )
    assert with_history != without


def test_conversations_in_a_batch(pipe, image):
    """Stops: a list of conversations read as one, and answers that depend on their neighbours."""
    one = [{"role": "User", "content": "<image_placeholder>\nWhat?", "images": [image("wide")]}]
    two = [
        {"role": "User", "content": "hi"},
        {"role": "Assistant", "content": "hello"},
        {
            "role": "User",
            "content": "<image_placeholder>and<image_placeholder>",
            "images": [image("tall")] * 2,
        },
    ]
    together = pipe.chat([one, two], max_new_tokens=6)
    assert together == [pipe.chat(one, max_new_tokens=6), pipe.chat(two, max_new_tokens=6)]
    assert pipe.chat([one], max_new_tokens=6) == together[:1]


def test_chat_leaves_the_conversation_alone(pipe, image):
    """Stops: an empty assistant's message that piles up in the caller's list, or images taken out of it."""
    conversation = [{"role": "User", "content": "<image_placeholder>\nWhat?", "images": [image("wide")]}]
    before = json.dumps(conversation)
    pipe.chat(conversation, max_new_tokens=2)
    pipe.chat([conversation, conversation], max_new_tokens=2)
    assert json.dumps(conversation) == before
    paths = [image("wide")]
    pipe.understand("What?", images=paths, max_new_tokens=2)
    assert paths == [image("wide")]


def test_max_new_tokens_is_kept(pipe):
    """Stops: one token too many or too few."""
    long = pipe.understand("hi", max_new_tokens=7).token_ids
    for count in (1, 2, 6):
        assert pipe.understand("hi", max_new_tokens=count).token_ids == long[:count]


def test_answers_end_where_positions_end(pipe, monkeypatch):
    """Stops: an answer that runs past the last position the model was trained on."""
    length = len(
        pipe.processor.conversation(
            [{"role": "User", "content": "hi"}, {"role": "Assistant", "content": ""}]
        )[0]
    )
    llm = replace(pipe.model.config.llm, max_position_embeddings=length + 3)
    free = pipe.understand("hi", max_new_tokens=9).token_ids
    monkeypatch.setattr(pipe.model, "config", replace(pipe.model.config, llm=llm))
    assert pipe.understand("hi", max_new_tokens=9).token_ids == free[:3]


def test_answers_stop_at_eos(pipe, expected, image, monkeypatch):
    """Stops: answers that run on behind EOS, and EOS shown in the text."""
    stopped = expected["stopped_fp32"]
    monkeypatch.setattr(pipe.processor.tokenizer, "eos_id", stopped["eos"])
    answer = pipe.understand("Describe this image", images=image("wide"))
    assert answer.token_ids == stopped["ids"] and answer.token_ids.count(stopped["eos"]) == 1


def test_a_row_that_ended_waits_for_the_others(pipe, image, monkeypatch):
    """Stops: a batch cut at its first EOS, and EOS padding counted as part of an answer."""
    free = pipe.understand(["hi", "what is a rainbow?"], max_new_tokens=12)
    eos = next(i for i in free[0].token_ids[2:] if i not in free[1].token_ids)
    monkeypatch.setattr(pipe.processor.tokenizer, "eos_id", eos)
    first, second = pipe.understand(["hi", "what is a rainbow?"], max_new_tokens=12)
    assert first.token_ids == free[0].token_ids[: free[0].token_ids.index(eos) + 1]
    assert second.token_ids == free[1].token_ids


# Sampling ---------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_deterministic(pipe):
    """Stops: a draw where greedy was asked for."""
    answers = [pipe.understand("hi", max_new_tokens=6, seed=s).token_ids for s in (None, 1, 2)]
    assert answers == [answers[0]] * 3


def test_a_seeded_answer_repeats(pipe):
    """Stops: a seed without effect, or one that is used for every token anew."""
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    first, again, other = (pipe.understand("hi", seed=s, **options).token_ids for s in (1, 1, 2))
    assert first == again != other and len(set(first)) > 2


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-12}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(pipe, options):
    """Stops: a top-k or top-p that removes the best token, or ignores its setting."""
    greedy = pipe.understand("hi", max_new_tokens=6).token_ids
    narrow = {"temperature": 1.0, "seed": 1} | options
    assert pipe.understand("hi", max_new_tokens=6, **narrow).token_ids == greedy


@pytest.fixture
def drawn(monkeypatch):
    """The probabilities that `sample` draws from."""
    caught = []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *args, **kwargs: caught.append(p) or draw(p, *args, **kwargs)
    )

    def probabilities(*args):
        caught.clear()
        with torch.random.fork_rng(devices=[]):
            ids = sample(*args, generator=None)
        assert ids.shape == args[0].shape[:1] and ids.dtype == torch.int64
        return caught[0]

    return probabilities


def plain_probabilities(logits: list[float], temperature: float, top_p: float, top_k: int) -> list[float]:
    """Temperature, top-k and top-p for one row, without tensors."""
    weights = {i: np.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=weights.get)
    if top_k:
        order = order[-top_k:]
    total, kept, below = sum(weights[i] for i in order), [], 0.0
    for i in order:
        below += weights[i] / total
        if top_p >= 1 or below > 1 - top_p or i == order[-1]:
            kept.append(i)
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [(1.0, 1.0, 0), (0.7, 0.95, 50), (1.5, 0.5, 0), (0.3, 0.9, 7), (2.0, 1.0, 3), (1.0, 0.01, 5)]
SETTINGS += [(1.0, 0.9, 1000)]


@pytest.mark.parametrize("temperature, top_p, top_k", SETTINGS)
def test_sampling_follows_the_plain_formula(drawn, temperature, top_p, top_k):
    """Stops: top-p over the unfiltered vocabulary, a threshold off by one token, filters in another order."""
    logits = torch.randn(4, 80, generator=torch.Generator().manual_seed(5)) * 3
    expected = [plain_probabilities(row, temperature, top_p, top_k) for row in logits.double().tolist()]
    ours = drawn(logits, temperature, top_p, top_k)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature, top_p, top_k", SETTINGS)
def test_sampling_is_transformers_s(drawn, temperature, top_p, top_k):
    """Stops: a misreading of top-p or top-k that our own formula would share."""
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(6, 640, generator=torch.Generator().manual_seed(6)) * 4
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(drawn(logits, temperature, top_p, top_k), scores.softmax(-1))


# Parts ----------------------------------------------------------------------------------------------------------


def test_parts_hold_only_what_their_task_needs(pipe, parity_dir):
    """Stops: four gigabytes loaded for half a model, and a half that differs from the whole."""
    whole = pipe.model.state_dict()
    understanding = jf.load(parity_dir, device="cpu", parts="understanding", progress=False)
    generation = jf.load(parity_dir, device="cpu", parts="generation", progress=False)
    foreign = {
        "understanding": ("uvit_", "gen_"),
        "generation": ("siglip.", "und_", "llm.lm_head."),
    }
    for half in (understanding, generation):
        state = half.model.state_dict()
        assert set(state) == {k for k in whole if not k.startswith(foreign[half.model.parts])}
        assert all(torch.equal(v, whole[k]) for k, v in state.items())
        assert half.model.extra_tensors == {}
    assert understanding.vae is None and generation.vae is not None
    for half, names in (
        (generation, ("siglip", "und_aligner", "und_begin")),
        (
            understanding,
            ("uvit_encoder", "gen_in_aligner", "gen_out_norm", "gen_out_aligner", "uvit_decoder"),
        ),
    ):
        for name in names:
            assert getattr(half.model, name) is None and getattr(pipe.model, name) is not None
    assert generation.model.llm.lm_head is None
    options = {"num_inference_steps": 2, "seed": 1, "progress": False}
    assert torch.equal(generation.generate(LONG, **options).latents, pipe.generate(LONG, **options).latents)
    assert understanding.understand("hi", max_new_tokens=4) == pipe.understand("hi", max_new_tokens=4)


def test_a_part_refuses_the_other_task(parity_dir, tmp_path):
    """Stops: an AttributeError on None deep inside, and half a checkpoint saved as a whole one."""
    understanding = jf.load(parity_dir, device="cpu", parts="understanding", progress=False)
    generation = jf.load(parity_dir, device="cpu", parts="generation", progress=False)
    with pytest.raises(ValueError, match='only parts="understanding" was loaded; generation needs'):
        understanding.generate(SHORT)
    with pytest.raises(ValueError, match='only parts="generation" was loaded; understanding needs'):
        generation.understand("hi")
    with pytest.raises(ValueError, match='only parts="generation" was loaded'):
        generation.chat([{"role": "User", "content": "hi"}])
    for half in (understanding, generation):
        with pytest.raises(ValueError, match='parts="all"'):
            jf.save(half, tmp_path / "half")
    assert list(tmp_path.iterdir()) == []


def test_understanding_needs_no_vae(parity_dir, monkeypatch):
    """Stops: a VAE, or diffusers, loaded to answer a question."""

    def refuse(*args):
        raise AssertionError("the VAE was loaded")

    monkeypatch.setattr(loading, "load_vae", refuse)
    pipe = jf.load(parity_dir, device="cpu", dtype="float16", parts="understanding", progress=False)
    assert pipe.vae is None  # and float16, which the VAE refuses, is no matter


# Loading and saving ---------------------------------------------------------------------------------------------


def test_saved_and_loaded_again_is_the_same(pipe, parity_dir, tmp_path, image):
    """Stops: a saved checkpoint that paints or answers differently, or that lacks a file."""
    folder = jf.save(pipe, tmp_path / "deep" / "copy")
    assert folder == tmp_path / "deep" / "copy"
    again = jf.load(folder, device="cpu", progress=False)
    options = {"num_inference_steps": 2, "parallel_size": 2, "seed": 1, "progress": False}
    ours, theirs = pipe.generate(LONG, **options), again.generate(LONG, **options)
    assert torch.equal(ours.latents, theirs.latents)
    assert [i.tobytes() for i in ours.images] == [i.tobytes() for i in theirs.images]
    question = {"prompt": "What?", "images": image("wide"), "max_new_tokens": 6}
    assert pipe.understand(**question) == again.understand(**question)


def test_the_saved_folder_has_the_official_layout(pipe, parity_dir, tmp_path):
    """Stops: a folder that only this library can read. Read here with safetensors and json alone."""
    folder = jf.save(pipe, tmp_path / "copy")
    for file in ("model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        old, new = load_file(parity_dir / file), load_file(folder / file)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / file).read_bytes() == (parity_dir / file).read_bytes()
    for file in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((parity_dir / file).read_text())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "multi_modality"
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


def test_the_present_dtypes_are_saved(bf16, tmp_path):
    """Stops: bf16 weights written as fp32, twice the size, or a config that names another dtype."""
    folder = jf.save(bf16, tmp_path / "copy", max_shard_size=200_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = jf.load(folder, device="cpu", dtype="bfloat16", progress=False)
    options = {"num_inference_steps": 1, "parallel_size": 1, "seed": 1, "progress": False}
    assert torch.equal(again.generate(LONG, **options).latents, bf16.generate(LONG, **options).latents)


def test_saving_refuses_what_is_there(pipe, tmp_path):
    """Stops: somebody's files overwritten without being asked, or ever."""
    target = tmp_path / "taken"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="taken"):
        jf.save(pipe, target)
    assert (target / "thesis.txt").read_text() == "mine" and list(tmp_path.iterdir()) == [target]
    jf.save(pipe, target, overwrite=True)
    assert (target / "config.json").is_file() and (target / "thesis.txt").read_text() == "mine"


def test_dtypes_of_model_and_vae(pipe, bf16, parity_dir):
    """Stops: an option that is read and not used, and "auto" in half precision on a CPU."""

    def dtypes(**options):
        loaded = jf.load(parity_dir, device="cpu", progress=False, **options)
        assert {p.dtype for p in loaded.model.parameters()} == {loaded.model.dtype}
        return loaded.model.dtype, loaded.vae.dtype

    assert (pipe.model.dtype, pipe.vae.dtype) == (torch.float32, torch.float32)
    assert (bf16.model.dtype, bf16.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    assert dtypes(dtype=torch.bfloat16, vae_dtype="float32") == (torch.bfloat16, torch.float32)
    assert dtypes(dtype="torch.float32", vae_dtype=torch.bfloat16) == (torch.float32, torch.bfloat16)
    assert dtypes(dtype="float16") == (torch.float16, torch.float32)  # no float16 VAE


def test_a_compiled_vae_is_compiled_once(parity_dir, pipe, monkeypatch):
    """Stops: a minute of compiling for each new number of images, and images that depend on their company."""
    sizes = set()

    def compile(function, **options):
        assert options == {"dynamic": False}

        def compiled(z, **named):
            sizes.add(z.shape)
            return function(z, **named)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    vae = jf.load(parity_dir, device="cpu", compile=True, progress=False).vae
    for images in (1, 3):
        latents = torch.randn(5, *pipe.model.latent_shape, generator=torch.Generator().manual_seed(0))
        for count in (1, 2, 3, 5):
            torch.testing.assert_close(vae.decode(latents[:count]), pipe.vae.decode(latents[:count]))
        assert sizes == {(images, *pipe.model.latent_shape)}
        vae.compile_decoder(3)
        sizes.clear()


@pytest.mark.parametrize("count, most, sizes", [(5, 4, [3, 2]), (4, 4, [4]), (9, 4, [3, 3, 3]), (1, 4, [1])])
def test_images_are_decoded_evenly(pipe, monkeypatch, count, most, sizes):
    """Stops: a peak of memory for four images and then one alone, for which the card is too large."""
    monkeypatch.setattr("janusflow_min.pipeline.CPU_IMAGES", most)
    seen, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z: seen.append(len(z)) or decode(z))
    pipe.generate("a star", parallel_size=count, num_inference_steps=1, seed=0, progress=False)
    assert seen == sizes


def test_a_loaded_model_is_for_use(pipe):
    """Stops: a model in training mode, or one that holds on to gradients."""
    assert not pipe.model.training and not any(p.requires_grad for p in pipe.model.parameters())
    assert not any(p.requires_grad for p in pipe.vae.parameters())
    assert isinstance(pipe.model, jf.JanusFlow) and isinstance(pipe.model, torch.nn.Module)


@pytest.mark.parametrize(
    "cuda, mps, chosen, dtype",
    [
        (True, True, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, chosen, dtype):
    """Stops: CUDA taken for granted, Apple's GPU forgotten, bfloat16 on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = devices.pick_device("auto")
    assert device.type == chosen and device.index is None  # the current one, which torchrun sets
    assert devices.pick_dtype("auto", device) == dtype


@pytest.mark.parametrize("share, parts", [(1.05, "all"), (1.05, "generation"), (1.15, "all"), (None, "all")])
def test_auto_fits_a_cpu_s_free_memory(parity_dir, monkeypatch, recwarn, share, parts):
    """Stops: a machine that swaps, or a process that is killed, where half the bytes would have fitted; a VAE left
    behind in float32; bfloat16 where float32 fits, was asked for, or nothing is known."""
    model = jf.load(parity_dir, device="cpu", parts=parts, progress=False).model
    needed = 4 * sum(p.numel() for p in model.parameters())
    free = None if share is None else int(share * needed)
    monkeypatch.setattr(devices, "free_memory", lambda: free)
    pipe = jf.load(parity_dir, device="cpu", parts=parts, progress=False)
    short = share == 1.05
    assert pipe.dtype == pipe.vae.dtype == (torch.bfloat16 if short else torch.float32)
    texts = [str(w.message) for w in recwarn if "bfloat16" in str(w.message)]
    assert len(texts) == short and all("are free" in text and "\n" not in text for text in texts)
    assert jf.load(parity_dir, device="cpu", dtype="float32", progress=False).dtype == torch.float32
    mixed = jf.load(parity_dir, device="cpu", vae_dtype="float32", progress=False)
    assert mixed.vae.dtype == torch.float32


def test_free_memory_is_the_system_s_or_the_container_s(tmp_path, monkeypatch):
    """Stops: the host's memory taken for a container's, and a crash where a system says nothing."""
    gib = 2**30
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: {20 * 2**20} kB\nMemAvailable: {9 * 2**20} kB\nCached: 1 kB\n"
    )
    assert devices.free_memory(tmp_path) == 9 * gib
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text(f"anon {gib}\nfile {7 * gib}\n")
    for limit, free in (("max", 9), (4 * gib, 3), (64 * gib, 9), (gib // 2, 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert devices.free_memory(tmp_path) == free * gib
    monkeypatch.delattr(devices.os, "sysconf", raising=False)
    assert devices.free_memory(tmp_path / "elsewhere") is None


def test_device_options(parity_dir):
    """Stops: a torch.device refused where its name is accepted."""
    loaded = jf.load(parity_dir, device=torch.device("cpu"), progress=False)
    assert loaded.model.device == loaded.vae.device == torch.device("cpu")


def test_the_vae_may_lie_elsewhere(parity_dir, tmp_path, pipe):
    """Stops: a vae_path that is ignored, or taken only in one of its two forms."""
    scaled = tmp_path / "vae"
    scaled.mkdir()
    for file in (parity_dir / "vae").iterdir():
        (scaled / file.name).write_bytes(file.read_bytes())
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    for path in (str(scaled), scaled, tmp_path):  # the folder, or one that holds it
        loaded = jf.load(parity_dir, vae_path=path, device="cpu", progress=False)
        assert loaded.vae.scaling_factor == 0.5 and pipe.vae.scaling_factor == 0.13025
    quiet = jf.load(
        parity_dir, vae_path=tmp_path / "none", device="cpu", parts="understanding", progress=False
    )
    assert quiet.vae is None


def test_without_a_vae_folder_the_hub_s_is_taken(parity_dir, tmp_path, monkeypatch):
    """Stops: the official checkpoint, which has no VAE of its own, refused or decoded by a wrong one."""
    import huggingface_hub

    for file in parity_dir.iterdir():
        if file.is_file() and not file.name.startswith("expected"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    asked = []

    def download(repo, **options):
        asked.append(repo)
        return str(parity_dir / "vae")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert jf.load(tmp_path, device="cpu", progress=False).vae is not None
    assert asked == ["stabilityai/sdxl-vae"]


def test_loading_is_quiet_when_asked(parity_dir, capfd, monkeypatch):
    """Stops: bars and diffusers' warnings in logs, and at those who asked for none."""
    jf.load(parity_dir, device="cpu", parts="understanding", progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    jf.load(parity_dir, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")
    jf.load(parity_dir, device="cpu", parts="understanding", progress=True)
    assert "Loading weights" in capfd.readouterr().err
