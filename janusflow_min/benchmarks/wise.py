# SPDX-License-Identifier: MIT
"""WISE: does an image show what the prompt only implies, by knowledge of culture, time, space and science?

Two data sets that must never be mixed, for the same id is another prompt in each: `legacy`, which every published
JanusFlow number used (GPT-4o, three grades), and `verified` (a Qwen judge, right or wrong). Reads their JSON files,
writes `<prompt_id>.png`, and has a chat endpoint judge. Formats, ranges, formulas and parsing follow
PKU-YuanGroup/WISE (`WISE_legacy/gpt_eval.py`, `Calculate.py`; `vllm_eval.py`, `calculate_verified.py`). The judge's
wording here is our own, after its structure; --judge-prompts takes the official one out of your checkout. Wording
moves the numbers, so its hash is stored.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report as reports
from .chat import OpenAIChat, Question, image_part, judge_all
from .judges import Chat, Records, prompt_hash, strip_thinking
from .official_prompts import check_placeholders, fill, read_prompts
from .reading import read_image, read_text, text_sha256
from .report import Published
from .runner import Coverage, Item, Option, RunFolder, Settings, read_json, run, sha256

TITLE = "WISE"
SUMMARY = "world knowledge: 1,000 prompts, 1 image each, graded by a chat model"
FIELDS = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")
CATEGORIES = ("cultural", "time", "space", "biology", "physics", "chemistry")


@dataclass(frozen=True)
class Dataset:
    """One of the two data sets with its judge and formula."""

    files: Mapping[str, tuple[int, int]]  # stem -> first and last id
    files_sha256: Sequence[str]  # of the published ones, by `text_sha256`
    wording_sha256: str  # of the official system message and question, by `prompt_hash`
    last_ids: Sequence[int]  # of each category
    weights: Sequence[float]
    judge: str
    url: str | None
    max_tokens: int
    results: str  # folder of the result files
    extra: Mapping[str, Any]  # further fields of the request


DATASETS = {
    "legacy": Dataset(
        files={
            "cultural_common_sense": (1, 400),
            "spatio-temporal_reasoning": (401, 700),
            "natural_science": (701, 1000),
        },
        files_sha256=(
            "7a59216c768698280cea37caa574b52f3faf054d73b398b9bb6b3161baf8e3aa",
            "e27d797885ad86e64d857d0cc93d33e04be572a8dcae95692a2c7e7876233f9a",
            "b262fae58e413c7a4bd3c3d5a089f8c6529feac227e4b6606be261a949035544",
        ),
        wording_sha256="b14eef22928c4c2c2c5020236b4bea468ec7c371ef95b9d894074e81f56b13db",
        last_ids=(400, 567, 700, 800, 900, 1000),
        weights=(0.4, 0.167, 0.133, 0.1, 0.1, 0.1),
        judge="gpt-4o-2024-05-13",
        url=None,
        max_tokens=2000,
        results="Results",
        extra={},
    ),
    "verified": Dataset(
        files={
            "cultural_common_sense_verified": (1, 400),
            "spatio-temporal_reasoning_verified": (401, 640),
            "natural_science_verified": (641, 1000),
        },
        files_sha256=(
            "23482925266e2784b2ba24b75239fdc6691bf85ae253d2c4aa38b71b45fefa89",
            "42c0b9d829365e392c2d4af283850dc76b1f922ab0c79198366de4f306eaf2b6",
            "6f346c336f16f611e5c73e0fcacdccb336c200d534cf111526b22d50ea912555",
        ),
        wording_sha256="5afe1472e449c208de5b8f7654b25b8f47a259d0e2376b05a986a08873bd5200",
        last_ids=(400, 520, 640, 760, 880, 1000),
        weights=(0.4, 0.12, 0.12, 0.12, 0.12, 0.12),
        judge="Qwen3.5-35B-A3B",
        url="http://127.0.0.1:8000/v1",
        max_tokens=500,
        results="Results-qwen35",
        extra={"chat_template_kwargs": {"enable_thinking": False}},
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
WORDING = {  # our own, see --judge-prompts for the official one
    "legacy": {
        "system": "You audit generated images. You are strict, impartial, and you follow the output format to the "
        "letter.",
        "user": """Grade one generated image. Answer with three grades and nothing else.

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

