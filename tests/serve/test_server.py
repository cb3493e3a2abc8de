# SPDX-License-Identifier: MIT
"""The server as its clients see it: the `openai` package, curl, and clients that send nonsense or hang up."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from adapters import write_adapter  # noqa: E402
from serving import Running, data_url, endless, wait_until  # noqa: E402

import janusflow_min as jf  # noqa: E402
from janusflow_min.serve.app import PREPARING  # noqa: E402

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def pipe():
    return jf.load("tiny", device="cpu", progress=False)


@pytest.fixture(scope="module")
def server(pipe):
    with Running(pipe) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def star(pipe) -> Image.Image:
    return pipe.generate("a photo of a red star", 1, num_inference_steps=4, seed=0, progress=False).images[0]


def image_part(image: Image.Image) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def user(*content) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content],
    }


def metric(server: Running, name: str) -> float:
    text = httpx.get(f"{server.root}/metrics").text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))


# What is asked for is done ----------------------------------------------------------------------------------------


def test_models_and_health(server, client):
    """Stops: clients that find no model to choose."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "janusflow-min"
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}


def test_chat_answers_as_understand_does(pipe, client, star):
    """Stops: images, turns or the system's words that do not reach the model in its own form."""
    answer = client.chat.completions.create(model="tiny", messages=[user(QUESTION, image_part(star))])
    alone = pipe.understand(QUESTION, images=star)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text.strip())
    assert choice.finish_reason == "stop" and answer.object == "chat.completion"
    usage, ids = answer.usage, pipe.processor.tokenizer.encode(alone.sft_format)
    assert usage.prompt_tokens == len(ids) + pipe.processor.num_image_tokens + 1
    assert usage.completion_tokens == len(alone.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_turns_and_several_images(pipe, client, star):
    """Stops: a conversation of which only the last turn is read; images in another order than they were sent."""
    ring = Image.new("L", (50, 90), 200)
    turns = [
        user(image_part(star), image_part(ring), "What is in the first picture?"),
        {"role": "assistant", "content": "a red star"},
        user("And in the second?"),
    ]
    answer = client.chat.completions.create(model="tiny", messages=turns)
    tag = "<image_placeholder>\n"
    alone = pipe.chat(
        [
            {"role": "User", "content": tag * 2 + "What is in the first picture?", "images": [star, ring]},
            {"role": "Assistant", "content": "a red star"},
            {"role": "User", "content": "And in the second?"},
        ]
    )
    assert answer.choices[0].message.content == alone.text.strip()
    assert answer.usage.completion_tokens == len(alone.token_ids)


def test_the_system_message_takes_the_place_of_the_usual_one(pipe, server, client):
    """Stops: a system message that is ignored, or comes on top of the built-in one."""
    tokens = {}
    for system in (None, "", "Be brief."):
        first = [] if system is None else [{"role": "system", "content": system}]
        answer = client.chat.completions.create(model="tiny", messages=[*first, user("hi")])
        tokens[system] = answer.usage.prompt_tokens
    asked = [{"role": "User", "content": "hi"}, {"role": "Assistant", "content": ""}]
    for system in ("", "Be brief."):
        assert tokens[system] == len(pipe.processor.conversation(asked, system)[0])
    assert tokens[None] == len(pipe.processor.conversation(asked)[0])


def test_sampling_options_are_the_library_s(pipe, client):
    """Stops: a temperature, top_p or seed that has no effect or another one than in the library."""
    texts = set()
    for seed in range(6):
        options = dict(temperature=1.9, top_p=0.99, seed=seed)
        answer = client.chat.completions.create(
            model="tiny", messages=[user("hi")], max_tokens=9, extra_body={"top_k": 0}, **options
        )
        alone = pipe.understand("hi", max_new_tokens=9, top_k=0, **options)
        assert answer.choices[0].message.content == alone.text.strip()
        texts.add(answer.choices[0].message.content)
    assert len(texts) > 2


def test_maximum_and_stop_strings_end_an_answer(pipe, server, client, star):
    """Stops: an answer that goes on past what was asked for, or says that it ended otherwise."""
    create = lambda **options: client.chat.completions.create(  # noqa: E731
        model="tiny", messages=[user("Describe the picture.", image_part(star))], **options
    )
    whole = create().choices[0].message.content
    last = whole.split()[-1]
    cut = create(stop=[last, "never"])
    assert cut.choices[0].message.content == whole.partition(last)[0].strip() != whole
    assert cut.choices[0].finish_reason == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        short = create(**{name: 1})
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 1)
        assert whole.startswith(short.choices[0].message.content)
    streamed = create(stop=last, stream=True)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in streamed).strip()
        == whole.partition(last)[0].strip()
    )


