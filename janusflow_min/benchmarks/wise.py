# SPDX-License-Identifier: MIT
"""WISE: does an image show what the prompt only implies, by knowledge of culture, time, space and science?

Reads the JSON files of one of two data sets (`wise_sets`), writes `<prompt_id>.png`, and has a chat endpoint judge.
Formats, ranges, formulas and parsing follow PKU-YuanGroup/WISE (`WISE_legacy/gpt_eval.py`, `Calculate.py`;
`vllm_eval.py`, `calculate_verified.py`). The judge's wording here is our own, after its structure; --judge-prompts
takes the official one out of your checkout. Wording moves the numbers, so its hash is stored.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import parse_json, sha256
from ..options import SubsetOptions, option
from . import report as reports
from .bootstrap import ItemScore
from .chat import Question, image_part, judge_settings
from .judges import Chat, Records, prompt_hash, strip_thinking
from .official_prompts import check_placeholders, fill, read_prompts
from .reading import text_sha256
from .run_folder import RunFolder
from .runner import Coverage, Item, Settings, run
from .scoring import ChatOptions, ScoringRun, means
from .scoring import ScoreOptions as CommonOptions
from .wise_sets import CATEGORIES, DATASETS, GRADES, PUBLISHED, WORDING, Dataset

TITLE = "WISE"
SUMMARY = "world knowledge: 1,000 prompts, 1 image each, graded by a chat model"
FIELDS = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")
PLACES = {  # of the judge's texts, in either official script
    "system": "build_evaluation_messages.0.content.0.text",
    "user": "build_evaluation_messages.1.content.0.text",
}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SubsetOptions):
    data: Path = option("folder of the data set's JSON files: WISE_legacy/data or data_verified", kind=Path)
    dataset: str = option("which of the two data sets", "legacy", choices=tuple(DATASETS))


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(GenerateOptions, ChatOptions, CommonOptions):
    judge_model: str | Chat | None = option(
        "name of the chat model (default: the data set's own judge)", None
    )
    judge_url: str | None = option(
        "its endpoint, up to /v1 (default: OpenAI's for legacy, a local vLLM's for verified)", None
    )
    judge_prompts: Path | None = option(
        "WISE_legacy/gpt_eval.py or vllm_eval.py of your checkout, for the official wording; or a .json file with "
        "system and user, the latter with {Prompt} and {Explanation} in it",
        None,
        kind=Path,
    )
    official_compat: bool = option("read answers exactly as the official scorer does", False)


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


# Reading -----------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    id: int
    prompt: str
    explanation: str
    subcategory: str
    file: str  # stem of its file


def read(data: str | Path, dataset: str = "legacy", subset: bool = False) -> list[Prompt]:
    """The data set's prompts by id. ValueError with file and place for what does not fit."""
    folder, prompts = Path(data), {}
    about = _dataset(dataset)
    names = ", ".join(f"{stem}.json" for stem in about.files)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data must be a folder with {names}; {folder} is not a folder")
    for stem, (first, last) in about.files.items():
        path = folder / f"{stem}.json"
        if not path.is_file():
            if subset:
                continue
            raise FileNotFoundError(f"{path} is missing; the {dataset} data set is {names}")
        records = parse_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: a JSON array of objects is needed, got {type(records).__name__}")
        for i, record in enumerate(records):
            prompt = _prompt(record, f"{path}[{i}]", first, last, stem)
            if prompt.id in prompts:
                raise ValueError(f"{path}[{i}]: prompt_id {prompt.id} is there already")
            prompts[prompt.id] = prompt
        lacking = [number for number in range(first, last + 1) if number not in prompts]
        if lacking and not subset:
            whole = last - first + 1
            raise ValueError(
                f"{path}: {whole - len(lacking)} prompts, the {dataset} data set has {whole}, ids {first} to "
                f"{last}; {lacking[0]} is missing. --subset accepts it"
            )
    if not prompts:
        raise ValueError(f"{folder} holds none of {names}")
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


def _files(data: str | Path, dataset: str) -> list[Path]:
    paths = [Path(data) / f"{stem}.json" for stem in _dataset(dataset).files]
    return [path for path in paths if path.is_file()]


def _inputs(data: str | Path, dataset: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in _files(data, dataset)}


def is_published(data: str | Path, dataset: str) -> bool:
    """Whether the files are the published ones, word for word."""
    return [text_sha256(path) for path in _files(data, dataset)] == list(_dataset(dataset).files_sha256)


def generate(settings: Settings, out: str | Path, options: GenerateOptions) -> Coverage:
    """Make `out`/images/<prompt_id>.png. The seed's prompt index is the id less 1."""
    prompts = read(options.data, options.dataset, options.subset)
    items = [Item(p.id - 1, p.prompt, (f"{p.id}.png",)) for p in prompts]
    inputs = _inputs(options.data, options.dataset)
    return run("wise", items, inputs, out, 1, settings, {"dataset": options.dataset})


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
    values = [value for name in CATEGORIES if (value := means.get(name)) is not None]
    if len(values) < len(CATEGORIES):
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


