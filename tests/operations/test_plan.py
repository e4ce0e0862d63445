"""The plan: what a rehearsed step counts, which choice is taken, what is said of bad input, and two cases against real runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from lora_dist.arguments.planning import size
from lora_dist.cli.plan import main, split
from lora_dist.config import RunConfig
from lora_dist.engine.adapting import recompute_first, refuse_strategy
from lora_dist.engine.wrap import optimizer_problems, quantised_problems
from lora_dist.log import UserError
from lora_dist.models.chunked import CHUNK_BYTES
from lora_dist.operations.plan import GIB, Hardware, Planner, Rates, Rehearsal, rehearse, what_fits
from lora_dist.operations.plan.choice import flags, refusal
from lora_dist.operations.plan.memory import Layout, held
from lora_dist.operations.plan.show import table
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


def test_whole_logits_are_three_copies_wide_in_float32_and_chunks_end(small: Path) -> None:
    for asked, tokens in (("logits", 2 * 31), ("auto", CHUNK_BYTES["cpu"] // 4 // 128)):
        config = _config(small, train__cross_entropy=asked, data__block_size=32 if asked == "logits" else 2**17)
        rehearsal = Rehearsal(config, cuda=False)
        assert rehearsal.blueprint.vocabulary == 128
        peak = rehearsal.peaks("fp32", checkpointing=True, rows=2)["head"]
        assert 1 * tokens * 128 * 4 <= peak.logits <= 4 * tokens * 128 * 4


def test_a_softmax_in_another_precision_makes_its_input_anew(small: Path) -> None:
    """Logits in bfloat16 and float32, and the float32 that torch turns the first into: 10 bytes each, in float32 8."""
    for precision, wide in (("fp32", 8), ("bf16", 10)):
        rehearsal = Rehearsal(_config(small, data__block_size=64), cuda=True)
        peak = rehearsal.peaks(precision, checkpointing=True, rows=2, exact=True)["head"]
        assert peak.logits == wide * 2 * 63 * 128


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


def test_kept_tiles_take_less_of_everything(small: Path, rehearsal: Rehearsal) -> None:
    """Half of the tiles, where no mask is stored; the matrix that layers are unpacked into is in the step's own peak."""
    dense, tiles = rehearsal, Rehearsal(_config(small, model__storage="blocks"), cuda=False)
    model = tiny_model(layers=5)
    pruned = 0
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and "layers" in name:
            P, Q = -(-linear.out_features // 16), -(-linear.in_features // 16)
            pruned += linear.weight.numel() - 256 * ((P * Q + 1) // 2)  # as in `_half`, edge tiles filled up
    a, b = dense.shapes("fp32"), tiles.shapes("fp32")
    assert sum(p.elements for p in a.base) - sum(p.elements for p in b.base) == pruned > 0
    assert held(a, Layout("ddp", 1)).base - held(b, Layout("ddp", 1)).base == 4 * pruned
    sent = [traffic(s, Layout("zero3", 2), accumulation=1, checkpointing=False).all_gather for s in (a, b)]
    assert sent[0] - sent[1] == pytest.approx(2 * 4 * pruned / 2, abs=2)
    peaks = [r.peaks("fp32", checkpointing=False, rows=2)["layers"].total for r in (dense, tiles)]
    assert 0 <= peaks[1] - peaks[0] <= 2 * 4 * 48 * 32


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
    limit = configured * 5 // 6
    planner = _planner(small, rehearsal, limit, **options)
    best = planner.best(planner.all())
    assert best is not None and best.fits and best.memory.total <= limit
    assert best.choice != planner.configured()
    remedies = planner.remedies(planner.configured())
    assert remedies and all(gib * GIB <= limit for _, gib in remedies)
    assert remedies[0][0].startswith("--train.per_device_train_batch_size 4 --train.gradient_accumulation_steps 2")


def test_as_few_layers_are_recomputed_as_it_takes(small: Path, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train__per_device_train_batch_size": 8, "train__eval_strategy": "no", "train__gradient_checkpointing": True}
    without, all_ = (
        (planner := _planner(small, rehearsal, GIB, **options | {"train__gradient_checkpointing": on}))
        .work_out(planner.configured())
        .memory.total
        for on in (False, True)
    )
    assert _planner(small, rehearsal, without, **options).fewest_layers() == (0, without)
    assert _planner(small, rehearsal, all_ - 1, **options).fewest_layers() is None
    found = _planner(small, rehearsal, (without + all_) // 2, **options).fewest_layers()
    half = (without + all_) // 2
    assert found is not None and found[0] == 2 and all_ < found[1] <= half  # of four: the last is recomputed at once

    # What a configuration with auto is changed to says so: its auto stands in the YAML, and wants checkpointing.
    auto = _planner(small, rehearsal, half, **options | {"train__gradient_checkpointing_layers": "auto"})
    now = auto.configured()
    assert (now.checkpointing, now.layers) == (True, 2)
    assert _planner(small, rehearsal, 1, **options | {"train__gradient_checkpointing_layers": "auto"}).configured().layers == 5
    off = flags(dataclasses.replace(now, checkpointing=False, layers=None), now)
    assert off == ["--train.gradient_checkpointing_layers all", "--train.gradient_checkpointing false"]

    # The line between none and all is what a step with so many layers recomputed takes.
    def first_two(model: Any, on: bool, kernels: Any) -> None:
        set_checkpointing(model, True, kernels)
        recompute_first(model.get_base_model(), "2")

    told = rehearsal.peaks("fp32", checkpointing=2 / 5, rows=6)["layers"].total
    set_checkpointing = rehearse._set_checkpointing
    monkeypatch.setattr(rehearse, "_set_checkpointing", first_two)
    assert told == pytest.approx(rehearsal._trace("fp32", None, True, 6, True, False)["none"]["layers"].total, rel=0.03)


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


def test_mixtures_of_experts_can_be_rehearsed_in_every_precision(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
    MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"]).save_pretrained(
        tmp_path
    )
    rehearsal = Rehearsal(_config(tmp_path), cuda=True)
    experts = sum(p.elements for p in rehearsal.shapes("fp32").base if len(p.shape) == 3)
    assert experts == 3 * 4 * (3 * 32 * 64)  # layers, experts, gate, up and down
    fp32, bf16 = (rehearsal.peaks(kind, checkpointing=False, rows=2)["layers"].total for kind in ("fp32", "bf16"))
    assert 0 < bf16 < fp32 < 2.1 * bf16


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
@pytest.mark.parametrize("case", ["fp32-4-rows", "bf16-checkpointing"])
def test_within_a_tenth_of_the_measured_peak(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cases that are large enough: kernels' scratch memory, which other CPUs have other kernels for, is some 10 to 20 MiB."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("measure_plan", ROOT / "scripts" / "measure_plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "measure_plan", module)
    spec.loader.exec_module(module)
    assert module.measure(case, True).ratio == pytest.approx(1.0, abs=0.1)


def test_a_teacher_is_held_as_the_strategy_has_it(small: Path, rehearsal: Rehearsal, tmp_path: Path) -> None:
    """Its weights and its hidden states of two rows of 32 tokens; cut, also its head, whole; on disk, nothing."""
    dense = tmp_path / "dense"
    model = tiny_model(layers=3)
    model.config.save_pretrained(dense)
    weights, hidden, head = model.num_parameters(), 64 * 32, 128 * 32
    planners = {
        how: _planner(small, rehearsal, GIB, train__distill_from=str(dense), train__per_device_train_batch_size=2, **options)
        for how, options in {
            "live": {},
            "layers": {"train__distill_hidden_weight": 1.0, "train__distill_hidden": "layers"},
            "cached": {"train__distill_cache": "cache"},
        }.items()
    }
    plans = {how: planner.work_out(planner.configured()) for how, planner in planners.items()}
    assert plans["live"].memory.teacher == 4 * (weights + hidden)
    assert plans["layers"].memory.teacher == 4 * (weights + (1 + 3) * hidden)
    assert plans["cached"].memory.teacher == 0
    assert plans["live"].memory.total - plans["cached"].memory.total == plans["live"].memory.teacher
    assert plans["live"].tokens_per_s < plans["cached"].tokens_per_s
    now = planners["live"].configured()
    cut = planners["live"].work_out(dataclasses.replace(now, layout=Layout("fsdp2", 2, cuda=False), precision="bf16"))
    assert cut.memory.teacher == pytest.approx(2 * (weights / 2 + hidden + head), rel=0.01)
    assert "teacher" in table([plans["live"]]) and "teacher" not in table([plans["cached"]])
