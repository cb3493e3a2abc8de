# SPDX-License-Identifier: MIT
"""How fast a training step is at the official size, and how much memory it takes: random weights, generation batches.

    python scripts/benchmark_training.py                              # one GPU: ours, full and LoRA (needs torchao)
    python scripts/benchmark_training.py --janus-root Janus           # the reference's plain loop in the same run
    torchrun --nproc-per-node 2 scripts/benchmark_training.py         # FSDP2 against one GPU: speed, equal losses
    python scripts/benchmark_training.py --size small                 # a smoke test, on the CPU too

A step is, on each GPU, 8 rows (--rows) of 32 prompt tokens, t_emb and the image's tokens, none of them hidden, with
fp32 master weights, bf16 compute, AdamW and clipping. Model FLOPs: 6 per parameter of the LLM's blocks and token, and
causal attention (6 · layers · hidden · length per token); the rest of the model is not counted. They are set against
the card's own rate for 8192 x 8192 matrices in bf16, measured first. Ours runs through `training.step.TrainStep`, as
the trainer does.
The reference (its needs: see `scripts/compare_reference.py`) gets the plain loop that its users write: autocast,
fused AdamW, no clipping; its loss is the flow's alone, so ours is also measured without alignment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import helper, release, tiny_config
from torch import Tensor

from janusflow_min.config import JanusFlowConfig
from janusflow_min.flow import flow_loss, interpolate
from janusflow_min.model import JanusFlow
from janusflow_min.training.config import Config, LoraConfig, ObjectiveConfig, OptimizerConfig, SourceConfig
from janusflow_min.training.losses import MixedBatch
from janusflow_min.training.step import TrainStep

PROMPT = 32
LEAST = dict(states="8bit", recompute=True)
HOME = dict(lora=16, cached=True, **LEAST)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--size", choices=("official", "small"), default="official")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--janus-root", type=Path, help="checkout of deepseek-ai/Janus, to measure it too")
    parser.add_argument("--only", help="measure the rows whose name holds this")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row, after --warmup")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of a step, on each GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    bench = Benchmark(args)
    report = bench.two() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else bench.one()
    if report and args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, args.rows
        self.sizes = JanusFlowConfig() if args.size == "official" else tiny_config(layers=7)
        self.device = torch.device(args.device)
        if self.device.type == "cuda" and "LOCAL_RANK" in os.environ:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.dtype = getattr(torch, args.dtype)
        with torch.device("meta"):
            model = JanusFlow(self.sizes)
        self.latent_shape, self.image_tokens = model.latent_shape, model.num_image_tokens
        self.length = PROMPT + 1 + self.image_tokens
        llm = self.sizes.llm
        per_token = 6 * sum(p.numel() for p in model.llm.layers.parameters())
        self.flops = per_token + 6 * llm.num_hidden_layers * llm.hidden_size * self.length
        side = 8192 if self.device.type == "cuda" else 512
        self.peak = self.matrix_rate(side)
        self.about = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "size": args.size,
            "dtype": args.dtype,
            "tokens_per_step_and_gpu": self.rows * self.length,
            "flops_per_token": self.flops,
            "matrix_tflops": self.peak / 1e12,
        }
        self.say(f"{json.dumps(self.about)}")

    # One GPU -----------------------------------------------------------------------

    def one(self) -> dict:
        compiled = self.args.compile
        jobs = {
            "ours, eager": lambda: self.ours(False, 0.0, 0.0),
            "ours, compiled": lambda: self.ours(True, 0.0, 0.0),
            "ours, compiled, with alignment and average": lambda: self.ours(True, 1.0, 0.99),
            "ours, gradient checkpointing, 8-bit states": lambda: self.ours(compiled, 0.0, 0.0, **LEAST),
            "ours, LoRA and gradient checkpointing": lambda: self.ours(compiled, 0.0, 0.0, lora=16),
            "ours, LoRA, 8-bit, SigLIP's features cached": lambda: self.ours(compiled, 1.0, 0.0, **HOME),
        }
        if self.args.janus_root is not None:
            jobs["reference, autocast"] = lambda: self.reference(False)
            jobs["reference, autocast, its LLM compiled"] = lambda: self.reference(True)
        rows = {}
        self.say(f"\n{'':<45}{'ms/step':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}{'loss':>9}")
        for name, job in jobs.items():
            if (self.args.only or "") not in name or (not compiled and ", compiled" in name):
                continue
            rows[name] = row = self.measured(job())
            self.say(
                f"{name:<45}{row['ms']:>9.1f}{row['tokens_per_s']:>10,.0f}{row['tflops']:>9.1f}"
                f"{row['of_peak']:>9.1%}{row['peak_gib']:>7.1f}{row['loss']:>9.4f}"
            )
            release()
        return {**self.about, "rows": rows}

    def ours(self, compiled: bool, alignment: float, average: float, cached: bool = False, **options: Any):
        """A function that makes step i, and returns its loss on the device. cached: SigLIP is frozen and its features
        are there, so that it need not be."""
        train_step = self.train_step(compiled, alignment, average, freeze=cached, **options)
        batches = [self.batch(i) for i in range(4)]
        if cached:
            model = train_step.loss.model
            with torch.no_grad():
                features = [model.siglip(batch.pixels.to(self.dtype)) for batch in batches]
            batches = [replace(b, pixels=None, features=f) for b, f in zip(batches, features, strict=True)]
            model.siglip.cpu()

        def step(i: int) -> Tensor:
            return loss_of(train_step.step(i, [batches[i % 4]]))

        return step

    def train_step(
        self,
        compiled: bool,
        alignment: float,
        average: float,
        lora: int = 0,
        rows: int | None = None,
        parallel: str = "none",
        world: int = 1,
        states: Any = "fp32",
        recompute: bool = False,
        freeze: bool = False,
    ) -> TrainStep:
        config = Config(
            data=(SourceConfig("generation", manifest="none"),),
            batch=rows or self.rows,
            compile=compiled,
            gradient_checkpointing=lora > 0 or recompute,
            objective=ObjectiveConfig(alignment_weight=alignment),
            optimizer=OptimizerConfig(
                ema_decay=average, warmup=0, states=states, lr_by_component={"siglip": 0.0} if freeze else {}
            ),
            lora=LoraConfig(rank=lora),
        )
        return TrainStep(config, self.model(), self.device, self.dtype, parallel, world)

    def model(self) -> JanusFlow:
        """torch's own initialisation, on the device; the same on every rank."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return JanusFlow(self.sizes)

    def batch(self, seed: int, rows: int | None = None) -> MixedBatch:
        """Rows of random prompts and image latents; row r of a global batch depends on `seed` and r alone."""
        rows = rows or self.rows
        vocabulary, side = self.sizes.llm.vocab_size, self.sizes.siglip.image_size
        ids = torch.zeros(rows, self.length, dtype=torch.int64)
        places = torch.zeros(rows, self.length, dtype=torch.bool)
        places[:, PROMPT:] = True
        drawn = []
        for r in range(rows):
            g = torch.Generator().manual_seed(1000 * seed + r)
            ids[r, :PROMPT] = torch.randint(vocabulary, (PROMPT,), generator=g)
            t = torch.sigmoid(torch.randn(1, generator=g))
            latents, noise = (torch.randn(self.latent_shape, generator=g) for _ in range(2))
            drawn.append((t, noise, latents, torch.rand(3, side, side, generator=g) * 2 - 1))
        t, noise, latents, pixels = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        index = torch.arange(self.length - self.image_tokens, self.length)
        index = (index + self.length * torch.arange(rows)[:, None]).flatten()
        positions = torch.arange(self.length).expand(rows, -1).contiguous()
        fields = dict(
            gen_places=places, gen_index=index, t=t[:, 0], noise=noise, latents=latents, pixels=pixels
        )
        return MixedBatch(ids, positions, **fields).to(self.device)

    def reference(self, compiled: bool):
        """The published model in a plain loop: fp32 weights, autocast, fused AdamW."""
        torch.manual_seed(0)
        model = helper().build(self.sizes.to_dict(), self.args.janus_root).to(self.device)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1.0)
        model.train().requires_grad_(True)
        llm = model.language_model.model
        if compiled:
            llm = torch.compile(llm)
        adamw = torch.optim.AdamW(model.parameters(), 2e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        batches = [self.batch(i) for i in range(4)]
        grid = self.latent_shape[1] // 2

        def step(i: int) -> Tensor:
            batch = batches[i % 4]
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                z, target = interpolate(batch.latents, batch.noise, batch.t)
                features, t_emb, skip = model.vision_gen_enc_model(z, batch.t * 1000)
                image = model.vision_gen_enc_aligner(features.flatten(2).transpose(1, 2))
                text = model.language_model.get_input_embeddings()(batch.input_ids[:, :PROMPT])
                embeds = torch.cat([text.to(image.dtype), t_emb[:, None].to(image.dtype), image], dim=1)
                hidden = llm(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -self.image_tokens :]
                hidden = model.vision_gen_dec_aligner(model.vision_gen_dec_aligner_norm(hidden))
                hidden = hidden.transpose(1, 2).unflatten(2, (grid, grid))
                loss = flow_loss(model.vision_gen_dec_model(hidden, skip, t_emb), target).mean()
            loss.backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    # Several GPUs -----------------------------------------------------------------------

    def two(self) -> dict | None:
        """FSDP2 on all ranks, then the same global batches on rank 0 alone, in micro-batches."""
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
        compiled, total = self.args.compile, self.rows * world
        train_step = self.train_step(compiled, 0.0, 0.0, rows=total, parallel="fsdp", world=world)
        whole = [self.batch(i, total) for i in range(4)]
        mine = [part(batch, range(rank, total, world), self.length) for batch in whole]

        def sharded(i: int) -> Tensor:
            return loss_of(train_step.step(i, [mine[i % 4]]))

        together = self.measured(sharded, self.rows * world)
        del train_step, sharded
        release()
        report = None
        if rank == 0:
            alone = self.measured(self.ours(compiled, 0.0, 0.0))
            release()
            train_step = self.train_step(compiled, 0.0, 0.0, rows=total)
            halves = [[part(b, range(r, total, world), self.length) for r in range(world)] for b in whole]
            count = len(together["losses"])
            losses = [float(loss_of(train_step.step(i, halves[i % 4]))) for i in range(count)]
            apart = [abs(a - b) / abs(b) for a, b in zip(together["losses"], losses, strict=True)]
            speedup = together["tokens_per_s"] / alone["tokens_per_s"]
            report = {**self.about, "gpus": world, "fsdp": together, "one": alone, "one_losses": losses}
            report |= {"speedup": speedup, "largest_relative_difference": max(apart)}
            self.say(f"one GPU   {alone['tokens_per_s']:>10,.0f} tokens/s, {alone['peak_gib']:.1f} GiB")
            self.say(
                f"{world} GPUs    {together['tokens_per_s']:>10,.0f} tokens/s, {together['peak_gib']:.1f} GiB each"
            )
            self.say(
                f"speed-up {speedup:.2f}; losses of {len(losses)} steps differ by {max(apart):.1e} at most"
            )
            for i in (0, len(losses) // 2, len(losses) - 1):
                self.say(f"  step {i}: {together['losses'][i]:.5f} sharded, {losses[i]:.5f} alone")
        dist.barrier()
        dist.destroy_process_group()
        return report

    # Measuring -----------------------------------------------------------------------

    def measured(self, step, rows: int | None = None) -> dict:
        """Median time of a step after warm-up; memory and losses over all of them."""
        rows, cuda = rows or self.rows, self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        losses, marks = [], []
        for i in range(self.args.warmup + self.args.steps + 1):
            if i >= self.args.warmup:
                marks.append(self.mark())
            if i < self.args.warmup + self.args.steps:
                losses.append(step(i))
        times = self.seconds(marks)
        seconds, tokens = statistics.median(times), rows * self.length
        rate = tokens / seconds * self.flops / (rows / self.rows)  # of one GPU
        return {
            "ms": 1e3 * seconds,
            "slowest_ms": 1e3 * max(times),
            "tokens_per_s": tokens / seconds,
            "tflops": rate / 1e12,
            "of_peak": rate / self.peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "loss": float(losses[-1]),
            "losses": torch.stack(losses).tolist(),
        }

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list) -> list[float]:
        """Between each mark and the next."""
        if self.device.type != "cuda":
            return [b - a for a, b in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def matrix_rate(self, side: int) -> float:
        """FLOP/s of a square matrix product in the compute dtype: the best of three medians."""
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        best = float("inf")
        for _ in range(3):
            marks = []
            for _ in range(11):
                marks.append(self.mark())
                a @ b
            marks.append(self.mark())
            best = min(best, statistics.median(self.seconds(marks[1:])))
        return 2 * side**3 / best

    def say(self, text: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(text, flush=True)


def loss_of(result: tuple[dict[str, Tensor], bool]) -> Tensor:
    """The mean loss, still on the device."""
    total, count = result[0]["loss"]
    return total / count


def part(batch: MixedBatch, rows: range, length: int) -> MixedBatch:
    """Some rows of a batch whose rows are all alike in form."""
    rows = list(rows)
    names = ("input_ids", "position_ids", "gen_places", "t", "noise", "latents", "pixels")
    count = len(batch.gen_index) // len(batch.t)
    return replace(
        batch, gen_index=batch.gen_index[: count * len(rows)], **{n: getattr(batch, n)[rows] for n in names}
    )


if __name__ == "__main__":
    main()
