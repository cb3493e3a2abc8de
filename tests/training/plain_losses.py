# SPDX-License-Identifier: MIT
"""The objective once more, as an oracle: batches of one kind, padded on the left and masked.

Legend: B batch, T text tokens, N image tokens, D the LLM's hidden size, C h w latent, P SigLIP's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from janusflow_min.flow import TIME_SCALE, flow_loss, interpolate
from janusflow_min.model import JanusFlow, merge_image_embeds
from janusflow_min.training.losses import IGNORE, AlignmentHead


class GenerationLoss(NamedTuple):
    flow: Tensor  # (B,) mean squared error of the velocity
    alignment: Tensor  # (B,) minus the mean cosine similarity, -1 is best


def prompt_mask(attention_mask: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts, some dropped: only BOS stays visible there, and every token keeps its position.

    attention_mask (B, T) true for real tokens, drop (B,) bool -> mask (B, T), position_ids (B, T). It is the form
    that guidance uses when sampling.
    """
    real = attention_mask.bool()
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    bos = real & (position_ids == 0)
    return torch.where(drop[:, None], bos, real), position_ids


def generation_loss(
    model: JanusFlow,
    head: AlignmentHead,
    latents: Tensor,
    pixels: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    t: Tensor,
    noise: Tensor,
    drop: Tensor,
    tap: int = 6,
) -> GenerationLoss:
    """Flow and alignment losses of images with prompts.

    latents, noise (B, C, h, w): the clean image in the flow's scale, and normal noise; pixels (B, 3, S, S): the
    same image as SigLIP wants it; input_ids, attention_mask (B, T): left-padded prompts without the generation
    tag; t (B,) in [0, 1]; drop (B,) bool: prompts to hide (the paper: 10 %); tap: after which block the states
    are aligned, counted from 1 (the paper: 6).
    """
    z, target = interpolate(latents, noise, t)
    mask, positions = prompt_mask(attention_mask, drop)
    count = 1 + model.num_image_tokens
    offsets = torch.arange(1, count + 1, device=z.device)
    x, t_emb, skip = model.encode_latents(z.to(model.dtype), t * TIME_SCALE)
    last, hidden = model.llm(
        torch.cat([model.llm.embed_tokens(input_ids), t_emb[:, None], x], dim=1),
        torch.cat([positions, positions[:, -1:] + offsets], dim=1),
        torch.cat([mask, mask.new_ones(len(mask), count)], dim=1),
        hidden_layer=tap,
    )
    v = model.decode_velocity(last[:, 1 - count :], skip, t_emb)
    hidden = hidden[:, 1 - count :]
    with torch.no_grad():
        features = model.siglip(pixels)  # (B, N, P); stopped: only the LLM's states move towards it
    alignment = -F.cosine_similarity(head(hidden).float(), features.float(), dim=-1).mean(1)
    return GenerationLoss(flow_loss(v, target), alignment)


def understanding_loss(
    model: JanusFlow,
    input_ids: Tensor,
    labels: Tensor,
    images_seq_mask: Tensor | None = None,
    pixels: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the tokens that carry a label, as a scalar.

    input_ids, labels (B, T), labels `IGNORE` outside the responses; pixels (images, 3, S, S) in the order of
    their places in images_seq_mask (B, T), or None for text alone. With padding on the right no attention_mask
    is needed.
    """
    embeds = model.llm.embed_tokens(input_ids)
    if pixels is not None:
        embeds = merge_image_embeds(embeds, model.embed_images(pixels), images_seq_mask)
    hidden = model.llm(embeds, attention_mask=attention_mask)
    logits = model.logits(hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
