# SPDX-License-Identifier: MIT
"""What every benchmark's scoring shares: options, the run that is scored, and what is written about it.

    run = ScoringRun("geneval", out, options, inputs, published=text_sha256(data) == SHA256)
    names = run.whole(name for item in items for name in item.files)
    ...  # judge
    return run.write(headline=…, scores=…, items=…, …)

A number is only a headline where the whole published set was scored by the benchmark's own rules. Anything less is a
partial score, or one beside the published protocol, and says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..options import departures, json_object, option
from . import bootstrap
from .bootstrap import ItemScore, Weights
from .chat import OpenAIChat, Parse, Question, judge_all
from .judges import Chat, Records
from .reading import json_lines
from .run_folder import RunFolder, is_whole

SAMPLED = 50  # questions whose size is measured for a dry run


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Of every scoring."""

    limit: int | None = option("score only the first prompts", None, kind=int)
    dry_run: bool = option("say how much there is to judge, and ask nothing", False)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(LimitOptions):
    """Of every scoring of a folder of images."""

    images: Path | None = option("folder of images made elsewhere, instead of the run's", None, kind=Path)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Of scoring by a chat endpoint."""

    judge_max_tokens: int | None = option(
        "longest answer in tokens (default: the judge's usual)", None, kind=int
    )
    judge_thinking: bool | None = option(
        "let a reasoning judge think (default: as it likes)", None, kind=bool
    )
    judge_extra: Mapping[str, Any] = option(
        "more fields of each request, a JSON object", None, kind=json_object
    )
    concurrency: int = option("requests at once", 8)
    attempts: int = option("for each item, answers that make no sense included", 3)
    stop_after: int = option("give up after so many items in a row without an answer", 10)
    timeout: float = option("of a request, in seconds", 300.0)
    wait: float = 1.0  # seconds before the second attempt

    def chat(
        self, judge: str | Chat, url: str | None, max_tokens: int, extra: Mapping[str, Any] | None = None
    ) -> Chat:
        """The endpoint's model of this name; a judge that is one already as it is. max_tokens: its usual."""
        if not isinstance(judge, str):
            return judge
        return OpenAIChat(
            judge,
            url,
            max_tokens=self.judge_max_tokens or max_tokens,
            timeout=self.timeout,
            thinking=self.judge_thinking,
            extra=dict(extra or {}) | dict(self.judge_extra or {}),
        )

    def ask(
        self, chat: Chat, questions: Sequence[Question], parse: Parse, records: Records, progress: bool = True
    ) -> dict[Any, str]:
        """`judge_all` with these options."""
        own = (self.concurrency, self.attempts, progress, self.wait, self.stop_after)
        return judge_all(chat, questions, parse, records, *own)


