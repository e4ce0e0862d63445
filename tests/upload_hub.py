"""A hub in miniature that files are uploaded to: the calls that huggingface_hub makes for a commit, LFS's batch and upload among them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    token: str = "hf_write"
    owner: str = "me"
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by name: private, files (path -> content), commits (titles), puts (how many)"""
    blobs: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """uploaded weights by repository and sha256"""
    events: list[tuple[str, str]] = field(default_factory=list)
    """in order: (put or broken, sha256 of the weights), (commit, repository)"""
    break_put: tuple[str, int] = ("", 0)
    """of a repository's uploads of weights, which one is refused, counted from 1"""
    url: str = ""
    counting: Lock = field(default_factory=Lock)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._answer({"error": "Invalid credentials"}, 401)
        return False

    def do_GET(self) -> None:
        found = re.fullmatch(r"/api/models/([\w./-]+?)(/revision/\w+)?", self.path.split("?")[0])
        repo = self.hub.repos.get(found[1]) if found else None
        if repo is None:
            self._answer({"error": "Repository not found"}, 404)
        elif self._allowed():
            self._answer(
                {"_id": "1", "id": found[1], "modelId": found[1], "private": repo["private"], "sha": "0" * 40, "siblings": []}
            )

    def do_POST(self) -> None:
        body, hub = self._body(), self.hub
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif not self._allowed():
            return
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or hub.owner}/{asked['name']}"
            exists = name in hub.repos
            if not exists:
                hub.repos[name] = {"private": asked.get("visibility") == "private", "files": {}, "commits": [], "puts": 0}
            self._answer({"url": f"{hub.url}/{name}", "name": name, "id": "1"}, 409 if exists else 200)
        elif found := re.fullmatch(r"/api/models/([\w./-]+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]})
        elif found := re.fullmatch(r"/([\w./-]+)\.git/info/lfs/objects/batch", self.path):
            objects = []
            for wanted in json.loads(body)["objects"]:
                oid = wanted["oid"]
                upload = (
                    {"actions": {"upload": {"href": f"{hub.url}/lfs/{found[1]}/{oid}"}}}
                    if (found[1], oid) not in hub.blobs
                    else {}
                )
                objects.append({"oid": oid, "size": wanted["size"], **upload})
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([\w./-]+)/commit/main", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"unexpected {self.path}"}, 500)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[name]
        self.hub.events.append(("commit", name))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.hub.blobs[name, value["oid"]]
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})

    def do_PUT(self) -> None:
        content, hub = self._body(), self.hub
        name, oid = self.path.removeprefix("/lfs/").rsplit("/", 1)
        with hub.counting:  # two files arrive at once, each in a thread of its own
            hub.repos[name]["puts"] += 1
            number = hub.repos[name]["puts"]
        if (name, number) == hub.break_put:
            hub.events.append(("broken", oid))
            self._answer({"error": "broken off"}, 400)
            return
        hub.events.append(("put", oid))
        assert hashlib.sha256(content).hexdigest() == oid
        hub.blobs[name, oid] = content
        self._answer({})


@contextmanager
def upload_hub() -> Iterator[Hub]:
    """A server on this machine, as long as the block lasts; `Hub.url` is for HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
