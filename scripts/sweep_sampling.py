# SPDX-License-Identifier: MIT
"""How the sampling options trade rows for right images: the default's held-out prompts, judged by its world's rules.

    python scripts/sweep_sampling.py --out sweep                # a GPU: a few seconds a setting
    python scripts/sweep_sampling.py --out sweep --cases 10     # a CPU: fewer prompts
    python scripts/sweep_sampling.py --out sweep --best-of 2 4 8

Each setting is a line of OUT/sweep.jsonl; one that is there is not run again. At the end OUT/sweep.md and
OUT/sweep.png; with --best-of also OUT/calibration.png: how often images of a score are right.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import log, name_of, pyplot

import janusflow_min as jf
from janusflow_min.benchmarks.bootstrap import wilson
from janusflow_min.benchmarks.shapes import prompts as held_out
from janusflow_min.sampling_options import PRESETS
from janusflow_min.shapes.judge import check

EULER, QUICK = dict(solver="euler", timestep_shift=1.0), PRESETS["quick"]
WHOLE = (0.0, 1.0)


def settings() -> list[dict[str, Any]]:
    """The grid: Euler as published, the other solvers with and without shift, guidance in part of the time."""
    grid = [EULER | {"num_inference_steps": n} for n in (500, 100, 30, 15, 8)]
    for solver, shift, rows in product(
        ("midpoint", "heun", "ab2", "euler"), (1.0, 2.0, 3.0), (8, 10, 12, 16)
    ):
        steps = rows // 2 if solver in ("midpoint", "heun") else rows
        grid.append(dict(solver=solver, timestep_shift=shift, num_inference_steps=steps))
    for high in (0.3, 0.5, 0.7):
        grid.append(EULER | {"num_inference_steps": 30, "guidance_interval": (0.0, high)})
    for shift, steps, high in product((2.0, 2.5), (8, 10, 12), (0.3, 0.5, 0.7)):
        ab2 = dict(solver="ab2", timestep_shift=shift, num_inference_steps=steps)
        grid.append(ab2 | {"guidance_interval": (0.0, high)})
    grid += [EULER | {"num_inference_steps": 30, "cfg_weight": w} for w in (1.0, 3.0)]
    return [dict(cfg_weight=2.0, guidance_interval=WHOLE) | one for one in [*grid, dict(QUICK)]]


def rows_of(pipe: jf.Pipeline, prompt: str, options: dict[str, Any]) -> int:
    """Rows of the LLM for one image, counted."""
    sampler, count = pipe.sampler, 0
    prefill = sampler.prefill

    def counting(plan):
        velocity = prefill(plan)

        def counted(z, timestep):
            nonlocal count
            count += len(plan.source)
            return velocity(z, timestep)

        return counted

    sampler.prefill = counting
    pipe.generate(prompt, 1, seed=0, progress=False, output_type="latent", **options)
    del sampler.prefill
    return count


def run(
    pipe: jf.Pipeline, cases: list[tuple[str, str]], options: dict[str, Any], true: torch.Tensor | None
) -> tuple:
    start = time.perf_counter()
    out = pipe.generate([prompt for _, prompt in cases], 1, seed=0, progress=False, **options)
    right = [check(image, prompt)[0] for image, (_, prompt) in zip(out.images, cases, strict=True)]
    families = {
        family: [r for r, (f, _) in zip(right, cases, strict=True) if f == family] for family, _ in cases
    }
    off = None
    if true is not None and "best_of" not in options:
        apart, length = (z.flatten(1).norm(dim=1) for z in (out.latents - true, true))
        off = float((apart / length).mean())
    rows = rows_of(pipe, cases[0][1], {k: v for k, v in options.items() if k not in ("best_of", "checker")})
    low, high = wilson(sum(right) / len(right), len(right))
    record = options | {
        "rows": rows * options.get("best_of", 1),
        "right": sum(right) / len(right),
        "interval": [low, high],
        "families": {family: sum(own) / len(own) for family, own in families.items()},
        "off": off,
        "images": len(right),
        "seconds": time.perf_counter() - start,
    }
    return record, out


def name(r: dict[str, Any]) -> str:
    text = f"{r['solver']}, {r['num_inference_steps']} steps, shift {r['timestep_shift']:g}"
    low, high = r["guidance_interval"]
    text += "" if r["cfg_weight"] == 2 else f", guidance {r['cfg_weight']:g}"
    text += "" if (low, high) == WHOLE else f", guided for t < {high:g}"
    return text + (
        f", best of {r['best_of']} ({r['checker'] or 'yes or no'})" if r.get("best_of", 1) > 1 else ""
    )


def write(out: Path, records: list[dict[str, Any]], where: str) -> None:
    plt = pyplot()
    lines = [f"{records[0]['images']} images a setting, one run, {where}.", ""]
    lines += ["| | rows an image | right | 95 % | off 500 steps |", "| --- | ---: | ---: | --- | ---: |"]
    for r in sorted(records, key=lambda r: (r.get("best_of", 1) > 1, r["rows"])):
        low, high = (100 * x for x in r["interval"])
        off = "" if r["off"] is None else f"{r['off']:.3f}"
        lines.append(f"| {name(r)} | {r['rows']} | {r['right']:.1%} | {low:.1f} to {high:.1f} | {off} |")
    (out / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axis = plt.subplots(figsize=(7, 4))
    labels = [r["solver"] + (", best of several" if r.get("best_of", 1) > 1 else "") for r in records]
    for label in dict.fromkeys(labels):
        own = [r for r, its in zip(records, labels, strict=True) if its == label]
        axis.scatter([r["rows"] for r in own], [100 * r["right"] for r in own], s=16, label=label)
    axis.set(xscale="log", xlabel="rows of the LLM an image", ylabel="right, %", ylim=(60, 100))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(out / "sweep.png", dpi=120, bbox_inches="tight")


def calibrate(out: Path, pipe: jf.Pipeline, cases: list[tuple[str, str]]) -> str:
    """Images with 8 Euler steps, of which many are wrong, and what the model says of them: a plot; the areas under the
    ROC curve in words."""
    import matplotlib.pyplot as plt

    prompts = [prompt for _, prompt in cases]
    images = pipe.generate(prompts, 1, num_inference_steps=8, seed=10_000, progress=False).images
    right = [check(image, prompt)[0] for image, prompt in zip(images, prompts, strict=True)]
    figure, axis = plt.subplots(figsize=(4, 4))
    axis.plot([0, 1], [0, 1], color="0.8")
    said = []
    for label, checker in (("the world's questions", "shapes"), ("yes or no", None)):
        scores = pipe.score(images, prompts, checker)
        places = [min(9, int(10 * score)) for score in scores]
        bins = {
            k: [r for place, r in zip(places, right, strict=True) if place == k] for k in sorted(set(places))
        }
        shares = [sum(own) / len(own) for own in bins.values()]
        sizes = [10 + 4 * len(own) ** 0.5 for own in bins.values()]
        axis.scatter([(k + 0.5) / 10 for k in bins], shares, s=sizes, label=label)
        good, bad = ([s for s, r in zip(scores, right, strict=True) if r is want] for want in (True, False))
        wins = sum((a > b) + (a == b) / 2 for a in good for b in bad)
        said.append(f"{label} {wins / max(1, len(good) * len(bad)):.3f}")
    axis.set(xlabel="score", ylabel="share that is right", title=f"{len(images):,} images, 8 Euler steps")
    axis.legend()
    figure.savefig(out / "calibration.png", dpi=120, bbox_inches="tight")
    return f"Area under the ROC curve, {sum(right)} of {len(right)} images right: {', '.join(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", type=int, default=100, help="prompts of each of the six families")
    parser.add_argument(
        "--best-of", type=int, nargs="*", default=[], metavar="N", help="measure selection as well"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe, cases = jf.load(args.model, device=args.device, progress=False), held_out(args.cases)
    path, true_path = args.out / "sweep.jsonl", args.out / "latents_500.pt"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {name(r) for r in records}
    true = torch.load(true_path) if true_path.exists() else None
    chosen = settings()
    for count, checker, base in product(
        args.best_of, ("shapes", None), (EULER | {"num_inference_steps": 30}, QUICK)
    ):
        chosen.append(
            dict(cfg_weight=2.0, guidance_interval=WHOLE) | base | {"best_of": count, "checker": checker}
        )
    for options in chosen:
        if name(options) in done:
            continue
        done.add(name(options))
        record, out = run(pipe, cases, options, true)
        if true is None:
            true = out.latents
            torch.save(true, true_path)
        with open(path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        records.append(record)
        log(f"{name(record)}: {record['rows']} rows, {record['right']:.1%}, {record['seconds']:.1f} s")
    write(args.out, records, name_of(pipe.device))
    if args.best_of:
        with open(args.out / "sweep.md", "a", encoding="utf-8") as page:
            page.write(f"\n{calibrate(args.out, pipe, cases)}\n")


if __name__ == "__main__":
    main()
