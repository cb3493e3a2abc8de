# SPDX-License-Identifier: MIT
"""Reports, the same for every benchmark: `report.json`, `report.md`, `report.png` and `report.html` of a score.json.

The report stands beside the published numbers, each with its protocol, has a 95 % interval for every number, and
holds what they depend on: input hashes, checkpoint, settings, judge, options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from .gallery import gallery
from .run_folder import RunFolder
from .scoring import read_items

MAX_NOTE = 300  # characters of a note in the Markdown


@dataclass(frozen=True)
class Published:
    """A published row. scores: group -> value, on the benchmark's scale."""

    name: str
    protocol: str
    scores: Mapping[str, float]
    overall: float | None


def read_score(folder: RunFolder) -> dict[str, Any]:
    path = folder.root / "score.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage `score` first")
    score = read_json(path)
    lacking = [
        key for key in ("benchmark", "headline", "scores", "inputs_sha256", "options") if key not in score
    ]
    if lacking:
        raise ValueError(
            f"{path} is no score of this version, it lacks {', '.join(lacking)}: score the run again"
        )
    return score


def summary(score: Mapping[str, Any]) -> str:
    """One line: the headline, or why there is none; of a dry run, how much there is to judge."""
    if "dry_run" in score:
        return score["dry_run"]
    n, of = score["n_scored"], score["n_expected"]
    if score["headline"] is not None:
        top = score["headline"]
        low_high = (
            "" if top["interval"] is None else ", 95 % interval {:.4f} to {:.4f}".format(*top["interval"])
        )
        return f"{top['name']}: {top['value']:.4f} ({n:,} scored{low_high})"
    if n != of:
        return f"partial: {n:,} of {of:,} scored, so there is no headline number"
    if score["departures"]:
        return f"{n:,} scored, but there is no headline number: {'; '.join(score['departures'])}"
    return f"{n:,} scored"


def markdown(score: Mapping[str, Any], title: str, published: Sequence[Published]) -> str:
    model = ((score["manifest"] or {}).get("checkpoint") or {}).get("model", "images made elsewhere")
    lines = [f"# {title}: {_plain(model)}", "", f"**{_plain(summary(score))}**", ""]
    groups = list(score["scores"])
    lines.append("| | " + " | ".join(groups) + " | overall | protocol |")
    lines.append("| --- |" + " ---: |" * (len(groups) + 1) + " --- |")
    cells = [_cell(score["scores"][group]) for group in groups]
    judged = ", ".join(_plain(value) for value in score["judge"].values() if isinstance(value, str))
    overall = "" if score["headline"] is None else _with_interval(score["headline"])
    lines.append(f"| **this run** | {' | '.join(cells)} | {overall} | judge: {judged} |")
    for row in published:
        values = [_number(row.scores.get(group)) for group in groups]
        lines.append(f"| {row.name} | {' | '.join(values)} | {_number(row.overall)} | {row.protocol} |")
    lines += ["", "In brackets: 95 % intervals over the prompts; they say nothing of the judge's own errors."]
    if not published:
        lines += ["", "No published JanusFlow number is known."]
    if score["others"]:
        lines += ["", *(f"- {name}: {_with_interval(entry)}" for name, entry in score["others"].items())]
    if score["notes"]:
        lines += ["", *(f"- {_plain(note[:MAX_NOTE])}" for note in score["notes"])]
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
    """Bars of this run, with intervals, and of the published rows. ImportError without matplotlib (extra `bench`)."""
    from matplotlib.figure import Figure

    own = dict(score["scores"])
    if score["headline"] is not None or any(row.overall is not None for row in published):
        own["overall"] = score["headline"] or {"value": None, "interval": None}
    rows = [("this run", {group: entry["value"] for group, entry in own.items()})]
    rows += [(row.name, {**row.scores, "overall": row.overall}) for row in published]
    rows = [row for row in rows if any(row[1].get(group) is not None for group in score["scores"])]
    groups, width = list(own), 0.8 / max(1, len(rows))
    figure = Figure(figsize=(max(6.0, 1.3 * len(groups) + 2), 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(rows):
        places = [k + (i - (len(rows) - 1) / 2) * width for k in range(len(groups))]
        bars = axes.bar(places, [values.get(group) or 0.0 for group in groups], width, label=name)
        labels = ["" if values.get(group) is None else f"{values[group]:.3g}" for group in groups]
        axes.bar_label(bars, labels, fontsize=7)
        for x, entry in zip(places, own.values(), strict=True):
            if name == "this run" and entry["interval"] is not None:
                axes.vlines(x, *entry["interval"], color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set_ylim(0, score["scale"] * 1.05)
    axes.set_title(f"{title}, {summary(score)}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write_report(folder: RunFolder, title: str, published: Sequence[Published]) -> list[Path]:
    """report.json, report.md, report.html (a gallery of failures) and, where matplotlib is installed, report.png;
    returns their paths."""
    score = read_score(folder)
    rows = [
        {"name": r.name, "protocol": r.protocol, "scores": dict(r.scores), "overall": r.overall}
        for r in published
    ]
    root = folder.root
    folder.write_json("report.json", score | {"title": title, "published": rows})
    folder.write_text("report.md", markdown(score, title, published))
    names = ["report.json", "report.md"]
    if (root / "item_scores.jsonl").is_file():
        folder.write_text(
            "report.html", gallery(read_items(root), f"{title}: {summary(score)}", score["scale"])
        )
        names.append("report.html")
    try:
        with folder.writing(root / "report.png") as temporary:
            plot(temporary, score, title, published)
        names.append("report.png")
    except ImportError:
        print("no plot: pip install 'janusflow-min[bench]' brings matplotlib", file=sys.stderr)
    return [root / name for name in names]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _with_interval(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    low_high = "" if entry["interval"] is None else f" [{', '.join(map(_number, entry['interval']))}]"
    return f"{_number(entry['value'])}{low_high}"


def _cell(entry: Mapping[str, Any]) -> str:
    n, of = entry["n_scored"], entry["n_expected"]
    return _with_interval(entry) + ("" if n == of else f" ({n} of {of})")


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
