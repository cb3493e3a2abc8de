# SPDX-License-Identifier: MIT
"""The process that `test_fuzz.py` feeds with damaged files: one case a line in, one verdict a line out.

    python fuzz_worker.py CHECKPOINT SCRATCH MEGABYTES

A case is `TARGET SEED`: a file of the checkpoint, or an image format of Pillow. The verdict is "fine", or the error's
class and text. What the process may take beyond what it has after a first whole pass is limited.
"""

from __future__ import annotations

import io
import json
import math
import random
import resource
import shutil
import struct
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image

import janusflow_min as jf
from janusflow_min.pixels import open_image

NASTY = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.0,
    1e-45,
    1e30,
    1e308,
    math.nan,
    math.inf,
    2**31,
    2**63,
    10**9,
    10**18,
]
NASTY += [
    10**400,
    "",
    "x",
    "\x1b[2J",
    "x" * 100_000,
    "\ud800",
    [],
    {},
    [1],
    [None] * 3,
    {"a": 1},
    [[[[]]]],
    [1e30] * 3,
]
NASTY += [
    "<｜begin▁of▁sentence｜>",
    "BPE",
    "Fixed",
    "AutoencoderKL",
    "float16",
    "../../etc/passwd",
    [10**9] * 4,
    [1] * 5000,
]


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """One to three changes: of the structure where there is one, or of bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if name.endswith(".json") and rng.random() < 0.75:
            data = mutate_json(data, rng)
        elif name.endswith(".safetensors") and rng.random() < 0.6:
            data = mutate_header(data, rng)
        else:
            data = mutate_bytes(data, rng)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(20)
    at = rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))
    length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
    return rng.choice(
        (
            data[:at] + rng.randbytes(length) + data[at + length :],
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            data[:at] + rng.choice((b"\0", b"\xff")) * length + data[at + length :],
            data[:at],
            data[:at] + data[at + length :],
            data[:at] + data[at : at + length] * rng.choice((2, 3, 100)) + data[at:],
            data[:at] + rng.randbytes(length) + data[at:],
        )
    )


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    try:
        root = {"": json.loads(data)}
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(root)
    # What stands near the root counts more than one of a thousand entries of the vocabulary.
    node, key = rng.choice(places[: rng.choice((10, 60, 300, len(places)))])
    kind = rng.random()
    if kind < 0.6:
        node[key] = rng.choice(NASTY)
    elif kind < 0.8:
        value = node[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            node[key] = [value] * rng.choice((0, 1, 2, 1000))
        else:
            node[key] = rng.choice(
                (value * 2, -value, value + 1, value - 1, value * 10**6, value // 3, str(value))
            )
    elif kind < 0.95 and isinstance(node, dict):
        del node[key]
    elif isinstance(node, dict):
        node[key + "\x1b[1m"] = node.pop(key)
    else:
        node.insert(0, rng.choice(NASTY))
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(root.get("")).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file: names, dtypes, shapes and offsets, or the header's length."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return (
            struct.pack("<Q", rng.choice((0, 1, length - 1, length + 8, 2**31, 2**63, len(data)))) + data[8:]
        )
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def picture(form: str) -> bytes:
    """A small image in a format of Pillow."""
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    mode = {"MSP": "1", "XBM": "1", "BLP": "P", "GIF": "P", "PNG": "RGBA", "SGI": "RGBA"}.get(form, "RGB")
    buffer = io.BytesIO()
    image.resize((64, 64)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def run(target: str, seed: int, checkpoint: Path, scratch: Path) -> None:
    rng = random.Random(f"{target} {seed}")
    if target in Image.SAVE:
        random.seed(0)
        data = mutate(target, picture(target), rng)
        file = scratch / f"image.{target.lower()}"
        file.write_bytes(data)
        open_image(file)
        open_image(io.BytesIO(data), upright=True, background="white")
        return
    file = scratch / target
    try:
        file.unlink()
        file.write_bytes(mutate(target, (checkpoint / target).read_bytes(), rng))
        use(scratch)
    finally:
        file.unlink(missing_ok=True)
        shutil.copyfile(checkpoint / target, file)


def use(folder: Path) -> None:
    pipe = jf.load(folder, device="cpu", progress=False)
    image = pipe.generate("a cat", parallel_size=1, num_inference_steps=1, seed=0, progress=False).images[0]
    pipe.understand("What?", images=image, max_new_tokens=2)


def main(checkpoint: Path, scratch: Path, megabytes: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Image.init()
    for file in checkpoint.rglob("*"):
        if file.is_file() and not file.name.startswith("expected"):
            (scratch / file.relative_to(checkpoint)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, scratch / file.relative_to(checkpoint))
    use(scratch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20,) * 2)
    print("ready", flush=True)
    for line in sys.stdin:
        target, seed = line.split()
        try:
            run(target, int(seed), checkpoint, scratch)
            verdict = "fine"
        except BaseException as error:  # panics of Rust are none of Exception's
            verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(ascii(verdict), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
