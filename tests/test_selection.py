# SPDX-License-Identifier: MIT
"""A model that checks itself: likelihoods of answers against decoding, scores, the best of several, the checker."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

import janusflow_min as jf
from janusflow_min import cli, selection
from janusflow_min.shapes import captions, checker, judge, scenes

QUIET = dict(num_inference_steps=2, seed=3, progress=False)


@pytest.fixture(scope="module")
def pipe():
    return jf.load("tiny", device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str, Image.Image]]:
    """Family, plain caption and true render of two training scenes of each family."""
    rng, found = random.Random(5), []
    for family in scenes.FAMILIES:
        for _ in range(2):
            scene = scenes.sample_scene(rng, family)
            image = scenes.to_pil(scenes.render(scenes.pack([scene]))[0])
            found.append((family, captions.caption(scene, family, rng, "plain"), image))
    return found


def test_the_likelihood_is_that_of_decoding_token_by_token(pipe, drawn):
    """Stops: tokens off by one, the prompt's counted, padding seen, an image of another row; an answer without its
    end, which makes "red" as likely as "red star"."""
    rows = [(drawn[k][2], question, answer) for k, (question, answer) in enumerate(ROWS)]
    together = selection.log_likelihoods(pipe, rows)
    for row, value in zip(rows, together, strict=True):
        image, question, answer = row
        tokens: list[int] = []
        logs: list[float] = []
        wanted = [*pipe.processor.tokenizer.encode(f"Assistant: {answer}"), pipe.processor.tokenizer.eos_id]
        wanted = wanted[len(pipe.processor.tokenizer.encode("Assistant:")) :]

        def forced(logits: torch.Tensor, wanted=wanted, tokens=tokens, logs=logs) -> torch.Tensor:
            tokens.append(wanted[len(tokens)])
            logs.append(float(logits.log_softmax(-1)[0, tokens[-1]]))
            return torch.tensor([tokens[-1]])

        content = f"{pipe.processor.tokenizer.image_tag}\n{question}"
        messages = [
            {"role": "User", "content": content, "images": [image]},
            {"role": "Assistant", "content": ""},
        ]
        pipe.sampler.generate_tokens(pipe.processor.batch([messages]), len(wanted), -1, forced)
        assert value == pytest.approx(sum(logs), abs=1e-3)
        assert selection.log_likelihoods(pipe, [row])[0] == pytest.approx(value, abs=1e-3)


ROWS = [
    ("What color is the star?", "red"),
    ("Describe the picture.", "a red star on a white background"),
    ("Is there a red star?", "no"),
]


def test_what_the_model_would_answer_is_the_likeliest_option(pipe, drawn):
    """Stops: probabilities in another order than the options, or that do not add up."""
    for _, _, image in drawn[:4]:
        answer = pipe.understand("How many objects are there?", image).text.strip()
        chosen = pipe.choose(image, "How many objects are there?", ["one", "two", "three", "four"])
        assert max(chosen, key=chosen.get) == answer and list(chosen) == ["one", "two", "three", "four"]
        assert sum(chosen.values()) == pytest.approx(1)


def test_scores_tell_right_from_wrong(pipe, drawn):
    """Stops: a score of the wrong image or prompt, and one that needs the batch."""
    images, prompts = [image for _, _, image in drawn], [prompt for _, prompt, _ in drawn]
    own = pipe.score(images, prompts, checker="shapes")
    assert all(0 <= value <= 1 for value in own) and sum(value > 0.5 for value in own) >= len(own) - 1
    others = pipe.score(images, prompts[2:] + prompts[:2], checker=checker.questions)
    assert max(others) < 0.5
    assert pipe.score(images[0], prompts[0], checker="shapes") == pytest.approx(own[0], abs=1e-4)
    assert all(value <= pipe.score(images[k], prompts[k]) + 1e-5 for k, value in enumerate(own))
    asked = pipe.score(images[1], prompts[1])
    both = selection.log_likelihoods(
        pipe,
        [
            (images[1], selection.QUESTION.format(prompt=prompts[1]), a)
            for a in (*selection.YES, *selection.NO)
        ],
    )
    yes, no = (sum(map(math.exp, part)) for part in (both[:2], both[2:]))
    assert asked == pytest.approx(yes / (yes + no), abs=1e-4)
    unknown = pipe.score(
        images[1], "a photo of a cat", checker="shapes"
    )  # no question of the world: the usual one
    assert unknown == pytest.approx(pipe.score(images[1], "a photo of a cat"), abs=1e-5)


def test_the_flow_tells_what_no_question_does(pipe):
    """Stops: a fit that the noise decides, one that needs another image or prompt, and a checker whose other prompts
    are asked like questions or passed over."""
    found = {}
    for size, radius in (("small", 16.0), ("large", 32.0)):
        for shape in ("star", "circle", "ring"):
            thing = scenes.Object(shape, "red", 64.0, 64.0, radius, scenes.COLOURS["red"])
            scene = scenes.Scene("white", scenes.BACKGROUNDS["white"], (thing,))
            image = scenes.to_pil(scenes.render(scenes.pack([scene]))[0])
            prompt = f"a photo of a {size} red {shape} on a white background"
            (other,) = [item for item in checker.questions(prompt) if isinstance(item, str)]
            assert {prompt, other} == {prompt, prompt.replace(size, "large" if size == "small" else "small")}
            found[size, shape] = own = selection.fit(pipe, image, prompt, other)
            assert own == selection.fit(pipe, image, prompt, other)
            assert selection.fit(pipe, image, other, prompt) == pytest.approx(1 - own, abs=1e-6)
            assert selection.fit(pipe, image, prompt, prompt) == pytest.approx(0.5, abs=1e-3)
            asked = [item for item in checker.questions(prompt) if not isinstance(item, str)]
            without = pipe.score(image, prompt, checker=lambda _, asked=asked: asked)
            assert pipe.score(image, prompt, checker="shapes") == pytest.approx(own * without, rel=1e-3)
    assert min(found.values()) > 0.6 and sum(found.values()) / len(found) > 0.9


def test_the_best_of_several_comes_first_and_can_be_made_again(pipe):
    """Stops: a first candidate that is not the usual image, candidates shared between images, the best of the batch
    in place of the image's own, a seed that makes another image."""
    prompts = ["a photo of a red star", "a photo of two blue circles"]
    usual = pipe.generate(prompts, 2, **QUIET)
    rated: list[tuple[bytes, str]] = []

    def mean(image: Image.Image, prompt: str) -> float:
        rated.append((image.tobytes(), prompt))
        return float(torch.tensor(list(image.convert("L").tobytes()), dtype=torch.float32).mean())

    best = pipe.generate(prompts, 2, best_of=3, judge=mean, **QUIET)
    assert len(best.images) == 4 and best.prompts == usual.prompts and len(rated) == 12
    for k in range(4):  # the first candidate is the usual image, but for the last bits of another batch
        image, prompt = rated[3 * k]
        apart = np.abs(np.frombuffer(image, np.uint8) - np.asarray(usual.images[k]).ravel().astype(int))
        assert prompt == usual.prompts[k] and apart.max() <= 1
    assert len({image for image, _ in rated}) == 12
    for k in range(4):
        own = best.scores[k]
        seed = selection.candidate_seed(3 + k, own.index(max(own)))
        assert best.seeds[k] == seed and mean(best.images[k], "") == max(own) >= mean(usual.images[k], "")
        again = pipe.generate(best.prompts[k], 1, **QUIET | {"seed": seed})
        torch.testing.assert_close(again.latents[0], best.latents[k], atol=1e-5, rtol=0)
    assert usual.scores is None
    one = pipe.generate(prompts, 2, best_of=1, judge=mean, **QUIET)
    assert torch.equal(one.latents, usual.latents)


