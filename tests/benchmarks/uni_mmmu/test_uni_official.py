# SPDX-License-Identifier: MIT
"""--official-compat beside the official scorer, on random invented outputs and replies. Nothing of theirs is copied.

UNI_MMMU_ROOT names a checkout of Vchitect/Uni-MMMU, TORCHUMM_ROOT one of AIFrontierLab/TorchUMM, which has a copy:
either's evaluators are run whole, with a stand-in for their two models and for DreamSim. pandas is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from invented_uni import MAZE, draw_maze, draw_puzzle, plain, save, score_of, write
from official import official_file
from PIL import Image

from janusflow_min.benchmarks.uni_mmmu import boards, prompts, rules

SCRIPTS = {"UNI_MMMU_ROOT": "eval_ummmu.py", "TORCHUMM_ROOT": "eval/generation/uni_mmmu/eval_ummmu.py"}
SUMMARIES = {task: "summary.json" for task in ("jigsaw", "maze", "sliding")}
SUMMARIES |= {task: "eval_summary.json" for task in ("math", "science", "code")}
MOVES = ("up", "down", "left", "right")
VALUES = [
    0,
    1,
    1,
    1,
    True,
    False,
    1.0,
    1.9,
    0.5,
    2,
    7,
    -1,
    None,
    "0",
    "1",
    " 1 ",
    "no",
    "yes",
    "true",
    "",
    "5/5",
]
VALUES += [[], [1], {}, {"a": 1}, 3, 4, 5, "4", "4.5", 10**400, "match", "1_0", "\u0663"]
ENDLESS = [float("nan"), float("inf"), "1e400", "nan", -1e308]
KEYS = ("reasoning_correct", "result_correct", "image_correct", "overlay_ok", "reasoning_rigorous")
KEYS += ("conclusion_correct", "text_ok", "text_semantic_match", "shape_color_accuracy", "position_accuracy")

pytestmark = pytest.mark.official


@pytest.fixture(params=SCRIPTS)
def theirs(request, monkeypatch) -> ModuleType:
    """The official module, with nothing in the place of its models' packages."""
    pytest.importorskip("pandas")
    path = official_file(request.param, SCRIPTS[request.param])
    names = ("AutoModelForCausalLM", "AutoTokenizer", "Qwen2_5_VLForConditionalGeneration", "AutoProcessor")
    fakes = {"transformers": names, "qwen_vl_utils": ("process_vision_info",), "dreamsim": ("dreamsim",)}
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(members, lambda **_: (None, None)))
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("eval_ummmu", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "eval_ummmu", module)
    spec.loader.exec_module(module)
    return module


# Random inputs -------------------------------------------------------------------------------------------------


def rubble(rng: random.Random, pieces: list[str], most: int = 12) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, most)))


def random_reply(rng: random.Random, endless: bool = False) -> str:
    """A judge's: mostly JSON with odd values, sometimes behind a reasoning with braces, sometimes rubble."""
    values = VALUES + ENDLESS * endless
    if rng.random() < 0.2:
        return rubble(
            rng, ["{", "}", '"', "\\", '{"text_ok": 1}', "<think>", "</think>", " ", "a", ":", "[", "]"]
        )
    found = {key: rng.choice(values) for key in KEYS if rng.random() < 0.9}
    if rng.random() < 0.9:
        found["verdict"] = rng.choice(["match", "match", "partial", "Match", None, 1])
    found["explanation"] = rng.choice(["ok", 'brace } and "quote"', "{", "\\"])
    before = rng.choice(
        ["", "", "", "```json\n", "Sure: ", "<think>hm</think>\n", "<think>\\frac{1}{2}</think>", "<think>{"]
    )
    return before + json.dumps(found) + rng.choice(["", "\n```", ' {"text_ok": 1}'])


