# SPDX-License-Identifier: MIT
"""What is looked at before a run loads anything, and what its folder tells the next run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import janusflow_min as jf
from janusflow_min import cli
from janusflow_min.config import JanusFlowConfig
from janusflow_min.model import JanusFlow
from janusflow_min.official import from_official
from janusflow_min.training import checkpoints, trainer
from janusflow_min.training.check import check, compare, estimate
from janusflow_min.training.config import Config
from janusflow_min.training.metrics import read_lines
from janusflow_min.training.prepare import trainable
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer


@pytest.fixture
def never_loaded(monkeypatch):
    """Whatever is refused is refused before weights are read."""
    monkeypatch.setattr(trainer, "load_model", lambda *a, **k: pytest.fail("weights were read"))


WRONG = [  # change of the settings, words of the error
    ({"report": {"every": 1, "prompts": ["a cat", " "]}}, ["report.prompts.1", "must be text"]),
    (
        {"report": {"every": 1, "prompts": ["a <image_placeholder>"]}},
        ["report.prompts.0", "image_placeholder"],
    ),
    ({"report": {"every": 1, "questions": [""]}}, ["report.questions.0", "no image"]),
    (
        {"report": {"every": 1, "questions": ["a", "b"], "images": ["", "no.png"]}},
        ["report.images.1", "no.png"],
    ),
    ({"report": {"every": 1, "validation": "no.jsonl"}}, ["no.jsonl"]),
    ({"report": {"every": 1, "prompts": ["cat " * 20_000]}}, ["report.prompts.0", "tokens long"]),
    ({"report": {"every": 1, "questions": ["why " * 20_000]}}, ["report.questions.0", "positions"]),
    ({"lora": {"rank": 4, "targets": ["q_proj", "querry"]}}, ["lora.targets", "querry", "k_proj"]),
    ({"objective": {"alignment_layer": 9}}, ["objective.alignment_layer", "1 to "]),
    ({"model": "nowhere"}, ["nowhere"]),
    ({"vae": "nowhere/at/all"}, ["nowhere/at/all"]),
    ({"steps": None, "epochs": -1.0}, ["epochs", "above 0"]),
    ({"report": {"tracker": "wandb"}}, ["report.tracker", "pip install wandb"]),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_mistakes_are_found_before_anything_loads(settings, change, words, never_loaded, monkeypatch):
    """Stops: a run that ends at its first report, 1,000 steps on, by a file or a prompt that was wrong all along."""
    if "lora" in change:
        pytest.importorskip("peft")
    monkeypatch.setattr("janusflow_min.training.check.find_spec", lambda name: None)
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        Trainer(settings(**change), progress=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(settings, tmp_path, never_loaded):
    """Stops: hours of training that end at the first checkpoint."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for change in ({"output": str(closed / "run")}, {"loader": {"cache": str(closed), "crop": "fixed"}}):
        with pytest.raises(PermissionError):
            Trainer(settings(**change), progress=False)


def test_an_output_that_is_a_file_is_refused(settings, tmp_path, never_loaded):
    """Stops: the same, where a file lies in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output"):
        Trainer(settings(tmp_path / "file" / "run"), progress=False)


def test_a_plan_says_what_a_run_would_do(settings, manifest, never_loaded):
    """Stops: a dry run whose counts, shares, parameters or epochs are not the run's."""
    data = [{"kind": kind, "manifest": str(manifest)} for kind in ("generation", "understanding")]
    plan = check(settings(data=data, steps=None, epochs=3.0, batch=4, stage="adaptation"))
    # 12 and 8 rows, half of the samples each: the 12 are read three times after 72 samples.
    assert plan.config.steps == 18 and plan.epochs(18) == pytest.approx(3.0)
    model = jf.load(settings().model, device="cpu", progress=False).model
    count = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("llm", "siglip")}
    assert plan.frozen["llm"] == count["llm"] and plan.frozen["siglip"] == count["siglip"]
    assert plan.trained["uvit_decoder"] == sum(p.numel() for p in model.uvit_decoder.parameters())
    text = str(plan)
    assert (
        "12 rows, 50.0% of the samples" in text and "18 of 4 samples, 3.0 epochs" in text and "memory" in text
    )


