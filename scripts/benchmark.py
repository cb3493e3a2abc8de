# SPDX-License-Identifier: MIT
"""How fast: ours, the reference, and what the card allows, in one run.

    python scripts/benchmark.py --json speed.json --plot speed.png                    # ours, one GPU
    python scripts/benchmark.py --janus-root ../Janus --modes fast compile reference "reference compiled"
    python scripts/benchmark.py --growth                                              # time and memory as things grow
    python scripts/benchmark.py --host --json host.json                               # first tokens, 1,000 questions
    python scripts/benchmark.py --memory --janus-root ../Janus --modes fast reference # peaks, and 200 random calls
    python scripts/benchmark.py --throughput --gpus 2 --janus-root ../Janus --modes fast reference  # benchmark images
    python scripts/benchmark.py --size small --device cpu --dtype float32             # minutes on a CPU
    python scripts/benchmark.py --device cpu --images 1 --runs 1 --num-inference-steps 2  # the official size there

Official architecture with random weights (nobody's speed depends on their values), bfloat16, written once to
--work in the official layout with an SDXL-shaped VAE. Every figure is the median of --runs runs after a warm-up,
wall clock with the device synchronised, from prompt to pixels or from prepared inputs to tokens. `throughput.py` says
what --throughput measures; it exits with 1 if GPUs or passes differ in a byte; `resources.py` what --host and
--memory do.

- limit of the card: its measured matrix rate and copy bandwidth. Floor of generating: the LLM's products at that
  rate. Floor of answering: its weights and the row's keys and values read once a token.
- modes: "fast" is the default, "compile" is `load(compile=True)`, "plain" is `load(fast=False)`, "int8" and "fp8" are
  its `quantization`; "reference" is the published loop over the published classes, "reference compiled" has its LLM in
  torch.compile (5 images alone).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import resources
import throughput
import torch
from common import (
    helper,
    log,
    median,
    name_of,
    peak_gib,
    pyplot,
    random_checkpoint,
    release,
    reset_peak,
    seconds,
)
from PIL import Image
from torch import Tensor

import janusflow_min as jf
from janusflow_min.config import JanusFlowConfig
from janusflow_min.fast.quantized import QUANTIZATIONS
from janusflow_min.model import JanusFlow
from janusflow_min.pipeline import Pipeline
from janusflow_min.pixels import to_uint8
from janusflow_min.processor import Batch
from janusflow_min.sampling import PlainSampler

Note = Callable[[str, float], None]  # takes a measure and its value
MODES = ("fast", "compile", "plain", *QUANTIZATIONS, "reference", "reference compiled")
SECONDS = ("1 image", "5 images", "16 images", "5 images, 128 prompt tokens", "64 prompts, per image")


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    report: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__, "dtype": args.dtype}
    report |= {"size": args.size, "runs": args.runs, "steps": args.num_inference_steps}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.work or Path(scratch)) / f"random-{args.size}"
        random_checkpoint(args.size, folder, args.device, args.janus_root)
        if args.throughput:
            pixels = None
            if "reference" in args.modes:
                pixels = reference_painter(folder, args, *load_reference(folder, args))
            report["throughput"] = measured = throughput.measure(folder, Path(scratch), args, pixels)
            print(json.dumps(report, indent=2))
            write(report, args.json)
            return 1 if False in measured.values() else 0
        config = JanusFlowConfig.from_file(folder / "config.json")
        report["limits"] = limits = card_limits(device, args.dtype)
        if args.growth:
            report["growth"] = growth(folder, args)
        elif args.host:
            report["host"] = resources.host(load(folder, args, args.modes[0]), folder, args)
            print(json.dumps(report["host"], indent=2))
        elif args.memory:
            report["memory"] = resources.memory(partial(painter_of, folder, args), args)
            print(json.dumps(report["memory"], indent=2))
        else:
            report["floors"] = floors(config, limits, args)
            report["results"] = results = {}
            for mode in args.modes:
                log(mode)

                def note(measure: str, value: float, mode: str = mode) -> None:
                    results.setdefault(measure, {})[mode] = value
                    write(report, args.json)

                measure = measure_reference if mode.startswith("reference") else measure_ours
                measure(folder, args, mode, note)
                release()
            print(table(report))
    write(report, args.json)
    if args.plot is not None:
        (plot_growth if args.growth else plot)(report, args.plot)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--janus-root", type=Path, help="checkout of deepseek-ai/Janus, for its modes")
    parser.add_argument("--work", type=Path, help="keep the random checkpoint here; else a temporary folder")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="write a picture here (needs matplotlib)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", choices=("official", "small"), default="official")
    parser.add_argument("--modes", nargs="+", default=["fast"], choices=MODES)
    parser.add_argument("--growth", action="store_true", help="curves instead of the table, fast mode only")
    parser.add_argument(
        "--host", action="store_true", help="what the host adds to answers, and its questions/s"
    )
    parser.add_argument("--memory", action="store_true", help="peaks at 1 and 5 images, growth over --calls")
    parser.add_argument(
        "--calls", type=int, default=200, help="with --memory: of random shapes (default: 200)"
    )
    parser.add_argument("--questions", type=int, default=1000, help="with --host (default: 1000)")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 5, 16], help="generated at once (1 5 16)"
    )
    parser.add_argument("--throughput", action="store_true", help="images per second of a benchmark's run")
    parser.add_argument("--gpus", type=int, default=1, help="with --throughput: also by so many ranks")
    parser.add_argument("--prompts", type=int, default=64, help="with --throughput (default: 64)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer")
    args = parser.parse_args()
    if args.janus_root is None and any(mode.startswith("reference") for mode in args.modes):
        parser.error("the reference's modes need --janus-root")
    return args


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# What is measured -----------------------------------------------------------------------


def prompt_of(pipe: Pipeline, tokens: int, number: int = 0) -> str:
    """A prompt whose template has so many tokens, the generation tag not counted."""
    words = ("red", "blue", "green", "star", "circle", "square", "ring", "cross")
    text = words[number % 8]
    while True:
        count = len(pipe.processor.generation_prompt(text)[0]) - 1
        if count >= tokens:
            return text
        text += " " + words[(number // 8 + count) % 8]


def picture(size: int) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def question(pipe: Pipeline, rows: int):
    """The processor's batch of image questions."""
    size = pipe.model.config.siglip.image_size
    user = {
        "role": "User",
        "content": "<image_placeholder>\nDescribe the picture.",
        "images": [picture(size)],
    }
    return pipe.processor.batch([[user, {"role": "Assistant", "content": ""}]] * rows)


