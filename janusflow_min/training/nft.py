# SPDX-License-Identifier: MIT
"""DiffusionNFT: reinforcement learning of the flow from rewards, on the forward process alone.

Zheng et al. 2025, arXiv 2509.16117, algorithm 1, in the convention of `flow.py`: z_t = t·x + (1 - t)·noise,
v = x - noise, and z_t + (1 - t)·v estimates x. In a round (`rounds.py`) the old policy, the optimizer's average of the
weights, generates `nft.group` images x of each prompt by any solver, and their rewards R in [0, 1] become

    r = 1/2 + 1/2·clip((R - mean of the prompt's images) / deviation, -1, 1).

Then v+ = v_old + β·(v - v_old) and v- = v_old - β·(v - v_old) learn x from new noise at new times:

    r·|x+ - x|² / w+ + (1 - r)·|x- - x|² / w- + pull·|v - v_start|²,

where x± are the estimates by v±, w± = mean |x± - x| without gradient, and |·|² is the mean over an image's latent.
Nothing is differentiated through the solver or the reward. The last term (the paper's KL) and the slow old policy keep
a run from collapsing.

Legend: B images of a round on this rank, P their prompts, K training points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from .. import checks
from ..flow import flow_loss, interpolate
from .config import Config
from .ranks import rank
from .rewards import Prompts, find_reward
from .rounds import Asked, Points, RoundStep, repeated, total
from .settings import require
from .step import add_metrics

LEAST_DEVIATION = 0.1  # of rewards: smaller differences are not blown up


class NftStep(RoundStep):
    """A round: generate and rate images, then learn from their differences."""

    def __init__(self, config: Config, *parts: Any):
        """As `RoundStep`."""
        super().__init__(config, *parts)
        self.nft, self.group = config.nft, config.nft.group
        self.reward = find_reward(self.nft.reward, self.nft.checker, self.pipe)

    def losses(self, p: Points) -> Tensor:
        v, beta = self.velocity(p), self.nft.beta
        z, _ = interpolate(p.x, p.noise, p.t)
        left = (1 - p.t).view(-1, 1, 1, 1)
        loss = self.nft.pull * flow_loss(v, p.v_start) if self.nft.pull else torch.zeros_like(p.t)
        for r, sign in ((p.r, beta), (1 - p.r, -beta)):
            error = z + left * (p.v_old + sign * (v - p.v_old)) - p.x
            width = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            loss = loss + r * error.square().flatten(1).mean(1) / width
        return loss

    def collect(self, asked: Sequence[Asked]) -> tuple[Points, dict[str, Tensor]]:
        prompts, numbers = self.images_of(asked)
        with self.optimizer.computing_with(self.optimizer.average):
            x = self.generate(prompts, self.noise_of(numbers))
            points = self.points(prompts, numbers, x)
            points = points._replace(v_old=self.velocities(points))
        if self.nft.pull:
            with self.optimizer.computing_with(self.start):
                points = points._replace(v_start=self.velocities(points))
        rewards = x.new_tensor(self.rate(self.decode(x), prompts)).view(-1, self.group)  # (P, group)
        variances = rewards.var(1, correction=0)  # (P,)
        variance = torch.stack(total(variances))
        if self.world > 1:
            dist.all_reduce(variance)
        deviation = (variance[0] / variance[1]).sqrt().clamp(min=LEAST_DEVIATION)
        r = 0.5 + 0.5 * ((rewards - rewards.mean(1, keepdim=True)) / deviation).clamp(-1, 1)
        metrics: dict[str, Tensor] = {}
        spread = {"reward": total(rewards), "spread": total(variances.sqrt())}
        add_metrics(metrics, spread | self.distances(points))
        return points._replace(r=repeated(r.flatten(), self.nft.passes)), metrics

    def rate(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Rewards. ValueError unless there is a number in [0, 1] for each image."""
        # Eyes that learn to see what is wanted are no judges: those of "answers" stay as they were.
        with self.optimizer.computing_with(self.start if self.nft.reward == "answers" else {}):
            values: Any = self.reward(images, prompts)
        values = values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
        good = isinstance(values, list | tuple) and len(values) == len(images)
        require(good, "what nft.reward returned", f"{len(images)} numbers for as many images", values)
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
        """1 - reward, and the reward: the mean of one image for each prompt."""
        numbers = range(rank(), self.nft.validation, self.world)
        prompts = Prompts(self.nft.prompts, self.config.seed, "nft validation")
        texts = [prompts[n] for n in numbers]
        images = self.decode(self.generate(texts, self.noise_of(numbers, "validation")))
        sums = torch.tensor([sum(self.rate(images, texts)), len(texts)], dtype=torch.float64, device="cpu")
        if self.world > 1:
            dist.all_reduce(sums)
        reward = float(sums[0] / sums[1])
        return {"loss": 1 - reward, "reward": reward}
