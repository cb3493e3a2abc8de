# SPDX-License-Identifier: MIT
"""The command line, run in this process on the random tiny checkpoint: results, files, errors, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapters import write_adapter
from PIL import Image
from safetensors.torch import load_file, save_file

from janusflow_min import __version__, contact_sheet
from janusflow_min.cli import build_parser, main
from janusflow_min.commands import demo
from janusflow_min.hub import TINY
from janusflow_min.loading import load
from janusflow_min.pipeline import Pipeline

PROMPTS = ["a photo of a red star", "Ein Bär, 二つ!"]


@pytest.fixture(scope="module")
def fast(parity_dir) -> list[str]:
    """Options of a short `generate` on the random checkpoint."""
    return ["--model", str(parity_dir), "--parallel-size", "2", "--num-inference-steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def painted(fast, tmp_path_factory) -> Path:
    """A folder with two prompts' pictures and their sheet, painted in batches of three, not to be written to."""
    out = tmp_path_factory.mktemp("painted")
    assert main(["generate", *PROMPTS, *fast, "--seed", "5", "--batch-size", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def checkpoint(parity_dir, tmp_path) -> Path:
    """A copy of the random checkpoint that a test may break."""
    ignored = shutil.ignore_patterns("expected.*", "images")
    return Path(shutil.copytree(parity_dir, tmp_path / "checkpoint", ignore=ignored))


def metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return {key: str(value) for key, value in image.text.items()}


def failure(capsys, *argv: str) -> str:
    """The error line of a command that must fail with exit code 2, one line and no traceback."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("janusflow-min: error: ")
    assert len(told) == 1 and "Traceback" not in told[0]
    return told[0]


# generate -----------------------------------------------------------------------


def test_generate_writes_every_picture_and_the_sheet(painted):
    """Stops pictures lost or named after another prompt or seed where a batch ends in the middle of a prompt."""
    names = sorted(path.name for path in painted.iterdir())
    assert names == [
        "00_a-photo-of-a-red-star_seed5.png",
        "00_a-photo-of-a-red-star_seed6.png",
        "01_ein-bar_seed7.png",
        "01_ein-bar_seed8.png",
        "sheet.png",
    ]


def test_generate_is_the_pipeline_s_picture(painted, parity_dir):
    """Stops the command from painting something else than `Pipeline.generate` with the same seed."""
    import janusflow_min as jf

    pipe = jf.load(parity_dir, parts="generation", progress=False)
    out = pipe.generate(PROMPTS, parallel_size=2, num_inference_steps=2, seed=5, progress=False)
    for path, image in zip(sorted(painted.glob("0*.png")), out.images, strict=True):
        difference = np.asarray(Image.open(path)).astype(int) - np.asarray(image)
        assert abs(difference).max() <= 1  # batches of another size round differently


def test_metadata_say_how_to_repeat(painted, parity_dir):
    """Stops a picture without its settings, with another picture's, or with a prompt mangled by Latin-1."""
    found = metadata(painted / "01_ein-bar_seed8.png")
    side = Image.open(painted / "01_ein-bar_seed8.png").width
    assert found == {
        "prompt": PROMPTS[1],
        "seed": "8",
        "img_size": str(side),
        "model": parity_dir.name,
        "janusflow_min": __version__,
        "dtype": "float32",
        "vae_dtype": "float32",
        "cfg_weight": "2.0",
        "solver": "euler",
        "timestep_shift": "1.0",
        "guidance_interval": "(0.0, 1.0)",
        "guidance_rescale": "0.0",
        "best_of": "1",
        "num_inference_steps": "2",
        "upstream_rounding": "False",
    }


def test_same_seed_same_bytes(painted, fast, tmp_path):
    """Stops randomness or a time stamp that the seed does not cover."""
    argv = ["generate", *PROMPTS, *fast, "--seed", "5", "--batch-size", "3", "--out", str(tmp_path)]
    assert main(argv) == 0
    for path in painted.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_overwritten(fast, tmp_path):
    """Stops a second run from replacing the first one's pictures."""
    argv = ["generate", PROMPTS[0], *fast, "--parallel-size", "1", "--out", str(tmp_path)]
    for weight in ("1", "2", "7"):
        assert main([*argv, "--seed", "3", "--cfg-weight", weight]) == 0
    stem = "00_a-photo-of-a-red-star_seed3"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"{stem}{k}.png" for k in ("-2", "-3", "")),
        *(f"sheet{k}.png" for k in ("-2", "-3", "")),
    ]
    weights = [metadata(tmp_path / f"{stem}{k}.png")["cfg_weight"] for k in ("", "-2", "-3")]
    assert weights == ["1.0", "2.0", "7.0"]


