# SPDX-License-Identifier: MIT
"""The ComfyUI nodes, called as ComfyUI calls them: by INPUT_TYPES and FUNCTION, with tensors, in inference mode."""

from __future__ import annotations

import importlib
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import janusflow_min as jf
from janusflow_min.integrations import comfyui
from janusflow_min.shapes import scenes

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
PROMPT, STAR = "a photo of a red star", "a photo of a blue star"


def call(name: str, **given):
    """As ComfyUI's executor: the inputs' defaults, checked against their limits, then FUNCTION of a fresh object."""
    cls = comfyui.NODE_CLASS_MAPPINGS[name]
    kinds, values = cls.INPUT_TYPES(), {}
    assert set(kinds) <= {"required", "optional", "hidden"}
    assert not set(given) - set(kinds["required"]) - set(kinds["optional"])
    for key, (kind, *more) in kinds["required"].items():
        usual = kind[0] if isinstance(kind, list) else (more[0]["default"] if more else None)
        values[key] = given.get(key, usual)
        assert values[key] is not None, f"{name} needs {key}"
        if more and "min" in more[0]:
            assert more[0]["min"] <= values[key] <= more[0]["max"]
    values |= {key: value for key, value in given.items() if key in kinds["optional"]}
    with torch.inference_mode():
        results = getattr(cls(), cls.FUNCTION)(**values)
    assert isinstance(results, tuple) and len(results) == len(cls.RETURN_TYPES)
    assert cls.CATEGORY == "JanusFlow" and name in comfyui.NODE_DISPLAY_NAME_MAPPINGS
    for kind, result in zip(cls.RETURN_TYPES, results, strict=True):
        if kind == "IMAGE":
            assert result.dtype == torch.float32 and result.ndim == 4 and result.shape[3] == 3
            assert result.min() >= 0 and result.max() <= 1
    return results[0]


@pytest.fixture(scope="module")
def model():
    return call("JanusFlowLoad", source="tiny")


@pytest.fixture(scope="module")
def pipe():
    return jf.load("tiny")


@pytest.fixture(scope="module")
def star(model):
    return call("JanusFlowGenerate", model=model, prompt=PROMPT, seed=3, num_inference_steps=4)


def levels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().byte().numpy()


def test_generate_makes_the_pipeline_s_images(model, pipe):
    """Stops: other pixels than `generate`'s, channels or axes in another order, a negative prompt without effect."""
    options = {"prompt": PROMPT, "seed": 3, "parallel_size": 2, "num_inference_steps": 4}
    image = call("JanusFlowGenerate", model=model, **options)
    assert np.array_equal(levels(image), pipe.generate(**options, output_type="np").images)
    other = call("JanusFlowGenerate", model=model, negative_prompt=STAR, **options)
    assert not torch.equal(image, other)
    again = call("JanusFlowGenerate", model=model, **options)
    assert torch.equal(image, again)  # so a cached result is a right one: no node needs IS_CHANGED


def test_ask_answers_each_image(model, pipe):
    """Stops: a batch of which only the first image is asked about, and pieces of two answers in one."""
    drawn = [scenes.sample_scene(random.Random(seed), "single_object") for seed in range(4)]
    images = torch.from_numpy(scenes.to_uint8(scenes.render(scenes.pack(drawn)))).float() / 255
    question = "Describe the picture."
    answers = call("JanusFlowAsk", model=model, image=images, question=question)
    assert answers == [pipe.understand(question, array).text.strip() for array in levels(images)]
    assert len(set(answers)) > 1 and all(" on a " in answer for answer in answers)
    assert comfyui.Ask.OUTPUT_IS_LIST == (True,)


