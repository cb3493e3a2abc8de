# SPDX-License-Identifier: MIT
"""Scoring with rules, stand-in judges, and a chat endpoint on the loopback."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from chat_server import ChatServer
from invented_uni import YES, Judge, Same, answer, copy, save, score_of, write
from PIL import Image

from janusflow_min.benchmarks.compare import compare
from janusflow_min.benchmarks.uni_mmmu import judging, readers, rules
from janusflow_min.benchmarks.uni_mmmu.scoring import render_svg
from janusflow_min.cli import main


def test_native_scores(native, data, tmp_path):
    """Stops: a number for what was not torchumm_run; texts that no judge is needed for left out."""
    run = copy(native, tmp_path, maze=answer("right"), sliding=answer("left", "up"), code="no block")
    for name, choice in (("ex_0", 0), ("ex_1", 0)):
        block = f'<FINAL_ANSWER_JSON>{{"choice": {choice}}}</FINAL_ANSWER_JSON>'
        (run / f"jigsaw/{name}/model_text.txt").write_text(block)
    vl, text = Judge(YES), Judge("<think>{x}</think>" + YES)
    result = score_of(run, data, vl_model=vl, text_model=text, dreamsim=Same(), progress=False)
    table = json.loads((run / "eval/all_tasks_summary.json").read_text())
    assert table == {
        "jigsaw_image": None,
        "jigsaw_text": 0.5,
        "maze_image": None,
        "maze_text": 1.0,
        "sliding_image": None,
        "sliding_text": 1.0,
        "math_overlay": None,
        "math_text": 1.0,
        "science_reasoning": pytest.approx(2 / 3),  # officially, the sample without an image counts 0
        "science_result": pytest.approx(2 / 3),
        "science_image": None,
        "code_text": 0.0,
        "code_shape_color": 5.0,
        "code_position": 4.0,
    }
    assert result["headline"] is None and result["complete"] and result["departures"]
    assert any("visual scaffold" in note.replace("\n", " ") for note in result["notes"])
    row = next(csv.DictReader((run / "eval/all_tasks_summary.csv").open()))
    assert list(row) == [column[1] for column in rules.COLUMNS] and row["Maze text accuracy by step"] == "1.0"
    assert json.loads((run / "eval/sliding/summary.json").read_text())["text_accuracy_exact"] == 0
    shown = [[part["type"] for part in m[-1]["content"]] for m in vl.messages if len(m) == 1]
    assert shown == [["text", "image_url", "image_url"]] * 2  # code: rubric, reference, candidate


def test_torchumm_scores_and_perfect_frames(torchumm_run, data, tmp_path):
    """Stops: images judged against the wrong truth: slots swapped, the first frame for the last."""
    run = copy(torchumm_run, tmp_path, maze=answer("right"))
    for number in ("00003", "00015", "00020"):
        shutil.copy(
            data / f"maze/maze_6x6_{number}_steps/maze_step_0001.png",
            run / f"maze/case_{number}/cand_01/maze_step_0000_step_0001.png",
        )
    for case in readers.read(data, "sliding"):
        shutil.copy(case.truth["frames"][0], run / case.folder / "cand_01/demo_step_0000_step_0001.png")
    for case in readers.read(data, "jigsaw"):
        for k, path in enumerate(case.truth["slots"], 1):
            shutil.copy(path, run / case.folder / f"model_image_{k:02d}.png")
    (run / "jigsaw/ex_1/model_image_02.png").unlink()
    (run / "jigsaw/ex_1/result.json").write_text("{}")
    score_of(run, data, vl_model=Judge(YES), dreamsim=Same(), progress=False)
    table = json.loads((run / "eval/all_tasks_summary.json").read_text())
    assert table["maze_image"] == table["sliding_image"] == table["math_overlay"] == 1.0
    assert table["jigsaw_image"] == 0.5  # one item without two images costs the whole distance
    assert table["science_image"] == pytest.approx(2 / 3) and table["math_text"] is None
    maze = json.loads((run / "eval/maze/summary.json").read_text())
    assert maze["total_candidates"] == 3 and maze["parse_accuracy_all_ok"] == 1


def test_a_missing_case_is_no_zero_and_no_number(native, data, tmp_path):
    """Stops: a table from half of the cases that looks whole."""
    run = copy(native, tmp_path, maze=answer("right"))
    (run / "maze/case_00003/_done.ok").unlink()
    result = score_of(run, data, tasks=["maze"], progress=False)
    assert {"value": 1.0, "n_scored": 1, "n_expected": 2}.items() <= result["scores"]["maze_text"].items()
    assert not result["complete"]
    assert json.loads((run / "eval/all_tasks_summary.json").read_text())["maze_text"] is None


def test_answers_without_json_count_zero_and_are_told(native, data, tmp_path):
    """Stops: a judge's nonsense left out, which would raise the score; officially it is 0."""
    run = copy(native, tmp_path)
    result = score_of(run, data, tasks=["math"], text_model=Judge("I cannot."), progress=False)
    assert result["scores"]["math_text"]["value"] == 0.0
    assert any("2 judgements had no usable JSON" in note for note in result["notes"])


