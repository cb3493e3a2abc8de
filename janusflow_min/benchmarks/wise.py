# SPDX-License-Identifier: MIT
"""WISE: does a picture show what the prompt only implies, by knowledge of culture, time, space and science?

Two sets that must never be mixed, for the same id is another prompt in each: `legacy`, which every published
JanusFlow number used (GPT-4o, three grades), and `verified` (a Qwen judge, right or wrong). Reads their JSON files,
writes `<prompt_id>.png`, and has a chat endpoint judge. Formats, ranges, formulas and parsing follow
PKU-YuanGroup/WISE (`WISE_legacy/gpt_eval.py`, `Calculate.py` and their successors); the judge's wording here is our
own, after its structure, and another may be given as a file: wording moves the numbers, so its hash is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import report as reports
from .report import Published
from .runner import Coverage, Item, Option, RunFolder, Settings, read_json, run, sha256

if TYPE_CHECKING:
    from .judges import Chat

TITLE = "WISE"
SUMMARY = "world knowledge: 1,000 prompts, 1 image each, graded by a chat model"
FIELDS = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")


@dataclass(frozen=True)
class Set:
    """One of the two data sets with its judge and formula."""

    files: Mapping[str, tuple[int, int]]  # stem -> first and last id
    ranges: Mapping[str, tuple[int, int]]  # category -> first and last id
    weights: Mapping[str, float]
    judge: str
    url: str | None
    max_tokens: int
    results: str  # folder of the result files
    extra: Mapping[str, Any]  # further fields of the request


CATEGORIES = ("cultural", "time", "space", "biology", "physics", "chemistry")
SETS = {
    "legacy": Set(
        {
            "cultural_common_sense": (1, 400),
            "spatio-temporal_reasoning": (401, 700),
            "natural_science": (701, 1000),
        },
        dict(
            zip(
                CATEGORIES,
                ((1, 400), (401, 567), (568, 700), (701, 800), (801, 900), (901, 1000)),
                strict=True,
            )
        ),
        dict(zip(CATEGORIES, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), strict=True)),
        "gpt-4o-2024-05-13",
        None,
        2000,
        "Results",
        {},
    ),
    "verified": Set(
        {
            "cultural_common_sense_verified": (1, 400),
            "spatio-temporal_reasoning_verified": (401, 640),
            "natural_science_verified": (641, 1000),
        },
        dict(
            zip(
                CATEGORIES,
                ((1, 400), (401, 520), (521, 640), (641, 760), (761, 880), (881, 1000)),
                strict=True,
            )
        ),
        dict(zip(CATEGORIES, (0.4, 0.12, 0.12, 0.12, 0.12, 0.12), strict=True)),
        "Qwen3.5-35B-A3B",
        "http://127.0.0.1:8000/v1",
        500,
        "Results-qwen35",
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
}
GRADES = ("consistency", "realism", "aesthetic_quality")
PUBLISHED = {
    "legacy": (
        Published(
            "JanusFlow-1.3B, WISE's authors",
            "legacy set, GPT-4o-2024-05-13",
            dict(zip(CATEGORIES, (0.13, 0.26, 0.28, 0.20, 0.19, 0.11), strict=True)),
            0.18,
        ),
        Published(
            "JanusFlow-1.3B, TorchUMM",
            "legacy set, Qwen2.5-VL-72B, more lenient than GPT-4o; its main table prints 0.2964",
            dict(zip(CATEGORIES, (0.2731, 0.3222, 0.3947, 0.3215, 0.2860, 0.1905), strict=True)),
            0.2954,
        ),
    ),
    "verified": (
        Published("Janus-1.3B (no JanusFlow is published)", "verified set, Qwen3.5-35B-A3B", {}, 0.2730),
        Published("Janus-Pro-1B", "verified set, Qwen3.5-35B-A3B", {}, 0.2650),
        Published("Janus-Pro-7B", "verified set, Qwen3.5-35B-A3B", {}, 0.3340),
    ),
}
SYSTEM = {
    "legacy": "You audit generated images. You are strict, impartial, and you follow the output format to the letter.",
    "verified": "",
}
WORDING = {
    "legacy": """Grade one generated image. Answer with three grades and nothing else.