def test_prompts_file_img_size_and_drawn_seed(fast, tmp_path, capsys):
    """Stops a byte-order mark or blank lines from becoming prompts, an ignored --img-size, a seed never told."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa ring\r\n\r\n  two stars \n".encode())
    argv = ["generate", "--prompts-file", str(file), *fast[:-1], "--no-sheet", "--img-size", "40"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    paths = [Path(line) for line in told.out.splitlines()]
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert [metadata(p)["prompt"] for p in paths] == ["a ring"] * 2 + ["two stars"] * 2
    assert {Image.open(p).size for p in paths} == {(40, 40)}
    assert f"--seed {metadata(paths[0])['seed']} repeats it" in told.err


# understand -----------------------------------------------------------------------


def test_understand_prints_the_answer(parity_dir, capsys):
    """Stops an answer that differs from the library's, and anything else on stdout."""
    import janusflow_min as jf

    files = [str(parity_dir / "images" / name) for name in ("square.png", "wide.png")]
    argv = ["understand", "What is different?", "--image", files[0], "--image", files[1], "--quiet"]
    argv += ["--model", str(parity_dir), "--max-new-tokens", "6"]
    pipe = jf.load(parity_dir, parts="understanding", progress=False)
    answer = pipe.understand("What is different?", images=files, max_new_tokens=6)
    assert main(argv) == 0
    assert capsys.readouterr().out == answer.text.strip() + "\n"
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["token_ids"] == answer.token_ids and record["sft_format"] == answer.sft_format
    assert record["images"] == files and record["answer"] == answer.text


def test_understand_samples_by_seed(parity_dir, capsys):
    """Stops --temperature and --seed from being dropped on the way to the sampler."""
    image = str(parity_dir / "images" / "square.png")
    argv = ["understand", "--image", image, "--model", str(parity_dir), "--max-new-tokens", "8", "--quiet"]
    argv += ["--json", "--temperature", "2", "--top-k", "0", "--top-p", "1", "--seed"]
    tokens = []
    for seed in ("1", "1", "2"):
        assert main([*argv, seed]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1] != tokens[2]


# info -----------------------------------------------------------------------


def test_info_on_a_whole_checkpoint(parity_dir, capsys):
    """Stops a false alarm, a part left out, or a total other than the file's."""
    assert main(["info", str(parity_dir)]) == 0
    report = capsys.readouterr().out
    tensors = load_file(parity_dir / "model.safetensors")
    total = next(line for line in report.splitlines() if line.startswith("together")).split()
    assert total[1] == str(len(tensors))
    assert total[2] == f"{sum(t.numel() for t in tensors.values()):,}"
    for part in (
        "llm ",
        "siglip ",
        "attn_pool",
        "uvit_encoder",
        "uvit_decoder",
        "AutoencoderKL",
        "image_gen",
    ):
        assert part in report
    assert "missing or wrong: nothing" in report and "(unknown)" not in report


def test_info_on_the_default(capsys):
    """Stops shipping a trained default with files or keys missing."""
    assert main(["info"]) == 0
    assert "missing or wrong: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, ": the same"),
        ({"do_normalize": True}, ": differs in do_normalize\n    do_normalize false\n"),
        ({"image_mean": [0.5] * 3}, ": differs in mean\n    mean (0.485, 0.456, 0.406)\n"),
        ({"image_mean": None, "image_std": [0.5] * 3}, ": differs in mean, deviation\n"),
    ],
)
def test_info_says_how_images_are_normalised(checkpoint, capsys, changes, verdict):
    """Stops: answers about wrongly normalised images whose cause nobody sees: the published file is not confirmed."""
    file = checkpoint / "preprocessor_config.json"
    mean, std = [0.48500001430511475, 0.456, 0.406], [0.229, 0.224, 0.225]  # as the doubles of float32, too
    published = {"do_normalize": False, "image_mean": mean, "image_std": std}
    file.write_text(json.dumps(json.loads(file.read_text()) | published | changes))
    assert main(["info", str(checkpoint)]) == 0
    report = capsys.readouterr().out
    shown = "none" if "image_mean" in changes and changes["image_mean"] is None else "(0."
    assert f"do_normalize {str(changes.get('do_normalize', False)).lower()}, mean {shown}" in report
    assert "JanusFlow-1.3B's file (inferred from its size, not confirmed)" + verdict in report


