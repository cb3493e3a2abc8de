# SPDX-License-Identifier: MIT
"""What a person calls: `load`, then `generate`, `understand`, `chat`; `save` writes the official layout again.

    import janusflow_min as jf
    pipe = jf.load("tiny")
    pipe.generate("a photo of a red star").images[0].save("star.png")
    pipe.understand("What is in the picture?", images="star.png").text

Sampling follows the reference's `demo/app_janusflow.py`, answering its `inference.py`. The prompt's keys and values
are computed once for every distinct prompt and stay in the cache over all steps: causal attention makes that
exact. The unconditional rows of guidance see BOS alone, at position 0, and share their twins' positions.

Legend: B images, R rows of the LLM's batch, T text tokens, N image tokens, D hidden size, C h w latent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .checkpoint import check_config, is_checkpoint_entry, load_model, save_model
from .files import atomic_directory, expand
from .flow import euler, guide
from .hub import resolve, resolve_vae
from .model import PARTS, JanusFlow, Parts
from .pixels import is_image_source, to_uint8
from .processor import FILES, Processor, check_processor_matches
from .vae import VAE, check_vae_dtype, load_vae

if TYPE_CHECKING:
    from .fast.engine import Engine

DEFAULT_QUESTION = "Describe the image."
VAE_IMAGES = 8  # decoded at once on a GPU
MAX_IMAGES = 16  # painted at once; more would not be faster, only larger
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Generation:
    """Painted images: `parallel_size` for each prompt, prompts in order."""

    images: list[Image.Image]
    latents: Tensor  # (B, C, h, w) fp32 on the CPU, final latents before the VAE
    seeds: list[int] | None  # None where the caller gave the noise
    prompts: list[str]  # of each image


@dataclass(frozen=True)
class Answer:
    text: str  # without special tokens
    sft_format: str  # the prompt as the model read it
    token_ids: list[int]  # the EOS that ended it included


class Pipeline:
    """A loaded model with its processor and VAE. Made by `load`; `fast` and `compile` are explained there."""

    def __init__(
        self,
        model: JanusFlow,
        processor: Processor,
        vae: VAE | None,
        fast: bool = False,
        compile: bool = False,
    ):
        self.model, self.processor, self.vae = model, processor, vae
        self.fast, self.compile = fast, compile
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine | None:
        """The fast path, made when first needed, and anew when the model's weights moved; None: the plain path."""
        if not self.fast:
            return None
        if self._engine is None or not self._engine.current:
            from .fast.engine import make

            self._engine = None  # its buffers go first
            self._engine = make(self.model, self.compile)
        return self._engine

    # Generation -----------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        parallel_size: int = 5,
        cfg_weight: float = 2.0,
        num_inference_steps: int = 30,
        img_size: int | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        upstream_rounding: bool = False,
        progress: bool = True,
    ) -> Generation:
        """Paint images from text.

        prompt: one or several; each gets `parallel_size` images. cfg_weight: guidance, 1 is none.
        img_size: side of the square result in px; other than the model's own means a Lanczos resize.
        seed: image k of the call gets seed + k and a generator of its own, so its noise depends on neither batch
        nor device; a list gives every image its seed; None draws seeds, which the result names.
        latents: (B, C, h, w) starting noise instead of seeds, B = prompts · parallel_size.
        upstream_rounding: round time, step, latents and rotary frequencies to the model's dtype as the published
        code does; by default they stay in fp32, which is closer to the true flow.
        Raises ValueError for what it cannot paint: an empty prompt, special tags in it, sizes or steps below 1,
        latents of another shape; FloatingPointError where latents or pixels become NaN or infinite.
        """
        self._need("generation")
        prompts = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt is an empty list")
        _at_least_one(parallel_size=parallel_size, num_inference_steps=num_inference_steps)
        if img_size is not None:
            _at_least_one(img_size=img_size)
        if not np.isfinite(cfg_weight):
            raise ValueError(f"cfg_weight must be a finite number, got {cfg_weight}")
        # Without the generation tag: t_emb takes its place.
        encoded = [self.processor.generation_prompt(text)[0][:-1] for text in prompts]
        image_tokens = 1 + self.model.num_image_tokens  # t_emb in front
        longest = max(map(len, encoded)) + image_tokens
        self._check_length(longest, f"the longest prompt and {image_tokens} image tokens")
        count = len(prompts) * parallel_size
        noise, seeds = self._noise(count, seed, latents)
        final = []
        parts = [range(i, min(i + MAX_IMAGES, count)) for i in range(0, count, MAX_IMAGES)]
        with tqdm(
            total=num_inference_steps * len(parts),
            desc="Painting",
            unit="step",
            disable=not progress,
            leave=False,
        ) as bar:
            for part in parts:
                each = [encoded[i // parallel_size] for i in part]
                z = noise[part.start : part.stop].to(
                    self.model.device, self.model.dtype if upstream_rounding else torch.float32
                )
                velocity = (self.engine or self).velocity(each, 1, cfg_weight, upstream_rounding)
                final.append(euler(velocity, z, num_inference_steps, _Pace(bar, z.device)))
        final = torch.cat(final)
        fine = torch.isfinite(final).flatten(1).all(1).tolist()
        if not all(fine):
            bad = sorted({i // parallel_size for i in range(count) if not fine[i]})
            raise FloatingPointError(
                f"the latents of {', '.join(repr(prompts[i]) for i in bad)} are not finite, so nothing is painted; "
                f"dtype {self.model.dtype} (float16 overflows, bfloat16 does not), cfg_weight {cfg_weight}"
            )
        images = []
        # A few at a time: the VAE's activations, not the model, would set the peak of memory.
        at_once = VAE_IMAGES if final.is_cuda else 1
        for start in range(0, count, at_once):
            pixels = self.vae.decode(final[start : start + at_once])
            fine = torch.isfinite(pixels).flatten(1).all(1).tolist()
            for i in range(len(fine)):
                if not fine[i]:
                    raise FloatingPointError(
                        f"the VAE, in {self.vae.dtype}, turns the latents of {prompts[(start + i) // parallel_size]!r} "
                        "into NaN or infinite pixels, so nothing is painted"
                    )
            images += map(Image.fromarray, to_uint8(pixels))
        if img_size is not None and img_size != images[0].width:
            images = [image.resize((img_size, img_size), Image.Resampling.LANCZOS) for image in images]
        return Generation(
            images, final.float().cpu(), seeds, [text for text in prompts for _ in range(parallel_size)]
        )

    def velocity(
        self,
        prompts: Sequence[Sequence[int]],
        parallel_size: int,
        cfg_weight: float,
        upstream_rounding: bool = False,
    ):
        """The guided velocity (z (B, C, h, w), timestep (B,)) -> (B, C, h, w) for B = prompts · parallel_size.

        prompts: token ids of each, the generation tag left out. Guidance 1 skips the unconditional rows.
        """
        model, device = self.model, self.model.device
        image_tokens = 1 + model.num_image_tokens  # t_emb in front
        longest = max(map(len, prompts))
        # Distinct prompts, then BOS alone for the unconditional rows: left-padded, computed once.
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        rows = [*distinct, distinct[0][:1]]
        ids, mask = left_pad(rows, self.processor.tokenizer.pad_id, device)  # (R', T)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        prefix = model.new_cache(len(rows), longest)
        model.llm(model.llm.embed_tokens(ids), positions, mask, prefix, upstream_rounding=upstream_rounding)
        # One row for every image, conditional rows first.
        index = {ids: i for i, ids in enumerate(distinct)}
        chosen = [index[tuple(p)] for p in prompts for _ in range(parallel_size)]
        lengths = torch.tensor([len(distinct[i]) for i in chosen], device=device)
        guided = cfg_weight != 1.0
        if guided:
            lengths = lengths.repeat(2)
            chosen = chosen + [len(distinct)] * len(chosen)
        chosen = torch.tensor(chosen, device=device)
        cache = prefix.select(chosen, longest + image_tokens)
        seen = torch.cat([mask[chosen], mask.new_ones(len(chosen), image_tokens)], dim=1)  # (R, T + 1 + N)
        seen = None if bool(seen.all()) else seen
        image_positions = lengths[:, None] + torch.arange(image_tokens, device=device)  # (R, 1 + N)

        def evaluate(z: Tensor, timestep: Tensor) -> Tensor:
            cache.length = longest  # forget the last step's image tokens
            v = model.velocity(
                z,
                timestep,
                position_ids=image_positions,
                attention_mask=seen,
                cache=cache,
                upstream_rounding=upstream_rounding,
            )
            if not guided:
                return v
            v = v.to(z.dtype)  # guidance in the sampler's precision
            return guide(*v.chunk(2), cfg_weight)

        return evaluate

    def _noise(self, count: int, seed: int | Sequence[int] | None, latents: Tensor | None):
        shape = (count, *self.model.latent_shape)
        if latents is not None:
            if seed is not None:
                raise ValueError("give either seed or latents, not both")
            latents = torch.as_tensor(latents)
            if tuple(latents.shape) != shape:
                raise ValueError(
                    f"latents must be {list(shape)} (images, C, h, w), got {list(latents.shape)}"
                )
            if not torch.isfinite(latents).all():
                raise ValueError("latents hold NaN or infinite values")
            return latents, None
        if seed is None:
            seed = _fresh_seed()
        single = not isinstance(seed, Iterable)
        seeds = [_seed(_seed(seed) + k) for k in range(count)] if single else [_seed(s) for s in seed]
        if len(seeds) != count:
            raise ValueError(f"{count} images need {count} seeds, got {len(seeds)}")
        drawn = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(drawn), seeds

    # Understanding -----------------------------------------------------------------------

    def understand(
        self,
        prompt: str | Sequence[str] | None,
        images: Any = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 50,
        seed: int | None = None,
        upstream_rounding: bool = False,
    ) -> Answer | list[Answer]:
        """Answer a question, about images or none.

        prompt: one question or several. images: for one question an image (path, PIL image or uint8 array
        [H, W, 3]) or a list of them; for several questions a list with an image, a list of images or None for each.
        An empty question about images means "Describe the image." The other options are `chat`'s.
        """
        single = prompt is None or isinstance(prompt, str)
        prompts = [prompt] if single else list(prompt)
        if not prompts:
            raise ValueError("prompt is an empty list")
        if single:
            groups = [_as_list(images)]
        else:
            if images is not None and (is_image_source(images) or len(images) != len(prompts)):
                raise ValueError(
                    f"{len(prompts)} prompts need a list of {len(prompts)} images, lists of images or None"
                )
            groups = [_as_list(group) for group in (images if images is not None else [None] * len(prompts))]
        conversations = []
        for text, group in zip(prompts, groups, strict=True):
            if text is None or (isinstance(text, str) and not text.strip()):
                if not group:
                    raise ValueError("the prompt is empty and there is no image to describe")
                text = DEFAULT_QUESTION
            self.processor.tokenizer.reject_special_tokens(text)
            content = f"{self.processor.tokenizer.image_tag}\n" * len(group) + text
            user = {"role": "User", "content": content, "images": group}
            conversations.append([user, {"role": "Assistant", "content": ""}])
        answers = self._answer(
            conversations, max_new_tokens, temperature, top_p, top_k, seed, upstream_rounding
        )
        return answers[0] if single else answers

    def chat(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 50,
        seed: int | None = None,
        upstream_rounding: bool = False,
    ) -> Answer | list[Answer]:
        """Continue a conversation, or a list of them as one batch.

        A conversation is a list of messages in the reference's form: {"role": "User" or "Assistant", "content":
        text with an <image_placeholder> for each image, "images": [...]}; where the last is not an empty message
        of the assistant, one is added.
        temperature 0 is greedy; above 0: temperature, top-k, top-p, then one multinomial draw over the batch a
        step, from a CPU generator made of `seed` (None: of a fresh one). upstream_rounding: round the rotary
        frequencies to the model's dtype, as the published code does. Raises ValueError for conversations that do not
        fit.
        """
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"a conversation is a list of messages, not {type(conversation).__name__}")
        if not conversation:
            raise ValueError("the conversation is empty")
        single = isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else conversation
        answers = self._answer(
            [list(c) if isinstance(c, (list, tuple)) else [c] for c in conversations],
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            seed,
            upstream_rounding,
        )
        return answers[0] if single else answers

    @torch.inference_mode()
    def _answer(
        self, conversations, max_new_tokens, temperature, top_p, top_k, seed, upstream_rounding
    ) -> list[Answer]:
        self._need("understanding")
        _at_least_one(max_new_tokens=max_new_tokens)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if not _is_whole(top_k) or top_k < 0:
            raise ValueError(f"top_k must be a whole number, 0 (off) or above, got {top_k!r}")
        for messages in conversations:
            if not messages:
                raise ValueError("the conversation is empty")
            last = messages[-1] if isinstance(messages[-1], Mapping) else {}  # the processor names what it is
            if str(last.get("role", "")).lower() != "assistant" or str(last.get("content", "")).strip():
                messages.append({"role": "Assistant", "content": ""})
        batch = self.processor.batch(conversations)
        length = batch.input_ids.shape[1]
        self._check_length(length + 1, f"the conversation's {length} tokens and an answer")
        generator = torch.Generator().manual_seed(_fresh_seed() if seed is None else _seed(seed))
        max_new_tokens = min(max_new_tokens, self.model.config.llm.max_position_embeddings - length)
        eos_id = self.processor.tokenizer.eos_id

        def choose(logits: Tensor) -> Tensor:
            return sample(logits, temperature, top_p, top_k, generator)

        if self.engine is not None:
            greedy = None if temperature == 0 else choose
            tokens = self.engine.decode(batch, max_new_tokens, eos_id, greedy, upstream_rounding)
        else:
            tokens = self._decode(batch, max_new_tokens, eos_id, choose, upstream_rounding)
        texts = [self.processor.tokenizer.decode(ids) for ids in tokens]
        return [Answer(t, s, ids) for t, s, ids in zip(texts, batch.sft_format, tokens, strict=True)]

    def _decode(self, batch, max_new_tokens, eos_id, choose, upstream_rounding) -> list[list[int]]:
        device = self.model.device
        mask = batch.attention_mask.to(device).bool()
        embeds = self.model.embed_inputs(
            batch.input_ids.to(device),
            batch.pixel_values.to(device),
            batch.images_seq_mask.to(device),
            batch.images_emb_mask.to(device),
        )
        return decode(self.model, embeds, mask, max_new_tokens, eos_id, choose, upstream_rounding)

    def _check_length(self, length: int, what: str) -> None:
        limit = self.model.config.llm.max_position_embeddings
        if length > limit:
            raise ValueError(f"{what} need {length} positions; the model has {limit}")

    def _need(self, task: str) -> None:
        if self.model.parts not in ("all", task):
            raise ValueError(f'only parts="{self.model.parts}" was loaded; {task} needs "all" or "{task}"')


class _Pace:
    """`euler`'s on_step: moves the bar, and keeps the host two steps ahead of the GPU, so that the bar tells the truth
    and an interrupt is obeyed, without ever letting the GPU wait."""

    def __init__(self, bar: tqdm, device: torch.device):
        self.bar, self.device, self.events = bar, device, []

    def __call__(self, step: int, z: Tensor) -> None:
        if self.device.type == "cuda":
            self.events.append(torch.cuda.current_stream(self.device).record_event())
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        self.bar.update()


def decode(
    model: JanusFlow,
    inputs_embeds: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    eos_id: int,
    choose: Callable[[Tensor], Tensor],
    upstream_rounding: bool = False,
) -> list[list[int]]:
    """Autoregressive decoding of left-padded rows, until EOS or `max_new_tokens`.

    inputs_embeds (B, T, D), mask (B, T) bool, choose: fp32 logits (B, V) -> ids (B,). Returns a list of ids for
    each row, EOS included where it came.
    """
    rows, length = mask.shape
    full = bool(mask.all())
    mask = torch.cat([mask, mask.new_ones(rows, max_new_tokens)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T + new): counted from a row's first real token
    cache = model.new_cache(rows, length + max_new_tokens)
    ended = torch.zeros(rows, dtype=torch.bool, device=mask.device)
    columns, start = [], 0
    embeds = inputs_embeds
    for end in range(length, length + max_new_tokens):
        seen = None if full else mask[:, :end]
        hidden = model.llm(embeds, positions[:, start:end], seen, cache, upstream_rounding=upstream_rounding)
        ids = choose(model.logits(hidden[:, -1]))
        ids = ids.masked_fill(ended, eos_id)  # a row that ended is filled up with EOS
        columns.append(ids)
        ended = ended | (ids == eos_id)
        if ended.all():
            break
        embeds, start = model.llm.embed_tokens(ids)[:, None], end
    answers = torch.stack(columns, dim=1).tolist()
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in answers]


def sample(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None
) -> Tensor:
    """fp32 logits (B, V) -> ids (B,): greedy at temperature 0, else temperature, top-k, top-p and one draw.

    Top-p as in transformers: in ascending order, tokens whose cumulative probability stays at or below 1 - p go;
    the best always stays. The draw is over the whole vocabulary, on the CPU.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits / temperature
    if 0 < top_k < scores.shape[-1]:
        worst = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < worst, float("-inf"))
    if top_p < 1:
        ascending, order = scores.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    probabilities = scores.softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> ids (R, T) and mask (R, T), padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


# Loading and saving -----------------------------------------------------------------------


def load(
    source: str | Path = "tiny",
    vae_path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_dtype: str | torch.dtype | None = None,
    parts: Parts = "all",
    progress: bool = True,
    fast: bool = True,
    compile: bool = False,
) -> Pipeline:
    """Load a checkpoint in the official layout.

    source: "tiny" (the trained default inside this package), a folder, or a hub id such as
    "deepseek-ai/JanusFlow-1.3B". vae_path: folder or hub id; by default the checkpoint's own `vae/`, else
    stabilityai/sdxl-vae from the hub. device "auto": CUDA, then MPS, then the CPU. dtype "auto": bfloat16 on CUDA,
    else float32. vae_dtype: the model's where that is possible. parts: "all", "generation" or "understanding"
    loads no more than the task needs. fast: on an NVIDIA GPU in bfloat16 use the kernels and CUDA graphs of `fast/`;
    False is the plain path. compile: also torch.compile for what those leave over (UViT, SigLIP, VAE), a minute or
    more at the first use, then from torch's cache on disk. Raises FileNotFoundError or ValueError, which name what is
    wrong.
    """
    if parts not in PARTS:
        raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if parts != "understanding":
        usual = torch.float32 if dtype == torch.float16 else dtype  # float16 is no dtype for the VAE
        vae_dtype = check_vae_dtype(usual if vae_dtype is None else pick_dtype(vae_dtype, device))
    folder = resolve(source, progress)
    check_config(folder)  # the commonest mistake first: not a JanusFlow checkpoint
    if parts != "understanding":  # before the weights, which take long
        where = resolve_vae(folder, vae_path, progress)
    model = load_model(folder, device, dtype, parts, progress)
    processor = Processor.from_folder(folder, model.config.llm.vocab_size)
    check_processor_matches(folder, model.config, processor)
    vae = None
    if parts != "understanding":
        vae = load_vae(where, device, vae_dtype)
        channels = model.config.latent_channels
        if vae.latent_channels != channels:
            raise ValueError(
                f"the VAE in {where} has {vae.latent_channels} latent channels, the model {channels}"
            )
        if compile:
            vae.compile_decoder()
    return Pipeline(model, processor, vae, fast, compile)


def save(
    pipe: Pipeline, folder: str | Path, overwrite: bool = False, max_shard_size: int | None = None
) -> Path:
    """Write the pipeline in the official layout, VAE included, in its present dtypes; returns the folder.

    The folder appears only when everything is written. FileExistsError where something is there already, unless
    `overwrite`: then a checkpoint's files give way, and whatever else the folder holds stays. max_shard_size in
    bytes splits the weights. ValueError for a pipeline that was loaded in parts, and for a model that is wrapped
    (torch.compile, peft, accelerate), whose weights nobody could load.
    """
    with atomic_directory(
        folder, overwrite, lambda name: name in FILES or is_checkpoint_entry(name)
    ) as temporary:
        save_model(pipe.model, temporary, max_shard_size)
        for name, content in pipe.processor.files.items():
            (temporary / name).write_bytes(content)
        pipe.vae.autoencoder.save_pretrained(temporary / "vae")
    return expand(folder)


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA, then Apple's MPS, then the CPU. ValueError for a device that this machine lacks."""
    if str(device) == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if torch.device(device).type == "meta" if isinstance(device, torch.device) else str(device)[:4] == "meta":
        raise ValueError('device "meta" holds no weights; to look at a checkpoint, use `janusflow-min info`')
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} is not usable here: {str(error).splitlines()[0]}") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on CUDA, else float32. Names as in torch, with or without "torch."."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def _as_list(images: Any) -> list:
    if images is None:
        return []
    return [images] if is_image_source(images) else list(images)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


def _seed(value: int) -> int:
    if not _is_whole(value) or not 0 <= value < 2**63:
        raise ValueError(f"a seed must be a whole number in [0, 2**63), got {value!r}")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
