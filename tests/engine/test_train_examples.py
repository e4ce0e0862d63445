"""Runs on Alpaca-format records inside the test process: losses against transformers' own, what the console says, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.data.sampler import stable_permutation
from tests.engine.test_train import refused, train
from tests.instructions import transformers_loss, write_instructions
from tests.runs import assert_identical, losses, records

MODES = {"padded": {}, "grouped": {"group_by_length": True}, "packed": {"data__packing": True, "data__packing_length": 96}}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_instructions(tmp_path_factory.mktemp("instructions"))


@pytest.fixture
def common(instructions: tuple[Path, Path]) -> dict[str, object]:
    return {
        "data__format": "auto",
        "data__prompt_template": instructions[1],
        "data__block_size": 48,
        "adapter__lora_dropout": 0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
    }


@pytest.mark.parametrize("mode", MODES)
def test_losses_equal_transformers_own(mode, tiny_base, instructions, common, tmp_path, capsys):
    """The first step holds all records, whatever they are packed into; evaluation holds some out."""
    file, _ = instructions
    steps = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "global_batch_size": 58}
    if mode == "packed":
        steps["global_batch_size"] = 20  # packed rows, more than there are
    train(tiny_base, file, tmp_path / "out", **common, **MODES[mode], **steps)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    assert losses(tmp_path / "out")[1] == pytest.approx(transformers_loss(model, tokenizer, file, 48), abs=1e-5)
    output = capsys.readouterr().out
    assert "  - Format: alpaca (by the columns), template short, loss on the answers\n" in output
    assert (
        "  - Bad records: 2 of 60 left out (record 6: output: missing; record 10: output: found a number, expected a text)"
        in output
    )
    assert "  - Truncated: 2 of 58 examples at 48 tokens (answers lost 6" in output
    assert "  - Train samples: 58 sequences\n" in output
    share = records(tmp_path / "out", "train")[0]["padding_share"]
    assert 0 <= share < 0.5
    if mode == "packed":
        assert "  - Packed: 58 examples in " in output and " rows of 96 tokens, 9" in output
    else:
        assert f"  - Padding: about {share:.1%} of the tokens computed" in output


def test_held_out_examples_are_evaluated_as_transformers_does(tiny_base, instructions, common, tmp_path):
    file, _ = instructions
    out = tmp_path / "out"
    train(tiny_base, file, out, **common, max_steps=12, eval_steps=6, save_strategy="no", load_best_model_at_end=False)
    held = sorted(stable_permutation(58, "hold_out", 42)[:16].tolist())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    evaluations = {row["step"]: row["eval_loss"] for row in records(out, "eval")}
    assert evaluations[0] == pytest.approx(transformers_loss(model, tokenizer, file, 48, held), abs=1e-5)
    assert evaluations[12] < evaluations[0] - 0.2
    assert losses(out)[12] < losses(out)[1]


@pytest.mark.parametrize("mode", ["grouped", "packed"])
def test_a_resumed_run_equals_the_uninterrupted_one(mode, tiny_base, instructions, common, tmp_path):
    file, _ = instructions
    kind = {**common, **MODES[mode], "adapter__lora_dropout": 0.1, "eval_strategy": "no", "save_steps": 3}
    train(tiny_base, file, tmp_path / "whole", **kind, max_steps=16)
    train(tiny_base, file, tmp_path / "parts", **kind, max_steps=5)
    train(
        tiny_base, file, tmp_path / "parts", **kind, max_steps=16, resume_from_checkpoint="auto", data__dataloader_num_workers=1
    )
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_what_changed_since_the_checkpoint_is_named(tiny_base, instructions, common, tmp_path):
    file, _ = instructions
    out = tmp_path / "out"
    kind = {**common, "group_by_length": True, "eval_strategy": "no"}
    train(tiny_base, file, out, **kind, max_steps=2)
    again = {**kind, "max_steps": 4, "resume_from_checkpoint": "auto"}
    message = refused(tiny_base, file, out, **{**again, "group_by_length": False})
    assert message.startswith("train.group_by_length: found false, expected true as when checkpoint-2 was written")
    message = refused(tiny_base, file, out, **again, global_batch_size=6)
    assert message.startswith("train.global_batch_size: found 6 examples a step with train.group_by_length, expected 4")
    message = refused(tiny_base, file, out, **again, data__train_on_inputs=True)
    assert (
        "data.train_on_inputs, " in message and "found as many training examples as" in message and "the same records" in message
    )
    message = refused(tiny_base, file, out, **{**again, "group_by_length": False, "data__packing": True})
    assert "data.packing_length" in message and "training packed rows, expected 58" in message


def test_data_that_does_not_fit_what_is_asked(tiny_base, tiny_text, instructions, common, tmp_path):
    file, _ = instructions
    out = tmp_path / "out"
    message = refused(tiny_base, file, out, **common, data__max_bad_share=0)
    assert "data.dataset_name: found 2 bad records of 60 in the train split (record 6: output: missing;" in message
    message = refused(tiny_base, file, out, **common, data__holdout_windows=58)
    assert "data.holdout_windows: found 58 of 58 examples, expected fewer: lower it, or set data.validation_file" in message
    message = refused(tiny_base, file, out, **{**common, "data__format": "chat"})
    assert "the tokenizer of" in message and str(tiny_base) in message and "has no chat template" in message
    message = refused(
        "nowhere/at/all", file, out, **{**common, "data__prompt_template": "none"}
    )  # before the model is looked for
    assert message.startswith("data.prompt_template: found no template none, expected one of alpaca")
    message = refused(tiny_base, tiny_text, out, **common, data__packing=True)
    assert f"data.packing: found true, but {tiny_text} holds text, expected examples" in message
    message = refused(tiny_base, tiny_text, out, **{**common, "data__format": "alpaca"})
    assert "is running text, expected records" in message
    message = refused(tiny_base, file, out, **common, data__packing=True, data__packing_length=40)
    assert "data.packing_length: found 40, expected" in message


def test_a_validation_file_of_the_same_format(tiny_base, instructions, common, tmp_path, capsys):
    file, _ = instructions
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(record) for record in json.loads(file.read_text())[:10]))
    train(
        tiny_base, file, tmp_path / "out", **common, max_steps=1, save_strategy="no", data__validation_file=held,
        data__max_bad_share=0.3, load_best_model_at_end=False,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "  - Eval samples: 8 sequences\n" in output and "  - Bad records (validation): 2 of 10 left out" in output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    first = records(tmp_path / "out", "eval")[0]["eval_loss"]
    assert first == pytest.approx(transformers_loss(model, tokenizer, file, 48, list(range(8))), abs=1e-5)


def test_chats_train_through_the_tokenizers_template(tiny_base, common, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '</s>' }}{% endfor %}"
    )
    rows = [
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]},
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    train(base, tmp_path / "chats.json", tmp_path / "out", **common, max_steps=1, eval_strategy="no", save_strategy="no")
    assert "  - Format: chat (by the columns), loss on the answers\n" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for prompt, answer, rest in [("u:ab</s>", "a:cd</s>", ""), ("u:x</s>", "a:y</s>", "u:z</s>")]:
        ids = tokenizer(prompt + answer + rest, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        start, end = (len(tokenizer(text)["input_ids"]) for text in (prompt, prompt + answer))
        labels[0, :start], labels[0, end:] = -100, -100
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * (end - start)
        count += end - start
    assert losses(tmp_path / "out")[1] == pytest.approx(total / count, abs=1e-5)