def test_info_lists_all_that_is_wrong(checkpoint, capsys):
    """Stops a report that ends at the first fault: keys, files and the VAE are all told at once."""
    tensors = load_file(checkpoint / "model.safetensors")
    gone = next(name for name in tensors if name.startswith("vision_gen_dec_aligner."))
    tensors["stray.weight"] = tensors.pop(gone)
    save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert main(["info", str(checkpoint)]) == 1
    report = capsys.readouterr().out
    for text in (
        gone,
        "stray.weight",
        "tokenizer.json is missing",
        "diffusion_pytorch_model.safetensors is not",
    ):
        assert text in report
    assert "missing or wrong: 3" in report


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_info_names_an_absent_file(checkpoint, capsys, name):
    """Stops a traceback, or exit code 0, where a needed file is not there."""
    (checkpoint / name).unlink()
    assert main(["info", str(checkpoint)]) == 1
    assert name in capsys.readouterr().out.split("missing or wrong")[1]


def test_info_names_all_absent_shards(checkpoint, capsys):
    """Stops an interrupted download of shards from being told one file at a time."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    shards = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    here = {name: tensors[name] for name, file in shards.items() if file == "model-1.safetensors"}
    save_file(here, checkpoint / "model-1.safetensors")
    assert main(["info", str(checkpoint)]) == 1
    assert "2 files that are absent: model-0.safetensors, model-2.safetensors" in capsys.readouterr().out


def test_info_without_a_vae_is_whole(checkpoint, capsys):
    """Stops the official repository, which has no VAE, from being called incomplete."""
    shutil.rmtree(checkpoint / "vae")
    assert main(["info", str(checkpoint)]) == 0
    assert "stabilityai/sdxl-vae" in capsys.readouterr().out


# Errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([""], "prompt is empty"),
        (["a star", "  "], "prompt is empty"),
        ([], "no prompt"),
        (["a star", "<image_placeholder>"], "special tokens"),
        (
            ["a star", "--num-inference-steps", "0"],
            "--num-inference-steps: must be a whole number from 1 to 10000, got 0",
        ),
        (["a star", "--img-size", "-3"], "--img-size: must be"),
        (["a star", "--parallel-size", "x"], "--parallel-size: must be"),
        (["a star", "--cfg-weight", "nan"], "--cfg-weight: must be a finite number"),
        (["a star", "--seed", "-1"], "--seed: must be"),
        (["a star", "--device", "abacus"], "device 'abacus' is not usable"),
        (["a star", "--dtype", "int4"], "dtype must be one of"),
        (["a star", "--vae-dtype", "float16"], "the VAE runs in bfloat16 or float32"),
        (["a star", "--vae", "no/such/vae"], "vae_path 'no/such/vae'"),
        (["a star", "--model", "./none"], "source './none' is neither a folder nor a hub id"),
        (["--prompts-file", "no-such-file.txt"], "no-such-file.txt"),
        (["a star", "--colour", "red"], "unrecognized arguments"),
        (["one " * 2000], "positions"),
    ],
)
def test_generate_refuses(fast, tmp_path, capsys, argv, says):
    """Stops a traceback, an unclear message, exit code 0, or a folder left behind, for each bad input."""
    out = tmp_path / "out"
    line = failure(capsys, "generate", *fast, "--out", str(out), *argv)
    assert says in line
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "demo"])
@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_generate_does_not_write_into_a_file(tmp_path, capsys, monkeypatch, command, below):
    """Stops: the weights read first, or a file replaced, where --out is a file or lies below one."""
    monkeypatch.setattr("janusflow_min.loading.load", lambda *a, **k: pytest.fail("loaded first"))
    (tmp_path / "out").write_text("mine")
    argv = [command, *(["a star"] if command == "generate" else []), "--out", str(tmp_path / "out" / below)]
    assert "is a file" in failure(capsys, *argv)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--img-size", "1000000"], "--img-size: must be a whole number from 1 to 8192, got 1000000"),
        (["--parallel-size", "99999999999"], "--parallel-size: must be a whole number from 1 to 10000"),
        (["--parallel-size", "9" * 5000], "--parallel-size: must be a whole number from 1 to 10000"),
        (
            ["--num-inference-steps", "1000000000"],
            "--num-inference-steps: must be a whole number from 1 to 10000",
        ),
        (["--batch-size", "1000000000"], "--batch-size: must be a whole number from 1 to 256"),
        (
            ["--img-size", "8192", "--batch-size", "100", "--parallel-size", "100"],
            "lower --batch-size or --img-size",
        ),
        (["b"] * 20 + ["--parallel-size", "9999"], "one command makes at most 100,000"),
        (["--cfg-weight", "1e999"], "--cfg-weight: must be a finite number"),
        (["--seed", "9" * 30], "--seed: must be a whole number"),
    ],
)
def test_counts_are_bounded_before_anything_is_loaded(capsys, monkeypatch, argv, says):
    """Stops: terabytes asked for by a slip of the key, and bounds that only the code knows."""
    monkeypatch.setattr("janusflow_min.loading.load", lambda *a, **k: pytest.fail("loaded first"))
    assert says in failure(capsys, "generate", "a star", *argv)


def test_the_help_says_the_bounds(capsys):
    """Stops: a limit that is met by trial."""
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert all(bound in text for bound in ("10,000", "8192", "256"))


# The terminal -----------------------------------------------------------------------

RUN = [sys.executable, "-m", "janusflow_min"]
PLAIN_ENV = {
    k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "PYTHONIOENCODING", "PYTHONUTF8")
}


@pytest.mark.parametrize(
    "env",
    [
        *({"PYTHONIOENCODING": code} for code in ("gbk", "ascii", "cp1252")),
        {"LC_ALL": "C"},
    ],
    ids=lambda env: "-".join(env.values()),
)
def test_letters_that_the_terminal_lacks_are_escaped(fast, tmp_path, env):
    """Stops: a run that ends at its first path or answer, the other images lost (Windows consoles, LC_ALL=C)."""
    out = tmp_path / "Bär ⭐ 二 \x1b[31m"
    argv = ["generate", "ein Bär ⭐", "二つ", *fast, "--parallel-size", "1", "--out", str(out)]
    done = subprocess.run([*RUN, *argv], env=PLAIN_ENV | env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.png"))) == 3
    assert done.stdout.count(b"\n") == 3 and b"\\x1b[31m" in done.stdout and b"\x1b" not in done.stdout
    assert (b"\\u2b50" in done.stdout) == ("PYTHONIOENCODING" in env)


def test_json_stays_json_in_every_encoding(parity_dir):
    """Stops: Python's escapes inside of JSON, which no parser reads."""
    argv = [
        "understand",
        "⭐ Bär \x9b31m 😀?",
        "--json",
        "--quiet",
        "--max-new-tokens",
        "3",
        "--model",
        str(parity_dir),
    ]
    for code in ("ascii", "utf-8"):
        done = subprocess.run([*RUN, *argv], env=PLAIN_ENV | {"PYTHONIOENCODING": code}, capture_output=True)
        assert json.loads(done.stdout.decode(code))["question"] == argv[1]
        assert "\x9b" not in done.stdout.decode(code)


