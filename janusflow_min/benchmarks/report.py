# SPDX-License-Identifier: MIT
"""Scores and reports, the same for every benchmark: `score.json`, then `report.json`, `report.md`, `report.png`.

A number is only a headline where the whole benchmark was scored: all items of the published set, none missing. Less
gives a partial report, with how many of how many beside every value. The report stands beside the published numbers,
each with its protocol, and holds what the number depends on: input hashes, checkpoint, settings, judge, options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .runner import RunFolder, read_json

MAX_NOTE = 300  # characters of a note in the Markdown


@dataclass(frozen=True)
class Published:
    """A published row. scores: group -> value, on the benchmark's scale."""

    name: str
    protocol: str
    scores: Mapping[str, float]
    overall: float | None


@dataclass(frozen=True)
class Score:
    """What a scoring stage found out."""

    benchmark: str
    headline: tuple[str, float | None]  # name and value; "" where the benchmark has no total
    scale: float  # the best possible value
    standard: bool  # the input is the published set
    n_expected: int
    n_scored: int
    scores: Mapping[str, tuple[float | None, int, int]]  # group -> value, scored, expected
    judge: Mapping[str, Any]
    options: Mapping[str, Any]
    inputs: Mapping[str, str]  # name -> sha256
    manifest: Mapping[str, Any] | None  # of the generation; None for images made elsewhere
    notes: Sequence[str] = ()
    others: Mapping[str, float | None] = field(
        default_factory=dict
    )  # more totals, shown where the headline is


def check_inputs(
    manifest: Mapping[str, Any] | None, benchmark: str, inputs: Mapping[str, str], root: Path
) -> None:
    """ValueError where the run was painted for another benchmark or from another file than the one to score by."""
    if manifest is None:
        return
    if manifest.get("benchmark") != benchmark:
        raise ValueError(f"{root} is a run of {manifest.get('benchmark')}, not of {benchmark}")
    for name, value in inputs.items():
        painted = manifest.get("inputs_sha256", {}).get(name)
        if painted is not None and painted != value:
            raise ValueError(
                f"{root} was painted from another {name}: sha256 {painted} there, {value} of the one given"
            )


def write_score(folder: RunFolder, score: Score) -> dict[str, Any]:
    """score.json; returns its content. A headline only where all of the published set is scored."""
    complete = score.n_scored == score.n_expected
    name, value = score.headline
    whole = complete and score.standard
    result = {
        "benchmark": score.benchmark,
        "complete": complete,
        "standard_set": score.standard,
        "n_expected": score.n_expected,
        "n_scored": score.n_scored,
        "headline": {"name": name, "value": value} if whole and name and value is not None else None,
        "others": dict(score.others) if whole else {},
        "scale": score.scale,
        "scores": {
            group: {"value": value, "n_scored": n, "n_expected": of}
            for group, (value, n, of) in score.scores.items()
        },
        "judge": dict(score.judge),
        "options": dict(score.options),
        "inputs_sha256": dict(score.inputs),
        "manifest": score.manifest,
        "notes": list(score.notes),
    }
    folder.write_json(folder.root / "score.json", result)
    return result


def read_score(folder: RunFolder) -> dict[str, Any]:
    path = folder.root / "score.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage `score` first")
    return read_json(path)


def summary(score: Mapping[str, Any]) -> str:
    """One line: the headline, or why there is none."""
    n, of = score["n_scored"], score["n_expected"]
    if score["headline"] is not None:
        return f"{score['headline']['name']}: {score['headline']['value']:.4f} ({n:,} scored)"
    if not score["complete"]:
        return f"partial: {n:,} of {of:,} scored, so there is no headline number"
    if not score["standard_set"]:
        return f"{n:,} scored, but not the published set, so there is no headline number"
    return f"{n:,} scored"


