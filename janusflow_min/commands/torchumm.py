# SPDX-License-Identifier: MIT
"""`janusflow-min torchumm`: TorchUMM's own, unmodified runners with our backbone in the place of "janus_flow".

TorchUMM (AIFrontierLab/TorchUMM, read at commit 083395e) has no plugin hook: `umm eval` starts each generation
runner as a process of its own, where a registration made by the caller is lost. So this launcher puts TorchUMM's
`src` on the path, registers `JanusFlowBackbone` under its name before the built-in ones (which never replace a
name that is taken), gives the other built-in names a factory that says why it fails, so that none of their modules
is imported, and executes the runner's file as `__main__` in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "janus_flow"  # torchumm.NAME; that module loads torch, which `--help` should not wait for
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "torchumm"
RUNNERS = {
    "geneval": "eval/generation/geneval/run_generation.py",
    "dpg_bench": "eval/generation/dpg_bench/run_generation_and_eval.py",
    "wise": "eval/generation/wise/run_wise_eval.py",
    "uni_mmmu": "eval/generation/uni_mmmu/run_generation.py",
}
IN_PROCESS = ("infer", "eval")  # subcommands of `umm`
OTHERS = ("bagel", "janus_pro", "show_o", "show_o2", "emu3", "omnigen2", "blip3o", "tokenflow", "deepgen")
OTHERS += ("emu3_5", "mmada", "ovis_u1")


def add_parser(command: Callable[..., argparse.ArgumentParser], option: Callable[..., None]) -> None:
    """Add `torchumm` to the command line; `command` and `option` are the parser's own helpers."""
    new = command(
        torchumm,
        "run TorchUMM's runners with this library's model",
        "Run an unmodified runner of a TorchUMM checkout with this library in the place of its janus_flow.\n"
        f"RUNNER is one of its generation runners ({', '.join(RUNNERS)}), infer or eval (as\n"
        "`umm infer` and `umm eval`), or a .py file of the checkout. Relative paths in a configuration are\n"
        "TorchUMM's: from the checkout's root. Without --config the one shipped for that runner is taken.",
        """  janusflow-min torchumm geneval --root TorchUMM
  janusflow-min torchumm dpg_bench --root TorchUMM --set inference.backbone_cfg.model_path=tiny
  janusflow-min torchumm eval --root TorchUMM --config my_geneval.yaml
  torchrun --nproc-per-node 4 -m janusflow_min torchumm dpg_bench --root TorchUMM""",
    )
    new.add_argument("runner", metavar="RUNNER", help="what to run")
    option(new, "--root", "DIR", "a checkout of TorchUMM; without: $TORCHUMM_ROOT")
    option(new, "--config", "FILE", "a configuration in TorchUMM's format, YAML or JSON")
    new.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one value, as umm's own --set",
    )


def torchumm(args: argparse.Namespace) -> int:
    root = args.root or os.environ.get("TORCHUMM_ROOT")
    if not root:
        raise ValueError("--root: where is the checkout of TorchUMM? (or set TORCHUMM_ROOT)")
    return launch(root, args.runner, args.config, args.set)


def launch(root: str | Path, runner: str, config: str | Path | None = None, overrides: list[str] = ()) -> int:
    """Run `runner` of the checkout `root` with the configuration; returns its exit code.

    runner: a key of RUNNERS, "infer", "eval", or a .py file, from the root or absolute. overrides: "a.b=value".
    Raises ValueError or FileNotFoundError before anything is loaded, where root, runner or config are not usable.
    """
    root = Path(root).expanduser().resolve()
    if not (root / "src" / "umm" / "core" / "registry.py").is_file():
        raise FileNotFoundError(f"{root} is no checkout of TorchUMM: src/umm/core/registry.py is not there")
    script = None if runner in IN_PROCESS else _script(root, runner)
    config = _config(runner, config)
    with _as_program(root, script, ["--config", str(config)]):
        register(root)
        _check(config, runner, overrides)
        if script is not None:
            return _exit_code(lambda: runpy.run_path(str(script), run_name="__main__"))
        from umm.cli.main import main

        options = [text for override in overrides for text in ("--set", override)]
        with _children(root, overrides):
            return _exit_code(lambda: main([runner, "--config", str(config), *options]))


