# SPDX-License-Identifier: MIT
"""Recipes and their data, for `train_shapes.py`: worlds, the tokenizer, scenes with captions and with conversations as
arrays of integers, and batches of them whose shapes are fixed. Not run itself."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from janusflow_min.files import atomic_directory, atomic_file
from janusflow_min.hub import TINY
from janusflow_min.processor import SYSTEM_PROMPT, Processor
from janusflow_min.shapes import scenes
from janusflow_min.training.config import Config, ObjectiveConfig, OptimizerConfig, SourceConfig
from janusflow_min.training.losses import IGNORE, MixedBatch
from janusflow_min.training.sample import conversation_example
from janusflow_min.worlds import World, open_world


@dataclass(frozen=True)
class Recipe:
    """All that decides the result. As it stands here, it is the default's: about 20 minutes of an H100."""

    seed: int = 0
    worlds: tuple[tuple[str, float], ...] = (("shapes", 1.0),)  # and the share of each in scenes and batches
    vocabulary: int = 1024  # at most
    # data
    generation_scenes: int = 500_000
    captions_per_scene: int = 4
    conversations: int = 300_000
    turns: int = 4  # questions about each image
    prompt_length: int = 31  # tokens, padded on the right; as long as the longest where that is longer
    conversation_length: int = 192
    families: tuple[tuple[str, int], ...] = (
        ("single_object", 10),
        ("two_object", 18),
        ("counting", 24),
        ("colors", 6),
        ("position", 14),
        ("color_attr", 22),
        ("mixed", 10),
    )
    thing_families: tuple[tuple[str, int], ...] = (
        ("single_object", 24),
        ("two_object", 22),
        ("counting", 20),
        ("colors", 4),
        ("position", 18),
        ("color_attr", 4),
        ("mixed", 8),
    )
    # VAE
    vae_latent_channels: int = 4
    vae_kl: float = 3e-4
    vae_flat: float = 0.0  # share of images of no world: shapes of any colour, gradients, lines
    vae_channels: tuple[int, ...] = (32, 48, 64, 64)
    vae_seconds: float = 150.0
    vae_batch: int = 96
    vae_lr: float = 1.5e-3
    vae_compile: bool = False  # over a minute, and then twice as fast
    # model
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 6
    siglip_width: int = 128
    uvit_channels: int = 80
    batch: int = 256  # images with prompts a step
    conversation_batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 500
    seconds: float = 750.0  # of training; the schedule runs over this time
    decay: float = 0.5  # last share of the schedule, linear to zero
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    logit_mean: float = -0.4  # of the logit-normal; below 0 is towards noise, where layout is decided
    logit_std: float = 1.0
    answer_weight: float = 0.5
    alignment_weight: float = 0.5
    alignment_layer: int = 2  # of 6; the paper: 6 of 24
    log_every: int = 100  # steps

    def settings(self) -> Config:
        """Of the trainer."""
        return Config(
            data=(SourceConfig("generation", manifest="drawn by this script"),),
            seed=self.seed,
            batch=self.batch,
            objective=ObjectiveConfig(
                alignment_layer=self.alignment_layer,
                alignment_weight=self.alignment_weight,
                answer_weight=self.answer_weight,
            ),
            optimizer=OptimizerConfig(lr=self.lr, ema_decay=self.ema_decay),
        )


# Things and shapes in one model: about 24 minutes of an H100.
THINGS = replace(
    Recipe(),
    worlds=(("things", 0.8125), ("shapes", 0.1875)),
    vocabulary=1280,
    generation_scenes=400_000,
    conversations=200_000,
    prompt_length=34,
    conversation_length=184,
    turns=3,
    vae_channels=(48, 64, 80, 96),
    vae_latent_channels=8,
    vae_kl=1e-4,
    vae_flat=0.2,
    vae_seconds=300.0,
    vae_batch=80,
    vae_lr=1.2e-3,
    vae_compile=True,
    hidden_size=384,
    intermediate_size=512,
    layers=5,
    uvit_channels=96,
    batch=320,
    lr=1.3e-3,
    seconds=780.0,
)
RECIPES = {"shapes": Recipe(), "things": THINGS}
SMOKE = dict(
    generation_scenes=100,
    conversations=50,
    vae_channels=(16, 16, 32, 32),
    vae_seconds=5.0,
    vae_batch=8,
    batch=8,
    conversation_batch=2,
    seconds=20.0,
    warmup=20,
    log_every=2,
)
SMALL_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<image_placeholder>",
    "<｜begin▁of▁generation｜>",
    "<begin_of_image>",
    "<end_of_image>",
)


