# SPDX-License-Identifier: MIT
"""`janusflow-min bench NAME generate | score | report`: see `benchmarks/__init__.py` for what a benchmark offers."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import benchmarks
from ..benchmarks.runner import Option, Settings, World

STAGES = {
    "generate": "paint what is missing of the run; under torchrun every rank paints its share",
    "score": "judge what is painted",
    "report": "score.json as report.json, report.md and report.png, beside published numbers",
}
DEFAULTS = Settings()
SETTINGS = (  # of Settings, for every benchmark; `seed` and the like keep their names
    Option("--model", '"tiny", a folder in the official layout, or a hub id', DEFAULTS.model),
    Option("--vae", "the VAE's folder or hub id; without: the checkpoint's vae/, else SDXL's"),
    Option("--device", "auto is CUDA, then MPS, then CPU", DEFAULTS.device),
    Option("--dtype", "auto is bfloat16 on CUDA, else float32", DEFAULTS.dtype),
    Option("--vae-dtype", "float32 or bfloat16; without: as --dtype"),
    Option("--cfg-weight", "guidance; 1 is none", DEFAULTS.cfg_weight, float),
    Option("--num-inference-steps", "Euler steps of the flow", DEFAULTS.num_inference_steps, int),
    Option("--seed", "the first image's; the others' follow from their place", DEFAULTS.seed, int),
    Option(
        "--batch-size", "images painted at once; part of what decides the last bits", DEFAULTS.batch_size, int
    ),
    Option("--upstream-rounding", "round as the published code does", DEFAULTS.upstream_rounding, bool),
    Option("--fast", "kernels and CUDA graphs where the GPU has them", DEFAULTS.fast, bool),
    Option("--compile", "torch.compile for what those leave over", DEFAULTS.compile, bool),
    Option(
        "--threads", "CPU threads of a process; part of what decides the last bits", DEFAULTS.threads, int
    ),
    Option("--limit", "only the first prompts; a run without it goes on", DEFAULTS.limit, int),
)
EXAMPLES = """examples:
  janusflow-min bench tiny generate --out outputs/tiny
  janusflow-min bench tiny score --out outputs/tiny && janusflow-min bench tiny report --out outputs/tiny
  torchrun --nproc-per-node 2 -m janusflow_min bench geneval generate --data evaluation_metadata.jsonl \\
      --model deepseek-ai/JanusFlow-1.3B --out outputs/geneval"""


def add_parser(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Add `bench` with all benchmarks and stages. Nothing that loads torch is imported for it."""
    bench = commands.add_parser(
        "bench",
        help="run a benchmark: paint, score, report",
        description="Run a benchmark in three stages, which share the folder --out. Data come from paths that you\n"
        "give; nothing is bundled. Every stage may be interrupted and called again: it goes on.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    names = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for name, module_name in benchmarks.MODULES.items():
        module = importlib.import_module(f"{benchmarks.__name__}.{module_name}")
        about = names.add_parser(name, help=module.SUMMARY, description=f"{module.TITLE}: {module.SUMMARY}.")
        stages = about.add_subparsers(title="stages", metavar="STAGE", required=True)
        for stage, help in STAGES.items():
            new = stages.add_parser(stage, help=help, description=f"{module.TITLE}, {stage}: {help}.")
            new.set_defaults(run=run, benchmark=module, stage=stage)
            new.add_argument(
                "--out", dest="folder", metavar="DIR", default=f"outputs/{name}", help="the run's folder"
            )
            for option in (*module.OPTIONS[stage], *(SETTINGS if stage == "generate" else ())):
                _add(new, option)
            new.add_argument("--quiet", action="store_true", help="no progress bars")
            new.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """One stage of one benchmark."""
    from ..benchmarks import report

    module, stage = args.benchmark, args.stage
    own = {_keyword(option): getattr(args, _keyword(option)) for option in module.OPTIONS[stage]}
    if stage == "generate":
        known = {field.name for field in fields(Settings)}
        shared = {name: value for name, value in vars(args).items() if name in known and name not in own}
        print(module.generate(Settings(**shared, progress=not args.quiet), args.folder, **own))
        return 0
    if World.from_environment().size > 1:
        raise ValueError(f"only the stage generate is spread over ranks; call {stage} without torchrun")
    if stage == "score":
        print(report.summary(module.score(args.folder, progress=not args.quiet, **own)))
    else:
        for path in module.report(args.folder, **own):
            print(path)
    return 0


def _keyword(option: Option) -> str:
    return option.flag.removeprefix("--").replace("-", "_")


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    help = option.help if option.default is None else f"{option.help} (default: {option.default})"
    common: dict[str, Any] = {"default": option.default, "help": help.replace("%", "%%")}
    if option.kind is bool:
        parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
        return
    kind = (lambda text: Path(text).expanduser()) if option.kind is Path else option.kind
    common |= {"type": kind, "required": option.required}
    common |= {"choices": option.choices} if option.choices else {"metavar": option.kind.__name__.upper()}
    parser.add_argument(option.flag, action="append" if option.many else "store", **common)
