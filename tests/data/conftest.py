"""Tokenizers, texts and a hub in miniature, made on the spot for the tests of `lora_dist.data`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_dist.data.windows import Windows

WORDS = np.array(
    ["the", "lake", "was", "cold", "river", "ran", "to", "a", "sea", "of", "salt", "ships", "slept", "under", "stones"]
)


def prose(num_lines: int, seed: int = 0) -> list[str]:
    """Lines of running text with their line breaks, some of them blank."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() + ".\n" for _ in range(num_lines)]
    return [line if i % 5 else "\n" for i, line in enumerate(lines)]


def build_tokenizer(bos: bool = True, eos: bool = True, adds: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens; `adds` says what it puts around a text by itself: any of bos, eos, both."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(prose(200), trainer)
    if adds:
        left, right = ("<s> " if adds in ("bos", "both") else ""), (" </s>" if adds in ("eos", "both") else "")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{left}$A{right}", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>" if eos else None, model_max_length=64
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def write_text(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts; the test is skipped where it is absent."""
    path = Path(os.environ.get("LORA_DIST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real texts at {path} (LORA_DIST_DATA names the folder)")
    return path


@pytest.fixture
def windows_of() -> Callable[[int], Windows]:
    """n windows of 5 tokens, whose first token is the window's number."""

    def make(n: int) -> Windows:
        return Windows(np.arange(n, dtype=np.uint16)[:, None] + np.array([0, 1, 2, 3, 4], np.uint16) * 1000)

    return make


# --- a hub in miniature: serves data sets from memory, over the few routes that `datasets` asks for -----------------------

SHA = "0123456789abcdef0123456789abcdef01234567"
DATE = "2024-01-01T00:00:00.000Z"


class _Handler(BaseHTTPRequestHandler):
    repos: dict[str, dict[str, bytes] | str]  # files of each repository, or the error code it answers with

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

    def _answer(self, body: str = "") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.removeprefix("api/").split("/")
        if len(parts) < 3 or parts[0] != "datasets":
            return self._send(404, b"{}")
        repo, rest = "/".join(parts[1:3]), parts[3:]
        files = self.repos.get(repo, "RepoNotFound")
        if isinstance(files, str):
            return self._send(401, b'{"error": "no"}', {"X-Error-Code": files, "X-Error-Message": "no"})
        if rest[:1] == ["resolve"]:
            return self._file(files, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._json(_tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower()))
        if rest[:1] == ["paths-info"]:
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self._json([_entry(files, name) for name in asked if name in files or _is_folder(files, name)])
        return self._json({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files], "lastModified": DATE})

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        return self._send(200, files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _is_folder(files: dict[str, bytes], name: str) -> bool:
    return any(path.startswith(name + "/") for path in files)


def _entry(files: dict[str, bytes], name: str) -> dict:
    if name not in files:
        return {"type": "directory", "path": name, "oid": _oid(name.encode())}
    return {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])}


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    prefix = folder + "/" if folder else ""
    names = {name for name in files if name.startswith(prefix)}
    folders = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    every = names | {name for name in folders if name.startswith(prefix)}
    return [_entry(files, name) for name in sorted(every) if recursive or "/" not in name[len(prefix) :]]


@contextmanager
def fake_hub(repos: dict[str, dict[str, bytes] | str]) -> Iterator[str]:
    """The endpoint's URL, for HF_ENDPOINT, as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repos": repos}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
