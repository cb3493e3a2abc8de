# SPDX-License-Identifier: MIT
"""Sampling from a loaded model: the guided velocity that a solver of `flow.py` integrates, and the token loop.

A `Sampler` runs the LLM: `PlainSampler` here, the one to read, and `fast.sampler.GraphSampler`, the same numbers
several times faster on a GPU. What is not about speed stands here once: which rows the LLM computes for a list of
prompts (`plan_rows`), guidance, the choice of a token.

Follows the reference's `demo/app_janusflow.py` and `inference.py`. A prompt's keys and values are computed once for
every distinct prompt and stay in the cache over all steps, which causal attention makes exact.

Legend: B images, R rows of the LLM's batch, P distinct prompts, T text tokens, N image tokens, C h w latent,
V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .flow import TIME_SCALE, Velocity, classifier_free_guidance, rescale_guidance
from .llama import mask_positions
from .model import JanusFlow
from .processor import Batch

# z (B, C, h, w), timestep (B,) in [0, 1000] -> (R, C, h, w)
RowsVelocity = Callable[[Tensor, Tensor], Tensor]
MAX_BATCH = 16  # images generated or questions answered at once; more would not be faster, only larger
SampleFn = Callable[[Tensor], Tensor]  # fp32 logits (B, V) -> the next token's id of each row (B,)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Which prompts the LLM reads, and where each row of image tokens goes on."""

    prompts: list[tuple[int, ...]]  # P distinct ones, token ids
    source: list[int]  # (R,) which of them a row continues: the images' own, then the unconditional ones
    position: list[int]  # (R,) of the row's first image token
    images: int  # B; R is B, or 2B with guidance


def plan_rows(
    prompts: Sequence[Sequence[int]],
    guided: bool,
    negative_prompts: Sequence[Sequence[int]] | None = None,
) -> RowPlan:
    """The rows for B images, one prompt (token ids without the generation tag) each.

    As published, an unconditional row sees BOS alone and stands at the positions of its conditional twin. A negative
    prompt, one for each image, is read in its place and stands at its own positions.
    """
    rows, position = [tuple(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    bos_only = rows[0][:1]
    # BOS is read without guidance too: the LLM's batch, and so the last bit, does not depend on the weight.
    distinct = [*dict.fromkeys(rows), bos_only]
    if guided and negative_prompts is None:
        rows, position = rows + [bos_only] * len(rows), position * 2
    elif guided:
        rows += [tuple(prompt) for prompt in negative_prompts or ()]
        distinct, position = list(dict.fromkeys(rows)), [len(prompt) for prompt in rows]
    return RowPlan(distinct, [distinct.index(row) for row in rows], position, len(prompts))


class Sampler(Protocol):
    """How a model is run. What a call returns is never changed by a later one."""

    @property
    def is_current(self) -> bool:
        """Whether it still runs the model's present weights."""

    def prefill(self, plan: RowPlan) -> RowsVelocity:
        """Read the prompts; returns the velocity of each row, in z's dtype."""

    def generate_tokens(
        self, batch: Batch, max_new_tokens: int, eos_id: int, sample_fn: SampleFn | None = None
    ) -> list[list[int]]:
        """Answer the processor's batch (on the CPU): ids of each row, the EOS that ended it included.

        sample_fn None is greedy; else its logits are valid until it returns. FloatingPointError for logits that are
        not finite.
        """


def guided_velocity(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    cfg_weight: float,
    negative_prompts: Sequence[Sequence[int]] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
) -> Velocity:
    """The velocity for B prompts, token ids without the generation tag; negative_prompts: as many, or none.

    With a cfg_weight of 1, and at times outside guidance_interval (low <= t < high; t = 1 belongs to high = 1), the
    unconditional rows are not computed. guidance_rescale: see `flow.rescale_guidance`.
    """
    low, high = guidance_interval
    prefilled: dict[bool, RowsVelocity] = {}  # guided or not -> the rows', made when first needed

    def velocity(z: Tensor, t: float) -> Tensor:
        guided = cfg_weight != 1.0 and low <= t and (t < high or high == 1.0)
        if guided not in prefilled:
            prefilled[guided] = sampler.prefill(plan_rows(prompts, guided, negative_prompts))
        v = prefilled[guided](z, torch.full((len(z),), t * TIME_SCALE, dtype=z.dtype, device=z.device))
        if not guided:
            return v
        v_cond, v_uncond = v.chunk(2)
        v = classifier_free_guidance(v_cond, v_uncond, cfg_weight)
        return rescale_guidance(v, v_cond, guidance_rescale) if guidance_rescale else v

    return velocity


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (B, *shape), each image's from its own CPU generator, whatever the model's dtype and device and torch's
    defaults: fp32 on the CPU."""
    drawn = [torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    return torch.stack(drawn)


class PlainSampler:
    """The modules as they are, on any device and in any dtype."""

    is_current = True

    def __init__(self, model: JanusFlow):
        self.model = model

    def prefill(self, plan: RowPlan) -> RowsVelocity:
        model, device = self.model, self.model.device
        image_tokens = 1 + model.num_image_tokens  # t_emb in front
        ids, mask = left_pad(plan.prompts, device)  # (P, T)
        prompts = model.new_cache(*ids.shape)
        model.llm(model.llm.embed_tokens(ids), mask_positions(mask), mask, prompts)
        # One row of cache for every row of image tokens.
        length, source = ids.shape[1], torch.tensor(plan.source, device=device)
        cache = prompts.select(source, length)
        cache.fixed = True
        seen = torch.cat([mask[source], mask.new_ones(len(source), image_tokens)], dim=1)  # (R, T + 1 + N)
        attention_mask = None if bool(seen.all()) else seen
        first = torch.tensor(plan.position, device=device)
        positions = first[:, None] + torch.arange(image_tokens, device=device)  # (R, 1 + N)

        def velocity(z: Tensor, timestep: Tensor) -> Tensor:
            v = model.velocity(
                z, timestep, position_ids=positions, attention_mask=attention_mask, cache=cache
            )
            return v.to(z.dtype)

        return velocity

    def generate_tokens(
        self, batch: Batch, max_new_tokens: int, eos_id: int, sample_fn: SampleFn | None = None
    ) -> list[list[int]]:
        model, device = self.model, self.model.device
        embeds = model.prepare_inputs_embeds(
            batch.input_ids.to(device),
            batch.pixel_values.to(device),
            batch.images_seq_mask.to(device),
            batch.images_emb_mask.to(device),
        )
        mask = batch.attention_mask.to(device).bool()
        rows, length = mask.shape
        full = bool(mask.all())
        mask = torch.cat([mask, mask.new_ones(rows, max_new_tokens)], dim=1)
        positions = mask_positions(mask)  # (B, T + new)
        cache = model.new_cache(rows, length + max_new_tokens)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        columns, start = [], 0
        for end in range(length, length + max_new_tokens):
            seen = None if full else mask[:, :end]
            hidden = model.llm(embeds, positions[:, start:end], seen, cache)
            logits = model.logits(hidden[:, -1])
            if sample_fn is None:
                best, ids = logits.max(-1)
                check_logits(best)
            else:
                ids = sample_fn(logits)
            ids = ids.masked_fill(ended, eos_id)  # a row that has ended is filled up with EOS
            columns.append(ids)
            ended = ended | (ids == eos_id)
            if ended.all():
                break
            embeds, start = model.llm.embed_tokens(ids)[:, None], end
        return cut_at_eos(torch.stack(columns, dim=1).tolist(), eos_id)


def sample(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: Sequence[torch.Generator] | None
) -> Tensor:
    """fp32 logits (B, V) -> ids (B,): temperature, top-k, top-p and one draw; the best token at temperature 0.

    Top-p as in transformers: in ascending order, tokens whose cumulative probability stays at or below 1 - p go;
    the best always stays. The draw is over the whole vocabulary, on the CPU, each row's from its generator; None is
    torch's. FloatingPointError for logits that are not finite.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits / temperature
    if 0 < top_k < scores.shape[-1]:
        worst = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < worst, float("-inf"))
    if top_p < 1:
        ascending, order = scores.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    probabilities = scores.softmax(-1).cpu()
    check_logits(probabilities.amax(-1))
    if generator is None:
        drawn = torch.multinomial(probabilities, 1)
    else:
        rows = zip(probabilities.split(1), generator, strict=True)
        drawn = torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])
    return drawn[:, 0].to(logits.device)


