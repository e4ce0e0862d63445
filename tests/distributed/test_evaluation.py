"""A report by two processes, the model whole on both or cut in two: the figures of one process."""

from __future__ import annotations

import pytest
import torch

from lora_dist.arguments import EvalArgs
from lora_dist.cli.options import Verb, parse
from lora_dist.engine.report import evaluate_models
from lora_dist.parallel import World
from tests.evaluation.conftest import write_questions

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def argv(tiny_base, tiny_text, tmp_path_factory):
    questions = write_questions(tmp_path_factory.mktemp("questions"))
    return [
        str(tiny_base), "--metrics=all", f"--texts=stories={tiny_text},wikitext2={tiny_text}", "--stride=24", "--block_size=40",
        "--max_samples=21", "--batch_size=4", f"--task_data={questions}", "--prompt_tokens=8", "--max_new_tokens=8", "--repetitions=2",
        "--device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(argv):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    yield evaluate_models(parse(EvalArgs, argv, Verb("eval", "", positionals=("model",))), World()).report
    torch.set_num_threads(threads)


def timeless(entry):
    return {k: timeless(v) if isinstance(v, dict) else v for k, v in entry.items() if k != "runtime_s"}


def test_two_processes_give_the_digits_of_one(pair, argv, alone):
    done = pair.run(*argv, verb="report")
    for fact in done.facts:
        assert fact["failed"] == []
        report = fact["report"]
        assert timeless(report["perplexity"]) == timeless(alone["perplexity"])
        assert timeless(report["zeroshot"]) == timeless(alone["zeroshot"])
        assert report["how"]["processes"] == 2
        assert report["speed"] == done.facts[0]["report"]["speed"]  # rank 0's, known to all
        assert report["memory"]["weights_bytes"] == alone["memory"]["weights_bytes"]
    assert alone["perplexity"]["stories"]["windows"] == 21 and len(alone["zeroshot"]["tasks"]) == 7


def test_a_sharded_model_gives_them_too(pair, argv, alone):
    """21 windows make 6 batches of which the last is one window; the zero-shot tasks have odd numbers too: no process waits for ever."""
    report = pair.run(*argv, "--strategy=fsdp2", verb="report").facts[1]["report"]
    for name, text in alone["perplexity"].items():
        assert report["perplexity"][name]["loss"] == pytest.approx(text["loss"], rel=1e-6)
    accuracies = [{task: figures["acc"] for task, figures in r["zeroshot"]["tasks"].items()} for r in (report, alone)]
    assert accuracies[0] == accuracies[1]
    assert report["memory"]["weights_bytes"] == alone["memory"]["weights_bytes"]
    assert report["memory"]["weights_nonzero_bytes"] == alone["memory"]["weights_nonzero_bytes"]
    assert report["memory"]["zero_tiles"] == pytest.approx(alone["memory"]["zero_tiles"])
    assert report["speed"]["decode_tokens_per_s"]["median"] > 0


def test_what_fails_on_one_is_told_by_both(pair, argv):
    done = pair.run(
        *argv[:1], "--metrics=ppl,memory", "--texts=gone=/no/such.txt", "--prompt_tokens=60", "--block_size=40", verb="report"
    )
    lines = [fact["failed"] for fact in done.facts]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert any("texts: found no file /no/such.txt" in line for line in lines[0])
    assert any("prompt_tokens, max_new_tokens: found 60 and 64" in line for line in lines[0])


@pytest.mark.parametrize(
    "rank,where,failed",
    [
        (1, "lora_dist.engine.measures.token_stream", {"stories", "wikitext2"}),
        (1, "lm_eval.api.task.ConfigurableTask.build_all_requests", {"piqa", "boolq"}),
        (0, "lm_eval.api.task.ConfigurableTask.process_results", {"piqa", "boolq"}),
    ],
)
def test_what_fails_on_one_process_only_leaves_nobody_waiting(pair, argv, rank, where, failed):
    """Both note it in its place, both go on with the next text or task, and the last metric is whole."""
    asked = ["--metrics=ppl,zeroshot,speed", "--tasks=piqa,boolq", *(word for word in argv[2:] if "max_samples" not in word)]
    done = pair.run(argv[0], *asked, "--limit=3", "--max_samples=3", verb="report", faults=[{"rank": rank, "where": where}])
    for fact in done.facts:
        report = fact["report"]
        entries = {**report["perplexity"], **report["zeroshot"]["tasks"]}
        assert {name for name, entry in entries.items() if "error" in entry} == failed
        assert all("OSError: gone here" in entries[name]["error"] for name in failed)
        assert report["speed"]["decode_tokens_per_s"]["median"] > 0