Be ruthless: you are an auditor looking for faults, not an admirer.

You are given two texts. PROMPT is all that the image generator saw. EXPLANATION says what PROMPT implies and what a
right image therefore shows.

Consistency: is the image faithful to PROMPT as EXPLANATION reads it?
0 - what is asked for, or what knowledge implies, is absent or contradicted
1 - the main point is there, but a part is missing, vague or wrong
2 - everything is there, exactly and without doubt

Realism: could the image be real?
0 - physically impossible, broken or obviously artificial
1 - mostly plausible, with visible flaws of shape, light, material or scale
2 - not to be told from a photograph, or flawless in the style that PROMPT names

Aesthetic Quality: is it well made to look at?
0 - unpleasant: bad composition, colour or clutter
1 - acceptable but ordinary, with weaknesses
2 - of professional quality in composition, colour and clarity

Output exactly these three lines, n being 0, 1 or 2:
Consistency: n
Realism: n
Aesthetic Quality: n

Grade 2 is exceedingly rare. Wherever you are in doubt, give the lower grade. Write no word more.

PROMPT: "{prompt}"
EXPLANATION: "{explanation}"
""",
    "verified": """This benchmark asks whether an image generator has knowledge of the world. Judge the knowledge that
the image shows; whether it is beautiful does not matter.

PROMPT is what the generator saw: it describes something indirectly. EXPLANATION is the ground truth: what a right
image shows. If PROMPT asks for the animal on an emblem and EXPLANATION names a crane, an eagle is wrong however well
painted. If PROMPT asks for ice after an hour in the sun and EXPLANATION says a puddle, an ice cube is wrong. If the
right object is there in a plain or clumsy style, that is right.

Check four things:
1. Objects: are the objects of PROMPT and EXPLANATION there?
2. Knowledge: does the image give the answer that EXPLANATION states?
3. Relations: are states, places, numbers and interactions as stated?
4. Usability: can all of that be seen without guessing?

The score is 1 only if all four hold. It is 0 if an object is missing, if the answer is absent, wrong or generic, if a
relation is wrong, if the image shows only the words of PROMPT literally, or if it is too unclear to tell. In doubt
the score is 0.

Output exactly one line, "Score: 0" or "Score: 1", and nothing else.

