# SPDX-License-Identifier: MIT
"""The repository itself: what CI runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "python3 $*" >> "$CALLS"  # an environment with nothing in it, of tools that only note how they are called
[ ! -e .venv ] || echo "there was a .venv" >> "$CALLS"
mkdir -p .venv/bin build
for tool in pip python janusflow-min ruff mypy; do
    printf '#!/bin/sh\\necho "%s $*" >> "$CALLS"\\n[ "%s $*" != "$FAILS" ]\\n' $tool $tool > .venv/bin/$tool
    chmod +x .venv/bin/$tool
done
"""
CALLS = [
    "python3 -m venv .venv",
    "pip install -q .",
    "janusflow-min demo",
    "python3 -m venv .venv",
    "pip install -q -e .[test]",
    "python -m pytest",
    "pip install -q -e .[dev]",
    "ruff check .",
    "ruff format --check .",
    "mypy ",
]


@pytest.fixture
def ci(tmp_path):
    """Runs a copy of `.ci/run` beside README, with tools that only note their calls; (exit status, calls)."""
    if os.name == "nt" or shutil.which("bash") is None:
        pytest.skip("needs bash")
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy2(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    shutil.copy2(ROOT / "README.md", checkout)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(fails: str = "") -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        env |= {"CALLS": str(calls), "FAILS": fails}
        done = subprocess.run(
            [checkout / ".ci" / "run"], env=env, cwd=tmp_path, capture_output=True, timeout=60
        )
        return done.returncode, calls.read_text().splitlines()

    return run


def test_ci_runs_the_readme_s_commands_with_nothing_before_them(ci):
    """Stops: a CI that installs something first, or other things, and is green where a newcomer's machine fails."""
    assert ci() == (0, CALLS)
    assert ci() == (0, CALLS), "what an earlier run left is not removed"


@pytest.mark.parametrize("call", [call for call in CALLS if call != "python3 -m venv .venv"])
def test_ci_fails_when_one_of_its_commands_does(ci, call):
    """Stops: a failing step that the next one hides."""
    status, calls = ci(fails=call)
    assert status != 0 and calls[-1] == call


def test_tools_have_one_version():
    """Stops: ruff or mypy that differ between the CI and a contributor's machine."""
    dev = re.search(r"^dev = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert dev and re.search(r'"ruff==[\d.]+"', dev[1]) and re.search(r'"mypy==[\d.]+"', dev[1])
