# SPDX-License-Identifier: MIT
"""GenEval: are the objects there, in the number, colour and place that the prompt names?

Reads `evaluation_metadata.jsonl`, writes the tree that the official scorer reads, and scores such a tree by the
official rules (`geneval_rules`) from an instance segmenter's detections, or a saved file of them, and a CLIP colour
classifier. Formats follow djghosh13/geneval.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, sha256
from ..options import SubsetOptions, option
from . import report as reports
from .bootstrap import ItemScore
from .detection import CLASSES, COLOURS, Detection
from .geneval_judging import Colours, detections
from .geneval_rules import RELATIONS, TAGS, Rules, aggregate, judge, keep
from .judges import ColourJudge, Detector, bar
from .ranks import RankInfo
from .reading import UnreadableImage, json_lines, text_sha256
from .report import Published
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, run
from .scoring import ScoreOptions as CommonOptions
from .scoring import ScoringRun, means

TITLE = "GenEval"
SUMMARY = "objects, counts, colours, positions: 553 prompts, 4 images each"
DATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of the published file
IMAGES_PER_PROMPT = 4
PUBLISHED = (
    Published(
        "JanusFlow-1.3B, paper",
        "table 2 of arXiv 2411.07975, 384 px; sampling settings not given",
        dict(zip(TAGS, (0.97, 0.59, 0.45, 0.83, 0.53, 0.42), strict=True)),
        0.63,
    ),
    Published(
        "JanusFlow-1.3B, TorchUMM",
        "its README; its fractions fit five images a prompt, not four",
        dict(zip(TAGS, (0.9425, 0.4606, 0.2775, 0.7468, 0.3220, 0.2500), strict=True)),
        0.4999,
    ),
)


@dataclass(frozen=True, kw_only=True)
class DataOptions(SubsetOptions):
    data: Path = option("evaluation_metadata.jsonl of djghosh13/geneval", kind=Path)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DataOptions):
    images_per_prompt: int = option("images of each prompt", IMAGES_PER_PROMPT)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Rules, DataOptions, CommonOptions):
    images_per_prompt: int | None = option(
        "expected of each prompt (default: the manifest's, else 4)", None, kind=int
    )
    detector: str | Detector | None = option("folder or hub id of a Mask2Former for COCO instances", None)
    detections: Path | None = option("a saved detections.jsonl instead of a detector", None, kind=Path)
    clip: str | ColourJudge | None = option(
        "folder or hub id of the CLIP model that names colours", "openai/clip-vit-large-patch14"
    )
    device: str = option("of the judges", "auto")
    official_compat: bool = option(
        "score whatever images are there, by their folders' metadata.jsonl, as the official scorer does",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.detector is None) == (self.detections is None):
            raise ValueError("give either --detector or --detections")


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


# Reading -----------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One line of the benchmark's file."""

    index: int
    tag: str
    prompt: str
    metadata: Mapping[str, Any]  # the whole line


def read(path: str | Path, subset: bool = False) -> list[Prompt]:
    """The benchmark's lines. ValueError with file and line for what does not fit; for another number of prompts
    than the benchmark's too, unless `subset`."""
    prompts: list[Prompt] = []
    for place, line in json_lines(path):
        _check_line(line, place)
        prompts.append(Prompt(len(prompts), line["tag"], line["prompt"], line))
    counts = Counter(prompt.tag for prompt in prompts)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; evaluation_metadata.jsonl has {sum(TAGS.values())} lines")
    if not subset and counts != TAGS:
        wrong = ", ".join(f"{tag} {counts[tag]} (must be {n})" for tag, n in TAGS.items() if counts[tag] != n)
        raise ValueError(
            f"{path}: {len(prompts)} prompts, GenEval has {sum(TAGS.values())}; {wrong}. --subset accepts it"
        )
    return prompts