def test_a_plan_counts_lora_s_parameters(settings, never_loaded):
    """Stops: adapters counted as the weights that they adapt."""
    pytest.importorskip("peft")
    plan, adapted = check(settings()), check(settings(lora={"rank": 4}))
    assert 0 < adapted.trained["llm"] < plan.trained["llm"] == adapted.frozen["llm"]
    assert sum(adapted.memory.values()) < sum(plan.memory.values())


MEASURED = {  # GiB at the official size on one H100, batches of 8: docs/finetuning.md
    38.3: dict(objective={"alignment_weight": 0.0}, optimizer={"ema_decay": 0.0}),
    35.1: dict(objective={"alignment_weight": 0.0}, optimizer={"ema_decay": 0.0}, compile=True),
    42.8: dict(compile=True),
    9.9: dict(
        objective={"alignment_weight": 0.0},
        optimizer={"ema_decay": 0.0},
        lora={"rank": 16},
        gradient_checkpointing=True,
        compile=True,
    ),
}


@pytest.mark.parametrize("gib", MEASURED)
def test_the_memory_estimate_is_what_was_measured(gib, tmp_path):
    """Stops: an estimate that forgets the moments, the average or the frozen weights."""
    pytest.importorskip("peft")
    data = [{"kind": "generation", "manifest": "a"}]
    settings = {"data": data, "batch": 8, "micro_batch": 8, "device": "cpu", "dtype": "bfloat16"}
    config = read(Config, settings | MEASURED[gib])
    with torch.device("meta"):
        model = JanusFlow(JanusFlowConfig())
    loss, rates = trainable(config, model)
    parameters = dict(loss.named_parameters())
    trained = sum(p.numel() for name, p in parameters.items() if rates[name])
    frozen = sum(p.numel() for name, p in parameters.items() if not rates[name])
    assert sum(estimate(config, model, trained, frozen, 1).values()) == pytest.approx(gib, rel=0.03)


def test_what_has_no_effect_is_said(settings, manifest):
    """Stops: settings that are read over, and parts that no sample trains."""
    lonely = [{"kind": "text", "manifest": str(manifest)}]
    notes = {
        "without lora.rank": {"lora": {"alpha": 8.0}},
        "min_lr_ratio": {"optimizer": {"min_lr_ratio": 0.1}},
        "warm-up of 9": {"optimizer": {"warmup": 9}},
        "report.every = 0": {"report": {"prompts": ["a cat"]}},
        "no sample trains gen_aligners": {"data": lonely},
        "alignment_head has no effect": {
            "objective": {"alignment_weight": 0.0},
            "optimizer": {"lr_by_component": {"alignment_head": 1e-3}},
        },
        "data.2 is never read": {"stage": "adaptation"},
    }
    assert check(settings()).notes == []
    for words, change in notes.items():
        assert any(words in note for note in check(settings(**change)).notes), words


def test_an_adapter_that_is_not_all_that_was_trained_is_said(settings):
    """Stops: an adapter that is loaded without the parts that were trained beside it."""
    pytest.importorskip("peft")
    notes = check(settings(lora={"rank": 2})).notes
    assert any("gen_aligners, uvit_encoder, uvit_decoder, which train whole" in note for note in notes)


def test_the_dry_run_writes_nothing(settings, tmp_path, manifest, capsys, monkeypatch):
    """Stops: a dry run that leaves a folder, or that is none."""
    path = tmp_path / "a.toml"
    path.write_text(
        f'output = "out"\ndevice = "cpu"\nsteps = 3\n[objective]\nalignment_layer = 2\n[[data]]\nkind = "text"\n'
        f"manifest = {json.dumps(str(manifest))}\nratio = 1\n"
    )
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    assert "6 rows" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["a.toml"]


# The next run in the same folder -----------------------------------------------------------------------


