# SPDX-License-Identifier: MIT
"""What all scorings share: options, headlines, intervals, the comparison of two runs, the gallery."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import bootstrap, judges
from janusflow_min.benchmarks.bootstrap import ItemScore
from janusflow_min.benchmarks.chat import Question
from janusflow_min.benchmarks.compare import compare, markdown
from janusflow_min.benchmarks.gallery import gallery
from janusflow_min.benchmarks.report import summary, write_report
from janusflow_min.benchmarks.run_folder import RunFolder
from janusflow_min.benchmarks.scoring import ChatOptions, ScoreOptions, ScoringRun, read_items
from janusflow_min.options import add_options, departures, json_object, option, read_options

# Options -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options(ScoreOptions, ChatOptions):
    data: Path = option("the data, 100 % of it", kind=Path)
    threshold: float = option("scores must be above it", 0.3, rule=True)
    crop: bool = option("show the box alone", True, rule=True)
    tasks: list[str] | None = option("repeat for more", None, repeat=True)
    dataset: str = option("which", "legacy", choices=("legacy", "verified"))
    secret: str = "for Python alone"


def parse(*line: str) -> Options:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Options)
    return read_options(Options, parser.parse_args(line), progress=False)


def test_a_dataclass_makes_the_arguments(monkeypatch):
    """Stops: an option that the command line and the function know under two names or with two defaults."""
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--data", "x") == Options(data=Path("x"), progress=False)
    line = [
        "--data",
        "~/y",
        "--threshold",
        "0.5",
        "--no-crop",
        "--tasks",
        "a",
        "--tasks",
        "b",
        "--limit",
        "3",
    ]
    line += ["--judge-extra", '{"top_k": 1}', "--dataset", "verified", "--judge-thinking", "--dry-run"]
    assert parse(*line) == Options(
        data=Path("/home/me/y"),
        threshold=0.5,
        crop=False,
        tasks=["a", "b"],
        limit=3,
        judge_extra={"top_k": 1},
        dataset="verified",
        judge_thinking=True,
        dry_run=True,
        progress=False,
    )
    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    text = parser.format_help()
    assert (
        "100 % of it" in text and "(default: 0.3)" in text and "secret" not in text and "--wait" not in text
    )
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        parse("--data", "x", "--limit", "0")
    for bad in ("[1]", "{", "[" * 100_000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a JSON object"):
            json_object(bad)


def test_another_rule_is_a_departure():
    """Stops: a headline for changed thresholds."""
    assert departures(parse("--data", "x", "--limit", "3", "--attempts", "1")) == []
    assert departures(parse("--data", "x", "--threshold", "0.4", "--no-crop")) == [
        "threshold is 0.4, the benchmark's is 0.3",
        "crop is False, the benchmark's is True",
    ]


# A run -----------------------------------------------------------------------


def scored(root: Path, rights, published: bool = True, groups=("a", "b"), **options) -> dict:
    """Items of two images each, written as any benchmark does."""
    run = ScoringRun("x", root, Options(data=Path("d"), **options), {"d": "1"}, published)
    items = [
        ItemScore(f"{i:03d}", {groups[i % 2]: (float(x), 2)}, f"a prompt <{i}>", [f"{root}/images/{i}.png"])
        for i, x in enumerate(rights)
    ]
    means = {g: [i.parts[g][0] / 2 for i in items if g in i.parts] for g in groups}
    return run.write(
        headline=("overall", float(np.mean([np.mean(v or [0]) for v in means.values()]))),
        scale=1.0,
        scores={g: (float(np.mean(v or [0])), 2 * len(v), 2 * len(v)) for g, v in means.items()},
        n_expected=2 * len(items),
        n_scored=2 * len(items),
        judge={"model": "m"},
        items=items,
        totals={"overall": {g: 0.5 for g in groups}},
    )


def test_a_headline_needs_the_published_set_and_its_rules(tmp_path):
    """Stops: a benchmark's number for 553 lines of one prompt, or for another threshold."""
    score = scored(tmp_path, [2, 1, 0, 2])
    assert score["headline"]["value"] == 0.625
    low, high = score["headline"]["interval"]
    assert 0 <= low < 0.625 < high <= 1 and f"95 % interval {low:.4f} to {high:.4f}" in summary(score)
    score = scored(tmp_path, [2, 1, 0, 2], published=False)
    assert score["headline"] is None and summary(score).endswith("the data are not the published ones")
    score = scored(tmp_path, [2, 1, 0, 2], threshold=0.4)
    assert score["headline"] is None and "threshold is 0.4, the benchmark's is 0.3" in summary(score)
    assert score["options"] == {"threshold": 0.4, "crop": True}


