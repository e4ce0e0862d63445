"""scripts/run_evaluation.py: every flag takes effect, and the JSON has every field that workflow W2 names."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import run_evaluation

from lora_dist.arguments import EvalArgs
from lora_dist.cli.options import Verb, parse
from lora_dist.engine.model_path import model_directory
from lora_dist.log import UserError
from tests.evaluation.conftest import write_questions
from tests.models.pickles import Evil
from tests.runs import ROOT, environment

TASKS = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def read(*argv: str) -> EvalArgs:
    return parse(EvalArgs, run_evaluation.to_options(["--model_path", "m", *argv]), Verb("", "", positionals=("model",)))


def test_flags_and_their_defaults():
    args = read()
    assert (args.model, args.metrics, args.texts, args.tasks, args.task_data, args.output) == (
        "m",
        ["all"],
        ["wikitext2", "ptb"],
        TASKS,
        None,
        None,
    )
    assert args.chosen_metrics == ("ppl", "zeroshot", "speed", "memory")
    assert read("--metrics", "ppl,memory").chosen_metrics == ("ppl", "memory")
    args = read(
        "--wikitext2", "w.txt", "--ptb", "p.txt", "--task_data", "d", "--output", "o.json", "--limit", "5", "--adapter", "a"
    )
    assert (args.texts, args.task_data, args.output, args.limit, args.adapter) == (
        ["wikitext2=w.txt", "ptb=p.txt"],
        "d",
        "o.json",
        5,
        "a",
    )


def test_the_whole_of_it(tiny_base, tiny_text, tmp_path):
    """The run folder that fine-tuning leaves, from the command line; no data from the hub."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pruned_model").symlink_to(tiny_base)
    output = tmp_path / "evaluation_results.json"
    flags = {
        "model_path": tmp_path / "run", "metrics": "all", "wikitext2": tiny_text, "ptb": tiny_text, "task_data": write_questions(tmp_path),
        "output": output, "limit": 2, "max_samples": 4, "prompt_tokens": 8, "max_new_tokens": 8, "repetitions": 2,
    }  # fmt: skip
    command = [sys.executable, "scripts/run_evaluation.py", *(f"--{key}={value}" for key, value in flags.items())]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert (report["model"], report["how"]["directory"]) == (str(tmp_path / "run"), str(tmp_path / "run" / "pruned_model"))
    assert [report["perplexity"][text]["perplexity"] > 1 for text in ("wikitext2", "ptb")] == [True, True]
    assert report["perplexity"]["ptb"]["joiner"] == " " and report["perplexity"]["wikitext2"]["joiner"] == "\n\n"
    assert list(report["zeroshot"]["tasks"]) == TASKS
    accuracies = [task["acc"] for task in report["zeroshot"]["tasks"].values()]
    assert report["zeroshot"]["mean_acc"] == pytest.approx(sum(accuracies) / 7)
    assert all(
        report["speed"][key]["median"] > 0 for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_latency_s")
    )
    assert 0 < report["speed"]["inter_token_latency_s"]["p50"] <= report["speed"]["inter_token_latency_s"]["p95"]
    assert all(
        report["memory"][key] > 0 for key in ("weights_bytes", "peak_generating_bytes", "peak_evaluating_bytes", "zero_weights")
    )
    assert "| perplexity, wikitext2" in done.stdout and "Traceback" not in done.stderr
    assert output.with_suffix(".md").exists()


def test_what_a_model_path_means(tiny_base, tmp_path):
    assert model_directory(str(tiny_base)) == str(tiny_base)
    assert model_directory("org/name") == "org/name"
    run = tmp_path / "run"
    for name in ("pruned_model", ".pruned_model.old", "lora_adapter", "checkpoint-5"):
        (run / name).mkdir(parents=True)
    for name in ("pruned_model", ".pruned_model.old"):
        (run / name / "config.json").write_text("{}")
        (run / name / "model.safetensors").write_text("")
    assert model_directory(str(run)) == str(run / "pruned_model")
    (run / "pruned_model" / "model.safetensors").unlink()
    (run / "pruned_model.bin").write_text("")
    with pytest.raises(UserError, match=r"holds no model, .* name the pickle, .*pruned_model.bin"):
        model_directory(str(run))
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        model_directory(str(run))


def test_a_pickle_is_converted_and_evaluated(tiny_base, tiny_text, tmp_path, capsys):
    from lora_dist.models.legacy import save_pickled
    from lora_dist.models.loading import load_base

    base = load_base(str(tiny_base))
    save_pickled(base.model, base.tokenizer, tmp_path / "pruned_model.bin")
    flags = ["--metrics=ppl", f"--wikitext2={tiny_text}", f"--ptb={tiny_text}", "--max_samples=4", "--device=cpu"]
    outputs = [tmp_path / "pickle.json", tmp_path / "directory.json"]
    for path, output in zip((tmp_path / "pruned_model.bin", tiny_base), outputs, strict=True):
        assert run_evaluation.run(["--model_path", str(path), f"--output={output}", *flags]) == 0
    pickle, directory = (json.loads(output.read_text()) for output in outputs)
    assert pickle["how"]["directory"] == str(tmp_path / "pruned_model")
    assert pickle["perplexity"]["ptb"]["loss"] == directory["perplexity"]["ptb"]["loss"]
    assert pickle["how"]["fingerprint"] == directory["how"]["fingerprint"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import torch

    marker = tmp_path / "ran"
    torch.save({"model": Evil(marker), "tokenizer": None}, tmp_path / "bad.bin")
    with pytest.raises(UserError, match="system"):
        run_evaluation.run(["--model_path", str(tmp_path / "bad.bin"), "--metrics=memory", "--device=cpu"])
    assert not marker.exists()
