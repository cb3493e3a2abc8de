# SPDX-License-Identifier: MIT
"""What README, docs/ and the examples of --help tell a reader to type: every line is run here, or stands in NOT_RUN.

A page's commands run one after the other in a folder of their own, with the default model and invented data. SMALL
and REPLACED make them quick: two steps, one prompt, a judge's saved answers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from chat_server import ChatServer
from invented import write_dpg, write_geneval, write_image, write_rows, write_uni_mmmu, write_wise

from janusflow_min import cli
from janusflow_min.checkpoint import read_config
from janusflow_min.commands import demo
from janusflow_min.hub import TINY
from janusflow_min.model import JanusFlow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {  # how a command begins: why no test here runs it
    "python3 -m venv .venv": ".ci/run runs README's two commands word for word",
    ".venv/bin/": "the same two commands",
    "pip install": "the network",
    "git ": "the network",
    "modal ": "an account at Modal; test_modal_app.py calls the script's functions",
    "pytest -m reference": "a checkout of the reference",
    "pytest -m torchumm": "a checkout of TorchUMM",
    "pytest -m official": "checkouts of the official scorers",
    "janusflow-min bench NAME": "a pattern",
    "janusflow-min demo '|'": "a pattern",
    "janusflow-min torchumm": "a checkout of TorchUMM; test_torchumm_launch.py runs its runners",
    "torchrun --nproc-per-node 4 -m janusflow_min torchumm": "a checkout of TorchUMM",
    "python scripts/compare_reference.py": "a GPU and a checkout of the reference",
    "python scripts/benchmark.py": "a GPU",
    "python scripts/benchmark_training.py": "a GPU",
    "torchrun --nproc-per-node 2 scripts/benchmark_training.py": "two GPUs",
    "python scripts/train_shapes.py": "a GPU",
    "python scripts/things_atlas.py": "npm and resvg-py; test_things_atlas.py renders two invented packages",
    "janusflow-min bench things": "the atlas; test_things_benchmark.py runs it on invented sprites",
    "python scripts/examples/new_concept.py": "half an hour",
    "pytest -m lmms_eval": "lmms-eval",
    "python -m lmms_eval": "lmms-eval and the hub; tests/integrations/test_lmms_eval.py runs it",
    "accelerate launch": "two GPUs; tests/integrations/test_lmms_eval.py runs two ranks",
    "curl ": "a server; tests/serve/test_serving_page.py runs them",
    "python scripts/load_test.py": "minutes; tests/serve/test_load_test.py runs a short one",
    "python scripts/serve_ray.py": "the same; tests/serve/test_serve_ray.py starts it",
    "pytest -m ray": "the extra serve-ray",
    "janusflow-min serve": "it serves until it is told to end; tests/serve starts it as a command",
    "janusflow-min ui": "it serves until it is told to end; test_webui.py starts it as a command",
    "pytest -m browser": "a browser",
    "janusflow-min info deepseek-ai/JanusFlow-1.3B": "the hub",
}
NEEDS = {  # how a command begins: a package of an extra without which it is left out
    "janusflow-min bench wise score": "openai",
    "janusflow-min bench wise report": "openai",
    "janusflow-min bench uni_mmmu score": "openai",
    "janusflow-min bench uni_mmmu report": "openai",
    "janusflow-min train scripts/examples/lora_official.toml": "peft",
}
REPLACED = {  # an option's value, and some options' names
    "--model": ["--model", "tiny"],
    "--device": ["--device", "cpu"],
    "--at-least": ["--at-least", "0"],
    "--export": ["--export", "runs/two/checkpoints/step-00000002"],
    "--detector": ["--detections", "detections.jsonl"],
    "--vqa": ["--answers", "answers.jsonl"],
    "--vl-url": ["--vl-url", "{url}"],
    "--text-url": ["--text-url", "{url}"],
}
TRAINING = ["model=tiny", "vae=", "device=cpu", "steps=2", "batch=2", "micro_batch=2", "save_every=2"]
TRAINING += [
    "parallel=replicate",
    "compile=false",
    "loader.workers=0",
    "report.every=0",
    "optimizer.warmup=1",
]
SMALL = {  # how a command begins: what is added to it
    "janusflow-min generate": ["--num-inference-steps", "2"],
    "janusflow-min bench shapes generate": ["--cases", "1"],
    r"janusflow-min bench (\w+) generate": ["--num-inference-steps", "2"],
    "janusflow-min bench (geneval|dpg_bench|wise) (generate|score)": ["--subset"],
    "janusflow-min bench wise score": ["--judge-url", "{url}"],
    "janusflow-min bench uni_mmmu (generate|score)": ["--tasks", "science"],
    "janusflow-min bench uni_mmmu generate": ["--max-new-tokens", "8"],
    r"janusflow-min train (?!--export)": [word for setting in TRAINING for word in ("--set", setting)],
}
ROUNDS = ["passes=1", "updates=1", "num_inference_steps=1", "validation=0"]
for table, example in (("nft", "nft"), ("distill", "reflow")):
    SMALL[f"janusflow-min train scripts/examples/{example}.toml"] = [
        *(word for setting in ROUNDS for word in ("--set", f"{table}.{setting}")),
        *("--set", "report.keep_best=false", "--set", "nft.group=2"),
    ]
GRADES = 'Consistency: 2\nRealism: 1\nAesthetic Quality: 0\n{"verdict": "yes", "score": 1}'


# Finding ---------------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def written(page: Path) -> str:
    """All that a page tells its reader to type: the fenced blocks, and commands in the midst of a sentence."""
    text = page.read_text(encoding="utf-8")
    inline = r"`((?:janusflow-min\s+\w+|python|torchrun|pip|pytest|modal|git)\s+[^`]+)`"
    found = re.finditer(rf"^```(\w+)\n(.*?)^```|{inline}", text, re.MULTILINE | re.DOTALL)
    texts = [" ".join(m[3].split()) if m[3] else m[2] if m[1] == "sh" else "" for m in found]
    return "\n".join(texts)


def commands(text: str) -> list[str]:
    """One simple command an entry: lines joined at a backslash, split at &&, comments gone."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            found.append(shlex.join(words[:at]))
            words = words[at + 1 :]
        found += [shlex.join(words)] if words else []
    return found


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def examples(epilog: str) -> str:
    """The commands of an epilog: its indented lines, without the explanations that stand behind some of them."""
    lines = [line for line in epilog.splitlines() if line.startswith("  ")]
    return "\n".join(
        re.sub(r"(?<=\S) {4,}.*", "", line) if line.startswith("  jan") else line for line in lines
    )