PROMPT: "{Prompt}"
EXPLANATION: "{Explanation}"
""",
    },
    "verified": {
        "system": "",
        "user": """This benchmark asks whether an image generator has knowledge of the world. Judge the knowledge that
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

PROMPT: "{Prompt}"
EXPLANATION: "{Explanation}"
""",
    },
}
PLACES = {  # of the judge's texts, in either official script
    "system": "build_evaluation_messages.0.content.0.text",
    "user": "build_evaluation_messages.1.content.0.text",
}
DATASET = Option("--dataset", "which of the two data sets", "legacy", choices=tuple(DATASETS))
SUBSET = Option(
    "--subset", "accept another number of prompts than the benchmark's; no headline then", False, bool
)
DATA = Option(
    "--data",
    "folder of the data set's JSON files: WISE_legacy/data or data_verified",
    kind=Path,
    required=True,
)
OPTIONS = {
    "generate": (DATA, DATASET, SUBSET),
    "score": (
        DATA,
        DATASET,
        SUBSET,
        Option("--images", "folder of images made elsewhere, instead of the run's", kind=Path),
        Option("--judge-model", "name of the chat model; without: the data set's own judge"),
        Option(
            "--judge-url",
            "its endpoint, up to /v1; without: OpenAI's for legacy, a local vLLM's for verified",
        ),
        Option(
            "--judge-prompts",
            "WISE_legacy/gpt_eval.py or vllm_eval.py of your checkout, for the official wording; or a .json file "
            "with system and user, the latter with {Prompt} and {Explanation} in it",
            kind=Path,
        ),
        Option("--concurrency", "requests at once", 10, int),
        Option("--attempts", "for each image, answers that make no sense counted", 3, int),
        Option("--stop-after", "images in a row without a grade, then give up on the judge", 10, int),
        Option("--timeout", "of a request, in seconds", 300.0, float),
        Option("--official-compat", "read answers exactly as the official scorer does", False, bool),
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


def read(data: str | Path, dataset: str = "legacy", subset: bool = False) -> list[Prompt]:
    """The data set's prompts by id. ValueError with file and line for what does not fit."""
    folder, prompts = Path(data), {}
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data must be a folder with {', '.join(_names(dataset))}; {folder} is not a folder"
        )
    for stem, (first, last) in _dataset(dataset).files.items():
        path = folder / f"{stem}.json"
        if not path.is_file():
            if subset:
                continue
            raise FileNotFoundError(
                f"{path} is missing; the {dataset} data set is {', '.join(_names(dataset))}"
            )
        for record, line in _records(path):
            prompt = _prompt(record, f"{path}:{line}", first, last, stem)
            if prompt.id in prompts:
                raise ValueError(f"{path}:{line}: prompt_id {prompt.id} is there already")
            prompts[prompt.id] = prompt
        lacking = [number for number in range(first, last + 1) if number not in prompts]
        if lacking and not subset:
            whole = last - first + 1
            raise ValueError(
                f"{path}: {whole - len(lacking)} prompts, the {dataset} data set has {whole}, ids {first} to "
                f"{last}; {lacking[0]} is missing. --subset accepts it"
            )
    if not prompts:
        raise ValueError(f"{folder} holds none of {', '.join(_names(dataset))}")
    return [prompts[number] for number in sorted(prompts)]


def _prompt(record: Any, place: str, first: int, last: int, stem: str) -> Prompt:
    if not isinstance(record, dict) or sorted(record) != sorted(FIELDS):
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: an object with exactly {', '.join(FIELDS)} is needed, got {got}")
    number = record["prompt_id"]
    if isinstance(number, bool) or not isinstance(number, int) or not first <= number <= last:
        raise ValueError(f"{place}: prompt_id must be a whole number from {first} to {last}, got {number!r}")
    for name in ("Prompt", "Explanation"):
        if not isinstance(record[name], str) or not record[name].strip():
            raise ValueError(f"{place}: {name} must be a text that is not empty, got {record[name]!r}")
    return Prompt(number, record["Prompt"], record["Explanation"], str(record["Subcategory"]), stem)


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]


