# SPDX-License-Identifier: MIT
"""GenEval with --official-compat beside the official scorer, on random invented trees: GENEVAL_ROOT, TORCHUMM_ROOT.

The official script runs with its own main, its own selection, crops and rules; in place of mmdet and CLIP stand random
detections and a classifier that goes by a crop's bytes, so one different pixel in a crop gives another colour.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from official import functions, official_file
from PIL import Image, ImageOps

from janusflow_min.benchmarks import geneval, geneval_rules
from janusflow_min.benchmarks.detection import CLASSES, COLOURS, Detection, detection_record
from janusflow_min.benchmarks.geneval_rules import RELATIONS, TAGS

pytestmark = pytest.mark.official

SCRIPT = "evaluation/evaluate_images.py"
TORCHUMM = "eval/generation/geneval/evaluation/evaluate_images.py"
NAMES = ["ImageCrops", "compute_iou", "relative_position", "evaluate", "evaluate_image", "main"]


def colour_of(image: Image.Image) -> str:
    """Of an image's size and bytes: any difference changes it."""
    return COLOURS[zlib.crc32(repr(image.size).encode() + image.tobytes()) % len(COLOURS)]


def official(script: Path, detected: dict[str, tuple], options: dict[str, object]) -> types.SimpleNamespace:
    """The official functions, with `detected` (path -> boxes, masks) for the detector."""
    pd = pytest.importorskip("pandas")
    context = dict(
        np=np, Image=Image, ImageOps=ImageOps, json=json, os=os, re=re, sys=sys, torch=torch, pd=pd
    )
    context |= dict(COLORS=list(COLOURS), classnames=list(CLASSES), object_detector=None, tqdm=lambda x: x)
    context |= {name: options[key] for key, name in CONSTANTS.items()}
    arguments = {"bgcolor": options["bgcolor"], "crop": "1" if options["crop"] else "0"}
    context |= dict(args=types.SimpleNamespace(options=arguments), transform=colour_of)
    context["inference_detector"] = lambda _, path: detected[path]
    names = [*NAMES, "_load_completed"] if "_load_completed" in script.read_text(encoding="utf-8") else NAMES
    theirs = functions(script, *names, **context)
    crops = theirs["ImageCrops"]

    def classify(image, boxes, label):
        views = crops(image, [(tuple(box), mask) for box, mask in boxes])  # Pillow 13 takes no array
        return [views[i][0] for i in range(len(views))]

    theirs["color_classification"] = classify
    return types.SimpleNamespace(**theirs)


CONSTANTS = {
    "threshold": "THRESHOLD",
    "counting_threshold": "COUNTING_THRESHOLD",
    "max_objects": "MAX_OBJECTS",
    "max_overlap": "NMS_THRESHOLD",
    "position_threshold": "POSITION_THRESHOLD",
}


def random_options(rng: random.Random) -> dict[str, object]:
    usual = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16, "max_overlap": 1.0}
    usual |= {"position_threshold": 0.1, "bgcolor": "#999", "crop": True}
    other = {"threshold": [0.0, 0.01, 0.5], "counting_threshold": [0.3, 0.95], "max_objects": [1, 2, 40]}
    other |= {"max_overlap": [0.0, 0.3, 0.5, 0.999, 1.5], "position_threshold": [0.0, 0.25, 1.0]}
    other |= {"bgcolor": ["original", "#123456"], "crop": [False]}
    return usual | {key: rng.choice(values) for key, values in other.items() if rng.random() < 0.25}


def random_line(rng: random.Random, number: int) -> dict:
    clauses = []
    for i in range(rng.choice([1, 1, 1, 2, 3])):
        clause = {"class": rng.choice(CLASSES[:4]), "count": rng.choice([1] * 7 + [2, 3, 4, 1000])}
        if rng.random() < 0.2:
            clause["color"] = rng.choice(COLOURS)
        if i and rng.random() < 0.5:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(i)]
        clauses.append(clause)
    line = {"tag": rng.choice(list(TAGS)), "include": clauses, "prompt": f"a photo of «{number}»\u2028 é"}
    if rng.random() < 0.3:
        line["exclude"] = [{"class": rng.choice(CLASSES[:4]), "count": rng.choice([1, 2, 4, 17])}]
    return line