def test_the_official_reading_of_a_thinking_judge(native, data, tmp_path):
    """Stops: the flag without effect."""
    run = copy(native, tmp_path)
    judge = Judge("<think>\\frac{1}{2}</think>" + YES)
    result = score_of(run, data, tasks=["math"], text_model=judge, official_compat=True, progress=False)
    assert result["scores"]["math_text"]["value"] == 0.0


def test_an_endpoint_that_fails_in_the_usual_ways(native, data, tmp_path):
    """Stops: a dropped connection counted as a wrong answer; requests asked again that were answered."""
    pytest.importorskip("openai")

    def reply(request: dict, before: int):
        text = json.dumps(request["messages"])
        if "heated 1 times" in text:  # fails twice, then answers
            return [("drop", 0), ("status", 503), YES][before] if before < 3 else YES
        return ("status", 500) if "heated 3 times" in text and reply.broken else YES

    reply.broken = True
    run = copy(native, tmp_path)
    with ChatServer(reply) as server:
        options = dict(tasks=["science"], vl_model="judge-7b", vl_url=server.url, progress=False, wait=0.01)
        result = score_of(run, data, **options)
        entry = result["scores"]["science_reasoning"]
        assert (entry["n_scored"], entry["n_expected"]) == (2, 3) and not result["complete"]
        assert any(
            "1 could not be read or got no judgement" in note and "HTTP 500" in note
            for note in result["notes"]
        )
        asked, reply.broken = len(server.requests), False
        result = score_of(run, data, **options)
        assert result["complete"] and len(server.requests) == asked + 1
    assert result["scores"]["science_reasoning"]["value"] == pytest.approx(2 / 3)
    assert result["judge"]["vl"] == "judge-7b" and server.requests[0]["max_tokens"] == 1024


def test_another_judge_s_records_are_refused(native, data, tmp_path):
    """Stops: one number from two judges."""
    run = copy(native, tmp_path)
    score_of(run, data, tasks=["math"], text_model=Judge(YES), progress=False)
    other = Judge(YES)
    other.name = "another"
    with pytest.raises(ValueError, match="is of another judge"):
        score_of(run, data, tasks=["math"], text_model=other, progress=False)


def test_images_for_judges(tmp_path):
    """Stops: images wider than 2048 px, or transparency lost to JPEG."""
    import base64
    import io

    def sent(image: Image.Image, name: str) -> Image.Image:
        save(image, tmp_path / name)
        url = judging.image_url(tmp_path / name)
        kind, data = url.split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == f"data:image/{image.format.lower()}"
        return image

    assert sent(Image.new("RGB", (4096, 100)), "a.png").size == (2048, 50)
    assert sent(Image.new("RGB", (10, 10)), "b.jpg").format == "JPEG"
    assert sent(Image.new("RGBA", (10, 10)), "c.webp").format == "PNG"