def _names(dataset: str) -> list[str]:
    return [f"{stem}.json" for stem in _dataset(dataset).files]


def _records(path: Path) -> list[tuple[Any, int]]:
    """The elements of a JSON array, each with the line that it starts at."""
    text = read_text(path)
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
        except RecursionError:
            raise ValueError(f"{path}:{line}: not JSON: too deeply nested") from None
        found.append((record, line))
        at = space.match(text, at).end()
        if text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            place = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}:{place}: a comma or the array's end is missing")
    return found


def _inputs(data: str | Path, dataset: str) -> dict[str, str]:
    paths = [Path(data) / name for name in _names(dataset)]
    return {path.name: sha256(path) for path in paths if path.is_file()}


def is_published(data: str | Path, dataset: str) -> bool:
    """Whether the files are the published ones, word for word."""
    paths = [Path(data) / name for name in _names(dataset)]
    expected = _dataset(dataset).files_sha256
    return all(p.is_file() for p in paths) and [text_sha256(p) for p in paths] == list(expected)


def generate(
    settings: Settings, out: str | Path, data: str | Path, dataset: str = "legacy", subset: bool = False
) -> Coverage:
    """Make `out`/images/<prompt_id>.png. The seed's prompt index is the id less 1."""
    prompts = read(data, dataset, subset)
    items = [Item(p.id - 1, p.prompt, (f"{p.id}.png",)) for p in prompts]
    return run("wise", items, _inputs(data, dataset), out, 1, settings, {"dataset": dataset})


# Rules -----------------------------------------------------------------------

NO_MORE = r"(?!\w|\.\d)"  # behind a digit: it is not the beginning of 10 or 0.5


def parse_legacy(text: str, official_compat: bool = False) -> dict[str, int] | None:
    """The three grades, 0 to 2, of an answer; None where one is missing or out of range.

    A grade is the metric's name, perhaps in asterisks, perhaps a colon, and one digit, anywhere; the last counts.
    Where no name is found: the first three lines that are a lone 0, 1 or 2, in order. official_compat: thinking aloud
    counts as well, "**Realism:** 1" is not found, of 10 and 0.5 the first digit counts, and so do grades up to 9.
    """
    if not official_compat:
        text = strip_thinking(text)
    value = r":?\s*(\d)" if official_compat else rf"[:：]?\s*\*{{0,2}}\s*(\d){NO_MORE}"
    found: dict[str, int] = {}
    for grade in GRADES:
        name = grade.replace("_", " ")
        digits = re.findall(rf"{name}\*{{0,2}}\s*{value}", text, re.IGNORECASE)
        if digits:
            found[grade] = int(digits[-1])
    if not found:
        found = {grade: int(digit) for grade, digit in zip(GRADES, _lone("[0-2]", text), strict=False)}
    usable = len(found) == 3 and (official_compat or max(found.values()) <= 2)
    return found if usable else None


def parse_verified(text: str, official_compat: bool = False) -> dict[str, int] | None:
    """The score, 0 or 1, that an answer gives first; None where there is none. Thinking aloud does not count.

    official_compat: what was thought counts unless a whole <think>…</think> encloses it, "**Score:** 1" is not found,
    and of 0.5 the first digit counts.
    """
    if official_compat:
        text = re.sub(r"</think>\s*", "", re.sub(r"(?s)<think>.*?</think>\s*", "", text))
        pattern = r"score\*{0,2}\s*:?\s*([01])\b"
    else:
        text = strip_thinking(text)
        pattern = rf"score\*{{0,2}}\s*[:：]?\s*\*{{0,2}}\s*([01]){NO_MORE}"
    found = re.search(pattern, text, re.IGNORECASE)
    lone = _lone("[01]", text)
    if found or len(lone) == 1:
        return {"score": int(found[1] if found else lone[0])}
    return None


