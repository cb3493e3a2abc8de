# SPDX-License-Identifier: MIT
"""The fast path: its parts against the plain ones, shapes that change, weights that move; on a GPU the kernels too.

That it matches the reference's recordings is in `test_parity.py`, which runs both paths.
"""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import janusflow_min as jf
from janusflow_min.fast import ops
from janusflow_min.fast import sampler as fast
from janusflow_min.sampling import PlainSampler

PROMPTS = ["a photo of a red star", "a photo of a blue ring and a green circle on a grey background"]


def relative(actual: Tensor, wanted: Tensor) -> float:
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def fast_pipe(parity_dir) -> jf.Pipeline:
    pipe = jf.load(parity_dir, device="cpu", progress=False)
    pipe.sampler = fast.GraphSampler(pipe.model)
    return pipe


@pytest.mark.parametrize("weight", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("parallel", [1, 3])
def test_prompts_of_different_lengths_paint_what_the_plain_path_paints(pipe, fast_pipe, weight, parallel):
    """Stops: a row that starts at another's slot, an unconditional row with positions of its own, keys of one
    prompt under another image."""
    options = dict(parallel_size=parallel, cfg_weight=weight, num_inference_steps=3, seed=0, progress=False)
    wanted = pipe.generate(PROMPTS, **options).latents
    assert relative(fast_pipe.generate(PROMPTS, **options).latents, wanted) < 4e-6
    reverse = fast_pipe.generate(PROMPTS[::-1], **{**options, "seed": list(range(2 * parallel))}).latents
    again = pipe.generate(PROMPTS[::-1], **{**options, "seed": list(range(2 * parallel))}).latents
    assert relative(reverse, again) < 4e-6  # buffers that hold the last call's prompts


def test_more_images_than_fit_at_once(pipe, fast_pipe, monkeypatch):
    """Stops: a list that is cut, or images that depend on where the list is cut."""
    monkeypatch.setattr("janusflow_min.pipeline.MAX_BATCH", 3)
    options = dict(parallel_size=2, num_inference_steps=2, seed=5, progress=False)
    prompts = [*PROMPTS, PROMPTS[0]]
    out = fast_pipe.generate(prompts, **options)
    assert len(out.images) == 6 and out.seeds == list(range(5, 11))
    monkeypatch.setattr("janusflow_min.pipeline.MAX_BATCH", 16)
    assert relative(pipe.generate(prompts, **options).latents, out.latents) < 4e-6


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_plain_path_s(pipe, fast_pipe, parity_dir, temperature):
    """Stops: rows aligned at the wrong end, image features in another row, a step that forgets or repeats a token."""
    images = sorted((parity_dir / "images").glob("*.png"))
    questions = ["What is it?", "Describe both pictures, please.", "hello"]
    groups = [[images[0]], images[:2], None]
    options = dict(max_new_tokens=20, temperature=temperature, seed=3)
    for order in (slice(None), slice(None, None, -1), slice(1, 2)):
        plain = pipe.understand(questions[order], groups[order], **options)
        ours = fast_pipe.understand(questions[order], groups[order], **options)
        assert [a.token_ids for a in ours] == [a.token_ids for a in plain]


def test_an_answer_ends_at_eos_between_two_looks(fast_pipe, parity_dir, expected):
    """Stops: tokens behind EOS, which the fast path has computed before it looks."""
    batch = fast_pipe.processor.batch(
        [[{"role": "User", "content": "hello"}, {"role": "Assistant", "content": ""}]]
    )
    with torch.inference_mode():
        whole = fast_pipe.sampler.generate_tokens(batch, 40, -1)[0]
        eos = next(token for token in whole[3:] if whole.index(token) > 2)
        assert fast_pipe.sampler.generate_tokens(batch, 40, eos) == [whole[: whole.index(eos) + 1]]


def test_fused_weights_are_the_model_s_own(fast_pipe, parity_dir, tmp_path):
    """Stops: weights held twice, a saved checkpoint that lacks or doubles them, stale copies after `.to`."""
    attention = fast_pipe.model.llm.layers[0].self_attn
    fused = fast_pipe.sampler.layers[0].qkv
    assert attention.q_proj.weight.data_ptr() == fused.data_ptr()
    jf.save(fast_pipe, tmp_path / "saved")
    again, first = (
        jf.load(tmp_path / "saved", device="cpu", progress=False),
        jf.load(parity_dir, device="cpu"),
    )
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
    assert torch.equal(fused[: len(attention.q_proj.weight)], attention.q_proj.weight)
    old = fast_pipe.sampler
    assert old.is_current
    fast_pipe.model.to(torch.float64)
    assert not old.is_current and fast_pipe.sampler is not old


def test_memory_is_that_of_the_largest_shape_used_lately(fast_pipe, monkeypatch):
    """Stops: memory that grows with every new shape, and caches of a large call that are held for ever."""
    monkeypatch.setattr(fast, "LATELY", 12)
    options = dict(num_inference_steps=1, seed=0, progress=False)
    sampler = fast_pipe.sampler

    def held() -> tuple[int, int]:
        kept = [sampler.bytes_of(graph) for graph, _ in sampler.kept.values()]
        assert sampler.shared.nbytes == max(shared for _, shared in kept)
        return len(kept), sampler.shared.nbytes

    fast_pipe.understand(["hi"] * 2, max_new_tokens=2)
    before = held()[1]
    fast_pipe.understand(["hi"] * 9, max_new_tokens=300)
    most = held()[1]
    assert most > 4 * before
    for count in range(1, 9):
        fast_pipe.generate(PROMPTS[0], parallel_size=count, **options)
    assert held() == (9, most)  # whatever else came, the largest alone counts
    for _ in range(8):
        fast_pipe.generate(PROMPTS[0], parallel_size=2, **options)
    assert held()[1] < most / 4  # nobody has needed it lately
    monkeypatch.setattr(fast, "KEPT_BYTES", 3 * fast.GRAPH_BYTES)
    for count in range(1, 6):
        fast_pipe.generate(PROMPTS[0], parallel_size=count, **options)
    assert held()[0] == 2


def test_what_is_given_up_is_freed_at_once(fast_pipe):
    """Stops: gigabytes that wait for Python's garbage collector, after a larger call or a move of the model."""
    fast_pipe.understand("hi", max_new_tokens=2)
    fast_pipe.generate(PROMPTS[0], parallel_size=1, num_inference_steps=1, progress=False)
    kept = [weakref.ref(graph) for graph, _ in fast_pipe.sampler.kept.values()]
    sampler = weakref.ref(fast_pipe.sampler)
    assert len(kept) == 2
    gc.disable()
    try:
        fast_pipe.understand(["hi"] * 4, max_new_tokens=400)
        assert [ref() for ref in kept] == [None, None]
        fast_pipe.to(torch.float32)
        assert sampler() is None
    finally:
        gc.enable()


def test_calls_within_a_call_change_nothing(pipe, fast_pipe, parity_dir):
    """Stops: one call's keys and values read by another, now that all shapes share a buffer."""
    image = sorted((parity_dir / "images").glob("*.png"))[0]
    options = dict(parallel_size=2, num_inference_steps=3, seed=0, progress=False)
    wanted = pipe.generate(PROMPTS, **options).latents
    answer = pipe.understand("What is it?", image, max_new_tokens=8).token_ids

    def interrupt(step, t, latents):
        assert fast_pipe.understand("What is it?", image, max_new_tokens=8).token_ids == answer
        other = fast_pipe.generate(PROMPTS[::-1], **{**options, "parallel_size": 1 + step}).latents
        assert torch.isfinite(other).all()
        if step == 1:
            fast_pipe.sampler.forget()

    ours = fast_pipe.generate(PROMPTS, callback_on_step_end=interrupt, **options)
    assert relative(ours.latents, wanted) < 4e-6


def test_two_threads_wait_for_each_other(pipe, fast_pipe):
    """Stops: a stream of text and an image generated meanwhile, each with the other's keys and values."""
    options = dict(parallel_size=2, num_inference_steps=4, seed=0, progress=False)
    wanted = pipe.generate(PROMPTS[0], **options).latents
    text = pipe.understand("hello", max_new_tokens=60).text
    for _ in range(2):
        pieces = fast_pipe.stream("hello", max_new_tokens=60)
        first = next(pieces)
        assert relative(fast_pipe.generate(PROMPTS[0], **options).latents, wanted) < 4e-6
        assert first + "".join(pieces) == text


def test_compiling_is_not_for_each_number_of_images(pipe, parity_dir, monkeypatch):
    """Stops: seconds of compiling for every new number of images, and no compiled code at all after the eighth."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    module_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: module_compile(self, backend=counter))
    ours = jf.load(parity_dir, device="cpu", progress=False)
    ours.sampler = fast.GraphSampler(ours.model, compile=True)
    image = sorted((parity_dir / "images").glob("*.png"))[0]
    frames = []
    for count in (1, 2, 3, 5, 7):
        options = dict(parallel_size=count, num_inference_steps=2, seed=0, progress=False)
        assert (
            relative(
                ours.generate(PROMPTS[0], **options).latents, pipe.generate(PROMPTS[0], **options).latents
            )
            < 4e-6
        )
        asked = ["what?"] * count, [image] * count
        assert ours.understand(*asked, max_new_tokens=3) == pipe.understand(*asked, max_new_tokens=3)
        frames.append(counter.frame_count)
    assert 3 <= frames[0] < frames[2] <= 9 and frames[2] == frames[3] == frames[4]


def test_the_plain_path_is_used_where_the_fast_one_does_not_fit(pipe):
    """Stops: kernels on a CPU."""
    assert pipe.fast and isinstance(pipe.sampler, PlainSampler)


# Kernels -----------------------------------------------------------------------


def operands(device: str, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments for each block of `ops.py`, of uneven sizes; prefix, grouped heads and different lengths included."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows, tokens, heads, groups, dim, slots = 3, 5, 4, 2, 32, 80
    cache = draw(rows, slots, groups, dim), draw(rows, slots, groups, dim)
    prefix = draw(2, 6, groups, dim), draw(2, 6, groups, dim), whole(0, 1, 0), whole(3, 1, 6)
    long = draw(rows, 150, (heads + 2 * groups) * dim)  # more than a block of queries
    return {
        "rms_norm": (draw(7, 96), draw(96), 1e-6),
        "silu_mul": (draw(5, 2 * 200),),
        "linear_add": (draw(1, 96), draw(50, 96), draw(1, 50)),
        "norm_linear": (draw(1, 96), draw(96), 1e-6, draw(50, 96)),
        "norm_mlp": (draw(1, 96), draw(96), 1e-6, draw(60, 96)),
        "rope_store": (draw(rows, tokens, (heads + 2 * groups) * dim), draw(90, dim // 2), draw(90, dim // 2),
                       whole(3, 1, 0), *cache, heads),
        "attend": (draw(rows, tokens, heads, dim), *cache),
        "attend_image": (long, draw(160, dim // 2), draw(160, dim // 2), whole(3, 1, 0), heads, prefix),
        "attend_one": (draw(rows, heads, dim), *cache, whole(70, 3, 64)),
    }  # fmt: skip


def check_kernels(device: str, dtype: torch.dtype, bound: float, names: list[str]) -> None:
    from janusflow_min.fast import kernels

    for name in names:
        mine, theirs = ([a.clone() if isinstance(a, Tensor) else a for a in operands(device, dtype)[name]]
                        for _ in range(2))  # fmt: skip
        actual, wanted = getattr(kernels, name)(*mine), getattr(ops, name)(*theirs)
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype, name
        assert relative(actual, wanted) <= bound, name
        if name == "rope_store":  # what it wrote
            assert relative(mine[4], theirs[4]) <= bound and relative(mine[5], theirs[5]) <= bound


INTERPRETED = [
    "rms_norm", "silu_mul", "linear_add", "norm_linear", "norm_mlp", "rope_store", "attend", "attend_image",
    "attend_one",
]  # fmt: skip


def test_kernels_compute_what_ops_say_interpreted(interpret):
    """Stops: a kernel that reads or writes elsewhere, found without a GPU."""
    interpret(f"import torch, test_fast; test_fast.check_kernels('cpu', torch.float32, 1e-6, {INTERPRETED})")


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_compute_what_ops_say(name, dtype):
    check_kernels("cuda", dtype, 6e-3, [name])


@pytest.fixture(scope="module", params=["fixture", "tiny"])
def gpu_pipe(request, parity_dir) -> jf.Pipeline:
    source = parity_dir if request.param == "fixture" else "tiny"
    pipe = jf.load(source, device="cuda", dtype="bfloat16", progress=False)
    assert isinstance(pipe.sampler, fast.GraphSampler)
    return pipe


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_painting_on_a_gpu(gpu_pipe, weight):
    """Stops: a graph that replays the inputs it was captured with. One step: over several the trained default turns
    bfloat16's 1 % into 4 to 11 %, on the plain path just as on the fast one."""
    for parallel in (1, 3, 1):
        options = dict(parallel_size=parallel, cfg_weight=weight, num_inference_steps=1, progress=False)
        for seed in (0, 1):
            ours, graphs = gpu_pipe.generate(PROMPTS[:: 1 - 2 * seed], seed=seed, **options), gpu_pipe.sampler
            gpu_pipe.sampler = PlainSampler(gpu_pipe.model)
            plain = gpu_pipe.generate(PROMPTS[:: 1 - 2 * seed], seed=seed, **options)
            gpu_pipe.sampler = graphs
            assert relative(ours.latents, plain.latents) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("prompt, weight, steps", [("cat", 2.0, 4), ("long", 2.0, 4), ("long", 5.0, 3)])
def test_recorded_painting_on_a_gpu(parity_dir, recorded, expected, prompt, weight, steps):
    """The recording's own bounds for bfloat16."""
    pipe = jf.load(parity_dir, device="cuda", dtype="bfloat16", progress=False, upstream_rounding=True)
    out = pipe.generate(
        expected["generation"][prompt]["prompt"],
        2,
        weight,
        steps,
        latents=recorded[f"gen.{prompt}.noise"].bfloat16(),
        progress=False,
    )
    wanted = recorded[f"bf16.gen.{prompt}.w{weight}.s{steps}.z"][-1]
    assert relative(out.latents, wanted) <= (0.02 if weight <= 2 else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_on_a_gpu(gpu_pipe, rows):
    """Every step's logits beside the plain path's, both fed the plain path's tokens (in bf16 best tokens tie)."""
    texts = ["What is in the picture?", "Describe it at some length, please", "hello"][:rows]
    users = [[{"role": "User", "content": t}, {"role": "Assistant", "content": ""}] for t in texts]
    batch = gpu_pipe.processor.batch(users)
    seen = []

    def note(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    with torch.inference_mode():
        wanted = PlainSampler(gpu_pipe.model).generate_tokens(batch, 20, -1, note)
        plain, columns = list(seen), iter(torch.tensor(wanted, device="cuda").T)

        def follow(logits: Tensor) -> Tensor:
            step = len(done)
            assert relative(logits, plain[step]) < 0.03, step
            done.append(step)
            return next(columns)

        done: list[int] = []
        assert gpu_pipe.sampler.generate_tokens(batch, 20, -1, follow) == wanted
        assert len(done) == 20
        greedy = gpu_pipe.sampler.generate_tokens(batch, 20, -1)  # the whole step as one graph
        assert [len(ids) for ids in greedy] == [20] * rows and [g[0] for g in greedy] == [
            w[0] for w in wanted
        ]


@pytest.mark.gpu
def test_calls_within_a_call_on_a_gpu(gpu_pipe):
    """Stops: a graph that replays with another call's keys and values, or after its memory was given back."""
    options = dict(parallel_size=2, num_inference_steps=3, seed=0, progress=False)
    wanted = gpu_pipe.generate(PROMPTS, **options).latents

    def interrupt(step, t, latents):
        gpu_pipe.understand(["hello"] * (1 + 5 * step), max_new_tokens=4 + 300 * step)
        gpu_pipe.generate(PROMPTS[1], **{**options, "parallel_size": 1 + step})

    for _ in range(2):
        ours = gpu_pipe.generate(PROMPTS, callback_on_step_end=interrupt, **options)
        assert torch.equal(ours.latents, wanted)


@pytest.mark.gpu
def test_a_gpu_s_memory_is_given_back(gpu_pipe):
    """Stops: graphs, or the buffers of a large call, that keep the card's memory until Python collects garbage."""

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    gpu_pipe.understand("hello", max_new_tokens=2)
    gpu_pipe.generate(PROMPTS[0], parallel_size=1, num_inference_steps=1, progress=False)
    gpu_pipe.sampler.forget()
    before = allocated()
    gc.disable()
    try:
        for rows in (2, 16):
            gpu_pipe.understand(["hello"] * rows, max_new_tokens=400)
        most = allocated()
        gpu_pipe.generate(PROMPTS[0], parallel_size=3, num_inference_steps=1, progress=False)
        gpu_pipe.sampler.forget()
        assert allocated() - before < 0.1 * (most - before)
    finally:
        gc.enable()


@pytest.mark.gpu
def test_the_vae_s_encoder_waits_on_the_cpu(parity_dir):
    """Stops: memory for an encoder that generating never uses, and latents that depend on where it has waited."""
    pipe = jf.load(parity_dir, device="cuda", progress=False)
    encoder = next(pipe.vae.autoencoder.encoder.parameters())
    assert encoder.device.type == "cpu" and pipe.vae.device.type == "cuda"
    pipe.generate(PROMPTS[0], parallel_size=1, num_inference_steps=1, seed=0, progress=False)
    assert next(pipe.vae.autoencoder.encoder.parameters()).device.type == "cpu"
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        first = pipe.vae.encode(pixels)
    pipe.vae.to("cpu").to("cuda")
    assert torch.equal(pipe.vae.encode(pixels), first) and first.is_cuda
    assert not next(pipe.vae.autoencoder.encoder.parameters()).is_inference()
