# SPDX-License-Identifier: MIT
"""`janusflow-min torchumm`: see `janusflow_min/torchumm/launcher.py`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable


def add_parser(command: Callable[..., argparse.ArgumentParser], option: Callable[..., None]) -> None:
    """Add `torchumm` to the command line; `command` and `option` are the parser's own helpers."""
    new = command(
        torchumm,
        "run TorchUMM's runners with this library's model",
        "Run an unmodified runner of a TorchUMM checkout with this library in the place of its janus_flow.\n"
        "RUNNER is geneval, dpg_bench, wise, uni_mmmu, mme, mmbench, mmstar, mmmu, mmvet, mathvista or\n"
        "unified_bench; infer or eval, as `umm infer` and `umm eval`; or a .py file of the checkout. Relative\n"
        "paths in a configuration are TorchUMM's: from the checkout's root. Without --config the one shipped\n"
        "for that runner is used.",
        """  janusflow-min torchumm geneval --root TorchUMM
  janusflow-min torchumm dpg_bench --root TorchUMM --set inference.backbone_cfg.model_path=tiny
  janusflow-min torchumm eval --root TorchUMM --config my_geneval.yaml
  torchrun --nproc-per-node 4 -m janusflow_min torchumm dpg_bench --root TorchUMM""",
    )
    new.add_argument("runner", metavar="RUNNER", help="what to run")
    option(new, "--root", "DIR", "a checkout of TorchUMM; default: $TORCHUMM_ROOT")
    option(new, "--config", "FILE", "a configuration in TorchUMM's format, YAML or JSON")
    new.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one value, as umm's own --set",
    )


def torchumm(args: argparse.Namespace) -> int:
    from ..torchumm.launcher import launch

    root = args.root or os.environ.get("TORCHUMM_ROOT")
    if not root:
        raise ValueError("--root is needed: the checkout of TorchUMM (or set TORCHUMM_ROOT)")
    return launch(root, args.runner, args.config, args.set)
