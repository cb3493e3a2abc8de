# SPDX-License-Identifier: MIT
"""Editing and inversion: the formulas, batches, masks, every kind of image, and what is refused."""

from __future__ import annotations

import inspect
import io

import numpy as np
import pytest
import torch
from PIL import Image

import janusflow_min as jf
from janusflow_min.cli import build_parser, main
from janusflow_min.commands.edit import SETTINGS
from janusflow_min.edit_methods import flowedit_velocity, undo_euler
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.pixels import to_pixels
from janusflow_min.sampling import guided_velocity
from janusflow_min.sampling_options import EDIT_METHODS
from janusflow_min.selection import candidate_seed
from janusflow_min.shapes import judge, scenes
from janusflow_min.solvers import euler, time_grid

SOURCE, TARGET = "a red cat", "A photo of a blue dog and two birds"
SIDE = 64  # of the small checkpoint's images


@pytest.fixture(scope="module")
def tiny() -> jf.Pipeline:
    return jf.load("tiny", device="cpu", progress=False)


@pytest.fixture
def edit(pipe):
    """`edit`, short, quiet and seeded unless told otherwise."""
    usual = {"source_prompt": SOURCE, "num_inference_steps": 3, "seed": 5, "progress": False}
    return lambda image, prompt=TARGET, **options: pipe.edit(image, prompt, **usual | options)


