# SPDX-License-Identifier: MIT
"""Distillation of the model as it was at the start, the teacher, into itself: without guidance, and in fewer steps.

In a round (`rounds.py`) the teacher generates an image x of each prompt from noise, guided with `distill.cfg_weight` w.
`distill.target` says what the velocity v(z_t, t) of the prompt alone then learns, at z_t = t·x + (1 - t)·noise:

- "guidance": w·v_teacher(z_t, t, prompt) - (w - 1)·v_teacher(z_t, t), at new noise: the guided images from half the
  rows (Meng et al. 2022, arXiv 2210.03142, stage one, for a single w).
- "reflow": x - noise, with the noise that the image was made from: straighter ways, which fewer steps follow (Liu et
  al. 2022, arXiv 2209.03003), and without guidance, for the pairs have it already.

The loss is the mean square error. Unconditional rows are not trained.

Legend: B images of a round on this rank, K training points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..flow import TIME_SCALE, classifier_free_guidance, flow_loss, interpolate
from ..sampling import PlainSampler, plan_rows
from .ranks import rank
from .rewards import Prompts
from .rounds import Asked, Points, RoundStep, repeated, total


class DistillStep(RoundStep):
    """A round: the teacher generates and gives the targets, then the weights learn them."""

    def collect(self, asked: Sequence[Asked]) -> tuple[Points, dict[str, Tensor]]:
        return self.taught(*self.images_of(asked)), {}

    def losses(self, p: Points) -> Tensor:
        return flow_loss(self.velocity(p), p.target)

    def taught(self, prompts: Sequence[str], numbers: Sequence[int], key: str = "image") -> Points:
        """Points on the way to the teacher's images, with its targets. key: of the noise of this kind of numbers."""
        noise = self.noise_of(numbers, key)
        with self.optimizer.computing_with(self.start):
            x = self.generate(prompts, noise)
            p = self.points(prompts, numbers, x, f"{key} point")
            if self.config.distill.target == "reflow":
                p = p._replace(noise=repeated(noise, self.settings.passes))
                return p._replace(target=p.x - p.noise)
            return p._replace(target=self.guided(p, list(prompts) * self.settings.passes))

    def guided(self, p: Points, prompts: Sequence[str]) -> Tensor:
        """The guided velocity at K points by the present weights: (K, C, h, w)."""
        sampler, found = PlainSampler(self.pipe.model), list[Tensor]()
        ids, (z, _) = self.pipe.check_prompts(prompts), interpolate(p.x, p.noise, p.t)
        for part in self.parts(len(ids)):
            velocity = sampler.prefill(plan_rows([ids[k] for k in part.tolist()], guided=True))
            conditional, unconditional = velocity(z[part], p.t[part] * TIME_SCALE).chunk(2)
            found.append(classifier_free_guidance(conditional, unconditional, self.settings.cfg_weight))
        return torch.cat(found)

    @torch.no_grad()
    def validation_loss(self) -> dict[str, float | None]:
        numbers = range(rank(), self.settings.validation, self.world)
        prompts = Prompts(self.settings.prompts, self.config.seed, "distill validation")
        p = self.taught([prompts[n] for n in numbers], numbers, "validation")
        losses = torch.cat([self.losses(p.pick(part)) for part in self.parts(len(p.t))])
        sums = torch.stack(total(losses)).double().cpu()
        if self.world > 1:
            dist.all_reduce(sums)
        return {"loss": float(sums[0] / sums[1])}