def markdown(score: Mapping[str, Any], title: str, published: Sequence[Published]) -> str:
    model = ((score["manifest"] or {}).get("checkpoint") or {}).get("model", "images made elsewhere")
    lines = [f"# {title}: {model}", "", f"**{summary(score)}**", ""]
    groups = list(score["scores"])
    top = score["headline"] is not None
    overall = score["headline"]["value"] if top else None
    lines.append("| | " + " | ".join(groups) + " | overall | protocol |")
    lines.append("| --- |" + " ---: |" * (len(groups) + 1) + " --- |")
    cells = [_cell(score["scores"][group]) for group in groups]
    judged = ", ".join(str(value) for value in score["judge"].values() if isinstance(value, str))
    lines.append(f"| **this run** | {' | '.join(cells)} | {_number(overall)} | judge: {judged} |")
    for row in published:
        values = [_number(row.scores.get(group)) for group in groups]
        lines.append(f"| {row.name} | {' | '.join(values)} | {_number(row.overall)} | {row.protocol} |")
    if not published:
        lines += ["", "No published JanusFlow number is known."]
    if score["others"]:
        lines += ["", *(f"- {name}: {_number(value)}" for name, value in score["others"].items())]
    if score["notes"]:
        lines += ["", *(f"- {note[:MAX_NOTE]}" for note in score["notes"])]
    lines += ["", "| what it depends on | |", "| --- | --- |"]
    manifest = score["manifest"] or {}
    for part in ("judge", "options", "inputs_sha256"):
        lines += [f"| {part}: {key} | {_plain(value)} |" for key, value in score[part].items()]
    for part in ("checkpoint", "settings", "versions"):
        lines += [f"| {part}: {key} | {_plain(value)} |" for key, value in manifest.get(part, {}).items()]
    if "seed_rule" in manifest:
        lines.append(f"| seeds | {manifest['seed_rule']} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, score: Mapping[str, Any], title: str, published: Sequence[Published]) -> None:
    """Bars of this run beside the published rows. ImportError without matplotlib (extra `bench`)."""
    from matplotlib.figure import Figure

    groups = list(score["scores"])
    rows = [("this run", {group: score["scores"][group]["value"] for group in groups})]
    rows += [(row.name, row.scores) for row in published]
    rows = [(name, values) for name, values in rows if any(values.get(group) is not None for group in groups)]
    if score["headline"] is not None or any(row.overall is not None for row in published):
        groups = [*groups, "overall"]
        totals = {row.name: row.overall for row in published}
        totals["this run"] = score["headline"]["value"] if score["headline"] else None
        rows = [(name, dict(values) | {"overall": totals[name]}) for name, values in rows]
    figure = Figure(figsize=(max(6.0, 1.3 * len(groups) + 2), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(rows))
    for i, (name, values) in enumerate(rows):
        heights = [values.get(group) or 0.0 for group in groups]
        places = [k + (i - (len(rows) - 1) / 2) * width for k in range(len(groups))]
        bars = axes.bar(places, heights, width, label=name)
        labels = ["" if values.get(group) is None else f"{values[group]:.3g}" for group in groups]
        axes.bar_label(bars, labels, fontsize=7)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set_ylim(0, score["scale"] * 1.05)
    axes.set_title(f"{title}, {summary(score)}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write_report(folder: RunFolder, title: str, published: Sequence[Published]) -> list[Path]:
    """report.json, report.md and, where matplotlib is installed, report.png; returns their paths."""
    score = read_score(folder)
    rows = [
        {"name": r.name, "protocol": r.protocol, "scores": dict(r.scores), "overall": r.overall}
        for r in published
    ]
    paths = [folder.root / "report.json", folder.root / "report.md"]
    folder.write_json(paths[0], score | {"title": title, "published": rows})
    folder.write_text(paths[1], markdown(score, title, published))
    picture = folder.root / "report.png"
    try:
        with folder.writing(picture) as temporary:
            plot(temporary, score, title, published)
        paths.append(picture)
    except ImportError:
        print("no plot: pip install 'janusflow-min[bench]' brings matplotlib", file=sys.stderr)
    return paths


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(entry: Mapping[str, Any]) -> str:
    n, of = entry["n_scored"], entry["n_expected"]
    value = "-" if entry["value"] is None else _number(entry["value"])
    return value if n == of else f"{value} ({n} of {of})"


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
