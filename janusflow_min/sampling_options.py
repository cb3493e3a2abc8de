# SPDX-License-Identifier: MIT
"""How images are sampled: one definition for `Pipeline.generate`, the command line and the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import checks
from .checks import MAX_STEPS
from .options import finite, option, whole

SOLVER_NAMES = ("euler", "midpoint", "heun", "ab2")  # of solvers.SOLVERS, which needs torch
EDIT_METHODS = ("flowedit", "invert", "sdedit")  # editing.py says what they do
SHARED_OPTIONS = ("num_inference_steps", "solver", "timestep_shift")  # those that `edit` takes as well
DEFAULTS: Mapping[str, Any] = {  # the reference's
    "num_inference_steps": 30,
    "solver": "euler",
    "timestep_shift": 1.0,
    "guidance_interval": (0.0, 1.0),
}
PRESETS: Mapping[
    str, Mapping[str, Any]
] = {  # take the place of DEFAULTS; docs/sampling.md has the measurements
    "quick": dict(num_inference_steps=12, solver="ab2", timestep_shift=2.0, guidance_interval=(0.0, 0.5)),
}


def low_high(text: str) -> tuple[float, float]:
    """The type of an option that takes LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers with a comma between, got {text!r}") from None
    return low, high


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """None takes the preset's value, else that of DEFAULTS."""

    cfg_weight: float = option("strength of the guidance; 1 is none", 2.0, kind=finite())
    num_inference_steps: int | None = option(
        f"of the solver, at most {MAX_STEPS:,} (default: 30)", None, kind=whole(1, MAX_STEPS)
    )
    solver: str | Callable[..., Any] | None = option(
        "midpoint and heun evaluate the model twice a step (default: euler)", None, choices=SOLVER_NAMES
    )
    timestep_shift: float | None = option(
        "above 1: more of the steps near the noise (default: 1)", None, kind=finite(0, above=True)
    )
    guidance_interval: tuple[float, float] | None = option(
        "guidance for LOW <= t < HIGH alone, 0 noise, 1 image (default: 0,1)", None, kind=low_high
    )
    guidance_rescale: float = option("0 to 1: tones down what guidance makes vivid", 0.0, kind=finite(0, 1))
    negative_prompt: str | None = option("what images should not show", None)
    best_of: int = option("candidates for each image, of which the best is kept", 1, kind=whole())
    checker: str | None = option("what asks about candidates: shapes, or MODULE:FUNCTION", None)
    preset: str | None = option("other defaults; quick is a few steps", None, choices=tuple(PRESETS))

    def resolved(self) -> dict[str, Any]:
        """Every option but the preset, checked, with the value that holds. ValueError names the one that is wrong."""
        if self.preset is not None:
            checks.one_of("preset", self.preset, PRESETS)
        usual = {**DEFAULTS, **PRESETS.get(self.preset or "", {})}
        own = {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}
        own = {k: usual.get(k) if v is None else v for k, v in own.items() if k != "preset"}
        own["cfg_weight"] = checks.number("cfg_weight", own["cfg_weight"])
        own["num_inference_steps"] = checks.whole(
            "num_inference_steps", own["num_inference_steps"], most=MAX_STEPS
        )
        if own["solver"] not in SOLVER_NAMES and not callable(own["solver"]):
            names = ", ".join(SOLVER_NAMES)
            raise ValueError(
                f"solver must be one of {names} or a function, got {checks.shown(own['solver'])}"
            )
        own["timestep_shift"] = checks.number("timestep_shift", own["timestep_shift"], least=0, above=True)
        own["best_of"] = checks.whole("best_of", own["best_of"])
        own["guidance_rescale"] = checks.number("guidance_rescale", own["guidance_rescale"], least=0, most=1)
        ends = own["guidance_interval"]
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            raise ValueError(f"guidance_interval must be two times (low, high), got {checks.shown(ends)}")
        low, high = (checks.number("guidance_interval", end, least=0, most=1) for end in ends)
        if low > high:
            raise ValueError(f"guidance_interval must be in order, got ({low:g}, {high:g})")
        return own | {"guidance_interval": (low, high)}
