# SPDX-License-Identifier: MIT
"""Rows of training data as they are read: from JSON lines, and from folders of captioned images.

What a row may look like is in `sample.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

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
        return f"{self.source}{f', line {self.line}' if self.line else ''}: {self.reason}"


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


def check_columns(columns: Mapping[str, str], names: Sequence[str]) -> None:
    """ValueError for a column that the data do not have; without names nothing is known."""
    for ours, theirs in columns.items() if names else ():
        if theirs not in names and theirs.split(".")[0] not in names:
            raise ValueError(
                f'columns.{ours} = "{theirs}": there is no such column; there are {", ".join(names)}'
            )


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of sample that a row makes. ValueError where it makes none."""
    for kind, keys in (("understanding", CONVERSATIONS), ("generation", ("image",)), ("text", ("text",))):
        if any(row.get(key) is not None for key in keys):
            return kind
    raise ValueError(
        f"a row has image and text, a conversation ({', '.join(CONVERSATIONS)}), or text; this one has "
        f"{', '.join(k for k in row if row[k] is not None) or 'nothing'}: say which is which with columns"
    )


def cause(error: BaseException) -> str:
    """What lies at the bottom of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


# Files -----------------------------------------------------------------------


class Manifest:
    """The rows of one kind (None: of any) of a file of JSON lines, or of one JSON array of objects.

    Only the places of its rows are kept in memory. limit: stop after so many rows. Raises FileNotFoundError, and
    ValueError, which says what was found, where there is no row.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str | None = None,
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
    ):
        self.path, self.bad = Path(path), list[BadRow]()
        if not self.path.is_file():
            hint = "; it is a folder, which the key `folder` takes" if self.path.is_dir() else ""
            raise FileNotFoundError(f"no manifest at {path}{hint}")
        digest, kinds, keys, places = hashlib.sha256(), Counter[str](), dict[str, None](), []
        for line, first, text in self._entries():
            digest.update(text)
            try:
                row = json.loads(text)
                named = rename(row, columns or {})
                keys |= dict.fromkeys(row)
                found = kind_of(named)
                kinds[found] += 1
                if kind in (None, found):
                    places.append((line, first, len(text)))
            except (ValueError, RecursionError) as error:
                self.bad.append(BadRow(str(self.path), line, cause(error)))
            if limit is not None and len(places) >= limit:
                break
        check_columns(columns or {}, list(keys))
        self.fingerprint = digest.hexdigest()[:16]
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)  # (rows; line, first byte, bytes)
        if not places:
            known = [f"{count} of kind {other}" for other, count in kinds.items()]
            known += [f"{len(self.bad)} bad ones, the first: {self.bad[0]}"] if self.bad else []
            raise ValueError(
                f"{path} has no good row of kind {kind or 'any'}; found {'; '.join(known) or 'no row'}"
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
        text, decoder, number = self.path.read_bytes().decode("latin-1"), json.JSONDecoder(), 0
        place = text.index("[")
        between, end = re.compile(r"\s*[\[,]\s*(?=\{)"), re.compile(r"\[?\s*\]")
        while match := between.match(text, place):
            number += 1
            try:
                _, place = decoder.raw_decode(text, match.end())
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path} is a JSON array that is broken at entry {number}: {error}"
                ) from None
            yield number, match.end(), text[match.end() : place].encode("latin-1")
        if end.match(text, place) is None:
            raise ValueError(f"{self.path} is a JSON array that is broken after entry {number}")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        line, first, count = self.places[index].tolist()
        with self.path.open("rb") as f:
            f.seek(first)
            return Row(str(self.path), line, json.loads(f.read(count)), self.path.parent)


class CaptionFolder:
    """Images below a folder, each with its captions in a text file of the same name, one a line."""

    def __init__(self, path: str | Path):
        self.path, self.bad = Path(path), list[BadRow]()
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder at {path}")
        self.pairs: list[tuple[Path, Path]] = []
        digest = hashlib.sha256()
        found = (p for p in self.path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
        for image in sorted(found, key=lambda p: p.relative_to(self.path).parts):
            captions = [p for suffix in CAPTION_SUFFIXES if (p := image.with_suffix(suffix)).is_file()]
            if captions:
                self.pairs.append((image, captions[0]))
                digest.update(f"{image.relative_to(self.path).as_posix()} {image.stat().st_size} ".encode())
                digest.update(captions[0].read_bytes())
            else:
                self.bad.append(BadRow(str(image), 0, f"no {image.stem}.txt with its caption beside it"))
        self.fingerprint = digest.hexdigest()[:16]
        if not self.pairs:
            raise ValueError(
                f"{path} has no image with a caption in a .txt file beside it; images without one: {len(self.bad)}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Row:
        image, caption = self.pairs[index]
        try:
            lines = caption.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            return Row(str(caption), 0, ValueError(f"it is not text in UTF-8: {error}"))
        return Row(str(caption), 0, {"image": str(image), "text": [line for line in lines if line.strip()]})
