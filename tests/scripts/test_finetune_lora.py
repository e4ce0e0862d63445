"""Workflow W2 as a user calls it: every flag, and whole runs of the front end down to the pickled model and its evaluation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import finetune_lora
import prune_structured
import pytest
import torch
from make_instructions import main as make_instructions
from make_instructions import make_records

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import InspectArgs
from lora_dist.blocks import BlockMask, Pattern
from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB
from lora_dist.config import RunConfig
from lora_dist.engine.inspect import inspect
from lora_dist.engine.open_model import open_model
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.loading import load_base
from lora_dist.parallel import World
from tests.runs import ROOT, environment, losses, records
from tests.tiny import tiny_model, tiny_tokenizer

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
    remainder = "^batch_size: found 64 with micro_batch_size 4 on 3 processes, expected a multiple of 12, such as 60$"
    with pytest.raises(UserError, match=remainder):
        batch()
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


def test_instruction_data_of_every_kind_are_the_same_for_the_same_seed(tmp_path):
    rows = make_records(200, 3)
    assert rows == make_records(200, 3) != make_records(200, 4)
    assert all(set(row) == {"instruction", "input", "output"} and row["output"] for row in rows)
    assert any(not row["input"] for row in rows) and any(row["input"] for row in rows)
    assert max(len(row["output"]) for row in rows) > 300 and any(not row["output"].isascii() for row in rows)
    assert make_instructions([str(tmp_path / "a" / "x.json"), "--records", "5"]) == 0
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == make_records(5, 0)


# --- whole runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A pruned and a dense base with room for the template, instructions, and small local files to evaluate on."""
    folder = tmp_path_factory.mktemp("w2")
    tokenizer = tiny_tokenizer()
    for name in ("pruned", "dense"):
        model = tiny_model("llama", vocab_size=len(tokenizer))
        model.config.max_position_embeddings = 512
        masks = {}
        for linear in prunable_linears(model) if name == "pruned" else ():
            mask = BlockMask.detect(linear.weight_OI, 16)
            mask.kept_PQ[0, 0] = mask.kept_PQ[-1, -1] = False
            linear.weight_OI.masked_fill_(~mask.expand(), 0.0)
            masks[linear.name] = mask
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if masks:
            Pattern(masks).save(folder / name)
    (folder / "data.json").write_text(json.dumps([row for row in make_records(150, 0) if len(row["output"]) < 60][:96]))
    (folder / "text.txt").write_text("the old bird sings under the new bridge .\n" * 60)
    return folder


def start(workplace: Path, model: str, out: Path, *argv: str) -> int:
    """In this process, as `main` does it."""
    options = ["--pruned_model", str(workplace / model), "--output_dir", str(out), *common(workplace), *argv]
    return run_reporting("finetune_lora.py", lambda: finetune_lora.run(options))


def common(workplace: Path) -> list[str]:
    return [
        "--data_path", str(workplace / "data.json"), "--val_set_size", "16", "--batch_size", "16", "--num_epochs", "2",
        "--learning_rate", "1e-2", "--cutoff_len", "420", "--data.cache_dir", str(workplace / "cache"), "--train.logging_steps", "1",
        "--eval_steps", "5", "--save_steps", "5",
    ]  # fmt: skip


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def finished(workplace, data_dir) -> tuple[Path, str]:
    """A block-pruned model tuned, merged and evaluated; its folder and its console."""
    out = workplace / "finished"
    local = ["--eval_wikitext2", str(workplace / "text.txt"), "--eval_ptb", str(workplace / "text.txt")]
    local += ["--eval_task_data", str(data_dir / "multiple-choice"), "--eval_limit", "2"]
    code = start(workplace, "pruned", out, "--add_eos_token", *local)
    console = (out / "train.log").read_text()
    assert code == 0, console
    return out, console


def test_the_loss_falls_and_the_console_says_what_is_done(finished):
    out, console = finished
    values = losses(out)
    assert len(values) == 10 and values[10] < 0.9 * values[1]
    evaluated = [row["eval_loss"] for row in records(out, "eval")]
    assert len(evaluated) == 3 and evaluated[-1] < evaluated[0]
    for line in ("✅ Pattern kept: all ", "✅ Fine-tuned model saved in ", "***** Evaluating the fine-tuned model *****"):
        assert line in console
    assert "  Total train batch size (w. parallel, distributed & accumulation) = 16" in console


def test_the_output_has_the_guides_layout(finished):
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert {
        "lora_adapter",
        "pruned_model",
        "pruned_model.bin",
        "evaluation",
        "checkpoint-5",
        "checkpoint-10",
        "train.log",
    } <= names
    assert not any(name.startswith(".pruned") for name in names) and "adapter_model.safetensors" not in names
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in (out / "lora_adapter").iterdir()
    }
    assert json.loads((out / "pruned_model" / "merge.json").read_text())["out"] == str(out / "pruned_model")


