# SPDX-License-Identifier: MIT
"""WISE's two data sets: files, formulas, judges, published numbers, and our own wording of what the judge is asked.

Two sets that must never be mixed, for the same id is another prompt in each: `legacy`, which every published JanusFlow
number used (GPT-4o, three grades), and `verified` (a Qwen judge, right or wrong).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .report import Published

CATEGORIES = ("cultural", "time", "space", "biology", "physics", "chemistry")


@dataclass(frozen=True)
class Dataset:
    """One of the two data sets with its judge and formula."""

    files: Mapping[str, tuple[int, int]]  # stem -> first and last id
    files_sha256: Sequence[str]  # of the published ones, by `text_sha256`
    wording_sha256: str  # of the official system message and question, by `prompt_hash`
    last_ids: Sequence[int]  # of each category
    weights: Sequence[float]
    judge: str
    url: str | None
    max_tokens: int
    results: str  # folder of the result files
    extra: Mapping[str, Any]  # further fields of the request


DATASETS = {
    "legacy": Dataset(
        files={
            "cultural_common_sense": (1, 400),
            "spatio-temporal_reasoning": (401, 700),
            "natural_science": (701, 1000),
        },
        files_sha256=(
            "7a59216c768698280cea37caa574b52f3faf054d73b398b9bb6b3161baf8e3aa",
            "e27d797885ad86e64d857d0cc93d33e04be572a8dcae95692a2c7e7876233f9a",
            "b262fae58e413c7a4bd3c3d5a089f8c6529feac227e4b6606be261a949035544",
        ),
        wording_sha256="b14eef22928c4c2c2c5020236b4bea468ec7c371ef95b9d894074e81f56b13db",
        last_ids=(400, 567, 700, 800, 900, 1000),
        weights=(0.4, 0.167, 0.133, 0.1, 0.1, 0.1),
        judge="gpt-4o-2024-05-13",
        url=None,
        max_tokens=2000,
        results="Results",
        extra={},
    ),
    "verified": Dataset(
        files={
            "cultural_common_sense_verified": (1, 400),
            "spatio-temporal_reasoning_verified": (401, 640),
            "natural_science_verified": (641, 1000),
        },
        files_sha256=(
            "23482925266e2784b2ba24b75239fdc6691bf85ae253d2c4aa38b71b45fefa89",
            "42c0b9d829365e392c2d4af283850dc76b1f922ab0c79198366de4f306eaf2b6",
            "6f346c336f16f611e5c73e0fcacdccb336c200d534cf111526b22d50ea912555",
        ),
        wording_sha256="5afe1472e449c208de5b8f7654b25b8f47a259d0e2376b05a986a08873bd5200",
        last_ids=(400, 520, 640, 760, 880, 1000),
        weights=(0.4, 0.12, 0.12, 0.12, 0.12, 0.12),
        judge="Qwen3.5-35B-A3B",
        url="http://127.0.0.1:8000/v1",
        max_tokens=500,
        results="Results-qwen35",
        extra={"chat_template_kwargs": {"enable_thinking": False}},
    ),
}
GRADES = ("consistency", "realism", "aesthetic_quality")
PUBLISHED = {
    "legacy": (
        Published(
            "JanusFlow-1.3B, WISE's authors",
            "legacy set, GPT-4o-2024-05-13",
            dict(zip(CATEGORIES, (0.13, 0.26, 0.28, 0.20, 0.19, 0.11), strict=True)),
            0.18,
        ),
        Published(
            "JanusFlow-1.3B, TorchUMM",
            "legacy set, Qwen2.5-VL-72B, more lenient than GPT-4o; its main table prints 0.2964",
            dict(zip(CATEGORIES, (0.2731, 0.3222, 0.3947, 0.3215, 0.2860, 0.1905), strict=True)),
            0.2954,
        ),
    ),
    "verified": (
        Published("Janus-1.3B (no JanusFlow is published)", "verified set, Qwen3.5-35B-A3B", {}, 0.2730),
        Published("Janus-Pro-1B", "verified set, Qwen3.5-35B-A3B", {}, 0.2650),
        Published("Janus-Pro-7B", "verified set, Qwen3.5-35B-A3B", {}, 0.3340),
    ),
}
WORDING = {  # our own, see --judge-prompts for the official one
    "legacy": {
        "system": "You audit generated images. You are strict, impartial, and you follow the output format to the "
        "letter.",
        "user": """Grade one generated image. Answer with three grades and nothing else.

Be ruthless: you are an auditor looking for faults, not an admirer.

You are given two texts. PROMPT is all that the image generator saw. EXPLANATION says what PROMPT implies and what a
right image therefore shows.

Consistency: is the image faithful to PROMPT as EXPLANATION reads it?
0 - what is asked for, or what knowledge implies, is absent or contradicted
1 - the main point is there, but a part is missing, vague or wrong
2 - everything is there, exactly and without doubt

Realism: could the image be real?
0 - physically impossible, broken or obviously artificial
1 - mostly plausible, with visible flaws of shape, light, material or scale
2 - not to be told from a photograph, or flawless in the style that PROMPT names

Aesthetic Quality: is it well made to look at?
0 - unpleasant: bad composition, colour or clutter
1 - acceptable but ordinary, with weaknesses
2 - of professional quality in composition, colour and clarity

Output exactly these three lines, n being 0, 1 or 2:
Consistency: n
Realism: n
Aesthetic Quality: n

Grade 2 is exceedingly rare. Wherever you are in doubt, give the lower grade. Write no word more.

PROMPT: "{Prompt}"
EXPLANATION: "{Explanation}"
""",
    },
    "verified": {
        "system": "",
        "user": """This benchmark asks whether an image generator has knowledge of the world. Judge the knowledge that
the image shows; whether it is beautiful does not matter.

PROMPT is what the generator saw: it describes something indirectly. EXPLANATION is the ground truth: what a right
image shows. If PROMPT asks for the animal on an emblem and EXPLANATION names a crane, an eagle is wrong however well
painted. If PROMPT asks for ice after an hour in the sun and EXPLANATION says a puddle, an ice cube is wrong. If the
right object is there in a plain or clumsy style, that is right.

Check four things:
1. Objects: are the objects of PROMPT and EXPLANATION there?
2. Knowledge: does the image give the answer that EXPLANATION states?
3. Relations: are states, places, numbers and interactions as stated?
4. Usability: can all of that be seen without guessing?

The score is 1 only if all four hold. It is 0 if an object is missing, if the answer is absent, wrong or generic, if a
relation is wrong, if the image shows only the words of PROMPT literally, or if it is too unclear to tell. In doubt
the score is 0.

Output exactly one line, "Score: 0" or "Score: 1", and nothing else.

PROMPT: "{Prompt}"
EXPLANATION: "{Explanation}"
""",
    },
}