def settled(text: str, stop: Sequence[str], final: bool) -> tuple[str, bool]:
    """What of an answer's text later tokens cannot change, and whether a stop string has ended it. Until it is final,
    half a character and the start of a stop string wait."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    if found:
        return text[: min(found)], True
    if not final:
        text = text.rstrip("\ufffd")
        begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        text = text[: len(text) - max(begun, default=0)]
    return text, False


class AnswerWatch:
    """A `SampleFn` around another one that ends a row at a stop string and hands on its text as it is settled.

    on_text(row, text): called with each new piece; the pieces of a row add up to its text.
    """

    def __init__(
        self,
        rows: int,
        sample_fn: SampleFn,
        eos_id: int,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        on_text: Callable[[int, str], None] | None,
    ):
        self.sample_fn, self.eos_id, self.decode = sample_fn, eos_id, decode
        self.stop, self.on_text = stop, on_text
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.texts, self.ended = [""] * rows, [False] * rows

    def __call__(self, logits: Tensor) -> Tensor:
        check_logits(logits.amax(-1))
        ids = self.sample_fn(logits).tolist()
        for row, token in enumerate(ids):
            if not self.ended[row]:
                self.tokens[row].append(token)
                self._advance(row, final=token == self.eos_id)
            if self.ended[row]:
                ids[row] = self.eos_id
        return torch.tensor(ids, device=logits.device)

    def finish(self) -> None:
        """No more tokens come: what waited is text after all."""
        for row, ended in enumerate(self.ended):
            if not ended:
                self._advance(row, final=True)
                self.ended[row] = False  # by its length

    def _advance(self, row: int, final: bool) -> None:
        text, stopped = settled(self.decode(self.tokens[row]), self.stop, final)
        new, self.texts[row] = text[len(self.texts[row]) :], text
        self.ended[row] = final or stopped
        if new and self.on_text is not None:
            self.on_text(row, new)


def check_logits(best: Tensor) -> None:
    """FloatingPointError unless the largest logit of each row is finite; NaN counts as the largest."""
    if not torch.isfinite(best).all():
        raise FloatingPointError(
            "the model's logits are NaN or infinite, so there is no answer; float16 can overflow, bfloat16 and "
            "float32 hardly ever do: check the weights or load with another dtype"
        )


def cut_at_eos(rows: list[list[int]], eos_id: int) -> list[list[int]]:
    """Each row up to its first EOS, which stays."""
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in rows]


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> ids (P, T), padded with 0 on the left, and their mask (P, T)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask
