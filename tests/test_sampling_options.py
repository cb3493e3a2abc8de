# SPDX-License-Identifier: MIT
"""How images are sampled: solvers, shift, interval, rescale, negative prompts, presets, callbacks, on both samplers."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import janusflow_min as jf
from janusflow_min import cli, solvers
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.options import add_options, read_options
from janusflow_min.sampling import PlainSampler
from janusflow_min.sampling_options import DEFAULTS, PRESETS, SOLVER_NAMES, SamplingOptions

PROMPTS = ["a cat", "two dogs on a long red sofa"]
QUIET = dict(parallel_size=1, seed=3, progress=False, num_inference_steps=4)


class Counting:
    """A sampler that counts the rows it computes."""

    is_current = True

    def __init__(self, sampler):
        self.sampler, self.rows = sampler, 0

    def prefill(self, plan):
        velocity = self.sampler.prefill(plan)

        def counted(z, timestep):
            self.rows += len(plan.source)
            return velocity(z, timestep)

        return counted

    def generate_tokens(self, *args):
        return self.sampler.generate_tokens(*args)


@pytest.fixture(scope="module")
def loaded(parity_dir):
    return jf.load(parity_dir, device="cpu", dtype="float32", progress=False)


@pytest.fixture(params=[PlainSampler, GraphSampler])
def pipe(request, loaded):
    loaded.sampler = Counting(request.param(loaded.model))
    yield loaded
    loaded.sampler = None


def latents(pipe, prompt=PROMPTS[0], **options):
    return pipe.generate(prompt, **QUIET | options).latents


def test_the_defaults_are_the_reference_s(pipe):
    """Stops: an option that changes what those who do not use it get."""
    plain = latents(pipe)
    named = dict(cfg_weight=2.0, guidance_rescale=0.0, **DEFAULTS) | {"num_inference_steps": 4}
    assert torch.equal(plain, latents(pipe, **named))
    assert PRESETS.keys() == {"quick"} and tuple(solvers.SOLVERS) == SOLVER_NAMES


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_a_solver_by_name_is_the_function(pipe, solver):
    """Stops: a name that runs something else."""
    named = latents(pipe, solver=solver, timestep_shift=2.0)
    assert torch.equal(named, latents(pipe, solver=solvers.SOLVERS[solver], timestep_shift=2.0))
    assert solver == "euler" or not torch.equal(named, latents(pipe, timestep_shift=2.0))


def rows(pipe, **options) -> int:
    pipe.sampler.rows = 0
    latents(pipe, PROMPTS, **options)
    return pipe.sampler.rows // len(PROMPTS)


def test_rows_that_are_not_needed_are_not_computed(pipe):
    """Stops: an interval that computes unconditional rows and throws them away; one step too many or too few."""
    assert rows(pipe) == 8 and rows(pipe, cfg_weight=1.0) == 4
    assert rows(pipe, guidance_interval=(0.0, 0.5)) == 4 + 2
    assert rows(pipe, guidance_interval=(0.25, 0.75)) == 4 + 2
    assert rows(pipe, guidance_interval=(0.5, 1.0)) == 4 + 2
    assert rows(pipe, solver="heun") == 16  # t = 1 belongs to the whole interval
    assert rows(pipe, solver="ab2", num_inference_steps=None, preset="quick") <= 24


def test_guidance_1_and_an_empty_interval_agree_bit_for_bit(pipe):
    """Stops: an unguided step that is computed otherwise inside of a guided run."""
    alone = latents(pipe, PROMPTS, cfg_weight=1.0)
    for empty in ((0.0, 0.0), (0.3, 0.3), (0.99, 0.995)):
        assert torch.equal(alone, latents(pipe, PROMPTS, guidance_interval=empty))
    assert not torch.equal(alone, latents(pipe, PROMPTS, guidance_interval=(0.0, 0.3)))


def test_half_an_interval_is_two_runs_in_one(pipe):
    """Stops: graphs or caches of the guided and the unguided rows that overwrite each other."""
    steps = []
    latents(
        pipe,
        PROMPTS,
        guidance_interval=(0.5, 1.0),
        callback_on_step_end=lambda i, t, z: steps.append(z.clone()),
    )
    unguided = []
    latents(pipe, PROMPTS, cfg_weight=1.0, callback_on_step_end=lambda i, t, z: unguided.append(z.clone()))
    assert torch.equal(steps[1], unguided[1]) and not torch.equal(steps[2], unguided[2])


def test_negative_prompts_take_the_unconditional_rows(pipe):
    """Stops: a negative prompt that is lost, added, or the same for all prompts."""
    plain = latents(pipe, PROMPTS)
    one = latents(pipe, PROMPTS, negative_prompt="a bus")
    assert not torch.allclose(plain, one, atol=1e-3)
    torch.testing.assert_close(one, latents(pipe, PROMPTS, negative_prompt=["a bus", "a bus"]))
    two = latents(pipe, PROMPTS, negative_prompt=["a bus", "a red kettle without a lid"])
    torch.testing.assert_close(two[0], one[0], atol=1e-5, rtol=0)
    alone = latents(pipe, PROMPTS[1], negative_prompt="a red kettle without a lid", seed=4)
    torch.testing.assert_close(two[1:], alone, atol=1e-5, rtol=0)
    # Guidance away from the prompt itself is no guidance, as its rows say the same.
    own = latents(pipe, PROMPTS, negative_prompt=PROMPTS, cfg_weight=3.0)
    torch.testing.assert_close(own, latents(pipe, PROMPTS, cfg_weight=1.0), atol=1e-4, rtol=0)
    assert torch.equal(latents(pipe, cfg_weight=1.0), latents(pipe, cfg_weight=1.0, negative_prompt="a bus"))


def test_options_do_not_depend_on_the_batch(pipe):
    """Stops: a spread, a solver's memory or an interval that mixes the images of a batch."""
    options = dict(solver="ab2", timestep_shift=2.0, guidance_interval=(0.1, 0.8), guidance_rescale=0.5)
    options |= dict(negative_prompt="a bus", num_inference_steps=5)
    together = pipe.generate(PROMPTS, **QUIET | options).latents
    for k, prompt in enumerate(PROMPTS):
        alone = latents(pipe, prompt, seed=3 + k, **options)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5, rtol=0)


