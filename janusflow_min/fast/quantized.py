# SPDX-License-Identifier: MIT
"""The LLM's matrices in 8 bits: `load(quantization=...)`. What it computes, in plain PyTorch on any device.

A matrix keeps one scale for each of its rows (output channels); a product's input gets one for each of its rows
(tokens) on the way, so that both operands are 8 bits wide and a GPU multiplies them twice as fast as bfloat16. One
row alone, which is what answering one question has, is not rounded: there only the weights' bytes count.

Two number formats: "int8", steps of equal size, the finer one where no value of a row towers over the others; "fp8"
(e4m3), steps of equal ratio, for which outliers do not matter. Norms, embeddings, attention, SigLIP, UViT and VAE
stay as they are. The kernels are in `products.py`.

Legend: M rows of the input, K inputs, N outputs of a linear layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import JanusFlow

QUANTIZATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Quantized:
    """A matrix (N, K) as values of 8 bits, int8 or e4m3, times a fp32 scale (N,) for each row."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self) -> Tensor:
        """(N, K) fp32."""
        return self.values.float() * self.scale[:, None]


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Round each row of x (N, K) to 8 bits, its largest value to the format's largest."""
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-30) / LARGEST[dtype]
    x = x / scale[:, None]
    return Quantized((x if dtype.is_floating_point else x.round()).to(dtype), scale)


Weight = Tensor | Quantized


def linear(x: Tensor, weight: Weight) -> Tensor:
    """(M, K) by (N, K) -> (M, N) in x's dtype; with 8 bits summed in fp32."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    kind, wide = weight.values.dtype, x.float()
    if kind == torch.int8 and x.device.type == "cpu":
        sums = _whole_products(wide, weight.values)
    elif len(x) == 1:
        sums = wide @ weight.values.float().T
    else:
        rows = quantize(wide, kind)
        sums = rows.values.float() @ weight.values.float().T * rows.scale[:, None]
    return (sums * weight.scale).to(x.dtype)


def _whole_products(x: Tensor, values: Tensor) -> Tensor:
    """The same by a CPU's own instructions for int8, whose sums are exact. Of one row what the rounding leaves over
    is rounded and multiplied too, which keeps 14 bits of it."""
    rows = quantize(x, torch.int8)
    sums = torch._int_mm(rows.values, values.t()) * rows.scale[:, None]
    if len(x) == 1:
        rest = quantize(x - rows.dequantize(), torch.int8)
        sums += torch._int_mm(rest.values, values.t()) * rest.scale[:, None]
    return sums


class QuantizedLinear(nn.Module):
    """In the place of an `nn.Linear` without bias."""

    def __init__(self, weight: Quantized):
        super().__init__()
        self.values = nn.Parameter(weight.values, requires_grad=False)
        self.scale = nn.Parameter(weight.scale, requires_grad=False)

    @property
    def weight(self) -> Quantized:
        return Quantized(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


@torch.no_grad()
def quantize_llm(model: JanusFlow, quantization: str, device: torch.device) -> None:
    """Replace the LLM's linear layers, head included, one by one, and move the model: of these only 8 bits.

    The first blocks, one of every twelve, stay as they are: what they add is large beside what they add it to, and
    all later ones see it. Of the official model's two that is a third of the error (docs/quantization.md).
    """
    blocks = list(model.llm.layers)[math.ceil(len(model.llm.layers) / 12) :]
    for parent in (model.llm, *(module for block in blocks for module in block.modules())):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                weight = quantize(child.weight.to(device), QUANTIZATIONS[quantization])
                setattr(parent, name, QuantizedLinear(weight))
    model.llm.quantization = quantization
    model.to(device)


def refuse_quantized(model: JanusFlow, what: str) -> None:
    """ValueError for what needs the weights as they were."""
    if (kind := model.llm.quantization) is not None:
        raise ValueError(f"the LLM is rounded to {kind}: to {what}, load it without quantization")