def random_detections(rng: random.Random, size: tuple[int, int], masks: bool) -> list[Detection]:
    """Some classes crowded, scores that often tie or lie on a threshold, boxes on whole pixels or between."""
    edges = [0.3, 0.9, 0.5, 0.05, 0.01, 0.95]
    edges += [float(np.nextafter(np.float32(x), np.float32(side))) for x in edges for side in (0, 1)]
    found = []
    for label in rng.sample(CLASSES[:5], rng.choice([0, 3, 4, 5])):
        for _ in range(rng.choice([1, 1, 2, 3, 5, 20, 45])):
            score = rng.choice(edges) if rng.random() < 0.5 else rng.random()
            x1, y1 = rng.uniform(0, size[0] - 2), rng.uniform(0, size[1] - 2)
            x2, y2 = rng.uniform(x1 + 1, size[0] + 2), rng.uniform(y1 + 1, size[1] + 2)
            if rng.random() < 0.6:
                x1, y1, x2, y2 = int(x1), int(y1), int(x2) + 1, int(y2) + 1
            box = np.array([x1, y1, x2, y2, score], np.float32).tolist()
            mask = (
                np.array(rng.choices([False, True], k=size[0] * size[1])).reshape(size[::-1])
                if masks
                else None
            )
            found.append(Detection(label, tuple(box[:4]), box[4], mask))
    return found


def as_mmdet(found: list[Detection], masks: bool):
    """The detector's answer in mmdet's form: per class an (n, 5) float32 array, and the masks."""
    own = {label: [d for d in found if d.label == label] for label in CLASSES}
    boxes = [np.array([[*d.box, d.score] for d in own[c]], np.float32).reshape(-1, 5) for c in CLASSES]
    return (boxes, [[d.mask for d in own[c]] for c in CLASSES]) if masks else boxes


def random_tree(rng: random.Random, root: Path) -> tuple[list[dict], dict, dict]:
    """A tree in every form that the official scorer takes; its lines, detections by path and in mmdet's form."""
    lines, found, detected = [], {}, {}
    folders = rng.sample(["00000", "0001", "2", "10", "00553", "\u0663", "7"], rng.randint(1, 6))
    for number, folder in enumerate(folders):
        line = random_line(rng, number)
        lines.append(line)
        samples = root / folder / "samples"
        samples.mkdir(parents=True)
        (root / folder / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
        names = ["0000.png", "00001.png", "2.png", "03.png", "12345678.png", "4.png.bak.png", "\u0665.png"]
        for name in [*rng.sample(names, rng.randint(0, 5)), "grid.png", "x0.png"]:
            size = (rng.randint(4, 12), rng.randint(4, 12))
            mode = rng.choice(["RGB", "RGB", "L", "RGBA", "P"])
            image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode)
            exif = Image.Exif()
            exif[0x0112] = rng.choice([1, 1, 3, 6, 8])
            image.save(samples / name, exif=exif)
            turned = size[::-1] if exif[0x0112] in (6, 8) else size
            masks = rng.random() < 0.7
            path = f"{folder}/samples/{name}"
            found[path] = random_detections(rng, turned, masks)
            detected[str(samples / name)] = as_mmdet(found[path], masks)
    (root / "_gen_workspace").mkdir()
    return lines, found, detected


