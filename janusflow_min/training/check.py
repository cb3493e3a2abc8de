# SPDX-License-Identifier: MIT
"""Checks everything about a run that can be checked before weights are loaded; `--dry-run` prints the result."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import read_config
from ..devices import pick_device, pick_dtype
from ..files import check_folder
from ..hub import resolve, resolve_vae
from ..model import JanusFlow
from ..pixels import open_image
from ..processor import Processor, check_processor_matches
from . import checkpoints
from .batch import StepDataset
from .config import COMPONENTS, KINDS, Config, LoraConfig
from .dataset import Source, open_sources, summarize
from .eight_bit import BLOCK
from .prepare import component, trainable
from .rewards import check_rounds
from .sample import SampleBuilder
from .settings import anchored, naming, read, require

KIND_COMPONENTS = {  # what only samples of a kind train
    "generation": ("gen_aligners", "uvit_encoder", "uvit_decoder", "alignment_head"),
    "understanding": ("siglip", "und_aligner"),
}
GIB = 2**30


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run will do."""

    config: Config  # with its steps, where epochs were given, and absolute paths
    folder: Path  # of the model
    processor: Processor
    sources: list[Source]
    trained: dict[str, int]  # parameters, by component
    frozen: dict[str, int]
    memory: dict[str, float]  # GiB on each device, by purpose: an estimate
    disk: float  # GiB of the checkpoints and the export
    notes: list[str]  # what is allowed, but probably not intended

    def epochs(self, step: int) -> float | None:
        """How often every row has been read after so many steps; None for streams."""
        shares = zip(self.sources, self.config.ratios(), strict=True)
        total = sum(self.config.ratios())
        passes = [step * self.config.batch * r / total / len(s) for s, r in shares if len(s) and r]
        return round(min(passes), 4) if passes else None

    def __str__(self) -> str:
        c, o = self.config, self.config.optimizer
        trained = [f"{name} {n / 1e6:,.2f} M at {c.rate(name):g}" for name, n in self.trained.items() if n]
        frozen = [f"{name} {n / 1e6:,.2f} M" for name, n in self.frozen.items() if n]
        lines = [("model", f"{c.model} ({self.folder})"), ("trains", ", ".join(trained))]
        lines += [("frozen", ", ".join(frozen) or "nothing")]
        for i, row in enumerate(summarize(c, self.sources)):
            count = f"{row['rows']:,} rows" if row["rows"] else "a stream"
            bad = f", {row['bad']:,} bad" if row["bad"] else ""
            share = f"{row['share']:.1%} of the samples"
            lines.append((f"data.{i}", f"{row['kind']}: {row['source']}, {count}{bad}, {share}"))
        if c.in_rounds:
            r, rate = c.rounds, c.batch * c.rounds.passes / c.updates
            what = f"reward {c.nft.reward}" if c.stage == "nft" else f"target {c.distill.target}"
            lines.append(("round", f"prompts {r.prompts}, {what}; {r.updates} updates of {rate:g} points"))
        passes, left = self.epochs(c.steps), checkpoints.found(Path(c.output) / "checkpoints")
        lines += [
            ("steps", f"{c.steps:,} of {c.batch} samples{'' if passes is None else f', {passes:,.1f} epochs'}"),
            ("rate", f"{o.warmup:,} steps of warm-up, then {o.schedule}"),
            ("memory", f"about {sum(self.memory.values()):.2f} GiB on each device: "
             + ", ".join(f"{name} {gib:.2f}" for name, gib in self.memory.items())),
            ("disk", f"about {self.disk:.2f} GiB for {c.keep} checkpoints and the export"),
            ("output", f"{c.output}{f', continuing from {left[0].name}' if left else ''}"),
        ]  # fmt: skip
        return "\n".join(f"{name:<8} {text}" for name, text in [*lines, *(("note", n) for n in self.notes)])


