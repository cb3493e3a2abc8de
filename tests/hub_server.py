# SPDX-License-Identifier: MIT
"""A stand-in for the Hugging Face hub on the loopback interface: repositories are folders. A helper, not a test."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_reader_and_writer"


class Asked(list):
    """The names of the files that were asked for, and how many bytes of files were sent."""

    sent = 0


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serve(root: Path, gated: str = "", cut: int | None = None) -> Iterator[tuple[str, Asked]]:
    """(endpoint, the files that were asked for) of a hub with the repositories `root`/owner/name, and other branches
    of them in `root`/owner/name@branch. gated: a repository that nobody may read; cut: the most bytes of a file that
    get through before the connection breaks."""
    asked = Asked()
    blobs: dict[str, bytes] = {}  # what has been uploaded and is not part of a commit yet

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def folder(self, owner: str, name: str, revision: str) -> Path | None:
            """A repository's folder at a branch or commit; None once the answer has said what is wrong."""
            if f"{owner}/{name}" == gated:
                return self.send(403, b"", False, {"X-Error-Code": "GatedRepo"})
            if not (root / owner / name).is_dir():
                return self.send(404, b"", False, {"X-Error-Code": "RepoNotFound"})
            for path in (root / owner).iterdir():
                base, _, branch = path.name.partition("@")
                if base == name and unquote(revision) in (branch or "main", commit(branch or "main")):
                    self.commit = commit(branch or "main")
                    return path
            return self.send(404, b"", False, {"X-Error-Code": "RevisionNotFound"})

        def answer(self, body: bool) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts == ["api", "whoami-v2"]:
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                return self.json({"name": "someone", "type": "user"}) if known else self.json({}, 401)
            if parts[:2] == ["api", "models"]:
                revision = parts[5] if len(parts) > 5 else "main"
                if (folder := self.folder(parts[2], parts[3], revision)) is None:
                    return None
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                names = [p.relative_to(folder).as_posix() for p in files]
                if "tree" in parts:
                    value = [
                        {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.tag(p)}
                        for name, p in zip(names, files, strict=True)
                    ]
                else:
                    repository = "/".join(parts[2:4])
                    value = {"id": repository, "modelId": repository, "sha": self.commit, "private": False}
                    value |= {"tags": [], "downloads": 0, "likes": 0}
                    value |= {"siblings": [{"rfilename": name} for name in names]}
                return self.json(value)
            if len(parts) < 4:
                return self.send(404, b"", body, {})
            owner, name, _, revision, *rest = parts
            if (folder := self.folder(owner, name, revision)) is None:
                return None
            file = folder.joinpath(*rest)
            if not file.is_file():
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            if body:
                asked.append("/".join(rest))
            content, status, headers = file.read_bytes(), 200, {"ETag": f'"{self.tag(file)}"'}
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            asked.sent += min(len(content), cut or len(content)) if body else 0
            return self.send(status, content, body, headers)

        def do_PUT(self) -> None:
            blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.json({})

        def do_POST(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.json({"error": "no right to write"}, 403)
            if parts == ["api", "repos", "create"]:
                about = json.loads(content)
                path = f"{about.get('organization') or 'someone'}/{about['name']}"
                there = (root / path).is_dir()
                (root / path).mkdir(parents=True, exist_ok=True)
                return self.json({"url": f"{endpoint}/{path}", "id": path}, 409 if there else 200)
            if parts == ["api", "validate-yaml"]:
                return self.json({"errors": [], "warnings": []})
            if "preupload" in parts:
                files = [
                    {"path": f["path"], "shouldIgnore": False, "uploadMode": self.mode(f["path"])}
                    for f in json.loads(content)["files"]
                ]
                return self.json({"files": files})
            if parts[-1] == "batch":
                objects = [
                    o | {"actions": {"upload": {"href": f"{endpoint}/blobs/{o['oid']}"}}}
                    for o in json.loads(content)["objects"]
                ]
                return self.json({"transfer": "basic", "objects": objects})
            assert "commit" in parts, self.path
            folder = root.joinpath(*parts[2:4])
            for line in content.splitlines():
                entry = json.loads(line)
                value, target = entry["value"], folder / entry["value"].get("path", "")
                if entry["key"] in ("file", "lfsFile"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    small = entry["key"] == "file"
                    target.write_bytes(base64.b64decode(value["content"]) if small else blobs[value["oid"]])
                elif entry["key"] == "deletedFile":
                    target.unlink()
                elif entry["key"] == "deletedFolder":
                    shutil.rmtree(target)
            url = f"{endpoint}/{'/'.join(parts[2:4])}/commit/{commit('main')}"
            return self.json({"success": True, "commitOid": commit("main"), "commitUrl": url})

        @staticmethod
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        @staticmethod
        def tag(file: Path) -> str:
            return hashlib.sha1(file.read_bytes()).hexdigest()

        def json(self, value: object, status: int = 200) -> None:
            self.send(
                status,
                json.dumps(value).encode(),
                self.command != "HEAD",
                {"Content-Type": "application/json"},
            )

        def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            usual = {"Content-Length": str(len(content))}
            usual |= {"X-Repo-Commit": self.commit} if hasattr(self, "commit") else {}
            for key, value in (usual | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:cut])
                self.close_connection = len(content) > len(content[:cut])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield endpoint, asked
    finally:
        server.shutdown()
        server.server_close()


def run(
    code: str, cache: Path, endpoint: str, offline: bool = False, token: str = ""
) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    root = str(Path(__file__).resolve().parents[1])
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": root}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    return done