PROMPT: "{prompt}"
EXPLANATION: "{explanation}"
""",
}
SET = Option("--set", "which of the two data sets", "legacy", choices=tuple(SETS))
SUBSET = Option(
    "--subset", "accept another number of prompts than the benchmark's; no headline then", False, bool
)
DATA = Option(
    "--data", "folder of the set's JSON files: WISE_legacy/data or data_verified", kind=Path, required=True
)
OPTIONS = {
    "generate": (DATA, SET, SUBSET),
    "score": (
        DATA,
        SET,
        SUBSET,
        Option("--images", "folder of images made elsewhere, instead of the run's", kind=Path),
        Option("--judge-model", "name of the chat model; without: the set's own judge"),
        Option(
            "--judge-url",
            "its endpoint, up to /v1; without: OpenAI's for legacy, a local vLLM's for verified",
        ),
        Option("--judge-prompt-file", "another wording, with {prompt} and {explanation} in it", kind=Path),
        Option("--concurrency", "requests at once", 10, int),
        Option("--attempts", "for each image, answers that make no sense counted", 3, int),
        Option("--timeout", "of a request, in seconds", 300.0, float),
    ),
    "report": (),
}


# Reading -----------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    id: int
    prompt: str
    explanation: str
    subcategory: str
    file: str  # stem of its file


def read(data: str | Path, set: str = "legacy", subset: bool = False) -> list[Prompt]:
    """The set's prompts by id. ValueError with file and line for what does not fit."""
    folder, prompts = Path(data), {}
    if not folder.is_dir():
        raise FileNotFoundError(f"--data must be a folder with {', '.join(_names(set))}; {folder} is none")
    for stem, (first, last) in _set(set).files.items():
        path = folder / f"{stem}.json"
        if not path.is_file():
            if subset:
                continue
            raise FileNotFoundError(f"{path} is missing; the {set} set is {', '.join(_names(set))}")
        for record, line in _records(path):
            place = f"{path}:{line}"
            if not isinstance(record, dict) or sorted(record) != sorted(FIELDS):
                got = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{place}: an object with exactly {', '.join(FIELDS)} is needed, got {got}")
            number = record["prompt_id"]
            if isinstance(number, bool) or not isinstance(number, int) or not first <= number <= last:
                raise ValueError(
                    f"{place}: prompt_id must be a whole number from {first} to {last}, got {number!r}"
                )
            if number in prompts:
                raise ValueError(f"{place}: prompt_id {number} is there already")
            for name in ("Prompt", "Explanation"):
                if not isinstance(record[name], str) or not record[name].strip():
                    raise ValueError(
                        f"{place}: {name} must be a text that is not empty, got {record[name]!r}"
                    )
            prompts[number] = Prompt(
                number, record["Prompt"], record["Explanation"], str(record["Subcategory"]), stem
            )
        there = [number for number in range(first, last + 1) if number in prompts]
        if not subset and len(there) != last - first + 1:
            lacking = next(number for number in range(first, last + 1) if number not in prompts)
            raise ValueError(
                f"{path}: {len(there)} prompts, the {set} set has {last - first + 1}, ids {first} to {last}; "
                f"{lacking} is missing. --subset accepts it"
            )
    if not prompts:
        raise ValueError(f"{folder} holds none of {', '.join(_names(set))}")
    return [prompts[number] for number in sorted(prompts)]


def _set(name: str) -> Set:
    if name not in SETS:
        raise ValueError(f"set must be one of {', '.join(SETS)}, got {name!r}")
    return SETS[name]


def _names(set: str) -> list[str]:
    return [f"{stem}.json" for stem in _set(set).files]


def _records(path: Path) -> list[tuple[Any, int]]:
    """The elements of a JSON array, each with the line that it starts at."""
    text = path.read_text(encoding="utf-8-sig")
    decoder, found = json.JSONDecoder(), []
    space = re.compile(r"\s*")
    at = space.match(text).end()
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}:1: a JSON array of objects is needed")
    at = space.match(text, at + 1).end()
    while text[at : at + 1] != "]":
        line = text.count("\n", 0, at) + 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        found.append((record, line))
        at = space.match(text, at).end()
        if text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            place = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}:{place}: a comma or the array's end is missing")
    return found


def _inputs(data: str | Path, set: str) -> dict[str, str]:
    paths = [Path(data) / name for name in _names(set)]
    return {path.name: sha256(path) for path in paths if path.is_file()}


def generate(
    settings: Settings, out: str | Path, data: str | Path, set: str = "legacy", subset: bool = False
) -> Coverage:
    """Paint `out`/images/<prompt_id>.png. The seed's prompt index is the id less 1."""
    prompts = read(data, set, subset)
    items = [Item(p.id - 1, p.prompt, (f"{p.id}.png",)) for p in prompts]
    return run("wise", items, _inputs(data, set), out, 1, settings, {"set": set})


# Rules -----------------------------------------------------------------------


def parse_legacy(text: str) -> dict[str, int] | None:
    """The three grades of an answer; None where one is missing or out of range.

    A grade is the metric's name, with up to two asterisks on either side, perhaps a colon, and one digit, anywhere;
    the last counts. Where no name is found: the first three lines that are a lone 0, 1 or 2, in order.
    """
    found = {}
    for grade in GRADES:
        digits = re.findall(rf"{grade.replace('_', ' ')}\*{{0,2}}\s*:?\s*(\d)", text, re.IGNORECASE)
        if digits:
            found[grade] = int(digits[-1])
    if not found:
        lone = [line.strip() for line in text.splitlines() if line.strip() in ("0", "1", "2")]
        found = {grade: int(digit) for grade, digit in zip(GRADES, lone, strict=False)}
    return found if len(found) == 3 and all(value <= 2 for value in found.values()) else None


