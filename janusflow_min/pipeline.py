# SPDX-License-Identifier: MIT
"""What a person calls on a loaded model: `generate`, `edit`, `understand`, `chat`.

    import janusflow_min as jf
    pipe = jf.load("tiny")
    pipe.generate("a photo of a red star").images[0].save("star.png")
    pipe.understand("What is in the image?", images="star.png").text

Arguments, seeds and images are handled here; `sampling.py` runs the model. Every call checks all of its arguments
before it computes anything, and touches no random state but its own.

Legend: B images, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import answering, checks, editing
from .devices import DTYPES, SHORT_NAMES, pick_device, pick_dtype
from .fast.quantized import refuse_quantized
from .flow import Velocity
from .lora import LoraMixin
from .model import JanusFlow
from .pixels import ImageSource, to_uint8
from .processor import Processor
from .progress import progress_bar
from .sampling import MAX_BATCH, PlainSampler, Sampler, draw_noise, fresh_seed, guided_velocity
from .sampling_options import SamplingOptions
from .selection import Checker, Judge, best_candidates, choose, find_checker, rater, score_all
from .solvers import OnStep, Solver, find_solver, time_grid
from .vae import VAE

GPU_IMAGES, CPU_IMAGES = 4, 1  # decoded at once, at most: more would set the peak of memory

OUTPUT_TYPES = ("pil", "np", "latent")
# Of an image: its prompt, token ids of that and of the negative one.
Row = tuple[str, list[int], list[int] | None]
OnStepEnd = Callable[..., Any]  # (step, t, latents), with preview (step, t, latents, images)


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated images: `parallel_size` for each prompt, prompts in order."""

    images: Any  # PIL images; with output_type "np" a uint8 array (B, H, W, 3), with "latent" an empty list
    latents: Tensor  # (B, C, h, w) fp32 on the CPU, final latents before the VAE
    seeds: list[int] | None  # None where the caller gave the noise
    prompts: list[str]  # of each image
    scores: list[list[float]] | None = None  # with best_of: of each image's candidates, its own the best

    def __repr__(self) -> str:
        shown = isinstance(self.images, list) and self.images
        size = f" of {self.images[0].width}x{self.images[0].height}" if shown else ""
        return f"Generation({len(self.prompts)} images{size}, seeds={self.seeds}, prompts={self.prompts})"


class TooLongError(ValueError):
    """A prompt or conversation that needs more positions than the model has."""


