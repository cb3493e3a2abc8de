# SPDX-License-Identifier: MIT
"""Invented data in the shapes of the published files, as small as can be. A helper, not a test."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image

from janusflow_min.benchmarks.wise_sets import DATASETS

DPG_COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad"]
DPG_COLUMNS += ["category_detailed", "tuple", "question_natural_language"]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour).save(path)
    return path


def write_geneval(metadata: Path, detections: Path) -> None:
    """One prompt, and what a detector would have found in its four images."""
    cat = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
    write_lines(metadata, [cat])
    found = {"detections": [{"class": "cat", "box": [0, 0, 9, 9], "score": 0.9}]}
    write_lines(detections, [{"filename": f"00000/samples/{k:05d}.png"} | found for k in range(4)])


def write_dpg(prompts: Path, questions: Path, answers: Path) -> None:
    """One prompt with one question, and what a judge would have said of its four tiles."""
    prompts.mkdir(parents=True, exist_ok=True)
    (prompts / "1.txt").write_text("A blue kettle, on a stove.\n", encoding="utf-8")
    with open(questions, "w", encoding="utf-8", newline="") as f:
        row = [
            "1",
            "A blue kettle, on a stove.",
            "",
            "1",
            "0",
            "",
            "",
            "entity - whole (kettle)",
            "Is there one?",
        ]
        csv.writer(f).writerows([DPG_COLUMNS, row])
    write_lines(answers, [{"item_id": "1", "answers": [{"1": "yes"}] * 4}])


def write_wise(folder: Path) -> None:
    """One question in each file of the legacy set."""
    for stem, (number, _) in DATASETS["legacy"].files.items():
        record = {"Prompt": f"what {number} hints at", "Explanation": f"shows {number}", "prompt_id": number}
        write_json(folder / f"{stem}.json", [record | {"Category": "Biology", "Subcategory": "Animal"}])


def write_uni_mmmu(folder: Path) -> None:
    """One sample of the task `science`."""
    write_image(folder / "science/imgs/1.png")
    sample = {"input_image_file_path_list": ["./data/science/imgs/1.png"]}
    sample |= {"input_prompt": "It is heated.", "output_prompt": "It has melted."}
    blocks = [{"level_1_category": "Physics", "level_2_category": "Heat", "samples": [sample]}]
    write_json(folder / "science/dim_all.json", blocks)


def write_rows(manifest: Path) -> None:
    """A training manifest: two images with captions, two conversations, two texts."""
    rows: list[dict[str, Any]] = []
    for k, colour in enumerate(("red", "blue")):
        name = write_image(manifest.parent / f"{k}.png", colour).name
        ask = {"role": "User", "content": "<image_placeholder>\nWhat colour is it?", "images": [name]}
        rows += [{"image": name, "text": f"a {colour} square"}, {"text": f"The sky is {colour}."}]
        rows += [{"conversation": [ask, {"role": "Assistant", "content": colour}]}]
    write_lines(manifest, rows)
