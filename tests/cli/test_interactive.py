"""Lines from a pipe that are no text, and no stdin at all: said in a line, and the other lines are answered."""

from __future__ import annotations

import io
import sys

import pytest

from lora_dist.__main__ import main


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_line_that_is_no_text_is_named_and_the_others_are_answered(tiny_base, monkeypatch, capsys, encoding):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the river\n\nbad \xff one\na\n"), encoding=encoding))
    assert main(["generate", str(tiny_base), "--max_new_tokens=2"]) == 2
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("the river") and second.startswith("a")
    assert err.splitlines()[-1] == "line 3: a byte that is not UTF-8 (0xff at 4), expected UTF-8 text"


@pytest.mark.parametrize(
    "argv,problem",
    [
        ([], "prompt: found nothing, expected --prompt TEXT"),
        (["--prompt=a\udcff"], "prompt: a byte that is not UTF-8 (0xff at 1)"),
    ],
)
def test_without_stdin_or_text(tiny_base, monkeypatch, capsys, argv, problem):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    assert main(["generate", str(tiny_base), *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lora-dist generate: {problem}")