def run(config, **options) -> Path:
    return Trainer(config, progress=False, **options).run()


def test_settings_that_decide_nothing_may_change(settings, tmp_path, monkeypatch):
    """Stops: a run that cannot go on because of a smaller micro-batch, a new number of workers or another folder."""
    run(settings(steps=2))
    changed = settings(
        micro_batch=2,
        gradient_checkpointing=True,
        loader={"workers": 0, "on_bad_row": "stop", "timeout": 99, "max_padding": 0.5},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(changed), "__hash__", None)
    relative = {"output": os.path.relpath(changed.output), "model": os.path.relpath(changed.model)}
    data = [{"kind": s.kind, "manifest": os.path.relpath(s.manifest)} for s in changed.data]
    run(settings(**relative, data=data, steps=4))
    run(changed)
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_other_data_are_noticed(settings, tmp_path, manifest):
    """Stops: a run that goes on with other rows under the old name."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = manifest.read_text().splitlines()
    (folder / "text.jsonl").write_text("\n".join(rows[20:]) + "\n")
    data = [{"kind": "text", "manifest": str(folder / "text.jsonl"), "ratio": 1}]
    run(settings(data=data, steps=2))
    moved = folder.rename(tmp_path / "moved")
    data[0]["manifest"] = str(moved / "text.jsonl")
    run(settings(data=data, steps=3))  # the same data elsewhere
    (moved / "text.jsonl").write_text("\n".join(rows[20:24]) + "\n")
    with pytest.raises(ValueError, match=r"data\.0 .*different data"):
        run(settings(data=data))


def test_what_changes_the_rates_is_said(settings):
    """Stops: a cosine that silently bends to another end."""
    first, longer = (settings(steps=n, optimizer={"schedule": "cosine", "warmup": n // 2}) for n in (4, 8))
    about = {"config": json.loads(json.dumps(first.to_dict()))}
    sources = check(first).sources
    assert compare(about, first, sources) == []
    said = compare(about, longer, sources)
    assert len(said) == 2 and "warmup was 2, is 4" in said[0] and "steps was 4, is 8" in said[1]


def test_older_checkpoints_stay_usable(settings):
    """Stops: a new setting with a default that makes every earlier checkpoint another run's."""
    config = settings()
    old = json.loads(json.dumps(config.to_dict()))
    for table, key in (("optimizer", "weight_decay"), ("lora", "dora"), ("objective", "flow_weighting")):
        del old[table][key]
    del old["data"][0]["shuffle"]
    assert compare({"config": old}, config, check(config).sources) == []
    changed = settings(optimizer={"weight_decay": 0.1})
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay was 0\.0, is 0\.1"):
        compare({"config": old}, changed, check(changed).sources)


