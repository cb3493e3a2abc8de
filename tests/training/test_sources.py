# SPDX-License-Identifier: MIT
"""Every kind of source, and what a user's data may look like: the same rows for any workers, clear errors."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from janusflow_min.training import hf_rows
from janusflow_min.training.batch import StepBatches, StepDataset, load_steps
from janusflow_min.training.config import Config
from janusflow_min.training.dataset import Source, open_sources
from janusflow_min.training.hf_rows import Part, Stream
from janusflow_min.training.metrics import read_lines
from janusflow_min.training.sample import SampleBuilder
from janusflow_min.training.trainer import Trainer

ROWS = 23


@pytest.fixture
def dataset(settings, processor, model, datasets) -> Callable[..., StepDataset]:
    """The data of a configuration."""

    def make(rank: int = 0, world: int = 1, **changes: Any) -> StepDataset:
        config: Config = settings(**changes)
        return StepDataset(config, open_sources(config), SampleBuilder(config, processor, model), rank, world)

    return make


def png(colour: int | str) -> bytes:
    """An image that tells which row it is of."""
    buffer = io.BytesIO()
    rgb = (10 * colour, 5, 200) if isinstance(colour, int) else colour
    Image.new("RGB", (70, 66), rgb).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory, datasets) -> Path:
    """The same 23 captioned images in every form, tables and archives in two shards of unequal length."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"image": f"images/{i:02}.png", "text": f"row {i}"} for i in range(ROWS)]
    (folder / "images").mkdir()
    for i, row in enumerate(rows):
        (folder / row["image"]).write_bytes(png(i))
        (folder / row["image"]).with_suffix(".txt").write_text(row["text"])
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    halves = rows[:9], rows[9:]
    for k, half in enumerate(halves):
        (folder / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
        with (folder / f"{k}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, ("image", "text"))
            writer.writeheader()
            writer.writerows(half)
        encoded = {
            "image": [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in half],
            "text": [row["text"] for row in half],
        }
        table = datasets.Dataset.from_dict(encoded).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{k}.parquet")
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for row in half:
                for name in (row["image"], row["image"].replace(".png", ".txt")):
                    tar.add(folder / name, Path(name).name)
        if k:
            table.save_to_disk(folder / "saved")
    return folder


WEB = {"columns": {"image": "png", "text": "txt"}}
SOURCES: dict[str, dict[str, Any]] = {
    "manifest": {"manifest": "0.jsonl"},
    "array": {"manifest": "rows.json"},
    "folder": {"folder": "images"},
    "csv": {"dataset": "csv", "files": ["0.csv", "1.csv"]},
    "csv, streamed": {"dataset": "csv", "files": ["0.csv", "1.csv"], "streaming": True},
    "json": {"dataset": "json", "files": ["*.jsonl"]},
    "json, streamed": {"dataset": "json", "files": ["*.jsonl"], "streaming": True},
    "parquet": {"dataset": "parquet", "files": ["*.parquet"]},
    "parquet, streamed": {"dataset": "parquet", "files": ["*.parquet"], "streaming": True},
    "WebDataset": {"dataset": "webdataset", "files": ["*.tar"], **WEB},
    "WebDataset, streamed": {"dataset": "webdataset", "files": ["*.tar"], "streaming": True, **WEB},
    "saved": {"dataset": "saved"},
    "saved, streamed": {"dataset": "saved", "streaming": True},
}


def source_at(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The table of a source, its paths as a configuration's reader leaves them."""
    table = {"kind": "generation", **SOURCES[name], **changes}
    for key in ("manifest", "folder"):
        if key in table:
            table[key] = str(folder / table[key])
    if table.get("dataset") == "saved":
        table["dataset"] = str(folder / "saved")
    return table | ({"files": [str(folder / f) for f in table["files"]]} if "files" in table else {})


def opened(dataset, table: dict[str, Any], **changes: Any) -> Source:
    return dataset(data=[table], **changes).sources[0]


def digests(steps: Any) -> list[tuple]:
    """What each step holds, to the bit, and its bad rows."""
    found = []
    for data in steps:
        assert isinstance(data, StepBatches)
        content = hashlib.sha256()
        for batch in data.batches:
            for field in fields(batch):
                value = getattr(batch, field.name)
                content.update(field.name.encode() if value is None else value.numpy().tobytes())
        found.append((data.step, data.samples, data.tokens, tuple(data.bad), content.hexdigest()))
    return found


# Order -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_an_epoch_holds_every_row_once(dataset, files, name):
    """Stops: rows of a source that are never seen or seen twice, that come in file order though they are shuffled,
    whose image is another row's, or whose path counts from the caller's folder."""
    source = opened(dataset, source_at(files, name))
    count = {"manifest": 9, "saved": 14, "saved, streamed": 14}.get(name, ROWS)
    rows = [source(k) for k in range(2 * count)]
    texts = [str(row.values["text"]) for row in rows]
    assert len(set(texts[:count])) == count and sorted(texts[:count]) == sorted(texts[count:])
    assert texts[:count] != texts[count:]
    builder = dataset(data=[source_at(files, name)]).builder
    for row in rows[:3]:
        sample = builder(row.values, "generation", __import__("torch").Generator(), 0.0, row.folder)
        text = row.values["text"]
        text = text[0] if isinstance(text, list) else text
        assert int(sample.image[0, 0, 0]) == 10 * int(str(text).removeprefix("row "))
    again = opened(dataset, source_at(files, name))
    for k in (count + 2, count + 3, 1):
        assert again(k).values["text"] == rows[k].values["text"]
    plain = opened(dataset, source_at(files, name, shuffle=False))
    assert [plain(k).line for k in range(3)] == ([0, 0, 0] if name == "folder" else [1, 2, 3])


def test_workers_and_ranks_change_no_row(dataset, files):
    """Stops: a stream whose shards `datasets` shares out among the workers, rows that two ranks take, a run that
    learns other rows when it goes on with other workers: for every kind of source."""
    data = [source_at(files, name) for name in SOURCES]
    whole = dataset(data=data, batch=26, steps=8)
    expected = digests(load_steps(whole, range(8)))
    assert len(expected) == 8 and all(samples == 26 and not bad for _, samples, _, bad, _ in expected)
    one, two = ({"workers": n} for n in (1, 2))
    assert digests(load_steps(dataset(data=data, batch=26, steps=8, loader=two), range(8))) == expected
    assert digests(load_steps(dataset(data=data, batch=26, steps=8, loader=one), range(5, 8))) == expected[5:]
    for rank in range(2):
        alone = dataset(rank, 2, data=data, batch=26, steps=3)
        assert digests(load_steps(alone, range(3))) == digests(alone[step] for step in range(3))
    tokens = [
        sum(dataset(rank, 2, data=data, batch=26, steps=3)[k].tokens for rank in range(2)) for k in range(3)
    ]
    assert tokens == [row[2] for row in expected[:3]]


LAUNCH = """
import json, sys
from janusflow_min.training.config import Config
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer

if __name__ == "__main__":
    Trainer(read(Config, json.loads(sys.argv[1])), progress=False).run()
"""


@pytest.mark.slow
def test_two_ranks_with_any_workers_learn_what_one_learns(settings, files, tmp_path, datasets):
    """Stops: two ranks, or a run that goes on with other workers, that learn from other rows of any kind of source."""
    data = [source_at(files, name) for name in SOURCES]
    common = {"data": data, "batch": 26}
    Trainer(settings(tmp_path / "one", steps=4, **common), progress=False).run()
    expected = [row["loss"] for row in read_lines(tmp_path / "one" / "metrics.jsonl")]
    (tmp_path / "launch.py").write_text(LAUNCH)
    for workers in range(3):
        output = tmp_path / f"{workers} workers"
        for steps, count in ((2, workers), (4, (workers + 1) % 3)):
            config = settings(output, steps=steps, loader={"workers": count}, **common)
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
            ]
            command += [
                str(20_000 + os.getpid() % 20_000),
                str(tmp_path / "launch.py"),
                json.dumps(config.to_dict()),
            ]
            root = str(Path(__file__).parents[2])
            environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        losses = [row["loss"] for row in read_lines(output / "metrics.jsonl")]
        assert losses == pytest.approx(expected, rel=2e-4), workers
        assert not (output / "bad_rows.jsonl").exists()


# Faults -----------------------------------------------------------------------


def texts_of(source: Source, count: int) -> tuple[list[str], list[str]]:
    """Good rows and reasons of bad ones at the first positions."""
    rows = [source(k) for k in range(count)]
    good = [str(row.values["text"]) for row in rows if not isinstance(row.values, Exception)]
    return good, [f"{row.source}: {row.values}" for row in rows if isinstance(row.values, Exception)]


def test_a_stream_that_breaks_is_read_again(files, monkeypatch):
    """Stops: a bare StopIteration, rows lost or taken twice, or a run's end, where the net fails once."""

    class Rows:
        n_shards, broken = 1, 0

        def iter(self, batch_size: int):
            for i in range(9):
                if i in (4, 6) and self.broken < i:
                    Rows.broken = i
                    raise ConnectionError("the net is down")
                yield {"text": [f"row {i}"]}

    stream = Stream("s", [Part(None, Rows())], 0, (0, "a"))
    rows = [stream.row_at(k, k) for k in range(18)]
    assert [row.values["text"] for row in rows] == [f"row {i}" for i in range(9)] * 2


DAMAGED = [(name, how) for name in ("parquet", "json") for how in ("cut", "flipped")]
DAMAGED += [(f"{name}, streamed", how) for name, how in DAMAGED] + [("WebDataset, streamed", "cut")]


def test_a_stream_s_buffer_is_bounded(monkeypatch):
    """Stops: thousands of encoded images that every worker holds, and rows that large ones push out unread."""
    monkeypatch.setattr(hf_rows, "BUFFER_BYTES", 10_000)
    read, seen = [], []

    class Rows:
        n_shards = 1

        def iter(self, batch_size: int):
            for i in range(200):
                read.append(i)
                yield {"image": [{"bytes": bytes(1000 if i < 100 else 20), "path": None}], "text": [str(i)]}

    stream = hf_rows.Stream("s", [hf_rows.Part(None, Rows())], 50, (0, "a"))
    for k in range(200):
        seen.append(int(stream.row_at(k, k).values["text"]))
        assert len(read) - len(seen) <= (11 if len(read) < 100 else 50) and len(stream._held) == 1
    assert sorted(seen) == list(range(200)) and seen != sorted(seen)


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_file_is_left_out(dataset, files, tmp_path, name, damage):
    """Stops: a run that ends because one of its files is cut or damaged, or that does not tell which; and one that
    goes on though on_bad_row says stop."""
    suffix = {"p": "parquet", "W": "tar", "j": "jsonl"}[name[0]]
    for k in range(2):
        content = bytearray((files / f"{k}.{suffix}").read_bytes())
        if k and suffix == "tar":
            with tarfile.open(files / "1.tar") as tar:
                content = content[: tar.getmembers()[16].offset_data + 100]
        elif k and damage == "cut":
            content = content[: len(content) * 2 // 3]
        elif k:
            start = len(content) // 2 // 512 * 512
            content[start : start + 512] = bytes([255]) * 512
        (tmp_path / f"{k}.{suffix}").write_bytes(content)
    (tmp_path / "images").symlink_to(files / "images")
    table = source_at(tmp_path, name, files=[f"*.{suffix}"])
    table["files"] = [str(tmp_path / f"*.{suffix}")]
    source = opened(dataset, table)
    good, bad = texts_of(source, 60)
    told = [str(row) for row in source.bad] + bad
    assert {f"row {i}" for i in range(9)} <= set(good)
    assert told and ("1." + suffix in told[0] or "shard 2 of 2" in told[0]), told
    data = dataset(data=[table], batch=12)[2]
    assert data.samples == 12
    with pytest.raises(ValueError, match=r"data\.0|a bad row"):
        strict = dataset(data=[table], batch=12, loader={"workers": 0, "on_bad_row": "stop"})
        for step in range(4):
            strict[step]


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_but_damaged_files(dataset, tmp_path, streaming):
    """Stops: an endless search, or an error that does not say what is wrong with the files."""
    for k in range(2):
        (tmp_path / f"{k}.parquet").write_bytes(b"PAR1 and nothing else")
    table = source_at(tmp_path, "parquet, streamed", streaming=streaming)
    with pytest.raises(ValueError, match=r"data\.0: .*0\.parquet.*[Pp]arquet"):
        opened(dataset, table)


MANIFESTS: dict[str, tuple[bytes, list[str]]] = {
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), ["UTF-16", "UTF-8"]),
    "UTF-16 without a mark": ('{"text": "a"}\n'.encode("utf-16-le"), ["UTF-16", "UTF-8"]),
    "nested": (b"[" * 100_000, ["no good row", "line 1", "RecursionError"]),
    "metadata": (b'{"file_name": "a.png", "caption": "a cat"}\n', ["file_name, caption", "columns"]),
    "another kind": (b'{"conversation": []}\n' * 3, ["no good row of kind text", "3 of kind understanding"]),
    "broken array": (b'[{"text": "a"}, {"text": ]', ["JSON array", "entry 2"]),
    "cut array": (b'[{"text": "a"}, {"text": "b"}', ["JSON array", "entry 2"]),
    "empty array": (b"[]", ["no good row", "found no row"]),
    "empty": (b"", ["no good row", "found no row"]),
    "csv": (b"text\na cat\n", ["no good row", "line 1", "Expecting value"]),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_of_other_trainers(dataset, tmp_path, name):
    """Stops: "no good row, bad ones: 0" where the file could say what lies there and what to do."""
    (tmp_path / "a.jsonl").write_bytes(MANIFESTS[name][0])
    with pytest.raises(ValueError) as caught:
        opened(dataset, {"kind": "text", "manifest": str(tmp_path / "a.jsonl")})
    assert all(word in str(caught.value) for word in ["a.jsonl", *MANIFESTS[name][1]]), str(caught.value)


def test_rows_with_empty_values(dataset, tmp_path):
    """Stops: a table written as JSON lines, with null for what a row has not, whose rows are taken for another kind."""
    rows = [
        {"image": None, "text": "a", "conversation": None},
        {"image": "b.png", "text": "b", "conversation": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, line in (("text", 1), ("generation", 2)):
        source = opened(dataset, {"kind": kind, "manifest": str(tmp_path / "a.jsonl")})
        assert len(source) == 1 and source(0).line == line


def test_byte_order_marks_and_nested_lines_among_good_ones(dataset, tmp_path):
    """Stops: a whole manifest refused for a mark that Windows writes, or for one absurd line."""
    mark = b"\xef\xbb\xbf"
    lines = [
        mark + b'{"text": "one"}',
        b"[" * 100_000,
        mark + '{"text": "zwölf"}'.encode(),
        b'{"text": "b"}\r',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    source = opened(dataset, {"kind": "text", "manifest": str(tmp_path / "a.jsonl"), "shuffle": False})
    assert texts_of(source, 3)[0] == ["one", "zwölf", "b"] and [row.line for row in source.bad] == [2]
    (tmp_path / "b.json").write_bytes(mark + ' [ {"text": "zwölf"},\n{"text": "b"} ] '.encode())
    source = opened(dataset, {"kind": "text", "manifest": str(tmp_path / "b.json"), "shuffle": False})
    assert texts_of(source, 2)[0] == ["zwölf", "b"]


def test_columns_are_named(dataset, files, tmp_path):
    """Stops: a misspelt column that is noticed after a thousand rows, without the names there are; columns of a
    manifest without effect; a captions folder without captions that does not say so."""
    for name in ("csv", "csv, streamed", "WebDataset, streamed"):
        with pytest.raises(ValueError, match=r'data\.0: columns.image = "jpeg".*there are .*te?xt'):
            opened(dataset, source_at(files, name, columns={"image": "jpeg", "text": "txt"}))
    with pytest.raises(ValueError, match=r"data\.0: there is no column image, no text; .* of .*png, txt"):
        opened(dataset, source_at(files, "WebDataset, streamed", columns={}))
    with pytest.raises(ValueError, match="conversation or messages or conversations"):
        opened(dataset, source_at(files, "csv", kind="understanding"))
    with pytest.raises(FileNotFoundError, match=r"data\.0: files: nothing at .*none"):
        opened(dataset, source_at(files, "csv", files=["none-*.csv"]))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "info": {"caption": "a cat"}}\n')
    (tmp_path / "a.png").write_bytes(png(1))
    wrong = {"image": "file_name", "text": "infos.caption"}
    with pytest.raises(ValueError, match=r'columns.text = "infos.caption".* there are file_name, info'):
        opened(
            dataset, {"kind": "generation", "manifest": str(tmp_path / "metadata.jsonl"), "columns": wrong}
        )
    columns = {"image": "file_name", "text": "info.caption"}
    table = {"kind": "generation", "manifest": str(tmp_path / "metadata.jsonl"), "columns": columns}
    data = dataset(data=[table], batch=1)[0]
    assert data.samples == 1 and not data.bad
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "b.txt").write_bytes("a cat".encode("utf-16"))
    row = opened(dataset, {"kind": "generation", "folder": str(tmp_path)})(0)
    assert row.source.endswith("b.txt") and "not text in UTF-8" in str(row.values)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"no image with a caption .*\.txt.* without one: 2"):
        opened(dataset, {"kind": "generation", "folder": str(tmp_path)})


def test_a_table_is_opened_quietly(dataset, files, datasets, capfd, monkeypatch, tmp_path):
    """Stops: progress bars of `datasets` in a batch job's log, or switched off for whoever uses it afterwards."""
    from datasets.utils import are_progress_bars_disabled

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    opened(dataset, source_at(files, "csv"))
    assert capfd.readouterr().err == "" and not are_progress_bars_disabled()


@pytest.mark.parametrize("streaming", [False, True])
def test_archives_whose_entries_differ(dataset, tmp_path, streaming):
    """Stops: the rest of a shard lost behind an entry whose JSON has a key more, or none."""
    notes = [{"caption": f"row {i}"} for i in range(8)]
    notes += [{"caption": "row 8", "extra": 1}, {"caption": "row 9", "extra": "x"}, {}, {"caption": "row 11"}]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, note in enumerate(notes):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.json", json.dumps(note).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    table = {
        "kind": "generation",
        "dataset": "webdataset",
        "files": [str(tmp_path / "a.tar")],
        "shuffle": False,
    }
    columns = {"image": "png", "text": "json.caption"}
    source = opened(dataset, table | {"streaming": streaming, "columns": columns})
    texts = [source(k).values["text"] for k in range(12)]
    assert texts == [note.get("caption") for note in notes]


def test_saved_splits_and_folders_of_images(dataset, files, tmp_path, datasets):
    """Stops: what `save_to_disk` writes of several splits, or an image folder with its metadata, that cannot be read;
    paths from Python, relative to where it runs, that are taken for the hub's."""
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(7), "path": None}], "text": ["row 7"]})
    splits = datasets.DatasetDict({"train": table, "test": table})
    splits.save_to_disk(tmp_path / "splits")
    source = {"kind": "generation", "dataset": str(tmp_path / "splits")}
    assert opened(dataset, source | {"split": "test"})(3).values["text"] == "row 7"
    with pytest.raises(ValueError, match=r"data\.0: .*splits cannot be opened: KeyError: 'none'"):
        opened(dataset, source | {"split": "none"})
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(3))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "row 3"}\n')
    for streaming in (False, True):
        data = [{"kind": "generation", "dataset": str(folder), "streaming": streaming}]
        data = dataset(data=data, batch=1)[0]
        assert data.samples == 1 and not data.bad and int(data.batches[0].images[0, 0, 0, 0]) == 30
    with pytest.raises(FileNotFoundError, match=r"data\.0: no manifest at .*photos; it is a folder"):
        opened(dataset, {"kind": "generation", "manifest": str(folder)})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_looks_like_a_pattern(dataset, tmp_path, streaming):
    """Stops: a file in a folder "d[1]" that is not found, or whose stream is silently empty."""
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]" / "a.csv").write_text("text\nrow\n")
    table = {
        "kind": "text",
        "dataset": "csv",
        "files": [str(tmp_path / "d[1]" / "a.csv")],
        "streaming": streaming,
    }
    assert opened(dataset, table)(0).values["text"] == "row"


def test_relative_files_count_from_here(dataset, files, monkeypatch):
    """Stops: a table that is opened from Python by a relative path, whose images are then looked for elsewhere."""
    monkeypatch.chdir(files)
    table = {"kind": "generation", "dataset": "csv", "files": ["0.csv"]}
    data = dataset(data=[table], batch=4)[0]
    assert data.samples == 4 and not data.bad


def test_a_row_that_lacks_a_value_names_those_it_has(dataset, tmp_path):
    """Stops: "1,000 bad rows, got None" for a manifest whose captions have another name."""
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a cat"}\n')
    table = {"kind": "generation", "manifest": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match="there is no text, but image, caption; say with columns"):
        dataset(data=[table])[0]


def test_a_data_set_of_several_configurations(dataset, tmp_path):
    """Stops: data that cannot be named, or an error without the names there are."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"
    )
    for name in ("en", "de"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    table = {"kind": "text", "dataset": str(tmp_path)}
    assert opened(dataset, table | {"subset": "de"})(0).values["text"] == "de"
    with pytest.raises(ValueError, match=r"data\.0.*(?s:.*)en.*de"):
        opened(dataset, table)