# Worlds -----------------------------------------------------------------------


def sample(recipe: Recipe, world: World, rng: random.Random, count: int) -> tuple[list[str], list[Any]]:
    """Families, drawn by their weights, and a training scene of each."""
    weighted = recipe.families if world.name == "shapes" else recipe.thing_families
    names, weights = zip(*weighted, strict=True)
    families = rng.choices(names, weights, k=count)
    return families, [world.sample_scene(rng, family) for family in families]


def shares(recipe: Recipe, count: int) -> dict[str, int]:
    """World -> its part of a count; at least one of each."""
    return {name: max(1, round(count * share)) for name, share in recipe.worlds}


def flat_images(count: int, device: torch.device) -> Tensor:
    """(B, 3, S, S) in [-1, 1]: shapes of any colour that may overlap, under a gradient or stripes, crossed by lines."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device)

    slots = torch.cat([uniform(4, 1).mul(len(scenes.SHAPES)).floor(), uniform(4, 2) * scenes.SIZE], 2)
    slots = torch.cat([slots, 6 + 40 * uniform(4, 1), 255 * uniform(4, 3)], 2)
    image = scenes.render(torch.cat([255 * uniform(3), slots.flatten(1)], 1))
    axis = torch.linspace(-1, 1, scenes.SIZE, device=device)
    angle, tilt = (2 * math.pi * uniform(1, 1, 1) for _ in range(2))
    along = angle.cos() * axis + angle.sin() * axis[:, None]  # (B, 1, S, S)
    wave = torch.where(uniform(1, 1, 1) < 0.5, along, (along * 30 * uniform(1, 1, 1)).sin())
    gradient = torch.lerp(2 * uniform(3, 1, 1) - 1, 2 * uniform(3, 1, 1) - 1, 0.5 + 0.5 * wave)
    image = torch.lerp(image, gradient, (2 * uniform(1, 1, 1) - 1).clamp(min=0))
    line = (tilt.cos() * axis + tilt.sin() * axis[:, None] - uniform(1, 1, 1) + 0.5).abs()
    cover = ((0.1 * uniform(1, 1, 1) - line) * scenes.SIZE / 2 + 0.5).clamp(0, 1) * (uniform(1, 1, 1) < 0.5)
    return torch.lerp(image, (2 * uniform(3, 1, 1) - 1).expand_as(image), cover.expand_as(image))


# Tokenizer -----------------------------------------------------------------------


def make_tokenizer(folder: Path, size: int, corpus: list[str]) -> None:
    """A byte-level BPE of at most `size` tokens that knows the worlds' words, beside the shipped model's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        show_progress=False,
    )
    template = f"{SYSTEM_PROMPT}\n\nUser: .\n\nAssistant: .User: .\n\n"
    tokenizer.train_from_iterator([template] * 100 + corpus, trainer)
    with atomic_directory(folder) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name in SMALL_FILES:
            shutil.copyfile(TINY / name, temporary / name)


def vocab_size(folder: Path) -> int:
    """Rows of the embedding: the tokenizer's, rounded up to a multiple of 64."""
    return math.ceil(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() / 64) * 64


# Data -----------------------------------------------------------------------

LONGEST = 512  # tokens; a sentence or conversation of more is an error


