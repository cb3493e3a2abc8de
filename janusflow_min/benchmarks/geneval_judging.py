# SPDX-License-Identifier: MIT
"""What GenEval's judges see: the objects in every image, by a detector or from a saved file, and their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..files import sha256
from . import judge_models
from .detection import SAVED_ABOVE, Detection, SavedDetections, detection_record
from .judges import Detector, Records, bar, merge_ranks, rank_file
from .ranks import RankInfo, rank_device, shard, wait_for_ranks
from .reading import UnreadableImage, read_image
from .scoring import ScoringRun

if TYPE_CHECKING:
    from .geneval import ScoreOptions


def detections(
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
        changed = (n for n in names if saved.seen.get(n, "") not in ("", sha256(scoring.images / n)))
        if (name := next(changed, None)) is not None:
            raise ValueError(
                f"{scoring.images / name} is not the image that {options.detections} is about: detect again"
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
    if world.size > 1 and world.rank == 0:  # with the others' shares, and to name what nobody could read
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
