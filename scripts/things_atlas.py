# SPDX-License-Identifier: MIT
"""Fetch the emoji that the world of things shows, render them, and keep them in one file outside the package.

    python scripts/things_atlas.py                                   # with `npm pack`, into ~/.cache/janusflow-min
    python scripts/things_atlas.py --packages FOLDER --out things.npz    # from the two .tgz files in FOLDER

The pictures are Noto Emoji (Google, Apache-2.0) and Fluent Emoji Flat (Microsoft, MIT), as the npm packages
`@iconify-json/noto` and `@iconify-json/fluent-emoji-flat` hold them. Beside the file lie their notices and a contact
sheet. Needs `pip install 'janusflow-min[things]'`, and npm or the .tgz files.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from janusflow_min.files import atomic_file
from janusflow_min.things.atlas import DEFAULT_PATH, FILLED, SIDE, Atlas, resized, save_atlas
from janusflow_min.things.concepts import ICONS, STYLES

PACKAGES = {"noto": "@iconify-json/noto", "fluent": "@iconify-json/fluent-emoji-flat"}  # style -> package
RENDERED = 256  # px, side at which an emoji is rendered before its empty border is cut off


def find_packages(folder: Path | None, scratch: Path) -> dict[str, Path]:
    """Style -> .tgz, from `folder`, or fetched into `scratch`. Errors name the package that is missing."""
    if folder is None:
        try:
            subprocess.run(["npm", "pack", "--silent", *PACKAGES.values()], cwd=scratch, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            wanted = " ".join(PACKAGES.values())
            raise SystemExit(
                f"`npm pack {wanted}` failed ({error}); give its files with --packages"
            ) from error
        folder = scratch
    found = {}
    for style, name in PACKAGES.items():
        files = sorted(folder.glob(f"{name.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"))
        if not files:
            raise SystemExit(f"{folder} holds no file of {name}, such as `npm pack {name}` writes")
        found[style] = files[-1]
    return found


def read_package(path: Path) -> tuple[dict[str, Any], str]:
    """The icons of a package, and its notice: name, version, authors, licence and where its text stands."""
    with tarfile.open(path) as archive:

        def read(name: str) -> dict[str, Any]:
            file = archive.extractfile(f"package/{name}")
            assert file is not None
            return json.load(file)

        icons, info, about = read("icons.json"), read("info.json"), read("package.json")
    author, licence = info["author"], info["license"]
    return icons, (
        f"{info['name']}, by {author['name']} ({author['url']})\n"
        f"licence: {licence['spdx']}, {licence['url']}\n"
        f"from the npm package {about['name']} {about['version']}\n"
    )


def render(icons: dict[str, Any], name: str) -> torch.Tensor:
    """An icon as (4, A, A) uint8, premultiplied, its bounding box as large as `FILLED` allows."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise SystemExit("rendering needs `pip install 'janusflow-min[things]'`") from error

    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons[key]) for key in ("width", "height"))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDERED}" height="{RENDERED}" viewBox="{view}">{icon["body"]}</svg>'
    )
    png = svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))).float()
    pixels[..., :3] *= pixels[..., 3:] / 255
    rows, columns = (torch.nonzero((pixels[..., 3] > 16).any(axis))[:, 0] for axis in (1, 0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].permute(2, 0, 1)
    height, width = pixels.shape[1:]
    side = max(height, width)
    square = torch.zeros(1, 4, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[0, :, top : top + height, left : left + width] = pixels
    border = (SIDE - FILLED) // 2
    return torch.nn.functional.pad(resized(square, FILLED)[0], (border,) * 4)


def contact_sheet(atlas: Atlas, side: int = 48, columns: int = 20) -> Image.Image:
    small = resized(atlas.pixels.flatten(0, 1).float(), side).float()
    white = (small[:, :3] + 255 - small[:, 3:]).round().clamp(0, 255).to(torch.uint8)
    white = torch.nn.functional.pad(white, (0, 0, 0, 0, 0, 0, 0, -len(white) % columns), value=255)
    grid = white.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    return Image.fromarray(grid.flatten(0, 1).flatten(1, 2).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, help="folder with the packages' .tgz files; default: npm pack"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        read = {
            style: read_package(path) for style, path in find_packages(args.packages, Path(scratch)).items()
        }
    for style, (icons, _) in read.items():
        known = {*icons["icons"], *icons.get("aliases", {})}
        if missing := sorted(set(ICONS.values()) - known):
            raise SystemExit(f"{PACKAGES[style]} has no {', '.join(missing)}")
    rendered = [
        torch.stack([render(read[style][0], icon) for style in STYLES])
        for icon in tqdm(ICONS.values(), "Rendering")
    ]
    atlas = Atlas(tuple(ICONS), torch.stack(rendered))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_atlas(atlas, args.out)
    with atomic_file(args.out.with_suffix(".NOTICE.txt")) as path:
        path.write_text("\n".join(notice for _, notice in read.values()), encoding="utf-8")
    with atomic_file(args.out.with_suffix(".png")) as path:
        contact_sheet(atlas).save(path, "PNG")
    print(f"{args.out}: {len(ICONS)} things in {len(STYLES)} styles")


if __name__ == "__main__":
    main()
