# SPDX-License-Identifier: MIT
"""Images per second of the official architecture with random weights, through the code of `bench geneval generate`.

    python scripts/benchmark_generation.py --janus-root ../Janus --json speed.json   # one GPU, beside the reference
    python scripts/benchmark_generation.py --gpus 2 --json scaling.json              # one GPU, then two by torchrun
    python scripts/benchmark_generation.py --tiny --device cpu --gpus 2 --prompts 8  # a minute, to try it

The work: 64 different prompts of GenEval's six kinds, 4 images each, 30 Euler steps, guidance 2, bfloat16, decoded by
a VAE of SDXL's shape and written as PNG files in GenEval's layout. Weights are drawn (`compare_reference.py` has the
recipe), written in the official layout into --work and loaded from there. No official tokenizer is needed: the test
fixture's makes about 35 tokens of such a prompt, more than the official one would.

Ours paints all of it, `--passes` times in one process: the first pass pays for compiling and capturing, the last is
the one compared. The reference (its own classes: `tests/reference.py` says which checkout and packages) paints in the
seed's way: one prompt at a time, its images at once, the whole sequence at every step, the VAE on all its images,
files written one after another; `--reference-prompts` of the prompts after one that is not counted, told per image.

With --gpus N the same work is done by one process and then by N ranks under torchrun. Ranks start together; the
time ends with the slowest. All passes must be equal to the single process's first one, byte for byte: else, or where
the speed is below --scaling times that of one GPU and ratio below --ratio, the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import helper, save_random, tiny_config

from janusflow_min.benchmarks import geneval
from janusflow_min.benchmarks.ranks import RankInfo
from janusflow_min.benchmarks.run_folder import RunFolder
from janusflow_min.benchmarks.runner import Settings, generate_images, load_pipe
from janusflow_min.files import sha256
from janusflow_min.sampling import PlainSampler

ROOT = Path(__file__).resolve().parents[1]
STEPS, GUIDANCE, IMAGES = 30, 2.0, 4
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def main() -> int:
    args = parse()
    if args.worker:
        {"prepare": prepare, "ours": ours, "reference": reference}[args.worker](args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        args.work = Path(scratch)
        return measure(args)


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--janus-root", type=Path, help="checkout of deepseek-ai/Janus; without: ours alone")
    parser.add_argument(
        "--work", type=Path, help="where to put weights (4.4 GB) and images; else a temporary folder"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=1, help="also paint with so many ranks under torchrun")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--reference-prompts", type=int, default=8, help="of them, painted by the reference")
    parser.add_argument("--batch-size", type=int, default=16, help="images that ours paints at once")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--fast", action=argparse.BooleanOptionalAction, default=True, help="as load() takes it"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="random weights of a small architecture")
    parser.add_argument(
        "--ratio", type=float, default=0.0, help="fail below so many times the reference's speed"
    )
    parser.add_argument("--scaling", type=float, default=0.0, help="fail below so many times one GPU's speed")
    parser.add_argument("--worker", choices=("prepare", "ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--name", default="one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.janus_root is not None and not 0 < args.reference_prompts < args.prompts:
        parser.error(
            f"--reference-prompts must lie between 1 and --prompts - 1, got {args.reference_prompts}"
        )
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    return args


# The parent -----------------------------------------------------------------------


def measure(args: argparse.Namespace) -> int:
    """Every measurement in processes of its own, so that none has another's memory or compiled code."""
    start = time.perf_counter()

    def log(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    call(args, "prepare")
    log("random weights written")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "torch": torch.__version__,
        "architecture": "tiny" if args.tiny else "official, random weights",
        "work": f"{args.prompts} prompts x {IMAGES} images, {args.steps} steps, guidance {GUIDANCE}",
        "batch_size": args.batch_size,
    }
    failures = []
    for ranks in dict.fromkeys((1, args.gpus)):
        name = f"{ranks}"
        call(args, "ours", name, ranks)
        report[f"ours, {ranks} GPU" + ("s" if ranks > 1 else "")] = collect(args, name, ranks)
        log(f"ours on {ranks}")
    digests = {
        folder.name: sha256(folder / "images")
        for folder in sorted(args.work.glob("run-*"))
        if folder.is_dir()
    }
    report["all passes and shards equal, byte for byte"] = len(set(digests.values())) == 1
    if len(set(digests.values())) != 1:
        failures.append(f"FAILED images differ between {digests}")
    one = report["ours, 1 GPU"]["images_per_second"]
    if args.gpus > 1:
        report["scaling"] = report[f"ours, {args.gpus} GPUs"]["images_per_second"] / one
        if report["scaling"] < args.scaling:
            failures.append(f"FAILED scaling {report['scaling']:.2f} is below {args.scaling}")
    if args.janus_root is not None:
        call(args, "reference")
        report["reference"] = json.loads((args.work / "reference.json").read_text(encoding="utf-8"))
        report["ratio"] = one / report["reference"]["images_per_second"]
        log("reference")
        if report["ratio"] < args.ratio:
            failures.append(f"FAILED ratio {report['ratio']:.2f} is below {args.ratio}")
    report["failures"] = failures
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 1 if failures else 0


