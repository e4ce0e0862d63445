"""Records of instruction data: where they are read from, and what a usable one of each format is.

    alpaca              {"instruction": "...", "input": "..." (optional), "output": "..."}
    chat                {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                        {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}   (ShareGPT)
    prompt_completion   {"prompt": "...", "completion": "..."}

Local JSON and CSV files are parsed here, not by `datasets`: it would turn a column of digits into numbers, the answer "null" into
nothing, and end at the first value of another type, where one bad record is meant to be named and left out. Called by `examples.py`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.exceptions import DatasetGenerationError

from lora_dist.data.files import LocalSplit, first_line
from lora_dist.data.hub import HubSplit
from lora_dist.log import UserError

Format = Literal["alpaca", "chat", "prompt_completion"]
Record = Mapping[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "chat": ("messages", "conversations", "tools"),
    "prompt_completion": ("prompt", "completion"),
}
"""columns that a format reads"""
_RAW = "record"  # column of records that are kept as JSON text
_PROBED = 100
_TOO_DEEP = "nested too deeply"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "tool": "tool",
}  # fmt: skip
"""ShareGPT's names among them"""


class BadRecordError(ValueError):
    """A record that cannot be used, and why."""


# --- where they are read from ---------------------------------------------------------------------------------------------


def record_tables(split: LocalSplit | HubSplit, scratch: Path) -> Iterator[datasets.Dataset]:
    """The records of a split in order, in tables whose rows `unpacked` reads.

    Args:
        scratch: folder for converted copies, needed as long as the tables are.

    Raises:
        UserError: for files that are no records or do not parse.
    """
    if isinstance(split, HubSplit):
        yield split.load()[split.name]
        return
    for number, path in enumerate(split.files):
        folder = scratch / f"records-{number}"
        if ".parquet" in path.name.lower():
            yield _parquet(path, folder, split.option)
            continue
        try:
            yield datasets.Dataset.from_generator(
                _raw_rows,
                features=datasets.Features({_RAW: datasets.Value("large_string")}),
                cache_dir=str(folder),
                gen_kwargs={"path": path, "option": split.option, "names": split.names},
                fingerprint=hashlib.sha256(str(path).encode()).hexdigest()[
                    :16
                ],  # spares hashing the arguments; the folder is its own
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from error
            raise


def columns_of(split: LocalSplit | HubSplit) -> set[str]:
    """Columns of a split, by its first 100 records; none of running text.

    Raises:
        UserError: for files that do not parse.
    """
    if isinstance(split, HubSplit):
        return set(split.load()[split.name].column_names)
    first = split.files[0]
    if ".txt" in first.suffixes:
        return set()
    if ".parquet" in first.name.lower():
        try:
            return set(datasets.Dataset.from_parquet(str(first), streaming=True).column_names or ())
        except (DatasetGenerationError, ValueError, OSError) as error:
            raise _no_parquet(split.option, first, error) from error
    probed = list(islice(_records(first, split.option, split.names), _PROBED))
    found = {name for record in probed if isinstance(record, dict) for name in record}
    if not probed:
        raise _no_record(split.option, first)
    if not found:
        raise UserError(
            f"{split.option}: {first} holds {_shown(probed[0])} where a record is expected, an object with the fields of data.format"
        )
    return found


def first_row(split: LocalSplit) -> list[str]:
    """The first row of a split's first file, names of columns or not; empty where that is no CSV or TSV file.

    Raises:
        UserError: a file that cannot be read.
    """
    path = split.files[0]
    name = path.name.lower()
    if not (".csv" in name or ".tsv" in name):
        return []
    row: list[str] = next(_read(path, split.option, lambda file: csv.reader(file, **_form(tabs=".tsv" in name))), [])
    return row


def unpacked(batch: Mapping[str, list]) -> Iterator[Any]:
    """The records of a batch of a table's rows: mappings, or what stands in a file in place of one."""
    if list(batch) == [_RAW]:
        yield from map(_parsed, batch[_RAW])
    else:
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _parquet(path: Path, folder: Path, option: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files={"train": [str(path)]}, split="train", cache_dir=str(folder))
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise _no_parquet(option, path, error) from error


def _no_parquet(option: str, path: Path, error: Exception) -> UserError:
    return UserError(f"{option}: {path} cannot be read as parquet ({first_line(error.__cause__ or error)})")


def _no_record(option: str, path: Path) -> UserError:
    return UserError(f"{option}: {path} holds no record, expected one at least")


def _raw_rows(path: Path, option: str, names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    empty = True
    for record in _records(path, option, names):
        empty = False
        try:
            yield {_RAW: json.dumps(record)}
        except RecursionError:
            yield {_RAW: json.dumps(_TOO_DEEP)}
    if empty:
        raise _no_record(option, path)


def _records(path: Path, option: str, names: tuple[str, ...] = ()) -> Iterator[Any]:
    """What the records of a JSON or CSV file parse to; a line that does not parse gives a text, which is no record.

    Args:
        names: of the columns of a CSV or TSV file without a header.
    """
    name = path.name.lower()
    if names and not (".csv" in name or ".tsv" in name):
        raise UserError(f"data.column_names: found with {path}, expected .csv or .tsv files")
    read = partial(_csv_records, names=names, tabs=".tsv" in name) if ".csv" in name or ".tsv" in name else _json_records
    if ".txt" in path.suffixes:
        raise UserError(
            f"{option}: {path} is running text, expected records in .json, .jsonl, .csv or .parquet (or data.format text)"
        )
    yield from _read(path, option, read)


def _read(path: Path, option: str, parse: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """What `parse` makes of an open file; UserError where it cannot be read."""
    opened: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from parse(file)
    except _BrokenFileError as error:
        raise UserError(f"{option}: {path} {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path} is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{option}: {path} cannot be read ({error})") from error


class _BrokenFileError(ValueError):
    """A file as a whole cannot be used; the text goes behind its name."""


def _json_records(file: Any) -> Iterator[Any]:
    first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            records = json.loads(first + file.read())
        except (ValueError, RecursionError) as error:
            reason = _TOO_DEEP if isinstance(error, RecursionError) else error
            raise _BrokenFileError(f"cannot be read as JSON ({reason}), expected a list of records, or one a line") from error
        yield from records
        return
    if first.strip() == "{":
        raise _BrokenFileError("holds an object over several lines, expected a list of records, or one a line")
    for line in chain([first], file):
        if line.strip():
            yield _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.strip()[:_PROBED]


def _csv_records(file: Any, names: tuple[str, ...], tabs: bool) -> Iterator[Any]:
    return _rows(csv.DictReader(file, fieldnames=names or None, restkey="", **_form(tabs=tabs)))


def _form(*, tabs: bool) -> dict[str, Any]:
    """Of csv's readers. Between tabs, as in GLUE's own files, quotation marks are text."""
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}


def _rows(rows: csv.DictReader) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)
    names = list(rows.fieldnames or ())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _BrokenFileError(f"has more than one column {', '.join(map(repr, twice))}, expected names that differ")
    for record in rows:
        yield f"more fields than the header: {record['']}" if "" in record else record


# --- what a usable one is -------------------------------------------------------------------------------------------------


def detect_format(columns: set[str], text_column: str) -> Format | Literal["text"] | None:
    """What rows with these columns are; None for neither examples nor text."""
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if columns & {"messages", "conversations"}:
        return "chat"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    return "text" if not columns or text_column in columns else None


def question_and_answer(record: Any, kind: Format) -> tuple[str, str | None, str]:
    """Instruction, input and output of an Alpaca record; prompt, None and completion of a pair.

    Raises:
        BadRecordError: what is wrong with it.
    """
    _require_mapping(record)
    question, answer = ("instruction", "output") if kind == "alpaca" else ("prompt", "completion")
    texts = [_text(record, name) for name in (question, answer)]
    given = None
    if kind == "alpaca" and record.get("input") is not None:
        given = _text(record, "input")
        if not given.strip():
            given = None
    if kind == "alpaca" and not texts[0].strip():
        raise BadRecordError(f"{question}: empty")
    if not texts[1].strip():
        raise BadRecordError(f"{answer}: empty")
    return texts[0], given, texts[1]


def conversation(record: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages in OpenAI's form, at least one of them the assistant's, and the tools they may call.

    Raises:
        BadRecordError: what is wrong with it.
    """
    _require_mapping(record)
    name = "messages" if record.get("messages") is not None else "conversations"
    turns = record.get(name)
    if turns is None:
        raise BadRecordError("messages or conversations: missing")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRecordError(f"{name}: found {_kind(turns)}, expected a list of messages")
    messages = [chat_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError(f"{name}: no message of the assistant")
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRecordError("tools: not JSON") from error
    if tools and not isinstance(tools, list):
        raise BadRecordError(f"tools: found {_kind(tools)}, expected a list")
    return messages, tools or None


def chat_message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message in OpenAI's form, of one in that or in ShareGPT's.

    Raises:
        BadRecordError: what is wrong with it.
    """
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = turn.get(role_key)
    if role is None:
        raise BadRecordError(f"{where}.role: missing")
    if not isinstance(role, str) or (role not in _ROLES and not (role == "developer" and not sharegpt)):
        found = repr(role) if isinstance(role, str) else _kind(role)
        raise BadRecordError(f"{where}.{role_key}: found {found}, expected one of {', '.join(_ROLES)}")
    message = {key: value for key, value in turn.items() if value is not None and key not in (role_key, content_key)}
    message["role"] = _ROLES.get(role, role)
    content = turn.get(content_key)
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    message["content"] = _text({content_key: content}, content_key, f"{where}.{content_key}")
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise BadRecordError(f"{where}.{content_key}: empty answer")
    return message


def _require_mapping(record: Any) -> None:
    if not isinstance(record, Mapping):
        raise BadRecordError(f"found {_shown(record)}, expected an object")


def _text(record: Record, name: str, where: str | None = None) -> str:
    value = record.get(name)
    if value is None:
        raise BadRecordError(f"{where or name}: missing")
    if not isinstance(value, str):
        raise BadRecordError(f"{where or name}: found {_kind(value)}, expected a text")
    require_characters(value, where or name)
    return value


def require_characters(text: str, where: str) -> None:
    """Raises BadRecordError for what no tokenizer takes: half of a character, or a byte that was kept as one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"a byte that is not UTF-8 ({code - 0xDC00:#x}"
            if 0xDC80 <= code <= 0xDCFF
            else "half of a character (a lone surrogate"
        )
        raise BadRecordError(f"{where}: {what} at {error.start})") from error


def _shown(value: Any) -> str:
    """What stands in a wrong place, in few words."""
    return f"a text {value[:30]!r}" if isinstance(value, str) else _kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)
