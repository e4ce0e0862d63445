"""Records: what a usable one of each format is, what is wrong with others, and files of every kind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from lora_dist.data.files import files_split
from lora_dist.data.hub import HubSplit
from lora_dist.data.records import (
    BadRecordError,
    columns_of,
    conversation,
    detect_format,
    question_and_answer,
    record_tables,
    unpacked,
)
from lora_dist.log import UserError

ROWS = [
    {"instruction": "Say no.", "input": None, "output": "null"},
    {"instruction": "Count: é 🙂", "input": "a\nb", "output": "2"},
    {"instruction": "Broken", "output": 3},
    {"messages": [{"role": "user", "content": "x"}]},
]


def read(path: Path, tmp_path: Path) -> list:
    split = files_split(str(path), "text", "data.dataset_name")
    tables = list(record_tables(split, tmp_path / "scratch"))
    return [record for table in tables for record in unpacked(table[:])]


def test_json_is_read_as_it_is(tmp_path: Path, write_text: Callable[..., Path]):
    """Types may differ from record to record, and nested values stay."""
    assert read(write_text("a.json", json.dumps(ROWS)), tmp_path) == ROWS
    lines = "\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n{broken\n"
    assert read(write_text("b.jsonl", lines), tmp_path) == [*ROWS, "{broken"]
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    assert read(tmp_path / "c.json.gz", tmp_path) == ROWS


def test_csv_holds_texts_only(tmp_path: Path, write_text: Callable[..., Path]):
    path = write_text("a.csv", 'instruction,output\nAdd 1 and 1,2\n"Say ""no""",null\na,"two\nlines"\na,b,c\nshort\n')
    assert read(path, tmp_path) == [
        {"instruction": "Add 1 and 1", "output": "2"},
        {"instruction": 'Say "no"', "output": "null"},
        {"instruction": "a", "output": "two\nlines"},
        "more fields than the header: ['c']",
        {"instruction": "short", "output": None},
    ]


def test_parquet_keeps_chats(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet", tmp_path) == rows
    assert columns_of(files_split(str(tmp_path / "a.parquet"), "text", "x")) == {"messages"}


def test_hub_rows_are_read_as_they_are(tmp_path: Path):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": None, "output": None}]
    loaded = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    split = HubSplit("train", "text", ("repo", "revision", "{}", "train"), lambda: loaded)
    assert columns_of(split) == {"instruction", "input", "output"}
    assert [record for table in record_tables(split, tmp_path) for record in unpacked(table[:])] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1},', "cannot be read as JSON"),
        ("a.json", "[" * 100_000, r"cannot be read as JSON \(nested too deeply\)"),
        ("a.json", "[]", "holds no record"),
        ("a.json", " \n\n", "holds no record"),
        ("a.csv", "instruction,output\n", "holds no record"),
        (
            "a.json",
            '{\n "instruction": "a",\n "output": "b"\n}',
            "holds an object over several lines, expected a list of records",
        ),
        ("a.csv", "instruction,output,output\na,b,c\n", "has more than one column 'output'"),
        ("a.parquet", "PAR1garbage", "a.parquet cannot be read as parquet"),
        ("a.txt", "words", "is running text, expected records"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, write_text: Callable[..., Path], name: str, content: str, message: str):
    with pytest.raises(UserError, match=message):
        read(write_text(name, content), tmp_path)
    if not name.endswith(".txt"):
        with pytest.raises(UserError, match=message):
            columns_of(files_split(str(tmp_path / name), "text", "data.dataset_name"))


@pytest.mark.parametrize(("content", "found"), [("[1, 2, 3]", "a number"), ("words\nof text", "a text 'words'")])
def test_files_of_other_things_have_no_columns(tmp_path: Path, write_text: Callable[..., Path], content: str, found: str):
    split = files_split(str(write_text("a.json", content)), "text", "data.dataset_name")
    with pytest.raises(UserError, match=f"data.dataset_name: .*a.json holds {found} where a record is expected"):
        columns_of(split)


def test_a_record_nested_beyond_reason_is_a_bad_one(tmp_path: Path, write_text: Callable[..., Path]):
    for depth in (900, 100_000):  # some can be read, and not written again
        deep = '{"instruction":' + "[" * depth + "]" * depth + ', "output": "x"}'
        first, second, third = read(
            write_text(f"{depth}.jsonl", f"{json.dumps(ROWS[0])}\n{deep}\n{json.dumps(ROWS[0])}"), tmp_path
        )
        assert first == third == ROWS[0]
        with pytest.raises(BadRecordError, match="found a"):
            question_and_answer(second, "alpaca")


def test_formats_follow_from_the_columns():
    assert detect_format({"instruction", "output", "text"}, "text") == "alpaca"
    assert detect_format({"conversations", "id"}, "text") == detect_format({"messages"}, "text") == "chat"
    assert detect_format({"prompt", "completion"}, "text") == "prompt_completion"
    assert detect_format({"body"}, "body") == detect_format(set(), "text") == "text"
    assert detect_format({"body"}, "text") is None


def test_pairs():
    record = {"instruction": "Add", "input": "", "output": " 3 "}
    assert question_and_answer(record, "alpaca") == ("Add", None, " 3 ")
    assert question_and_answer({**record, "input": " x "}, "alpaca") == ("Add", " x ", " 3 ")
    assert question_and_answer({"prompt": "", "completion": "a"}, "prompt_completion") == ("", None, "a")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "a"}, "output: missing"),
        ({"instruction": "a", "output": None}, "output: missing"),
        ({"instruction": "a", "output": 3}, "output: found a number, expected a text"),
        ({"instruction": ["a"], "output": "b"}, "instruction: found a list, expected a text"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input: found an object, expected a text"),
        ({"instruction": "a", "output": " \n"}, "output: empty"),
        ({"instruction": "", "output": "b"}, "instruction: empty"),
        ({"instruction": "a", "output": "\ud83d"}, "output: half of a character (a lone surrogate at 0)"),
        ("{broken", "found a text '{broken', expected an object"),
    ],
)
def test_bad_pairs(record: object, reason: str):
    with pytest.raises(BadRecordError) as error:
        question_and_answer(record, "alpaca")
    assert str(error.value) == reason


def test_both_kinds_of_chat():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
    ]
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    assert conversation({"conversations": sharegpt, "id": 7}) == (messages, None)
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, messages[2]]
    assert conversation({"messages": parts, "tools": '[{"type": "function"}]'}) == (messages[1:3], [{"type": "function"}])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "messages or conversations: missing"),
        ({"messages": "x"}, "messages: found a text, expected a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "messages[0].content: empty answer"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content: missing"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: found 'bot', expected one of human"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role: found a list, expected one of human"),
        ({"messages": [{"role": "assistant", "content": "\udcff"}]}, "messages[0].content: a byte that is not UTF-8 (0xff at 0)"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content: found a list, expected a text"),
    ],
)
def test_bad_chats(record: dict, reason: str):
    with pytest.raises(BadRecordError) as error:
        conversation(record)
    assert str(error.value).startswith(reason)
