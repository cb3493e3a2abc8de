# SPDX-License-Identifier: MIT
"""WISE: its two sets, its rules with the specification's vectors, its judge over HTTP. All records are invented."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import wise, wise_sets
from janusflow_min.benchmarks.reading import text_sha256
from janusflow_min.benchmarks.wise_sets import CATEGORIES, DATASETS

GRADES = "Consistency: {}\nRealism: {}\nAesthetic Quality: {}"


def record(number: int, **change) -> dict:
    return {
        "Prompt": f"the thing that number {number} hints at",
        "Explanation": f"shows thing {number}",
        "Category": "Biology",
        "Subcategory": "Animal",
        "prompt_id": number,
    } | change


def write_set(folder: Path, name: str = "legacy", ids=None) -> Path:
    """The set's files, all ids or some."""
    folder.mkdir(exist_ok=True)
    for stem, (first, last) in DATASETS[name].files.items():
        records = [record(i) for i in range(first, last + 1) if ids is None or i in ids]
        (folder / f"{stem}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return folder


def write_images(folder: Path, ids) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in ids:
        Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(folder / f"{number}.png")
    return folder


def score_of(run: Path, data: Path, **options) -> dict:
    return wise.score(run, wise.ScoreOptions(data=data, **options))


# Reading -----------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_whole_sets_are_read(tmp_path, name):
    prompts = wise.read(write_set(tmp_path, name), name)
    assert [p.id for p in prompts] == list(range(1, 1001))


def test_sets_are_not_mixed(tmp_path):
    write_set(tmp_path, "verified")
    with pytest.raises(
        FileNotFoundError, match=r"cultural_common_sense\.json is missing; the legacy data set is"
    ):
        wise.read(tmp_path, "legacy")
    with pytest.raises(ValueError, match="dataset must be one of legacy, verified, got 'new'"):
        wise.read(tmp_path, "new")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_id": 401}, "prompt_id must be a whole number from 1 to 400, got 401"),
        ({"prompt_id": "7"}, "got '7'"),
        ({"prompt_id": 1}, "prompt_id 1 is there already"),
        ({"Prompt": ""}, "Prompt must be a text"),
        ({"Extra": 1}, "exactly Prompt, Explanation, Category, Subcategory, prompt_id"),
    ],
)
def test_a_bad_record_is_named_by_its_place(tmp_path, bad, message):
    """Stops: a data set with one wrong record that is refused without saying which."""
    path = tmp_path / "cultural_common_sense.json"
    path.write_text(json.dumps([record(1), record(2) | bad]), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=message) as error:
        wise.read(tmp_path, "legacy", subset=True)
    assert f"{path}[1]: " in str(error.value)


def test_bad_files_are_named(tmp_path):
    """Stops: a file that is not a data set, or lacks a prompt, and scores what it holds."""
    path = tmp_path / "natural_science.json"
    for text, message in (("{}", "a JSON array"), ("[{", "JSON"), ("[" * 100_000, "JSON"), ("\x80", "JSON")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message) as error:
            wise.read(tmp_path, "legacy", subset=True)
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match="holds none of"):
        wise.read(tmp_path, "legacy", subset=True)
    write_set(tmp_path, ids=set(range(1, 1001)) - {17})
    with pytest.raises(
        ValueError, match="399 prompts, the legacy data set has 400, ids 1 to 400; 17 is missing"
    ):
        wise.read(tmp_path)


