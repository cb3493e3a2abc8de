# SPDX-License-Identifier: MIT
"""A model that checks itself: how likely answers are, whether an image shows its prompt, the best of several.

Answers are read, not sampled: one batched pass gives the probability of each of them after question and image. By
default the question is whether the image shows the prompt. A `Checker` that knows the prompts' world asks for each
thing that they say besides, which separates right from wrong better; what no question tells, the flow may, which
generates one thing under one prompt and another under another. Any function (image, prompt) -> float does as well.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import checks
from .flow import TIME_SCALE, flow_loss, interpolate
from .llama import mask_positions
from .model import merge_image_embeds
from .pixels import ImageSource, look_up, open_image, to_pixels
from .sampling import draw_noise, plan_rows

if TYPE_CHECKING:
    from .pipeline import Pipeline

# A prompt -> questions about an image of it, each with the answers that are right, whose probabilities are added; and
# other prompts, which an image of this one fits worse (`fit`).
Checker = Callable[[str], Sequence[tuple[str, Sequence[str]] | str]]
CHECKERS = {"shapes": "janusflow_min.shapes.checker:questions"}  # the default model's world
Judge = Callable[[Image.Image, str], float]  # (image, prompt) -> the higher, the better

QUESTION = "Does this image show {prompt}? Answer yes or no."
YES, NO = ("yes", "Yes"), ("no", "No")
MAX_ROWS = 64  # answers read in one pass
MAX_CANDIDATES = 16  # images that are generated before they are scored
FIT_TIMES = (0.05, 0.1, 0.2, 0.3)  # of `fit`: where the flow decides layout and sizes
FIT_POWER = 8  # of `fit`: of 600 prompts' images, right ones get 0.95 on average, wrong ones 0.84


def log_likelihoods(pipe: Pipeline, rows: Sequence[tuple[ImageSource, str, str]]) -> list[float]:
    """The log-probability of each answer, its end included, after (image, question, answer); natural logarithm."""
    pipe._need("understanding")
    processor, found = pipe.processor, list[float]()

    @functools.cache  # the same for every image: a checker asks all candidates the same
    def encoded(question: str, answer: str) -> tuple[list[int], int]:
        """Token ids of question and answer, and how many are the answer's."""
        content = f"{processor.tokenizer.image_tag}\n{question}"
        asked = [{"role": "User", "content": content, "images": [rows[0][0]]}]
        prompt, _, _ = processor.conversation([*asked, {"role": "Assistant", "content": ""}])
        whole, _, _ = processor.conversation([*asked, {"role": "Assistant", "content": answer}])
        pipe._check_length(len(whole), f"the question and the answer {answer!r}")
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole, len(whole) - same

    for start in range(0, len(rows), MAX_ROWS):
        part = rows[start : start + MAX_ROWS]
        found += _read_answers(pipe, [image for image, _, _ in part], [encoded(q, a) for _, q, a in part])
    return found


@torch.inference_mode()
def _read_answers(
    pipe: Pipeline, sources: Sequence[ImageSource], encoded: Sequence[tuple[list[int], int]]
) -> list[float]:
    """sources: the image of each row. encoded: its token ids, and how many of them are the answer's."""
    model, processor, device = pipe.model, pipe.processor, pipe.device
    images: dict[int, ImageSource] = {id(image): image for image in sources}  # each is encoded once
    answer_lengths = [length for _, length in encoded]
    batch = processor.collate([(ids, "", []) for ids, _ in encoded])
    levels = processor.image_processor.levels(list(images.values())).to(device)
    features = model.embed_images(look_up(levels, processor.image_processor.table.to(model.dtype)))
    order = {key: k for k, key in enumerate(images)}
    features = features[torch.tensor([order[id(image)] for image in sources], device=device)]
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device).bool()
    embeds = merge_image_embeds(model.llm.embed_tokens(ids), features, batch.images_seq_mask.to(device))
    last = max(answer_lengths) + 1  # padding is on the left, so all answers end together
    hidden: Tensor = model.llm(embeds, mask_positions(mask), mask)[:, -last:-1]
    logs = model.logits(hidden).log_softmax(-1).gather(2, ids[:, 1 - last :, None])[..., 0]  # (B, last - 1)
    return [
        float(row[-length:].double().sum()) for row, length in zip(logs.cpu(), answer_lengths, strict=True)
    ]


def choose(pipe: Pipeline, image: ImageSource, question: str, options: Sequence[str]) -> dict[str, float]:
    """The probability of each option as the answer, given that it is one of them; they add up to 1."""
    _check_text("question", question)
    options = checks.texts("options", options)
    if len(set(options)) < len(options):
        raise ValueError("options: two are the same")
    for i, option in enumerate(options):
        _check_text(f"options[{i}]", option)
    logs = torch.tensor(log_likelihoods(pipe, [(image, question, option) for option in options]))
    return dict(zip(options, logs.softmax(0).tolist(), strict=True))


def score_all(
    pipe: Pipeline, images: Sequence[ImageSource], prompts: Sequence[str], checker: Checker | None = None
) -> list[float]:
    """The probability, in [0, 1], that each image shows its prompt.

    The share of yes in yes and no; with a checker times the probability of a right answer to each of its questions,
    and `fit` for each of its other prompts.
    """
    rows: list[tuple[ImageSource, str, str]] = []
    plans: list[list[tuple[range, range]]] = []  # of each image: rows of right answers, rows of wrong ones

    def added(image: ImageSource, question: str, answers: Sequence[str]) -> range:
        rows.extend((image, question, answer) for answer in answers)
        return range(len(rows) - len(answers), len(rows))

    fits: list[float] = []
    for image, prompt in zip(images, prompts, strict=True):
        asked: list[tuple[str, Sequence[str], Sequence[str]]] = [(QUESTION.format(prompt=prompt), YES, NO)]
        fits.append(1.0)
        for item in checker(prompt) if checker else ():
            if isinstance(item, str):
                fits[-1] *= fit(pipe, image, prompt, item)
            else:
                asked.append((*item, ()))
        plans.append([(added(image, q, right), added(image, q, wrong)) for q, right, wrong in asked])
    logs = log_likelihoods(pipe, rows)

    def total(places: range) -> float:
        return sum(math.exp(logs[i]) for i in places)

    found = []
    for plan, value in zip(plans, fits, strict=True):
        for yes, no in plan:
            value *= total(yes) / (total(yes) + total(no)) if no else min(1.0, total(yes))
        found.append(value)
    return found