def test_the_pickled_model_reloads_as_the_guide_says_and_is_the_merged_one(finished):
    out, _ = finished
    loaded = torch.load(out / "pruned_model.bin", weights_only=False)
    merged = load_base(str(out / "pruned_model"), progress=False)
    assert torch.equal(logits(loaded["model"]), logits(merged.model))
    assert loaded["tokenizer"]("a b")["input_ids"] == merged.tokenizer("a b")["input_ids"]
    assert loaded["model"].config.use_cache and all(p.requires_grad for p in loaded["model"].parameters())
    pattern = Pattern.load(out / "pruned_model")
    assert all(not linear.weight_OI[~pattern[linear.name].expand()].any() for linear in prunable_linears(merged.model))


def test_the_run_folder_stands_for_its_adapter(finished, workplace):
    out, _ = finished
    assert inspect(InspectArgs(path=str(out))).what == "adapter"
    opened = open_model(str(workplace / "pruned"), str(out), world=World())
    merged = load_base(str(out / "pruned_model"), progress=False).model
    assert opened.masked and torch.allclose(logits(opened.model), logits(merged), atol=1e-5)


def test_the_evaluation_has_every_field_of_the_guide(finished):
    out, _ = finished
    report = json.loads((out / "evaluation" / "evaluation_results.json").read_text())
    assert set(report["perplexity"]) == {"wikitext2", "ptb"} and report["perplexity"]["ptb"]["perplexity"] > 1
    text = json.dumps(report["zeroshot"])
    for task in ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"):
        assert task in text
    assert "error" not in text and "error" not in report["speed"] and "error" not in report["memory"]
    assert (out / "evaluation" / "evaluation_results.md").is_file()


def test_a_finished_run_is_not_overwritten_but_gone_on_with(finished, workplace, capsys):
    out, _ = finished
    before = (out / "lora_adapter" / "adapter_model.safetensors").read_bytes()
    assert start(workplace, "pruned", out, "--add_eos_token", "--skip_evaluation") == 2
    assert "already holds a run" in capsys.readouterr().err
    (out / "pruned_model" / "older").write_text("")
    code = start(workplace, "pruned", out, "--add_eos_token", "--skip_evaluation", "--resume_from_checkpoint", "auto")
    assert code == 0 and (out / "lora_adapter" / "adapter_model.safetensors").read_bytes() == before
    assert not (out / "pruned_model" / "older").exists() and (out / "pruned_model.bin").is_file()


def test_a_plain_adapter_loads_with_plain_peft_and_a_run_that_died_before_the_merge_is_finished(
    workplace, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(finetune_lora, "finish", lambda *args: sys.exit(9))
        with pytest.raises(SystemExit):
            start(workplace, "dense", out)
    assert (out / "lora_adapter").is_dir() and not (out / "pruned_model").exists()
    trained = losses(out)
    capsys.readouterr()
    nowhere = [
        "--eval_wikitext2",
        str(workplace / "text.txt"),
        "--eval_ptb",
        str(tmp_path / "no.txt"),
        "--eval_task_data",
        str(tmp_path / "no"),
    ]
    code = start(workplace, "dense", out, "--resume_from_checkpoint", "auto", *nowhere)
    console = capsys.readouterr().out
    assert code == 1 and losses(out) == trained  # nothing was trained again; the evaluation failed
    assert "the fine-tuned model is kept" in console and "the base has no sparsity pattern: plain LoRA" in console
    assert f"python scripts/run_evaluation.py --model_path {out / 'pruned_model'} --metrics all --output " in console
    assert console.count("does not learn to end its answers") == 1
    merged = logits(torch.load(out / "pruned_model.bin", weights_only=False)["model"])
    plain = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(workplace / "dense")!r}), {str(out / "lora_adapter")!r})
AutoTokenizer.from_pretrained({str(out / "lora_adapter")!r})
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits, {str(tmp_path / "logits.pt")!r})
import sys
assert not any(name.startswith("lora_dist") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), merged, atol=1e-5)


