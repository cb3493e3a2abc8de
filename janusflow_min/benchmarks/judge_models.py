# SPDX-License-Identifier: MIT
"""Judges that run here, through transformers (extra `bench`), imported when first needed: Mask2Former, CLIP, BLIP.

The detector follows mmdet's Mask2Former instance recipe (its 3.x head `mask2former_head.py` and
`maskformer_fusion_head.py`), because that is what GenEval's official scorer runs; transformers' own post-processing
thresholds before it upsamples.

Legend: B batch, Q queries, K classes, h w mask grid, H W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files import sha256
from .detection import CLASSES, COLOURS, Detection
from .judges import prompt_hash

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of bytes
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of [0, 1]


# Detector -----------------------------------------------------------------------


class Mask2FormerDetector:
    """A Mask2Former for COCO instances, facebook/mask2former-swin-small-coco-instance for one.

    Labels are mapped by their index, 0 to 79, since names differ between label maps.
    """

    def __init__(self, source: str | Path, device: str = "auto", short: int = 800, long: int = 1333):
        transformers = _transformers()
        self.model, self.device = _place(transformers.Mask2FormerForUniversalSegmentation, source, device)
        self.short, self.long = short, long
        labels = self.model.config.num_labels
        if labels != 80:
            raise ValueError(f"the detector in {source} knows {labels} classes; COCO's 80 are needed")
        self.name = f"Mask2Former {_model_name(source)}, mmdet's recipe at {short}/{long} px"

    def detect(self, image: Image.Image) -> list[Detection]:
        import torch

        pixels, size = prepare_for_mmdet(image, self.short, self.long)
        with torch.inference_mode():
            out = self.model(pixel_values=pixels.to(self.device, self.model.dtype))
        found = instances(
            out.class_queries_logits[0].float(),
            out.masks_queries_logits[0].float(),
            (pixels.shape[-2], pixels.shape[-1]),
            size,
            (image.height, image.width),
        )
        rows = zip(*(x.cpu().numpy() for x in found), strict=True)
        return [
            Detection(CLASSES[label], (float(x1), float(y1), float(x2), float(y2)), float(score), mask)
            for score, label, (x1, y1, x2, y2), mask in rows
        ]


def prepare_for_mmdet(image: Image.Image, short: int, long: int) -> tuple[Tensor, tuple[int, int]]:
    """An RGB image -> pixels (1, 3, H', W') as mmdet's test pipeline makes them, and (height, width) without padding.

    Scaled, keeping its shape, until its shorter side is `short` or its longer one `long`; bilinear without
    antialiasing, to whole numbers; padded with 128 on the right and below to multiples of 32; normalised.
    """
    import torch
    import torch.nn.functional as F

    height, width = image.height, image.width
    scale = min(short / min(height, width), long / max(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False).round()
    pixels = F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32), value=128.0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std, size


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    original: tuple[int, int],
    best: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mmdet's instance post-processing: (Q, K + 1) and (Q, h, w) -> scores (n,), labels (n,), boxes (n, 4), masks
    (n, H, W) bool.

    The best (query, class) pairs by probability, so a query may give several classes. Masks are upsampled as logits,
    padding is cut off, and only then is the threshold 0. score = probability · mean mask probability inside the mask.
    Sizes are (height, width): of the network's input with and without padding, of the image.
    """
    import torch
    import torch.nn.functional as F

    scores = class_logits.softmax(-1)[:, :-1]  # (Q, K), without "nothing"
    classes = scores.shape[1]
    scores, order = scores.flatten().topk(min(best, scores.numel()))
    labels, queries = order % classes, order // classes
    masks = F.interpolate(mask_logits[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : size[0], : size[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]  # (Q, H, W)
    inside = masks > 0
    certainty = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for i, mask in enumerate(inside):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):  # an empty mask keeps a box of zeros
            boxes[i] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    return scores * certainty[queries], labels, boxes[queries], inside[queries]


# Colours -----------------------------------------------------------------------


class ClipColours:
    """Zero-shot colour names by CLIP, openai/clip-vit-large-patch14 officially."""

    def __init__(self, source: str | Path, device: str = "auto"):
        transformers = _transformers()
        self.model, self.device = _place(transformers.CLIPModel, source, device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.name = f"CLIP {_model_name(source)}"
        self.heads: dict[str, Tensor] = {}

    def colours(self, views: Sequence[Image.Image], label: str) -> list[str]:
        import torch

        with torch.inference_mode():
            if label not in self.heads:
                self.heads[label] = torch.stack([self._text(colour, label) for colour in COLOURS])  # (10, W)
            side = self.model.config.vision_config.image_size
            pixels = torch.stack([_clip_pixels(view, side) for view in views]).to(
                self.device, self.model.dtype
            )
            features = self.model.visual_projection(
                self.model.vision_model(pixel_values=pixels).pooler_output
            )
            return [COLOURS[i] for i in (_unit(features) @ self.heads[label].T).argmax(-1).tolist()]

    def _text(self, colour: str, label: str) -> Tensor:
        """The normalised mean of the three sentences' normalised embeddings."""
        texts = [f"a photo of a {colour} {label}", f"a photo of a {colour}-colored {label}"]
        texts.append(f"a photo of a {colour} object")
        ids = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        pooled = self.model.text_model(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).pooler_output
        return _unit(_unit(self.model.text_projection(pooled)).mean(0))


def _clip_pixels(image: Image.Image, side: int, square: bool = False) -> Tensor:
    """CLIP's transform -> (3, side, side): shorter side to `side` by bicubic, centre cut; `square` squeezes instead."""
    import torch

    image = image.convert("RGB")
    width, height = (int(side * v / min(image.size)) for v in image.size)
    image = image.resize((side, side) if square else (width, height), Image.Resampling.BICUBIC)
    left, top = (round((v - side) / 2) for v in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Questions -----------------------------------------------------------------------


class BlipVQA:
    """BLIP for visual questions, Salesforce/blip-vqa-capfilt-large for one; a stand-in for mPLUG."""

    def __init__(self, source: str | Path, device: str = "auto"):
        transformers = _transformers()
        self.model, self.device = _place(transformers.BlipForQuestionAnswering, source, device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.name = f"BLIP {_model_name(source)}"

    def answer(self, image: Image.Image, question: str) -> str:
        import torch

        side = self.model.config.vision_config.image_size
        pixels = _clip_pixels(image, side, square=True)[None].to(self.device, self.model.dtype)
        ids = self.tokenizer(question, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.input_ids,
                pixel_values=pixels,
                attention_mask=ids.attention_mask,
                max_new_tokens=10,
            )
        return self.tokenizer.decode(out[0], skip_special_tokens=True).strip()


# Models -----------------------------------------------------------------------


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ImportError("this judge needs transformers: pip install 'janusflow-min[bench]'") from None
    return transformers


def _place(kind: Any, source: str | Path, device: str):
    """The model, ready to judge, in fp32, and its device."""
    from ..devices import pick_device

    chosen = pick_device(device)
    model = kind.from_pretrained(source).float()
    return model.to(chosen).eval().requires_grad_(False), chosen


def _model_name(source: str | Path) -> str:
    """A hub id, or a folder's name and the hash of its weights."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return str(source)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = prompt_hash(*(sha256(file) for file in weights))
    return f"{folder.resolve().name} (sha256 {digest[:16]})"
