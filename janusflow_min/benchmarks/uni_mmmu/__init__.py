# SPDX-License-Identifier: MIT
"""Uni-MMMU: six tasks in which understanding and generation should help each other.

Reads the data of Vchitect/Uni-MMMU-Eval, writes the official layout, scores it by the official rules and judges.
`readers` files to cases, `prompts` wording, `generation` the two modes, `boards` and `rules` pure scoring, `judging`
the judges, `scoring` the table. The benchmark has 14 numbers and no total, so there is no headline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import sha256
from ...options import option
from ...sampling_options import EDIT_METHODS
from .. import report as reports
from ..judges import Chat
from ..ranks import RankInfo
from ..report import Published
from ..run_folder import RunFolder
from ..runner import Coverage, Settings
from ..scoring import ChatOptions, LimitOptions, ScoringRun
from .readers import RELEASED, SOURCES, Case, data_folder, read, tasks_of
from .rules import COLUMNS, table

if TYPE_CHECKING:
    from .judging import Distance, Judging

TITLE = "Uni-MMMU"
SUMMARY = "six tasks of understanding and generation together: 880 cases, 14 numbers"
PUBLISHED = (
    Published(
        "Janus-Pro-7B, TorchUMM (no JanusFlow result is published)",
        "its README, in %, read as shares here; images from the text alone where an edit is asked for",
        {"science_reasoning": 0.293, "science_result": 0.255, "science_image": 0.0, "code_text": 0.015},
        None,
    ),
)
VL_MODEL, TEXT_MODEL = "Qwen/Qwen2.5-VL-72B-Instruct", "Qwen/Qwen3-32B"  # the official judges
JUDGED = ("code_text", "code_image", "science_text", "science_image", "math_overlay", "math_text")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    data: Path = option("the data/ folder of Vchitect/Uni-MMMU-Eval", kind=Path)
    tasks: Sequence[str] | None = option(
        f"one of {', '.join(SOURCES)}; repeat for more; without: all", None, repeat=True
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DataOptions):
    uni_mode: str = option(
        "native: what the model can do; torchumm: TorchUMM's calls, images from the text alone for an edit",
        "native",
        choices=("native", "torchumm"),
    )
    editing: str | None = option(
        "with torchumm: edit the request's first image where an edit is asked for; the model was not trained for it",
        None,
        choices=EDIT_METHODS,
    )
    max_new_tokens: int = option("longest answer", 512)
    prompts: Path | None = option(
        ".json file with other wording, by the names in uni_mmmu/prompts.py", None, kind=Path
    )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DataOptions, LimitOptions, ChatOptions):
    """vl_model, text_model: an endpoint's name of the model, or a `judges.Chat`. dreamsim: its cache folder, or a
    `judging.Distance`."""

    vl_model: str | Chat | None = option(
        f"judge that sees, officially {VL_MODEL}; without: its legs are null", None
    )
    vl_url: str | None = option("its endpoint, up to /v1", "http://localhost:8000/v1")
    text_model: str | Chat | None = option(
        f"judge of geometry's texts, officially {TEXT_MODEL}; without: null", None
    )
    text_url: str | None = option("its endpoint, up to /v1", "http://localhost:8001/v1")
    dreamsim: Path | Distance | None = option(
        "cache folder of DreamSim, for the jigsaw's images; without: null", None, kind=Path
    )
    judge_prompts: Path | None = option(
        "eval_ummmu.py of your checkout of Uni-MMMU, for the official wording; or a .json file by the names in "
        "uni_mmmu/prompts.py",
        None,
        kind=Path,
    )
    official_compat: bool = option(
        "read answers, images and judges' replies exactly as the official scorer does", False
    )
    limit: int | None = option("score only the first cases of each task", None, kind=int)
    timeout: float = option("of a request, in seconds", 600.0)


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


def generate(settings: Settings, out: str | Path, options: GenerateOptions) -> Coverage:
    """Answer and generate what is missing into `out`/TASK/CASE/; `settings.limit` counts for each task."""
    from ..runner import load_pipe, open_run
    from .generation import MODES, SEED_RULE, is_done, run_tasks, write_summaries
    from .prompts import model_wording, prompts_hash

    mode, max_new_tokens = options.uni_mode, options.max_new_tokens
    if mode not in MODES:
        raise ValueError(f"uni_mode must be one of {', '.join(MODES)}, got {mode!r}")
    if options.editing is not None and (options.editing not in EDIT_METHODS or mode != "torchumm"):
        known = ", ".join(EDIT_METHODS)
        raise ValueError(
            f"editing must be one of {known}, with uni_mode torchumm; got {options.editing!r} with {mode}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    world = RankInfo.from_environment()
    texts = model_wording(options.prompts)
    cases = _cases(options, mode)
    choices = {
        "uni_mode": mode,
        "max_new_tokens": max_new_tokens,
        "prompts_sha256": prompts_hash(texts),
        "own_wording": options.prompts is None,
    }
    if options.editing is not None:
        choices["editing"] = options.editing
    with open_run("uni_mmmu", _hashes(options.data), out, settings, choices, SEED_RULE) as folder:
        run_tasks(
            lambda: load_pipe(settings, "all"),
            folder,
            cases,
            mode,
            texts,
            settings,
            max_new_tokens,
            world,
            options.editing,
        )
    write_summaries(folder, cases)
    usable = [case for of_task in cases.values() for case in of_task if case.usable]
    missing = tuple(case.folder for case in usable if not is_done(folder, case))
    if not missing and world.size == 1:  # another rank may still be writing
        folder.tidy()
    return Coverage(len(usable), len(usable) - len(missing), missing)


def score(run: str | Path, options: ScoreOptions) -> dict[str, Any]:
    """Score what is generated; writes `eval/` and score.json into `run` and returns the score.

    A run without our manifest, of TorchUMM for instance, counts as generating all images.
    """
    from .judging import DreamSim, Judging
    from .prompts import judge_wording, prompts_hash
    from .scoring import counts, item_scores, score_task, write_table, write_task

    scoring = ScoringRun("uni_mmmu", run, options, _hashes(options.data), published=True)
    folder, manifest = scoring.folder, scoring.manifest
    mode = manifest["settings"]["uni_mode"] if manifest else "torchumm"
    cases = _cases(options, mode)
    if any(len(of_task) != RELEASED[task] for task, of_task in cases.items()) or len(cases) < len(SOURCES):
        scoring.departures.append("the data are not the published ones")
    texts = judge_wording(options.judge_prompts)
    distance = options.dreamsim
    if isinstance(distance, str | Path):
        distance = DreamSim(distance)
    judging = Judging(folder, texts, options, _judges(options), distance)
    asked = {task: of_task[: options.limit] for task, of_task in cases.items()}
    records = {
        task: score_task(task, of_task, mode == "torchumm", judging) for task, of_task in asked.items()
    }
    if options.dry_run:
        return scoring.dry_run(judging.planned)
    if not any(record["status"] == "ok" for of_task in records.values() for record in of_task):
        raise FileNotFoundError(f"{folder.root} holds no finished case of {', '.join(cases)}")
    summaries = {task: write_task(folder, task, of_task) for task, of_task in records.items()}
    values, counted = table(summaries), counts(records, cases)
    if endless := [key for key, value in values.items() if value is not None and not math.isfinite(value)]:
        values |= dict.fromkeys(endless)  # only with official_compat, and JSON has no such numbers
        scoring.notes.append(
            f"a judge's NaN or Infinity leaves no number, as officially: {', '.join(endless)}"
        )
    whole = {key: values[key] if counted[key][0] == counted[key][1] else None for key in values}
    write_table(folder, whole)
    run_legs = {key: counted[key] for key in values if values[key] is not None}
    scoring.notes += _notes(mode, manifest, judging, cases)
    return scoring.write(
        headline=("", None),
        scale=1.0,
        scores={key: (value, *counted[key]) for key, value in values.items()},
        n_expected=sum(of for _, of in run_legs.values()),
        n_scored=sum(n for n, _ in run_legs.values()),
        judge={
            "vl": _name(options.vl_model),
            "text": _name(options.text_model),
            "images": distance.name if distance else None,
        },
        items=item_scores(folder, records, cases),
        options={
            "uni_mode": mode,
            "official_compat": options.official_compat,
            "judge_wording_sha256": prompts_hash(texts),
            "judge_prompts_sha256": sha256(options.judge_prompts) if options.judge_prompts else None,
            "max_points": {key: most for key, _, most, _, _ in COLUMNS if most != 1},
        },
    )


def report(run: str | Path) -> list[Path]:
    """report.json and report.md as everywhere, and a plot in which every value is a share of its highest one."""
    folder = RunFolder(run)
    result = reports.read_score(folder)
    most = {key: value for key, _, value, _, _ in COLUMNS}
    shares = {
        (key if most[key] == 1 else f"{key} / {most[key]}"): entry
        | {"value": None if entry["value"] is None else entry["value"] / most[key]}
        for key, entry in result["scores"].items()
    }
    paths = reports.write_report(folder, TITLE, PUBLISHED)
    plot = folder.root / "report.png"
    if plot in paths:
        with folder.writing(plot) as temporary:
            reports.plot(temporary, result | {"scores": shares}, TITLE, PUBLISHED)
    return paths


def _cases(options: DataOptions, mode: str) -> dict[str, list[Case]]:
    tasks = tasks_of(options.tasks or [])
    return {task: read(options.data, task, demonstration=mode == "torchumm") for task in tasks}


def _hashes(data: str | Path) -> dict[str, str]:
    """Of what is there for any task: a run may take up further tasks later."""
    folder = data_folder(data)
    return {source: sha256(folder / source) for source in SOURCES.values() if (folder / source).exists()}


def _judges(options: ScoreOptions) -> dict[str, Chat]:
    """leg -> its judge, of the legs that have one."""
    from .judging import ANSWER_TOKENS, TEXT_LEGS

    judges = {}
    for leg in JUDGED:
        text = leg in TEXT_LEGS
        model, url = (options.text_model, options.text_url) if text else (options.vl_model, options.vl_url)
        if model is not None:
            judges[leg] = options.chat(model, url, ANSWER_TOKENS.get(leg, 512))
    return judges


def _name(judge: Any) -> str | None:
    return judge if judge is None or isinstance(judge, str) else judge.name


def _notes(
    mode: str, manifest: Mapping[str, Any] | None, judging: Judging, cases: Mapping[str, list[Case]]
) -> list[str]:
    from .judging import TEXT_LEGS
    from .prompts import OFFICIAL_SHA256, prompts_hash

    settings = (manifest or {}).get("settings", {})
    notes = ["code_shape_color and code_position are points of 5, the others shares of 1"]
    if mode == "native":
        notes.append(
            "mode native: geometry, jigsaw, maze and sliding are answered from the given images, without the visual "
            "scaffold of own images; images that need editing are not generated"
        )
    elif editing := settings.get("editing"):
        notes.append(
            f"mode torchumm, but where an edit is asked for, the first image is edited by {editing}, which the model "
            "was not trained for: not comparable with TorchUMM's numbers"
        )
    else:
        notes.append("mode torchumm: where an edit is asked for, the image is generated from the text alone")
    if settings.get("own_wording"):
        notes.append("the model was asked in our wording of the instructions, not in the official one")
    official = {leg: TEXT_MODEL if leg in TEXT_LEGS else VL_MODEL for leg in judging.chats}
    others = any(chat.name != official[leg] for leg, chat in judging.chats.items())
    if judging.chats and (others or prompts_hash(judging.texts) != OFFICIAL_SHA256):
        notes.append(
            f"the official judges are {VL_MODEL} and {TEXT_MODEL} with their authors' wording (--judge-prompts): the "
            "numbers of other judges or of another wording are not comparable"
        )
    if judging.chats and not judging.options.official_compat:
        notes.append(
            "replies are read more carefully than officially (--official-compat): see docs/benchmarks.md"
        )
    if judging.unusable:
        notes.append(
            f"{len(judging.unusable)} judgements had no usable JSON and count 0: {', '.join(judging.unusable[:3])}"
        )
    if judging.failures:
        some = "; ".join(f"{key}: {reason}" for key, reason in list(judging.failures.items())[:3])
        notes.append(
            f"{len(judging.failures)} could not be read or got no judgement; the next run asks again. {some}"
        )
    for task, of_task in cases.items():
        if len(of_task) != RELEASED[task]:
            notes.append(f"{task} has {len(of_task)} cases here; {RELEASED[task]} are said to be released")
    return notes