def random_moves(rng: random.Random, truth: list[str], nested: bool) -> str:
    words: list = [
        rng.choice([*MOVES, *MOVES, " Up ", "DOWN", 1, None, ""]) for _ in range(rng.randint(0, 5))
    ]
    if rng.random() < 0.5:
        words = list(truth)
    if nested and rng.random() < 0.1:
        words = [words]
    block = f"<ANSWER_JSON>{json.dumps(words)}</ANSWER_JSON>"
    broken = rng.choice(
        ["<ANSWER_JSON>[up, down]</ANSWER_JSON>", '<answer_json>["up"', "<ANSWER_JSON>[]</ANSWER_JSON>"]
    )
    return rng.choice(
        [block, block, block.lower(), f"so {block} or {broken}", f"{broken} no {block}", broken, "", "up"]
    )


def random_choice(rng: random.Random) -> str:
    value = json.dumps({"choice": rng.choice([0, 1, 0, 1, True, False, 1.0, 0.0, "1", 2, None, [0], -1])})
    block = f"<FINAL_ANSWER_JSON>\n{value}\n</FINAL_ANSWER_JSON>"
    return rng.choice(
        [block, block, block.lower(), block + block, "<FINAL_ANSWER_JSON>{choice}</FINAL_ANSWER_JSON>", ""]
    )


def random_board(rng: random.Random, maze: bool) -> Image.Image:
    """A board, whole or with faults, in images of all shapes; or nothing of the kind."""
    colours = [boards.FLOOR, boards.WALL, boards.START, boards.GOAL, boards.PATH, boards.WHITE, *boards.TILES]
    kind = rng.random()
    if kind < 0.1:
        return Image.new("RGB", (rng.randint(1, 40), rng.randint(1, 40)), rng.choice(colours))
    if kind < 0.2:
        size = (rng.randint(1, 30), rng.randint(1, 30))
        return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    side, pad = rng.randint(3, 14), rng.randint(0, 9)
    if maze:
        rows = [
            "".join(rng.choice("## SG" if rng.random() < 0.1 else "## ") for _ in range(6)) for _ in range(6)
        ]
        image = draw_maze(rng.choice([rows, MAZE]), side, pad)
    else:
        image = draw_puzzle(["".join(rng.choice("123456789") for _ in range(3)) for _ in range(3)], side, pad)
    for _ in range(rng.randint(0, 3)):
        x, y = rng.randint(0, image.width - 1), rng.randint(0, image.height - 1)
        image.paste(rng.choice(colours), (x, y, x + rng.randint(1, 8), y + rng.randint(1, 8)))
    if rng.random() < 0.4:
        image = image.resize((rng.randint(1, 90), rng.randint(1, 90)), rng.choice([0, 2, 3]))
    if rng.random() < 0.3:
        wider = Image.new(
            "RGB", (image.width + rng.randint(0, 60), image.height + rng.randint(0, 60)), "white"
        )
        wider.paste(
            image, (rng.randint(0, wider.width - image.width), rng.randint(0, wider.height - image.height))
        )
        image = wider
    return image


def random_image(rng: random.Random, path: Path) -> None:
    """Of every kind that a judge may be sent: wide, transparent, a palette, another format than its name says."""
    mode = rng.choice(["RGB", "RGB", "RGBA", "L", "P", "LA", "1", "CMYK"])
    size = (rng.choice([5, 8, 8, 2100]), rng.randint(1, 9))
    image = Image.new("RGB", size, (rng.randrange(256), rng.randrange(256), rng.randrange(256))).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.05:
        path.write_bytes(rng.choice([b"", b"not an image"]))
        return
    form = "JPEG" if mode in ("RGB", "L", "CMYK") and rng.random() < 0.3 else "PNG"
    if mode == "CMYK" and form == "PNG":
        form = "JPEG"
    image.save(path, form, **({"transparency": 0} if mode == "P" and rng.random() < 0.5 else {}))


