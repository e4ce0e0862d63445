"""Zero-shot accuracy: lm-eval's own prompts, and the figures of `lm_eval` called directly on the same files."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.evaluation.harness import WorldLM
from lora_dist.evaluation.zeroshot import LOCAL_TASKS, TASKS, ZeroShotArgs, means, zero_shot
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.evaluation.conftest import COUNT, hub_rows
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer

METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def no_bar(batches, label):
    return lambda: None


def ours(model, tokenizer, **options):
    args = ZeroShotArgs(**{"tasks": tuple(TASKS), "batch_size": 3, "context": CONTEXT, **options})
    return zero_shot(model, tokenizer, args, world=World(), progress=no_bar)


def directly(model, tokenizer, folder, *, limit=None, context=CONTEXT, num_fewshot=0, tasks=tuple(TASKS)):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5, max_length=context)
    manager = TaskManager(include_defaults=False, include_path=str(LOCAL_TASKS), metadata={"task_data": str(folder)})
    names = [f"local_{task}" for task in tasks]
    return simple_evaluate(lm, tasks=names, limit=limit, task_manager=manager, num_fewshot=num_fewshot, log_samples=True)


def assert_equal(found, direct, tasks=tuple(TASKS)):
    for task in tasks:
        theirs = {key.removesuffix(",none"): value for key, value in direct["results"][f"local_{task}"].items()}
        assert {m: found["tasks"][task].get(m) for m in METRICS} == {m: theirs.get(m) for m in METRICS}, task


@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_the_figures_are_lm_evals(task_data, num_fewshot):
    model, tokenizer = tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    found = ours(model, tokenizer, task_data=str(task_data), num_fewshot=num_fewshot)
    assert_equal(found, directly(model, tokenizer, task_data, num_fewshot=num_fewshot))
    assert {task["questions"] for task in found["tasks"].values()} == {COUNT}
    accuracies = [task["acc"] for task in found["tasks"].values()]
    assert found["mean_acc"] == pytest.approx(sum(accuracies) / 7) and len(set(accuracies)) > 1
    assert found["mean_acc_norm"] == pytest.approx(sum(t.get("acc_norm", t["acc"]) for t in found["tasks"].values()) / 7)


def test_real_model_and_files(data_dir):
    """stories260K on the local files, whose passages are longer than its context of 512."""
    folder = data_dir / "multiple-choice"
    model = AutoModelForCausalLM.from_pretrained(data_dir / "stories260K").eval()
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260K")
    found = ours(model, tokenizer, task_data=str(folder), limit=4, context=512, batch_size=8)
    assert_equal(found, directly(model, tokenizer, folder, limit=4, context=512))
    assert found["tasks"]["boolq"]["truncated"] > 0 and found["tasks"]["piqa"]["truncated"] == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_log_likelihoods_are_lm_evals(kind):
    """With and without answers of one token, which share a row, and with contexts that are cut off from the left."""
    model, tokenizer = tiny_model(kind, vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    pairs = [
        ("the old bird", " sings"),
        ("the old bird", " flows"),
        ("a", "b"),
        ("a", "c"),
        ("river " * 30, "stone"),
        ("", "home"),
    ]
    lm = WorldLM(model, tokenizer, world=World(), batch_size=2, context=CONTEXT, sharded=False, progress=lambda n: lambda: None)
    direct = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)

    class Request:
        def __init__(self, pair):
            self.args, self.task_name = pair, "t"

    mine, theirs = (each.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True) for each in (lm, direct))
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], rel=1e-5)
    assert lm.truncated == 1


def test_an_answer_longer_than_the_context_is_scored_in_pieces():
    model, tokenizer = tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    lm = WorldLM(model, tokenizer, world=World(), batch_size=2, context=8, sharded=False, progress=lambda n: lambda: None)
    start, answer = [5, 6, 7], [11 + i % 5 for i in range(10)]
    [(found, greedy), _] = lm._loglikelihood_tokens([(None, start, answer), (None, start, [9])])
    whole, expected, likeliest = start + answer, 0.0, True
    for first in (0, 4, 8):  # pieces of half a context, behind what fits in front of each
        piece = answer[first : first + 4]
        before = whole[: len(start) + first + len(piece)][-9:-1]
        logprobs = model(torch.tensor([before])).logits[0, -len(piece) :].detach().log_softmax(-1)
        expected += float(sum(row[token] for row, token in zip(logprobs, piece, strict=True)))
        likeliest = likeliest and logprobs.argmax(-1).tolist() == piece
    assert found == pytest.approx(expected, rel=1e-5) and greedy == likeliest
    assert lm.truncated == 1


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_lm_evals_own_tasks(task, task_data):
    """The same rows through lm-eval's definition for the hub, and through the one for local files."""
    rows = datasets.Dataset.from_list(hub_rows(task))
    theirs = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / TASKS[task]))
    config = load_yaml(theirs.task_index[task].yaml_path)
    config |= {"custom_dataset": lambda **_: {"train": rows, "validation": rows}, "test_split": None}
    own = TaskManager(include_defaults=False, include_path=str(LOCAL_TASKS), metadata={"task_data": str(task_data)})
    loaded = [ConfigurableTask(config=config), own.load([f"local_{task}"])["tasks"][f"local_{task}"]]
    for each in loaded:
        each.set_config("num_fewshot", 0)
        each.build_all_requests()
    requests = [[request.args for request in each.instances] for each in loaded]
    assert requests[0] == requests[1] and len(requests[0]) >= 2 * COUNT
    assert [set(each.aggregation()) for each in loaded] == [
        {"acc"} if task in ("boolq", "winogrande") else {"acc", "acc_norm"}
    ] * 2
    choices = len(requests[0]) // COUNT
    for doc, other in zip(loaded[0].eval_docs, loaded[1].eval_docs, strict=True):
        for likeliest in range(choices):  # the right answer is the same one
            answers = [(0.0 if i == likeliest else -1.0, False) for i in range(choices)]
            assert loaded[0].process_results(doc, answers)["acc"] == loaded[1].process_results(other, answers)["acc"]


