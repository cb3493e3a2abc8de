# SPDX-License-Identifier: MIT
"""The page of `janusflow-min ui`, called directly and as a server; test_webui_browser.py has a browser."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402

import janusflow_min as jf  # noqa: E402
from janusflow_min.cli import main  # noqa: E402
from janusflow_min.serve import Limits  # noqa: E402
from janusflow_min.webui import EDIT, MAX_TEXT, QUESTIONS, Page, write_example  # noqa: E402

ROOT = Path(__file__).parents[1]
STAR = "a photo of a red star"


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(
        jf.load("tiny", device="cpu"), "tiny", Limits(max_image_pixels=40_000, max_steps=1000, max_queue=12)
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("example") / "example.png"
    write_example(path)
    return str(path)


@pytest.fixture(scope="module")
def url(page: Page) -> Iterator[str]:
    _, url, public = page.launch("127.0.0.1", None)
    assert url.startswith("http://127.0.0.1:") and public is None
    yield url
    page.demo.close(verbose=False)


def inputs(prompt: str = STAR, steps: int = 2, count: int = 1, seed: int | None = 0, **more) -> list:
    values = dict(negative="", guidance=2.0, solver="euler", preset="default", best_of=1, preview=True) | more
    names = ("negative", "guidance", "solver", "preset", "best_of", "preview")
    negative, guidance, solver, preset, best_of, preview = (values[name] for name in names)
    return [prompt, negative, seed, count, guidance, steps, solver, preset, best_of, preview]


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "janusflow-stream"]


def wait_until_idle(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while streams():
        assert time.monotonic() < deadline, "the model still runs"
        time.sleep(0.02)


def test_the_page_generates_what_the_library_does(page):
    """Stops: a setting that the page shows and drops; a seed that makes other images here; previews that are none."""
    _, *steps, (images, status) = page.generate(
        *inputs(steps=3, count=2, seed=5, negative="a circle", guidance=3.0, solver="heun")
    )
    wanted = page.pipe.generate(
        STAR, 2, 3.0, 3, seed=5, negative_prompt="a circle", solver="heun", progress=False
    ).images
    assert [caption for _, caption in images] == ["seed 5", "seed 6"] and status == "Done."
    assert all(np.array_equal(image, other) for (image, _), other in zip(images, wanted, strict=True))
    assert (
        len(steps) == 3 and all(len(previews) == 2 for previews, _ in steps) and "Step 3 of 3" in steps[-1][1]
    )
    *_, (quick, _) = page.generate(*inputs(steps=4, solver="ab2", preset="quick", preview=False))
    same = page.pipe.generate(STAR, 1, num_inference_steps=4, preset="quick", seed=0, progress=False).images
    assert np.array_equal(quick[0][0], same[0])
    *_, (best, _) = page.generate(*inputs(best_of=3))
    wanted = page.pipe.generate(STAR, 1, num_inference_steps=2, seed=0, best_of=3, progress=False)
    assert best[0][1] == f"seed {wanted.seeds[0]}, score {max(wanted.scores[0]):.2f}"


def test_a_conversation_goes_on(page, example):
    """Stops: a second question that has forgotten the image or the first; an answer other than the library's."""
    history, told = [], []
    for question, files in ((QUESTIONS[1], [example]), (QUESTIONS[2], [])):
        told += page.ask({"text": question, "files": files}, history, "")
        history = told[-1][1]
    first = page.pipe.understand(QUESTIONS[1], example).text
    tag = page.pipe.processor.tokenizer.image_tag
    conversation = [
        {"role": "User", "content": f"{tag}\n{QUESTIONS[1]}", "images": [example]},
        {"role": "Assistant", "content": first.strip()},
        {"role": "User", "content": QUESTIONS[2]},
    ]
    second = page.pipe.chat(conversation).text
    assert [turn["text"] for turn in history] == [QUESTIONS[1], first, QUESTIONS[2], second]
    assert told[-1][0][0]["content"] == {"path": example}
    *pieces, (_, other, _) = page.ask({"text": QUESTIONS[0], "files": [example]}, [], "You are a judge.")
    assert len(pieces) > 3  # the question, and more of the answer each time
    assert (
        other[-1]["text"]
        == page.pipe.understand(QUESTIONS[0], example, system_prompt="You are a judge.").text
    )


