# SPDX-License-Identifier: MIT
"""The model `janusflow_min` of lmms-eval 0.7.3, which finds it by the entry-point group `lmms_eval.models`.

A question has the family's published form: no system prompt, an image tag and a newline for each image, then the
task's text, which brings its own sentence about short answers; greedy unless a task samples.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator  # comes with lmms-eval
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import Collator
from loguru import logger  # lmms-eval's, which turns Python's warnings off
from tqdm import tqdm

from ..loading import load
from ..pipeline import TooLongError
from ..sampling import MAX_BATCH

MANIFEST = ModelManifest("janusflow_min", simple_class_path=f"{__name__}.JanusFlowMin")


class JanusFlowMin(lmms):
    """The --model_args: pretrained, device (this rank's), batch_size (questions answered at once; "auto" is 16),
    system_prompt, seed (of tasks that sample; their answers depend on the batches too), and other options of `load`."""

    is_simple = True

    def __init__(self, pretrained="deepseek-ai/JanusFlow-1.3B", device=None, batch_size=1, **options: Any):
        super().__init__()
        self.accelerator = Accelerator()
        self.batch_size = MAX_BATCH if batch_size == "auto" else int(batch_size)
        self.system_prompt, self.seed = options.pop("system_prompt", ""), options.pop("seed", 0)
        if device in (None, self.accelerator.device.type):
            device = self.accelerator.device
        self.pipe = load(pretrained, device=device, parts="understanding", **options)
        self.device = self.pipe.device  # on which lmms-eval gathers

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each request; "" with a warning for a question that is longer than the model's positions."""
        # A batch has the same generation_kwargs, and questions of about one length.
        collator = Collator([request.args for request in requests], lambda args: -len(args[0]), grouping=True)
        answers: list[str] = []
        for batch in tqdm([*collator.get_batched(n=self.batch_size)], "Answering", disable=self.rank != 0):
            answers += self._answer(batch, self.seed + len(answers))
        return collator.get_original(answers)

    def _answer(self, batch: list[tuple[Any, ...]], seed: int) -> list[str]:
        questions = [question for question, *_ in batch]
        images = [visuals(self.task_dict[task][split][doc]) for _, _, visuals, doc, task, split in batch]
        options = answer_options(batch[0][1]) | {"system_prompt": self.system_prompt, "seed": seed}
        try:
            return [answer.text.strip() for answer in self.pipe.understand(questions, images, **options)]
        except TooLongError as error:
            if len(batch) > 1:
                return [text for one in batch for text in self._answer([one], seed)]
            logger.warning(f'answered "" to document {batch[0][3]} of {batch[0][4]}: {error}')
            return [""]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("janusflow_min runs tasks whose output_type is generate_until")

    generate_until_multi_round = loglikelihood


def answer_options(asked: dict[str, Any]) -> dict[str, Any]:
    """`understand`'s, of a task's generation_kwargs; what these leave out is as in transformers."""
    if (asked.get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams {asked['num_beams']}: no beam search here; --gen_kwargs num_beams=1")
    sampled = asked.get("do_sample", bool(asked.get("temperature")))
    return {
        "max_new_tokens": asked.get("max_new_tokens", 512),
        "stop": asked.get("until") or None,
        "temperature": asked.get("temperature", 1.0) if sampled else 0.0,
        "top_p": asked.get("top_p") or 1.0,
        "top_k": asked.get("top_k", 50),
    }
