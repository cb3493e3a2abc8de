# SPDX-License-Identifier: MIT
"""Where training rows come from: JSON lines, folders of captioned images, and what Hugging Face `datasets` opens.

`Source` gives row p of a source as a function of the seed and p alone, so neither data workers nor ranks nor a
restart change which rows a step learns from. `Mixture` says which source a sample of the run takes its row from.
Rows are raw here: what a row may look like is in `batch.py`.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import Config, SourceConfig

CONVERSATIONS = ("conversation", "messages", "conversations")  # keys that may hold one
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_SUFFIXES = (".txt", ".caption")


class Row(NamedTuple):
    """One row as it was read; `values` is the error where it could not be."""

    source: str  # file or data set
    line: int  # counted from 1
    values: Mapping[str, Any] | Exception
    folder: Path | None = None  # that relative paths of images count from


class BadRow(NamedTuple):
    source: str
    line: int  # counted from 1; 0: the whole file
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.source}, line {self.line}: {self.reason}"
            if self.line
            else f"{self.source}: {self.reason}"
        )


def seeded_generator(*key: Any) -> torch.Generator:
    """A CPU generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def rename(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """Our names for the columns, `{ours: theirs}`; a dot reaches into a column. ValueError for what is no row."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with named values, got {row!s:.80}")
    new: dict[str, Any] = {}
    for ours, theirs in columns.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        new[ours] = value
    return {key: value for key, value in row.items() if key not in columns.values()} | new


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of sample that a row makes. ValueError where it makes none."""
    for kind, keys in (("understanding", CONVERSATIONS), ("generation", ("image",)), ("text", ("text",))):
        if any(key in row for key in keys):
            return kind
    raise ValueError(
        f"a row has image and text, a conversation ({', '.join(CONVERSATIONS)}), or text; this one has "
        f"{', '.join(map(str, row)) or 'nothing'}: say which is which with columns"
    )


# Files -----------------------------------------------------------------------


class Manifest:
    """The rows of one kind (None: of any) of a file of JSON lines, or of one JSON array of objects.

    Only the places of its rows are kept in memory. `limit`: stop after so many rows.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str | None = None,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
    ):
        self.path, self.columns = Path(path), columns or {}
        self.bad: list[BadRow] = []
        if not self.path.is_file():
            raise FileNotFoundError(f"no manifest at {path}")
        digest, others = hashlib.sha256(), Counter[str]()
        self.places: list[tuple[int, int, int]] = []  # (line, first byte, bytes)
        for line, first, text in self._entries():
            digest.update(text)
            try:
                found = kind_of(rename(json.loads(text), self.columns))
                if kind in (None, found):
                    self.places.append((line, first, len(text)))
                others[found] += 1
            except (ValueError, RecursionError) as error:
                self.bad.append(BadRow(str(self.path), line, f"{type(error).__name__}: {error}"))
            if limit is not None and len(self.places) >= limit:
                break
        self.fingerprint = digest.hexdigest()[:16]
        if not self.places:
            told = [f"{count} of kind {other}" for other, count in others.items()]
            told += [f"{len(self.bad)} bad ones, the first: {self.bad[0]}"] if self.bad else []
            raise ValueError(
                f"{path} has no good row of kind {kind or 'any'}; found {'; '.join(told) or 'no row'}"
            )

    def _entries(self) -> Iterator[tuple[int, int, bytes]]:
        """(line, first byte, bytes) of each object; of an array, the line is its place there."""
        with self.path.open("rb") as f:
            start = f.read(4096)
            if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
                raise ValueError(f"{self.path} is UTF-16 or binary; a manifest is JSON in UTF-8")
            if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*[{\]]", start) is None:
                f.seek(0)
                first = 0
                for number, line in enumerate(f, start=1):
                    if line.strip():
                        yield number, first, line.rstrip()
                    first += len(line)
                return
        # In Latin-1 a character is a byte, so that the decoder's places are places in the file.
        text, decoder = self.path.read_bytes().decode("latin-1"), json.JSONDecoder()
        first, number = text.index("["), 0
        while match := re.compile(r"[\[,]\s*(?=\{)").match(text, first):
            try:
                _, end = decoder.raw_decode(text, match.end())
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path} is a JSON array that is broken at entry {number + 1}: {error}"
                ) from None
            number += 1
            yield number, match.end(), text[match.end() : end].encode("latin-1")
            first = re.compile(r"\s*").match(text, end).end()
        if text[first : first + 1] not in ("]", "["):
            raise ValueError(f"{self.path} is a JSON array that is broken after entry {number}")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        line, first, count = self.places[index]
        with self.path.open("rb") as f:
            f.seek(first)
            return Row(str(self.path), line, json.loads(f.read(count)), self.path.parent)


class CaptionFolder:
    """Images below a folder, each with its captions in a text file of the same name, one a line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder at {path}")
        self.pairs: list[tuple[Path, Path]] = []
        self.bad: list[BadRow] = []
        digest = hashlib.sha256()
        found = (p for p in self.path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
        for image in sorted(found, key=lambda p: p.relative_to(self.path).parts):
            captions = [p for suffix in CAPTION_SUFFIXES if (p := image.with_suffix(suffix)).is_file()]
            if not captions:
                self.bad.append(BadRow(str(image), 0, f"no {image.stem}.txt with its caption beside it"))
                continue
            self.pairs.append((image, captions[0]))
            digest.update(f"{image.relative_to(self.path).as_posix()} {image.stat().st_size} ".encode())
            digest.update(captions[0].read_bytes())
        self.fingerprint = digest.hexdigest()[:16]
        if not self.pairs:
            raise ValueError(
                f"{path} has no image with a caption in a .txt file beside it; images without one: {len(self.bad)}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Row:
        image, caption = self.pairs[index]
        lines = caption.read_text(encoding="utf-8-sig").splitlines()
        values = {"image": str(image), "text": [line for line in lines if line.strip()]}
        return Row(str(caption), 0, values)


# Hugging Face datasets -----------------------------------------------------------------------


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "a source with `dataset` needs the package datasets: pip install 'janusflow-min[train]'"
        ) from None
    return datasets


def open_dataset(
    config: SourceConfig, skip_bad: bool
) -> tuple[list[tuple[Path | None, Any]], list[BadRow], str]:
    """[(folder, rows)] with images left encoded, the files that were left out, and a fingerprint.

    Files of one folder are opened together: paths in them count from there.
    """
    local = Path(config.dataset)
    if (local / "dataset_info.json").is_file() or (local / "state.json").is_file():
        rows = import_datasets().load_from_disk(config.dataset)
        parts, bad = [(local, rows.to_iterable_dataset() if config.streaming else rows)], []
        files = sorted(str(p) for p in local.rglob("*") if p.is_file())
    else:
        folders: dict[Path | None, list[str]] = (
            {} if config.files else {local if local.is_dir() else None: []}
        )
        for pattern in config.files:
            here = Path(pattern).is_absolute()  # what is not comes from the hub or the net
            found = sorted(glob.glob(pattern, recursive=True)) if here else [pattern]
            if not found:
                raise FileNotFoundError(f"files: nothing at {pattern}")
            for file in found:
                folders.setdefault(Path(file).parent if here else None, []).append(file)
        parts, bad = [], []
        for folder, names in folders.items():
            rows, left_out = load_files(config, names, skip_bad)
            parts += [(folder, rows)] if rows is not None else []
            bad += left_out
        files = [file for names in folders.values() for file in names]
        if not parts:
            raise ValueError(f"none of its files can be read; {bad[0]}")
    sizes = [(Path(f).name, Path(f).stat().st_size if Path(f).is_file() else 0) for f in files]
    lengths = [] if config.streaming else [len(rows) for _, rows in parts]
    fingerprint = hashlib.sha256(repr((config.dataset, config.subset, config.split, sizes, lengths)).encode())
    return [(folder, prepare(config, rows)) for folder, rows in parts], bad, fingerprint.hexdigest()[:16]


def load_files(config: SourceConfig, files: list[str], skip_bad: bool) -> tuple[Any, list[BadRow]]:
    """The rows of files, without those that cannot be read, which are looked for where opening all together fails."""

    def load(files: list[str]) -> Any:
        return import_datasets().load_dataset(
            config.dataset,
            config.subset or None,
            data_files=files or None,
            split=config.split,
            streaming=config.streaming,
        )

    try:
        return load(files), []
    except Exception as error:  # whatever the format's reader raises
        if not files or not skip_bad:
            raise ValueError(
                f"{', '.join(files[:3]) or config.dataset} cannot be opened: {cause(error)}"
            ) from error
    good, bad = [], []
    for file in files:
        try:
            rows = load([file])
            next(iter(rows), None)
            good.append(file)
        except Exception as error:
            bad.append(BadRow(file, 0, cause(error)))
    return load(good) if good else None, bad


def cause(error: BaseException) -> str:
    """What lies at the bottom of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def prepare(config: SourceConfig, rows: Any) -> Any:
    """Only the columns that are used, images in them undecoded. ValueError, naming the columns, where one lacks."""
    names = rows.column_names
    if names is None:  # a stream whose format does not say
        try:
            names = list(next(iter(rows), {}))
        except Exception:  # told when the stream is read
            return rows
    has = ", ".join(names)
    for ours, theirs in config.columns.items():
        if theirs not in names and theirs.split(".")[0] not in names:
            raise ValueError(f'columns.{ours} = "{theirs}": there is no such column; there are {has}')
    named = (set(names) - set(config.columns.values())) | set(config.columns)
    wanted = {"understanding": CONVERSATIONS, "generation": ("image", "text"), "text": ("text",)}[config.kind]
    missing = [key for key in wanted if key not in named]
    if len(missing) == (len(wanted) if config.kind == "understanding" else max(1, len(missing))):
        words = f"{' or '.join(missing)}: say with columns which it is"
        raise ValueError(f"the columns are {has}; there is no {words}")
    used = {*CONVERSATIONS, "image", "images", "text", *config.columns.values()}
    used |= {theirs.split(".")[0] for theirs in config.columns.values()}
    rows = rows.select_columns([name for name in names if name in used])
    for name, feature in (rows.features or {}).items():
        if (new := undecoded(feature)) != feature:
            rows = rows.cast_column(name, new)
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
    if isinstance(feature, datasets.Sequence) or type(feature).__name__ in ("List", "LargeList"):
        inner = undecoded(feature.feature)
        return feature if inner == feature.feature else type(feature)(inner)
    return feature


class Table:
    """Data sets on disk, one after another."""

    def __init__(self, name: str, parts: Sequence[tuple[Path | None, Any]]):
        self.name, self.parts = name, parts
        self.ends = list(accumulate(len(rows) for _, rows in parts))
        if not self.ends[-1]:
            raise ValueError(f"{name} has no rows")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        part = bisect.bisect_right(self.ends, index)
        folder, rows = self.parts[part]
        return Row(self.name, index + 1, rows[index - self.ends[part] + len(rows)], folder)


class Stream:
    """Data sets that can only be read on: shard after shard, epoch after epoch, rows shuffled in a buffer (0: not).

    A shard that breaks is read again from its start, up to where it broke; one that breaks there again is left, and
    its place taken by one bad row.
    """

    def __init__(self, name: str, parts: Sequence[tuple[Path | None, Any]], buffer: int, key: tuple):
        self.name, self.buffer, self.key = name, buffer, key
        counts = [(folder, rows, rows.n_shards) for folder, rows in parts]
        self.shards = [(*part, k) for part in counts for k in range(part[2])]
        self._restart()

    def _restart(self) -> None:
        self._rows, self._next, self._ahead = None, 0, {}

    def __getstate__(self) -> dict[str, Any]:  # an iterator stays behind; a worker starts its own
        return self.__dict__ | {"_rows": None, "_next": 0, "_ahead": {}}

    def row(self, position: int, keep: int) -> Row:
        """The row at a position; the rows from position `keep` on stay at hand, and nothing else does."""
        self._ahead = {p: row for p, row in self._ahead.items() if p >= keep}
        if position < self._next and position not in self._ahead:
            self._restart()
        if self._rows is None:
            self._rows = self._endless()
        while position not in self._ahead:
            row = next(self._rows)
            if self._next >= keep:
                self._ahead[self._next] = row
            self._next += 1
        return self._ahead[position]

    def _endless(self) -> Iterator[Row]:
        epoch = 0
        while True:
            last = None
            good = False
            for last in self._epoch(seeded_generator(*self.key, epoch)):
                good = good or not isinstance(last.values, Exception)
                yield last
            if not good:
                raise ValueError(f"{self.name} gives no rows{'; ' + str(last.values) if last else ''}")
            epoch += 1

    def _epoch(self, generator: torch.Generator) -> Iterator[Row]:
        if not self.buffer:
            for shard in self.shards:
                yield from self._shard(*shard)
            return
        held: list[Row] = []
        for index in torch.randperm(len(self.shards), generator=generator, device="cpu").tolist():
            for row in self._shard(*self.shards[index]):
                if len(held) < self.buffer:
                    held.append(row)
                    continue
                k = int(torch.randint(len(held), (1,), generator=generator, device="cpu"))
                yield held[k]
                held[k] = row
        for k in torch.randperm(len(held), generator=generator, device="cpu").tolist():
            yield held[k]

    def _shard(self, folder: Path | None, rows: Any, count: int, index: int) -> Iterator[Row]:
        if count > 1:
            from datasets.distributed import split_dataset_by_node

            rows = split_dataset_by_node(rows, rank=index, world_size=count)
        name = f"{self.name}, shard {index + 1} of {count}" if count > 1 else self.name
        done, broken_at = 0, -1
        while True:
            try:
                # Not `iter(rows)`, which in a data loader's worker gives that worker's shards alone.
                for batch in islice(rows.iter(batch_size=1), done, None):
                    done += 1
                    yield Row(name, done, {key: values[0] for key, values in batch.items()}, folder)
                return
            except Exception as error:  # whatever the format's reader or the net raises
                if broken_at == done:
                    reason = f"it cannot be read from here on: {cause(error)}"
                    yield Row(name, done + 1, ValueError(reason))
                    return
                broken_at = done


# Sources -----------------------------------------------------------------------


class Source:
    """Rows in the order that a run takes them: at any position from 0 up, drawn without replacement from the seed."""

    def __init__(self, config: SourceConfig, seed: int, key: str, skip_bad: bool = True):
        """key: which source of the run it is. ValueError, OSError where it has no rows that can be used."""
        self.config, self.seed, self.key = config, seed, key
        self.name = config.manifest or config.folder or config.dataset
        self.rows: Any
        if config.manifest:
            self.rows = Manifest(config.manifest, config.kind, config.columns)
        elif config.folder:
            self.rows = CaptionFolder(config.folder)
        if config.dataset:
            parts, self.bad, self.fingerprint = open_dataset(config, skip_bad)
            buffer = config.shuffle_buffer if config.shuffle else 0
            stream = config.streaming
            self.rows = Stream(self.name, parts, buffer, (seed, key)) if stream else Table(self.name, parts)
        else:
            self.bad, self.fingerprint = self.rows.bad, self.rows.fingerprint
        self._epoch, self._order = -1, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epoch": -1, "_order": None}

    def __len__(self) -> int:
        """Rows of an epoch; 0 for a stream, which does not know."""
        return 0 if self.config.streaming else len(self.rows)

    def __call__(self, position: int, keep: int | None = None) -> Row:
        """The row at a position; a stream holds the rows from `keep` on, so that they can be asked for again."""
        if self.config.streaming:
            row = self.rows.row(position, position if keep is None else keep)
        else:
            epoch, index = divmod(position, len(self.rows))
            if self.config.shuffle:
                if epoch != self._epoch:
                    generator = seeded_generator(self.seed, self.key, epoch)
                    self._epoch, self._order = (
                        epoch,
                        torch.randperm(len(self.rows), generator=generator, device="cpu"),
                    )
                index = int(self._order[index])
            try:
                row = self.rows[index]
            except Exception as error:  # the file changed, or whatever a reader raises
                row = Row(self.name, index + 1, error)
        if isinstance(row.values, Exception):
            return row
        return row._replace(values=rename(row.values, self.config.columns))


def open_sources(config: Config) -> list[Source]:
    """The sources of a run. Errors name the table of the configuration."""
    skip, found = config.loader.on_bad_row == "skip", []
    for i, source in enumerate(config.data):
        try:
            found.append(Source(source, config.seed, f"{i} {source.kind}", skip))
        except (ValueError, OSError) as error:
            raise type(error)(f"data.{i}: {error}") from error
    return found


def summarize(config: Config, sources: Iterable[Source]) -> list[dict[str, Any]]:
    """What a run would learn from, by source: kind, rows (None: a stream), bad rows, share of the samples, and a
    fingerprint of the data."""
    ratios = config.ratios()
    return [
        {
            "source": s.name,
            "kind": s.config.kind,
            "rows": len(s) or None,
            "bad": len(s.bad),
            "share": ratio / sum(ratios),
            "fingerprint": s.fingerprint,
        }
        for s, ratio in zip(sources, ratios, strict=True)
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