def _check_line(line: Any, place: str) -> None:
    def need(fits: bool, what: str) -> None:
        if not fits:
            raise ValueError(f"{place}: {what}")

    need(isinstance(line, dict), f"a JSON object is needed, got {type(line).__name__}")
    for key in ("tag", "prompt", "include"):
        need(key in line, f"the field {key!r} is missing; there are {', '.join(line) or 'none'}")
    need(line["tag"] in TAGS, f"tag must be one of {', '.join(TAGS)}, got {line['tag']!r}")
    text = line["prompt"]
    need(isinstance(text, str) and text.strip() != "", "prompt must be a text that is not empty")
    for name in ("include", "exclude"):
        clauses = line.get(name, [])
        need(isinstance(clauses, list), f"{name} must be a list, got {clauses!r}")
        need(bool(clauses) or name == "exclude", "include is empty")
        for i, clause in enumerate(clauses):
            where = f"{name}[{i}]"
            need(isinstance(clause, dict), f"{where} must be an object, got {clause!r}")
            label, count, colour = clause.get("class"), clause.get("count"), clause.get("color", COLOURS[0])
            need(label in CLASSES, f"{where}.class must be one of the 80 object names, got {label!r}")
            fits = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            need(fits, f"{where}.count must be a whole number of at least 1, got {count!r}")
            need(colour in COLOURS, f"{where}.color must be one of {', '.join(COLOURS)}, got {colour!r}")
            if "position" in clause:
                match clause["position"]:
                    case [relation, int(other)] if relation in RELATIONS and 0 <= other < i:
                        pass
                    case wrong:
                        expected = f"[one of {', '.join(RELATIONS)}, index of an earlier clause]"
                        need(False, f"{where}.position must be {expected}, got {wrong!r}")


def items(prompts: Sequence[Prompt], images_per_prompt: int) -> list[Item]:
    return [
        Item(
            prompt.index,
            prompt.prompt,
            tuple(f"{prompt.index:05d}/samples/{k:05d}.png" for k in range(images_per_prompt)),
            {f"{prompt.index:05d}/metadata.jsonl": json.dumps(prompt.metadata) + "\n"},
        )
        for prompt in prompts
    ]


def generate(settings: Settings, out: str | Path, options: GenerateOptions) -> Coverage:
    """Make `out`/images/NNNNN/samples/NNNNN.png, beside metadata.jsonl."""
    count = options.images_per_prompt
    whole = items(read(options.data, options.subset), count)
    return run("geneval", whole, {"evaluation_metadata.jsonl": sha256(options.data)}, out, count, settings)


# Scoring -----------------------------------------------------------------------


def score(run: str | Path, options: ScoreOptions) -> dict[str, Any]:
    """Judge a tree of images; writes detections.jsonl, results.jsonl and score.json into `run`.

    Under torchrun the images are shared out among the detectors of all ranks; the first rank does the rest and has
    the score, the others return {}.
    """
    prompts, compat = read(options.data, options.subset), options.official_compat
    inputs = {"evaluation_metadata.jsonl": sha256(options.data)}
    scoring = ScoringRun("geneval", run, options, inputs, text_sha256(options.data) == DATA_SHA256)
    there = find_images(scoring.images, prompts, compat)
    if options.limit is not None:
        prompts = prompts[: options.limit]
        there = [(prompt, name) for prompt, name in there if 0 <= prompt.index < options.limit]
    per_prompt = _images_per_prompt(scoring, options, there)
    found, detector = detections(scoring, options, [name for _, name in there])
    if RankInfo.from_environment().rank > 0:
        return {}
    if options.dry_run:
        todo = sum(name not in found for _, name in there)
        return {"benchmark": "geneval", "dry_run": f"{todo:,} images to detect objects in"}
    colours = Colours(scoring.images, options)
    results = []
    for prompt, name in bar(there, "Judging", options.progress):
        if name not in scoring.failures:
            try:
                results.append(_result(prompt, name, found[name], options, colours))
            except UnreadableImage as error:
                scoring.failures[name] = str(error)
    scoring.folder.write_text("results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    items, summary = _items(scoring.images, results), aggregate(results, compat)
    if results:
        scoring.notes.append(
            f"{summary['correct_images']:.2%} of the images, {summary['correct_prompts']:.2%} of the prompts correct"
        )
    if compat:
        scoring.notes.append(f"mean of the tags that have images: {summary['overall']}")
    of = Counter(prompt.tag for prompt in prompts)
    title = "overall, mean of the six tags"
    return scoring.write(
        headline=(title, summary["overall"]),
        scale=1.0,
        scores=means(items, {tag: of[tag] * per_prompt for tag in TAGS}),
        n_expected=len(prompts) * per_prompt,
        n_scored=len(results),
        judge={"detector": detector, "colours": colours.name},
        items=items,
        totals={title: dict.fromkeys(TAGS, 1 / len(TAGS))},
        options={"images_per_prompt": per_prompt, "official_compat": compat},
    )


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, PUBLISHED)


