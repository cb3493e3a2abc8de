# SPDX-License-Identifier: MIT
"""`janusflow-min train CONFIG.toml`: fine-tune a model, or go on with a run that was stopped."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(command: Any) -> None:
    """`command` makes a parser as the others of the command line have it."""
    new = command(
        train,
        "fine-tune a model on your own images and conversations",
        "Train as a TOML file says, and export the result to OUTPUT/export, which --model and jf.load take. A run\n"
        "that was stopped, by Ctrl-C or a power cut, goes on from its newest whole checkpoint when called again, and\n"
        "ends with the same weights. OUTPUT also gets metrics.jsonl, samples/, bad_rows.jsonl and curves.png.",
        """  janusflow-min train scripts/examples/new_concept.toml
  janusflow-min train mine.toml --set output=runs/two --set optimizer.lr=1e-4 --fresh
  torchrun --nproc-per-node 2 -m janusflow_min train scripts/examples/full_two_gpus.toml""",
    )
    new.add_argument("config", metavar="CONFIG", help="a TOML file; training/config.py has every key")
    new.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, dots for tables; repeat",
    )
    new.add_argument(
        "--fresh", action="store_true", help="start anew; the output's old checkpoints are deleted"
    )
    new.add_argument("--quiet", action="store_true", help="no progress bar, no remarks")


def train(args: argparse.Namespace) -> int:
    """Run a configuration to its end."""
    from ..training.config import load_config
    from ..training.trainer import Trainer

    trainer = Trainer(load_config(args.config, args.set), args.fresh, not args.quiet)
    folder = trainer.run()
    if trainer.rank == 0:
        print(folder)
    return 0
