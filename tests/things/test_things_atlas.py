# SPDX-License-Identifier: MIT
"""The script that renders the emoji: from two invented packages, no network."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from janusflow_min.things.atlas import BORDER, FILLED, SIDE, load_atlas
from janusflow_min.things.concepts import ICONS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("things_atlas")


def package(folder: Path, name: str, names) -> None:
    """A package as npm packs it: a square in the right half of a 32 px icon, twice as high as it is wide."""
    body = '<path fill="#00f" d="M16 0h16v32H16z"/>'
    icons = {each: {"body": body} for each in names}
    files = {
        "icons.json": {"icons": icons, "aliases": {}, "width": 32, "height": 32},
        "info.json": {
            "name": name,
            "author": {"name": "A", "url": "https://a.example"},
            "license": {"spdx": "MIT", "url": "https://l.example"},
        },
        "package.json": {"name": f"@iconify-json/{name}", "version": "1.0.0"},
    }
    with tarfile.open(folder / f"iconify-json-{name}-1.0.0.tgz", "w:gz") as archive:
        for path, content in files.items():
            data = json.dumps(content).encode()
            about = tarfile.TarInfo(f"package/{path}")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))


def run(script, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["things_atlas.py", *map(str, arguments)])
    script.main()


def test_packages_are_rendered_with_their_notices(script, monkeypatch, tmp_path):
    """Stops: an icon that is cut off, off its centre or smaller than it can be; pictures without their licence."""
    pytest.importorskip("resvg_py")
    for name in ("noto", "fluent-emoji-flat"):
        package(tmp_path, name, ICONS.values())
    run(script, monkeypatch, "--packages", tmp_path, "--out", tmp_path / "new" / "things.npz")
    atlas = load_atlas(tmp_path / "new" / "things.npz")
    assert atlas.kinds == tuple(ICONS)
    sprite = atlas.pixels[0, 1].numpy()
    expected = np.zeros((SIDE, SIDE), np.uint8)
    quarter = FILLED // 4
    expected[BORDER : SIDE - BORDER, SIDE // 2 - quarter : SIDE // 2 + quarter] = 255
    assert np.abs(sprite[3].astype(float) - expected).mean() < 2  # a soft edge of a pixel
    assert sprite[2].max() >= 253 and sprite[:2].max() <= 2
    np.testing.assert_allclose(atlas.extents[0, 1], [0.25, 0.5], atol=0.01)
    notice = (tmp_path / "new" / "things.NOTICE.txt").read_text()
    assert "@iconify-json/noto 1.0.0" in notice and "licence: MIT, https://l.example" in notice


def test_what_is_missing_is_named(script, monkeypatch, tmp_path):
    """Stops: a traceback where a package, or one icon of it, is not there."""
    package(tmp_path, "noto", ICONS.values())
    with pytest.raises(SystemExit, match="holds no file of @iconify-json/fluent-emoji-flat"):
        run(script, monkeypatch, "--packages", tmp_path, "--out", tmp_path / "things.npz")
    package(tmp_path, "fluent-emoji-flat", [name for name in ICONS.values() if name != "cow"])
    with pytest.raises(SystemExit, match="@iconify-json/fluent-emoji-flat has no cow"):
        run(script, monkeypatch, "--packages", tmp_path, "--out", tmp_path / "things.npz")
    assert not (tmp_path / "things.npz").exists()
