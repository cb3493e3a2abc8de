# SPDX-License-Identifier: MIT
"""docs/extending.md's new loss, applied as it is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import janusflow_min as jf
from janusflow_min.training import losses
from janusflow_min.training.metrics import curves, read_lines

CODE = """
import json, sys, types
import janusflow_min.training
name = "janusflow_min.training.losses"
sys.modules[name] = module = types.ModuleType(name)
module.__package__ = "janusflow_min.training"
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), module.__dict__)
from janusflow_min.training.config import Config
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer
Trainer(read(Config, json.loads(sys.argv[2])), progress=False).run()
"""


def test_a_new_loss_is_one_edit(settings, tmp_path, manifest):
    """Stops: a loss that takes five files, that is minimised and not shown, or shown and not minimised."""
    page = (Path(jf.__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    old, new = re.search(
        r"```diff\n (.*?\n)\+(.*?\n)```", page[page.index("## A loss") :], re.DOTALL
    ).groups()
    source = Path(losses.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "losses.py").write_text(source.replace(old, old + new), encoding="utf-8")
    report = {"every": 2, "validation": str(manifest), "validation_rows": 20}
    data = [{"kind": "generation", "manifest": str(manifest)}]
    config = settings(steps=2, report=report, data=data)
    path = os.pathsep.join([str(Path(jf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CODE, str(tmp_path / "losses.py"), json.dumps(config.to_dict())]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    row = read_lines(Path(config.output) / "metrics.jsonl")[0]
    assert "root_flow" in curves(row) and row["flow"] / 2 < row["root_flow"] ** 2 <= row["flow"]
    total = row["flow"] + row["alignment"] + 0.1 * row["root_flow"]
    assert abs(total - row["loss"]) < 1e-4
    assert read_lines(Path(config.output) / "samples.jsonl")[0]["root_flow"] > 0
