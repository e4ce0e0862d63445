"""Every strategy on real processes: it is in force, it trains what one process trains, and its checkpoints are everyone's.

Two groups of workers, of one process and of two, run all jobs of this file (`group.py`). `make test-long` adds what takes longest, and
`make matrix` the pairs of strategies.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options, records
from tests.tiny import save_dense

pytestmark = pytest.mark.distributed

STEPS = 50
STRATEGIES = {
    "ddp": {},
    "fsdp2": {},
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero1-offload": {"parallel__offload_optimizer": "cpu"},
    "zero2-offload": {"parallel__offload_optimizer": "cpu"},
    "zero3-offload": {"parallel__offload_optimizer": "cpu"},
    "zero3-offload-all": {"parallel__offload_optimizer": "cpu", "parallel__offload_param": "cpu"},
}
PLAIN = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def strategy_options(name: str) -> dict[str, object]:
    extra = dict(STRATEGIES[name])
    if name.startswith("zero3"):  # tiny parameters would all stay whole
        extra["parallel__ds_config"] = str(Path(__file__).with_name("zero3_small.json"))
    return {"parallel__strategy": name.split("-")[0], **extra}


@pytest.fixture(scope="module")
def arguments(tiny_base, tiny_text):
    """`train` options of a run; the global batch is 4 windows however many processes there are."""

    def make(out: Path, strategy: str, processes: int, **train: object) -> list[str]:
        values: dict[str, object] = {
            "adapter__lora_dropout": 0,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4 // processes,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
            "guard__every": 10,
        }
        return options(tiny_base, tiny_text, out, **{**values, **strategy_options(strategy), **train})

    return make


# --- equal to one process --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(groups, arguments, tmp_path_factory):
    """The run that all others are compared with: one process, float32, no strategy to speak of."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = groups[1].run(*arguments(out, "ddp", 1, max_steps=STEPS, warmup_steps=5, lr_scheduler_type="cosine"))
    return out, done


def check_in_force(name: str, facts: list[dict], total: int, trainable: int) -> None:
    """Read off the wrapped models, rank by rank."""
    stage = int(name[4]) if name.startswith("zero") else None
    for fact in facts:
        if stage is not None:
            assert fact["engine"] == "deepspeed.runtime.engine.DeepSpeedEngine"
            assert fact["stage"] == stage
            assert fact["optimizer"] == ("DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer")
            assert fact["gradient_partitions"] == (stage >= 2)
            assert fact["offload_optimizer"] == ("offload" in name)
            assert fact["offload_param"] == (name == "zero3-offload-all")
        elif name == "fsdp2":
            assert fact["placements"] == ["(Shard(dim=0),)"]
            assert fact["units"] == 2 + 2 + 1  # two decoder layers, embedding and head, the root
        else:
            assert fact["placements"] == ["whole"]
    if name == "fsdp2" or stage == 3:
        # An odd number of rows (99 tokens) leaves one process a row more, and padding in memory.
        held = [fact["base_elements"] for fact in facts]
        assert total <= sum(held) <= total * 1.01
        assert max(held) <= total * 0.51
        assert all(4 * fact["base_elements"] <= fact["base_bytes"] <= 4 * fact["base_elements"] * 1.01 for fact in facts)
        assert sum(fact["trainable_elements"] for fact in facts) <= trainable * 1.05
        assert max(fact["trainable_elements"] for fact in facts) <= trainable * 0.55
    else:
        assert all(fact["base_elements"] == total for fact in facts)
    if stage == 3:
        assert all(fact["whole_elements"] == 0 for fact in facts)


