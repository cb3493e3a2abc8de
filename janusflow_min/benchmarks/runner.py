# SPDX-License-Identifier: MIT
"""What every benchmark's generation shares: settings, seeds from identity, shards, resuming.

A run is a folder (`run_folder`) with a manifest (`manifest`). Seeds come from an item's place in the benchmark's own
order (`image_seed`), never from the order of generation. Items are generated in blocks, cut once from the whole list:
floating-point sums depend on a batch's shape and on the longest prompt in it, so a block always has the same
neighbours, whichever rank has it and however many of its files are there already. On a CPU the number of threads
counts too, so a run has its own number (`cpu_threads`), whatever torchrun or the machine says.

Rank r of w has blocks r, r + w, r + 2 w, …; ranks share a folder and need no other contact, so one that dies leaves
the others' files usable and a rerun fills its holes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from tqdm import tqdm

from ..files import check_folder
from ..options import option
from ..sampling_options import SamplingOptions
from .manifest import checkpoint_identity, generation_settings, write_manifest
from .ranks import RankInfo, rank_device, shard
from .run_folder import RunFolder, is_whole

if TYPE_CHECKING:
    from ..pipeline import Pipeline

T = TypeVar("T")
Compose = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]
SEED_RULE = "seed + prompt index * images per prompt + sample index, one CPU generator for each image"
WRITERS = 4  # threads that compress PNG files while the next block is generated


@dataclass(frozen=True)
class Settings(SamplingOptions):
    """How a run is generated. What changes pixels is in the manifest."""

    model: str = option('"tiny", a folder in the official layout, or a hub id', "tiny")
    revision: str | None = option("branch, tag or commit of a model that is a hub id", None)
    lora: list[str] | None = option("an adapter, [NAME=]PATH[:SCALE]; may be repeated", None, repeat=True)
    vae: str | None = option("the VAE's folder or hub id (default: the checkpoint's vae/, else SDXL's)", None)
    device: str = option("auto is CUDA, then MPS, then CPU", "auto")
    dtype: str = option("auto is bfloat16 on CUDA, else float32", "auto")
    vae_dtype: str | None = option("float32 or bfloat16 (default: as --dtype)", None)
    seed: int = option("of the first image; the others' follow from their place", 0)
    batch_size: int = option("images generated at once; moves their last bits", 16)
    upstream_rounding: bool = option("round as the published code does", False)
    quantization: str | None = option("keep the LLM's matrices in 8 bits", None, choices=("int8", "fp8"))
    fast: bool = option("kernels and CUDA graphs where the GPU has them", True)
    compile: bool = option("torch.compile for the rest", False)
    threads: int = option("CPU threads of a process; moves the images' last bits", 1)
    limit: int | None = option("only the first prompts; a run without it goes on", None, kind=int)
    progress: bool = True


def check_settings(settings: Settings) -> None:
    """ValueError for what would fail only once the model is loaded."""
    settings.resolved()
    for name in ("batch_size", "threads", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def image_seed(base_seed: int, prompt_index: int, images_per_prompt: int, sample_index: int) -> int:
    """A seed that depends on which image it is alone: see SEED_RULE."""
    return base_seed + prompt_index * images_per_prompt + sample_index


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark and the files that it becomes, named relative to `images/`."""

    index: int  # in the benchmark's own order; never renumbered within a shard
    prompt: str
    files: tuple[str, ...]
    texts: Mapping[str, str] = field(default_factory=dict)  # other files of the layout: name -> content