def random_run(rng: random.Random, base: Path, nested: bool) -> Path:
    """Data at base/data, a run at base/outputs/m, as the official scorer wants them."""
    data, run = base / "data", base / "outputs" / "m"

    def case(folder: str, text: str | None, images: list[str], result: Mapping | None = None) -> None:
        here = run / folder
        if rng.random() < 0.07:
            return
        here.mkdir(parents=True, exist_ok=True)
        if text is not None and rng.random() < 0.93:
            (here / "model_text.txt").write_text(text, encoding="utf-8")
        for name in images:
            random_image(rng, here / name)
        write(here / "result.json", result or {})
        (here / "_done.ok").write_text("ok")

    def words(*blocks: str) -> str:
        return rubble(rng, ["red ", "It melts. ", "x = 4 ", "{", "}", "\n", "\u00e9 ", *blocks])

    samples = []
    for k in range(40):
        save(plain("red"), data / f"svg/{k}.png")
        (data / f"svg/{k}.svg").write_text("<svg/>")
        samples.append({"id": f"A{k}", "svg": f"{k}.svg", "png": f"{k}.png"})
        block = f"<RENDER_SUMMARY>{words()}</RENDER_SUMMARY>"
        images = [f"model_image_{i:02d}.png" for i in range(1, rng.randint(0, 3) + 1)]
        case(f"code/case_{k + 1:02d}_A{k}", words(block, block), images, samples[-1])
    write(data / "svg/metadata.json", {"samples": samples})

    samples = []
    for k in range(40):
        save(Image.new("RGB", (9, 9), (k, 0, 0)), data / f"science/{k}.png")
        truth = rng.choice(["It has melted.", "It has melted.", ""])
        samples.append({"input_image_file_path_list": [f"./data/science/{k}.png"], "output_prompt": truth})
        samples[-1]["input_prompt"] = f"Heated {k} times."
        case(f"science/case_{k + 1:02d}", words(), ["model_image_01.png"] * rng.randint(0, 1))
    write(data / "science/dim_all.json", [{"samples": samples[:7]}, {"samples": samples[7:]}])

    group = {}
    for k in range(40):
        item = {
            "type": rng.choice(["Calculation", "proof", "", None]),
            "problem_text_en": f"Find x. {{b}} {k}",
        }
        item |= {"solution_en": "x = 4", "auxiliary_text_en": rng.choice(["Connect B and D.", ""])}
        item["original_image"] = save(Image.new("RGB", (9, 9), (0, k, 0)), data / f"math_data/{k}.png")
        item["auxiliary_image"] = save(plain("grey"), data / f"math_data/{k}_aux.png")
        if rng.random() < 0.1:
            item["auxiliary_image"] = "gone.png"
        group[str(k)] = item
        case(f"math/a__{k}", words(), ["model_image_01.png"] * rng.randint(0, 1))
    write(data / "math_data/filtered.json", {"a": group})

    items = []
    for k in range(40):
        here = f"./data/jigsaw_dataset_2x2ref/ex_{k}"
        for i, name in enumerate(("ref", "c0", "c1", "right", "wrong")):
            save(Image.new("RGB", (9, 9), (i, 0, k)), base / here / f"{name}.png")
        item = {"id": f"ex_{k}", "label": k % 2, "ref_panel": {"ref_image_path": f"{here}/ref.png"}}
        item |= {"candidate_paths": [f"{here}/c0.png", f"{here}/c1.png"]}
        item |= {"gt_completed_2x2_path": f"{here}/right.png", "gt_wrong_2x2_path": f"{here}/wrong.png"}
        items.append(item)
        images = [f"model_image_{i:02d}.png" for i in range(1, rng.choice([2, 2, 2, 1, 3, 0]) + 1)]
        case(f"jigsaw/ex_{k}", words() + random_choice(rng), images)
    write(data / "jigsaw_dataset_2x2ref/metadata.json", {"items": items})
    write(
        run / "jigsaw/summary.json",
        {"per_item": [{"id": item["id"]} for item in items if rng.random() < 0.9]},
    )

    def frames(folder: str, stem: str, truth: list[Image.Image], maze: bool) -> None:
        for c in range(rng.choice([1, 1, 1, 0, 2])):
            for k, right in enumerate(truth[: rng.randint(0, len(truth))]):
                image = right if rng.random() < 0.6 else random_board(rng, maze)
                save(image, run / folder / f"cand_{c + 1:02d}/{stem}_{k:04d}.png")

    def texts(truth: list[str]) -> str:
        return rules.CANDIDATES.join(
            random_moves(rng, truth, nested) for _ in range(rng.choice([1, 1, 1, 2]))
        )

    for k in range(40):
        number, folder = f"{k:05d}", data / f"maze/maze_6x6_{k:05d}_steps"
        first = draw_maze(MAZE, rng.randint(5, 12), rng.randint(0, 6)) if k else random_board(rng, True)
        save(first, folder / "maze_step_0000.png")
        moves = [rng.choice(MOVES) for _ in range(rng.randint(1, 5))]
        write(data / f"maze/maze_6x6_steps_{number}.json", {"steps_long": moves})
        right = boards.expected_frames(boards.parse_maze(draw_maze(MAZE)), moves)
        case(f"maze/case_{number}", texts(moves), [], {"step0": str(folder / "maze_step_0000.png")})
        if (run / f"maze/case_{number}").is_dir():
            frames(f"maze/case_{number}", "maze_step", [draw_maze(grid, 8) for grid in right], True)

    items = []
    for k in range(40):
        folder, states = data / f"sliding/demo_3x3_{k:05d}_steps", []
        for i in range(rng.randint(2, 5)):
            states.append(random_board(rng, False))
            save(states[-1], folder / f"demo_step_{i:04d}.png")
        moves = [rng.choice(MOVES) for _ in states[1:]]
        write(data / f"sliding/demo_3x3_steps_words_{k:05d}.json", {"steps_words": moves})
        words_json = f"data/sliding/demo_3x3_steps_words_{k:05d}.json"
        items.append({"steps_dir": f"data/sliding/{folder.name}", "steps_words_json": words_json})
        case(
            f"sliding/case_{folder.name}", texts(moves), [], {"init_png": str(folder / "demo_step_0000.png")}
        )
        if (run / f"sliding/case_{folder.name}").is_dir():
            frames(f"sliding/case_{folder.name}", "demo_step", states[1:], False)
    write(data / "sliding/summary_steps_le_8.json", {"items": items})
    return run


