# SPDX-License-Identifier: MIT
"""What every benchmark's generation shares: whole files only, seeds from identity, shards, a manifest, resuming.

A run is a folder. `images/` in it is the layout that the benchmark's official scorer lists, so nothing else is ever
written there: files are made in `.work/` beside it, flushed to the disk and renamed, and a file that is there is
whole. `manifest.json` says what was painted and how; a rerun with anything else is refused.

Seeds come from an item's place in the benchmark's own order (`image_seed`), never from the order of painting. Items
are painted in blocks, cut once from the whole list: floating-point sums depend on a batch's shape and on the longest
prompt in it, so a block is always painted with the same neighbours, whichever rank has it and however many of its
files are there already. On a CPU the number of threads counts too, so a run has its own number (`cpu_threads`),
whatever torchrun or the machine says.

Rank r of w has blocks r, r + w, r + 2 w, …; ranks share a folder and need no other contact, so one that dies leaves
the others' files usable and a rerun fills its holes. `torchrun` sets the ranks, on one machine or on many with a
shared folder; RANK and WORLD_SIZE in the environment do as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from tqdm import tqdm

from ..files import atomic_file, check_folder, read_json, sha256
from ..options import option
from ..sampling_options import SamplingOptions

if TYPE_CHECKING:
    import torch

    from ..pipeline import Pipeline

T = TypeVar("T")
SEED_RULE = "seed + prompt index * images per prompt + sample index, one CPU generator for each image"
PNG = b"\x89PNG\r\n\x1a\n"
WRITERS = 4  # threads that compress PNG files while the next block is painted


@dataclass(frozen=True)
class Settings(SamplingOptions):
    """How a run is generated. What changes pixels is in the manifest."""

    model: str = option('"tiny", a folder in the official layout, or a hub id', "tiny")
    vae: str | None = option("the VAE's folder or hub id; without: the checkpoint's vae/, else SDXL's", None)
    device: str = option("auto is CUDA, then MPS, then CPU", "auto")
    dtype: str = option("auto is bfloat16 on CUDA, else float32", "auto")
    vae_dtype: str | None = option("float32 or bfloat16; without: as --dtype", None)
    seed: int = option("of the first image; the others' follow from their place", 0)
    batch_size: int = option("images generated at once; moves their last bits", 16)
    upstream_rounding: bool = option("round as the published code does", False)
    fast: bool = option("kernels and CUDA graphs where the GPU has them", True)
    compile: bool = option("torch.compile for the rest", False)
    threads: int = option("CPU threads of a process; moves the images' last bits", 1)
    limit: int | None = option("only the first prompts; a run without it goes on", None, kind=int)
    progress: bool = True


# Ranks and seeds -----------------------------------------------------------------------


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


def image_seed(base_seed: int, prompt_index: int, images_per_prompt: int, sample_index: int) -> int:
    """A seed that depends on which image it is alone: see SEED_RULE."""
    return base_seed + prompt_index * images_per_prompt + sample_index


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """Those of the whole list, in its order, whose index is `rank` modulo `world`."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, {world}), got {rank}")
    return list(items[rank::world])


# Files -----------------------------------------------------------------------