def picture(size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def differ(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@torch.inference_mode()
def encoded(pipe: jf.Pipeline, image: Image.Image) -> torch.Tensor:
    assert pipe.vae is not None
    return pipe.vae.encode(to_pixels(image)[None])


@torch.inference_mode()
def test_flowedit_is_the_paper_s_loop(pipe, edit):
    """Stops: source and target exchanged, noise that differs between the two, a step in the wrong direction."""
    x, image = encoded(pipe, picture()), picture()
    source, target = (
        guided_velocity(pipe.sampler, pipe.check_prompts([text]), weight)
        for text, weight in ((SOURCE, 1.5), (TARGET, 3.0))
    )
    generator, z, steps = torch.Generator().manual_seed(5), x.clone(), 3
    for i in range(steps):
        t = 0.25 + 0.75 * i / steps
        noise = torch.randn(x.shape[1:], generator=generator)
        z_source = t * x + (1 - t) * noise
        z = z + 0.75 / steps * (target(z + z_source - x, t) - source(z_source, t))
    expected = pipe._decode(z, [TARGET])[0]
    assert differ(edit(image, strength=0.75, cfg_weight=3.0, source_cfg_weight=1.5)[0], expected) <= 1


@torch.inference_mode()
def test_the_fast_path_edits_alike(pipe, parity_dir):
    """Stops: a batch of source and target rows that only the plain sampler understands."""
    fast, x = jf.load(parity_dir, device="cpu", progress=False), encoded(pipe, picture())
    prompts = [pipe.check_prompts([text]) for text in (SOURCE, TARGET)]
    found = []
    for sampler in (pipe.sampler, GraphSampler(fast.model)):
        generators = [torch.Generator().manual_seed(1)]
        velocity = flowedit_velocity(sampler, x, *prompts, (3.0, 1.5), generators)
        found.append(euler(velocity, x, time_grid(3, 0.2)))
    assert not torch.equal(found[0], x)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", EDIT_METHODS)
def test_a_batch_edits_as_each_alone(edit, method):
    """Stops: noise that depends on the batch, images or prompts mixed up."""
    images, prompts = [picture(seed=k) for k in range(10)], [TARGET, SOURCE] * 5
    together = edit(images, prompts, method=method)
    assert [result.info["seed"] for result in together] == list(range(5, 15))
    for k in (0, 7, 9):
        assert differ(edit(images[k], prompts[k], method=method, seed=5 + k)[0], together[k]) <= 1


def test_of_several_the_least_change_that_shows_the_prompt(pipe, edit, monkeypatch):
    """Stops: a candidate that shows the prompt and changed more than it had to, scores taken for another image's, and a
    result whose seed and strength do not repeat it."""
    options = dict(strength=0.8, num_inference_steps=2)
    alone = [
        [edit(picture(seed=i), seed=candidate_seed(5 + i, k), **options | {"strength": strength})[0]]
        for i in range(2)
        for k, strength in enumerate((0.8, 0.7, 0.8))
    ]
    images = [image for (image,) in alone]
    before = [encoded(pipe, picture(seed=i)) for i in range(2) for _ in range(3)]
    moved = [float((encoded(pipe, a) - b).norm()) for a, b in zip(images, before, strict=True)]
    said = iter([[0.9, 0.2], [0.4, 0.3], [0.8, 0.1]])  # of both images' candidate k
    monkeypatch.setattr("janusflow_min.selection.scores_of", lambda *args, **options: next(said))
    first, second = edit([picture(), picture(seed=1)], best_of=3, **options)
    assert first.info["scores"] == [0.9, 0.4, 0.8] and second.info["scores"] == [0.2, 0.3, 0.1]
    best = 0 if moved[0] < moved[2] else 2
    assert differ(first, images[best]) <= 1 and differ(second, images[4]) <= 1
    assert second.info["strength"] == pytest.approx(0.7)
    monkeypatch.undo()
    again = edit(
        picture(seed=1), seed=second.info["seed"], num_inference_steps=2, strength=second.info["strength"]
    )[0]
    assert differ(again, second) <= 1 and again.info["prompt"] == second.info["prompt"]


def test_a_judge_chooses_the_edit(pipe, edit, parity_dir):
    """Stops: a judge whose numbers are taken for probabilities, and candidates that nothing can judge."""
    darkest = edit(picture(), best_of=4, judge=lambda image, prompt: -float(np.asarray(image).mean()))[0]
    scores = darkest.info["scores"]
    assert max(scores) == -float(np.asarray(darkest).mean()) > min(scores)
    half = jf.load(parity_dir, device="cpu", parts="generation", progress=False)
    with pytest.raises(ValueError, match="understanding"):
        half.edit(picture(), TARGET, SOURCE, best_of=2, progress=False)


def test_one_image_serves_all_prompts(edit):
    """Stops: one image edited by the first prompt alone, or one prompt that edits the first image alone."""
    image = picture()
    several = edit(image, [TARGET, SOURCE], seed=[5, 5])
    assert differ(several[0], edit(image)[0]) <= 1 and differ(*several) > 1
    assert [result.info["prompt"] for result in several] == [TARGET, SOURCE]
    assert len(edit([picture(), picture(seed=1)])) == 2


def test_the_same_prompt_changes_nothing(pipe, edit):
    """Stops: an edit that drifts where nothing is asked for: FlowEdit's two velocities must cancel."""
    image = picture()
    plain = pipe._decode(encoded(pipe, image), [SOURCE])[0]
    assert differ(edit(image, SOURCE, cfg_weight=2.0, source_cfg_weight=2.0)[0], plain) <= 1


@pytest.mark.parametrize("method", EDIT_METHODS)
def test_what_the_mask_protects_keeps_its_bytes(edit, method):
    """Stops: a mask with its colours exchanged, a soft edge, the VAE's losses outside of it."""
    image, mask = picture(), Image.new("L", (SIDE, SIDE))
    mask.paste(255, (10, 20, 30, 50))
    result, allowed = np.asarray(edit(image, method=method, mask=mask)[0]), np.asarray(mask) == 255
    changed = (result != np.asarray(image)).any(-1)
    assert not changed[~allowed].any() and changed[allowed].mean() > 0.5


@pytest.mark.parametrize("method", EDIT_METHODS)
def test_latents_outside_the_mask_end_at_the_image(pipe, edit, method):
    """Stops: an edit that does not know of its surroundings, whose seams show."""
    seen: list[torch.Tensor] = []
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 8, 8))
    edit(picture(), method=method, mask=mask, callback_on_step_end=lambda step, t, z: seen.append(z))
    assert len(seen) == 3
    moved = (seen[-1] - encoded(pipe, picture())).abs().amax((0, 1))
    assert moved[0, 0] > 1e-3
    moved[0, 0] = 0
    assert moved.max() < 1e-4


