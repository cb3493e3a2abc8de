# SPDX-License-Identifier: MIT
"""Train the default model that ships in the package, from nothing, with one command on one GPU.

    python scripts/train_shapes.py --work runs/tiny                 # all stages, about 20 minutes on an H100
    python scripts/train_shapes.py --work runs/tiny --smoke         # the same path in miniature, minutes on a CPU
    janusflow-min bench shapes generate --model runs/tiny/tiny --out outputs/new    # then judge it

Stages, each skipped when its result lies in --work already: `tokenizer` (a byte-level BPE over the world's
sentences), `data` (scenes, captions, conversations, as integers), `vae`, `latents`, `model` (resumes from its
newest checkpoint, optimizer included), `export` (the official layout, bfloat16).

Each step is the trainer's own, `TrainStep`, with the paper's objective: flow matching with logit-normal time and
10 % prompt dropping, cross-entropy on answers, alignment to SigLIP's features. Everything, SigLIP too, starts
from random weights; the paper starts from pre-trained ones.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from janusflow_min.checkpoint import load_model, read_config, save_model
from janusflow_min.files import atomic_directory, atomic_file
from janusflow_min.flow import sample_time
from janusflow_min.hub import TINY
from janusflow_min.loading import pick_dtype
from janusflow_min.model import JanusFlow
from janusflow_min.processor import SYSTEM_PROMPT, Processor
from janusflow_min.shapes import captions, scenes
from janusflow_min.training.config import Config, ObjectiveConfig, OptimizerConfig, SourceConfig
from janusflow_min.training.losses import IGNORE, MixedBatch
from janusflow_min.training.metrics import means
from janusflow_min.training.optimizer import Schedule
from janusflow_min.training.sample import conversation_example
from janusflow_min.training.step import TrainStep
from janusflow_min.vae import VAE


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
# Not cuDNN's kernel, which torch would choose on Hopper: with it every gradient was NaN after 1,900 steps of one run;
# without it none was in the 20,000 that made the default.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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


# VAE -----------------------------------------------------------------------


def train_vae(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """diffusers' AutoencoderKL on rendered scenes: L1 + 3·MSE + 3e-4·KL. Ends with the latents' scale measured."""
    from diffusers import AutoencoderKL

    torch.manual_seed(recipe.seed)
    stages = len(recipe.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=scenes.SIZE,
    ).to(device, memory_format=torch.channels_last)
    rng = random.Random(f"vae {recipe.seed}")
    names, weights = zip(*recipe.families, strict=True)
    count = min(40_000, recipe.generation_scenes)
    drawn = [scenes.sample_scene(rng, family) for family in rng.choices(names, weights, k=count)]
    packed = scenes.pack(drawn).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    log = open(folder.parent / "vae.jsonl", "w")  # noqa: SIM115
    start, step, elapsed = time.monotonic(), 0, 0.0
    bar = tqdm(total=round(recipe.vae_seconds), desc="VAE", unit="s")
    while elapsed < recipe.vae_seconds:
        for group in optimizer.param_groups:  # warm-up over steps, then a cosine over the time
            cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, elapsed / recipe.vae_seconds))
            group["lr"] = recipe.vae_lr * min(1.0, (step + 1) / 100) * cosine
        x = scenes.render(packed[torch.randint(count, (recipe.vae_batch,), device=device)])
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        mse = error.square().mean()
        loss = error.abs().mean() + 3 * mse + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            psnr = 10 * math.log10(4 / mse.item())  # waits for the GPU
            elapsed = time.monotonic() - start
            print(
                json.dumps({"step": step, "seconds": elapsed, "loss": loss.item(), "psnr": psnr}),
                file=log,
                flush=True,
            )
            bar.set_postfix(step=step, psnr=f"{psnr:.1f}")
            bar.update(round(elapsed) - bar.n)
    log.close()
    with torch.no_grad():
        z = torch.cat([vae.encode(scenes.render(p)).latent_dist.mean for p in packed[:2000].split(100)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    with atomic_directory(folder, overwrite=True) as temporary:
        vae.to(torch.bfloat16).save_pretrained(temporary)


def load_frozen_vae(folder: Path, device: torch.device) -> VAE:
    from diffusers import AutoencoderKL

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    return VAE(vae.to(device, memory_format=torch.channels_last))


@torch.no_grad()
def encode_all(vae: VAE, packed: Tensor, batch: int = 1024) -> Tensor:
    parts = tqdm(packed.split(batch), desc="Latents")
    return torch.cat([vae.encode(scenes.render(p)).to(torch.bfloat16) for p in parts])


# Model -----------------------------------------------------------------------


def learning_rate(recipe: Recipe, step: int, elapsed: float) -> float:
    """Warm-up over steps, then constant, then linear to zero over the last share of the time."""
    left = max(0.0, 1.0 - elapsed / recipe.seconds)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup, left / recipe.decay)


@torch.no_grad()
def init_weights(model: JanusFlow, generator: torch.Generator | None = None, std: float = 0.02) -> JanusFlow:
    """Random weights to start training from: normal(0, std) matrices, unit norms, zero biases; residual outputs
    scaled down with depth as in GPT-2. `generator` is a CPU generator: the same seed gives the same weights."""
    layers = model.config.llm.num_hidden_layers
    for name, p in model.named_parameters():
        if name.endswith("bias") or "channelwise_norm" in name:
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1.0)
        else:
            small = p.ndim == 2 or "embed" in name or "unpatch_conv" in name
            scale = std if small else p[0].numel() ** -0.5  # other convolutions: 1/sqrt(fan-in)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale = std / (2 * layers) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


class ModelTraining:
    """The trainer's own step (`TrainStep`) over data that lie on the device, by a schedule in time instead of steps."""

    def __init__(self, recipe: Recipe, work: Path, device: torch.device, compiled: bool, init: Path | None):
        """Continues from `work`/training.pt where there is one, else starts from `init` or from random weights."""
        self.recipe, self.work, self.checkpoint = recipe, work, work / "training.pt"
        self.generation = load_arrays(work / "generation.npz", device)
        self.conversation = load_arrays(work / "conversation.npz", device)
        self.latents = encode_all(load_frozen_vae(work / "vae", device), self.generation["packed"])
        size = vocab_size(work / "tokenizer")
        tokenizer = Processor.from_folder(work / "tokenizer", size).tokenizer
        self.pad = tokenizer.pad_id
        # Ids whose embeddings an image replaces.
        self.image_ids = torch.tensor([tokenizer.image_start_id, tokenizer.image_id], device=device)
        shipped = read_config(TINY)
        model = JanusFlow(replace(shipped, llm=replace(shipped.llm, vocab_size=size)))
        if init is None:
            init_weights(model, torch.Generator().manual_seed(recipe.seed))
        else:
            model.load_state_dict(load_model(init, "cpu", torch.float32, progress=False).state_dict())
        self.model = model.to(device)
        dtype = pick_dtype("auto", device)
        self.train_step = TrainStep(recipe.settings(), self.model, device, dtype)
        self.optimizer, self.dtype, self.device = self.train_step.optimizer, dtype, device
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.schedule = Schedule(*torch.zeros(4, device=device))  # a captured graph reads it at every step
        self.skipped = torch.zeros((), device=device)
        self.step, self.elapsed = 0, 0.0
        if self.checkpoint.is_file():
            saved = torch.load(self.checkpoint, map_location=device, weights_only=True)
            for name, tensors in self.optimizer.state().items():
                for key, tensor in tensors.items():
                    tensor.copy_(saved["optimizer"][name][key])
            self.optimizer.load()
            self.generator.set_state(saved["generator"].cpu())
            self.step, self.elapsed = saved["step"], saved["elapsed"]
        if compiled:
            self.train_step.loss.compile(fullgraph=True, dynamic=False)
            self.batches = torch.compile(self.batches, fullgraph=True, dynamic=False)

    def draw(self) -> tuple[Tensor, ...]:
        """A step's data, drawn on the device: a copy from the host would wait for the whole queue of kernels."""
        recipe, device, generator = self.recipe, self.device, self.generator

        def below(n: int, count: int) -> Tensor:
            return torch.randint(n, (count,), generator=generator, device=device)

        rows = below(len(self.latents), recipe.batch)
        which = below(recipe.captions_per_scene, recipe.batch)
        talks = below(len(self.conversation["ids"]), recipe.conversation_batch)
        latents = self.latents[rows].float()
        return (
            self.generation["packed"][rows],
            latents,
            self.generation["ids"][rows, which].long(),
            sample_time(recipe.batch, recipe.logit_mean, recipe.logit_std, generator, device),
            torch.randn(latents.shape, generator=generator, device=device),
            torch.rand(recipe.batch, generator=generator, device=device) < recipe.prompt_dropout,
            self.conversation["packed"][talks],
            self.conversation["ids"][talks].long(),
            self.conversation["labels"][talks].long(),
        )

    def batches(self, packed, latents, ids, t, noise, drop, packed_und, ids_und, labels) -> list[MixedBatch]:
        """The two micro-batches of a step; conversations together weigh as much as all images."""
        count, pixels = self.model.num_image_tokens, scenes.render(packed)
        places = (ids_und[..., None] == self.image_ids).any(-1)
        return [
            generation_batch(ids, self.pad, drop, count, t, noise, latents, pixels),
            conversation_batch(ids_und, labels, places, scenes.render(packed_und), self.recipe.batch),
        ]

    def update(self) -> dict[str, Tensor]:
        """One step, all on the device. Returns its metrics, (sum, count) each."""
        with sdpa_kernel(ATTENTION):
            batches = self.batches(*self.draw())
            metrics, _ = self.train_step.step(self.step, batches, schedule=self.schedule)
        self.skipped.add_(~metrics["norm"][0].isfinite())
        return metrics

    def set_schedule(self) -> None:
        factor = learning_rate(self.recipe, self.step, self.elapsed) / self.recipe.lr
        numbers = self.optimizer.schedule(self.step)._replace(factor=factor)
        for tensor, number in zip(self.schedule, numbers, strict=True):
            tensor.fill_(number)

    def capture(self) -> Callable[[], dict[str, Tensor]]:
        """The whole step as one CUDA graph: launching its kernels one by one takes longer than they run. The first
        three steps are made one by one, on a stream of their own."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.set_schedule()
                self.update()
                self.step += 1
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            metrics = self.update()

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return metrics

        return replay

    def run(self, graph: bool) -> None:
        """Train until the schedule's time is used up; a checkpoint and an export every minute and at the end."""
        update, seconds = self.capture() if graph else self.update, self.recipe.seconds
        bar = tqdm(total=round(seconds), initial=round(self.elapsed), desc="Model", unit="s")
        last, saved_at = time.monotonic(), self.elapsed
        with (self.work / "training.jsonl").open("a") as log:
            while self.elapsed < seconds:
                self.set_schedule()
                metrics = update()
                self.step += 1
                if self.step % self.recipe.log_every:
                    continue
                row = self.numbers(metrics)
                print(json.dumps(row), file=log, flush=True)
                self.elapsed += time.monotonic() - last
                bar.set_postfix(flow=f"{row['flow']:.4f}", answers=f"{row['answers']:.3f}", step=self.step)
                bar.update(round(self.elapsed) - bar.n)
                if self.elapsed - saved_at > 60:
                    self.save()
                    saved_at = self.elapsed
                last = time.monotonic()
        self.save()

    def numbers(self, metrics: Mapping[str, Tensor]) -> dict[str, float | None]:
        """A line of the log; waits for the GPU."""
        found = means({name: pair.tolist() for name, pair in metrics.items()})
        common = {"step": self.step, "seconds": round(self.elapsed, 1), "skipped": int(self.skipped)}
        return {**common, "lr": self.recipe.lr * float(self.schedule.factor), **found}

    def save(self) -> None:
        """The checkpoint, and the averaged weights in the official layout, bfloat16, with tokenizer and VAE."""
        state = {"optimizer": self.optimizer.state(), "generator": self.generator.get_state()}
        with atomic_file(self.checkpoint) as temporary:
            torch.save(state | {"step": self.step, "elapsed": self.elapsed}, temporary)
        average = {
            name.removeprefix("model."): tensor.to("cpu", torch.bfloat16)
            for name, tensor in self.optimizer.average.items()
            if name.startswith("model.")
        }
        clean = JanusFlow(self.model.config).to(torch.bfloat16)
        clean.load_state_dict(average, strict=True)
        with atomic_directory(self.work / "tiny", overwrite=True) as folder:
            save_model(clean, folder)
            shutil.copytree(self.work / "tokenizer", folder, dirs_exist_ok=True)
            shutil.copytree(self.work / "vae", folder / "vae")
            (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny"), help="folder for every stage's result")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, help="training time of the model, instead of the recipe's")
    add("--init", type=Path, help="checkpoint folder to start the model from, instead of random weights")
    flag = argparse.BooleanOptionalAction
    add("--compile", action=flag, default=None, help="torch.compile; default: on a GPU")
    add("--graph", action=flag, default=None, help="one CUDA graph a step; default: on a GPU")
    add("--smoke", action="store_true", help="a miniature of everything, to see that it runs")
    args = parser.parse_args()
    recipe = replace(Recipe(), **(SMOKE if args.smoke else {}))
    recipe = replace(recipe, seconds=args.seconds or recipe.seconds)
    work, device = args.work, torch.device(args.device)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if not (work / "vae").is_dir():
        train_vae(recipe, work / "vae", device)
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work / "tokenizer")
    for kind, count in (("generation", recipe.generation_scenes), ("conversation", recipe.conversations)):
        if not (work / f"{kind}.npz").is_file():
            make_data(recipe, work / "tokenizer", work / f"{kind}.npz", kind, count)
    compiled, graph = (device.type == "cuda" if f is None else f for f in (args.compile, args.graph))
    ModelTraining(recipe, work, device, compiled, args.init).run(graph)


if __name__ == "__main__":
    main()