@pytest.mark.parametrize(("variable", "path"), [("GENEVAL_ROOT", SCRIPT), ("TORCHUMM_ROOT", TORCHUMM)])
def test_trees_end_in_the_same_numbers(variable, path, tmp_path):
    """Stops: another choice of images, detections, crops, relations or means than the official one: 40 random trees."""
    script = official_file(variable, path)
    summary = re.sub(
        r":\.(2%|5f)\}", ":.17g}", script.with_name("summary_scores.py").read_text(encoding="utf-8")
    )
    (tmp_path / "summary_scores.py").write_text(summary, encoding="utf-8")
    (tmp_path / "object_names.txt").write_bytes(script.with_name("object_names.txt").read_bytes())
    assert (tmp_path / "object_names.txt").read_text().split("\n")[:80] == list(CLASSES)
    images = right = 0
    for seed in range(40):
        rng = random.Random(seed)
        root = tmp_path / f"images{seed}"
        lines, found, detected = random_tree(rng, root)
        options = random_options(rng)
        outfile = tmp_path / f"results{seed}.jsonl"
        official(script, detected, options).main(
            types.SimpleNamespace(imagedir=str(root), outfile=str(outfile))
        )
        theirs = [
            json.loads(line) for line in outfile.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        data, saved = tmp_path / "data.jsonl", tmp_path / "saved.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines[: rng.randint(1, len(lines))]))
        records = [{"filename": name, "detections": detection_record(d, -1.0)} for name, d in found.items()]
        saved.write_text("".join(json.dumps(record) + "\n" for record in records))
        judge = types.SimpleNamespace(
            name="bytes", colours=lambda views, label: [colour_of(v) for v in views]
        )
        mine = geneval.ScoreOptions(
            **dict(data=data, images=root, detections=saved, clip=judge, official_compat=True, subset=True),
            **options,
            progress=False,
        )
        if not theirs:
            with pytest.raises(FileNotFoundError, match="no image of the layout"):
                geneval.score(tmp_path / f"run{seed}", mine)
            continue
        score = geneval.score(tmp_path / f"run{seed}", mine)
        ours = [json.loads(line) for line in (tmp_path / f"run{seed}/results.jsonl").read_text().splitlines()]
        for record in theirs:
            record["filename"] = Path(record["filename"]).relative_to(root).as_posix()
        by_name = {record["filename"]: record for record in ours}
        assert sorted(by_name) == sorted(record["filename"] for record in theirs)
        for record in theirs:
            mine = by_name[record["filename"]]
            assert mine["correct"] == record["correct"], (record, mine)
            assert json.loads(mine["details"]) == json.loads(record["details"])
            assert [mine[key] for key in ("tag", "prompt", "metadata")] == [
                record[key] for key in ("tag", "prompt", "metadata")
            ]
            assert len(mine["reason"].splitlines()) == len(record["reason"].splitlines())
        printed = subprocess.run(
            [sys.executable, tmp_path / "summary_scores.py", outfile],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        tags = dict(re.findall(r"^(\w+)\s+= (\S+) \(", printed, re.MULTILINE))
        there = {tag: entry["value"] for tag, entry in score["scores"].items() if entry["value"] is not None}
        assert {tag: float(value) for tag, value in tags.items()} == there
        mine = geneval_rules.aggregate(ours, official_compat=True)
        for key, text in (
            ("overall", r"Overall score \(avg. over tasks\): (\S+)"),
            ("images", r"Total images: (\S+)"),
            ("prompts", r"Total prompts: (\S+)"),
            ("correct_images", r"% correct images: (\S+)"),
            ("correct_prompts", r"% correct prompts: (\S+)"),
        ):
            assert mine[key] == pytest.approx(float(re.search(text, printed)[1]), rel=1e-14, abs=0.0)
        images += len(ours)
        right += sum(record["correct"] for record in ours)
    assert images > 300 and 0.05 < right / images < 0.95


def test_relations_and_overlaps_are_alike():
    """Stops: a relation that rounds to the other side of its limit: 20,000 pairs of boxes, a third of them on edges."""
    script = official_file("GENEVAL_ROOT", SCRIPT)
    rng, met = np.random.default_rng(0), set()
    for threshold in (0.1, 0.0, 0.05, 0.3):
        theirs = functions(script, "relative_position", "compute_iou", np=np, POSITION_THRESHOLD=threshold)
        for i in range(5000):
            kind = i % 3
            values = rng.integers(0, 12, 8) * (1.0, 0.5, 5.0)[i % 5 % 3] if kind else rng.uniform(0, 400, 8)
            a, b = np.array([[*values[:4], 0.5], [*values[4:], 0.5]], np.float32)
            if kind == 2:  # a and b of one size, side by side
                b[:4] = a[:4] + np.float32(rng.choice([0, 1, 2, 2.5, 10]))
            expected = theirs["relative_position"]((a, None), (b, None))
            assert geneval_rules.relations(a[:4].tolist(), b[:4].tolist(), threshold) == expected
            assert geneval_rules.iou(a, b) == theirs["compute_iou"](a, b)
            met.add(frozenset(expected))
    assert len(met) == 9


def test_the_published_file_is_known():
    """Stops: a headline that the published prompts do not get."""
    path = official_file("GENEVAL_ROOT", "prompts/evaluation_metadata.jsonl")
    assert len(geneval.read(path)) == 553 and geneval.text_sha256(path) == geneval.DATA_SHA256