def test_any_image_goes_in_and_the_model_s_size_comes_out(edit):
    """Stops: an error for a photo that is not square, grey, transparent or a file's bytes."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    wide = picture((90, 40)).convert("RGBA")
    for image in (
        wide,
        picture((3, 7)).convert("L"),
        file.getvalue(),
        np.asarray(picture()),
        wide.convert("P"),
    ):
        result = edit(image)[0]
        assert result.size == (SIDE, SIDE) and result.mode == "RGB"
    mask = Image.new("1", wide.size, 1)
    assert edit(wide, mask=mask)[0].size == (SIDE, SIDE)


def test_the_model_describes_what_has_no_source_prompt(pipe, edit):
    """Stops: a source prompt that is not the model's answer, and questions that SDEdit does not need."""
    answer = pipe.understand("Describe the image.", picture(), max_new_tokens=96).text.strip()
    assert edit(picture(), source_prompt=None)[0].info["source_prompt"] == answer
    assert edit(picture(), source_prompt=None, method="sdedit")[0].info["source_prompt"] is None


def test_undo_euler_undoes_euler():
    """Stops: an inversion that only approximates the steps it undoes."""
    matrix = torch.tensor([[0.1, -1.0], [1.0, -0.3]]).double()
    z = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    times = time_grid(20)

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", matrix * (1 + t), z)

    x = euler(velocity, z, times)
    errors = [float((undo_euler(velocity, x, times, n) - z).abs().max()) for n in (1, 4, 12)]
    assert errors[0] > 30 * errors[1] and errors[1] < 1e-3 and errors[2] < 1e-9


def test_inverted_latents_generate_the_image_again(tiny):
    """Stops: latents of another scale, prompt or direction than generation's."""
    scene = scenes.pack([scene_of("red", "star")])
    image, prompt = scenes.to_pil(scenes.render(scene)[0]), "a photo of a red star"
    latents = tiny.invert(image, prompt)
    assert latents.shape == (1, *tiny.model.latent_shape) and 0.8 < float(latents.std()) < 1.2
    again = tiny.generate(prompt, 1, cfg_weight=1.0, latents=latents, progress=False)
    x = encoded(tiny, image)
    assert float((again.latents - x).square().mean() / x.var()) < 0.02


def scene_of(colour: str, shape: str) -> scenes.Scene:
    rgb = scenes.COLOURS[colour]
    thing = scenes.Object(shape, colour, 60.0, 70.0, 24.0, rgb)
    return scenes.Scene("white", scenes.BACKGROUNDS["white"], (thing,))