def test_images_are_named_by_their_id_and_seeded_by_it(tmp_path, parity_dir):
    """Stops: a subset that generates an id with another seed than the whole set does."""
    data = write_set(tmp_path / "data", ids={3, 905})
    command = ["bench", "wise", "generate", "--data", str(data), "--subset", "--out", str(tmp_path / "a")]
    command += ["--model", str(parity_dir), "--device", "cpu", "--num-inference-steps", "1", "--quiet"]
    assert cli.main([*command, "--batch-size", "1"]) == 0
    assert sorted(p.name for p in (tmp_path / "a/images").iterdir()) == ["3.png", "905.png"]
    write_set(data, ids={905})
    command[command.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    assert cli.main([*command, "--batch-size", "1"]) == 0
    assert (tmp_path / "a/images/905.png").read_bytes() == (tmp_path / "b/images/905.png").read_bytes()
    assert json.loads((tmp_path / "b/manifest.json").read_text())["settings"]["dataset"] == "legacy"


# Rules: the vectors of the specification ----------------------------------------------------------------


def test_wiscore():
    assert wise.wiscore(2, 1, 0) == pytest.approx(0.8)
    assert wise.wiscore(1, 1, 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        wise.wiscore(9.9, 9.9, 9.9)  # TorchUMM's sentinel for a judge that failed


def test_overall():
    means = dict(zip(CATEGORIES, (0.13, 0.26, 0.28, 0.20, 0.19, 0.11), strict=True))
    assert wise.overall(means, "legacy") == pytest.approx(0.1827, abs=5e-5)
    assert wise.overall(means | {"time": None}, "legacy") is None
    for name in DATASETS:
        assert sum(DATASETS[name].weights) == pytest.approx(1.0)
        assert [wise.category(i, name) for i in (1, 400, 401, 1000)] == [
            "cultural",
            "cultural",
            "time",
            "chemistry",
        ]
    assert (wise.category(567, "legacy"), wise.category(568, "legacy")) == ("time", "space")
    assert (wise.category(520, "verified"), wise.category(521, "verified")) == ("time", "space")
    counts = Counter(wise.category(i, "verified") for i in range(1, 1001))
    assert list(counts.values()) == [400, 120, 120, 120, 120, 120]  # the overall is the plain mean


@pytest.mark.parametrize(
    ("text", "grades"),
    [
        (GRADES.format(2, 1, 0), (2, 1, 0)),
        ("**Consistency**: 1\n**Realism** 2\n*aesthetic quality* 0", (1, 2, 0)),
        ("**Consistency:** 1\n**Realism:** 2\n**Aesthetic Quality：** 0", (1, 2, 0)),
        ("<think>" + GRADES.format(1, 1, 1) + " no wait", None),
        ("<think>" + GRADES.format(1, 1, 1) + "</think>2\n1\n0", (2, 1, 0)),
        (GRADES.format(1.5, 1, 1), None),
        (GRADES.format(10, 1, 1), None),
        ("CONSISTENCY 1, realism:2; Aesthetic Quality: 1", (1, 2, 1)),
        ("Consistency: 0\n" + GRADES.format(2, 2, 2), (2, 2, 2)),  # the last counts
        ("Here you are\n1\n 0 \n2\n", (1, 0, 2)),
        ("1\n0", None),
        ("Consistency: 1\nRealism: 2", None),
        (GRADES.format(9.9, 9.9, 9.9), None),
        (GRADES.format(3, 0, 0), None),
        ("I cannot judge this image.", None),
    ],
)
def test_legacy_answers(text, grades):
    assert wise.parse_legacy(text) == (
        None if grades is None else dict(zip(wise_sets.GRADES, grades, strict=True))
    )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 1", 1),
        ("**Score:** 0", 0),
        ("score 1", 1),
        ("Score: 1.", 1),
        ("<think>Score: 1, or is it?</think>Score: 0", 0),
        ("<think>If it were there, Score: 1 would be right, but", None),
        ("Score: 1, and not Score: 0", 1),  # the first counts
        ("The image shows it.\n1\n", 1),
        ("0\n1", None),
        ("Score: 10", None),
        ("Score: 0.5", None),
        ("Score: 2", None),
        ("", None),
    ],
)
def test_verified_answers(text, score):
    assert wise.parse_verified(text) == (None if score is None else {"score": score})


# Judging over HTTP -----------------------------------------------------------------------