def all_places() -> dict[str, list[str]]:
    """Page or command's help -> the commands that stand there."""
    places = {page.name: commands(written(page)) for page in PAGES}
    for parser in parsers(cli.build_parser()):
        places[f"{parser.prog} --help"] = commands(examples(parser.epilog or ""))
    return {place: found for place, found in places.items() if found}


PLACES = all_places()


def begins(command: str, table) -> str | None:
    """The entry of a table that a command begins with."""
    return next((entry for entry in table if command.startswith(entry)), None)


def test_commands_are_found():
    """Stops: a page or a help that the tests below no longer read."""
    assert {"README.md", "benchmarks.md", "finetuning.md", "torchumm.md", "parity.md", "speed.md"} <= set(
        PLACES
    )
    helps = {place for place in PLACES if place.endswith("--help")}
    assert helps >= {
        f"janusflow-min {c} --help" for c in ("demo", "generate", "understand", "info", "train", "bench")
    }
    assert commands("a 'b c' \\\n  d  # e\nX=1 f && g -h") == ["a 'b c' d", "X=1 f", "g -h"]


def test_what_is_not_run_is_written_somewhere():
    """Stops: reasons that outlive their lines."""
    found = [re.sub(r"^(\w+=\S+ )+", "", command) for place in PLACES.values() for command in place]
    assert set(NOT_RUN) - {begins(command, NOT_RUN) for command in found} == set()


def test_readme_is_a_front_page():
    """Stops: a README that grows into a manual; a map that lacks a file, or names one that is gone; dead links."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    mapped = set(
        re.findall(r"`([\w/]+?(?:\.py|/))`", text.partition("## Map of the code")[2].partition("\n## ")[0])
    )
    package = [path for path in (ROOT / "janusflow_min").iterdir() if not path.name.startswith("__")]
    there = {f"{path.name}/" if path.is_dir() else path.name for path in package}
    there = {name for name in there if name.endswith((".py", "/"))} - {"assets/", "configs/"}
    assert mapped - {"scripts/", "tests/"} == there
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


# Running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """The current folder, with whatever the commands name."""
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    for name in ("A", "B", "star", "dog"):
        write_image(desk / f"{name}.png")
    write_image(desk / "mask.png", "white")
    (desk / "prompts.txt").write_text("a photo of a red star\n", encoding="utf-8")
    shutil.copytree(TINY, desk / "path/to/JanusFlow-1.3B")
    shutil.copytree(TINY / "vae", desk / "path/to/sdxl-vae")
    for metadata in ("geneval/prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"):
        write_geneval(desk / metadata, desk / "detections.jsonl")
    write_dpg(desk / "ELLA/dpg_bench/prompts", desk / "ELLA/dpg_bench/dpg_bench.csv", desk / "answers.jsonl")
    write_wise(desk / "WISE/WISE_legacy/data")
    write_uni_mmmu(desk / "Uni-MMMU/data")
    shutil.copytree(ROOT / "scripts" / "examples", desk / "scripts/examples")
    write_rows(desk / "scripts/examples/data/train.jsonl")
    for name in ("new", "replay"):
        write_rows(desk / f"runs/new_concept/data/{name}.jsonl")
    write_rows(desk / "data/train.jsonl")
    mine = 'output = "runs/mine"\n[[data]]\nkind = "generation"\nmanifest = "data/train.jsonl"\n'
    (desk / "mine.toml").write_text(mine, encoding="utf-8")
    with torch.device("meta"):
        model = JanusFlow(read_config(TINY))
    for seed, name in enumerate(("dog", "sketch")):
        write_adapter(desk / "adapters" / name, model, seed)
    return desk


def small(command: str, url: str) -> list[str]:
    """A command's words with the options that make it small."""
    words, changed = shlex.split(command), []
    if words[0] == "torchrun":  # one process instead of several, which the tests of runs and benchmarks start
        words = ["janusflow-min", *words[words.index("janusflow_min") + 1 :]]
    while words:
        word = words.pop(0)
        if word in REPLACED and words:
            words.pop(0)
            changed += REPLACED[word]
        else:
            changed.append(word)
    for start, more in SMALL.items():
        changed += more if re.match(start, shlex.join(changed)) else []
    return [word.replace("{url}", url) for word in changed]


