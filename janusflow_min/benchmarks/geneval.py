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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from . import judge_models
from . import report as reports
from .detection import CLASSES, COLOURS, SAVED_ABOVE, Detection, SavedDetections, detection_record
from .judges import ColourJudge, Detector, Records, bar
from .reading import UnreadableImage, json_lines, read_image, text_sha256
from .report import Published
from .runner import Coverage, Item, Option, RunFolder, Settings, read_json, run, sha256

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
SUBSET = Option(
    "--subset", "accept another number of prompts than the benchmark's; no headline then", False, bool
)
DATA = Option("--data", "evaluation_metadata.jsonl of djghosh13/geneval", kind=Path, required=True)
OPTIONS = {
    "generate": (
        DATA,
        SUBSET,
        Option("--images-per-prompt", "images of each prompt", IMAGES_PER_PROMPT, int),
    ),
    "score": (
        DATA,
        SUBSET,
        Option("--images", "folder of images made elsewhere, instead of the run's", kind=Path),
        Option("--images-per-prompt", "expected of each prompt; without: the manifest's, else 4", kind=int),
        Option("--detector", "folder or hub id of a Mask2Former for COCO instances"),
        Option("--detections", "a saved detections.jsonl instead of a detector", kind=Path),
        Option(
            "--clip", "folder or hub id of the CLIP model that names colours", "openai/clip-vit-large-patch14"
        ),
        Option("--device", "of the judges", "auto"),
        Option("--threshold", "a detection's score must be above it", 0.3, float),
        Option("--counting-threshold", "the same for counting prompts", 0.9, float),
        Option("--max-objects", "best detections kept of a class", 16, int),
        Option(
            "--max-overlap", "IoU from which a fainter box of the class is dropped; 1 keeps all", 1.0, float
        ),
        Option("--position-threshold", "share of the sizes by which objects must be apart", 0.1, float),
        Option("--bgcolor", "colour around an object for CLIP, or original", "#999"),
        Option("--crop", "show CLIP the object's box alone", True, bool),
        Option(
            "--official-compat",
            "score whatever images are there, by their folders' metadata.jsonl, as the official scorer does",
            False,
            bool,
        ),
    ),
    "report": (),
}


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
    prompts = []
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


def generate(
    settings: Settings,
    out: str | Path,
    data: str | Path,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    subset: bool = False,
) -> Coverage:
    """Paint `out`/images/NNNNN/samples/NNNNN.png, beside metadata.jsonl."""
    prompts = read(data, subset)
    return run(
        "geneval",
        items(prompts, images_per_prompt),
        {"evaluation_metadata.jsonl": sha256(data)},
        out,
        images_per_prompt,
        settings,
    )


# Rules -----------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The official scorer's options and their defaults."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


def keep(detections: Sequence[Detection], tag: str, rules: Rules = Rules()) -> dict[str, list[Detection]]:
    """The detections that count, best first, by class in the order of CLASSES."""
    limit = rules.counting_threshold if tag == "counting" else rules.threshold
    kept = {}
    for label in CLASSES:
        own = [d for d in detections if d.label == label]
        rows = np.array([[*d.box, d.score] for d in own], np.float32).reshape(-1, 5)
        best = np.argsort(rows[:, 4])[::-1]  # of equal scores the later one first
        best = best[rows[best, 4] > limit][: rules.max_objects]
        if rules.max_overlap != 1:
            best = suppress(rows, best, rules.max_overlap)
        if len(best):
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


