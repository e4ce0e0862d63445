"""Reports of models side by side: what is in the files, and that a failure loses nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lora_dist.arguments import EvalArgs
from lora_dist.cli import eval as eval_verb
from lora_dist.cli.options import Verb, parse
from lora_dist.engine.evaluate import open_for_evaluation, packed_loss
from lora_dist.engine.report import evaluate_models
from lora_dist.log import UserError
from lora_dist.models.chunked import chunked_head
from lora_dist.monitor.console import Console
from lora_dist.parallel import World
from tests.evaluation.conftest import write_questions

VERB = Verb("eval", "", positionals=("model",))


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory):
    """A masked and a plain adapter with an update, and the masked one merged."""
    from lora_dist.adapter import adapter_tensors, attach_adapter, save_adapter
    from lora_dist.arguments import MergeArgs
    from lora_dist.engine.merge import merge
    from lora_dist.engine.open_model import open_model

    folder = tmp_path_factory.mktemp("adapters")
    for name in ("masked", "plain"):
        opened = open_model(str(tiny_base), world=World())
        pattern = opened.found.pattern if name == "masked" else None
        model = attach_adapter(
            opened.base.model,
            pattern,
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "up_proj"],
            base_fingerprint=opened.base.fingerprint,
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, folder / name, adapter_tensors(model))
    merge(MergeArgs(base=str(tiny_base), adapter=str(folder / "masked"), out=str(folder / "merged")), World())
    return folder


def options(tiny_text, *extra):
    return [f"--texts=stories={tiny_text}", "--block_size=32", "--max_samples=8", "--device=cpu", *extra]


def report_of(argv):
    return evaluate_models(parse(EvalArgs, argv, VERB), World())


def test_models_side_by_side(tiny_base, tiny_text, adapters, tmp_path):
    rows = {
        "dense": adapters / "merged",
        "pruned": tiny_base,
        "masked": f"{tiny_base}+{adapters / 'masked'}",
        "plain": f"{tiny_base}+{adapters / 'plain'}",
        "gone": tmp_path / "nothing",
    }
    output = tmp_path / "out" / "figures.json"
    compare = "--compare=" + ",".join(f"{name}={where}" for name, where in rows.items())
    questions = f"--task_data={write_questions(tmp_path)}"
    argv = options(
        tiny_text,
        compare,
        "--metrics=ppl,zeroshot,memory",
        questions,
        f"--output={output}",
        "--prompt_tokens=8",
        "--max_new_tokens=4",
    )
    assert eval_verb.main(argv) == 1  # one row failed
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    found = {row["name"]: row for row in report["models"]}
    assert list(found) == list(rows) and (report["format"], report["version"]) == ("lora_dist.evaluation", 1)
    assert found["gone"]["error"].startswith("MODEL: found no directory") and "perplexity" not in found["gone"]

    losses = {name: row["perplexity"]["stories"]["loss"] for name, row in found.items() if name != "gone"}
    assert losses["masked"] == pytest.approx(losses["dense"], rel=1e-5)  # merged: the same model
    accuracies = {
        name: {task: figures["acc"] for task, figures in row["zeroshot"]["tasks"].items()}
        for name, row in found.items()
        if name != "gone"
    }
    assert accuracies["masked"] == accuracies["dense"] and len(accuracies["masked"]) == 7
    # Which of eight questions a random model answers differs between machines; the losses tell the models apart anywhere.
    assert len({round(losses[name], 6) for name in ("pruned", "masked", "plain")}) == 3
    assert ("recovery" in found["plain"]) == (losses["pruned"] > losses["dense"])  # weights are random: pruning may do no harm

    zeros = {name: row["memory"]["zero_tiles"] for name, row in found.items() if name != "gone"}
    assert zeros["masked"] == zeros["pruned"] == zeros["dense"] > 0.4
    assert 0 < zeros["plain"] < zeros["pruned"]  # dense where the adapter acts
    assert found["masked"]["memory"]["adapter_bytes"] > 0 and found["pruned"]["memory"]["adapter_bytes"] is None
    weights = found["pruned"]["memory"]
    assert weights["weights_nonzero_bytes"] < weights["weights_bytes"] == 4 * weights["parameters"]
    markdown = output.with_suffix(".md").read_text()
    assert "| perplexity, stories" in markdown and "gone: MODEL: found no directory" in markdown


@pytest.mark.parametrize("adapter", [None, "masked"])
def test_losses_are_taken_without_logits(tiny_base, tiny_text, adapters, adapter):
    argv = [str(tiny_base), f"--dataset_name={tiny_text}", "--block_size=32", "--max_samples=8", "--split=train"]
    args = parse(EvalArgs, argv + ([] if adapter is None else [f"--adapter={adapters / adapter}"]), VERB)
    opened = open_for_evaluation(args, args.model, args.adapter, World())
    head = chunked_head(opened.model)
    assert head is not None and head.chunked
    losses, sizes = [], []
    for chunked in (True, False):
        head.chunked = chunked
        handle = head.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel()))
        losses.append(packed_loss(args, opened, 32, World(), lambda total: lambda: None)[0].loss)
        handle.remove()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and sizes[0] == 1 < sizes[-1]


def test_every_figure_says_how_it_was_obtained(tiny_base, tiny_text, tmp_path):
    output = tmp_path / "figures.json"
    questions = write_questions(tmp_path)
    argv = options(tiny_text, str(tiny_base), "--metrics=all", f"--task_data={questions}", "--limit=4", "--stride=16", f"--output={output}",
                   "--prompt_tokens=8", "--max_new_tokens=4", "--repetitions=2", "--generation_batch_size=2")  # fmt: skip
    assert eval_verb.main(argv) == 0
    report = json.loads(output.read_text())
    text = report["perplexity"]["stories"]
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"]))
    assert text["word_perplexity"] == pytest.approx(math.exp(text["nll"] / text["words"]))
    assert text["bits_per_byte"] == pytest.approx(text["nll"] / math.log(2) / text["bytes"])
    assert (text["context"], text["stride"], text["average"], text["windows"]) == (32, 16, "token", 8)
    assert text["tokens"] == 31 + 7 * 16
    scored = tiny_text.read_text()[: text["tokens"] + 1]  # one token a character, and the first has nothing before it
    assert (text["words"], text["bytes"]) == (len(scored.split(" ")) + scored.count("\n"), len(scored))
    assert {len(report["how"]["tokenizer"]["sha256"]), len(text["text_sha256"]), len(report["how"]["fingerprint"])} == {64}
    assert report["how"]["dtype"] == "float32" and report["how"]["versions"]["torch"] == torch.__version__
    assert len(report["zeroshot"]["tasks"]) == 7 and report["zeroshot"]["mean_acc"] is not None
    assert all(task["questions"] == 4 and len(task["data_sha256"]) == 64 for task in report["zeroshot"]["tasks"].values())
    assert (report["speed"]["batch_size"], report["speed"]["prompt_tokens"], report["speed"]["repetitions"]) == (2, 8, 2)
    assert report["memory"]["peak_generating_bytes"] is not None and "before loading" in report["memory"]["peak_of"]


def test_a_metric_that_fails_leaves_the_others(tiny_base, tiny_text):
    argv = options(tiny_text, str(tiny_base), "--metrics=speed,ppl", "--prompt_tokens=4096")
    outcome = report_of(argv)
    assert outcome.report["speed"]["error"].startswith("prompt_tokens, max_new_tokens: found 4096")
    assert outcome.report["perplexity"]["stories"]["tokens"] > 0
    assert outcome.failed == [f"{tiny_base.name}: speed: {outcome.report['speed']['error']}"]
    short = tiny_text.parent / "short.txt"
    short.write_text("a")
    outcome = report_of([str(tiny_base), f"--texts=short={short},stories={tiny_text}", "--average=window", "--device=cpu"])
    assert outcome.report["perplexity"]["short"]["error"].startswith("block_size: found a text of 1 tokens, expected 64")
    assert outcome.report["perplexity"]["stories"]["average"] == "window" and len(outcome.failed) == 1


def test_held_out_windows_are_those_that_eval_alone_tells(tiny_base, tiny_text, tmp_path):
    held = [
        str(tiny_base),
        f"--dataset_name={tiny_text}",
        "--holdout_windows=16",
        "--block_size=32",
        f"--cache_dir={tmp_path}",
        "--device=cpu",
    ]
    figures = tmp_path / "alone.json"
    assert eval_verb.main([*held, f"--output={figures}"]) == 0
    alone = json.loads(figures.read_text())
    outcome = report_of([*held, "--metrics=ppl"])
    assert outcome.report["perplexity"]["text held out"]["loss"] == pytest.approx(alone["eval_loss"], rel=1e-12)
    assert set(alone) >= {
        "eval_loss",
        "perplexity",
        "tokens",
        "windows",
        "block_size",
        "dtype",
        "split",
        "runtime_s",
        "model",
        "adapter",
    }


def test_a_single_model_that_cannot_be_loaded_and_files_that_cannot_be_written(tiny_base, tiny_text, tmp_path):
    with pytest.raises(UserError, match="MODEL: found no directory"):
        report_of(options(tiny_text, str(tmp_path / "nothing"), "--metrics=ppl"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: .*file/x.json cannot be written"):
        report_of(options(tiny_text, str(tiny_base), f"--output={tmp_path / 'file' / 'x.json'}"))
    with pytest.raises(UserError, match="block_size: found 4096, expected at most the model's context of 64"):
        report_of([str(tiny_base), f"--texts=stories={tiny_text}", "--block_size=4096"])


def test_the_console_says_what_is_done(tiny_base, tiny_text, capsys):
    evaluate_models(parse(EvalArgs, options(tiny_text, str(tiny_base)), VERB), World(), Console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[1/1] {tiny_base.name}: {tiny_base}"
    assert any(line.startswith("| perplexity, stories") for line in lines)
    assert any("8 windows of 32 tokens, stride 32, average token, 248 scored tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "MODEL, compare: found nothing"),
        (["m", "--compare=a=b"], "MODEL, compare: found both"),
        (["--compare=a=b,a=c"], "compare: found a twice"),
        (["--compare=ab"], "compare: found ab, expected NAME=DIR"),
        (["--compare=a=b", "--adapter=c"], "adapter: found with compare"),
        (["m", "--texts=wikitext2,x="], "texts: found x=, expected wikitext2, ptb, c4 or NAME=FILE"),
        (["m", "--texts=a=b", "--average=window", "--stride=4"], "stride: found 4 with average window"),
        (["m", "--texts=a=b", "--stride=64", "--block_size=32"], "stride: found 64, expected at most block_size, 32"),
        (["m", "--stride=4", "--limit=3"], "stride, limit: found without a report"),
        (["m", "--metrics=speed", "--max_new_tokens=1"], "max_new_tokens: found 1, expected 2 or more"),
        (["m", "--metrics=zeroshot", "--num_fewshot=-1", "--limit=0"], "num_fewshot: found -1"),
        (["m", "--metrics=zeroshot", "--tasks="], "tasks: found nothing"),
        (
            ["m", "--metrics=perplexity"],
            "metrics: found ['perplexity'], expected a list of one of ppl, zeroshot, speed, memory, all",
        ),
    ],
)
def test_options_that_do_not_fit(argv, problem):
    with pytest.raises(UserError) as error:
        parse(EvalArgs, argv, VERB)
    assert problem in str(error.value)
