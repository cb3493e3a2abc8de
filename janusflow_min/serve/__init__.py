# SPDX-License-Identifier: MIT
"""A server that speaks OpenAI's protocol: `engine.py` runs the model, `protocol.py` reads requests, `app.py` serves."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any


def _limit(default: int, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may be in hand."""

    max_queue: int = _limit(64, "requests that may wait or run; one more gets status 429 with Retry-After")
    max_body: int = _limit(16 * 2**20, "bytes of a request, and of an image that is fetched")
    max_image_pixels: int = _limit(20_000_000, "pixels of an image that is sent")
    max_tokens: int = _limit(4096, "tokens of an answer; the model's positions are a limit too")
    max_n: int = _limit(10, "images of a request")
    max_steps: int = _limit(100, "num_inference_steps of a request")
    max_size: int = _limit(2048, "side of an image of a request, in px")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; OSError names the options."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return sock
