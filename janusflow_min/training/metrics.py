# SPDX-License-Identifier: MIT
"""Reports of a run: metrics as JSON lines and to a tracker, generated images, answers, and curves at the end."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..contact_sheet import contact_sheet, save_png
from ..files import atomic_write
from ..pipeline import Pipeline
from .config import Config

CLOCK = ("time", "samples_per_second", "tokens_per_second", "memory_gib")  # what differs from run to run


class Tracker(Protocol):
    """Receives the metrics besides metrics.jsonl. `Trainer` accepts any object with this method."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Client:
    """A run of wandb or trackio, which share an API; a resumed run keeps its name there."""

    def __init__(self, name: str, folder: Path, config: Config):
        where = {"name": f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}", "resume": "allow"}
        if name == "wandb":
            where |= {"id": where["name"], "dir": str(folder)}
        self.run = import_module(name).init(project=config.report.project, config=config.to_dict(), **where)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


def make_tracker(config: Config, folder: Path, first: int) -> Tracker | None:
    """The tracker in the settings; None if tensorboard is not installed. ImportError for a missing client."""
    name = config.report.tracker
    try:
        return TensorBoard(folder, first) if name == "tensorboard" else Client(name, folder, config)
    except ImportError:
        if name == "tensorboard":
            return None
        raise ImportError(f'report.tracker = "{name}" needs the package: pip install {name}') from None


class Report:
    """Writes into the run's folder; with `folder` None it computes the same and writes nothing (a sharded model
    generates on all ranks together). `step`: where the run continues; lines of later steps are dropped."""

    def __init__(self, folder: Path | None, config: Config, tracker: Tracker | None = None, step: int = 0):
        self.folder, self.config, self.tracker = folder, config, tracker
        if folder is None:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in read_lines(folder / name) if row["step"] <= step]
            atomic_write(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        if tracker is None and config.report.tracker != "none":
            self.tracker = make_tracker(config, folder, step + 1)

    def close(self) -> None:
        if isinstance(self.tracker, TensorBoard | Client):
            self.tracker.close()

    def metrics(self, step: int, row: Mapping[str, Any], file: str = "metrics.jsonl") -> None:
        """Write a row. A number that is not finite becomes null, since JSON has no other way."""
        assert self.folder is not None
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        row = {k: None if isinstance(v, float) and k not in numbers else v for k, v in row.items()}
        with (self.folder / file).open("a", encoding="utf-8") as f:
            print(json.dumps({"step": step, **row}, ensure_ascii=False, allow_nan=False), file=f)
        if self.tracker is not None:
            prefix = "" if file == "metrics.jsonl" else "validation/"
            self.tracker.log({prefix + k: float(v) for k, v in numbers.items() if k != "time"}, step)

    def show(self, pipe: Pipeline, step: int, validation: Mapping[str, float | None] | None) -> None:
        """Generate the fixed prompts with fixed seeds, ask the fixed questions, note the validation loss."""
        r, row = self.config.report, dict[str, Any](validation or {})
        if r.prompts:
            out = pipe.generate(
                list(r.prompts),
                parallel_size=1,
                cfg_weight=r.cfg_weight,
                num_inference_steps=r.num_inference_steps,
                seed=0,
                progress=False,
            )
            if self.folder is not None:
                sheet = contact_sheet([(p, [i]) for p, i in zip(out.prompts, out.images, strict=True)])
                path = self.folder / "samples" / f"step-{step:08d}.png"
                path.unlink(missing_ok=True)  # of a run that was stopped behind its last checkpoint
                row["sheet"] = str(save_png(sheet, path).relative_to(self.folder))
        if r.questions:
            images = [image or None for image in r.images] or [None] * len(r.questions)
            answers = pipe.understand(list(r.questions), images, max_new_tokens=64)
            row["answered"] = [answer.text.strip() for answer in answers]
        if self.folder is not None and row:
            self.metrics(step, row, "samples.jsonl")

    def plot(self) -> None:
        """`curves.png` of every loss, the gradient's norm and the learning rate, where matplotlib is installed."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        assert self.folder is not None
        steps, shown = read_lines(self.folder / "metrics.jsonl"), read_lines(self.folder / "samples.jsonl")
        keys = curves(steps[-1]) if steps else []
        figure = Figure(figsize=(11, 3.5 * math.ceil(len(keys) / 3)), layout="constrained")
        for k, key in enumerate(keys, start=1):
            axes = figure.add_subplot(math.ceil(len(keys) / 3), 3, k, title=key, xlabel="step")
            points = [(row["step"], row[key]) for row in steps if row.get(key) is not None]
            if points:
                x, y = np.array(points).T
                axes.plot(x, y, linewidth=0.8, label="training")
                if (width := len(y) // 40) > 1 and key != "lr":
                    mean = np.convolve(y, np.full(width, 1 / width), "valid")
                    axes.plot(x[width - 1 :], mean, label=f"its mean over {width} steps")
            points = [(row["step"], row[key]) for row in shown if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label="validation")
            if axes.lines:
                axes.legend()
        FigureCanvasAgg(figure).print_png(str(self.folder / "curves.png"))


def curves(row: Mapping[str, Any]) -> list[str]:
    """The keys of a step's row that stand for the whole step: losses, the gradient's norm, the learning rate."""
    return [k for k in row if k not in ("step", "epoch", "padding", *CLOCK) and not k.startswith("flow_t")]


def plain_line(step: int, steps: int, row: Mapping[str, Any], seconds_left: float) -> str:
    """A step in one line, for runs without a terminal."""
    numbers = [f"{key} {row[key]:.4g}" for key in curves(row) if row[key] is not None]
    left = timedelta(seconds=round(seconds_left))
    return f"step {step:,} of {steps:,}: {', '.join(numbers)}, {row['samples_per_second']:.3g} samples/s, {left} left"


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """The mean of each metric from its sum and number of samples; None if there were none."""
    return {name: total / round(count) if round(count) else None for name, (total, count) in sums.items()}


def memory_gib(device: torch.device) -> float | None:
    """Peak memory of this process: on the GPU, else resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a killed run may have left half of one at the end."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
