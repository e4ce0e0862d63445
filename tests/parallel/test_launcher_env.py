"""The environment of `accelerate launch`, made by accelerate's own functions: defaults are no request, and a conflict is one line."""

from __future__ import annotations

import json
import os

import pytest

accelerate_launch = pytest.importorskip("accelerate.commands.launch")

from accelerate.utils import launch as accelerate_environments  # noqa: E402

from lora_dist.parallel.launcher_env import check_accelerate_environment, launch_problems  # noqa: E402

STRATEGIES = {"ddp": None, "fsdp2": None, "zero1": 1, "zero2": 2, "zero3": 3}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Flags of `accelerate launch` -> the environment that its processes get; a file stands for what `accelerate config` writes."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(tmp_path / "none.yaml"))

    def environment(*flags: str, file: str | None = None) -> dict[str, str]:
        if file is not None:
            (tmp_path / "accelerate.yaml").write_text(file)
            flags = ("--config_file", str(tmp_path / "accelerate.yaml"), *flags)
        parser = accelerate_launch.launch_command_parser()
        flags = ("--main_process_port", "0", *flags, "train.py")
        args, defaults, _ = accelerate_launch._validate_launch_command(parser.parse_args(flags))
        if args.use_deepspeed and not args.cpu:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if defaults else ""
            return accelerate_environments.prepare_deepspeed_cmd_env(args)[1]
        if (args.use_fsdp or args.use_megatron_lm or args.multi_gpu) and not args.cpu:
            return accelerate_environments.prepare_multi_gpu_env(args)
        return accelerate_environments.prepare_simple_launcher_cmd_env(args)[1]

    return environment


def check(environ, strategy="ddp", *, bf16=False, fp16=False, accumulation=1, **known) -> list[str]:
    return check_accelerate_environment(
        environ, strategy=strategy, ds_stage=STRATEGIES[strategy], bf16=bf16, fp16=fp16, accumulation=accumulation, **known
    )


