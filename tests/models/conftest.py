"""A small model on disk, one copy a test so that a test may break it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def _saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama_dir(_saved_llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama as a Hugging Face directory, free to be damaged."""
    return Path(shutil.copytree(_saved_llama, tmp_path / "llama"))
