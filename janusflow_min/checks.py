# SPDX-License-Identifier: MIT
"""Numbers from users and files, checked in one way. Every error is a ValueError: name, what it must be, what it is."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
LARGEST = 2**63 - 1
# What one call may ask for, so that a slip of the key does not ask for terabytes or years.
MAX_STEPS = 10_000
MAX_IMG_SIZE = 8192  # px; 200 MB an image
MAX_IMAGE_BYTES = 4 * 2**30  # of all images that one call returns
MAX_NEW_TOKENS = 1_000_000  # more than any model has positions for


# Names of other libraries' arguments -> ours, for the error that meets them.
NAMES_ELSEWHERE = {
    "guidance_scale": "cfg_weight",
    "num_images_per_prompt": "parallel_size",
    "generator": "seed",
    "height": "img_size",
    "width": "img_size",
    "scheduler": "solver",
    "steps": "num_inference_steps",
    "shift": "timestep_shift",
    "callback": "callback_on_step_end",
    "image": "images",
    "question": "prompt",
    "text": "prompt",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "do_sample": "temperature, 0 of which takes the likeliest token",
    "stop_strings": "stop",
    "system": "system_prompt",
}


def known_arguments(*more: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a method: its TypeError for an unknown argument names ours, where another library calls it so.

    more: those of its `**options`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        named = inspect.signature(function).parameters.values()
        ours = [p.name for p in named if p.kind is not p.VAR_KEYWORD][1:] + list(more)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in ours:
                    elsewhere = NAMES_ELSEWHERE.get(name)
                    hint = f"here it is {elsewhere}" if elsewhere else f"there are {', '.join(ours)}"
                    raise TypeError(f"{function.__name__} has no argument {name}: {hint}")
            return function(*args, **kwargs)

        return checked

    return decorate


def is_whole(value: Any) -> bool:
    """An int of Python or numpy; true and false are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float of Python or numpy that a float can hold; true and false are none."""
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    return is_whole(value) and abs(int(value)) < 1e300


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST) -> int:
    """`value` as an int, if it is a whole number from `least` to `most`."""
    if not is_whole(value) or not least <= value <= most:
        bounds = f"of at least {least}" if most == LARGEST else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, got {shown(value)}")
    return int(value)


def number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False
) -> float:
    """`value` as a float, if it is finite and from `least` to `most`. above: `least` itself is too small."""
    if not is_number(value) or not least <= value <= most or (above and value == least):
        bounds = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
        bounds += "" if most == math.inf else f"{' and' if bounds else ''} of at most {most:g}"
        raise ValueError(f"{name} must be a finite number{bounds}, got {shown(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def seed(name: str, value: Any) -> int:
    """`value` as an int, if it is a whole number in [0, 2**63)."""
    if not is_whole(value) or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a whole number in [0, 2**63), got {shown(value)}")
    return int(value)


def one_of(name: str, value: Any, names: Collection[str]) -> None:
    if value not in tuple(names):
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {shown(value)}")


def function(name: str, value: Any) -> None:
    """ValueError unless `value` can be called or is None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, got {shown(value)}")


def texts(name: str, value: Any) -> list[str]:
    """A str, or a list or tuple of them that is not empty, as a list."""
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"{name} must be a str or a list of str, got {shown(value)}")
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise ValueError(f"{name} is an empty list")
    for i, text in enumerate(values):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] must be a str, got {shown(text)}")
    return values


def image_bytes(count: int, side: int, remedy: str = "parallel_size or img_size") -> None:
    """ValueError where `count` images of `side` px are more than one call returns."""
    if count * side**2 * 3 > MAX_IMAGE_BYTES:
        raise ValueError(
            f"{count:,} images of {side}x{side} px are more than the {MAX_IMAGE_BYTES >> 30} GiB that one call "
            f"returns, which holds {MAX_IMAGE_BYTES // (side**2 * 3):,} of them: lower {remedy}"
        )


def shown(value: Any) -> str:
    """A value for a one-line error; of what is neither short text nor a number, its kind alone."""
    if isinstance(value, str):
        return f"{value!r:.80}"
    if is_whole(value) and abs(int(value)) >= 10**20:
        return f"a number of {int(value).bit_length()} bits"
    plain = value is None or isinstance(value, bool | float | np.floating) or is_whole(value)
    return str(value) if plain else f"a {type(value).__name__}"
