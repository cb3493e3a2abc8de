# SPDX-License-Identifier: MIT
"""The page in a real browser, opt-in (`pytest -m browser`): Chromium, driven by Playwright.

With SHOTS=folder each test leaves its screenshot there.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

import janusflow_min as jf  # noqa: E402
from janusflow_min.serve import Limits  # noqa: E402
from janusflow_min.webui import Page, write_example  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SLOW = 60_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Page, str]]:
    page = Page(jf.load("tiny", device="cpu"), "tiny", Limits())
    _, url, _ = page.launch("127.0.0.1", None)
    yield page, url
    page.demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium, or CHROMIUM=/path/to/a/browser")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(served, browser, request):
    """Opens the page anew: visit(width) -> tab, which must ask no other server for anything and fail nowhere."""
    tabs, outside, errors = [], [], []

    def opened(width: int = 1200):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(SLOW)
        tab.on(
            "request",
            lambda r: None if r.url.startswith((served[1], "data:", "blob:")) else outside.append(r.url),
        )
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(served[1])
        button(tab, "Generate").wait_for()
        tabs.append(tab)
        return tab

    yield opened
    for k, tab in enumerate(tabs):
        if (folder := os.environ.get("SHOTS")) and not tab.is_closed():
            tab.screenshot(path=Path(folder) / f"{request.node.name}-{k}.png", full_page=True)
        tab.close()
    assert outside == [] and errors == []


def button(tab, name: str):
    return tab.get_by_role("button", name=name, exact=True).locator("visible=true")


def open_tab(tab, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def status(tab, words: str) -> None:
    tab.get_by_text(words, exact=True).locator("visible=true").wait_for()


def fits(tab) -> bool:
    return tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def images(tab):
    return tab.locator(".grid-container img").locator("visible=true")


def test_images_appear_while_they_are_sampled(visit):
    """Stops: a button, an example or a preview that does nothing in a browser."""
    tab = visit()
    button(tab, "a photo of a circle and a square").click()
    playwright.expect(tab.get_by_label("Prompt", exact=True).first).to_have_value(
        "a photo of a circle and a square"
    )
    button(tab, "Generate").click()
    tab.get_by_text(re.compile(r"Step \d+ of 30")).wait_for()
    playwright.expect(images(tab)).to_have_count(4)
    status(tab, "Done.")
    for caption in ("seed 0", "seed 3"):
        tab.get_by_text(caption).wait_for()


@pytest.mark.parametrize("how", ["Stop", "closed tab"])
def test_a_run_that_nobody_wants_ends(visit, served, monkeypatch, how):
    """Stops: a preset that is shown and not taken; a model that samples on behind a stopped or closed page."""
    finished, inner = [], served[0].pipe.generate
    monkeypatch.setattr(
        served[0].pipe, "generate", lambda *args, **options: finished.append(inner(*args, **options))
    )
    tab = visit()
    tab.get_by_role("button", name=re.compile("^More")).locator("visible=true").click()
    tab.get_by_label("quick").check()
    playwright.expect(tab.get_by_label(re.compile("^number input for Steps"))).to_have_value("12")
    tab.get_by_label(re.compile("^number input for Steps")).fill("100")
    button(tab, "Generate").click()
    tab.get_by_text(re.compile(r"Step \d+ of 100")).wait_for()
    if how == "Stop":
        button(tab, "Stop").click()
        status(tab, "Stopped.")
    else:
        tab.close()
    deadline = time.monotonic() + 60
    while any(thread.name == "janusflow-stream" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not finished


def test_a_conversation_about_an_image(visit, served, tmp_path):
    """Stops: an upload that is not sent, an answer that is not shown, a second turn that forgets the first."""
    write_example(tmp_path / "shapes.png")
    tab = visit()
    open_tab(tab, "Ask")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "shapes.png")
    box = tab.get_by_placeholder("Ask, with an image")
    tab.locator("img[alt], .thumbnail-item").locator("visible=true").first.wait_for()
    for question, answer in (("How many objects are there?", "two"), ("What color is the star?", "red")):
        box.fill(question)
        box.press("Enter")
        tab.get_by_role("log").get_by_text(answer, exact=True).wait_for()
    assert tab.get_by_role("log").locator("img").count() >= 1
    button(tab, "New conversation").click()
    playwright.expect(
        tab.get_by_text("What color is the star?", exact=True).locator("visible=true")
    ).to_have_count(1)


def test_an_edit_within_what_is_brushed_over(visit, served, monkeypatch):
    """Stops: strokes that reach the server as no mask, or an example that fills nothing."""
    masks, inner = [], served[0].pipe.edit
    monkeypatch.setattr(
        served[0].pipe, "edit", lambda *args, **options: masks.append(args[4]) or inner(*args, **options)
    )
    tab = visit()
    open_tab(tab, "Edit")
    tab.get_by_text("a red star becomes green").click()
    playwright.expect(tab.get_by_label("Source prompt")).to_have_value(
        "a photo of a red star and a blue circle"
    )
    time.sleep(2)  # the canvas fades the image in
    tab.get_by_label("Brush", exact=True).first.click()
    canvas = tab.locator("canvas").first.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    tab.mouse.move(x - 70, y)
    tab.mouse.down()
    tab.mouse.move(x - 20, y + 10, steps=8)
    tab.mouse.up()
    time.sleep(1)
    button(tab, "Edit").click()
    status(tab, "Done.")
    playwright.expect(images(tab)).to_have_count(2)
    assert masks[0] is not None and 0 < masks[0].convert("L").resize((100, 100)).histogram()[0] < 10_000


def test_a_bad_upload_is_refused_in_words(visit, tmp_path):
    """Stops: a text file with an image's name that ends in silence, in "Error" or in a traceback."""
    (tmp_path / "bad.png").write_text("this is no image")
    tab = visit()
    open_tab(tab, "Ask")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
    box = tab.get_by_placeholder("Ask, with an image")
    time.sleep(2)
    box.fill("What is this?")
    box.press("Enter")
    tab.get_by_text("cannot be read as an image").first.wait_for()
    assert "Traceback" not in tab.content()


