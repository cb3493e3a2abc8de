# SPDX-License-Identifier: MIT
"""Our numbers beside the public reference's at the official size, with a control that must fail.

    python scripts/compare_reference.py --janus-root ../Janus --json parity.json   # one GPU
    python scripts/compare_reference.py --janus-root ../Janus --model FOLDER  # the real weights
    python scripts/compare_reference.py --janus-root ../Janus --tiny --device cpu  # seconds, to try it

Without --model it draws seeded random weights of the official architecture, every parameter away from
where training would start, and writes them in the official layout (bfloat16, 4.1 GB) into --work. The
reference, through its own classes (`tests/reference.py` says which checkout and packages), and ours then read
that folder, in fp32 and in bf16. The truth is the reference in fp32, TF32 off. Inputs: one generation prompt
of 32 tokens, guidance 2, and one question about one image. No tokenizer is needed: token ids are fixed random
numbers below the vocabulary, BOS, PAD and the image ids included, and the masks are what the processor would
make of such ids. Noise and pixels are rounded to bfloat16 before anything starts, so that both precisions
start from the same numbers.

The control is our own fp32 model with two plausible mistakes: rotary pairs of neighbours instead of halves,
and SigLIP's position table read by columns. The exit code is 1 if ours in fp32 is further than 1e-4 from the
truth anywhere, if ours in bf16 is further from it than 1.25 times the reference's own bf16, or if the control
passes.

The reference's bf16 is as published: `.to(bfloat16)` rounds the rotary inverse frequencies too, which we do
only with `upstream_rounding`. The last column but one has the reference's bf16 with its fp32 frequencies put back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from common import helper, log, release, save_random, tiny_config
from torch import Tensor, nn

from janusflow_min import llama
from janusflow_min.checkpoint import load_model
from janusflow_min.config import JanusFlowConfig
from janusflow_min.flow import Velocity
from janusflow_min.model import JanusFlow
from janusflow_min.sampling import PlainSampler, guided_velocity
from janusflow_min.solvers import euler, time_grid

PROMPT_TOKENS, QUESTION_TOKENS = 32, 48  # BOS included, image tokens not
FP32_LIMIT, BF16_RATIO, CONTROL_LIMIT = 1e-4, 1.25, 1e-2
STAGES = {
    "siglip": "SigLIP features",
    "inputs_embeds": "input embeddings",
    "hidden": "hidden states",
    "logits": "logits",
    "v_cond": "first velocity, conditional",
    "v_uncond": "first velocity, unconditional",
    "z": "latents after the last step, rounded as published",
    "z_default": "latents after the last step, sampler in fp32 (default)",
}
LAST = {"kl": "KL of the logits, nats", "top1": "best token agrees, %"}
COLUMNS = {  # title: (run, the run it is compared with)
    "ours fp32 : ref fp32": ("ours fp32", "ref fp32"),
    "ref bf16 : ref fp32": ("ref bf16", "ref fp32"),
    "ours bf16 : ref fp32": ("ours bf16", "ref fp32"),
    "ours bf16 with upstream_rounding : ref bf16": ("ours bf16 upstream", "ref bf16"),
    "ours bf16 : ref bf16 with fp32 frequencies": ("ours bf16", "ref bf16 exact"),
    "control: faulty ours fp32 : ref fp32": ("faulty fp32", "ref fp32"),
}
Run = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What every run reads; tensors on the device, values exact in bfloat16."""

    prompt: list[int]  # the generation tag last
    pad_id: int
    noise: Tensor  # (B, C, h, w)
    question: SimpleNamespace  # as `processor.Batch`, one row


