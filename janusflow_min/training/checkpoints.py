# SPDX-License-Identifier: MIT
"""A run's checkpoints: written completely or not at all, found automatically, skipped if damaged.

`checkpoints/step-00000500/` holds what torch.distributed.checkpoint writes (shards of any number of ranks, which any
other number can read) and `checkpoint.json`: the step, the configuration, and size and CRC-32 of every file. All of it
is written under another name, synced to the disk, and renamed last.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .ranks import barrier, rank

META = "checkpoint.json"


def save(folder: Path, step: int, state: Mapping[str, Any], about: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step-N; every rank calls it. OSError if that fails, on a full disk say; older ones stay."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{target.name}"
    first = rank() == 0
    if first:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    barrier()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces that there is one process only
            dcp.save(dict(state), checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if first:
            files = {p.name: [p.stat().st_size, crc(p)] for p in sorted(temporary.iterdir())}
            with (temporary / META).open("w", encoding="utf-8") as f:
                json.dump({"step": step, "files": files, **about}, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            sync_folder(temporary)
            if target.exists():  # a broken one of this name, or the same step again
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync_folder(folder)
            for old in found(folder)[keep:]:
                shutil.rmtree(old)
    except (CheckpointException, OSError, RuntimeError) as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        left = found(folder)
        kept = f"the last one is {left[0]}" if left else "there is none yet"
        raise OSError(
            f"the checkpoint of step {step} cannot be written ({reason}); is the disk full? {kept}"
        ) from error
    barrier()
    return target


def load(folder: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into the tensors of `state`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


class Lock:
    """Keeps a second run out of a folder. The system releases the lock of a process that is gone, however it ended."""

    def __init__(self, folder: Path):
        """RuntimeError if another run holds it."""
        self.file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: no lock
            return
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip()
            self.file.close()
            raise RuntimeError(
                f"another run ({owner}) is writing to {folder}; wait for it, or choose another output"
            ) from None
        except OSError:  # a file system without locks
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written: checkpoints, exports, files."""
    for path in (*folder.glob(".*.writing-*"), *folder.glob(".writing-*"), *folder.glob("*/.*writing-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe(path: Path) -> dict[str, Any]:
    """A checkpoint's `checkpoint.json`, its files verified. ValueError if it is not complete."""
    try:
        about = json.loads((path / META).read_text(encoding="utf-8"))
        for name, (size, checksum) in about["files"].items():
            actual = (path / name).stat().st_size
            if actual != size:
                raise ValueError(f"{name} has {actual} bytes, not {size}")
            if crc(path / name) != checksum:
                raise ValueError(f"{name} has another checksum")
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "is damaged" if path.is_dir() else "is no checkpoint"
        raise ValueError(f"{path} {what} ({type(error).__name__}: {error})") from error


def newest(folder: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its `checkpoint.json`; damaged ones are reported to `tell`."""
    for path in found(folder):
        try:
            return path, describe(path)
        except ValueError as error:
            tell(f"{error}; trying an older one")
    return None


def found(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def crc(path: Path) -> int:
    value = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