class RunFolder:
    """A run's folder: `images/` for scorers, everything else beside it.

    root: may be relative or begin with `~`; kept absolute, so that a path inside it means one thing.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is a file, not a folder")
        self.images = self.root / "images"
        self.work = self.root / ".work"
        self.manifest = self.root / "manifest.json"

    @contextmanager
    def writing(self, path: str | Path) -> Iterator[Path]:
        """A temporary path with the suffix of `path`, renamed to it when the block ends well: in `.work/` for what
        goes into `images/`, beside `path` for all else.

        path: absolute, or relative to the run's folder (not to the current one); on the same file system, or the
        rename fails.
        """
        path = self.root / path
        with atomic_file(path, self.work if path.is_relative_to(self.images) else None) as temporary:
            yield temporary

    def write_text(self, path: str | Path, text: str) -> None:
        """A lone surrogate, which UTF-8 does not have, is written as JSON's escape of it."""
        with self.writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_json(self, path: str | Path, value: Any) -> None:
        self.write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def write_image(self, path: str | Path, image: Image.Image) -> None:
        with self.writing(path) as temporary:
            image.save(temporary)

    def read_manifest(self) -> dict[str, Any]:
        """ValueError for what is no manifest, FileNotFoundError where there is none."""
        if not self.manifest.is_file():
            raise FileNotFoundError(f"{self.manifest} is missing: run the stage `generate` first")
        manifest = read_json(self.manifest)
        for key, kind in {"benchmark": str, "inputs_sha256": dict, "settings": dict}.items():
            if not isinstance(manifest.get(key), kind):
                raise ValueError(
                    f"{self.manifest} is no manifest of a run: its {key} is {manifest.get(key)!r}"
                )
        return manifest

    def tidy(self) -> None:
        """Drop what killed processes left; call it when nothing is missing any more."""
        shutil.rmtree(self.work, ignore_errors=True)


# The manifest -----------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of what computes pixels. Other versions or devices may change the last bits."""
    import torch

    from .. import __version__

    cuda = torch.cuda.is_available()
    return {
        "janusflow_min": __version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
    }


def checkpoint_identity(settings: Settings) -> dict[str, str]:
    """The names and hashes of the checkpoint's and the VAE's configuration and weights."""
    from ..hub import SDXL_VAE, resolve, resolve_vae

    folder = resolve(settings.model)
    vae = resolve_vae(folder, settings.vae)
    return {
        "model": _public_name(settings.model),
        "model_sha256": _weights_sha256(folder),
        "vae": "the checkpoint's" if vae == folder / "vae" else _public_name(settings.vae or SDXL_VAE),
        "vae_sha256": _weights_sha256(vae),
    }


def _weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def _public_name(source: str) -> str:
    """A hub id as it is; of a folder its own name: a path says nothing on another machine."""
    local = Path(source).expanduser()
    return local.resolve().name if local.is_dir() else source


def paint_settings(settings: Settings) -> dict[str, Any]:
    """What of `settings` changes pixels, "auto" resolved on this machine."""
    from ..devices import pick_device, pick_dtype

    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    usual = "float32" if _name(dtype) == "float16" else _name(dtype)
    return {
        **settings.resolved(),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "upstream_rounding": settings.upstream_rounding,
        "device_type": device.type,
        "dtype": _name(dtype),
        "vae_dtype": usual if settings.vae_dtype is None else _name(pick_dtype(settings.vae_dtype, device)),
        "fast": settings.fast,
        "compile": settings.compile,
        "threads": settings.threads if device.type == "cpu" else None,
    }


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads: their number decides how sums are cut, so last bits."""
    import torch

    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_whole(path: Path) -> bool:
    """Whether a file is there and not empty; an image must not be damaged either: a PNG by its checksums, any other by
    decoding it."""
    if not path.is_file():
        return False
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        return path.stat().st_size > 0
    content = path.read_bytes()
    if content.startswith(PNG):
        return _png_is_whole(content)
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # whatever Pillow raises for broken bytes: struct.error, SyntaxError, OSError, …
        return False
    return True


def _png_is_whole(content: bytes) -> bool:
    """Every chunk (length, kind, data, checksum of kind and data) is as it was written, and the last one is IEND."""
    start = len(PNG)
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if zlib.crc32(content[start + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            return False
        if content[start + 4 : start + 8] == b"IEND":
            return end == len(content)
        start = end
    return False


def write_manifest(
    folder: RunFolder,
    benchmark: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    checkpoint: Mapping[str, str],
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    seed_rule: str = SEED_RULE,
) -> dict[str, Any]:
    """Write the manifest, or compare it with the one there; returns it.

    inputs: name -> sha256. settings: everything that changes output, the benchmark's own choices included. Raises
    ValueError, naming every difference, where the folder was made from other inputs, settings or weights; other
    versions or another device are only told, since they change last bits at most. All ranks may call this at once.
    """
    new = {
        "benchmark": benchmark,
        "inputs_sha256": dict(inputs),
        "settings": dict(settings),
        "seed_rule": seed_rule,
        "checkpoint": dict(checkpoint),
        "versions": versions(),
    }
    new = json.loads(json.dumps(new))  # tuples become lists, as they are when read
    if not folder.manifest.exists():
        folder.write_json(folder.manifest, new)
    old = folder.read_manifest()
    other = [line for line in differences(old, new) if not line.startswith("versions.")]
    if other:
        raise ValueError(
            f"{folder.root} was made with other settings; take another --out, or these: {'; '.join(other)}"
        )
    if old.get("versions") != new["versions"]:
        told = "; ".join(differences(old, new))
        log(f"{folder.root} was begun elsewhere, so last bits may differ between its images: {told}")
    return old


def differences(old: Any, new: Any, name: str = "", words: tuple[str, str] = ("there", "now")) -> list[str]:
    """What differs between two values as JSON holds them, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."), words)
        ]
    return [] if old == new else [f"{name}: {json.dumps(old)} {words[0]}, {json.dumps(new)} {words[1]}"]


