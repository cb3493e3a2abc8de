# SPDX-License-Identifier: MIT
"""The paper's training objective: flow matching, next-token cross-entropy, representation alignment.

Paper sections 3.3 and 3.4. A generation sample's loss is flow + alignment; an understanding or text sample's loss
is the cross-entropy of its responses. Nothing here draws random numbers: times, noise and dropping are arguments.

Rows of all kinds go through the LLM in one pass, padded on the right: attention is causal, so no row sees its padding
and no mask is needed. A hidden prompt is left out of its row, all but BOS, and the image keeps its positions; that is
the same as masking it.

Legend: B rows, T tokens of all sorts, N image tokens, D the LLM's hidden size, C h w latent, P SigLIP's width,
G generated images, M images that are asked about, L labelled tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import TIME_SCALE, flow_loss, interpolate
from ..model import JanusFlow, merge_image_embeds
from .config import ObjectiveConfig

BINS = 4  # of t, in the metrics
ABSENT: Any = None  # a field that a batch has no use for
IGNORE = -100  # label of a token that carries no loss; processor_config.json's ignore_id


class AlignmentHead(nn.Module):
    """Three-layer MLP from the LLM's states to SigLIP's features (REPA); trained with the model, dropped afterwards."""

    def __init__(self, hidden_size: int, width: int, inner: int | None = None):
        super().__init__()
        inner = inner or hidden_size
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        layers = linear(hidden_size, inner), nn.SiLU(), linear(inner, inner), nn.SiLU(), linear(inner, width)
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, P)"""
        return self.layers(hidden)


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """Rows of any kind, padded on the right; fields that only absent kinds would need are None."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    label_index: Tensor = ABSENT  # (L,) the token before each label, in the flattened rows
    labels: Tensor = ABSENT  # (L,)
    label_weight: Tensor = ABSENT  # (L,) 1 / labels of its sample
    und_pixels: Tensor = ABSENT  # (M, 3, S, S) as SigLIP wants it; uint8 before `batch.unpack`
    und_places: Tensor = ABSENT  # (B, T) begin-of-image and image tokens
    gen_places: Tensor = ABSENT  # (B, T) t_emb and image tokens
    gen_index: Tensor = ABSENT  # (G N,) the image tokens in the flattened rows
    t: Tensor = ABSENT  # (G,)
    noise: Tensor = ABSENT  # (G, C, h, w)
    images: Tensor = ABSENT  # (G, 3, S, S) uint8, which `batch.unpack` makes the next two of
    vae_pixels: Tensor = ABSENT  # (G, 3, S, S) in [-1, 1]
    pixels: Tensor = ABSENT  # (G, 3, S, S) the same as SigLIP wants it
    latents: Tensor = ABSENT  # (G, C, h, w) of the images
    features: Tensor = ABSENT  # (G, N, P) of the pixels, where they are known already

    def __reduce__(self) -> tuple:
        """Pickled as plain bytes: tensors would go through shared memory, which is scarce in containers."""
        arrays = {f.name: v.numpy() for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return _from_arrays, (arrays,)

    def to(self, device: torch.device) -> MixedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if v is not None}
        return replace(self, **moved)

    def pin_memory(self) -> MixedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in values.items() if v is not None})


def _from_arrays(arrays: dict[str, np.ndarray]) -> MixedBatch:
    return MixedBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


class Term(NamedTuple):
    """One loss of a batch; `scale` times its weighted sum is minimised."""

    values: Tensor  # (K,) of each sample, or of each token
    weights: Tensor  # (K,) those of one sample add up to 1
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a batch, by name. An entry of `terms` is all that a new one takes: it is minimised,
    summed over micro-batches and ranks, and reported."""

    terms: dict[str, Term]
    total: Tensor  # () what is minimised: a sum over samples, each of weight 1
    rows: Tensor  # () samples of the batch
    flow_by_time: tuple[Tensor, Tensor]  # sums and counts in bins of t, (BINS,) each

    def metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name: (sum, number of samples), both () and without gradients; every batch has the same names."""
        found = {"loss": (self.total, self.rows)}
        found |= {name: ((t.values * t.weights).sum(), t.weights.sum()) for name, t in self.terms.items()}
        for k, pair in enumerate(zip(*self.flow_by_time, strict=True)):
            found[f"flow_t{k / BINS:.2f}"] = pair
        return {name: (total.detach().float(), count) for name, (total, count) in found.items()}


class JanusFlowLoss(nn.Module):
    """Model and alignment head; its forward pass is the paper's loss of a mixed batch."""

    def __init__(self, model: JanusFlow, head: AlignmentHead, settings: ObjectiveConfig):
        super().__init__()
        self.model, self.head, self.settings = model, head, settings

    def forward(self, batch: MixedBatch, grad_for_unused: tuple[str, ...] = ()) -> Losses:
        """grad_for_unused: prefixes of parameters that get a gradient here, if only zeros: sharded ranks must agree on
        what has one, and may hold samples of different kinds."""
        model: Any = self.model  # loaded whole: no part of it is None
        settings = self.settings
        embeds = model.llm.embed_tokens(batch.input_ids)  # (B, T, D)
        if batch.und_pixels is not None:
            images = model.embed_images(batch.und_pixels.to(embeds.dtype))  # (M, 1 + N, D)
            embeds = merge_image_embeds(embeds, images, batch.und_places)
        if batch.t is not None:
            z, target = interpolate(batch.latents, batch.noise, batch.t)
            x, t_emb, skip = model.encode_latents(z.to(embeds.dtype), batch.t * TIME_SCALE)
            tokens = torch.cat([t_emb[:, None], x], dim=1)  # (G, 1 + N, D)
            embeds = merge_image_embeds(embeds, tokens, batch.gen_places)
        layer = settings.alignment_layer
        hidden, states = model.llm(embeds, batch.position_ids, hidden_layer=layer)  # (B, T, D) twice
        none = hidden.new_zeros(0, dtype=torch.float32)
        flow = weighted = alignment = cross_entropy = label_weight = none
        if batch.t is not None:
            v = model.decode_velocity(pick(hidden, batch.gen_index).view_as(x), skip, t_emb)
            flow = flow_loss(v, target)
            weighted = flow * time_weight(batch.t, settings.flow_weighting)
            if settings.alignment_weight:
                with torch.no_grad():  # only the LLM's states move towards the features
                    features = batch.features
                    if features is None:
                        features = model.siglip(batch.pixels.to(embeds.dtype))
                projected = self.head(pick(states, batch.gen_index).view_as(x))  # (G, N, P)
                alignment = -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)
        if batch.labels is not None:
            logits = model.logits(pick(hidden, batch.label_index))  # (L, vocabulary)
            cross_entropy = F.cross_entropy(logits, batch.labels, reduction="none")
            label_weight = batch.label_weight
        terms = {
            "flow": Term(weighted, torch.ones_like(weighted)),
            "alignment": Term(alignment, torch.ones_like(alignment), settings.alignment_weight),
            "answers": Term(cross_entropy, label_weight, settings.answer_weight),
        }
        total = none.sum()
        for term in terms.values():
            total = total + term.scale * (term.values * term.weights).sum()
        if grad_for_unused:
            named = (p for name, p in self.named_parameters() if name.startswith(grad_for_unused))
            total = total + 0.0 * sum(p.sum() for p in named if p.requires_grad)
        rows = torch.full((), float(len(batch.input_ids)), dtype=torch.float32, device=hidden.device)
        return Losses(terms, total, rows, by_time(flow, none if batch.t is None else batch.t))


def time_weight(t: Tensor, kind: str) -> Tensor:
    """Weights (G,) of the flow loss at times t (G,), as Stable Diffusion 3's training names them; noise is 1 - t."""
    if kind == "sigma_sqrt":
        return (1 - t).clamp(min=0.01) ** -2
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * t * (1 - t)))
    return torch.ones_like(t)


def pick(hidden: Tensor, index: Tensor) -> Tensor:
    """States (B, T, D) at places in the flattened rows: (K, D)."""
    return hidden.flatten(0, 1).index_select(0, index)


def by_time(flow: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the flow loss (G,) in equal bins of t (G,): two of (BINS,)."""
    bin_of = (t * BINS).long().clamp(max=BINS - 1)
    inside = (bin_of[None] == torch.arange(BINS, device=t.device)[:, None]).float()  # (BINS, G)
    return inside @ flow.detach().float(), inside.sum(1)
