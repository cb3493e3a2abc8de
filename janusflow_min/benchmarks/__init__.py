# SPDX-License-Identifier: MIT
"""Benchmarks: what a model is asked, and how its images and answers are judged.

A benchmark is a module with the names of `Benchmark`, and an entry in `MODULES`; the command line needs nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .runner import Coverage, Settings


class Benchmark(Protocol):
    """What a benchmark's module offers.

    Importing it must stay cheap: models and the pipeline are imported by the functions that need them. Every stage
    may be interrupted and called again.
    """

    TITLE: str  # its name in a report
    SUMMARY: str  # one line for --help
    OPTIONS: dict[str, type]  # "generate" and "score": dataclasses whose fields are made by `options.option`

    def generate(self, settings: Settings, out: str | Path, options: Any) -> Coverage:
        """Generate what is missing of the run in the folder `out`, see `runner.run`."""

    def score(self, run: str | Path, options: Any) -> dict[str, Any]:
        """Judge what is there; returns score.json's content, see `scoring.ScoringRun`. options has `progress`."""

    def report(self, run: str | Path) -> list[Path]:
        """Write the report, see `report.write_report`; returns the files' paths."""


MODULES = {  # name on the command line -> module in this package
    "geneval": "geneval",
    "dpg_bench": "dpg_bench",
    "wise": "wise",
    "uni_mmmu": "uni_mmmu",
    "shapes": "shapes",
    "things": "things",
}