def _lone(digit: str, text: str) -> list[str]:
    """The lines that are one digit and nothing else."""
    return re.findall(rf"^\s*({digit})\s*$", text, re.MULTILINE)


def wiscore(
    consistency: float, realism: float, aesthetic_quality: float, official_compat: bool = False
) -> float:
    """Of one image, 0 to 1. ValueError for a grade outside 0 to 2, such as TorchUMM's 9.9 for a failed judgement.

    official_compat: every digit is a grade.
    """
    grades, best = (consistency, realism, aesthetic_quality), 9 if official_compat else 2
    if not all(0 <= grade <= best for grade in grades):
        raise ValueError(f"grades lie in [0, {best}], got {grades}")
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2


def category(number: int, dataset: str) -> str:
    """By the id: the records' own field is another division."""
    return CATEGORIES[bisect.bisect_left(DATASETS[dataset].last_ids, number)]


def overall(means: Mapping[str, float | None], dataset: str) -> float | None:
    """The weighted mean of the categories; None where one has no value."""
    values = [means.get(name) for name in CATEGORIES]
    if None in values:
        return None
    return sum(weight * value for weight, value in zip(DATASETS[dataset].weights, values, strict=True))


# Scoring -----------------------------------------------------------------------


def wording_sha256(texts: Mapping[str, str]) -> str:
    return prompt_hash(texts["system"], texts["user"])


def read_wording(path: str | Path | None, dataset: str) -> dict[str, str]:
    """{"system", "user"}: our own, with what `path`, an official script or JSON, has in their place."""
    texts = WORDING[dataset] | ({} if path is None else read_prompts(path, PLACES))
    check_placeholders(texts["user"], ("Prompt", "Explanation"), f"{path}: user")
    return texts


def score(
    run: str | Path,
    data: str | Path,
    dataset: str = "legacy",
    subset: bool = False,
    images: str | Path | None = None,
    judge_model: str | Chat | None = None,
    judge_url: str | None = None,
    judge_prompts: str | Path | None = None,
    concurrency: int = 10,
    attempts: int = 3,
    stop_after: int = 10,
    timeout: float = 300.0,
    official_compat: bool = False,
    progress: bool = True,
    wait: float = 1.0,
) -> dict[str, Any]:
    """Have every image judged; writes judge.jsonl, the official result files and score.json into `run`.

    judge_model: the endpoint's name of it, or an object with `judges.Chat`'s methods.
    """
    about, folder = _dataset(dataset), RunFolder(run)
    root = folder.images if images is None else Path(images)
    prompts, texts = read(data, dataset, subset), read_wording(judge_prompts, dataset)
    manifest = read_json(folder.manifest) if folder.manifest.is_file() and images is None else None
    inputs = _inputs(data, dataset)
    reports.check_inputs(manifest, "wise", inputs, folder.root)
    if manifest is not None and manifest["settings"].get("dataset") != dataset:
        raise ValueError(
            f"{folder.root} was made from the {manifest['settings'].get('dataset')} data set, not {dataset}"
        )
    there = [prompt for prompt in prompts if (root / f"{prompt.id}.png").is_file()]
    if not there:
        raise FileNotFoundError(f"no image named <prompt_id>.png in {root}")
    chat = judge_model
    if chat is None or isinstance(chat, str):
        chat = OpenAIChat(
            chat or about.judge,
            judge_url or about.url,
            max_tokens=about.max_tokens,
            timeout=timeout,
            extra=about.extra,
        )
    wording = wording_sha256(texts)
    identity = {"judge": chat.name, "prompt_sha256": wording, "dataset": dataset}
    parse = functools.partial(
        parse_legacy if dataset == "legacy" else parse_verified, official_compat=official_compat
    )
    records = Records(folder.root / "judge.jsonl", "prompt_id", identity)
    questions, failures = _questions(there, root, texts)
    for number, entry in list(records.entries.items()):  # read by the rules of the other mode, perhaps
        if parse(entry["answer"]) is None:
            del records.entries[number]
    try:
        failures |= judge_all(
            chat, questions, parse, records, concurrency, attempts, progress, wait, stop_after
        )
    finally:
        records.close()
    answers = {
        q.key: records.entries[q.key] | parse(records.entries[q.key]["answer"])
        for q in questions
        if records.has(q.key, q.sha256)
    }
    _write_results(folder, about, [p for p in there if p.id in answers], answers, root)
    values = {
        number: float(entry["score"])
        if dataset == "verified"
        else wiscore(*(entry[grade] for grade in GRADES), official_compat=official_compat)
        for number, entry in answers.items()
    }
    scores = {}
    for name in CATEGORIES:
        own = [value for number, value in values.items() if category(number, dataset) == name]
        expected = sum(category(p.id, dataset) == name for p in prompts)
        scores[name] = (sum(own) / len(own) if own else None, len(own), expected)
    notes = []
    if (chat.name, wording) != (about.judge, about.wording_sha256):
        notes.append(
            f"the data set's own judge is {about.judge} with its authors' wording (--judge-prompts): the numbers of "
            "another judge or of another wording are not comparable"
        )
    if failures:
        some = "; ".join(f"{number}: {reason}" for number, reason in list(failures.items())[:3])
        notes.append(f"{len(failures)} images got no grade and are left out; the next run asks again. {some}")
    return reports.write_score(
        folder,
        reports.Score(
            "wise",
            headline=(
                "WiScore" if dataset == "legacy" else "WISE_Verified score",
                overall({name: value for name, (value, _, _) in scores.items()}, dataset),
            ),
            scale=1.0,
            standard=is_published(data, dataset),
            n_expected=len(prompts),
            n_scored=len(values),
            scores=scores,
            judge={"model": chat.name, "prompt_sha256": wording},
            options={
                "dataset": dataset,
                "attempts": attempts,
                "official_compat": official_compat,
                "judge_prompts_sha256": None if judge_prompts is None else sha256(judge_prompts),
            },
            inputs=inputs,
            manifest=manifest,
            notes=notes,
        ),
    )


