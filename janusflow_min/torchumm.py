# SPDX-License-Identifier: MIT
"""The seed API: `InferencePipeline`, `InferenceRequest` and the backbone class, as TorchUMM's users know them.

Follows the contract of TorchUMM's `umm.inference` (commit 083395e): requests by task, keyword dispatch to
`generation` and `understanding`, the same keys in and out. `JanusFlowBackbone` can be registered in TorchUMM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .files import atomic_file
from .loading import load
from .pipeline import Pipeline

NAME = "janus_flow"
TASKS = ("generation", "editing", "understanding")
GENERATION = {"cfg_weight": 2.0, "num_inference_steps": 30, "parallel_size": 5, "img_size": 384}
UNDERSTANDING = {"max_new_tokens": 512, "do_sample": False, "temperature": 0.0, "top_p": 0.95, "top_k": 50}


@dataclass(slots=True)
class InferenceRequest:
    """One piece of work. `params` override the backbone's defaults for this request; unknown ones are ignored."""

    backbone: str
    task: str
    prompt: str | None = None
    images: list[Any] = field(default_factory=list)  # paths (or PIL images)
    videos: list[Any] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    output_path: str | None = None


class JanusFlowBackbone:
    """The backbone "janus_flow": `load(cfg)`, `generation(...)`, `understanding(...)`.

    It paints and answers but does not edit: TorchUMM's runners expect that absence to raise NotImplementedError,
    so there is no `editing` here.
    """

    name = NAME

    def __init__(self) -> None:
        self.pipe: Pipeline | None = None
        self.generation_cfg, self.understanding_cfg = dict(GENERATION), dict(UNDERSTANDING)
        self.next_seed = 42

    def load(self, cfg: Mapping[str, Any] | None = None) -> None:
        """cfg: model_path ("tiny", folder or hub id), vae_path, seed (42; start of the stream of image seeds),
        torch_dtype, device, generation_cfg, understanding_cfg. janus_root is accepted and not needed."""
        cfg = _merge({}, cfg)
        self.generation_cfg = _merge(GENERATION, cfg.get("generation_cfg"))
        self.understanding_cfg = _merge(UNDERSTANDING, cfg.get("understanding_cfg"))
        self.next_seed = _whole(cfg, "seed", 42)
        self.pipe = load(
            cfg.get("model_path") or "deepseek-ai/JanusFlow-1.3B",
            vae_path=cfg.get("vae_path"),
            device=_device(cfg.get("device", "auto")),
            dtype=cfg.get("torch_dtype", "auto"),
        )

    def generation(
        self,
        prompt: str,
        output_path: str | Path | None = None,
        generation_cfg: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Returns {"image": first PIL image, "images": all, "saved_paths": list of str, [] without output_path}.

        One image is saved as `output_path`, several as `stem_0.ext`, `stem_1.ext`, … A `seed` in generation_cfg is
        this request's; otherwise every image takes the next of the stream that `load` started.
        """
        cfg = _merge(self.generation_cfg, generation_cfg)
        count = _whole(cfg, "parallel_size")
        names = _names(Path(output_path), count) if output_path else []  # its errors before the work
        seed = _whole(cfg, "seed", self.next_seed)
        if "seed" not in cfg:
            self.next_seed += max(count, 0)
        out = self._pipe().generate(
            prompt,
            parallel_size=count,
            cfg_weight=float(cfg["cfg_weight"]),
            num_inference_steps=_whole(cfg, "num_inference_steps"),
            img_size=_whole(cfg, "img_size"),
            seed=seed,
            progress=bool(cfg.get("progress", False)),
        )
        for image, name in zip(out.images, names, strict=False):  # no names without output_path
            _save(image, name)
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
        asked, cfg = _merge({}, understanding_cfg), _merge(self.understanding_cfg, understanding_cfg)
        if not asked.get("do_sample", cfg["do_sample"] or "temperature" in asked):
            temperature = 0.0
        else:  # 1 is transformers' default; a temperature of 0 in the request itself is meant
            temperature = float(cfg["temperature"]) or (0.0 if "temperature" in asked else 1.0)
        answer = self._pipe().understand(
            prompt,
            images=images,
            max_new_tokens=_whole(cfg, "max_new_tokens"),
            temperature=temperature,
            top_p=float(cfg["top_p"]),
            top_k=_whole(cfg, "top_k"),
            seed=_whole(cfg, "seed", None),
        )
        return {"text": answer.text, "sft_format": answer.sft_format}

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
            raise RuntimeError("the backbone is not loaded; call load(cfg) first")
        return self.pipe


class InferencePipeline:
    """`InferencePipeline(backbone_name="janus_flow", backbone_cfg={...}).run(request)`."""

    def __init__(self, backbone_name: str = NAME, backbone_cfg: Mapping[str, Any] | None = None):
        if backbone_name != NAME:
            raise ValueError(f"backbone_name must be {NAME!r}, got {backbone_name!r}")
        self.backbone_name = backbone_name
        self.backbone = JanusFlowBackbone()
        self.backbone.load(backbone_cfg)

    def run(self, request: InferenceRequest | Mapping[str, Any]) -> dict[str, Any]:
        """Run a request, or a dict with its fields. ValueError for one that is not whole, NotImplementedError for
        editing."""
        request = _request(request)
        if request.backbone != self.backbone_name:
            raise ValueError(
                f"the request is for backbone {request.backbone!r}, this pipeline is {self.backbone_name!r}"
            )
        if request.task == "generation":
            if not (request.prompt or "").strip():
                raise ValueError("a generation request needs a prompt that is not empty")
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
            raise NotImplementedError("JanusFlow paints from text; it does not edit images")
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {request.task!r}")

    def run_many(self, requests: Iterable[InferenceRequest | Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.run(request) for request in requests]


def _device(device: Any) -> Any:
    """Where cfg names no card: the current one, which TorchUMM's runners set to a rank's own under torchrun."""
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return device


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


def _whole(cfg: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """A whole number of a configuration, which may hold it as 4, 4.0 or "4"; 4.5 and true raise ValueError."""
    value = cfg.get(key, default)
    if value is None:
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a whole number, got {value!r}") from None


def _names(path: Path, count: int) -> list[Path]:
    """The files of `count` images. ValueError for an extension that PIL cannot write."""
    suffix = path.suffix or ".png"
    if Image.registered_extensions().get(suffix.lower()) not in Image.SAVE:
        raise ValueError(f"output_path {str(path)!r}: {suffix!r} is no image format that PIL writes")
    if count == 1:
        return [path.with_suffix(suffix)]
    return [path.with_name(f"{path.stem}_{i}{suffix}") for i in range(count)]


def _save(image: Image.Image, path: Path) -> None:
    with atomic_file(path) as temporary:
        image.save(temporary)