def check(config: Config, world: int = 1, weights: bool = False, progress: bool = False) -> Plan:
    """Check settings, files, data and the model's layers without loading weights.

    weights: download them if the model is on the hub; the run will need them. Raises ValueError, OSError or
    ImportError that name the setting.
    """
    config = read(Config, anchored(Config, config.to_dict(), Path.cwd()))
    report = config.report
    check_folder(config.output, "output")
    if config.loader.cache:
        check_folder(config.loader.cache, "loader.cache")
    if report.tracker in ("wandb", "trackio") and find_spec(report.tracker) is None:
        raise ImportError(
            f'report.tracker = "{report.tracker}" needs the package: pip install {report.tracker}'
        )
    if config.optimizer.states == "8bit" and find_spec("torchao") is None:
        raise ImportError(
            "optimizer.states = '8bit' needs the package torchao: pip install 'janusflow-min[torchao]'"
        )
    for i, image in enumerate(report.images):
        if image:
            with naming(f"report.images.{i}"):
                open_image(image)
    sources = open_sources(config, progress)
    config = dataclasses.replace(config, steps=steps_of(config, sources), epochs=None)
    folder = resolve(config.model, progress, weights)
    sizes = read_config(folder)
    processor = Processor.from_folder(folder, sizes.llm.vocab_size)
    check_processor_matches(folder, sizes, processor)
    if weights or config.vae or (folder / "vae").is_dir():  # else the hub's, which a dry run leaves there
        resolve_vae(folder, config.vae or None, progress)
    longest, places = sizes.llm.max_position_embeddings, 1 + sizes.siglip.num_patches
    for i, prompt in enumerate(report.prompts):
        with naming(f"report.prompts.{i}"):
            ids, _ = processor.generation_prompt(prompt)
            require(len(ids) + places <= longest, "it", f"at most {longest - places} tokens long", prompt)
    for i, question in enumerate(report.questions):
        with naming(f"report.questions.{i}"):
            shown = any(report.images[i : i + 1])
            require(
                bool(question.strip()) or shown, "it", "text where there is no image to describe", question
            )
            processor.tokenizer.reject_special_tokens(question)
            length = len(processor.conversation([{"role": "User", "content": question}])[0]) + places * shown
            require(length < longest, "it", f"shorter than the model's {longest} positions", question)
    if config.in_rounds:
        check_rounds(config, processor, longest - places)
    with torch.device("meta"):
        model = JanusFlow(sizes)
    if report.validation:
        data = StepDataset(config, sources, SampleBuilder(config, processor, model)).validation(whole=True)
        if not data.batches:
            raise ValueError(f"report.validation: none of its rows can be used; the first: {data.bad[0]}")
    loss, rates = trainable(config, model)
    trained, frozen = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
    for name, p in loss.named_parameters():
        (trained if rates[name] else frozen)[component(name)] += p.numel()
    memory = estimate(config, model, sum(trained.values()), sum(frozen.values()), world)
    state = sum(trained.values()) * state_bytes(config)
    whole = sum(p.numel() for p in model.parameters()) * (4 if config.export_dtype == "float32" else 2)
    disk = (state * (config.keep + 1) + whole) / GIB
    plan = Plan(config, folder, processor, sources, trained, frozen, memory, disk, [])
    plan.notes.extend(remarks(plan))
    return plan


def steps_of(config: Config, sources: Sequence[Source]) -> int:
    """The steps of the run; with `epochs`, as many as it takes to read every source that often."""
    if config.steps is not None:
        return config.steps
    most, total = 0.0, sum(config.ratios())
    for i, (source, ratio) in enumerate(zip(sources, config.ratios(), strict=True)):
        if ratio and not len(source):
            raise ValueError(f"epochs needs the number of rows, and data.{i} is a stream; give steps instead")
        if ratio:
            most = max(most, config.epochs * len(source) * total / ratio)
    return max(1, math.ceil(round(most / config.batch, 6)))


def state_bytes(config: Config) -> float:
    """Of the optimizer, for each trained parameter: master, both moments, average."""
    moments = 8 if config.optimizer.states == "fp32" else 2 * (1 + 4 / BLOCK)
    return 4 + moments + (4 if config.optimizer.ema_decay else 0)


def estimate(config: Config, model: JanusFlow, trained: int, frozen: int, world: int) -> dict[str, float]:
    """GiB on each device. The values that a block keeps of each token and hidden unit are fitted to the runs on one
    H100 in docs/finetuning.md."""
    size = 2 if pick_dtype(config.dtype, pick_device(config.device)) == torch.bfloat16 else 4
    shards = world if config.parallel == "fsdp" else 1
    llm, rows = model.config.llm, min(config.micro_batch, math.ceil(config.batch / world))
    tokens = rows * (64 + 1 + model.num_image_tokens)
    block = 10 if config.compile else 17
    kept = llm.num_hidden_layers + block if config.gradient_checkpointing else llm.num_hidden_layers * block
    copies = size if size == 2 or shards > 1 else 0
    several = config.batch > config.micro_batch * world and shards == 1  # gradients are summed up in fp32
    return {
        "weights": (frozen * size / shards + trained * copies) / GIB,
        "optimizer": trained * state_bytes(config) / shards / GIB,
        "gradients": trained * (size + (4 if several else 0)) / shards / GIB,
        "activations": tokens * kept * llm.hidden_size * size / GIB,
    }


