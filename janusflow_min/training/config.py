# SPDX-License-Identifier: MIT
"""What a training run is told, read from TOML: every setting of the paper, with the paper's value as default.

Paper: arXiv 2411.07975v2, sections 3.3, 3.4 and 4.1 and its table of hyper-parameters. `stage` names one of the
paper's three stages and sets what trains, at which rate, the warm-up, steps, batch, prompt form and data mix; a key
that is given wins. Unknown keys and wrong types are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

KINDS = ("understanding", "generation", "text")  # of samples; the order of the paper's ratios
COMPONENTS = (
    "llm",  # the embedding table and the output projection included; LoRA's matrices where there are some
    "siglip",
    "und_aligner",  # with und_begin, which the paper trains too
    "gen_aligners",  # into and out of the LLM, with the norm between
    "uvit_encoder",
    "uvit_decoder",
    "alignment_head",
)
_THIN = COMPONENTS[2:]


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
}


@dataclass(frozen=True)
class ObjectiveConfig:
    prompt_dropout: float = 0.1  # share of prompts hidden, for guidance (section 3.3)
    logit_mean: float = 0.0  # of the logit-normal (section 3.3; mean and deviation not stated there)
    logit_std: float = 1.0
    alignment_layer: int = 6  # the block after which states are aligned, counted from 1 (section 3.4)
    alignment_weight: float = 1.0  # section 3.4: flow + alignment
    answer_weight: float = 1.0
    prompt_form: Literal["stage", "chat", "plain"] = "stage"  # plain: the prompt alone, as in pre-training


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW without decay, clipped (the paper's table)."""

    lr: float | None = None  # of what the stage trains; None: the stage's
    lr_by_component: dict[str, float] = field(default_factory=dict)  # by component; 0 freezes
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: int | None = None  # steps; None: the stage's
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0  # share of the rate that a cosine ends at
    ema_decay: float = 0.99  # moving average, which is what gets exported; 0: none


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank matrices beside the LLM's linear layers (peft); the rest of the LLM is frozen. rank 0: none."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples of one kind: a manifest, a folder, or what Hugging Face `datasets` opens."""

    kind: Literal["understanding", "generation", "text"]
    manifest: str = ""  # JSON lines, or one JSON array; paths of images count from its folder
    folder: str = ""  # images, each with its captions in a .txt of the same name, one a line
    dataset: str = ""  # "parquet", "webdataset", "csv", …, a hub id, or a folder written by `save_to_disk`
    subset: str = ""  # which configuration, of a dataset that has several
    files: tuple[str, ...] = ()  # data_files of the dataset; globs too
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 1000  # encoded rows of a stream that each process holds to shuffle them
    columns: dict[str, str] = field(default_factory=dict)  # ours: the data's, e.g. {image = "jpg"}
    ratio: float | None = None  # of the mix; None: the stage's for this kind, shared by its sources
    shuffle: bool = True


@dataclass(frozen=True)
class LoaderConfig:
    on_bad_row: Literal["skip", "stop"] = "skip"
    max_tokens: int = 4096  # a longer sample is a bad row (the paper packs to 4,096)
    max_padding: float = 0.1  # of a micro-batch's tokens, at most
    workers: int = 2  # processes that read; 0: none
    timeout: int = 1800  # seconds that a step's data may take to come from a worker
    cache: str = ""  # folder for VAE latents, and SigLIP's features where SigLIP is frozen; "": none
    crop: Literal["random", "fixed"] = (
        "random"  # fixed: the same square of an image each time, as a cache needs
    )
    random_flip: bool = False  # mirror half of the images that are generated


@dataclass(frozen=True)
class ReportConfig:
    log: int = 10  # steps between lines of metrics on the screen; every step goes to metrics.jsonl
    every: int = 1000  # steps between sheets of pictures, answers and validation; 0: never
    prompts: tuple[str, ...] = ()  # painted with seeds 0, 1, …
    questions: tuple[str, ...] = ()
    images: tuple[str, ...] = ()  # one for each question, "" for none
    validation: str = ""  # a manifest of any kinds
    validation_rows: int = 64
    num_inference_steps: int = 30
    cfg_weight: float = 2.0
    tensorboard: bool = True  # where it is installed


