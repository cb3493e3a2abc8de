# SPDX-License-Identifier: MIT
"""`janusflow-min demo`: six prompts and three questions, in under a minute on two CPU cores."""

from __future__ import annotations

import argparse
import time

from ..files import check_folder
from .common import Command, Option, dtype_name, load_pipeline, model_options, say, seed, since
from .generate import generate_files

PROMPTS = (  # one of each family of GenEval
    "a photo of a red star",
    "a photo of a circle and a square",
    "a photo of three stars",
    "a photo of a purple circle",
    "a photo of a ring left of a triangle",
    "a photo of a red cross and a blue circle",
)
QUESTIONS = ("What is in the picture?", "Describe the picture.", "How many objects are there?")
PARALLEL_SIZE = 2


def add_parser(command: Command, option: Option) -> None:
    new = command(
        demo,
        "generate images of six prompts and ask about one: under a minute on two CPU cores",
        "Generate two images for each of six prompts, save them with a contact sheet, and ask three questions\n"
        "about the first image. Existing files are kept: a new one of the same name gets -2, -3, ...",
        "  janusflow-min demo\n  janusflow-min demo --seed 7 --out outputs/seven",
    )
    model_options(new, option, vae=True)
    option(new, "--out", "DIR", "folder for the images", "outputs/demo")
    option(new, "--seed", "N", "seed of the first image; image k gets seed N + k", 0, seed)


def demo(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    out = check_folder(args.out, "--out")
    pipe = load_pipeline(args, "all")
    count = sum(p.numel() for p in pipe.model.parameters()) / 1e6
    where = f"{pipe.model.device.type}, {dtype_name(pipe.model.dtype)}"
    say(f"{args.model}: {count:,.1f} M parameters ({where}), loaded in {since(start)}")
    say(f"generating {len(PROMPTS) * PARALLEL_SIZE} images in 30 steps each")
    begin = time.perf_counter()
    paths = generate_files(pipe, args, PROMPTS, out, PARALLEL_SIZE, args.seed, batch_size=12)
    say(f"generated in {since(begin)}\n\nabout {paths[0]}:")
    answers = pipe.understand(list(QUESTIONS), images=[str(paths[0])] * len(QUESTIONS), max_new_tokens=64)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        say(f"  {question}  {answer.text.strip()}")
    say(f"\nall in {since(start)}; open {paths[-1]} to see the images")
    return 0
