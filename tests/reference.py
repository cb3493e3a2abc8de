# SPDX-License-Identifier: MIT
"""The public reference as a witness: built for any configuration, filled from our files, stage by stage.

A helper for `test_reference_live.py` and `scripts/compare_reference.py`, not a test. It needs a checkout of
github deepseek-ai/Janus, commit 1daa72f, and what that imports: transformers 4.46, timm, attrdict,
torchvision, einops, diffusers. Nothing of the reference is copied here: its modules are imported and called.
Two things in it are fixed to one size and are replaced for others: its SigLIP presets and its aligners.

Legend: B batch, T tokens, N image tokens, M images per row, P patches, W SigLIP width, D hidden size, V
vocabulary, C h w latent, n steps.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn

SIGLIP_SIZES = ("width", "layers", "heads", "patch_size", "mlp_ratio")


def import_reference(root: str | Path) -> SimpleNamespace:
    """The reference's modules `modeling`, `siglip` and `processing` from the checkout at `root`."""
    root = Path(root).expanduser().resolve()
    if not (root / "janus" / "janusflow" / "models" / "modeling_vlm.py").is_file():
        raise FileNotFoundError(f"{root} is no checkout of deepseek-ai/Janus")
    # Where jax and tensorflow are installed, transformers would import them.
    os.environ.setdefault("USE_FLAX", "0")
    os.environ.setdefault("USE_TF", "0")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    with contextlib.redirect_stdout(io.StringIO()):  # it announces that it patches `collections` for attrdict
        importlib.import_module("janus")
        models = importlib.import_module("janus.janusflow.models")
    return SimpleNamespace(
        modeling=importlib.import_module(f"{models.__name__}.modeling_vlm"),
        siglip=importlib.import_module(f"{models.__name__}.siglip_vit"),
        processing=importlib.import_module(f"{models.__name__}.processing_vlm"),
    )


def build(config: Mapping[str, Any], root: str | Path) -> nn.Module:
    """Its `MultiModalityCausalLM` for the content of a `config.json`: fp32, on the CPU, not initialised.

    Explicit sizes in `vision_und_enc_config.params` make, or override, the preset that `model_name` names.
    The aligners follow the configuration; at the official size they are what the reference hard-codes.
    """
    from transformers.modeling_utils import no_init_weights

    reference = import_reference(root)
    params = config["vision_und_enc_config"]["params"]
    table, name = reference.siglip.SigLIP_MODEL_CONFIG, params["model_name"]
    explicit = {key: params[key] for key in SIGLIP_SIZES if key in params}
    preset = {"image_size": params["image_size"], "global_pool": "map"} | table.get(name, {}) | explicit
    with mock.patch.dict(table, {name: preset}), no_init_weights():
        model = reference.modeling.MultiModalityCausalLM(reference.modeling.MultiModalityConfig(**config))
    width, llm = preset["width"], model.config.language_config
    channels = config["vision_gen_enc_config"]["params"]["block_out_channels"][-1]
    decoder_in = config["vision_gen_dec_config"]["params"]["in_channels"]
    norm = type(model.vision_gen_dec_aligner_norm)
    model.vision_und_enc_aligner = nn.Linear(width, llm.hidden_size)
    model.beg_of_und_embed = nn.Parameter(torch.zeros(1, llm.hidden_size))
    model.vision_gen_enc_aligner = nn.Linear(channels, llm.hidden_size)
    model.vision_gen_dec_aligner_norm = norm(llm.hidden_size, eps=llm.rms_norm_eps)
    model.vision_gen_dec_aligner = nn.Linear(llm.hidden_size, decoder_in)
    return model.eval().requires_grad_(False)


def load(
    folder: str | Path,
    root: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    exact_frequencies: bool = False,
) -> nn.Module:
    """The reference with the weights of a checkpoint folder, loaded strictly under its own names.

    As published: built in fp32, then `.to(dtype)`, which rounds the rotary inverse frequencies, a buffer, to
    bfloat16 as well. `exact_frequencies` puts the fp32 ones back.
    """
    folder = Path(folder)
    model = build(json.loads((folder / "config.json").read_text(encoding="utf-8")), root)
    state = {name: tensor.to(dtype) for name, tensor in read_weights(folder, device)}
    model.load_state_dict(state, strict=True, assign=True)
    rotary = model.language_model.model.rotary_emb
    frequencies = rotary.inv_freq
    model = model.to(device, dtype)
    if exact_frequencies:
        rotary.inv_freq = frequencies.to(device)
    return model.eval().requires_grad_(False)


