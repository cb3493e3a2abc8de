# SPDX-License-Identifier: MIT
"""The processes of a run: one, or under torchrun one for each device."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..devices import pick_device
from .config import Config


def start(config: Config) -> tuple[torch.device, int, int, str]:
    """Device, rank, number of ranks and the form of parallelism; under torchrun the process group is made."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch < world:
        raise ValueError(f"batch must be at least the number of ranks, {world}; got {config.batch}")
    device, parallel = pick_device(config.device), config.parallel
    if world == 1 or parallel == "none":
        if world > 1:
            raise ValueError('parallel must be "auto", "replicate" or "fsdp" under torchrun, got "none"')
        return device, 0, 1, "none"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), world, "replicate" if parallel == "auto" else parallel


def whole_tensor(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