def test_two_runs_do_not_share_a_folder(settings, tmp_path):
    """Stops: two runs that mix their lines and checkpoints; a lock that outlives its process."""
    first = Trainer(settings(), progress=False)
    with pytest.raises(RuntimeError, match=f"another run .*{os.getpid()}"):
        Trainer(settings(), progress=False)
    first.run()
    run(settings())
    code = (
        "import sys; from pathlib import Path; from janusflow_min.training.checkpoints import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    path = os.pathsep.join([str(Path(jf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RuntimeError, match="another run"):
        Trainer(settings(), progress=False)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run(settings())


def test_a_fresh_run_keeps_the_old_checkpoints_until_it_has_its_own(settings, tmp_path, monkeypatch):
    """Stops: --fresh with a typing mistake that costs the weights of a week."""
    run(settings(steps=2))
    folder = tmp_path / "run"
    with pytest.raises(ValueError):
        Trainer(settings(objective={"alignment_layer": 9}), fresh=True, progress=False)
    assert [p.name for p in checkpoints.found(folder / "checkpoints")] == ["step-00000002"]
    broken = Trainer(settings(optimizer={"lr": 2e-3}), fresh=True, progress=False)
    monkeypatch.setattr(broken, "encode", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.run()
    assert [p.name for p in checkpoints.found(folder / "checkpoints.replaced")] == ["step-00000002"]
    run(settings(optimizer={"lr": 2e-3}, steps=1))
    assert not (folder / "checkpoints.replaced").exists()
    assert [p.name for p in checkpoints.found(folder / "checkpoints")] == ["step-00000001"]


def test_what_a_killed_run_left_is_removed(settings, tmp_path):
    """Stops: half-written folders that pile up, each as large as a checkpoint."""
    folder = tmp_path / "run"
    run(settings(steps=2))
    for left in ("checkpoints/.writing-step-00000004", ".export.writing-ab12", "export/.export.writing-12ab"):
        (folder / left).mkdir()
        (folder / left / "part").write_text("x")
    (folder / ".metrics.writing-ab12.jsonl").write_text("x")
    run(settings(steps=3))
    assert not [p for p in folder.rglob("*") if ".writing-" in p.name]


def test_an_export_that_is_a_link(settings, tmp_path):
    """Stops: a link to the disk with room that is replaced by a folder, or that ends the run."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "large")
    run(settings(steps=1))
    assert (tmp_path / "run" / "export").is_symlink() and (tmp_path / "large" / "model.safetensors").is_file()


# Running -----------------------------------------------------------------------


def test_a_run_in_a_thread(settings):
    """Stops: handlers of signals, which only the main thread may set."""
    made = []
    thread = threading.Thread(target=lambda: made.append(run(settings(steps=1))))
    thread.start()
    thread.join()
    assert made and (made[0] / "model.safetensors").is_file()


def test_lines_for_who_has_no_terminal(settings, capsys):
    """Stops: an empty log of a batch job, bars in it, or a --quiet run that speaks."""
    Trainer(settings(steps=4, report={"log": 2})).run()
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2 of 4", "step 4 of 4"] and "samples/s" in lines[
        0
    ]
    assert "\r" not in told.err and "average of the weights" in told.err
    run(settings(steps=5))
    told = capsys.readouterr()
    assert told.out == told.err == ""


def test_skipping_has_an_end(settings, monkeypatch, tmp_path):
    """Stops: a run of a week whose every step is left out; lines that no JSON reader takes."""
    monkeypatch.setattr(trainer, "MAX_SKIPPED", 3)
    monkeypatch.setattr(
        "janusflow_min.training.losses.flow_loss", lambda v, target: (v - target).flatten(1).mean(1) / 0
    )
    with pytest.raises(FloatingPointError, match=r"step 3 .*2 steps before it.*learning rate"):
        run(settings(on_nan="skip"))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(row["loss"], row["skipped"]) for row in rows] == [(None, True)] * 3


class Collector:
    def __init__(self):
        self.seen = []

    def log(self, numbers, step):
        self.seen.append((step, numbers))


def test_a_tracker_hears_every_number(settings, manifest):
    """Stops: a dashboard without validation, or with numbers of other steps than metrics.jsonl."""
    tracker, report = Collector(), {"every": 2, "validation": str(manifest), "validation_rows": 4}
    config = settings(steps=2, report=report)
    run(config, tracker=tracker)
    rows = read_lines(Path(config.output) / "metrics.jsonl")
    assert [step for step, _ in tracker.seen] == [1, 2, 2]
    assert (
        tracker.seen[0][1]["loss"] == rows[0]["loss"] and tracker.seen[0][1]["epoch"] == rows[0]["epoch"] > 0
    )
    assert tracker.seen[2][1]["validation/loss"] > 0
    assert rows[0]["memory_gib"] > 0 and rows[0]["samples_per_second"] > 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_clients_are_called_as_they_are_published(settings, name, monkeypatch, tmp_path):
    """Stops: an argument that the client does not know; a run that goes on as another one."""
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers["loss"]))

        def finish(self):
            calls.append("finished")

    class Module:
        @staticmethod
        def init(project, name, config, resume, **more):
            calls.append((project, name, resume, sorted(more), config["steps"]))
            return Run()

    monkeypatch.setitem(sys.modules, name, Module)
    monkeypatch.setattr("janusflow_min.training.check.find_spec", lambda name: True)
    for steps in (1, 2):
        run(settings(steps=steps, report={"tracker": name}))
    made = [call for call in calls if len(call) == 5]
    assert calls.count("finished") == 2
    assert made[0][:4] == made[1][:4] and made[0][3] == (["dir", "id"] if name == "wandb" else [])
    assert [call[0] for call in calls if len(call) == 2] == [1, 2]


def test_short_runs_learn_with_the_defaults(settings, manifest, tmp_path):
    """Stops: an export of 40 steps that is the untrained model: a warm-up of 1,000 steps, an average of the start."""
    data = [{"kind": "generation", "manifest": str(manifest)}]
    options = dict(data=data, steps=40, batch=4, save_every=100)
    made = run(
        settings(
            **options,
            optimizer={"lr": 3e-3, "warmup": None},
            report={"every": 40, "validation": str(manifest)},
        )
    )
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    start, end = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    shown = read_lines(tmp_path / "run" / "samples.jsonl")[-1]
    assert end < start - 0.5 and shown["flow"] + shown["alignment"] < (start + end) / 2
    assert (made / "model.safetensors").is_file()


# What comes out -----------------------------------------------------------------------


def test_any_checkpoint_is_exported(settings, tmp_path):
    """Stops: an earlier, better state of a run that nobody can load."""
    run(settings(steps=4, export_dtype="float32", save_every=2))
    folder = tmp_path / "run" / "checkpoints"
    assert cli.main(["train", "--export", str(folder / "step-00000004")]) == 0
    last, again = (
        load_file(tmp_path / "run" / n / "model.safetensors") for n in ("export", "export-step-00000004")
    )
    assert last.keys() == again.keys() and all(torch.equal(last[key], again[key]) for key in last)
    assert cli.main(["train", "--export", str(folder / "step-00000002")]) == 0
    earlier = load_file(tmp_path / "run" / "export-step-00000002" / "model.safetensors")
    assert any(not torch.equal(last[key], earlier[key]) for key in last)
    assert cli.main(["train", "--export", str(folder / "step-00000009")]) == 2


def test_the_best_is_kept(settings, tmp_path, manifest, monkeypatch):
    """Stops: the best state by validation that a later one overwrites, or that a restart forgets."""
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: {"loss": next(losses)})
    kept = []
    plain = Trainer.export
    monkeypatch.setattr(
        Trainer, "export", lambda self, name: (kept.append((name, self.index)), plain(self, name))[1]
    )
    report = {"every": 1, "validation": str(manifest), "keep_best": True}
    for steps in (3, 4, 5):
        run(settings(steps=steps, report=report))
    assert [step for name, step in kept if name == "best"] == [1, 2, 5]
    assert jf.load(tmp_path / "run" / "best", device="cpu", progress=False)


LORA = {
    "plain": {"rank": 4},
    "dropout": {"rank": 4, "dropout": 0.3},
    "dora": {"rank": 4, "dora": True},
    "everywhere": {"rank": 4, "components": ["llm", "siglip", "uvit_encoder", "uvit_decoder"]},
    "convolutions": {"rank": 4, "components": ["uvit_encoder"], "targets": ["in_conv", "cond_embeds_mapper"]},
}


@pytest.mark.parametrize("name", LORA)
def test_adapters(settings, parity_dir, tmp_path, name):
    """Stops: adapters that are merged otherwise than they compute, that train their base, or that nobody can load;
    dropout that a restart draws anew or that sampling sees."""
    peft = pytest.importorskip("peft")
    lora = LORA[name]
    optimizer = {"lr": 1e-2, "warmup": 0, "ema_decay": 0.0}
    options = dict(lora=lora, export_dtype="float32", optimizer=optimizer, gradient_checkpointing=True)
    trainer = Trainer(settings(**options), progress=False)
    parts = lora.get("components", ["llm"])
    inside = [n for n in trainer.optimizer.params if n.removeprefix("model.").split(".")[0] in parts]
    assert inside and all("lora_" in n for n in inside)
    merged = load_file(trainer.run() / "model.safetensors")
    base = load_file(parity_dir / "model.safetensors")
    assert merged.keys() == base.keys()
    if name == "dropout":  # stopped and gone on with: the same masks
        run(settings(tmp_path / "again", **options, steps=3))
        run(settings(tmp_path / "again", **options))
        again = load_file(tmp_path / "again" / "export" / "model.safetensors")
        assert all(torch.equal(merged[key], again[key]) for key in merged)
    loss = trainer.train_step.loss.eval()
    plain = jf.load(tmp_path / "run" / "export", device="cpu", dtype="float32", progress=False).model
    g = torch.Generator().manual_seed(0)
    embeds, pixels = torch.randn(1, 9, 64, generator=g), torch.rand(1, 3, 64, 64, generator=g)
    z, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([300.0])
    with torch.no_grad():
        for call in (
            lambda m: m.llm(embeds),
            lambda m: m.siglip(pixels),
            lambda m: m.encode_latents(z, t)[0],
        ):
            torch.testing.assert_close(call(plain), call(loss.model), rtol=1e-3, atol=1e-4)
    adapter = tmp_path / "run" / "export-adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == len([n for n in trainer.optimizer.params if "lora_" in n])
    assert peft.LoraConfig.from_pretrained(adapter).r == 4
    official = {key.removesuffix(".weight") for key in base}
    names = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}
    assert names <= official and names == set(peft.LoraConfig.from_pretrained(adapter).target_modules)
    pipe = jf.load(parity_dir, device="cpu", dtype="float32", progress=False)
    if name == "dora":
        with pytest.raises(ValueError, match="use_dora = True is not supported"):
            pipe.load_lora(adapter)
        return
    pipe.load_lora(adapter)
    mine, exported = pipe.model.state_dict(), plain.state_dict()
    changed = {from_official(f"{name}.weight") for name in names}
    for key in changed:  # the aligners and what else trains whole are in the export alone
        torch.testing.assert_close(mine[key], exported[key], rtol=0, atol=1e-6 if mine[key].ndim == 4 else 0)


def test_an_adapter_alone_is_peft_s(settings, parity_dir, tmp_path):
    """Stops: an adapter file that peft loads, but that does nothing there."""
    peft = pytest.importorskip("peft")
    rates = dict.fromkeys(("siglip", "und_aligner", "gen_aligners", "uvit_encoder", "uvit_decoder"), 0.0)
    run(
        settings(
            lora={"rank": 4},
            export_dtype="float32",
            optimizer={"lr": 1e-2, "warmup": 0, "lr_by_component": rates},
        )
    )
    base, merged = (
        jf.load(folder, device="cpu", dtype="float32", progress=False).model.llm
        for folder in (parity_dir, tmp_path / "run" / "export")
    )
    official = torch.nn.Module()  # the official model's names around the LLM
    official.language_model = torch.nn.Module()
    official.language_model.model = base
    adapted = peft.PeftModel.from_pretrained(official, tmp_path / "run" / "export-adapter")
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = adapted.base_model.model.language_model.model(embeds)
        torch.testing.assert_close(mine, merged(embeds), rtol=1e-4, atol=1e-5)


def test_the_weights_of_times_are_stable_diffusion_3_s(settings):
    """Stops: a weight at the wrong end of time; a weighting that changes nothing."""
    from janusflow_min.training.losses import time_weight

    t = torch.tensor([0.1, 0.5, 0.9])
    sigma = 1 - t
    torch.testing.assert_close(time_weight(t, "sigma_sqrt"), sigma**-2.0)
    torch.testing.assert_close(time_weight(t, "cosmap"), 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)))
    assert torch.equal(time_weight(t, "none"), torch.ones(3))
    diffusers = pytest.importorskip("diffusers.training_utils")
    for kind in ("sigma_sqrt", "cosmap"):
        theirs = diffusers.compute_loss_weighting_for_sd3(kind, sigmas=sigma)
        torch.testing.assert_close(time_weight(t, kind), theirs.float())