def test_a_run_is_scored_as_what_it_is(tmp_path):
    """Stops: images of one benchmark or of one file scored by another's."""
    folder = RunFolder(tmp_path)
    folder.write_json("manifest.json", {"benchmark": "y", "inputs_sha256": {"d": "1"}, "settings": {}})
    with pytest.raises(ValueError, match="is a run of y, not of x"):
        ScoringRun("x", tmp_path, Options(data=Path("d")), {"d": "1"}, True)
    with pytest.raises(ValueError, match="generated from another d: sha256 1 there, 2 of the one given"):
        ScoringRun("y", tmp_path, Options(data=Path("d")), {"d": "2"}, True)
    elsewhere = ScoringRun("x", tmp_path, Options(data=Path("d"), images=tmp_path / "mine"), {}, True)
    assert elsewhere.manifest is None and elsewhere.images == tmp_path / "mine"


def test_broken_images_are_named_and_left_out(tmp_path):
    """Stops: one cut file among 2,212 that ends scoring without its name, or an empty one that gets a grade."""
    (tmp_path / "images").mkdir()
    run = ScoringRun("x", tmp_path, Options(data=Path("d")), {}, True)
    with pytest.raises(FileNotFoundError, match=r"no image named <id>\.png in"):
        run.whole(["1.png"], "<id>.png")
    (tmp_path / "images" / "1.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no image that is whole \(1\.png\) named"):
        run.whole(["1.png"], "<id>.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "2.png")
    assert run.whole(["1.png", "2.png", "3.png"], "<id>.png") == ["2.png"]
    assert run.failures == {"1.png": "the file is empty or damaged"}


def test_a_dry_run_asks_nothing(tmp_path):
    """Stops: a bill for 57,564 images that nobody expected."""
    path = tmp_path / "run" / "judge.jsonl"
    records = judges.Records(path, "key", {})
    run = ScoringRun("x", tmp_path / "run", Options(data=Path("d")), {}, True)
    questions = [Question(i, "h", lambda: [{"content": "x" * 10_000}]) for i in range(1234)]
    assert summary(run.dry_run(records.todo(questions))) == "1,234 requests, about 12.4 MB"
    assert not path.exists()
    records.add(0, "h", {})
    assert summary(run.dry_run(records.todo(questions))).startswith("1,233 requests")
    assert summary(run.dry_run([])) == "0 requests, about 0.0 MB"
    records.close()


# Intervals -----------------------------------------------------------------------


def items(values, count: int = 1, group: str = "a") -> list[ItemScore]:
    return [ItemScore(str(i), {group: (v, count)}) for i, v in enumerate(values)]


def test_intervals_of_shares_are_wilsons():
    """Stops: an interval of no width for 20 of 20."""
    low, high = bootstrap.intervals(items([1.0] * 20), {}, 1.0)["a"]
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert bootstrap.intervals(items([1.0] * 8 + [0.0] * 2), {}, 1.0)["a"] == pytest.approx(
        (0.4902, 0.9433), abs=1e-4
    )
    assert bootstrap.intervals(items([100.0] * 20), {}, 100.0)["a"] == pytest.approx((83.89, 100), abs=1e-2)
    assert bootstrap.intervals([], {}, 1.0) == {}


def test_intervals_count_prompts_not_images():
    """Stops: four images of one prompt taken for four independent trials."""
    rng = np.random.default_rng(0)
    rights = rng.random(200) < 0.6
    alike = [4.0 * right for right in rights]  # all four images right, or none
    low, high = bootstrap.intervals(items(alike, 4), {}, 1.0)["a"]
    error = np.sqrt(rights.mean() * (1 - rights.mean()) / 200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    apart = [float(x) for x in rng.binomial(4, 0.6, 200)]
    low, high = bootstrap.intervals(items(apart, 4), {}, 1.0)["a"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 800), rel=0.15)


def test_totals_are_weighted_means_of_groups():
    """Stops: an interval around another number than the headline's; groups that a draw leaves empty."""
    rows = [*items([1.0, 0.0, 1.0, 1.0]), ItemScore("b", {"b": (3.0, 4)}), ItemScore("c", {"b": (2.0, 4)})]
    found = bootstrap.intervals(rows, {"mean": {"a": 0.5, "b": 0.5}, "none": {"a": 0.5, "z": 0.5}}, 1.0)
    low, high = found["mean"]
    assert low < 0.5 * 0.75 + 0.5 * 0.625 < high
    assert set(found) == {"a", "b", "mean"}
    assert found == bootstrap.intervals(
        rows, {"mean": {"a": 0.5, "b": 0.5}}, 1.0
    )  # the draws come from a seed


# Two runs -----------------------------------------------------------------------


def test_two_runs_are_compared_item_by_item(tmp_path):
    """Stops: a difference read from two intervals that overlap, although every item changed for the better."""
    a = [0, 1, 1, 0, 1, 2] * 10
    scored(tmp_path / "a", a)
    scored(tmp_path / "b", [min(2, x + 1) for x in a], threshold=0.4)
    result = compare(tmp_path / "a", tmp_path / "b")
    overall = result["differences"]["overall"]
    assert overall["difference"] == pytest.approx(np.mean([min(2, x + 1) - x for x in a]) / 2)
    assert overall["clear"] and overall["interval"][0] > 0.3
    assert len(result["won"]) == 50 and not result["lost"] and result["items"] == 60
    assert result["not_alike"] == ["options.threshold: 0.3 in A, 0.4 in B"]
    same = compare(tmp_path / "a", tmp_path / "a")
    assert same["differences"]["overall"]["interval"] == [0.0, 0.0] and not same["won"] + same["lost"]
    assert not same["differences"]["overall"]["clear"] and not same["not_alike"]
    back = compare(tmp_path / "b", tmp_path / "a")
    assert len(back["lost"]) == 50 and back["differences"]["a"]["difference"] < 0
    text = markdown(result)
    assert "50 items are better in B" in text and "not alike" in text and "- 000: 0 -> 0.5" in text


def test_only_common_items_are_compared(tmp_path):
    """Stops: a run of the first prompts beaten by one of all."""
    scored(tmp_path / "a", [2, 2, 0, 0])
    scored(tmp_path / "b", [2, 2])
    result = compare(tmp_path / "a", tmp_path / "b")
    assert (result["items"], result["only"]) == (2, [2, 0])
    assert result["differences"]["overall"]["difference"] == 0
    scored(tmp_path / "c", [])
    with pytest.raises(ValueError, match="no scored item in common"):
        compare(tmp_path / "a", tmp_path / "c")
    path = tmp_path / "b" / "score.json"
    path.write_text(path.read_text().replace('"d": "1"', '"d": "2"'))
    with pytest.raises(
        ValueError, match=r'not of the same inputs_sha256: inputs_sha256.d: "1" in A, "2" in B'
    ):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="run the stage `score` first"):
        compare(tmp_path / "a", tmp_path / "none")


