# SPDX-License-Identifier: MIT
"""Uni-MMMU's data, invented in the shape of the released files, and judges that say what they are told. No test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

from janusflow_min.benchmarks import uni_mmmu
from janusflow_min.benchmarks.runner import Settings
from janusflow_min.benchmarks.uni_mmmu import boards


def generate_in(settings, run, data, **options):
    return uni_mmmu.generate(settings, run, uni_mmmu.GenerateOptions(data=data, **options))


def score_of(run, data, **options):
    return uni_mmmu.score(run, uni_mmmu.ScoreOptions(data=data, **options))


MAZE = ["######", "#S  ##", "## ###", "##  G#", "######", "######"]


def draw_maze(rows, side: int = 30, pad: int = 0, size=None) -> Image.Image:
    """In the benchmark's colours: the agent is a dot, the goal a square of its own."""
    image = Image.new("RGB", size or (6 * side + 2 * pad, 6 * side + 2 * pad), "white")
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            x, y = pad + c * side, pad + r * side
            box = [x, y, x + side - 1, y + side - 1]
            draw.rectangle(box, fill={"#": boards.WALL, "G": boards.GOAL}.get(cell, boards.FLOOR))
            if cell == "S":
                m = side * 0.2
                draw.ellipse([x + m, y + m, x + side - m, y + side - m], fill=boards.START)
    return image


def draw_puzzle(rows, side: int = 60, pad: int = 8) -> Image.Image:
    image = Image.new("RGB", (3 * side + 2 * pad, 3 * side + 2 * pad), "white")
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            x, y = pad + c * side, pad + r * side
            draw.rectangle([x, y, x + side - 1, y + side - 1], fill=boards.TILES[int(cell) - 1])
    return image


def answer(*words) -> str:
    return f"<ANSWER_JSON>{json.dumps(words)}</ANSWER_JSON>"


def save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 40), colour)


MAZE_2 = ["######", "# S ##", "## ###", "##  G#", "######", "######"]
SQUARE = '<svg width="8" height="8"><rect width="4" height="4" fill="#E74C3C"/></svg>'


def make_data(root: Path) -> Path:
    """In the released layout: two cases of each task, and a maze and a sample that are left out."""
    samples = []
    for name in ("A_0001", "B/0002"):
        stem = name.replace("/", "")
        save(plain("red"), root / f"svg/pngs/{stem}.png")
        (root / "svg/svgs").mkdir(exist_ok=True)
        (root / f"svg/svgs/{stem}.svg").write_text(SQUARE)
        samples.append({"id": name, "difficulty": "A", "svg": f"svgs/{stem}.svg", "png": f"pngs/{stem}.png"})
    write(root / "svg/metadata.json", {"samples": samples})

    def sample(k: int) -> dict:
        save(plain("blue"), root / f"science/imgs/{k}.png")
        return {
            "input_image_file_path_list": [f"./data/science/imgs/{k}.png"],
            "input_prompt": f" It is heated {k} times. ",
            "output_prompt": "It has melted.",
        }

    unusable = {"input_image_file_path_list": [], "input_prompt": "x", "output_prompt": "y"}
    blocks = [{"level_1_category": "Physics", "level_2_category": "Heat", "samples": [sample(1), unusable]}]
    write(root / "science/dim_all.json", [*blocks, {"samples": [sample(3)]}])

    def problem(k: int) -> dict:
        return {
            "type": "calculation" if k else "proof",
            "problem_text_en": f"Find x. {{braces}} {k}",
            "choices_en": ["3", "4"],
            "auxiliary_text_en": "Connect B and D.",
            "original_image": save(plain("white"), root / f"math_data/{k}.png"),
            "auxiliary_image": save(plain("grey"), root / f"math_data/{k}_aux.png"),
            "solution_en": "x = 4",
        }

    write(root / "math_data/filtered.json", {"set A": {"1": problem(0), "2": problem(1)}})

    items = []
    jigsaw = root / "jigsaw_dataset_2x2ref"
    for k in (0, 1):
        here = jigsaw / f"ex_{k}"
        for name, colour in {
            "ref": "red",
            "c0": "green",
            "c1": "blue",
            "right": "navy",
            "wrong": "tan",
        }.items():
            save(plain(colour), here / f"{name}.png")
        item = {"id": f"ex_{k}", "label": k, "ref_panel": {"ref_image_path": f"ex_{k}/ref.png"}}
        item["candidate_paths"] = [f"ex_{k}/c0.png", f"ex_{k}/c1.png"]
        for key, name in (("gt_completed_2x2_path", "right"), ("gt_wrong_2x2_path", "wrong")):
            item[key] = f"./data/jigsaw_dataset_2x2ref/ex_{k}/{name}.png"
        items.append(item)
    write(jigsaw / "metadata.json", {"items": items})

    for number in ("00003", "00015", "00020"):
        for k, rows in enumerate((MAZE, MAZE_2)):
            save(draw_maze(rows), root / f"maze/maze_6x6_{number}_steps/maze_step_{k:04d}.png")
        write(root / f"maze/maze_6x6_steps_{number}.json", {"steps_long": ["Right"]})

    items = []
    for number in ("00001", "00002"):
        for k, rows in enumerate((["123", "456", "789"], ["123", "456", "798"])):
            save(draw_puzzle(rows), root / f"sliding/demo_3x3_{number}_steps/demo_step_{k:04d}.png")
        write(root / f"sliding/demo_3x3_steps_words_{number}.json", {"steps_words": ["left"]})
        words = f"data/sliding/demo_3x3_steps_words_{number}.json"
        items.append({"steps_dir": f"data/sliding/demo_3x3_{number}_steps", "steps_words_json": words})
    write(root / "sliding/summary_steps_le_8.json", {"items": items})
    return root


FAST = Settings(
    model="tiny", device="cpu", dtype="float32", num_inference_steps=1, batch_size=4, progress=False
)


class Judge:
    """A judge that sees nothing and says the same to all."""

    name = "always yes"

    def __init__(self, text: str):
        self.text, self.messages = text, []

    def ask(self, messages):
        self.messages.append(messages)
        return self.text


YES = json.dumps(
    dict.fromkeys(
        (
            "reasoning_correct",
            "result_correct",
            "image_correct",
            "overlay_ok",
            "text_ok",
            "text_semantic_match",
        ),
        1,
    )
    | {"shape_color_accuracy": 5, "position_accuracy": 4, "verdict": "match"}
)


class Same:
    name = "equal bytes"

    def __call__(self, a, b) -> float:
        return float(a.convert("RGB").tobytes() != b.convert("RGB").tobytes())


def copy(run: Path, tmp_path: Path, **texts: str) -> Path:
    """A copy of a run, with the texts of some tasks replaced."""
    new = shutil.copytree(run, tmp_path / "run")
    for task, text in texts.items():
        for path in (new / task).glob("*/model_text.txt"):
            path.write_text(text)
    return new
