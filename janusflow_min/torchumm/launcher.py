# SPDX-License-Identifier: MIT
"""TorchUMM's own, unmodified runners with our backbone in the place of its "janus_flow".

TorchUMM (AIFrontierLab/TorchUMM, read at commit 083395e) has no plugin hook: `umm eval` starts its runners as
processes of their own, where a registration made by the caller is lost. So this launcher executes a runner's file as
`__main__` in this process, with `hook/sitecustomize.py` installed in it and in every Python process below it: there
`janus_flow` is ours, and TorchUMM's other adapters are refused instead of imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .backend import NAME, PARAMS, normalized_name, unknown_params

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "torchumm"
HOOK = Path(__file__).resolve().parent / "hook"
RUNNERS = {
    "geneval": "eval/generation/geneval/run_generation.py",
    "dpg_bench": "eval/generation/dpg_bench/run_generation_and_eval.py",
    "wise": "eval/generation/wise/run_wise_eval.py",
    "uni_mmmu": "eval/generation/uni_mmmu/run_generation.py",
}
EVALUATIONS = ("mme", "mmbench", "mmstar", "mmmu", "mmvet", "mathvista", "unified_bench")  # of `umm eval`
SHIPPED = (*RUNNERS, *EVALUATIONS)  # a configuration for each
IN_PROCESS = ("infer", "eval")  # subcommands of `umm`


def launch(
    root: str | Path, runner: str, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> int:
    """Run `runner` of the checkout `root` with the configuration; returns its exit code.

    runner: one of SHIPPED, "infer", "eval", or a .py file, from the root or absolute. overrides: "a.b=value".
    Raises ValueError or FileNotFoundError before anything is loaded, where root, runner or config are not usable.
    """
    root = Path(root).expanduser().resolve()
    if not (root / "src" / "umm" / "core" / "registry.py").is_file():
        raise FileNotFoundError(f"{root} is not a checkout of TorchUMM: src/umm/core/registry.py is missing")
    command = "eval" if runner in EVALUATIONS else runner
    script = None if command in IN_PROCESS else _script(root, runner)
    config = _config(runner, config)
    with _as_program(root, script, ["--config", str(config)], overrides):
        import umm

        if root not in Path(umm.__file__ or "").resolve().parents:
            raise ValueError(
                f"the package umm comes from {umm.__file__}, not from {root}; run in a fresh process"
            )
        _check(config, runner, overrides)
        if script is not None:
            return _exit_code(lambda: runpy.run_path(str(script), run_name="__main__"))
        from umm.cli.main import main

        options = [text for override in overrides for text in ("--set", override)]
        return _exit_code(lambda: main([command, "--config", str(config), *options]))


def _script(root: Path, runner: str) -> Path:
    path = root / RUNNERS.get(runner, runner)  # an absolute runner stays what it is
    if path.suffix != ".py":
        raise ValueError(
            f"RUNNER must be one of {', '.join([*SHIPPED, *IN_PROCESS])} or a .py file, got {runner!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no runner {path}")
    return path


def _config(runner: str, config: str | Path | None) -> Path:
    if config is None:
        if runner not in SHIPPED:
            raise ValueError(f"--config is needed; configurations are shipped for {', '.join(SHIPPED)}")
        return CONFIGS / f"{runner}.yaml"
    path = Path(config).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no configuration {path}; the shipped ones are in {CONFIGS}")
    return path


def _check(config: Path, runner: str, overrides: Sequence[str]) -> None:
    """What TorchUMM would find out late or not at all. `overrides` become this process's."""
    from umm.core.config import load_config, set_config_overrides

    set_config_overrides(list(overrides))
    try:
        cfg = load_config(config)
    except RuntimeError as error:  # no PyYAML
        raise ValueError(f"{config.name}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{config} or --set cannot be read: {error}") from None  # PyYAML's own errors
    if unset := sorted(set(re.findall(r"\$\{(\w+)\}", json.dumps(cfg, default=str)))):
        raise ValueError(f"{config}: these environment variables are not set: {', '.join(unset)}")
    if runner in SHIPPED and runner != "dpg_bench" and not isinstance(cfg.get(runner), Mapping):
        raise ValueError(f"{config}: no block {runner!r}; is it another benchmark's configuration?")
    block = cfg.get("inference", cfg)
    block = block if isinstance(block, Mapping) else {}
    named = block.get("backbone")
    if normalized_name(named) != NAME and not block.get("infer_config"):
        raise ValueError(f"{config}: inference.backbone must be {NAME!r}, got {named!r}")
    request = block.get("request")
    params = request.get("params") if isinstance(request, Mapping) else None
    if unknown := unknown_params(params if isinstance(params, Mapping) else None):
        raise ValueError(
            f"{config}: inference.request.params: JanusFlow has no {', '.join(unknown)}; it has {', '.join(PARAMS)}"
        )


@contextlib.contextmanager
def _as_program(
    root: Path, script: Path | None, arguments: list[str], overrides: Sequence[str]
) -> Iterator[None]:
    """This process as `python script arguments` has it: TorchUMM's `src` on the path, and our hook, here and in
    PYTHONPATH for the processes below. Restored afterwards."""
    hook = runpy.run_path(str(HOOK / "sitecustomize.py"))
    path, argv, environment = list(sys.path), list(sys.argv), dict(os.environ)
    sys.path[:0] = [str(root / "src")] if script is None else [str(script.parent), str(root / "src")]
    sys.argv = [str(script or "umm"), *arguments]
    kept = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOK), str(root / "src"), kept]))
    os.environ[hook["OVERRIDES"]] = json.dumps(list(overrides))
    finder = hook["install"]()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path[:], sys.argv = path, argv
        os.environ.clear()
        os.environ.update(environment)


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
