# SPDX-License-Identifier: MIT
"""`janusflow-min generate`: images of prompts, as PNG files that say how to repeat them, and a contact sheet."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from ..checks import MAX_IMG_SIZE
from ..files import check_folder, expand
from ..options import add_options, read_options, whole
from ..sampling_options import SamplingOptions
from .common import (
    Command,
    Option,
    dtype_name,
    load_pipeline,
    model_options,
    model_record,
    say,
    seed,
    since,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline

MAX_PARALLEL_SIZE = 10_000
MAX_FILES = 100_000  # of one command: prompts x parallel size
MAX_BATCH_SIZE = 256
STRIP = 6  # images of --save-steps, one row of a contact sheet


def add_parser(command: Command, option: Option) -> None:
    new = command(
        generate,
        "generate images from prompts",
        "Generate images and save each as INDEX_PROMPT_seedSEED.png, with its prompt, seed and settings in the PNG's\n"
        "text chunks, and a contact sheet. The paths go to stdout. Existing files are kept: a new one of the same\n"
        "name gets -2, -3, ... Images are saved after every batch, so an interrupted run keeps them.",
        """  janusflow-min generate "a photo of a red star"
  janusflow-min generate "a blue ring" "two squares" --parallel-size 3 --seed 1 --out outputs/mine
  janusflow-min generate --prompts-file prompts.txt --no-sheet --quiet
  janusflow-min generate "a cat on a rainbow" --model deepseek-ai/JanusFlow-1.3B --device cuda --img-size 1024""",
    )
    new.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to generate; one or more, in quotes")
    new.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line, UTF-8")
    model_options(new, option, vae=True)
    option(new, "--out", "DIR", "folder for the images", "outputs")
    option(
        new, "--parallel-size", "N", f"images per prompt, at most {MAX_PARALLEL_SIZE:,}", 5,
        whole(1, MAX_PARALLEL_SIZE),
    )  # fmt: skip
    option(
        new, "--batch-size", "N", f"images generated at once, at most {MAX_BATCH_SIZE}; fewer need less memory", 10,
        whole(1, MAX_BATCH_SIZE),
    )  # fmt: skip
    option(
        new, "--img-size", "PX", f"resize to PX x PX, at most {MAX_IMG_SIZE} (default: the model's size)", None,
        whole(1, MAX_IMG_SIZE),
    )  # fmt: skip
    option(
        new,
        "--seed",
        "N",
        "seed of the first image; image k gets seed N + k (default: random, and printed)",
        None,
        seed,
    )
    add_options(new, SamplingOptions)
    new.add_argument(
        "--sheet", action=argparse.BooleanOptionalAction, default=True, help="make a contact sheet"
    )
    new.add_argument(
        "--save-steps",
        action="store_true",
        help="also the way from noise to each image, where the flow was heading, as a strip NAME_steps.png",
    )


def generate(args: argparse.Namespace) -> int:
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    if not prompts:
        raise ValueError("no prompt: give one or more, or --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    count = len(prompts) * args.parallel_size
    if count > MAX_FILES:
        raise ValueError(
            f"{len(prompts):,} prompts with --parallel-size {args.parallel_size:,} make {count:,} images; one command "
            f"makes at most {MAX_FILES:,}"
        )
    out = check_folder(args.out, "--out")
    settings = read_options(SamplingOptions, args).resolved() | {"img_size": args.img_size}
    if args.save_steps and args.best_of > 1:
        raise ValueError("--save-steps shows one image's way, so it does not go with --best-of")
    if args.img_size is not None:
        checks.image_bytes(min(args.batch_size, count), args.img_size, "--batch-size or --img-size")
    pipe = load_pipeline(args, "generation" if args.best_of == 1 else "all")
    start = time.perf_counter()
    # Not up to 2**63, the library's bound: a random seed should be short enough to type.
    first = secrets.randbelow(2**31) if args.seed is None else args.seed
    generate_files(
        pipe,
        args,
        prompts,
        out,
        args.parallel_size,
        first,
        args.batch_size,
        args.sheet,
        save_steps=args.save_steps,
        **settings,
    )
    say(f"generated in {since(start)}; --seed {first} repeats it", args.quiet, remark=True)
    return 0


def generate_files(
    pipe: Pipeline,
    args: argparse.Namespace,
    prompts: Sequence[str],
    out: Path,
    parallel_size: int,
    first_seed: int,
    batch_size: int,
    sheet: bool = True,
    save_steps: bool = False,
    **settings: Any,
) -> list[Path]:
    """Generate in batches, saving each at once; returns the images' paths, the sheet's last. save_steps: a strip of
    where the flow was heading after each of some steps, beside each image."""
    from ..contact_sheet import contact_sheet, save_png, sheet_side, slug, thumbnail
    from ..progress import progress_bar
    from ..sampling import MAX_BATCH

    settings = SamplingOptions().resolved() | {"img_size": None} | settings
    pipe.check_prompts(list(prompts))  # the last prompt's error should not wait for the first's image
    jobs = [
        (i, i * parallel_size + k + first_seed) for i in range(len(prompts)) for k in range(parallel_size)
    ]
    side, digits = sheet_side(len(jobs)), max(2, len(str(len(prompts) - 1)))
    common = model_record(args, pipe) | {
        "vae_dtype": dtype_name(pipe.vae.dtype if pipe.vae else None),
        "upstream_rounding": pipe.model.llm.upstream_rounding,
    }
    common |= {key: value for key, value in settings.items() if key != "img_size" and value is not None}
    groups: list[tuple[str, list]] = [(prompt, []) for prompt in prompts]
    paths: list[Path] = []
    if save_steps:
        batch_size = min(batch_size, MAX_BATCH)  # the steps of more images would come in turn
    several, told = len(jobs) > batch_size, 0
    with progress_bar(not args.quiet and several, total=len(jobs), desc="Images", unit="image") as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            kept: list[Any] = []  # of each step shown: a list of images, one for each prompt of the batch
            if save_steps:
                settings |= {
                    "callback_on_step_end": keep_steps(kept, settings["num_inference_steps"]),
                    "preview": True,
                }
            result = pipe.generate(
                [prompts[i] for i, _ in batch],
                parallel_size=1,
                seed=[image_seed for _, image_seed in batch],
                progress=not args.quiet,
                **settings,
            )
            for k, ((i, image_seed), image) in enumerate(zip(batch, result.images, strict=True)):
                name = f"{i:0{digits}d}_{slug(prompts[i])}_seed{image_seed}.png"
                own = {"prompt": prompts[i], "seed": image_seed, "img_size": image.width}
                if result.scores is not None and result.seeds is not None:
                    own |= {"chosen_seed": result.seeds[k], "scores": result.scores[k]}
                paths.append(save_png(image, out / name, own | common))
                if save_steps:
                    strip = contact_sheet([(prompts[i], [images[k] for images in kept])])
                    paths.append(save_png(strip, out / f"{paths[-1].stem}_steps.png", own | common))
                if sheet:
                    groups[i][1].append(thumbnail(image, side))
            bar.clear()
            for path in paths[told:]:
                say(str(path))
            told = len(paths)
            bar.update(len(batch))
    if sheet:
        paths.append(save_png(contact_sheet(groups), out / "sheet.png", {"first_seed": first_seed} | common))
        say(str(paths[-1]))
    return paths


def keep_steps(kept: list[Any], steps: int) -> Callable[..., None]:
    """A callback that keeps the previews of up to STRIP steps, evenly spread."""
    shown = {round(k * (steps - 1) / (STRIP - 1)) for k in range(STRIP)}

    def told(step: int, t: float, latents: Any, images: list[Any]) -> None:
        if step in shown:
            kept.append(images)

    return told


def read_prompts(path: str) -> list[str]:
    """One prompt a line, empty lines left out."""
    try:
        lines = expand(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is not UTF-8 text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path} holds no prompt")
    return prompts
