# SPDX-License-Identifier: MIT
"""What the tests of the server share: a server in this process, on a free port of loopback. A helper, not a test."""

from __future__ import annotations

import base64
import importlib.util
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from janusflow_min.pipeline import Pipeline
from janusflow_min.sampling import PlainSampler

SCRIPTS = Path(__file__).parents[2] / "scripts"


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Endless(PlainSampler):
    """Answers that only their maximum ends, a token in `seconds` at least."""

    def __init__(self, model: Any, eos_id: int, seconds: float = 0.0):
        super().__init__(model)
        self.eos_id, self.seconds = eos_id, seconds

    def generate_tokens(self, batch: Any, max_new_tokens: int, eos_id: int, sample_fn: Any = None) -> Any:
        def without_end(logits: Any) -> Any:
            time.sleep(self.seconds)
            logits[:, self.eos_id] = float("-inf")
            return sample_fn(logits)

        return super().generate_tokens(batch, max_new_tokens, eos_id, without_end)


@contextmanager
def endless(pipe: Pipeline, seconds: float = 0.0) -> Iterator[None]:
    """`pipe` with answers that do not end by themselves."""
    pipe.sampler = Endless(pipe.model, pipe.processor.tokenizer.eos_id, seconds)
    try:
        yield
    finally:
        pipe.sampler = None


class Running:
    """`with Running(pipe) as server:` serves at `server.url`; `log` holds the lines of its log."""

    def __init__(
        self, pipe: Pipeline, api_key: str | None = None, hosts: frozenset[str] = frozenset(), **limits: Any
    ):
        import uvicorn

        from janusflow_min.serve import Limits
        from janusflow_min.serve.app import Server
        from janusflow_min.serve.engine import Engine

        self.log: list[str] = []
        self.engine = Engine(pipe)
        self.server = Server(self.engine, "tiny", Limits(**limits), api_key, hosts, self.log.append)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.url = f"{self.root}/v1"
        config = uvicorn.Config(self.server.app, log_level="error", access_log=False)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True
        )

    def __enter__(self) -> Running:
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *_: Any) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive() and not self.engine.is_alive, "the server does not end"


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)