class Pipeline(LoraMixin):
    """A loaded model with its processor and VAE. Made by `load`; `fast` and `compile` are explained there."""

    def __init__(
        self,
        model: JanusFlow,
        processor: Processor,
        vae: VAE | None,
        fast: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        self.model, self.processor, self.vae = model, processor, vae
        self.fast, self.compile = fast, compile
        self._sampler: Sampler | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's; the VAE has its own."""
        return self.model.dtype

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        vae = "no VAE" if self.vae is None else f"VAE in {str(self.vae.dtype).removeprefix('torch.')}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Pipeline({count:,} parameters in {dtype} on {self.device}, {vae}, parts={self.model.parts!r})"
        )

    def to(self, *where: str | torch.device | torch.dtype) -> Pipeline:
        """Move model and VAE to a device, a dtype or both, in place; returns the pipeline. A VAE overflows in float16,
        so it becomes float32 then."""
        device, dtype = self.device, None
        for value in where:
            if isinstance(value, torch.dtype) or str(value) in (*DTYPES, *SHORT_NAMES):
                dtype = pick_dtype(value, device)  # type: ignore[arg-type]
            else:
                device = pick_device(value)
        if dtype not in (None, self.dtype):
            refuse_quantized(self.model, "change its dtype")
        self._sampler = None  # its buffers go first
        adapters = self.adapters
        self.set_adapters([])  # they are merged anew, in the new dtype
        self.model.to(device, None if dtype == self.dtype else dtype)
        self.set_adapters(list(adapters), list(adapters.values()))
        if self.vae is not None:
            self.vae.to(device, torch.float32 if dtype == torch.float16 else dtype)
        return self

    @property
    def sampler(self) -> Sampler:
        """What runs the model: the fast sampler if `fast` is set and the machine has what it needs, else the plain one.
        Made when first needed, and anew when the model's weights have moved. Another one may be assigned."""
        if self._sampler is None or not self._sampler.is_current:
            self._sampler = None  # its buffers go first
            if self.fast and self.model.device.type == "cuda":
                from .fast.sampler import build_sampler

                self._sampler = build_sampler(self.model, self.compile)
            self._sampler = self._sampler or PlainSampler(self.model)
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler | None) -> None:
        self._sampler = sampler

    # Generation -----------------------------------------------------------------------

    @checks.known_arguments()
    def generate(
        self,
        prompt: str | Sequence[str],
        parallel_size: int = 5,
        cfg_weight: float = 2.0,
        num_inference_steps: int | None = None,
        img_size: int | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | np.ndarray | None = None,
        progress: bool = True,
        solver: str | Solver | None = None,
        timestep_shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        preset: str | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        preview: bool = False,
        output_type: str = "pil",
        best_of: int = 1,
        checker: str | Checker | None = None,
        judge: Judge | None = None,
    ) -> Generation:
        """Generate images from text.

        prompt: one or a list; each gets `parallel_size` images. cfg_weight: strength of the guidance, 1 is none.
        num_inference_steps: of the solver, 30, at most 10,000. img_size: side of the square images in px, at most
        8192; one other than the model's own means a Lanczos resize. All images of a call take at most 4 GiB.
        seed: image k of the call gets seed + k and a generator of its own, so its noise depends on neither batch
        nor device; a list gives every image its seed; None draws seeds, which the result holds.
        latents: (B, C, h, w) starting noise instead of seeds, B = prompts · parallel_size.
        progress: a bar, where stderr is a terminal.

        How the flow is sampled: solver: "euler", "midpoint", "heun", "ab2" or a function like `solvers.euler`.
        timestep_shift: above 1 more of the steps near the noise, 1 equal ones. guidance_interval: (low, high), guidance
        for low <= t < high alone, 0 noise, 1 image; half the work outside. guidance_rescale: 0 to 1.
        negative_prompt: one, or one for each prompt, in the place of no prompt; without effect at cfg_weight 1.
        preset: "quick" sets what of these is None to few steps.

        callback_on_step_end(step, t, latents): called after each step with the time reached and the latents there
        (B, C, h, w), of at most 16 images in turn. With preview it gets a fourth argument, PIL images of where the
        flow is heading, each at the cost of the VAE. What it raises ends the call and comes out of it.
        best_of: candidates for each image; the best by `score` is returned, with its seed and all scores. The first is
        what best_of 1 gives. checker: see `score`; judge: a function (image, prompt) -> float in its place.
        output_type: "pil"; "np" for a uint8 array (B, H, W, 3); "latent" for latents alone.
        Raises ValueError for arguments that make no image, an empty prompt or special tags in it for instance;
        FloatingPointError where latents or pixels become NaN or infinite.
        """
        self._need("generation")
        prompts = checks.texts("prompt", prompt)
        count = len(prompts) * checks.whole("parallel_size", parallel_size)
        options = SamplingOptions(
            cfg_weight=cfg_weight,
            num_inference_steps=num_inference_steps,
            solver=solver,
            timestep_shift=timestep_shift,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            preset=preset,
            best_of=best_of,
        ).resolved()
        rated = rater(self, best_of, checker, judge)
        negative = self._negative_prompts(negative_prompt, len(prompts))
        checks.function("callback_on_step_end", callback_on_step_end)
        if checks.flag("preview", preview) and callback_on_step_end is None:
            raise ValueError("preview is for callback_on_step_end, which is not given")
        checks.one_of("output_type", output_type, OUTPUT_TYPES)
        side = self.model.config.siglip.image_size
        if img_size is not None:
            side = img_size = checks.whole("img_size", img_size, most=checks.MAX_IMG_SIZE)
        checks.image_bytes(count, side)
        progress = checks.flag("progress", progress)
        noise, seeds = self._noise(count, seed, latents)
        if seeds is None and best_of > 1:
            raise ValueError("best_of draws further noise from seeds, so it cannot be given latents")
        rows = list(zip(prompts, self.check_prompts(prompts), negative, strict=True))
        rows = [row for row in rows for _ in range(parallel_size)]
        watch = None
        if callback_on_step_end is not None:
            watch = partial(watched, callback_on_step_end, self._decode if preview else None)

        def make(rows: Sequence[Row], noise: Tensor) -> tuple[Tensor, list[Image.Image]]:
            final, texts = self._integrate(rows, noise, options, progress, watch), [text for text, *_ in rows]
            return final, [] if output_type == "latent" and best_of == 1 else self._decode(final, texts)

        def rate(rows: Sequence[Row], images: list[Image.Image]) -> list[float]:
            return rated(images, [text for text, *_ in rows])

        with torch.inference_mode():
            if best_of == 1:
                (final, images), scores = make(rows, noise), None
            else:
                final, images, seeds, scores = best_candidates(
                    best_of, rows, seeds or [], noise.shape[1:], make, rate
                )
        if output_type == "latent":
            images = []
        if images and img_size is not None and img_size != images[0].width:
            images = [image.resize((img_size, img_size), Image.Resampling.LANCZOS) for image in images]
        found = np.stack([np.asarray(image) for image in images]) if output_type == "np" else images
        # Cloned outside of inference mode: a tensor like any other, gradients included.
        return Generation(found, final.float().cpu().clone(), seeds, [text for text, *_ in rows], scores)

    @overload
    def score(self, image: ImageSource, prompt: str, checker: str | Checker | None = None) -> float: ...
    @overload
    def score(
        self,
        image: list[ImageSource] | list[Image.Image],
        prompt: list[str],
        checker: str | Checker | None = None,
    ) -> list[float]: ...
    @checks.known_arguments()
    def score(
        self,
        image: Any,
        prompt: Any,
        checker: str | Checker | None = None,
    ) -> Any:
        """The probability, in [0, 1], that an image shows a prompt; a list of both gives a list.

        Without a checker the model is asked just that. A checker turns a prompt into questions with their right
        answers, prompt -> [(question, [answers])], and the score is the probability that all are answered rightly:
        a function, "MODULE:FUNCTION", or "shapes", the default model's. One batched pass for up to 64 answers.
        """
        asks = find_checker(checker)
        single = not isinstance(image, list | tuple)
        images, prompts = ([image] if single else list(image)), checks.texts("prompt", prompt)
        if not images or len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        values = score_all(self, images, prompts, asks)
        return values[0] if single else values

    @checks.known_arguments()
    def choose(self, image: ImageSource, question: str, options: Sequence[str]) -> dict[str, float]:
        """The probability of each option as the answer to a question about an image, given that it is one of them:
        they add up to 1. One batched pass."""
        return choose(self, image, question, options)

    def _negative_prompts(self, negative_prompt: Any, count: int) -> Sequence[list[int] | None]:
        """Token ids, or None, for each of `count` prompts."""
        if negative_prompt is None:
            return [None] * count
        texts = checks.texts("negative_prompt", negative_prompt)
        if not all(text.strip() for text in texts):
            raise ValueError("negative_prompt is empty; None is no negative prompt")
        if len(texts) not in (1, count):
            raise ValueError(f"negative_prompt: {count} prompts need one or {count}, got {len(texts)}")
        return self.check_prompts(texts * count if len(texts) == 1 else texts)

    def check_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, the generation tag left out: t_emb takes its place. ValueError for an empty
        prompt, special tags in it, or one that is too long."""
        encoded = [self.processor.generation_prompt(text)[0][:-1] for text in prompts]
        image_tokens = 1 + self.model.num_image_tokens  # t_emb in front
        longest = max(map(len, encoded)) + image_tokens
        self._check_length(longest, f"the longest prompt and {image_tokens} image tokens")
        return encoded

    def _integrate(
        self,
        rows: Sequence[Row],
        noise: Tensor,
        options: Mapping[str, Any],
        progress: bool,
        watch: Callable[[Velocity, Sequence[float], OnStep], tuple[Velocity, OnStep]] | None,
    ) -> Tensor:
        """Noise (B, C, h, w) to final latents, MAX_BATCH images at a time. options: `SamplingOptions.resolved`."""
        model, done = self.model, []
        times = time_grid(options["num_inference_steps"], shift=options["timestep_shift"])
        solver = find_solver(options["solver"])
        dtype = model.dtype if model.llm.upstream_rounding else torch.float32
        parts = [slice(i, i + MAX_BATCH) for i in range(0, len(noise), MAX_BATCH)]
        total = (len(times) - 1) * len(parts)
        with progress_bar(progress, total=total, desc="Generating", unit="step") as bar:
            for part in parts:
                _, prompts, negative = zip(*rows[part], strict=True)
                z = noise[part].to(model.device, dtype)
                velocity = guided_velocity(
                    self.sampler,
                    prompts,
                    options["cfg_weight"],
                    None if None in negative else negative,
                    options["guidance_interval"],
                    options["guidance_rescale"],
                )
                on_step: OnStep = ProgressCallback(bar, z.device)
                if watch is not None:
                    velocity, on_step = watch(velocity, times, on_step)
                done.append(solver(velocity, z, times, on_step))
        final = torch.cat(done)
        if bad := [rows[i][0] for i in _not_finite(final)]:
            raise FloatingPointError(
                f"the latents of {', '.join(map(repr, dict.fromkeys(bad)))} are not finite, so there is no image; "
                f"dtype {model.dtype} (float16 overflows, bfloat16 does not), cfg_weight {options['cfg_weight']}"
            )
        return final

    def _decode(self, latents: Tensor, prompts: Sequence[str]) -> list[Image.Image]:
        """Final latents (B, C, h, w) to images. prompts: of each, to name the one that fails."""
        assert self.vae is not None
        images: list[Image.Image] = []
        parts = -(-len(latents) // (GPU_IMAGES if latents.is_cuda else CPU_IMAGES))
        at_once = -(-len(latents) // parts)  # as evenly as it goes
        for start in range(0, len(latents), at_once):
            pixels = self.vae.decode(latents[start : start + at_once])
            for i in _not_finite(pixels):
                raise FloatingPointError(
                    f"the VAE, in {self.vae.dtype}, turns the latents of {prompts[start + i]!r} into NaN or infinite "
                    "pixels, so there is no image"
                )
            images += map(Image.fromarray, to_uint8(pixels))
        return images

    def _noise(self, count: int, seed: Any, latents: Any) -> tuple[Tensor, list[int] | None]:
        shape = (count, *self.model.latent_shape)
        if latents is not None:
            if seed is not None:
                raise ValueError("give either seed or latents, not both")
            if isinstance(latents, np.ndarray) and latents.dtype.kind == "f":
                latents = torch.from_numpy(latents)
            if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.shape != shape:
                raise ValueError(
                    f"latents must be a floating-point tensor or array {list(shape)} (images, C, h, w), "
                    f"got {_described(latents)}"
                )
            if not torch.isfinite(latents).all():
                raise ValueError("latents hold NaN or infinite values")
            return latents.detach(), None
        seeds = self._seeds(count, seed)
        return draw_noise(shape[1:], [torch.Generator("cpu").manual_seed(s) for s in seeds]), seeds

    def _seeds(self, count: int, seed: Any) -> list[int]:
        """Of each of `count` images: seed + k, those of a list, or fresh ones."""
        if seed is None:
            seed = fresh_seed()
        if isinstance(seed, list | tuple | range) or (isinstance(seed, np.ndarray) and seed.ndim == 1):
            if len(seed) != count:
                raise ValueError(f"seed: {count} images need {count} seeds, got {len(seed)}")
            return [checks.seed(f"seed[{i}]", s) for i, s in enumerate(seed)]
        return [checks.seed("seed", checks.seed("seed", seed) + k) for k in range(count)]

    # Editing -----------------------------------------------------------------------

    edit = editing.edit
    invert = editing.invert

    # Understanding -----------------------------------------------------------------------

    understand = answering.understand
    stream = answering.stream
    chat = answering.chat

    def _check_length(self, length: int, what: str) -> None:
        limit = self.model.config.llm.max_position_embeddings
        if length > limit:
            raise TooLongError(f"{what} need {length} positions; the model has {limit}")

    def _need(self, task: str) -> None:
        """ValueError unless there is all that `task` needs."""
        if self.model.parts not in ("all", task):
            raise ValueError(f'only parts="{self.model.parts}" was loaded; {task} needs "all" or "{task}"')
        if self.model.device.type == "meta":
            raise ValueError(
                "the model's weights are on the meta device, as after accelerate's cpu_offload: they must be in "
                "memory, so remove its hooks (accelerate.hooks.remove_hook_from_submodules) or load the model again"
            )
        if task == "generation" and self.vae is None:
            raise ValueError("this pipeline has no VAE, which generation needs")


def watched(
    callback: OnStepEnd,
    decode: Callable[..., list[Image.Image]] | None,
    velocity: Velocity,
    times: Sequence[float],
    on_step: OnStep,
) -> tuple[Velocity, OnStep]:
    """A solver's velocity and on_step that call the user's function after each step, with where the flow is heading
    if `decode` is given."""
    estimate: Tensor | None = None

    def velocity_seen(z: Tensor, t: float) -> Tensor:
        nonlocal estimate
        v = velocity(z, t)
        estimate = z + (1 - t) * v
        return v

    def after(step: int, z: Tensor) -> None:
        on_step(step, z)
        more = [] if decode is None else [decode(estimate, ["the preview"] * len(z))]
        callback(step, times[step + 1], z, *more)

    return velocity_seen, after


class ProgressCallback:
    """A solver's on_step: moves the bar, and keeps the host at most two steps ahead of the GPU, so that the bar is
    true and an interrupt obeyed, without ever letting the GPU wait."""

    def __init__(self, bar: tqdm, device: torch.device):
        self.bar, self.device = bar, device
        self.events: list[torch.cuda.Event] = []

    def __call__(self, step: int, z: Tensor) -> None:
        if self.device.type == "cuda":
            self.events.append(torch.cuda.current_stream(self.device).record_event())
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        self.bar.update()


def _not_finite(batch: Tensor) -> list[int]:
    """Indices of the rows that hold NaN or infinite values."""
    finite = torch.isfinite(batch).flatten(1).all(1).tolist()
    return [i for i, fine in enumerate(finite) if not fine]


def _described(value: Any) -> str:
    """An array's type, dtype and shape; of anything else what it is."""
    if not isinstance(value, Tensor | np.ndarray):
        return checks.shown(value)
    return f"{checks.shown(value)} of {value.dtype} {list(value.shape)}"