class Harmful:
    """Writes a file when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.write_text, (self.file, "ran"))


def test_a_structured_pickle_goes_all_the_way_and_a_harmful_one_nowhere(workplace, tmp_path, capsys, monkeypatch):
    """Layers of different widths: converted, tuned, merged, pickled, reloaded."""
    pickle = tmp_path / "HGSP" / "pruned_model.bin"
    prune = ["--kv_heads", "1,2", "--neurons", "24,40"]
    assert prune_structured.main([str(workplace / "dense"), str(pickle), *prune]) == 0
    monkeypatch.chdir(tmp_path)
    options = ["--pruned_model", str(pickle), *common(workplace), "--skip_evaluation", "--num_epochs", "1"]
    assert run_reporting("finetune_lora.py", lambda: finetune_lora.run(options)) == 0
    out = tmp_path / "results" / "HGSP_finetuned"
    assert (tmp_path / "HGSP" / "pruned_model" / "convert.json").is_file()
    assert "bit for bit" in capsys.readouterr().out and losses(out)[5] < losses(out)[1]
    tuned, merged = (
        torch.load(out / "pruned_model.bin", weights_only=False)["model"],
        load_base(str(out / "pruned_model"), progress=False),
    )
    assert torch.equal(logits(tuned), logits(merged.model))
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in tuned.model.layers] == [8, 16]
    before = load_base(str(tmp_path / "HGSP" / "pruned_model"), progress=False).model
    assert not torch.allclose(logits(before), logits(tuned), atol=1e-2)
    harmful = tmp_path / "harmful.bin"
    torch.save({"model": Harmful(tmp_path / "ran"), "tokenizer": None}, harmful)
    refused = ["--pruned_model", str(harmful), *common(workplace)]
    assert run_reporting("finetune_lora.py", lambda: finetune_lora.run(refused)) == 2
    assert not (tmp_path / "ran").exists() and "pathlib." in capsys.readouterr().err
    assert (
        run_reporting("finetune_lora.py", lambda: finetune_lora.run([*refused, "--trust_pickle"])) == 2
    )  # there is no model in it
    assert (tmp_path / "ran").exists() and "--trust_pickle opens it" not in capsys.readouterr().err
    assert run_reporting("finetune_lora.py", lambda: finetune_lora.run(["--pruned_model", "no.bin", *common(workplace)])) == 2
    assert "pruned_model: found no file no.bin" in capsys.readouterr().err


@pytest.mark.parametrize("code,state", [(75, "stopped"), (0, "stopped"), (1, "failed")])
def test_a_run_that_did_not_end_hands_its_code_on_and_nothing_more_happens(code, state, workplace, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def train(config, world, argv):
        out.mkdir()
        (out / "status.json").write_text(json.dumps({"state": state}))
        return code

    monkeypatch.setattr("lora_dist.engine.train.train", train)
    monkeypatch.setattr(finetune_lora, "finish", lambda *args: pytest.fail("went on"))
    assert start(workplace, "dense", out) == code


@pytest.mark.parametrize(
    "argv,problem",
    [
        (["--prompt_template_name", "nosuch"], r"found no template nosuch, expected one of .*alpaca"),
        (["--val_set_size", "5000"], r"found 5000"),
        (["--lora_target_modules", "q_proj,nosuch"], r"nosuch match no linear"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(argv, problem, workplace, tmp_path, capsys):
    assert start(workplace, "dense", tmp_path / "out", *argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_lora.py: ")]
    assert len(lines) == 1 and re.search(problem, lines[0])


def launched(launcher: list[str], workplace: Path, out: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "scripts" / "finetune_lora.py"), "--pruned_model", str(workplace / "pruned"), "--output_dir", str(out)]
    asked = [sys.executable, "-m", *launcher, *script, *common(workplace), "--parallel.device=cpu", *argv]
    return subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)))


def assert_same_as_one_process(done: subprocess.CompletedProcess[str], out: Path, one: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("LoRA Fine-tuning Configuration") == 1 and "Gradient Accumulation steps = 2" in done.stdout
    expected, found = losses(one), losses(out)
    assert expected.keys() == found.keys() and all(found[k] == pytest.approx(expected[k], rel=1e-5) for k in found)
    a, b = (logits(torch.load(folder / "pruned_model.bin", weights_only=False)["model"]) for folder in (one, out))
    assert torch.allclose(a, b, atol=1e-3)


NO_DROPOUT = ["--lora_dropout", "0", "--skip_evaluation", "--num_epochs", "1"]


def test_two_processes_under_torchrun_equal_one(workplace, tmp_path):
    assert start(workplace, "pruned", tmp_path / "one", *NO_DROPOUT) == 0
    done = launched(["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], workplace, tmp_path / "two", *NO_DROPOUT)
    assert_same_as_one_process(done, tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_under_accelerate_launch_equal_one(strategy, workplace, tmp_path):
    """Sharded, the merge is made together, and the evaluation by both processes."""
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate.yaml"), "--num_processes", "2"]
    assert start(workplace, "pruned", tmp_path / "one", *NO_DROPOUT) == 0
    done = launched(launcher, workplace, tmp_path / "two", *NO_DROPOUT, "--parallel.strategy", strategy)
    assert_same_as_one_process(done, tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "two")
