# SPDX-License-Identifier: MIT
"""Nodes for ComfyUI, in its category JanusFlow: Load, LoRA, Generate, Ask, Edit.

`custom_nodes/janusflow/__init__.py` is one line:

    from janusflow_min.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

IMAGE is float (B, H, W, 3) in [0, 1]; MASK is (B, H, W), 1 where it may change. Seeds are inputs: no IS_CHANGED.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..editing import EDIT_BATCH
from ..loading import load
from ..pipeline import Pipeline
from ..sampling import MAX_BATCH
from ..sampling_options import EDIT_METHODS

try:
    from comfy import model_management, utils
except ImportError:  # outside ComfyUI
    model_management = None

TEXT = ("STRING", {"multiline": True, "default": ""})
INPUTS: dict[str, tuple] = {  # what ComfyUI shows, and lets pass, for an input of this name
    **{"model": ("JANUSFLOW",), "image": ("IMAGE",), "mask": ("MASK",)},
    "source": ("STRING", {"default": "tiny"}),
    "scale": ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}),
    **dict.fromkeys(("prompt", "negative_prompt", "source_prompt", "question"), TEXT),
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1, "control_after_generate": True}),
    "parallel_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    "num_inference_steps": ("INT", {"default": 30, "min": 1, "max": 1000}),
    "cfg_weight": ("FLOAT", {"default": 2.0, "min": 0.0, "max": 30.0, "step": 0.1}),
    "method": ([*EDIT_METHODS],),
    "strength": ("FLOAT", {"default": 0.8, "min": 0.05, "max": 1.0, "step": 0.05}),
    "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 4096}),
}


@dataclass(frozen=True)
class Loaded:
    """What wires of the type JANUSFLOW carry. The node that computes makes its own adapters active, so branches of a
    graph may differ in them and share the weights."""

    pipe: Pipeline
    adapters: dict[str, float]  # folder or hub id: scale

    def ready(self) -> Pipeline:
        for source in [each for each in self.adapters if each not in self.pipe.adapters]:
            self.pipe.load_lora(source, name=source, scale=0)
        self.pipe.set_adapters([*self.adapters], [*self.adapters.values()])
        return self.pipe


def step_callback(total: int) -> Any:
    """Moves ComfyUI's bar by one of `total` steps, and ends the node once its user has pressed cancel."""
    bar = utils.ProgressBar(total) if model_management else None

    def step(*_: Any) -> None:
        if bar:
            model_management.throw_exception_if_processing_interrupted()
            bar.update(1)

    return step


def to_arrays(image: torch.Tensor) -> list[np.ndarray]:
    """IMAGE (B, H, W, 3) or MASK (B, H, W) -> uint8 arrays."""
    return [*(image.float().cpu().clamp(0, 1) * 255).round().byte().numpy()]


class Node:
    CATEGORY, FUNCTION, RETURN_TYPES, REQUIRED, OPTIONAL = "JanusFlow", "run", ("IMAGE",), "", ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        kinds = {"required": cls.REQUIRED, "optional": cls.OPTIONAL}
        return {kind: {name: INPUTS[name] for name in names.split()} for kind, names in kinds.items()}


class Load(Node):
    """A folder, a hub id such as deepseek-ai/JanusFlow-1.3B, or "tiny", the trained default."""

    RETURN_TYPES, REQUIRED = ("JANUSFLOW",), "source"

    @torch.inference_mode(False)  # in which ComfyUI runs nodes; weights made there take no adapter
    def run(self, source):
        device = model_management.get_torch_device() if model_management else "auto"
        return (Loaded(load(source, device=device), {}),)


class LoRA(Node):
    """An adapter in peft's format, beside those that the model has; the same one again changes its scale."""

    RETURN_TYPES, REQUIRED = ("JANUSFLOW",), "model source scale"

    def run(self, model, source, scale):
        changed = Loaded(model.pipe, {**model.adapters, source: scale})
        changed.ready()  # what is wrong with it is said here
        return (changed,)


class Generate(Node):
    REQUIRED = "model prompt negative_prompt seed parallel_size num_inference_steps cfg_weight"

    def run(self, model, negative_prompt, **options):
        step = step_callback(options["num_inference_steps"] * math.ceil(options["parallel_size"] / MAX_BATCH))
        options |= {"negative_prompt": negative_prompt or None, "callback_on_step_end": step}
        return (torch.from_numpy(model.ready().generate(output_type="np", **options).images).float() / 255,)


class Ask(Node):
    """One answer to each image, greedily."""

    RETURN_TYPES, OUTPUT_IS_LIST, REQUIRED = ("STRING",), (True,), "model image question max_new_tokens"

    def run(self, model, image, question, max_new_tokens):
        answers, step = [""] * len(image), step_callback(max_new_tokens * len(image))
        questions = [question] * len(image)
        for i, piece in model.ready().stream(questions, to_arrays(image), max_new_tokens=max_new_tokens):
            answers[i] += piece
            step()
        return ([answer.strip() for answer in answers],)


class Edit(Node):
    """Changes the middle square of each image, at the model's size, without training for it: docs/editing.md."""

    REQUIRED, OPTIONAL = "model image prompt source_prompt seed method strength num_inference_steps", "mask"

    def run(self, model, image, source_prompt, mask=None, **options):
        if mask is not None:  # ComfyUI's may have another size than the image
            masks = [Image.fromarray(levels) for levels in to_arrays(mask.view(-1, *mask.shape[-2:]))]
            options["mask"] = [each.resize((image.shape[2], image.shape[1])) for each in masks]
        step = step_callback(options["num_inference_steps"] * math.ceil(len(image) / EDIT_BATCH))
        options |= {"source_prompt": source_prompt or None, "callback_on_step_end": step}
        edited = model.ready().edit(to_arrays(image), **options)
        return (torch.from_numpy(np.stack(edited)).float() / 255,)


NODE_CLASS_MAPPINGS = {f"JanusFlow{node.__name__}": node for node in (Load, LoRA, Generate, Ask, Edit)}
NODE_DISPLAY_NAME_MAPPINGS = {name: name.replace("Flow", "Flow ") for name in NODE_CLASS_MAPPINGS}
