# SPDX-License-Identifier: MIT
"""OpenAI's requests as this server takes them, its errors, and images from data URLs and permitted hosts."""

from __future__ import annotations

import base64
import binascii
import io
import ipaddress
import re
import socket
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urljoin, urlsplit

from fastapi.responses import JSONResponse
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..pixels import FORMATS, open_image

# Fields without effect: who asks, and wishes about cost, style or format that have one answer here.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "name"}
IGNORED |= {"parallel_tool_calls", "quality", "style", "background", "moderation", "input_fidelity"}
# What a field may hold that asks for nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, "", "auto", [], {}, {"type": "text"})
FETCH_SECONDS, REDIRECTS = 10, 3


class Problem(Exception):
    """An error for the client, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.response = JSONResponse(self.body, status, headers)


class Fields(BaseModel):
    """Fields that are not declared may be there if they ask for nothing, as clients send `"tools": []`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Any:
        for key, value in (self.model_extra or {}).items():
            if key not in IGNORED and value not in NOTHING:
                raise ValueError(f"{key:.40} is not supported here")
        return self


class ImageURL(Fields):
    url: str


class Part(Fields):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _has_its_field(self) -> Any:
        if self.type not in self.model_fields_set:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        parts = self.content
        return (
            parts if isinstance(parts, str) else "\n".join(part.text for part in parts if part.type == "text")
        )

    @property
    def urls(self) -> list[str]:
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if part.image_url]


class StreamOptions(Fields):
    include_usage: bool | None = None


class ChatRequest(Fields):
    """`POST /v1/chat/completions`; `lora` and `top_k` are this library's own."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    lora: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None


class ImageFields(Fields):
    """`POST /v1/images/generations`. What follows `seed` is this library's own: arguments by the same names."""

    prompt: str
    model: str | None = None
    lora: str | None = None
    n: int = Field(1, ge=1)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    seed: int | None = Field(None, ge=0, lt=2**62)
    cfg_weight: float | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    solver: str | None = None
    timestep_shift: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The library's own, as keyword arguments of `generate` or `edit`."""
        openai = {"prompt", "model", "lora", "n", "size", "response_format", "output_format", "seed"}
        return self.model_dump(include=set(type(self).model_fields) - openai, exclude_none=True)


class GenerationFields(ImageFields):
    preset: str | None = None
    guidance_interval: list[float] | None = None
    guidance_rescale: float | None = None
    negative_prompt: str | None = None


class EditFields(ImageFields):
    """`POST /v1/images/edits`, beside the files `image` and `mask`."""

    source_prompt: str | None = None
    strength: float | None = None
    method: str | None = None
    source_cfg_weight: float | None = None


# Images -----------------------------------------------------------------------------------------------------------


def decode_data_url(url: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. ValueError for anything else."""
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]+;base64", head, re.IGNORECASE):
        raise ValueError("an image must be a URL of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("the image's data are not base64") from None


def read_image(data: bytes, most_pixels: int, mask: bool = False) -> Image.Image:
    """An RGB image from a file's bytes; of a mask the places that may change, white, which are transparent in it.
    ValueError for what is no image, and for more than `most_pixels` before they are decoded."""
    width = height = 0
    try:
        with Image.open(
            io.BytesIO(data), formats=[kind for kind in FORMATS.split() if kind in Image.OPEN]
        ) as image:
            (width, height), bands = image.size, image.getbands()
            if width * height <= most_pixels and mask and bands[-1] in "Aa":
                return ImageChops.invert(image.convert("RGBA").getchannel("A"))
    except Exception:  # `open_image` says what is wrong
        return open_image(data)
    if width * height > most_pixels:
        raise ValueError(f"the image has {width}x{height} pixels; at most {most_pixels} are taken")
    if mask:
        raise ValueError("the mask has no alpha channel; where it is transparent the image may change")
    return open_image(data)


def fetch(url: str, hosts: frozenset[str], most: int) -> bytes:
    """A file of at most `most` bytes from one of `hosts` ("name" or "name:port"). ValueError where that fails.

    Each redirect is checked as the first URL is; the connection goes to the address that was checked.
    """
    import httpx

    deadline = time.monotonic() + FETCH_SECONDS
    for _ in range(1 + REDIRECTS):
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise ValueError("the image's URL is not a URL") from None
        usual = {"http": 80, "https": 443}.get(parts.scheme)
        if usual is None or parts.username is not None:
            raise ValueError(
                "an image's URL must begin with data:, http:// or https:// and hold no user name"
            )
        if (host if port in (None, usual) else f"{host}:{port}") not in hosts:
            raise ValueError("images are fetched from no host but those that the server's --allow-urls names")
        target = httpx.URL(url).copy_with(host=public_address(host, port or usual))
        try:
            with (
                httpx.Client(timeout=FETCH_SECONDS, trust_env=False) as client,
                client.stream(
                    "GET", target, headers={"Host": parts.netloc}, extensions={"sni_hostname": host}
                ) as response,
            ):
                if response.is_redirect:
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status_code != 200:
                    raise ValueError(f"the image's URL answers with status {response.status_code}")
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > most or time.monotonic() > deadline:
                        raise ValueError(f"the image is larger than {most} bytes or comes too slowly")
                return bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL):
            raise ValueError("the image's URL cannot be fetched") from None
    raise ValueError(f"the image's URL redirects more than {REDIRECTS} times")


def public_address(host: str, port: int) -> str:
    """An address of a host all of whose addresses are on the public internet."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise ValueError("the host of the image's URL is not known") from None
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in found):
        raise ValueError("the host of the image's URL has no public address")
    return min(found, key=lambda address: ":" in address)  # not every machine has IPv6
