# SPDX-License-Identifier: MIT
"""What the model is asked and what judges are told: our own wording of Uni-MMMU's instructions.

The official texts are its authors'; these say the same in other words and ask for the same answer formats. Wording
moves numbers: `override` takes texts from a JSON file, the official ones for instance, and the hash of what was used
is stored. {names} in a text are filled in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

MOVES = "The only moves are up, down, left and right, one cell at a time."
ANSWER = 'Answer with one line and nothing else: <ANSWER_JSON>["move", "move", ...]</ANSWER_JSON>'
PROMPTS = {
    "science": """You see the first state of a scene and read what is done to it. Work out, from what is known \
of nature, the one state that the scene must end in. Everything stays as it is unless the condition changes it, \
and nothing is added that does not follow from it. Do not simply repeat the condition. Write at most 120 words, \
which name the cause and end with an exact description of how the final state looks:
<OUTPUT_PROMPT> your explanation and description </OUTPUT_PROMPT>""",
    "science_image": "Now paint one image of the final state.",
    "math": """You solve a problem of plane geometry with the help of auxiliary lines.

Problem:
{problem}

Choices:
{choices}

Auxiliary lines:
{auxiliary}

First the auxiliary lines are drawn over the figure, which otherwise stays unchanged. Then a short, ordered \
solution or proof that uses them follows, of at most 150 words, which calls points by their labels. For a \
calculation its last line is **Final answer: VALUE**, for a proof it is **Conclusion: STATEMENT**.""",
    "math_image": "Now paint one image: the figure with the auxiliary lines drawn over it.",
    "math_text": "Now write the solution or proof alone, in at most 150 words, with the last line as asked for.",
    "jigsaw": """You see a picture cut into two rows of two cells, whose bottom right cell is hidden, and two \
candidates for that cell. Imagine each candidate in the hidden cell, at its size, not turned and not recoloured, \
the other cells unchanged. Compare seams, colours, textures and the whole, and decide which candidate belongs \
there.""",
    "jigsaw_image": "Now paint one image: the picture with candidate {candidate} in the hidden cell.",
    "jigsaw_text": """Now decide. End with exactly this block, with 0 or 1 and a reason of at most 30 words:
<FINAL_ANSWER_JSON>{"choice": 0, "rationale": "..."}</FINAL_ANSWER_JSON>""",
    "maze": f"""You see a maze of 6 by 6 cells. Dark cells are walls, light cells are free, the blue dot is you, \
the green cell is the goal. Find the way from the dot to the goal. {MOVES} Walls cannot be entered.""",
    "sliding": f"""You see a sliding puzzle of 3 by 3 cells, first as it is and then as it must become. The red \
cell is the empty one. A move slides one coloured tile next to it into the empty cell, and is named after the \
direction in which that tile moves. Find the moves from the first picture to the second. {MOVES}""",
    "plan": "Say in one sentence what step {step} is: up, down, left or right.",
    "frame": "Now paint one image: the board after step {step}, all else unchanged.",
    "moves": ANSWER,
    "code": """Here is the source of an SVG picture. Render it in your mind by the rules of SVG: the canvas from \
width, height and viewBox, later elements over earlier ones, fills, strokes and transforms as written, nothing \
that is not in the source. Describe the picture, objectively and in at most 60 words, in this block:
<RENDER_SUMMARY> the description </RENDER_SUMMARY>""",
    "code_text": "Think it through; do not paint yet.",
    "code_image": "Now paint exactly one image: the picture that the source describes, without any added text.",
}
JUDGES = {
    "science_text_system": "You grade answers in natural science, strictly and by the facts. Reply with JSON only.",
    "science_text": """A scene was changed by a condition, and a candidate explained what comes of it.

reasoning_correct: 1 if the candidate's cause and mechanism are scientifically right for this condition and do \
not contradict the reference, else 0.
result_correct: 1 if the final state that the candidate describes is the reference's in all that matters, else 0.

Scene: (none)
Condition: {condition}
Reference: {truth}
Candidate: {candidate}

Reply with {"reasoning_correct": 0 or 1, "result_correct": 0 or 1, "reason": "short"}.""",
    "science_image_system": """You grade edits of images. An edit is right if the background and all that the \
condition does not touch stay as they were, and what must change has changed as the target says. Reply with JSON \
only.""",
    "science_image": """Condition: {condition}
Target: {truth}
The first image is the scene before, the second the candidate.

Reply with {"image_correct": 0 or 1, "reason": "short"}.""",
    "math_overlay_system": "You check auxiliary lines in geometric figures, strictly. Reply with JSON only.",
    "math_overlay": """Auxiliary lines: {auxiliary}
Three images: the figure, the figure with the right auxiliary lines, the candidate. overlay_ok is 1 if the \
candidate is the same figure, unchanged, with just these lines between the right points, however they are \
styled; else 0.

Reply with {"overlay_ok": 0 or 1, "overlay_reason": "short"}.""",
    "math_text_system": "You check solutions and proofs in geometry, strictly. Reply with JSON only.",
    "math_text": """Type: {type}
Problem: {problem}
Reference solution: {truth}
Candidate: {candidate}

reasoning_rigorous: 1 if every step of the candidate follows and none that is needed is missing. \
conclusion_correct: 1 if it ends where the reference ends. calc_numeric_match: for CALCULATION, 1 if the values \
are equal. text_ok: 1 only if reasoning_rigorous and conclusion_correct are both 1.

Reply with {"reasoning_rigorous": 0 or 1, "conclusion_correct": 0 or 1, "calc_numeric_match": 0 or 1, "text_ok": \
0 or 1, "text_reason": "short"}.""",
    "code_image": """The first image is the reference rendering of a drawing, the second a candidate. Judge two \
things with whole numbers from 0 (nothing right) to 5 (all right):
shape_color_accuracy: are the shapes there, in number, kind and colour?
position_accuracy: are they where they belong, in the right sizes and overlaps?
verdict: "match" if both are at least 4; "partial" if both are at least 2, or one is at least 4 and the other at \
least 1; else "mismatch".

Reply with JSON only: {"shape_color_accuracy": 0, "position_accuracy": 0, "verdict": "...", "explanation": "short"}.""",
    "code_text": """The image is the reference rendering of a drawing; a candidate described it without seeing \
it. text_semantic_match is 1 if the description names the main shapes, their colours and their arrangement \
without a contradiction to the image, else 0.

Reply with JSON only: {"text_semantic_match": 0 or 1, "explanation": "short"}.""",
}


def fill(text: str, **values: object) -> str:
    """`text` with each {name} of `values` replaced, in one pass; other braces stay."""
    if not values:
        return text
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: str(values[match[1]]), text)


def override(texts: Mapping[str, str], path: str | Path | None) -> dict[str, str]:
    """`texts` with those that the JSON object in `path` names. ValueError for a name that is not one of them."""
    if path is None:
        return dict(texts)
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    good = isinstance(given, dict) and all(isinstance(value, str) for value in given.values())
    if not good or set(given) - set(texts):
        raise ValueError(f"{path}: an object from names to texts is needed; names are {', '.join(texts)}")
    return dict(texts) | given


def prompts_hash(texts: Mapping[str, str]) -> str:
    """Of all texts and their names."""
    return hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode()).hexdigest()