def score(run: str | Path, options: ScoreOptions) -> dict[str, Any]:
    """Have every image judged; writes judge.jsonl, the official result files and score.json into `run`."""
    dataset, compat = options.dataset, options.official_compat
    about = _dataset(dataset)
    prompts = read(options.data, dataset, options.subset)[: options.limit]
    texts = read_wording(options.judge_prompts, dataset)
    published = is_published(options.data, dataset)
    scoring = ScoringRun("wise", run, options, _inputs(options.data, dataset), published)
    generated = scoring.manifest and scoring.manifest["settings"].get("dataset")
    if generated not in (None, dataset):
        raise ValueError(f"{scoring.folder.root} was made from the {generated} data set, not {dataset}")
    there = set(scoring.whole([f"{p.id}.png" for p in prompts], "<prompt_id>.png"))
    model, url = options.judge_model or about.judge, options.judge_url or about.url
    judge = options.chat(model, url, about.max_tokens, about.extra)
    questions = [_question(p, scoring.images, texts) for p in prompts if f"{p.id}.png" in there]
    parse = functools.partial(parse_legacy if dataset == "legacy" else parse_verified, official_compat=compat)
    wording, settings = wording_sha256(texts), judge_settings(judge)
    identity = {"judge": judge.name, "prompt_sha256": wording, "dataset": dataset, "settings": settings}
    with closing(Records(scoring.folder.root / "judge.jsonl", "prompt_id", identity)) as records:
        for number, entry in list(records.entries.items()):  # read by the rules of the other mode, perhaps
            if parse(entry["answer"]) is None:
                del records.entries[number]
        if options.dry_run:
            return scoring.dry_run(records.todo(questions))
        scoring.failures |= options.ask(judge, questions, parse, records, options.progress)
    answers = {q.key: records.entries[q.key]["answer"] for q in questions if records.has(q.key, q.sha256)}
    judged = [(p, answers[p.id], parse(answers[p.id]) or {}) for p in prompts if p.id in answers]
    _write_results(scoring, about, judged)
    items = []
    for p, answer, grades in judged:
        value = float(grades["score"]) if dataset == "verified" else wiscore(**grades, official_compat=compat)
        image = str(scoring.images / f"{p.id}.png")
        items.append(ItemScore(str(p.id), {category(p.id, dataset): (value, 1)}, p.prompt, [image], answer))
    expected = Counter(category(p.id, dataset) for p in prompts)
    scores = means(items, {name: expected[name] for name in CATEGORIES})
    if (judge.name, wording) != (about.judge, about.wording_sha256):
        scoring.notes.append(
            f"the data set's own judge is {about.judge} with its authors' wording (--judge-prompts): the numbers of "
            "another judge or of another wording are not comparable"
        )
    title = "WiScore" if dataset == "legacy" else "WISE_Verified score"
    path = options.judge_prompts
    script = None if path is None else sha256(path)
    return scoring.write(
        headline=(title, overall({name: value for name, (value, _, _) in scores.items()}, dataset)),
        scale=1.0,
        scores=scores,
        n_expected=len(prompts),
        n_scored=len(items),
        judge={"model": judge.name, "prompt_sha256": wording} | settings,
        items=items,
        totals={title: dict(zip(CATEGORIES, about.weights, strict=True))},
        options={"dataset": dataset, "official_compat": compat, "judge_prompts_sha256": script},
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


def _question(prompt: Prompt, images: Path, texts: Mapping[str, str]) -> Question:
    path = images / f"{prompt.id}.png"
    text = fill(texts["user"], Prompt=prompt.prompt, Explanation=prompt.explanation)
    seen = hashlib.sha256(f"{sha256(path)} {text}".encode()).hexdigest()
    make = functools.partial(messages, texts, prompt.prompt, prompt.explanation, path)
    return Question(prompt.id, seen, make)


def _write_results(
    scoring: ScoringRun, about: Dataset, judged: Sequence[tuple[Prompt, str, Mapping[str, int]]]
) -> None:
    """The official result files, one pair for each data file, sorted by id."""
    for stem in about.files:
        full, lines = [], []
        for p, answer, grades in judged:
            if p.file == stem:
                path = str(scoring.images / f"{p.id}.png")
                about_it = {"prompt_id": p.id, "prompt": p.prompt, "key": p.explanation}
                full.append(about_it | {"image_path": path, "evaluation": answer})
                lines.append({"prompt_id": p.id, "Subcategory": p.subcategory} | dict(grades))
        name = f"{about.results}/{stem.removesuffix('_verified')}"
        scoring.folder.write_json(f"{name}_full_results.json", full)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        scoring.folder.write_text(f"{name}_scores_results.jsonl", text)
