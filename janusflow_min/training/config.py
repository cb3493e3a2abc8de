# SPDX-License-Identifier: MIT
"""The settings of a training run, read from TOML, with the paper's values as defaults.

Paper: arXiv 2411.07975v2, sections 3.3, 3.4 and 4.1 and its table of hyper-parameters. `stage` names one of the
paper's three stages, or "nft" or "distill", and sets what trains, the learning rate, warm-up, steps, batch, prompt form
and data mix; a key that is given wins. A value's type and limits stand beside it; whatever does not fit is an error
that names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..devices import SHORT_NAMES
from .settings import (
    BelowOne,
    Count,
    Interval,
    NotNegative,
    PathOrName,
    PathText,
    Positive,
    Seed,
    Share,
    SolverSteps,
    Steps,
    UpTo1000,
    checked,
    load_toml,
    require,
)

KINDS = ("understanding", "generation", "text")  # of samples; the order of the paper's ratios
Component = Literal[
    "llm",  # the embedding table and the output projection included
    "siglip",
    "und_aligner",  # with und_begin, which the paper trains too
    "gen_aligners",  # into and out of the LLM, with the norm between
    "uvit_encoder",
    "uvit_decoder",
    "alignment_head",
]
COMPONENTS: tuple[str, ...] = get_args(Component)
_GENERATION = ("llm", "gen_aligners", "uvit_encoder", "uvit_decoder")
_THIN = COMPONENTS[2:]
FROM_STAGE: Any = None  # the default of what the stage decides; set when a Config is made


@dataclass(frozen=True)
class Stage:
    """One row of the paper's table of stages; `mix` in the order of KINDS."""

    trains: tuple[str, ...]
    lr: float
    warmup: int
    steps: int
    batch: int
    mix: tuple[float, float, float]
    early_mix: tuple[float, float, float]
    early_steps: int
    prompt_form: str


