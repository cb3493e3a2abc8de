# SPDX-License-Identifier: MIT
"""Rows from Hugging Face `datasets`: tables on disk, streams, the hub. Images stay encoded until they are needed."""

from __future__ import annotations

import contextlib
import copy
import glob
import hashlib
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import SourceConfig
from .rows import CONVERSATIONS, BadRow, Row, cause, check_columns, seeded_generator

SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves
BUFFER_BYTES = 2**28  # of a stream's buffer, at most
NEEDED = {  # by kind: columns, one of each group
    "understanding": (CONVERSATIONS,),
    "generation": (("image",), ("text",)),
    "text": (("text",),),
}


class Part(NamedTuple):
    folder: Path | None  # that paths in the rows count from
    rows: Any  # a Dataset or an IterableDataset


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "a source with `dataset` needs the package datasets: pip install 'janusflow-min[train]'"
        ) from None
    return datasets


def open_dataset(config: SourceConfig, key: tuple, skip_bad: bool, show: bool = False) -> Table | Stream:
    """The rows of a source; files of one folder are opened together, for paths in them count from there.

    key: of the order of a stream. show: progress bars, on a terminal. Raises ValueError or OSError
    where a file cannot be read, or with `skip_bad` where none can, and where a column is missing.
    """
    local, bad, parts = Path(config.dataset), list[BadRow](), list[Part]()
    folders: dict[Path | None, list[str]] = {}
    for pattern in config.files:
        hub = "/" in config.dataset and not local.exists()
        here = not hub and "://" not in pattern
        literal = not here or Path(pattern).is_file()  # a name may look like a pattern
        found = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"files: nothing at {pattern}")
        for file in found:
            folders.setdefault(Path(file).parent if here else None, []).append(file)
    for folder, names in folders.items() or [(local if local.is_dir() else None, [])]:
        with progress_bars(show):
            rows = load(config, names, bad if skip_bad else None)
            parts += [Part(folder, prepare(config, rows))] if rows is not None else []
    if not parts:
        raise ValueError(f"none of its files can be read; {bad[0]}")
    files = [file for names in folders.values() for file in names]
    files = files or [str(p) for p in sorted(local.rglob("*"))] if local.is_dir() else files
    sizes = [(Path(f).name, Path(f).stat().st_size if Path(f).is_file() else 0) for f in files]
    digest = hashlib.sha256(repr((config.dataset, config.subset, config.split, sizes)).encode())
    if isinstance(parts[0].rows, import_datasets().IterableDataset):
        return Stream(config.dataset, parts, config.shuffle_buffer if config.shuffle else 0, key, bad, digest)
    return Table(config.dataset, parts, bad, digest)


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Those of `datasets`: on a terminal, and only where they are wanted."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not are_progress_bars_disabled() and not (show and sys.stderr is not None and sys.stderr.isatty())
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def load(config: SourceConfig, files: list[str], bad: list[BadRow] | None) -> Any:
    """The rows of files. Where opening all together fails, those that cannot be read are looked for, added to `bad`
    and left out; None where none can."""

    def open_files(files: list[str]) -> Any:
        if any((Path(config.dataset) / name).is_file() for name in SAVED):  # read in place, never streamed
            rows = import_datasets().load_from_disk(config.dataset)
            return rows[config.split] if isinstance(rows, dict) else rows
        paths = [glob.escape(file) if Path(file).is_file() else file for file in files]
        options = {"data_files": paths or None, "split": config.split, "streaming": config.streaming}
        return import_datasets().load_dataset(config.dataset, config.subset or None, **options)

    try:
        return open_files(files)
    except Exception as error:  # whatever the format's reader raises
        if not files or bad is None:
            raise ValueError(
                f"{', '.join(files[:3]) or config.dataset} cannot be opened: {cause(error)}"
            ) from error
    good = []
    for file in files:
        try:
            next(iter(open_files([file])), None)
            good.append(file)
        except Exception as error:
            bad.append(BadRow(file, 0, cause(error)))
    return open_files(good) if good else None


def prepare(config: SourceConfig, rows: Any) -> Any:
    """Only the columns that are used, images encoded. ValueError names the columns if one lacks."""
    names = rows.column_names
    if names is None:  # a stream whose format does not say
        try:
            names = list(next(iter(rows), {}))
        except Exception:  # reported when the stream is read
            return rows
    columns = config.columns
    check_columns(columns, names)
    named = set(names) - set(columns.values()) | set(columns)
    missing = [" or ".join(group) for group in NEEDED[config.kind] if not named & set(group)]
    if missing:
        raise ValueError(
            f"there is no column {', no '.join(missing)}; say with columns which it is of {', '.join(names)}"
        )
    used = {*CONVERSATIONS, "image", "images", "text", *columns.values()}
    used |= {theirs.split(".")[0] for theirs in columns.values()}
    rows = rows.select_columns([name for name in names if name in used])
    if isinstance(rows, import_datasets().Dataset):
        return rows.with_format("arrow")  # a cast would write all of it anew
    for name, feature in (rows.features or {}).items():
        if (encoded := undecoded(feature)) != feature:
            rows = rows.cast_column(name, encoded)
    return rows


