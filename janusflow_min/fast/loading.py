# SPDX-License-Identifier: MIT
"""`checkpoint.read_tensors`, faster to NVIDIA GPUs: several threads, through pinned memory, so that reading and copying
run side by side. To other devices it is the plain one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import check_float, open_weights

THREADS, PIECE = 8, 2**24  # bytes of pinned memory of each thread


def read_tensors(
    files: Mapping[Path, list[str]], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    if torch.device(device).type != "cuda":
        yield from checkpoint.read_tensors(files, device, dtype)
        return
    # All threads copy on the caller's stream: memory that one has freed is then another's only after it was read.
    stream, local = torch.cuda.current_stream(device), threading.local()

    def read(job: tuple[Path, str]) -> tuple[str, Tensor]:
        path, name = job
        if not hasattr(local, "piece"):
            local.piece = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            local.copied = torch.cuda.Event()
        with open_weights(path) as f, torch.cuda.stream(stream):
            return name, copied(check_float(path, name, f.get_tensor(name))).to(dtype)

    def copied(tensor: Tensor) -> Tensor:
        result = torch.empty_like(tensor, device=device)
        source, target = (x.view(-1).view(torch.uint8) for x in (tensor, result))
        for start in range(0, len(source), PIECE):
            part = source[start : start + PIECE]
            piece = local.piece[: len(part)]
            local.copied.synchronize()  # the piece is free again
            piece.numpy()[:] = part.numpy()  # one thread each, unlike torch's copy
            target[start : start + len(part)].copy_(piece, non_blocking=True)
            local.copied.record(stream)
        return result

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(read, [(path, name) for path, names in files.items() for name in names])