@pytest.mark.parametrize("points", ["NaN", "Infinity", '"nan"'])
def test_endless_points(native, data, tmp_path, points):
    """Stops: a score that is no JSON, or intervals of NaN, because a judge said NaN and official_compat takes it."""
    judge = Judge(f'{{"shape_color_accuracy": {points}, "position_accuracy": 4}}')
    run = copy(native, tmp_path)
    result = score_of(run, data, tasks=["code"], vl_model=judge, official_compat=True, progress=False)
    assert result["scores"]["code_shape_color"]["value"] is None
    assert result["scores"]["code_position"]["value"] == 4
    assert any("leaves no number, as officially: code_shape_color" in note for note in result["notes"])
    lines = (run / "item_scores.jsonl").read_text().splitlines()
    for text in ((run / "score.json").read_text(), (run / "eval/all_tasks_summary.json").read_text(), *lines):
        json.loads(text, parse_constant=pytest.fail)
    result = score_of(copy(native, tmp_path / "2"), data, tasks=["code"], vl_model=judge, progress=False)
    assert result["scores"]["code_shape_color"]["value"] == 0


def test_a_damaged_image_is_never_sent(tmp_path):
    """Stops: raw bytes that a judge is shown in the place of an image, and whose file no error names."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for name in ("a.png", "b.jpg", "c.webp"):
        save(noise, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for damaged in (content[: len(content) // 2], content[:30], b""):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
                judging.image_url(tmp_path / name)
    save(noise, tmp_path / "d.png")
    content = bytearray((tmp_path / "d.png").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    (tmp_path / "d.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.png cannot be read as an image"):
        judging.image_url(tmp_path / "d.png")


def test_an_image_that_cannot_be_read(torchumm_run, data, tmp_path):
    """Stops: one cut image among thousands that ends scoring; counted as wrong where the official scorer does not."""
    run = copy(torchumm_run, tmp_path)
    (run / "science/case_01/model_image_01.png").write_bytes(b"")
    (run / "jigsaw/ex_0/model_image_01.png").write_bytes(b"x")
    (run / "maze/case_00003/cand_01/maze_step_0000_step_0001.png").write_bytes(b"x")
    options = dict(tasks=["science", "jigsaw", "maze"], vl_model=Judge(YES), dreamsim=Same(), progress=False)
    for case, name in (("science/case_01", "model_image_01.png"), ("jigsaw/ex_0", "model_image_01.png")):
        record = json.loads((run / case / "result.json").read_text())
        write(run / case / "result.json", record | {"files": [f for f in record["files"] if f != name]})
    record = json.loads((run / "maze/case_00003/result.json").read_text())
    write(run / "maze/case_00003/result.json", record | {"files": []})
    result = score_of(run, data, **options)
    left = {key: entry["n_expected"] - entry["n_scored"] for key, entry in result["scores"].items()}
    assert left["science_image"] == left["jigsaw_image"] == left["maze_image"] == 1
    assert left["science_reasoning"] == left["jigsaw_text"] == left["maze_text"] == 0
    assert any("cannot be read as an image" in note for note in result["notes"])
    result = score_of(run, data, official_compat=True, **options)
    assert result["scores"]["science_image"]["value"] == pytest.approx(1 / 3)
    assert result["complete"] and result["options"]["official_compat"]


def test_one_refused_item_blocks_nothing(native, data, tmp_path):
    """Stops: a content filter's refusal of one item that leaves all the others without a score."""
    pytest.importorskip("openai")

    def reply(request: dict, before: int):
        return ("status", 400) if "heated 1 times" in json.dumps(request["messages"]) else YES

    with ChatServer(reply) as server:
        options = dict(tasks=["science"], vl_model="judge", vl_url=server.url, progress=False, wait=0.01)
        result = score_of(copy(native, tmp_path), data, **options)
    entry = result["scores"]["science_reasoning"]
    assert (entry["n_scored"], entry["n_expected"]) == (2, 3)
    assert any("science_text/case_01: the judge refuses, HTTP 400" in note for note in result["notes"])


def test_the_remark_on_wording_stays(native, data, tmp_path):
    """Stops: "not comparable" that vanishes with any file of prompts."""
    path = tmp_path / "judges.json"
    write(path, {"code_text": "Match?"})
    for wording in (None, path):
        run = copy(native, tmp_path / str(wording is None))
        result = score_of(
            run, data, tasks=["code"], vl_model=Judge(YES), judge_prompts=wording, progress=False
        )
        assert any("not comparable" in note for note in result["notes"])
        assert (result["options"]["judge_prompts_sha256"] is None) == (wording is None)