def test_a_preset_fills_in_what_is_not_given(pipe):
    """Stops: a preset that overrides what was asked for, or is overridden by defaults."""
    quick = PRESETS["quick"]
    one = latents(pipe, num_inference_steps=None, preset="quick")
    assert torch.equal(one, latents(pipe, **quick))
    assert torch.equal(latents(pipe, preset="quick"), latents(pipe, **{**quick, "num_inference_steps": 4}))


BAD = [
    (dict(solver="rk4"), "solver must be one of euler, midpoint, heun, ab2 or a function, got 'rk4'"),
    (dict(solver=3), "solver must be"),
    (dict(timestep_shift=0), "timestep_shift must be a finite number above 0, got 0"),
    (dict(timestep_shift=-1.0), "timestep_shift"),
    (dict(timestep_shift=float("nan")), "timestep_shift"),
    (dict(guidance_interval=(0.6, 0.5)), r"guidance_interval must be in order, got \(0.6, 0.5\)"),
    (dict(guidance_interval=(-0.1, 0.5)), "guidance_interval must be a finite number of at least 0"),
    (dict(guidance_interval=(0, 1.1)), "guidance_interval"),
    (dict(guidance_interval=0.5), r"guidance_interval must be two times \(low, high\)"),
    (dict(guidance_interval="ab"), "guidance_interval"),
    (dict(guidance_interval=(0.1, 0.2, 0.3)), "guidance_interval"),
    (dict(guidance_rescale=1.5), "guidance_rescale"),
    (dict(guidance_rescale=None), "guidance_rescale"),
    (dict(negative_prompt=[]), "negative_prompt is an empty list"),
    (dict(negative_prompt=["a", "b", "c"]), "negative_prompt: 2 prompts need one or 2, got 3"),
    (dict(negative_prompt=""), "empty"),
    (dict(negative_prompt=3), "negative_prompt must be a str"),
    (dict(preset="slow"), "preset must be one of quick, got 'slow'"),
    (dict(preset=1), "preset must be one of quick"),
    (dict(output_type="pt"), "output_type must be one of pil, np, latent, got 'pt'"),
    (dict(callback_on_step_end="x"), "callback_on_step_end must be a function"),
    (dict(preview=True), "preview is for callback_on_step_end"),
    (dict(preview=1), "preview must be True or False"),
]


