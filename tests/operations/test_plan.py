"""The plan: what a rehearsed step counts, which choice is taken, what is said of bad input, and two cases against real runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lora_dist.arguments.planning import size
from lora_dist.cli.plan import main, split
from lora_dist.config import RunConfig
from lora_dist.engine.adapting import refuse_strategy
from lora_dist.engine.wrap import optimizer_problems, quantised_problems
from lora_dist.log import UserError
from lora_dist.operations.plan import GIB, Hardware, Planner, Rates, Rehearsal, what_fits
from lora_dist.operations.plan.choice import flags, refusal
from lora_dist.operations.plan.memory import Layout, held
from lora_dist.operations.plan.traffic import traffic
from tests.runs import ROOT
from tests.tiny import tiny_model

RATES = Rates(flops=1e12, bandwidth=1e9)


def _config(base: Path, **options: object) -> RunConfig:
    config = RunConfig()
    config.model.name_or_path, config.data.block_size = str(base), 32
    for key, value in options.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of five layers alike, and nothing else."""
    folder = tmp_path_factory.mktemp("plan") / "base"
    tiny_model(layers=5).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rehearsal(small: Path) -> Rehearsal:
    return Rehearsal(_config(small), cuda=False)


def _planner(small: Path, rehearsal: Rehearsal, memory: int, processes: int = 2, **options: object) -> Planner:
    return Planner(_config(small, **options), rehearsal, Hardware(processes, memory, RATES, cuda=False), length=32)


def test_layers_and_rows_follow_from_few(rehearsal: Rehearsal) -> None:
    """What was traced with one and two layers, or two and four rows, is what all of them would give."""
    for checkpointing in (False, True):
        whole = rehearsal._trace("fp32", None, checkpointing, 6, True, False)["none"]
        told = rehearsal.peaks("fp32", checkpointing=checkpointing, rows=6)
        for phase, peak in whole.items():
            assert told[phase].total == pytest.approx(peak.total, rel=0.01)
            assert told[phase].logits == pytest.approx(peak.logits, rel=0.01)


def test_logits_are_three_copies_wide_in_float32(rehearsal: Rehearsal) -> None:
    peak = rehearsal.peaks("bf16", checkpointing=True, rows=2)["head"]
    one = 2 * 31 * rehearsal.blueprint.vocabulary * 4
    assert 2 * one <= peak.logits <= 4 * one


def test_attention_is_never_tokens_squared(small: Path) -> None:
    config = _config(small, data__block_size=64)
    short, long = Rehearsal(_config(small), cuda=True), Rehearsal(config, cuda=True)
    peaks = [r.peaks("bf16", checkpointing=False, rows=2)["layers"].total for r in (short, long)]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.05)


def test_parameters_are_those_of_the_model(small: Path, rehearsal: Rehearsal) -> None:
    shapes = rehearsal.shapes("fp32")
    model = tiny_model(layers=5)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    assert sum(p.elements for p in shapes.base) == model.num_parameters()
    assert sum(p.elements for p in shapes.trainable) == sum(8 * (m.in_features + m.out_features) for m in linears)
    assert held(shapes, Layout("ddp", 1)).optimizer == 8 * sum(p.elements for p in shapes.trainable)


def test_sharding_and_offloading_take_from_a_rank(rehearsal: Rehearsal) -> None:
    shapes = rehearsal.shapes("fp32")
    whole = held(shapes, Layout("ddp", 4))
    cut = held(shapes, Layout("fsdp2", 4))
    assert cut.base == pytest.approx(whole.base / 4, rel=0.02) and cut.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    away = held(shapes, Layout("zero3", 4, offload_optimizer=True, offload_param=True))
    assert (away.base, away.optimizer) == (0, 0) and away.host > 0
    assert held(shapes, Layout("ddp", 1, optim="adamw_8bit")).optimizer <= whole.optimizer


