"""Prompt templates: alpaca-lora's own texts, where a template is looked for, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_dist.data.templates import load_template
from lora_dist.log import UserError

OWN = {"prompt_input": "Q {instruction} ({input}) A:", "prompt_no_input": "Q {instruction} A:", "response_split": "A:"}


def test_alpaca_is_the_published_text():
    template = load_template("alpaca")
    assert template.prompt("Sort: {x}", "c, a, b 🙂") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort: {x}\n\n### Input:\nc, a, b 🙂\n\n### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\n"
    )
    assert template.prompt("Greet.") == template.prompt("Greet.", "") == template.prompt("Greet.", None) == without
    assert template.answer(without + " Hello. \n\n### Response:\nagain") == "Hello."
    assert template.answer(" Hello. ") == "Hello."


def test_own_templates_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "alpaca.json").write_text(json.dumps(OWN))
    assert load_template("alpaca").prompt("a", "b") == "Q a (b) A:"
    assert load_template(str(tmp_path / "templates" / "alpaca.json")).prompt("a") == "Q a A:"
    assert load_template("alpaca_short").prompt("a") == "### Instruction:\na\n\n### Response:\n"
    with pytest.raises(UserError, match=r"data\.prompt_template: found no template alpaka, expected one of alpaca, alpaca_short"):
        load_template("alpaka")
    with pytest.raises(UserError, match="found no file"):
        load_template("./alpaca.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_input": None}, "prompt_input: found nothing, expected a text"),
        ({"prompt_no_input": 3}, "prompt_no_input: found int, expected a text"),
        (
            {"prompt_input": "{instruction} A:"},
            "prompt_input: found the fields {instruction}, expected {instruction} and {input}",
        ),
        ({"prompt_no_input": "{instruction!r} A:"}, "prompt_no_input: found the fields {instruction}"),
        ({"prompt_no_input": "{instruction A:"}, "expected braces around field names only"),
        ({"response_split": "B:"}, "prompt_no_input: does not hold response_split 'B:'"),
    ],
)
def test_what_is_no_template(tmp_path: Path, change: dict, message: str):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(OWN | change))
    with pytest.raises(UserError) as error:
        load_template(str(file))
    assert message in str(error.value)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_template(str(file))
