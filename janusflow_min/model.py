# SPDX-License-Identifier: MIT
"""JanusFlow: one Llama that answers questions about images and generates images. Start reading here.

Understanding: image -> SigLIP -> aligner -> Llama -> next-token logits.
Generation: latents -> UViT encoder -> aligner -> Llama -> norm, aligner -> UViT decoder -> velocity of the flow.

Follows the reference's `modeling_vlm.py` and the sampling loop of `demo/app_janusflow.py`; paper section 3.2.

Legend: B batch, T text tokens, N image tokens, D the LLM's hidden size, C h w latent, S image side in pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import JanusFlowConfig
from .llama import KVCache, Llama, RMSNorm, mask_positions
from .siglip import Siglip
from .uvit import ShallowUViTDecoder, ShallowUViTEncoder

Parts = Literal["all", "generation", "understanding"]
PARTS: tuple[Parts, ...] = ("all", "generation", "understanding")


class JanusFlow(nn.Module):
    """The model. With `parts` other than "all" only what that task needs is built; the rest is None."""

    def __init__(self, config: JanusFlowConfig, parts: Parts = "all"):
        super().__init__()
        if parts not in PARTS:
            raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
        self.config, self.parts = config, parts
        self.extra_tensors: dict[str, Tensor] = {}  # official names: never used, saved again
        width = config.llm.hidden_size
        self.llm = Llama(config.llm, lm_head=parts != "generation")
        if parts != "generation":
            self.siglip = Siglip(config.siglip)
            self.und_aligner = nn.Linear(config.siglip.width, width)
            self.und_begin = nn.Parameter(torch.zeros(1, width))
        else:
            self.siglip = self.und_aligner = self.und_begin = None  # type: ignore[assignment]
        if parts != "understanding":
            self.uvit_encoder = ShallowUViTEncoder(config.uvit_encoder)
            self.gen_in_aligner = nn.Linear(config.uvit_encoder.channels, width)
            self.gen_out_norm = RMSNorm(width, config.llm.rms_norm_eps)
            self.gen_out_aligner = nn.Linear(width, config.uvit_decoder.in_channels)
            self.uvit_decoder = ShallowUViTDecoder(config.uvit_decoder)
        else:
            self.uvit_encoder = self.gen_in_aligner = None  # type: ignore[assignment]
            self.gen_out_norm = self.gen_out_aligner = self.uvit_decoder = None  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.embed_tokens.weight.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a generated image: one image token per patch of the understanding encoder's grid."""
        siglip = self.config.siglip
        side = siglip.image_size // siglip.patch_size * self.config.latent_stride
        return self.config.latent_channels, side, side

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of a generated image, t_emb not counted."""
        _, height, width = self.latent_shape
        return height * width // self.config.latent_stride**2

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config.llm, batch, capacity, self.device, self.dtype)

    # Understanding -----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        images_seq_mask: Tensor,
        images_emb_mask: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Next-token logits (B, T, vocabulary), fp32, of the processor's batch; `velocity` is its counterpart for
        generation. attention_mask (B, T), the rest as in `prepare_inputs_embeds`."""
        embeds = self.prepare_inputs_embeds(input_ids, pixel_values, images_seq_mask, images_emb_mask)
        return self.logits(self.llm(embeds, mask_positions(attention_mask), attention_mask))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> what the LLM sees of each: the begin embedding, then N features
        (B, 1 + N, D)."""
        features = self.und_aligner(self.siglip(pixels))
        return torch.cat([self.und_begin.expand(len(pixels), 1, -1), features], dim=1)

    def prepare_inputs_embeds(
        self, input_ids: Tensor, pixel_values: Tensor, images_seq_mask: Tensor, images_emb_mask: Tensor
    ) -> Tensor:
        """The LLM's input for a batch of the processor: text embeddings, with image embeddings in their places.

        input_ids (B, T), pixel_values (B, M, 3, S, S) for at most M images a row, images_seq_mask (B, T) true at
        begin-of-image and image tokens, images_emb_mask (B, M, 1 + N) true for the images there are -> (B, T, D).
        """
        embeds = self.llm.embed_tokens(input_ids)
        present = images_emb_mask[..., 0]  # (B, M)
        if not present.any():
            return embeds
        images = self.embed_images(pixel_values[present].to(embeds.dtype))  # (images, 1 + N, D), in order
        return merge_image_embeds(embeds, images, images_seq_mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> next-token logits (..., vocabulary), fp32."""
        return self.llm.lm_head(hidden).float()

    # Generation -----------------------------------------------------------------------

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        text_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One evaluation of the velocity field.

        latents (B, C, h, w), timestep (B,) in [0, 1000]. The prompt comes either as `text_embeds` (R, T, D), put
        in front, or as a `cache` that already holds it. R rows of prompt may be a multiple of B: the latents then
        serve each B rows in turn (conditional rows, then unconditional ones), and are encoded only once.
        position_ids (R, T' + 1 + N) and attention_mask (R, T + 1 + N) as `Llama.forward` wants them, T' = T with
        text_embeds and 0 with a cache. Returns the velocity (R, C, h, w).
        """
        latents = latents.to(self.dtype)
        x, t_emb, skip = self.encode_latents(latents, timestep)
        tokens = torch.cat([t_emb[:, None], x], dim=1)  # (B, 1 + N, D)
        rows = len(latents) if text_embeds is None else len(text_embeds)
        if cache is not None:
            rows = cache.keys.shape[1]
        if (copies := rows // len(latents)) > 1:
            tokens, t_emb = tokens.repeat(copies, 1, 1), t_emb.repeat(copies, 1)
            skip = skip.repeat(copies, 1, 1, 1)
        if text_embeds is not None:
            tokens = torch.cat([text_embeds, tokens], dim=1)
        hidden = self.llm(tokens, position_ids, attention_mask, cache)
        return self.decode_velocity(hidden[:, -x.shape[1] :], skip, t_emb)

    def encode_latents(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w), timestep (B,) -> image tokens (B, N, D), t_emb (B, D), skip (B, C', h/2, w/2)."""
        skip, t_emb = self.uvit_encoder(latents, timestep)
        return self.gen_in_aligner(rearrange(skip, "b c h w -> b (h w) c")), t_emb, skip

    def decode_velocity(self, hidden: Tensor, skip: Tensor, t_emb: Tensor) -> Tensor:
        """The LLM's states at the image tokens (B, N, D), skip, t_emb -> velocity (B, C, h, w)."""
        x = self.gen_out_aligner(self.gen_out_norm(hidden))
        x = rearrange(x, "b (h w) c -> b c h w", h=skip.shape[2])
        return self.uvit_decoder(x, skip, t_emb)


def merge_image_embeds(embeds: Tensor, images: Tensor, images_seq_mask: Tensor) -> Tensor:
    """Put image embeddings (images, 1 + N, D), in order, where the mask (B, T) of embeds (B, T, D) is true.

    A gather: `masked_scatter` says the same, but its backward pass makes the GPU wait for the host.
    """
    index = images_seq_mask.flatten().cumsum(0).sub(1).clamp(min=0)
    chosen = images.to(embeds.dtype).flatten(0, 1).index_select(0, index).view_as(embeds)
    return torch.where(images_seq_mask[..., None], chosen, embeds)
