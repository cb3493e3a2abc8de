# SPDX-License-Identifier: MIT
"""`load(quantization=...)`: the plain products against float64, what a quantized pipeline may and may not do, the
kernels against the plain products, and the default model's images and answers."""

from __future__ import annotations

import pytest
import torch
from adapters import write_adapter
from PIL import Image
from torch import Tensor

import janusflow_min as jf
from janusflow_min import cli
from janusflow_min.benchmarks.manifest import generation_settings
from janusflow_min.benchmarks.runner import Settings
from janusflow_min.fast import ops, quantized
from janusflow_min.fast.quantized import QUANTIZATIONS, Quantized, quantize
from janusflow_min.fast.sampler import GraphSampler

# A format's own error: of one rounded matrix with normal entries, and of a product of two (relative L2 norm).
ROUNDED = {"int8": 0.0105, "fp8": 0.029}
PRODUCT = {"int8": 0.012, "fp8": 0.040}
# Of the default model's latents after one step, and the median of several images' after ten: over several steps its
# flow can end in another image, as it does with bfloat16.
ONE_STEP = {"int8": 0.02, "fp8": 0.03}
TEN_STEPS = {"int8": 0.02, "fp8": 0.04}
PROMPT = "a photo of a red star"


def relative(actual: Tensor, wanted: Tensor) -> float:
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm()).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipes(kind) -> tuple[jf.Pipeline, jf.Pipeline]:
    """The default model, as it is and quantized."""
    return tuple(jf.load(device="cpu", progress=False, quantization=q) for q in (None, kind))


def test_rounding_keeps_each_row_s_precision(kind):
    """Stops: one scale for the whole matrix or for columns, values that overflow the format, rows of zeros turned
    into NaN."""
    x = draw(64, 512)
    rounded = quantize(x, QUANTIZATIONS[kind])
    assert rounded.values.element_size() == 1 and rounded.scale.shape == (64,)
    for row, wanted in zip(rounded.dequantize(), x, strict=True):
        assert relative(row, wanted) < ROUNDED[kind]
        assert row.abs().max() == pytest.approx(wanted.abs().max().item(), rel=1e-6)
    columns = quantize(x.T.contiguous(), QUANTIZATIONS[kind]).dequantize().T  # the control: the wrong axis
    assert max(relative(row, wanted) for row, wanted in zip(columns, x, strict=True)) > 3 * ROUNDED[kind]
    zeros = quantize(torch.zeros(2, 8), QUANTIZATIONS[kind])
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 8))


@pytest.mark.parametrize("rows", [1, 7])
def test_products_against_float64(kind, rows):
    """Stops: a scale forgotten, applied twice or along the wrong axis; sums that overflow."""
    x, w = draw(rows, 512, seed=1), draw(96, 512, seed=2)
    weight = quantize(w, QUANTIZATIONS[kind])
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)  # of each output: they differ
    inputs = x.double() if rows == 1 else quantize(x, QUANTIZATIONS[kind]).dequantize().double()
    exact = inputs @ weight.dequantize().double().T

    def error(y: Tensor) -> float:
        return ((y.double() - exact) / size).abs().max().item()

    y = quantized.linear(x, weight)
    assert error(y) < (1e-5 if rows == 1 and kind == "int8" else 1e-7)  # the row's 14 bits, else fp32's sums
    assert relative(y / size, x.double() @ w.double().T / size) < PRODUCT[kind]
    # Controls that must fail: a scale off by a thousandth, the scales of other outputs.
    assert error(y * 1.001) > 5e-5
    assert error(quantized.linear(x, Quantized(weight.values, weight.scale.flip(0)))) > 0.1
    for dtype in (torch.bfloat16, torch.float16):
        assert quantized.linear((x / 100).to(dtype), weight).dtype == dtype


def test_matrices_behind_the_first_block_are_8_bits_and_nothing_else(pipes, kind):
    """Stops: a layer passed over, an embedding or SigLIP rounded, weights held twice."""
    plain, ours = pipes
    before, after = (dict(pipe.model.named_parameters()) for pipe in pipes)
    matrices = {n for n in before if n.startswith("llm.") and n.endswith(("_proj.weight", "lm_head.weight"))}
    matrices -= {n for n in matrices if n.startswith("llm.layers.0.")}
    assert len(matrices) == 7 * (plain.model.config.llm.num_hidden_layers - 1) + 1
    for name, weight in before.items():
        if name in matrices:
            values, scale = (after[name.replace(".weight", part)] for part in (".values", ".scale"))
            assert values.dtype == QUANTIZATIONS[kind] and values.nbytes == weight.numel()
            assert relative(Quantized(values, scale).dequantize(), weight) < ROUNDED[kind]
        else:
            assert torch.equal(after[name], weight), name
    assert ours.model.llm.quantization == kind and plain.model.llm.quantization is None


def test_images_stay_close(pipes, kind):
    """Stops: a product that is rounded twice, a layer with another's scale: the error of the latents would grow."""
    for steps, bound in ((1, ONE_STEP[kind]), (10, TEN_STEPS[kind])):
        options = dict(
            parallel_size=5, num_inference_steps=steps, seed=0, progress=False, output_type="latent"
        )
        ours, wanted = (pipe.generate(PROMPT, **options).latents for pipe in reversed(pipes))
        errors = sorted(relative(a, b) for a, b in zip(ours, wanted, strict=True))
        assert bound / 10 < errors[2] < bound
    assert torch.equal(ours, pipes[1].generate(PROMPT, **options).latents)


