# SPDX-License-Identifier: MIT
"""`janusflow-min train CONFIG.toml`: fine-tune a model, or continue a run that was stopped."""

from __future__ import annotations

import argparse
import os
from typing import Any


def add_parser(command: Any) -> None:
    """`command` makes a parser as the others of the command line have it."""
    new = command(
        train,
        "fine-tune a model on your own images and conversations",
        "Train by the settings of a TOML file and export the result to OUTPUT/export, which --model and jf.load take.\n"
        "A run that was stopped, by Ctrl-C or a power cut, continues from its newest complete checkpoint when called\n"
        "again, and ends with the same weights. OUTPUT also gets metrics.jsonl, samples/, bad_rows.jsonl, config.toml\n"
        "(every setting), curves.png and, with LoRA, export-adapter/ in peft's form.",
        """  janusflow-min train mine.toml --dry-run
  janusflow-min train scripts/examples/new_concept.toml
  janusflow-min train mine.toml --set output=runs/two --set optimizer.lr=1e-4 --fresh
  torchrun --nproc-per-node 2 -m janusflow_min train scripts/examples/full_two_gpus.toml
  janusflow-min train --export runs/two/checkpoints/step-00000500""",
    )
    new.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a TOML file; docs/finetuning.md has a whole one"
    )
    new.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, dots for tables; may be repeated",
    )
    new.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be done, and stop"
    )
    new.add_argument(
        "--fresh", action="store_true", help="start over; old checkpoints are deleted once a new one is saved"
    )
    new.add_argument(
        "--export", metavar="CHECKPOINT", help="export a checkpoint of a run instead of training"
    )
    new.add_argument("--quiet", action="store_true", help="no progress, no remarks")


def train(args: argparse.Namespace) -> int:
    """Run a configuration to its end, or check it, or export one of its checkpoints."""
    if (args.config is None) == (args.export is None):
        raise ValueError("train takes either a CONFIG or --export CHECKPOINT")
    if args.export is not None:
        if args.set or args.fresh or args.dry_run:
            raise ValueError(
                "--export takes its settings from the checkpoint; leave out --set, --fresh and --dry-run"
            )
        from ..training.export import export_checkpoint

        print(export_checkpoint(args.export))
        return 0
    from ..training.config import load_config

    config = load_config(args.config, args.set)
    if args.dry_run:
        from ..training.check import check

        print(check(config, int(os.environ.get("WORLD_SIZE", "1")), progress=not args.quiet))
        return 0
    from ..training.trainer import Trainer

    trainer = Trainer(config, args.fresh, not args.quiet)
    folder = trainer.run()
    if trainer.rank == 0:
        print(folder)
    return 0
