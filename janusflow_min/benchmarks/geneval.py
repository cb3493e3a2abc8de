# SPDX-License-Identifier: MIT
"""GenEval: are the objects there, in the number, colour and place that the prompt names?

Reads `evaluation_metadata.jsonl`, writes the tree that the official scorer reads, and scores such a tree by the
official rules from an instance segmenter's detections and a CLIP colour classifier. Formats and rules follow
djghosh13/geneval (`evaluation/evaluate_images.py`, `summary_scores.py`). The rules are pure Python: their only
input are `Detection`s, and a saved file of them does as well as a detector.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from . import report as reports
from .detection import CLASSES, COLOURS, Detection
from .report import Published
from .runner import Coverage, Item, Option, RunFolder, Settings, read_json, run, sha256

if TYPE_CHECKING:
    from .judges import ColourJudge, Detector

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
BEGINNING = (
    "a photo of "  # of every published prompt, of none of the lengthened ones that TorchUMM has beside them
)
SAVED_ABOVE = 0.05  # score of the faintest detections that are kept on disk
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
    "generate": (DATA, SUBSET, Option("--images-per-prompt", "images of each prompt", 4, int)),
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
    path = Path(path)
    prompts = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        place = f"{path}:{number}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: no JSON object: {error}") from None
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
                colour is None or colour in COLOURS,
                f"{where}.color must be one of {', '.join(COLOURS)}, got {colour!r}",
            )
            fits = position is None or (
                isinstance(position, list)
                and len(position) == 2
                and position[0] in RELATIONS
                and isinstance(position[1], int)
                and 0 <= position[1] < len(clauses)
            )
            need(
                fits,
                f"{where}.position must be [one of {', '.join(RELATIONS)}, index of a clause], got {position!r}",
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
    settings: Settings, out: str | Path, data: str | Path, images_per_prompt: int = 4, subset: bool = False
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
        found = [d for d in detections if d.label == label and d.score > limit]
        found = sorted(found, key=lambda d: -d.score)[: rules.max_objects]
        if rules.max_overlap < 1:
            found = suppress(found, rules.max_overlap)
        if found:
            kept[label] = found
    return kept


def suppress(detections: Sequence[Detection], limit: float) -> list[Detection]:
    """Greedy non-maximum suppression of one class, best first: IoU of at least `limit` drops the fainter box."""
    kept: list[Detection] = []
    for candidate in detections:
        if all(iou(candidate.box, better.box) < limit for better in kept):
            kept.append(candidate)
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose last pixel is part of them."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    both = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - both
    return both / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where box `a` lies as seen from box `b`: none, one or two of RELATIONS."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    size = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    apart = [math.copysign(max(abs(o) - threshold * s, 0.0), o) for o, s in zip(offset, size, strict=True)]
    if all(abs(value) < 1e-3 for value in apart):
        return set()
    x, y = (value / math.hypot(*offset) for value in apart)  # by the length before the sizes were taken off
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
        elif clause.get("color") is not None:
            seen = list(colours(label, found))
            if seen.count(clause["color"]) < count:
                names = ", ".join(f"{n} {name}" for name, n in Counter(seen).items())
                wrong = f"expected {clause['color']} {label}>={count}, found {seen.count(clause['color'])} ({names})"
        if not wrong and clause.get("position") is not None:
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
    target = groups[index] if index < len(groups) else None
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


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy by tag over images, their unweighted mean, and what the official summary prints beside it.

    results: records with tag, correct and metadata. A tag without an image is None, and so is the mean then.
    """
    tags = {tag: [bool(r["correct"]) for r in results if r["tag"] == tag] for tag in TAGS}
    means = {tag: float(np.mean(values)) if values else None for tag, values in tags.items()}
    prompts: dict[str, bool] = {}
    for r in results:
        prompts[r["metadata"]] = prompts.get(r["metadata"], False) or bool(r["correct"])
    return {
        "tags": means,
        "overall": None if None in means.values() else float(np.mean(list(means.values()))),
        "images": len(results),
        "prompts": len(prompts),
        "correct_images": float(np.mean([bool(r["correct"]) for r in results])) if results else None,
        "correct_prompts": float(np.mean(list(prompts.values()))) if prompts else None,
    }


