# SPDX-License-Identifier: MIT
"""The repository itself: what CI runs and what a release holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import janusflow_min

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
    "pip install -q -e .[train,bench,serve,ui]",
    "python -m pytest tests/training tests/benchmarks tests/serve tests/integrations tests/test_docs.py "
    "tests/test_lora.py tests/test_webui.py tests/test_walkthrough.py",
    "pip install -q -e .[torchao]",
    "python -m pytest tests/training/test_eight_bit.py",
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


# tests/ mirrors the package

TOPICS = {  # tests of what no one file holds
    "": "ambient bad_input docs extending fuzz house imports parity reference_live torchumm_launch walkthrough "
    "webui_browser",
    "benchmarks": "official_dpg official_geneval official_wise shapes_benchmark things_benchmark",
    "benchmarks/uni_mmmu": "official",
    "serve": "serve_command server serving_page",
    "training": "ambient_training default_recipe extending_losses loader mixed_batches run_config runs sources "
    "training_data",
}


def test_tests_stand_where_one_looks_for_them():
    """Stops: a test file under a name or in a folder that says nothing of the module it tests."""
    scripts, package = {path.stem for path in (ROOT / "scripts").rglob("*.py")}, ROOT / "janusflow_min"
    topics = {(folder, name) for folder, names in TOPICS.items() for name in names.split()}
    files = list((ROOT / "tests").rglob("test_*.py"))
    assert len({path.name for path in files}) == len(files)
    for path in files:
        folder = path.parent.relative_to(ROOT / "tests").as_posix().removeprefix(".")
        name = path.stem.removeprefix("test_uni_" if folder.endswith("uni_mmmu") else "test_")
        below = {module.stem for module in (package / folder).rglob("*")} | scripts | {path.parent.name}
        assert (folder, name) in topics or name in below, (
            f"{path}: no module {name}, and no topic of {folder}"
        )
        topics.discard((folder, name))
    assert not topics, f"no test file has these topics: {topics}"


# What is shipped


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, set[str]]:
    """The names in an sdist and a wheel that are built from the tracked files, and the wheel's metadata."""
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path_factory.mktemp("built") / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [sdist], [wheel] = (checkout / "dist").glob("*.tar.gz"), (checkout / "dist").glob("*.whl")
    with tarfile.open(sdist) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        [metadata] = [name for name in inside if name.endswith("METADATA")]
        return {
            "sdist": names,
            "wheel": inside,
            "metadata": set(archive.read(metadata).decode().splitlines()),
        }


def tracked() -> list[str]:
    """Every file of the repository, relative to its root; outside a checkout of git, every file that lies there."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if done is None or done.returncode != 0:
        pytest.skip("needs a checkout and git")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_sdist_holds_every_file(built):
    """Stops: an sdist with half of the tests, without their fixtures or without the scripts."""
    hidden = {".gitignore", ".pre-commit-config.yaml"}
    wanted = {name for name in tracked() if name not in hidden and not name.startswith(".github/")}
    assert wanted - built["sdist"] == set()


def test_the_wheel_holds_the_package_and_no_more(built):
    """Stops: a wheel without the default model, the configurations or the marker of types; tests installed."""
    package = {name for name in tracked() if name.startswith("janusflow_min/")}
    inside = {name for name in built["wheel"] if ".dist-info/" not in name}
    assert inside == package and "janusflow_min/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in built["wheel"])


def test_the_metadata_says_what_a_visitor_looks_for(built):
    """Stops: a licence in a form that indexes no longer read, a second place for the version, no classifiers."""
    assert {"License-Expression: MIT", f"Version: {janusflow_min.__version__}"} <= built["metadata"]
    assert {"Requires-Python: >=3.10", "Classifier: Typing :: Typed"} <= built["metadata"]
    assert any(line.startswith("Keywords: ") for line in built["metadata"])