@torch.inference_mode()
def fit(pipe: Pipeline, image: ImageSource, prompt: str, other: str) -> float:
    """How much better an image fits a prompt than another, in [0, 1]; 0.5 where it fits both alike.

    The mean square error of either prompt's velocity at the same noisy images (Li et al. 2023, arXiv 2303.16203),
    each to the power -8: the prompt's share of both.
    """
    pipe._need("generation")
    x = encode_images(pipe, [square(pipe, open_image(image, upright=True, background="white"))])
    times = x.new_tensor(FIT_TIMES)
    noise = draw_noise(x.shape[1:], [torch.Generator("cpu").manual_seed(k) for k in range(len(times))]).to(x)
    z, target = interpolate(x.expand_as(noise), noise, times)
    prompts = [text for text in pipe.check_prompts([prompt, other]) for _ in FIT_TIMES]
    velocity = pipe.sampler.prefill(plan_rows(prompts, False))(
        z.repeat(2, 1, 1, 1), times.repeat(2) * TIME_SCALE
    )
    own, others = flow_loss(velocity, target.repeat(2, 1, 1, 1)).chunk(2)
    return 1 / (1 + float(own.mean() / others.mean()) ** FIT_POWER)


def square(
    pipe: Pipeline, image: Image.Image, how: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The middle of an image, at the model's size."""
    side = pipe.model.config.siglip.image_size
    return ImageOps.fit(image, (side, side), how)


def encode_images(pipe: Pipeline, squares: Sequence[Image.Image]) -> Tensor:
    """RGB images of the model's size -> latents (B, C, h, w), fp32 on the model's device. One image at a time, which
    bounds the VAE's memory."""
    vae = pipe.vae
    assert vae is not None
    latents = [vae.encode(to_pixels(image)[None].to(vae.device)) for image in squares]
    return torch.cat(latents).to(pipe.model.device, torch.float32)


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of the candidate of an image with this seed; the first is the image itself."""
    if candidate == 0:
        return seed
    digest = hashlib.sha256(f"{seed} candidate {candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def best_candidates(
    best_of: int,
    rows: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    make: Callable[[list[Any], Tensor], tuple[Tensor, list[Image.Image]]],
    rate: Callable[[list[Any], list[Image.Image]], list[float]],
) -> tuple[Tensor, list[Image.Image], list[int], list[list[float]]]:
    """Of each image, a row and its seed, the best of its candidates: latents, images, seeds, all scores.

    make: (rows, noise (B, C, h, w)) -> latents and images. rate: scores of a make's images. A few images at a time, so
    that memory does not grow with `best_of`.
    """
    latents, images, chosen, scores = [], [], [], []
    at_once = max(1, MAX_CANDIDATES // best_of)
    for start in range(0, len(seeds), at_once):
        places = [i for i in range(start, min(start + at_once, len(seeds))) for _ in range(best_of)]
        tried = [candidate_seed(seeds[i], k % best_of) for k, i in enumerate(places)]
        noise = draw_noise(tuple(shape), [torch.Generator("cpu").manual_seed(seed) for seed in tried])
        z, made = make([rows[i] for i in places], noise)
        rated = rate([rows[i] for i in places], made)
        for first in range(0, len(places), best_of):
            own = rated[first : first + best_of]
            best = first + own.index(max(own))
            latents.append(z[best])
            images.append(made[best])
            chosen.append(tried[best])
            scores.append(own)
    return torch.stack(latents), images, chosen, scores


def find_checker(checker: Any) -> Checker | None:
    """A checker by name, by "module:function", or the function itself."""
    if isinstance(checker, str):
        return named_function("checker", CHECKERS, checker)
    checks.function("checker", checker)
    return checker


def named_function(what: str, known: Mapping[str, str], name: str) -> Callable[..., Any]:
    """A function by its name in `known`, or by "module:function". ValueError says what is wrong with `what`."""
    module, _, attribute = known.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        names = ", ".join(known)
        raise ValueError(f"{what} must be {names} or MODULE:FUNCTION, got {name!r}: {error}") from None


def rater(
    pipe: Pipeline, best_of: int, checker: str | Checker | None, judge: Judge | None
) -> Callable[[Sequence[Image.Image], Sequence[str]], list[float]]:
    """What gives candidates their scores: (images, prompts) -> one for each. ValueError where nothing can."""
    asks = find_checker(checker)
    if judge is not None and (checker is not None or not callable(judge)):
        raise ValueError("judge must be a function, and takes the place of a checker")
    if best_of > 1 and judge is None:
        pipe._need("understanding")
    return functools.partial(scores_of, pipe, checker=asks, judge=judge)


def scores_of(
    pipe: Pipeline,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    checker: Checker | None,
    judge: Judge | None,
) -> list[float]:
    """Of each image with its prompt, by the judge, else by `score_all`. ValueError for a judge's value that is no
    number."""
    if judge is None:
        return score_all(pipe, images, prompts, checker)
    values = [judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return [checks.number("what the judge returned", value) for value in values]


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be a text that is not empty, got {checks.shown(text)}")
