"""The flags of workflow W2: what each becomes, the defaults, the batch; and the data made for it."""

from __future__ import annotations

import json
from functools import cache

import finetune_lora
import pytest
from make_instructions import main as make_instructions
from make_instructions import make_records

from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB
from lora_dist.config import RunConfig
from lora_dist.log import UserError

MODEL = ["--pruned_model", "m"]
# flag, its value, and what follows of it: values of RunConfig by key. One parse of all shows what they do; each is looked at by itself.
FLAGS = [
    ("data_path", "d.json", {"data.dataset_name": "d.json"}),
    ("val_set_size", "7", {"data.holdout_windows": 7}),
    ("cutoff_len", "99", {"data.block_size": 99}),
    ("prompt_template_name", "mine", {"data.prompt_template": "mine"}),
    ("batch_size", "32", {"train.global_batch_size": 32, "train.gradient_accumulation_steps": 2}),
    ("micro_batch_size", "16", {"train.per_device_train_batch_size": 16}),
    ("num_epochs", "5", {"train.num_train_epochs": 5.0}),
    ("learning_rate", "3e-5", {"train.learning_rate": 3e-5}),
    ("wandb_project", "w", {"tracker.wandb_project": "w", "tracker.report_to": ["wandb"]}),
    ("lora_r", "3", {"adapter.r": 3}),
    ("lora_alpha", "5", {"adapter.lora_alpha": 5.0}),
    ("lora_dropout", "0.3", {"adapter.lora_dropout": 0.3}),
    ("lora_target_modules", "k_proj,o_proj", {"adapter.target_modules": ["k_proj", "o_proj"]}),
    ("output_dir", "o", {"train.output_dir": "o"}),
    ("train_on_inputs", None, {"data.train_on_inputs": True}),
    ("add_eos_token", "True", {"data.add_eos_token": True}),
    ("resume_from_checkpoint", "r", {"train.resume_from_checkpoint": "r"}),
    ("packing", None, {"data.packing": True}),
    ("packing_length", "512", {"data.packing_length": 512}),
    ("overwrite_output_dir", None, {"train.overwrite_output_dir": True}),
    ("eval_steps", "11", {"train.eval_steps": 11}),
    ("save_steps", "12", {"train.save_steps": 12}),
    ("train.warmup_ratio", "0.1", {"train.warmup_ratio": 0.1}),
]
OTHERS = [
    ("val_set_size", "0", {"train.eval_strategy": "no"}),
    ("group_by_length", None, {"train.group_by_length": True}),
    ("pruned_model", "n", {"model.name_or_path": "n", "train.output_dir": "results/n_finetuned"}),
]
"""which do not go with some of those above"""


@cache
def configured(*argv: str) -> RunConfig:
    return parse(RunConfig, finetune_lora.to_options([*MODEL, *argv])[1], VERB)


def words(flags: list[tuple[str, str | None, dict]]) -> list[str]:
    return [word for flag, value, _ in flags for word in (f"--{flag}", value) if word is not None]


def read(config: RunConfig, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("flags,which", [(FLAGS, i) for i in range(len(FLAGS))] + [(OTHERS, i) for i in range(len(OTHERS))])
def test_every_flag_takes_effect(flags, which):
    flag, value, expected = flags[which]
    given, default = configured(*words(flags)), configured()
    assert {key: read(given, key) for key in expected} == expected, (flag, value)
    assert all(read(default, key) != value for key, value in expected.items())


def test_the_guides_defaults():
    expected = {
        "data.dataset_name": "yahma/alpaca-cleaned", "data.holdout_windows": 2000, "data.block_size": 256, "data.prompt_template": "alpaca",
        "train.global_batch_size": 64, "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 16,
        "train.num_train_epochs": 2.0, "train.learning_rate": 1e-4, "adapter.r": 8, "adapter.lora_alpha": 16.0, "adapter.lora_dropout": 0.05,
        "adapter.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"], "adapter.mask": "auto",
        "train.output_dir": "results/m_finetuned", "data.train_on_inputs": False, "data.add_eos_token": False, "train.group_by_length": False,
        "train.resume_from_checkpoint": None, "tracker.report_to": [], "data.packing": False, "data.format": "auto",
        "train.adapter_subfolder": "lora_adapter",
    }  # fmt: skip
    config = configured()
    assert {key: read(config, key) for key in expected} == expected
    flags, _ = finetune_lora.to_options(MODEL)
    assert flags.skip_evaluation == flags.trust_pickle == "false"