def test_the_command_compares(tmp_path, capsys):
    """Stops: a comparison that only Python callers reach."""
    scored(tmp_path / "a", [2, 1])
    assert cli.main(["bench", "shapes", "compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "runs of x, not of shapes" in capsys.readouterr().err


# The gallery -----------------------------------------------------------------------


def test_the_gallery_shows_what_went_wrong(tmp_path):
    """Stops: a page that runs what a prompt or a judge wrote, or that breaks when an image has gone."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (300, 200), "red").save(tmp_path / "images" / f"{i}.png")
    scored(tmp_path, [0, 2, 1, 0])
    paths = write_report(RunFolder(tmp_path), "<X>", ())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert tmp_path / "report.html" in paths
    assert "3 of 4 items lost points" in page and "a prompt &lt;0&gt;" in page and "&lt;X&gt;" in page
    assert (
        page.index("prompt &lt;0") < page.index("prompt &lt;3") < page.index("prompt &lt;2")
    )  # the worst first
    assert "prompt &lt;1" not in page and page.count("data:image/jpeg;base64,") == 2 and "3.png: " in page
    assert "<script" not in page and "http" not in page and "<prompt" not in page
    evil = ItemScore(
        "<b>", {"<i>": (0.0, 1)}, "<script>alert(1)</script>", ["a<.png"], "\x1b[31m</pre><script>"
    )
    assert gallery([evil], "t", 1.0).count("<script") == 0
    assert "<b>" not in gallery([evil], "t", 1.0)


def test_item_scores_come_back_as_they_went(tmp_path):
    """Stops: a run that can no longer be compared after its folder was moved."""
    scored(tmp_path / "run", [2, 1])
    line = json.loads((tmp_path / "run" / "item_scores.jsonl").read_text().splitlines()[1])
    assert line["images"] == ["images/1.png"]
    (tmp_path / "run").rename(tmp_path / "moved")
    item = read_items(tmp_path / "moved")[1]
    assert item == ItemScore("001", {"b": (1.0, 2)}, "a prompt <1>", [str(tmp_path / "moved/images/1.png")])
    assert {f.name for f in fields(item)} == {"item", "parts", "prompt", "images", "reason"}


def test_numbers_without_a_value_have_no_interval():
    """Stops: a warning of numpy's, or an interval of NaN, where a judge wrote "nan" and the official rules count it."""
    ones = items([1.0, 0.0, 1.0])
    for value in (float("nan"), float("inf")):
        odd = [*ones, ItemScore("x", {"b": (value, 1)})]
        totals = {"both": {"a": 0.5, "b": 0.5}, "first": {"a": 1.0}}
        with np.errstate(all="raise"):
            found = bootstrap.intervals(odd, totals, 1.0)
            compared = bootstrap.compare(odd, odd, totals)
        assert found.keys() == compared.keys() == {"a", "first"}


@pytest.mark.parametrize(
    "name, content",
    [(name, text) for name in ("score.json", "manifest.json") for text in ("[]", "{}", "null", '{"a": 1', "")]
    + [("manifest.json", '{"benchmark": "x", "inputs_sha256": [], "settings": {}}')]
    + [
        ("item_scores.jsonl", text)
        for text in ('{"item": "000", "parts": {"a', "[]", "{}", "null", '{"item": "0", "parts": {"a": 1}}')
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path, name, content):
    """Stops: a KeyError or an AttributeError for a file that a full disk or an editor damaged."""
    scored(tmp_path, [1, 0])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        if name == "manifest.json":
            ScoringRun("x", tmp_path, Options(data=Path("d")), {}, True)
        else:
            compare(tmp_path, tmp_path)
