# SPDX-License-Identifier: MIT
"""Uni-MMMU's generation: each case as a short program of questions and images, run in blocks, kept in its layout.

A case's program is a Python generator that yields `Ask` and `Generate` and gets answers and images back. A block of
cases runs its programs side by side: all open questions are one batch, then all open images. Blocks are cut once
from the whole list and always run whole, so that neighbours, shards and resuming change nothing (see `runner`).

Modes. `native` runs what JanusFlow can do: it generates from text and answers about images, but does not edit. Texts of
all tasks, the image of `code`; geometry, jigsaw, maze and sliding are answered from the given images, without the
images of its own that the benchmark means as a scaffold. `torchumm` runs the calls of TorchUMM's runner in its
order, for numbers like its own: it falls back to generating from the text alone where an edit is asked for, and its
JanusFlow adapter reads the first image of a request only. With `editing`, a method of `Pipeline.edit`, that image is
edited instead: without training, and so no number like TorchUMM's.

Layout, official and TorchUMM's: `TASK/CASE/` with model_text.txt, model_image_NN.png or cand_01/*.png, result.json,
and _done.ok last; `TASK/summary.json`, `TASK/manifest.csv`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...files import read_json
from ...sampling_options import SHARED_OPTIONS
from ..official_prompts import fill
from ..ranks import RankInfo, shard
from ..reading import read_image, read_text
from ..run_folder import RunFolder, is_whole
from ..runner import Settings, blocks
from .readers import TASKS, Case

if TYPE_CHECKING:
    from ...pipeline import Pipeline

MODES = ("native", "torchumm")
SEED_RULE = "seed + 100000 * task number + 100 * case index + picture of the case, one CPU generator for each"
PLAN_CHARACTERS = 200  # of a planned step that go into the context

Part = str | Path | Image.Image  # of a context: text or image


@dataclass(frozen=True)
class Ask:
    """A question: texts and images in order. Its answer is sent back."""

    parts: Sequence[Part]


@dataclass(frozen=True)
class Generate:
    """An image from the texts among `parts`, saved as `name`. `own` is the place of the model's own explanation,
    the one text that is shortened where the context is too long."""

    parts: Sequence[Part]
    name: str
    own: int | None = None


class TooLong(ValueError):
    """More than the model's positions, with nothing left that may be shortened."""


Program = Generator[Ask | Generate, Any, str]  # returns the text for model_text.txt


# Programs -----------------------------------------------------------------------


def program(case: Case, mode: str, texts: Mapping[str, str]) -> Program:
    """The calls of a case. texts: as in `prompts.PROMPTS`."""
    return PROGRAMS[case.task](case, mode == "torchumm", texts)


