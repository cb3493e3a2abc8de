# SPDX-License-Identifier: MIT
"""Train the default model that ships in the package, from nothing, with one command on one GPU.

    python scripts/train_shapes.py --work runs/tiny                 # all stages, about 20 minutes on an H100
    python scripts/train_shapes.py --work runs/tiny --smoke         # the same path in miniature, minutes on a CPU
    janusflow-min bench shapes generate --model runs/tiny/tiny --out outputs/new    # then judge it

Stages, each skipped when its result lies in --work already: `tokenizer` (a byte-level BPE over the world's
sentences), `data` (scenes, captions, conversations, as integers), `vae`, `latents`, `model` (resumes from its
newest checkpoint, optimizer included), `export` (the official layout, bfloat16).

The objective is the trainer's own, `JanusFlowLoss`, the paper's: flow matching with logit-normal time and 10 %
prompt dropping, cross-entropy on answers, alignment to SigLIP's features. Everything, SigLIP too, starts from
random weights; the paper starts from pre-trained ones.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from janusflow_min.checkpoint import load_model, save_model
from janusflow_min.config import JanusFlowConfig, LlamaConfig, SiglipConfig, UViTConfig
from janusflow_min.files import atomic_directory, atomic_file
from janusflow_min.flow import sample_time
from janusflow_min.model import JanusFlow
from janusflow_min.processor import SYSTEM_PROMPT, Processor
from janusflow_min.shapes import captions, scenes
from janusflow_min.training.config import ObjectiveConfig
from janusflow_min.training.losses import IGNORE, AlignmentHead, JanusFlowLoss, MixedBatch
from janusflow_min.training.sample import conversation_example
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
    # model
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 6
    siglip_width: int = 128
    siglip_layers: int = 4
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

    def config(self, vocab_size: int) -> JanusFlowConfig:
        width, channels = self.hidden_size, self.uvit_channels
        return JanusFlowConfig(
            llm=LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.layers,
                num_attention_heads=width // 64,
                max_position_embeddings=1024,
            ),
            siglip=SiglipConfig(
                image_size=scenes.SIZE,
                patch_size=16,
                width=self.siglip_width,
                layers=self.siglip_layers,
                heads=self.siglip_width // 32,
            ),
            uvit_encoder=UViTConfig(4, channels, channels, hidden_size=width),
            uvit_decoder=UViTConfig(channels, 4, channels, hidden_size=width),
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
    """A byte-level BPE that knows the world's words whole, and the small files of the official layout."""
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
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = SPECIAL[:2]
    small = {
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": bos, "eos_token": eos, "pad_token": SPECIAL[2]},
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": scenes.SIZE,
            "min_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1 / 255,
            "do_normalize": True,
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "num_image_tokens": (scenes.SIZE // 16) ** 2,
            "sft_format": "deepseek",
            "add_special_token": False,
            "mask_prompt": True,
            "ignore_id": IGNORE,
            "image_tag": SPECIAL[3],
        },
    }
    for name, content in small.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def train_model(
    recipe: Recipe,
    work: Path,
    device: torch.device,
    compiled: bool,
    graph: bool,
    init: Path | None,
    finish_at: float | None,
) -> None:
    """Train until the schedule's time is used up; a checkpoint every minute and at the end, resumed from."""
    vae = load_frozen_vae(work / "vae", device)
    generation = load_arrays(work / "generation.npz", device)
    conversation = load_arrays(work / "conversation.npz", device)
    latents = encode_all(vae, generation["packed"])
    config = recipe.config(vocab_size(work / "tokenizer"))
    model = init_weights(JanusFlow(config), torch.Generator().manual_seed(recipe.seed)).to(device)
    torch.manual_seed(recipe.seed)
    head = AlignmentHead(config.llm.hidden_size, config.siglip.width).to(device)
    modules = torch.nn.ModuleList([model, head])
    names, params = zip(*modules.named_parameters(), strict=True)
    average = [p.detach().clone() for p in params]
    # Learning rate and the average's weight as tensors, because a captured graph reads them at every step.
    rate, blend = torch.zeros((), device=device), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        params, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=device.type == "cuda"
    )
    pad = Processor.from_folder(work / "tokenizer", config.llm.vocab_size).tokenizer.pad_id
    image_ids = torch.tensor(image_token_ids(work / "tokenizer"), device=device)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    step, elapsed = 0, 0.0
    checkpoint = work / "training.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["lr"] = rate
        average = [p.to(device) for p in saved["average"]]
        generator.set_state(saved["generator"].cpu())
        step, elapsed = saved["step"], saved["elapsed"]
    elif init is not None:
        model.load_state_dict(load_model(init, device, torch.float32, progress=False).state_dict())
        average = [p.detach().clone() for p in params]

    settings = ObjectiveConfig(
        alignment_layer=recipe.alignment_layer,
        alignment_weight=recipe.alignment_weight,
        answer_weight=recipe.answer_weight,
    )
    objective = JanusFlowLoss(model, head, settings)
    count = model.num_image_tokens

    def losses(packed, z, ids, t, noise, drop, packed_und, ids_und, labels_und):
        pairs = objective(generation_batch(ids, pad, drop, count, t, noise, z, scenes.render(packed)))
        places = (ids_und[..., None] == image_ids).any(-1)
        talks = objective(conversation_batch(ids_und, labels_und, places, scenes.render(packed_und)))
        answers = talks.terms["answers"]
        return (
            pairs.total / len(ids) + talks.total,
            pairs.terms["flow"].values,
            pairs.terms["alignment"].values,
            (answers.values * answers.weights).sum(),
        )

    if compiled:
        losses = torch.compile(losses)

    def draw_batch():
        # All on the device: a copy from the host would wait for the whole queue of kernels.
        def below(n: int, count: int) -> Tensor:
            return torch.randint(n, (count,), generator=generator, device=device)

        rows, which = below(len(latents), recipe.batch), below(recipe.captions_per_scene, recipe.batch)
        talks = below(len(conversation["ids"]), recipe.conversation_batch)
        z = latents[rows].float()
        return (
            generation["packed"][rows],
            z,
            generation["ids"][rows, which].long(),
            sample_time(recipe.batch, recipe.logit_mean, recipe.logit_std, generator, device),
            torch.randn(z.shape, generator=generator, device=device),
            torch.rand(recipe.batch, generator=generator, device=device) < recipe.prompt_dropout,
            conversation["packed"][talks],
            conversation["ids"][talks].long(),
            conversation["labels"][talks].long(),
        )

    skipped = torch.zeros((), device=device)

    def train_step() -> tuple[Tensor, ...]:
        batch = draw_batch()
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False),
            sdpa_kernel(ATTENTION),
        ):
            loss, flow, alignment, answers = losses(*batch)
        loss.backward()
        norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
        norm = norms.norm()
        torch.nn.utils.clip_grads_with_norm_(params, 1.0, norm)
        bad = (~torch.isfinite(norm)).float()
        skipped.add_(bad)
        optimizer.found_inf = bad  # makes the fused optimizer skip the step
        optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub(params, average)
            torch._foreach_mul_(change, blend)
            torch._foreach_add_(average, change)
        return flow.detach(), alignment.detach(), answers.detach(), batch[3], norms

    def set_rates() -> None:
        rate.fill_(learning_rate(recipe, step, elapsed))
        blend.fill_(1 - min(recipe.ema_decay, (1 + step) / (10 + step)))

    replay = None
    if graph:  # the whole step as one CUDA graph: launching its kernels one by one takes longer than they run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                set_rates()
                optimizer.zero_grad(set_to_none=True)
                train_step()
                step += 1
        torch.cuda.synchronize()
        optimizer.zero_grad(set_to_none=True)
        captured = torch.cuda.CUDAGraph()
        captured.register_generator_state(generator)
        with torch.cuda.graph(captured):
            result = train_step()
        replay = captured.replay

    def save():
        state = {
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "generator": generator.get_state(),
            "step": step,
            "elapsed": elapsed,
        }
        with atomic_file(checkpoint) as temporary:
            torch.save(state, temporary)

    if finish_at is not None:
        recipe = replace(recipe, seconds=max(1.0, finish_at - time.monotonic()))
    log = open(work / "training.jsonl", "a")  # noqa: SIM115
    bar = tqdm(total=round(recipe.seconds), initial=round(elapsed), desc="Model", unit="s")
    last, saved_at = time.monotonic(), elapsed
    while elapsed < recipe.seconds:
        set_rates()
        if replay is not None:
            replay()
        else:
            optimizer.zero_grad(set_to_none=True)
            result = train_step()
        step += 1
        if step % recipe.log_every == 0:
            flow, alignment, answers, t, norms = result
            row = {
                "step": step,
                "seconds": round(elapsed, 1),
                "flow": flow.mean().item(),  # waits for the GPU
                "alignment": alignment.mean().item(),
                "answers": answers.item(),
                "norm": norms.norm().item(),
                "bad": [names[i] for i in (~torch.isfinite(norms)).nonzero()[:3, 0].tolist()],
                "skipped": int(skipped),
                "lr": rate.item(),
            }
            for low in (0.0, 0.25, 0.5, 0.75):
                here = (t >= low) & (t < low + 0.25)
                row[f"flow_{low:.2f}"] = (flow * here).sum().item() / max(1, int(here.sum()))
            print(json.dumps(row), file=log, flush=True)
            elapsed += time.monotonic() - last
            bar.set_postfix(flow=f"{row['flow']:.4f}", answers=f"{row['answers']:.3f}", step=step)
            bar.update(round(elapsed) - bar.n)
            if elapsed - saved_at > 60:
                save()
                export(recipe, work, model, params, average)
                saved_at = elapsed
            last = time.monotonic()
    save()
    export(recipe, work, model, params, average)


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


