# SPDX-License-Identifier: MIT
"""Rows to samples to micro-batches: sources, mixing, bad rows, padding, the cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from janusflow_min.training.batch import StepDataset, bucket
from janusflow_min.training.config import SourceConfig
from janusflow_min.training.dataset import Mixture, Source, open_sources
from janusflow_min.training.rows import Manifest, seeded_generator
from janusflow_min.training.sample import Cache, Sample, SampleBuilder, square


def steps_of(config, processor, model, rank=0, world=1, cache=None) -> StepDataset:
    return StepDataset(
        config, open_sources(config), SampleBuilder(config, processor, model, cache), rank, world
    )


# Mixing -----------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(21, 70, 9), (1, 1), (0.5, 0.3, 0.2), (50, 50, 0), (1,), (0.001, 1)])
def test_sources_take_turns_by_their_ratios(ratios):
    """Stops: rows left out or taken twice, a source that waits for long, a source of share 0 that is used."""
    mixture, taken = Mixture(ratios), Counter()
    for slot in range(1000):
        source, position = mixture(slot)
        assert position == taken[source]
        taken[source] += 1
        for k, ratio in enumerate(ratios):
            assert abs(taken[k] - (slot + 1) * ratio / sum(ratios)) <= len(ratios)


def test_an_early_mix_hands_over():
    """Stops: rows taken twice, or left out, where the first mix of a stage ends."""
    mixture, taken = Mixture((14, 80, 6), early=(30, 50, 20), early_samples=100), Counter()
    for slot in range(300):
        source, position = mixture(slot)
        assert position == taken[source]
        taken[source] += 1
        if slot == 99:
            assert [taken[k] for k in range(3)] == [30, 50, 20]


def test_a_mix_without_any_of_the_sources_is_refused():
    """Stops: a run of stage 1 over text alone, which that stage has none of."""
    with pytest.raises(ValueError, match="ratio"):
        Mixture((0, 0))


def test_epochs_take_every_row_once(manifest):
    """Stops: rows that are never seen, the same order in every epoch or for every seed."""
    config = SourceConfig("generation", manifest=str(manifest))
    source, other = Source(config, 0, "a"), Source(config, 1, "a")
    orders = [[source(k).line for k in range(12 * e, 12 * e + 12)] for e in range(3)]
    assert all(sorted(order) == list(range(1, 13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and orders[0] != [other(k).line for k in range(12)]
    assert source(5).line == orders[0][5]  # and back again


def test_ranks_share_a_step(settings, processor, model):
    """Stops: draws that depend on the number of GPUs, rows that two of them take."""
    config = settings(batch=7)
    whole = steps_of(config, processor, model)[3]
    parts = [steps_of(config, processor, model, rank, 2)[3] for rank in range(2)]
    assert whole.samples == 7 and [p.samples for p in parts] == [4, 3]
    for name in ("t", "noise", "labels", "images"):
        values = [
            sorted(float(x.double().sum()) for data in datas for b in data.batches
                   for x in (getattr(b, name) if getattr(b, name) is not None else []))
            for datas in ([whole], parts)
        ]  # fmt: skip
        assert values[0] == pytest.approx(values[1]) and values[0]
    assert sum(p.tokens for p in parts) == whole.tokens


# Bad rows -----------------------------------------------------------------------

SPECIAL = "<｜end▁of▁sentence｜>"
BAD = {
    "not json": '{"image": ',
    "no kind": '{"caption": "a cat"}',
    "a list": "[1]",
    "no file": '{"image": "none.png", "text": "a cat"}',
    "broken image": '{"image": "broken.png", "text": "a cat"}',
    "empty prompt": '{"image": "0.png", "text": " "}',
    "special": json.dumps({"image": "0.png", "text": SPECIAL}),
    "two placeholders": json.dumps(
        {
            "conversation": [
                {"role": "User", "content": "<image_placeholder>" * 2, "images": ["0.png"]},
                {"role": "Assistant", "content": "yes"},
            ]
        }
    ),
    "no placeholder": json.dumps(
        {
            "conversation": [
                {"role": "User", "content": "What?", "images": ["0.png"]},
                {"role": "Assistant", "content": "yes"},
            ]
        }
    ),
    "empty answer": json.dumps(
        {"conversation": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": " "}]}
    ),
    "no answer": json.dumps({"conversation": [{"role": "User", "content": "a"}]}),
    "a role": json.dumps({"conversation": [{"role": "Robot", "content": "a"}]}),
    "no messages": '{"conversation": "hello"}',
    "too long": json.dumps({"text": "word " * 2000}),
}
WORDS = {
    "not json": "Expecting",
    "no kind": "this one has caption",
    "a list": "a row is an object",
    "no file": "no image file",
    "broken image": "cannot be",
    "empty prompt": "must be text",
    "special": "special tokens",
    "two placeholders": "2 image placeholders, but 1 images",
    "no placeholder": "0 image placeholders, but 1 images",
    "empty answer": "empty answer",
    "no answer": "no answer",
    "a role": "role",
    "no messages": "a conversation",
    "too long": "too long",
}


@pytest.fixture
def dirty(tmp_path, manifest) -> Path:
    """Good rows of all kinds, and after them every bad one."""
    Image.new("RGB", (80, 70), "red").save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    good = [
        {"image": "0.png", "text": "a cat"},
        {"text": "hello"},
        {"conversation": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]},
    ]
    lines = [json.dumps(row) for row in good] + list(BAD.values())
    path = tmp_path / "dirty.jsonl"
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_bad_rows_are_told_and_replaced(settings, processor, model, dirty):
    """Stops: a run that dies of one bad row among a million, or that hides which row it was and why."""
    kinds = ("generation", "understanding", "text")
    config = settings(data=[{"kind": k, "manifest": str(dirty), "ratio": 1} for k in kinds], batch=12)
    steps = steps_of(config, processor, model)
    bad = [row for source in steps.sources for row in source.bad]
    for step in range(3):
        data = steps[step]
        assert data.samples == 12
        bad += data.bad
    reasons = {row.line: row.reason for row in bad}
    for k, name in enumerate(BAD, start=4):
        assert WORDS[name] in reasons.get(k, ""), (name, reasons.get(k))
    assert set(reasons) == set(range(4, 4 + len(BAD)))


def test_a_bad_row_stops_the_run_when_asked(settings, processor, model, dirty):
    """Stops: on_bad_row = "stop" that goes on."""
    data = [{"kind": "text", "manifest": str(dirty)}]
    config = settings(data=data, batch=12, loader={"workers": 0, "on_bad_row": "stop"})
    with pytest.raises(ValueError, match=r"dirty.jsonl, line 17: .*too long"):
        steps_of(config, processor, model)[0]


def test_a_source_without_a_good_row_is_an_error(settings, processor, model, tmp_path):
    """Stops: an endless search for a row that can be used."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": ""}\n')
    config = settings(data=[{"kind": "text", "manifest": str(path), "ratio": 1}])
    with pytest.raises(ValueError, match="1,000 bad rows"):
        steps_of(config, processor, model)[0]
    with pytest.raises(ValueError, match="no good row"):
        Manifest(path, "generation")