# Painting -----------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark and the files that it becomes, named relative to `images/`."""

    index: int  # in the benchmark's own order; never renumbered within a shard
    prompt: str
    files: tuple[str, ...]
    texts: Mapping[str, str] = field(default_factory=dict)  # other files of the layout: name -> content


@dataclass(frozen=True)
class Coverage:
    """How much of a benchmark is there. An empty or a cut image counts as missing."""

    expected: int
    present: int
    missing: tuple[str, ...]  # file names

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        if self.complete:
            return f"all {self.expected} files are there"
        some = ", ".join(self.missing[:5]) + (", …" if len(self.missing) > 5 else "")
        return f"{self.present} of {self.expected} files are there; missing: {some}"


def coverage(items: Sequence[Item], images: Path) -> Coverage:
    """Of image files in the folder that scorers list."""
    names = [name for item in items for name in item.files]
    missing = tuple(name for name in names if not is_whole(images / name))
    return Coverage(len(names), len(names) - len(missing), missing)


def blocks(items: Sequence[T], images_per_prompt: int, batch_size: int) -> list[list[T]]:
    """The whole list cut into what is painted at once: always the same, see the file's first lines."""
    size = max(1, batch_size // images_per_prompt)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


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


def load_pipe(settings: Settings, world: RankInfo, parts: str = "generation") -> Pipeline:
    """The pipeline that `settings` describe, on this rank's own device where there are several."""
    from ..loading import load

    device = rank_device(settings.device, world)
    options: dict[str, Any] = dict(parts=parts, fast=settings.fast, compile=settings.compile)
    options["upstream_rounding"] = settings.upstream_rounding
    if parts != "understanding":
        options |= dict(vae_path=settings.vae, vae_dtype=settings.vae_dtype)
    quiet = not settings.progress or world.local_rank != 0
    return load(settings.model, device=device, dtype=settings.dtype, progress=not quiet, **options)


def paint(
    pipe: Pipeline | Callable[[], Pipeline],
    folder: RunFolder,
    items: Sequence[Item],
    images_per_prompt: int,
    settings: Settings,
    world: RankInfo | None = None,
    compose: Callable[[Sequence[Image.Image]], Sequence[Image.Image]] | None = None,
) -> Coverage:
    """Paint what of this rank's share is missing; returns the coverage of the whole benchmark.

    pipe: or a function that loads it, called only if something is missing. items: the whole benchmark, in its order.
    compose: makes the item's files of its `images_per_prompt` images, a grid for instance; without it they are
    one to one. Interrupted at any point, the files there are whole, and the same call goes on.
    """
    world = RankInfo.from_environment() if world is None else world
    wanted = len(items) if settings.limit is None else settings.limit
    files = 1 if not items else len(items[0].files)
    if compose is None and files != images_per_prompt:
        raise ValueError(f"{images_per_prompt} images of a prompt need as many files, got {files}")
    share = shard(
        blocks(list(enumerate(items)), images_per_prompt, settings.batch_size), world.rank, world.size
    )
    todo = []
    for block in share:
        lacking = [
            item.index
            for place, item in block
            if place < wanted
            and not all(is_whole(folder.images / name) for name in [*item.files, *item.texts])
        ]
        if lacking:
            todo.append(([item for _, item in block], set(lacking)))
    if not todo:
        return coverage(items, folder.images)
    for block, lacking in todo:
        for path in [folder.images / name for item in block if item.index in lacking for name in item.files]:
            check_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(
                    f"{path} is a folder, but an image is to be written there: move it away"
                )
    pipe = pipe() if callable(pipe) else pipe
    for block, _ in todo:  # the last prompt's error should not wait for the first's picture
        for item in block:
            pipe.processor.generation_prompt(item.prompt)
    count = sum(len(lacking) for _, lacking in todo)
    hidden = not settings.progress or world.local_rank != 0
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=count, desc="Painting", unit="prompt", disable=hidden) as bar,
    ):
        pending: list[Future] = []
        for block, lacking in todo:
            seeds = [
                image_seed(settings.seed, item.index, images_per_prompt, k)
                for item in block
                for k in range(images_per_prompt)
            ]
            images = pipe.generate(
                [item.prompt for item in block],
                parallel_size=images_per_prompt,
                seed=seeds,
                progress=False,
                **settings.resolved(),
            ).images
            for writing in pending:  # of the block before: no more than one waits in memory, errors are told
                writing.result()
            groups = [images[i : i + images_per_prompt] for i in range(0, len(images), images_per_prompt)]
            pending = [
                writers.submit(_write, folder, item, group, compose)
                for item, group in zip(block, groups, strict=True)
                if item.index in lacking
            ]
            bar.update(len(lacking))
        for writing in pending:
            writing.result()
    found = coverage(items, folder.images)
    if found.complete:
        folder.tidy()
    return found


