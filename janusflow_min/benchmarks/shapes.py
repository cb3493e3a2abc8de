# SPDX-License-Identifier: MIT
"""The default model's world as a benchmark that runs anywhere: combinations that training never saw.

Prompts: `cases` for each of the six families, every one from a scene that the family's held-out rule keeps from
training; the images are judged by `shapes.judge`, which knows nothing of the model. Questions: `cases` for each of
the six kinds, about true renders of held-out scenes. Edits: `cases` for each of the five kinds of `shapes.edits`, of
true renders of held-out scenes with two objects. Each case has a generator of its own, made of family or kind, number
and seed, so batches and order change nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from .. import checks
from ..files import parse_json
from ..options import finite, option
from ..sampling_options import EDIT_METHODS, SHARED_OPTIONS
from . import report as reports
from .bootstrap import ItemScore
from .ranks import RankInfo, shard
from .reading import read_image
from .run_folder import RunFolder, is_whole
from .runner import Coverage, Item, Settings, blocks, generate_images, image_seed, load_pipe, open_run
from .scoring import ScoreOptions as CommonOptions
from .scoring import ScoringRun, means

if TYPE_CHECKING:
    from ..shapes.captions import QA, Grammar
    from ..shapes.edits import EditCase
    from ..worlds import World

TITLE = "Shapes"
SUMMARY = "the default's world: held-out prompts, questions and edits, no data needed"
ANSWER_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    cases: int = option("prompts for each of six families, questions of six kinds, edits of five", 100)
    draw_seed: int = option("from which prompts, questions and edits are drawn", 0)
    edits: bool = option("edit as well", True)
    edit_method: str = option("of the edits", "flowedit", choices=EDIT_METHODS)
    edit_strength: float = option("of the edits, in (0, 1]", 0.8, kind=finite(0, 1, above=True))


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CommonOptions):
    at_least: float | None = option("fail where a smaller share of the images is right", None, kind=float)
    answers_at_least: float | None = option(
        "fail where a smaller share of the answers is right", None, kind=float
    )


OPTIONS = {"generate": GenerateOptions, "score": ScoreOptions}


def prompts(cases: int, seed: int = 0, world: World | None = None) -> list[tuple[str, str]]:
    """(family, prompt), `cases` for each family; of the world of shapes, or another."""
    from ..worlds import SHAPES, scenes

    world, drawn = world or SHAPES, []
    for family in scenes.FAMILIES:
        for i in range(cases):
            rng = random.Random(f"prompt {family} {i} {seed}")
            scene = world.sample_scene(rng, family, "held_out")
            drawn.append((family, world.caption(scene, family, rng, "plain")))
    return drawn


def questions(cases: int, seed: int = 0, world: World | None = None) -> list[tuple[QA, Image.Image]]:
    """A question and the image it is about, `cases` for each kind, families in turn where they have such a one."""
    from ..worlds import SHAPES, scenes

    world, drawn = world or SHAPES, []
    for kind in world.grammar.kinds:
        for i in range(cases):
            rng = random.Random(f"question {kind} {i} {seed}")
            while True:
                scene = world.sample_scene(rng, rng.choice(scenes.FAMILIES), "held_out")
                fitting = [qa for qa in world.questions(scene, rng) if qa.kind == kind]
                if fitting:
                    break
            image = scenes.to_pil(world.render(world.pack([scene]))[0])
            drawn.append((rng.choice(fitting), image))
    return drawn


def edits(cases: int, seed: int = 0) -> list[EditCase]:
    """`cases` for each kind."""
    from ..shapes.edits import EDIT_KINDS, edit_case

    return [edit_case(kind, i, seed) for kind in EDIT_KINDS for i in range(cases)]


def generate(settings: Settings, out: str | Path, options: GenerateOptions = GenerateOptions()) -> Coverage:
    """Generate `out`/images/NNNNN.png, answer into `out`/answers/NNNNN.json, a block of questions each, and edit into
    `out`/edits/NNNNN.png, with the original beside each, NNNNN-source.png."""
    cases, draw_seed = options.cases, options.draw_seed
    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    captioned, asked = prompts(cases, draw_seed), questions(cases, draw_seed)
    drawn = json.dumps([captioned, [(qa.kind, qa.question, qa.answer) for qa, _ in asked]])
    inputs = {"drawn": hashlib.sha256(drawn.encode()).hexdigest()}
    choices: dict[str, Any] = {"images_per_prompt": 1, "cases": cases, "draw_seed": draw_seed}
    to_edit = edits(cases, draw_seed) if options.edits else []
    if options.edits:
        checks.one_of("edit_method", options.edit_method, EDIT_METHODS)
        drawn = json.dumps([(case.source_prompt, case.prompt) for case in to_edit])
        inputs["edits"] = hashlib.sha256(drawn.encode()).hexdigest()
        choices["edit_method"] = options.edit_method
        choices["edit_strength"] = checks.number("edit_strength", options.edit_strength, 0, 1, above=True)
    items = [Item(i, prompt, (f"{i:05d}.png",)) for i, (_, prompt) in enumerate(captioned)]
    pipe = functools.cache(lambda: load_pipe(settings, "all"))
    with open_run("shapes", inputs, out, settings, choices) as folder:
        found = generate_images(pipe, folder, items, 1, settings)
        world = RankInfo.from_environment()
        _answer(pipe, folder, asked, settings, world)
        _edit(pipe, folder, to_edit, options, settings, world)
    return found


def read_answers(path: Path, count: int) -> list[str] | None:
    """The `count` answers that a file holds, None where there is none. ValueError for anything else in it."""
    if not path.exists():
        return None
    answers = parse_json(path)
    if (
        not isinstance(answers, list)
        or len(answers) != count
        or not all(isinstance(answer, str) for answer in answers)
    ):
        raise ValueError(f"{path} must hold a list of {count} answers")
    return answers


def _answer(
    pipe: Callable[[], Any], folder: RunFolder, questions: Sequence, settings: Settings, world: RankInfo
) -> None:
    share = shard(list(enumerate(blocks(questions, 1, settings.batch_size))), world.rank, world.size)
    hidden = not settings.progress or world.local_rank != 0
    for i, block in tqdm(share, desc="Answering", unit="batch", disable=hidden):
        path = folder.root / "answers" / f"{i:05d}.json"
        if settings.limit is not None and i * settings.batch_size >= settings.limit:
            continue
        with suppress(ValueError):  # a damaged file is written again
            if read_answers(path, len(block)) is not None:
                continue
        answers = pipe().understand(
            [qa.question for qa, _ in block], [image for _, image in block], max_new_tokens=ANSWER_TOKENS
        )
        folder.write_json(path, [answer.text for answer in answers])


def _edit(
    pipe: Callable[[], Any],
    folder: RunFolder,
    cases: Sequence[EditCase],
    options: GenerateOptions,
    settings: Settings,
    world: RankInfo,
) -> None:
    from ..shapes import scenes

    numbered = list(enumerate(cases))[: settings.limit]
    share = shard(blocks(numbered, 1, settings.batch_size), world.rank, world.size)
    hidden = not settings.progress or world.local_rank != 0
    sampling = {name: value for name, value in settings.resolved().items() if name in SHARED_OPTIONS}
    for block in tqdm(share, desc="Editing", unit="batch", disable=hidden or not cases):
        paths = [folder.root / "edits" / f"{i:05d}.png" for i, _ in block]
        if all(is_whole(path) for path in paths):
            continue
        sources = [scenes.to_pil(scenes.render(scenes.pack([case.source]))[0]) for _, case in block]
        edited = pipe().edit(
            sources,
            [case.prompt for _, case in block],
            [case.source_prompt for _, case in block],
            strength=options.edit_strength,
            method=options.edit_method,
            seed=[image_seed(settings.seed, i, 1, 0) for i, _ in block],
            progress=False,
            best_of=settings.best_of,
            checker=settings.checker,
            **sampling,
        )
        for path, source, image in zip(paths, sources, edited, strict=True):
            folder.write_image(path.with_name(f"{path.stem}-source.png"), source)
            folder.write_image(path, image)


def score(run: str | Path, options: ScoreOptions = ScoreOptions()) -> dict[str, Any]:
    """Judge images and answers; writes item_scores.jsonl and score.json into `run`. ValueError below a given share."""
    from ..worlds import SHAPES

    manifest = RunFolder(run).read_manifest()
    about = {key: manifest["settings"][key] for key in ("cases", "draw_seed")}
    to_edit = edits(*about.values()) if "edits" in manifest["inputs_sha256"] else []
    return score_world(run, options, SHAPES, prompts(*about.values()), questions(*about.values()), to_edit)


def score_world(
    run: str | Path,
    options: ScoreOptions,
    world: World,
    captioned: Sequence[tuple[str, str]],
    asked: Sequence[tuple[QA, Image.Image]],
    to_edit: Sequence[EditCase] = (),
) -> dict[str, Any]:
    """`score` of a world's run, whose prompts, questions and edits these are."""
    manifest = RunFolder(run).read_manifest()
    scoring = ScoringRun(world.name, run, options, manifest["inputs_sha256"], published=True)
    about = {key: manifest["settings"][key] for key in ("cases", "draw_seed")}
    there = scoring.whole([f"{i:05d}.png" for i in range(len(captioned[: options.limit]))], "NNNNN.png")
    answers = _read_blocks(scoring, len(asked), manifest["settings"]["batch_size"])
    names = [f"edits/{i:05d}.png" for i in range(len(to_edit[: options.limit]))]
    edited = scoring.whole_files(scoring.folder.root, names)
    if options.dry_run:
        what = f"{len(there):,} images, {len(answers):,} answers and {len(edited):,} edits, judged by rules"
        return {"benchmark": world.name, "dry_run": what}
    items = _judge_images(scoring, captioned, there, world.checker(), options.progress)
    items += _judge_answers(asked[: options.limit], answers, world.grammar)
    items += _judge_edits(scoring, to_edit, edited)
    groups = dict.fromkeys([*(family for family, _ in captioned), *(f"answer: {qa.kind}" for qa, _ in asked)])
    groups |= dict.fromkeys(f"{case.kind} {what}" for case in to_edit for what in ("edited", "kept"))
    shares = means(items, dict.fromkeys(("images", "answers", "edited", "kept"), about["cases"]))
    totals = {"images right": {"images": 1.0}, "answers right": {"answers": 1.0}}
    others = {"answers right": shares["answers"][0]}
    if to_edit:
        totals |= {"edited": {"edited": 1.0}, "kept": {"kept": 1.0}}
        others |= {name: shares[name][0] for name in ("edited", "kept")}
    result = scoring.write(
        headline=("images right", shares["images"][0]),
        scale=1.0,
        scores=means(items, dict.fromkeys(groups, about["cases"])),
        n_expected=len(captioned) + len(asked) + len(to_edit),
        n_scored=len(items),
        judge={"rules": "of this package"},
        items=items,
        totals=totals,
        options=about,
        others=others,
    )
    for name, least in (("images", options.at_least), ("answers", options.answers_at_least)):
        value, n, _ = shares[name]
        if least is not None and (not result["complete"] or (value or 0.0) < least):
            raise ValueError(
                f"{value or 0.0:.1%} of {n} {name} are right, at least {least:.1%} are needed"
                + ("" if result["complete"] else f"; {reports.summary(result)}")
            )
    return result


