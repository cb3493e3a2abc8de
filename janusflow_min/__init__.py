# SPDX-License-Identifier: MIT
"""janusflow-min: JanusFlow in plain PyTorch.

Start with `load` and `Pipeline`; to read the model, start at `model.py`.
"""

from .config import JanusFlowConfig
from .loading import load, save
from .model import JanusFlow
from .pipeline import Answer, Generation, Pipeline
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
    "save",
]
