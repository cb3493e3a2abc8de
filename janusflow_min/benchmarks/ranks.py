# SPDX-License-Identifier: MIT
"""Several processes that share one run: which of them this is, its share of the work, its device.

`torchrun` sets the ranks, on one machine or on many with a shared folder; RANK and WORLD_SIZE in the environment do as
well where ranks need not wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class RankInfo:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without them one process."""
        try:
            rank, size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
            local = int(environment.get("LOCAL_RANK", 0))
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from None
        if not 0 <= rank < size or local < 0:
            raise ValueError(f"RANK must lie in [0, WORLD_SIZE), got RANK {rank} of WORLD_SIZE {size}")
        return cls(rank, size, local)


def wait_for_ranks(world: RankInfo) -> None:
    """Back once every rank is here; one that dies makes torchrun end them all. ValueError without torchrun."""
    if world.size == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise ValueError("this stage's ranks wait for each other: start them with torchrun")
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """Those of the whole list, in its order, whose index is `rank` modulo `world`."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, {world}), got {rank}")
    return list(items[rank::world])


def rank_device(name: str, world: RankInfo) -> torch.device:
    """The device of that name; of several GPUs this rank's own, made the current one."""
    import torch

    from ..devices import pick_device

    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {world.local_rank}, but {torch.cuda.device_count()} GPUs are here; --device cuda:0 "
                "takes that one whatever the rank"
            )
        torch.cuda.set_device(world.local_rank)
        device = torch.device("cuda", world.local_rank)
    return device
