# SPDX-License-Identifier: MIT
"""WISE with --official-compat beside its authors' scripts, on random invented answers: WISE_ROOT, TORCHUMM_ROOT."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from official import functions, official_file
from PIL import Image

from janusflow_min.benchmarks import wise, wise_sets
from janusflow_min.benchmarks.judges import NoAnswer
from janusflow_min.benchmarks.wise_sets import DATASETS, WORDING

pytestmark = pytest.mark.official

SCRIPTS = {"legacy": "WISE_legacy/gpt_eval.py", "verified": "vllm_eval.py"}
DATA = {"legacy": "WISE_legacy/data", "verified": "data_verified"}
CALCULATE = {"legacy": "WISE_legacy/Calculate.py", "verified": "calculate_verified.py"}
PARSE = {"legacy": wise.parse_legacy, "verified": wise.parse_verified}
PIECES = {
    "legacy": [
        "Consistency",
        "realism",
        "AESTHETIC QUALITY",
        "Aesthetic  Quality",
        "aesthetic_quality",
        "Reali\u017fm",
    ],
    "verified": ["Score", "score", "SCORE", "Scores", "\u017fcore"],
}
NOISE = [
    ": ",
    ":",
    "::",
    "：",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\r",
    "\x0b",
    "\u2028",
    "\u00a0",
    "\t",
    "*",
    "**",
    "***",
]
NOISE += ["is", "/2", ".5", ".", "-", "0", "1", "2", "3", "9", "10", "\u0661", "\u0967", "x"]
NOISE += ["<think>", "</think>", "</THINK>"]


def random_answer(rng: random.Random, dataset: str) -> str:
    """Half of them well formed here and there, half of them rubble."""
    if rng.random() < 0.5:
        return "".join(rng.choice([*NOISE, *PIECES[dataset]]) for _ in range(rng.randint(0, 14)))
    names = ["Consistency", "Realism", "Aesthetic Quality"] if dataset == "legacy" else ["Score"]
    lines = []
    for name in (
        rng.sample(names * rng.randint(1, 2), k=rng.randint(1, len(names))) if rng.random() < 0.3 else names
    ):
        form = rng.choice(
            ["{}: {}", "**{}**: {}", "**{}:** {}", "{}{}", "*{}* {}", "- {} : {}", "{}\n{}", "\n{1}\n"]
        )
        lines.append(form.format(name, rng.choice(["0", "1", "2", "1", "0", "7", "1.5", "10", "1/2"])))
    thought = rng.choice(
        ["", "", "<think>Score: 1, Realism: 2</think>", "Score: 0</think>\n", "<think>\n1\n"]
    )
    return (
        thought + rng.choice(["\n", ", ", "\r\n", " "]).join(lines) + rng.choice(["", "\n", "\n0\n", " end"])
    )


def ask_official(script: Path, dataset: str, answers: dict[int, str]) -> dict[int, dict]:
    """The records of their own `evaluate_image` for every id whose answer it can use."""
    names = ["extract_scores", "encode_image", "build_evaluation_messages", "evaluate_image"]
    names += ["REQUIRED_SCORE_KEYS", "MAX_EXTRACT_RETRIES"]
    asked: list[int] = []

    def reply(*_, **__):
        message = {"choices": [{"message": {"content": answers[asked[-1]]}}]}
        return types.SimpleNamespace(raise_for_status=lambda: None, json=lambda: message) if post else message

    post = dataset == "verified"
    if post:
        names.append("_chat_completion_via_vllm")
    stand_ins = dict(
        requests=types.SimpleNamespace(post=reply),
        openai=types.SimpleNamespace(ChatCompletion=types.SimpleNamespace(create=reply)),
    )
    from base64 import b64encode

    stand_ins |= dict(re=re, base64=types.SimpleNamespace(b64encode=b64encode), print=lambda *_: None)
    from typing import Any

    theirs = functions(script, *names, Dict=dict, Any=Any, List=list, **stand_ins)
    config = {"model": "m", "api_base": "", "api_key": "", "timeout": 1}
    found = {}
    for number in answers:
        asked.append(number)
        prompt = {"Prompt": "p", "Explanation": "e", "Subcategory": f"s{number}"}
        result = theirs["evaluate_image"](number, prompt, __file__, config)
        if result["status"] == "ok":
            found[number] = result["score"]
    return found


@pytest.mark.parametrize("dataset", DATASETS)
def test_answers_are_read_alike(dataset):
    """Stops: a grade where the official script finds none, or another one: 20,000 random answers."""
    rng = random.Random(dataset)
    answers = {i: random_answer(rng, dataset) for i in range(20_000)}
    expected = ask_official(official_file("WISE_ROOT", SCRIPTS[dataset]), dataset, answers)
    for number, text in answers.items():
        theirs = expected.get(number)
        ours = PARSE[dataset](text, official_compat=True)
        assert ours == (theirs and {name: theirs[name] for name in ours or {"": 0}}), repr(text)
    assert 2000 < len(expected) < 18_000


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_judge_is_sent_the_official_messages(dataset, tmp_path):
    """Stops: a system message, a blank or a placeholder that is lost on the way from the checkout to the judge."""
    script = official_file("WISE_ROOT", SCRIPTS[dataset])
    theirs = functions(script, "build_evaluation_messages", Dict=dict)["build_evaluation_messages"]
    texts, image = wise.read_wording(script, dataset), tmp_path / "1.png"
    image.write_bytes(b"\x00")
    rng = random.Random(0)
    for _ in range(300):
        words = ["a", "{Explanation}", "{Prompt}", "{", "}", '"', "\\1", "\\n", "é", "%s", "\n"]
        prompt, explanation = ("".join(rng.choices(words, k=6)) for _ in "ab")
        expected = theirs({"Prompt": prompt, "Explanation": explanation}, "AA==")
        assert wise.messages(texts, prompt, explanation, image) == expected
    assert texts != WORDING[dataset]


class Scripted:
    """Says about each image what it is to say, or nothing that makes sense."""

    def __init__(self, name: str, answers: dict[str, str]):
        self.name, self.answers = name, answers

    def ask(self, messages):
        answer = self.answers[messages[-1]["content"][0]["text"].split("«")[1]]
        if answer == "timeout":
            raise NoAnswer("timeout")
        return answer


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("whole", [True, False])
def test_whole_runs_end_in_the_same_numbers(dataset, whole, tmp_path):
    """Stops: a mean, a weight, a range or a missing image that counts otherwise: 1,000 random answers a run."""
    rng = random.Random(f"{dataset} {whole}")
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir(), images.mkdir()
    for stem, (first, last) in DATASETS[dataset].files.items():
        fields = ("Prompt", "Explanation", "Category", "Subcategory")
        records = [dict.fromkeys(fields, f"«{i}«") | {"prompt_id": i} for i in range(first, last + 1)]
        (data / f"{stem}.json").write_text(json.dumps(records), encoding="utf-8")
    answers = {}
    for i in range(1, 1001):
        if whole or rng.random() < 0.9:
            Image.new("RGB", (1, 1)).save(images / f"{i}.png")
            while True:
                answers[i] = random_answer(rng, dataset)
                if not whole or PARSE[dataset](answers[i], official_compat=True):
                    break
    own = tmp_path / "wording.json"
    own.write_text('{"user": "{Prompt}{Explanation}"}')
    chat = Scripted("judge", {str(i): text for i, text in answers.items()})
    options = wise.ScoreOptions(
        data=data, dataset=dataset, images=images, judge_model=chat, judge_prompts=own, official_compat=True,
        attempts=1, stop_after=1000, progress=False,
    )  # fmt: skip
    ours = wise.score(tmp_path / "run", options)
    expected = ask_official(official_file("WISE_ROOT", SCRIPTS[dataset]), dataset, answers)
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "run" / DATASETS[dataset].results).glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for line in lines:
        line["Subcategory"] = f"s{line['prompt_id']}"
    assert {line["prompt_id"]: line for line in lines} == expected
    assert ours["n_scored"] == len(expected) and (len(expected) == 1000) == whole
    files = sorted((tmp_path / "run" / DATASETS[dataset].results).glob("*.jsonl"))
    script = official_file("WISE_ROOT", CALCULATE[dataset])
    precise = re.sub(r":\.2f\}", ":.17g}", script.read_text(encoding="utf-8"))  # all digits of what it prints
    (tmp_path / "calculate.py").write_text(precise, encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, tmp_path / "calculate.py", *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not whole:
        assert ours["headline"] is None and "Aborting overall evaluation" in printed
        return
    summary = printed.split("Overall Evaluation Summary")[1]
    means = [float(number) for number in re.findall(r"Average (?:binary )?WiScore: (\S+)", summary)]
    assert means == [ours["scores"][name]["value"] for name in wise_sets.CATEGORIES]
    overall = float(re.search(r"Overall WiScore: (\S+)", summary)[1])
    values = {name: entry["value"] for name, entry in ours["scores"].items()}
    assert wise.overall(values, dataset) == overall


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_published_files_are_known(dataset):
    """Stops: a headline that the published prompts do not get, or the remark about wording under the official one."""
    data = official_file("WISE_ROOT", DATA[dataset])
    assert wise.is_published(data, dataset) and len(wise.read(data, dataset)) == 1000
    texts = wise.read_wording(official_file("WISE_ROOT", SCRIPTS[dataset]), dataset)
    assert wise.wording_sha256(texts) == DATASETS[dataset].wording_sha256


def test_torchumm_weighs_alike():
    """Stops: a weight that TorchUMM's copy of the formula has otherwise."""
    script = official_file("TORCHUMM_ROOT", "eval/generation/wise/Calculate.py")
    theirs = functions(script, "calculate_wiscore")["calculate_wiscore"]
    for grades in [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]:
        assert wise.wiscore(*grades) == theirs(*grades)
