# SPDX-License-Identifier: MIT
"""What importing the library does and does not do, and which file may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import janusflow_min

PACKAGE = Path(janusflow_min.__file__).parent
CORE = {
    "torch",
    "safetensors",
    "tokenizers",
    "diffusers",
    "PIL",
    "numpy",
    "einops",
    "tqdm",
    "huggingface_hub",
}
LAZY = {"diffusers", "huggingface_hub"}  # imported by the function that needs them
MODEL_FILES = ("config", "llama", "siglip", "uvit", "flow", "model")
CHECKPOINT_FILES = ("official", "checkpoint", "tokenizer", "processor", "vae")
FLOOR_1 = {*MODEL_FILES, *CHECKPOINT_FILES}
HELPERS = {"files", "checks", "pixels", "prefetch", "progress", "diagnose", "weights"}  # of all floors
FLOOR_3 = {"cli", "webui", "commands", "serve", "integrations", "__main__"}
JUDGES = (
    PACKAGE / "benchmarks" / "judge_models.py"
)  # models of others that judge pictures, imported when first needed

PROBE = """
import json, os, random, sys, threading
import torch, numpy, einops, tokenizers, safetensors.torch, tqdm, PIL.Image

def state():
    return dict(
        torch=torch.random.get_rng_state().tolist(), seed=torch.initial_seed(), python=repr(random.getstate()),
        numpy=repr(numpy.random.get_state()), dtype=str(torch.get_default_dtype()), grad=torch.is_grad_enabled(),
        device=str(torch.empty(0).device), threads=torch.get_num_threads(), env=dict(os.environ), cwd=os.getcwd(),
        deterministic=torch.are_deterministic_algorithms_enabled(), path=list(sys.path),
        tf32=[torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        precision=torch.get_float32_matmul_precision(), cuda=torch.cuda.is_initialized(),
        bomb=PIL.Image.MAX_IMAGE_PIXELS, files=sorted(os.listdir(".")), running=threading.active_count(),
    )

before, modules = state(), set(sys.modules)
import janusflow_min
for name in janusflow_min.__all__:
    getattr(janusflow_min, name)
after = state()
print("---", json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "all": sorted(sys.modules), "new": sorted(set(sys.modules) - modules),
}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict:
    """What `import janusflow_min` does in a fresh interpreter whose core dependencies are there already."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{PROBE}"],
        cwd=tmp_path_factory.mktemp("cwd"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed, result = done.stdout.split("---")
    assert printed == "" and done.stderr == "", "the import prints or warns"
    return json.loads(result)


def test_only_core_dependencies_are_imported(imported):
    """Stops: a heavy library that comes with the first line, or one that an installation lacks."""
    new = {name.split(".")[0] for name in imported["new"]} - set(sys.stdlib_module_names)
    assert new <= (CORE - LAZY) | {"janusflow_min"}
    heavy = {
        "diffusers",
        "transformers",
        "timm",
        "torchvision",
        "matplotlib",
        "accelerate",
        "scipy",
        "gradio",
    }
    assert not heavy & {name.split(".")[0] for name in imported["new"]}


def test_later_floors_are_not_imported(imported):
    """Stops: the command line, training or benchmarks loaded by everyone."""
    ours = {name.split(".")[1] for name in imported["all"] if name.startswith("janusflow_min.")}
    assert ours >= FLOOR_1
    assert not ours & (FLOOR_3 | {"training", "benchmarks", "shapes", "things", "worlds"})


HELP = """
import sys
{statement}
heavy = {{"torch", "diffusers", "transformers", "tokenizers", "datasets", "fastapi", "pydantic", "gradio"}}
heavy &= {{m.split(".")[0] for m in sys.modules}}
assert not heavy, heavy
"""
EVERY_HELP = """
import argparse, contextlib, io
from janusflow_min.cli import build_parser, main

def paths(parser, words=()):
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from paths(child, (*words, name))

found = list(paths(build_parser()))
assert ("generate",) in found and ("bench", "geneval", "score") in found, found
for words in found:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert "usage:" in text.getvalue(), words
"""


LOOK = "import janusflow_min; dir(janusflow_min); janusflow_min.__version__"


@pytest.mark.parametrize("statement", [LOOK, EVERY_HELP], ids=["import", "help"])
def test_no_torch_before_it_is_needed(statement):
    """Stops: four seconds before the first line of --help, for an import that nobody's question needs."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})" + HELP.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_package_s_names_are_what_they_say():
    """Stops: a lazy name that is missing, misspelt or hidden from `dir`."""
    assert {*janusflow_min.__all__} <= {*dir(janusflow_min)}
    for name in janusflow_min.__all__:
        assert getattr(janusflow_min, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = janusflow_min.nothing


def test_the_import_changes_nothing(imported):
    """Stops: global seeding, a default dtype, threads or environment variables set at import."""
    assert imported["changed"] == []


# The house ------------------------------------------------------------------------------------------------------


def imports(path: Path) -> list[tuple[str, str, bool]]:
    """(top-level package, the part of ours or "", at module level) of every import of a file, in functions too."""
    package = ["janusflow_min", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            whole = module == "janusflow_min"  # from . import flow
            names = [f"{module}.{alias.name}" for alias in node.names] if whole else [module]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            found.append((top, rest[0] if top == "janusflow_min" and rest else "", id(node) in outer))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def inner(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    return {part for top, part, _ in imports(path) if top == "janusflow_min"}


def test_floor_one_imports_only_floor_one():
    """Stops: a model that needs the pipeline, so that nobody can read or reuse it alone."""
    for name in FLOOR_1:
        assert inner(PACKAGE / f"{name}.py") <= FLOOR_1 | HELPERS, name
    for name in HELPERS:
        assert inner(PACKAGE / f"{name}.py") <= HELPERS | {"official"}, name


@pytest.mark.parametrize(
    "names, most",
    [
        (MODEL_FILES, 850),
        ((*CHECKPOINT_FILES, "weights", "pixels"), 1295),  # 850 is wanted
    ],
    ids=["the model", "its files"],
)
def test_floor_one_is_read_in_one_sitting(names, most):
    """Stops: a model that grows past what a newcomer reads."""
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in names}
    assert sum(lines.values()) <= most, lines


BUDGETS = {  # lines at most
    "the rest of the package": 7595,  # 4600 is wanted
    "prefetch": 112,
    "measuring the host": 165,
    "quantization": 302,
    "LoRA": 216,  # 120 is wanted
    "hub": 295,
    "server": 1072,  # 450 is wanted
    "page": 357,  # 250 is wanted
    "lmms-eval": 80,
    "ComfyUI": 150,
    "training": 4022,  # 2300 is wanted
    "post-training": 495,
    "benchmarks": 6896,  # 4200 is wanted
    "worlds": 2479,  # of shapes and of things, with their judges; 2076 is wanted
    "scripts": 3509,  # 2200 is wanted
}


@pytest.mark.parametrize("part", BUDGETS)
def test_each_part_keeps_its_budget(part):
    """Stops: a library that grows until nobody reads it. Something new makes room for itself."""
    after = {PACKAGE / "training" / f"{name}.py" for name in ("nft", "distill", "rounds", "rewards")}
    training = set((PACKAGE / "training").rglob("*.py")) - after
    benchmarks = set((PACKAGE / "benchmarks").rglob("*.py"))
    worlds = {path for name in ("shapes", "things") for path in (PACKAGE / name).rglob("*.py")}
    scripts = set((PACKAGE.parent / "scripts").rglob("*.py"))
    server = {*(PACKAGE / "serve").rglob("*.py"), PACKAGE / "commands" / "serve.py"}
    files = {"training": training, "benchmarks": benchmarks, "scripts": scripts, "server": server}
    files |= {
        "worlds": {*worlds, PACKAGE / "worlds.py"},
        "post-training": after,
        "LoRA": {PACKAGE / "lora.py"},
        "quantization": {PACKAGE / "fast" / "quantized.py", PACKAGE / "fast" / "products.py"},
        "prefetch": {PACKAGE / "prefetch.py"},
        "hub": {PACKAGE / "hub.py", PACKAGE / "publish.py"},
    }
    doors = {"lmms-eval": "lmms_eval.py", "ComfyUI": "comfyui.py"}
    files |= {name: {PACKAGE / "integrations" / file} for name, file in doors.items()}
    scripts.discard(PACKAGE.parent / "scripts" / "resources.py")
    files |= {"measuring the host": {PACKAGE.parent / "scripts" / "resources.py"}}
    files |= {"page": {PACKAGE / "webui.py", PACKAGE / "commands" / "ui.py"}}
    counted = files.get(part, set(FILES).difference(*files.values()))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in counted)
    assert lines <= BUDGETS[part]


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported_modules(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports, in functions too; not what only a type checker reads, and not
    the package itself, which imports its parts when they are asked for."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    passed_over = {id(inside) for node in typing for inside in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in passed_over:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names} & set(known)
            found |= submodules or {module}
        elif isinstance(node, ast.Import) and id(node) not in passed_over:
            found |= {alias.name for alias in node.names}
    return (found & set(known)) - {name, "janusflow_min"}


def test_no_modules_import_each_other():
    """Stops: two files that can only be understood, moved or tested together."""
    known = modules()
    graph = {name: imported_modules(name, path, known) for name, path in known.items()}
    assert any(graph.values())
    while free := {name for name, needed in graph.items() if not needed & set(graph)}:
        graph = {name: needed for name, needed in graph.items() if name not in free}
    rounds = {name: sorted(needed & set(graph)) for name, needed in graph.items()}
    assert not rounds, f"a cycle is among {rounds}"


def test_the_flow_imports_no_model():
    """Stops: a sampler tied to one network: `flow.py` is functions of a velocity callable."""
    assert inner(PACKAGE / "flow.py") == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_a_door(path):
    """Stops: logic that lives in the command line, where a user of the library cannot reach it."""
    if path.relative_to(PACKAGE).with_suffix("").parts[0] not in FLOOR_3:
        assert not inner(path) & FLOOR_3


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_vae_imports_diffusers_and_only_when_needed(path):
    """Stops: seconds of import for who only asks a question, and witnesses used as dependencies."""
    outside = {(top, outer) for top, _, outer in imports(path)}
    if path != PACKAGE / "vae.py":
        assert not {top for top, _ in outside} & {"diffusers"}
    foreign = {"timm", "torchvision", "attrdict"} | (set() if path == JUDGES else {"transformers"})
    assert not {top for top, _ in outside} & foreign
    assert not {top for top, outer in outside if outer} & (LAZY | {"transformers", "openai", "matplotlib"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_open_with_licence_and_purpose(path):
    """Stops: a file without its licence line or without the docstring that says what it is."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text))