STAGES = {
    "adaptation": Stage(_THIN, 1e-4, 2000, 10_000, 512, (50, 50, 0), (50, 50, 0), 0, "plain"),
    "pretraining": Stage(
        ("llm", *_THIN), 1e-4, 2000, 390_000, 512, (14, 80, 6), (30, 50, 20), 10_000, "plain"
    ),
    "finetuning": Stage(COMPONENTS, 2e-5, 1000, 26_000, 256, (21, 70, 9), (21, 70, 9), 0, "chat"),
    # Not the paper's, see nft.py and distill.py. Here a step is a round and makes its own samples.
    "nft": Stage(_GENERATION, 1e-4, 10, 200, 384, (0, 0, 0), (0, 0, 0), 0, "chat"),
    "distill": Stage(_GENERATION, 3e-4, 10, 200, 384, (0, 0, 0), (0, 0, 0), 0, "chat"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    prompt_dropout: Share = 0.1  # share of prompts hidden, for guidance (section 3.3)
    logit_mean: float = 0.0  # of the logit-normal times (section 3.3; mean and deviation not stated there)
    logit_std: Positive = 1.0
    flow_weighting: Literal["none", "cosmap", "sigma_sqrt"] = "none"  # of the flow loss by t (SD 3)
    alignment_layer: Count = 6  # the block after which states are aligned, counted from 1 (section 3.4)
    alignment_weight: NotNegative = 1.0  # section 3.4: flow + alignment
    answer_weight: NotNegative = 1.0
    prompt_form: Literal["stage", "chat", "plain"] = "stage"  # plain: the prompt alone, as in pre-training


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, without decay and clipped by default (the paper's table)."""

    lr: Positive = FROM_STAGE  # of what the stage trains
    lr_by_component: dict[Component, NotNegative] = field(default_factory=dict)  # 0 freezes
    betas: tuple[BelowOne, ...] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0  # of matrices and convolutions; never of norms, biases and embeddings
    max_grad_norm: Positive = 1.0
    warmup: Interval = FROM_STAGE  # steps (updates, in rounds); the stage's is at most a fifth of the run
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Share = 0.0  # of the rate, at the end of a cosine
    states: Literal["fp32", "8bit"] = (
        "fp32"  # AdamW's moments; 8bit needs torchao and a quarter of the memory
    )
    ema_decay: BelowOne = 0.99  # of the average that is exported, lower in the first steps; 0: no average


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside linear layers (peft); the other weights of these components are frozen. rank 0: none."""

    rank: UpTo1000 = 0
    alpha: Positive = 32.0
    dropout: BelowOne = 0.0
    dora: bool = False
    components: tuple[Literal["llm", "siglip", "uvit_encoder", "uvit_decoder"], ...] = ("llm",)
    targets: tuple[str, ...] = ()  # last names of modules, "q_proj" say; (): all linear layers but lm_head


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples of one kind: a manifest, a folder, or what Hugging Face `datasets` opens."""

    kind: Literal["understanding", "generation", "text"]
    manifest: PathText = ""  # JSON lines, or one JSON array; paths of images count from its folder
    folder: PathText = ""  # images, each with its captions in a .txt of the same name, one a line
    dataset: PathOrName = ""  # "parquet", "webdataset", "csv", …, a hub id, or a folder of `save_to_disk`
    subset: str = ""  # which configuration, of a dataset that has several
    files: tuple[PathText, ...] = ()  # data_files of the dataset; globs too
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: Count = 1000  # encoded rows of a stream that each process shuffles, in 256 MiB at most
    columns: dict[str, str] = field(default_factory=dict)  # ours: the data's, e.g. {image = "jpg"}
    ratio: Positive = FROM_STAGE  # of the mix; the stage's is for a kind, shared by its sources
    shuffle: bool = True

    @staticmethod
    def not_paths(data: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """Strings that stay as they are: the name of a format, and files of a data set on the hub."""
        name = str(data.get("dataset", ""))
        if "/" in name:
            return () if (folder / Path(name).expanduser()).exists() else ("files",)
        return ("dataset",) if data.get("files") else ()


@dataclass(frozen=True)
class LoaderConfig:
    on_bad_row: Literal["skip", "stop"] = "skip"
    max_tokens: Count = 4096  # a longer sample is a bad row (the paper packs to 4,096)
    max_padding: Positive = 0.1  # of a micro-batch's tokens, at most
    workers: UpTo1000 = 2  # processes that read; 0: none
    timeout: Steps = 1800  # seconds that a step's data may take to come from a worker
    cache: PathText = ""  # folder for VAE latents, and SigLIP's features where SigLIP is frozen; "": none
    crop: Literal["random", "fixed"] = "random"  # fixed: an image's same square each time, as a cache needs
    random_flip: bool = False  # mirror half of the images that are generated


@dataclass(frozen=True)
class ReportConfig:
    log: Steps = 10  # steps between lines on the screen; every step goes to metrics.jsonl
    every: Interval = 1000  # steps between generated images, answers and validation; 0: never
    prompts: tuple[str, ...] = ()  # generated with seeds 0, 1, …
    questions: tuple[str, ...] = ()
    images: tuple[PathText, ...] = ()  # one for each question, "" for none
    validation: PathText = ""  # a manifest of any kinds
    validation_rows: Count = 64
    keep_best: bool = False  # also export the weights of the lowest validation loss, to OUTPUT/best
    patience: UpTo1000 = 0  # end the run after so many validations without a better one; 0: never
    num_inference_steps: SolverSteps = 30
    cfg_weight: float = 2.0
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"  # where it is installed
    project: str = "janusflow-min"  # for wandb and trackio


@dataclass(frozen=True)
class RoundsConfig:
    """How a step of the next two stages makes `batch` images of its own, and learns from them. See rounds.py."""

    # "shapes" or "things": a world; or a file with a prompt on each line, plain or as {"text": prompt}
    prompts: PathOrName = "shapes"
    passes: Count = 2  # training points of an image: new noise and time each
    updates: Count = 4  # of the weights, each from its share of a round's points
    validation: UpTo1000 = 96  # prompts of its own, one image each; 0: no validation
    cfg_weight: float = 1.0  # 1: no guidance
    num_inference_steps: SolverSteps = 12
    solver: Literal["euler", "midpoint", "heun", "ab2"] = "ab2"
    timestep_shift: Positive = 2.0


@dataclass(frozen=True)
class NftConfig(RoundsConfig):
    """Of stage "nft"."""

    # "shapes", "things": the rules of that world; "answers": the model's own; or MODULE:FUNCTION
    reward: str = "shapes"
    checker: str = "shapes"  # of "answers", by name or as MODULE:FUNCTION; "": the plain question alone
    group: Count = 12  # images of a prompt, whose rewards are compared
    beta: Positive = 1.0
    pull: NotNegative = 0.1  # to the velocity of the start


@dataclass(frozen=True)
class DistillConfig(RoundsConfig):
    """Of stage "distill"."""

    target: Literal["guidance", "reflow"] = "guidance"  # see distill.py
    cfg_weight: float = 2.0  # of the teacher
    passes: Count = 4
    updates: Count = 8


@dataclass(frozen=True)
class Config:
    data: tuple[SourceConfig, ...] = ()
    model: PathOrName = "tiny"  # "tiny", a folder in the official layout, or a hub id
    vae: PathOrName = ""  # folder or hub id; "": the checkpoint's own, else SDXL's
    output: PathText = "runs/train"
    stage: Literal["adaptation", "pretraining", "finetuning", "nft", "distill"] = "finetuning"
    seed: Seed = 0
    steps: Steps = FROM_STAGE
    epochs: Positive | None = None  # instead of steps: until every source was read so many times
    batch: Count = FROM_STAGE  # samples of a step, over all GPUs
    micro_batch: Count = 8  # samples of one forward pass, at most
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "fp32", "bf16"] = "auto"  # of computing; masters are fp32
    parallel: Literal["auto", "none", "replicate", "fsdp"] = "auto"  # under torchrun; auto: replicate
    compile: bool = False
    gradient_checkpointing: bool = False
    on_nan: Literal["stop", "skip"] = "stop"  # skip: leave such a step out; 20 in a row end the run
    save_every: Steps = 500  # steps between checkpoints
    keep: Count = 2  # checkpoints
    export_dtype: Literal["float32", "bfloat16", "fp32", "bf16"] = "bfloat16"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    nft: NftConfig = field(default_factory=NftConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        checked(Config, self)
        stage, o, report = STAGES[self.stage], self.optimizer, self.report
        require(len(o.betas) == 2, "optimizer.betas", "two numbers", o.betas)
        require(self.in_rounds or len(self.data) > 0, "data", "at least one source ([[data]])", [])
        for i, source in enumerate(self.data):
            given = [key for key in ("manifest", "folder", "dataset") if getattr(source, key)]
            require(len(given) == 1, f"data.{i}", "a manifest, a folder or a dataset, one of them", given)
            file = bool(source.manifest or source.folder)
            unused = dict.fromkeys(("subset", "files", "streaming", "split"), file)
            unused |= {"columns": bool(source.folder), "shuffle_buffer": not source.streaming}
            for key in (key for key, without_effect in unused.items() if without_effect):
                value, default = getattr(source, key), getattr(SourceConfig, key, {})
                require(value == default, f"data.{i}.{key}", "left out, for it has no effect here", value)
            captions = source.kind == "generation" or not source.folder
            require(captions, f"data.{i}.kind", '"generation" for a folder', source.kind)
        ratios = [source.ratio is not None for source in self.data]
        require(all(ratios) or not any(ratios), "data.*.ratio", "given for every source or for none", ratios)
        require(not (self.steps and self.epochs), "epochs", "left out where steps is given", self.epochs)
        one_each = len(report.images) in (0, len(report.questions))
        require(one_each, "report.images", "one for each question", report.images)
        rank, sharded = self.lora.rank, self.parallel == "fsdp"
        require(not (rank and sharded), "lora.rank", '0 with parallel = "fsdp" (use "replicate")', rank)
        eight = o.states == "8bit" and sharded
        require(not eight, "optimizer.states", '"fp32" with parallel = "fsdp" (use "replicate")', o.states)
        cached = self.loader.cache and self.loader.crop != "fixed"
        require(not cached, "loader.crop", '"fixed" where there is a cache', self.loader.crop)
        if self.in_rounds:
            self._check_rounds()
        needed = f"{self.stage if self.in_rounds else 'report'}.validation"
        validated = bool((self.rounds.validation if self.in_rounds else report.validation) and report.every)
        for key in ("keep_best", "patience"):
            value = getattr(report, key)
            require(validated or not value, f"report.{key}", f"with {needed} and every", value)
        steps = self.steps or (None if self.epochs else stage.steps)
        warmup = o.warmup if o.warmup is not None or steps is None else min(stage.warmup, steps // 5)
        form: Any = self.objective.prompt_form
        form = stage.prompt_form if form == "stage" else form
        resolved = {
            "optimizer": dataclasses.replace(o, lr=o.lr or stage.lr, warmup=warmup),
            "steps": steps,
            "batch": self.batch or stage.batch,
            "objective": dataclasses.replace(self.objective, prompt_form=form),
            "dtype": SHORT_NAMES.get(self.dtype, self.dtype),
            "export_dtype": SHORT_NAMES.get(self.export_dtype, self.export_dtype),
        }
        for key, value in resolved.items():
            object.__setattr__(self, key, value)
        rates = {name: self.rate(name) for name in COMPONENTS}
        require(any(rates.values()), "optimizer.lr_by_component", "above 0 for one component", rates)
        for name in self.lora.components if self.lora.rank else ():
            reason = f'above 0 for its adapters; stage "{self.stage}" does not train it'
            require(rates[name] > 0, f"optimizer.lr_by_component.{name}", reason, 0)
        none = f'given: stage "{self.stage}" has no share for any of the kinds'
        require(
            self.in_rounds or any(self.ratios()), "data.*.ratio", none, [source.kind for source in self.data]
        )

    def _check_rounds(self) -> None:
        without = f'left out with stage = "{self.stage}", which makes its own samples'
        require(not self.data, "data", without, [source.kind for source in self.data])
        require(not self.epochs, "epochs", without, self.epochs)
        require(not self.report.validation, "report.validation", without, self.report.validation)
        require(not self.loader.cache, "loader.cache", without, self.loader.cache)
        wanted = f'"replicate" with stage = "{self.stage}"'
        require(self.parallel != "fsdp", "parallel", wanted, self.parallel)
        batch, group = self.batch or STAGES[self.stage].batch, self.nft.group
        if self.stage == "nft":
            require(group > 1, "nft.group", "2 or more, for a prompt's images are compared", group)
            require(batch % group == 0, "batch", f"a multiple of nft.group, {group}", batch)
        distill = self.distill
        alone = self.stage == "distill" and distill.target == "guidance" and distill.cfg_weight == 1
        require(not alone, "distill.cfg_weight", "other than 1, for the student learns guidance", 1.0)
        points, key = batch * self.rounds.passes, f"{self.stage}.updates"
        require(self.updates <= points, key, f"at most batch x passes, {points}", self.updates)

    @property
    def in_rounds(self) -> bool:
        """Whether a step makes its own samples."""
        return self.stage in ("nft", "distill")

    @property
    def rounds(self) -> RoundsConfig:
        """The table of the stage, if that is one of rounds."""
        return self.distill if self.stage == "distill" else self.nft

    @property
    def updates(self) -> int:
        """Steps of the optimizer in a step of the run."""
        return self.rounds.updates if self.in_rounds else 1

    @staticmethod
    def not_paths(data: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """ "tiny" is the default model even where a folder has that name."""
        return ("model",) if data.get("model") == "tiny" else ()

    def rate(self, component: str) -> float:
        """The learning rate of a component; 0: it is frozen."""
        default = self.optimizer.lr if component in STAGES[self.stage].trains else 0.0
        rates: Mapping[Any, float] = self.optimizer.lr_by_component
        return rates.get(component, default)

    def ratios(self, early: bool = False) -> list[float]:
        """The share of each source in the mix, in the first steps of the stage (`early`) or later."""
        if self.data and self.data[0].ratio is not None:
            return [source.ratio for source in self.data]
        mix = dict(zip(KINDS, self.mix(early), strict=True))
        kinds = [source.kind for source in self.data]
        return [mix[kind] / kinds.count(kind) for kind in kinds]

    def mix(self, early: bool) -> tuple[float, ...]:
        stage = STAGES[self.stage]
        return stage.early_mix if early else stage.mix

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; `overrides` are KEY=VALUE with dotted keys, values as TOML writes them (quotes optional).

    Relative paths in the file are relative to its folder, those in overrides to the current one. Raises
    FileNotFoundError, or ValueError that names the key.
    """
    return load_toml(Config, Path(path).expanduser(), overrides, {"output": Config.output})