def test_a_stream_says_what_the_whole_answer_says(client, star):
    """Stops: a stream that comes in one piece, without its end, its role or the usage that was asked for."""
    asked = dict(model="tiny", messages=[user("Describe the picture.", image_part(star))])
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *chunks, end = chunks
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and end.choices == [] and end.usage == whole.usage


def test_a_stream_arrives_while_the_answer_is_decoded(pipe, server, client):
    """Stops: events that are held back until the answer is over."""
    with endless(pipe, seconds=0.01):
        stream = client.chat.completions.create(
            model="tiny", messages=[user("hi")], max_tokens=150, stream=True
        )
        times = [time.monotonic() for _ in stream]
    assert times[-1] - times[1] > 1 and len(times) > 50


def test_images_are_generate_s(pipe, client):
    """Stops: prompts, seeds, steps, guidance or sizes that get lost on the way."""
    settings = dict(num_inference_steps=3, cfg_weight=3.0)
    rest = dict(solver="heun", timestep_shift=2.0, guidance_interval=[0.0, 0.5], guidance_rescale=0.5)
    others = settings | rest | dict(negative_prompt="a blue ring")
    for size, side, options in (
        ("auto", None, others),
        ("auto", None, {"preset": "quick"}),
        ("64x64", 64, settings),
    ):
        got = client.images.generate(
            model="tiny", prompt="a photo of a red star", n=2, size=size, response_format="b64_json",
            extra_body={"seed": 7, **options},
        )  # fmt: skip
        alone = pipe.generate("a photo of a red star", 2, img_size=side, seed=7, progress=False, **options)
        for data, image, seed in zip(got.data, alone.images, alone.seeds, strict=True):
            read = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
            assert (read.format, read.size, data.seed) == ("PNG", image.size, seed)
            assert np.abs(np.asarray(read, int) - np.asarray(image, int)).max() <= 1
        assert got.size == f"{image.width}x{image.width}"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def half_transparent(size: tuple[int, int]) -> Image.Image:
    """A mask of OpenAI's form: the left half, transparent, may change."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def test_edits_are_edit_s(pipe, client, star):
    """Stops: an edit of another image, of what the mask protects, or with other settings than were asked for."""
    settings = dict(
        strength=0.6, num_inference_steps=4, source_prompt="a photo of a red star", method="flowedit"
    )
    white = Image.new("L", star.size, 0)
    white.paste(255, (0, 0, star.width // 2, star.height))
    for mask, theirs in ((None, openai.NOT_GIVEN), (white, png(half_transparent(star.size)))):
        got = client.images.edit(
            model="tiny", image=("a.png", png(star)), mask=theirs, prompt="a photo of a blue star", n=2,
            extra_body={"seed": 3, **settings},
        )  # fmt: skip
        prompts = ["a photo of a blue star"] * 2
        alone = pipe.edit([star] * 2, prompts, mask=mask, seed=3, progress=False, **settings)
        for data, image, seed in zip(got.data, alone, (3, 4), strict=True):
            read = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))), int)
            assert np.abs(read - np.asarray(image, int)).max() <= 1 and data.seed == seed
            if mask is not None:
                right = np.asarray(star)[:, star.width // 2 :]
                assert np.array_equal(read[:, star.width // 2 :], right)
        assert np.abs(read - np.asarray(star, int)).max() > 20


@pytest.mark.parametrize(
    "files, fields, words",
    [
        ({}, {"prompt": "a"}, "image"),
        ({"image": b"no image"}, {"prompt": "a"}, "image"),
        ({"image": None}, {}, "prompt"),
        ({"image": None}, {"prompt": "a", "strength": "much"}, "strength"),
        ({"image": None}, {"prompt": "a", "strength": "2", "source_prompt": "b"}, "strength"),
        ({"image": None}, {"prompt": "a", "method": "magic"}, "method"),
        ({"image": None}, {"prompt": "a", "n": "11"}, "at most 10"),
        ({"image": None}, {"prompt": "a", "preset": "quick"}, "preset"),
        ({"image": None, "mask": "opaque"}, {"prompt": "a"}, "alpha"),
        ({"image": None, "mask": "small"}, {"prompt": "a", "source_prompt": "b"}, "mask"),
        ({"image": "large"}, {"prompt": "a"}, "6000x6000"),
        ({"image": None, "image2": b""}, {"prompt": "a"}, "image"),
        ({"image[] 1": None, "image[] 2": None}, {"prompt": "a"}, "one file image"),
    ],
)
def test_bad_edits(pipe, server, star, files, fields, words):
    """Stops: bad edits that are tried, or that end the engine."""
    contents = {None: png(star), "opaque": png(star), "small": png(half_transparent((9, 9)))}
    contents["large"] = png(Image.new("1", (6000, 6000)))
    sent = [(key.split()[0], ("a.png", contents.get(value, value))) for key, value in files.items()]
    done = httpx.post(f"{server.url}/images/edits", files=sent or {"other": b"a"}, data=fields, timeout=60)
    assert done.status_code == 400 and words in done.json()["error"]["message"], done.json()


def test_forms_of_other_pages_are_refused(pipe, server, star):
    """Stops: a web page that has its visitors' own server edit images, which needs no permission of the browser."""
    sent = dict(files={"image": png(star)}, data={"prompt": " "})
    for origin, status in (("https://elsewhere.example", 403), ("null", 403), (server.root, 400)):
        done = httpx.post(f"{server.url}/images/edits", headers={"Origin": origin}, **sent)
        assert done.status_code == status