def _code(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    start: list[Part] = [texts["code"], read_text(case.truth["svg"])]
    answer = yield Ask([*start, texts["code_text"]])
    yield Generate([*start, answer, texts["code_image"]], "model_image_01.png", own=2)
    return answer


def _science(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    condition = f"Condition: {case.fields['condition']}"
    context: list[Part] = [texts["science"], "Initial image:", case.images[0], condition]
    answer = yield Ask(context)
    if generates:
        yield Generate([*context, answer, texts["science_image"]], "model_image_01.png", own=4)
    return answer


def _math(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    instruction = fill(
        texts["math"],
        problem=case.fields["problem"],
        choices="\n".join(case.fields["choices"]) or "(none)",
        auxiliary=case.fields["auxiliary"] or "(none)",
    )
    context: list[Part] = [instruction, "The figure:", case.images[0]]
    if generates:
        overlay = yield Generate([*context, texts["math_image"]], "model_image_01.png")
        context += ["The figure with the auxiliary lines:", overlay]
    return (yield Ask([*context, texts["math_text"]]))


def _jigsaw(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    context: list[Part] = [texts["jigsaw"]]
    for name, image in zip(("The picture:", "Candidate 0:", "Candidate 1:"), case.images, strict=True):
        context += [name, image]
    if generates:
        for k in (0, 1):
            order = fill(texts["jigsaw_image"], candidate=k)
            image = yield Generate([*context, order], f"model_image_{k + 1:02d}.png")
            context += [f"With candidate {k}:", image]
    return (yield Ask([*context, texts["jigsaw_text"]]))


def _maze(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    return (yield from _steps(case, generates, texts, [texts["maze"], case.images[0]]))


def _sliding(case: Case, generates: bool, texts: Mapping[str, str]) -> Program:
    context: list[Part] = [
        texts["sliding"],
        "As it is:",
        case.images[0],
        "As it must become:",
        case.images[1],
    ]
    return (yield from _steps(case, generates, texts, context))


def _steps(case: Case, generates: bool, texts: Mapping[str, str], context: list[Part]) -> Program:
    for step in range(1, case.fields["steps"] + 1 if generates else 1):
        plan = yield Ask([*context, fill(texts["plan"], step=step)])
        context.append(plan[:PLAN_CHARACTERS])
        name = f"cand_01/{case.images[0].stem}_step_{step:04d}.png"
        context.append((yield Generate([*context, fill(texts["frame"], step=step)], name)))
    return (yield Ask([*context, texts["moves"]]))


PROGRAMS = dict(science=_science, math=_math, jigsaw=_jigsaw, maze=_maze, sliding=_sliding, code=_code)


# One block -----------------------------------------------------------------------


@dataclass
class Run:
    """A case under way."""

    case: Case
    steps: Program
    waiting: Ask | Generate | None = None
    text: str | None = None  # the program's result
    images: dict[str, Image.Image] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    shortened: list[dict[str, int]] = field(default_factory=list)  # tokens kept, of how many
    problem: str = ""  # why it ended early

    def send(self, value: Any) -> None:
        """Give the program what it waits for; it waits for the next then, or has ended."""
        try:
            self.waiting = self.steps.send(value)
        except StopIteration as end:
            self.waiting, self.text = None, end.value
        except (OSError, ValueError) as error:  # a file of the data
            self.stop(str(error))

    def stop(self, problem: str) -> None:
        self.steps.close()
        self.waiting, self.problem = None, problem


def run_block(
    pipe: Pipeline,
    cases: Sequence[Case],
    mode: str,
    texts: Mapping[str, str],
    settings: Settings,
    max_new_tokens: int,
    editing: str | None = None,
) -> list[Run]:
    """Run the cases side by side: one batch of questions or of images at a time."""
    runs = [Run(case, program(case, mode, texts)) for case in cases]
    for run in runs:
        run.send(None)
    while waiting := [run for run in runs if run.waiting is not None]:
        asking = [(run, run.waiting) for run in waiting if isinstance(run.waiting, Ask)]
        if asking:
            _ask(pipe, asking, mode, max_new_tokens)
        else:
            generating = [(run, run.waiting) for run in waiting if isinstance(run.waiting, Generate)]
            _generate(pipe, generating, settings, editing)
    return runs


def _ask(pipe: Pipeline, waiting: Sequence[tuple[Run, Ask]], mode: str, max_new_tokens: int) -> None:
    ready = []
    for run, request in waiting:
        try:
            ready.append((run, conversation(pipe, request.parts, first_image_only=mode == "torchumm")))
        except ValueError as error:
            run.stop(str(error))
    if ready:
        answers = pipe.chat([messages for _, messages in ready], max_new_tokens=max_new_tokens)
        for (run, _), answer in zip(ready, answers, strict=True):
            run.send(answer.text.strip())


def _generate(
    pipe: Pipeline, waiting: Sequence[tuple[Run, Generate]], settings: Settings, editing: str | None
) -> None:
    """editing: the method by which a request's first image is edited; None generates from the text alone."""
    ready = []
    for run, request in waiting:
        try:
            text, shortened = image_prompt(pipe, request)
            source = _first_image(request) if editing else None
        except ValueError as error:
            run.stop(str(error))
            continue
        run.shortened += shortened
        case = run.case
        first = settings.seed + 100_000 * TASKS.index(case.task) + 100 * case.index
        run.seeds.append(first + len(run.images))
        ready.append((run, request.name, text, source))
    for edits in (False, True):
        group = [entry for entry in ready if (entry[3] is not None) == edits]
        if not group:
            continue
        texts, seeds = [text for _, _, text, _ in group], [run.seeds[-1] for run, *_ in group]
        options = settings.resolved()
        if edits and editing is not None:
            kept = {name: options[name] for name in SHARED_OPTIONS}
            sources = [source for *_, source in group if source is not None]
            images = pipe.edit(sources, texts, method=editing, seed=seeds, progress=False, **kept)
        else:
            images = pipe.generate(texts, parallel_size=1, seed=seeds, progress=False, **options).images
        for (run, name, *_), image in zip(group, images, strict=True):
            run.images[name] = image
            run.send(image)


def _first_image(request: Generate) -> Image.Image | None:
    """Raises UnreadableImage."""
    first = next((part for part in request.parts if not isinstance(part, str)), None)
    return read_image(first) if isinstance(first, Path) else first


def conversation(pipe: Pipeline, parts: Sequence[Part], first_image_only: bool) -> list[dict[str, Any]]:
    """The parts as one message of the user: each image where it stands, or the first one in front and no other.

    Raises TooLong where the answer would have no position left, ValueError for an image that cannot be read.
    """
    tag = pipe.processor.tokenizer.image_tag
    images = [part for part in parts if not isinstance(part, str)]
    texts = [_plain(pipe, part) if isinstance(part, str) else tag for part in parts]
    if first_image_only:
        images = images[:1]
        texts = [tag] * len(images) + [text for text in texts if text != tag]
    for image in images:
        if isinstance(image, Path):
            read_image(image)
    user: dict[str, Any] = {"role": "User", "content": "\n".join(texts), "images": images}
    messages = [user, {"role": "Assistant", "content": ""}]
    processor = pipe.processor
    needed = len(processor.tokenizer.encode(processor.template(messages)))
    needed += len(images) * (processor.num_image_tokens + 1)  # a tag is one token; begin and end come too
    _check(pipe, needed + 1, "the question")
    return messages


def image_prompt(pipe: Pipeline, request: Generate) -> tuple[str, list[dict[str, int]]]:
    """The texts as one prompt, the model's own explanation shortened from its end until all fits.

    Returns what was shortened too: [] or [{"kept", "of"}] in tokens. Raises TooLong where the rest alone does not fit.
    """
    image_tokens = pipe.model.num_image_tokens  # t_emb takes the generation tag's place
    limit = pipe.model.config.llm.max_position_embeddings

    def prompt(own: str) -> str:
        texts = [own if i == request.own else part for i, part in enumerate(request.parts)]
        return "\n".join(_plain(pipe, text) for text in texts if isinstance(text, str) and text)

    def needed(own: str) -> int:
        return len(pipe.processor.generation_prompt(prompt(own))[0]) + image_tokens

    own = "" if request.own is None else str(request.parts[request.own])
    if needed(own) <= limit:
        return prompt(own), []
    _check(pipe, needed(""), "the image's prompt" + " without the explanation" * bool(own))
    spans = [span for _, span in pipe.processor.tokenizer.encode_with_offsets(own) if span != (0, 0)]
    keep, most = 0, len(spans)
    while keep < most:  # the largest number of tokens that fits
        middle = (keep + most + 1) // 2
        keep, most = (middle, most) if needed(own[: spans[middle - 1][1]]) <= limit else (keep, middle - 1)
    return prompt(own[: spans[keep - 1][1]] if keep else ""), [{"kept": keep, "of": len(spans)}]


def _check(pipe: Pipeline, needed: int, what: str) -> None:
    limit = pipe.model.config.llm.max_position_embeddings
    if needed > limit:
        raise TooLong(f"{what} needs {needed} positions; the model has {limit}")


def _plain(pipe: Pipeline, text: str) -> str:
    """The text such that the tokenizer sees no special token in it, whatever the model or the data wrote."""
    try:
        pipe.processor.tokenizer.reject_special_tokens(text)
        return text
    except ValueError:
        return text.replace("<", "< ")


# Files -----------------------------------------------------------------------


def is_done(folder: RunFolder, case: Case) -> bool:
    """Whether a case is there whole: the marker, its record, and every image that the record lists."""
    here = folder.root / case.folder
    if not (here / "_done.ok").is_file():
        return False
    try:
        files = read_json(here / "result.json").get("files", [])
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(files, list) and all(is_whole(here / str(name)) for name in files)


def write_case(folder: RunFolder, run: Run, mode: str) -> None:
    """The case's files, the marker last."""
    case = run.case
    here = folder.root.resolve() / case.folder
    for name, image in run.images.items():
        folder.write_image(here / name, image)
    folder.write_text(here / "model_text.txt", run.text or "")
    saved = [str(here / name) for name in run.images]
    frames = case.task in ("maze", "sliding")
    record: dict[str, Any] = {
        "id": case.fields.get("id", case.name),
        "status": "error" if run.problem else "ok",
        "errors": [run.problem] if run.problem else [],
        "case_dir": str(here),
        "mode": mode,
        "expected_image_count": len(saved),
        "text_file": str(here / "model_text.txt"),
        "images_saved_flatten" if frames else "images_saved": saved,
        "files": list(run.images),
        "seeds": run.seeds,
        "explanation_shortened": run.shortened,
    }
    record |= {key: value for key, value in case.fields.items() if key not in ("id", "steps")}
    named = {
        "science": ("initial_image",),
        "maze": ("step0",),
        "sliding": ("init_png", "final_png"),
        "math": ("original_image",),
        "jigsaw": ("ref_2x2", "cand0", "cand1"),
        "code": (),
    }[case.task]
    record |= {key: str(path.resolve()) for key, path in zip(named, case.images, strict=True)}
    folder.write_json(here / "result.json", record)
    folder.write_text(here / "_done.ok", "ok")


def write_summaries(folder: RunFolder, cases: Mapping[str, Sequence[Case]]) -> None:
    """summary.json and manifest.csv of each task, of all its cases: the jigsaw's scorer reads the ids from there."""
    for task, of_task in cases.items():
        items, rows = [], []
        for case in of_task:
            record = read_json(folder.root / case.folder / "result.json") if is_done(folder, case) else {}
            item = {"id": case.fields.get("id", case.name), "status": record.get("status", "missing")}
            errors, images = record.get("errors", []), len(record.get("files", ()))
            items.append(item | {"errors": errors})
            row = {"id": item["id"], "folder": case.name, "status": item["status"], "images": images}
            rows.append(row | {"errors": "; ".join(errors)})
        count = Counter(item["status"] for item in items)
        summary = {"task": task, "count_total": len(items), "count_success": count["ok"]}
        summary |= {"count_error": count["error"], "count_missing": count["missing"], "per_item": items}
        folder.write_json(folder.root / task / "summary.json", summary)
        folder.write_text(folder.root / task / "manifest.csv", csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; its columns are all keys, in the order in which they are met."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def run_tasks(
    load: Any,
    folder: RunFolder,
    cases: Mapping[str, Sequence[Case]],
    mode: str,
    texts: Mapping[str, str],
    settings: Settings,
    max_new_tokens: int,
    world: RankInfo,
    editing: str | None = None,
) -> None:
    """This rank's share of the blocks of all tasks. load: gives the pipeline, called only if something is missing."""
    from tqdm import tqdm

    whole = []
    for of_task in cases.values():
        usable = [case for case in of_task if case.usable]
        wanted = {case.index for case in usable[: settings.limit]}
        whole += [(block, wanted) for block in blocks(usable, 1, settings.batch_size)]
    todo = []
    for block, wanted in shard(whole, world.rank, world.size):
        lacking = {case.index for case in block if case.index in wanted and not is_done(folder, case)}
        if lacking:
            todo.append((block, lacking))
    if not todo:
        return
    pipe = load()
    hidden = not settings.progress or world.local_rank != 0
    with tqdm(total=sum(len(lacking) for _, lacking in todo), desc="Cases", disable=hidden) as bar:
        for block, lacking in todo:
            for run in run_block(pipe, block, mode, texts, settings, max_new_tokens, editing):
                if run.case.index not in lacking:
                    continue
                write_case(folder, run, mode)
                for told in [run.problem] * bool(run.problem) + [
                    f"explanation shortened to {s['kept']} of {s['of']} tokens" for s in run.shortened
                ]:
                    bar.write(f"{run.case.folder}: {told}", file=sys.stderr)
                bar.update()
