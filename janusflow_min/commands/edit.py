# SPDX-License-Identifier: MIT
"""`janusflow-min edit`: an image changed as prompts say, as PNG files that say how to repeat them."""

from __future__ import annotations

import argparse
import secrets
import time
from pathlib import Path

from ..checks import MAX_STEPS
from ..files import check_folder, expand
from ..options import finite, whole
from ..sampling_options import EDIT_METHODS, SOLVER_NAMES
from .common import Command, Option, load_pipeline, model_options, model_record, say, seed, since

NAMES = (
    "strength method cfg_weight source_cfg_weight num_inference_steps solver timestep_shift best_of checker"
)
SETTINGS = tuple(NAMES.split())


def add_parser(command: Command, option: Option) -> None:
    new = command(
        edit,
        "change an image as a prompt says",
        "Edit an image by one or more prompts, each of which says all that the edited image shows, and save each\n"
        "as INDEX_PROMPT_seedSEED.png with prompts, seed and settings in the PNG's text chunks. The image's middle\n"
        "square is taken, at the model's size. Existing files are kept: a new one of the same name gets -2, -3, ...",
        """  janusflow-min edit star.png "a photo of a blue star"
  janusflow-min edit star.png "a blue star" --source-prompt "a red star" --mask mask.png
  janusflow-min edit star.png "a photo of a ring" "a photo of a cross" --strength 0.9 --seed 1""",
    )
    new.add_argument("image", metavar="IMAGE", help="the file to edit; it stays as it is")
    new.add_argument("prompts", metavar="PROMPT", nargs="+", help="what the edited image shows; one or more")
    option(new, "--source-prompt", "TEXT", "what the image shows (default: the model is asked)")
    option(new, "--mask", "FILE", "an image of the same size; white may change, outside it every byte stays")
    model_options(new, option, vae=True)
    option(new, "--out", "DIR", "folder for the images", "outputs")
    option(new, "--strength", "S", "above 0 to 1: how much may change", 0.8, finite(0, 1, above=True))
    new.add_argument(
        "--method", choices=EDIT_METHODS, default="flowedit", help="how to edit (default: flowedit)"
    )
    option(new, "--cfg-weight", "W", "guidance with the prompt; 1 is none", 3.0, finite())
    option(new, "--source-cfg-weight", "W", "guidance with the source prompt; 1 is none", 1.5, finite())
    option(new, "--num-inference-steps", "N", "of the solver", 30, whole(1, MAX_STEPS))
    new.add_argument("--solver", choices=SOLVER_NAMES, default="euler", help="(default: euler)")
    option(new, "--timestep-shift", "S", "above 1: more steps near the noise", 1.0, finite(0, above=True))
    option(new, "--best-of", "N", "candidates for each prompt, of which the best is kept", 1, whole())
    option(new, "--checker", "NAME", "what asks about candidates: shapes, or MODULE:FUNCTION")
    option(new, "--seed", "N", "seed of the first; edit k gets seed N + k (default: random)", None, seed)


def edit(args: argparse.Namespace) -> int:
    from ..contact_sheet import save_png, slug
    from ..pixels import open_image

    for path in (args.image, args.mask):  # a broken file is named before the weights are read
        if path is not None:
            open_image(path)
    for name, text in (("prompt", args.prompts), ("--source-prompt", [args.source_prompt])):
        if any(one is not None and not one.strip() for one in text):
            raise ValueError(f"{name} is empty")
    out: Path = check_folder(args.out, "--out")
    asks = args.source_prompt is None and args.method != "sdedit"
    pipe = load_pipeline(args, "all" if asks or args.best_of > 1 else "generation")
    start = time.perf_counter()
    first = secrets.randbelow(2**31) if args.seed is None else args.seed
    settings = {name: getattr(args, name) for name in SETTINGS}
    edited = pipe.edit(
        args.image,
        args.prompts,
        args.source_prompt,
        mask=args.mask,
        seed=first,
        progress=not args.quiet,
        **settings,
    )
    mask = None if args.mask is None else expand(args.mask).name
    common = settings | model_record(args, pipe) | {"image": expand(args.image).name, "mask": mask}
    for i, (prompt, image) in enumerate(zip(args.prompts, edited, strict=True)):
        about = {str(key): value for key, value in (common | image.info).items() if value is not None}
        say(str(save_png(image, out / f"{i:02d}_{slug(prompt)}_seed{image.info['seed']}.png", about)))
    if asks:
        say(f"the model calls the image {edited[0].info['source_prompt']!r}", args.quiet, remark=True)
    say(f"edited in {since(start)}; --seed {first} repeats it", args.quiet, remark=True)
    return 0