def parse_verified(text: str) -> dict[str, int] | None:
    """The score, 0 or 1; None where there is none. What is thought aloud does not count."""
    from .judges import strip_thinking

    text = strip_thinking(text)
    found = re.findall(r"score\*{0,2}\s*:?\s*\*{0,2}\s*([01])(?!\w|\.\d)", text, re.IGNORECASE)
    if not found:
        found = [line.strip() for line in text.splitlines() if line.strip() in ("0", "1")]
        found = found if len(found) == 1 else []
    return {"score": int(found[-1])} if found else None


def wiscore(consistency: float, realism: float, aesthetic_quality: float) -> float:
    """Of one image, 0 to 1. ValueError for a grade outside 0 to 2, such as TorchUMM's 9.9 for a failed judgement."""
    grades = (consistency, realism, aesthetic_quality)
    if not all(0 <= grade <= 2 for grade in grades):
        raise ValueError(f"grades lie in [0, 2], got {grades}")
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2


def category(number: int, set: str) -> str:
    """By the id: the records' own field is another division."""
    return next(name for name, (first, last) in SETS[set].ranges.items() if first <= number <= last)


def overall(means: Mapping[str, float | None], set: str) -> float | None:
    """The weighted mean of the categories; None where one has no value."""
    if any(means.get(name) is None for name in CATEGORIES):
        return None
    return sum(weight * means[name] for name, weight in SETS[set].weights.items())


# Scoring -----------------------------------------------------------------------


def score(
    run: str | Path,
    data: str | Path,
    set: str = "legacy",
    subset: bool = False,
    images: str | Path | None = None,
    judge_model: str | Chat | None = None,
    judge_url: str | None = None,
    judge_prompt_file: str | Path | None = None,
    concurrency: int = 10,
    attempts: int = 3,
    timeout: float = 300.0,
    progress: bool = True,
    wait: float = 1.0,
) -> dict[str, Any]:
    """Have every image judged; writes judge.jsonl, the official result files and score.json into `run`.

    judge_model: the endpoint's name of it, or an object with `judges.Chat`'s methods.
    """
    from . import judges
    from .chat import OpenAIChat, judge_all

    about, folder = _set(set), RunFolder(run)
    root = folder.images if images is None else Path(images)
    prompts = read(data, set, subset)
    manifest = read_json(folder.manifest) if folder.manifest.is_file() and images is None else None
    reports.check_inputs(manifest, "wise", _inputs(data, set), folder.root)
    if manifest is not None and manifest["settings"].get("set") != set:
        raise ValueError(
            f"{folder.root} was painted from the {manifest['settings'].get('set')} set, not {set}"
        )
    there = [prompt for prompt in prompts if (root / f"{prompt.id}.png").is_file()]
    if not there:
        raise FileNotFoundError(f"no image named <prompt_id>.png in {root}")
    wording = WORDING[set]
    if judge_prompt_file is not None:
        wording = Path(judge_prompt_file).read_text(encoding="utf-8")
        if "{prompt}" not in wording or "{explanation}" not in wording:
            raise ValueError(f"{judge_prompt_file} must hold {{prompt}} and {{explanation}}")
    chat = judge_model
    if chat is None or isinstance(chat, str):
        chat = OpenAIChat(
            chat or about.judge,
            judge_url or about.url,
            max_tokens=about.max_tokens,
            timeout=timeout,
            extra=about.extra,
        )
    identity = {"judge": chat.name, "prompt_sha256": judges.prompt_hash(SYSTEM[set], wording), "set": set}
    records = judges.Records(folder.root / "judge.jsonl", "prompt_id", identity)
    questions = [_question(prompt, root, wording, SYSTEM[set]) for prompt in there]
    parse = parse_legacy if set == "legacy" else parse_verified
    try:
        failures = judge_all(chat, questions, parse, records, concurrency, attempts, progress, wait)
    finally:
        records.close()
    asked = {question.key: question.sha256 for question in questions}
    answers = {number: records.entries[number] for number in asked if records.has(number, asked[number])}
    _write_results(folder, about, [p for p in there if p.id in answers], answers, root, set)
    values = {
        number: wiscore(*(entry[grade] for grade in GRADES)) if set == "legacy" else float(entry["score"])
        for number, entry in answers.items()
    }
    by_category = {
        name: [value for number, value in values.items() if category(number, set) == name]
        for name in CATEGORIES
    }
    means = {name: float(np.mean(each)) if each else None for name, each in by_category.items()}
    of = {name: sum(category(p.id, set) == name for p in prompts) for name in CATEGORIES}
    notes = []
    if chat.name != about.judge or judge_prompt_file is None:
        notes.append(
            f"the set's own judge is {about.judge} with its authors' wording: the numbers of another judge or of "
            "another wording are not comparable"
        )
    if failures:
        some = "; ".join(f"{number}: {reason}" for number, reason in list(failures.items())[:3])
        notes.append(f"{len(failures)} images got no grade and are left out; the next run asks again. {some}")
    return reports.write_score(
        folder,
        reports.Score(
            "wise",
            headline=("WiScore" if set == "legacy" else "WISE_Verified score", overall(means, set)),
            scale=1.0,
            standard=len(prompts) == 1000,
            n_expected=len(prompts),
            n_scored=len(values),
            scores={name: (means[name], len(by_category[name]), of[name]) for name in CATEGORIES},
            judge={"model": chat.name, "prompt_sha256": identity["prompt_sha256"]},
            options={"set": set, "attempts": attempts},
            inputs=_inputs(data, set),
            manifest=manifest,
            notes=notes,
        ),
    )


