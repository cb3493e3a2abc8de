# SPDX-License-Identifier: MIT
"""The sources of a run, and which row each of its samples takes.

`Source` gives row p of a source as a function of the seed and p alone, so neither data workers nor ranks nor a
restart change which rows a step learns from. `Mixture` says which source a sample of the run takes its row from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .config import Config, SourceConfig
from .hf_rows import Stream, open_dataset
from .rows import BadRow, CaptionFolder, Manifest, Row, rename, seeded_generator
from .settings import naming


class Source:
    """Rows in the order that a run takes them: at any position from 0 up, drawn without replacement from the seed."""

    def __init__(self, config: SourceConfig, seed: int, key: str, skip_bad: bool = True, show: bool = False):
        """key: which source of the run it is. show: progress bars. ValueError, OSError where it has no usable rows."""
        self.config, self.seed, self.key = config, seed, key
        self.name = config.manifest or config.folder or config.dataset
        self.rows: Any
        if config.manifest:
            self.rows = Manifest(config.manifest, config.kind, config.columns)
        elif config.folder:
            self.rows = CaptionFolder(config.folder)
        else:
            self.rows = open_dataset(config, (seed, key), skip_bad, show)
        self.bad: list[BadRow] = self.rows.bad
        self.fingerprint: str = self.rows.fingerprint
        self.streamed = isinstance(self.rows, Stream)
        self._order: tuple[int, Tensor] | None = None  # of an epoch

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}

    def __len__(self) -> int:
        """Rows of an epoch; 0 for a stream, which does not know."""
        return 0 if self.streamed else len(self.rows)

    def __call__(self, position: int, keep: int | None = None) -> Row:
        """The row at a position; a stream holds the rows from `keep` on, so that they can be asked for again."""
        if self.streamed:
            row = self.rows.row_at(position, position if keep is None else keep)
            return row if isinstance(row.values, Exception) else self._renamed(row)
        epoch, index = divmod(position, len(self.rows))
        if self.config.shuffle:
            if self._order is None or self._order[0] != epoch:
                generator = seeded_generator(self.seed, self.key, epoch)
                self._order = epoch, torch.randperm(len(self.rows), generator=generator, device="cpu")
            index = int(self._order[1][index])
        try:
            row = self.rows[index]
            return row if isinstance(row.values, Exception) else self._renamed(row)
        except Exception as error:  # the file changed, or whatever a reader raises
            return Row(self.name, index + 1, error)

    def _renamed(self, row: Row) -> Row:
        return row._replace(values=rename(row.values, self.config.columns))


def open_sources(config: Config, show: bool = False) -> list[Source]:
    """The sources of a run; show: progress bars, on a terminal. Errors name the table of the configuration."""
    skip, found = config.loader.on_bad_row == "skip", []
    for i, source in enumerate(config.data):
        with naming(f"data.{i}"):
            found.append(Source(source, config.seed, f"{i} {source.kind}", skip, show))
    return found


def summarize(config: Config, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What a run would learn from, by source: its name, kind, rows (None: a stream), bad rows, share of the samples,
    and a fingerprint of the data."""
    total = sum(config.ratios())
    return [
        {
            "source": source.name,
            "kind": source.config.kind,
            "rows": len(source) or None,
            "bad": len(source.bad),
            "share": ratio / total,
            "fingerprint": source.fingerprint,
        }
        for source, ratio in zip(sources, config.ratios(), strict=True)
    ]


class Mixture:
    """Which source sample i takes from, and which of that source's rows: a closed form, so any step can be the first.

    Sources take turns as evenly as their ratios allow. `early` ratios hold for the first `early_samples`.
    """

    def __init__(self, ratios: Sequence[float], early: Sequence[float] = (), early_samples: int = 0):
        self.late, self.early = integer_weights(ratios), integer_weights(early or ratios)
        self.early_samples = early_samples

    def __call__(self, sample: int) -> tuple[int, int]:
        """Sample -> (source, position in it)."""
        if sample < self.early_samples:
            return self._place(sample, self.early)
        source, position = self._place(sample - self.early_samples, self.late)
        return source, position + self._count(self.early_samples, self.early, source)

    @staticmethod
    def _place(sample: int, weights: list[int]) -> tuple[int, int]:
        left = sum(weights)
        for source, weight in enumerate(weights):
            taken, after = ((2 * i * weight + left) // (2 * left) for i in (sample, sample + 1))
            if after > taken:
                return source, taken
            sample, left = sample - taken, left - weight
        raise AssertionError("unreachable")

    @staticmethod
    def _count(samples: int, weights: list[int], source: int) -> int:
        """How many of the first samples go to a source."""
        left = sum(weights)
        for weight in weights[:source]:
            samples, left = samples - (2 * samples * weight + left) // (2 * left), left - weight
        weight = weights[source]
        return (2 * samples * weight + left) // (2 * left) if weight else 0


def integer_weights(ratios: Sequence[float]) -> list[int]:
    """Whole numbers in the same ratios."""
    parts = [Fraction(ratio).limit_denominator(10**6) for ratio in ratios]
    if not sum(parts) > 0:
        raise ValueError("the stage's mix has no share for any of the sources; give them a ratio")
    common = math.lcm(*(part.denominator for part in parts))
    return [int(part * common) for part in parts]
