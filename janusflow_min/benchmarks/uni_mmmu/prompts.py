# SPDX-License-Identifier: MIT
"""What the model is asked and what judges are told: our own wording of Uni-MMMU's instructions.

The official texts are its authors'; these say the same in other words, ask for the same answer formats and have the
same {placeholders}. Wording moves numbers: `read_wording` takes other texts out of the official script or a JSON
file, and the hash of what was used is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..official_prompts import check_placeholders, read_prompts

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

reasoning_correct: 1 if the candidate names the causes and mechanisms that lead from the condition to the final \
state, without a wrong law or a contradiction; else 0.
result_correct: 1 if the final state that the candidate describes can come of this scene and condition by science \
and common sense; else 0. The reference is the expected answer, but another final state also counts if it is \
scientifically sound and contradicts neither scene nor condition.

Scene: {scene}
Condition: {condition}
Reference: {gt_text}
Candidate: {pred_text}

Reply with {"reasoning_correct": 0 or 1, "result_correct": 0 or 1}.""",
    "science_image_system": """You grade edits of images: the first image is the scene before, the second the \
candidate. The edit is right if the scene stays recognisably the same (viewpoint, main objects, surfaces) except \
where the target asks for a change, and if it shows what the target says without contradiction. Style and small \
differences in rendering do not matter. Reply with JSON only.""",
    "science_image": """Condition: {condition}
Target: {gt_text}

Reply with {"image_correct": 0 or 1}.""",
    "math_overlay_system": "You check auxiliary lines in geometric figures, strictly but fairly. Reply with JSON only.",
    "math_overlay": """Auxiliary lines that must be drawn, all of them:
{aux_en}

Three images: the figure, the figure with the right auxiliary lines, the candidate. overlay_ok is 1 if every line is \
in the candidate, between the right points or in the right relation; else 0. Further marks and letters do no harm \
unless they change the meaning, nor do small shifts while it is clear what is meant.

Reply with {"overlay_ok": 0 or 1, "overlay_reason": "short"}.""",
    "math_text_system": "You check solutions and proofs in geometry, rigorously. Reply with JSON only.",
    "math_text": """Type: {task_type}
Problem: {problem}
Reference solution, which need not be the only way: {gt_text}
Candidate: {cand_text}

reasoning_rigorous: 1 if the candidate has no major gap and no false claim.
conclusion_correct: 1 if, for CALCULATION, its final number equals the reference's (form and units do not matter, nor \
does the letter of a choice); for PROVING, if it establishes the claim, in whatever valid steps.
calc_numeric_match: for CALCULATION, 1 if the numbers are equal; else null.
text_ok: 1 only if reasoning_rigorous and conclusion_correct are both 1.

Reply with {"reasoning_rigorous": 0 or 1, "conclusion_correct": 0 or 1, "calc_numeric_match": 0, 1 or null, \
"text_ok": 0 or 1, "text_reason": "short"}.""",
    "code_image": """The first image is the reference rendering of an SVG drawing of circles, polygons, lines and \
curves, the second a candidate. Give two scores, whole numbers from 0 (nothing right) over 3 (about half) to 5 (all \
right but for traces of rendering):
shape_color_accuracy: are the same shapes there, in kind, number of sides and count, which must be exact, and in \
colours of the same family? A missing or additional shape, or any text that is not in the reference, costs points.
position_accuracy: are they where they belong: order, alignment, spacing, rotation, size on the canvas, and which \
shape lies over which?
Thin strokes that differ by a pixel, and noise, do not matter.
verdict: "match" if both are at least 4; "partial" if both are at least 2, or one is at least 4 and the other at \
least 1; else "mismatch".

Reply with JSON only: {"shape_color_accuracy": 0, "position_accuracy": 0, "verdict": "...", "explanation": "short"}.""",
    "code_text": """The image is the reference rendering of a drawing; a candidate described it without seeing \
it. text_semantic_match is 1 only if all of this holds: the kinds of shapes and their counts are right (a polygon \
with its number of sides), the colours are of the right family, and the arrangement (place, order, spacing, \
rotation, overlaps) is right in words that a person would use. Traces of rendering do not matter.

Reply with JSON only: {"text_semantic_match": 0 or 1, "explanation": "short"}.""",
}
# Placeholders without which whoever reads the text could not know what it is about.
PROMPTS_NEED: dict[str, tuple[str, ...]] = {
    "math": ("problem", "choices", "auxiliary"),
    "jigsaw_image": ("candidate",),
    "plan": ("step",),
    "frame": ("step",),
}
JUDGES_NEED: dict[str, tuple[str, ...]] = {
    "science_text": ("condition", "gt_text", "pred_text"),
    "science_image": ("condition", "gt_text"),
    "math_overlay": ("aux_en",),
    "math_text": ("task_type", "problem", "gt_text", "cand_text"),
}
JUDGES_PLACES = {  # of the judges' texts in the official eval_ummmu.py
    "science_text_system": "science.text_system",
    "science_text": "science.text_user_tmpl",
    "science_image_system": "science.image_system",
    "science_image": "science.image_user_tmpl",
    "math_overlay_system": "geometry.system_overlay",
    "math_overlay": "geometry.overlay_user_tmpl",
    "math_text_system": "geometry.system_text",
    "math_text": "geometry.text_user_tmpl",
    "code_image": "code_svg.image_prompt",
    "code_text": "code_svg.text_prompt",
}


OFFICIAL_SHA256 = "bc3ac7c4f5f7d6584f7a81627076be5ff0ea86476c379626253c56417835cd95"  # of its judges' texts


def model_wording(path: str | Path | None) -> dict[str, str]:
    """PROMPTS, with those texts in their place that the JSON file `path` has. ValueError as `read_prompts`."""
    if path is not None and Path(path).suffix != ".json":
        raise ValueError(
            f"{path}: the model's prompts come from a .json file with names as in uni_mmmu/prompts.py"
        )
    return _wording(PROMPTS, path, dict.fromkeys(PROMPTS, ""), PROMPTS_NEED)


def judge_wording(path: str | Path | None) -> dict[str, str]:
    """JUDGES, or the official texts out of eval_ummmu.py, or those in a JSON file in place of ours."""
    return _wording(JUDGES, path, JUDGES_PLACES, JUDGES_NEED)


def _wording(
    own: Mapping[str, str],
    path: str | Path | None,
    places: Mapping[str, str],
    needed: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    texts = dict(own) | ({} if path is None else read_prompts(path, places))
    for name, placeholders in needed.items():
        check_placeholders(texts[name], placeholders, f"{path}: {name}")
    return texts


def prompts_hash(texts: Mapping[str, str]) -> str:
    """Of all texts and their names."""
    return hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode()).hexdigest()
