# SPDX-License-Identifier: MIT
"""Devices and dtypes by name."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA, then Apple's MPS, then the CPU. ValueError for a device that this machine lacks."""
    if str(device) == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if str(device).split(":")[0] == "meta":
        raise ValueError('device "meta" holds no weights; to look at a checkpoint, use `janusflow-min info`')
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} is not usable here: {str(error).splitlines()[0]}") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on CUDA, else float32. Names as in torch, with or without "torch.", or short ones: "bf16"."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        chosen = DTYPES.get(SHORT_NAMES.get(name, name))
    else:
        chosen = dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return chosen
