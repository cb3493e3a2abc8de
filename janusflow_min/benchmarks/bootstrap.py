# SPDX-License-Identifier: MIT
"""How sure a benchmark's numbers are: 95 % intervals, and the difference of two runs, by bootstrap over items.

An item, a prompt with all its images and questions, is the unit that is drawn again: the images of one prompt are not
independent trials. Items are drawn within the groups that they count for, so no group is ever empty.

Legend: N items, G groups, M numbers (groups, then totals), D draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
Weights = Mapping[str, float]  # a total: group -> weight of its mean


@dataclass(frozen=True)
class ItemScore:
    """What scoring found out about one item."""

    item: str
    parts: Mapping[str, tuple[float, int]]  # group -> sum of the values, how many
    prompt: str = ""
    images: Sequence[str] = ()  # paths
    reason: str = ""  # why it lost points, or what the judge said

    @property
    def value(self) -> float | None:
        """The mean of its first group."""
        total, count = next(iter(self.parts.values()), (0.0, 0))
        return total / count if count else None


@dataclass(frozen=True)
class Comparison:
    """One number in two runs, and the 95 % interval of b - a."""

    a: float
    b: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def intervals(
    items: Sequence[ItemScore], totals: Mapping[str, Weights], scale: float
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every group and total that has a value.

    The percentiles of `DRAWS` draws; but Wilson's interval for a share of items that are right or wrong, and where
    all draws agree: then they do not show how few the items are. scale: the best possible value.
    """
    groups = groups_of(items)
    sums, counts = _table(items, groups)
    values = _numbers(sums.sum(0)[None], counts.sum(0)[None], groups, totals)[0]  # (M,)
    weights = _draws(counts, 0)
    with np.errstate(invalid="ignore"):
        drawn = _numbers(weights @ sums, weights @ counts, groups, totals)  # (D, M)
    found = {}
    for k, name in enumerate([*groups, *totals]):
        if not math.isfinite(values[k]):  # as a judge's "nan" makes it by the official rules
            continue
        low, high = np.percentile(drawn[:, k], [2.5, 97.5])
        own = [i for i, group in enumerate(groups) if group in totals.get(name, (name,))]
        inside = (counts[:, own] > 0).any(1)
        single = len(own) == 1 and (counts[inside][:, own] == 1).all()
        binary = single and np.isin(sums[inside][:, own], (0, scale)).all()
        if binary or (low == high and 0 <= values[k] <= scale):
            low, high = (scale * x for x in wilson(values[k] / scale, int(inside.sum())))
        found[name] = (float(low), float(high))
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many items."""
    if not count:
        return 0.0, 1.0
    z, n, p = 1.96, count, share
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def compare(
    a: Sequence[ItemScore], b: Sequence[ItemScore], totals: Mapping[str, Weights], seed: int = 0
) -> dict[str, Comparison]:
    """b - a of every number, by draws that take the same items of both. a, b: the same items in the same order."""
    if [x.item for x in a] != [x.item for x in b]:
        raise ValueError("the two runs' items must be the same, in the same order")
    groups = groups_of([*a, *b])
    (sums_a, counts_a), (sums_b, counts_b) = _table(a, groups), _table(b, groups)
    weights = _draws(np.concatenate([counts_a, counts_b], 1), seed)
    with np.errstate(invalid="ignore"):
        one, two = (
            [_numbers(w @ s, w @ c, groups, totals) for w in (np.ones((1, len(a))), weights)]
            for s, c in ((sums_a, counts_a), (sums_b, counts_b))
        )
    result = {}
    for k, name in enumerate([*groups, *totals]):
        values = float(one[0][0, k]), float(two[0][0, k])
        if all(map(math.isfinite, values)):
            low, high = np.percentile(two[1][:, k] - one[1][:, k], [2.5, 97.5])
            result[name] = Comparison(*values, float(low), float(high))
    return result


def groups_of(items: Sequence[ItemScore]) -> list[str]:
    return list(dict.fromkeys(group for item in items for group in item.parts))


def _table(items: Sequence[ItemScore], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts, (N, G) each."""
    pairs = np.array([[item.parts.get(g, (0.0, 0)) for g in groups] for item in items], float)
    pairs = pairs.reshape(len(items), len(groups), 2)
    return pairs[..., 0], pairs[..., 1]


def _draws(counts: np.ndarray, seed: int) -> np.ndarray:
    """How often each item is drawn, (D, N): with replacement, within the items that count for the same groups."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((DRAWS, len(counts)))
    strata: dict[bytes, list[int]] = {}
    for i, row in enumerate(counts > 0):
        strata.setdefault(row.tobytes(), []).append(i)
    for inside in strata.values():
        n = len(inside)
        weights[:, inside] = rng.multinomial(n, np.full(n, 1 / n), DRAWS)
    return weights


def _numbers(
    sums: np.ndarray, counts: np.ndarray, groups: Sequence[str], totals: Mapping[str, Weights]
) -> np.ndarray:
    """(D, G) each -> (D, M): means, then totals; NaN where there is no value."""
    with np.errstate(invalid="ignore"):
        means = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.nan)
    index = {group: k for k, group in enumerate(groups)}
    columns = [
        sum((w * means[:, index[g]] for g, w in weights.items()), np.zeros(len(means)))
        if weights.keys() <= index.keys()
        else np.full(len(means), np.nan)
        for weights in totals.values()
    ]
    return np.concatenate([means, np.stack(columns, 1)], 1) if columns else means