def report(run: str | Path) -> list[Path]:
    folder = RunFolder(run)
    which = reports.read_score(folder)["options"]["set"]
    return reports.write_report(folder, f"{TITLE} ({which})", PUBLISHED[which])


def _question(prompt: Prompt, root: Path, wording: str, system: str):
    from .chat import Question, image_part

    path = root / f"{prompt.id}.png"
    text = wording.replace("{prompt}", prompt.prompt).replace("{explanation}", prompt.explanation)

    def messages() -> list[dict[str, Any]]:
        user = {"role": "user", "content": [{"type": "text", "text": text}, image_part(path)]}
        return [*([{"role": "system", "content": system}] if system else []), user]

    return Question(prompt.id, hashlib.sha256(f"{sha256(path)} {text}".encode()).hexdigest(), messages)


def _write_results(
    folder: RunFolder,
    about: Set,
    prompts: Sequence[Prompt],
    answers: Mapping[int, Mapping[str, Any]],
    root: Path,
    set: str,
) -> None:
    """The official result files, one pair for each data file, sorted by id."""
    names = GRADES if set == "legacy" else ("score",)
    for stem in about.files:
        own = [prompt for prompt in prompts if prompt.file == stem]
        kind = stem.removesuffix("_verified")
        full = [
            {
                "prompt_id": p.id,
                "prompt": p.prompt,
                "key": p.explanation,
                "image_path": str(root / f"{p.id}.png"),
                "evaluation": answers[p.id]["answer"],
            }
            for p in own
        ]
        folder.write_json(folder.root / about.results / f"{kind}_full_results.json", full)
        lines = [
            json.dumps(
                {"prompt_id": p.id, "Subcategory": p.subcategory} | {n: answers[p.id][n] for n in names}
            )
            for p in own
        ]
        folder.write_text(
            folder.root / about.results / f"{kind}_scores_results.jsonl",
            "".join(f"{line}\n" for line in lines),
        )