def register(root: Path) -> None:
    """Register our backbone in the registry of TorchUMM, whose `src` is on the path."""
    import umm
    from umm.core import registry

    from ..torchumm import JanusFlowBackbone

    if root not in Path(umm.__file__ or "").resolve().parents:
        raise ValueError(
            f"the package umm comes from {umm.__file__}, not from {root}; run in a fresh process"
        )
    registry.register("backbone", NAME, JanusFlowBackbone)
    for name in OTHERS:
        if name not in registry.list_registered("backbone"):
            registry.register("backbone", name, _absent(name))


def _absent(name: str) -> Callable[[], Any]:
    def factory() -> Any:
        raise RuntimeError(f"backbone {name!r} is TorchUMM's own; this launcher provides {NAME!r} alone")

    return factory


def _script(root: Path, runner: str) -> Path:
    path = root / RUNNERS.get(runner, runner)  # an absolute runner stays what it is
    if path.suffix != ".py":
        raise ValueError(
            f"RUNNER must be one of {', '.join([*RUNNERS, *IN_PROCESS])} or a .py file, got {runner!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no runner {path}")
    return path


def _config(runner: str, config: str | Path | None) -> Path:
    if config is None:
        if runner not in RUNNERS:
            raise ValueError(f"--config is needed; configurations are shipped for {', '.join(RUNNERS)}")
        return CONFIGS / f"{runner}.yaml"
    path = Path(config).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no configuration {path}; the shipped ones are in {CONFIGS}")
    return path


def _check(config: Path, runner: str, overrides: list[str]) -> None:
    """What TorchUMM would find out late or not at all. `overrides` become this process's."""
    from umm.core.config import load_config, set_config_overrides

    set_config_overrides(list(overrides))
    try:
        cfg = load_config(config)
    except RuntimeError as error:  # no PyYAML
        raise ValueError(f"{config.name}: {error}") from None
    except Exception as error:
        if isinstance(error, ValueError | OSError):
            raise
        raise ValueError(f"{config}: not readable: {error}") from None  # PyYAML's own errors
    if unset := sorted(set(re.findall(r"\$\{(\w+)\}", json.dumps(cfg, default=str)))):
        raise ValueError(f"{config}: these environment variables are not set: {', '.join(unset)}")
    if runner in RUNNERS and runner != "dpg_bench" and not isinstance(cfg.get(runner), Mapping):
        raise ValueError(f"{config}: no block {runner!r}; is it another benchmark's configuration?")
    block = cfg.get("inference", cfg)
    named = block.get("backbone") if isinstance(block, Mapping) else None
    if named != NAME and not (isinstance(block, Mapping) and block.get("infer_config")):
        raise ValueError(f"{config}: inference.backbone must be {NAME!r}, got {named!r}")


@contextlib.contextmanager
def _as_program(root: Path, script: Path | None, arguments: list[str]) -> Iterator[None]:
    """sys.path and sys.argv as `python script arguments` has them, with TorchUMM's `src`; restored afterwards."""
    path, argv = list(sys.path), list(sys.argv)
    sys.path[:0] = [str(root / "src")] if script is None else [str(script.parent), str(root / "src")]
    sys.argv = [str(script or "umm"), *arguments]
    try:
        yield
    finally:
        sys.path[:], sys.argv = path, argv


@contextlib.contextmanager
def _children(root: Path, overrides: list[str]) -> Iterator[None]:
    """`umm eval` starts its runners by subprocess.run: the generation runners then go through this launcher too."""
    original = subprocess.run

    def run(command: Any, *args: Any, **options: Any) -> Any:
        ours = through_launcher(command, root, overrides)
        if ours is not command:
            env = dict(options.get("env") or os.environ)
            package = str(Path(__file__).resolve().parents[2])
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), package]))
            options["env"] = env
        return original(ours, *args, **options)

    subprocess.run = run
    try:
        yield
    finally:
        subprocess.run = original


def through_launcher(command: Any, root: Path, overrides: list[str]) -> Any:
    """[python or torchrun ..., RUNNER.py, --config, X] -> the same through this module; others as they are."""
    if not isinstance(command, list):
        return command
    for name, runner in RUNNERS.items():
        if str(root / runner) in command:
            at = command.index(str(root / runner))
            options = [text for override in overrides for text in ("--set", override)]
            launcher = ["-m", "janusflow_min", "torchumm", name, "--root", str(root)]
            return [*command[:at], *launcher, *command[at + 1 :], *options]
    return command


def _exit_code(run: Callable[[], Any]) -> int:
    """0, or what the program exits with; a text of SystemExit goes to stderr, as Python does."""
    try:
        result = run()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    return result if isinstance(result, int) else 0