def score(
    run: str | Path,
    data: str | Path,
    subset: bool = False,
    images: str | Path | None = None,
    images_per_prompt: int | None = None,
    detector: str | Detector | None = None,
    detections: str | Path | None = None,
    clip: str | ColourJudge | None = "openai/clip-vit-large-patch14",
    device: str = "auto",
    bgcolor: str = "#999",
    crop: bool = True,
    official_compat: bool = False,
    progress: bool = True,
    **rules: Any,
) -> dict[str, Any]:
    """Judge a tree of images; writes detections.jsonl, results.jsonl and score.json into `run` and returns the score.

    detector, clip: names for transformers, or objects with the protocols of `judges`. rules: fields of `Rules`.
    """
    options = Rules(**rules)
    folder = RunFolder(run)
    root = folder.images if images is None else Path(images)
    prompts = read(data, subset)
    manifest = read_json(folder.manifest) if folder.manifest.is_file() and images is None else None
    inputs = {"evaluation_metadata.jsonl": sha256(data)}
    reports.check_inputs(manifest, "geneval", inputs, folder.root)
    if images_per_prompt is None:
        images_per_prompt = manifest["settings"]["images_per_prompt"] if manifest else IMAGES_PER_PROMPT
    there = find_images(root, prompts, official_compat)
    excess = _check_numbers(root, there, images_per_prompt, official_compat)
    if (detector is None) == (detections is None):
        raise ValueError("give either --detector or --detections")
    names, failures = [name for _, name in there], {}
    faintest = min(SAVED_ABOVE, options.threshold, options.counting_threshold)
    if detections is not None:
        saved, judge_name = (
            SavedDetections(detections, faintest),
            f"saved detections, sha256 {sha256(detections)}",
        )
        if absent := [name for name in names if name not in saved]:
            raise ValueError(f"{detections} lacks {len(absent)} images of {root}, {absent[0]} for one")
    else:
        if isinstance(detector, str):
            detector = judge_models.Mask2FormerDetector(detector, device)
        saved, failures = _detect(folder, root, names, detector, faintest, progress)
        judge_name = detector.name
    colours = Colours(root, clip, device, bgcolor, crop)
    results = []
    for prompt, name in bar(there, "Judging", progress):
        if name not in failures:
            try:
                results.append(_result(prompt, name, saved[name], options, colours))
            except UnreadableImage as error:
                failures[name] = str(error)
    folder.write_text("results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    summary = aggregate(results, official_compat)
    usual = {"bgcolor": "#999", "crop": True, "images_per_prompt": IMAGES_PER_PROMPT}
    used = {"bgcolor": bgcolor, "crop": crop, "images_per_prompt": images_per_prompt}
    as_published = options == Rules() and used == usual and text_sha256(data) == DATA_SHA256
    of = Counter(prompt.tag for prompt in prompts)
    return reports.write_score(
        folder,
        reports.Score(
            "geneval",
            headline=("overall, mean of the six tags", summary["overall"]),
            scale=1.0,
            standard=as_published and not excess,
            n_expected=len(prompts) * images_per_prompt,
            n_scored=len(results),
            scores={
                tag: (
                    summary["tags"][tag],
                    sum(r["tag"] == tag for r in results),
                    of[tag] * images_per_prompt,
                )
                for tag in TAGS
            },
            judge={"detector": judge_name, "colours": colours.name},
            options=asdict(options) | used | {"official_compat": official_compat},
            inputs=inputs,
            manifest=manifest,
            notes=_notes(summary, used, failures, detections is None, official_compat),
        ),
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


def _check_numbers(
    root: Path, there: Sequence[tuple[Prompt, str]], images_per_prompt: int, official_compat: bool
) -> bool:
    """Whether a prompt has more images than expected: ValueError then, unless `official_compat`."""
    most, count = Counter(json.dumps(prompt.metadata) for prompt, _ in there).most_common(1)[0]
    if count > images_per_prompt and not official_compat:
        raise ValueError(
            f"{root} has {count} images of one prompt, {json.loads(most)['prompt']!r}, where {images_per_prompt} are "
            f"expected; --images-per-prompt {count} expects so many"
        )
    return count > images_per_prompt


def _notes(
    summary: Mapping[str, Any],
    used: Mapping[str, Any],
    failures: Mapping[str, str],
    own_detector: bool,
    official_compat: bool,
) -> list[str]:
    notes = [
        f"{summary['correct_images']:.2%} of the images, {summary['correct_prompts']:.2%} of the prompts correct"
        if summary["images"]
        else "no image could be judged"
    ]
    if official_compat:
        notes.append(f"mean of the tags that have images: {summary['overall']}")
    if failures:
        some = "; ".join(list(failures.values())[:3])
        notes.append(f"{len(failures)} images could not be read and are left out: {some}")
    if used["images_per_prompt"] != IMAGES_PER_PROMPT:
        notes.append(f"{used['images_per_prompt']} images a prompt; the benchmark has {IMAGES_PER_PROMPT}")
    if own_detector:
        notes.append(
            "Meta's Mask2Former through transformers is not OpenMMLab's checkpoint of the official scorer: "
            "scores differ slightly"
        )
    return notes


class Colours:
    """Names the colours of detections in images below `root`; the judge is loaded when first needed."""

    def __init__(self, root: Path, clip: str | ColourJudge | None, device: str, bgcolor: str, crop: bool):
        self.root, self.clip, self.device, self.bgcolor, self.crop = root, clip, device, bgcolor, crop
        self.name = "not asked"

    def __call__(self, name: str, label: str, found: Sequence[Detection]) -> Sequence[str]:
        if self.clip is None:
            raise ValueError("a prompt names a colour: --clip is needed")
        if isinstance(self.clip, str):
            self.clip = judge_models.ClipColours(self.clip, self.device)
        self.name = self.clip.name
        image = ImageOps.exif_transpose(read_image(self.root / name)).convert("RGB")
        try:
            views = [view(image, d, self.bgcolor, self.crop) for d in found]
        except ValueError as error:
            raise ValueError(f"{self.root / name}: {error}") from None
        return self.clip.colours(views, label)


def _result(
    prompt: Prompt, name: str, found: Sequence[Detection], options: Rules, colours: Colours
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
        image = image.crop(tuple(round(v) for v in found.box))
        if 0 in image.size:
            raise ValueError(f"no pixel lies in the box {found.box} of {found.label}")
    return image


def _detect(
    folder: RunFolder,
    root: Path,
    names: Sequence[str],
    detector: Detector,
    faintest: float,
    progress: bool,
) -> tuple[SavedDetections, dict[str, str]]:
    """Detections of every image, those on disk taken where image and detector are the same; and the images that
    cannot be read: name -> why."""
    path = folder.root / "detections.jsonl"
    identity = {"detector": detector.name, "saved_above": faintest}
    records = Records(path, "filename", identity, keep=False)
    hashes = {name: sha256(root / name) for name in names}
    failures = {}
    try:
        for name in bar([n for n in names if not records.has(n, hashes[n])], "Detecting", progress):
            try:
                image = ImageOps.exif_transpose(read_image(root / name)).convert("RGB")
            except UnreadableImage as error:
                failures[name] = str(error)
                continue
            found = detector.detect(image)
            records.add(name, hashes[name], {"detections": detection_record(found, faintest)})
    finally:
        records.close()
    return SavedDetections(path, faintest), failures
