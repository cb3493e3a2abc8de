# SPDX-License-Identifier: MIT
"""Generation in both modes, its layout, resuming, and the wording."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from invented_uni import FAST, SQUARE, Judge, generate_in, plain, score_of, write

from janusflow_min.benchmarks.ranks import RankInfo
from janusflow_min.benchmarks.runner import Settings
from janusflow_min.benchmarks.uni_mmmu import generation, prompts, readers


def tree(run: Path, *ends: str) -> list[str]:
    ends = ends or (".png",)
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.name.endswith(ends))


def test_native_generates_code_alone(native):
    """Stops: an image generated without its input counted as an edit."""
    assert tree(native) == [f"code/case_0{i}/model_image_01.png" for i in ("1_A_0001", "2_B_0002")]
    assert len(tree(native, "_done.ok")) == len(tree(native, "model_text.txt")) == 12
    assert not (native / ".work").exists()


def test_the_torchumm_layout(torchumm_run):
    """Stops: files under names that the official scorer does not look for."""
    images = [f"code/case_0{i}/model_image_01.png" for i in ("1_A_0001", "2_B_0002")]
    images += [f"science/case_0{i}/model_image_01.png" for i in (1, 3)]
    images += [f"math/set_A__{i}/model_image_01.png" for i in (1, 2)]
    images += [f"jigsaw/ex_{i}/model_image_0{k}.png" for i in (0, 1) for k in (1, 2)]
    images += [f"maze/case_{i}/cand_01/maze_step_0000_step_0001.png" for i in ("00003", "00015", "00020")]
    images += [f"sliding/case_demo_3x3_0000{i}_steps/cand_01/demo_step_0000_step_0001.png" for i in (1, 2)]
    assert tree(torchumm_run) == sorted(images)
    assert len({(torchumm_run / name).read_bytes() for name in images}) == len(images)  # own seeds


def test_what_scorers_read_in_result_json(torchumm_run, data):
    """Stops: references that the official scorers cannot find."""

    def record(folder: str) -> dict:
        return json.loads((torchumm_run / folder / "result.json").read_text())

    code = record("code/case_02_B_0002")
    assert (code["svg"], code["png"]) == ("svgs/B0002.svg", "pngs/B0002.png")
    maze = record("maze/case_00003")
    assert Path(maze["step0"]).is_absolute() and Path(maze["step0"]).is_file()
    assert (
        [Path(p).is_file() for p in maze["images_saved_flatten"]]
        == [True]
        == [True] * maze["expected_image_count"]
    )
    assert Path(record("sliding/case_demo_3x3_00001_steps")["init_png"]).is_file()
    summary = json.loads((torchumm_run / "jigsaw/summary.json").read_text())
    assert [item["id"] for item in summary["per_item"]] == ["ex_0", "ex_1"]
    assert (torchumm_run / "jigsaw/ex_0/_done.ok").read_text() == "ok"


def test_shards_and_holes_change_nothing(native, data, tmp_path, monkeypatch):
    """Stops: answers or images that depend on the shard or on what was there already."""
    for rank in (1, 0):
        monkeypatch.setattr(RankInfo, "from_environment", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        generate_in(FAST, tmp_path / "run", data, max_new_tokens=6)
    monkeypatch.undo()
    (tmp_path / "run/code/case_01_A_0001/_done.ok").unlink()
    (tmp_path / "run/code/case_02_B_0002/model_image_01.png").unlink()
    shutil.rmtree(tmp_path / "run/maze/case_00003")
    assert generate_in(FAST, tmp_path / "run", data, max_new_tokens=6).complete
    names = tree(native, ".png", "model_text.txt", "summary.json", "manifest.csv")
    assert names == tree(tmp_path / "run", ".png", "model_text.txt", "summary.json", "manifest.csv")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (native / name).read_bytes(), name


def test_nothing_missing_loads_nothing(native, data, monkeypatch):
    """Stops: a minute of loading to find out that all is there."""
    from janusflow_min.benchmarks import runner

    monkeypatch.setattr(runner, "load_pipe", lambda *args: pytest.fail("loaded"))
    assert generate_in(FAST, native, data, max_new_tokens=6).complete


def test_other_settings_are_refused(native, data):
    """Stops: a folder with answers of two modes."""
    with pytest.raises(ValueError, match=r"settings.uni_mode: \"native\" there, \"torchumm\" now"):
        generate_in(FAST, native, data, uni_mode="torchumm", max_new_tokens=6)


def test_tasks_one_after_another(data, tmp_path):
    """Stops: a folder that takes no second task; seeds that depend on which tasks were asked for."""
    for task in ("code", "science"):
        assert generate_in(FAST, tmp_path, data, tasks=[task], max_new_tokens=2).complete
    record = json.loads((tmp_path / "code/case_02_B_0002/result.json").read_text())
    assert record["seeds"] == [100_000 * readers.TASKS.index("code") + 100]
    assert "task number" in json.loads((tmp_path / "manifest.json").read_text())["seed_rule"]


def test_a_limit_counts_for_each_task(data, tmp_path):
    """Stops: a trial run that sees the first task alone."""
    limited = Settings(**{**FAST.__dict__, "limit": 1})
    coverage = generate_in(limited, tmp_path, data, tasks=["science", "maze"], max_new_tokens=2)
    assert coverage.missing == ("science/case_03", "maze/case_00020")


def test_editing_is_an_option(data, tmp_path):
    """Stops: an edit that nobody asked for, that no score tells of, or that the image makes no difference to."""
    run = tmp_path / "run"
    options = dict(tasks=["math"], uni_mode="torchumm", editing="sdedit", max_new_tokens=2)
    assert generate_in(FAST, run, data, **options).complete
    assert json.loads((run / "manifest.json").read_text())["settings"]["editing"] == "sdedit"
    generate_in(FAST, tmp_path / "plain", data, tasks=["math"], uni_mode="torchumm", max_new_tokens=2)
    name = "math/set_A__1/model_image_01.png"
    assert (run / name).read_bytes() != (tmp_path / "plain" / name).read_bytes()
    notes = score_of(run, data, tasks=["math"], text_model=Judge("{}"), progress=False)["notes"]
    assert any("edited by sdedit, which the model was not trained for" in note for note in notes)
    with pytest.raises(ValueError, match=r'settings\.editing: "sdedit" there, null now'):
        generate_in(FAST, run, data, tasks=["math"], uni_mode="torchumm", max_new_tokens=2)
    for wrong in (dict(uni_mode="native"), dict(editing="magic")):
        with pytest.raises(
            ValueError, match="editing must be one of flowedit, invert, sdedit, with uni_mode"
        ):
            generate_in(FAST, tmp_path / "new", data, **options | wrong)
    assert not (tmp_path / "new").exists()


def test_sampling_options_reach_the_images(pipe, data):
    """Stops: a solver or a preset that the manifest names and no image was made with."""
    fake = Fake(pipe)
    settings = Settings(preset="quick", negative_prompt="blurred")
    (run,) = generation.run_block(
        fake, [readers.read(data, "code")[0]], "native", prompts.PROMPTS, settings, 6
    )
    assert run.images and settings.resolved().items() <= fake.options.items()


class Fake:
    """A pipeline that records what it is asked; answers are numbered."""

    def __init__(self, pipe, texts=()):
        self.processor, self.model = pipe.processor, pipe.model
        self.asked, self.prompts, self.texts = [], [], list(texts)

    def chat(self, conversations, max_new_tokens):
        self.asked += [(c[0]["content"], c[0]["images"]) for c in conversations]
        answers = [self.texts.pop(0) if self.texts else f"answer {len(self.asked)}" for _ in conversations]
        return [type("Answer", (), {"text": text}) for text in answers]

    def generate(self, texts, **options):
        self.options = options
        self.prompts += list(zip(texts, options["seed"], strict=True))
        return type("Generation", (), {"images": [plain("red") for _ in texts]})


def run_one(fake, case, mode, texts=prompts.PROMPTS):
    (run,) = generation.run_block(fake, [case], mode, texts, FAST, 6)
    return run


def test_native_shows_every_image_in_its_place(pipe, data):
    """Stops: the candidates that the model never sees."""
    fake = Fake(pipe)
    run = run_one(fake, readers.read(data, "jigsaw")[0], "native")
    ((content, images),) = fake.asked
    tag = pipe.processor.tokenizer.image_tag
    assert f"The picture:\n{tag}\nCandidate 0:\n{tag}\nCandidate 1:\n{tag}\n" in content
    assert [path.name for path in images] == ["ref.png", "c0.png", "c1.png"]
    assert run.text == "answer 1" and not run.images


def test_torchumm_calls_in_its_order(pipe, data):
    """Stops: another order of calls, images that its adapter would not read, a plan that is not shortened."""
    fake = Fake(pipe, ["plan " * 100])
    run = run_one(fake, readers.read(data, "sliding")[0], "torchumm")
    tag = pipe.processor.tokenizer.image_tag
    assert [content.count(tag) for content, _ in fake.asked] == [1, 1]
    assert all(content.startswith(tag) for content, _ in fake.asked)
    assert [[path.name for path in images] for _, images in fake.asked] == [["demo_step_0000.png"]] * 2
    ((text, seed),) = fake.prompts
    assert tag not in text and ("plan " * 100)[:200] in text and "plan " * 41 not in text
    assert seed == 100_000 * readers.TASKS.index("sliding")
    assert run.text == "answer 2" and list(run.images) == ["cand_01/demo_step_0000_step_0001.png"]


def test_the_explanation_is_shortened_and_the_source_never(pipe, data, capsys):
    """Stops: a prompt beyond the model's positions, or an SVG cut off to make it fit."""
    fake = Fake(pipe, ["word " * 3000])
    case = readers.read(data, "code")[0]
    run = run_one(fake, case, "native")
    ((text, _),) = fake.prompts
    limit = pipe.model.config.llm.max_position_embeddings
    needed = len(pipe.processor.generation_prompt(text)[0]) + pipe.model.num_image_tokens
    assert limit - 3 <= needed <= limit
    assert SQUARE in text and text.endswith(prompts.PROMPTS["code_image"])
    (told,) = run.shortened
    assert 0 < told["kept"] < told["of"]


