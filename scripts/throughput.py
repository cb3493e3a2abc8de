# SPDX-License-Identifier: MIT
"""`benchmark.py --throughput`: images per second through the code of `bench geneval generate`. Not run itself.

The work: different prompts of GenEval's six kinds, 4 images each, decoded and written as PNG files in GenEval's layout.
Ours does all of it `PASSES` times in each process: the first pass pays for compiling and capturing, the last one
counts. With --gpus N one process does it, then N ranks under torchrun; ranks start together, the time ends with the
slowest, and every pass must write the same bytes. The reference does it in its own way: one prompt at a time, its
images at once, files written one after another; a few prompts after one that is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import log
from PIL import Image

from janusflow_min.benchmarks import geneval
from janusflow_min.benchmarks.ranks import RankInfo
from janusflow_min.benchmarks.run_folder import RunFolder
from janusflow_min.benchmarks.runner import Settings, generate_images, load_pipe
from janusflow_min.fast.quantized import QUANTIZATIONS
from janusflow_min.files import sha256
from janusflow_min.pixels import to_uint8

ROOT = Path(__file__).resolve().parents[1]
IMAGES, PASSES, REFERENCE_PROMPTS = 4, 2, 8
PROMPTS_FILE = "evaluation_metadata.jsonl"


def measure(model: Path, work: Path, args: Any, reference: Any) -> dict[str, Any]:
    """The report. reference: (prompt, count) -> pixels (count, 3, H, W) in [-1, 1], or None to leave it out."""
    lines = [json.dumps(line) + "\n" for line in invented(args.prompts)]
    (work / PROMPTS_FILE).write_text("".join(lines), encoding="utf-8")
    report: dict[str, Any] = {"work": f"{args.prompts} prompts x {IMAGES} images"}
    for mode in (mode for mode in args.modes if not mode.startswith("reference")):
        settings = Settings(
            model=str(model),
            device=args.device,
            dtype=args.dtype,
            num_inference_steps=args.num_inference_steps,
            seed=0,
            fast=mode != "plain",
            compile=mode == "compile",
            quantization=mode if mode in QUANTIZATIONS else None,
        )
        for ranks in dict.fromkeys((1, args.gpus)):
            log(f"{mode} on {ranks}")
            report[f"{mode}, {ranks} GPU{'s' * (ranks > 1)}"] = launch(work, mode, ranks, settings)
        runs = sorted(work.glob(f"{mode}-*-pass*"))
        equal = len({sha256(run / "images") for run in runs}) == 1
        report[f"{mode}: all {len(runs)} passes equal, byte for byte"] = equal
    if reference is not None:
        report["reference"] = of_reference(reference, work)
    return report


def launch(work: Path, mode: str, ranks: int, settings: Settings) -> dict[str, Any]:
    """Of all ranks: each pass from the first start to the last end."""
    task = {"work": str(work), "name": f"{mode}-{ranks}", "settings": vars(settings)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    subprocess.run([sys.executable, *launcher, __file__, json.dumps(task)], check=True, env=env)
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in work.glob(f"{task['name']}-rank*.json")]
    passes = zip(*(part["passes"] for part in parts), strict=True)  # of each, (start, end) of every rank
    seconds = [max(end for _, end in ranks) - min(start for start, _ in ranks) for ranks in passes]
    return {
        "images_per_second": parts[0]["images"] / seconds[-1],
        "seconds": seconds,
        "load_seconds": max(part["load"] for part in parts),
        "peak_memory_gib": max(part["memory"] for part in parts),
    }


def run_rank(task: dict[str, Any]) -> None:
    """One rank's share; its clock readings go into a file."""
    world, work, settings = RankInfo.from_environment(), Path(task["work"]), Settings(**task["settings"])
    begin = time.time()
    pipe = load_pipe(settings)
    result: dict[str, Any] = {"load": time.time() - begin, "passes": []}
    items = geneval.items(geneval.read(work / PROMPTS_FILE, subset=True), IMAGES)
    torch.distributed.init_process_group("gloo")
    for k in range(PASSES):
        torch.distributed.barrier()
        begin = time.time()
        folder = RunFolder(work / f"{task['name']}-pass{k}")
        generate_images(pipe, folder, items, IMAGES, settings, world)
        result["passes"].append((begin, time.time()))
    torch.distributed.destroy_process_group()
    on_gpu = pipe.device.type == "cuda"
    result["memory"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    result["images"] = IMAGES * len(items)
    file = work / f"{task['name']}-rank{world.rank}.json"
    file.write_text(json.dumps(result), encoding="utf-8")


def of_reference(reference: Any, work: Path) -> dict[str, Any]:
    prompts = geneval.read(work / PROMPTS_FILE, subset=True)[: REFERENCE_PROMPTS + 1]
    out = work / "reference"
    out.mkdir()
    seconds = []
    for k, prompt in enumerate(prompts):
        begin = time.perf_counter()
        for i, image in enumerate(to_uint8(reference(prompt.prompt, IMAGES))):
            Image.fromarray(image).save(out / f"{k:05d}_{i}.png")
        seconds.append(time.perf_counter() - begin)
    counted = seconds[1:]  # the first pays for the libraries' start
    return {"images_per_second": IMAGES * len(counted) / sum(counted), "seconds_per_prompt": counted}


def invented(count: int) -> list[dict[str, Any]]:
    """Prompts of GenEval's six kinds in turn, all different, in its format."""
    lines = []
    for i in range(count):
        a, b = (geneval.CLASSES[(7 * i + shift) % 80] for shift in (0, 31))
        colour, other = (geneval.COLOURS[(i + shift) % 10] for shift in (0, 3))
        kinds = {
            "single_object": (f"a photo of a {a}", [{"class": a}]),
            "two_object": (f"a photo of a {a} and a {b}", [{"class": a}, {"class": b}]),
            "counting": (f"a photo of three {a}s", [{"class": a, "count": 3}]),
            "colors": (f"a photo of a {colour} {a}", [{"class": a, "color": colour}]),
            "position": (
                f"a photo of a {a} left of a {b}",
                [{"class": b}, {"class": a, "position": ["left of", 0]}],
            ),
            "color_attr": (
                f"a photo of a {colour} {a} and a {other} {b}",
                [{"class": a, "color": colour}, {"class": b, "color": other}],
            ),
        }
        tag = list(geneval.TAGS)[i % 6]
        prompt, include = kinds[tag]
        lines.append({"tag": tag, "include": [{"count": 1} | thing for thing in include], "prompt": prompt})
    return lines


if __name__ == "__main__":
    run_rank(json.loads(sys.argv[1]))