def test_a_judge_that_fails_in_every_way_is_asked_again(tmp_path):
    """Stops: a sentinel or a zero for what was not judged; a run that dies with its endpoint."""
    pytest.importorskip("openai")
    ids = [1, 2, 3, 401, 600, 750, 805, 1000]
    data, images = write_set(tmp_path / "data", ids=ids), write_images(tmp_path / "images", ids)
    trouble = {
        1: [("hang", 4)],
        2: [("drop", 0)],
        3: [("status", 429), ("status", 500)],
        401: ["I would rather not.", "Consistency: 7"],
        600: [("raw", b"<html>")],
        750: [("raw", b'{"choices": []}')],
        805: ["nonsense", ("status", 503), ("drop", 0)],  # all three attempts
    }

    def number(request) -> int:
        text = request["messages"][1]["content"][0]["text"]
        return next(i for i in ids if f'shows thing {i}"' in text)

    def reply(request, before):
        wrong = trouble.get(number(request), [])
        return wrong[before] if before < len(wrong) else GRADES.format(2, 1, 0)

    options = dict(subset=True, images=images, judge_model="a judge", progress=False, wait=0.01, timeout=2.0)
    with ChatServer(reply) as server:
        score = score_of(tmp_path / "run", data, judge_url=server.url, concurrency=4, **options)
        first = len(server.requests)
        assert server.most_at_once > 1
        again = score_of(tmp_path / "run", data, judge_url=server.url, **options)
    assert (score["n_scored"], score["n_expected"], score["complete"]) == (7, 8, False)
    assert "1 without a score" in " ".join(score["notes"]) and "805" in " ".join(score["notes"])
    assert score["scores"]["physics"]["value"] is None
    cultural = score["scores"]["cultural"]
    assert (cultural["value"], cultural["n_scored"], cultural["n_expected"]) == (pytest.approx(0.8), 3, 3)
    assert len(server.requests) == first + 1  # the one that was left
    assert again["complete"] and again["headline"] is None
    request = server.requests[0]
    assert request["model"] == "a judge" and request["temperature"] == 0 and request["max_tokens"] == 2000
    system, user = request["messages"]
    assert system["role"] == "system" and user["content"][1]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert len(score["judge"]["prompt_sha256"]) == 64
    lines = (tmp_path / "run/Results/natural_science_scores_results.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "prompt_id": 750,
        "Subcategory": "Animal",
        "consistency": 2,
        "realism": 1,
        "aesthetic_quality": 0,
    }
    full = json.loads((tmp_path / "run/Results/cultural_common_sense_full_results.json").read_text())
    assert [entry["prompt_id"] for entry in full] == [1, 2, 3]
    assert list(full[0]) == ["prompt_id", "prompt", "key", "image_path", "evaluation"]


def test_a_judge_that_refuses_stops_the_run(tmp_path):
    """Stops: a thousand requests with a wrong key, each retried."""
    pytest.importorskip("openai")
    ids = list(range(1, 41))
    data, images = write_set(tmp_path / "data", ids=ids), write_images(tmp_path / "images", ids)
    with (
        ChatServer(lambda *_: ("status", 401)) as server,
        pytest.raises(RuntimeError, match="the judge refuses, HTTP 401"),
    ):
        score_of(
            tmp_path / "run",
            data,
            subset=True,
            images=images,
            judge_url=server.url,
            concurrency=2,
            progress=False,
        )
    assert len(server.requests) < 20


def test_the_verified_set_is_asked_in_its_own_way(tmp_path):
    pytest.importorskip("openai")
    data, images = (
        write_set(tmp_path / "data", "verified", {1, 521}),
        write_images(tmp_path / "images", [1, 521]),
    )
    with ChatServer(lambda *_: "<think>\n</think>\n\nScore: 1") as server:
        options = dict(dataset="verified", subset=True, images=images, judge_url=server.url, progress=False)
        score = score_of(tmp_path / "run", data, **options)
        assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
        assert server.requests[0]["max_tokens"] == 500
        assert score["judge"]["model"] == "Qwen3.5-35B-A3B"
        assert score["scores"]["space"]["value"] == 1.0
        assert (tmp_path / "run/Results-qwen35/cultural_common_sense_scores_results.jsonl").is_file()
        # Other wording is another judge: the answers there are not mixed with it.
        own = tmp_path / "wording.json"
        own.write_text(json.dumps({"user": "Is {Explanation} what {Prompt} means?", "system": "Be brief."}))
        with pytest.raises(ValueError, match="of another judge"):
            score_of(tmp_path / "run", data, judge_prompts=own, **options)
        score = score_of(tmp_path / "other", data, judge_prompts=own, **options)
        system, user = server.requests[-1]["messages"]
        assert system["content"][0]["text"] == "Be brief."
        text = user["content"][0]["text"]
        assert text.startswith("Is shows thing") and "hints at means?" in text
        assert "not comparable" in score["notes"][0]
        assert len(score["options"]["judge_prompts_sha256"]) == 64
        own.write_text('{"user": "Is it right?"}')
        with pytest.raises(
            ValueError, match=r"must have the placeholders \{Prompt\}, \{Explanation\}; it has none"
        ):
            score_of(tmp_path / "third", data, judge_prompts=own, **options)