def test_one_evaluation_by_the_fast_sampler(pipes, kind):
    """Stops: query, key and value weights joined without their scales, or with one another's."""
    _, ours = pipes
    options = dict(parallel_size=2, num_inference_steps=1, seed=0, progress=False, output_type="latent")
    wanted = ours.generate(PROMPT, **options).latents
    answer = ours.understand("Is there a red star?", max_new_tokens=5).token_ids
    ours.sampler = GraphSampler(ours.model)
    try:
        # Sums in another order move single roundings of 8 bits.
        assert relative(ours.generate(PROMPT, **options).latents, wanted) < 1e-2
        assert ours.understand("Is there a red star?", max_new_tokens=5).token_ids == answer
        assert ours.sampler.is_current
        with torch.no_grad():
            last = ours.model.llm.layers[-1].self_attn.q_proj
            assert ours.sampler.layers[-1].qkv.values.data_ptr() == last.values.data_ptr()
    finally:
        ours.sampler = None


def test_what_a_quantized_pipeline_cannot_do_says_so(pipes, kind, tmp_path):
    """Stops: rounded weights saved as if they were the model, an adapter merged into 8 bits, scales cast to bfloat16
    by `.to`, a misspelt name that is passed over."""
    plain, ours = pipes
    with pytest.raises(ValueError, match="to save it, load it without"):
        jf.save(ours, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="quantized: load it again without"):
        ours.load_lora(write_adapter(tmp_path / "adapter", plain.model))
    with pytest.raises(ValueError, match="to change its dtype, load"):
        ours.to("bfloat16")
    assert ours.to("cpu", torch.float32) is ours
    assert ours.model.llm.lm_head.scale.dtype == torch.float32
    with pytest.raises(ValueError, match="one of int8, fp8, got 'int4'"):
        jf.load(tmp_path / "no such folder", quantization="int4")


def test_the_command_line_says_what_made_an_image(kind, tmp_path, capsys):
    """Stops: an option that is dropped on its way to `load`, an image or a run that hides it, an adapter refused only
    once the model is loaded."""
    options = ["--quantization", kind, "--device", "cpu", "--quiet"]
    command = [
        "generate",
        PROMPT,
        "--num-inference-steps",
        "1",
        "--parallel-size",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*command, *options]) == 0
    with Image.open(next(tmp_path.glob("*seed*.png"))) as image:
        assert image.text["quantization"] == kind
    assert cli.main([*command, *options, "--lora", str(tmp_path / "nowhere")]) == 2
    assert "--lora does not go with --quantization" in capsys.readouterr().err
    assert generation_settings(Settings(quantization=kind, device="cpu"))["quantization"] == kind
    assert "quantization" not in generation_settings(Settings(device="cpu"))  # older runs go on


# Kernels -----------------------------------------------------------------------


def check_kernels(device: str, dtype: torch.dtype, bound: float, kind: str) -> None:
    """Each of the blocks with 8-bit weights against `ops.py`, of uneven sizes, for one row and for many."""
    from janusflow_min.fast import kernels

    generator = torch.Generator().manual_seed(3)
    weight, gate_up, down = (
        Quantized(made.values.to(device), made.scale.to(device))
        for made in (
            quantize(torch.randn(shape, generator=generator) * 0.1, QUANTIZATIONS[kind])
            for shape in ((96, 208), (192, 208), (208, 96))
        )
    )
    for rows in (1, 5, 16, 70, 300):
        x, residual = draw(rows, 208).to(device, dtype), draw(rows, 208, seed=4).to(device, dtype)
        norm = 1 + draw(1, 208, seed=5)[0].to(device, dtype)

        def mlp(block, x=x, norm=norm, residual=residual):
            return block.linear_add(block.norm_mlp(x, norm, 1e-6, gate_up), down, residual.clone())

        def out(block, x=x):
            return block.linear_add(x, weight, torch.ones(len(x), 96, device=device, dtype=dtype))

        def qkv(block, x=x, norm=norm):
            return block.norm_linear(x, norm, 1e-6, weight)

        for work in (mlp, out, qkv):
            actual, wanted = work(kernels), work(ops)
            assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
            for a, b in zip(actual, wanted, strict=True):
                assert relative(a, b) <= bound, (work.__name__, rows)


def test_kernels_compute_what_the_plain_products_say_interpreted(interpret):
    """Stops: a kernel that reads or writes elsewhere, or scales another row, found without a GPU. (int8 alone: the
    interpreter rounds e4m3 in its own way.)"""
    interpret(
        "import torch, test_quantized; test_quantized.check_kernels('cpu', torch.float32, 1e-3, 'int8')"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_compute_what_the_plain_products_say(kind, dtype):
    """Stops: what the interpreter cannot see: rounding, sums and layouts of the card's own instructions."""
    check_kernels("cuda", dtype, 2e-2, kind)


@pytest.mark.gpu
def test_a_quantized_default_on_a_gpu(kind):
    """Stops: a graph that reads weights which have moved, quantized products that are skipped by the fast path."""
    plain, ours = (jf.load(device="cuda", progress=False, quantization=q) for q in (None, kind))
    assert isinstance(ours.sampler, GraphSampler)
    options = dict(parallel_size=3, num_inference_steps=1, seed=0, progress=False, output_type="latent")
    error = relative(ours.generate(PROMPT, **options).latents, plain.generate(PROMPT, **options).latents)
    assert 1e-3 < error < 2 * ONE_STEP[kind]
    shown = plain.generate(PROMPT, 1, seed=1, progress=False).images[0]
    question = "What is in the image?"
    assert ours.understand(question, images=shown).text == plain.understand(question, images=shown).text