# Padding -----------------------------------------------------------------------


def test_padding_stays_under_a_tenth(settings, processor, model, manifest):
    """Stops: short texts padded to the length of a picture."""
    kinds = ("understanding", "generation", "text")
    for batch, micro in ((32, 8), (9, 16), (64, 64)):
        config = settings(
            data=[
                {"kind": k, "manifest": str(manifest), "ratio": r}
                for k, r in zip(kinds, (21, 70, 9), strict=True)
            ],
            batch=batch,
            micro_batch=micro,
        )
        steps = steps_of(config, processor, model)
        tokens = places = 0
        for step in range(4):
            data = steps[step]
            assert data.samples == batch and all(len(b.input_ids) <= micro for b in data.batches)
            tokens, places = tokens + data.tokens, places + data.padded_tokens
        assert 1 - tokens / places < 0.1
    lengths = torch.randint(1, 4096, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = bucket([Sample("text", [0] * n) for n in lengths], 16)
    assert sorted(len(s.ids) for g in groups for s in g) == sorted(lengths)
    for group in groups:
        area = len(group) * max(len(s.ids) for s in group)
        assert area - sum(len(s.ids) for s in group) <= 0.1 * area and len(group) <= 16


# Pictures -----------------------------------------------------------------------


def test_squares(processor):
    """Stops: a stretched picture, a crop that is always the middle, or one outside the picture."""
    wide = Image.new("RGB", (300, 100), "blue")
    wide.paste("red", (0, 0, 100, 100))
    middle = square(wide, 64, None)
    assert middle.size == (64, 64) and middle.getpixel((32, 32)) == (0, 0, 255)
    crops = [square(wide, 64, seeded_generator(0, i)) for i in range(40)]
    shares = {sum(c.getpixel((x, 32))[0] > 128 for x in range(64)) for c in crops}
    assert len(shares) > 5 and all(c.size == (64, 64) for c in crops)
    assert square(wide, 64, seeded_generator(3)).tobytes() == square(wide, 64, seeded_generator(3)).tobytes()


def test_the_cache_knows_its_pictures_and_weights(tmp_path):
    """Stops: latents of another picture or encoder, and a damaged file that is believed."""
    cache, other = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert len({cache.key(red), cache.key(blue), other.key(red)}) == 3
    key = cache.key(red)
    assert cache.get(key) == {}
    cache.put(key, {"latents": torch.arange(4.0)})
    assert torch.equal(cache.get(key)["latents"], torch.arange(4.0))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{key}.safetensors"]
    path = cache.path(key)
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.get(key) == {}


# Datasets -----------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(settings, processor, model, tmp_path, manifest, streaming, datasets):
    """Stops: columns under other names, undecoded images or streams that cannot be read on from a position."""
    picture = (manifest.parent / "0.png").read_bytes()
    rows = {"jpg": [{"bytes": picture, "path": None}] * 7, "txt": [f"row {i}" for i in range(7)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    source = {
        "kind": "generation",
        "dataset": "parquet",
        "files": [str(tmp_path / "a.parquet")],
        "columns": {"image": "jpg", "text": "txt"},
        "streaming": streaming,
    }
    config = settings(data=[source])
    steps = steps_of(config, processor, model)
    texts = [steps.sources[0](k).values["text"] for k in range(14)]
    assert sorted(texts[:7]) == sorted(texts[7:]) == sorted(rows["txt"]) and texts[:7] != texts[7:]
    again = steps_of(config, processor, model)
    assert [again.sources[0](k).values["text"] for k in (9, 10, 3)] == [texts[9], texts[10], texts[3]]
    data = steps[1]
    assert data.samples == 6 and not data.bad and data.batches[0].images is not None


def test_webdataset(settings, processor, model, tmp_path, manifest, datasets):
    """Stops: shards whose pictures or texts come as bytes that nobody decodes."""
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(3):
            (tmp_path / f"{i}.txt").write_text(f"row {i}")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
            tar.add(manifest.parent / f"{i}.png", f"{i}.png")
    source = {
        "kind": "generation",
        "dataset": "webdataset",
        "files": [str(tmp_path / "shard.tar")],
        "columns": {"image": "png", "text": "txt"},
        "streaming": True,
    }
    steps = steps_of(settings(data=[source]), processor, model)
    data = steps[0]
    assert data.samples == 6 and not data.bad
