# SPDX-License-Identifier: MIT
"""GenEval: are the objects there, in the number, colour and place that the prompt names?

Reads `evaluation_metadata.jsonl`, writes the tree that the official scorer reads, and scores such a tree by the
official rules from an instance segmenter's detections and a CLIP colour classifier. Formats and rules follow
djghosh13/geneval (`evaluation/evaluate_images.py`, `summary_scores.py`). The rules are pure Python: their only
input are `Detection`s, and a saved file of them does as well as a detector. They compute in float32, as the official
scorer does on mmdet's boxes, so edges and ties fall alike.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..files import read_json, sha256
from ..options import SubsetOptions, option
from . import judge_models
from . import report as reports
from .bootstrap import ItemScore
from .detection import CLASSES, COLOURS, SAVED_ABOVE, Detection, SavedDetections, detection_record
from .judges import ColourJudge, Detector, Records, bar, merge_ranks, rank_file
from .ranks import RankInfo, rank_device, shard, wait_for_ranks
from .reading import UnreadableImage, json_lines, read_image, text_sha256
from .report import Published
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, run
from .scoring import ScoreOptions as CommonOptions
from .scoring import ScoringRun

TITLE = "GenEval"
SUMMARY = "objects, counts, colours, positions: 553 prompts, 4 images each"
TAGS = {  # lines of each in the published file
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
RELATIONS = ("left of", "right of", "above", "below")
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
class Rules:
    """The official scorer's options and their defaults."""

    threshold: float = option("a detection's score must be above it", 0.3, rule=True)
    counting_threshold: float = option("the same for counting prompts", 0.9, rule=True)
    max_objects: int = option("best detections kept of a class", 16, rule=True)
    max_overlap: float = option(
        "IoU from which a fainter box of the class is dropped; 1 keeps all", 1.0, rule=True
    )
    position_threshold: float = option("share of the sizes by which objects must be apart", 0.1, rule=True)
    bgcolor: str = option("colour around an object for CLIP, or original", "#999", rule=True)
    crop: bool = option("show CLIP the object's box alone", True, rule=True)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Rules, DataOptions, CommonOptions):
    images_per_prompt: int | None = option(
        "expected of each prompt; without: the manifest's, else 4", None, kind=int
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
    need(
        isinstance(line["prompt"], str) and line["prompt"].strip() != "",
        "prompt must be a text that is not empty",
    )
    for name in ("include", "exclude"):
        clauses = line.get(name, [])
        need(isinstance(clauses, list), f"{name} must be a list, got {clauses!r}")
        need(bool(clauses) or name == "exclude", "include is empty")
        for i, clause in enumerate(clauses):
            where = f"{name}[{i}]"
            need(isinstance(clause, dict), f"{where} must be an object, got {clause!r}")
            label, count = clause.get("class"), clause.get("count")
            need(label in CLASSES, f"{where}.class must be one of the 80 object names, got {label!r}")
            whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            need(whole, f"{where}.count must be a whole number of at least 1, got {count!r}")
            colour, position = clause.get("color"), clause.get("position")
            need(
                "color" not in clause or colour in COLOURS,
                f"{where}.color must be one of {', '.join(COLOURS)}, got {colour!r}",
            )
            fits = "position" not in clause or (
                isinstance(position, list)
                and len(position) == 2
                and position[0] in RELATIONS
                and isinstance(position[1], int)
                and 0 <= position[1] < i
            )
            need(
                fits,
                f"{where}.position must be [one of {', '.join(RELATIONS)}, index of an earlier clause], got "
                f"{position!r}",
            )


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


# Rules -----------------------------------------------------------------------


def keep(detections: Sequence[Detection], tag: str, rules: Rules = Rules()) -> dict[str, list[Detection]]:
    """The detections that count, best first, by class in the order of CLASSES."""
    limit = rules.counting_threshold if tag == "counting" else rules.threshold
    kept = {}
    for label in CLASSES:
        own = [d for d in detections if d.label == label]
        rows = np.array([[*d.box, d.score] for d in own], np.float32).reshape(-1, 5)
        order = np.argsort(rows[:, 4])[::-1]  # of equal scores the later one first
        best = order[rows[order, 4] > limit][: rules.max_objects].tolist()
        if rules.max_overlap != 1:
            best = suppress(rows, best, rules.max_overlap)
        if best:
            kept[label] = [own[i] for i in best]
    return kept


def suppress(boxes: np.ndarray, order: Sequence[int], limit: float) -> list[int]:
    """Greedy non-maximum suppression of one class: of `order`, best first, those whose IoU with every better one that
    stays is below `limit`."""
    kept: list[int] = []
    for candidate in order:
        if all(iou(boxes[better], boxes[candidate]) < limit for better in kept):
            kept.append(candidate)
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose last pixel is part of them."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - both
    return both / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where box `a` lies as seen from box `b`: none, one or two of RELATIONS."""
    boxes = np.array([a[:4], b[:4]], np.float32)
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, np.abs(boxes[:, 2:] - boxes[:, :2])
    offset = centres[0] - centres[1]
    apart = np.maximum(np.abs(offset) - threshold * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)  # by the length before the sizes were taken off
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def judge(
    metadata: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    colours: Callable[[str, Sequence[Detection]], Sequence[str]],
    position_threshold: float = 0.1,
) -> tuple[bool, str]:
    """(correct, reasons, one a line) of one image.

    objects: by class, best first, as `keep` gives them. colours: (class, detections) -> the colour of each; asked
    only where a clause names one.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        label, count = clause["class"], clause["count"]
        found = list(objects.get(label, ()))[:count]
        wrong = ""
        if len(found) < count:
            wrong = f"expected {label}>={count}, found {len(found)}"
        elif "color" in clause:
            seen = list(colours(label, found))
            if seen.count(clause["color"]) < count:
                names = ", ".join(f"{n} {name}" for name, n in Counter(seen).items())
                wrong = f"expected {clause['color']} {label}>={count}, found {seen.count(clause['color'])} ({names})"
        if not wrong and "position" in clause:
            wrong = _misplaced(clause, found, groups, metadata["include"], position_threshold)
        if wrong:
            reasons.append(wrong)
        groups.append(None if wrong else found)
    for clause in metadata.get("exclude", ()):
        there = len(objects.get(clause["class"], ()))
        if there >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {there}")
    return not reasons, "\n".join(reasons)


def _misplaced(clause, found, groups, include, threshold: float) -> str:
    relation, index = clause["position"]
    target = groups[index]
    name = include[index]["class"]
    if target is None:
        return f"no target {name} for {clause['class']} to be {relation}"
    for thing in found:
        for other in target:
            seen = relations(thing.box, other.box, threshold)
            if relation not in seen:
                told = " and ".join(sorted(seen)) or "in no relation to it"
                return f"expected {clause['class']} {relation} {name}, found it {told}"
    return ""


def aggregate(results: Sequence[Mapping[str, Any]], official_compat: bool = False) -> dict[str, Any]:
    """Accuracy by tag over images, their unweighted mean, and what the official summary prints beside it.

    results: records with tag, correct and metadata. A tag without an image is None, and so is the mean then;
    official_compat: the mean is over the other tags.
    """
    tags = {tag: [bool(r["correct"]) for r in results if r["tag"] == tag] for tag in TAGS}
    means = {tag: float(np.mean(values)) if values else None for tag, values in tags.items()}
    prompts: dict[str, bool] = {}
    for r in results:
        prompts[r["metadata"]] = prompts.get(r["metadata"], False) or bool(r["correct"])
    there = [mean for mean in means.values() if mean is not None]
    whole = len(there) == len(TAGS) or (official_compat and there)
    return {
        "tags": means,
        "overall": float(np.mean(there)) if whole else None,
        "images": len(results),
        "prompts": len(prompts),
        "correct_images": float(np.mean([bool(r["correct"]) for r in results])) if results else None,
        "correct_prompts": float(np.mean(list(prompts.values()))) if prompts else None,
    }


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
    detections, detector = _detections(scoring, options, [name for _, name in there])
    if RankInfo.from_environment().rank > 0:
        return {}
    if options.dry_run:
        todo = sum(name not in detections for _, name in there)
        return {"benchmark": "geneval", "dry_run": f"{todo:,} images to detect objects in"}
    colours = Colours(scoring.images, options)
    results = []
    for prompt, name in bar(there, "Judging", options.progress):
        if name not in scoring.failures:
            try:
                results.append(_result(prompt, name, detections[name], options, colours))
            except UnreadableImage as error:
                scoring.failures[name] = str(error)
    scoring.folder.write_text("results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    summary = aggregate(results, compat)
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
        scores={
            tag: (mean, sum(r["tag"] == tag for r in results), of[tag] * per_prompt)
            for tag, mean in summary["tags"].items()
        },
        n_expected=len(prompts) * per_prompt,
        n_scored=len(results),
        judge={"detector": detector, "colours": colours.name},
        items=_items(scoring.images, results),
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


def _detections(
    scoring: ScoringRun, options: ScoreOptions, names: Sequence[str]
) -> tuple[Mapping[str, list[Detection]], str]:
    """The detections of every image, and who made them. A dry run gives those that are there."""
    faintest = min(SAVED_ABOVE, options.threshold, options.counting_threshold)
    if options.detections is not None:
        saved = SavedDetections(options.detections, faintest)
        if absent := [name for name in names if name not in saved]:
            raise ValueError(
                f"{options.detections} lacks {len(absent)} images of {scoring.images}, {absent[0]} for one"
            )
        return saved, f"saved detections, sha256 {sha256(options.detections)}"
    detector: Any = options.detector
    world = RankInfo.from_environment()
    if isinstance(detector, str):
        detector = judge_models.Mask2FormerDetector(detector, str(rank_device(options.device, world)))
        scoring.notes.append(
            "Meta's Mask2Former through transformers is not OpenMMLab's checkpoint of the official scorer: "
            "scores differ slightly"
        )
    path = scoring.folder.root / "detections.jsonl"
    _detect(scoring, options, detector, faintest, names, path, world)
    if (
        world.size > 1 and world.rank == 0
    ):  # with the others' shares, and to name the images that nobody could read
        _detect(scoring, options, detector, faintest, names, path, RankInfo())
    return SavedDetections(path, faintest) if path.is_file() else {}, detector.name


def _detect(
    scoring: ScoringRun,
    options: ScoreOptions,
    detector: Detector,
    faintest: float,
    names: Sequence[str],
    path: Path,
    world: RankInfo,
) -> None:
    """Detect objects in what `path` lacks: of several ranks each in its share, into a file of its own that the next
    call puts together, and back when all are done."""
    identity = {"detector": detector.name, "saved_above": faintest}
    if world.rank == 0:
        merge_ranks(path)
    wait_for_ranks(world)
    records = Records(path, "filename", identity, keep=False)
    hashes = {name: sha256(scoring.images / name) for name in names}
    todo = [name for name in names if not records.has(name, hashes[name])]
    if world.size > 1:
        records = Records(rank_file(path, world.rank), "filename", identity, keep=False)
        todo = shard(todo, world.rank, world.size)
    with closing(records):
        for name in bar([] if options.dry_run else todo, "Detecting", options.progress and world.rank == 0):
            try:
                image = upright(scoring.images / name)
            except UnreadableImage as error:
                scoring.failures[name] = str(error)
                continue
            found = detector.detect(image)
            records.add(name, hashes[name], {"detections": detection_record(found, faintest)})
    wait_for_ranks(world)


def upright(path: Path) -> Image.Image:
    """An image in RGB, turned as its EXIF data say. Raises UnreadableImage."""
    return ImageOps.exif_transpose(read_image(path)).convert("RGB")


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


class Colours:
    """Names the colours of detections in images below `root`; the judge is loaded when first needed."""

    def __init__(self, root: Path, options: ScoreOptions):
        self.root, self.options, self.clip = root, options, options.clip
        self.name = "not asked"

    def __call__(self, name: str, label: str, found: Sequence[Detection]) -> Sequence[str]:
        if self.clip is None:
            raise ValueError("a prompt names a colour: --clip is needed")
        if isinstance(self.clip, str):
            self.clip = judge_models.ClipColours(self.clip, self.options.device)
        self.name = self.clip.name
        image, rules = upright(self.root / name), self.options
        try:
            views = [view(image, d, rules.bgcolor, rules.crop) for d in found]
        except ValueError as error:
            raise ValueError(f"{self.root / name}: {error}") from None
        return self.clip.colours(views, label)


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


def view(image: Image.Image, found: Detection, bgcolor: str = "#999", crop: bool = True) -> Image.Image:
    """What the colour judge sees of an object: everything else covered by `bgcolor`, cut to its box."""
    if found.mask is not None:
        if found.mask.shape != (image.height, image.width):
            raise ValueError(
                f"a mask must have the image's size {image.height} x {image.width}, got {found.mask.shape}"
            )
        if bgcolor != "original":
            empty = Image.new("RGB", image.size, bgcolor)
            image = Image.composite(image, empty, Image.fromarray(found.mask.astype(np.uint8) * 255))
    if crop:
        x1, y1, x2, y2 = (round(v) for v in found.box)
        image = image.crop((x1, y1, x2, y2))
        if 0 in image.size:
            raise ValueError(f"no pixel lies in the box {found.box} of {found.label}")
    return image
