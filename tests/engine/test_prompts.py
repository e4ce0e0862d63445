"""Files of prompts: what ends a line, byte-order marks, and what no model can be asked."""

from __future__ import annotations

import json

import pytest

from lora_dist.engine.prompts import Prompt, read_prompts
from lora_dist.log import UserError

ODD = "one\u2028two\u0085three\x0bfour\x0cfive"  # str.splitlines ends a line at each


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(tmp_path, start, end):
    texts = [ODD, "b"]
    (tmp_path / "p.txt").write_bytes((start + end.join([*texts, ""])).encode())
    lines = [json.dumps(text, ensure_ascii=False) for text in (ODD.replace("\x0b", "").replace("\x0c", ""), "b")]
    (tmp_path / "p.jsonl").write_bytes((start + end.join(lines)).encode())
    (tmp_path / "p.json").write_bytes((start + f"[{','.join(lines)}]").encode())
    assert read_prompts(tmp_path / "p.txt") == [Prompt(text) for text in texts]
    for name in ("p.jsonl", "p.json"):
        assert read_prompts(tmp_path / name) == [Prompt("one\u2028two\u0085threefourfive"), Prompt("b")]


@pytest.mark.parametrize(
    "name,content,problem",
    [
        ("p.json", "[" * 100_000, "p.json, as a JSON list: is nested too deeply"),
        ("p.jsonl", '"a"\n' + "{" * 5 + '"a":' * 4 + "1", "p.jsonl, line 2: is not JSON"),
        ("p.jsonl", '"a"\n' + '{"a":' * 100_000, "p.jsonl, line 2: is nested too deeply"),
        ("p.json", '["a", "\\ud800 b"]', r"p.json, item 2: half of a character \(a lone surrogate at 0\), expected UTF-8 text"),
        ("p.json", '[{"instruction": "a", "input": "\\ud800"}]', "p.json, item 1: half of a character"),
        ("p.json", '[[{"role": "user", "content": "\\ud800"}]]', r"p.json, item 1: messages\[0\].content: half of a character"),
        ("p.json", '[[{"role": ["user"], "content": "a"}]]', r"item 1: messages\[0\].role: found a list"),
        ("p.json", "[" + "1" * 5000 + "]", "is not JSON"),
    ],
)
def test_what_no_model_can_be_asked(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        read_prompts(tmp_path / name)
