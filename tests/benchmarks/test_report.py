# SPDX-License-Identifier: MIT
"""Scores and reports: no headline for a part, published numbers with their protocol, the world of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from janusflow_min import cli
from janusflow_min.benchmarks import report
from janusflow_min.benchmarks.report import Published
from janusflow_min.benchmarks.run_folder import RunFolder
from janusflow_min.benchmarks.scoring import ScoreOptions, ScoringRun, check_inputs

PUBLISHED = (Published("Theirs", "their way", {"a": 0.25}, 0.5),)


def make(run: Path, n_scored: int = 8, published: bool = True, value: float | None = 0.75) -> dict[str, Any]:
    """A scored run in the folder."""
    about = {"checkpoint": {"model": "mine"}, "settings": {"seed": 1}, "versions": {}, "seed_rule": "rule"}
    about |= {"benchmark": "geneval", "inputs_sha256": {"file": "abc"}}
    (run / "manifest.json").write_text(json.dumps(about))
    scoring = ScoringRun("geneval", run, ScoreOptions(), {"file": "abc"}, published)
    scoring.notes.append("a remark")
    return scoring.write(
        headline=("overall", value),
        scale=1.0,
        n_expected=8,
        n_scored=n_scored,
        scores={"a": (0.5, n_scored, 8), "b": (None, 0, 0)},
        judge={"model": "judge|one"},
        items=[],
        others={"another total": 0.7},
    )


@pytest.mark.parametrize(
    ("score", "line"),
    [
        ({}, "overall: 0.7500 (8 scored)"),
        ({"n_scored": 7}, "partial: 7 of 8 scored, so there is no headline number"),
        (
            {"published": False},
            "8 scored, but there is no headline number: the data are not the published ones",
        ),
        ({"value": None}, "8 scored"),
    ],
)
def test_only_the_whole_published_set_has_a_headline(tmp_path, score, line):
    """Stops: an average of a part, read as the benchmark's number."""
    folder = RunFolder(tmp_path)
    assert report.summary(make(tmp_path, **score)) == line
    paths = report.write_report(folder, "GenEval", PUBLISHED)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# GenEval: mine\n") and line in text
    headline = "0.75" if line.startswith("overall") else ""
    assert f"| {headline} | judge: judge\\|one |" in text
    assert ("another total" in text) == line.startswith(("overall", "8 scored")) * ("not the" not in line)
    assert "| Theirs | 0.25 |  | 0.5 | their way |" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["published"] == [
        {"name": "Theirs", "protocol": "their way", "scores": {"a": 0.25}, "overall": 0.5}
    ]
    assert (content["headline"] is None) == (headline == "")
    assert paths[:2] == [tmp_path / "report.json", tmp_path / "report.md"]


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    make(tmp_path, n_scored=3)
    paths = report.write_report(RunFolder(tmp_path), "GenEval", PUBLISHED)
    with Image.open(next(path for path in paths if path.suffix == ".png")) as picture:
        assert picture.width > 400
    report.write_report(RunFolder(tmp_path), "GenEval", ())


def test_without_matplotlib_there_is_everything_else(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    make(tmp_path)
    paths = report.write_report(RunFolder(tmp_path), "GenEval", PUBLISHED)
    assert {path.suffix for path in paths} == {".json", ".md", ".html"}
    assert "janusflow-min[bench]" in capsys.readouterr().err
    assert not (tmp_path / "report.png").exists()


def test_a_run_is_not_scored_as_another_or_from_another_file(tmp_path):
    manifest = {"benchmark": "wise", "inputs_sha256": {"a.json": "1"}}
    with pytest.raises(ValueError, match="is a run of wise, not of geneval"):
        check_inputs(manifest, "geneval", {}, tmp_path)
    with pytest.raises(ValueError, match=r"generated from another a\.json"):
        check_inputs(manifest, "wise", {"a.json": "2"}, tmp_path)
    check_inputs(manifest, "wise", {"a.json": "1"}, tmp_path)
    check_inputs(None, "wise", {}, tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage `score` first"):
        report.read_score(RunFolder(tmp_path))


def test_the_shapes_run_anywhere(tmp_path, capsys):
    """The whole command with the embedded default; twice, since the second has nothing left to do."""
    out = ["--out", str(tmp_path), "--quiet"]
    generate = [
        "bench",
        "shapes",
        "generate",
        "--cases",
        "1",
        "--num-inference-steps",
        "8",
        "--device",
        "cpu",
        *out,
    ]
    assert cli.main([*generate, "--limit", "2", "--batch-size", "2"]) == 0
    assert cli.main(["bench", "shapes", "score", *out]) == 0
    assert "partial: 6 of 17 scored" in capsys.readouterr().out
    assert cli.main([*generate, "--batch-size", "2"]) == 0
    assert "all 6 files are there" in capsys.readouterr().out
    assert cli.main(["bench", "shapes", "score", *out]) == 0
    assert "images right: " in capsys.readouterr().out
    score = json.loads((tmp_path / "score.json").read_text())
    assert len(score["scores"]) == 22 and score["complete"]
    items = [json.loads(line) for line in (tmp_path / "item_scores.jsonl").read_text().splitlines()]
    images = [item["parts"]["images"][0] for item in items if "images" in item["parts"]]
    assert len(items) == 17 and len(images) == 6
    assert score["headline"]["value"] == pytest.approx(sum(images) / 6)
    assert cli.main(["bench", "shapes", "report", *out]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.split("| what it depends on")[0].count("[") == 26  # intervals of 22 groups and 4 totals
    assert cli.main(["bench", "shapes", "score", "--answers-at-least", "1.1", *out]) == 2
    assert "at least 110.0% are needed" in capsys.readouterr().err
    assert cli.main(["bench", "shapes", "score", "--at-least", "0", *out]) == 0