def test_the_default_changes_a_colour_and_keeps_the_place(tiny):
    """Stops: an edit that runs and changes nothing, or generates another image."""
    image = scenes.to_pil(scenes.render(scenes.pack([scene_of("red", "star")]))[0])
    result = tiny.edit(image, "a photo of a blue star", seed=0, progress=False)[0]
    (thing,) = judge.read(result).objects
    assert (thing.colour, thing.shape) == ("blue", "star")
    assert max(abs(thing.centre[0] - 60), abs(thing.centre[1] - 70)) < 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"best_of": 0}, "best_of must be"),
        ({"best_of": 2, "checker": "shape"}, "checker must be"),
        ({"judge": 3}, "judge must be a function"),
        ({"method": "flow"}, "method must be one of flowedit, invert, sdedit, got 'flow'"),
        ({"strength": 0}, "strength must be a finite number above 0 and of at most 1, got 0"),
        ({"strength": 1.5}, "strength must be .* got 1.5"),
        ({"cfg_weight": float("nan")}, "cfg_weight must be a finite number"),
        ({"source_cfg_weight": "3"}, "source_cfg_weight must be a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"solver": "rk9"}, "solver must be one of"),
        ({"timestep_shift": 0}, "timestep_shift must be a finite number above 0"),
        ({"mask": Image.new("L", (SIDE, 32), 255)}, "a mask must be of its image's size, 64x64, got 64x32"),
        ({"mask": Image.new("L", (SIDE, SIDE))}, "a mask has nothing white"),
        ({"mask": [Image.new("L", (SIDE, SIDE), 255)] * 2}, "mask: 1 edits need one or 1, got 2"),
        ({"prompt": ""}, "the prompt must be text"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"image": []}, "image is an empty list"),
        ({"image": [picture()] * 2, "prompt": [TARGET] * 3}, "image: 3 edits need one or 3, got 2"),
        ({"image": 3}, "an image must be a path"),
        ({"source_prompt": [SOURCE] * 2}, "source_prompt: 1 edits need one or 1, got 2"),
        ({"source_prompt": " "}, "the prompt must be text"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function"),
    ],
)
def test_what_makes_no_edit_is_refused_before_any_work(pipe, edit, monkeypatch, options, message):
    """Stops: a slip of the key that is noticed after the work, or never."""
    monkeypatch.setattr(pipe.vae, "encode", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(pipe, "understand", lambda *_, **__: pytest.fail("it asked"))
    with pytest.raises(ValueError, match=message):
        edit(**{"image": picture()} | options)


def test_a_missing_file_and_a_missing_part_are_named(pipe, edit, parity_dir):
    """Stops: an AttributeError deep inside for a path without a file or a model without its half."""
    with pytest.raises(FileNotFoundError, match=r"no image file at 'none.png'"):
        edit("none.png")
    half = jf.load(parity_dir, device="cpu", progress=False, parts="generation")
    with pytest.raises(ValueError, match='understanding needs "all"'):
        half.edit(picture(), TARGET, progress=False)
    assert len(half.edit(picture(), TARGET, SOURCE, num_inference_steps=1, progress=False)) == 1


def test_what_a_callback_raises_ends_the_edit(edit):
    """Stops: an edit that cannot be stopped."""
    with pytest.raises(KeyError, match="enough"):
        edit(picture(), callback_on_step_end=lambda *_: (_ for _ in ()).throw(KeyError("enough")))


def test_the_command_saves_what_edit_makes(tiny, tmp_path, capsys):
    """Stops: a command whose options do not arrive, or a PNG that does not say how to repeat it."""
    path, mask = tmp_path / "in.png", tmp_path / "mask.png"
    scenes.to_pil(scenes.render(scenes.pack([scene_of("red", "star")]))[0]).save(path)
    Image.new("L", (128, 128), 255).save(mask)
    words = [
        "edit",
        str(path),
        TARGET.lower(),
        "a photo of a ring",
        "--seed",
        "3",
        "--num-inference-steps",
        "2",
    ]
    options = ["--mask", str(mask), "--strength", "0.5", "--method", "invert", "--out", str(tmp_path / "out")]
    assert main([*words, *options, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    saved = printed.out.split()
    expected = tiny.edit(
        path, [TARGET.lower(), "a photo of a ring"], mask=mask, seed=3, num_inference_steps=2, strength=0.5,
        method="invert", progress=False,
    )  # fmt: skip
    for file, image, seed in zip(saved, expected, "34", strict=True):
        with Image.open(file) as found:
            assert differ(found, image) <= 1
            assert found.text["seed"] == seed and found.text["method"] == "invert"  # type: ignore[attr-defined]
            assert found.text["source_prompt"] == image.info["source_prompt"]  # type: ignore[attr-defined]
    assert "--seed 3 repeats it" in printed.err and image.info["source_prompt"] in printed.err


def test_the_command_s_defaults_are_edit_s():
    """Stops: two sets of defaults that drift apart."""
    args = build_parser().parse_args(["edit", "a.png", "a star"])
    usual = inspect.signature(jf.Pipeline.edit).parameters
    assert {name: getattr(args, name) for name in SETTINGS} == {
        name: usual[name].default for name in SETTINGS
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["none.png", "a star"], "no image file at 'none.png'"),
        (["here.png", " "], "prompt is empty"),
        (["here.png", "a star", "--strength", "0"], "argument --strength: must be"),
        (["here.png", "a star", "--method", "flow"], "argument --method: invalid choice"),
        (["here.png", "a star", "--mask", "none.png"], "no image file at 'none.png'"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, capsys, words, message):
    """Stops: weights that are read, or a folder that is made, before a slip of the key is noticed."""
    monkeypatch.chdir(tmp_path)
    picture().save("here.png")
    assert main(["edit", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]