def test_traffic(rehearsal: Rehearsal) -> None:
    shapes = rehearsal.shapes("fp32")
    trained = 4 * sum(p.elements for p in shapes.trainable)
    everything = sum(p.bytes for p in shapes.parameters)
    assert traffic(shapes, Layout("ddp", 4), accumulation=3, checkpointing=False).all_reduce == int(2 * 0.75 * trained)
    once, thrice = (traffic(shapes, Layout("fsdp2", 4), accumulation=n, checkpointing=False) for n in (1, 3))
    assert 0.75 * everything <= once.all_gather <= 1.5 * everything and thrice.all_gather == pytest.approx(
        3 * once.all_gather, abs=3
    )
    assert once.reduce_scatter == thrice.reduce_scatter == int(0.75 * trained)
    assert traffic(shapes, Layout("ddp", 1), accumulation=1, checkpointing=False).network == 0


def test_the_simplest_is_taken_where_all_fits(small: Path, rehearsal: Rehearsal) -> None:
    planner = _planner(small, rehearsal, GIB, train__per_device_train_batch_size=2, train__gradient_accumulation_steps=2)
    plans = planner.all()
    best = planner.best(plans)
    assert best is not None and all(plan.fits for plan in plans)
    assert (best.choice.layout.name, best.choice.precision, best.choice.checkpointing) == ("ddp", "fp32", False)
    assert all(plan.choice.micro_batch * plan.choice.accumulation * 2 >= 8 for plan in plans)