def test_a_source_that_is_too_long(pipe, data, tmp_path):
    """Stops: a case that stops the run, or that is tried again at every call."""
    root = shutil.copytree(data / "svg", tmp_path / "data/svg").parent
    (root / "svg/svgs/A_0001.svg").write_text("<svg>" + "<g></g>" * 2000 + "</svg>")
    assert generate_in(FAST, tmp_path / "run", root, tasks=["code"], max_new_tokens=2).complete
    record = json.loads((tmp_path / "run/code/case_01_A_0001/result.json").read_text())
    assert record["status"] == "error" and "the model has 1024" in record["errors"][0]
    assert (tmp_path / "run/code/case_01_A_0001/model_text.txt").read_text() == ""


def test_special_tokens_in_a_model_s_own_text(pipe, data):
    """Stops: a tag in an answer that stops the run, or that is read as an image."""
    tag = pipe.processor.tokenizer.image_tag
    fake = Fake(pipe, [f"see {tag} there"])
    run_one(fake, readers.read(data, "code")[0], "native")
    assert tag not in fake.prompts[0][0]


def test_a_broken_file_of_the_data_costs_its_case_alone(data, tmp_path):
    """Stops: one image that is cut off, or one SVG in another encoding, that ends the run for all."""
    root = shutil.copytree(data, tmp_path / "data")
    (root / "science/imgs/1.png").write_bytes(b"")
    (root / "svg/svgs/A_0001.svg").write_bytes("<svg>\u00e9</svg>".encode("latin-1"))
    assert generate_in(FAST, tmp_path / "run", root, tasks=["science", "code"], max_new_tokens=2).complete

    def record(folder: str) -> dict:
        return json.loads((tmp_path / "run" / folder / "result.json").read_text())

    assert "1.png cannot be read as an image" in record("science/case_01")["errors"][0]
    assert "A_0001.svg is not UTF-8 text" in record("code/case_01_A_0001")["errors"][0]
    assert record("science/case_03")["status"] == record("code/case_02_B_0002")["status"] == "ok"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 5}'])