def read_weights(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `model.safetensors`, or of all the shards, under its official name."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, framework="pt", device=str(device)) as f:
            for key in f.keys():  # noqa: SIM118 (no mapping)
                yield key, f.get_tensor(key)


# Understanding ----------------------------------------------------------------------------------------------


@torch.no_grad()
def understand(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The stages of the understanding path for a left-padded batch, of its processor or of ours.

    siglip (images that are there, P, W), inputs_embeds and hidden (B, T, D), logits (B, T, V) fp32. Positions
    are those that `generate` would give: counted from a row's first real token.
    """
    device, dtype = model.beg_of_und_embed.device, model.beg_of_und_embed.dtype
    pixels = batch.pixel_values.to(device, dtype)
    emb_mask = batch.images_emb_mask.to(device)
    mask = batch.attention_mask.to(device)
    embeds = model.prepare_inputs_embeds(
        input_ids=batch.input_ids.to(device, copy=True),  # it writes into its argument
        pixel_values=pixels,
        images_seq_mask=batch.images_seq_mask.to(device),
        images_emb_mask=emb_mask,
    )
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    language = model.language_model
    hidden = language.model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return {
        "siglip": model.vision_und_enc_model(pixels[emb_mask[..., 0]]),
        "inputs_embeds": embeds,
        "hidden": hidden,
        "logits": language.lm_head(hidden).float(),
    }


@torch.no_grad()
def answer(
    model: nn.Module,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    eos_id: int,
    bos_id: int = 0,
    **sampling: Any,
) -> list[list[int]]:
    """Token ids of each row's continuation by its `generate`, cut behind the first EOS. Greedy, unless
    `sampling` (temperature, top_p) is given; then it draws from torch's global generator."""
    output = model.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask.to(inputs_embeds.device),
        pad_token_id=eos_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        use_cache=True,
        **sampling,
    )
    rows = output.tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


# Generation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def paint(
    model: nn.Module, prompt_ids: Sequence[int], noise: Tensor, weight: float, steps: int, pad_id: int
) -> dict[str, Tensor]:
    """What the sampling loop of `demo/app_janusflow.py` computes, for any number and size of images.

    prompt_ids end in the generation tag, noise (B, C, h, w) is cast to the model's dtype, in which every
    operation of a step is rounded. Returns the velocities of the first step, v_cond and v_uncond (B, C, h,
    w), and z after every step (n, B, C, h, w).
    """
    device, dtype = model.beg_of_und_embed.device, model.beg_of_und_embed.dtype
    count, _, height, width = noise.shape
    tokens = (height // 2) * (width // 2)
    length = len(prompt_ids) - 1  # t_emb takes the generation tag's place
    ids = torch.tensor(prompt_ids[:-1], device=device).repeat(2 * count, 1)
    ids[count:, 1:] = pad_id  # the unconditional rows: BOS, then padding that nobody sees
    mask = torch.ones(2 * count, length + 1 + tokens, dtype=torch.int, device=device)
    mask[count:, 1:length] = 0
    prompt = model.language_model.get_input_embeddings()(ids)

    z = noise.to(device, dtype)
    step = torch.zeros_like(z) + 1.0 / steps
    first, after = None, []
    for i in range(steps):
        t = torch.full((2 * count,), i / steps * 1000.0, dtype=torch.float32, device=device).to(dtype)
        features, t_emb, skip = model.vision_gen_enc_model(torch.cat([z, z]), t)
        images = model.vision_gen_enc_aligner(features.flatten(2).transpose(1, 2))
        embeds = torch.cat([prompt, t_emb[:, None], images], dim=1)
        hidden = model.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
        hidden = model.vision_gen_dec_aligner(model.vision_gen_dec_aligner_norm(hidden[:, -tokens:]))
        hidden = hidden.transpose(1, 2).unflatten(2, (height // 2, width // 2))
        v_cond, v_uncond = model.vision_gen_dec_model(hidden, skip, t_emb).chunk(2)
        first = (v_cond, v_uncond) if first is None else first
        v = weight * v_cond - (weight - 1.0) * v_uncond
        z = z + step * v
        after.append(z)
    return {"v_cond": first[0], "v_uncond": first[1], "z": torch.stack(after)}


# Processor --------------------------------------------------------------------------------------------------


def load_processor(folder: str | Path, root: str | Path) -> Any:
    """Its `VLChatProcessor` from the tokenizer and processor files of a checkpoint folder."""
    processing = import_reference(root).processing
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the tags that it adds
        return processing.VLChatProcessor.from_pretrained(str(folder))


def batch(processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """Its left-padded batch of conversations, whose images are RGB PIL images under "images"."""
    rows = []
    for messages in conversations:
        images = [image for message in messages for image in message.get("images", ())]
        rows.append(processor.process_one(conversations=messages, images=images))
    return processor.batchify(rows)


def generation_prompt(processor: Any, prompt: str) -> tuple[list[int], str]:
    """Token ids of a generation prompt, the generation tag last, and the prompt string without it."""
    messages = [{"role": "User", "content": prompt}, {"role": "Assistant", "content": ""}]
    text = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=messages, sft_format=processor.sft_format, system_prompt=""
    )
    return processor.tokenizer.encode(text + processor.image_gen_tag), text