@pytest.mark.parametrize("options, text", BAD, ids=[str(next(iter(options.items()))) for options, _ in BAD])
def test_bad_options_are_refused_before_any_work(loaded, monkeypatch, options, text):
    """Stops: an error after minutes, or a value that is taken for another."""
    monkeypatch.setattr(loaded.model, "velocity", lambda *args, **kwargs: pytest.fail("the model was run"))
    loaded.sampler = PlainSampler(loaded.model)
    with pytest.raises(ValueError, match=text):
        latents(loaded, PROMPTS, **options)
    loaded.sampler = None


def test_a_wrong_name_is_told_ours(loaded):
    """Stops: a guess at our names, and a second set of them."""
    for theirs, ours in dict(
        guidance_scale="cfg_weight", num_images_per_prompt="parallel_size", generator="seed"
    ).items():
        with pytest.raises(TypeError, match=rf"generate has no argument {theirs}: here it is {ours}"):
            loaded.generate("a cat", **{theirs: 1})
    with pytest.raises(
        TypeError, match="generate has no argument bogus: there are prompt, parallel_size, cfg_weight"
    ):
        loaded.generate("a cat", bogus=1)
    with pytest.raises(TypeError, match="understand has no argument max_length: here it is max_new_tokens"):
        loaded.understand("a cat", max_length=1)


@pytest.mark.gpu
def test_the_graphs_give_the_plain_numbers(parity_dir):
    """Stops: graphs of the guided and the unguided rows that share buffers, or a solver that reads a stale velocity:
    the fast path is as near to the plain one with every option as without."""
    how = dict(device="cuda", dtype="bfloat16", progress=False)
    fast, plain = (jf.load(parity_dir, fast=on, **how) for on in (True, False))
    assert isinstance(fast.sampler, GraphSampler) and isinstance(plain.sampler, PlainSampler)
    tried = [dict(solver=solver, timestep_shift=2.0) for solver in SOLVER_NAMES]
    tried += [dict(guidance_interval=(0.2, 0.7)), dict(guidance_rescale=0.7), dict(negative_prompt="a bus")]
    tried += [
        dict(solver="ab2", guidance_interval=(0.0, 0.5), negative_prompt=["a bus", "a kettle on a red sofa"])
    ]
    for options in ({}, *tried, {}):
        one, two = (latents(pipe, PROMPTS, num_inference_steps=8, **options) for pipe in (fast, plain))
        assert (one - two).norm() / two.norm() < 0.03, options


# Seeing it happen -----------------------------------------------------------------------


def test_every_step_is_told_with_its_time_and_latents(pipe):
    """Stops: the time before the step, latents of another batch, a preview of the noise instead of the aim."""
    seen = []
    out = pipe.generate(
        PROMPTS,
        callback_on_step_end=lambda *args: seen.append(args),
        preview=True,
        **QUIET | {"timestep_shift": 2.0},
    )
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [t for _, t, *_ in seen] == solvers.time_grid(4, shift=2.0)[1:]
    assert torch.equal(seen[-1][2].cpu(), out.latents)
    for _, _, z, images in seen:
        assert z.shape == out.latents.shape and [image.size for image in images] == [(64, 64)] * 2
    # The last step ends where the estimate of its start points: the image itself.
    assert [image.tobytes() for image in seen[-1][3]] == [image.tobytes() for image in out.images]
    assert seen[0][3][0].tobytes() != out.images[0].tobytes()
    assert torch.equal(out.latents, pipe.generate(PROMPTS, **QUIET | {"timestep_shift": 2.0}).latents)


class Stop(Exception):
    pass


