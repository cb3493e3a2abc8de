# SPDX-License-Identifier: MIT
"""Devices and dtypes by name; how much memory is free."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

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


def pick_dtype(dtype: str | torch.dtype, device: torch.device, parameters: int = 0) -> torch.dtype:
    """ "auto": bfloat16 on CUDA, and, with a warning, on a CPU where so many parameters would not fit in float32; else
    float32. Names as in torch, with or without "torch.", or short ones: "bf16"."""
    if dtype == "auto":
        needed = 1.1 * 4 * parameters  # a tenth for the VAE and for what is computed
        free = free_memory() if device.type == "cpu" and needed else None
        if free is not None and needed > free:
            warnings.warn(
                f"bfloat16, because float32 needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; "
                'dtype="float32" takes it all the same',
                stacklevel=3,
            )
            return torch.bfloat16
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        chosen = DTYPES.get(SHORT_NAMES.get(name, name))
    else:
        chosen = dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that this process can still take, within its container's limit; None where the system
    does not say. root: where /proc and /sys are."""
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        free.append(1024 * int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    if not free and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError, IndexError):  # "max" is none
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text())
        used = int(
            (group / "memory.stat").read_text().split("anon ")[1].split()[0]
        )  # the cache of files gives way
        free.append(max(0, limit - used))
    return min(free, default=None)
