# SPDX-License-Identifier: MIT
"""janusflow-min: JanusFlow in plain PyTorch.

Start with `load` and `Pipeline`; to read the model, start at `model.py`. Names are imported when first used, so
that `import janusflow_min` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answering import Answer
    from .config import JanusFlowConfig
    from .loading import load, save
    from .model import JanusFlow
    from .pipeline import Generation, Pipeline
    from .publish import push_to_hub
    from .torchumm import InferencePipeline, InferenceRequest, JanusFlowBackbone

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Generation",
    "InferencePipeline",
    "InferenceRequest",
    "JanusFlow",
    "JanusFlowBackbone",
    "JanusFlowConfig",
    "Pipeline",
    "load",
    "push_to_hub",
    "save",
]
_MODULES = {"JanusFlowConfig": "config", "JanusFlow": "model", "load": "loading", "save": "loading"}
_MODULES["push_to_hub"] = "publish"
_MODULES |= {"Answer": "answering", "Generation": "pipeline", "Pipeline": "pipeline"}
_MODULES |= dict.fromkeys(("InferencePipeline", "InferenceRequest", "JanusFlowBackbone"), "torchumm")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