@pytest.mark.parametrize(
    "argv", [["info"], ["--help"], ["generate", "--help"], ["bench", "shapes", "--help"]]
)
def test_a_reader_that_leaves_ends_the_run_in_silence(argv):
    """Stops: "Broken pipe" told as an error, or by Python itself at its end."""
    process = subprocess.Popen([*RUN, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    # argparse itself does not notice when its help goes nowhere.
    assert told == b"" and process.wait(60) in ((0, 141) if "--help" in argv else (141,))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    """Stops: a report that never reached its file, with exit code 0 or a traceback."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*RUN, "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "error:" in done.stderr and len(done.stderr.splitlines()) == 1


def test_errors_cannot_move_the_cursor(capsys):
    """Stops: a file's name or a key that writes over the terminal."""
    line = failure(capsys, "understand", "?", "--image", "a\x1b[2J\u202eb.png")
    assert "\x1b" not in line and "\u202e" not in line and "x1b" in line


@pytest.mark.parametrize("where", ["parser", "command"])
def test_ctrl_c_is_130(capsys, monkeypatch, where):
    """Stops: a traceback, or another exit code than shells expect."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    target = "janusflow_min.cli.build_parser" if where == "parser" else "janusflow_min.loading.load"
    monkeypatch.setattr(target, interrupt)
    assert main(["generate", "a star"]) == 130
    assert capsys.readouterr().err.startswith("janusflow-min: interrupted")


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_understand_refuses_a_bad_image(tmp_path, capsys, content):
    """Stops a traceback, or a wait for the weights, where the image is missing or broken."""
    file = tmp_path / "image.png"
    if content is not None:
        file.write_bytes(content)
    line = failure(capsys, "understand", "What?", "--image", str(file), "--model", "./no-weights-are-read")
    assert str(file) in line


def test_understand_refuses_nothing_to_answer(capsys):
    """Stops an empty command from describing an image that is not there."""
    assert "no question" in failure(capsys, "understand")


def test_no_command_and_unknown_models(capsys):
    """Stops a traceback from the parser, and from `info` without a folder."""
    assert "COMMAND" in failure(capsys)
    assert "neither a folder" in failure(capsys, "info", "/no/such/folder")


def test_latents_that_are_not_finite_are_told(fast, tmp_path, capsys, monkeypatch):
    """Stops FloatingPointError, which is no ValueError, from ending in a traceback."""

    def fail(*_, **__):
        raise FloatingPointError("the latents of\n 'a star' are not finite")

    monkeypatch.setattr(Pipeline, "generate", fail)
    line = failure(capsys, "generate", "a star", *fast, "--out", str(tmp_path / "out"))
    assert "latents of 'a star' are not finite" in line and not (tmp_path / "out").exists()


def test_debug_shows_the_traceback():
    """Stops --debug from being accepted and ignored."""
    with pytest.raises(FileNotFoundError):
        main(["info", "/no/such/folder", "--debug"])


def test_interrupt_leaves_whole_files_only(fast, tmp_path, capsys, monkeypatch):
    """Stops a half-written picture under its final or a temporary name, and another exit code than 130."""
    whole = Image.Image.save
    calls = []

    def interrupted(self, file, *args, **kwargs):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise KeyboardInterrupt
        whole(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert main(["generate", "a star", *fast, "--seed", "1", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["00_a-star_seed1.png"]
    Image.open(tmp_path / "00_a-star_seed1.png").load()


# Help, images, demo -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "generate", "understand", "info"])
def test_help_teaches(command, capsys):
    """Stops help that cannot be printed (a stray % in it) or has no example, and examples that do not parse."""
    import shlex

    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.split("examples:\n")[1].splitlines() if line.strip()]
    assert end.value.code == 0 and len(examples) >= 2
    for example in examples:
        build_parser().parse_args(shlex.split(example)[1:])


def test_module_and_version():
    """Stops `python -m janusflow_min` from missing, and the exit code from being lost there."""
    run = [sys.executable, "-m", "janusflow_min"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"janusflow-min {__version__}")
    assert subprocess.run([*run, "info", "./none"], capture_output=True).returncode == 2


def test_contact_sheet_holds_every_picture():
    """Stops overlapping or cropped pictures: each must be found whole, in a sheet of the size computed by hand."""
    colours = [(20 * i + 5, 0, 0) for i in range(6)]
    groups = [
        (f"group {g}", [Image.new("RGB", (32, 32), c) for c in colours[2 * g : 2 * g + 2]]) for g in range(3)
    ]
    sheet = contact_sheet.contact_sheet(groups)
    assert sheet.width == 3 * (2 * 32 + contact_sheet.GAP) + 4 * 2 * contact_sheet.GAP
    pixels = np.asarray(sheet)
    for colour in colours:
        assert (pixels == colour).all(-1).sum() == 32 * 32
    assert (
        contact_sheet.contact_sheet([("wide", [Image.new("RGB", (64, 8))])]).width
        == 64 + 4 * contact_sheet.GAP
    )
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet.contact_sheet([])


def test_contact_sheet_survives_any_caption():
    """Stops long, empty, spaceless or non-Latin prompts from raising or from making the sheet wider or endless."""
    picture = [Image.new("RGB", (64, 64))] * 2
    plain = contact_sheet.contact_sheet([("x", picture)])
    for caption in ("", "word " * 500, "w" * 3000, "二つの星 " * 50, "line\nbreak\ttab"):
        sheet = contact_sheet.contact_sheet([(caption, picture)])
        assert sheet.width == plain.width and sheet.height < plain.height + 60


def test_a_sheet_of_thousands_stays_small():
    """Stops a run of thousands of prompts from ending in a sheet that fills the memory."""
    assert (
        contact_sheet.sheet_side(1) == 256
        and 5000 * contact_sheet.sheet_side(5000) ** 2 <= contact_sheet.SHEET_PIXELS
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [("A café, at night!", "a-cafe-at-night"), ("二つ", "prompt"), ("../../x", "x"), ("a" * 99, "a" * 40)],
)
def test_slug(text, name):
    """Stops a prompt from escaping the folder or making a name that a file system refuses."""
    assert contact_sheet.slug(text) == name


@pytest.mark.slow  # about 30 s on two cores
@pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="without the trained default")
def test_demo_on_the_trained_default(tmp_path, capsys):
    """Stops a first command that fails, paints the wrong number of pictures or answers nonsense."""
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    assert len(list(tmp_path.glob("0*.png"))) == demo.PARALLEL_SIZE * len(demo.PROMPTS)
    told = capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file() and str(tmp_path / "sheet.png") in told
    assert "What is in the picture?  a red star" in told


def test_demo_on_random_weights(parity_dir, tmp_path, capsys, monkeypatch):
    """Stops a demo that runs with the default alone; short, so that the whole path is in every test run."""
    whole = Pipeline.generate
    short = {"num_inference_steps": 1}
    monkeypatch.setattr(Pipeline, "generate", lambda self, *a, **k: whole(self, *a, **k | short))
    assert main(["demo", "--model", str(parity_dir), "--out", str(tmp_path), "--quiet"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == demo.PARALLEL_SIZE * len(demo.PROMPTS) + 1
    assert "How many objects are there?" in capsys.readouterr().out


def test_the_steps_of_each_image_are_saved(parity_dir, tmp_path, capsys):
    """Stops: the steps of another image of the batch, or a strip that is drawn from the noise alone."""
    line = ["generate", "a cat", "two red cups", "--model", str(parity_dir), "--device", "cpu", "--seed", "3"]
    line += ["--parallel-size", "1", "--num-inference-steps", "4", "--save-steps", "--no-sheet", "--quiet"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    paths = [Path(text) for text in capsys.readouterr().out.split("\n") if text]
    assert [path.name.endswith("_steps.png") for path in paths] == [False, True, False, True]
    for plain, strip in (paths[:2], paths[2:]):
        image, steps = Image.open(plain).convert("RGB"), Image.open(strip).convert("RGB")
        side = image.width
        assert steps.width >= 4 * side and steps.height >= side
        assert image.tobytes() in {
            steps.crop((x, y, x + side, y + side)).tobytes()
            for x in range(steps.width - side + 1)
            for y in range(0, 40)
        }  # the last step ends where it was heading
    assert main([*line, "--best-of", "2", "--out", str(tmp_path)]) == 2
    assert "--save-steps" in capsys.readouterr().err


# Adapters -----------------------------------------------------------------------


def test_lora_is_used_and_noted(fast, parity_dir, tmp_path, capsys):
    """Stops: an adapter that is named and not used, or of which the image's file says nothing."""
    model = ["--model", str(parity_dir), "--quiet"]
    folder = write_adapter(tmp_path / "odd", load(parity_dir, device="cpu", progress=False).model, size=0.3)
    made = {}
    for name, lora in {
        "plain": [],
        "one": ["--lora", str(folder)],
        "two": ["--lora", f"b={folder}:0.5"],
    }.items():
        out = tmp_path / name
        assert (
            main(["generate", PROMPTS[0], *fast, *lora, "--seed", "5", "--out", str(out), "--no-sheet"]) == 0
        )
        path = sorted(out.iterdir())[0]
        made[name] = metadata(path).get("lora"), np.asarray(Image.open(path)).tobytes()
    assert [made[name][0] for name in made] == [None, "odd:1", "b:0.5"]
    assert len({pixels for _, pixels in made.values()}) == 3
    capsys.readouterr()
    ask = ["understand", "hi", *model, "--max-new-tokens", "4", "--json"]
    assert main([*ask, "--lora", f"{folder}:2"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"] == {"odd": 2.0}


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("none/there/at/all", "--lora 'none/there/at/all' is neither a folder nor a hub id"),
        ("", "--lora must be a folder or a hub id"),
        (":0.5", "--lora ':0.5' is neither"),
    ],
)
def test_a_lora_that_is_none_is_told_before_the_model_is_read(monkeypatch, capsys, lora, words):
    """Stops: minutes of loading before a mistyped path is told."""
    monkeypatch.setattr("janusflow_min.loading.load", None)
    assert words in failure(capsys, "understand", "hi", "--lora", lora)


def test_a_revision_is_for_hub_ids(parity_dir, capsys):
    """Stops: a revision that is silently ignored."""
    error = failure(capsys, "understand", "hi", "--model", str(parity_dir), "--revision", "v2")
    assert "revision 'v2' is for hub ids" in error
    assert "revision 'v2' is for hub ids" in failure(capsys, "understand", "hi", "--revision", "v2")