def line(asked: str, ours: str, remedy: str, flag: str) -> str:
    return (
        f"accelerate launch asks for {asked}, the run has {ours}, and the run's options rule: "
        f"set {remedy}, or take {flag} off accelerate launch"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("flags", [(), ("--cpu", "--num_processes", "2"), ("--multi_gpu", "--num_processes", "2")])
def test_a_launch_that_only_starts_processes_goes_with_every_run(launched, strategy, flags):
    everything = {
        "offload_optimizer": "none", "offload_param": "none", "max_grad_norm": 0.0, "gradient_checkpointing": False,
        "hybrid_shard": False, "device": "cpu", "ds_config": "",
    }  # fmt: skip
    for precision in ({}, {"bf16": True}, {"fp16": True}):
        assert check(launched(*flags), strategy, accumulation=8, **precision, **everything) == []


def test_no_launcher_at_all_is_no_request(launched):  # which clears the environment of this test run
    assert check({}, "zero3", bf16=True, ds_config="", device="cuda") == []
    assert launch_problems(strategy="ddp", ds_stage=None, bf16=False, fp16=False, accumulation=1) == []


@pytest.mark.parametrize("flags", [("--use_fsdp",), ("--use_fsdp", "--fsdp_version", "2")])
def test_fsdp_goes_with_fsdp2_only(launched, flags):
    environ = launched(*flags, "--num_processes", "2")
    assert check(environ, "fsdp2", gradient_checkpointing=False, hybrid_shard=False) == []
    assert check(environ, "zero2") == [
        "ACCELERATE_USE_FSDP: " + line("FSDP", "parallel.strategy zero2", "parallel.strategy fsdp2", "--use_fsdp")
    ]
    assert len(check(environ, "ddp")) == 1


def test_what_goes_with_fsdp_is_compared(launched):
    environ = launched(
        "--use_fsdp", "--num_processes", "2", "--fsdp_offload_params", "true", "--fsdp_sharding_strategy", "HYBRID_SHARD",
        "--fsdp_activation_checkpointing", "true",
    )  # fmt: skip
    found = check(environ, "fsdp2", gradient_checkpointing=False, hybrid_shard=False)
    assert [problem.split(":")[0] for problem in found] == [
        "FSDP_OFFLOAD_PARAMS",
        "FSDP_ACTIVATION_CHECKPOINTING",
        "FSDP_SHARDING_STRATEGY",
    ]
    assert "set parallel.hybrid_shard true, or take --fsdp_sharding_strategy off" in found[2]
    assert len(check(environ, "fsdp2", gradient_checkpointing=True, hybrid_shard=True)) == 1
    environ = launched("--use_fsdp", "--num_processes", "2", "--fsdp_sharding_strategy", "2")
    assert "asks for SHARD_GRAD_OP" in check(environ, "fsdp2")[0]


def test_deepspeed_goes_with_zero_only(launched):
    environ = launched("--use_deepspeed", "--num_processes", "2")
    for strategy in ("zero1", "zero2", "zero3"):
        assert check(environ, strategy, ds_config="") == []  # no stage was asked for: accelerate's own 2 is a default
    assert check(environ, "fsdp2") == [
        "ACCELERATE_USE_DEEPSPEED: "
        + line("DeepSpeed", "parallel.strategy fsdp2", "parallel.strategy zero1, zero2 or zero3", "--use_deepspeed")
    ]
    environ = launched("--use_deepspeed", "--num_processes", "2", "--zero_stage", "3")
    assert check(environ, "zero3") == []
    assert "set parallel.strategy zero3, or take --use_deepspeed off" in check(environ, "ddp")[0]
    assert check(environ, "zero2") == [
        "ACCELERATE_DEEPSPEED_ZERO_STAGE: "
        + line("stage 3", "parallel.strategy zero2", "parallel.strategy zero3", "--zero_stage")
    ]


def test_a_zero_strategy_takes_its_stage_from_its_name_too(launched):
    environ = launched("--use_deepspeed", "--num_processes", "2", "--zero_stage", "3")
    run = {"bf16": False, "fp16": False, "accumulation": 1, "ds_stage": None}
    assert check_accelerate_environment(environ, strategy="zero3", **run) == []
    assert len(check_accelerate_environment(environ, strategy="zero1", **run)) == 1


def test_offload_and_clipping_that_were_asked_for_are_compared(launched):
    environ = launched(
        "--use_deepspeed", "--num_processes", "2", "--zero_stage", "3", "--offload_optimizer_device", "cpu",
        "--offload_param_device", "none", "--gradient_clipping", "0.5",
    )  # fmt: skip
    assert check(environ, "zero3") == check(environ, "zero3", offload_optimizer="auto") == []  # not told, not compared
    assert check(environ, "zero3", offload_optimizer="cpu", offload_param="cpu", max_grad_norm=0.5) == []
    option = "parallel.offload_optimizer"
    assert check(environ, "zero3", offload_optimizer="none", offload_param="none", max_grad_norm=1.0) == [
        "ACCELERATE_GRADIENT_CLIPPING: "
        + line("clipping at 0.5", "train.max_grad_norm 1", "train.max_grad_norm 0.5", "--gradient_clipping"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE: "
        + line("cpu", f"{option} none", f"{option} cpu", "--offload_optimizer_device"),
    ]


def test_a_file_given_to_accelerate_must_be_the_runs(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (tmp_path / "linked").symlink_to(tmp_path)
    environ = launched("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", "zero2.json")
    for same in ("zero2.json", tmp_path / "zero2.json", tmp_path / "linked" / "zero2.json"):
        assert check(environ, "zero2", ds_config=same) == []
    variable, flag = "ACCELERATE_DEEPSPEED_CONFIG_FILE", "--deepspeed_config_file"
    assert check(environ, "zero2", ds_config="") == [
        f"{variable}: " + line("zero2.json", "no parallel.ds_config", "parallel.ds_config zero2.json", flag)
    ]
    assert check(environ, "zero3", ds_config="zero3.json") == [
        f"{variable}: " + line("zero2.json", "parallel.ds_config zero3.json", "parallel.ds_config zero2.json", flag)
    ]
    assert check(environ, "zero2") == []
    assert "asks for stage 2 (zero2.json), the run has parallel.strategy zero3" in check(environ, "zero3")[0]
    environ = launched("--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", "absent.json")
    assert check(environ, "zero2")[0].startswith(f"{variable}: absent.json: cannot be read")


@pytest.mark.parametrize("flags", [("--cpu",), ("--use_fsdp",), ("--use_deepspeed",), ("--multi_gpu",)])
def test_half_precision_is_compared_whoever_starts_the_processes(launched, flags):
    strategy = {"--use_fsdp": "fsdp2", "--use_deepspeed": "zero2"}.get(flags[0], "ddp")
    environ = launched(*flags, "--num_processes", "2", "--mixed_precision", "bf16")
    assert check(environ, strategy, bf16=True) == []
    for run, ours in (({}, "train.bf16 false, train.fp16 false"), ({"fp16": True}, "train.bf16 false, train.fp16 true")):
        assert check(environ, strategy, **run) == [
            "ACCELERATE_MIXED_PRECISION: " + line("bf16", ours, "train.bf16 true", "--mixed_precision bf16")
        ]
    environ = launched(*flags, "--num_processes", "2", "--mixed_precision", "fp16")
    assert check(environ, strategy, fp16=True) == []
    assert "set train.fp16 true" in check(environ, strategy)[0]


def test_accumulation_above_1_is_a_request(launched):
    deepspeed = ("--use_deepspeed", "--num_processes", "2", "--gradient_accumulation_steps")
    assert check(launched(*deepspeed, "1"), "zero2", accumulation=8) == []
    assert check(launched(*deepspeed, "8"), "zero2", accumulation=8) == []
    assert check(launched(*deepspeed, "4"), "zero2", accumulation=8) == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: "
        + line(
            "4 micro-batches a step", "train.gradient_accumulation_steps 8", "train.gradient_accumulation_steps 4",
            "--gradient_accumulation_steps",
        )
    ]  # fmt: skip


def test_what_lora_dist_does_not_have_is_refused(launched):
    found = check(launched("--use_megatron_lm", "--num_processes", "2"))
    assert [problem.split(":")[0] for problem in found] == ["ACCELERATE_USE_MEGATRON_LM"]
    found = check(launched("--cpu", "--dynamo_backend", "inductor"))
    assert found == [
        "ACCELERATE_DYNAMO_BACKEND: accelerate launch asks for INDUCTOR, but lora-dist does not compile: take --dynamo_backend off"
    ]
    fsdp2 = ("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--use_parallelism_config")
    found = check(launched(*fsdp2, "--parallelism_config_tp_size", "2"), "fsdp2", hybrid_shard=False)
    assert [problem.split(":")[0] for problem in found] == ["PARALLELISM_CONFIG_TP_SIZE"]
    found = check(launched(*fsdp2, "--parallelism_config_dp_replicate_size", "2"), "fsdp2", hybrid_shard=False)
    assert [problem.split(":")[0] for problem in found] == ["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"]


def test_a_cpu_launch_does_not_go_with_gpus(launched):
    environ = launched("--cpu", "--num_processes", "2")
    assert check(environ, device="cpu") == check(environ) == []
    assert check(environ, device="cuda") == [
        "ACCELERATE_USE_CPU: " + line("true", "parallel.device cuda", "parallel.device cpu", "--cpu")
    ]


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: 2
machine_rank: 0
gpu_ids: all
mixed_precision: {precision}
use_cpu: false
"""


def test_a_file_of_accelerate_config_asks_as_flags_do(launched):
    deepspeed = """
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
"""
    environ = launched(file=CONFIG.format(kind="DEEPSPEED", precision="bf16") + deepspeed)
    assert check(environ, "zero2", bf16=True, accumulation=8, offload_optimizer="cpu", ds_config="") == []
    found = check(environ, "zero3")
    assert [problem.split(":")[0] for problem in found] == ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"]
    fsdp = "\nfsdp_config:\n  fsdp_version: 2\n  fsdp_offload_params: false\n  fsdp_reshard_after_forward: true\n"
    environ = launched(file=CONFIG.format(kind="FSDP", precision="'no'") + fsdp)
    assert check(environ, "fsdp2", bf16=True) == []
    assert len(check(environ, "zero3")) == 1
    assert check(launched(file=CONFIG.format(kind="MULTI_GPU", precision="'no'")), "zero3", bf16=True) == []