def test_a_broken_record_is_made_again(native, tmp_path, data, content):
    """Stops: a record that an interruption cut off, which stops every later call."""
    run = shutil.copytree(native, tmp_path / "run")
    (run / "maze/case_00003/result.json").write_bytes(content)
    assert generate_in(FAST, run, data, max_new_tokens=6).complete
    assert json.loads((run / "maze/case_00003/result.json").read_text())["status"] == "ok"


def test_wording_from_a_file(tmp_path):
    """Stops: a text without the place for the question; a misspelt name without effect."""
    path = tmp_path / "prompts.json"
    write(path, {"frame": "Step {step}."})
    assert prompts.model_wording(path)["frame"] == "Step {step}."
    for texts, message in (
        ({"chess": "x"}, "unknown name 'chess'; the names are science"),
        ({"frame": "Go."}, r"frame must have the placeholders \{step\}; it has none"),
    ):
        write(path, texts)
        with pytest.raises(ValueError, match=message):
            prompts.model_wording(path)
    with pytest.raises(ValueError, match=r"the model's prompts come from a \.json file"):
        prompts.model_wording(tmp_path / "maze.py")


def test_judges_wording_must_show_the_answer(tmp_path):
    """Stops: a rubric with other placeholders, by which the judge never sees what it judges."""
    path = tmp_path / "judges.json"
    write(path, {"math_text": "{task_type} {problem} {truth} {candidate}"})
    with pytest.raises(
        ValueError, match=r"math_text must have the placeholders \{gt_text\}, \{cand_text\}; it has"
    ):
        prompts.judge_wording(path)
    write(path, {"code_text": "Match?"})
    assert prompts.judge_wording(path)["code_text"] == "Match?"
    script = tmp_path / "eval_ummmu.py"
    text = "{condition} {gt_text} {pred_text} {aux_en} {task_type} {problem} {cand_text}"
    lines = ["class Configurations:", "    def __post_init__(self):"]
    for place in {place.split(".")[0] for place in prompts.JUDGES_PLACES.values()}:
        keys = [p.split(".")[1] for p in prompts.JUDGES_PLACES.values() if p.startswith(place)]
        lines.append(f"        self.{place} = {{{', '.join(f'{key!r}: {text!r}' for key in keys)}}}")
    script.write_text("\n".join(lines))
    assert prompts.judge_wording(script) == dict.fromkeys(prompts.JUDGES, text)