def test_two_users_at_once(visit):
    """Stops: a second visitor who gets the first one's images, or none."""
    one, two = visit(), visit()
    for tab, prompt in ((one, "a photo of a red star"), (two, "a photo of a ring left of a triangle")):
        button(tab, prompt).click()
        button(tab, "Generate").click()
    for tab in (two, one):
        status(tab, "Done.")
    first, second = (images(tab).first.screenshot() for tab in (one, two))
    assert first != second


def test_a_phone_shows_every_tab_whole(visit):
    """Stops: a page that scrolls sideways at 390 px, or whose buttons lie outside of it."""
    tab = visit(390)
    for name, control in (("Generate", "Generate"), ("Ask", "New conversation"), ("Edit", "Edit")):
        open_tab(tab, name)
        button(tab, control).wait_for()
        time.sleep(1)
        assert fits(tab), name
        box = button(tab, control).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 30


def test_the_keyboard_is_enough(visit):
    """Stops: a control that only a mouse reaches, and focus that cannot be seen."""
    tab = visit()

    def tab_to(target, most: int = 40) -> None:
        for _ in range(most):
            if target.evaluate("e => e === document.activeElement"):
                return
            tab.keyboard.press("Tab")
        raise AssertionError("Tab does not reach it")

    tab_to(tab.get_by_label("Prompt", exact=True).first)
    tab.keyboard.press("Control+A")
    tab.keyboard.type("a photo of three stars")
    tab_to(tab.get_by_role("slider", name=re.compile("Images")).first)
    for _ in range(3):
        tab.keyboard.press("ArrowLeft")
    tab.get_by_label("Prompt", exact=True).first.focus()
    tab_to(button(tab, "Generate"))
    outline = button(tab, "Generate").evaluate(
        "e => getComputedStyle(e).outlineStyle + getComputedStyle(e).boxShadow"
    )
    assert outline != "nonenone"
    tab.keyboard.press("Enter")
    status(tab, "Done.")
    playwright.expect(images(tab)).to_have_count(1)
    tab.get_by_role("tab", name="Generate").focus()
    tab.keyboard.press(
        "Tab" if tab.get_by_role("tab", name="Ask").get_attribute("tabindex") != "-1" else "ArrowRight"
    )
    tab.keyboard.press("Enter")
    box = tab.get_by_placeholder("Ask, with an image")
    box.wait_for()
    tab_to(box)
    tab.keyboard.type("Hello")
    tab.keyboard.press("Enter")
    tab.get_by_role("log").get_by_text("Hello", exact=True).wait_for()
