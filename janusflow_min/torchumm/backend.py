# SPDX-License-Identifier: MIT
"""The seed API: `InferencePipeline`, `InferenceRequest` and the backbone class, as TorchUMM's users know them.

Follows the contract of TorchUMM's `umm.inference` (commit 083395e): requests by task, keyword dispatch to
`generation` and `understanding`, the same keys in and out. `JanusFlowBackbone` can be registered in TorchUMM.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..files import atomic_file, expand

if TYPE_CHECKING:
    from ..pipeline import Pipeline

NAME = "janus_flow"
TASKS = ("generation", "editing", "understanding")
GENERATION = {"cfg_weight": 2.0, "num_inference_steps": 30, "parallel_size": 5, "img_size": 384}
# TorchUMM's, and what transformers fills in there once `do_sample` is set: no top_p, top_k 50.
UNDERSTANDING = {"max_new_tokens": 5120, "do_sample": False, "temperature": 0.0, "top_p": 1.0, "top_k": 50}
# Used where backbone_cfg has an editing_cfg, {} at least. The model was not trained for it: see `Pipeline.edit`.
EDITING = {"method": "flowedit", "strength": 0.8, "source_prompt": None, "num_inference_steps": 30}
EDITING |= {"cfg_weight": 3.0, "source_cfg_weight": 1.5}
# One dict of params may serve all tasks. use_cache is accepted and has no effect: the cache changes no answer.
PARAMS = tuple(dict.fromkeys([*GENERATION, *UNDERSTANDING, *EDITING, "seed", "use_cache", "progress"]))
BACKBONE_CFG: tuple[str, ...] = ("model_path", "janus_root", "vae_path", "seed", "torch_dtype", "device")
BACKBONE_CFG += ("generation_cfg", "understanding_cfg", "editing_cfg")
DTYPES = {"half": "float16", "float": "float32"}  # names of TorchUMM that `load` has not


@dataclass(slots=True)
class InferenceRequest:
    """One piece of work. `params` override the backbone's defaults for this request; unknown ones are ignored with a
    warning, since TorchUMM's runners pass one dict to every model and task."""

    backbone: str
    task: str
    prompt: str | None = None
    images: list[Any] = field(default_factory=list)  # paths (or PIL images)
    videos: list[Any] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    output_path: str | None = None

    def to_batch(self) -> dict[str, Any]:
        batch = {"prompt": self.prompt, "images": self.images, "videos": self.videos}
        return batch | ({"metadata": self.metadata} if self.metadata else {})