# Ours -----------------------------------------------------------------------


def load(folder: Path, args: argparse.Namespace, mode: str) -> Pipeline:
    quantization = mode if mode in QUANTIZATIONS else None
    options = dict(fast=mode != "plain", compile=mode == "compile", quantization=quantization)
    return jf.load(folder, device=args.device, dtype=args.dtype, progress=False, **options)


def painter(pipe: Pipeline, args: argparse.Namespace) -> Callable[..., Callable[[], Any]]:
    """(images, prompt tokens, steps) -> what generates them."""

    def paint(count: int, tokens: int = 32, steps: int = args.num_inference_steps) -> Callable[[], Any]:
        settings = dict(parallel_size=count, num_inference_steps=steps, progress=False, seed=0)
        return partial(pipe.generate, prompt_of(pipe, tokens), **settings)

    return paint


@torch.inference_mode()
def answer(pipe: Pipeline, batch: Batch, tokens: int) -> list[list[int]]:
    """From prepared inputs; an EOS that no token has, so that every answer is of full length."""
    return pipe.sampler.generate_tokens(batch, tokens, eos_id=-1)


def measure_ours(folder: Path, args: argparse.Namespace, mode: str, note: Note) -> None:
    load(folder, args, mode)  # imports, the first use of the device
    release()
    note("load, s", median(lambda: load(folder, args, mode), 2))
    release()
    pipe = load(folder, args, mode)
    settings = dict(num_inference_steps=args.num_inference_steps, progress=False, seed=0)
    paint = painter(pipe, args)
    note("first painting, s", seconds(paint(args.images[0])))
    note_images(paint, args.images, note, args)
    if 5 in args.images:
        note("5 images, 128 prompt tokens", median(paint(5, 128), args.runs))
    if 16 in args.images:
        prompts = [prompt_of(pipe, 20 + i % 20, i) for i in range(64)]
        work = partial(pipe.generate, prompts, parallel_size=1, **settings)
        note("64 prompts, per image", seconds(work) / 64)
    asked = [question(pipe, 1), question(pipe, 16)]
    note_answers(lambda batch, n: partial(answer, pipe, batch, n), asked, args.max_new_tokens, note, args)
    if pipe.device.type == "cuda" and mode != "plain":
        note("distance to plain, latents", distance(pipe, folder, args))
    release()