# Judges that answer by what they are sent, so that another word or pixel is another answer ----------------------


def said(messages: list[Mapping]) -> str:
    """All texts and images of the messages, whether in parts or not."""
    flat = []
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            flat.append(part["text"] if part["type"] == "text" else part["image_url"]["url"])
    return hashlib.sha256("\0".join(flat).encode()).hexdigest()


def reply_to(messages: list[Mapping], endless: bool) -> str:
    for message in messages:  # as their vision model does with what is no image
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url" and not part["image_url"]["url"].startswith("data:image/"):
                raise ValueError("not an image")
    return random_reply(random.Random(said(messages)), endless)


class Judge:
    name = "invented"

    def __init__(self, endless: bool):
        self.endless = endless

    def ask(self, messages) -> str:
        return reply_to(messages, self.endless)


class Distance:
    name = "invented"

    def __call__(self, a: Image.Image, b: Image.Image) -> float:
        both = a.convert("RGB").tobytes() + b.convert("RGB").tobytes()
        return random.Random(hashlib.sha256(both).hexdigest()).random()


def run_theirs(theirs: ModuleType, base: Path, monkeypatch, endless: bool) -> dict[str, dict]:
    """Task -> summary, from their own evaluators and configuration."""
    monkeypatch.chdir(base)  # their paths are relative to it
    monkeypatch.setattr(theirs.JigsawEvaluator, "_dreamsim_distance", lambda self, a, b: Distance()(a, b))

    def judge(kind):
        def generate_text(messages, max_new_tokens):
            for message in messages:
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if part["type"] == "image_url":  # it decodes what it is sent
                        import base64
                        import io

                        Image.open(
                            io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))
                        ).load()
            return reply_to(messages, endless).strip()

        made = kind.__new__(kind)
        made.generate_text = generate_text
        return made

    configs = theirs.Configurations(model_name="m", base_path=str(base))
    vl, lm = judge(theirs.LocalVL), judge(theirs.LocalTextLM)
    for evaluator in (
        theirs.GeometryEvaluator(configs.geometry, lm=lm, vl=vl),
        theirs.JigsawEvaluator(configs.jigsaw),
        theirs.ScienceEvaluator(configs.science, vl=vl),
        theirs.CodeSVGEvaluator(configs.code_svg, vl=vl),
        theirs.MazeEvaluator(configs.maze),
        theirs.SlidingPuzzleEvaluator(configs.sliding_puzzle),
    ):
        evaluator.evaluate()
        evaluator.summarize()
    there = base / "eval" / "m"
    return {task: json.loads((there / task / name).read_text()) for task, name in SUMMARIES.items()}


