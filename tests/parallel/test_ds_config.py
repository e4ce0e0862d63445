"""DeepSpeed's JSON: what is filled in from the run, what contradicts it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lora_dist.log import UserError
from lora_dist.parallel.ds_config import resolve_strategy, stage_of, zero_config
from tests.parallel.facts import FACTS


def write(folder: Path, tree: object) -> Path:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def complete(path, *, stage=2, facts=FACTS, optimizer="auto", param="auto", nvme=None):
    return zero_config(stage, path, facts, offload_optimizer=optimizer, offload_param=param, nvme_path=nvme)


def zero(stage=2, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


def problems(path, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        complete(path, **options)
    prefix = f"parallel.ds_config: {path}: "
    return [line.removeprefix(prefix) for line in caught.value.problems]


# --- reading ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 2},\n  }', "line 2, column 3: not JSON"),
        ("[1]", "found [1], expected an object with zero_optimization in it"),
        ("{}", "zero_optimization.stage: found nothing, expected 1, 2 or 3"),
        ('{"zero_optimization": true}', "zero_optimization.stage: found nothing, expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage: found 0, expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage: found "auto", expected 1, 2 or 3'),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage: found true, expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "found stage twice, expected it once"),
    ],
)
def test_a_file_without_a_stage_is_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        stage_of(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"parallel.ds_config: {path}: {message}")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"absent.json: cannot be read \(No such file or directory\), expected DeepSpeed's JSON"):
        stage_of(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="binary.json: not text in UTF-8"):
        stage_of(tmp_path / "binary.json")


def test_the_strategy_is_the_files_stage(tmp_path):
    path = str(write(tmp_path, zero(3)))
    assert resolve_strategy("auto", None) == "ddp"
    assert resolve_strategy("fsdp2", None) == "fsdp2"
    assert resolve_strategy("auto", path) == resolve_strategy("zero3", path) == "zero3"
    for named in ("ddp", "fsdp2", "zero2"):
        with pytest.raises(UserError) as caught:
            resolve_strategy(named, path)
        assert str(caught.value) == (
            f"parallel.strategy: found {named}, but parallel.ds_config {path} asks for zero3: "
            "set parallel.strategy zero3 or auto, or another file"
        )
    assert problems(path, stage=2) == ["zero_optimization.stage is 3, parallel.strategy zero2"]


# --- filling and contradicting ------------------------------------------------------------------------------------------------


def test_absent_auto_and_equal_values_all_give_the_runs(tmp_path):
    wanted, _ = complete(write(tmp_path, zero()))
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    for values in (["auto"] * 4, [None] * 4, [24, 2, 4, 0.5]):
        config, _ = complete(write(tmp_path, zero() | dict(zip(names, values, strict=True))))
        assert config == wanted
    assert [wanted[name] for name in names] == [24, 2, 4, 0.5]


def test_notes_say_what_was_filled_in_and_left_out(tmp_path):
    tree = zero(reduce_bucket_size="auto") | {
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": 24, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW"}, "activation_checkpointing": {"partition_activations": False},
    }  # fmt: skip
    path = write(tmp_path, tree)
    _, notes = complete(path)
    prefix = f"parallel.ds_config: {path}: "
    assert notes == [
        f"{prefix}filled in from the run: train_micro_batch_size_per_gpu 2, zero_optimization.reduce_bucket_size 4096",
        f"{prefix}left out: activation_checkpointing (train.gradient_checkpointing decides), "
        "optimizer (train.learning_rate and the train.adam_* options make the AdamW)",
    ]


def test_all_contradictions_are_reported_together(tmp_path):
    tree = zero(2, zero_quantized_weights=True, foo="auto") | {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 8, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5, "total_num_steps": 7}},
    }  # fmt: skip
    same = 'set one as the other, or "auto"'
    assert problems(write(tmp_path, tree)) == [
        "zero_optimization.zero_quantized_weights is on: it rounds the frozen base, which lora-dist keeps as it is: take it out",
        "train_batch_size is 64, train.per_device_train_batch_size 2 x train.gradient_accumulation_steps 4 x processes 3 is 24: "
        + same,
        f"train_micro_batch_size_per_gpu is 8, train.per_device_train_batch_size 2: {same}",
        f"gradient_accumulation_steps is 8, train.gradient_accumulation_steps 4: {same}",
        f"gradient_clipping is 1.0, train.max_grad_norm 0.5: {same}",
        f"bf16.enabled is true, train.bf16 false: {same}",
        f"optimizer.params.lr is 0.0003, train.learning_rate 0.0001: {same}",
        f"optimizer.params.betas is [0.9, 0.95], train.adam_beta1 0.9, train.adam_beta2 0.999: {same}",
        f"scheduler.params.warmup_num_steps is 5, train.warmup_steps 10: {same}",
        f"scheduler.params.total_num_steps is 7, train.max_steps 100: {same}",
        'zero_optimization.foo is "auto", which lora-dist has no value for: set one, or take it out',
    ]


def test_sizes_are_filled_only_where_they_are_auto(tmp_path):
    auto = {"stage3_prefetch_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": "auto"}
    config, _ = complete(write(tmp_path, zero(3, reduce_bucket_size=5e8, **auto)), stage=3)
    assert config["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 3686, "stage3_gather_16bit_weights_on_model_save": False,
    }  # fmt: skip


def test_clipping_can_be_turned_off(tmp_path):
    config, _ = complete(write(tmp_path, zero()), facts=dataclasses.replace(FACTS, max_grad_norm=0.0))
    assert config["gradient_clipping"] == 0.0  # absent would be DeepSpeed's 1.0


@pytest.mark.parametrize("key", ["bf16", "fp16"])
@pytest.mark.parametrize("run", [False, True])
def test_precision_sections_must_agree_and_are_left_out(tmp_path, key, run):
    facts = dataclasses.replace(FACTS, **{key: run})
    for enabled in ("auto", run, None):
        config, _ = complete(write(tmp_path, zero() | {key: {"enabled": enabled, "loss_scale": 0}}), facts=facts)
        assert key not in config
    found = problems(write(tmp_path, zero() | {key: {"enabled": not run}}), facts=facts)
    text = {True: "true", False: "false"}
    assert found == [f'{key}.enabled is {text[not run]}, train.{key} {text[run]}: set one as the other, or "auto"']


def test_precision_that_lora_dist_does_not_compute_in_is_refused(tmp_path):
    tree = zero() | {
        "fp16": {"enabled": True, "loss_scale": 128, "fp16_master_weights_and_grads": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "amp": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"},
    }  # fmt: skip
    found = problems(write(tmp_path, tree), facts=dataclasses.replace(FACTS, fp16=True))
    assert [line.split(":")[0] for line in found] == [
        "amp is on",
        "torch_autocast is on",
        'data_types.grad_accum_dtype is "bf16", expected "fp32"',
        "fp16.fp16_master_weights_and_grads is true, expected false",
        "fp16.loss_scale is 128, expected 0",
    ]
    assert "take it out and set train.bf16 or train.fp16" in found[0]


# --- optimizer and scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {"type": "AdamW"},
        {"type": "adam", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "torch_adam": True}},
        {"type": "ADAMW", "params": {"adam_w_mode": True, "amsgrad": False}},
    ],
)
def test_an_adamw_that_is_the_runs_is_taken_and_left_out(tmp_path, section):
    config, notes = complete(write(tmp_path, zero() | {"optimizer": section}))
    assert "optimizer" not in config
    assert "optimizer (train.learning_rate" in notes[-1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "Lamb"}, 'optimizer.type is "Lamb", expected AdamW: lora-dist trains with nothing else'),
        ({"params": {}}, "optimizer.type is null, expected AdamW"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "optimizer.params.adam_w_mode is false, lora-dist's AdamW has true"),
        ({"type": "AdamW", "params": {"weight_decay": 0.1}}, "optimizer.params.weight_decay is 0.1, train.weight_decay 0.0"),
        ({"type": "AdamW", "params": {"eps": "1e-8"}}, 'optimizer.params.eps is "1e-8", train.adam_epsilon 1e-08'),
        ({"type": "AdamW", "params": {"freeze_step": 5}}, "optimizer.params.freeze_step: lora-dist's AdamW has no such option"),
        ("AdamW", 'optimizer: found "AdamW", expected an object'),
    ],
)
def test_another_optimizer_is_refused(tmp_path, section, message):
    found = problems(write(tmp_path, zero() | {"optimizer": section}))
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_a_schedule_that_is_the_runs_is_taken_and_left_out(tmp_path, kind):
    for params in (
        dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        {"warmup_min_lr": 0, "warmup_max_lr": 1e-4, "warmup_num_steps": 10, "total_num_steps": 100, "warmup_type": "linear"},
        {},
    ):
        config, _ = complete(write(tmp_path, zero() | {"scheduler": {"type": kind, "params": params}}))
        assert "scheduler" not in config


def test_steps_that_the_run_does_not_know_yet_are_not_compared(tmp_path):
    unknown = dataclasses.replace(FACTS, warmup_steps=-1, max_steps=-1)
    section = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 70}}
    path = write(tmp_path, zero() | {"scheduler": section})
    assert len(problems(path)) == 2
    config, _ = complete(path, facts=unknown)
    assert "scheduler" not in config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "OneCycle"}, 'scheduler.type is "OneCycle", expected WarmupLR, WarmupDecayLR, WarmupCosineLR, or no scheduler'),
        (
            {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}},
            "scheduler.params.warmup_max_lr is 0.001, train.learning_rate 0.0001",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}},
            "scheduler.params.warmup_min_lr is 1e-06, lora-dist warms up from 0",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_type": "log"}},
            'scheduler.params.warmup_type is "log", lora-dist warms up linearly',
        ),
    ],
)
def test_another_schedule_is_refused(tmp_path, section, message):
    found = problems(write(tmp_path, zero() | {"scheduler": section}))
    assert len(found) == 1
    assert found[0].startswith(message)


# --- offload ------------------------------------------------------------------------------------------------------------------


def places(config) -> list:
    return [config["zero_optimization"].get(key) for key in ("offload_optimizer", "offload_param")]


def test_the_options_fill_in_where_the_file_says_nothing_or_auto(tmp_path):
    for section in ({}, {"offload_optimizer": {"device": "auto"}}, {"offload_optimizer": None}):
        path = write(tmp_path, zero(3, **section))
        assert places(complete(path, stage=3)[0]) == [None, None]
        assert places(complete(path, stage=3, optimizer="none")[0]) == [None, None]
        config, notes = complete(path, stage=3, optimizer="cpu", param="nvme", nvme="/local")
        assert places(config) == [{"device": "cpu"}, {"device": "nvme", "nvme_path": "/local"}]
        assert 'zero_optimization.offload_optimizer.device "cpu"' in notes[0]
        assert 'zero_optimization.offload_param.nvme_path "/local"' in notes[0]


def test_auto_keeps_what_the_file_says(tmp_path):
    section = {"device": "cpu", "pin_memory": False, "nvme_path": "auto"}
    path = write(tmp_path, zero(3, offload_optimizer=section, offload_param={"device": "none"}))
    assert places(complete(path, stage=3)[0]) == [{"device": "cpu", "pin_memory": False}, None]
    path = write(tmp_path, zero(3, cpu_offload=True, cpu_offload_param=True))  # DeepSpeed's old keys
    assert places(complete(path, stage=3)[0]) == [{"device": "cpu"}, {"device": "cpu"}]


def test_an_option_that_contradicts_the_file_is_an_error(tmp_path):
    path = write(tmp_path, zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "none"}))
    same = 'set one as the other, or "auto"'
    assert problems(path, stage=3, optimizer="none", param="cpu") == [
        f'zero_optimization.offload_optimizer.device is "cpu", parallel.offload_optimizer none: {same}',
        f'zero_optimization.offload_param.device is "none", parallel.offload_param cpu: {same}',
    ]


def test_nvme_needs_one_folder(tmp_path):
    section = {"device": "nvme", "nvme_path": "auto"}
    path = write(tmp_path, zero(3, offload_optimizer=section, offload_param=section))
    assert problems(path, stage=3) == ["parallel.nvme_path: found nothing, expected a folder on a fast local disk for nvme"]
    assert problems(None, stage=3, param="nvme") == [
        "parallel.nvme_path: found nothing, expected a folder on a fast local disk for nvme"
    ]
    path = write(tmp_path, zero(3, offload_param={"device": "nvme", "nvme_path": "/a"}))
    assert places(complete(path, stage=3)[0])[1] == {"device": "nvme", "nvme_path": "/a"}
    assert places(complete(path, stage=3, nvme="/a")[0])[1] == {"device": "nvme", "nvme_path": "/a"}
    assert problems(path, stage=3, nvme="/b") == [
        'zero_optimization.offload_param.nvme_path is "/a", parallel.nvme_path /b: set one as the other, or "auto"'
    ]


def test_what_only_stage_3_has_is_refused_elsewhere(tmp_path):
    expected = "with zero2, expected zero3, the only stage that DeepSpeed has it for"
    assert problems(None, param="cpu") == [f"parallel.offload_param: found cpu {expected}"]
    assert problems(None, optimizer="nvme", nvme="/a") == [f"parallel.offload_optimizer: found nvme {expected}"]
    path = write(tmp_path, zero(2, offload_param={"device": "cpu"}))
    assert problems(path) == [f"zero_optimization.offload_param.device is cpu {expected}"]


def test_a_device_that_deepspeed_does_not_have_is_refused(tmp_path):
    for section in ({"device": "disk"}, "cpu"):
        found = problems(write(tmp_path, zero(2, offload_optimizer=section)))
        assert len(found) == 1
        assert found[0].endswith('expected {"device": "none", "cpu" or "nvme"}')


# --- what cannot be honoured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"pipeline": {"stages": 2}}, "pipeline is on: lora-dist splits data, not layers"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2, expected 1 or nothing"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2, expected 1 or nothing"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention is on"),
        ({"compression_training": {"weight_quantization": {}}}, "compression_training is on"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is on: lora-dist orders and cuts the text itself"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency is on"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum", expected "mean"'),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false, expected true"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile is on"),
    ],
)
def test_a_section_that_lora_dist_cannot_honour_is_an_error(tmp_path, tree, message):
    found = problems(write(tmp_path, zero() | tree))
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize("key", ["zero_quantized_nontrainable_weights", "zero_quantized_gradients", "mics_shard_size", "zenflow"])
def test_a_zero_option_that_lora_dist_cannot_honour_is_an_error(tmp_path, key):
    found = problems(write(tmp_path, zero(3, **{key: {"topk_ratio": 0.1} if key == "zenflow" else 2})), stage=3)
    assert [line.split(" is on")[0] for line in found] == [f"zero_optimization.{key}"]


def test_partial_offload_needs_another_optimizer(tmp_path):
    section = {"device": "cpu", "ratio": 0.3, "super_offload": True}
    found = problems(write(tmp_path, zero(3, offload_optimizer=section)), stage=3)
    assert [line.split(":")[0] for line in found] == [
        "zero_optimization.offload_optimizer.super_offload is on",
        "zero_optimization.offload_optimizer.ratio is 0.3, expected 1.0",
    ]


def test_what_is_turned_off_is_dropped_and_the_rest_goes_to_deepspeed(tmp_path):
    off = {
        "amp": {"enabled": "auto"}, "torch_autocast": {"enabled": False}, "elasticity": {"enabled": False}, "sparse_gradients": False,
        "tensor_parallel": {"autotp_size": 1}, "pipeline": {},
    }  # fmt: skip
    passed = {
        "wall_clock_breakdown": True, "steps_per_print": 50, "flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True},
        "communication_data_type": "fp32", "zero_allow_untested_optimizer": True, "some_new_key": 1,
    }  # fmt: skip
    config, _ = complete(write(tmp_path, zero(2, overlap_comm=True, some_other_key=2) | off | passed))
    assert not off.keys() & config.keys()
    assert {key: config[key] for key in passed} == passed
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True, "some_other_key": 2}


def test_every_other_auto_is_named(tmp_path):
    found = problems(write(tmp_path, zero(allgather_bucket_size="auto") | {"flops_profiler": {"steps": [1, "auto"]}}))
    assert [line.split(" is ")[0] for line in found] == ["zero_optimization.allgather_bucket_size", "flops_profiler.steps.1"]