def main() -> int:
    options = parse()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = helper()
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        if options.model is not None:
            folder = options.model
        else:
            folder = (options.work or Path(scratch)) / "random"
            folder.mkdir(parents=True, exist_ok=True)
            config = tiny_config() if options.tiny else JanusFlowConfig()
            save_random(config, folder, options.device, options.seed, options.janus_root)
            log(f"random weights written to {folder}")
        runs = evaluate(folder, reference, options)
    table = compare(runs, options.device)
    failures = judge(table)
    log("compared")

    print(markdown(table))
    print("\n" + ("\n".join(failures) or "All within the limits; the control fails."))
    if options.json is not None:
        report = {
            "weights": options.model.name if options.model else "tiny" if options.tiny else "random",
            "num_inference_steps": options.num_inference_steps,
            "parallel_size": options.parallel_size,
            "cfg_weight": options.cfg_weight,
            "seed": options.seed,
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
            "torch": torch.__version__,
            "transformers": sys.modules["transformers"].__version__,
            "limits": {"fp32": FP32_LIMIT, "bf16_ratio": BF16_RATIO, "control": CONTROL_LIMIT},
            "relative_l2": table,
            "failures": failures,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--janus-root", type=Path, required=True, help="checkout of deepseek-ai/Janus")
    parser.add_argument("--model", type=Path, help="folder with real weights; else random ones are drawn")
    parser.add_argument("--work", type=Path, help="keep the random checkpoint here; else a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--parallel-size", type=int, default=2, help="images of the prompt")
    parser.add_argument("--cfg-weight", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="random weights of a small architecture")
    options = parser.parse_args()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    return options


# Weights and inputs -----------------------------------------------------------------------


def make_inputs(config: JanusFlowConfig, options: argparse.Namespace) -> Inputs:
    """Fixed random ids, an image of soft blobs, noise: see the file's first lines."""
    generator = torch.Generator().manual_seed(options.seed)
    device, tokens = options.device, config.siglip.num_patches
    ids = torch.randperm(config.llm.vocab_size, generator=generator).tolist()
    bos, pad, begin, image, end, tag = (ids.pop() for _ in range(6))
    prompt = [bos, *ids[: PROMPT_TOKENS - 1], tag]
    text = ids[PROMPT_TOKENS : PROMPT_TOKENS + QUESTION_TOKENS - 1]
    half = len(text) // 2
    question = torch.tensor([[bos, *text[:half], begin, *[image] * tokens, end, *text[half:]]])
    blobs = torch.randn(1, 3, 6, 6, generator=generator)
    size = config.siglip.image_size
    pixels = F.interpolate(blobs, size=(size, size), mode="bicubic").tanh().bfloat16().float()
    with torch.device("meta"):
        latent_shape = JanusFlow(config).latent_shape
    noise = torch.randn((options.parallel_size, *latent_shape), generator=generator).bfloat16().float()
    return Inputs(
        prompt,
        pad,
        noise.to(device),
        SimpleNamespace(
            input_ids=question.to(device),
            attention_mask=torch.ones_like(question, device=device),
            pixel_values=pixels[None].to(device),
            images_seq_mask=((question == begin) | (question == image)).to(device),
            images_emb_mask=torch.ones(1, 1, tokens + 1, dtype=torch.bool, device=device),
        ),
    )


# Runs -----------------------------------------------------------------------


def evaluate(folder: Path, reference: ModuleType, options: argparse.Namespace) -> dict[str, Run]:
    """Every run by its name; one model at a time."""
    inputs = make_inputs(JanusFlowConfig.from_file(folder / "config.json"), options)
    runs: dict[str, Run] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for exact in (False, True) if name == "bf16" else (False,):
            model = reference.load(folder, options.janus_root, dtype, options.device, exact_frequencies=exact)
            key = f"ref {name} exact" if exact else f"ref {name}"
            runs[key] = run_reference(model, reference, inputs, options)
            del model
            release()
            log(key)
        model = load_model(folder, options.device, dtype, progress=False)
        runs[f"ours {name}"] = run_ours(model, inputs, options)
        log(f"ours {name}")
        if name == "fp32":
            with faults(model):
                runs["faulty fp32"] = run_ours(model, inputs, options)
            log("faulty fp32")
        else:
            model.llm.upstream_rounding = True
            runs["ours bf16 upstream"] = run_ours(model, inputs, options)
            log("ours bf16 upstream")
        del model
        release()
    return runs


def run_reference(
    model: nn.Module, reference: ModuleType, inputs: Inputs, options: argparse.Namespace
) -> Run:
    run = reference.understand(model, inputs.question)
    prompt, noise, pad_id = inputs.prompt, inputs.noise, inputs.pad_id
    painted = reference.paint(model, prompt, noise, options.cfg_weight, options.num_inference_steps, pad_id)
    final = painted["z"][-1]
    return to_cpu(run | painted | {"z": final, "z_default": final})


@torch.inference_mode()
def run_ours(model: JanusFlow, inputs: Inputs, options: argparse.Namespace) -> Run:
    """Through the calls that the pipeline makes. z: latents in the model's dtype; z_default: in fp32."""
    q = inputs.question
    embeds = model.prepare_inputs_embeds(q.input_ids, q.pixel_values, q.images_seq_mask, q.images_emb_mask)
    hidden = model.llm(embeds)
    count, times = len(inputs.noise), time_grid(options.num_inference_steps)

    def velocity(cfg_weight: float) -> Velocity:
        return guided_velocity(PlainSampler(model), [inputs.prompt[:-1]] * count, cfg_weight)

    z = inputs.noise.to(model.dtype)
    final = euler(velocity(options.cfg_weight), z, times)
    default = final
    if z.dtype != torch.float32:
        default = euler(velocity(options.cfg_weight), inputs.noise, times)
    return to_cpu(
        {
            "siglip": model.siglip(q.pixel_values[0].to(model.dtype)),
            "inputs_embeds": embeds,
            "hidden": hidden,
            "logits": model.logits(hidden),
            "v_cond": velocity(1.0)(z, 0.0),  # guidance 1 is the conditional velocity alone
            "v_uncond": velocity(0.0)(z, 0.0),  # 0 the unconditional one
            "z": final,
            "z_default": default,
        }
    )


@contextmanager
def faults(model: JanusFlow) -> Iterator[None]:
    """The control's two mistakes, one in the LLM, one in SigLIP."""

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    table = model.siglip.pos_embed.data
    side = model.config.siglip.image_size // model.config.siglip.patch_size
    by_columns = table.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    try:
        model.siglip.pos_embed.data = by_columns.contiguous()
        with mock.patch.object(llama, "apply_rotary", neighbours):
            yield
    finally:
        model.siglip.pos_embed.data = table


def to_cpu(run: Run) -> Run:
    return {stage: value.float().cpu() for stage, value in run.items()}


# Figures -----------------------------------------------------------------------


def compare(runs: dict[str, Run], device: str) -> dict[str, dict[str, float]]:
    """Column title -> stage -> relative L2 norm; KL and agreement of the best token for the logits."""
    table: dict[str, dict[str, float]] = {}
    for title, (one, other) in COLUMNS.items():
        column = table[title] = {}
        for stage in STAGES:
            actual, expected = (runs[name][stage].to(device) for name in (one, other))
            column[stage] = relative(actual, expected)
            if stage == "logits":
                p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
                column["kl"] = float((p.exp() * (p - q)).sum(-1).mean())
                column["top1"] = 100 * float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
    return table


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 norm of the difference; infinite where something is not finite."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    value = float((actual - expected).norm() / expected.norm())
    return value if value == value else float("inf")


def judge(table: dict[str, dict[str, float]]) -> list[str]:
    """What breaks a limit, in words."""
    ours32, ref16, ours16, _, _, control = table.values()
    failures = []
    for stage, name in STAGES.items():
        if not ours32[stage] <= FP32_LIMIT:
            failures.append(f"FAILED {name}: ours in fp32 is {ours32[stage]:.1e} from the truth")
        if not ours16[stage] <= BF16_RATIO * ref16[stage]:
            both = f"{ours16[stage]:.2e} from the truth, the reference's {ref16[stage]:.2e}"
            failures.append(f"FAILED {name}: ours in bf16 is {both}")
        if not control[stage] > CONTROL_LIMIT:
            failures.append(f"FAILED {name}: the control passes with {control[stage]:.1e}; this sees nothing")
    return failures


def markdown(table: dict[str, dict[str, float]]) -> str:
    """One row a stage, one column a comparison."""
    lines = ["| relative L2 norm | " + " | ".join(table) + " |", "| --- |" + " ---: |" * len(table)]
    for stage, name in (STAGES | LAST).items():
        form = ".2f" if stage == "top1" else ".1e"
        lines.append(
            " | ".join([f"| {name}", *(f"{column[stage]:{form}}" for column in table.values())]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