def test_curl(server, star, tmp_path):
    """Stops: a server that only the openai package can use."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "request.json").write_text(json.dumps({"messages": [user(QUESTION, image_part(star))]}))

    def curl(*arguments: str) -> str:
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sent = ("-H", "Content-Type: application/json", "-d", "@request.json")
    assert json.loads(curl(f"{server.url}/chat/completions", *sent))["choices"][0]["message"]["content"]
    assert "tiny" in curl(f"{server.url}/models")
    (tmp_path / "large.json").write_text('{"messages": "' + "x" * 40_000_000 + '"}')
    error = json.loads(curl(f"{server.url}/chat/completions", *sent[:3], "@large.json"))["error"]
    assert error["code"] == "request_too_large"


def test_what_clients_send_without_meaning_it_is_accepted(client):
    """Stops: the usual clients refused for fields that ask for nothing."""
    answer = client.chat.completions.create(
        model="tiny", messages=[user("hi")], n=1, presence_penalty=0, frequency_penalty=0, logprobs=False, user="me",
        tools=[], response_format={"type": "text"}, metadata={"a": "b"},
    )  # fmt: skip
    again = [user("hi"), answer.choices[0].message.model_dump(), user("and now?")]
    assert client.chat.completions.create(model="tiny", messages=again).choices[0].message.content


# What cannot be done is said -------------------------------------------------------------------------------------


def chat(**fields) -> tuple[str, dict]:
    return "/chat/completions", {"messages": [user("hi")]} | fields


def paint(**fields) -> tuple[str, dict]:
    return "/images/generations", {"prompt": "a star"} | fields


def with_url(url) -> tuple[str, dict]:
    return chat(messages=[user("hi", {"type": "image_url", "image_url": {"url": url}})])


LARGE = data_url(Image.new("1", (6000, 6000)))
TRUNCATED = data_url(Image.effect_noise((64, 64), 50))[:-2000].rstrip("=")
TRUNCATED = TRUNCATED[: len(TRUNCATED) - (len(TRUNCATED.partition(",")[2]) % 4)]
BAD = {
    "no messages": (chat(messages=[]), 400, "messages"),
    "no user": (chat(messages=[{"role": "assistant", "content": "hi"}]), 400, "last message"),
    "ends with the assistant": (chat(messages=[user("a"), {"role": "assistant", "content": "a"}]), 400, "last"),
    "an empty message": (chat(messages=[user("  ")]), 400, "last message"),
    "a role": (chat(messages=[{"role": "tool", "content": "hi"}]), 400, "role"),
    "a late system message": (chat(messages=[user("hi"), {"role": "system", "content": "a"}]), 400, "system"),
    "no content": (chat(messages=[{"role": "user"}]), 400, "content"),
    "a part": (chat(messages=[user({"type": "input_audio"})]), 400, "type"),
    "a part without its field": (chat(messages=[user({"type": "text"})]), 400, "needs the field text"),
    "an image of the assistant": (
        chat(messages=[{"role": "assistant", "content": [image_part(Image.new("L", (9, 9)))]}, user("hi")]),
        400,
        "assistant",
    ),
    "a model": (chat(model="gpt-5"), 404, "gpt-5"),
    "temperature": (chat(temperature=3), 400, "temperature"),
    "a temperature that is text": (chat(temperature="1"), 400, "temperature"),
    "top_p": (chat(top_p=0), 400, "top_p"),
    "seed": (chat(seed=-1), 400, "seed"),
    "a seed of many digits": (chat(seed=10**400), 400, "seed"),
    "max_tokens": (chat(max_tokens=0), 400, "max_tokens"),
    "more tokens than allowed": (chat(max_tokens=100_000), 400, "4096"),
    "stop": (chat(stop=["a"] * 17), 400, "stop"),
    "n": (chat(n=2), 400, "n"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools"),
    "a misspelt field": (chat(temprature=1), 400, "temprature"),
    "a special token": (chat(messages=[user("<image_placeholder> hi")]), 400, "special tokens"),
    "a surrogate": (chat(messages=[user("\ud800")]), 400, ""),
    "a text that is too long": (chat(messages=[user("star " * 5000)]), 400, "positions"),
    "images that are too many": (chat(messages=[user(*[image_part(Image.new("L", (9, 9)))] * 17)]), 400, "positions"),
    "a remote image": (with_url("https://example.com/a.png"), 400, "--allow-urls"),
    "a file": (with_url("file:///etc/passwd"), 400, "data:"),
    "no URL": (with_url("http://[:::1]/"), 400, "URL"),
    "data of another kind": (with_url("data:text/html;base64,aGk="), 400, "data:image"),
    "data that are no base64": (with_url("data:image/png;base64,###"), 400, "base64"),
    "data that are no image": (with_url("data:image/png;base64,aGVsbG8="), 400, "image"),
    "a truncated image": (with_url(TRUNCATED), 400, "image"),
    "a large image": (with_url(LARGE), 400, "6000x6000"),
    "an empty prompt": (paint(prompt=" "), 400, "prompt"),
    "no prompt": (("/images/generations", {}), 400, "prompt"),
    "a long prompt": (paint(prompt="star " * 2000), 400, "positions"),
    "a special token in a prompt": (paint(prompt="a <end_of_image> star"), 400, "special tokens"),
    "images of a request": (paint(n=11), 400, "10"),
    "no images": (paint(n=0), 400, "n"),
    "a size": (paint(size="large"), 400, "size"),
    "a size that is not square": (paint(size="64x128"), 400, "square"),
    "a huge size": (paint(size="9999x9999"), 400, "2048"),
    "URLs for results": (paint(response_format="url"), 400, "response_format"),
    "steps": (paint(num_inference_steps=101), 400, "num_inference_steps"),
    "cfg_weight": (paint(cfg_weight="2"), 400, "cfg_weight"),
    "solver": (paint(solver="rk45"), 400, "solver"),
    "preset": (paint(preset="slow"), 400, "preset"),
    "timestep_shift": (paint(timestep_shift=0), 400, "timestep_shift"),
    "guidance_interval": (paint(guidance_interval=[0.5, 0.1]), 400, "guidance_interval"),
    "guidance_interval of one": (paint(guidance_interval=[0.5]), 400, "guidance_interval"),
    "guidance_rescale": (paint(guidance_rescale=2), 400, "guidance_rescale"),
    "an empty negative prompt": (paint(negative_prompt=" "), 400, "prompt"),
    "an image's seed": (paint(seed=2**63), 400, "seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(server, case):
    """Stops: a bad request that costs the engine's time, kills it, or is answered in a form no client reads."""
    (path, body), status, words = BAD[case]
    done = httpx.post(
        server.url + path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    error = done.json()["error"]
    assert done.status_code == status and words in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'{"messages": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "text/plain"),
        (b"a=b", "multipart/form-data"),
    ],
)
def test_bodies_that_are_no_json(server, content, kind):
    """Stops: a body that is not even JSON answered with a stack trace or in plain text; a web page that makes a
    browser's user ask (text/plain needs no permission there)."""
    for path in ("/chat/completions", "/images/generations"):
        done = httpx.post(server.url + path, content=content, headers={"Content-Type": kind})
        assert done.status_code == 400 and done.json()["error"]["type"] == "invalid_request_error"


