# SPDX-License-Identifier: MIT
"""The command line: `janusflow-min demo | generate | understand | info | train | bench | torchumm`; `--help` teaches.

Results go to stdout (file names, answers, the report), progress and remarks to stderr. Exit codes: 0 done,
1 `info` found something missing, 2 an error, told in one line, 130 interrupted. What loads torch is imported
inside the commands.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import bench, info, torchumm, train

if TYPE_CHECKING:
    from .pipeline import Pipeline

PROG = "janusflow-min"
DEMO_PROMPTS = (  # one of each family of GenEval
    "a photo of a red star",
    "a photo of a circle and a square",
    "a photo of three stars",
    "a photo of a purple circle",
    "a photo of a ring left of a triangle",
    "a photo of a red cross and a blue circle",
)
DEMO_QUESTIONS = ("What is in the picture?", "Describe the picture.", "How many objects are there?")
DEMO_IMAGES = 2  # for each prompt
MODEL_HELP = (
    '"tiny" (the trained default inside the package), a folder in the official layout, or a hub id such as '
)
MODEL_HELP += "deepseek-ai/JanusFlow-1.3B"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. argv: without the program's name, by default this process's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; what is already saved is whole", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, ImportError, RuntimeError) as error:
        if "--debug" in argv:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{PROG}: error: {text}", file=sys.stderr)
        return 2


# Commands -----------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Paint the demo's prompts, then ask about one of the pictures."""
    start = time.perf_counter()
    out = _out_folder(args.out)
    pipe = _load(args, "all")
    count = sum(p.numel() for p in pipe.model.parameters()) / 1e6
    where = f"{pipe.model.device.type}, {_name(pipe.model.dtype)}"
    print(f"{args.model}: {count:,.1f} M parameters ({where}), loaded in {_since(start)}")
    print(f"painting {len(DEMO_PROMPTS) * DEMO_IMAGES} pictures in 30 steps each")
    painting = time.perf_counter()
    seed = 0 if args.seed is None else args.seed
    paths = _paint(pipe, args, DEMO_PROMPTS, out, DEMO_IMAGES, seed=seed, batch_size=12)
    print(f"painted in {_since(painting)}\n\nabout {paths[0]}:")
    answers = pipe.understand(
        list(DEMO_QUESTIONS), images=[str(paths[0])] * len(DEMO_QUESTIONS), max_new_tokens=64
    )
    for question, answer in zip(DEMO_QUESTIONS, answers, strict=True):
        print(f"  {question}  {answer.text.strip()}")
    print(f"\nall in {_since(start)}; look at {paths[-1]}")
    return 0


