# SPDX-License-Identifier: MIT
"""GenEval: its file, its tree, its rules with the specification's vectors, its scores. All records are invented."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import detection, geneval, geneval_judging, geneval_rules
from janusflow_min.benchmarks.detection import CLASSES, COLOURS, Detection
from janusflow_min.benchmarks.geneval_rules import TAGS, Rules, judge, keep, relations
from janusflow_min.benchmarks.reading import text_sha256

KITES = {
    "tag": "counting",
    "include": [{"class": "kite", "count": 3}],
    "exclude": [{"class": "kite", "count": 4}],
    "prompt": "a photo of three kites",
}
LEFT = {
    "tag": "position",
    "include": [{"class": "vase", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a cat left of a vase",
}
PINK = {
    "tag": "color_attr",
    "include": [
        {"class": "cup", "count": 1, "color": "pink"},
        {"class": "bus", "count": 1, "color": "black"},
    ],
    "prompt": "a photo of a pink cup and a black bus",
}
CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def whole_benchmark() -> list[dict]:
    """553 lines with the published number of each tag."""
    lines = []
    for tag, count in TAGS.items():
        for i in range(count):
            label = CLASSES[i % 80]
            clause = {"class": label, "count": 1}
            clause |= {"color": COLOURS[i % 10]} if tag in ("colors", "color_attr") else {}
            lines.append({"tag": tag, "include": [clause], "prompt": f"a photo of {tag} {i} {label}"})
    return lines


def tree(root: Path, lines: list[dict], images_per_prompt: int = 4, size: int = 8) -> Path:
    for i, line in enumerate(lines):
        samples = root / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        (root / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        for k in range(images_per_prompt):
            Image.new("RGB", (size, size), (i % 256, k, 0)).save(samples / f"{k:05d}.png")
    return root


def score_of(run: Path, data: Path, **options) -> dict:
    return geneval.score(run, geneval.ScoreOptions(data=data, **options))


def seen(label: str, score: float = 0.95, box=(0, 0, 4, 4), mask=None) -> Detection:
    return Detection(label, box, score, mask)


def never(label, found):
    raise AssertionError("no colour is asked for")


# Reading -----------------------------------------------------------------------


def test_the_published_file_is_read(tmp_path):
    prompts = geneval.read(write_lines(tmp_path / "a.jsonl", whole_benchmark()))
    assert len(prompts) == 553 and Counter(p.tag for p in prompts) == TAGS
    assert [p.index for p in prompts] == list(range(553))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colour"}, "tag must be one of single_object"),
        ({"prompt": " "}, "prompt must be a text"),
        ({"include": []}, "include is empty"),
        ({"include": {"class": "cat"}}, "include must be a list"),
        (
            {"include": [{"class": "mouse", "count": 1}]},
            r"include\[0\].class must be one of the 80 object names",
        ),
        ({"include": [{"class": "cat", "count": 0}]}, "at least 1, got 0"),
        ({"include": [{"class": "cat", "count": True}]}, "at least 1, got True"),
        ({"include": [{"class": "cat", "count": 1, "color": "grey"}]}, "color must be one of red"),
        ({"include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}, "position must be"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 3]}]}, "index of an earlier clause"),
        ({"exclude": [{"class": "cat"}]}, r"exclude\[0\].count"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    """Stops: a benchmark file that is wrong in one place and scores nonsense."""
    path = write_lines(tmp_path / "a.jsonl", [KITES, CAT | change])
    with pytest.raises(ValueError, match=message) as error:
        geneval.read(path, subset=True)
    assert f"{path}:2" in str(error.value)


def test_what_is_no_benchmark_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tag": "counting"\n')
    with pytest.raises(ValueError, match=rf"{path}:1: not JSON"):
        geneval.read(path, subset=True)
    write_lines(path, [{"tag": "counting", "prompt": "three kites"}])
    with pytest.raises(ValueError, match="'include' is missing"):
        geneval.read(path, subset=True)
    write_lines(path, whole_benchmark()[1:])
    with pytest.raises(ValueError, match=r"552 prompts, GenEval has 553; single_object 79 \(must be 80\)"):
        geneval.read(path)


# Rules: the vectors of the specification ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 10, 10], [50, 0, 60, 10], {"left of"}),
        ([0, 0, 10, 10], [50, 50, 60, 60], {"left of", "above"}),
        ([0, 0, 40, 40], [30, 0, 70, 40], {"left of"}),
        ([0, 0, 100, 100], [15, 0, 115, 100], set()),
        ([50, 0, 60, 10], [0, 0, 10, 10], {"right of"}),
        ([0, 50, 10, 60], [0, 0, 10, 10], {"below"}),
        ([5, 5, 9, 9], [5, 5, 9, 9], set()),
    ],
)
def test_relations(a, b, expected):
    assert relations(a, b) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a) == {opposite[name] for name in expected}


def test_the_direction_is_divided_by_the_length_before_sizes_are_taken_off():
    """Stops: a unit vector. A at (0, 0), B at (30, 0), sides 40: 22 / 30 = 0.733; at (16.1, 0): 8.1 / 16.1 = 0.503;
    at (15.9, 0): 7.9 / 15.9 = 0.497, which no longer counts."""
    a = [0, 0, 40, 40]
    assert relations(a, [16.1, 0, 56.1, 40]) == {"left of"}
    assert relations(a, [15.9, 0, 55.9, 40]) == set()
    assert relations(a, [15.9, 0, 55.9, 40], threshold=0.0) == {"left of"}


def test_detections_count_above_the_threshold_alone():
    found = [seen("cat", 0.3), seen("cat", 0.31), seen("cat", 0.9), seen("dog", 0.91), seen("dog", 0.9)]
    assert [d.score for d in keep(found, "single_object")["cat"]] == [0.9, 0.31]  # >, and best first
    assert [d.score for d in keep(found, "counting")["dog"]] == [0.91]
    assert "cat" not in keep(found, "counting")
    assert len(keep([seen("cat")] * 20, "colors")["cat"]) == 16
    assert keep(found, "colors", Rules(threshold=0.95)) == {}


def test_suppression_counts_pixels_inclusively_and_is_off_by_default():
    boxes = [
        seen("cat", 0.9, (0, 0, 9, 9)),
        seen("cat", 0.8, (5, 0, 14, 9)),
        seen("cat", 0.7, (30, 0, 39, 9)),
    ]
    assert geneval_rules.iou(boxes[0].box, boxes[1].box) == pytest.approx(50 / 150)
    assert len(keep(boxes, "colors")["cat"]) == 3
    assert [d.score for d in keep(boxes, "colors", Rules(max_overlap=1 / 3))["cat"]] == [0.9, 0.7]
    assert len(keep(boxes, "colors", Rules(max_overlap=0.34))["cat"]) == 3


def test_include_means_at_least_and_exclude_closes_it():
    assert judge(CAT, {"cat": [seen("cat")] * 3}, never) == (True, "")
    assert judge(CAT, {}, never) == (False, "expected cat>=1, found 0")
    for count, right in ((2, False), (3, True), (4, False)):
        assert judge(KITES, {"kite": [seen("kite")] * count}, never)[0] is right
    assert judge(KITES, {"kite": [seen("kite")] * 5}, never)[1] == "expected kite<4, found 5"


def test_colours_are_asked_of_the_best_and_counted():
    asked = []

    def colours(label, found):
        asked.append((label, len(found)))
        return {"cup": ["pink"], "bus": ["white"]}[label]

    objects = {"cup": [seen("cup")] * 2, "bus": [seen("bus")]}
    right, reason = judge(PINK, objects, colours)
    assert not right and reason == "expected black bus>=1, found 0 (1 white)"
    assert asked == [("cup", 1), ("bus", 1)]  # the best of two cups
    assert judge(PINK, objects, lambda label, _: ["pink" if label == "cup" else "black"]) == (True, "")
    assert judge(PINK, {"bus": [seen("bus")]}, lambda *_: ["black"])[1] == "expected cup>=1, found 0"


def test_positions_are_checked_against_every_matched_object():
    cat, vase = seen("cat", box=(0, 0, 10, 10)), seen("vase", box=(50, 0, 60, 10))
    assert judge(LEFT, {"cat": [cat], "vase": [vase]}, never) == (True, "")
    right, reason = judge(LEFT, {"cat": [vase], "vase": [cat]}, never)
    assert not right and reason == "expected cat left of vase, found it right of"
    right, reason = judge(LEFT, {"cat": [cat]}, never)
    assert not right
    assert reason.split("\n") == ["expected vase>=1, found 0", "no target vase for cat to be left of"]
    two = LEFT | {"include": [{"class": "vase", "count": 2}, LEFT["include"][1]]}
    other = seen("vase", box=(0, 50, 10, 60))
    assert judge(two, {"cat": [cat], "vase": [vase, vase]}, never)[0]
    assert not judge(two, {"cat": [cat], "vase": [vase, other]}, never)[0]
    # A clause whose colour is wrong is no target.
    pink = LEFT | {"include": [LEFT["include"][0] | {"color": "pink"}, LEFT["include"][1]]}
    _, reason = judge(pink, {"cat": [cat], "vase": [vase]}, lambda *_: ["red"])
    assert reason.split("\n")[1] == "no target vase for cat to be left of"


def test_the_overall_is_the_mean_of_tags_not_of_images():
    results = [{"tag": "single_object", "correct": True, "metadata": "a"}] * 9
    results += [{"tag": tag, "correct": False, "metadata": tag} for tag in list(TAGS)[1:]]
    summary = geneval_rules.aggregate(results)
    assert summary["overall"] == pytest.approx(1 / 6) and summary["correct_images"] == pytest.approx(9 / 14)
    assert summary["correct_prompts"] == pytest.approx(1 / 6) and summary["prompts"] == 6
    assert geneval_rules.aggregate(results[:9])["overall"] is None  # a tag without images: no overall


# What the colour judge sees, and saved detections -----------------------------------------------------------


def test_the_colour_judge_sees_the_object_alone():
    image = Image.new("RGB", (6, 4), "red")
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:4] = True
    cut = geneval_judging.view(image, seen("cat", box=(1.0, 0.6, 5.0, 4.0), mask=mask))
    assert cut.size == (4, 3)
    assert cut.getpixel((1, 0)) == (255, 0, 0) and cut.getpixel((0, 0)) == (153, 153, 153)
    assert (
        geneval_judging.view(image, seen("cat", mask=mask), "original", crop=False).tobytes()
        == image.tobytes()
    )
    assert geneval_judging.view(image, seen("cat", box=(0, 0, 2, 2))).getpixel((1, 1)) == (
        255,
        0,
        0,
    )  # no mask
    with pytest.raises(ValueError, match="image's size 4 x 6"):
        geneval_judging.view(image, seen("cat", mask=mask.T))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_masks_survive_the_disk(shape):
    rng = np.random.default_rng(0)
    for mask in (rng.random(shape) > 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        record = detection.encode_mask(mask)
        assert np.array_equal(detection.decode_mask(json.loads(json.dumps(record))), mask)
    assert detection.encode_mask(np.array([[1, 0], [1, 0]], bool)) == {"size": [2, 2], "counts": [0, 2, 2]}
    with pytest.raises(ValueError, match="needs 4 pixels, got 3"):
        detection.decode_mask({"size": [2, 2], "counts": [3]})


def test_bad_saved_detections_are_named(tmp_path):
    path = tmp_path / "detections.jsonl"
    good = {"filename": "a.png", "detections": [{"class": "cat", "box": [0, 0, 1, 1], "score": 0.5}]}
    for bad, message in (
        ({"detections": []}, "KeyError"),
        (
            good | {"detections": [{"class": "sofa", "box": [0, 0, 1, 1], "score": 1}]},
            "class, box or score of .*sofa",
        ),
        (good | {"detections": [{"class": "cat", "box": [0, 1], "score": 1}]}, "class, box or score"),
    ):
        write_lines(path, [good, bad])
        with pytest.raises(ValueError, match=message) as error:
            detection.SavedDetections(path)
        assert f"{path}:2" in str(error.value)


# Scoring -----------------------------------------------------------------------


class FakeDetector:
    """Sees one cat in red images, nothing elsewhere."""

    name = "fake"

    def __init__(self):
        self.seen = 0

    def detect(self, image):
        self.seen += 1
        red, _, _ = image.getpixel((0, 0))
        mask = np.ones((image.height, image.width), bool)
        return [Detection("cat", (0, 0, 8, 8), 0.97, mask)] if red > 200 else []


class FakeColours:
    name = "fake"

    def __init__(self, colour="pink"):
        self.colour = colour

    def colours(self, views, label):
        return [self.colour for _ in views]


RANKS = """
import json, os, sys
sys.path[:0] = {paths!r}
from test_geneval import CAT, FakeColours, FakeDetector, score_of
detector, rank = FakeDetector(), int(os.environ["RANK"])
if len(sys.argv) > 1 and rank == 1:
    detect, detector.detect = detector.detect, lambda image: detect(image) if detector.seen < 2 else os._exit(3)
