# SPDX-License-Identifier: MIT
"""Editing without training: `Pipeline.edit` and `Pipeline.invert`, over the same velocity that generates.

Three methods, each a start and a velocity that a solver integrates from t = 1 - strength to 1:

- "flowedit" (Kulikov et al. 2024, arXiv 2412.08629): from the image straight to the edited one, by the difference of
  the velocities under target and source prompt at the same noise.
- "invert": back to the noise that the source prompt makes the image of, then forward with the target prompt.
- "sdedit" (Meng et al. 2021, arXiv 2108.01073): noise is added to the image, then forward with the target prompt.

Legend: B images, C h w latent, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from . import checks
from .edit_methods import flowedit_velocity, hold_outside, undo_euler
from .flow import interpolate
from .pixels import ImageSource, open_image, to_pixels
from .progress import progress_bar
from .sampling import draw_noise, guided_velocity
from .sampling_options import EDIT_METHODS, SamplingOptions
from .selection import Checker, Judge, candidate_seed, encode_images, rater, square
from .solvers import Solver, find_solver, time_grid

if TYPE_CHECKING:
    from .pipeline import Pipeline

LESS = 7 / 8  # of the strength, for every second candidate
EDIT_BATCH = 8  # images edited at once; FlowEdit's four rows each fill what 16 guided images do
DESCRIPTION_TOKENS = 96  # most, of the model's own source prompt


def edit(
    pipe: Pipeline,
    image: ImageSource | Sequence[ImageSource],
    prompt: str | Sequence[str],
    source_prompt: str | Sequence[str] | None = None,
    strength: float = 0.8,
    mask: ImageSource | Sequence[ImageSource] | None = None,
    method: str = "flowedit",
    cfg_weight: float = 3.0,
    source_cfg_weight: float = 1.5,
    num_inference_steps: int = 30,
    seed: int | Sequence[int] | None = None,
    progress: bool = True,
    solver: str | Solver = "euler",
    timestep_shift: float = 1.0,
    callback_on_step_end: Callable[..., Any] | None = None,
    best_of: int = 1,
    checker: str | Checker | None = None,
    judge: Judge | None = None,
) -> list[Image.Image]:
    """Change images as prompts say; returns one of the model's size for each, its prompts and seed in `.info`.

    image: a path, bytes of a file, file object, PIL image or uint8 array [H, W, 3] of any size, or a list; cropped to
    the middle square and resized. prompt: what the edited image shows, all of it. Of images and prompts either one
    or equally many. source_prompt: what the image shows, one or one for each; None asks the model; "sdedit" has none.
    strength: share of the way to noise that is run again, in (0, 1]: 1 may change everything.
    mask: an image of each image's size, or one for all; white may change, and outside it the bytes stay.
    cfg_weight, source_cfg_weight: guidance with the target and the source prompt; 1 is none.
    num_inference_steps: of the solver, whatever the strength. seed: image k gets seed + k, a list gives every image
    its seed, None draws them; "invert" uses none. progress, solver, timestep_shift, callback_on_step_end: as in
    `generate`.
    best_of: candidates for each image, every second one with 7/8 of the strength. Of those that show the prompt by
    `score` with this checker (above 0.5) the one that changed least is returned, of none the one of the highest
    score; with a judge the one that it likes best. Seed and strength of that one, and all scores, are in `.info`.
    Raises ValueError for arguments that make no edit and FileNotFoundError for a missing file, before any work;
    FloatingPointError where latents or pixels become NaN or infinite.
    """
    checks.one_of("method", method, EDIT_METHODS)
    strength = checks.number("strength", strength, least=0, most=1, above=True)
    weights = checks.number("cfg_weight", cfg_weight), checks.number("source_cfg_weight", source_cfg_weight)
    options = SamplingOptions(
        num_inference_steps=num_inference_steps, solver=solver, timestep_shift=timestep_shift, best_of=best_of
    ).resolved()
    integrate, best_of = find_solver(options["solver"]), options["best_of"]
    rated = rater(pipe, best_of, checker, judge)
    checks.function("callback_on_step_end", callback_on_step_end)
    progress = checks.flag("progress", progress)
    images, prompts = _inputs(pipe, image, prompt)
    masks = None if mask is None else _masks(pipe, mask, images)
    seeds = pipe._seeds(len(prompts), seed)
    target = pipe.check_prompts(prompts)
    squares = [square(pipe, picture) for picture in images]
    described: list[Any] = [None] * len(prompts)
    source, sampler = target, pipe.sampler
    if method != "sdedit":
        described = _source_prompts(pipe, source_prompt, squares)
        source = pipe.check_prompts(described)

    parts = [slice(i, i + EDIT_BATCH) for i in range(0, len(prompts), EDIT_BATCH)]
    total = best_of * len(parts) * options["num_inference_steps"]

    def candidates(k: int) -> Iterator[tuple[Image.Image, float]]:
        """Of each image, and how far its latents moved."""
        own = strength * (LESS if k % 2 else 1)
        times = time_grid(options["num_inference_steps"], 1 - own, options["timestep_shift"])

        def on_step(step: int, z: Tensor) -> None:
            bar.update()
            if callback_on_step_end is not None:
                callback_on_step_end(step, times[step + 1], z)

        for part in parts:
            x = encode_images(pipe, squares[part])
            tried = [candidate_seed(s, k) for s in seeds[part]]
            generators = [torch.Generator("cpu").manual_seed(s) for s in tried]
            start, velocity = x, guided_velocity(sampler, target[part], weights[0])
            if method == "flowedit":
                velocity = flowedit_velocity(sampler, x, source[part], target[part], weights, generators)
            elif method == "invert":
                start = undo_euler(guided_velocity(sampler, source[part], weights[1]), x, times)
            else:
                noise = draw_noise(x.shape[1:], generators).to(x)
                start = interpolate(x, noise, x.new_full((len(x),), times[0]))[0]
            if masks is not None:
                velocity = hold_outside(velocity, _changing(masks[part], x), start, x, own)
            final = integrate(velocity, start, times, on_step)
            if not torch.isfinite(final).all():
                raise FloatingPointError(
                    f"the edited latents are not finite; dtype {pipe.model.dtype}, cfg_weight {cfg_weight}, "
                    f"source_cfg_weight {source_cfg_weight}"
                )
            edited = pipe._decode(final, prompts[part])
            if masks is not None:
                held = zip(edited, squares[part], masks[part], strict=True)
                edited = [Image.composite(image, original, mask) for image, original, mask in held]
            for image, seed in zip(edited, tried, strict=True):
                image.info |= {"seed": seed, "strength": own}
            yield from zip(edited, (final - x).flatten(1).norm(dim=1).tolist(), strict=True)

    with torch.inference_mode(), progress_bar(progress, total=total, desc="Editing", unit="step") as bar:
        tries = [list(candidates(k)) for k in range(best_of)]
        scored = [rated([image for image, _ in one], prompts) for one in tries] if best_of > 1 else []
    found = []
    for i, own in enumerate(zip(*tries, strict=True)):
        scores = [one[i] for one in scored]
        shows = [k for k, score in enumerate(scores) if score > 0.5 and judge is None]
        best = min(shows, key=lambda k: own[k][1]) if shows else scores.index(max(scores)) if scores else 0
        found.append(own[best][0])
        found[-1].info |= {"prompt": prompts[i], "source_prompt": described[i]}
        found[-1].info |= {"scores": scores} if scores else {}
    return found


def invert(
    pipe: Pipeline,
    image: ImageSource | Sequence[ImageSource],
    prompt: str | Sequence[str],
    cfg_weight: float = 1.0,
    num_inference_steps: int = 30,
) -> Tensor:
    """Latents (B, C, h, w), fp32 on the CPU, from which `generate` makes the images again.

    image, prompt: as in `edit`, the prompt being what the image shows. Hand the result to `generate` as `latents`,
    with parallel_size 1 and the same prompts, cfg_weight and num_inference_steps. Raises what `edit` raises.
    """
    weight = checks.number("cfg_weight", cfg_weight)
    times = time_grid(checks.whole("num_inference_steps", num_inference_steps, most=checks.MAX_STEPS))
    images, prompts = _inputs(pipe, image, prompt)
    encoded, found = pipe.check_prompts(prompts), []
    with torch.inference_mode():
        for i in range(0, len(images), EDIT_BATCH):
            part = slice(i, i + EDIT_BATCH)
            x = encode_images(pipe, [square(pipe, picture) for picture in images[part]])
            found.append(undo_euler(guided_velocity(pipe.sampler, encoded[part], weight), x, times))
    latents = torch.cat(found).cpu()
    if not torch.isfinite(latents).all():
        raise FloatingPointError(f"the inverted latents are not finite; dtype {pipe.model.dtype}")
    return latents.clone()  # outside of inference mode: a tensor like any other


# What is handed in -----------------------------------------------------------------------


def _inputs(pipe: Pipeline, image: Any, prompt: Any) -> tuple[list[Image.Image], list[str]]:
    """Opened images and prompts, equally many: the only one of either serves all of the other."""
    pipe._need("generation")
    prompts, sources = checks.texts("prompt", prompt), _listed(image)
    if not sources:
        raise ValueError("image is an empty list")
    count = max(len(prompts), len(sources))
    prompts, sources = _each("prompt", prompts, count), _each("image", sources, count)
    return [open_image(source, upright=True, background="white") for source in sources], prompts


def _masks(pipe: Pipeline, mask: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Of each image, at the model's size: mode L, 255 where it may change and 0 elsewhere."""
    found = []
    for source, image in zip(_each("mask", _listed(mask), len(images)), images, strict=True):
        grey = open_image(source, upright=True).convert("L")
        if grey.size != image.size:
            size, wanted = ("{}x{}".format(*picture.size) for picture in (grey, image))
            raise ValueError(f"a mask must be of its image's size, {wanted}, got {size}")
        found.append(square(pipe, grey.point([0] * 128 + [255] * 128), Image.Resampling.NEAREST))
        if not found[-1].getbbox():
            raise ValueError("a mask has nothing white in its middle square, so nothing may change")
    return found


def _changing(masks: Sequence[Image.Image], x: Tensor) -> Tensor:
    """Masks at the model's size -> (B, 1, h, w): the latents with a white pixel."""
    white = torch.stack([to_pixels(mask.convert("RGB"))[:1] for mask in masks])  # (B, 1, S, S)
    return adaptive_max_pool2d(white, x.shape[2:]).to(x.device) > 0


def _source_prompts(pipe: Pipeline, source_prompt: Any, squares: list[Image.Image]) -> list[str]:
    """As given, or what the model says of each image."""
    if source_prompt is not None:
        return _each("source_prompt", checks.texts("source_prompt", source_prompt), len(squares))
    answers = pipe.understand([""] * len(squares), squares, max_new_tokens=DESCRIPTION_TOKENS)
    return [answer.text.strip() for answer in answers]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _each(name: str, values: list[Any], count: int) -> list[Any]:
    """`count` values of as many or of one."""
    if len(values) not in (1, count):
        raise ValueError(f"{name}: {count} edits need one or {count}, got {len(values)}")
    return values * (count // len(values))
