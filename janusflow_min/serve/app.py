# SPDX-License-Identifier: MIT
"""The HTTP side of the server: a FastAPI application over an `Engine`.

`Server.gate` stands around every request: key, place in the queue, size, a client that goes away, one line of log,
metrics. What is asked for is checked before it takes the engine's time, and nothing of its content is logged.
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import math
import threading
import time
import traceback
import uuid
from asyncio import FIRST_COMPLETED, Queue, Task, create_task, gather, get_running_loop, wait, wrap_future
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..answering import DEFAULT_QUESTION
from ..processor import SYSTEM_PROMPT
from ..sampling import fresh_seed
from ..sampling_options import SamplingOptions
from . import Limits, protocol
from .engine import Engine, ImageRequest, Question
from .protocol import ChatRequest, EditFields, GenerationFields, ImageFields, Message, Problem

READ_SECONDS, WRITE_SECONDS = 60, 60  # for a client to send its request, and to take a piece of the answer
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # of request_seconds
PREPARING = 8  # images of requests that are decoded or fetched at once, which bounds the memory
DEFAULT_TOKENS = 512  # of an answer whose request names no maximum
Json = dict[str, Any]


class Server:
    """What the handlers share; `app` is the application. `hosts` may be asked for images; `log` takes lines."""

    def __init__(
        self, engine: Engine, name: str, limits: Limits, api_key: str | None, hosts: frozenset[str],
        log: Callable[[str], None],
    ):  # fmt: skip
        self.engine, self.name, self.limits, self.api_key = engine, name, limits, api_key
        self.hosts, self.log, self.created = hosts, log, int(time.time())
        self.in_hand, self.usual_seconds = 0, 1.0  # requests that wait or run; what one takes
        self.pool = ThreadPoolExecutor(PREPARING, "janusflow-prepare")
        self.registry = registry = prometheus.CollectorRegistry()
        self.seconds = prometheus.Histogram(
            "janusflow_request_seconds", "Requests", ["route", "status"], registry=registry, buckets=BUCKETS
        )
        prometheus.ProcessCollector(registry=registry)
        gauges: dict[str, Callable[[], float]]
        gauges = {f"{key}_total": partial(engine.counts.__getitem__, key) for key in engine.counts}
        gauges |= {"requests_in_hand": lambda: self.in_hand, "threads": threading.active_count}
        for key, value in gauges.items():
            prometheus.Gauge(f"janusflow_{key}", key, registry=registry).set_function(value)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            engine.start()
            yield
            await anyio.to_thread.run_sync(engine.stop)
            self.pool.shutdown(wait=False)

        app = FastAPI(
            title="janusflow-min", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
        )
        self.app = app
        app.add_middleware(lambda app: partial(self.gate, app))
        app.add_exception_handler(HTTPException, on_http_exception)
        app.add_exception_handler(RequestValidationError, on_invalid)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/images/generations")(self.generate)
        app.post("/v1/images/edits")(self.edit)
        self.routes = {getattr(route, "path", "") for route in app.routes}

    # Around every request -----------------------------------------------------------------------

    async def gate(self, app: Any, scope: Json, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begin, status, received, sent, holds, over = time.perf_counter(), 0, 0, 0, False, False

        async def counted_send(message: Any) -> None:
            nonlocal status, sent, holds, over
            status, sent = message.get("status", status), sent + len(message.get("body", b""))
            over = message["type"] == "http.response.body" and not message.get("more_body")
            if over and holds:  # the work is done, however slowly the client reads
                self.in_hand, holds = self.in_hand - 1, False
            try:
                with anyio.fail_after(WRITE_SECONDS):
                    await send(message)
            except OSError:  # TimeoutError is one
                over = False
                raise ClientDisconnect from None

        try:
            try:
                if scope["path"] != "/health":
                    self.check_key(scope)
                body = b""
                if scope["method"] == "POST":
                    self.check_place()
                    self.in_hand, holds = self.in_hand + 1, True
                    body = await read_body(scope, receive, self.limits.max_body)
                    received = len(body)
                await until_gone(app, scope, body, receive, counted_send)
            except Problem as problem:
                await problem.response(scope, receive, counted_send)
            except ValueError as error:
                await Problem(400, str(error)).response(scope, receive, counted_send)
            except FloatingPointError as error:
                await Problem(500, str(error), "not_finite").response(scope, receive, counted_send)
        except ClientDisconnect:
            pass
        except Exception as error:  # not its message, which may hold what was asked
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.log(f"{type(error).__name__} at {at.filename}:{at.lineno}")
            if not status:
                with suppress(ClientDisconnect):
                    await Problem(500, "an error inside the server").response(scope, receive, counted_send)
        finally:
            self.in_hand -= holds
            seconds, status = time.perf_counter() - begin, status if over else 499
            if received and status == 200:
                self.usual_seconds += 0.1 * (seconds - self.usual_seconds)
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.seconds.labels(route, str(status)).observe(seconds)
            self.log(f"{route} {status}, {seconds:.3f} s, {received} bytes in, {sent} bytes out")

    def check_key(self, scope: Json) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.api_key and not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise Problem(401, "the API key is missing or wrong", "invalid_api_key")

    def check_place(self) -> None:
        if self.in_hand >= self.limits.max_queue:
            message = f"{self.in_hand} requests are in hand already; try again later"
            seconds = min(60, math.ceil(self.usual_seconds))
            raise Problem(429, message, "queue_full", headers={"Retry-After": str(seconds)})

    async def prepared(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` in a thread, of which there are few. A client that goes away does not make room for another
        before its thread is done."""
        return await get_running_loop().run_in_executor(self.pool, function, *arguments)

    # What is there ------------------------------------------------------------------------------

    async def health(self) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def models(self) -> Json:
        return {"object": "list", "data": [self.check_model(self.name)]}

    async def model(self, model: str) -> Json:
        return self.check_model(model)

    def check_model(self, model: str | None, lora: str | None = None) -> Json:
        if model not in (None, self.name):
            message = f"the model {model!r:.80} does not exist; {self.name!r} is served"
            raise Problem(404, message, "model_not_found", "model")
        if lora is not None and lora not in self.engine.loras:
            message = f"the adapter {lora!r:.80} does not exist; there are {[*self.engine.loras]}"
            raise Problem(404, message, "lora_not_found", "lora")
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "janusflow-min"}
        return about | {"lora": [*self.engine.loras]}

    # Chat ---------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest) -> Response:
        self.check_model(body.model, body.lora)
        question = await self.prepared(self.question, body)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(self.events(question, about, usage), media_type="text/event-stream")
        self.engine.submit(question)
        await wrap_future(question.future)
        message = {"role": "assistant", "content": question.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": question.finish_reason}
        about |= {"object": "chat.completion", "choices": [choice], "usage": usage_of(question)}
        return JSONResponse(about)

    def question(self, body: ChatRequest) -> Question:
        """The request as the engine takes it. ValueError or Problem for what cannot be answered."""
        pipe, most = self.engine.pipe, self.limits.max_tokens
        positions = pipe.model.config.llm.max_position_embeddings
        images = sum(len(message.urls) for message in body.messages)
        if images * pipe.processor.num_image_tokens > positions:
            raise too_long(f"{images} images", positions)
        system, conversation = [], []
        for message in body.messages:
            if message.role in ("user", "assistant"):
                conversation.append(self.turn(message))
            elif conversation or message.urls:
                raise ValueError("a system message comes first and holds text alone")
            else:
                system.append(message.text)
        if not conversation or conversation[-1]["role"] != "user" or not conversation[-1]["content"].strip():
            raise ValueError("the last message must be the user's, and not empty")
        conversation.append({"role": "assistant", "content": ""})
        system_prompt = "\n\n".join(system) if system else SYSTEM_PROMPT
        ids, _, squares = pipe.processor.conversation(conversation, system_prompt)
        if (room := positions - len(ids)) < 1:
            raise too_long(f"{len(ids)} tokens and an answer", positions)
        asked = body.max_completion_tokens or body.max_tokens or min(DEFAULT_TOKENS, most)
        if asked > most:
            raise Problem(400, f"an answer has at most {most} tokens", param="max_tokens")
        options = body.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = fresh_seed() if body.seed is None else body.seed
        stop = [text for text in stop if text]
        return Question(ids, squares, min(asked, room), seed, stop, lora=body.lora, **options)

    def turn(self, message: Message) -> Json:
        """A message in the processor's form: its images first, as the model was trained, then its text."""
        processor, squares = self.engine.pipe.processor, []
        if message.urls and message.role == "assistant":
            raise ValueError("a message of the assistant holds text alone")
        for url in message.urls:
            remote = url[:5].lower() != "data:"
            data = (
                protocol.fetch(url, self.hosts, self.limits.max_body)
                if remote
                else protocol.decode_data_url(url)
            )
            image = protocol.read_image(data, self.limits.max_image_pixels)
            squares.append(processor.image_processor.pad(image))  # small from here on
        processor.tokenizer.reject_special_tokens(message.text)
        text = message.text if message.text.strip() or not squares else DEFAULT_QUESTION
        content = f"{processor.tokenizer.image_tag}\n" * len(squares) + text
        return {"role": message.role, "content": content, "images": squares}

    async def events(self, question: Question, about: Json, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        loop, queue = get_running_loop(), Queue()  # type: ignore[var-annotated]

        def put(piece: str | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        def chunk(delta: Json, finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return event(about | {"choices": [choice]} | ({"usage": None} if usage else {}))

        about |= {"object": "chat.completion.chunk"}
        question.on_text = put
        question.future.add_done_callback(lambda _: put(None))
        try:
            self.engine.submit(question)
            piece = await queue.get()  # nothing is sent before there is something to say
            yield chunk({"role": "assistant", "content": ""})
            while piece is not None:
                yield chunk({"content": piece})
                piece = await queue.get()
            question.future.result()
            yield chunk({}, question.finish_reason)
            if usage:
                yield event(about | {"choices": [], "usage": usage_of(question)})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(Problem(500, f"the answer failed: {type(error).__name__}").body)
        finally:
            question.future.cancel()

    # Images -------------------------------------------------------------------------------------

    async def generate(self, body: GenerationFields) -> Json:
        SamplingOptions(**body.settings).resolved()  # ValueError
        return await self.images(body)

    async def edit(self, request: Request) -> Json:
        # A browser asks this server before it sends another page's JSON, but not before it sends its form.
        origin = request.headers.get("origin", "")
        if origin and origin.partition("://")[2] != request.headers.get("host"):
            raise Problem(403, "forms of other web pages are refused")
        async with request.form(max_files=2) as form:
            fields = {key: value for key, value in form.items() if isinstance(value, str)}
            uploads = [(key, file) for key, file in form.multi_items() if isinstance(file, UploadFile)]
            files = {key.removesuffix("[]"): await file.read() for key, file in uploads}
        if len(files) < len(uploads) or not {"image"} <= set(files) <= {"image", "mask"}:
            raise Problem(400, "an edit needs one file image, and may have one file mask", param="image")
        try:
            body = EditFields.model_validate(fields, strict=False)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        most, read = self.limits.max_image_pixels, protocol.read_image
        image = await self.prepared(read, files["image"], most)
        mask = await self.prepared(read, files["mask"], most, True) if "mask" in files else None
        return await self.images(body, image, mask)

    async def images(
        self, body: ImageFields, source: Image.Image | None = None, mask: Image.Image | None = None
    ) -> Json:
        self.check_model(body.model, body.lora)
        limits, settings = self.limits, body.settings
        width, height = (0, 0) if body.size == "auto" else map(int, body.size.split("x"))
        if width != height:
            raise Problem(400, "size must be square", param="size")
        asked = {"n": (body.n, limits.max_n), "size": (width, limits.max_size)}
        asked["num_inference_steps"] = (body.num_inference_steps or 0, limits.max_steps)
        for name, (value, most) in asked.items():
            if value > most:
                raise Problem(400, f"{name} may be at most {most}", param=name)
        prompts = [body.prompt]
        prompts += [settings[key] for key in ("negative_prompt", "source_prompt") if key in settings]
        await self.prepared(self.engine.pipe.check_prompts, prompts)
        first = fresh_seed() if body.seed is None else body.seed
        seeds = [first + k for k in range(body.n)]
        work = ImageRequest(body.prompt, seeds, settings, source, mask, body.lora)
        self.engine.submit(work)
        made = await wrap_future(work.future)
        side = width or made[0].width
        data = []
        for image, seed in zip(made, work.seeds, strict=True):
            data.append({"b64_json": await self.prepared(png, image, side), "seed": seed})
        return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{side}x{side}"}


async def read_body(scope: Json, receive: Any, most: int) -> bytes:
    """A request's body of at most `most` bytes. Problem or ClientDisconnect where that fails."""
    body = bytearray()
    too_large = Problem(413, f"a request may have {most} bytes", "request_too_large")
    if int(dict(scope["headers"]).get(b"content-length", 0)) > most:
        raise too_large
    with anyio.move_on_after(READ_SECONDS):
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)
        raise ClientDisconnect
    raise Problem(408, f"the request did not arrive within {READ_SECONDS} s", "timeout")


async def until_gone(app: Any, scope: Json, body: bytes, receive: Any, send: Any) -> None:
    """Run the application over a body that has been read; cancel it and raise ClientDisconnect if its client goes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def gone() -> Json:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        return message

    async def again() -> Json:
        return messages.pop() if messages else await watch

    watch: Task[Json] = create_task(gone())
    task = create_task(app(scope, again, send))
    try:
        await wait({task, watch}, return_when=FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await gather(task, return_exceptions=True)
            raise ClientDisconnect
        await task
    finally:
        watch.cancel()
        task.cancel()


def usage_of(question: Question) -> Json:
    prompt, answer = len(question.ids), len(question.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def too_long(what: str, positions: int) -> Problem:
    message = f"{what} need more than the model's {positions} positions"
    return Problem(400, message, "context_length_exceeded", "messages")


def event(data: Json) -> str:
    return f"data: {json.dumps(data)}\n\n"


def png(image: Image.Image, side: int) -> str:
    """A PNG in base64, after a Lanczos resize where the side is another one."""
    if image.width != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def on_http_exception(_: Request, error: Any) -> Response:
    return Problem(error.status_code, str(error.detail), headers=error.headers).response


def on_invalid(_: Request, error: Any) -> Response:
    """The fault that lies deepest, without the value that was sent."""
    fault = max(error.errors(), key=lambda fault: len(fault["loc"]))
    where = ".".join(str(key) for key in fault["loc"] if key not in ("body", "str") and "[" not in str(key))
    return Problem(400, f"{where or 'the body'}: {fault['msg']}", param=where or None).response