def note_images(
    paint: Callable[..., Callable[[], Any]], counts: list[int], note: Note, args: argparse.Namespace
) -> None:
    """Seconds and peak memory of so many images at once, and seconds a step."""
    for count in counts:
        name = f"{count} image{'s' * (count > 1)}"
        work = paint(count)
        if count != counts[0]:  # which has just been generated for the first time
            work()
        reset_peak()
        value = statistics.median(seconds(work) for _ in range(args.runs))
        note(name, value)
        note(f"peak memory, {name}, GiB", peak_gib())
        if count == 1:
            single = statistics.median(seconds(paint(1, steps=1)) for _ in range(args.runs))
            note("1 image: a step, s", (value - single) / max(1, args.num_inference_steps - 1))


def note_answers(
    answers: Callable[[Batch, int], Callable[[], Any]],
    asked: list[Batch],
    tokens: int,
    note: Note,
    args: argparse.Namespace,
) -> None:
    """asked: one question, and where 16 images are generated at once 16 questions."""
    note("first answer, s", seconds(answers(asked[0], 2)))
    for batch in asked if 16 in args.images else asked[:1]:
        rows = len(batch.input_ids)
        start, whole = (median(answers(batch, n), args.runs) for n in (1, tokens))
        if rows == 1:
            note("first token, ms", 1000 * start)
        name = "one question" if rows == 1 else f"{rows} questions"
        note(f"tokens/s, {name}", rows * (tokens - 1) / (whole - start))


def distance(pipe: Pipeline, folder: Path, args: argparse.Namespace) -> float:
    """Relative L2 norm of the difference of the final latents between this path and the plain one."""
    settings = dict(parallel_size=2, num_inference_steps=args.num_inference_steps, seed=0, progress=False)
    prompt = prompt_of(pipe, 32)
    ours, fast = pipe.generate(prompt, **settings).latents, pipe.sampler
    pipe.sampler = PlainSampler(pipe.model)
    plain = pipe.generate(prompt, **settings).latents
    pipe.sampler = fast
    return float((ours - plain).norm() / plain.norm())


# The reference -----------------------------------------------------------------------