def test_a_broken_image_is_left_out_and_named(tmp_path):
    """Stops: a grade for an image that cannot be opened, and one bad file that ends the scoring of all."""
    data, images = write_set(tmp_path / "data", ids=[1, 2, 3]), write_images(tmp_path / "images", [1, 2, 3])
    (images / "1.png").write_bytes(b"")
    (images / "2.png").write_bytes((images / "3.png").read_bytes()[:50])
    chat = FakeChat()
    score = score_of(tmp_path / "run", data, subset=True, images=images, judge_model=chat, progress=False)
    assert (chat.asked, score["n_scored"], score["complete"]) == (1, 1, False)
    assert "2 without a score" in " ".join(
        score["notes"]
    ) and "1.png: the file is empty or damaged" in " ".join(score["notes"])


def test_an_answer_of_one_mode_is_read_again_by_the_other(tmp_path):
    """Stops: a grade by the official rules in a score by our own, or the other way round, after a second call."""
    data, images = write_set(tmp_path / "data", ids=[1]), write_images(tmp_path / "images", [1])
    chat = FakeChat(GRADES.format(1, 1, 9))
    options = dict(subset=True, images=images, judge_model=chat, progress=False, wait=0.0)
    official = score_of(tmp_path / "run", data, official_compat=True, **options)
    assert official["scores"]["cultural"]["value"] == pytest.approx((0.7 + 0.2 + 0.9) / 2)
    chat.text = GRADES.format(1, 1, 2)
    assert score_of(tmp_path / "run", data, **options)["scores"]["cultural"]["value"] == pytest.approx(0.55)
    assert chat.asked == 2


class FakeChat:
    name = "gpt-4o-2024-05-13"

    def __init__(self, text=GRADES.format(1, 1, 1)):
        self.asked, self.text = 0, text

    def ask(self, messages):
        self.asked += 1
        return self.text


def test_only_all_thousand_have_a_headline(tmp_path, monkeypatch):
    """Stops: a headline for 999 images, or for a thousand prompts that are not the published ones."""
    data, images = write_set(tmp_path / "data"), write_images(tmp_path / "run/images", range(1, 1001))
    chat = FakeChat()
    (images / "77.png").rename(tmp_path / "77.png")
    score = score_of(tmp_path / "run", data, judge_model=chat, progress=False)
    assert score["headline"] is None and score["n_scored"] == 999
    (tmp_path / "77.png").rename(images / "77.png")
    score = score_of(tmp_path / "run", data, judge_model=chat, progress=False)
    assert chat.asked == 1000 and score["complete"] and score["headline"] is None  # invented prompts
    published = [text_sha256(data / f"{stem}.json") for stem in DATASETS["legacy"].files]
    about = dataclasses.replace(DATASETS["legacy"], files_sha256=published)
    monkeypatch.setitem(DATASETS, "legacy", about)
    score = score_of(tmp_path / "run", data, judge_model=chat, progress=False)
    assert (score["headline"]["name"], score["headline"]["value"]) == ("WiScore", pytest.approx(0.5))
    dry = score_of(tmp_path / "other", data, images=images, judge_model=chat, dry_run=True)
    assert "1,000 requests" in dry["dry_run"] and not (tmp_path / "other/score.json").exists()
    wise.report(tmp_path / "run")
    text = (tmp_path / "run/report.md").read_text()
    assert "# WISE (legacy)" in text and "0.2954" in text and "0.18" in text and "GPT-4o" in text
