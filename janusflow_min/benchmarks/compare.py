# SPDX-License-Identifier: MIT
"""Two scored runs of one benchmark, item by item: what changed, and whether it is more than chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import bootstrap
from .bootstrap import DRAWS, ItemScore
from .manifest import differences
from .report import read_score
from .run_folder import RunFolder
from .scoring import read_items

SHOWN = 20  # flipped items that are named in each direction


def compare(a: str | Path, b: str | Path, seed: int = 0) -> dict[str, Any]:
    """b - a for every group and total, by a paired bootstrap over the items that both have.

    Raises ValueError for runs of different benchmarks or data, or without a common item; FileNotFoundError for a run
    that is not scored. Different judges or rules are reported, since then the difference is not the model's alone.
    """
    folders = RunFolder(a), RunFolder(b)
    scores = [read_score(folder) for folder in folders]
    for key in ("benchmark", "inputs_sha256"):
        if scores[0][key] != scores[1][key]:
            lines = differences(scores[0][key], scores[1][key], key, ("in A", "in B"))
            raise ValueError(f"the runs are not of the same {key}: {'; '.join(lines)}")
    found = [{item.item: item for item in read_items(folder.root)} for folder in folders]
    common = [key for key in found[0] if key in found[1]]
    if not common:
        raise ValueError(f"{folders[0].root} and {folders[1].root} have no scored item in common")
    pairs = [(found[0][key], found[1][key]) for key in common]
    totals = scores[0].get("totals", {})
    result = bootstrap.compare([x for x, _ in pairs], [y for _, y in pairs], totals, seed)
    changed = [
        (y.value - x.value, x, y)
        for x, y in pairs
        if x.value is not None and y.value is not None and x.value != y.value
    ]
    changed.sort(key=lambda entry: (-abs(entry[0]), entry[1].item))
    settings = [(score["manifest"] or {}).get("settings", {}) for score in scores]
    return {
        "benchmark": scores[0]["benchmark"],
        "runs": [str(folder.root) for folder in folders],
        "seed": seed,
        "items": len(common),
        "only": [len(found[0]) - len(common), len(found[1]) - len(common)],
        "differences": {
            name: {"a": c.a, "b": c.b, "difference": c.b - c.a, "interval": [c.low, c.high], "clear": c.clear}
            for name, c in result.items()
        },
        "won": [_flip(x, y) for change, x, y in changed if change > 0],
        "lost": [_flip(x, y) for change, x, y in changed if change < 0],
        "not_alike": [
            line
            for key in ("judge", "options")
            for line in differences(scores[0][key], scores[1][key], key, ("in A", "in B"))
        ],
        "settings": differences(settings[0], settings[1], "settings", ("in A", "in B")),
    }


def _flip(x: ItemScore, y: ItemScore) -> dict[str, Any]:
    return {"item": x.item, "a": x.value, "b": y.value, "prompt": y.prompt, "reason": y.reason or x.reason}


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['benchmark']}: B - A", ""]
    lines += [f"- {name}: {run}" for name, run in zip("AB", result["runs"], strict=True)]
    lines.append(
        f"- {result['items']:,} items in both, {result['only'][0]:,} only in A, {result['only'][1]:,} only in B"
    )
    lines += [
        f"- **not alike**, so this is not the model's difference alone: {line}"
        for line in result["not_alike"]
    ]
    lines += [f"- {line}" for line in result["settings"]]
    lines += ["", "| | A | B | B - A | 95 % interval | |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for name, c in result["differences"].items():
        low, high = c["interval"]
        lines.append(
            f"| {name} | {c['a']:.4g} | {c['b']:.4g} | {c['difference']:+.4g} | {low:+.4g} to {high:+.4g} | "
            f"{'clear' if c['clear'] else ''} |"
        )
    lines += ["", f"Paired bootstrap over the common items, {DRAWS:,} draws, seed {result['seed']}."]
    for key, title in (("won", "better in B"), ("lost", "worse in B")):
        lines += ["", f"{len(result[key]):,} items are {title}" + (":" if result[key] else ".")]
        for flip in result[key][:SHOWN]:
            text = " ".join(json.dumps(flip["prompt"][:100], ensure_ascii=False).split())
            lines.append(f"- {flip['item']}: {flip['a']:.3g} -> {flip['b']:.3g} {text}")
    return "\n".join(lines) + "\n"