def test_edit_changes_what_the_mask_says(model, pipe, star):
    """Stops: a mask that is upside down or inverted, and one of another size than its image."""
    options = {"prompt": STAR, "seed": 1, "num_inference_steps": 4}
    whole = call("JanusFlowEdit", model=model, image=star, **options)
    edited = pipe.edit(levels(star)[0], progress=False, **options)
    assert np.array_equal(levels(whole)[0], np.asarray(edited[0]))
    for size in (star.shape[1], 64):
        mask = torch.zeros(1, size, size)
        mask[:, : size // 4, :] = 1
        held = levels(call("JanusFlowEdit", model=model, image=star, mask=mask, **options))
        quarter = star.shape[1] // 4
        assert np.array_equal(held[:, quarter + 4 :], levels(star)[:, quarter + 4 :])
        assert not np.array_equal(held[:, :quarter], levels(star)[:, :quarter])
    alone = call("JanusFlowEdit", model=model, image=star, mask=mask[0], **options)
    assert np.array_equal(levels(alone), held)
    with pytest.raises(ValueError, match="nothing may change"):
        call("JanusFlowEdit", model=model, image=star, mask=torch.zeros(1, 64, 64), **options)


def test_branches_of_a_graph_have_their_own_adapters(model, tmp_path):
    """Stops: an adapter that stays in the weights of the branch without it, and weights made in inference mode, which
    take none."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], r=4)
        peft.get_peft_model(jf.load("tiny").model, config).save_pretrained(tmp_path / "one")
    options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2}
    plain = call("JanusFlowGenerate", model=model, **options)
    half = call("JanusFlowLoRA", model=model, source=str(tmp_path / "one"), scale=0.5)
    full = call("JanusFlowLoRA", model=half, source=str(tmp_path / "one"))
    assert full.pipe is model.pipe and (half.adapters, full.adapters) == (
        {str(tmp_path / "one"): 0.5},
        {str(tmp_path / "one"): 1.0},
    )
    images = [call("JanusFlowGenerate", model=each, **options) for each in (half, full, model, half)]
    assert torch.equal(images[2], plain) and torch.equal(images[0], images[3])
    assert not torch.equal(images[0], plain) and not torch.equal(images[0], images[1])
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        call("JanusFlowLoRA", model=model, source=str(tmp_path))


@pytest.fixture
def inside(monkeypatch):
    """The module as ComfyUI imports it; what its bars and its cancel button do."""
    steps: list[tuple[int, int]] = []

    class Cancelled(Exception):
        pass

    class ProgressBar:
        def __init__(self, total):
            self.total, self.at = total, 0

        def update(self, by):
            self.at += by
            steps.append((self.at, self.total))

    def throw():
        if cancel_after and len(steps) >= cancel_after[0]:
            raise Cancelled

    cancel_after: list[int] = []
    package, utils, management = (
        ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")
    )
    utils.ProgressBar = ProgressBar
    management.throw_exception_if_processing_interrupted = throw
    management.get_torch_device = lambda: torch.device("cpu")
    package.utils, package.model_management = utils, management
    for module in (package, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    importlib.reload(comfyui)
    yield steps, cancel_after, Cancelled
    monkeypatch.undo()
    importlib.reload(comfyui)


def test_bars_move_and_cancel_ends_every_node(inside, pipe):
    """Stops: a node that shows no progress, and one that goes on for minutes after the user has pressed cancel."""
    steps, cancel_after, cancelled = inside
    model = call("JanusFlowLoad")
    work = {
        "JanusFlowGenerate": {"prompt": PROMPT, "parallel_size": 17, "num_inference_steps": 2},
        "JanusFlowEdit": {
            "image": torch.rand(1, 32, 32, 3),
            "prompt": STAR,
            "num_inference_steps": 2,
            "strength": 1.0,
        },
        "JanusFlowAsk": {"image": torch.rand(1, 32, 32, 3), "question": "What is in the picture?"},
    }
    for name, given in work.items():
        steps.clear()
        cancel_after.clear()
        call(name, model=model, **given)
        assert steps[0][0] == 1 and len(steps) >= 2, name
        if name != "JanusFlowAsk":  # whose answer may be shorter than max_new_tokens
            assert steps[-1][0] == steps[-1][1], name
        steps.clear()
        cancel_after.append(1)
        with pytest.raises(cancelled):
            call(name, model=model, **given)
        assert len(steps) == 1, name


def test_the_line_of_the_docs_gives_comfyui_its_names():
    """Stops: a one-line custom node of the docs that ComfyUI finds nothing in."""
    line = re.search(r"^from janusflow_min.integrations.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[
        0
    ]
    found: dict = {}
    exec(line, found)
    assert set(found["NODE_CLASS_MAPPINGS"]) == set(found["NODE_DISPLAY_NAME_MAPPINGS"])
    assert len(found["NODE_CLASS_MAPPINGS"]) == 5 and line in comfyui.__doc__
