# SPDX-License-Identifier: MIT
"""Training on images that the model generates itself, in rounds: what `nft.py` and `distill.py` share.

A step of such a run is a round: prompts are drawn, images of them generated, and the weights updated several times at
points of the flow to these images. What a round draws depends on the seed and the image's number in the run alone,
for any number of ranks.

Legend: B images of a round on this rank, K training points, C h w latent, T tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..flow import TIME_SCALE, interpolate, sample_time
from ..llama import mask_positions
from ..model import JanusFlow
from ..pipeline import Pipeline
from ..pixels import to_uint8
from ..processor import Processor
from ..sampling import PlainSampler, draw_noise, guided_velocity, left_pad
from ..solvers import SOLVERS, time_grid
from ..vae import VAE
from .batch import StepBatches
from .config import Config
from .losses import ABSENT
from .ranks import rank
from .rewards import Prompts
from .rows import seeded_generator
from .settings import require
from .step import TrainStep, add_metrics, reduce_metrics

Asked = tuple[int, str]  # a prompt's number in the run, and the prompt


class Points(NamedTuple):
    """Where the velocity is trained: K rows each, pass after pass of the round's images."""

    ids: Tensor  # (K, T) the prompt, padded on the left
    mask: Tensor  # (K, T)
    x: Tensor  # (K, C, h, w) the generated image's latent, fp32 as all that follows
    noise: Tensor  # (K, C, h, w)
    t: Tensor  # (K,)
    v_old: Tensor = ABSENT  # (K, C, h, w), as the next two
    v_start: Tensor = ABSENT
    target: Tensor = ABSENT
    r: Tensor = ABSENT  # (K,) in [0, 1]

    def pick(self, rows: Tensor) -> Points:
        return Points(*(ABSENT if tensor is None else tensor[rows] for tensor in self))


