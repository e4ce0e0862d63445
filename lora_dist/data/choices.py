"""Multiple-choice questions in local files, whatever their schema, in one form: what the zero-shot tasks of `evaluation/` ask.

Three schemas are read: the hub's own (which lm-eval's tasks read), MosaicML's `query, choices, gold`, and its `context_options,
continuation, gold` for WinoGrande. The form they are brought into has lm-eval's prompt ready made:

    query, choices, gold             the prompt as lm-eval's own task builds it, the answers behind it, the right one's number
    contexts, continuation, gold     WinoGrande: the sentence up to the blank with each option, and what follows, which is scored

Called by `evaluation/tasks/local.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from lora_dist.log import UserError

Row = Mapping[str, Any]

FILES = {
    "boolq": ("boolq",),
    "piqa": ("piqa",),
    "hellaswag": ("hellaswag",),
    "winogrande": ("winogrande",),
    "arc_easy": ("arc_easy", "arc-easy"),
    "arc_challenge": ("arc_challenge", "arc-challenge"),
    "openbookqa": ("openbookqa", "openbook_qa"),
}
"""what the names of a task's files begin with"""
_ENDINGS = (".jsonl", ".json", ".parquet")


def question_file(folder: str | Path, task: str) -> Path:
    """The file of a task's questions in a folder.

    Raises:
        UserError: none, or several.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"task_data: found no folder {folder}, expected one with the questions of each task in a file")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _ENDINGS and path.name.lower().startswith(FILES[task]) and path.is_file()
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"task_data: found {names} in {folder} for {task}, expected one file {' or '.join(FILES[task])}*"
            f"{{{','.join(_ENDINGS)}}}"
        )
    return found[0]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_questions(task: str, folder: str | Path) -> datasets.Dataset:
    """All questions of a task, in the order of the file.

    Raises:
        UserError: no file, one that cannot be read, or rows of another schema; the first such row is named.
    """
    path = question_file(folder, task)
    rows = []
    for number, row in enumerate(_read_rows(path), start=1):
        try:
            rows.append(_READERS[task](row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            keys = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise UserError(
                f"task_data: {path}: row {number} ({keys}) is no question of {task} ({type(error).__name__}: {error}), expected the "
                "hub's own schema or query, choices, gold"
            ) from error
    if not rows:
        raise UserError(f"task_data: {path} holds no question")
    return datasets.Dataset.from_list(rows)


def _read_rows(path: Path) -> list[Any]:
    if path.suffix.lower() == ".parquet":
        return datasets.Dataset.from_parquet(str(path)).to_list()
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if path.suffix.lower() == ".json"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise UserError(f"task_data: {path} cannot be read as {path.suffix[1:]} ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"task_data: {path} holds {type(rows).__name__}, expected a list of questions")
    return rows


def _gold(row: Row, choices: list[str]) -> dict[str, Any]:
    gold = int(row["gold"])
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold} of {len(choices)} choices")
    return {"choices": [str(choice) for choice in choices], "gold": gold}


def _boolq(row: Row) -> Row:
    if "query" in row:  # Passage: ...\nQuestion: ...?
        query = str(row["query"]).removeprefix("Passage: ").rstrip()
        return {"query": query.removesuffix("Answer:").rstrip() + "\nAnswer:", **_gold(row, row["choices"])}
    label = row["label"] if "label" in row else row["answer"]
    return {"query": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", "choices": ["no", "yes"], "gold": int(label)}


def _asked(row: Row) -> Row:
    """MosaicML's PIQA and ARC: the question with its label, without `Answer:`."""
    return {"query": str(row["query"]).rstrip() + "\nAnswer:", **_gold(row, row["choices"])}


def _piqa(row: Row) -> Row:
    if "query" in row:
        return _asked(row)
    return {
        "query": f"Question: {row['goal']}\nAnswer:",
        "choices": [str(row["sol1"]), str(row["sol2"])],
        "gold": int(row["label"]),
    }


def _arc(row: Row) -> Row:
    if "query" in row:
        return _asked(row)
    gold = list(row["choices"]["label"]).index(row["answerKey"])
    return {"query": f"Question: {row['question']}\nAnswer:", "choices": list(row["choices"]["text"]), "gold": gold}


def _openbookqa(row: Row) -> Row:
    if "query" in row:
        return {"query": str(row["query"]), **_gold(row, row["choices"])}
    gold = list(row["choices"]["label"]).index(row["answerKey"].lstrip())
    return {"query": str(row["question_stem"]), "choices": list(row["choices"]["text"]), "gold": gold}


def _hellaswag(row: Row) -> Row:
    if "query" in row:
        return {"query": str(row["query"]), **_gold(row, row["choices"])}
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _without_brackets(context),
        "choices": [_without_brackets(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_brackets(text: str) -> str:
    """WikiHow's marks, as lm-eval's HellaSwag takes them out."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Row) -> Row:
    if "context_options" in row:
        contexts = [str(context) for context in row["context_options"]]
        gold = _gold(row, contexts)["gold"]
        return {"contexts": contexts, "continuation": str(row["continuation"]).strip(), "gold": gold}
    before, blank, after = str(row["sentence"]).partition("_")
    if not blank:
        raise ValueError("no _ in sentence")
    return {
        "contexts": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": int(row["answer"]) - 1,
    }


_READERS: dict[str, Callable[[Row], Row]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}
