# SPDX-License-Identifier: MIT
"""DiffusionNFT: its loss, its draws, its rewards, and whole runs, on the tiny random checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import janusflow_min as jf
from janusflow_min.benchmarks import shapes
from janusflow_min.flow import interpolate
from janusflow_min.sampling import PlainSampler, guided_velocity
from janusflow_min.training import checkpoints, nft, rewards
from janusflow_min.training.check import check
from janusflow_min.training.config import Config, OptimizerConfig
from janusflow_min.training.metrics import CLOCK, Report, read_lines
from janusflow_min.training.optimizer import AdamW
from janusflow_min.training.trainer import Trainer


def brightness(images, prompts):
    """A reward that any model can learn: the lighter the better."""
    return [1 / (1 + math.exp(139.7 - float(np.asarray(image).mean()))) for image in images]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing the curves takes longer than the run."""
    monkeypatch.setattr(Report, "plot", lambda self: None)


@pytest.fixture
def settings(rounds_for):
    """`rounds_for` with this stage's table."""
    own = {"reward": f"{__name__}:brightness", "group": 2, "num_inference_steps": 2}

    def make(output: str = "run", batch: int = 6, **changes) -> Config:
        return rounds_for("nft", own, batch, output, **changes)

    return make


def train(config: Config) -> Path:
    return Trainer(config, progress=False).run()


