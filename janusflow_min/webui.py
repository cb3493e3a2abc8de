# SPDX-License-Identifier: MIT
"""The page of `janusflow-min ui`: generate, ask and edit in a browser, by Gradio.

Every run of the model is an event of one concurrency group, so one runs at a time and the others queue. A run is a
generator over `answering.iterate`: each step or piece of text is shown as it comes, and closing the generator, as the
Stop button or a closed tab does, ends the run at its next step. What a browser sends is checked here or by Gradio's
components, on the server; a conversation is kept there too.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from .answering import DEFAULT_QUESTION, iterate, prepare
from .pipeline import Pipeline
from .sampling_options import DEFAULTS, PRESETS, SOLVER_NAMES
from .selection import MAX_CANDIDATES
from .serve import Limits
from .serve.protocol import read_image
from .shapes import scenes

MAX_TEXT = 2000  # characters of a prompt or a question
FILES_SECONDS = 3600  # how long uploaded and generated files are kept
PROMPTS = (
    "a photo of a red star",
    "a photo of a circle and a square",
    "a photo of a ring left of a triangle",
)
QUESTIONS = ("Describe the picture.", "How many objects are there?", "What color is the star?")
EDIT = ("a photo of a green star and a blue circle", "a photo of a red star and a blue circle")
CSS = "footer {display: none !important} .gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto}"
MODEL: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
ASIDE: dict[str, Any] = dict(queue=False, api_visibility="private")  # events that leave the model alone
Tell = Callable[[int, Any], None]


@contextmanager
def in_plain_words() -> Iterator[None]:
    """What is wrong with the input, in the library's words; tracebacks stay on the server's terminal."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, OSError, ArithmeticError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
    except Exception as error:
        raise gr.Error("Something failed; the terminal where the server runs says what.") from error


