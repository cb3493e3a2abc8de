# SPDX-License-Identifier: MIT
"""A page of what went wrong: the images that lost points, with prompt and reason, in one HTML file without scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..files import printable
from .bootstrap import ItemScore

SHOWN = 60  # items at most
SIDE = 224  # px of a thumbnail
STYLE = """body { font: 14px/1.4 sans-serif; margin: 2em; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1.5em }
figure { margin: 0 } img { max-width: 112px } img:only-of-type { max-width: 224px }
figcaption { overflow-wrap: anywhere } small { color: #666 }
pre { white-space: pre-wrap; font: inherit; color: #a00 }"""


def gallery(items: Sequence[ItemScore], title: str, best: float) -> str:
    """HTML of the worst items that have images: those below `best`, the worst first, at most `SHOWN`."""
    lost = [item for item in items if item.images and item.value is not None and item.value < best]
    shown = sorted(lost, key=lambda item: (item.value, item.item))[:SHOWN]
    scored = sum(item.value is not None for item in items)
    more = f", the worst {len(shown)} of them here" if len(shown) < len(lost) else ""
    body = "\n".join(_figure(item) for item in shown)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>
<style>
{STYLE}
</style></head><body>
<h1>{_text(title)}</h1>
<p>{len(lost):,} of {scored:,} items lost points{more}.</p>
<main>
{body}
</main></body></html>
"""


def _figure(item: ItemScore) -> str:
    images = "".join(_thumbnail(Path(path)) for path in item.images[:4])
    about = f"<small>{_text(item.item)} · {_text(', '.join(item.parts))} · {item.value:.3g}</small>"
    reason = f"<pre>{_text(item.reason[:600])}</pre>" if item.reason else ""
    return f"<figure>{images}<figcaption>{about}<br>{_text(item.prompt)}{reason}</figcaption></figure>"


def _thumbnail(path: Path) -> str:
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except Exception as error:  # whatever Pillow raises for a file that has gone or broken since
        return f"<small>{_text(path.name)}: {_text(type(error).__name__)}</small>"
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _text(text: str) -> str:
    """Escaped: prompts, answers and file names are not ours."""
    return html.escape(printable(text))
