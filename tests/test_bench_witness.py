# SPDX-License-Identifier: MIT
"""Our scoring rules beside the official scorers, on random judgements: opt-in, nothing of theirs is copied.

TORCHUMM_ROOT=path pytest tests/test_bench_witness.py, the path being a checkout of AIFrontierLab/TorchUMM, which
holds GenEval's, DPG-Bench's and WISE's scorers and GenEval's and DPG-Bench's prompts. Their functions are taken out
of the files and run with judges of our own in place of their models, so none of what they import is needed.
"""

from __future__ import annotations

import ast
import json
import os
import os.path as osp
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from janusflow_min.benchmarks import dpg_bench, geneval, wise
from janusflow_min.benchmarks.geneval import CLASSES, COLOURS, Detection, Rules

pytestmark = pytest.mark.skipif(
    "TORCHUMM_ROOT" not in os.environ, reason="TORCHUMM_ROOT names no checkout of TorchUMM"
)


@pytest.fixture(scope="module")
def scorers() -> Path:
    return Path(os.environ["TORCHUMM_ROOT"]) / "eval" / "generation"


def functions(path: Path, *names: str, **context: Any) -> dict[str, Any]:
    """Functions of a file, without running the rest of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(tree, str(path), "exec"), context)
    return context


def test_published_prompts_are_read(scorers):
    assert len(geneval.read(scorers / "geneval/prompts/evaluation_metadata.jsonl")) == 553
    prompts = dpg_bench.read(scorers / "dpg_bench/prompts")
    assert len(prompts) == 1065 and list(prompts)[-1] == "whoops9"


@pytest.mark.parametrize("max_overlap", [1.0, 0.5])
def test_geneval_judges_alike(scorers, tmp_path, max_overlap):
    """3,000 random images of the published prompts."""
    rng, colour_of = random.Random(0), {}
    results: list[np.ndarray] = []
    theirs = functions(
        scorers / "geneval/evaluation/evaluate_images.py",
        *("compute_iou", "relative_position", "evaluate", "evaluate_image"),
        **dict(
            np=np, Image=Image, ImageOps=ImageOps, json=json, COLORS=list(COLOURS), classnames=list(CLASSES)
        ),
        **dict(THRESHOLD=0.3, COUNTING_THRESHOLD=0.9, MAX_OBJECTS=16, POSITION_THRESHOLD=0.1),
        NMS_THRESHOLD=max_overlap,
        object_detector=None,
        inference_detector=lambda *_: results,
        color_classification=lambda image, boxes, label: [colour_of[tuple(box[:4])] for box, _ in boxes],
    )
    path = tmp_path / "empty.png"
    Image.new("RGB", (100, 100)).save(path)
    prompts = geneval.read(scorers / "geneval/prompts/evaluation_metadata.jsonl")
    right = 0
    for _ in range(3000):
        prompt = rng.choice(prompts)
        wanted = {clause["class"]: clause.get("color", "red") for clause in prompt.metadata["include"]}
        found = []
        for label in {*wanted, rng.choice(CLASSES)}:
            for _ in range(rng.choice([0, 1, 1, 2, 3, 4, 5])):
                x, y = rng.uniform(0, 60), rng.uniform(0, 60)
                box = (x, y, x + rng.uniform(1, 40), y + rng.uniform(1, 40))
                score = rng.choice([0.2, 0.31, 0.5, 0.89, 0.91, 0.99]) + rng.uniform(0, 0.005)
                found.append(Detection(label, box, score))
                colour_of[box] = wanted.get(label, "red") if rng.random() < 0.7 else rng.choice(COLOURS)
        results[:] = [
            np.array([[*d.box, d.score] for d in found if d.label == label]).reshape(-1, 5)
            for label in CLASSES
        ]
        expected = theirs["evaluate_image"](str(path), prompt.metadata)
        objects = geneval.keep(found, prompt.tag, Rules(max_overlap=max_overlap))
        correct, reason = geneval.judge(
            prompt.metadata, objects, lambda _, things: [colour_of[d.box] for d in things]
        )
        assert correct == bool(expected["correct"]), (prompt.metadata, expected["reason"], reason)
        details = {label: [[*d.box, d.score] for d in things] for label, things in objects.items()}
        assert details == json.loads(expected["details"])
        right += correct
    assert 300 < right < 2700


def test_dpg_bench_scores_alike(scorers, tmp_path):
    """300 random items, some with a dependency that stands behind its child."""
    rng = random.Random(0)
    said: dict[tuple[bytes, str], str] = {}

    def vqa(image, question):
        return said.setdefault((image.tobytes(), question), rng.choice(["yes", "yes", "no", "Yes"]))

    theirs = functions(
        scorers / "dpg_bench/compute_dpg_bench.py",
        "compute_dpg_one_sample",
        "crop_image",
        Image=Image,
        osp=osp,
    )
    path = tmp_path / "item.png"
    dpg_bench.grid([Image.new("RGB", (2, 2), colour) for colour in ("red", "green", "blue", "white")]).save(
        path
    )
    with Image.open(path) as image:
        cut = dpg_bench.tiles(image, 4)
    for _ in range(300):
        said.clear()
        n = rng.randint(1, 8)
        parents = [
            tuple({rng.randint(1, n) for _ in range(rng.randint(0, 2))} - {i}) for i in range(1, n + 1)
        ]
        questions = [
            dpg_bench.Question(i, p, "entity", "entity - whole", f"{i}?") for i, p in enumerate(parents, 1)
        ]
        asked = {
            "qid2tuple": {q.id: "entity - whole (x)" for q in questions},
            "qid2question": {q.id: q.text for q in questions},
            "qid2dependency": {q.id: list(q.parents) or [0] for q in questions},
        }
        args = SimpleNamespace(pic_num=4, res_path=str(tmp_path / "result.txt"))
        expected = theirs["compute_dpg_one_sample"](
            args=args,
            question_dict={"item": asked},
            image_path=str(path),
            vqa_model=SimpleNamespace(vqa=vqa),
            resolution=2,
        )
        raw = [
            {q.id: int(dpg_bench.is_yes(said[tile.tobytes(), q.text], compat=True)) for q in questions}
            for tile in cut
        ]
        assert np.mean(dpg_bench.item_score(questions, raw)) == pytest.approx(expected[0])


def test_wise_weighs_alike(scorers):
    theirs = functions(scorers / "wise/Calculate.py", "calculate_wiscore")["calculate_wiscore"]
    for grades in np.ndindex(3, 3, 3):
        assert wise.wiscore(*grades) == theirs(*grades)