def test_best_of_goes_with_everything_else(pipe, tmp_path, capsys):
    """Stops: an option that the command takes and forgets; scores that nobody can read afterwards."""
    options = dict(best_of=2, checker="shapes", preset="quick", output_type="np", img_size=64)
    found = pipe.generate("a photo of a red star", 2, **QUIET | options)
    assert found.images.shape == (2, 64, 64, 3) and [len(own) for own in found.scores] == [2, 2]
    words = (
        "--parallel-size 1 --seed 3 --num-inference-steps 2 --best-of 2 --checker shapes --no-sheet --quiet"
    )
    line = ["generate", "a photo of a red star", *words.split(), "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    image = Image.open(capsys.readouterr().out.strip())
    plain = pipe.generate("a photo of a red star", 1, **QUIET | {"seed": int(image.info["chosen_seed"])})
    apart = np.asarray(plain.images[0]).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(apart).max() <= 1 and image.info["best_of"] == "2"
    assert cli.main([*line, "--checker", "nothing:here"]) == 2
    assert "checker must be shapes or MODULE:FUNCTION" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(best_of=0), "best_of must be a whole number of at least 1, got 0"),
        (dict(best_of=2.5), "best_of"),
        (dict(checker="nothing"), "checker must be shapes or MODULE:FUNCTION, got 'nothing'"),
        (dict(checker="janusflow_min.shapes.checker:nothing"), "checker must be"),
        (dict(checker=3), "checker must be a function, got 3"),
        (dict(judge=3), "judge must be a function"),
        (dict(judge=max, checker="shapes"), "takes the place of a checker"),
        (dict(best_of=2, seed=None, latents=torch.zeros(1, 4, 16, 16)), "best_of draws further noise"),
    ],
)
def test_bad_choices_are_refused_before_any_work(pipe, monkeypatch, options, text):
    """Stops: an error after minutes."""
    monkeypatch.setattr(pipe.model, "velocity", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=text):
        pipe.generate("a photo of a red star", 1, **QUIET | options)