def make_chunk(job: tuple[str, str, int, int, Recipe, Path, Path | None]) -> dict[str, np.ndarray]:
    """One worker's share: a world, `kind` "generation" or "conversation", `count` scenes of the given seed."""
    name, kind, seed, count, recipe, folder, atlas = job
    world = open_world(name, atlas, device=None)
    rng = random.Random(f"{kind} {seed} {recipe.seed}")
    processor = Processor.from_folder(folder, vocab_size(folder))
    pad = processor.tokenizer.pad_id
    families, drawn = sample(recipe, world, rng, count)
    packed = world.pack(drawn).numpy().astype(np.float32)
    if kind == "generation":
        ids = np.full((count, recipe.captions_per_scene, LONGEST), pad, np.int16)
        for i, (scene, family) in enumerate(zip(drawn, families, strict=True)):
            for j in range(recipe.captions_per_scene):
                tokens = processor.generation_prompt(world.caption(scene, family, rng))[0][:-1]
                ids[i, j, : len(tokens)] = tokens
        longest = max(recipe.prompt_length, int((ids != pad).sum(-1).max()))
        return {"packed": packed, "ids": ids[..., :longest]}
    ids = np.full((count, LONGEST), pad, np.int16)
    labels = np.full_like(ids, IGNORE)
    for i, scene in enumerate(drawn):
        messages = []
        for qa in world.some_questions(scene, rng, recipe.turns):
            tag = "" if messages else SPECIAL[3] + "\n"
            messages += [
                {"role": "User", "content": tag + qa.question},
                {"role": "Assistant", "content": qa.answer},
            ]
        tokens, targets = conversation_example(processor, messages)
        ids[i, : len(tokens)], labels[i, : len(tokens)] = tokens, targets
    longest = max(recipe.conversation_length, int((ids != pad).sum(-1).max()))
    return {"packed": packed, "ids": ids[:, :longest], "labels": labels[:, :longest]}


def joined(parts: list[np.ndarray], fill: int) -> np.ndarray:
    """(n, ..., L) of several lengths L, one after the other, filled up on the right to the longest."""
    longest = max(part.shape[-1] for part in parts)
    missing = [[(0, 0)] * (part.ndim - 1) + [(0, longest - part.shape[-1])] for part in parts]
    return np.concatenate(
        [np.pad(part, widths, constant_values=fill) for part, widths in zip(parts, missing, strict=True)]
    )


def make_data(
    recipe: Recipe, folder: Path, path: Path, name: str, kind: str, count: int, atlas: Path | None
) -> None:
    size = min(5000, count)
    jobs = [
        (name, kind, i, min(size, count - i * size), recipe, folder, atlas)
        for i in range(math.ceil(count / size))
    ]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        chunks = list(tqdm(pool.imap(make_chunk, jobs), total=len(jobs), desc=f"Data, {name}, {kind}"))
    pad = Processor.from_folder(folder, vocab_size(folder)).tokenizer.pad_id
    arrays = {
        key: joined([chunk[key] for chunk in chunks], IGNORE if key == "labels" else pad) for key in chunks[0]
    }
    with atomic_file(path) as temporary:
        np.savez(temporary, **arrays)


def load_arrays(path: Path, device: torch.device) -> dict[str, Tensor]:
    with np.load(path) as data:
        return {key: torch.from_numpy(data[key]).to(device) for key in data}


# Batches -----------------------------------------------------------------------


def generation_batch(
    ids: Tensor, pad: int, drop: Tensor, count: int, t: Tensor, noise: Tensor, latents: Tensor, pixels: Tensor
) -> MixedBatch:
    """Prompts (B, P), padded on the right, with their images of `count` tokens; of those in drop (B,) only BOS is left.

    All shapes are fixed and nothing waits for the GPU, as a captured graph needs it.
    """
    rows, length = len(ids), ids.shape[1] + 1 + count
    real = (ids != pad).sum(1)
    start = torch.where(drop, 1, real)[:, None]  # of t_emb
    columns = torch.arange(length, device=ids.device)
    behind = columns >= start  # (B, T)
    first = start + 1 + length * torch.arange(rows, device=ids.device)[:, None]
    return MixedBatch(
        input_ids=torch.nn.functional.pad(ids, (0, 1 + count), value=pad),
        position_ids=columns + behind * (real[:, None] - start),
        gen_places=behind & (columns <= start + count),
        gen_index=(first + torch.arange(count, device=ids.device)).flatten(),
        t=t,
        noise=noise,
        latents=latents,
        pixels=pixels,
    )


def conversation_batch(
    ids: Tensor, labels: Tensor, places: Tensor, pixels: Tensor, weight: float
) -> MixedBatch:
    """Conversations (B, T) whose labels weigh the same, together `weight`; those of weight 0 keep the shape fixed."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    before = (positions + ids.shape[1] * torch.arange(len(ids), device=ids.device)[:, None])[:, :-1]
    wanted = labels[:, 1:] != IGNORE
    return MixedBatch(
        input_ids=ids,
        position_ids=positions,
        label_index=before.flatten(),
        labels=labels[:, 1:].clamp(min=0).flatten(),
        label_weight=(weight * wanted / wanted.sum()).flatten(),
        und_pixels=pixels,
        und_places=places,
    )