class Page:
    """`demo` is the page, a `gr.Blocks`; `generate`, `ask` and `edit` are what its buttons do."""

    def __init__(self, pipe: Pipeline, name: str, limits: Limits):
        self.pipe, self.limits = pipe, limits
        kept = (FILES_SECONDS, FILES_SECONDS)
        self.demo = gr.Blocks(title=f"JanusFlow: {name}", analytics_enabled=False, delete_cache=kept)
        with TemporaryDirectory() as folder, self.demo:
            write_example(example := Path(folder) / "example.png")  # Gradio takes a copy
            gr.Markdown(
                f"# JanusFlow\nOne model generates images, answers questions and edits. Model: `{name}`"
            )
            with gr.Tab("Generate"):
                self._generate_tab()
            with gr.Tab("Ask"):
                self._ask_tab(str(example))
            with gr.Tab("Edit"):
                self._edit_tab(str(example))
        self.demo.queue(max_size=limits.max_queue, api_open=False)

    def launch(self, host: str, port: int | None, share: bool = False) -> tuple[Any, str, str]:
        """Serve it in threads: (app, local URL, public URL)."""
        return self.demo.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, footer_links=[],
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=CSS, pwa=False,
            ssr_mode=False, mcp_server=False, run_history=False, enable_monitoring=False,
            max_file_size=self.limits.max_body,
        )  # fmt: skip

    def _generate_tab(self) -> None:
        with gr.Row():
            with gr.Column():
                prompt = textbox("Prompt", PROMPTS[0])
                examples([[text] for text in PROMPTS], prompt)
                start, stop = buttons("Generate")
                count = gr.Slider(1, self.limits.max_n, 4, step=1, label="Images")
                seed = seed_box()
                with gr.Accordion("More", open=False):
                    negative = textbox("Negative prompt", info="What the images should not show.")
                    preset = gr.Radio(["default", *PRESETS], value="default", label="Preset")
                    steps = self._steps()
                    solver = gr.Dropdown(list(SOLVER_NAMES), value=DEFAULTS["solver"], label="Solver")
                    guidance = gr.Slider(1, 10, 2, step=0.1, label="Guidance", info="1 is none.")
                    best_of = gr.Slider(1, 8, 1, step=1, label="Best of", info="Candidates for each image.")
                    preview = gr.Checkbox(
                        True, label="Live preview", info="Shows where each step is heading."
                    )
            with gr.Column():
                status, gallery = gr.HTML("Ready.", min_height=64), gallery_of_two()
        inputs = [prompt, negative, seed, count, guidance, steps, solver, preset, best_of, preview]
        connect(self.generate, inputs, [gallery, status], prompt, start, stop)
        preset.change(of_preset, preset, [steps, solver], **ASIDE)

    def generate(
        self, prompt: str, negative: str, seed: int | None, count: int, guidance: float, steps: int, solver: str,
        preset: str, best_of: int, preview: bool,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Images while they are sampled, and what is happening."""

        def run(tell: Tell) -> None:
            check_texts(Prompt=prompt, Negative=negative)
            if count * best_of > MAX_CANDIDATES:
                raise ValueError(
                    f"Images times Best of must be at most {MAX_CANDIDATES}, got {count * best_of}"
                )
            made = self.pipe.generate(
                prompt, count, guidance, steps, seed=seed, progress=False, solver=solver, best_of=best_of,
                negative_prompt=negative if negative.strip() else None, preset=None if preset == "default" else preset,
                callback_on_step_end=lambda step, t, z, images=None: tell(step, images), preview=preview,
            )  # fmt: skip
            captions = [f"seed {seed}" for seed in made.seeds or []]
            if made.scores:
                captions = [f"{c}, score {max(s):.2f}" for c, s in zip(captions, made.scores, strict=True)]
            tell(-1, list(zip(made.images, captions, strict=True)))

        yield from running(run, steps)

    def _ask_tab(self, example: str) -> None:
        history = gr.State([])
        chatbot = gr.Chatbot(label="Conversation", height=360, buttons=["copy"])
        box = gr.MultimodalTextbox(
            label="Question", placeholder="Ask, with an image or without", file_types=["image"], sources=["upload"],
            file_count="multiple", max_plain_text_length=MAX_TEXT,
        )  # fmt: skip
        with gr.Row():
            stop, clear = gr.Button("Stop"), gr.Button("New conversation")
        examples([[{"text": text, "files": [example]}] for text in QUESTIONS], box, list(QUESTIONS))
        with gr.Accordion("More", open=False):
            system = textbox("System prompt", info="Empty: the model's usual one.")
        event = box.submit(
            self.ask, [box, history, system], [chatbot, history, box], show_progress_on=chatbot, **MODEL
        )
        stop.click(None, cancels=event, **ASIDE)
        clear.click(lambda: ([], [], None), None, [chatbot, history, box], cancels=event, **ASIDE)

    def ask(self, message: dict[str, Any], history: list[Any], system: str) -> Iterator[tuple[Any, Any, Any]]:
        """The conversation as shown and as kept (messages with role, text and files), while the answer is decoded."""
        asked: dict[str, Any] = {
            "role": "user",
            "text": message.get("text") or "",
            "files": list(message.get("files") or []),
        }
        with in_plain_words():
            check_texts(Question=asked["text"], System=system)
            if not asked["text"].strip() and not asked["files"]:
                raise ValueError("the question is empty: write one, or add an image to have it described")
            history, answer = [*history, asked], ""
            conversation = [self._message(**turn) for turn in history]
            run = prepare(self.pipe, [conversation], system_prompt=system if system.strip() else None)
            yield shown(history), history, None
            for _, piece in iterate(run):
                answer += piece
                kept = [*history, {"role": "assistant", "text": answer, "files": []}]
                yield shown(kept), kept, gr.skip()

    def _message(self, role: str, text: str, files: list[str]) -> dict[str, Any]:
        """As `Pipeline.chat` takes it."""
        tokenizer = self.pipe.processor.tokenizer
        tokenizer.reject_special_tokens(text)
        images = [self._open(Path(file).read_bytes()) for file in files]
        content = f"{tokenizer.image_tag}\n" * len(images) + (text.strip() or DEFAULT_QUESTION)
        return {"role": role.title(), "content": content, "images": images}

    def _open(self, data: bytes) -> Image.Image:
        return read_image(data, self.limits.max_image_pixels)

    def _edit_tab(self, example: str) -> None:
        with gr.Row():
            with gr.Column():
                gr.Markdown("Upload an image and brush over what may change; without a stroke all of it may.")
                editor = gr.ImageEditor(
                    label="Image", show_label=False, type="pil", format="png", sources=["upload", "clipboard"],
                    transforms=(), layers=False, brush=gr.Brush(24, ["#ff2d95"], color_mode="fixed"), height=420,
                )  # fmt: skip
                decode = (
                    editor.convert_and_format_image
                )  # wrapped: a subclass would have Gradio write a .pyi file here

                def checked(file: Any, *options: Any, **more: Any) -> Any:
                    with in_plain_words():
                        if file is not None:
                            self._open(file if isinstance(file, bytes) else Path(file.path).read_bytes())
                    return decode(file, *options, **more)

                editor.convert_and_format_image = checked  # type: ignore[method-assign]
            with gr.Column():
                prompt = textbox("Prompt", info="What the edited image shows, all of it.")
                source = textbox(
                    "Source prompt", info="What the image shows now; empty: the model says it itself."
                )
                value: Any = {"background": example, "layers": [], "composite": None}
                examples([[value, *EDIT]], [editor, prompt, source], ["a red star becomes green"])
                start, stop = buttons("Edit")
                strength = gr.Slider(
                    0.05, 1, 0.8, step=0.05, label="Strength", info="1 may change everything."
                )
                steps, seed = self._steps(), seed_box()
        status, images = gr.HTML("Ready.", min_height=64), gallery_of_two()
        connect(
            self.edit, [editor, prompt, source, strength, steps, seed], [images, status], prompt, start, stop
        )

    def edit(
        self,
        image: dict[str, Any] | None,
        prompt: str,
        source: str,
        strength: float,
        steps: int,
        seed: int | None,
    ) -> Iterator[tuple[Any, str]]:
        """The image before and after, and what is happening. image: `gr.ImageEditor`'s value; paint is the mask."""

        def run(tell: Tell) -> None:
            check_texts(Prompt=prompt, Source=source)
            if not image or image["background"] is None:
                raise ValueError("there is no image to edit: upload one")
            before, paint = image["background"], [layer.getchannel("A") for layer in image["layers"][:1]]
            mask = paint[0].point([0] + [255] * 255) if paint and paint[0].getbbox() else None
            after = self.pipe.edit(
                before, prompt, source if source.strip() else None, strength, mask, num_inference_steps=steps,
                seed=seed, progress=False, callback_on_step_end=lambda step, t, z: tell(step, None),
            )[0]  # fmt: skip
            before = ImageOps.fit(before.convert("RGB"), after.size, Image.Resampling.BICUBIC)
            tell(-1, [(before, "before"), (after, "after")])

        yield from running(run, steps)

    def _steps(self) -> gr.Slider:
        return gr.Slider(1, self.limits.max_steps, DEFAULTS["num_inference_steps"], step=1, label="Steps")


def running(run: Callable[[Tell], None], steps: int) -> Iterator[tuple[Any, str]]:
    """Images and status, of what `run` tells: (step, preview or None), at last (-1, images with captions)."""
    yield gr.skip(), "Starting."  # Gradio can close only what has yielded
    with in_plain_words():
        for step, images in iterate(run):
            bar = f"<progress value={step + 1} max={steps} style='width: 100%'></progress>Step {step + 1} of {steps}"
            yield images or gr.skip(), "Done." if step < 0 else bar


def connect(run: Any, inputs: list[Any], outputs: list[Any], prompt: Any, start: Any, stop: Any) -> None:
    """The button or Enter in the prompt starts a run; the other button stops it. outputs: images, status."""
    event = gr.on([start.click, prompt.submit], run, inputs, outputs, show_progress_on=outputs[1], **MODEL)
    stop.click(lambda: "Stopped.", None, outputs[1], cancels=event, **ASIDE)


def textbox(label: str, value: str = "", info: str | None = None) -> gr.Textbox:
    return gr.Textbox(value, label=label, info=info, max_lines=4, max_length=MAX_TEXT)


def seed_box() -> gr.Number:
    return gr.Number(0, precision=0, minimum=0, label="Seed", info="Empty: a new one each time.")


def buttons(start: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(start, variant="primary"), gr.Button("Stop")


def gallery_of_two() -> gr.Gallery:
    return gr.Gallery(show_label=False, columns=2, format="png", object_fit="contain", interactive=False)


def examples(rows: list[Any], inputs: Any, labels: list[str] | None = None) -> None:
    gr.Examples(rows, inputs, label="Examples", example_labels=labels, api_visibility="private")


def check_texts(**texts: str) -> None:
    """The browser keeps to the limit too; ValueError for who comes without one."""
    for name, text in texts.items():
        if len(text) > MAX_TEXT:
            raise ValueError(f"{name} must have at most {MAX_TEXT} characters, got {len(text)}")


def of_preset(name: str) -> tuple[int, str]:
    values = {**DEFAULTS, **PRESETS.get(name, {})}
    return values["num_inference_steps"], values["solver"]


def shown(history: list[Any]) -> list[dict[str, Any]]:
    """Messages for the chatbot, one for each file and each text."""
    parts = [(turn["role"], [{"path": file} for file in turn["files"]] + [turn["text"]]) for turn in history]
    return [{"role": role, "content": content} for role, contents in parts for content in contents if content]


def write_example(path: Path) -> None:
    star = scenes.Object("star", "red", 38, 66, 24, scenes.COLOURS["red"])
    circle = scenes.Object("circle", "blue", 92, 60, 22, scenes.COLOURS["blue"])
    scene = scenes.Scene("white", scenes.BACKGROUNDS["white"], (star, circle))
    scenes.to_pil(scenes.render(scenes.pack([scene]))[0]).save(path)
