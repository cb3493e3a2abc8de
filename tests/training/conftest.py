# SPDX-License-Identifier: MIT
"""A small data set of all kinds, and runs of the tiny random checkpoint over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janusflow_min.training.config import Config
from janusflow_min.training.settings import read


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Hugging Face `datasets`, offline and with a cache of the session's own."""
    module = pytest.importorskip("datasets")
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setattr(huggingface_hub.constants, name, True)
            patch.setattr(module.config, name, True, raising=False)
        patch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(module.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield module


def talk(question: str, answer: str, *images: str) -> dict[str, Any]:
    """A conversation's row."""
    user = {"role": "User", "content": "<image_placeholder>\n" * len(images) + question}
    if images:
        user["images"] = list(images)
    return {"conversation": [user, {"role": "Assistant", "content": answer}]}


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    """12 pictures with prompts, 8 conversations with 0 to 2 images, 6 texts: all of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    words = [
        "a",
        "red",
        "cat",
        "sits",
        "on",
        "the",
        "blue",
        "mat",
        "and",
        "looks",
        "at",
        "one",
        "small",
        "yellow",
        "bird",
    ]
    for i in range(12):
        width, height = rng.integers(40, 120, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": " ".join(words[: 1 + i])})
    for i in range(8):
        images = [f"{i}.png", f"{i + 1}.png"][: (1, 1, 2, 0)[i % 4]]
        rows.append(talk("What is it?", " ".join(words[: 1 + i]), *images))
    rows += [{"text": " ".join(words * (1 + i))} for i in range(6)]
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def settings_for(parity_dir, manifest) -> Callable[..., Config]:
    """A configuration of six short steps; keyword arguments override, tables as dicts."""

    def make(output: Path, **changes: Any) -> Config:
        kinds = ("generation", "understanding", "text")
        data: dict[str, Any] = {
            "model": str(parity_dir),
            "output": str(output),
            "device": "cpu",
            "steps": 6,
            "batch": 6,
            "micro_batch": 4,
            "save_every": 2,
            "data": [{"kind": kind, "manifest": str(manifest)} for kind in kinds],
            "optimizer": {"lr": 1e-3, "warmup": 2},
            "objective": {"alignment_layer": 2},
            "loader": {"workers": 0},
            "report": {"every": 0, "tracker": "none"},
        }
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(data.get(key), dict) else value
        return read(Config, data)

    return make


@pytest.fixture
def settings(settings_for, tmp_path) -> Callable[..., Config]:
    """`settings_for` with the test's own folder as output."""
    return lambda output=tmp_path / "run", **changes: settings_for(output, **changes)


@pytest.fixture
def rounds_for(parity_dir, tmp_path) -> Callable[..., Config]:
    """A configuration of four short rounds of a stage, its table `own`; keyword arguments override, tables as dicts."""

    def make(stage: str, own: dict[str, Any], batch: int, output: str = "run", **changes: Any) -> Config:
        data: dict[str, Any] = {
            "model": str(parity_dir),
            "output": str(tmp_path / output),
            "device": "cpu",
            "stage": stage,
            "steps": 4,
            "batch": batch,
            "micro_batch": 4,
            "save_every": 2,
            "export_dtype": "float32",
            "objective": {"alignment_layer": 2},
            "optimizer": {"lr": 1e-3, "warmup": 2, "ema_decay": 0.5},
            stage: {"updates": 2, "validation": 0} | own,
            "report": {"every": 0, "tracker": "none"},
        }
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(data.get(key), dict) else value
        return read(Config, data)

    return make