class ScoringRun:
    """One scoring of a run's folder, or of images made elsewhere.

    options: the stage's; rules that differ from the benchmark's own go into `departures`. inputs: name -> sha256 of
    the files that decide. published: whether these are the published ones. Raises ValueError where the folder was
    generated for another benchmark or from other files.
    """

    def __init__(
        self, benchmark: str, run: str | Path, options: Any, inputs: Mapping[str, str], published: bool
    ) -> None:
        self.benchmark, self.options, self.inputs = benchmark, options, dict(inputs)
        self.folder = RunFolder(run)
        elsewhere = getattr(options, "images", None)
        self.images = self.folder.images if elsewhere is None else Path(elsewhere).expanduser()
        there = self.folder.manifest.is_file() and elsewhere is None
        self.manifest: dict[str, Any] | None = self.folder.read_manifest() if there else None
        self.departures = ([] if published else ["the data are not the published ones"]) + departures(options)
        self.failures: dict[Any, str] = {}  # item -> why it has no score
        self.notes: list[str] = []
        check_inputs(self.manifest, benchmark, self.inputs, self.folder.root)

    def whole(self, names: Iterable[str], what: str) -> list[str]:
        """`whole_files` of the run's images. FileNotFoundError where none is there; what: describes a name, for it."""
        found = self.whole_files(self.images, names)
        if not found:
            broken = f" that is whole ({', '.join(list(self.failures)[:3])})" if self.failures else ""
            raise FileNotFoundError(f"no image{broken} named {what} in {self.images}")
        return found

    def whole_files(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Those of the image files in `folder` that are there whole. A broken one becomes a failure, by name."""
        found = []
        for name in names:
            if is_whole(folder / name):
                found.append(name)
            elif (folder / name).exists():
                self.failures[name] = "the file is empty or damaged"
        return found

    def dry_run(self, todo: Sequence[Question]) -> dict[str, Any]:
        """How many requests are left to send, and about how many MB they are; measured on a sample."""
        sample = todo[:: max(1, len(todo) // SAMPLED)]
        size = sum(len(json.dumps(list(q.messages()))) for q in sample)
        megabytes = size / max(1, len(sample)) * len(todo) / 1e6
        return {"benchmark": self.benchmark, "dry_run": f"{len(todo):,} requests, about {megabytes:,.1f} MB"}

    def write(
        self,
        *,
        headline: tuple[str, float | None],
        scale: float,
        scores: Mapping[str, tuple[float | None, int, int]],
        n_expected: int,
        n_scored: int,
        judge: Mapping[str, Any],
        items: Sequence[ItemScore],
        totals: Mapping[str, Weights] | None = None,
        options: Mapping[str, Any] | None = None,
        others: Mapping[str, float | None] | None = None,
    ) -> dict[str, Any]:
        """item_scores.jsonl and score.json; returns the latter's content.

        headline: name and value; "" where the benchmark has no total. scale: the best possible value. scores: group
        -> value, scored, expected. items: their parts have the groups of `scores`, and any others that totals need.
        totals: the headline and the others as weights of groups, for their intervals. others: further totals, shown
        where the headline is.
        """
        found = bootstrap.intervals(items, totals or {}, scale)
        name, value = headline
        complete = n_scored == n_expected
        whole = complete and not self.departures
        rules = {
            f.name: getattr(self.options, f.name) for f in fields(self.options) if f.metadata.get("rule")
        }
        if self.failures:
            some = "; ".join(f"{key}: {reason}" for key, reason in list(self.failures.items())[:3])
            self.notes.insert(0, f"{len(self.failures)} without a score, tried again by the next run. {some}")

        def number(name: str, value: float | None) -> dict[str, Any]:
            return {"value": value, "interval": list(found[name]) if name in found else None}

        result = {
            "benchmark": self.benchmark,
            "complete": complete,
            "departures": self.departures,
            "n_expected": n_expected,
            "n_scored": n_scored,
            "headline": {"name": name} | number(name, value)
            if whole and name and value is not None
            else None,
            "others": {name: number(name, value) for name, value in (others or {}).items()} if whole else {},
            "scale": scale,
            "totals": {name: dict(weights) for name, weights in (totals or {}).items()},
            "scores": {
                group: number(group, value) | {"n_scored": n, "n_expected": of}
                for group, (value, n, of) in scores.items()
            },
            "judge": dict(judge),
            "options": rules | dict(options or {}),
            "inputs_sha256": self.inputs,
            "manifest": self.manifest,
            "notes": self.notes,
        }
        write_items(self.folder, items)
        self.folder.write_json("score.json", result)
        return result


def means(
    items: Sequence[ItemScore], expected: Mapping[str, int]
) -> dict[str, tuple[float | None, int, int]]:
    """The `scores` of `ScoringRun.write` for the groups of `expected`: mean over the items' parts, scored, expected."""
    found = {}
    for group, of in expected.items():
        parts = [item.parts[group] for item in items if group in item.parts]
        n = sum(count for _, count in parts)
        found[group] = (sum(total for total, _ in parts) / n if n else None, n, of)
    return found


def check_inputs(
    manifest: Mapping[str, Any] | None, benchmark: str, inputs: Mapping[str, str], root: Path
) -> None:
    """ValueError where the run was generated for another benchmark or from another file than the one to score by."""
    if manifest is None:
        return
    if manifest.get("benchmark") != benchmark:
        raise ValueError(f"{root} is a run of {manifest.get('benchmark')}, not of {benchmark}")
    for name, value in inputs.items():
        used = manifest["inputs_sha256"].get(name)
        if used is not None and used != value:
            raise ValueError(
                f"{root} was generated from another {name}: sha256 {used} there, {value} of the one given"
            )


def write_items(folder: RunFolder, items: Sequence[ItemScore]) -> None:
    """item_scores.jsonl, which `compare` and the gallery read. Images inside the run are named relative to it."""

    def relative(path: str) -> str:
        absolute = Path(os.path.abspath(path))
        inside = absolute.is_relative_to(folder.root)
        return absolute.relative_to(folder.root).as_posix() if inside else str(absolute)

    lines = [
        json.dumps(
            {
                "item": item.item,
                "parts": {group: list(part) for group, part in item.parts.items()},
                "prompt": item.prompt,
                "images": [relative(path) for path in item.images],
                "reason": item.reason,
            },
            ensure_ascii=False,
        )
        for item in items
    ]
    folder.write_text("item_scores.jsonl", "".join(f"{line}\n" for line in lines))


def read_items(root: Path) -> list[ItemScore]:
    """Of a scored run. FileNotFoundError where it was not scored."""
    path = root / "item_scores.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage `score` first")
    items = []
    for place, r in json_lines(path):
        try:
            parts = {str(group): (float(total), int(count)) for group, (total, count) in r["parts"].items()}
            images = [str(root / name) for name in r["images"]]
            items.append(ItemScore(r["item"], parts, r["prompt"], images, r["reason"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{place} is no item's score ({error!r}): score the run again") from None
    return items