def remarks(plan: Plan) -> Iterator[str]:
    """Settings that have no effect, or probably not the intended one."""
    c, o = plan.config, plan.config.optimizer
    if not c.lora.rank and c.lora != LoraConfig():
        yield "the settings of [lora] have no effect without lora.rank"
    beside = [name for name in COMPONENTS[:-1] if plan.trained[name] and name not in c.lora.components]
    if c.lora.rank and beside:
        yield f"export-adapter/ will lack {', '.join(beside)}, which train whole; a rate of 0 freezes them"
    if o.schedule == "constant" and o.min_lr_ratio:
        yield 'optimizer.min_lr_ratio has no effect with optimizer.schedule = "constant"'
    if o.warmup >= c.steps:
        yield f"the warm-up of {o.warmup:,} steps ends after the run, of {c.steps:,}"
    if not c.report.every and (c.report.prompts or c.report.questions or c.report.validation):
        yield "report.every = 0: nothing of [report] is generated, asked or validated"
    if not c.objective.alignment_weight and o.lr_by_component.get("alignment_head"):
        yield "optimizer.lr_by_component.alignment_head has no effect without objective.alignment_weight"
    for i, ratio in enumerate(c.ratios()):
        if not ratio:
            yield f'data.{i} is never read: stage "{c.stage}" has no share for {c.data[i].kind}; give ratios'
    kinds = {s.kind for s, ratio in zip(c.data, c.ratios(), strict=True) if ratio}
    for kind in KINDS if not c.in_rounds else ():
        parts = [name for name in KIND_COMPONENTS.get(kind, ()) if plan.trained[name]]
        if kind not in kinds and parts:
            yield f"no sample trains {', '.join(parts)}: there is no data of kind {kind}"
    if c.objective.flow_weighting != "none" and "generation" not in kinds:
        yield "objective.flow_weighting has no effect without data of kind generation"
    free = shutil.disk_usage(next(p for p in (Path(c.output), *Path(c.output).parents) if p.exists())).free
    if plan.disk * GIB > free:
        yield f"only {free / GIB:.2f} GiB are free for the {plan.disk:.2f} GiB of checkpoints and export"


# Continuing a run -----------------------------------------------------------------------

FREE = {  # settings that may change in between: they do not decide what is learned
    *("output", "steps", "epochs", "micro_batch", "device", "parallel", "compile", "gradient_checkpointing"),
    *("on_nan", "save_every", "keep", "export_dtype", "report", "optimizer.warmup", "loader.on_bad_row"),
    *("loader.workers", "loader.timeout", "loader.max_padding", "loader.cache"),
}
PATHS = ("manifest", "folder", "dataset", "files")  # a source's fingerprint says whether the data changed


def compare(about: Mapping[str, Any], config: Config, sources: Sequence[Source]) -> list[str]:
    """Compare a run with the `checkpoint.json` it would continue from; returns what the user should know.

    ValueError if it would be a different run.
    """
    old = about["config"]
    changes = list(differences(old, config))
    prints = about.get("data", [s.fingerprint for s in sources])
    if len(prints) == len(sources):
        for i, (was, source) in enumerate(zip(prints, sources, strict=True)):
            if was != source.fingerprint:
                changes.append(f"data.{i} ({source.name}) holds different data than before")
    if changes:
        raise ValueError(f"belongs to a run with other settings: {'; '.join(changes)}")
    notes = []
    if old["optimizer"].get("warmup") != config.optimizer.warmup:
        notes.append(f"optimizer.warmup was {old['optimizer'].get('warmup')}, is {config.optimizer.warmup}")
    if old["steps"] != config.steps and config.optimizer.schedule == "cosine":
        notes.append(f"steps was {old['steps']}, is {config.steps}, and the cosine now ends there")
    return [f"{text}: this changes the learning rates from here on" for text in notes]


def differences(old: Mapping[str, Any], new: Any, where: str = "") -> Iterator[str]:
    """Settings that affect the result and differ. A setting that did not exist back then had its default."""
    for name in sorted(old.keys() - {f.name for f in dataclasses.fields(new)}):
        yield f"{where}{name} is no longer a setting"
    for f in dataclasses.fields(new):
        key, b = where + f.name, getattr(new, f.name)
        if key in FREE or (where.startswith("data.") and f.name in PATHS):
            continue
        default: Any = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        a = old.get(f.name, vars(default) if dataclasses.is_dataclass(default) else default)
        if dataclasses.is_dataclass(b):
            yield from differences(a, b, f"{key}.")
        elif f.name == "data":
            if len(a) != len(b):
                yield f"there were {len(a)} sources of data, are {len(b)}"
            for i, (x, y) in enumerate(zip(a, b, strict=False)):
                yield from differences(x, y, f"{key}.{i}.")
        elif a != b and not (isinstance(b, tuple) and list(a) == list(b)):
            yield f"{key} was {a!r}, is {b!r}"