@dataclass(frozen=True)
class Coverage:
    """How much of a benchmark is there. An empty or a damaged image counts as missing."""

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
    """The whole list cut into what is generated at once: always the same, see the file's first lines."""
    size = max(1, batch_size // images_per_prompt)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


# A stage -----------------------------------------------------------------------


@contextmanager
def open_run(
    benchmark: str,
    inputs: Mapping[str, str],
    out: str | Path,
    settings: Settings,
    choices: Mapping[str, Any],
    seed_rule: str = SEED_RULE,
) -> Iterator[RunFolder]:
    """The folder `out`, its manifest written or found to agree, with the run's own number of CPU threads in the block.

    inputs: name -> sha256. choices: the benchmark's own settings. Errors as of `write_manifest`, and ValueError for
    settings that would fail only once the model is loaded.
    """
    check_settings(settings)
    folder = RunFolder(out)
    about = generation_settings(settings) | dict(choices)
    write_manifest(folder, benchmark, inputs, about, checkpoint_identity(settings), seed_rule)
    with cpu_threads(settings.threads):
        yield folder


def run(
    benchmark: str,
    items: Sequence[Item],
    inputs: Mapping[str, str],
    out: str | Path,
    images_per_prompt: int,
    settings: Settings,
    choices: Mapping[str, Any] | None = None,
    compose: Compose | None = None,
) -> Coverage:
    """The generation stage of a benchmark that only generates images: `open_run`, then `generate_images`."""
    own = {"images_per_prompt": images_per_prompt, "items": len(items)} | dict(choices or {})
    with open_run(benchmark, inputs, out, settings, own) as folder:
        return generate_images(
            lambda: load_pipe(settings), folder, items, images_per_prompt, settings, compose=compose
        )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads: their number decides how sums are cut, so last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_pipe(settings: Settings, parts: str = "generation") -> Pipeline:
    """The pipeline that `settings` describe, on this rank's own device where there are several."""
    from ..devices import pick_device, pick_dtype
    from ..loading import load
    from ..lora import find_lora

    world = RankInfo.from_environment()
    parts = "all" if settings.best_of > 1 else parts
    options: dict[str, Any] = {"parts": parts}
    same = ("fast", "compile", "upstream_rounding", "quantization", "revision")
    options |= {name: getattr(settings, name) for name in same}
    if parts != "understanding":
        options |= dict(vae_path=settings.vae, vae_dtype=settings.vae_dtype)
    device, progress = rank_device(settings.device, world), settings.progress and world.local_rank == 0
    adapters = [find_lora(text) for text in settings.lora or ()]
    dtype = pick_dtype(settings.dtype, pick_device(device))  # as the manifest says, whatever memory is free
    pipe = load(settings.model, device=device, dtype=dtype, progress=progress, **options)
    for adapter in adapters:
        pipe.load_lora(**adapter)
    return pipe


def generate_images(
    pipe: Pipeline | Callable[[], Pipeline],
    folder: RunFolder,
    items: Sequence[Item],
    images_per_prompt: int,
    settings: Settings,
    world: RankInfo | None = None,
    compose: Compose | None = None,
) -> Coverage:
    """Generate what of this rank's share is missing; returns the coverage of the whole benchmark.

    pipe: or a function that loads it, called only if something is missing. items: the whole benchmark, in its order.
    compose: makes the item's files of its `images_per_prompt` images, a grid for instance; without it they are
    one to one. Interrupted at any point, the files there are whole, and the same call goes on.
    """
    world = world or RankInfo.from_environment()
    files = 1 if not items else len(items[0].files)
    if compose is None and files != images_per_prompt:
        raise ValueError(f"{images_per_prompt} images of a prompt need as many files, got {files}")
    wanted = {item.index for item in items[: settings.limit]}
    todo = []
    for block in shard(blocks(items, images_per_prompt, settings.batch_size), world.rank, world.size):
        lacking = [item for item in block if item.index in wanted and not _is_there(item, folder.images)]
        if lacking:
            todo.append((block, lacking))
    if todo:
        for path in (folder.images / name for _, lacking in todo for item in lacking for name in item.files):
            check_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(
                    f"{path} is a folder, but an image is to be written there: move it away"
                )
        loaded = pipe() if callable(pipe) else pipe
        for block, _ in todo:  # the last prompt's error should not wait for the first's image
            for item in block:
                loaded.processor.generation_prompt(item.prompt)
        quiet = not settings.progress or world.local_rank != 0
        _generate_blocks(loaded, folder, todo, images_per_prompt, settings, quiet, compose)
    found = coverage(items, folder.images)
    if not {name for item in items if item.index in wanted for name in item.files} & {*found.missing}:
        folder.tidy()
    return found


def _generate_blocks(
    pipe: Pipeline,
    folder: RunFolder,
    todo: Sequence[tuple[Sequence[Item], Sequence[Item]]],
    images_per_prompt: int,
    settings: Settings,
    quiet: bool,
    compose: Compose | None,
) -> None:
    """todo: whole blocks, and the items of each that are to be written."""
    count = sum(len(lacking) for _, lacking in todo)
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=count, desc="Generating", unit="prompt", disable=quiet) as bar,
    ):
        pending: list[Future] = []
        for block, lacking in todo:
            written = {item.index for item in lacking}
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
            for writing in pending:  # at most one block waits in memory; its errors end the run
                writing.result()
            groups = [images[i : i + images_per_prompt] for i in range(0, len(images), images_per_prompt)]
            pending = [
                writers.submit(_write, folder, item, group, compose)
                for item, group in zip(block, groups, strict=True)
                if item.index in written
            ]
            bar.update(len(lacking))
        for writing in pending:
            writing.result()


def _is_there(item: Item, images: Path) -> bool:
    return all(is_whole(images / name) for name in (*item.files, *item.texts))


def _write(folder: RunFolder, item: Item, images: Sequence[Image.Image], compose: Compose | None) -> None:
    """An item's files, those that are there whole already left alone."""
    for name, text in item.texts.items():
        if not is_whole(folder.images / name):
            folder.write_text(folder.images / name, text)
    for name, image in zip(item.files, images if compose is None else compose(images), strict=True):
        if not is_whole(folder.images / name):
            folder.write_image(folder.images / name, image)