def load_reference(folder: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and VAE."""
    from diffusers import AutoencoderKL

    reference, dtype = helper(), getattr(torch, args.dtype)
    if args.size == "official":
        kind = reference.import_reference(args.janus_root).modeling.MultiModalityCausalLM
        model = kind.from_pretrained(str(folder)).to(dtype).to(args.device).eval()
    else:  # its SigLIP presets know no other size
        model = reference.load(folder, args.janus_root, dtype, args.device)
    return model, AutoencoderKL.from_pretrained(folder / "vae").to(dtype).to(args.device).eval()


def reference_painter(folder: Path, args: argparse.Namespace, model: Any, vae: Any) -> Callable[..., Tensor]:
    """(prompt, count) -> pixels (count, 3, H, W) in [-1, 1]."""
    ours, reference = Pipeline(*ours_without_model(folder)), helper()

    @torch.inference_mode()
    def paint(prompt: str, count: int, steps: int = args.num_inference_steps) -> Tensor:
        ids = ours.processor.generation_prompt(prompt)[0]
        noise = torch.randn((count, *ours.model.latent_shape))
        pad_id = ours.processor.tokenizer.pad_id
        z = reference.paint(model, ids, noise, 2.0, steps, pad_id)["z"][-1]
        return vae.decode(z / vae.config.scaling_factor).sample

    return paint


@torch.inference_mode()
def measure_reference(folder: Path, args: argparse.Namespace, mode: str, note: Note) -> None:
    dtype, device = getattr(torch, args.dtype), args.device
    processor = Pipeline(*ours_without_model(folder))  # prompts and images are prepared by us for both
    if mode == "reference":
        note("load, s", median(lambda: load_reference(folder, args), 1))
        release()
    model, vae = load_reference(folder, args)
    if mode == "reference compiled":
        model.language_model.model = torch.compile(model.language_model.model)
    pixels = reference_painter(folder, args, model, vae)

    def paint(count: int, tokens: int = 32, steps: int = args.num_inference_steps) -> Callable[[], Any]:
        prompt = prompt_of(processor, tokens)
        return lambda: to_uint8(pixels(prompt, count, steps))

    note("first painting, s", seconds(paint(args.images[0])))
    note_images(paint, args.images if mode == "reference" else [5], note, args)
    if mode == "reference compiled":  # of its ways of use this is the one that compiling helps
        return
    if 5 in args.images:
        note("5 images, 128 prompt tokens", median(paint(5, 128), args.runs))

    def answers(batch, tokens: int) -> Callable[[], Any]:
        def work() -> None:
            embeds = model.prepare_inputs_embeds(
                input_ids=batch.input_ids.to(device, copy=True),
                pixel_values=batch.pixel_values.to(device, dtype),
                images_seq_mask=batch.images_seq_mask.to(device),
                images_emb_mask=batch.images_emb_mask.to(device),
            )
            model.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask.to(device),
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=None,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
            )

        return work

    asked = [question(processor, 1), question(processor, 16)]
    note_answers(answers, asked, min(48, args.max_new_tokens), note, args)


def painter_of(
    folder: Path, args: argparse.Namespace, mode: str
) -> tuple[Pipeline | None, Callable[..., Any]]:
    """A mode's pipeline (None: the reference's) and its painter, as `painter` makes one."""
    if not mode.startswith("reference"):
        pipe = load(folder, args, mode)
        return pipe, painter(pipe, args)
    prompt = prompt_of(Pipeline(*ours_without_model(folder)), 32)
    pixels = reference_painter(folder, args, *load_reference(folder, args))
    return None, lambda count: lambda: to_uint8(pixels(prompt, count))


def ours_without_model(folder: Path):
    """Processor and an empty model: what `prompt_of` and `question` look at."""
    from janusflow_min.processor import Processor

    config = JanusFlowConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = JanusFlow(config)
    return model, Processor.from_folder(folder, config.llm.vocab_size), None


# Limits -----------------------------------------------------------------------


def card_limits(device: torch.device, dtype: str) -> dict[str, float]:
    """Matrix rate (FLOP/s) and copy bandwidth (bytes/s, read and written counted), each the best of ten."""
    size, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    source = torch.randn(length // kind.itemsize, device=device).to(kind)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        work()
        return min(seconds(work) for _ in range(10))

    return {
        "flops": 2 * size**3 / best(lambda: a @ b),
        "bytes": 2 * length / best(lambda: target.copy_(source)),
    }


def floors(config: JanusFlowConfig, limits: dict[str, float], args: argparse.Namespace) -> dict[str, float]:
    """Seconds for painting (both rows of every image, the LLM's blocks alone), tokens/s for answering."""
    llm = config.llm
    d, kv = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
    block = 2 * d * d + 2 * d * kv + 3 * d * llm.intermediate_size
    weights = llm.num_hidden_layers * block
    tokens = 1 + config.siglip.num_patches  # as many as image tokens here
    attention = llm.num_hidden_layers * 4 * d * tokens * (tokens / 2 + 32)
    step = 2 * (2 * weights * tokens + attention)
    size = getattr(torch, args.dtype).itemsize
    result = {
        f"{n} image{'s' * (n > 1)}": n * args.num_inference_steps * step / limits["flops"] for n in (1, 5, 16)
    }
    result["64 prompts, per image"] = args.num_inference_steps * step / limits["flops"]
    read = size * (weights + llm.vocab_size * d)
    cache = size * 2 * llm.num_hidden_layers * kv * (tokens + 20 + args.max_new_tokens / 2)
    for rows, name in ((1, "tokens/s, one question"), (16, "tokens/s, 16 questions")):
        result[name] = rows * limits["bytes"] / (read + rows * cache)
    return result


# Growth -----------------------------------------------------------------------


def growth(folder: Path, args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """Curves of (what grows, seconds, peak GiB)."""
    pipe = load(folder, args, "fast")
    curves: dict[str, list[tuple[float, float, float]]] = {}

    def point(curve: str, x: float, work: Callable[[], Any]) -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        value = statistics.median(seconds(work) for _ in range(args.runs))
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        curves.setdefault(curve, []).append((x, value, peak))

    def paint(count: int = 2, tokens: int = 32, steps: int = args.num_inference_steps) -> Callable[[], Any]:
        prompt = prompt_of(pipe, tokens)
        return lambda: pipe.generate(
            prompt, parallel_size=count, num_inference_steps=steps, progress=False, seed=0
        )

    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        point("images", count, paint(count))
    for tokens in (16, 32, 64, 128, 256, 384):
        point("prompt tokens (2 images)", tokens, paint(tokens=tokens))
    for steps in (1, 5, 10, 20, 30, 50):
        point("steps (2 images)", steps, paint(steps=steps))
    batch = question(pipe, 1)
    for tokens in (1, 32, 64, 128, 256, 512):
        point("answer tokens", tokens, lambda tokens=tokens: answer(pipe, batch, tokens))
    return curves


# Output -----------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    results, floor = report["results"], report["floors"]
    modes = [mode for mode in MODES if any(mode in row for row in results.values())]
    limits = report["limits"]
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['dtype']}: "
        f"{limits['flops'] / 1e12:.0f} TFLOP/s, {limits['bytes'] / 1e12:.2f} TB/s",
        "",
        "| " + " | ".join(["", *modes, "limit"]) + " |",
        "| --- |" + " ---: |" * (len(modes) + 1),
    ]
    for measure, row in results.items():
        cells = [f"{row[mode]:.4g}" if mode in row else "" for mode in modes]
        limit = f"{floor[measure]:.4g}" if measure in floor else ""
        unit = ", s" if measure in SECONDS else ""
        lines.append("| " + " | ".join([measure + unit, *cells, limit]) + " |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: time as a multiple of the floor."""
    plt = pyplot()
    results, floor = report["results"], report["floors"]
    measures = [m for m in results if m in floor]
    modes = [mode for mode in MODES if any(mode in results[m] for m in measures)]
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        where = [j for j, m in enumerate(measures) if mode in results[m]]
        ratios = [results[measures[j]][mode] / floor[measures[j]] for j in where]
        ratios = [
            1 / r if measures[j].startswith("tokens") else r for j, r in zip(where, ratios, strict=True)
        ]
        axes.bar([j + i * width for j in where], ratios, width, color=f"C{i}", label=mode)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(measures))], measures, rotation=20, ha="right")
    axes.set_ylabel("time, multiples of the card's limit")
    axes.set_title(report["device"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def plot_growth(report: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    curves = report["growth"]
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6))
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        x, y, memory = zip(*points, strict=True)
        axis.plot(x, y, "o-", color="C0")
        axis.set_xlabel(name)
        axis.set_ylabel("seconds", color="C0")
        axis.set_ylim(bottom=0)
        other = axis.twinx()
        other.plot(x, memory, "s--", color="C1")
        other.set_ylabel("peak memory, GiB", color="C1")
        other.set_ylim(bottom=0)
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
