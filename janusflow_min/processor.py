# SPDX-License-Identifier: MIT
"""Text and images in, tensors out: prompt form, image preparation, left-padded batches.

Follows the reference's `processing_vlm.py`, `image_processing_vlm.py` (both in `janus/janusflow/models`) and the two
DeepSeek templates of `janus/utils/conversation.py`, as run under `transformers` 4.46. Where the reference guesses, a
ValueError says what is at fault.

Legend: B conversations, T tokens, N image tokens, M images per conversation, S side of the square image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checks import flag, number, shown, whole
from .config import JanusFlowConfig
from .files import read_json
from .official import PROCESSOR_FILES
from .pixels import ImageSource, check_image_source, look_up, open_image
from .prefetch import image_bytes, resize
from .tokenizer import TAGS, Tokenizer

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the reference's defaults; the folder's own values win
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _check(good: bool, key: str, wanted: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{key} must be {wanted}, got {shown(value)}")


@dataclass(frozen=True)
class ImageProcessor:
    """Image -> pixels: longest side to `image_size`, bicubic; centred on a square; scaled, normalised.

    The fields are those of `preprocessor_config.json`, with the reference's defaults. The square's colour is
    int(255·mean) per channel, 127 where `image_mean` is None (then `do_normalize` must be false).
    """

    image_size: int
    min_size: int = 14
    image_mean: Sequence[float] | None = CLIP_MEAN
    image_std: Sequence[float] | None = CLIP_STD
    rescale_factor: float = 1 / 255
    do_normalize: bool = True

    def __post_init__(self) -> None:
        whole("image_size", self.image_size, 1, 2**31 - 1)
        whole("min_size", self.min_size, 1, self.image_size)
        number("rescale_factor", self.rescale_factor, 0, 1e6, above=True)
        flag("do_normalize", self.do_normalize)
        for key, least in (("image_mean", -1e6), ("image_std", 1e-6)):
            value = getattr(self, key)
            if value is None and not self.do_normalize:
                continue
            _check(isinstance(value, list | tuple) and len(value) == 3, key, "three numbers", value)
            for i, x in enumerate(value):
                number(f"{key}[{i}]", x, least, 1e6)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ImageProcessor:
        """Read `preprocessor_config.json`, in which `image_size` is a must. FileNotFoundError, ValueError."""
        path = Path(folder) / "preprocessor_config.json"
        known = {key: value for key, value in read_json(path).items() if key in cls.__dataclass_fields__}
        try:
            return cls(**{"image_size": None} | known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def background(self) -> tuple[int, ...]:
        return (127, 127, 127) if self.image_mean is None else tuple(int(x * 255) for x in self.image_mean)

    def __call__(self, image: ImageSource) -> Tensor:
        """float32 [3, S, S]; in [-1, 1] for mean and deviation 0.5. Raises what `open_image` raises."""
        return look_up(self.levels([image]), self.table)[0]

    def levels(self, images: Sequence[ImageSource]) -> Tensor:
        """uint8 [K, 3, S, S] on the CPU: the bytes that `look_up` makes pixels of, on any device, with `table`."""
        return image_bytes(images, self.image_size, self._square)

    def pad(self, image: ImageSource) -> Image.Image:
        """Longest side to S, centred on a square of S x S."""
        return self._square(open_image(image))

    def _square(self, image: Image.Image, threads: int = 1) -> Image.Image:
        side, longest = self.image_size, max(image.size)
        width, height = (max(int(length / longest * side), self.min_size) for length in image.size)
        square = Image.new("RGB", (side, side), self.background)
        small = resize(image, (width, height), threads)
        square.paste(small, ((side - width) // 2, (side - height) // 2))
        return square

    @cached_property
    def table(self) -> Tensor:
        """float32 [3, 256] on the CPU: what each of a channel's 256 levels becomes, scaled and normalised."""
        # Rounded once here, as the reference does, then all in fp32.
        levels = np.arange(256, dtype=np.float64)[:, None].repeat(3, axis=1)
        pixels = (levels * self.rescale_factor).astype(np.float32)  # [256, 3]
        if self.do_normalize:
            mean, std = (np.asarray(values, np.float32) for values in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / std
        return torch.from_numpy(pixels.T.copy())


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded conversations. A missing image is zeros in pixel_values and False in images_emb_mask.

    Images stay bytes until something asks for `pixel_values`, which count from then on.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 at padding
    levels: Tensor  # [K, 3, S, S] uint8, the images there are, row by row
    table: Tensor  # [3, 256] float32, the pixels of a channel's levels
    images_seq_mask: Tensor  # [B, T] bool: begin-of-image and the image tokens
    images_emb_mask: Tensor  # [B, M, N+1] bool: the embeddings that take those places
    sft_format: list[str]  # B prompt strings

    @cached_property
    def pixel_values(self) -> Tensor:
        """[B, M, 3, S, S] float32, M at least 1."""
        present = self.images_emb_mask[..., 0]
        pixels = torch.zeros(*present.shape, *self.levels.shape[1:], dtype=torch.float32, device="cpu")
        pixels[present] = look_up(self.levels, self.table)
        return pixels

    def image_pixels(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[K, 3, S, S] of the images there are, made on the device: the bytes go there."""
        if "pixel_values" in vars(self):
            return self.pixel_values[self.images_emb_mask[..., 0]].to(device, dtype)
        return look_up(self.levels.to(device), self.table.to(dtype))


@dataclass(frozen=True, eq=False)
class Processor:
    """Messages and images -> tensors, in the model's own prompt form. Make one with `from_folder`.

    A message is {"role": "User" or "Assistant", "content": str, "images": list (optional)}; images are paths,
    PIL images or uint8 arrays, and `<image_placeholder>` in the contents says where each goes, in order. A
    conversation is a list of messages; one to be answered ends in an empty message of the assistant.
    """

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    num_image_tokens: int
    files: Mapping[str, bytes]  # name -> bytes of the tokenizer's and processor's files, for a saver

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, vocab_size: int) -> Processor:
        """Read a checkpoint folder; vocab_size: rows of the embedding.

        Raises FileNotFoundError (tokenizer.json, preprocessor_config.json) and ValueError, naming the file.
        """
        folder = Path(folder)
        path = folder / "processor_config.json"
        config = read_json(path, required=False)
        form = config.get("sft_format", "deepseek")
        _check(form in ("deepseek", "deepseek_old"), f"{path}: sft_format", "deepseek or deepseek_old", form)
        _check(not config.get("add_special_token"), f"{path}: add_special_token", "false", True)
        count = whole(f"{path}: num_image_tokens", config.get("num_image_tokens", 576), 1, 2**31 - 1)
        tags = {key: config.get(key, tag) for key, tag in TAGS.items()}
        for key, tag in tags.items():
            _check(isinstance(tag, str) and tag != "", f"{path}: {key}", "a string", tag)
        tokenizer, image_processor = Tokenizer(folder, vocab_size, tags), ImageProcessor.from_folder(folder)
        files = {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}
        return cls(tokenizer, image_processor, count, files)

    def template(self, messages: Sequence[Mapping[str, Any]], system_prompt: str = SYSTEM_PROMPT) -> str:
        """The prompt string: system prompt, blank line, `ROLE: content` per message with its role's ending.

        Raises ValueError for no messages, other roles, and special strings other than image placeholders.
        """
        filled = isinstance(messages, list | tuple) and len(messages) > 0
        _check(filled, "a conversation", "a list of messages, at least one", messages)
        self.tokenizer.reject_special_tokens(system_prompt)
        text = system_prompt + "\n\n" if system_prompt else ""
        endings = {"User": "\n\n", "Assistant": self.tokenizer.eos_token}
        for message in messages:
            good = isinstance(message, Mapping) and "role" in message and "content" in message
            _check(good, "a message", "a dict with role and content", message)
            unknown = ", ".join(str(key) for key in message if key not in ("role", "content", "images"))
            _check(not unknown, "a message's keys", "role, content and images", unknown)
            role, content = str(message["role"]).capitalize(), message["content"]
            _check(role in endings, "a message's role", "'User' or 'Assistant'", message["role"])
            _check(isinstance(content, str), "a message's content", "a str", content)
            content = content.strip()
            self.tokenizer.reject_special_tokens(content, allowed=[self.tokenizer.image_tag])
            text += f"{role}: {content}{endings[role]}" if content else f"{role}:"
        return text.strip()

    def generation_prompt(self, prompt: str) -> tuple[list[int], str]:
        """Ids, the generation tag last, and the prompt string before that tag.

        Raises ValueError for an empty prompt and for one that holds a special string.
        """
        _check(isinstance(prompt, str) and prompt.strip() != "", "the prompt", "text", prompt)
        self.tokenizer.reject_special_tokens(prompt)
        messages = [{"role": "User", "content": prompt}, {"role": "Assistant", "content": ""}]
        sft_format = self.template(messages, system_prompt="")
        return [*self.tokenizer.encode(sft_format), self.tokenizer.image_gen_id], sft_format

    def image_ids(self) -> list[int]:
        """What one image placeholder becomes: begin-of-image, N image tokens, end-of-image."""
        own = self.tokenizer
        return [own.image_start_id, *[own.image_id] * self.num_image_tokens, own.image_end_id]

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], system_prompt: str = SYSTEM_PROMPT
    ) -> tuple[list[int], str, list[ImageSource]]:
        """Ids, placeholders replaced by `image_ids`; the prompt string; the images, not opened yet.

        Raises ValueError where placeholders and images differ in number, for what is no image, and as `template`;
        FileNotFoundError for an image's path without a file.
        """
        tokenizer, sft_format = self.tokenizer, self.template(messages, system_prompt)
        groups = [[] if (images := message.get("images")) is None else images for message in messages]
        for images in groups:
            _check(isinstance(images, list | tuple), "a message's images", "a list", images)
        sources: list[ImageSource] = [source for images in groups for source in images]
        for source in sources:
            check_image_source(source)
        text_ids = tokenizer.encode(sft_format)
        tags = text_ids.count(tokenizer.image_id)
        if tags != len(sources):
            raise ValueError(f"{tags} image placeholders ({tokenizer.image_tag}), but {len(sources)} images")
        spread = {tokenizer.image_id: self.image_ids()}
        ids = [i for index in text_ids for i in spread.get(index, [index])]
        return ids, sft_format, sources

    def batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """Conversations -> a `Batch`. Raises ValueError for none, and what `conversation` and `open_image` raise."""
        filled = isinstance(conversations, list | tuple) and len(conversations) > 0
        _check(filled, "a batch", "a list of conversations, at least one", conversations)
        return self.collate([self.conversation(messages) for messages in conversations])

    def collate(self, conversations: Sequence[tuple[list[int], str, list[ImageSource]]]) -> Batch:
        """What `conversation` gave for each -> a `Batch`. Opens the images."""
        ids, sft_format, images = zip(*conversations, strict=True)
        rows, length = len(ids), max(map(len, ids))
        slots, cpu = max(1, *map(len, images)), torch.device("cpu")  # whatever torch's defaults are
        input_ids = torch.full((rows, length), self.tokenizer.pad_id, dtype=torch.int64, device=cpu)  # [B, T]
        attention_mask = torch.zeros(rows, length, dtype=torch.int64, device=cpu)
        emb_mask = torch.zeros(rows, slots, self.num_image_tokens + 1, dtype=torch.bool, device=cpu)
        for b in range(rows):
            input_ids[b, -len(ids[b]) :] = torch.tensor(ids[b], device=cpu)
            attention_mask[b, -len(ids[b]) :] = 1
            emb_mask[b, : len(images[b])] = True
        seq_mask = (input_ids == self.tokenizer.image_id) | (input_ids == self.tokenizer.image_start_id)
        levels = self.image_processor.levels([image for group in images for image in group])
        table = self.image_processor.table
        return Batch(input_ids, attention_mask, levels, table, seq_mask, emb_mask, list(sft_format))


def check_processor_matches(folder: Path, config: JanusFlowConfig, processor: Processor) -> None:
    """Raise ValueError, naming file and key, where the processor makes other images than the model reads."""
    siglip, side, count = config.siglip, processor.image_processor.image_size, processor.num_image_tokens
    if count != siglip.num_patches:
        makes = f"the encoder makes {siglip.num_patches} of an image of {siglip.image_size} px"
        raise ValueError(f"{folder / 'processor_config.json'}: num_image_tokens is {count}, but {makes}")
    if side != siglip.image_size:
        reads = f"the encoder's in config.json {siglip.image_size}"
        raise ValueError(f"{folder / 'preprocessor_config.json'}: image_size is {side}, {reads}")