def test_other_addresses_and_methods(server):
    """Stops: errors of the framework's own form."""
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server.url}/chat/completions").status_code == 405
    assert httpx.get(f"{server.url}/models/other").json()["error"]["code"] == "model_not_found"
    assert httpx.post(f"{server.root}/health").status_code == 405


def test_the_client_s_errors_are_openai_s(client):
    """Stops: errors that the openai package cannot tell apart."""
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=[user("hi")], temperature=-1)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.images.generate(model="dall-e-3", prompt="a star")


def test_an_api_key(pipe):
    """Stops: a key that is not asked for, or asked for of whoever looks whether the server is alive."""
    with Running(pipe, api_key="sécret") as server:
        for key in (None, "wrong", "sécre"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert httpx.get(server.root + path, headers=headers).status_code == 401
            done = httpx.post(f"{server.url}/chat/completions", json=chat()[1], headers=headers)
            assert done.json()["error"]["code"] == "invalid_api_key"
        good = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{server.url}/models", headers=good).status_code == 200
        assert httpx.get(f"{server.root}/health").status_code == 200


def test_an_error_inside_is_answered_and_its_words_are_not_logged(pipe, monkeypatch):
    """Stops: prompts in the log by way of an error's message; a request without an answer."""
    with Running(pipe) as server:
        monkeypatch.setattr(pipe, "check_prompts", lambda prompts: 1 / 0 if "secret" in prompts[0] else None)
        monkeypatch.setattr(pipe, "generate", lambda *a, **k: [][1])
        for prompt in ("a secret star", "another star"):
            done = httpx.post(f"{server.url}/images/generations", json={"prompt": prompt})
            assert done.status_code == 500 and done.json()["error"]["type"] == "server_error"
        httpx.post(
            f"{server.url}/chat/completions?secret=1",
            json={"messages": [user("my secret")], "model": "secret"},
        )
        httpx.get(f"{server.root}/secret")
    text = "\n".join(server.log)
    assert "ZeroDivisionError at" in text and "IndexError at" in text and "/v1/images/generations 500" in text
    assert "secret" not in text and "star" not in text


# Load and clients that go away ----------------------------------------------------------------------------------


def send_raw(server: Running, path: str, body: dict, whole: bool = True) -> socket.socket:
    """A request on a socket of its own, whose answer nobody reads."""
    content = json.dumps(body).encode()
    head = f"POST /v1{path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    made = socket.create_connection(("127.0.0.1", int(server.root.rpartition(":")[2])))
    made.sendall(head.encode() + (content if whole else content[: len(content) // 2]))
    return made


def test_the_queue_has_an_end(pipe):
    """Stops: requests that pile up without limit; a place that is not given back."""
    with Running(pipe, max_queue=3) as server, endless(pipe, seconds=0.005):
        url = f"{server.url}/chat/completions"
        with ThreadPoolExecutor(3) as pool:
            running = [
                pool.submit(httpx.post, url, json=chat(max_tokens=150)[1], timeout=60) for _ in range(3)
            ]
            wait_until(lambda: server.server.in_hand == 3)
            full = httpx.post(url, json=chat()[1])
            assert full.status_code == 429 and 1 <= int(full.headers["Retry-After"]) <= 60
            assert full.json()["error"]["code"] == "queue_full"
            assert httpx.get(f"{server.root}/health").status_code == 200
            with pytest.raises(openai.RateLimitError):
                openai.OpenAI(base_url=server.url, api_key="no", max_retries=0).images.generate(
                    prompt="a", model="tiny"
                )
            assert [done.result().status_code for done in running] == [200] * 3
        wait_until(lambda: server.server.in_hand == 0)
        assert httpx.post(url, json=chat(max_tokens=1)[1]).status_code == 200


def test_who_hangs_up_frees_the_place(pipe, monkeypatch):
    """Stops: places and the model's time held for clients that have gone: while waiting, being answered, streamed,
    painted for, or in the midst of sending."""
    monkeypatch.setattr("janusflow_min.serve.app.READ_SECONDS", 300.0)
    with Running(pipe, max_queue=7) as server, endless(pipe, seconds=0.05):
        long = dict(max_tokens=900)
        sockets = [
            send_raw(server, *chat(**long)),
            send_raw(server, *chat(**long, stream=True)),
            send_raw(server, *paint(num_inference_steps=100, n=10)),
            send_raw(server, *paint(num_inference_steps=99, n=10)),
            send_raw(server, *chat(**long), whole=False),
        ]
        wait_until(lambda: server.server.in_hand == 5 and server.engine.images)
        reader = httpx.stream("POST", f"{server.url}/chat/completions", json=chat(**long, stream=True)[1])
        with reader as stream:
            lines = stream.iter_lines()  # which hangs up when it is dropped
            next(lines)
            wait_until(lambda: server.server.in_hand == 6)
        wait_until(lambda: server.server.in_hand == 5)
        for each in sockets:
            each.close()
        wait_until(lambda: server.server.in_hand == 0)
        wait_until(lambda: not server.engine.questions and not server.engine.images, seconds=10)
        tokens = server.engine.counts["tokens"]
        answer = httpx.post(f"{server.url}/chat/completions", json=chat(max_tokens=2)[1], timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 2
        assert server.engine.counts["tokens"] == tokens + 2
    assert sum(" 499, " in line for line in server.log) >= 5


def test_who_hangs_up_makes_no_room_before_the_thread_is_done(pipe, star, monkeypatch):
    """Stops: more images in memory than the server has threads for, by clients that send one and hang up."""
    lock, running, most = threading.Lock(), 0, 0

    def slow(*arguments):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.5)
        with lock:
            running -= 1
        return star

    monkeypatch.setattr("janusflow_min.serve.protocol.read_image", slow)
    before = threading.active_count()
    with Running(pipe, max_queue=100) as server:
        for _ in range(3):
            sockets = [
                send_raw(server, *chat(messages=[user("hi", image_part(star))])) for _ in range(PREPARING)
            ]
            wait_until(lambda: running == PREPARING)
            for each in sockets:
                each.close()
            wait_until(lambda: server.server.in_hand == 0)
        wait_until(lambda: running == 0)
    assert most == PREPARING
    wait_until(lambda: threading.active_count() <= before)


def test_who_sends_too_slowly_is_not_waited_for(pipe, monkeypatch):
    """Stops: places held by requests that never end."""
    monkeypatch.setattr("janusflow_min.serve.app.READ_SECONDS", 0.2)
    with Running(pipe) as server, send_raw(server, *chat(), whole=False) as slow:
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        wait_until(lambda: server.server.in_hand == 0)


def test_who_reads_too_slowly_is_not_waited_for(pipe, monkeypatch):
    """Stops: places held by a client that does not read its answer."""
    monkeypatch.setattr("janusflow_min.serve.app.WRITE_SECONDS", 0.3)
    monkeypatch.setattr("janusflow_min.serve.app.event", lambda data: "x" * 10_000_000)
    with Running(pipe) as server, send_raw(server, *chat(stream=True)):
        wait_until(lambda: any("499" in line or "bytes out" in line for line in server.log))
        wait_until(lambda: server.server.in_hand == 0)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_limit(pipe, chunked):
    """Stops: gigabytes taken into memory, with an announced length or without one."""
    with Running(pipe, max_body=100_000) as server:
        pieces = (b" " * 1000 for _ in range(200))
        content = pieces if chunked else b" " * 200_000
        done = httpx.post(
            f"{server.url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert done.status_code == 413 and done.json()["error"]["code"] == "request_too_large"


def test_metrics(server, client):
    """Stops: numbers that Prometheus cannot read or that do not move."""
    before = metric(server, "janusflow_tokens_total"), metric(server, "janusflow_images_total")
    used = client.chat.completions.create(model="tiny", messages=[user("hi")]).usage.completion_tokens
    client.images.generate(model="tiny", prompt="a star", n=2, extra_body={"num_inference_steps": 1})
    assert metric(server, "janusflow_tokens_total") == before[0] + used
    assert metric(server, "janusflow_images_total") == before[1] + 2
    assert metric(server, "janusflow_requests_in_hand") == 0
    count = 'janusflow_request_seconds_count{route="/v1/images/generations",status="200"}'
    assert metric(server, count) >= 1


# Images from elsewhere -------------------------------------------------------------------------------------------


class Site:
    """A small web site on loopback: `pages` maps a path to (status, headers, content)."""

    def __init__(self, pages: dict):
        self.pages, self.asked = pages, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"site.example:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                path = connection.recv(10_000).split()[1].decode()
                self.asked.append(path)
                status, headers, content = self.pages[path]
                head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
                connection.sendall(
                    f"HTTP/1.1 {status} x\r\nConnection: close\r\n{head}\r\n".encode() + content
                )


def test_images_come_from_permitted_hosts_alone(pipe, star, monkeypatch):
    """Stops: a server that fetches for its clients what only it can reach, directly or by a redirect."""
    file = io.BytesIO()
    star.save(file, "PNG")
    site = Site({"/star.png": (200, {}, file.getvalue()), "/gone": (404, {}, b"")})
    port = site.host.rpartition(":")[2]
    site.pages |= {
        "/to": (302, {"Location": "/star.png"}, b""),
        "/inside": (302, {"Location": f"http://127.0.0.1:{port}/star.png"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/large": (200, {}, b"x" * 3_000_000),
    }

    def ask(server: Running, url: str) -> httpx.Response:
        return httpx.post(f"{server.url}/chat/completions", json=with_url(url)[1], timeout=30)

    real = socket.getaddrinfo
    local = lambda host, *a, **k: real("127.0.0.1" if host == "site.example" else host, *a, **k)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", local)
    hosts = frozenset({site.host, f"127.0.0.1:{port}", "[::1]", "169.254.169.254", "10.0.0.1"})
    with Running(pipe, hosts=hosts, max_body=2_000_000) as server:
        private = [
            f"http://{site.host}/star.png",
            f"http://127.0.0.1:{port}/star.png",
            "http://169.254.169.254/",
        ]
        private += ["http://10.0.0.1/", "http://2130706433/", "http://[::1]/"]
        for url in private:
            assert ask(server, url).status_code == 400
        assert site.asked == []  # not one of them was fetched
        monkeypatch.setattr("janusflow_min.serve.protocol.public_address", lambda host, port: "127.0.0.1")
        assert ask(server, f"http://{site.host}/star.png").status_code == 200
        assert ask(server, f"http://{site.host}/to").status_code == 200
        monkeypatch.setattr(server.server, "hosts", frozenset({site.host}))
        for path, words in (
            ("/inside", "--allow-urls"),
            ("/loop", "redirects"),
            ("/large", "larger"),
            ("/gone", "404"),
        ):
            assert words in ask(server, f"http://{site.host}{path}").json()["error"]["message"]
        assert "user name" in ask(server, f"http://user@{site.host}/").json()["error"]["message"]
    assert site.asked.count("/star.png") == 2 and site.asked.count("/loop") == 4
    site.socket.close()


def test_a_request_picks_an_adapter(tmp_path, star):
    """Stops: an adapter for everybody, for nobody, or a misspelt one that is silently left out."""
    pipe = jf.load("tiny", device="cpu", progress=False)
    plain = pipe.understand(QUESTION, images=star).text
    pipe.load_lora(write_adapter(tmp_path / "odd", pipe.model, size=0.5))
    odd = pipe.understand(QUESTION, images=star, max_new_tokens=8).text
    steps = {"seed": 1, "num_inference_steps": 2}
    image = pipe.generate("a red star", 1, progress=False, **steps).images[0]
    assert odd != plain
    with Running(pipe) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        ask = partial(
            client.chat.completions.create, model="tiny", messages=[user(QUESTION, image_part(star))]
        )
        told = [ask(max_tokens=8, extra_body={"lora": lora}) for lora in ("odd", None)]
        assert [answer.choices[0].message.content for answer in told] == [odd.strip(), plain.strip()]
        made = client.images.generate(model="tiny", prompt="a red star", extra_body=steps | {"lora": "odd"})
        made = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json)))
        assert np.array_equal(np.asarray(made), np.asarray(image))
        edit = partial(client.images.edit, model="tiny", prompt="a blue star", image=("a.png", png(star)))
        assert edit(extra_body=steps | {"lora": "odd"}).data[0].b64_json
        for call in (ask, edit, partial(client.images.generate, model="tiny", prompt="a red star")):
            with pytest.raises(
                openai.NotFoundError, match=r"adapter 'even' does not exist; there are \['odd'\]"
            ):
                call(extra_body={"lora": "even"})
        assert client.models.retrieve("tiny").lora == ["odd"]
