# SPDX-License-Identifier: MIT
"""Conversations as training examples: token ids, and labels on the responses only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..processor import SYSTEM_PROMPT, Processor
from .objective import IGNORE


def conversation_example(
    processor: Processor, messages: Sequence[Mapping[str, Any]], system_prompt: str = SYSTEM_PROMPT
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, images expanded, and labels of the same length.

    Labels are the ids of each answer and of the EOS behind it, and `IGNORE` elsewhere (the paper trains on the
    response alone).
    """
    text = processor.template(messages, system_prompt)
    spans, start = [], 0  # character spans of the answers, EOS included
    eos = processor.tokenizer.eos_token
    for message in messages:
        if message["role"].lower() == "assistant" and message["content"].strip():
            answer = "Assistant: " + message["content"].strip() + eos
            begin = text.index(answer, start) + len("Assistant:")
            start = begin + len(answer) - len("Assistant:")
            spans.append((begin, start))
    ids, labels = [], []
    tokenizer = processor.tokenizer
    for token, (first, last) in tokenizer.encode_with_offsets(text):
        if token == tokenizer.image_id:
            expanded = processor.image_ids()
            ids += expanded
            labels += [IGNORE] * len(expanded)
            continue
        ids.append(token)
        inside = last > first and any(begin <= first and last <= end for begin, end in spans)
        labels.append(token if inside else IGNORE)
    return ids, labels
