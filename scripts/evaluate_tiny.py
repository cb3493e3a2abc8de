# SPDX-License-Identifier: MIT
"""Judge the trained default, or another model of its world, on what training never saw.

    python scripts/evaluate_tiny.py                                    # the default: 600 pictures, 600 answers
    python scripts/evaluate_tiny.py runs/tiny/tiny --cases 20 --out runs/tiny/evaluation

Prints a table with 95 % intervals; writes `evaluation.json` (every case) and a sheet of the pictures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image

import janusflow_min as jf
from janusflow_min.benchmarks.tiny import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tiny", help='"tiny" or a checkpoint folder')
    parser.add_argument("--cases", type=int, default=100, help="prompts a family, questions a kind")
    parser.add_argument("--cfg-weight", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"))
    args = parser.parse_args()
    pipe = jf.load(args.model, device=args.device, dtype=args.dtype)
    painted, pictures = evaluate.paint(pipe, args.cases, args.cfg_weight, args.steps, args.seed)
    answered, _ = evaluate.answer(pipe, args.cases, args.seed)
    report = {
        "model": args.model,
        "cfg_weight": args.cfg_weight,
        "num_inference_steps": args.steps,
        "seed": args.seed,
    }
    for name, cases in (("pictures", painted), ("answers", answered)):
        scores = evaluate.score(cases)
        print(f"\n| {name} | right | of | share | 95 % interval |\n| --- | ---: | ---: | ---: | --- |")
        for group, s in scores.items():
            low, high = s.interval
            print(f"| {group} | {s.right} | {s.total} | {s.share:.1%} | {low:.1%} to {high:.1%} |")
        report[name] = {
            "scores": {
                group: asdict(s) | {"share": s.share, "interval": s.interval} for group, s in scores.items()
            },
            "cases": [asdict(case) for case in cases],
        }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    columns, side = 25, pictures[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    sheet.save(args.out / "pictures.png")
    print(f"\n{args.out / 'evaluation.json'}, {args.out / 'pictures.png'}")


if __name__ == "__main__":
    main()