# Saved detections -----------------------------------------------------------------------


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    flat = np.asarray(mask, bool).flatten(order="F")
    change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], change, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode_mask(record: Mapping[str, Any]) -> np.ndarray:
    height, width = record["size"]
    counts = np.asarray(record["counts"], dtype=np.int64)
    if counts.sum() != height * width:
        raise ValueError(f"a mask of {height} x {width} needs {height * width} pixels, got {counts.sum()}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def detection_record(found: Sequence[Detection]) -> list[dict[str, Any]]:
    return [
        {
            "class": d.label,
            "box": [float(v) for v in d.box],
            "score": float(d.score),
            **({} if d.mask is None else {"mask": encode_mask(d.mask)}),
        }
        for d in found
        if d.score > SAVED_ABOVE
    ]


class SavedDetections(Mapping[str, list[Detection]]):
    """file name -> detections of a detections.jsonl, read when asked for: with their masks they are large.

    A line has `filename` and `detections` (class, box, score and, where there is one, mask); the last of a file name
    counts. ValueError with file and line for what does not fit.
    """

    def __init__(self, path: str | Path):
        self.path, self.lines = Path(path), {}  # file name -> (number of the line, where it starts)
        with open(self.path, "rb") as f:
            number, start = 1, 0
            for line in f:
                self.lines[self._record(line, number)["filename"]] = (number, start)
                number, start = number + 1, start + len(line)

    def __getitem__(self, name: str) -> list[Detection]:
        number, start = self.lines[name]
        with open(self.path, "rb") as f:
            f.seek(start)
            record = self._record(f.readline(), number)
        return [
            Detection(
                d["class"], tuple(d["box"]), d["score"], decode_mask(d["mask"]) if d.get("mask") else None
            )
            for d in record["detections"]
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            for d in record["detections"]:
                if (
                    d["class"] not in CLASSES
                    or len([float(v) for v in d["box"]]) != 4
                    or float(d["score"]) < 0
                ):
                    raise ValueError(f"class, box or score of {d}")
            if not isinstance(record["filename"], str):
                raise ValueError(f"the filename {record['filename']!r}")
            return record
        except (KeyError, TypeError, ValueError) as error:
            form = '{"filename": "00000/samples/0.png", "detections": [{"class", "box": [x1, y1, x2, y2], "score"}]}'
            raise ValueError(
                f"{self.path}:{number}: a line needs {form}: {type(error).__name__}: {str(error)[:200]}"
            ) from None


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
    progress: bool = True,
    **rules: Any,
) -> dict[str, Any]:
    """Judge a tree of images; writes detections.jsonl, results.jsonl and score.json into `run` and returns the score.

    detector, clip: names for transformers, or objects with the protocols of `judges`. rules: fields of `Rules`.
    """
    from . import judge_models, judges

    options = Rules(**rules)
    folder = RunFolder(run)
    root = folder.images if images is None else Path(images)
    prompts = read(data, subset)
    manifest = read_json(folder.manifest) if folder.manifest.is_file() and images is None else None
    reports.check_inputs(manifest, "geneval", {"evaluation_metadata.jsonl": sha256(data)}, folder.root)
    if images_per_prompt is None:
        images_per_prompt = manifest["settings"]["images_per_prompt"] if manifest else 4
    whole = items(prompts, images_per_prompt)
    _check_tree(root, whole)
    there = [(prompt, name) for prompt, item in zip(prompts, whole, strict=True) for name in item.files]
    there = [(prompt, name) for prompt, name in there if (root / name).is_file()]
    if not there:
        raise FileNotFoundError(f"no image of the layout NNNNN/samples/NNNNN.png in {root}")
    names = [name for _, name in there]
    if (detector is None) == (detections is None):
        raise ValueError("give either --detector or --detections")
    if detections is not None:
        saved, judge_name = SavedDetections(detections), f"saved detections, sha256 {sha256(detections)}"
        if absent := [name for name in names if name not in saved]:
            raise ValueError(f"{detections} lacks {len(absent)} images of {root}, {absent[0]} for one")
    else:
        detector = (
            judge_models.Mask2FormerDetector(detector, device) if isinstance(detector, str) else detector
        )
        saved, judge_name = _detect(folder, root, names, detector, progress), detector.name
    colour_names: list[str] = []

    @functools.cache
    def colour_judge() -> ColourJudge:  # only where a prompt names a colour
        if clip is None:
            raise ValueError("a prompt names a colour: --clip is needed")
        chosen = judge_models.ClipColours(clip, device) if isinstance(clip, str) else clip
        colour_names.append(chosen.name)
        return chosen

    def colours(name: str, label: str, found: Sequence[Detection]) -> Sequence[str]:
        with Image.open(root / name) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        return colour_judge().colours([view(image, d, bgcolor, crop) for d in found], label)

    results = [
        _result(prompt, name, keep(saved[name], prompt.tag, options), colours, options.position_threshold)
        for prompt, name in judges.bar(there, "Judging", progress)
    ]
    folder.write_text("results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    summary = aggregate(results)
    of = Counter(prompt.tag for prompt in prompts)
    standard = of == TAGS and all(prompt.prompt.startswith(BEGINNING) for prompt in prompts)
    expected = len(prompts) * images_per_prompt
    notes = [
        f"{summary['correct_images']:.2%} of the images, {summary['correct_prompts']:.2%} of the prompts correct"
    ]
    if images_per_prompt != 4:
        notes.append(f"{images_per_prompt} images a prompt; the benchmark has 4")
    if detections is None:
        notes.append(
            "Meta's Mask2Former through transformers is not OpenMMLab's checkpoint of the official scorer: "
            "scores differ slightly"
        )
    return reports.write_score(
        folder,
        reports.Score(
            "geneval",
            headline=("overall, mean of the six tags", summary["overall"]),
            scale=1.0,
            standard=standard,
            n_expected=expected,
            n_scored=len(results),
            scores={
                tag: (
                    summary["tags"][tag],
                    sum(r["tag"] == tag for r in results),
                    of[tag] * images_per_prompt,
                )
                for tag in TAGS
            },
            judge={
                "detector": judge_name,
                "colours": colour_names[0] if colour_names else "not asked",
            },
            options={f.name: getattr(options, f.name) for f in fields(options)}
            | {"bgcolor": bgcolor, "crop": crop, "images_per_prompt": images_per_prompt},
            inputs={"evaluation_metadata.jsonl": sha256(data)},
            manifest=manifest,
            notes=notes,
        ),
    )


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, PUBLISHED)


def _result(
    prompt: Prompt,
    name: str,
    objects: Mapping[str, Sequence[Detection]],
    colours: Callable[[str, str, Sequence[Detection]], Sequence[str]],
    position_threshold: float,
) -> dict[str, Any]:
    """An image's line of results.jsonl, the official one."""
    correct, reason = judge(prompt.metadata, objects, functools.partial(colours, name), position_threshold)
    boxes = {label: [[*d.box, d.score] for d in found] for label, found in objects.items()}
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
    """What the colour judge sees of an object: all else painted over, cut to its box."""
    if bgcolor != "original" and found.mask is not None:
        if found.mask.shape != (image.height, image.width):
            raise ValueError(
                f"a mask must have the image's size {image.height} x {image.width}, got {found.mask.shape}"
            )
        empty = Image.new("RGB", image.size, bgcolor)
        image = Image.composite(image, empty, Image.fromarray(found.mask.astype(np.uint8) * 255))
    return image.crop(tuple(round(v) for v in found.box)) if crop else image


def _check_tree(root: Path, whole: Sequence[Item]) -> None:
    """Every metadata.jsonl that is there is the file's own line: else the images are of other prompts."""
    for item in whole:
        for name, text in item.texts.items():
            path = root / name
            if path.is_file() and read_json(path) != json.loads(text):
                raise ValueError(
                    f"{path} is not line {item.index + 1} of --data: the images are of other prompts"
                )


def _detect(
    folder: RunFolder, root: Path, names: Sequence[str], detector: Detector, progress: bool
) -> SavedDetections:
    """Detections of every image, those on disk taken where image and detector are the same."""
    from .judges import Records, bar

    path = folder.root / "detections.jsonl"
    records = Records(path, "filename", {"detector": detector.name}, keep=False)
    hashes = {name: sha256(root / name) for name in names}
    try:
        for name in bar([n for n in names if not records.has(n, hashes[n])], "Detecting", progress):
            with Image.open(root / name) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
            records.add(name, hashes[name], {"detections": detection_record(detector.detect(image))})
    finally:
        records.close()
    return SavedDetections(path)
