"""What a model is asked, from files or a conversation, and the exact text that it is given. Called by `engine/answer.py`.

A prompt is a text, an instruction with an input (Alpaca's records), or the messages of a conversation. Which of them a model is given
as what follows from the way it was trained: as they are, in a prompt template, or in the tokenizer's chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dist.data.records import BadRecordError, chat_message, require_characters
from lora_dist.data.templates import PromptTemplate
from lora_dist.log import UserError

_EXPECTED = "a text, instruction (and input), or messages"

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question: a text, an instruction with its input, or the messages up to the answer that is asked for."""

    text: str = ""
    input: str | None = None
    messages: tuple[Message, ...] = ()


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: lines of text (.txt), or JSON: a list, or one value a line. Empty lines are left out.

    Raises:
        UserError: the file cannot be read, is empty, or holds something else.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            text = opened.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"prompt_file: {file} cannot be read ({reason})") from error
    kind = file.suffix.lower()
    if kind not in (".txt", ".json", ".jsonl"):
        raise UserError(f"prompt_file: {file} has an unknown extension, expected .txt, .json or .jsonl")
    ends = (line.removesuffix("\r") for line in text.split("\n"))  # str.splitlines knows of more, which JSON texts may hold
    lines = [(f"line {i}", line) for i, line in enumerate(ends, start=1) if line.strip()]
    if kind == ".txt":
        found = [Prompt(line) for _, line in lines]  # UTF-8, so whole characters
    else:
        values = (
            _json_list(file, text) if text.lstrip().startswith("[") else [(where, _json(file, where, x)) for where, x in lines]
        )
        found = [_prompt(f"prompt_file: {file}, {where}", value) for where, value in values]
    if not found:
        raise UserError(f"prompt_file: {file} holds no prompt, expected one a line or a JSON list")
    return found


def check_text(text: str, where: str) -> None:
    """Raises UserError for what no tokenizer takes, as it comes from files and terminals: half of a character, bytes that are not UTF-8."""
    try:
        require_characters(text, where)
    except BadRecordError as error:
        raise UserError(f"{error}, expected UTF-8 text") from error


def _json_list(file: Path, text: str) -> list[tuple[str, Any]]:
    values = _json(file, "as a JSON list", text)
    return [(f"item {i}", value) for i, value in enumerate(values, start=1)]


def _json(file: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"prompt_file: {file}, {where}: is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"prompt_file: {file}, {where}: is nested too deeply, expected {_EXPECTED}") from error


def _prompt(where: str, value: Any) -> Prompt:
    if isinstance(value, str):
        check_text(value, where)
        return Prompt(value)
    if isinstance(value, list):
        return Prompt(messages=_messages(where, value))
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}, expected {_EXPECTED}")
    for key in ("messages", "conversations"):
        if key in value:
            return Prompt(messages=_messages(where, value[key]))
    for key in ("instruction", "prompt", "text"):
        if key in value:
            given = (value[key], value.get("input") or "")
            if not all(isinstance(part, str) for part in given):
                raise UserError(f"{where}: found {key} or input that is no text")
            for part in given:
                check_text(part, where)
            return Prompt(given[0], given[1] if key == "instruction" else None)
    raise UserError(f"{where}: found {', '.join(map(str, value)) or 'nothing'}, expected {_EXPECTED}")


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    """In OpenAI's form, without the answers after the last question."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(
            f"{where}: found messages that are no list of objects, expected role and content (or from and value) in each"
        )
    try:
        messages = [chat_message(turn, f"messages[{i}]") for i, turn in enumerate(value)]
    except BadRecordError as error:
        raise UserError(f"{where}: {error}") from error
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where}: found no message of a user")
    return tuple(messages)


@dataclass
class Form:
    """How prompts are put to a model. `special_tokens`: whether the tokenizer is to add its own around them."""

    tokenizer: Any
    template: PromptTemplate | None = None
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise UserError("chat: found a tokenizer without a chat template, expected one with; or give --prompt_template")

    @property
    def special_tokens(self) -> bool:
        return not self.chat

    @property
    def plain(self) -> bool:
        """The model continues the prompt itself."""
        return self.template is None and not self.chat

    def render(self, prompt: Prompt, where: str = "prompt") -> str:
        """The text that the model is given.

        Raises:
            UserError: a conversation without `chat`, or an instruction with neither template nor `chat`.
        """
        if self.chat:
            content = "\n\n".join(part for part in (prompt.text, prompt.input) if part)
            return self.conversation(list(prompt.messages) or [{"role": "user", "content": content}])
        if prompt.messages:
            raise UserError(f"{where}: found a conversation, expected --chat with it")
        if self.template is not None:
            return self.template.prompt(prompt.text, prompt.input if prompt.input and prompt.input.strip() else None)
        if prompt.input is not None:
            raise UserError(f"{where}: found an instruction, expected --prompt_template (such as alpaca) or --chat with it")
        return prompt.text

    def conversation(self, messages: list[Message]) -> str:
        """A conversation up to where the answer begins."""
        before = [{"role": "system", "content": self.system}] if self.system and messages[0]["role"] != "system" else []
        try:
            rendered: str = self.tokenizer.apply_chat_template([*before, *messages], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of their own: jinja2's errors, and what they raise themselves
            raise UserError(f"chat: the tokenizer's chat template refuses the conversation ({error})") from error
        return rendered


@dataclass
class Conversation:
    """Turns of a chat that is kept within a model's context."""

    form: Form
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str, fits: Callable[[str], bool]) -> tuple[str, int]:
        """Add a question.

        Args:
            fits: whether a text leaves room for the answer.

        Returns:
            The text for the model, and how many of the oldest messages were dropped to make room.
        """
        self.messages.append({"role": "user", "content": text})
        dropped = 0
        while not fits(self.form.conversation(self.messages)) and len(self.messages) > 1:
            oldest = 2 if self.messages[1]["role"] == "assistant" else 1  # a question goes with its answer
            del self.messages[:oldest]
            dropped += oldest
        return self.form.conversation(self.messages), dropped

    def answered(self, text: str) -> None:
        """Keep the answer to the last question, unless it has one."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.append({"role": "assistant", "content": text})

    def unanswered(self) -> None:
        """Forget the last question."""
        self.messages.pop()
