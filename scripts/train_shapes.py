# SPDX-License-Identifier: MIT
"""Train the default model that ships in the package, or one of things too, from nothing, with one command on one GPU.

    python scripts/train_shapes.py --work runs/tiny                 # all stages, about 20 minutes on an H100
    python scripts/train_shapes.py --work runs/tiny --smoke         # the same path in miniature, minutes on a CPU
    janusflow-min bench shapes generate --model runs/tiny/tiny --out outputs/new    # then judge it
    python scripts/train_shapes.py --work runs/things --recipe things    # things and shapes, after things_atlas.py

Stages, each skipped when its result lies in --work already: `tokenizer` (a byte-level BPE over the worlds'
sentences), `data` (scenes, captions, conversations, as integers; drawn while the VAE trains), `vae`, `latents`, `model`
(resumes from its newest checkpoint, optimizer included), `export` (the official layout, bfloat16).

Each step is the trainer's own, `TrainStep`, with the paper's objective: flow matching with logit-normal time and
10 % prompt dropping, cross-entropy on answers, alignment to SigLIP's features. Everything, SigLIP too, starts
from random weights; the paper starts from pre-trained ones.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from shapes_data import (
    RECIPES,
    SMOKE,
    Recipe,
    conversation_batch,
    flat_images,
    generation_batch,
    load_arrays,
    make_data,
    make_tokenizer,
    sample,
    shares,
    vocab_size,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from janusflow_min.checkpoint import load_model, read_config, save_model
from janusflow_min.config import JanusFlowConfig
from janusflow_min.devices import pick_dtype
from janusflow_min.files import atomic_directory, atomic_file
from janusflow_min.flow import sample_time
from janusflow_min.hub import TINY
from janusflow_min.model import JanusFlow
from janusflow_min.processor import Processor
from janusflow_min.shapes import scenes
from janusflow_min.training.losses import MixedBatch
from janusflow_min.training.metrics import means
from janusflow_min.training.optimizer import Schedule
from janusflow_min.training.step import TrainStep
from janusflow_min.vae import VAE
from janusflow_min.worlds import World, open_world

# Not cuDNN's kernel, which torch would choose on Hopper: with it every gradient was NaN after 1,900 steps of one run;
# without it none was in the 20,000 that made the default.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# VAE -----------------------------------------------------------------------


def vae_batch(recipe: Recipe, drawn: Sequence[tuple[World, Tensor]], device: torch.device) -> Tensor:
    """Images: scenes of the worlds by their shares, and of no world as many as `vae_flat` says."""
    flat = round(recipe.vae_batch * recipe.vae_flat)
    sizes = shares(recipe, recipe.vae_batch - flat)
    parts = [
        world.render(packed[torch.randint(len(packed), (sizes[world.name],), device=device)])
        for world, packed in drawn
    ]
    return torch.cat([*parts, flat_images(flat, device)] if flat else parts)


def vae_loss(vae, x: Tensor, kl: float) -> tuple[Tensor, Tensor]:
    """L1 + 3·MSE + kl·KL of images (B, 3, S, S), and the MSE."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        y = vae.decoder(vae.post_quant_conv(z))
    error = y.float() - x
    mse = error.square().mean()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return error.abs().mean() + 3 * mse + kl * divergence, mse.detach()


