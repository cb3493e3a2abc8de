# SPDX-License-Identifier: MIT
"""Images and batches prepared in threads, so that the device does not wait for the host.

Pillow lets go of Python's lock while it decodes and resizes. Threads live as long as the call that needs them, and
nothing depends on their number. Legend: K images, S side of a square.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import ImageSource, open_image

THREADS = 8  # at most
LARGE = 2**19  # pixels of an image whose resize is shared among threads
Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
    """function(item) of each item in order; while the caller works with one result, a thread makes the next.

    What the function raises is raised in its turn. Close the iterator if you leave it early: that ends the thread.
    """
    with ThreadPoolExecutor(1, "janusflow-ahead") as pool:  # for a single item no thread starts
        result = function(items[0])
        for item in items[1:]:
            following = pool.submit(function, item)
            yield result
            result = following.result()
        yield result


def image_bytes(
    images: Sequence[ImageSource], side: int, square: Callable[[Image.Image, int], Image.Image]
) -> Tensor:
    """uint8 (K, 3, S, S) on the CPU. square(image, threads): an opened image's.

    The first error in order is raised. What is given several times is read once.
    """
    distinct = {id(image): image for image in images}
    found = np.empty((len(distinct), 3, side, side), np.uint8)
    count, reading = thread_count(), threading.Lock()
    share = max(1, count // max(1, len(distinct)))

    def prepare(place: np.ndarray, image: ImageSource) -> None:
        # File objects, and images that Pillow has not loaded yet, may share a file: one at a time.
        own = isinstance(image, str | os.PathLike | bytes | np.ndarray)
        with contextlib.nullcontext() if own else reading:
            opened = open_image(image, copy=False)
        place[:] = np.asarray(square(opened, share)).transpose(2, 0, 1)

    if min(count, len(distinct)) > 1:
        with ThreadPoolExecutor(min(count, len(distinct))) as pool:
            list(pool.map(prepare, found, distinct.values()))
    else:
        list(map(prepare, found, distinct.values()))
    if len(distinct) < len(images):
        order = {key: k for k, key in enumerate(distinct)}
        found = found[[order[id(image)] for image in images]]
    return torch.from_numpy(found)


def resize(image: Image.Image, size: tuple[int, int], threads: int = 1) -> Image.Image:
    """Pillow's bicubic resize of an RGB image to (width, height), bit for bit, a large one's work shared by threads.

    Pillow makes every row narrower first, then every column shorter, and rounds to bytes in between: so bands of
    rows, then bands of columns, are independent. From version 13 on it begins with the columns where those shrink
    more, or are more than twice the rows: such images are left to it.
    """
    (width, height), (columns, rows), bicubic = image.size, size, Image.Resampling.BICUBIC
    rows_first = columns <= width and rows <= height <= 2 * width and columns * height <= (rows + 1) * width
    count = min(threads, 4, height, columns)  # more wait for each other
    if count < 2 or width * height < LARGE or not rows_first:
        return image.resize(size, bicubic)
    narrow, small = Image.new("RGB", (columns, height)), Image.new("RGB", size)

    def shrink_rows(band: tuple[int, int]) -> Image.Image:
        top, bottom = band
        return image.resize((columns, bottom - top), bicubic, box=(0, top, width, bottom))

    def shrink_columns(band: tuple[int, int]) -> Image.Image:
        left, right = band
        return narrow.crop((left, 0, right, height)).resize((right - left, rows), bicubic)

    down, across = (list(pairwise(n * i // count for i in range(count + 1))) for n in (height, columns))
    with ThreadPoolExecutor(count) as pool:
        for (top, _), part in zip(down, pool.map(shrink_rows, down), strict=True):
            narrow.paste(part, (0, top))
        for (left, _), part in zip(across, pool.map(shrink_columns, across), strict=True):
            small.paste(part, (left, 0))
    return small


def thread_count() -> int:
    """One for each core that this process may use, at most `THREADS`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(THREADS, len(allowed))