score = score_of({run!r}, detector=detector, clip=FakeColours(), data={data!r}, subset=True, images={images!r},
                 images_per_prompt=2, progress=False)
print(json.dumps([rank, detector.seen, score.get("n_scored")]), flush=True)
"""


def test_detection_is_shared_out_among_ranks(tmp_path):
    """Stops: other numbers from several GPUs than from one, images detected twice, a rank's work lost when another
    dies, an unreadable image of one rank's share that the score does not know."""
    pytest.importorskip("torch.distributed.run")
    lines = [CAT | {"prompt": f"a photo of a cat, {i}"} for i in range(6)]
    data, images = write_lines(tmp_path / "data.jsonl", lines), tree(tmp_path / "images", lines, 2)
    for i in range(0, 6, 2):
        Image.new("RGB", (8, 8), (255, i, 0)).save(images / f"0000{i}/samples/00000.png")
    (images / "00003/samples/00001.png").write_bytes(b"no image")
    options = dict(data=data, subset=True, images=images, images_per_prompt=2, progress=False)
    one = score_of(tmp_path / "one", detector=FakeDetector(), clip=FakeColours(), **options)
    run = tmp_path / "two"
    paths = [str(Path(__file__).parent), *sys.path]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(paths=paths, run=str(run), data=str(data), images=str(images)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    died = subprocess.run([*command, "die"], capture_output=True, text=True, timeout=300)
    assert died.returncode != 0 and not (run / "score.json").exists()
    kept = len([line for path in run.glob("detections*.jsonl") for line in path.read_text().splitlines()])
    assert kept >= 2
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert [r[2] for r in ranks] == [11, None] and ranks[0][1] + ranks[1][1] == 11 - kept
    two = json.loads((run / "score.json").read_text())
    assert (
        two == json.loads((tmp_path / "one" / "score.json").read_text())
        and two["n_scored"] == one["n_scored"]
    )
    assert (run / "results.jsonl").read_text() == (tmp_path / "one" / "results.jsonl").read_text()
    assert [path.name for path in run.glob("detections*")] == ["detections.jsonl"]


def test_a_part_is_scored_without_a_headline_and_goes_on(tmp_path):
    """Stops: an average over what happens to be there, sold as the benchmark's number; and detecting twice."""
    pink = CAT | {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "pink"}]}
    lines = [CAT, pink, KITES]
    data, images = write_lines(tmp_path / "data.jsonl", lines), tree(tmp_path / "images", lines, 2)
    for name in ("00000/samples/00000.png", "00001/samples/00000.png", "00001/samples/00001.png"):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(images / name)
    (images / "00002/samples/00001.png").unlink()
    options = dict(data=data, subset=True, images=images, images_per_prompt=2, progress=False)
    detector = FakeDetector()
    score = score_of(tmp_path / "run", detector=detector, clip=FakeColours(), **options)
    assert score["headline"] is None and not score["complete"]
    assert (score["n_scored"], score["n_expected"]) == (5, 6)

    def counted(*values):
        return dict(zip(("value", "n_scored", "n_expected"), values, strict=True))

    scores = {
        tag: {k: v for k, v in entry.items() if k != "interval"} for tag, entry in score["scores"].items()
    }
    assert scores["single_object"] == counted(0.5, 2, 2)
    assert score["scores"]["colors"]["value"] == 1.0
    assert scores["counting"] == counted(0.0, 1, 2)
    assert score["scores"]["position"]["value"] is None
    assert score["judge"] == {"detector": "fake", "colours": "fake"}
    results = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert list(results[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(results[0]["details"]) == {"cat": [[0, 0, 8, 8, 0.97]]}
    assert json.loads(results[0]["metadata"]) == CAT
    # Again: what was detected is kept; a new image and a changed one are not.
    Image.new("RGB", (8, 8), (255, 0, 0)).save(images / "00002/samples/00001.png")
    Image.new("RGB", (8, 8), (255, 9, 0)).save(images / "00000/samples/00001.png")
    score = score_of(tmp_path / "run", detector=detector, clip=FakeColours("red"), **options)
    assert detector.seen == 7 and score["complete"] and score["headline"] is None
    assert score["scores"]["single_object"]["value"] == 1.0 and score["scores"]["colors"]["value"] == 0.0
    # The file that this left does as a saved one.
    saved = score_of(
        tmp_path / "other", detections=tmp_path / "run/detections.jsonl", clip=FakeColours("red"), **options
    )
    assert saved["scores"] == score["scores"]
    # But not for other images of the same names and sizes.
    Image.new("RGB", (8, 8), (255, 8, 0)).save(images / "00000/samples/00001.png")
    with pytest.raises(ValueError, match=r"00001\.png is not the image that .*detections\.jsonl is about"):
        score_of(tmp_path / "other", detections=tmp_path / "run/detections.jsonl", **options)
    detector.name = "another"
    with pytest.raises(ValueError, match="of another judge"):
        score_of(tmp_path / "run", detector=detector, clip=FakeColours(), **options)


def test_the_whole_benchmark_has_a_headline(tmp_path, capsys, monkeypatch):
    """Stops: a headline for other prompts, other thresholds or fewer images. All 2,212 images, saved detections: every
    second image of single_object right, all others wrong."""
    lines = whole_benchmark()
    data, images = write_lines(tmp_path / "data.jsonl", lines), tree(tmp_path / "run/images", lines, size=1)
    records = []
    for i, line in enumerate(lines):
        for k in range(4):
            right = line["tag"] == "single_object" and k % 2 == 0
            label = line["include"][0]["class"]
            found = [{"class": label, "box": [0, 0, 1, 1], "score": 0.8}] if right else []
            records.append({"filename": f"{i:05d}/samples/{k:05d}.png", "detections": found})
    saved = write_lines(tmp_path / "saved.jsonl", records)
    command = ["bench", "geneval", "score", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*command, "--detections", str(saved)]) == 0  # invented prompts of the right numbers
    assert "2,212 scored, but there is no headline number" in capsys.readouterr().out
    monkeypatch.setattr(geneval, "DATA_SHA256", text_sha256(data))
    for other in (
        ["--threshold", "0.31"],
        ["--bgcolor", "original"],
        ["--no-crop"],
        ["--max-overlap", "0.9"],
    ):
        assert cli.main([*command, "--detections", str(saved), *other]) == 0
        assert "2,212 scored, but there is no headline number" in capsys.readouterr().out
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))  # the same text
    assert cli.main([*command, "--detections", str(saved)]) == 0
    assert "overall, mean of the six tags: 0.0833 (2,212 scored, 95 % interval" in capsys.readouterr().out
    score = json.loads((tmp_path / "run/score.json").read_text())
    assert math.isclose(score["headline"]["value"], 0.5 / 6)
    assert cli.main(["bench", "geneval", "report", "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.md").read_text()
    assert "| JanusFlow-1.3B, paper | 0.97 | 0.59 | 0.45 | 0.83 | 0.53 | 0.42 | 0.63 |" in text
    assert "five images a prompt" in text
    longer = [line | {"prompt": f"In the morning light, {line['prompt']}"} for line in lines]
    write_lines(tmp_path / "longer.jsonl", longer)
    other = tree(tmp_path / "longer", longer, size=1)
    score = score_of(
        tmp_path / "other",
        tmp_path / "longer.jsonl",
        images=other,
        detections=saved,
        clip=None,
        progress=False,
    )
    assert score["complete"] and score["headline"] is None  # lengthened prompts are another benchmark
    (images / "00552/samples/00003.png").unlink()
    assert cli.main([*command, "--detections", str(saved)]) == 0
    assert "partial: 2,211 of 2,212 scored" in capsys.readouterr().out


def test_images_of_other_prompts_are_refused(tmp_path):
    """Stops: images judged by what other prompts ask for."""
    data, images = write_lines(tmp_path / "data.jsonl", [CAT, KITES]), tree(tmp_path / "images", [CAT, LEFT])
    options = dict(subset=True, images=images, detector=FakeDetector(), progress=False)
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl is not of a line of --data"):
        score_of(tmp_path / "run", data, **options)
    (images / "00001/metadata.jsonl").unlink()
    (images / "00001").rename(images / "00002")
    with pytest.raises(ValueError, match=r"images/00002 is not of a line of --data"):
        score_of(tmp_path / "run", data, **options)


def test_names_of_any_digits_are_taken(tmp_path):
    """Stops: a tree that is refused or half read, though the official README shows it and the official scorer takes
    it: `samples/0000.png`, folders not padded, numbered otherwise or without metadata.jsonl."""
    lines = [CAT, KITES, LEFT]
    data, images = write_lines(tmp_path / "data.jsonl", lines), tree(tmp_path / "images", lines, 2)
    for k in range(2):
        (images / f"00000/samples/{k:05d}.png").rename(images / f"00000/samples/{k:04d}.png")
        (images / f"00001/samples/{k:05d}.png").rename(images / f"00001/samples/{10 - k}.png")
    (images / "00001").rename(images / "17")
    (images / "00002").rename(images / "2")
    (images / "2/metadata.jsonl").unlink()
    (images / "00000/samples/grid.png").write_bytes(b"")
    (images / "_gen_workspace").mkdir()
    (images / "3").mkdir()
    found = geneval.find_images(images, geneval.read(data, subset=True))
    assert [(prompt.tag, name) for prompt, name in found] == [
        ("single_object", "00000/samples/0000.png"),
        ("single_object", "00000/samples/0001.png"),
        ("position", "2/samples/00000.png"),
        ("position", "2/samples/00001.png"),
        ("counting", "17/samples/9.png"),
        ("counting", "17/samples/10.png"),
    ]


def test_more_images_than_expected_are_no_silent_choice(tmp_path):
    """Stops: a score of the first four of five images, or of all five, sold as the benchmark's four."""
    data, images = write_lines(tmp_path / "data.jsonl", [CAT]), tree(tmp_path / "images", [CAT], 5)
    options = dict(subset=True, images=images, detector=FakeDetector(), progress=False)
    with pytest.raises(
        ValueError, match="has 5 images of one prompt, 'a photo of a cat', where 4 are expected"
    ):
        score_of(tmp_path / "run", data, **options)
    assert score_of(tmp_path / "run", data, images_per_prompt=5, **options)["n_scored"] == 5
    score = score_of(tmp_path / "run", data, official_compat=True, **options)
    assert (score["n_scored"], score["n_expected"], score["headline"]) == (5, 4, None)


def test_a_broken_image_is_left_out_and_named(tmp_path):
    """Stops: one image of 2,212 that is cut off and ends the scoring of all, without its name."""
    data, images = write_lines(tmp_path / "data.jsonl", [CAT]), tree(tmp_path / "images", [CAT])
    whole = (images / "00000/samples/00000.png").read_bytes()
    (images / "00000/samples/00001.png").write_bytes(whole[: len(whole) // 2])
    score = score_of(
        tmp_path / "run", data, subset=True, images=images, detector=FakeDetector(), progress=False
    )
    assert (score["n_scored"], score["complete"]) == (3, False)


def test_a_low_threshold_sees_what_the_detector_saw(tmp_path):
    """Stops: --threshold 0.01 that finds nothing between 0.01 and 0.05, since only fainter ones were not saved."""
    data, images = write_lines(tmp_path / "data.jsonl", [CAT]), tree(tmp_path / "images", [CAT], 1)
    detector = FakeDetector()
    detector.detect = lambda image: [seen("cat", 0.04), seen("cat", 0.5), seen("dog", 0.009)]
    options = dict(subset=True, images=images, images_per_prompt=1, progress=False)
    score_of(tmp_path / "low", data, detector=detector, threshold=0.01, **options)
    line = json.loads((tmp_path / "low/results.jsonl").read_text())
    assert [box[4] for box in json.loads(line["details"])["cat"]] == [0.5, 0.04]
    score_of(tmp_path / "usual", data, detector=detector, **options)
    with pytest.raises(ValueError, match=r"of another judge: .*0\.05.* there, .*0\.01.* now"):
        score_of(tmp_path / "usual", data, detector=detector, threshold=0.01, **options)
    saved = dict(detections=tmp_path / "usual/detections.jsonl", **options)
    with pytest.raises(ValueError, match=r"detections.jsonl:1 has the detections above 0.05 alone"):
        score_of(tmp_path / "other", data, threshold=0.01, **saved)
    assert score_of(tmp_path / "other", data, **saved)["n_scored"] == 1


def test_edges_and_ties_fall_as_in_float32():
    """Stops: a score of exactly the threshold that counts since 0.3 in float32 is a little more, and the earlier of
    two equal scores first."""
    third = float(np.float32(0.3))
    assert third > 0.3 and keep([seen("cat", third)], "colors") == {}
    first, second = seen("cat", 0.5, (0, 0, 1, 1)), seen("cat", 0.5, (2, 2, 3, 3))
    assert keep([first, second], "colors")["cat"] == [second, first]
    assert keep([first, second], "colors", Rules(max_objects=1))["cat"] == [second]


def test_the_tree_is_the_official_one(tmp_path, parity_dir):
    """NNNNN/metadata.jsonl with exactly one object, NNNNN/samples/NNNNN.png, nothing else."""
    data = write_lines(tmp_path / "data.jsonl", [CAT, KITES])
    command = [
        "bench",
        "geneval",
        "generate",
        "--data",
        str(data),
        "--subset",
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--model", str(parity_dir), "--device", "cpu", "--num-inference-steps", "1", "--quiet"]
    assert cli.main(command) == 0
    images = tmp_path / "run/images"
    names = sorted(p.relative_to(images).as_posix() for p in images.rglob("*") if p.is_file())
    assert names == [
        f"{i:05d}/{name}"
        for i in range(2)
        for name in ("metadata.jsonl", *(f"samples/{k:05d}.png" for k in range(4)))
    ]
    assert [json.loads((images / f"{i:05d}/metadata.jsonl").read_text()) for i in range(2)] == [CAT, KITES]
