# SPDX-License-Identifier: MIT
"""TorchUMM's API (`backend`), and its unmodified runners with this library in them (`launcher`)."""

from .backend import InferencePipeline, InferenceRequest, JanusFlowBackbone

__all__ = ["InferencePipeline", "InferenceRequest", "JanusFlowBackbone"]
