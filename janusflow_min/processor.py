# SPDX-License-Identifier: MIT
"""Text and images in, tensors out: tokenizer, prompt form, image preparation, left-padded batches.

Stands in front of `model.py` and imports nothing of it. Follows the reference's `processing_vlm.py`,
`image_processing_vlm.py` (both in `janus/janusflow/models`) and the two DeepSeek templates of
`janus/utils/conversation.py`, as run under `transformers` 4.46; only the Rust `tokenizers` is needed here.

Where the reference guesses we refuse: special strings inside user text, placeholders that do not match the
images, unknown roles, broken files. A refusal is a `ValueError` (`FileNotFoundError` for a missing file) that
says what is at fault. One image kind differs: 16-bit grey is scaled to 8 bits; PIL alone would clip it.

Legend: B conversations, T tokens, N image tokens, M images per conversation, S side of the square image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from torch import Tensor

from .config import JanusFlowConfig
from .files import read_json
from .official import PROCESSOR_FILES
from .pixels import ImageSource, check_image_source, open_image

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_TAG = "<image_placeholder>"
TAGS = {  # in the order in which missing ones are added; processor_config.json may name others
    "image_tag": IMAGE_TAG,
    "image_gen_tag": "<｜begin▁of▁generation｜>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
}
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the reference's defaults; the folder's own values win
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _check(good: bool, key: str, wanted: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{key} must be {wanted}, got {value!r:.80}")


def _is_number(value: Any, kinds: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


class Tokenizer:
    """A byte-level BPE with the special ids the model needs, each looked up by its string.

    folder: holds `tokenizer.json`; `tokenizer_config.json` and `special_tokens_map.json` may name BOS and
    EOS; the former has `add_bos_token` (true where missing). vocab_size: rows of the embedding. An image tag
    that the vocabulary lacks is added as a special token behind the last id, in the order of `TAGS`.
    Without PAD, EOS pads. The file's post-processor, truncation, padding and `add_eos_token` have no effect.

    Attributes: bos_id, eos_id, pad_id, image_id, image_gen_id, image_start_id, image_end_id, eos_token,
    image_tag. Raises FileNotFoundError without tokenizer.json; ValueError for a broken file, for no BOS or
    EOS, for a token without an embedding row.
    """

    def __init__(self, folder: str | os.PathLike, vocab_size: int, tags: Mapping[str, str] = TAGS):
        self.folder, self.vocab_size, self.image_tag = Path(folder), vocab_size, tags["image_tag"]
        path = self.folder / "tokenizer.json"
        read_json(path)  # for its errors, which are clearer
        config = read_json(self.folder / "tokenizer_config.json", required=False)
        special = read_json(self.folder / "special_tokens_map.json", required=False)
        try:
            self._bpe = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # some versions of the Rust side raise bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._bpe.no_padding()
        self._bpe.no_truncation()
        self._bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # changes no id
        self.add_bos = config.get("add_bos_token") is not False

        def named(key: str, default: str) -> str:
            value = special.get(key) or config.get(key)
            return str((value.get("content") if isinstance(value, dict) else value) or default)

        self.eos_token = named("eos_token", EOS)
        self.bos_id = self._special_id(named("bos_token", BOS), required_as="BOS")
        self.eos_id = self._special_id(self.eos_token, required_as="EOS")
        self.pad_id = self.eos_id if self._bpe.token_to_id(PAD) is None else self._special_id(PAD)
        tag_ids = [self._special_id(tags[key]) for key in TAGS]
        self.image_id, self.image_gen_id, self.image_start_id, self.image_end_id = tag_ids
        self._own = {self.bos_id, self.eos_id, self.pad_id, *tag_ids}
        # DeepSeek's vocabularies also list plain letters (ø, ö, ü ...) as added tokens: ordinary text.
        self._reserved = {
            i: token.content
            for i, token in self._bpe.get_added_tokens_decoder().items()
            if i in self._own or token.special or (token.content[:1] == "<" and token.content[-1:] == ">")
        }
        last, token = max((i, token) for token, i in self._bpe.get_vocab().items())
        if last >= vocab_size:
            raise ValueError(f"{path}: {token!r} has id {last}, but the embedding has {vocab_size} rows")

    def _special_id(self, token: str, required_as: str = "") -> int:
        """The id of a special string, which is added where the vocabulary lacks it, unless it is required."""
        index = self._bpe.token_to_id(token)
        if index is None and required_as:
            raise ValueError(f"the tokenizer in {self.folder} lacks its {required_as} token {token!r}")
        if index is None:
            index = 1 + max(self._bpe.get_vocab().values())
        if index >= self.vocab_size:
            rows = f"its id would be {index}, the embedding has {self.vocab_size} rows"
            raise ValueError(f"the tokenizer in {self.folder} has no row left for {token!r}: {rows}")
        if index not in self._bpe.get_added_tokens_decoder():  # a piece of the plain vocabulary keeps its id
            self._bpe.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        if self._bpe.token_to_id(token) != index:
            raise ValueError(f"the ids of the tokenizer in {self.folder} have holes: cannot add {token!r}")
        return index

    def _encode(self, text: str) -> tokenizers.Encoding:
        _check(isinstance(text, str), "text", "a str", text)
        _check(not any("\ud800" <= c <= "\udfff" for c in text), "text", "without lone surrogates", text)
        return self._bpe.encode(text, add_special_tokens=False)

    def encode_with_offsets(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Each token's id with its [first, last) characters; BOS comes first, once, if `add_bos`, at (0, 0).

        Special strings are recognised. Raises ValueError for text that is no str or no valid Unicode.
        """
        tokens = self._encode(text)
        bos = [(self.bos_id, (0, 0))] if self.add_bos and tokens.ids[:1] != [self.bos_id] else []
        return bos + list(zip(tokens.ids, tokens.offsets, strict=True))

    def encode(self, text: str) -> list[int]:
        """The ids of `encode_with_offsets`."""
        return [index for index, _ in self.encode_with_offsets(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text without special tokens and without ids that the vocabulary lacks; spaces stay."""
        return self._bpe.decode([int(i) for i in ids if int(i) not in self._own], skip_special_tokens=True)

    def reject_special_tokens(self, text: str, allowed: Iterable[str] = ()) -> None:
        """Raise ValueError, naming the strings, if the tokenizer sees special tokens that are not allowed."""
        found = {self._reserved.get(index) for index in self._encode(text).ids} - {None, *allowed}
        if found:
            raise ValueError(f"the text holds special tokens, which are not allowed there: {sorted(found)}")


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

    def __post_init__(self):
        side, low = self.image_size, self.min_size
        _check(_is_number(side, int) and side > 0, "image_size", "a whole number above 0", side)
        _check(_is_number(low, int) and 0 < low <= side, "min_size", f"a whole number from 1 to {side}", low)
        _check(_is_number(self.rescale_factor), "rescale_factor", "a number", self.rescale_factor)
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            three = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))
            _check(three or (value is None and not self.do_normalize), key, "three numbers", value)
        _check(not self.do_normalize or 0 not in self.image_std, "image_std", "not 0", self.image_std)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> ImageProcessor:
        """Read `preprocessor_config.json`, in which `image_size` is a must. FileNotFoundError, ValueError."""
        path = Path(folder) / "preprocessor_config.json"
        config = read_json(path)
        try:
            known = {key: value for key, value in config.items() if key in cls.__dataclass_fields__}
            return cls(**{"image_size": None} | known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def background(self) -> tuple[int, ...]:
        return (127, 127, 127) if self.image_mean is None else tuple(int(x * 255) for x in self.image_mean)

    def __call__(self, image: ImageSource) -> Tensor:
        """float32 [3, S, S]; in [-1, 1] for mean and deviation 0.5. Raises what `open_image` raises."""
        pixels = self.normalize(np.asarray(self.pad(image)))  # [S, S, 3]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def pad(self, image: ImageSource) -> Image.Image:
        """Longest side to S, centred on a square of S x S."""
        image, side = open_image(image), self.image_size
        longest = max(image.size)
        width, height = (max(int(length / longest * side), self.min_size) for length in image.size)
        square = Image.new("RGB", (side, side), self.background)
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(small, ((side - width) // 2, (side - height) // 2))
        return square

    def normalize(self, levels: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] -> float32: scaled and normalised."""
        pixels = levels.astype(np.float64) * self.rescale_factor
        pixels = pixels.astype(np.float32)  # rounded once here, as the reference does, then all in fp32
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return pixels


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded conversations. A missing image is zeros in pixel_values and False in images_emb_mask."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 at padding
    pixel_values: Tensor  # [B, M, 3, S, S] float32, M at least 1
    images_seq_mask: Tensor  # [B, T] bool: begin-of-image and the image tokens
    images_emb_mask: Tensor  # [B, M, N+1] bool: the embeddings that take those places
    sft_format: list[str]  # B prompt strings


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
        form, count = config.get("sft_format", "deepseek"), config.get("num_image_tokens", 576)
        _check(form in ("deepseek", "deepseek_old"), f"{path}: sft_format", "deepseek or deepseek_old", form)
        _check(not config.get("add_special_token"), f"{path}: add_special_token", "false", True)
        whole = _is_number(count, int) and count > 0
        _check(whole, f"{path}: num_image_tokens", "a whole number above 0", count)
        tags = {key: config.get(key, tag) for key, tag in TAGS.items()}
        _check(all(isinstance(tag, str) and tag for tag in tags.values()), f"{path}: tags", "strings", tags)
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
            unknown = [key for key in message if key not in ("role", "content", "images")]
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
        tokens = [self.tokenizer.image_id] * self.num_image_tokens
        return [self.tokenizer.image_start_id, *tokens, self.tokenizer.image_end_id]

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], str, list[ImageSource]]:
        """Ids, placeholders replaced by `image_ids`; the prompt string; the images, not opened yet.

        Raises ValueError where placeholders and images differ in number, for what is no image, and as `template`;
        FileNotFoundError for an image's path without a file.
        """
        tokenizer, sft_format = self.tokenizer, self.template(messages)
        sources: list[ImageSource] = []
        for message in messages:
            images = message.get("images")
            images = [] if images is None else images
            _check(isinstance(images, list | tuple), "a message's images", "a list", images)
            sources += images
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
        """What `conversation` gave for each -> a `Batch`. Opens the images, one at a time."""
        ids, sft_format, images = zip(*conversations, strict=True)
        rows, length, side = len(ids), max(map(len, ids)), self.image_processor.image_size
        slots, cpu = max(1, *map(len, images)), torch.device("cpu")  # whatever torch's defaults are
        input_ids = torch.full((rows, length), self.tokenizer.pad_id, dtype=torch.int64, device=cpu)  # [B, T]
        attention_mask = torch.zeros(rows, length, dtype=torch.int64, device=cpu)
        pixel_values = torch.zeros(
            rows, slots, 3, side, side, dtype=torch.float32, device=cpu
        )  # [B, M, 3, S, S]
        emb_mask = torch.zeros(
            rows, slots, self.num_image_tokens + 1, dtype=torch.bool, device=cpu
        )  # [B, M, N+1]
        for b in range(rows):
            input_ids[b, -len(ids[b]) :] = torch.tensor(ids[b], device=cpu)
            attention_mask[b, -len(ids[b]) :] = 1
            emb_mask[b, : len(images[b])] = True
            for m, image in enumerate(images[b]):
                pixel_values[b, m] = self.image_processor(image)
        seq_mask = (input_ids == self.tokenizer.image_id) | (input_ids == self.tokenizer.image_start_id)
        return Batch(input_ids, attention_mask, pixel_values, seq_mask, emb_mask, list(sft_format))


def check_processor_matches(folder: Path, config: JanusFlowConfig, processor: Processor) -> None:
    """Raise ValueError, naming file and key, where the processor makes other images than the model reads."""
    siglip = config.siglip
    if processor.num_image_tokens != siglip.num_patches:
        raise ValueError(
            f"{folder / 'processor_config.json'}: num_image_tokens is {processor.num_image_tokens}, but the encoder "
            f"makes {siglip.num_patches} of an image of {siglip.image_size} px"
        )
    if processor.image_processor.image_size != siglip.image_size:
        raise ValueError(
            f"{folder / 'preprocessor_config.json'}: image_size is {processor.image_processor.image_size}, the "
            f"encoder's in config.json {siglip.image_size}"
        )