def find_images(
    root: Path, prompts: Sequence[Prompt], official_compat: bool = False
) -> list[tuple[Prompt, str]]:
    """Every image that the official scorer would take, by its path below `root`, with its prompt.

    Folders are named by digits, images by digits before .png, however many. What a folder's images are of, its
    metadata.jsonl says, or without one its number, the prompt's index. ValueError where that is not one of `prompts`;
    official_compat: metadata.jsonl has the last word.
    """
    by_line = {json.dumps(p.metadata, sort_keys=True): p for p in prompts}
    found = []
    folders = [path for path in root.iterdir() if path.name.isdigit()] if root.is_dir() else []
    for folder in sorted(folders, key=lambda path: path.name.zfill(20)):
        if not (folder / "samples").is_dir():
            continue
        path = folder / "metadata.jsonl"
        if path.is_file():
            line = read_json(path)
            prompt = by_line.get(json.dumps(line, sort_keys=True))
            if prompt is None and official_compat:
                _check_line(line, str(path))
                prompt = Prompt(-1, line["tag"], line["prompt"], line)
        else:
            index = int(folder.name) if folder.name.isdecimal() else len(prompts)
            prompt = prompts[index] if index < len(prompts) else None
        if prompt is None:
            raise ValueError(
                f"{path if path.is_file() else folder} is not of a line of --data: the images are of other prompts"
            )
        names = [
            p.name for p in (folder / "samples").iterdir() if re.match(r"\d+\.png", p.name) and p.is_file()
        ]
        names.sort(key=lambda name: name.split(".")[0].zfill(20))
        found += [(prompt, f"{folder.name}/samples/{name}") for name in names]
    if not found:
        raise FileNotFoundError(f"no image of the layout NNNNN/samples/NNNNN.png in {root}")
    return found


def _images_per_prompt(
    scoring: ScoringRun, options: ScoreOptions, there: Sequence[tuple[Prompt, str]]
) -> int:
    """How many images of a prompt are expected. ValueError where a prompt has more, unless for `official_compat`."""
    expected = options.images_per_prompt
    if expected is None:
        manifest = scoring.manifest
        expected = manifest["settings"]["images_per_prompt"] if manifest else IMAGES_PER_PROMPT
    counts = Counter(json.dumps(prompt.metadata) for prompt, _ in there)
    prompt, most = counts.most_common(1)[0] if counts else ("", 0)
    if most > expected and not options.official_compat:
        raise ValueError(
            f"{scoring.images} has {most} images of one prompt, {json.loads(prompt)['prompt']!r}, where {expected} "
            f"are expected; --images-per-prompt {most} expects so many"
        )
    if max(most, expected) != IMAGES_PER_PROMPT:
        scoring.departures.append(
            f"there are {max(most, expected)} images of a prompt, the benchmark has {IMAGES_PER_PROMPT}"
        )
    return expected


def _items(images: Path, results: Sequence[Mapping[str, Any]]) -> list[ItemScore]:
    """A prompt's images are one item."""
    folders: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        folders.setdefault(r["filename"].split("/")[0], []).append(r)
    return [
        ItemScore(
            folder,
            {own[0]["tag"]: (float(sum(r["correct"] for r in own)), len(own))},
            own[0]["prompt"],
            [str(images / r["filename"]) for r in own],
            "\n".join(dict.fromkeys(r["reason"] for r in own if r["reason"])),
        )
        for folder, own in folders.items()
    ]


def _result(
    prompt: Prompt, name: str, found: Sequence[Detection], options: ScoreOptions, colours: Colours
) -> dict[str, Any]:
    """An image's line of results.jsonl, the official one."""
    objects = keep(found, prompt.tag, options)
    correct, reason = judge(
        prompt.metadata, objects, functools.partial(colours, name), options.position_threshold
    )
    boxes = {label: [[*d.box, d.score] for d in kept] for label, kept in objects.items()}
    return {
        "filename": name,
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(prompt.metadata),
        "details": json.dumps(boxes),
    }
