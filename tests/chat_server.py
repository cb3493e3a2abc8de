# SPDX-License-Identifier: MIT
"""A chat endpoint on loopback for tests: answers as it is told, and fails as real ones do. A helper, not a test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# a text; or ("status", 500), ("busy", Retry-After), ("hang", seconds), ("drop", 0), ("raw", bytes)
Reply = str | tuple[str, Any]


class ChatServer:
    """`with ChatServer(reply) as server:` serves `server.url`. reply: (request's JSON, how many times this very
    request came before) -> Reply."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]):
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = 0
        outer, lock, now = self, threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    before = sum(request == body for request in outer.requests)
                    outer.requests.append(body)
                    now[0] += 1
                    outer.most_at_once = max(outer.most_at_once, now[0])
                try:
                    self.act(reply(body, before))
                except OSError:  # the client has gone
                    pass
                finally:
                    with lock:
                        now[0] -= 1

            def act(self, what: Reply) -> None:
                kind, value = ("text", what) if isinstance(what, str) else what
                if kind == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                if kind == "hang":
                    time.sleep(value)
                    kind, value = "text", "too late"
                message = {"role": "assistant", "content": value}
                content = value if kind == "raw" else b'{"error": {"message": "no"}}'
                if kind == "text":
                    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                    about = {"id": "1", "object": "chat.completion", "created": 1, "model": body_model(self)}
                    content = json.dumps(about | {"choices": choices}).encode()
                self.send_response({"status": value, "busy": 429}.get(kind, 200))
                if kind == "busy":
                    self.send_header("Retry-After", value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        def body_model(handler: Any) -> str:
            return outer.requests[-1].get("model", "judge")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
