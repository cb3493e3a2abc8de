# SPDX-License-Identifier: MIT
"""`benchmark.py --host` and `--memory`: what the host adds to answers, and how much memory is held. Not run itself.

--host: the first token of 1 and of 16 questions about different images of 1,024 px, from the images and from prepared
batches; then --questions questions of `STREAM_TOKENS` tokens about JPEG files of 1,024 px, beside the time that the
same batches take when all are prepared: their ratio is the share of the time in which the device is the limit. With
nvidia-smi also its utilisation.

--memory: the most that 1 and 5 images allocate, each mode in turn, and what torch then holds on the card (graphs
included); then --calls calls of random shapes, which must not add to it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import log, median, peak_gib, release, reset_peak, seconds
from PIL import Image

from janusflow_min.pipeline import Pipeline
from janusflow_min.sampling import MAX_BATCH

SIDE, FILES, STREAM_TOKENS = 1024, 64, 20
QUESTION = "Describe image {} in a few words, please."


def host(pipe: Pipeline, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    images = [photo(i) for i in range(FILES)]
    report: dict[str, Any] = {}
    for rows in (1, MAX_BATCH):
        asked = [QUESTION.format(i) for i in range(rows)], images[:rows]
        batch = batches(pipe, *asked)[0]
        prepared = torch.inference_mode()(lambda batch=batch: pipe.sampler.generate_tokens(batch, 1, -1))
        times = [
            median(work, args.runs)
            for work in (lambda a=asked: pipe.understand(*a, max_new_tokens=1), prepared)
        ]
        name = f"first token, {rows} question{'s' * (rows > 1)}"
        report |= {f"{name}, ms": 1000 * times[0], f"{name}, prepared, ms": 1000 * times[1]}
    files = []
    for i, image in enumerate(images):
        files.append(folder / f"photo{i}.jpg")
        image.save(files[-1], quality=90)
    questions = [QUESTION.format(i) for i in range(args.questions)]
    sources = [files[i % FILES] for i in range(args.questions)]

    def stream() -> None:
        pipe.understand(questions, sources, max_new_tokens=STREAM_TOKENS)

    pipe.understand(questions[:MAX_BATCH], sources[:MAX_BATCH], max_new_tokens=STREAM_TOKENS)
    ready = batches(pipe, questions, sources)

    @torch.inference_mode()
    def all_prepared() -> None:
        for batch in ready:
            pipe.sampler.generate_tokens(batch, STREAM_TOKENS, pipe.processor.tokenizer.eos_id)

    report["stream, s"], report["utilisation, %"] = watched(lambda: seconds(stream))
    report["stream, prepared, s"], report["utilisation, prepared, %"] = watched(lambda: seconds(all_prepared))
    report["questions/s"] = args.questions / report["stream, s"]
    report["device is the limit, share"] = report["stream, prepared, s"] / report["stream, s"]
    return report


def photo(number: int) -> Image.Image:
    """Soft shapes and some noise, so that a JPEG file has a photograph's size."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 24, 24, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0]
    pixels = 255 * pixels + 12 * torch.randn(3, SIDE, SIDE, generator=generator)
    return Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def batches(pipe: Pipeline, questions: list[str], images: list[Any]) -> list[Any]:
    rows = []
    for text, image in zip(questions, images, strict=True):
        user = {"role": "User", "content": f"{pipe.processor.tokenizer.image_tag}\n{text}", "images": [image]}
        rows.append(pipe.processor.conversation([user, {"role": "Assistant", "content": ""}]))
    return [pipe.processor.collate(rows[i : i + MAX_BATCH]) for i in range(0, len(rows), MAX_BATCH)]


def watched(work: Callable[[], float]) -> tuple[float, float | None]:
    """What `work` returns, and the mean of nvidia-smi's utilisation meanwhile, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return work(), None
    command = [
        "nvidia-smi",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "-lms",
        "200",
        "-i",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        value = work()
        watcher.terminate()
        seen = [float(line) for line in (watcher.stdout or []) if line.strip().isdigit()]
    return value, statistics.mean(seen) if seen else None


def memory(
    painter_of: Callable[[str], tuple[Pipeline | None, Callable[..., Any]]], args: argparse.Namespace
) -> Any:
    report: dict[str, Any] = {}
    for mode in args.modes:
        log(mode)
        release()
        pipe, paint = painter_of(mode)
        report[mode] = {"loaded, GiB": peak_gib()}
        for count in (1, 5):
            paint(count)()
            reset_peak()
            paint(count)()
            report[mode] |= {f"{count} images, GiB": peak_gib(), f"{count} images, held, GiB": held_gib()}
        if pipe is not None:
            report[mode]["calls, held, GiB"] = random_calls(pipe, args)
        del pipe, paint
    return report


def held_gib() -> float:
    """What torch has taken of the GPU, cached blocks and graphs included; 0 without one."""
    return torch.cuda.memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0


def random_calls(pipe: Pipeline, args: argparse.Namespace) -> dict[int, float]:
    """Memory held after each tenth of the calls: images of 1 to 16 at once, prompts and answers of any length."""
    draw, held = random.Random(0), {}
    image = photo(0)
    for call in range(1, args.calls + 1):
        words = " ".join(draw.choices(("red", "star", "a", "small", "ring", "of"), k=draw.randint(1, 90)))
        if draw.random() < 0.5:
            pipe.generate(
                words, parallel_size=draw.randint(1, 16), num_inference_steps=1, progress=False, seed=call
            )
        else:
            rows = draw.randint(1, 16)
            images = [draw.choice([image, None]) for _ in range(rows)]
            pipe.understand([words] * rows, images, max_new_tokens=draw.randint(1, 200))
        if call % max(1, args.calls // 10) == 0:
            held[call] = held_gib()
            log(f"{call} calls: {held[call]:.2f} GiB held")
    return held
