# SPDX-License-Identifier: MIT
"""Benchmark runs: seeds, shards, whole files, resuming, manifests, the command under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from PIL import Image

import janusflow_min as jf
from janusflow_min import cli
from janusflow_min.benchmarks import runner
from janusflow_min.benchmarks.manifest import write_manifest
from janusflow_min.benchmarks.ranks import RankInfo, shard
from janusflow_min.benchmarks.run_folder import RunFolder, is_whole
from janusflow_min.benchmarks.runner import Item, Settings
from janusflow_min.files import sha256

ROOT = Path(__file__).resolve().parents[2]
THINGS = ("cat", "dog", "vase", "kite", "bus", "clock", "cup")


@pytest.fixture(scope="module")
def pipe(parity_dir):
    return jf.load(parity_dir, device="cpu", parts="generation", progress=False)


@pytest.fixture
def settings(parity_dir) -> Settings:
    return Settings(
        model=str(parity_dir), device="cpu", num_inference_steps=2, batch_size=4, progress=False, seed=5
    )


@pytest.fixture
def items() -> list[Item]:
    """Seven prompts of two images: four blocks of two prompts, the last with one. Their lengths differ."""
    return [
        Item(
            i,
            f"a photo of a {thing}" + " and a cat" * (i % 3),
            tuple(f"{i:05d}/samples/{k:05d}.png" for k in range(2)),
            {f"{i:05d}/metadata.jsonl": json.dumps({"prompt": thing}) + "\n"},
        )
        for i, thing in enumerate(THINGS)
    ]


@pytest.fixture
def data(tmp_path) -> Path:
    """The same in GenEval's format."""
    lines = [
        {"tag": "single_object", "include": [{"class": thing, "count": 1}], "prompt": f"a photo of a {thing}"}
        for thing in THINGS
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# Seeds and shards -----------------------------------------------------------------------


def test_seeds_depend_on_the_item_alone():
    """Stops: seeds that repeat between prompts, or that follow the order of generation."""
    seeds = [runner.image_seed(100, i, 4, k) for i in range(5) for k in range(4)]
    assert seeds == list(range(100, 120))


def test_shards_are_a_partition_that_keeps_places():
    items = list(range(11))
    shards = [shard(items, rank, 3) for rank in range(3)]
    assert shards[1] == [1, 4, 7, 10]
    assert sorted(item for own in shards for item in own) == items
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        shard(items, 3, 3)


def test_world_is_torchruns():
    assert RankInfo.from_environment({}) == RankInfo(0, 1, 0)
    assert RankInfo.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == RankInfo(5, 8, 1)
    with pytest.raises(ValueError, match="RANK 8 of WORLD_SIZE 8"):
        RankInfo.from_environment({"RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ValueError, match="whole numbers"):
        RankInfo.from_environment({"RANK": "one", "WORLD_SIZE": "8"})


# Files -----------------------------------------------------------------------


def test_a_file_is_whole_or_absent(tmp_path):
    """Stops: half an image under its final name after an interruption."""
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), folder.writing("images/1.png") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == folder.work  # never in a folder that scorers list
        raise KeyboardInterrupt
    assert tree(folder.root) == {}
    folder.write_image("images/1.png", Image.new("RGB", (2, 2)))
    assert list(tree(folder.root)) == ["images/1.png"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize("out", ["outputs/new/tiny", "./here", "~/mine", ".", "../beside/run"])
def test_a_run_may_be_named_in_any_way(tmp_path, monkeypatch, capsys, out):
    """Stops: files under OUT/OUT, a folder called ~, and a report that looks where `score` did not write."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = ["bench", "shapes", "generate", "--device", "cpu", "--cases", "1"]
    assert cli.main([*run, "--num-inference-steps", "1", "--out", out, "--quiet"]) == 0
    assert "all 6 files are there" in capsys.readouterr().out
    assert cli.main(["bench", "shapes", "score", "--out", out, "--quiet"]) == 0
    assert cli.main(["bench", "shapes", "report", "--out", out, "--quiet"]) == 0
    root = Path(out).expanduser().resolve()
    for name in ("manifest.json", "score.json", "item_scores.jsonl", "report.json", "report.html"):
        assert list(tmp_path.rglob(name)) == [root / name]
    assert {path.parent for path in tmp_path.rglob("0000?.*")} == {
        root / "images",
        root / "answers",
        root / "edits",
    }
    assert len(list((root / "images").iterdir())) == 6


# Generation -----------------------------------------------------------------------


def test_shards_together_equal_the_single_run(tmp_path, pipe, items, settings):
    """Stops: another rank count, another image."""
    one = RunFolder(tmp_path / "one")
    assert runner.generate_images(pipe, one, items, 2, settings, RankInfo()).complete
    for size in (2, 3):
        many = RunFolder(tmp_path / str(size))
        found = [
            runner.generate_images(pipe, many, items, 2, settings, RankInfo(rank, size))
            for rank in range(size)
        ]
        assert not found[0].complete and found[-1].complete
        assert tree(many.root) == tree(one.root)
    # And each is what the pipeline generates from the seed alone, up to the last bit of a batch.
    alone = pipe.generate(items[3].prompt, 1, seed=5 + 3 * 2 + 1, num_inference_steps=2, progress=False)
    with Image.open(one.images / "00003/samples/00001.png") as generated:
        pairs = zip(generated.tobytes(), alone.images[0].tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1


def test_holes_are_filled_with_the_same_images_and_the_rest_is_left_alone(
    tmp_path, pipe, items, settings, monkeypatch
):
    """Stops: resuming that fills a hole in another batch, or that overwrites what is there."""
    folder = RunFolder(tmp_path)
    runner.generate_images(pipe, folder, items, 2, settings, RankInfo())
    whole = tree(tmp_path)
    (folder.images / "00002/samples/00001.png").unlink()
    (folder.images / "00006/metadata.jsonl").unlink()
    kept = folder.images / "00000/samples/00000.png"
    Image.new("RGB", (3, 3)).save(kept)
    mine = kept.read_bytes()
    counts = []
    generate = jf.Pipeline.generate

    def spy(self, prompts, **options):
        counts.append(len(prompts))
        return generate(self, prompts, **options)

    monkeypatch.setattr(jf.Pipeline, "generate", spy)
    runner.generate_images(pipe, folder, items, 2, settings, RankInfo())
    assert counts == [2, 1]  # the two blocks with holes, whole
    assert kept.read_bytes() == mine
    assert tree(tmp_path) | {"images/00000/samples/00000.png": b""} == whole | {
        "images/00000/samples/00000.png": b""
    }

    def fail():
        raise AssertionError("nothing is missing, so nothing is loaded")

    assert runner.generate_images(fail, folder, items, 2, settings, RankInfo()).complete


def test_broken_images_are_missing_ones(tmp_path, pipe, items, settings):
    """Stops: an empty or a cut image, of a full disk for instance, that counts as generated for ever."""
    folder = RunFolder(tmp_path)
    runner.generate_images(pipe, folder, items, 2, settings, RankInfo())
    whole = tree(folder.images)
    for i, cut in enumerate((0, 1, 7, 8, 11, 19, 60, -1)):
        path = folder.images / f"{i // 2:05d}/samples/{i % 2:05d}.png"
        path.write_bytes(path.read_bytes()[:cut])
    (folder.images / "00006/samples/00001.png").write_bytes(b"<html>no image</html>")
    (folder.images / "00005/metadata.jsonl").write_text("")
    found = runner.coverage(items, folder.images)
    assert (found.present, found.expected) == (5, 14)
    assert runner.generate_images(pipe, folder, items, 2, settings, RankInfo()).complete
    assert tree(folder.images) == whole
    other = tmp_path / "another.png"
    Image.new("RGB", (4, 4)).save(other, "JPEG")  # of other people's tools; readable all the same
    assert is_whole(other) and not is_whole(tmp_path) and not is_whole(tmp_path / "none")


def test_the_number_of_threads_changes_no_byte(tmp_path, data):
    """Stops: torchrun, which sets one thread, generating other images than one process that takes them all; and a
    caller whose own number is changed."""
    before = torch.get_num_threads()
    settings = Settings(device="cpu", num_inference_steps=4, progress=False)
    items = [
        Item(i, f"a photo of {text}", (f"{i}.png",)) for i, text in enumerate(("a red star", "two rings"))
    ]
    images = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runner.run("x", items, {}, tmp_path / str(threads), 1, settings)
            assert torch.get_num_threads() == threads
            images[threads] = tree(tmp_path / str(threads) / "images")
        with pytest.raises(RuntimeError), runner.cpu_threads(3):
            assert torch.get_num_threads() == 3
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert images[1] == images[2]
    with pytest.raises(ValueError, match=r"settings\.threads: 1 there, 2 now"):
        runner.run("x", items, {}, tmp_path / "1", 1, replace(settings, threads=2))


@pytest.mark.parametrize("name", ["batch_size", "num_inference_steps", "threads", "limit"])
def test_numbers_are_checked_before_anything_is_made(tmp_path, items, settings, name):
    """Stops: a division by zero, or a run of nothing, once the weights are loaded."""
    with pytest.raises(ValueError, match=f"{name} must be .*1.*, got 0"):
        runner.run("x", items, {}, tmp_path / "run", 2, replace(settings, **{name: 0}))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_leaves_whole_files(tmp_path, pipe, items, settings, monkeypatch):
    """Stops: one failure that costs the others' work."""
    folder, generate = RunFolder(tmp_path / "run"), jf.Pipeline.generate
    calls = []

    def dies(self, prompts, **options):
        calls.append(prompts)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: device-side assert")
        return generate(self, prompts, **options)

    monkeypatch.setattr(jf.Pipeline, "generate", dies)
    with pytest.raises(RuntimeError):
        runner.generate_images(pipe, folder, items, 2, settings, RankInfo(0, 2))
    monkeypatch.setattr(jf.Pipeline, "generate", generate)
    found = runner.generate_images(pipe, folder, items, 2, settings, RankInfo(1, 2))
    assert 0 < len(found.missing) < found.expected
    assert "of 14 files are there; missing: 00004/samples/00000.png" in str(found)
    for path in folder.images.rglob("*.png"):
        Image.open(path).load()
    assert runner.generate_images(pipe, folder, items, 2, settings, RankInfo(0, 2)).complete
    runner.generate_images(pipe, RunFolder(tmp_path / "one"), items, 2, settings, RankInfo())
    assert tree(folder.root) == tree(tmp_path / "one")


def test_no_temporary_file_ever_lies_among_the_images(tmp_path, pipe, items, settings, monkeypatch):
    """Stops: a scorer that lists its folder while generation goes on, and scores half an image."""
    seen, replace = set(), os.replace

    def watch(source, target):
        seen.update(path.name for path in (tmp_path / "images").rglob("*") if path.is_file())
        assert (tmp_path / "images") not in Path(source).parents
        return replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    runner.generate_images(pipe, RunFolder(tmp_path), items, 2, settings, RankInfo())
    assert seen <= {"metadata.jsonl", "00000.png", "00001.png"}
    assert not (tmp_path / ".work").exists()


def test_a_limit_generates_the_first_prompts_as_the_whole_run_would(tmp_path, pipe, items, settings):
    part, one = RunFolder(tmp_path / "part"), RunFolder(tmp_path / "one")
    found = runner.generate_images(pipe, part, items, 2, replace(settings, limit=3), RankInfo())
    assert (found.present, found.expected) == (6, 14)
    assert not part.work.exists()
    runner.generate_images(pipe, one, items, 2, settings, RankInfo())
    assert tree(part.images).items() <= tree(one.images).items()


def test_a_prompt_that_cannot_be_generated_is_told_before_anything_is(tmp_path, pipe, items, settings):
    bad = Item(7, "a photo of <|User|>", ("a.png", "b.png"))
    with pytest.raises(ValueError):
        runner.generate_images(pipe, RunFolder(tmp_path), [*items, bad], 2, settings, RankInfo())
    assert not (tmp_path / "images").exists()


# The manifest -----------------------------------------------------------------------


def test_another_setting_is_refused_by_name(tmp_path, data, parity_dir, capsys):
    """Stops: one folder with images of two settings, prompts or checkpoints."""
    run = ["bench", "geneval", "generate", "--data", str(data), "--subset", "--out", str(tmp_path / "run")]
    run += ["--model", str(parity_dir), "--device", "cpu", "--num-inference-steps", "1", "--quiet"]
    run += ["--limit", "1", "--images-per-prompt", "1"]
    assert cli.main(run) == 0
    assert "1 of 7 files are there" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["num_inference_steps"] == 1 and manifest["settings"]["seed"] == 0
    assert manifest["inputs_sha256"] == {"evaluation_metadata.jsonl": sha256(data)}
    assert len(manifest["checkpoint"]["model_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(manifest)
    assert cli.main([*run, "--cfg-weight", "3"]) == 2
    error = capsys.readouterr().err
    assert "made with other settings" in error and "settings.cfg_weight: 2.0 there, 3.0 now" in error
    data.write_text(data.read_text().replace("a photo of a cat", "a picture of a cat"))
    assert cli.main(run) == 2
    assert "inputs_sha256.evaluation_metadata.jsonl" in capsys.readouterr().err
    assert cli.main([*run[:-4], "--model", "tiny"]) == 2
    assert "checkpoint.model_sha256" in capsys.readouterr().err


def test_options_of_sampling_are_recorded_and_older_runs_go_on(tmp_path, items, settings, pipe, monkeypatch):
    """Stops: an option of sampling that bench does not take or record; and a run from before it that is refused."""
    monkeypatch.setattr(runner, "load_pipe", lambda settings: pipe)
    arguments = (items, {}, tmp_path, 2)
    assert runner.run("x", *arguments, settings).complete
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("solver", "timestep_shift", "guidance_interval", "guidance_rescale", "negative_prompt"):
        assert name in manifest["settings"]
        del manifest["settings"][name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert runner.run("x", *arguments, settings).complete
    with pytest.raises(ValueError, match=r'settings\.solver: "euler" there, "ab2" now'):
        runner.run("x", *arguments, replace(settings, solver="ab2"))


def test_other_versions_are_told_but_not_refused(tmp_path, settings):
    folder, told = RunFolder(tmp_path), []
    made = write_manifest(folder, "x", {}, {"a": (1, 2)}, {}, "a rule", told.append)
    assert write_manifest(folder, "x", {}, {"a": (1, 2)}, {}, "a rule", told.append) == made and not told
    folder.write_json(folder.manifest, made | {"versions": made["versions"] | {"torch": "1.0"}})
    write_manifest(folder, "x", {}, {"a": (1, 2)}, {}, "a rule", told.append)
    assert 'versions.torch: "1.0" there' in told[0]
    folder.manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        write_manifest(folder, "x", {}, {}, {}, "a rule")


# Processes -----------------------------------------------------------------------


def command(data: Path, parity_dir: Path, run: Path, steps: int) -> list[str]:
    line = ["-m", "janusflow_min", "bench", "geneval", "generate", "--data", str(data), "--subset", "--quiet"]
    line += ["--out", str(run), "--model", str(parity_dir), "--device", "cpu", "--batch-size", "4"]
    return [*line, "--num-inference-steps", str(steps)]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def test_a_killed_process_leaves_whole_files_and_a_rerun_fills_the_holes(tmp_path, data, parity_dir):
    """Stops: work lost to a SIGKILL, as a machine that is taken away sends it."""
    run = tmp_path / "run"
    steps = 15  # long enough to be killed in the middle
    process = subprocess.Popen(
        [sys.executable, *command(data, parity_dir, run, steps)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    while process.poll() is None and not list(run.glob("images/*/samples/00003.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    timer.cancel()
    assert process.wait() == -signal.SIGKILL, "it ended by itself"
    there = [path for path in run.rglob("images/*/samples/*.png")]
    assert 4 <= len(there) < 28
    before = {path: path.read_bytes() for path in there}
    for path in there:
        Image.open(path).load()
    line = command(data, parity_dir, run, steps)[2:]
    assert cli.main(line) == 0
    assert len(list(run.rglob("images/*/samples/*.png"))) == 28
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (run / ".work").exists()


def test_torchrun_generates_what_one_process_generates(tmp_path, data, parity_dir):
    """Stops: a command that works alone only. Both ranks write into one folder."""
    pytest.importorskip("torch.distributed.run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(data, parity_dir, tmp_path / "two", 2)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "all 28 files are there" in done.stdout
    assert cli.main(command(data, parity_dir, tmp_path / "one", 2)[2:]) == 0
    one, two = tree(tmp_path / "one" / "images"), tree(tmp_path / "two" / "images")
    assert len(one) == 35 and one == two


def test_only_generate_is_spread_over_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench", "shapes", "score", "--out", str(tmp_path)]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_an_adapter_belongs_to_a_run(parity_dir, settings, items, tmp_path, pipe):
    """Stops: a run of an adapter that its manifest calls the base model's, or that another one is mixed into."""
    folder = write_adapter(tmp_path / "odd", pipe.model, size=0.3)
    adapted = replace(settings, lora=[f"{folder}:0.5"], limit=1)
    made = {}
    for name, chosen in {"base": replace(settings, limit=1), "adapted": adapted}.items():
        runner.run("geneval", items, {}, tmp_path / name, 2, chosen)
        made[name] = next((tmp_path / name).rglob("*.png")).read_bytes()
    assert made["base"] != made["adapted"]
    about = json.loads((tmp_path / "adapted" / "manifest.json").read_text())
    assert [key for key in about["checkpoint"] if "lora" in key] == ["lora odd:0.5 sha256"]
    assert not [
        key
        for key in json.loads((tmp_path / "base" / "manifest.json").read_text())["checkpoint"]
        if "lora" in key
    ]
    with pytest.raises(ValueError, match=r"lora odd:0\.5 sha256"):
        runner.run("geneval", items, {}, tmp_path / "adapted", 2, replace(adapted, lora=None))