def check_norms(facts: list[dict], saved: dict[str, torch.Tensor]) -> None:
    """The norms that all processes count on their pieces are those of the tensors that were gathered and written."""
    written = {name: float(tensor.double().norm()) for name, tensor in saved.items()}
    for fact in facts:
        live = {name.replace(".default.", "."): norm for name, norm in fact["norms"].items()}
        assert live == pytest.approx(written, rel=1e-6, abs=0)
    assert sum(norm > 0 for norm in written.values()) > 20


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long) if n.startswith(("zero1-offload", "zero3-offload")) else n for n in STRATEGIES],
)
def test_two_processes_train_what_one_does(name, groups, arguments, one_process, tmp_path):
    reference, alone = one_process
    done = groups[2].run(*arguments(tmp_path / "run", name, 2, max_steps=STEPS, warmup_steps=5, lr_scheduler_type="cosine"))
    a, b = losses(reference), losses(tmp_path / "run")
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    worst = max(abs(b[step] - a[step]) / a[step] for step in a)
    difference = largest_relative_difference(adapter(reference), adapter(tmp_path / "run"))
    print(f"{name}: losses differ by {worst:.1e} relative at most, adapter tensors by {difference:.1e} of their norm")
    assert worst < 1e-5
    assert difference < 1e-5
    assert a[STEPS] < a[1]
    check_in_force(name, done.facts, alone.facts[0]["base_elements"], alone.facts[0]["trainable_elements"])
    check_norms(done.facts, adapter(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("fsdp2", "bf16"), ("zero2", "fp16"), pytest.param("zero3", "bf16", marks=pytest.mark.long),
        *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in (("zero2", "bf16"), ("fsdp2", "fp16"), ("zero3", "fp16"))),
    ],
)  # fmt: skip
def test_half_precision_means_the_same(name, precision, groups, arguments, tmp_path):
    """Rounding differs, and half precision enlarges it; but much less than half precision itself changes a run."""
    groups[2].run(*arguments(tmp_path / "full", "ddp", 2, max_steps=10))
    for strategy in ("ddp", name):
        groups[2].run(*arguments(tmp_path / strategy, strategy, 2, max_steps=10, **{precision: True}))
    full, ddp, other = (losses(tmp_path / run) for run in ("full", "ddp", name))
    assert max(abs(other[s] - ddp[s]) / ddp[s] for s in ddp) < 5e-4
    by_precision = largest_relative_difference(adapter(tmp_path / "full"), adapter(tmp_path / "ddp"))
    by_strategy = largest_relative_difference(adapter(tmp_path / "ddp"), adapter(tmp_path / name))
    print(f"{precision} changes the adapter by {by_precision:.1e} of its norm, {name} by {by_strategy:.1e}")
    assert by_strategy < by_precision / 2
    assert max(abs(ddp[s] - full[s]) / full[s] for s in full) > 1e-7  # it was half precision
    if precision == "fp16":
        rows = records(tmp_path / name, "train")
        assert rows[-1]["loss_scale"] == 2**16 and rows[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_dense_model_teaches_two_processes_what_it_teaches_one(name, groups, arguments, tmp_path):
    """Cut over the processes; more of it in test_distill.py."""
    shared = {"distill_from": save_dense(tmp_path / "dense"), "distill_hidden_weight": 0.5, "max_steps": 4}
    groups[1].run(*arguments(tmp_path / "one", "ddp", 1, **shared))
    groups[2].run(*arguments(tmp_path / "two", name, 2, **shared))
    for key in ("loss", "ce_loss", "kl_loss", "hidden_loss"):
        one, two = ([row[key] for row in records(tmp_path / run, "train")] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5) and len(one) == 4


@pytest.mark.parametrize("name", ["fsdp2", "zero1", pytest.param("zero3", marks=pytest.mark.long)])
def test_gradient_checkpointing_changes_nothing(name, groups, arguments, tmp_path):
    for on in (False, True):
        groups[2].run(*arguments(tmp_path / str(on), name, 2, max_steps=5, gradient_checkpointing=on, adapter__lora_dropout=0.1))
    assert_identical(tmp_path / "False", tmp_path / "True")


@pytest.mark.parametrize("name", ["fsdp2", "zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_the_best_adapter_is_put_back(name, groups, arguments, tmp_path):
    """Too high a rate ruins the model after the first evaluations: what is kept is the best, in every copy there is."""
    shared = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    out = tmp_path / "run"
    groups[2].run(*arguments(out, name, 2, max_steps=12, learning_rate=0.3, max_grad_norm=0, warmup_steps=4, **shared))
    evaluations = {row["step"]: row["eval_loss"] for row in records(out, "eval")}
    best = min(evaluations, key=evaluations.__getitem__)
    assert 0 < best < 12, evaluations
    assert records(out, "final")[0]["eval_loss"] == pytest.approx(evaluations[best], rel=1e-7)
    saved = load_file(out / f"checkpoint-{best}" / "adapter" / "adapter_model.safetensors")
    final = adapter(out)
    assert all(torch.equal(saved[key], final[key]) for key in saved)


# --- one checkpoint for all ------------------------------------------------------------------------------------------------------

SEGMENT = 3


@pytest.fixture(scope="module")
def uninterrupted(groups, arguments, tmp_path_factory):
    """Losses of one process for as many steps as any chain of this file takes."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    groups[1].run(*arguments(out, "ddp", 1, max_steps=SEGMENT * (len(PLAIN) * (len(PLAIN) - 1) + 1)))
    return losses(out)


def run_chain(groups, arguments, out: Path, chain: list[tuple[str, int]]) -> dict[int, float]:
    """Train `SEGMENT` steps under each (strategy, processes), each going on from the checkpoint of the one before."""
    for number, (name, processes) in enumerate(chain, start=1):
        done = groups[processes].run(
            *arguments(out, name, processes, max_steps=SEGMENT * number, save_strategy="steps", save_steps=SEGMENT),
            "--resume=auto",
        )
        assert ("Resuming from" in done.output) == (number > 1)
        assert len(done.ranks) == processes
        assert done.facts[0]["strategy"] == {"d": "Replicated", "f": "FullySharded", "z": "Zero"}[name[0]]
    return losses(out)


def assert_joined(found: dict[int, float], whole: dict[int, float]) -> None:
    worst = max(abs(found[step] - whole[step]) / whole[step] for step in found)
    print(f"{len(found)} steps, losses differ by {worst:.1e} relative at most")
    assert list(found) == list(range(1, len(found) + 1))
    assert worst < 1e-5


def every_ordered_pair(names: list[str]) -> list[str]:
    """A walk that goes from each name to each other name exactly once (an Eulerian circuit, by Hierholzer)."""
    left = {a: [b for b in names if b != a] for a in names}
    stack, walk = [names[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def test_the_walk_takes_every_pair_once():
    walk = every_ordered_pair(PLAIN)
    assert sorted(itertools.pairwise(walk)) == sorted(itertools.permutations(PLAIN, 2))


@pytest.mark.long
def test_each_strategy_resumes_what_each_other_saved(groups, arguments, uninterrupted, tmp_path):
    """All ordered pairs of strategies in one run, on 2, 1, 2, 1, ... processes."""
    walk = every_ordered_pair(PLAIN)
    chain = [(name, 2 - number % 2) for number, name in enumerate(walk)]
    assert_joined(run_chain(groups, arguments, tmp_path / "run", chain), uninterrupted)


@pytest.mark.parametrize(
    "name",
    [
        "ddp", "fsdp2", "zero3",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("zero1", "zero2")),
        *(pytest.param(name, marks=pytest.mark.matrix) for name in STRATEGIES if name not in PLAIN),
    ],
)  # fmt: skip
def test_the_same_strategy_resumes_exactly(name, groups, arguments, tmp_path):
    """Two processes, stopped and resumed, against two processes that went on: bit for bit, with dropout."""
    shared = {"save_strategy": "steps", "save_steps": 3, "adapter__lora_dropout": 0.1}
    groups[2].run(*arguments(tmp_path / "whole", name, 2, max_steps=8, **shared))
    groups[2].run(*arguments(tmp_path / "parts", name, 2, max_steps=3, **shared))
    groups[2].run(*arguments(tmp_path / "parts", name, 2, max_steps=8, **shared), "--resume=auto")
    assert_identical(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.matrix
@pytest.mark.parametrize(("first", "second"), list(itertools.product(STRATEGIES, STRATEGIES)))
def test_two_one_two(first, second, groups, arguments, uninterrupted, tmp_path):
    """Saved under one strategy on two processes, resumed under another on one, and again on two under the first."""
    chain = [(first, 2), (second, 1), (first, 2)]
    assert_joined(run_chain(groups, arguments, tmp_path / "run", chain), uninterrupted)


# --- what a checkpoint holds -----------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_checkpoints_of_all_strategies_have_the_same_files(groups, arguments, tmp_path):
    """Names, shapes and dtypes of adapter and optimizer; and their values, to rounding."""
    found = {}
    for name in STRATEGIES:
        out = tmp_path / name
        groups[2].run(*arguments(out, name, 2, max_steps=3, save_strategy="steps", save_steps=3))
        folder = out / "checkpoint-3"
        found[name] = {
            "adapter": load_file(folder / "adapter" / "adapter_model.safetensors"),
            "optimizer": load_file(folder / "optimizer.safetensors"),
            "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()),
            "identity": {
                k: json.loads((folder / "manifest.json").read_text())[k] for k in ("base_fingerprint", "pattern_digest")
            },
        }
    reference = found["ddp"]
    for name, other in found.items():
        assert other["files"] == reference["files"] and other["identity"] == reference["identity"], name
        for part in ("adapter", "optimizer"):
            a, b = reference[part], other[part]
            assert {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}, name
            # A gathered tensor that came back empty or cut would be 0; a factor whose tiles are all pruned is 0 everywhere.
            assert {k for k, t in a.items() if t.any()} == {k for k, t in b.items() if t.any()}, name
            assert largest_relative_difference(a, b) < 1e-4, name
    assert sum(bool(t.any()) for t in reference["adapter"].values()) > 20
    assert all(math.isclose(float(t), 3.0) for k, t in reference["optimizer"].items() if k.endswith(".step"))