def _write(folder: RunFolder, item: Item, images: Sequence[Image.Image], compose: Callable | None) -> None:
    """An item's files, those that are there whole already left alone."""
    for name, text in item.texts.items():
        if not is_whole(folder.images / name):
            folder.write_text(folder.images / name, text)
    for name, image in zip(item.files, images if compose is None else compose(images), strict=True):
        if not is_whole(folder.images / name):
            folder.write_image(folder.images / name, image)


def run(
    benchmark: str,
    items: Sequence[Item],
    inputs: Mapping[str, str],
    out: str | Path,
    images_per_prompt: int,
    settings: Settings,
    choices: Mapping[str, Any] | None = None,
    compose: Callable[[Sequence[Image.Image]], Sequence[Image.Image]] | None = None,
) -> Coverage:
    """A benchmark's generation stage: manifest, then `paint`. choices: the benchmark's own settings."""
    world = RankInfo.from_environment()
    check_settings(settings)
    folder = RunFolder(out)
    own = {"images_per_prompt": images_per_prompt, "items": len(items)} | dict(choices or {})
    write_manifest(folder, benchmark, inputs, paint_settings(settings) | own, checkpoint_identity(settings))
    with cpu_threads(settings.threads):
        return paint(
            lambda: load_pipe(settings, world), folder, items, images_per_prompt, settings, world, compose
        )


def check_settings(settings: Settings) -> None:
    """ValueError for what would fail only once the model is loaded."""
    settings.resolved()
    for name in ("batch_size", "threads", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