def call(args: argparse.Namespace, worker: str, name: str = "one", ranks: int = 1) -> None:
    """This script again as a worker, under torchrun for several ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__).resolve()), "--worker", worker, "--name", name]
    for key in ("work", "device", "prompts", "reference_prompts", "batch_size", "passes", "steps", "seed"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    if args.janus_root is not None:
        command += ["--janus-root", str(args.janus_root)]
    command += ["--tiny"] if args.tiny else []
    command += [f"--{'' if getattr(args, key) else 'no-'}{key}" for key in ("fast", "compile")]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "4"})


def collect(args: argparse.Namespace, name: str, ranks: int) -> dict[str, Any]:
    """Of all ranks: each pass from the first start to the last end."""
    parts = [
        json.loads((args.work / f"{name}-rank{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]
    seconds = [
        max(part["ends"][i] for part in parts) - min(part["starts"][i] for part in parts)
        for i in range(args.passes)
    ]
    count = args.prompts * IMAGES
    return {
        "images_per_second": count / seconds[-1],
        "first_pass_images_per_second": count / seconds[0],
        "seconds": seconds,
        "load_seconds": max(part["load"] for part in parts),
        "peak_memory_gib": max(part["memory"] for part in parts),
        "fast path": parts[0]["fast"],
        "compile": parts[0]["compile"],
    }


# Workers -----------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Checkpoint with VAE and processor files, and prompts in GenEval's format."""
    from diffusers import AutoencoderKL

    from janusflow_min.config import JanusFlowConfig

    folder = args.work / "model"
    folder.mkdir()
    config = tiny_config() if args.tiny else JanusFlowConfig()
    save_random(config, folder, args.device, args.seed, args.janus_root)
    for file in (ROOT / "tests" / "fixtures" / "parity" / "tiny").glob("*.json"):
        if file.name not in ("config.json", "expected.json"):
            shutil.copy(file, folder)
    change(folder / "preprocessor_config.json", image_size=config.siglip.image_size)
    change(folder / "processor_config.json", num_image_tokens=config.siglip.num_patches)
    small = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8} if args.tiny else {}
    torch.manual_seed(args.seed)
    AutoencoderKL(**(SDXL_VAE | small)).save_pretrained(folder / "vae")
    lines = [json.dumps(line) + "\n" for line in invented(args.prompts)]
    (args.work / "evaluation_metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def invented(count: int) -> list[dict[str, Any]]:
    """Prompts of GenEval's six kinds in turn, all different, in its format."""
    names, colours = geneval.CLASSES, geneval.COLOURS
    lines = []
    for i in range(count):
        a, b = names[(7 * i) % 80], names[(7 * i + 31) % 80]
        colour, other = colours[i % 10], colours[(i + 3) % 10]
        tag = list(geneval.TAGS)[i % 6]
        prompt, include = {
            "single_object": (f"a photo of a {a}", [{"class": a, "count": 1}]),
            "two_object": (
                f"a photo of a {a} and a {b}",
                [{"class": a, "count": 1}, {"class": b, "count": 1}],
            ),
            "counting": (f"a photo of three {a}s", [{"class": a, "count": 3}]),
            "colors": (f"a photo of a {colour} {a}", [{"class": a, "count": 1, "color": colour}]),
            "position": (
                f"a photo of a {a} left of a {b}",
                [{"class": b, "count": 1}, {"class": a, "count": 1, "position": ["left of", 0]}],
            ),
            "color_attr": (
                f"a photo of a {colour} {a} and a {other} {b}",
                [{"class": a, "count": 1, "color": colour}, {"class": b, "count": 1, "color": other}],
            ),
        }[tag]
        lines.append({"tag": tag, "include": include, "prompt": prompt})
    return lines


def ours(args: argparse.Namespace) -> None:
    """One rank's share, `passes` times; its clock readings go into a file."""
    world = RankInfo.from_environment()
    settings = Settings(
        model=str(args.work / "model"),
        device=args.device,
        cfg_weight=GUIDANCE,
        num_inference_steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        fast=args.fast,
        compile=args.compile,
    )
    begin = time.time()
    pipe = load_pipe(settings)
    result: dict[str, Any] = {"load": time.time() - begin, "starts": [], "ends": []}
    result["fast"] = not isinstance(pipe.sampler, PlainSampler)
    result["compile"] = args.compile
    items = geneval.items(geneval.read(args.work / "evaluation_metadata.jsonl", subset=True), IMAGES)
    if world.size > 1:
        torch.distributed.init_process_group("gloo")
    for i in range(args.passes):
        if world.size > 1:
            torch.distributed.barrier()
        result["starts"].append(time.time())
        folder = RunFolder(args.work / f"run-{args.name}-{i}")
        generate_images(pipe, folder, items, IMAGES, settings, world)
        result["ends"].append(time.time())
    cuda = torch.cuda.is_available() and pipe.model.device.type == "cuda"
    result["memory"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    if world.size > 1:
        torch.distributed.destroy_process_group()
    path = args.work / f"{args.name}-rank{world.rank}.json"
    path.write_text(json.dumps(result), encoding="utf-8")


@torch.inference_mode()
def reference(args: argparse.Namespace) -> None:
    """The reference, one prompt at a time: the seed's way."""
    from diffusers import AutoencoderKL
    from PIL import Image

    from janusflow_min.pixels import to_uint8
    from janusflow_min.processor import Processor

    witness = helper()
    folder = args.work / "model"
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = witness.load(folder, args.janus_root, dtype, args.device)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device, dtype).eval()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor = Processor.from_folder(folder, config["language_config"]["vocab_size"])
    pad_id = processor.tokenizer.pad_id
    prompts = geneval.read(args.work / "evaluation_metadata.jsonl", subset=True)
    vision = config["vision_und_enc_config"]["params"]
    side = 2 * (vision["image_size"] // int(vision.get("patch_size", 16)))  # of the latents
    out = args.work / "reference"
    out.mkdir()
    seconds = []
    for k, prompt in enumerate(prompts[: args.reference_prompts + 1]):
        begin = time.perf_counter()
        ids = processor.generation_prompt(prompt.prompt)[0]
        torch.manual_seed(args.seed + k)
        noise = torch.randn((IMAGES, 4, side, side))
        z = witness.paint(model, ids, noise, GUIDANCE, args.steps, pad_id)["z"][-1]
        pixels = vae.decode(z / vae.config.scaling_factor).sample
        for i, image in enumerate(to_uint8(pixels)):
            Image.fromarray(image).save(out / f"{k:05d}_{i}.png")
        seconds.append(time.perf_counter() - begin)
    counted = seconds[1:]  # the first pays for the libraries' start
    result = {
        "images_per_second": IMAGES * len(counted) / sum(counted),
        "prompts": len(counted),
        "images_at_once": IMAGES,
        "seconds_per_prompt": counted,
    }
    (args.work / "reference.json").write_text(json.dumps(result), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