class JanusFlowBackbone:
    """The backbone "janus_flow": `load(cfg)`, `generation(...)`, `understanding(...)`, `editing(...)`.

    Editing is off, a NotImplementedError as TorchUMM's runners expect of a model without it, unless `load` gets an
    editing_cfg. A call before `load` loads the defaults.
    """

    name = NAME

    def __init__(
        self,
        model_path: str | None = None,
        janus_root: str | None = None,
        vae_path: str | None = None,
        seed: int = 42,
        torch_dtype: str | None = None,
    ) -> None:
        self.cfg = _merge({}, {"model_path": model_path, "vae_path": vae_path, "torch_dtype": torch_dtype})
        self.seed = seed
        self.pipe: Pipeline | None = None
        self.default_generation_cfg = dict(GENERATION)
        self.default_understanding_cfg = dict(UNDERSTANDING)
        self.default_editing_cfg = dict(EDITING)
        self.edits = False
        self.generated: Counter[str] = Counter()  # prompt -> images so far, of requests that gave no seed

    def load(self, cfg: Mapping[str, Any] | None = None) -> None:
        """cfg: model_path ("tiny", folder or hub id; default deepseek-ai/JanusFlow-1.3B), vae_path, seed (42),
        torch_dtype (default bfloat16 on a GPU, else float32), device, generation_cfg, understanding_cfg, and
        editing_cfg, which turns editing on, {} too. janus_root is accepted and not needed. ValueError for any other
        key."""
        from ..loading import load

        cfg = _merge(self.cfg, cfg)
        _refuse_unknown(cfg, BACKBONE_CFG, "backbone_cfg")
        for name, defaults in (
            ("generation_cfg", self.default_generation_cfg),
            ("understanding_cfg", self.default_understanding_cfg),
            ("editing_cfg", self.default_editing_cfg),
        ):
            changes = cfg.get(name) or {}
            if not isinstance(changes, Mapping):
                raise ValueError(f"backbone_cfg.{name} must be a mapping, got {changes!r:.80}")
            _refuse_unknown(changes, PARAMS, f"backbone_cfg.{name}")
            defaults.update(_merge({}, changes))
        self.edits = cfg.get("editing_cfg") is not None
        self.seed = _whole({"seed": self.seed} | cfg, "seed")
        self.generated.clear()
        self.pipe = load(
            cfg.get("model_path") or "deepseek-ai/JanusFlow-1.3B",
            vae_path=cfg.get("vae_path"),
            device=_device(cfg.get("device", "auto")),
            dtype=_dtype(cfg.get("torch_dtype", "auto")),
        )

    def generation(
        self,
        prompt: str | None,
        output_path: str | Path | None = None,
        generation_cfg: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Returns {"image": first PIL image, "images": all, "saved_paths": list of str, [] without output_path}.

        One image is saved as `output_path`, several as `stem_0.ext`, `stem_1.ext`, …; as PNG where the extension is
        no image format's. A `seed` in generation_cfg is this request's. Otherwise the seed follows from the
        backbone's seed, the prompt and the file's name; without a file, the images of one prompt count on from the
        backbone's seed. So a run that is resumed or spread over GPUs gives the images of one that is not.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"a generation needs a prompt that is not empty, got {prompt!r:.80}")
        _warn_unknown(generation_cfg)
        cfg = _merge(self.default_generation_cfg, generation_cfg)
        count = _whole(cfg, "parallel_size")
        names = _names(expand(output_path), count) if output_path else []  # its errors before the work
        seed = cfg.get("seed")
        if seed is None:
            seed = _file_seed(self.seed, prompt, names[0]) if names else self.seed + self.generated[prompt]
        out = self._pipe().generate(
            prompt,
            parallel_size=count,
            cfg_weight=_number(cfg, "cfg_weight"),
            num_inference_steps=_whole(cfg, "num_inference_steps"),
            img_size=_whole(cfg, "img_size"),
            seed=_whole({"seed": seed}, "seed"),
            progress=bool(cfg.get("progress", False)),
        )
        if not names and cfg.get("seed") is None:
            self.generated[prompt] += count
        _save(out.images, names)
        return {"image": out.images[0], "images": out.images, "saved_paths": [str(name) for name in names]}

    def understanding(
        self,
        prompt: str | None = None,
        images: Iterable[Any] | None = None,
        videos: Iterable[Any] | None = None,
        understanding_cfg: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Returns {"text": the answer, "sft_format": the prompt as the model read it}. All images are used.

        No prompt means "Describe the image." Answers are greedy unless `do_sample` is set, or a request names a
        temperature and no `do_sample`.
        """
        if videos:
            raise NotImplementedError("JanusFlow reads images, not videos")
        _warn_unknown(understanding_cfg)
        asked, cfg = _merge({}, understanding_cfg), _merge(self.default_understanding_cfg, understanding_cfg)
        if not asked.get("do_sample", cfg["do_sample"] or "temperature" in asked):
            temperature = 0.0
        else:  # 1 is transformers' default; a temperature of 0 in the request itself is meant
            temperature = _number(cfg, "temperature") or (0.0 if "temperature" in asked else 1.0)
        answer = self._pipe().understand(
            prompt,
            images=images,
            max_new_tokens=_whole(cfg, "max_new_tokens"),
            temperature=temperature,
            top_p=_number(cfg, "top_p"),
            top_k=_whole(cfg, "top_k"),
            seed=_whole(cfg, "seed") if "seed" in cfg else None,
        )
        return {"text": answer.text, "sft_format": answer.sft_format}

    def editing(
        self,
        prompt: str | None,
        images: Iterable[Any] | None = None,
        output_path: str | Path | None = None,
        editing_cfg: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Edit the first image without training for it, if `load` got an editing_cfg; else NotImplementedError.

        prompt: what the edited image shows, better than an instruction. Returns what `generation` returns, for one
        image of the model's size, seeded as there.
        """
        if not self.edits:
            raise NotImplementedError(
                "JanusFlow generates images from text and does not edit them; backbone_cfg.editing_cfg, {} at least, "
                "turns on editing without training"
            )
        sources = [images] if isinstance(images, str | Path | Image.Image) else list(images or ())
        if not sources or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"editing needs an image and a prompt, got {len(sources)} images and {prompt!r:.80}"
            )
        _warn_unknown(editing_cfg)
        cfg = _merge(self.default_editing_cfg, editing_cfg)
        names = _names(expand(output_path), 1) if output_path else []
        seed = cfg.get("seed")
        if seed is None:
            seed = _file_seed(self.seed, prompt, names[0]) if names else self.seed
        edited = self._pipe().edit(
            sources[0],
            prompt,
            source_prompt=cfg["source_prompt"],
            method=cfg["method"],
            strength=_number(cfg, "strength"),
            cfg_weight=_number(cfg, "cfg_weight"),
            source_cfg_weight=_number(cfg, "source_cfg_weight"),
            num_inference_steps=_whole(cfg, "num_inference_steps"),
            seed=_whole({"seed": seed}, "seed"),
            progress=bool(cfg.get("progress", False)),
        )
        _save(edited, names)
        return {"image": edited[0], "images": edited, "saved_paths": [str(name) for name in names]}

    def generate(self, batch: Mapping[str, Any], gen_cfg: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.generation(batch["prompt"], batch.get("output_path"), gen_cfg)

    def understand(
        self, batch: Mapping[str, Any], understanding_cfg: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.understanding(
            batch.get("prompt"), batch.get("images"), batch.get("videos"), understanding_cfg
        )

    def _pipe(self) -> Pipeline:
        if self.pipe is None:
            self.load()
        assert self.pipe is not None
        return self.pipe


class InferencePipeline:
    """`InferencePipeline(backbone_name="janus_flow", backbone_cfg={...}).run(request)`."""

    def __init__(self, backbone_name: str = NAME, backbone_cfg: Mapping[str, Any] | None = None):
        if normalized_name(backbone_name) != NAME:
            raise ValueError(f"backbone_name must be {NAME!r}, got {backbone_name!r}")
        self.backbone_name = NAME
        self.backbone = JanusFlowBackbone()
        self.backbone.load(backbone_cfg)

    def run(self, request: InferenceRequest | Mapping[str, Any]) -> dict[str, Any]:
        """Run a request, or a dict with its fields. ValueError for one that is not whole, NotImplementedError for
        editing that is not turned on."""
        request = _request(request)
        if normalized_name(request.backbone) != self.backbone_name:
            raise ValueError(
                f"the request is for backbone {request.backbone!r}, this pipeline is {self.backbone_name!r}"
            )
        if request.task == "generation":
            return self.backbone.generation(
                prompt=request.prompt, output_path=request.output_path, generation_cfg=request.params
            )
        if request.task == "understanding":
            return self.backbone.understanding(
                prompt=request.prompt,
                images=request.images,
                videos=request.videos,
                understanding_cfg=request.params,
            )
        if request.task == "editing":
            return self.backbone.editing(
                prompt=request.prompt,
                images=request.images,
                output_path=request.output_path,
                editing_cfg=request.params,
            )
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {request.task!r}")

    def run_many(
        self, requests: Iterable[InferenceRequest | Mapping[str, Any]], batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """One after the other; batch_size has no effect, as in TorchUMM."""
        return [self.run(request) for request in requests]


def normalized_name(name: Any) -> str:
    """Of a backbone, as TorchUMM's runners spell it: " Janus-Flow" is "janus_flow"."""
    return str(name).strip().lower().replace("-", "_")


def unknown_params(params: Mapping[str, Any] | None) -> list[str]:
    return sorted(str(key) for key in params or {} if key not in PARAMS)


def _refuse_unknown(cfg: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if unknown := sorted(str(key) for key in cfg if key not in known):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known ones are {', '.join(known)}")


def _warn_unknown(params: Mapping[str, Any] | None) -> None:
    if unknown := unknown_params(params):
        warnings.warn(f"JanusFlow has no params {', '.join(unknown)}; they are ignored", stacklevel=4)


def _device(device: Any) -> Any:
    """Where cfg names no GPU: the current one, which TorchUMM's runners set to a rank's own under torchrun."""
    import torch

    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _dtype(dtype: Any) -> Any:
    """A name of TorchUMM's configurations as `load` takes it."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.strip().lower().removeprefix("torch.")
    return DTYPES.get(name, name)


def _file_seed(seed: int, prompt: str, path: Path) -> int:
    digest = hashlib.sha256(json.dumps([seed, prompt, path.name]).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _request(request: InferenceRequest | Mapping[str, Any]) -> InferenceRequest:
    if isinstance(request, InferenceRequest):
        return request
    if not isinstance(request, Mapping):
        raise TypeError(f"a request is an InferenceRequest or a dict, not {type(request).__name__}")
    known = {f.name for f in fields(InferenceRequest)}
    unknown = set(request) - known
    missing = {key for key in ("backbone", "task") if request.get(key) is None}
    if unknown or missing:
        raise ValueError(
            f"a request needs backbone and task and may have {', '.join(sorted(known - {'backbone', 'task'}))}; "
            + "; ".join(
                f"{w}: {', '.join(sorted(k))}" for w, k in (("missing", missing), ("unknown", unknown)) if k
            )
        )
    return InferenceRequest(
        **{k: v for k, v in request.items() if v is not None or k in ("prompt", "output_path")}
    )


def _merge(defaults: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """`defaults` with what `changes` says; a None in it says nothing."""
    return dict(defaults) | {key: value for key, value in (changes or {}).items() if value is not None}


def _whole(cfg: Mapping[str, Any], key: str) -> int:
    """A whole number of a configuration, which may hold it as 4, 4.0 or "4"; 4.5 and true raise ValueError."""
    value = cfg[key]
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a whole number, got {value!r:.80}") from None


def _number(cfg: Mapping[str, Any], key: str) -> float:
    try:
        return float(cfg[key])
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a number, got {cfg[key]!r:.80}") from None


def _save(images: Iterable[Image.Image], names: Iterable[Path]) -> None:
    for image, name in zip(images, names, strict=False):  # no names without output_path
        with atomic_file(name, sync=False) as temporary:
            image.save(temporary, format=_format(name) or "PNG")


def _format(path: Path) -> str | None:
    """PIL's name of the format that the extension stands for; None where it writes no such format."""
    form = Image.registered_extensions().get(path.suffix.lower())
    return form if form in Image.SAVE else None


def _names(path: Path, count: int) -> list[Path]:
    """The files of `count` images, named as TorchUMM names them. IsADirectoryError where a folder has such a name."""
    suffix = path.suffix or ".png"
    names = [path.with_suffix(suffix)]
    if count != 1:
        names = [path.with_name(f"{path.stem}_{i}{suffix}") for i in range(count)]
    for name in names:
        if name.is_dir():
            raise IsADirectoryError(f"output_path: {name} is a folder; name a file in it")
    return names