def test_a_task_that_fails_leaves_the_others(task_data, tmp_path):
    for task in ("piqa", "arc_easy"):
        (tmp_path / f"{task}.jsonl").write_text((task_data / f"{task}.jsonl").read_text())
    model, tokenizer = tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    found = ours(model, tokenizer, tasks=("piqa", "boolq", "arc_easy"), task_data=str(tmp_path))
    assert found["tasks"]["boolq"]["error"].startswith("task_data: found none in")
    assert (
        found["tasks"]["piqa"]["acc"] == ours(model, tokenizer, tasks=("piqa",), task_data=str(task_data))["tasks"]["piqa"]["acc"]
    )
    assert "acc" in found["tasks"]["arc_easy"] and found["mean_acc"] is None


def test_a_task_of_ones_own_by_its_file(task_data):
    own = f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{task_data / "piqa.jsonl"}"}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    file = task_data / "mine.yaml"
    file.write_text(own)
    found = ours(tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), tasks=(str(file),), task_data=str(task_data))
    assert found["tasks"][str(file)]["questions"] == COUNT and 0 <= found["tasks"][str(file)]["acc"] <= 1


def test_lm_eval_is_quiet_but_what_matters_is_told(task_data, tmp_path, capfd):
    model, tokenizer = tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    found = ours(model, tokenizer, tasks=("piqa",), task_data=str(task_data))
    shown = capfd.readouterr()
    assert shown.out == shown.err == "" and "warnings" not in found
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f'{{"query": "q{i}", "choices": ["a", "b"], "gold": {7 * i}}}\n' for i in range(2)))
    broken = tmp_path / "broken.yaml"  # its second question has no right answer, of which lm-eval warns
    broken.write_text(
        f'task: broken\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: "{questions}"}}}}\n'
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: query\ndoc_to_target: gold\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = ours(model, tokenizer, tasks=(str(broken),))
    assert any("Label index was not in within range" in note for note in found.get("warnings", [])), found
    assert logging.getLogger("lm_eval").propagate


def test_without_lm_eval_the_extra_is_named(monkeypatch, task_data):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    with pytest.raises(UserError, match=r"found no lm-eval, expected it installed: pip install 'lora-dist\[evaluation\]'"):
        ours(tiny_model(), tiny_tokenizer(), task_data=str(task_data))


def test_means_need_every_task():
    assert means({"a": {"acc": 0.5, "acc_norm": 0.7}, "b": {"acc": 0.3}}) == {"mean_acc": 0.4, "mean_acc_norm": 0.5}
    assert means({"a": {"acc": 0.5}, "b": {"error": "x"}}) == {"mean_acc": None, "mean_acc_norm": None}


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    found = ours(tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), tasks=("piqa", "winogrande"), limit=1)
    for task, repo in (("piqa", "baber/piqa"), ("winogrande", "allenai/winogrande")):
        assert found["tasks"][task]["error"].startswith(f"task_data: found none, nor the data set {repo}"), found
        assert "set task_data to a folder of local files, HF_ENDPOINT" in found["tasks"][task]["error"]