def test_official_compat_counts_what_the_original_counts(native, data, tmp_path):
    """Stops: the flag that reaches texts but not the denominators: a missing sample of science counts 0 there."""
    run = copy(native, tmp_path)
    shutil.rmtree(run / "science/case_01")
    (run / "science/case_03/model_text.txt").write_text("")
    options = dict(tasks=["science"], vl_model=Judge(YES), progress=False)
    assert score_of(run, data, **options)["scores"]["science_result"]["value"] == 0
    result = score_of(run, data, official_compat=True, **options)
    entry = result["scores"]["science_result"]
    assert (entry["value"], entry["n_scored"], entry["n_expected"]) == (pytest.approx(1 / 3), 3, 3)


def test_a_rendering_where_the_data_has_none(native, data, tmp_path):
    """Stops: a case without a reference that passes silently."""
    pytest.importorskip("cairosvg")
    root = shutil.copytree(data, tmp_path / "data")
    for path in (root / "svg/pngs").iterdir():
        path.unlink()
    run = copy(native, tmp_path)
    judge = Judge(YES)
    result = score_of(run, root, tasks=["code"], vl_model=judge, progress=False)
    assert result["scores"]["code_shape_color"]["value"] == 5
    assert Image.open(run / "eval/code/references/case_01_A_0001.png").size == (8, 8)


@pytest.mark.parametrize(
    "size", ['width="30000" height="30000"', 'width="8" height="9000"', 'viewBox="0 0 9e8 1"']
)
def test_an_svg_of_wild_size_takes_no_memory(tmp_path, monkeypatch, size):
    """Stops: four gigabytes for one line of text in the data, before anybody sees that it is no reference."""
    surface = pytest.importorskip("cairosvg.surface")
    made, original = [], surface.cairo.ImageSurface
    monkeypatch.setattr(surface.cairo, "ImageSurface", lambda *a: made.append(a[1:]) or original(*a))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" {}><rect width="4" height="4"/></svg>'
    render_svg(svg.format('width="8" height="8"').encode(), tmp_path / "a.png")
    assert made == [(8, 8)] and Image.open(tmp_path / "a.png").size == (8, 8)
    with pytest.raises(ValueError, match="at most 8192 a side"):
        render_svg(svg.format(size).encode(), tmp_path / "b.png")
    assert made == [(8, 8)] and not (tmp_path / "b.png").exists()


def test_the_command_line(native, data, tmp_path, capsys):
    """Stops: options that do not reach the functions; a report that cannot be written."""
    run = copy(native, tmp_path, maze=answer("right"))
    of, fast = ["--data", str(data)], ["--device", "cpu", "--dtype", "float32", "--num-inference-steps", "1"]
    fast += ["--batch-size", "4", "--max-new-tokens", "6", "--quiet"]
    assert main(["bench", "uni_mmmu", "generate", *of, "--out", str(run), *fast]) == 0
    assert main(["bench", "uni_mmmu", "score", *of, "--tasks", "maze", "--out", str(run), "--quiet"]) == 0
    assert main(["bench", "uni_mmmu", "report", "--out", str(run)]) == 0
    text = (run / "report.md").read_text()
    assert "Janus-Pro-7B" in text and "maze_text" in text
    out = capsys.readouterr().out
    assert "all 12 files are there" in out and "report.json" in out


def test_limit_dry_run_and_items(native, data, tmp_path):
    """Stops: a limit that claims the whole, or of -1 drops a case; a dry run that asks or writes; items of no use."""
    run, judge = copy(native, tmp_path), Judge(YES)
    options = dict(tasks=["science"], vl_model=judge, progress=False)
    with pytest.raises(ValueError, match="limit must be at least 1, got -1"):
        score_of(run, data, limit=-1, **options)
    assert score_of(run, data, dry_run=True, **options)["dry_run"].startswith("2 requests")
    assert not judge.messages and not (run / "score.json").exists() and not (run / "eval/science").exists()
    part = score_of(run, data, limit=1, **options)
    assert part["scores"]["science_reasoning"]["n_scored"] == 1 and not part["complete"]
    whole = score_of(run, data, **options)
    entry = whole["scores"]["science_reasoning"]
    assert entry["interval"][0] < entry["value"] < entry["interval"][1] and whole["departures"]
    assert compare(run, run)["differences"]["science_reasoning"]["difference"] == 0