class RoundStep(TrainStep):
    """A round in the place of a step. A method is what it collects, and its losses."""

    group = 1  # images of a prompt

    def __init__(
        self,
        config: Config,
        model: JanusFlow,
        device: torch.device,
        dtype: torch.dtype,
        parallel: str,
        world: int,
        processor: Processor,
        vae: VAE,
    ):
        """model: of the start; the first six as in `TrainStep`. ValueError for fewer prompts in a round than ranks."""
        super().__init__(config, model, device, dtype, parallel, world)
        self.vae, self.pipe = vae, Pipeline(model, processor, vae)
        self.settings = config.rounds
        self.start = {name: p.detach().clone() for name, p in self.optimizer.master.items()}
        self.prompts = Prompts(self.settings.prompts, config.seed, f"{config.stage} prompt")

    def collect(self, asked: Sequence[Asked]) -> tuple[Points, dict[str, Tensor]]:
        """The training points of a round, K = passes·B, and its metrics."""
        raise NotImplementedError

    def losses(self, p: Points) -> Tensor:
        """Of K points: (K,)."""
        raise NotImplementedError

    def validation_loss(self) -> dict[str, float | None]:
        """By the present weights, over `validation` prompts, the same ones and the same noise each time."""
        raise NotImplementedError

    # A round -----------------------------------------------------------------------

    def prompts_of(self, rounds: range) -> Generator[StepBatches, None, None]:
        """The prompts of each round that are this rank's."""
        places, count = 1 + self.pipe.model.num_image_tokens, self.config.batch // self.group
        require(count >= self.world, "batch", f"at least {self.world * self.group}", self.config.batch)
        for index in rounds:
            numbers = range(index * count + rank(), (index + 1) * count, self.world)
            asked: list[Any] = [(n, self.prompts[n]) for n in numbers]
            lengths = [len(ids) + places for ids in self.pipe.check_prompts([text for _, text in asked])]
            tokens = sum(lengths) * self.group * self.settings.passes
            yield StepBatches(index, asked, [], len(asked) * self.group, tokens, tokens, [])

    def step(  # type: ignore[override]
        self, index: int, batches: Sequence[Asked], prepare: Any = None, stop_requested: bool = False
    ) -> tuple[dict[str, Tensor], bool]:
        """Make round `index` from its prompts. Returns what `TrainStep.step` does."""
        _, stop_requested, _ = self.sync_ranks([], stop_requested)
        self.loss.eval()  # adapters drop nothing out
        with torch.no_grad():
            points, metrics = self.collect(batches)
        self.loss.train()
        updates = self.settings.updates
        generator = seeded_generator(self.config.seed, f"{self.config.stage} order", index)
        order = torch.randperm(len(points.t), generator=generator, device="cpu").to(self.device)
        share = updates / (self.config.batch * self.settings.passes)  # of a point in its update
        for k, rows in enumerate(order.tensor_split(updates), start=index * updates):
            for i, part in enumerate(rows.split(self.config.micro_batch)):
                if i:
                    self.optimizer.accumulate()
                with self.dropout_masks(k, i):
                    losses = self.losses(points.pick(part))
                (losses.sum() * share).backward()
                add_metrics(metrics, {"loss": total(losses.detach())})
            add_metrics(metrics, {"norm": total(self.update(self.optimizer.schedule(k))[None])})
        if self.world > 1:
            reduce_metrics(metrics)
        return metrics, stop_requested

    def images_of(self, asked: Sequence[Asked]) -> tuple[list[str], list[int]]:
        """The prompt of each image of a round, and its number in the run."""
        prompts = [text for _, text in asked for _ in range(self.group)]
        return prompts, [n * self.group + k for n, _ in asked for k in range(self.group)]

    def noise_of(self, numbers: Sequence[int], key: str = "image") -> Tensor:
        """What these images start from: (B, C, h, w)."""
        key = f"{self.config.stage} {key}"
        generators = [seeded_generator(self.config.seed, key, n) for n in numbers]
        return draw_noise(self.pipe.model.latent_shape, generators).to(self.device)

    def points(self, prompts: Sequence[str], numbers: Sequence[int], x: Tensor, key: str = "point") -> Points:
        """New noise and times for images x (B, C, h, w) of these numbers, `passes` times."""
        c, passes, key = self.config, range(self.settings.passes), f"{self.config.stage} {key}"
        generators = [seeded_generator(c.seed, key, n, k) for k in passes for n in numbers]
        mean, std = c.objective.logit_mean, c.objective.logit_std
        t = torch.cat([sample_time(1, mean, std, generator) for generator in generators]).to(x)
        noise = draw_noise(x.shape[1:], generators).to(x)
        ids, mask = left_pad(self.pipe.check_prompts(prompts), self.device)
        ids, mask, x = (repeated(part, len(passes)) for part in (ids, mask, x))
        return Points(ids, mask, x, noise, t)

    # The model -----------------------------------------------------------------------

    def velocity(self, p: Points) -> Tensor:
        """Of each point's prompt by the present weights: (K, C, h, w), fp32."""
        model = self.pipe.model
        z, _ = interpolate(p.x, p.noise, p.t)
        image = p.mask.new_ones(len(p.t), 1 + model.num_image_tokens)
        seen = torch.cat([p.mask, image], dim=1)  # (K, T + 1 + N)
        return model.velocity(
            z,
            p.t * TIME_SCALE,
            text_embeds=model.llm.embed_tokens(p.ids),
            position_ids=mask_positions(seen),
            attention_mask=seen,
        ).float()

    def parts(self, count: int) -> list[Tensor]:
        """The indices of so many rows, `micro_batch` at a time."""
        return [*torch.arange(count, device=self.device).split(self.config.micro_batch)]

    def velocities(self, p: Points) -> Tensor:
        """`velocity`, `micro_batch` rows at a time."""
        return torch.cat([self.velocity(p.pick(part)) for part in self.parts(len(p.t))])

    def generate(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Latents (B, C, h, w), fp32, by the present weights."""
        s, sampler, latents = self.settings, PlainSampler(self.pipe.model), list[Tensor]()
        times = time_grid(s.num_inference_steps, shift=s.timestep_shift)
        for part in self.parts(len(prompts)):
            ids = self.pipe.check_prompts([prompts[k] for k in part.tolist()])
            velocity = guided_velocity(sampler, ids, s.cfg_weight)
            latents.append(SOLVERS[s.solver](velocity, noise[part], times, None))
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        found = (to_uint8(self.vae.decode(latents[part])) for part in self.parts(len(latents)))
        return [Image.fromarray(image) for images in found for image in images]


def repeated(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def total(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric of some samples: its sum and their number, both ()."""
    return values.sum(), values.new_tensor(float(values.numel()))