def undecoded(feature: Any) -> Any:
    """A feature of `datasets`, images at any depth left as bytes and path."""
    datasets = import_datasets()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {key: undecoded(inner) for key, inner in feature.items()}
    if isinstance(feature, list):
        return [undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # a list, under whatever name
        feature = copy.copy(feature)
        feature.feature = undecoded(feature.feature)
    return feature


class Table:
    """Data sets on disk, one after another."""

    def __init__(self, name: str, parts: Sequence[Part], bad: list[BadRow], digest: Any):
        self.name, self.parts, self.bad = name, parts, bad
        self.ends = list(accumulate(len(part.rows) for part in parts))
        digest.update(repr(self.ends).encode())
        self.fingerprint = digest.hexdigest()[:16]
        if not self.ends[-1]:
            raise ValueError(f"{name} has no rows")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        k = bisect_right(self.ends, index)
        folder, rows = self.parts[k]
        (values,) = rows[[index - self.ends[k] + len(rows)]].to_pylist()
        return Row(self.name, index + 1, values, folder)


def size_of(value: Any) -> int:
    """About how many bytes a row's values hold."""
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list):
        return sum(map(size_of, value))
    return len(value) if isinstance(value, bytes | str) else 8


class Stream:
    """Data sets that can only be read on: shard after shard, epoch after epoch, rows shuffled in a buffer (0: not).

    Every process reads all of it. A shard that breaks is read again from its start, up to where it broke; one that
    breaks there again is left, and its place taken by one bad row.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        buffer: int,
        key: tuple,
        bad: list[BadRow] | None = None,
        digest: Any = None,
    ):
        self.name, self.buffer, self.key, self.bad = name, buffer, key, bad or []
        self.fingerprint = (digest or hashlib.sha256()).hexdigest()[:16]
        self.shards = [(part, k, part.rows.n_shards) for part in parts for k in range(part.rows.n_shards)]
        self._restart()

    def _restart(self) -> None:
        self._rows: Iterator[Row] | None = None
        self._next, self._held = 0, dict[int, Row]()

    def __getstate__(self) -> dict[str, Any]:  # an iterator stays behind; a worker starts its own
        return self.__dict__ | {"_rows": None, "_next": 0, "_held": {}}

    def row_at(self, position: int, keep: int) -> Row:
        """The row at a position; the rows from position `keep` on stay at hand, and nothing else does."""
        self._held = {p: row for p, row in self._held.items() if p >= keep}
        if position < self._next and position not in self._held:
            self._restart()
        self._rows = self._rows or self._endless()
        while position not in self._held:
            row = next(self._rows)
            if self._next >= keep:
                self._held[self._next] = row
            self._next += 1
        return self._held[position]

    def _endless(self) -> Iterator[Row]:
        epoch = 0
        while True:
            good, row = False, None
            for row in self._epoch(seeded_generator(*self.key, epoch)):
                good = good or not isinstance(row.values, Exception)
                yield row
            if not good:
                raise ValueError(f"{self.name} gives no rows{f'; {row.values}' if row else ''}")
            epoch += 1

    def _epoch(self, generator: torch.Generator) -> Iterator[Row]:
        if not self.buffer:
            for shard in self.shards:
                yield from self._shard(*shard)
            return
        held: list[Row] = []
        size = 0
        for index in torch.randperm(len(self.shards), generator=generator, device="cpu").tolist():
            for row in self._shard(*self.shards[index]):
                held.append(row)
                size += size_of(row.values)
                while len(held) > self.buffer or (size > BUFFER_BYTES and len(held) > 1):
                    k = int(torch.randint(len(held), (1,), generator=generator, device="cpu"))
                    held[k], held[-1] = held[-1], held[k]
                    size -= size_of(held[-1].values)
                    yield held.pop()
        for k in torch.randperm(len(held), generator=generator, device="cpu").tolist():
            yield held[k]

    def _shard(self, part: Part, index: int, count: int) -> Iterator[Row]:
        name, rows = self.name, part.rows
        if count > 1:
            from datasets.distributed import split_dataset_by_node

            name, rows = f"{name}, shard {index + 1} of {count}", split_dataset_by_node(rows, index, count)
        done, broken_at = 0, -1
        while True:
            try:
                # Not `iter(rows)`, which in a data loader's worker gives that worker's shards alone.
                for batch in islice(rows.iter(batch_size=1), done, None):
                    done += 1
                    yield Row(name, done, {key: values[0] for key, values in batch.items()}, part.folder)
                return
            except MemoryError:
                raise
            except Exception as error:  # whatever the format's reader or the net raises
                if broken_at == done:
                    yield Row(name, done + 1, ValueError(f"it cannot be read from here on: {cause(error)}"))
                    return
                broken_at = done
