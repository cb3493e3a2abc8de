# SPDX-License-Identifier: MIT
"""The default model's recipe and its data, for `train_shapes.py`: the tokenizer, scenes with captions and with
conversations as arrays of integers, and batches of them whose shapes are fixed. Not run itself."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from janusflow_min.files import atomic_directory, atomic_file
from janusflow_min.hub import TINY
from janusflow_min.processor import SYSTEM_PROMPT, Processor
from janusflow_min.shapes import captions, scenes
from janusflow_min.training.config import Config, ObjectiveConfig, OptimizerConfig, SourceConfig
from janusflow_min.training.losses import IGNORE, MixedBatch
from janusflow_min.training.sample import conversation_example


@dataclass(frozen=True)
class Recipe:
    """All that decides the result. The whole of it takes about 20 minutes of an H100."""

    seed: int = 0
    # data
    generation_scenes: int = 500_000
    captions_per_scene: int = 4
    conversations: int = 300_000
    turns: int = 4  # questions about each image
    prompt_length: int = 31  # tokens, padded on the right
    conversation_length: int = 192  # tokens, padded on the right
    families: tuple[tuple[str, int], ...] = (
        ("single_object", 10),
        ("two_object", 18),
        ("counting", 24),
        ("colors", 6),
        ("position", 14),
        ("color_attr", 22),
        ("mixed", 10),
    )
    # VAE
    vae_channels: tuple[int, ...] = (32, 48, 64, 64)
    vae_seconds: float = 150.0
    vae_batch: int = 96
    vae_lr: float = 1.5e-3
    # model: of the sizes of the one that ships
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


SMOKE = dict(
    generation_scenes=100,
    conversations=50,
    vae_seconds=10.0,
    vae_batch=8,
    batch=8,
    conversation_batch=2,
    seconds=30.0,
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


# Tokenizer -----------------------------------------------------------------------


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE that knows the world's words whole, beside the shipped model's small files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        show_progress=False,
    )
    template = f"{SYSTEM_PROMPT}\n\nUser: .\n\nAssistant: .User: .\n\n"
    tokenizer.train_from_iterator([template] * 100 + captions.corpus(), trainer)
    with atomic_directory(folder) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name in SMALL_FILES:
            shutil.copyfile(TINY / name, temporary / name)


def vocab_size(folder: Path) -> int:
    """Rows of the embedding: the tokenizer's, rounded up to a multiple of 64."""
    return math.ceil(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() / 64) * 64


# Data -----------------------------------------------------------------------


def make_chunk(job: tuple[str, int, int, Recipe, Path]) -> dict[str, np.ndarray]:
    """One worker's share: `kind` "generation" or "conversation", `count` scenes of the given seed."""
    kind, seed, count, recipe, folder = job
    rng = random.Random(f"{kind} {seed} {recipe.seed}")
    processor = Processor.from_folder(folder, vocab_size(folder))
    pad = processor.tokenizer.pad_id
    names, weights = zip(*recipe.families, strict=True)
    families = rng.choices(names, weights, k=count)
    drawn = [scenes.sample_scene(rng, family) for family in families]
    packed = scenes.pack(drawn).numpy().astype(np.float32)
    if kind == "generation":
        ids = np.full((count, recipe.captions_per_scene, recipe.prompt_length), pad, np.int16)
        for i, (scene, family) in enumerate(zip(drawn, families, strict=True)):
            for j in range(recipe.captions_per_scene):
                tokens = processor.generation_prompt(captions.caption(scene, family, rng))[0][:-1]
                ids[i, j, : len(tokens)] = tokens  # raises where prompt_length is too short
        return {"packed": packed, "ids": ids}
    ids = np.full((count, recipe.conversation_length), pad, np.int16)
    labels = np.full_like(ids, IGNORE)
    for i, scene in enumerate(drawn):
        messages = []
        for qa in captions.sample_questions(scene, rng, recipe.turns):
            tag = "" if messages else SPECIAL[3] + "\n"
            messages += [
                {"role": "User", "content": tag + qa.question},
                {"role": "Assistant", "content": qa.answer},
            ]
        tokens, targets = conversation_example(processor, messages)
        ids[i, : len(tokens)], labels[i, : len(tokens)] = tokens, targets
    return {"packed": packed, "ids": ids, "labels": labels}


def make_data(recipe: Recipe, folder: Path, path: Path, kind: str, count: int) -> None:
    size = min(5000, count)
    jobs = [(kind, i, min(size, count - i * size), recipe, folder) for i in range(math.ceil(count / size))]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        chunks = list(tqdm(pool.imap(make_chunk, jobs), total=len(jobs), desc=f"Data, {kind}"))
    arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
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
