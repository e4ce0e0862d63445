"""Prompt templates for instructions: JSON files in alpaca-lora's format, the project's own and the user's.

    {"description": "...", "prompt_input": "... {instruction} ... {input} ...", "prompt_no_input": "... {instruction} ...",
     "response_split": "### Response:"}

Texts are filled in as `str.format` does, so a brace of the template's own is doubled. Called by `examples.py`, and by the commands
that put a question to a model.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

from lora_dist.log import UserError

_PACKAGED = Path(__file__).with_name("templates")
_FOLDER = "templates"
_FIELDS = {"prompt_input": {"instruction", "input"}, "prompt_no_input": {"instruction"}}


@dataclass(frozen=True)
class PromptTemplate:
    """How an instruction is put to the model, and where its answer begins."""

    name: str
    description: str
    prompt_input: str
    """with {instruction} and {input}"""
    prompt_no_input: str
    """with {instruction}"""
    response_split: str
    """the last words of the prompt: what comes behind them is the answer"""

    def prompt(self, instruction: str, input: str | None = None) -> str:
        """The text that the answer follows; an input that is missing or empty takes the template without one."""
        if input:
            return self.prompt_input.format(instruction=instruction, input=input)
        return self.prompt_no_input.format(instruction=instruction)

    def answer(self, text: str) -> str:
        """The answer in a prompt that a model went on with: between the first two `response_split`, as alpaca-lora cuts it; a text without
        any is an answer as a whole."""
        parts = text.split(self.response_split)
        return (parts[1] if len(parts) > 1 else text).strip()


def load_template(name: str) -> PromptTemplate:
    """Read a template.

    Args:
        name: of a file `templates/NAME.json` in the working directory or, where there is none, of the package's; or a path.

    Raises:
        UserError: no such template (with those there are), or a file that is none.
    """
    path = _find(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"data.prompt_template: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # no UTF-8, no JSON
        raise UserError(f"data.prompt_template: {path} is not JSON ({error})") from error
    problems = list(_problems(content))
    if problems:
        raise UserError(f"data.prompt_template: {path}: {problem}" for problem in problems)
    texts = {key: content[key] for key in (*_FIELDS, "response_split")}
    return PromptTemplate(path.stem, str(content.get("description", "")), **texts)


def _find(name: str) -> Path:
    if not name:
        raise UserError(f"data.prompt_template: found nothing, expected {_expected()}")
    if "/" in name or "\\" in name or name.endswith(".json"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"data.prompt_template: found no file {path}, expected {_expected()}")
        return path
    for folder in (Path(_FOLDER), _PACKAGED):
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    raise UserError(f"data.prompt_template: found no template {name}, expected {_expected()}")


def _expected() -> str:
    names = sorted({path.stem for folder in (Path(_FOLDER), _PACKAGED) for path in folder.glob("*.json")})
    return f"one of {', '.join(names)}, one of your own as {_FOLDER}/NAME.json in the working directory, or a path"


def _problems(content: object) -> list[str]:
    if not isinstance(content, dict):
        return [f"found {type(content).__name__}, expected an object with {', '.join(_FIELDS)} and response_split"]
    problems = []
    for key in (*_FIELDS, "response_split"):
        text = content.get(key)
        if not isinstance(text, str) or not text:
            problems.append(f"{key}: found {'nothing' if not text else type(text).__name__}, expected a text")
            continue
        if key not in _FIELDS:
            continue
        try:
            found = [
                (field, spec, conversion) for _, field, spec, conversion in string.Formatter().parse(text) if field is not None
            ]
        except ValueError as error:
            problems.append(f"{key}: {error}, expected braces around field names only (a brace of its own is doubled)")
            continue
        expected = " and ".join(f"{{{field}}}" for field in sorted(_FIELDS[key], reverse=True))
        if {field for field, _, _ in found} != _FIELDS[key] or any(spec or conversion for _, spec, conversion in found):
            listed = ", ".join(f"{{{field}}}" for field, _, _ in found) or "none"
            problems.append(f"{key}: found the fields {listed}, expected {expected} (a brace of its own is doubled)")
        split = content.get("response_split")
        if isinstance(split, str) and split and split not in text:
            problems.append(f"{key}: does not hold response_split {split!r}, expected it in front of the answer")
    return problems
