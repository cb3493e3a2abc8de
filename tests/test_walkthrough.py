# SPDX-License-Identifier: MIT
"""docs/walkthrough.ipynb, run from top to bottom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"
PRELUDE = """
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
FIGURES = []
plt.show = lambda: (FIGURES.append(plt.get_fignums()), plt.close("all"))
"""


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Stops: a page that explains a library of last month, with cells that fail or show nothing."""
    pytest.importorskip("matplotlib")
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join([PRELUDE, *code, "assert FIGURES == [[1]] * 9, FIGURES"]), encoding="utf-8")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "first token: ' red'" in done.stdout and time.monotonic() - start < 300
    drawn = [
        c for c in cells if any("image/png" in output.get("data", {}) for output in c.get("outputs", ()))
    ]
    assert len(drawn) >= 7  # what a reader sees who does not run it
