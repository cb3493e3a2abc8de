# SPDX-License-Identifier: MIT
"""Wording from a script that is parsed, or from JSON: what is taken, and what is refused. All scripts are invented."""

from __future__ import annotations

import pytest

from janusflow_min.benchmarks.official_prompts import check_placeholders, fill, read_prompts

SCRIPT = '''
import nothing_that_exists
from string import Template

raise SystemExit("the script was run")
PLAIN = """line one
line two"""
JOINED = ("a " "b " + "c")
TEMPLATE = Template("Say $WORD.")

def build(data, image):
    """Two messages."""
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge."}]},
        {"role": "user", "content": [{"text": f"Is {data['Prompt']} {data.answer} or {image}? {{}} \\u00e9"}]},
    ]

class Config:
    def __post_init__(self):
        self.geometry = {"system": ("A\\n" "B\\n"), "number": 3, "shown": f"{self.x!r}"}
        self.twice = "one"
        self.twice = "two"
        self.typed: str = "typed"
'''
PLACES = {
    "plain": "PLAIN",
    "joined": "JOINED",
    "template": "TEMPLATE",
    "system": "build.0.content.0.text",
    "user": "build.1.content.0.text",
    "geometry": "geometry.system",
    "typed": "typed",
}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "official.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_texts_are_taken_without_running_the_script(script):
    """Stops: running a stranger's script for its strings, and a text that loses a line, a brace or a placeholder."""
    assert read_prompts(script, PLACES) == {
        "plain": "line one\nline two",
        "joined": "a b c",
        "template": "Say $WORD.",
        "system": "You judge.",
        "user": "Is {Prompt} {answer} or {image}? {} é",
        "geometry": "A\nB\n",
        "typed": "typed",
    }


def test_a_byte_order_mark_is_read_over(script, tmp_path):
    """Stops: a script or JSON file saved by a Windows editor that is refused for its first three bytes."""
    marked = tmp_path / "marked.py"
    marked.write_bytes(b"\xef\xbb\xbf" + script.read_bytes())
    assert read_prompts(marked, PLACES) == read_prompts(script, PLACES)
    marked.with_suffix(".json").write_text('{"plain": "x"}', encoding="utf-8-sig")
    assert read_prompts(marked.with_suffix(".json"), PLACES) == {"plain": "x"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("MISSING", "no text at MISSING .*nothing is named MISSING.*is it the official file"),
        ("build.2.content", "no part '2' in a List"),
        ("build.0.contents", "no key 'contents'"),
        ("build.0", "is no text"),
        ("geometry.number", "'3' is no text"),
        ("geometry.shown", "is no text"),
        ("PLAIN.0", "no part '0' in a Constant"),
        ("twice", "2 different texts are found at twice"),
    ],
)
def test_a_place_without_one_text_is_named(script, place, message):
    """Stops: judging with an empty or a wrong text because the checkout is of another version."""
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(script, {"x": place})
    assert str(script) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", b"def (", "is not Python source"),
        ("a.py", b"x = '\xff'", "is not Python source"),
        ("a.py", b"x = 1\x00", "is not Python source"),
        ("a.py", b"x = " + b"(" * 5000 + b")" * 5000, "is not Python source"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b'"\xff"', "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.json", b"[]", "must hold a JSON object, not list"),
        ("a.json", b'{"plan": "x"}', "unknown name 'plan'; the names are plain, joined"),
        ("a.json", b'{"plain": 3}', "plain must be a string, got int"),
        ("a.txt", b"hello", "from the official .py file of a checkout, or from a .json file"),
    ],
)
def test_a_file_that_is_neither_is_named(tmp_path, name, content, message):
    """Stops: a traceback of a parser, without the file's name, for a file that cannot be used."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path, PLACES)
    assert str(path) in str(error.value)


def test_no_file_is_named(tmp_path):
    """Stops: a folder, or a wrong path, that is read as no wording."""
    for path in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_prompts(path, PLACES)


def test_placeholders():
    """Stops: a wording under which the judge never sees the answer, and a value that is searched for placeholders."""
    check_placeholders("{Prompt} {Explanation}", ["Prompt", "Explanation"], "x")
    with pytest.raises(
        ValueError, match=r"a\.py, user must have the placeholders \{answer\}; it has \{Prompt\}"
    ):
        check_placeholders("{Prompt} {Prompt}", ["Prompt", "answer"], "a.py, user")
    text = 'Is {a} {b}? {"score": 1} {c}'
    assert fill(text, a="{b}", b="\\1{a}") == 'Is {b} \\1{a}? {"score": 1} {c}'
    assert fill(text) == text