def conversation_batch(ids: Tensor, labels: Tensor, places: Tensor, pixels: Tensor) -> MixedBatch:
    """Conversations (B, T) whose labels weigh the same, together 1; those of weight 0 keep the shape fixed."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    before = (positions + ids.shape[1] * torch.arange(len(ids), device=ids.device)[:, None])[:, :-1]
    wanted = labels[:, 1:] != IGNORE
    return MixedBatch(
        input_ids=ids,
        position_ids=positions,
        label_index=before.flatten(),
        labels=labels[:, 1:].clamp(min=0).flatten(),
        label_weight=(wanted / wanted.sum()).flatten(),
        und_pixels=pixels,
        und_places=places,
    )


def image_token_ids(folder: Path) -> list[int]:
    """Ids whose embeddings an image replaces: begin-of-image and the image's own."""
    tokenizer = Processor.from_folder(folder, vocab_size(folder)).tokenizer
    return [tokenizer.image_start_id, tokenizer.image_id]


@torch.no_grad()
def export(recipe: Recipe, work: Path, model: JanusFlow, params: list, average: list) -> None:
    """The averaged weights in the official layout, bfloat16, with tokenizer and VAE: `work/tiny`."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        names[id(p)]: a.to("cpu", torch.bfloat16)
        for p, a in zip(params, average, strict=True)
        if id(p) in names
    }
    clean = JanusFlow(model.config).to(torch.bfloat16)
    clean.load_state_dict(state, strict=True)
    with atomic_directory(work / "tiny", overwrite=True) as folder:
        save_model(clean, folder)
        for path in (work / "tokenizer").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "vae").mkdir()
        for path in (work / "vae").iterdir():
            (folder / "vae" / path.name).write_bytes(path.read_bytes())
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="folder for every stage's result"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=Recipe.seconds, help="training time of the model")
    parser.add_argument("--stop-after", choices=("tokenizer", "data", "vae"), help="end after this stage")
    parser.add_argument(
        "--only-vae", action="store_true", help="the VAE alone (beside a run that makes the data)"
    )
    parser.add_argument(
        "--init", type=Path, help="checkpoint folder to start the model from, instead of random weights"
    )
    parser.add_argument("--finish-within", type=float, help="seconds from now; overrides --seconds")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=flag, default=None, help="torch.compile; default: on a GPU")
    parser.add_argument("--graph", action=flag, default=None, help="one CUDA graph a step; default: on a GPU")
    parser.add_argument("--scenes", type=int, help="scenes to draw in all, instead of the recipe's")
    parser.add_argument("--smoke", action="store_true", help="a miniature of everything, to see that it runs")
    args, began = parser.parse_args(), time.monotonic()
    recipe = replace(Recipe(), seconds=args.seconds)
    if args.smoke:
        recipe = replace(recipe, **SMOKE)
    if args.scenes is not None:
        recipe = replace(recipe, generation_scenes=args.scenes, conversations=args.scenes)
    work, device = args.work, torch.device(args.device)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if not (work / "vae").is_dir() and (args.only_vae or args.stop_after not in ("tokenizer", "data")):
        train_vae(recipe, work / "vae", device)
    if args.only_vae:
        return
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work / "tokenizer")
    if args.stop_after == "tokenizer":
        return
    for kind, count in (("generation", recipe.generation_scenes), ("conversation", recipe.conversations)):
        if not (work / f"{kind}.npz").is_file():
            make_data(recipe, work / "tokenizer", work / f"{kind}.npz", kind, count)
    if args.stop_after in ("data", "vae"):
        return
    compiled, graph = (device.type == "cuda" if f is None else f for f in (args.compile, args.graph))
    finish_at = None if args.finish_within is None else began + args.finish_within
    train_model(recipe, work, device, compiled, graph, args.init, finish_at)


if __name__ == "__main__":
    main()