@pytest.mark.parametrize(
    "model,folder",
    [
        ("results/HGSP_2000/pruned_model.bin", "results/HGSP_2000_finetuned"),
        ("out/pruned", "results/pruned_finetuned"),
        ("out/pruned/", "results/pruned_finetuned"),
        ("org/name", "results/name_finetuned"),
    ],
)
def test_the_default_output_is_named_after_the_model(model, folder):
    assert finetune_lora.to_options(["--pruned_model", model])[0].output_dir == folder


def test_accumulation_follows_from_the_batch_and_a_remainder_is_refused(monkeypatch, tmp_path):
    def batch(*argv: str) -> list[str]:
        return [
            o
            for o in finetune_lora.to_options([*MODEL, *argv])[1]
            if o.startswith(("--train.gradient_acc", "--train.global_batch"))
        ]

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert batch() == ["--train.gradient_accumulation_steps=4", "--train.global_batch_size=64"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    remainder = "^batch_size: found 64 with micro_batch_size 4 on 3 processes, expected a multiple of 12, such as 60 or 72$"
    with pytest.raises(UserError, match=remainder):
        batch()
    with pytest.raises(UserError, match="^batch_size: found 6 .*expected a multiple of 12, such as 12$"):
        batch("--batch_size=6")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the run goes on with the machines that are left
    goes_on = ["--train.gradient_accumulation_steps=6", "--train.global_batch_size=64"]
    assert batch() == goes_on
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    again = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
    with pytest.raises(UserError, match=remainder):
        batch(*again)  # nothing there yet
    (tmp_path / "checkpoint-3").mkdir()
    assert batch(*again) == goes_on


@pytest.mark.parametrize(
    "argv", ["--batch_size 0", "--batch_size x", "--micro_batch_size 1.5", "--val_set_size -1", "--eval_limit 0"]
)
def test_numbers_that_are_none_are_named(argv):
    with pytest.raises(UserError, match=f"{argv.split()[0][2:]}: found {argv.split()[1]}, expected a whole number from"):
        configured(*argv.split())
    with pytest.raises(UserError, match="pruned_model: found nothing"):
        finetune_lora.to_options([])


@pytest.mark.parametrize(
    "argv,problem",
    [
        ("--cutoff_len 1", "cutoff_len: found 1, expected a context of 2 tokens or more"),
        (
            "--lora_r 0 --num_epochs 0",
            "lora_r: found 0, expected a number above 0\nnum_epochs: found 0.0, expected a number above 0",
        ),
        ("--packing_length 9 --packing", "packing_length: found 9, expected packing, and cutoff_len (256) or more: a row holds"),
        ("--prompt_template_name none", "prompt_template_name: found no template none, expected one of alpaca"),
        ("--data_path none.json", "data_path: found no file none.json"),
        ("--data_path {}/t.txt --packing", "packing: found true, but {}/t.txt holds text, expected examples"),
    ],
)
def test_errors_name_the_flags_and_need_no_model(argv, problem, tmp_path):
    """The model is not there, which nothing has come to see yet."""
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "t.txt").write_text("words")
    given = [word.format(tmp_path) for word in argv.split()]
    options = ["--pruned_model", "nowhere/at/all", "--output_dir", str(tmp_path / "out"), "--data_path", str(tmp_path / "d.json")]
    with pytest.raises(UserError) as caught:
        finetune_lora.run([*options, *given])
    assert str(caught.value).startswith(problem.format(tmp_path))


def test_instruction_data_of_every_kind_are_the_same_for_the_same_seed(tmp_path):
    rows = make_records(200, 3)
    assert rows == make_records(200, 3) != make_records(200, 4)
    assert all(set(row) == {"instruction", "input", "output"} and row["output"] for row in rows)
    assert any(not row["input"] for row in rows) and any(row["input"] for row in rows)
    assert max(len(row["output"]) for row in rows) > 300 and any(not row["output"].isascii() for row in rows)
    assert make_instructions([str(tmp_path / "a" / "x.json"), "--records", "5"]) == 0
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == make_records(5, 0)
