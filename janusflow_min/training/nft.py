# SPDX-License-Identifier: MIT
"""DiffusionNFT: reinforcement learning of the flow from rewards, on the forward process alone.

Zheng et al. 2025, arXiv 2509.16117, algorithm 1, in the convention of `flow.py`: z_t = t·x + (1 - t)·noise,
v = x - noise, and z_t + (1 - t)·v estimates x. A step of the run is a round. The old policy, the optimizer's average
of the weights, generates `nft.group` images x of each prompt by any solver, and their rewards R in [0, 1] become

    r = 1/2 + 1/2·clip((R - mean of the prompt's images) / deviation, -1, 1).

Then v+ = v_old + β·(v - v_old) and v- = v_old - β·(v - v_old) learn x from new noise at new times:

    r·|x+ - x|² / w+ + (1 - r)·|x- - x|² / w- + pull·|v - v_start|²,

where x± are the estimates by v±, w± = mean |x± - x| without gradient, and |·|² is the mean over an image's latent.
Nothing is differentiated through the solver or the reward. The last term (the paper's KL) and the slow old policy keep
a run from collapsing. What a round draws depends on the seed and the image's number alone, for any number of ranks.

Legend: B images of a round on this rank, P their prompts, K training points, C h w latent, T tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from .. import checks
from ..flow import TIME_SCALE, flow_loss, interpolate, sample_time
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
from .rewards import Prompts, find_reward
from .rows import seeded_generator
from .settings import require
from .step import TrainStep, add_metrics, reduce_metrics

LEAST_DEVIATION = 0.1  # of rewards: smaller differences are not blown up


class Points(NamedTuple):
    """Where the velocity is trained: K rows each."""

    ids: Tensor  # (K, T) the prompt, padded on the left
    mask: Tensor  # (K, T)
    x: Tensor  # (K, C, h, w) the generated image's latent, fp32 as all that follows
    noise: Tensor  # (K, C, h, w)
    t: Tensor  # (K,)
    v_old: Tensor = ABSENT  # (K, C, h, w)
    v_start: Tensor = ABSENT  # (K, C, h, w)
    r: Tensor = ABSENT  # (K,) in [0, 1]

    def pick(self, rows: Tensor) -> Points:
        return Points(*(ABSENT if tensor is None else tensor[rows] for tensor in self))


class NftStep(TrainStep):
    """A round in the place of a step: generate and rate images, then update the weights `nft.updates` times."""

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
        self.nft, self.vae, self.pipe = config.nft, vae, Pipeline(model, processor, vae)
        self.per_round = config.batch // self.nft.group  # prompts
        require(self.per_round >= world, "batch", f"nft.group for each of {world} ranks", config.batch)
        self.start = {name: p.detach().clone() for name, p in self.optimizer.master.items()}
        self.prompts = Prompts(self.nft.prompts, config.seed, "nft prompt")
        self.reward = find_reward(self.nft.reward, self.nft.checker, self.pipe)

    def prompts_of(self, rounds: range) -> Generator[StepBatches, None, None]:
        """The prompts of each round that are this rank's, with their numbers in the run."""
        places, copies = 1 + self.pipe.model.num_image_tokens, self.nft.group * self.nft.passes
        for index in rounds:
            first = index * self.per_round
            asked: list[Any] = [
                (n, self.prompts[n]) for n in range(first + rank(), first + self.per_round, self.world)
            ]
            lengths = [len(ids) + places for ids in self.pipe.check_prompts([text for _, text in asked])]
            tokens = sum(lengths) * copies
            yield StepBatches(index, asked, [], len(asked) * self.nft.group, tokens, tokens, [])

    def step(  # type: ignore[override]
        self,
        index: int,
        batches: Sequence[tuple[int, str]],
        prepare: Any = None,
        stop_requested: bool = False,
    ) -> tuple[dict[str, Tensor], bool]:
        """Make round `index` from the prompts of `prompts_of`. Returns what `TrainStep.step` does."""
        _, stop_requested, _ = self.sync_ranks([], stop_requested)
        points, metrics = self.collect(batches)
        generator = seeded_generator(self.config.seed, "nft order", index)
        order = torch.randperm(len(points.t), generator=generator, device="cpu").to(self.device)
        share = self.nft.updates / (self.config.batch * self.nft.passes)  # of a point in its update
        for k, rows in enumerate(order.tensor_split(self.nft.updates), start=index * self.nft.updates):
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

    def losses(self, p: Points) -> Tensor:
        """The formula above for K points: (K,)."""
        v, beta = self.velocity(p), self.nft.beta
        z, _ = interpolate(p.x, p.noise, p.t)
        left = (1 - p.t).view(-1, 1, 1, 1)
        loss = self.nft.pull * flow_loss(v, p.v_start) if self.nft.pull else torch.zeros_like(p.t)
        for r, sign in ((p.r, beta), (1 - p.r, -beta)):
            error = z + left * (p.v_old + sign * (v - p.v_old)) - p.x
            width = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            loss = loss + r * error.square().flatten(1).mean(1) / width
        return loss

    def velocity(self, p: Points) -> Tensor:
        """By the present weights: (K, C, h, w), fp32."""
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

    def velocities(self, p: Points) -> Tensor:
        """`velocity`, `micro_batch` rows at a time."""
        rows = torch.arange(len(p.t), device=self.device).split(self.config.micro_batch)
        return torch.cat([self.velocity(p.pick(part)) for part in rows])

    @torch.no_grad()
    def collect(self, asked: Sequence[tuple[int, str]]) -> tuple[Points, dict[str, Tensor]]:
        """A round's points, K = `nft.passes`·B, and its metrics."""
        group, passes = self.nft.group, self.nft.passes
        prompts = [text for _, text in asked for _ in range(group)]
        numbers = [n * group + k for n, _ in asked for k in range(group)]  # of the images in the run
        self.loss.eval()  # adapters drop nothing out
        with self.optimizer.computing_with(self.optimizer.average):
            x, images = self.generate(prompts, "nft image", numbers)
            points = self.draw(prompts, numbers, x)
            points = points._replace(v_old=self.velocities(points))
        if self.nft.pull:
            with self.optimizer.computing_with(self.start):
                points = points._replace(v_start=self.velocities(points))
        rewards = x.new_tensor(self.rate(images, prompts)).view(-1, group)  # (P, group)
        self.loss.train()
        variances = rewards.var(1, correction=0)  # (P,)
        metrics = {"reward": total(rewards), "spread": total(variances.sqrt())} | self.distances(points)
        variance = torch.stack(total(variances))
        if self.world > 1:
            dist.all_reduce(variance)
        deviation = (variance[0] / variance[1]).sqrt().clamp(min=LEAST_DEVIATION)
        r = 0.5 + 0.5 * ((rewards - rewards.mean(1, keepdim=True)) / deviation).clamp(-1, 1)
        found: dict[str, Tensor] = {}
        add_metrics(found, metrics)
        return points._replace(r=r.flatten().repeat(passes)), found

    def draw(self, prompts: Sequence[str], numbers: Sequence[int], x: Tensor) -> Points:
        """Noise and times for the images x (B, C, h, w) of these numbers, `nft.passes` times."""
        c, passes = self.config, range(self.nft.passes)
        generators = [seeded_generator(c.seed, "nft point", n, k) for k in passes for n in numbers]
        mean, std = c.objective.logit_mean, c.objective.logit_std
        t = torch.cat([sample_time(1, mean, std, generator) for generator in generators]).to(x)
        noise = draw_noise(x.shape[1:], generators).to(x)
        ids, mask = left_pad(self.pipe.check_prompts(prompts), self.device)
        ids, mask, x = (part.repeat(len(passes), *[1] * (part.ndim - 1)) for part in (ids, mask, x))
        return Points(ids, mask, x, noise, t)

    def generate(
        self, prompts: Sequence[str], key: str, numbers: Sequence[int]
    ) -> tuple[Tensor, list[Image.Image]]:
        """Latents (B, C, h, w) fp32 and images by the present weights. key, numbers: of the noise of each."""
        sampler, solver = PlainSampler(self.pipe.model), SOLVERS[self.nft.solver]
        times = time_grid(self.nft.num_inference_steps, shift=self.nft.timestep_shift)
        generators = [seeded_generator(self.config.seed, key, n) for n in numbers]
        noise = draw_noise(self.pipe.model.latent_shape, generators).to(self.device)
        latents, images = list[Tensor](), list[Image.Image]()
        for start in range(0, len(prompts), self.config.micro_batch):
            part = slice(start, start + self.config.micro_batch)
            ids = self.pipe.check_prompts(prompts[part])
            z = solver(guided_velocity(sampler, ids, self.nft.cfg_weight), noise[part], times, None)
            latents.append(z)
            images += map(Image.fromarray, to_uint8(self.vae.decode(z)))
        return torch.cat(latents), images

    def rate(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Rewards. ValueError unless there is a number in [0, 1] for each image."""
        # Eyes that learn to see what is wanted are no judges: those of "answers" stay as they were.
        with self.optimizer.computing_with(self.start if self.nft.reward == "answers" else {}):
            values = list(self.reward(images, prompts))
        require(len(values) == len(images), "nft.reward", f"{len(images)} numbers for as many images", values)
        return [checks.number("what nft.reward returned", value, 0, 1) for value in values]

    def distances(self, p: Points) -> dict[str, tuple[Tensor, Tensor]]:
        """How far the old policy is from the start: of all weights, and of its velocities, relative to the start's."""
        start, old = [*self.start.values()], [*(self.optimizer.average or self.optimizer.master).values()]
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(old, start))).norm()
        found = {"weights_moved": total((moved / torch.stack(torch._foreach_norm(start)).norm())[None])}
        if self.nft.pull:
            square = p.v_start.square().flatten(1).mean(1)
            found["velocity_moved"] = total((flow_loss(p.v_old, p.v_start) / square).sqrt())
        return found

    @torch.no_grad()
    def validation_loss(self) -> dict[str, float | None]:
        """1 - reward and reward, the mean of one image for each of `nft.validation` prompts, the same each time, by
        the present weights."""
        numbers = range(rank(), self.nft.validation, self.world)
        prompts = Prompts(self.nft.prompts, self.config.seed, "nft validation")
        texts = [prompts[n] for n in numbers]
        _, images = self.generate(texts, "nft validation", numbers)
        sums = torch.tensor([sum(self.rate(images, texts)), len(texts)], dtype=torch.float64, device="cpu")
        if self.world > 1:
            dist.all_reduce(sums)
        reward = float(sums[0] / sums[1])
        return {"loss": 1 - reward, "reward": reward}


def total(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric of some samples: its sum and their number, both ()."""
    return values.sum(), values.new_tensor(float(values.numel()))