def train_vae(
    recipe: Recipe, worlds: Sequence[World], folder: Path, device: torch.device, compiled: bool
) -> None:
    """diffusers' AutoencoderKL on rendered scenes. Ends with the latents' scale and what it loses measured."""
    from diffusers import AutoencoderKL

    torch.manual_seed(recipe.seed)
    stages = len(recipe.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.vae_latent_channels,
        norm_num_groups=16,
        sample_size=scenes.SIZE,
    ).to(device, memory_format=torch.channels_last)
    count = min(40_000, recipe.generation_scenes)
    drawn = [
        (world, world.pack(sample(recipe, world, random.Random(f"vae {recipe.seed}"), count)[1]).to(device))
        for world in worlds
    ]
    draw, loss_of = vae_batch, vae_loss
    if compiled:
        draw, loss_of = (torch.compile(f, dynamic=False) for f in (vae_batch, vae_loss))
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    log = open(folder.parent / "vae.jsonl", "w")  # noqa: SIM115
    start, step, elapsed = time.monotonic(), 0, 0.0
    bar = tqdm(total=round(recipe.vae_seconds), desc="VAE", unit="s")
    while elapsed < recipe.vae_seconds:
        for group in optimizer.param_groups:  # warm-up over steps, then a cosine over the time
            cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, elapsed / recipe.vae_seconds))
            group["lr"] = recipe.vae_lr * min(1.0, (step + 1) / 100) * cosine
        x = draw(recipe, drawn, device).to(memory_format=torch.channels_last)
        loss, mse = loss_of(vae, x, recipe.vae_kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 1 and compiled:
            start = time.monotonic()  # compiling does not count
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
        first = [(world, part) for world, packed in drawn for part in packed[:2000].split(100)]
        z = torch.cat([vae.encode(world.render(part)).latent_dist.mean for world, part in first])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    with atomic_directory(folder, overwrite=True) as temporary:
        vae.to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(temporary)


def load_frozen_vae(folder: Path, device: torch.device) -> VAE:
    from diffusers import AutoencoderKL

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    return VAE(vae.to(device, memory_format=torch.channels_last))


@torch.no_grad()
def measure_vae(worlds: Sequence[World], folder: Path, device: torch.device, count: int) -> dict[str, float]:
    """PSNR in dB, for a range of 2, on held-out scenes of each world and on flat images; kept in vae.json."""
    vae, rng = load_frozen_vae(folder, device), random.Random("measure vae")
    images = {"flat": flat_images(count, device)}
    for world in worlds:
        drawn = [world.sample_scene(rng, scenes.FAMILIES[i % 6], "held_out") for i in range(count)]
        images[world.name] = world.render(world.pack(drawn).to(device))
    found = {}
    for name, x in images.items():
        y = torch.cat([vae.decode(vae.encode(part)).float() for part in x.split(100)])
        found[name] = 10 * math.log10(4 / (y - x).square().mean().item())
    (folder.parent / "vae.json").write_text(json.dumps(found) + "\n")
    return found


@torch.no_grad()
def encode_all(vae: VAE, world: World, packed: Tensor, batch: int = 1024) -> Tensor:
    parts = tqdm(packed.split(batch), desc=f"Latents, {world.name}")
    return torch.cat([vae.encode(world.render(p)).to(torch.bfloat16) for p in parts])


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


def model_config(recipe: Recipe, vocab_size: int) -> JanusFlowConfig:
    """The shipped model's, with the recipe's sizes; attention heads of 64 in the LLM, of 16 or more in SigLIP."""
    shipped, hidden, channels = read_config(TINY), recipe.hidden_size, recipe.uvit_channels
    latent = recipe.vae_latent_channels
    llm = replace(
        shipped.llm,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    widths = dict(channels=channels, hidden_size=hidden)
    return replace(
        shipped,
        llm=llm,
        siglip=replace(shipped.siglip, width=recipe.siglip_width),
        uvit_encoder=replace(shipped.uvit_encoder, in_channels=latent, out_channels=channels, **widths),
        uvit_decoder=replace(shipped.uvit_decoder, in_channels=channels, out_channels=latent, **widths),
    )


class ModelTraining:
    """The trainer's own step (`TrainStep`) over data that lie on the device, by a schedule in time instead of steps."""

    def __init__(
        self,
        recipe: Recipe,
        worlds: Sequence[World],
        work: Path,
        device: torch.device,
        compiled: bool,
        init: Path | None,
    ):
        """Continues from `work`/training.pt where there is one, else starts from `init` or from random weights."""
        self.recipe, self.work, self.checkpoint = recipe, work, work / "training.pt"
        vae, self.data = load_frozen_vae(work / "vae", device), []
        for world in worlds:
            generation, conversation = (
                load_arrays(work / f"{kind}-{world.name}.npz", device)
                for kind in ("generation", "conversation")
            )
            generation["latents"] = encode_all(vae, world, generation["packed"])
            self.data.append((world, generation, conversation))
        size = vocab_size(work / "tokenizer")
        tokenizer = Processor.from_folder(work / "tokenizer", size).tokenizer
        self.pad = tokenizer.pad_id
        # Ids whose embeddings an image replaces.
        self.image_ids = torch.tensor([tokenizer.image_start_id, tokenizer.image_id], device=device)
        model = JanusFlow(model_config(recipe, size))
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

    def draw(self) -> tuple[Any, ...]:
        """A step's data, drawn on the device: a copy from the host would wait for the whole queue of kernels."""
        recipe, device, generator = self.recipe, self.device, self.generator

        def below(n: int, count: int) -> Tensor:
            return torch.randint(n, (count,), generator=generator, device=device)

        shown, asked = [], []
        for world, generation, conversation in self.data:
            count, talks = (shares(recipe, n)[world.name] for n in (recipe.batch, recipe.conversation_batch))
            rows = below(len(generation["latents"]), count)
            which = below(recipe.captions_per_scene, count)
            scenes_, latents_, ids_ = (generation[key] for key in ("packed", "latents", "ids"))
            shown.append((scenes_[rows], latents_[rows].float(), ids_[rows, which].long()))
            chosen = below(len(conversation["ids"]), talks)
            asked.append(tuple(conversation[key][chosen] for key in ("packed", "ids", "labels")))
        packed, latents, ids = zip(*shown, strict=True)
        packed_und, ids_und, labels = zip(*asked, strict=True)
        latents, ids = torch.cat(latents), torch.cat(ids)
        return (
            packed,
            latents,
            ids,
            sample_time(len(ids), recipe.logit_mean, recipe.logit_std, generator, device),
            torch.randn(latents.shape, generator=generator, device=device),
            torch.rand(len(ids), generator=generator, device=device) < recipe.prompt_dropout,
            packed_und,
            torch.cat(ids_und).long(),
            torch.cat(labels).long(),
        )

    def render(self, packed: Sequence[Tensor]) -> Tensor:
        return torch.cat([data[0].render(part) for data, part in zip(self.data, packed, strict=True)])

    def batches(self, packed, latents, ids, t, noise, drop, packed_und, ids_und, labels) -> list[MixedBatch]:
        """The two micro-batches of a step; conversations together weigh as much as all images."""
        count = self.model.num_image_tokens
        places = (ids_und[..., None] == self.image_ids).any(-1)
        return [
            generation_batch(ids, self.pad, drop, count, t, noise, latents, self.render(packed)),
            conversation_batch(ids_und, labels, places, self.render(packed_und), len(ids)),
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


def draw_data(recipe: Recipe, work: Path, atlas: Path | None) -> None:
    """The scenes of every world, with captions and with conversations, where they are not there yet."""
    for kind, total in (("generation", recipe.generation_scenes), ("conversation", recipe.conversations)):
        for name, count in shares(recipe, total).items():
            path = work / f"{kind}-{name}.npz"
            if not path.is_file():
                make_data(recipe, work / "tokenizer", path, name, kind, count, atlas)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tiny"), help="folder for every stage's result")
    add("--recipe", choices=list(RECIPES), default="shapes", help="things: of both worlds in one model")
    add("--atlas", type=Path, help="of things, where it is not in its default place")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, help="training time of the model, instead of the recipe's")
    add("--vae-seconds", type=float, help="and of the VAE")
    add("--init", type=Path, help="checkpoint folder to start the model from, instead of random weights")
    add("--until", choices=("vae", "model"), default="model", help="the last stage to run")
    flag = argparse.BooleanOptionalAction
    add("--compile", action=flag, default=None, help="torch.compile; default: on a GPU")
    add("--graph", action=flag, default=None, help="one CUDA graph a step; default: on a GPU")
    add("--smoke", action="store_true", help="a miniature of everything, to see that it runs")
    args = parser.parse_args()
    recipe = replace(RECIPES[args.recipe], **(SMOKE if args.smoke else {}))
    given = {"seconds": args.seconds, "vae_seconds": args.vae_seconds}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    work, device = args.work, torch.device(args.device)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    compiled, graph = (device.type == "cuda" if f is None else f for f in (args.compile, args.graph))
    worlds = [open_world(name, args.atlas, device) for name, _ in recipe.worlds]
    if not (work / "tokenizer").is_dir():
        corpus = [text for world in worlds for text in world.corpus()]
        make_tokenizer(work / "tokenizer", recipe.vocabulary, corpus)
    with ThreadPoolExecutor(1) as beside:  # the processes that draw scenes leave the GPU to the VAE
        data = beside.submit(draw_data, recipe, work, args.atlas)
        if not (work / "vae").is_dir():
            train_vae(recipe, worlds, work / "vae", device, compiled and recipe.vae_compile)
            print(json.dumps(measure_vae(worlds, work / "vae", device, 20 if args.smoke else 500)))
        data.result()
    if args.until == "model":
        ModelTraining(recipe, worlds, work, device, compiled, args.init).run(graph)


if __name__ == "__main__":
    main()
