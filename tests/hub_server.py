# SPDX-License-Identifier: MIT
"""A stand-in for the Hugging Face hub on the loopback interface: repositories are folders."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Asked(list):
    """The names of the files that were asked for, and how many bytes of files were sent."""

    sent = 0


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, Asked]]:
    """(endpoint, the files that were asked for) of a hub with the repositories `root`/owner/name."""
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, body: bool) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = root.joinpath(*parts[2:4])
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                names = [p.relative_to(folder).as_posix() for p in files]
                if not files:
                    return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
                if "tree" in parts:
                    value = [
                        {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.tag(p)}
                        for name, p in zip(names, files, strict=True)
                    ]
                else:
                    repository = "/".join(parts[2:4])
                    value = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False}
                    value |= {
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [{"rfilename": name} for name in names],
                    }
                return self.send(200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})
            owner, name, _, _, *rest = parts
            file = root.joinpath(owner, name, *rest)
            if not file.is_file():
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            if body:
                asked.append("/".join(rest))
            content, status, headers = file.read_bytes(), 200, {"ETag": f'"{self.tag(file)}"'}
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(int(span[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            asked.sent += len(content) if body else 0
            return self.send(status, content, body, headers)

        @staticmethod
        def tag(file: Path) -> str:
            return hashlib.sha1(file.read_bytes()).hexdigest()

        def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (
                {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))} | headers
            ).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
