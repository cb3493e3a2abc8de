# SPDX-License-Identifier: MIT
"""Teach the default model a colour and a shape that it has never seen, and measure what it learned and what it kept.

    python scripts/examples/new_concept.py --work runs/new_concept     # all of it, about half an hour on two cores

Stages: `data` (images, captions and questions with teal things and bars, as many of the old world for replay, two
manifests), `vae` (its decoder learns teal), `before` (the default is judged), `train` (`janusflow-min train
new_concept.toml`), `after`. Training keeps the VAE as it is, as the paper does, and SDXL's paints any colour; the
default's has seen eight and turns teal into green or blue, so its decoder is taught first. Its encoder stays: the old
latents still mean what they meant. Images are judged by the shapes' judge, which gets the new colour and
outline as a `World` and is first tested on true images. Teal bars are in no training image; no old combination that the
evaluation asks for is either.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import janusflow_min as jf
from janusflow_min.benchmarks import shapes
from janusflow_min.benchmarks.bootstrap import wilson
from janusflow_min.files import atomic_directory
from janusflow_min.hub import TINY
from janusflow_min.pixels import to_pixels, to_uint8
from janusflow_min.shapes import captions, judge, scenes
from janusflow_min.shapes.captions import Item, Spec
from janusflow_min.training.config import load_config
from janusflow_min.training.trainer import Trainer
from janusflow_min.vae import load_vae

TEAL, TEAL_RGB = "teal", (0, 150, 150)
BAR, HALF_WIDTH, HALF_HEIGHT = "bar", 0.9, 0.4  # in units of the radius


def bar(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor | float) -> torch.Tensor:
    return torch.maximum(x.abs() - HALF_WIDTH * r, y.abs() - HALF_HEIGHT * r)


WORLD = scenes.World(
    colours=scenes.COLOURS | {TEAL: TEAL_RGB},
    outlines=scenes.OUTLINES
    | {BAR: scenes.Outline(4 * HALF_WIDTH * HALF_HEIGHT, (HALF_WIDTH, HALF_HEIGHT), bar)},
)
TAG = "<image_placeholder>\n"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--work", type=Path, default=Path("runs/new_concept"), help="folder for all results")
    parser.add_argument("--images", type=int, default=4000, help="new ones, and as many old ones")
    parser.add_argument("--vae-steps", type=int, default=600, help="of the VAE's decoder")
    parser.add_argument("--cases", type=int, default=20, help="judged images and answers of each new kind")
    parser.add_argument("--old-cases", type=int, default=20, help="of each of the six old families and kinds")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="of the training run")
    args = parser.parse_args()
    data, began = args.work / "data", time.monotonic()
    if not (data / "replay.jsonl").is_file():
        make_data(data, args.images)
    print(
        f"data after {time.monotonic() - began:.0f} s; the judge is right on {check_reader():.1%} of true images"
    )
    vae = args.work / "vae"
    if not vae.is_dir():
        teach_vae(data, vae, args.vae_steps)
    print(f"VAE after {time.monotonic() - began:.0f} s; it keeps {check_vae(vae):.1%} of true images right")
    before = evaluate("tiny", args.cases, args.old_cases)
    print(f"judged after {time.monotonic() - began:.0f} s")
    toml = Path(__file__).with_suffix(".toml")
    paths = [
        f"data.{i}.manifest={json.dumps(str((data / f'{name}.jsonl').absolute()))}"
        for i, name in enumerate(("new", "replay", "new", "replay"))
    ]
    paths.append(f"loader.cache={json.dumps(str((args.work / 'cache').absolute()))}")
    paths.append(f"vae={json.dumps(str(vae.absolute()))}")
    config = load_config(toml, [*paths, f"output={json.dumps(str(args.work / 'run'))}", *args.set])
    trained = time.monotonic()
    export = Trainer(config).run()
    trained = time.monotonic() - trained
    after = evaluate(str(export), args.cases, args.old_cases)
    print(f"\ntrained for {trained:.0f} s, all in {time.monotonic() - began:.0f} s\n")
    print("| | before | after |\n| --- | ---: | ---: |")
    for name, score in after.items():
        print(f"| {name} | {tell(before[name])} | {tell(score)} |")
    result = {"before": before, "after": after, "training_seconds": round(trained)}
    (args.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")


class Score(NamedTuple):
    right: int
    total: int


def tell(score: Score) -> str:
    low, high = wilson(score.right / score.total, score.total)
    return f"{score.right} of {score.total} ({low:.0%} to {high:.0%})"


# The new world -----------------------------------------------------------------------


def new_scene(rng: random.Random, kind: str, objects: int) -> scenes.Scene:
    """A scene of the old world in which one object turns teal, or into a bar, or both ("teal bar")."""
    scene = scenes.sample_scene(rng, "colors" if objects == 1 else "color_attr")
    which = rng.randrange(objects)
    thing = scene.objects[which]
    if TEAL in kind:
        rgb = tuple(c + rng.randint(-scenes.JITTER, scenes.JITTER) for c in TEAL_RGB)
        thing = replace(thing, colour=TEAL, rgb=tuple(max(0, c) for c in rgb))
    if BAR in kind:
        thing = replace(thing, shape=BAR)
    things = (*scene.objects[:which], thing, *scene.objects[which + 1 :])
    return replace(scene, objects=things)


def draw(scene: scenes.Scene) -> Image.Image:
    return scenes.to_pil(scenes.render(scenes.pack([scene], WORLD), world=WORLD)[0])


def caption(scene: scenes.Scene) -> str:
    return captions.caption(
        scene, "colors" if len(scene.objects) == 1 else "color_attr", random.Random(0), "plain"
    )


def questions(scene: scenes.Scene, rng: random.Random) -> list[captions.QA]:
    """In the old world's words; each object here has a colour and a shape of its own."""
    found = []
    for thing in scene.objects:
        found.append(captions.QA("color", f"What color is the {thing.shape}?", thing.colour))
        found.append(captions.QA("what", f"What shape is the {thing.colour} object?", thing.shape))
        wrong = (rng.choice([*scenes.COLOURS, TEAL]), thing.shape)
        for (colour, shape), answer in (((thing.colour, thing.shape), "yes"), (wrong, "no")):
            if answer == "yes" or all((o.colour, o.shape) != wrong for o in scene.objects):
                article = "an" if colour[0] in "aeiou" else "a"
                found.append(captions.QA("yes_no", f"Is there {article} {colour} {shape}?", answer))
    if len(scene.objects) == 1:
        found.append(
            captions.QA("what", "What is in the picture?", caption(scene).removeprefix("a photo of "))
        )
    return found