def test_a_choice_fits_by_what_it_gives_up(small: Path, rehearsal: Rehearsal) -> None:
    options = {"train__per_device_train_batch_size": 8, "train__eval_strategy": "no"}
    roomy = _planner(small, rehearsal, GIB, **options)
    configured = roomy.work_out(roomy.configured()).memory.total
    planner = _planner(small, rehearsal, configured * 2 // 3, **options)
    best = planner.best(planner.all())
    assert best is not None and best.fits and best.memory.total <= configured * 2 // 3
    assert best.choice != planner.configured()
    remedies = planner.remedies(planner.configured())
    assert remedies and all(gib * GIB <= configured * 2 // 3 for _, gib in remedies)
    assert remedies[0][0].startswith("--train.per_device_train_batch_size 4 --train.gradient_accumulation_steps 2")


def test_nothing_fits(small: Path, rehearsal: Rehearsal) -> None:
    planner = _planner(small, rehearsal, 1000)
    assert planner.best(planner.all()) is None and planner.remedies(planner.configured()) == []


@pytest.mark.long
def test_what_fits_takes_plain_numbers(small: Path) -> None:
    config = _config(small, train__per_device_train_batch_size=8, train__eval_strategy="no")
    found = what_fits(config, processes=2, cuda=False, limit_gib=1.0)
    assert found and all(text.startswith("--") and 0 < gib < 1 for text, gib in found)
    assert what_fits(config, processes=2, cuda=False, limit_gib=1e-6) == []


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_refuses_what_training_refuses(small: Path, strategy: str) -> None:
    for precision in ("fp32", "int8", "nf4"):
        for kind in ("lora", "dora", "adalora"):
            for optim, ratio in (("adamw_torch", None), ("adamw_8bit", None), ("adamw_torch", 16.0)):
                config = _config(small, adapter__type=kind, train__optim=optim, train__loraplus_lr_ratio=ratio)
                config.model.load_in_8bit, config.model.load_in_4bit = precision == "int8", precision == "nf4"
                problems = quantised_problems(config.model, strategy)
                problems += optimizer_problems(config.train, strategy, torch.device("cuda"))
                try:
                    refuse_strategy(kind, strategy)
                except UserError as error:
                    problems += error.problems
                assert (refusal(config, Layout(strategy, 2), precision) is None) == (not problems), problems


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3"])
def test_every_adapter_can_be_rehearsed(small: Path, kind: str) -> None:
    rehearsal = Rehearsal(_config(small, adapter__type=kind), cuda=True)
    assert rehearsal.peaks("bf16", checkpointing=True, rows=2)["layers"].total > 0


def test_classifiers_and_packed_rows(small: Path) -> None:
    classifier = Rehearsal(_config(small, model__task_type="SEQ_CLS", model__num_labels=3), cuda=True)
    assert any(p.shape == (3, 32) and p.trainable for p in classifier.shapes("bf16").parameters)
    plain, packed = (Rehearsal(_config(small, data__packing=on), cuda=True) for on in (False, True))
    totals = [r.peaks("bf16", checkpointing=False, rows=2)["layers"].total for r in (plain, packed)]
    assert totals[1] > totals[0]  # its mask is T x T
    assert classifier.peaks("bf16", checkpointing=False, rows=2)["layers"].total > 0


def test_quantised_bases_hold_less(rehearsal: Rehearsal) -> None:
    sizes = [sum(p.bytes for p in rehearsal.shapes(kind).base) for kind in ("fp32", "bf16", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.long
def test_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{name_or_path: {small}}}\ndata: {{block_size: 32}}\n")
    out = tmp_path / "plan.json"
    argv = [str(tmp_path / "run.yaml"), "--gpus", "2", "--gpu_memory=2GB", "--overhead", "0", "--json", str(out), "--adapter.r=4"]
    assert main(argv) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert f"NPROC=2 launch/torchrun.sh --config {tmp_path / 'run.yaml'} --adapter.r=4" in printed
    assert set(found["best"]["commands"]) == {"torchrun", "accelerate", "deepspeed"}
    for plan in found["plans"]:
        parts = {key: value for key, value in plan["memory_bytes"].items() if key not in ("total", "host")}
        assert sum(parts.values()) == plan["memory_bytes"]["total"] and plan["fits"]
    assert main([*argv, "--gpu_memory", "1KB"]) == 1
    assert "nothing fits; nearest:" in capsys.readouterr().out


def test_options_of_both_are_told_apart() -> None:
    own, of_train = split(
        ["a.yaml", "--gpus", "8", "--train.bf16", "--measure", "train.seed=1", "--strategy", "fsdp2", "--config", "b.yaml"]
    )
    assert own == ["a.yaml", "--gpus", "8", "--measure"]
    assert of_train == ["--config", "a.yaml", "--train.bf16", "train.seed=1", "--strategy", "fsdp2", "--config", "b.yaml"]


def test_all_problems_are_said_together(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{name_or_path: {small}}}\n")
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "run.yaml"), "--gpus", "0", "--gpu_memory", "much", "--train.seed", "-1"])
    assert {line.split(":")[0] for line in caught.value.problems} == {"gpus", "gpu_memory", "train.seed"}
    with pytest.raises(UserError, match=r"model\.name_or_path: found no directory"):
        main(["--model.name_or_path", str(tmp_path / "none")])
    with pytest.raises(UserError, match="context of 64"):
        main(["--model.name_or_path", str(small), "--data.block_size", "65"])


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * GIB), ("512MiB", 2**29), ("1.5G", 3 * GIB // 2), ("7", 7), ("x", None)]
)
def test_sizes(text: str, expected: int | None) -> None:
    assert size(text) == expected


def test_flags_say_what_differs(small: Path, rehearsal: Rehearsal) -> None:
    planner = _planner(small, rehearsal, GIB)
    now = planner.configured()
    assert flags(now, now) == []
    assert flags(dataclasses.replace(now, checkpointing=True), now) == ["--train.gradient_checkpointing true"]


@pytest.mark.long
@pytest.mark.parametrize("case", ["bf16", "fp32-checkpointing"])
def test_within_a_tenth_of_the_measured_peak(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("measure_plan", ROOT / "scripts" / "measure_plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "measure_plan", module)
    spec.loader.exec_module(module)
    assert module.measure(case, True).ratio == pytest.approx(1.0, abs=0.1)
