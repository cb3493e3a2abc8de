# SPDX-License-Identifier: MIT
"""`janusflow-min bench NAME generate | score | report | compare`; `benchmarks.Benchmark` is what a benchmark offers."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from .. import benchmarks
from ..benchmarks.ranks import RankInfo
from ..benchmarks.runner import Settings
from ..options import add_options, read_options

STAGES = {
    "generate": "generate the images that are missing; under torchrun each rank generates its share",
    "score": "judge what was generated",
    "report": "write report.json, .md, .html (a gallery of failures) and .png, beside published numbers",
}
EXAMPLES = """examples:
  janusflow-min bench shapes generate --out outputs/shapes
  janusflow-min bench shapes score --out outputs/shapes && janusflow-min bench shapes report --out outputs/shapes
  janusflow-min bench shapes compare outputs/shapes outputs/shapes
  torchrun --nproc-per-node 2 -m janusflow_min bench geneval generate --data evaluation_metadata.jsonl \\
      --model deepseek-ai/JanusFlow-1.3B --out outputs/geneval"""


def add_parser(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Add `bench` with all benchmarks and stages. Nothing that loads torch is imported for it."""
    bench = commands.add_parser(
        "bench",
        help="run a benchmark: generate, score, report, compare",
        description="Run a benchmark in three stages that share the folder --out, and compare two runs. Data come\n"
        "from paths that you give; nothing is bundled. An interrupted stage resumes when called again.",
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
            if stage in module.OPTIONS:
                add_options(new, module.OPTIONS[stage])
            if stage == "generate":
                add_options(new, Settings)
            new.add_argument("--quiet", action="store_true", help="no progress bars")
            new.add_argument("--debug", action="store_true", help="show the traceback of an error")
        help = "compare two scored runs: paired bootstrap, items that flipped"
        new = stages.add_parser("compare", help=help, description=f"{module.TITLE}: {help}.")
        new.set_defaults(run=compare, name=name)
        new.add_argument("a", metavar="A", help="a scored run's folder")
        new.add_argument("b", metavar="B", help="the one to set beside it; differences are B - A")
        new.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (default: 0)")
        new.add_argument("--json", action="store_true", help="JSON, with every flipped item, not Markdown")
        new.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """One stage of one benchmark."""
    from ..benchmarks import report

    module, stage, progress = args.benchmark, args.stage, not args.quiet
    if stage == "generate":
        settings = read_options(Settings, args, progress=progress)
        print(module.generate(settings, args.folder, read_options(module.OPTIONS[stage], args)))
        return 0
    options = read_options(module.OPTIONS[stage], args, progress=progress) if stage == "score" else None
    if RankInfo.from_environment().size > 1 and getattr(options, "detector", None) is None:
        what = "only generating images and detecting objects (bench geneval score --detector) is"
        raise ValueError(f"{what} spread over ranks; call this {stage} without torchrun")
    if options is not None:
        if score := module.score(args.folder, options):
            print(report.summary(score))
    else:
        for path in module.report(args.folder):
            print(path)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Two runs of one benchmark."""
    from ..benchmarks.compare import compare, markdown

    result = compare(args.a, args.b, args.seed)
    if result["benchmark"] != args.name:
        raise ValueError(f"these are runs of {result['benchmark']}, not of {args.name}")
    print(json.dumps(result, ensure_ascii=False, indent=2) if args.json else markdown(result))
    return 0