def test_an_edit_changes_what_was_brushed_over(page, example):
    """Stops: paint that is no mask, or a mask upside down; an edit other than the library's."""
    background = Image.open(example).convert("RGBA")
    paint = Image.new("RGBA", background.size)
    paint.paste((255, 45, 149, 90), (0, 0, 64, 128))
    value = {"background": background, "layers": [paint], "composite": background}
    _, *steps, (images, status) = page.edit(value, EDIT[0], EDIT[1], 0.8, 4, 0)
    (before, _), (after, _) = images
    mask = Image.new("L", background.size)
    mask.paste(255, (0, 0, 64, 128))
    wanted = page.pipe.edit(example, *EDIT, mask=mask, num_inference_steps=4, seed=0, progress=False)[0]
    assert np.array_equal(after, wanted) and np.array_equal(before, Image.open(example)) and status == "Done."
    changed = (np.asarray(after) != np.asarray(before)).any(2)
    assert changed[:, :64].any() and not changed[:, 64:].any() and len(steps) == 4
    blank = {"background": background, "layers": [Image.new("RGBA", background.size)], "composite": None}
    *_, (images, _) = page.edit(blank, *EDIT, 0.8, 2, 0)
    assert (np.asarray(images[1][0]) != np.asarray(before)).any(2)[:, 64:].any()