def report(run: str | Path) -> list[Path]:
    folder = RunFolder(run)
    dataset = reports.read_score(folder)["options"]["dataset"]
    return reports.write_report(folder, f"{TITLE} ({dataset})", PUBLISHED[dataset])


def messages(
    texts: Mapping[str, str], prompt: str, explanation: str, image: str | Path
) -> list[dict[str, Any]]:
    """What the judge is sent about an image file; an empty system message is left out."""
    question = {"type": "text", "text": fill(texts["user"], Prompt=prompt, Explanation=explanation)}
    user = {"role": "user", "content": [question, image_part(image)]}
    if not texts["system"]:
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": texts["system"]}]}, user]


def _questions(
    prompts: Sequence[Prompt], root: Path, texts: Mapping[str, str]
) -> tuple[list[Question], dict[int, str]]:
    """One for each image that can be read, and for the others the reason: id -> why not."""
    questions, unreadable = [], {}
    for p in prompts:
        path = root / f"{p.id}.png"
        try:
            read_image(path)
        except ValueError as error:
            unreadable[p.id] = str(error)
            continue
        text = fill(texts["user"], Prompt=p.prompt, Explanation=p.explanation)
        seen = hashlib.sha256(f"{sha256(path)} {text}".encode()).hexdigest()
        make = functools.partial(messages, texts, p.prompt, p.explanation, path)
        questions.append(Question(p.id, seen, make))
    return questions, unreadable


def _write_results(
    folder: RunFolder,
    about: Dataset,
    prompts: Sequence[Prompt],
    answers: Mapping[int, Mapping[str, Any]],
    root: Path,
) -> None:
    """The official result files, one pair for each data file, sorted by id."""
    for stem in about.files:
        own = [prompt for prompt in prompts if prompt.file == stem]
        name = f"{about.results}/{stem.removesuffix('_verified')}"
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
        folder.write_json(folder.root / f"{name}_full_results.json", full)
        lines = [
            {"prompt_id": p.id, "Subcategory": p.subcategory}
            | {key: answers[p.id][key] for key in (*GRADES, "score") if key in answers[p.id]}
            for p in own
        ]
        folder.write_text(
            folder.root / f"{name}_scores_results.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
        )