def make_data(folder: Path, count: int) -> None:
    """`new.jsonl` and `replay.jsonl` with their images: a generation pair and a conversation of each."""
    folder.mkdir(parents=True, exist_ok=True)
    families = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    for name in ("new", "replay"):
        lines = []
        for i in range(count):
            rng = random.Random(f"new concept {name} {i}")
            if name == "new":
                scene = new_scene(rng, (TEAL, BAR)[i % 2], 1 + (i // 2) % 2)
                text, asked = caption(scene), questions(scene, rng)
            else:
                family = families[i % len(families)]
                scene = scenes.sample_scene(rng, family)
                text, asked = captions.caption(scene, family, rng), captions.sample_questions(scene, rng, 3)
            file = f"{name}-{i:05d}.png"
            draw(scene).save(folder / file)
            lines.append({"image": file, "text": text})
            talk = []
            for qa in rng.sample(asked, min(3, len(asked))):
                tag = "" if talk else TAG
                talk += [
                    {"role": "User", "content": tag + qa.question},
                    {"role": "Assistant", "content": qa.answer},
                ]
            lines.append({"conversation": [talk[0] | {"images": [file]}, *talk[1:]]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# The VAE -----------------------------------------------------------------------


def pixels(path: Path) -> torch.Tensor:
    """(3, S, S) in [-1, 1]"""
    return to_pixels(Image.open(path))


def teach_vae(data: Path, folder: Path, steps: int, batch: int = 4, lr: float = 5e-4) -> None:
    """Train the decoder of the default's VAE on new and old images, half and half: L1 + 3 · MSE."""
    vae = load_vae(TINY, torch.device("cpu"), torch.float32)
    files = [sorted(data.glob(f"{name}-*.png")) for name in ("new", "replay")]
    params = [*vae.autoencoder.decoder.parameters(), *vae.autoencoder.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in params], lr, (0.9, 0.99), weight_decay=0.0)
    rng = random.Random(0)
    for step in tqdm(range(steps), desc="VAE's decoder", unit="step"):
        x = torch.stack([pixels(rng.choice(files[k % 2])) for k in range(batch)])
        with torch.no_grad():
            z = vae.encode(x)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        error = vae.decode(z) - x
        optimizer.zero_grad()
        (error.abs().mean() + 3 * error.square().mean()).backward()
        optimizer.step()
    with atomic_directory(folder) as temporary:
        vae.autoencoder.save_pretrained(temporary)


@torch.no_grad()
def check_vae(folder: Path, count: int = 6) -> float:
    """Share of true images of the new kinds that are still right behind the VAE: no model can do better."""
    vae, right = load_vae(folder, torch.device("cpu"), torch.float32), []
    for _, scene, _ in cases(count):
        x = to_pixels(draw(scene))
        right.append(shows(Image.fromarray(to_uint8(vae.decode(vae.encode(x[None])))[0]), scene)[0])
    return float(np.mean(right))


# Judging -----------------------------------------------------------------------


def shows(image, scene: scenes.Scene) -> tuple[bool, str]:
    items = tuple(Item(1, thing.shape, thing.colour) for thing in scene.objects)
    return judge.judge(judge.read(image, WORLD), Spec(items), WORLD)


KINDS = ((TEAL, 1), (BAR, 1), (TEAL, 2), (BAR, 2), (f"{TEAL} {BAR}", 1))


def cases(count: int) -> list[tuple[str, scenes.Scene, random.Random]]:
    """(kind, scene, its generator); no scene is one of training's, and a teal bar's kind is not either."""
    found = []
    for kind, objects in KINDS:
        name = f"{kind}, {'alone' if objects == 1 else 'and another'}"
        for i in range(count):
            rng = random.Random(f"judged {name} {i}")
            found.append((name, new_scene(rng, kind, objects), rng))
    return found


def check_reader(count: int = 100) -> float:
    """Share of true images that the judge finds right."""
    return float(np.mean([shows(draw(scene), scene)[0] for _, scene, _ in cases(count)]))


def evaluate(model: str, count: int, old: int, batch: int = 20) -> dict[str, Score]:
    """Images and answers, new and old, by kind."""
    pipe = jf.load(model, progress=False)
    verdicts: dict[str, list[bool]] = defaultdict(list)
    judged = cases(count)
    for start in range(0, len(judged), batch):
        part = judged[start : start + batch]
        out = pipe.generate([caption(s) for _, s, _ in part], parallel_size=1, seed=start, progress=False)
        for (name, scene, _), image in zip(part, out.images, strict=True):
            verdicts[f"images: {name}"].append(shows(image, scene)[0])
        asked = [(name, draw(scene), told(scene, rng)) for name, scene, rng in part]
        replies = pipe.understand(
            [qa.question for *_, qa in asked], [image for _, image, _ in asked], max_new_tokens=16
        )
        for (name, _, qa), reply in zip(asked, replies, strict=True):
            right = captions.answer_is_right("what", qa.answer, reply.text)
            verdicts[f"answers: {name}"].append(right)
    for start in range(0, 6 * old, batch):
        part = shapes.prompts(old)[start : start + batch]
        out = pipe.generate([text for _, text in part], parallel_size=1, seed=start, progress=False)
        for (_, text), image in zip(part, out.images, strict=True):
            verdicts["images: old families"].append(judge.check(image, text)[0])
        asked_old = shapes.questions(old)[start : start + batch]
        replies = pipe.understand(
            [qa.question for qa, _ in asked_old], [image for _, image in asked_old], max_new_tokens=48
        )
        for (qa, _), reply in zip(asked_old, replies, strict=True):
            right = captions.answer_is_right(qa.kind, qa.answer, reply.text)
            verdicts["answers: old kinds"].append(right)
    return {name: Score(sum(rights), len(rights)) for name, rights in sorted(verdicts.items(), reverse=True)}


def told(scene: scenes.Scene, rng: random.Random) -> captions.QA:
    """A question whose answer is the new word."""
    new = (TEAL, BAR)
    return rng.choice([qa for qa in questions(scene, rng) if any(word in qa.answer for word in new)])


if __name__ == "__main__":
    main()