def generate(args: argparse.Namespace) -> int:
    """Paint prompts, save pictures and a contact sheet."""
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        prompts += _read_prompts(args.prompts_file)
    if not prompts:
        raise ValueError("no prompt: give one or more, or --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    out = _out_folder(args.out)
    pipe = _load(args, "generation")
    start = time.perf_counter()
    settings = dict(
        cfg_weight=args.cfg_weight,
        num_inference_steps=args.steps,
        img_size=args.img_size,
    )
    # Not 2**63, the library's bound: a drawn seed should be short enough to type.
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    _paint(pipe, args, prompts, out, args.parallel_size, seed, args.batch_size, args.sheet, **settings)
    if not args.quiet:
        print(f"painted in {_since(start)}; --seed {seed} repeats it", file=sys.stderr)
    return 0


def understand(args: argparse.Namespace) -> int:
    """Answer a question about images."""
    from .pixels import open_image

    images = [open_image(path) for path in args.image]  # a broken file is told before the weights are read
    if not args.question.strip() and not images:
        raise ValueError("no question and no --image")
    pipe = _load(args, "understanding")
    answer = pipe.understand(
        args.question,
        images=images,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    if not args.json:
        print(answer.text.strip())
        return 0
    record = {"question": args.question, "images": args.image, "model": args.model}
    for key in ("temperature", "top_p", "top_k", "seed", "max_new_tokens"):
        record[key] = getattr(args, key)
    record |= {"answer": answer.text, "sft_format": answer.sft_format, "token_ids": answer.token_ids}
    print(json.dumps(record, ensure_ascii=False, indent=2))
    return 0


# What they share -----------------------------------------------------------------------


def _load(args: argparse.Namespace, parts: str) -> Pipeline:
    from .loading import load

    options: dict[str, Any] = dict(device=args.device, dtype=args.dtype, parts=parts, progress=not args.quiet)
    if parts != "understanding":
        options |= dict(vae_path=args.vae, vae_dtype=args.vae_dtype)
        options["upstream_rounding"] = getattr(args, "upstream_rounding", False)
    return load(args.model, **options)


def _paint(
    pipe: Pipeline,
    args: argparse.Namespace,
    prompts: Sequence[str],
    out: Path,
    parallel_size: int,
    seed: int,
    batch_size: int,
    sheet: bool = True,
    **settings: Any,
) -> list[Path]:
    """Paint in batches, save each batch at once; returns the pictures' paths, the sheet's last."""
    from tqdm import tqdm

    from . import __version__
    from .images import contact_sheet, save_png, sheet_side, slug, thumbnail

    settings = dict(cfg_weight=2.0, num_inference_steps=30, img_size=None) | settings
    for prompt in prompts:  # the last prompt's error should not wait for the first's picture
        pipe.processor.generation_prompt(prompt)
    jobs = [(i, i * parallel_size + k + seed) for i in range(len(prompts)) for k in range(parallel_size)]
    side, digits = sheet_side(len(jobs)), max(2, len(str(len(prompts) - 1)))
    local = Path(args.model).expanduser()
    common = {
        "model": local.resolve().name if local.is_dir() else args.model,
        "janusflow_min": __version__,
        "dtype": _name(pipe.model.dtype),
        "vae_dtype": _name(pipe.vae.dtype),
    }
    common |= {key: settings[key] for key in ("cfg_weight", "num_inference_steps")}
    common["upstream_rounding"] = pipe.model.llm.upstream_rounding
    groups: list[tuple[str, list]] = [(prompt, []) for prompt in prompts]
    paths: list[Path] = []
    hidden = args.quiet or len(jobs) <= batch_size
    with tqdm(total=len(jobs), desc="Pictures", unit="picture", disable=hidden, leave=False) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            result = pipe.generate(
                [prompts[i] for i, _ in batch],
                parallel_size=1,
                seed=[image_seed for _, image_seed in batch],
                progress=not args.quiet,
                **settings,
            )
            for (i, image_seed), image in zip(batch, result.images, strict=True):
                name = f"{i:0{digits}d}_{slug(prompts[i])}_seed{image_seed}.png"
                own = {"prompt": prompts[i], "seed": image_seed, "img_size": image.width}
                paths.append(save_png(image, out / name, own | common))
                groups[i][1].append(thumbnail(image, side))
                bar.write(str(paths[-1]), file=sys.stdout)
            bar.update(len(batch))
    if sheet:
        paths.append(save_png(contact_sheet(groups), out / "sheet.png", {"first_seed": seed} | common))
        print(paths[-1])
    return paths


def _out_folder(path: str) -> Path:
    out = Path(path).expanduser()
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {path} is a file, not a folder")
    return out  # made with the first picture


def _read_prompts(path: str) -> list[str]:
    """One prompt a line, empty lines left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is not UTF-8 text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path} holds no prompt")
    return prompts


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# Arguments -----------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere here."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} ({self.prog} --help says more)")


def _whole(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.strip().lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**63), got {text!r}")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to its function."""
    from . import __version__

    parser = _Parser(
        prog=PROG,
        description="JanusFlow: one model that paints pictures from text and answers questions about pictures.",
        epilog="""start here:
  janusflow-min demo                                  paint and ask with the small model inside the package
  janusflow-min generate "a photo of a red star"      pictures of your own prompt
  janusflow-min understand "What is this?" --image A.png
  janusflow-min info deepseek-ai/JanusFlow-1.3B       what a checkpoint holds

`janusflow-min COMMAND --help` explains a command. Errors are one line; --debug shows the traceback.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Any, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
        new = commands.add_parser(
            run.__name__,
            help=summary,
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        new.set_defaults(run=run)
        new.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return new

    def option(new: Any, flag: str, meta: str, help: str, default: Any = None, kind: Any = str) -> None:
        help += "" if default is None else f" (default: {default})"
        new.add_argument(flag, metavar=meta, type=kind, default=default, help=help)

    def model_options(new: argparse.ArgumentParser, vae: bool) -> None:
        option(new, "--model", "MODEL", MODEL_HELP, "tiny")
        option(new, "--device", "NAME", "auto is CUDA, then MPS, then CPU; or cpu, cuda, cuda:1, mps", "auto")
        option(new, "--dtype", "NAME", "auto is bfloat16 on CUDA, else float32; or either's name", "auto")
        if vae:
            option(
                new,
                "--vae",
                "PATH",
                "the VAE's folder or hub id; without: the checkpoint's vae/, else SDXL's",
            )
            option(new, "--vae-dtype", "NAME", "float32 or bfloat16; without: as --dtype")
        new.add_argument("--quiet", action="store_true", help="no progress bars, no remarks")

    new = command(
        demo,
        "paint six prompts and ask about a picture: under a minute on two CPU cores",
        "Paint two pictures of each of six prompts, save them with a contact sheet, and ask three questions\n"
        "about the first picture. A file that is there already is kept: the new one gets -2, -3, ...",
        "  janusflow-min demo\n  janusflow-min demo --seed 7 --out outputs/seven",
    )
    model_options(new, vae=True)
    option(new, "--out", "DIR", "folder for the pictures", "outputs/demo")
    option(new, "--seed", "N", "of the first picture; the next ones count on", 0, _seed)

    new = command(
        generate,
        "paint pictures from prompts",
        "Paint pictures and save each as INDEX_PROMPT_seedSEED.png with its prompt, seed and settings in the PNG's\n"
        "text chunks, and a contact sheet. The paths go to stdout. A file that is there already is kept: the new\n"
        "one gets -2, -3, ... Pictures are saved after every batch, so an interrupted run keeps them.",
        """  janusflow-min generate "a photo of a red star"
  janusflow-min generate "a blue ring" "two squares" --parallel-size 3 --seed 1 --out outputs/mine
  janusflow-min generate --prompts-file prompts.txt --no-sheet --quiet
  janusflow-min generate "a cat on a rainbow" --model deepseek-ai/JanusFlow-1.3B --device cuda --img-size 1024""",
    )
    new.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to paint; one or more, in quotes")
    new.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line, UTF-8")
    model_options(new, vae=True)
    option(new, "--out", "DIR", "folder for the pictures", "outputs")
    option(new, "--parallel-size", "N", "pictures for each prompt", 5, _whole)
    option(new, "--batch-size", "N", "pictures painted at once; fewer take less memory", 10, _whole)
    option(new, "--cfg-weight", "W", "guidance; 1 is none", 2.0, _finite)
    option(new, "--steps", "N", "Euler steps of the flow", 30, _whole)
    option(new, "--img-size", "PX", "side, by Lanczos resize; without: the model's own", None, _whole)
    option(
        new,
        "--seed",
        "N",
        "of the first picture; the next ones count on; without: drawn and told",
        None,
        _seed,
    )
    new.add_argument("--upstream-rounding", action="store_true", help="round as the published code does")
    new.add_argument(
        "--sheet", action=argparse.BooleanOptionalAction, default=True, help="make a contact sheet"
    )

    new = command(
        understand,
        "ask about pictures",
        "Answer a question about one or more pictures, or about none. The answer goes to stdout.",
        """  janusflow-min understand "How many objects are there?" --image star.png
  janusflow-min understand "What is different?" --image A.png --image B.png --json
  janusflow-min understand --image A.png --temperature 0.7 --seed 1""",
    )
    new.add_argument(
        "question", metavar="QUESTION", nargs="?", default="", help="without: describe the image"
    )
    new.add_argument("--image", metavar="FILE", action="append", default=[], help="repeat for more pictures")
    model_options(new, vae=False)
    option(new, "--max-new-tokens", "N", "longest answer in tokens", 512, _whole)
    option(new, "--temperature", "T", "0 is greedy", 0.0, _finite)
    option(new, "--top-p", "P", "nucleus, where there is a temperature", 0.95, _finite)
    option(new, "--top-k", "K", "best tokens kept, 0 is all", 50, int)
    option(new, "--seed", "N", "for a temperature above 0", None, _seed)
    new.add_argument("--json", action="store_true", help="answer, prompt, token ids and settings as JSON")

    info.add_parser(command, option, MODEL_HELP)
    train.add_parser(command)
    bench.add_parser(commands, argparse.RawDescriptionHelpFormatter)
    torchumm.add_parser(command, option)
    return parser
