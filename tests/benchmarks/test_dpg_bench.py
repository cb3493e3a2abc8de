# SPDX-License-Identifier: MIT
"""DPG-Bench: its files, its grids, its rules and known defects, its scores. All records are invented."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from chat_server import ChatServer
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import dpg_answers, dpg_bench, dpg_rules
from janusflow_min.benchmarks.dpg_rules import Question
from janusflow_min.benchmarks.judges import NoAnswer

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad"]
COLUMNS += ["category_detailed", "tuple", "question_natural_language"]
KETTLE = [  # of an item: dependency, tuple, question
    (1, "0", "entity - whole (kettle)", "Is there a kettle?"),
    (2, "1", "attribute - color (kettle, blue)", "Is the kettle blue?"),
    (3, "0", "entity - whole (stove)", "Is there a stove?"),
    (4, "1,3", "relation - spatial (kettle, stove, on)", "Is the kettle on the stove?"),
]


def write_csv(path: Path, items: dict[str, list[tuple]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(COLUMNS)
        for item, questions in items.items():
            for number, dependency, kind, text in questions:
                rows.writerow(
                    [item, "A blue kettle, on a stove.", "", number, dependency, "", "", kind, text]
                )
    return path


def write_prompts(folder: Path, stems) -> Path:
    folder.mkdir()
    for stem in stems:
        (folder / f"{stem}.txt").write_text(f"A long prompt about {stem}.\n", encoding="utf-8")
    return folder


def score_of(run: Path, data: Path, **options) -> dict:
    return dpg_bench.score(run, dpg_bench.ScoreOptions(data=data, **options))


# Reading -----------------------------------------------------------------------


def test_prompts_are_in_order_and_stripped(tmp_path):
    folder = write_prompts(tmp_path / "prompts", ["whoops1", "10", "9", "COCOval2014_1"])
    prompts = dpg_bench.read(folder, subset=True)
    assert list(prompts) == ["9", "10", "COCOval2014_1", "whoops1"]
    assert prompts["9"] == "A long prompt about 9."
    with pytest.raises(ValueError, match="4 prompts, DPG-Bench has 1065"):
        dpg_bench.read(folder)
    (folder / "9.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"9\.txt:1: the prompt is empty"):
        dpg_bench.read(folder, subset=True)
    with pytest.raises(FileNotFoundError, match="folder of prompts"):
        dpg_bench.read(folder / "9.txt")


def test_questions_are_read_with_their_categories(tmp_path):
    questions = dpg_rules.group(dpg_bench.read_rows(write_csv(tmp_path / "q.csv", {"demo7": KETTLE})))
    assert [q.parents for q in questions["demo7"]] == [(), (1,), (), (1, 3)]
    assert questions["demo7"][1] == Question(2, (1,), "attribute", "attribute - color", "Is the kettle blue?")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("two", "0", "entity - whole (x)", "Is it?"),
            "q.csv:3: proposition_id and dependency must be whole",
        ),
        ((2, "1;3", "entity - whole (x)", "Is it?"), "q.csv:3: proposition_id and dependency"),
        ((2, "0", "entity - whole (x)", ""), "q.csv:3: question_natural_language must not be empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        dpg_rules.group(dpg_bench.read_rows(write_csv(tmp_path / "q.csv", {"demo": [KETTLE[0], row]})))


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("item_id,text\n1,a\n")
    with pytest.raises(ValueError, match=r"q\.csv:1: the columns proposition_id, dependency, tuple"):
        dpg_rules.group(dpg_bench.read_rows(path))


# Grids -----------------------------------------------------------------------


def test_a_grid_is_cut_as_it_was_tiled():
    colours = ["red", "green", "blue", "white"]
    grid = dpg_bench.grid([Image.new("RGB", (3, 3), colour) for colour in colours])
    assert grid.size == (6, 6)
    assert [grid.getpixel(xy) for xy in ((0, 0), (5, 0), (0, 5), (5, 5))] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]
    cut = dpg_answers.cut(grid, 4)
    assert [tile.getpixel((1, 1)) for tile in cut] == [grid.getpixel((x, y)) for y in (1, 4) for x in (1, 4)]
    assert len(dpg_answers.cut(grid, 1, 3)) == 1
    assert dpg_answers.cut(grid, 1, 6)[0].size == (6, 6)  # a single image
    with pytest.raises(ValueError, match="of 4 px must be 8 px wide"):
        dpg_answers.cut(grid, 4, 4)


def test_the_folder_is_the_official_one(tmp_path, parity_dir):
    """One file for each prompt, nothing else: the official scorer scores whatever it finds."""
    prompts = write_prompts(tmp_path / "prompts", ["12", "vrd3"])
    command = [
        "bench",
        "dpg_bench",
        "generate",
        "--data",
        str(prompts),
        "--subset",
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--model", str(parity_dir), "--device", "cpu", "--num-inference-steps", "1", "--quiet"]
    assert cli.main(command) == 0
    files = sorted((tmp_path / "run/images").iterdir())
    assert [path.name for path in files] == ["12.png", "vrd3.png"]
    with Image.open(files[0]) as grid:
        assert grid.size == (2 * 64, 2 * 64)
        cut = dpg_answers.cut(grid, 4)
    assert len({tile.tobytes() for tile in cut}) == 4  # four seeds


# Rules: the vectors of the specification ----------------------------------------------------------------


def questions_of(*parents: tuple[int, ...], l1: str = "entity") -> list[Question]:
    return [Question(i, p, l1, f"{l1} - whole", f"{i}?") for i, p in enumerate(parents, 1)]


def test_failures_cascade_in_order_and_in_place():
    questions = questions_of((), (1,), (), (3,))
    raw = {1: 0, 2: 1, 3: 1, 4: 1}
    assert dpg_rules.propagate(questions, raw) == {1: 0, 2: 0, 3: 1, 4: 1}
    assert dpg_rules.item_score(questions, [raw]) == [0.5]
    assert raw[2] == 1  # the raw answers stay
    chain = questions_of((), (1,), (2,))
    assert dpg_rules.propagate(chain, {1: 0, 2: 1, 3: 1}) == {1: 0, 2: 0, 3: 0}
    backwards = questions_of((2,), (3,), ())  # a parent after its child: not seen in time
    assert dpg_rules.propagate(backwards, {1: 1, 2: 1, 3: 0}) == {1: 1, 2: 0, 3: 0}


def test_categories_pool_all_tiles_or_as_the_official_scorer_the_last():
    questions = {"a": questions_of((), (1,), (), (3,))}
    raw = {"a": [{1: 1, 2: 1, 3: 1, 4: 1}, {1: 0, 2: 1, 3: 1, 4: 1}]}
    assert dpg_rules.categories(questions, raw, "l1") == {"entity": (100 * 6 / 8, 8)}
    assert dpg_rules.categories(questions, raw, "l1", official_compat=True) == {"entity": (75.0, 4)}
    assert list(dpg_rules.categories(questions, raw, "l2")) == ["entity - whole"]


def test_the_official_scorer_loses_its_first_row(tmp_path):
    """ELLA issue 61: without question 1 the item of the vector is dropped, since question 2 depends on it."""
    path = write_csv(tmp_path / "q.csv", {"first": KETTLE, "second": KETTLE[:1]})
    official = dpg_rules.group(dpg_bench.read_rows(path), official_compat=True)
    assert [q.id for q in official["first"]] == [2, 3, 4]
    raw = {"first": [{1: 1, 2: 1, 3: 1, 4: 1}], "second": [{1: 0}]}
    assert dpg_rules.headline(dpg_rules.group(dpg_bench.read_rows(path)), raw) == 50.0
    assert dpg_rules.headline(official, raw, official_compat=True) == 0.0


def test_one_bad_row_costs_one_item(tmp_path):
    """Stops: one repeated id, one dependency on a question that is not there, or one prompt without questions that
    refuses the whole benchmark, or that nobody is told of."""
    dangling = [KETTLE[0], (2, "9", "entity - whole (x)", "Is it?")]
    twice = [(1, "0", "entity - whole (x)", "Is it?"), *KETTLE]
    rows = dpg_bench.read_rows(write_csv(tmp_path / "q.csv", {"a": KETTLE, "b": dangling, "c": twice}))
    questions = dpg_rules.group(rows)
    assert [q.text for q in questions["c"]] == [text for _, _, _, text in KETTLE]
    raw = {"a": [{1: 1, 2: 1, 3: 1, 4: 0}], "b": [{1: 1, 2: 1}], "c": [{1: 1, 2: 1, 3: 0, 4: 1}]}
    assert dpg_rules.headline(questions, raw) == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert dpg_rules.categories(questions, raw, "l1")["entity"] == (75.0, 4)
    assert dpg_rules.headline(questions, raw | {"d": [{1: 1}]}) == pytest.approx(62.5)
    told = dpg_rules.remarks(rows, dict.fromkeys("abcd", "a prompt"))
    assert [text.split(" ")[0] for text in told] == ["1", "1", "1"]
    assert "c 1" in told[0] and told[1].endswith("mean: b") and told[2].endswith("left out: d")
    # The official scorer looks the missing parent up only where no parent before it has failed.
    last = {"x": [dpg_rules.Question(1, (), "e", "e", "?"), dpg_rules.Question(2, (1, 9), "e", "e", "?")]}
    assert dpg_rules.headline(last, {"x": [{1: 0, 2: 1}]}, official_compat=True) == 0.0
    assert dpg_rules.headline(last, {"x": [{1: 1, 2: 1}]}, official_compat=True) is None
    assert dpg_rules.headline(last, {"x": [{1: 0, 2: 1}]}) is None


def test_answers_are_yes_by_their_first_word_or_exactly():
    assert all(dpg_rules.is_yes(text) for text in ("yes", "Yes.", " YES, it is", "**yes**"))
    assert not any(dpg_rules.is_yes(text) for text in ("", "no", "yesterday", "it is, yes"))
    assert dpg_rules.is_yes("yes", official_compat=True) and not dpg_rules.is_yes("Yes", official_compat=True)


# Scoring -----------------------------------------------------------------------


class FakeVQA:
    """Red tiles hold everything, others nothing."""

    name = "fake"

    def __init__(self):
        self.asked, self.refused = 0, None

    def answer(self, image, question):
        self.asked += 1
        if question == self.refused:
            raise NoAnswer("content filter")
        return "Yes." if image.getpixel((0, 0)) == (255, 0, 0) else "no"


def grid_of(path: Path, *colours: str) -> None:
    dpg_bench.grid([Image.new("RGB", (4, 4), colour) for colour in colours]).save(path)


def test_a_part_is_scored_without_a_headline_and_goes_on(tmp_path):
    prompts = write_prompts(tmp_path / "prompts", ["1", "2"])
    questions = write_csv(tmp_path / "q.csv", {"1": KETTLE, "2": KETTLE})
    images = tmp_path / "images"
    images.mkdir()
    grid_of(images / "1.png", "red", "red", "red", "blue")
    vqa = FakeVQA()
    options = dict(data=prompts, questions=questions, subset=True, images=images, vqa=vqa, progress=False)
    score = score_of(tmp_path / "run", **options)
    assert score["headline"] is None and (score["n_scored"], score["n_expected"]) == (1, 2)
    entity = score["scores"]["entity"]
    assert (entity["value"], entity["n_scored"], entity["n_expected"]) == (75.0, 8, 16)
    assert vqa.asked == 16
    items = json.loads((tmp_path / "run/items.json").read_text())["items"]
    assert items[0]["tile_scores"] == [1, 1, 1, 0] and items[0]["score"] == 0.75
    grid_of(images / "2.png", "red", "red", "red", "red")
    score = score_of(tmp_path / "run", **options)
    assert vqa.asked == 32 and score["complete"] and score["headline"] is None
    compat = score_of(tmp_path / "run", official_compat=True, **options)
    assert compat["scores"]["entity"]["value"] == 0.0  # exactly "yes" is never said
    items = json.loads((tmp_path / "run/items.json").read_text())
    assert items["l1"]["entity"][0] == 0.0 and {item["score"] for item in items["items"]} == {None, 0.0}
    assert vqa.asked == 32
    saved = score_of(
        tmp_path / "other",
        answers=tmp_path / "run/answers.jsonl",
        **{k: v for k, v in options.items() if k != "vqa"},
    )
    assert saved["scores"] == score["scores"]
    with pytest.raises(ValueError, match="one of --answers, --vqa and --judge-model"):
        score_of(tmp_path / "run", answers=tmp_path / "run/answers.jsonl", **options)


def test_a_chat_that_fails_leaves_the_grid_out(tmp_path):
    """Stops: no for what was not answered, and a run that dies with its endpoint."""
    pytest.importorskip("openai")
    prompts = write_prompts(tmp_path / "prompts", ["1", "2"])
    questions = write_csv(tmp_path / "q.csv", {"1": KETTLE[:1], "2": KETTLE[2:3]})
    images = tmp_path / "images"
    images.mkdir()
    for stem in "12":
        grid_of(images / f"{stem}.png", "red", "red", "red", "red")
    options = dict(
        data=prompts, questions=questions, subset=True, images=images, judge_model="m", progress=False
    )
    ill = [True]

    def reply(request, before):
        stove = "stove" in request["messages"][0]["content"][0]["text"]
        return ("status", 500) if stove and ill[0] else "Yes"

    with ChatServer(reply) as server:
        first = score_of(tmp_path / "run", judge_url=server.url, attempts=1, **options)
        assert (first["n_scored"], first["scores"]["entity"]["value"]) == (1, 100.0)
        assert "1 without a score" in " ".join(first["notes"])
        ill[0] = False
        assert score_of(tmp_path / "run", judge_url=server.url, **options)["complete"]
    assert len(server.requests) < 4 + 4 + 5


def test_a_refused_question_costs_no_other(tmp_path):
    """Stops: one question that a content filter refuses and whose grid is asked about anew at every call."""
    prompts = write_prompts(tmp_path / "prompts", ["1"])
    questions, images = write_csv(tmp_path / "q.csv", {"1": KETTLE}), tmp_path / "images"
    images.mkdir()
    grid_of(images / "1.png", "red", "red", "red", "blue")
    vqa = FakeVQA()
    vqa.refused = "Is the kettle blue?"
    options = dict(data=prompts, questions=questions, subset=True, images=images, vqa=vqa, progress=False)
    with pytest.raises(
        ValueError, match=r"no answers about the images.*4 questions got no answer: content filter"
    ):
        score_of(tmp_path / "run", **options)
    assert vqa.asked == 16
    vqa.refused = None
    assert score_of(tmp_path / "run", **options)["complete"] and vqa.asked == 16 + 4
    saved = options | dict(answers=tmp_path / "run/answers.jsonl", vqa=None)
    assert score_of(tmp_path / "other", **saved)["complete"]


def test_a_bad_grid_costs_one_grid(tmp_path):
    """Stops: one image of 1,065 that is cut off or of the wrong size and ends the scoring of all, without its name."""
    stems = ["1", "2", "3"]
    prompts = write_prompts(tmp_path / "prompts", stems)
    questions, images = write_csv(tmp_path / "q.csv", dict.fromkeys(stems, KETTLE)), tmp_path / "images"
    images.mkdir()
    grid_of(images / "1.jpg", "red", "red", "red", "blue")
    Image.new("RGB", (8, 6)).save(images / "2.png")
    (images / "3.png").write_bytes((images / "1.jpg").read_bytes()[:300])
    options = dict(data=prompts, questions=questions, subset=True, images=images, progress=False)
    score = score_of(tmp_path / "run", vqa=FakeVQA(), **options)
    assert (score["n_scored"], score["complete"]) == (1, False)
    told = next(note for note in score["notes"] if "2 without a score" in note)
    assert "2.png: a grid of tiles of 4 px must be 8 px" in told and "3.png: the file is empty" in told
    grid_of(images / "1.png", "red", "red", "red", "blue")
    with pytest.raises(ValueError, match=r"several images of 1: 1\.jpg, 1\.png"):
        score_of(tmp_path / "run", vqa=FakeVQA(), **options)


def test_answers_that_are_neither_are_told(tmp_path):
    """Stops: answers that a judge did not give, in a file of saved ones, counted as no in silence."""
    prompts = write_prompts(tmp_path / "prompts", ["1"])
    questions, images = write_csv(tmp_path / "q.csv", {"1": KETTLE[:1]}), tmp_path / "images"
    images.mkdir()
    grid_of(images / "1.png", "red", "red", "red", "blue")
    saved = tmp_path / "answers.jsonl"
    tiles = [{"1": text} for text in ("yes", "I cannot see the image.", "", "(No)")]
    saved.write_text(json.dumps({"item_id": "1", "answers": tiles}) + "\n", encoding="utf-8-sig")
    options = dict(data=prompts, questions=questions, subset=True, images=images, progress=False)
    score = score_of(tmp_path / "run", answers=saved, **options)
    assert score["scores"]["entity"]["value"] == 25.0
    assert "2 of 4 answers are neither yes nor no and count as no: 'I cannot see" in " ".join(score["notes"])


def test_the_whole_benchmark_has_both_headlines(tmp_path, capsys, monkeypatch):
    """Stops: a headline for prompts that are not the published ones, or for fewer tiles."""
    stems = [str(i) for i in range(1065)]
    prompts = write_prompts(tmp_path / "prompts", stems)
    questions = write_csv(tmp_path / "q.csv", dict.fromkeys(stems, KETTLE[:2]))
    images = tmp_path / "run/images"
    images.mkdir(parents=True)
    for stem in stems:
        grid_of(images / f"{stem}.png", "red", "red", "red", "red")
    saved = tmp_path / "answers.jsonl"
    tile = {"1": "yes", "2": "no"}
    saved.write_text("".join(json.dumps({"item_id": s, "answers": [tile] * 4}) + "\n" for s in stems))
    command = ["bench", "dpg_bench", "score", "--data", str(prompts), "--questions", str(questions)]
    command += ["--answers", str(saved), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(command) == 0
    assert "1,065 scored, but there is no headline number" in capsys.readouterr().out
    monkeypatch.setattr(dpg_bench, "PROMPTS_SHA256", dpg_bench.prompts_sha256(dpg_bench.read(prompts)))
    assert cli.main([*command, "--tiles", "3"]) == 0
    assert "1,065 scored, but there is no headline number" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "DPG-Bench score: 50.0000 (1,065 scored, 95 % interval" in capsys.readouterr().out
    score = json.loads((tmp_path / "run/score.json").read_text())
    assert [entry["value"] for entry in score["others"].values()] == [50.0, 50.0]
    assert score["scores"]["attribute"]["value"] == 0.0
    assert cli.main(["bench", "dpg_bench", "report", "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.md").read_text()
    assert "80.09" in text and "72.03" in text and "not judged by mPLUG" in text
    saved.write_text(json.dumps({"item_id": "3", "answers": [tile] * 3 + [{"1": "yes"}]}) + "\n")
    assert cli.main(command) == 2
    assert "answers.jsonl:1: 4 tiles with answers to questions [1, 2]" in capsys.readouterr().err