@dataclass(frozen=True)
class Config:
    data: tuple[SourceConfig, ...]
    model: str = "tiny"  # "tiny", a folder in the official layout, or a hub id
    vae: str = ""  # folder or hub id; "": the checkpoint's own, else SDXL's
    output: str = "runs/train"
    stage: Literal["adaptation", "pretraining", "finetuning"] = "finetuning"
    seed: int = 0
    steps: int | None = None  # None: the stage's
    batch: int | None = None  # samples of a step, over all GPUs; None: the stage's
    micro_batch: int = 8  # samples of one forward pass, at most
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of computing; master weights are fp32
    parallel: Literal["auto", "none", "replicate", "fsdp"] = "auto"  # under torchrun; auto: replicate
    compile: bool = False
    gradient_checkpointing: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        stage, o, rates = STAGES[self.stage], self.optimizer, self.optimizer.lr_by_component
        above = {f"loader.{k}": getattr(self.loader, k) for k in ("max_tokens", "max_padding", "timeout")}
        above |= {k: getattr(self, k) for k in ("micro_batch", "save_every", "keep")}
        above |= {
            "report.log": self.report.log,
            "optimizer.max_grad_norm": o.max_grad_norm,
            "objective.alignment_layer": self.objective.alignment_layer,
        }
        above |= {k: getattr(self, k) for k in ("steps", "batch") if getattr(self, k) is not None}
        for key, value in above.items():
            _check(value > 0, key, "above 0", value)
        for key, value in {
            "optimizer.ema_decay": o.ema_decay,
            "objective.prompt_dropout": self.objective.prompt_dropout,
            "optimizer.min_lr_ratio": o.min_lr_ratio,
        }.items():
            _check(0 <= value <= 1, key, "from 0 to 1", value)
        _check(
            len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "optimizer.betas", "two below 1", o.betas
        )
        _check(o.ema_decay < 1, "optimizer.ema_decay", "below 1", o.ema_decay)
        for name, rate in rates.items():
            _check(
                name in COMPONENTS,
                f"optimizer.lr_by_component.{name}",
                f"one of {', '.join(COMPONENTS)}",
                name,
            )
            _check(rate >= 0, f"optimizer.lr_by_component.{name}", "0 or above", rate)
        _check(len(self.data) > 0, "data", "at least one source ([[data]])", list(self.data))
        for i, source in enumerate(self.data):
            given = [key for key in ("manifest", "folder", "dataset") if getattr(source, key)]
            _check(len(given) == 1, f"data.{i}", "a manifest, a folder or a dataset, one of them", given)
            for key in ("subset", "files", "streaming"):
                useless = getattr(source, key) and not source.dataset
                _check(not useless, f"data.{i}.{key}", "left out without a dataset", getattr(source, key))
            _check(
                source.kind == "generation" or not source.folder, f"data.{i}.kind", "generation", source.kind
            )
            _check(source.shuffle_buffer > 0, f"data.{i}.shuffle_buffer", "above 0", source.shuffle_buffer)
            _check(source.ratio is None or source.ratio > 0, f"data.{i}.ratio", "above 0", source.ratio)
        given = [source.ratio is not None for source in self.data]
        _check(all(given) or not any(given), "data.*.ratio", "given for every source or for none", given)
        images, questions = self.report.images, self.report.questions
        _check(len(images) in (0, len(questions)), "report.images", "one for each question", list(images))
        if self.loader.cache:
            _check(self.loader.crop == "fixed", "loader.crop", '"fixed" where there is a cache', "random")
        fixed = {"lr": stage.lr, "warmup": stage.warmup}
        fixed = {key: value for key, value in fixed.items() if getattr(o, key) is None}
        object.__setattr__(self, "optimizer", dataclasses.replace(o, **fixed))
        for key in ("steps", "batch"):
            if getattr(self, key) is None:
                object.__setattr__(self, key, getattr(stage, key))
        if self.objective.prompt_form == "stage":
            chosen = dataclasses.replace(self.objective, prompt_form=stage.prompt_form)
            object.__setattr__(self, "objective", chosen)
        _check(
            any(self.rate(name) for name in COMPONENTS),
            "optimizer.lr_by_component",
            "above 0 for one component",
            rates,
        )

    def rate(self, component: str) -> float:
        """The learning rate of a component; 0: it is frozen."""
        default = self.optimizer.lr if component in STAGES[self.stage].trains else 0.0
        return self.optimizer.lr_by_component.get(component, default)

    def ratios(self, early: bool = False) -> list[float]:
        """The share of each source in the mix, in the first steps of the stage (`early`) or later."""
        if self.data[0].ratio is not None:
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

    Relative paths in the file count from its folder, but for `output`, which counts from here. Raises
    FileNotFoundError, or ValueError that names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        data = _toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError is one
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
        _put(data, key.strip(), value.strip())
    _anchor(data, path.parent)
    try:
        return read(Config, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _put(data: dict[str, Any], key: str, value: str) -> None:
    try:
        parsed = _toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value  # a bare word is a string
    here: Any = data
    *way, last = key.split(".")
    for part in way:
        try:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        except (ValueError, IndexError):
            raise ValueError(f"--set {key}: there is no {part!r}") from None
    if not isinstance(here, dict):
        raise ValueError(f"--set {key}: {'.'.join(way)} has no keys")
    here[last] = parsed


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make the paths of a file independent of where the command is called."""

    def place(table: Any, key: str, must: bool = False) -> None:
        if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
            local = folder / Path(table[key]).expanduser()
            if must or local.exists():  # else a hub id, a builder's name or "tiny"
                table[key] = str(local)

    for key in ("model", "vae"):
        place(data, key)
    place(data.get("report"), "validation", must=True)
    place(data.get("loader"), "cache", must=True)
    report = data.get("report")
    if isinstance(report, dict) and isinstance(report.get("images"), list):
        report["images"] = [str(folder / x) if isinstance(x, str) and x else x for x in report["images"]]
    for source in data["data"] if isinstance(data.get("data"), list) else []:
        place(source, "manifest", must=True)
        place(source, "folder", must=True)
        place(source, "dataset")
        if isinstance(source, dict) and isinstance(source.get("files"), list):
            hub = "/" in str(source.get("dataset")) and not Path(str(source["dataset"])).exists()
            source["files"] = [
                x if hub or not isinstance(x, str) or "://" in x else str(folder / Path(x).expanduser())
                for x in source["files"]
            ]


def read(cls: type, data: Any, where: str = "") -> Any:
    """A dataclass from plain data, strictly. ValueError names the key and what would be right."""
    _check(isinstance(data, Mapping), where or "the configuration", "a table", data)
    hints = typing.get_type_hints(cls)
    dot = f"{where}." if where else ""
    for key in data:
        if key not in hints:
            raise ValueError(f"unknown key {dot}{key}; the keys there are {', '.join(hints)}")
    for f in dataclasses.fields(cls):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in data:
            raise ValueError(f"{dot}{f.name} is missing")
    return cls(**{key: _value(hints[key], value, f"{dot}{key}") for key, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return read(kind, value, where)
    if origin is types.UnionType:  # X | None; TOML has no null, but `to_dict` has
        return None if value is None else _value(inner[0], value, where)
    if origin is Literal:
        _check(value in inner and isinstance(value, str), where, f"one of {', '.join(inner)}", value)
        return value
    if origin is tuple:
        _check(isinstance(value, list | tuple), where, "a list", value)
        return tuple(_value(inner[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, Mapping), where, "a table", value)
        return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    good = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    _check(good and value == value and value not in (float("inf"), -float("inf")), where, names[kind], value)
    return value


def _check(good: bool, key: str, wanted: str, got: Any) -> None:
    if not good:
        raise ValueError(f"{key} must be {wanted}, got {got!r:.120}")
