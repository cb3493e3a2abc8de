# SPDX-License-Identifier: MIT
"""DPG-Bench with --official-compat beside the official scorer, on random invented folders: ELLA_ROOT, TORCHUMM_ROOT.

The official script runs with its own main; in place of mPLUG stands a judge that goes by a tile's bytes.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import types
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from official import functions, official_file
from PIL import Image

from janusflow_min.benchmarks import dpg_bench

pytestmark = pytest.mark.official

SCRIPT = "dpg_bench/compute_dpg_bench.py"
COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad"]
COLUMNS += ["category_detailed", "tuple", "question_natural_language"]
KINDS = [
    "entity - whole (x)",
    "entity - part(x, (y))",
    "attribute - color ( x )",
    " relation - non-spatial (x)",
]
KINDS += ["global", "other - text (a - b)", "relation-spatial(x)", "entity - whole"]


def reply(image: Image.Image, question: str) -> str:
    seen = zlib.crc32(image.convert("RGB").tobytes() + question.encode())
    return ["yes", "yes", "yes", "no", "Yes", "yes.", "", " yes", "nothing"][seen % 9]


def official_score(
    script: Path, root: Path, questions: Path, resolution: int, tiles: int
) -> dict[str, float]:
    """What the official main prints: the score under "", the categories under their names."""
    pd = pytest.importorskip("pandas")
    printed: list[str] = []
    result = root.parent / "result.txt"
    args = types.SimpleNamespace(
        image_root_path=str(root), resolution=resolution, csv=str(questions), res_path=str(result), pic_num=tiles,
        vqa_model="mplug",
    )  # fmt: skip
    accelerator = types.SimpleNamespace(
        is_main_process=True, device="cpu", num_processes=1, process_index=0, prepare=lambda x: x,
        wait_for_everyone=lambda: None,
    )  # fmt: skip
    time = types.SimpleNamespace(
        time=lambda: 0, localtime=lambda _: 0, strftime=lambda *_: "", sleep=lambda _: 0
    )
    theirs = functions(
        script,
        *("prepare_dpg_data", "crop_image", "compute_dpg_one_sample", "main"),
        **dict(
            pd=pd,
            np=np,
            os=os,
            osp=os.path,
            Image=Image,
            defaultdict=defaultdict,
            time=time,
            tqdm=lambda x: x,
        ),
        parse_args=lambda: args,
        Accelerator=lambda: accelerator,
        gather_object=lambda x: x,
        MPLUG=lambda device: types.SimpleNamespace(vqa=reply),
        print=lambda *texts: printed.append(" ".join(map(str, texts))),
    )
    theirs["main"]()
    lines = re.findall(r"^\t(.*): (\S+)$", printed[-1], re.MULTILINE)
    return {name: float(value) for name, value in lines} | {"": float(printed[-1].rpartition(": ")[2])}


def random_questions(rng: random.Random, items: list[str]) -> list[list]:
    """Rows, some items with repeated ids, dangling dependencies, late parents or rows in two blocks."""
    rows = []
    for item in [*items, *(rng.choices(items, k=2) if rng.random() < 0.5 else [])]:
        n = rng.randint(1, 7)
        numbers = list(range(1, n + 1)) if rng.random() < 0.7 else [rng.randint(1, n) for _ in range(n)]
        for number in numbers:
            parents = [str(rng.randint(0, n + (rng.random() < 0.1))) for _ in range(rng.choice([1, 1, 2, 3]))]
            dependency = rng.choice([",", ", "]).join(parents) if rng.random() < 0.7 else "0"
            text = f"Is {rng.randint(0, 3)} there, «{number}»? \u2028é"
            rows.append(
                [item, 'a, "text"\nof two lines', "", number, dependency, "", "", rng.choice(KINDS), text]
            )
    rows.append(["last one", "", "", 1, "0,0", "", "", "entity - whole (x)", "?"])  # keeps the columns texts
    return rows


def random_grids(rng: random.Random, root: Path, items: list[str]) -> None:
    """Grids of several kinds and sizes, some missing, broken, twice or of nothing."""
    root.mkdir()
    for item in [*items, "unknown"]:
        for suffix in rng.choice([[".png"], [".png"], [".png"], [], [".jpg"], [".png", ".webp"], [".a.png"]]):
            size = (8, 8) if rng.random() < 0.8 else (rng.randint(3, 12), rng.randint(3, 12))
            mode = rng.choice(["RGB", "RGB", "L", "P"])
            image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).convert(mode)
            image.convert("RGB" if suffix in (".jpg", ".webp") else mode).save(root / f"{item}{suffix}")
            if rng.random() < 0.1:
                content = (root / f"{item}{suffix}").read_bytes()
                (root / f"{item}{suffix}").write_bytes(content[: rng.choice([0, 20, len(content) // 2])])
    (root / f"{items[0]}.txt").write_text("no image")


@pytest.mark.parametrize(
    ("variable", "path"), [("ELLA_ROOT", SCRIPT), ("TORCHUMM_ROOT", f"eval/generation/{SCRIPT}")]
)
def test_folders_end_in_the_same_numbers(variable, path, tmp_path):
    """Stops: another reading of the questions, another tile, mean or category than the official one: 300 folders."""
    script = official_file(variable, path)
    scored = 0
    for seed in range(300):
        rng = random.Random(seed)
        here = tmp_path / str(seed)
        here.mkdir()
        items = rng.sample(
            ["partiprompts97", "1", "256", "007", "vrd3", "é", "a b", "COCOval2014_1"], rng.randint(2, 8)
        )
        questions = here / "q.csv"
        with open(questions, "w", encoding=rng.choice(["utf-8", "utf-8-sig"]), newline="") as f:
            csv.writer(f, lineterminator=rng.choice(["\n", "\r\n"])).writerows(
                [COLUMNS, *random_questions(rng, items)]
            )
        random_grids(rng, here / "images", items)
        (here / "prompts").mkdir()
        for item in rng.sample(items, rng.randint(1, len(items))):
            (here / f"prompts/{item}.txt").write_text(f"prompt {item}")
        tiles, resolution = rng.randint(1, 4), rng.choice([4, 4, 4, 3, 8])
        expected = official_score(script, here / "images", questions, resolution, tiles)
        options = dpg_bench.ScoreOptions(
            data=here / "prompts",
            questions=questions,
            subset=True,
            images=here / "images",
            resolution=resolution,
            tiles=tiles,
            vqa=types.SimpleNamespace(name="bytes", answer=reply),
            official_compat=True,
            progress=False,
        )
        try:
            score = dpg_bench.score(here / "run", options)
        except (ValueError, FileNotFoundError) as error:
            assert re.search("no answers about|no image named|has no question about", str(error))
            assert np.isnan(expected[""])
            continue
        written = json.loads((here / "run/items.json").read_text(encoding="utf-8"))
        scores = [item["score"] for item in written["items"] if item["score"] is not None]
        ours = {name: value for name, (value, _) in (written["l1"] | written["l2"]).items()}
        if scores:
            ours |= {"": 100 * np.mean(scores)}
        else:
            expected.pop("")
        assert ours == {name: pytest.approx(value, rel=1e-14, abs=0.0) for name, value in expected.items()}
        table = {
            name: entry["value"] for name, entry in score["scores"].items() if entry["value"] is not None
        }
        assert table == {name: value for name, (value, _) in written["l1"].items()}
        scored += len(scores)
    assert scored > 600


def test_the_published_prompts_are_known():
    """Stops: a headline that the published prompts do not get."""
    prompts = dpg_bench.read(official_file("ELLA_ROOT", "dpg_bench/prompts"))
    assert len(prompts) == 1065 and dpg_bench.prompts_sha256(prompts) == dpg_bench.PROMPTS_SHA256