def metrics(config: Config) -> list[dict]:
    rows = read_lines(Path(config.output) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


# The loss -----------------------------------------------------------------------


@pytest.fixture
def step(settings) -> nft.NftStep:
    return Trainer(settings(nft={"pull": 0.5, "beta": 0.7}), progress=False).rounds


@pytest.fixture
def points(step) -> nft.Points:
    with torch.no_grad():
        drawn, _ = step.collect([(0, "a dog"), (1, "a light cat")])
    noise = torch.randn(drawn.x.shape, generator=torch.Generator().manual_seed(0))
    return drawn._replace(r=torch.linspace(0, 1, len(drawn.t)), v_start=drawn.v_start + 0.1 * noise)


def test_the_loss_is_the_paper_s(step, points, monkeypatch):
    """Stops: a sign, a weight or the direction of time that differs from the formula, here in plain numbers."""
    v = points.v_old + 0.2 * torch.randn(points.x.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(step, "velocity", lambda p: v)
    losses = step.losses(points)
    for k in range(len(losses)):
        t, r, x = float(points.t[k]), float(points.r[k]), points.x[k].double()
        z = t * x + (1 - t) * points.noise[k].double()
        old, new = points.v_old[k].double(), v[k].double()
        good = z + (1 - t) * (0.3 * old + 0.7 * new)
        bad = z + (1 - t) * (1.7 * old - 0.7 * new)
        expected = r * ((good - x) ** 2).mean() / (good - x).abs().mean()
        expected += (1 - r) * ((bad - x) ** 2).mean() / (bad - x).abs().mean()
        expected += 0.5 * ((new - points.v_start[k].double()) ** 2).mean()
        assert float(losses[k]) == pytest.approx(float(expected), rel=1e-4)


def test_rewards_decide_the_direction(step, points, monkeypatch):
    """Stops: learning from bad images what to generate; a change where all images are alike."""
    step.nft = replace(step.nft, pull=0.0)
    for r, sign in ((1.0, 1), (0.0, -1), (0.5, 0)):
        v = points.v_old.clone().requires_grad_()
        monkeypatch.setattr(step, "velocity", lambda p, v=v: v)
        step.losses(points._replace(r=torch.full_like(points.t, r))).sum().backward()
        towards = ((points.x - points.noise - points.v_old) * -v.grad).flatten(1).sum(1)
        size = float(towards.abs().max())
        assert (towards * sign > 0).all() if sign else size < 1e-5


def test_the_velocity_is_the_sampler_s(step, points):
    """Stops: training another velocity than the one that generates: positions, padding, the time's scale."""
    texts = ["a dog", "a dog", "a light cat", "a light cat"]
    ids = step.pipe.check_prompts(texts)
    p = points.pick(torch.arange(4))._replace(t=torch.full((4,), 0.3))
    z, _ = interpolate(p.x, p.noise, p.t)
    with torch.no_grad():
        expected = guided_velocity(PlainSampler(step.pipe.model), ids, 1.0)(z, 0.3)
        torch.testing.assert_close(step.velocity(p), expected, rtol=1e-4, atol=1e-5)


def test_only_differences_within_a_prompt_count(step, monkeypatch):
    """Stops: an easy prompt that rewards its bad images, and tiny differences that are blown up."""
    monkeypatch.setattr(step, "rate", lambda *args: [0.9, 0.9, 0.2, 0.4])
    with torch.no_grad():
        points, found = step.collect([(0, "a dog"), (1, "a cat")])
    r = points.r.view(2, 4)  # passes, images
    assert torch.equal(r[0], r[1]) and float(
        found["reward"][0].detach() / found["reward"][1]
    ) == pytest.approx(0.6)
    assert r[0, 0] == r[0, 1] == 0.5 and r[0, 2] == 0 and r[0, 3] == 1
    monkeypatch.setattr(step, "rate", lambda *args: [0.9, 0.901, 0.5, 0.501])
    with torch.no_grad():
        assert (step.collect([(0, "a dog"), (1, "a cat")])[0].r - 0.5).abs().max() < 0.01


# What is drawn -----------------------------------------------------------------------


def draws(config: Config, rounds: int, monkeypatch, world: int = 1) -> list[dict[int, tuple]]:
    """Of each rank, image number -> its prompt, noise, and training noise and times."""
    found = []
    for rank in range(world):
        step, own = Trainer(config, progress=False).rounds, {}
        monkeypatch.setattr("janusflow_min.training.rounds.rank", lambda rank=rank: rank)
        step.world = world
        for data in step.prompts_of(range(rounds)):
            texts, numbers = step.images_of(data.batches)
            noise = step.noise_of(numbers)
            p = step.points(texts, numbers, torch.zeros_like(noise))
            both = [q.view(2, len(numbers), *q.shape[1:]) for q in (p.noise, p.t)]
            for i, n in enumerate(numbers):
                own[n] = (texts[i], noise[i], both[0][:, i], both[1][:, i])
        found.append(own)
    return found


def test_every_image_has_noise_of_its_own(settings, monkeypatch):
    """Stops: the commonest fault of such trainers: prompts, rounds or ranks that share their seeds, so that a group
    holds one image many times; and draws that depend on the number of ranks."""
    (alone,) = draws(settings(nft={"prompts": "shapes"}), 3, monkeypatch)
    ranks = draws(settings(nft={"prompts": "shapes"}), 3, monkeypatch, world=2)
    assert [*alone] == [*range(18)] and not set(ranks[0]) & set(ranks[1])
    for n, own in (ranks[0] | ranks[1]).items():
        assert own[0] == alone[n][0] and all(
            torch.equal(a, b) for a, b in zip(own[1:], alone[n][1:], strict=True)
        )
    noises = [noise for _, first, more, _ in alone.values() for noise in (first, *more)]
    for a, b in itertools.combinations(noises, 2):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.5
    assert len({float(t) for _, _, _, times in alone.values() for t in times}) == 36
    (other,) = draws(settings(seed=1), 1, monkeypatch)
    assert not torch.equal(other[0][1], alone[0][1])


def test_held_out_prompts_are_not_learned():
    """Stops: a benchmark whose prompts were trained on."""
    held_out = {text for _, text in shapes.prompts(100)} | {text for _, text in shapes.prompts(100, 1)}
    drawn = [rewards.Prompts("shapes", 0, "nft prompt")[n] for n in range(1500)]
    assert not held_out & set(drawn) and len(set(drawn)) > 900
    assert rewards.Prompts("shapes", 1, "nft prompt")[0] != drawn[0]


def test_prompts_of_a_file(tmp_path):
    """Stops: lines that are never asked, asked twice before others, or taken for prompts though empty."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeffa cat\n\n{"text": "a dog"}\n  a bird \n', encoding="utf-8")
    prompts = rewards.Prompts(str(path), 0, "key")
    rounds = [[prompts[3 * k + i] for i in range(3)] for k in range(6)]
    assert all(sorted(texts) == ["a bird", "a cat", "a dog"] for texts in rounds)
    assert len({tuple(texts) for texts in rounds}) > 1
    for content, message in (("", "no prompt"), ('a\n{"prompt": "b"}', "line 2"), ('{"text": 3}', "line 1")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            rewards.read_prompts(path)


# Rewards -----------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.5], [0.5, 2.0], [0.5, float("nan")], [0.5, -0.1], [0.5, "x"]], ids=str)
def test_what_is_no_reward(step, values):
    """Stops: NaN, too few or unbounded numbers that move weights."""
    step.reward = lambda images, prompts: values
    images = [jf.pixels.Image.new("RGB", (64, 64))] * 2
    with pytest.raises(ValueError, match=r"nft\.reward"):
        step.rate(images, ["a", "b"])
    step.reward = lambda images, prompts: np.array([0.25, 1])
    assert step.rate(images, ["a", "b"]) == [0.25, 1]


def test_the_reader_s_reward():
    """Stops: wrong images that are rewarded, right ones that are not."""
    asked = [(qa.answer, image) for qa, image in shapes.questions(6) if qa.kind == "describe"]
    texts, images = zip(*asked, strict=True)
    reward = rewards.find_reward("shapes", "")
    assert reward(images, texts) == [1.0] * 6
    assert reward(images, texts[1:] + texts[:1]) == [0.0] * 6


def test_own_eyes_stay_as_they_were(settings, monkeypatch):
    """Stops: a model that learns to call any image right, because it judges with the weights that it trains."""
    config = settings(nft={"reward": "answers", "checker": ""})
    step = Trainer(config, progress=False).rounds
    seen = []

    def weights(pipe):
        return pipe.model.llm.layers[0].mlp.up_proj.weight.detach().clone()

    def score(pipe, images, *_):
        seen.append(weights(pipe))
        return [0.5] * len(images)

    monkeypatch.setattr(rewards, "score_all", score)
    before = weights(step.pipe)
    with torch.no_grad():
        step.optimizer.params["model.llm.layers.0.mlp.up_proj.weight"].add_(1)
    step.rate([jf.pixels.Image.new("RGB", (64, 64))], ["a cat"])
    assert torch.equal(seen[0], before) and torch.equal(weights(step.pipe), before + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_go_when_they_should(dtype):
    """Stops: a validation that goes on with the newest weights after its reward looked with those of the start."""
    p = torch.nn.Parameter(torch.zeros(3))
    config = OptimizerConfig(lr=1e-3, warmup=0)
    optimizer = AdamW([("p", p)], {"p": 1e-3}, config, 10, dtype)
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), optimizer.computing_with({"p": torch.full((3,), 2.0)}):
            with optimizer.computing_with({"p": torch.full((3,), 4.0)}):
                assert (p == 4).all()
            assert (p == 2).all()
            if error:
                raise error
        assert (p == 0).all() and (optimizer.master["p"] == 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nft": {"group": 1}}, "nft.group must be 2 or more"),
        ({"batch": 7}, "batch must be a multiple of nft.group, 2"),
        ({"data": [{"kind": "text", "manifest": "a"}]}, "data must be left out"),
        ({"parallel": "fsdp"}, "parallel must be"),
        ({"nft": {"updates": 13}}, "nft.updates"),
        ({"nft": {"reward": "no_such_module:f"}}, "nft.reward.*no_such_module"),
        ({"nft": {"reward": "beauty"}}, "nft.reward.*answers, shapes, things or MODULE:FUNCTION"),
        ({"nft": {"checker": "nobody", "reward": "answers"}}, "nft.checker"),
        ({"nft": {"prompts": "missing.txt"}}, "nft.prompts.*missing.txt"),
        ({"nft": {"solver": "rk9"}}, "nft.solver"),
        ({"report": {"keep_best": True, "every": 1}}, "report.keep_best must be with nft.validation"),
        ({"report": {"validation": "a.jsonl"}}, "report.validation must be left out"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, changes, message):
    """Stops: a mistake that shows after the weights are loaded, or never."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(settings(**changes))


def test_a_file_s_prompts_are_checked_first(settings, tmp_path):
    """Stops: a run that ends in its tenth round at a prompt that the reader does not know or the model cannot hold."""
    path = tmp_path / "prompts.txt"
    for text, reward, message in (
        ("a photo of a red star\na cat", "shapes", 'world "shapes".*a cat'),
        ("cat " * 20000, f"{__name__}:brightness", "tokens"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"nft\.prompts.*{message}"):
            check(settings(nft={"prompts": str(path), "reward": reward}))


# Runs -----------------------------------------------------------------------


def test_a_resumed_run_is_the_same_run(settings):
    """Stops: an old policy, a start or draws that a restart changes."""
    whole, parts = settings("whole"), settings("parts")
    train(whole)
    train(replace(parts, steps=2))
    train(parts)
    assert metrics(parts) == metrics(whole) and len(metrics(whole)) == 4
    a, b = (load_file(Path(c.output) / "export" / "model.safetensors") for c in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert metrics(whole)[0]["weights_moved"] == 0 < metrics(whole)[3]["weights_moved"]
    left = checkpoints.found(Path(whole.output) / "checkpoints")
    with pytest.raises(ValueError, match=r"nft\.beta was 1\.0, is 2\.0"):
        Trainer(settings("whole", nft={"beta": 2.0}), progress=False)
    assert len(left) == 2


def test_the_reward_rises_and_answers_stay(settings, parity_dir, tmp_path):
    """Stops: a trainer that runs and learns nothing; eyes and answers that change."""
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n")
    rates = {"lr": 3e-3, "ema_decay": 0.5, "warmup": 0}
    options = {"group": 8, "updates": 2, "pull": 0.0, "prompts": str(path)}
    config = settings(steps=12, batch=16, micro_batch=16, optimizer=rates, nft=options)
    train(config)
    reward = [row["reward"] for row in metrics(config)]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.02
    before = load_file(parity_dir / "model.safetensors")
    after = load_file(Path(config.output) / "export" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    assert any("vision_gen_dec" in key for key in changed)
    assert not [key for key in changed if "vision_model" in key or "lm_head" in key or "vision_tower" in key]


def test_the_best_is_kept_and_the_run_ends(settings, monkeypatch):
    """Stops: a collapse that is exported; a run that goes on for hours behind its best, also after a restart."""
    losses = iter([0.5, 0.3, 0.4, 0.6, 0.1])
    monkeypatch.setattr(nft.NftStep, "validation_loss", lambda self: {"loss": next(losses), "reward": 0.0})
    report = {"every": 1, "keep_best": True, "patience": 2}
    config = settings(nft={"validation": 4}, report=report, steps=9, save_every=1)
    train(config)
    shown = read_lines(Path(config.output) / "samples.jsonl")
    assert [row["loss"] for row in shown] == [0.5, 0.3, 0.4, 0.6] and len(metrics(config)) == 4
    assert (Path(config.output) / "best" / "model.safetensors").is_file()
    train(config)  # ended is ended
    assert len(metrics(config)) == 4 and next(losses) == 0.1


def test_validation_is_the_same_each_time(settings):
    """Stops: a best that is luck, by other prompts or noise at each validation."""
    trainer = Trainer(settings(nft={"validation": 4}), progress=False)
    first, second = (trainer.rounds.validation_loss() for _ in range(2))
    assert first == second and first["loss"] == pytest.approx(1 - first["reward"])
    assert 0 < first["reward"] < 1


def test_adapters_learn_too(settings):
    """Stops: a start that is not the base model, or adapters that are left out of the old policy."""
    pytest.importorskip("peft")
    rates = dict.fromkeys(("gen_aligners", "uvit_encoder", "uvit_decoder"), 0.0)
    config = settings(
        lora={"rank": 2, "dropout": 0.1}, optimizer={"lr": 1e-2, "lr_by_component": rates}, steps=2
    )
    train(config)
    assert json.loads((Path(config.output) / "export-adapter" / "adapter_config.json").read_text())["r"] == 2
    assert metrics(config)[1]["velocity_moved"] > 0 == metrics(config)[0]["velocity_moved"]


LAUNCH = """
import json, sys
from janusflow_min.training.config import Config, OptimizerConfig
from janusflow_min.training.optimizer import AdamW
from janusflow_min.training.settings import read
from janusflow_min.training.trainer import Trainer

if __name__ == "__main__":
    Trainer(read(Config, json.load(open(sys.argv[1]))), progress=False).run()
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(settings, tmp_path):
    """Stops: ranks that generate the same images, weigh a point by their own number, or validate different prompts."""
    options = {"updates": 1, "validation": 5}
    report = {"every": 2, "keep_best": True}
    alone = settings("alone", nft=options, report=report)
    train(alone)
    (tmp_path / "launch.py").write_text(LAUNCH)
    both = settings("both", nft=options, report=report, parallel="replicate")
    (tmp_path / "config.json").write_text(json.dumps(both.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [
        str(20_000 + os.getpid() % 20_000),
        str(tmp_path / "launch.py"),
        str(tmp_path / "config.json"),
    ]
    paths = [str(Path(jf.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, one in zip(metrics(both), metrics(alone), strict=True):
        for key in ("reward", "spread", "loss", "norm", "velocity_moved"):
            assert mine[key] == pytest.approx(one[key], rel=2e-3, abs=1e-6), (mine["step"], key)
    shown = [read_lines(Path(c.output) / "samples.jsonl") for c in (both, alone)]
    assert [row["loss"] for row in shown[0]] == pytest.approx([row["loss"] for row in shown[1]], rel=2e-3)
