"""Whole runs of workflow W2's front end: down to the pickled model and its evaluation, on one process and two, broken off and refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import finetune_lora
import prune_structured
import pytest
import torch
from make_instructions import make_records

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import InspectArgs
from lora_dist.blocks import BlockMask, Pattern
from lora_dist.engine.inspect import inspect
from lora_dist.engine.open_model import open_model
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.loading import load_base
from lora_dist.parallel import World
from tests.runs import ROOT, environment, losses, records
from tests.tiny import tiny_model, tiny_tokenizer


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


@pytest.mark.long
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