@pytest.mark.parametrize("seed", range(4))
def test_every_summary_is_theirs(theirs, tmp_path, monkeypatch, seed):
    """Stops: a rule, a denominator, a word or a pixel for the judge that differs. 240 random cases a seed."""
    nested = "_resolve_dataset_path" not in vars(theirs.JigsawEvaluator)  # TorchUMM's copy takes the list off
    run = random_run(random.Random(seed), tmp_path, nested)
    expected = run_theirs(theirs, tmp_path, monkeypatch, seed == 3)
    score_of(
        run,
        tmp_path / "data",
        vl_model=Judge(seed == 3),
        text_model=Judge(seed == 3),
        dreamsim=Distance(),
        judge_prompts=theirs.__file__,
        official_compat=True,
        progress=False,
    )
    for task, name in SUMMARIES.items():
        ours = json.loads((run / "eval" / task / name).read_text())
        assert str(ours) == str(expected[task]), task  # as text: NaN is NaN


def test_every_rule_is_theirs(theirs):
    """Stops: a rare text or board that the whole runs do not meet. 1,000 random ones each."""
    rng, maze = random.Random(5), theirs.MazeEvaluator.__new__(theirs.MazeEvaluator)
    nested = "_resolve_dataset_path" not in vars(theirs.JigsawEvaluator)
    for _ in range(1000):
        text = random_moves(rng, ["up"], nested)
        assert rules.moves(text, official_compat=True) == maze._parse_moves(text), text
        reply = random_reply(rng)
        found = theirs.UtilityHelpers.find_first_json_substring(reply.strip())
        try:
            value = json.loads(found) if found else None
        except ValueError:
            value = None
        assert str(rules.first_object(reply, official_compat=True)) == str(value), reply


def test_every_board_is_theirs(theirs, tmp_path):
    """Stops: a tile at a threshold, or a board in an image that is not square, read otherwise."""
    rng = random.Random(6)
    for k in range(600):
        path = tmp_path / "board.png"
        image = random_board(rng, maze=k % 2 == 0)
        image.save(path)
        if k % 2 == 0:
            found = theirs.UtilityHelpers.parse_maze_image(
                path, grid_h=6, grid_w=6, tolerance=0.75, sg_factor=0.5
            )
            maze = boards.parse_maze(image, official_compat=True)
            assert (maze.grid, maze.start, maze.goal) == (found["grid"], found["start"], found["goal"]), k
        else:
            found = theirs.UtilityHelpers.parse_sliding_puzzle_image(path, tolerance=0.80)
            assert boards.parse_puzzle(image, official_compat=True) == found["grid"], k


def test_the_official_wording_is_the_known_one(theirs):
    """Stops: a remark that says "official wording" about another text."""
    assert prompts.prompts_hash(prompts.judge_wording(theirs.__file__)) == prompts.OFFICIAL_SHA256