def _read_blocks(scoring: ScoringRun, count: int, batch_size: int) -> dict[int, str]:
    """Place of a question -> its answer, of all blocks that are there; a damaged one becomes a failure."""
    found: dict[int, str] = {}
    for k, places in enumerate(blocks(range(count), 1, batch_size)):
        try:
            answers = read_answers(scoring.folder.root / "answers" / f"{k:05d}.json", len(places))
        except ValueError as error:
            scoring.failures[f"answers {places[0]} to {places[-1]}"] = str(error)
        else:
            found |= zip(places, answers or (), strict=False)
    return found


def _judge_images(
    scoring: ScoringRun,
    captioned: Sequence[tuple[str, str]],
    names: Sequence[str],
    check: Callable[[Any, str], tuple[bool, str]],
    progress: bool,
) -> list[ItemScore]:
    items = []
    for name in tqdm(names, desc="Judging", disable=not progress):
        family, prompt = captioned[int(Path(name).stem)]
        path = scoring.images / name
        right, reason = check(read_image(path).convert("RGB"), prompt)
        parts = {group: (float(right), 1) for group in (family, "images")}
        items.append(ItemScore(name, parts, prompt, [str(path)], reason))
    return items


def _judge_answers(
    asked: Sequence[tuple[QA, Image.Image]], answers: Mapping[int, str], grammar: Grammar
) -> list[ItemScore]:
    from ..shapes.captions import answer_is_right

    items = []
    for place, (qa, _) in enumerate(asked):
        if (text := answers.get(place)) is not None:
            right = answer_is_right(qa.kind, qa.answer, text, grammar)
            parts = {group: (float(right), 1) for group in (f"answer: {qa.kind}", "answers")}
            reason = f"expected {qa.answer!r}, got {text.strip()!r}"
            items.append(ItemScore(f"question {place:05d}", parts, qa.question, (), reason))
    return items


def _judge_edits(scoring: ScoringRun, cases: Sequence[EditCase], names: Sequence[str]) -> list[ItemScore]:
    from ..shapes import judge
    from ..shapes.edits import is_edited, is_kept

    items = []
    for name in names:
        case, path = cases[int(Path(name).stem)], scoring.folder.root / name
        reading = judge.read(read_image(path).convert("RGB"))
        found = {"edited": is_edited(case, reading), "kept": is_kept(case, reading)}
        parts = {f"{case.kind} {what}": (float(value), 1) for what, value in found.items()}
        parts |= {what: (float(value), 1) for what, value in found.items()}
        reason = "; ".join(f"not {what}" for what, value in found.items() if not value)
        images = [str(path.with_name(f"{path.stem}-source.png")), str(path)]
        items.append(ItemScore(name, parts, f"{case.source_prompt} -> {case.prompt}", images, reason))
    return items


def report(run: str | Path) -> list[Path]:
    return reports.write_report(RunFolder(run), TITLE, ())