def option(words: list[str], name: str, default: str) -> Path:
    """The value of an option, the last one where it is repeated."""
    return Path(([default] + [b for a, b in pairwise(words) if a == name])[-1])


def check(words: list[str], printed: str) -> None:
    """Look at what a command must have written, relative to the current folder."""
    name, out = words[1], option(words, "--out", "outputs")
    if name == "demo":
        out = option(words, "--out", "outputs/demo")
        assert (
            len(list(out.glob("*.png"))) == 3 and "What is in the" in printed
        )  # one prompt's two, and the sheet
    elif name in ("generate", "edit"):
        paths = [Path(line) for line in printed.splitlines()]
        assert paths and all(path.is_file() and path.parent == out for path in paths)
    elif name == "understand":
        assert json.loads(printed)["answer"] if "--json" in words else printed.strip()
    elif name == "info":
        assert "parameters" in printed
    elif name == "train" and "--dry-run" in words:
        assert "memory" in printed and "data.0" in printed
    elif name == "train" and "--export" in words:
        assert (Path(printed.strip()) / "model.safetensors").is_file()
    elif name == "train":
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        output = Path(settings.get("output", "."))
        if "output" not in settings:  # the file's own, which counts from its folder
            text = Path(words[2]).read_text(encoding="utf-8")
            output = Path(words[2]).parent / re.findall(r'^output = "(.*)"', text, re.MULTILINE)[0]
        assert (output / "export/model.safetensors").is_file()
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    else:
        assert name == "bench"
        stage = words[3]
        if stage == "compare":
            assert "0 items are better in B" in printed  # a run beside itself
            return
        wanted = {"generate": "manifest.json", "score": "score.json", "report": "report.md"}[stage]
        assert (out / wanted).stat().st_size > 0
        if stage == "generate" and words[2] != "uni_mmmu":
            assert list((out / "images").rglob("*.png"))


@pytest.mark.parametrize("place", PLACES)
def test_every_command_does_what_it_says(place, desk, monkeypatch):
    """Stops: a line that fails as it is printed; results in another folder than the line names; a line that nobody
    tries and that is not in NOT_RUN."""
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    with ChatServer(lambda request, before: GRADES) as server:
        for command in PLACES[place]:
            while variable := re.match(r"(\w+)=(\S+) ", command):
                monkeypatch.setenv(variable[1], variable[2])
                command = command[variable.end() :]
            needs = begins(command, NEEDS)
            if begins(command, NOT_RUN) or (needs and find_spec(NEEDS[needs]) is None):
                continue
            words = small(command, server.url)
            assert words[0] == "janusflow-min", f"{place}: neither run nor in NOT_RUN: {command}"
            there = {path.name for path in desk.iterdir()}
            stdout, stderr = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                status = cli.main(words[1:])
            assert status == 0, f"{place}: {command}\nas: {shlex.join(words)}\n{stderr.getvalue()}"
            check(words, stdout.getvalue())
            new = {path.name for path in desk.iterdir()} - there
            assert new <= {"outputs", "runs"}, f"{place}: {command} wrote {new}"


# Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name != "serving.md"],  # test_serving_page.py
    ids=lambda page: page.name,
)
def test_every_snippet_runs(page, desk):
    """Stops: a call that the library no longer takes, in the first lines that a visitor copies."""
    names = {"__name__": "__main__"}  # a page's blocks follow each other
    for k, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, Python block {k + 1}", "exec"), names)
    if page.name == "README.md":
        assert os.path.getsize("star.png") > 0 and (desk / "my-checkpoint/model.safetensors").is_file()


@pytest.mark.slow
def test_snippets_type_check(tmp_path):
    """Stops: a call on the front page that an editor underlines in red, as `ans.text` once was."""
    pytest.importorskip("mypy")
    pages = [
        page for page in PAGES if blocks(page, "python") and page.name != "serving.md"
    ]  # openai's own types
    files = [tmp_path / f"snippets_{k}.py" for k in range(len(pages))]
    for page, file in zip(pages, files, strict=True):
        file.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import janusflow_min as jf\njf.load(device=3)\n")  # what must be found
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *config, *map(str, [*files, wrong])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(files) >= 2 and len(errors) == 1 and "wrong.py:2" in errors[0], done.stdout + done.stderr