def test_what_a_callback_raises_comes_out_and_nothing_stays(pipe, capfd):
    """Stops: a swallowed error, or a pipeline that remembers the half-done call."""
    before = latents(pipe, PROMPTS)

    def stop(step, t, z):
        z.zero_()
        raise Stop(step)

    with pytest.raises(Stop, match="0"):
        latents(pipe, PROMPTS, callback_on_step_end=stop)
    assert torch.equal(before, latents(pipe, PROMPTS)) and capfd.readouterr().err == ""


def test_other_types_of_output(pipe):
    """Stops: values in [0, 1] or channels first in place of the images' bytes."""
    images = pipe.generate(PROMPTS, **QUIET).images
    array = pipe.generate(PROMPTS, output_type="np", **QUIET)
    assert array.images.dtype == np.uint8 and array.images.shape == (2, 64, 64, 3)
    assert np.array_equal(array.images, np.stack([np.asarray(image) for image in images]))
    assert pipe.generate(PROMPTS, output_type="np", img_size=32, **QUIET).images.shape == (2, 32, 32, 3)
    only = pipe.generate(PROMPTS, output_type="latent", **QUIET)
    assert only.images == [] and torch.equal(only.latents, array.latents) and "2 images" in repr(only)
    assert "2 images" in repr(array)


# The command line and the benchmarks -----------------------------------------------------------------------


def parse(*line: str) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, SamplingOptions)
    return read_options(SamplingOptions, parser.parse_args(line)).resolved()


def test_flags_are_the_arguments(parity_dir, tmp_path, capsys):
    """Stops: an option that the command takes and forgets, and a PNG that does not say how it was made."""
    others = {"guidance_rescale": 0.0, "negative_prompt": None, "best_of": 1, "checker": None}
    assert parse() == {"cfg_weight": 2.0, **others, **DEFAULTS}
    assert parse("--preset", "quick", "--num-inference-steps", "5")["num_inference_steps"] == 5
    line = ["generate", "a cat", "--model", str(parity_dir), "--parallel-size", "1", "--seed", "3", "--quiet"]
    line += [
        "--num-inference-steps",
        "3",
        "--solver",
        "heun",
        "--timestep-shift",
        "2",
        "--no-sheet",
        "--out",
        str(tmp_path),
    ]
    line += [
        "--guidance-interval",
        "0.2,0.9",
        "--guidance-rescale",
        "0.5",
        "--negative-prompt",
        "a bus",
        "--device",
        "cpu",
    ]
    assert cli.main(line) == 0
    image = Image.open(capsys.readouterr().out.strip())
    settings = dict(solver="heun", timestep_shift=2.0, guidance_interval=(0.2, 0.9), guidance_rescale=0.5)
    settings |= dict(negative_prompt="a bus", num_inference_steps=3)
    assert {key: str(value) for key, value in settings.items()}.items() <= image.info.items()
    pipe = jf.load(parity_dir, device="cpu", progress=False)
    assert pipe.generate("a cat", **QUIET | settings).images[0].tobytes() == image.convert("RGB").tobytes()
    for bad in (
        ["--solver", "rk4"],
        ["--timestep-shift", "0"],
        ["--guidance-interval", "0.5"],
        ["--preset", "x"],
    ):
        assert cli.main([*line, *bad]) == 2
        assert bad[0] in capsys.readouterr().err
    assert cli.main([*line, "--guidance-interval", "0.5,0.2"]) == 2
    assert "in order" in capsys.readouterr().err


def test_a_benchmark_takes_and_records_them(tmp_path):
    """Stops: runs of two solvers in one folder."""
    line = [
        "bench",
        "shapes",
        "generate",
        "--out",
        str(tmp_path),
        "--cases",
        "1",
        "--num-inference-steps",
        "2",
        "--quiet",
    ]
    assert (
        cli.main([*line, "--preset", "quick", "--best-of", "2", "--checker", "shapes", "--device", "cpu"])
        == 0
    )
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert settings["best_of"] == 2 and settings["checker"] == "shapes"
    assert settings["solver"] == "ab2" and settings["num_inference_steps"] == 2
    assert cli.main([*line, "--device", "cpu"]) == 2
