# SPDX-License-Identifier: MIT
"""Text to token ids and back: the official `tokenizer.json`, run by the Rust `tokenizers` alone.

Follows what the reference's `LlamaTokenizerFast` does under `transformers` 4.46.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from .checks import shown
from .files import printable, read_json

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TAGS = {  # in the order in which missing ones are added; processor_config.json may name others
    "image_tag": "<image_placeholder>",
    "image_gen_tag": "<｜begin▁of▁generation｜>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
}


class Tokenizer:
    """A byte-level BPE with the special ids the model needs, each looked up by its string.

    folder: holds `tokenizer.json`; `tokenizer_config.json` and `special_tokens_map.json` may name BOS and EOS; the
    former has `add_bos_token` (true where missing). vocab_size: rows of the embedding. An image tag that the
    vocabulary lacks is added as a special token behind the last id. Without PAD, EOS pads. The file's
    post-processor, truncation, padding and `add_eos_token` have no effect. FileNotFoundError without
    tokenizer.json; ValueError for a broken file, for no BOS or EOS, for a token without an embedding row.
    """

    def __init__(self, folder: str | os.PathLike, vocab_size: int, tags: Mapping[str, str] = TAGS):
        self.folder, self.vocab_size, self.image_tag = Path(folder), vocab_size, tags["image_tag"]
        self.path = self.folder / "tokenizer.json"
        read_json(self.path)  # for its errors, which are clearer
        config = read_json(self.folder / "tokenizer_config.json", required=False)
        special = read_json(self.folder / "special_tokens_map.json", required=False)
        self._bpe: Any = tokenizers.Tokenizer
        self._bpe = self._rust("from_buffer", self.path.read_bytes())
        self._rust("no_padding")
        self._rust("no_truncation")
        self._bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # changes no id
        self.add_bos = config.get("add_bos_token") is not False

        def named(key: str, default: str) -> str:
            value = special.get(key) or config.get(key)
            return str((value.get("content") if isinstance(value, dict) else value) or default)

        self.eos_token = named("eos_token", EOS)
        self.bos_id = self._special_id(named("bos_token", BOS), required_as="BOS")
        self.eos_id = self._special_id(self.eos_token, required_as="EOS")
        self.pad_id = self.eos_id if self._rust("token_to_id", PAD) is None else self._special_id(PAD)
        tag_ids = [self._special_id(tags[key]) for key in TAGS]
        self.image_id, self.image_gen_id, self.image_start_id, self.image_end_id = tag_ids
        self._own = {self.bos_id, self.eos_id, self.pad_id, *tag_ids}
        # DeepSeek's vocabularies also list plain letters (ø, ö, ü ...) as added tokens: ordinary text.
        self._reserved = {
            i: token.content
            for i, token in self._rust("get_added_tokens_decoder").items()
            if i in self._own or token.special or (token.content[:1] == "<" and token.content[-1:] == ">")
        }
        last, token = max((i, token) for token, i in self._rust("get_vocab").items())
        if last >= vocab_size:
            raise ValueError(
                f"{self.path}: {shown(token)} has id {last}, but the embedding has {vocab_size} rows"
            )

    def _rust(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A call of the Rust side, which raises bare Exception and, where it panics, BaseException."""
        try:
            return getattr(self._bpe, method)(*arguments, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"{self.path} is not a tokenizer: {printable(str(error)):.300}") from error

    def _special_id(self, token: str, required_as: str = "") -> int:
        """The id of a special string, which is added where the vocabulary lacks it, unless it is required."""
        index = self._rust("token_to_id", token)
        if index is None and required_as:
            raise ValueError(f"the tokenizer in {self.folder} lacks its {required_as} token {shown(token)}")
        if index is None:
            index = 1 + max(self._rust("get_vocab").values())
        if index >= self.vocab_size:
            rows = f"has no row left for {shown(token)}: the embedding has {self.vocab_size}"
            raise ValueError(f"the tokenizer in {self.folder} {rows}")
        known = self._rust("get_added_tokens_decoder")
        if index not in known:  # a piece of the plain vocabulary keeps its id
            self._rust("add_special_tokens", [tokenizers.AddedToken(token, special=True, normalized=False)])
        if self._rust("token_to_id", token) != index:
            raise ValueError(f"the ids in {self.path} have holes: cannot add {shown(token)}")
        return index

    def _encode(self, text: str) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {shown(text)}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"text must be without lone surrogates, got {shown(text)}")
        return self._rust("encode", text, add_special_tokens=False)

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
        kept = [int(i) for i in ids if int(i) not in self._own]
        return self._rust("decode", kept, skip_special_tokens=True)

    def reject_special_tokens(self, text: str, allowed: Iterable[str] = ()) -> None:
        """Raise ValueError, naming the strings, if the tokenizer sees special tokens that are not allowed."""
        seen = {self._reserved[index] for index in self._encode(text).ids if index in self._reserved}
        if found := seen - {*allowed}:
            raise ValueError(f"the text holds special tokens, which are not allowed there: {sorted(found)}")