def test_bad_questions_are_named(pipe, drawn):
    """Stops: a judge's NaN that wins, options that are the same, images and prompts out of step."""
    image = drawn[0][2]
    with pytest.raises(ValueError, match="what the judge returned must be a finite number, got nan"):
        pipe.generate("a photo of a red star", 1, best_of=2, judge=lambda *_: float("nan"), **QUIET)
    with pytest.raises(ValueError, match="2 images need as many prompts, got 1"):
        pipe.score([image, image], ["a star"])
    for options, text in (
        ([], "empty list"),
        (["a", "a"], "the same"),
        (["a", " "], r"options\[1\]"),
        (3, "options"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe.choose(image, "What?", options)
    with pytest.raises(ValueError, match="question must be a text"):
        pipe.choose(image, "", ["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        pipe.score("none.png", "a star")


def test_the_checker_asks_what_prompts_say_and_its_answers_are_true(drawn):
    """Stops: a question with an answer that a right image does not give, and one that nothing says."""
    rng, kinds = random.Random(9), set()
    for family in scenes.FAMILIES:
        for _ in range(40):
            scene = scenes.sample_scene(rng, family, rng.choice(["train", "held_out"]))
            prompt = captions.caption(scene, family, rng, "plain")
            asked = dict(item for item in checker.questions(prompt) if not isinstance(item, str))
            assert asked
            for qa in captions.questions(scene, rng):  # what is beyond doubt about the scene itself
                if qa.question in asked:
                    kinds.add(qa.kind)
                    right = asked[qa.question]
                    assert any(captions.answer_is_right(qa.kind, answer, qa.answer) for answer in right), (
                        prompt,
                        qa,
                    )
    assert kinds >= {"color", "count", "where", "yes_no"}
    assert checker.questions("a cat") == []
    with_ground = checker.questions("a photo of a small star on a white background")
    assert "a photo of a large star on a white background" in with_ground
    assert len(dict(item for item in with_ground if not isinstance(item, str))["Describe the picture."]) == 8
    assert judge.check(drawn[0][2], drawn[0][1])[0]
