# SPDX-License-Identifier: MIT
"""The seed API: `InferencePipeline`, `InferenceRequest` and the backbone class, as TorchUMM's users know them.

Follows the contract of TorchUMM's `umm.inference` (commit 083395e): requests by task, keyword dispatch to
`generation` and `understanding`, the same keys in and out. `JanusFlowBackbone` can be registered in TorchUMM.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .pipeline import DEFAULT_QUESTION, Pipeline, load

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
        cfg = dict(cfg or {})
        self.generation_cfg = GENERATION | dict(cfg.get("generation_cfg") or {})
        self.understanding_cfg = UNDERSTANDING | dict(cfg.get("understanding_cfg") or {})
        self.next_seed = int(cfg.get("seed", 42))
        self.pipe = load(
            cfg.get("model_path") or "deepseek-ai/JanusFlow-1.3B",
            vae_path=cfg.get("vae_path"),
            device=cfg.get("device", "auto"),
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
        cfg = self.generation_cfg | dict(generation_cfg or {})
        count = int(cfg["parallel_size"])
        seed = cfg.get("seed")
        if seed is None:
            seed, self.next_seed = self.next_seed, self.next_seed + max(count, 0)
        out = self._pipe().generate(
            prompt,
            parallel_size=count,
            cfg_weight=float(cfg["cfg_weight"]),
            num_inference_steps=int(cfg["num_inference_steps"]),
            img_size=int(cfg["img_size"]),
            seed=int(seed),
            progress=bool(cfg.get("progress", False)),
        )
        paths = [] if output_path is None else _save(out.images, Path(output_path))
        return {"image": out.images[0], "images": out.images, "saved_paths": paths}

    def understanding(
        self,
        prompt: str | None = None,
        images: Iterable[Any] | None = None,
        videos: Iterable[Any] | None = None,
        understanding_cfg: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Returns {"text": the answer, "sft_format": the prompt as the model read it}. All images are used."""
        if videos:
            raise NotImplementedError("JanusFlow reads images, not videos")
        cfg = self.understanding_cfg | dict(understanding_cfg or {})
        temperature = float(cfg["temperature"])
        if cfg["do_sample"] and temperature == 0:
            temperature = 1.0  # transformers' default where sampling is on and no temperature is given
        elif not cfg["do_sample"] and "temperature" not in (understanding_cfg or {}):
            temperature = 0.0
        answer = self._pipe().understand(
            (prompt or "").strip() or DEFAULT_QUESTION,
            images=list(images or []),
            max_new_tokens=int(cfg["max_new_tokens"]),
            temperature=temperature,
            top_p=float(cfg["top_p"]),
            top_k=int(cfg["top_k"]),
            seed=cfg.get("seed"),
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


def _request(request: InferenceRequest | Mapping[str, Any]) -> InferenceRequest:
    if isinstance(request, InferenceRequest):
        return request
    if not isinstance(request, Mapping):
        raise TypeError(f"a request is an InferenceRequest or a dict, not {type(request).__name__}")
    known = {f.name for f in fields(InferenceRequest)}
    unknown, missing = set(request) - known, {"backbone", "task"} - set(request)
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


def _save(images: list, path: Path) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix or ".png"
    names = (
        [path.with_suffix(suffix)]
        if len(images) == 1
        else [path.with_name(f"{path.stem}_{i}{suffix}") for i in range(len(images))]
    )
    for image, name in zip(images, names, strict=True):
        temporary = name.with_name(f".{secrets.token_hex(4)}.{name.name}")
        try:
            image.save(temporary)
            temporary.replace(name)
        finally:
            temporary.unlink(missing_ok=True)
    return [str(name) for name in names]
