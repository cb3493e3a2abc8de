# SPDX-License-Identifier: MIT
"""Progress bars, which only a terminal gets."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(show: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr that vanishes at its end; none where `show` is false or stderr is no terminal."""
    return tqdm(disable=not (show and is_terminal()), leave=False, file=sys.stderr, **options)


def is_terminal() -> bool:
    """Whether stderr is one; Python without a console has no stderr at all."""
    return sys.stderr is not None and sys.stderr.isatty()