WRONG = {
    "an empty prompt": ("generate", inputs(prompt=" "), "the prompt must be text"),
    "special tags": ("generate", inputs(prompt="a <image_placeholder>"), "&lt;image_placeholder&gt;"),
    "a prompt without end": (
        "generate",
        inputs(prompt="a" * (MAX_TEXT + 1)),
        f"at most {MAX_TEXT} characters",
    ),
    "too many candidates": ("generate", inputs(count=5, best_of=4), "at most 16"),
    "nothing asked": ("ask", [{"text": " ", "files": []}, [], ""], "the question is empty"),
    "a tag in a question": ("ask", [{"text": "<image_placeholder>", "files": []}, [], ""], "special tokens"),
    "a file that is no image": (
        "ask",
        [{"text": "?", "files": [__file__]}, [], ""],
        "cannot be read as an image",
    ),
    "nothing to edit": ("edit", [None, STAR, "", 0.8, 2, 0], "no image to edit"),
    "a long source": ("edit", [None, STAR, "a" * (MAX_TEXT + 1), 0.8, 2, 0], "at most"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_plain_words(page, what):
    """Stops: the word "Error" alone, a traceback, or text of a user that the browser takes for HTML."""
    method, values, words = WRONG[what]
    with pytest.raises(gradio.Error) as caught:
        list(getattr(page, method)(*values))
    assert words in str(caught.value) and "<" not in str(caught.value) and not caught.value.print_exception
    assert not streams()


def test_a_fault_of_ours_shows_no_traceback(page, monkeypatch):
    """Stops: paths and code of the server in a visitor's browser."""
    monkeypatch.setattr(page.pipe, "generate", lambda *_, **__: {}["/secret/path"])
    with pytest.raises(gradio.Error, match="Something failed") as caught:
        list(page.generate(*inputs()))
    assert "secret" not in str(caught.value)


def test_ten_clients_at_once_get_their_own(page, url):
    """Stops: images of one visitor in another's browser, runs at the same time, a queue that loses somebody."""
    runs, most = 0, 0
    inner = page.pipe.generate

    def counted(*args, **options):
        nonlocal runs, most
        runs += 1
        most = max(most, runs)
        try:
            return inner(*args, **options)
        finally:
            runs -= 1

    page.pipe.generate = counted
    try:
        with ThreadPoolExecutor(10) as pool:
            clients = list(pool.map(lambda _: Client(url, verbose=False), range(10)))
            jobs = [
                client.submit(*inputs(seed=k, count=1 + k % 2), api_name="/generate")
                for k, client in enumerate(clients)
            ]
            results = [job.result(timeout=120) for job in jobs]
    finally:
        del page.pipe.generate
    for k, (images, _) in enumerate(results):
        wanted = page.pipe.generate(STAR, 1 + k % 2, 2.0, 2, seed=k, progress=False).images
        assert [np.array_equal(Image.open(i["image"]), w) for i, w in zip(images, wanted, strict=True)] == [
            True
        ] * len(wanted)
    assert most == 1


def test_the_running_page_holds_a_conversation_for_each_client(url, example):
    """Stops: a conversation that two visitors share, or that the server has lost by the second question."""
    one, two = (Client(url, verbose=False) for _ in range(2))
    for client, question in ((one, QUESTIONS[1]), (two, QUESTIONS[2])):
        client.predict({"text": question, "files": [handle_file(example)]}, "", api_name="/ask")
    shown, _ = one.predict({"text": QUESTIONS[2], "files": []}, "", api_name="/ask")
    texts = [part.get("text") for message in shown for part in message["content"]]
    assert texts == [None, QUESTIONS[1], "two", QUESTIONS[2], texts[-1]] and texts[-1]


def test_the_running_page_edits_and_refuses(url, example, tmp_path):
    """Stops: an upload that is no image, or of too many pixels, that ends in "Error" or is decoded all the same; a
    value beyond a slider's end taken from a client without a browser; a file of the server read by a forged path."""
    client = Client(url, verbose=False)

    def edit(path: str, steps: int = 2):
        value = {"background": handle_file(path), "layers": [], "composite": None}
        return client.predict(value, *EDIT, 0.8, steps, 0, api_name="/edit")

    assert len(edit(example)[0]) == 2
    text, large = tmp_path / "text.png", tmp_path / "large.png"
    text.write_text("no image")
    Image.new("RGB", (201, 200)).save(large)
    for path, words in ((text, "cannot be read as an image"), (large, "201x200 pixels; at most 40000")):
        with pytest.raises(Exception, match=words):
            edit(str(path))
        with pytest.raises(Exception, match=words):
            client.predict({"text": "?", "files": [handle_file(str(path))]}, "", api_name="/ask")
    with pytest.raises(Exception, match="1000"):
        edit(example, steps=1001)
    with pytest.raises(Exception, match=r"maximum|at most|greater"):
        client.predict(*inputs(count=11), api_name="/generate")
    forged = {"path": str(ROOT / "docs" / "demo.png"), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception):  # noqa: B017
        client.predict({"text": "?", "files": [forged]}, "", api_name="/ask")


@pytest.mark.parametrize("seen", [0, 2])
def test_a_run_that_nobody_wants_ends_and_frees_the_model(url, seen):
    """Stops: a Stop button that stops the page alone, while the model goes on for a thousand steps."""
    client = Client(url, verbose=False)
    job = client.submit(*inputs(steps=1000), api_name="/generate")
    deadline = time.monotonic() + 60
    while not streams() or len(job.outputs()) < seen:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(streams()) == 1
    job.cancel()
    wait_until_idle(20)
    images, _ = Client(url, verbose=False).predict(*inputs(), api_name="/generate")
    assert len(images) == 1


def test_a_full_queue_says_so(page):
    """Stops: waiting without end, where the server could say that it is busy."""
    small = Page(page.pipe, "tiny", Limits(max_queue=1, max_steps=1000))
    _, url, _ = small.launch("127.0.0.1", None)
    clients, jobs = [Client(url, verbose=False) for _ in range(3)], []
    for client in clients[:2]:  # one runs, one waits
        jobs.append(client.submit(*inputs(steps=1000), api_name="/generate"))
        time.sleep(1)
    with pytest.raises(Exception, match=r"[Qq]ueue"):
        clients[2].predict(*inputs(), api_name="/generate")
    for job in reversed(jobs):
        job.cancel()
    wait_until_idle(30)
    small.demo.close(verbose=False)


def test_nothing_is_shared_unless_asked(page, url):
    """Stops: telemetry, a public link, or routes that pass by the queue, by a default of Gradio's."""
    config = page.demo.get_config_file()
    assert not page.demo.analytics_enabled and not page.demo.share and page.demo.share_url is None
    assert not page.demo.api_open and page.demo.max_file_size == page.limits.max_body
    assert {
        f.concurrency_id for f in page.demo.fns.values() if f.api_name in ("generate", "ask", "edit")
    } == {"model"}
    assert config["analytics_enabled"] is False


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process at once there")
def test_the_command_serves_and_ends(tmp_path):
    """Stops: a command that listens elsewhere, changes the environment or the folder, or ends in a traceback."""
    command = [sys.executable, "-m", "janusflow_min", "ui", "--device", "cpu", "--port", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), process.stderr.read()
        port = line.strip().rpartition(":")[2]
        assert Client(f"http://127.0.0.1:{port}", verbose=False).predict(*inputs(), api_name="/generate")
        assert main(["ui", "--port", port]) == 2  # taken
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "", "") and not list(tmp_path.iterdir())
