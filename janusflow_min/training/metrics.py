# SPDX-License-Identifier: MIT
"""What a run shows: metrics as JSON lines and in TensorBoard, sheets of pictures, answers, and a plot at the end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..contact_sheet import contact_sheet, save_png
from ..files import atomic_write
from ..pipeline import Pipeline
from ..processor import Processor
from .config import Config


class Report:
    """Writes into the run's folder; with `folder` None it computes the same and writes nothing (a sharded model
    paints on all ranks together). `step`: where the run goes on; what was written of later steps is dropped."""

    def __init__(self, folder: Path | None, config: Config, processor: Processor, step: int):
        self.folder, self.config, self.board = folder, config, None
        if folder is None:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in rows(folder / name) if row["step"] <= step]
            atomic_write(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        if config.report.tracker == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def metrics(self, step: int, row: dict, file: str = "metrics.jsonl") -> None:
        with (self.folder / file).open("a", encoding="utf-8") as f:
            print(json.dumps({"step": step, **row}, ensure_ascii=False), file=f)
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "time":
                    self.board.add_scalar(
                        key if file == "metrics.jsonl" else f"validation/{key}", value, step
                    )
            self.board.flush()

    def show(self, pipe: Pipeline, step: int, validation: dict | None) -> None:
        """Paint the fixed prompts with fixed seeds, ask the fixed questions, note the validation loss."""
        r, row = self.config.report, dict(validation or {})
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
            row["said"] = [answer.text.strip() for answer in answers]
        if self.folder is not None and row:
            self.metrics(step, row, "samples.jsonl")

    def plot(self) -> None:
        """`curves.png`, where matplotlib is installed."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        steps, shown = rows(self.folder / "metrics.jsonl"), rows(self.folder / "samples.jsonl")
        figure = Figure(figsize=(11, 7), layout="constrained")
        for k, key in enumerate(("loss", "flow", "answers", "alignment", "norm", "lr"), start=1):
            axes = figure.add_subplot(2, 3, k, title=key, xlabel="step")
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


def rows(path: Path) -> list[dict]:
    """The whole lines of a JSON-lines file; the last one may have been cut off with its run."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
