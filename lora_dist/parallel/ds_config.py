"""DeepSpeed's JSON configuration as plain values: what a user's file asks for, checked against the run and completed from it.

A run has one source for each number. Where the file says "auto", or nothing, the run's own options are filled in; where it says
something else than they do, that is an error. What lora-dist does itself (precision, optimizer, schedule) is taken out of the file;
what it cannot do is refused rather than ignored. Imports neither deepspeed nor torch. Called by `engine/wrap.py` for
`engine/setup.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dist.log import UserError
from lora_dist.parallel.ds_rules import NOT_USED, REFUSED_SECTIONS, REFUSED_SIZES, REFUSED_VALUES, asks

AUTO = "auto"
OWN_FILES = Path(__file__).with_name("ds")
SILENT = 10**9  # steps between DeepSpeed's own reports: none in any run
DEVICES = ("none", "cpu", "nvme")
DECAYING = ("WarmupDecayLR", "WarmupCosineLR")
SCHEDULERS = ("WarmupLR", *DECAYING)


@dataclass(frozen=True)
class RunFacts:
    """What the run's own options say, which the JSON may not contradict. Unknown: warmup_steps -1, max_steps -1."""

    micro_batch: int
    accumulation: int
    world_size: int
    max_grad_norm: float
    bf16: bool
    fp16: bool
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    max_steps: int
    hidden_size: int
    global_batch: int | None = None
    """windows in a step; None: micro_batch x accumulation x world_size"""
    batch_follows: bool = False
    """micro_batch and accumulation were adapted to the number of processes, so that a step keeps global_batch windows"""
    configured_micro_batch: int | None = None
    """before it was adapted; None: micro_batch"""


def stage_of(ds_config: str | Path) -> int:
    """The ZeRO stage that a JSON asks for: 1, 2 or 3.

    Raises:
        UserError: the file cannot be read, is no JSON, or asks for no stage that is a strategy here.
    """
    return _stage(_read(ds_config), str(ds_config))


def resolve_strategy(strategy: str, ds_config: str | None) -> str:
    """The strategy by name: auto is the stage of the JSON, or ddp without one.

    Raises:
        UserError: a named strategy that is not the JSON's stage, and all that `stage_of` raises.
    """
    if ds_config is None:
        return "ddp" if strategy == AUTO else strategy
    found = f"zero{stage_of(ds_config)}"
    if strategy not in (AUTO, found):
        raise UserError(
            f"parallel.strategy: found {strategy}, but parallel.ds_config {ds_config} asks for {found}: "
            f"set parallel.strategy {found} or auto, or another file"
        )
    return found


def zero_config(
    stage: int,
    ds_config: str | Path | None,
    facts: RunFacts,
    *,
    offload_optimizer: str,
    offload_param: str,
    nvme_path: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """The complete configuration for `deepspeed.initialize`, and notes for the console: what was filled in, what was left out.

    Args:
        stage: 1, 2 or 3.
        ds_config: the user's JSON; None: lora-dist's own file of that stage, about which there is nothing to note.
        offload_optimizer: auto (what the JSON says), none, cpu or nvme.
        offload_param: the same for the shards of the base; cpu and nvme in stage 3 only.
        nvme_path: folder for what is offloaded to nvme.

    Raises:
        UserError: the file cannot be read, contradicts the run, or asks for what lora-dist does not do; all problems together.
    """
    path = OWN_FILES / f"zero{stage}.json" if ds_config is None else ds_config
    draft = _Draft(_read(path), str(path))
    if (asked := _stage(draft.tree, draft.file)) != stage:
        raise UserError(f"parallel.ds_config: {draft.file}: zero_optimization.stage is {asked}, parallel.strategy zero{stage}")
    draft.read_as_auto()
    _refuse(draft)
    _settle_batch(draft, facts)
    _settle_precision(draft, facts)
    _settle_optimizer(draft, facts)
    _settle_scheduler(draft, facts)
    for name, option in (("offload_optimizer", offload_optimizer), ("offload_param", offload_param)):
        _settle_offload(draft, stage, name, option, nvme_path)
    _fill_sizes(draft, facts.hidden_size)
    for key in _autos(draft.tree):
        draft.problem(f'{key} is "auto", which lora-dist has no value for: set one, or take it out')
    if draft.problems:
        raise UserError(dict.fromkeys(draft.problems))  # both offloads may miss the same folder
    if draft.tree.get("steps_per_print", AUTO) == AUTO:
        draft.tree["steps_per_print"] = SILENT
    # lora-dist hands over torch's AdamW, which DeepSpeed would otherwise refuse to offload.
    draft.tree |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return draft.tree, [] if ds_config is None else draft.notes()


@dataclass
class _Draft:
    """A configuration on its way from the user's file to DeepSpeed."""

    tree: dict[str, Any]
    file: str
    problems: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.problems.append(f"parallel.ds_config: {self.file}: {text}")

    def fill(self, section: dict[str, Any], key: str, dotted: str, value: Any) -> None:
        if section.get(key) != value:
            self.filled.append(f"{dotted} {_shown(value)}")
        section[key] = value

    def leave_out(self, key: str, why: str) -> None:
        if self.tree.pop(key, None) is not None:
            self.left_out.append(f"{key} ({why})")

    def section(self, key: str) -> dict[str, Any] | None:
        """A top-level section; None where there is none, or something else in its place, which is noted as a problem."""
        value = self.tree.get(key)
        if value is not None and not isinstance(value, dict):
            self.problem(f"{key}: found {_shown(value)}, expected an object")
        return value if isinstance(value, dict) else None

    def agree(self, found: Any, dotted: str, wanted: Any, option: str) -> bool:
        """Whether the file leaves a value to the run; a value that is not the run's is noted as a problem."""
        if found is None or found == AUTO:
            return True
        if not _same(found, wanted):
            self.problem(f'{dotted} is {_shown(found)}, {option}: set one as the other, or "auto"')
        return False

    def read_as_auto(self) -> None:
        """Take numbers that stand in the place of "auto" for "auto". DeepSpeed by itself understands no "auto" for these keys."""
        section = self.section("lora_dist") or {}
        stand_ins = section.get("read_as_auto", {})
        if set(section) - {"read_as_auto"} or not isinstance(stand_ins, dict):
            self.problem(f'lora_dist: found {_shown(section)}, expected {{"read_as_auto": {{KEY: NUMBER}}}}')
            return
        for key, number in stand_ins.items():
            if _same(self.tree.get(key), number):  # a number that the user has changed is the user's
                self.tree[key] = AUTO
        self.tree.pop("lora_dist", None)

    def notes(self) -> list[str]:
        notes = []
        if self.filled:
            notes.append(f"parallel.ds_config: {self.file}: filled in from the run: {', '.join(self.filled)}")
        if self.left_out:
            notes.append(f"parallel.ds_config: {self.file}: left out: {', '.join(self.left_out)}")
        return notes


def _read(path: str | Path) -> dict[str, Any]:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:  # JSON readers take the last one; DeepSpeed refuses
            raise UserError(f"parallel.ds_config: {path}: found {', '.join(sorted(twice))} twice, expected it once")
        return dict(pairs)

    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=refuse_twice)
    except OSError as error:
        raise UserError(f"parallel.ds_config: {path}: cannot be read ({error.strerror}), expected DeepSpeed's JSON") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"parallel.ds_config: {path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"parallel.ds_config: {path}: not text in UTF-8, expected DeepSpeed's JSON") from error
    if not isinstance(tree, dict):
        raise UserError(f"parallel.ds_config: {path}: found {_shown(tree)}, expected an object with zero_optimization in it")
    return tree


def _stage(tree: dict[str, Any], file: str) -> int:
    section = tree.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, dict) else None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        found = "nothing" if stage is None else _shown(stage)
        raise UserError(f"parallel.ds_config: {file}: zero_optimization.stage: found {found}, expected 1, 2 or 3")
    return int(stage)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return bool(found == wanted)


def _autos(tree: Any, prefix: str = "") -> Iterator[str]:
    if tree == AUTO:
        yield prefix
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _autos(value, f"{prefix}.{key}" if prefix else str(key))


def _refuse(draft: _Draft) -> None:
    """Note what lora-dist cannot honour as problems. The rest of these keys asks for nothing; DeepSpeed refuses some even so: away."""

    def holder(dotted: str) -> tuple[Any, str]:
        *parents, key = dotted.split(".")
        section: Any = draft.tree
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        return (section if isinstance(section, dict) else {}), key

    for dotted, why in REFUSED_SECTIONS.items():
        section, key = holder(dotted)
        if asks(section.pop(key, None)):
            draft.problem(f"{dotted} is on: {why}")
    for dotted, why in REFUSED_SIZES.items():
        section, key = holder(dotted)
        size = section.get(key)
        if size not in (None, AUTO, 0, 1):
            draft.problem(f"{dotted} is {_shown(size)}, expected 1 or nothing: {why}")
    for dotted, (allowed, why) in REFUSED_VALUES.items():
        section, key = holder(dotted)
        value = section.get(key)
        if value is not None and value != AUTO and not any(_same(value, a) for a in allowed):
            draft.problem(f"{dotted} is {_shown(value)}, expected {_shown(allowed[0])}: {why}")
    for key, why in NOT_USED.items():
        draft.leave_out(key, why)
    for key in ("tensor_parallel", "sequence_parallel_size", "data_parallel_size"):
        draft.tree.pop(key, None)


def _settle_batch(draft: _Draft, facts: RunFacts) -> None:
    """Batch and clipping. What a file says of a batch that follows from the global batch is of another number of processes: an elastic
    restart is not refused for it. Its train_batch_size then has to be the global batch, and its accumulation is replaced.
    """
    rows = facts.micro_batch * facts.accumulation * facts.world_size  # fillers included: DeepSpeed insists on the product
    batch = facts.global_batch or rows
    configured = facts.configured_micro_batch or facts.micro_batch
    micro = f"train.per_device_train_batch_size {configured}"
    accumulation = f"train.gradient_accumulation_steps {facts.accumulation}"
    product = f"{micro} x {accumulation} x processes {facts.world_size} is {batch}"
    draft.agree(
        draft.tree.get("train_batch_size"),
        "train_batch_size",
        batch,
        f"a step has {batch} windows" if facts.batch_follows else product,
    )
    draft.agree(draft.tree.get("train_micro_batch_size_per_gpu"), "train_micro_batch_size_per_gpu", configured, micro)
    if not facts.batch_follows:
        draft.agree(
            draft.tree.get("gradient_accumulation_steps"), "gradient_accumulation_steps", facts.accumulation, accumulation
        )
    clipping = f"train.max_grad_norm {facts.max_grad_norm}"
    draft.agree(draft.tree.get("gradient_clipping"), "gradient_clipping", facts.max_grad_norm, clipping)
    for key, value in (
        ("train_batch_size", rows),
        ("train_micro_batch_size_per_gpu", facts.micro_batch),
        ("gradient_accumulation_steps", facts.accumulation),
        ("gradient_clipping", facts.max_grad_norm),  # DeepSpeed clips to 1.0 where it is told nothing
    ):
        draft.fill(draft.tree, key, key, value)


def _settle_precision(draft: _Draft, facts: RunFacts) -> None:
    for key, option, wanted in (("bf16", "bf16", facts.bf16), ("bfloat16", "bf16", facts.bf16), ("fp16", "fp16", facts.fp16)):
        section = draft.section(key)
        if section is None:
            continue
        draft.agree(section.get("enabled"), f"{key}.enabled", wanted, f"train.{option} {_shown(wanted)}")
        for low in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads"):
            if section.get(low) is True:
                draft.problem(f"{key}.{low} is true, expected false: lora-dist keeps adapter, gradients and moments in float32")
        if wanted and key == "fp16" and section.get("loss_scale") not in (None, AUTO, 0):
            draft.problem(f"fp16.loss_scale is {_shown(section['loss_scale'])}, expected 0: lora-dist's loss scale is dynamic")
        draft.leave_out(key, f"train.{option} decides; lora-dist holds the base in half precision and scales the loss itself")


def _settle_optimizer(draft: _Draft, facts: RunFacts) -> None:
    section = draft.section("optimizer")
    if section is None:
        return
    kind, params = section.get("type"), section.get("params") or {}
    if str(kind).lower() not in ("adam", "adamw"):
        draft.problem(f"optimizer.type is {_shown(kind)}, expected AdamW: lora-dist trains with nothing else")
    elif not isinstance(params, dict):
        draft.problem(f"optimizer.params: found {_shown(params)}, expected an object")
    else:
        known: dict[str, tuple[Any, str]] = {
            "lr": (facts.learning_rate, f"train.learning_rate {facts.learning_rate}"),
            "betas": (facts.betas, f"train.adam_beta1 {facts.betas[0]}, train.adam_beta2 {facts.betas[1]}"),
            "eps": (facts.eps, f"train.adam_epsilon {facts.eps}"),
            "weight_decay": (facts.weight_decay, f"train.weight_decay {facts.weight_decay}"),
            # DeepSpeed's Adam is AdamW unless adam_w_mode is false; the others change what AdamW computes.
            "adam_w_mode": (True, "lora-dist's AdamW has true"),
            "bias_correction": (True, "lora-dist's AdamW has true"),
            "amsgrad": (False, "lora-dist's AdamW has false"),
            "fp32_optimizer_states": (True, "lora-dist's AdamW has true"),
        }
        for key, value in params.items():
            if key in known:
                draft.agree(value, f"optimizer.params.{key}", *known[key])
            elif key != "torch_adam":  # which only picks an implementation
                draft.problem(f"optimizer.params.{key}: lora-dist's AdamW has no such option: take it out")
    draft.leave_out("optimizer", "train.learning_rate and the train.adam_* options make the AdamW")


def _settle_scheduler(draft: _Draft, facts: RunFacts) -> None:
    section = draft.section("scheduler")
    if section is None:
        return
    kind, params = section.get("type"), section.get("params") or {}
    if kind not in SCHEDULERS:
        draft.problem(
            f"scheduler.type is {_shown(kind)}, expected {', '.join(SCHEDULERS)}, or no scheduler: see train.lr_scheduler_type"
        )
    elif not isinstance(params, dict):
        draft.problem(f"scheduler.params: found {_shown(params)}, expected an object")
    else:
        known: dict[str, tuple[Any, str]] = {
            "warmup_max_lr": (facts.learning_rate, f"train.learning_rate {facts.learning_rate}"),
            "warmup_min_lr": (0, "lora-dist warms up from 0"),
            "warmup_type": ("linear", "lora-dist warms up linearly"),
        }
        if facts.warmup_steps >= 0:
            known["warmup_num_steps"] = facts.warmup_steps, f"train.warmup_steps {facts.warmup_steps}"
        if facts.max_steps > 0 and kind in DECAYING:
            known["total_num_steps"] = facts.max_steps, f"train.max_steps {facts.max_steps}"
        for key, (wanted, option) in known.items():
            draft.agree(params.get(key), f"scheduler.params.{key}", wanted, option)
    draft.leave_out("scheduler", "train.lr_scheduler_type and train.warmup_steps are the schedule")


def _settle_offload(draft: _Draft, stage: int, name: str, option: str, nvme_path: str | None) -> None:
    zero = draft.tree["zero_optimization"]
    old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}[name]
    if zero.pop(old, None) is True:
        zero.setdefault(name, {"device": "cpu"})  # DeepSpeed's own reading of its old key
    dotted = f"zero_optimization.{name}"
    section = zero.pop(name, None) or {}
    found = section.get("device", AUTO) if isinstance(section, dict) else None
    if found not in (AUTO, *DEVICES):
        draft.problem(f'{dotted}: found {_shown(section)}, expected {{"device": "none", "cpu" or "nvme"}}')
    elif option not in (AUTO, found) and found != AUTO:
        draft.problem(f'{dotted}.device is "{found}", parallel.{name} {option}: set one as the other, or "auto"')
    elif (device := found if option == AUTO else option) in (AUTO, "none"):
        pass
    elif stage != 3 and (name == "offload_param" or device == "nvme"):
        what = (
            f"parallel.{name}: found {device}"
            if found == AUTO
            else f"parallel.ds_config: {draft.file}: {dotted}.device is {device}"
        )
        draft.problems.append(f"{what} with zero{stage}, expected zero3, the only stage that DeepSpeed has it for")
    else:
        zero[name] = section
        draft.fill(section, "device", f"{dotted}.device", device)
        _settle_nvme_path(draft, section, dotted, nvme_path if device == "nvme" else None)


def _settle_nvme_path(draft: _Draft, section: dict[str, Any], dotted: str, option: str | None) -> None:
    """Complete a section that offloads. `option` is parallel.nvme_path, which says nothing where the device is cpu."""
    found = section.pop("nvme_path", None)
    if section["device"] != "nvme":
        return
    if option is not None:
        draft.agree(found, f"{dotted}.nvme_path", option, f"parallel.nvme_path {option}")
        section["nvme_path"] = found
        draft.fill(section, "nvme_path", f"{dotted}.nvme_path", option)
    elif found in (None, AUTO):
        draft.problems.append("parallel.nvme_path: found nothing, expected a folder on a fast local disk for nvme")
    else:
        section["nvme_path"] = found


def _fill_sizes(draft: _Draft, hidden: int) -> None:
    """What Hugging Face's tools fill in for the same keys; only "auto" is filled, so that DeepSpeed's own defaults stay reachable."""
    zero = draft.tree["zero_optimization"]
    for key, value in {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_gather_16bit_weights_on_model_save": False,  # of DeepSpeed's own checkpoints, which are not written
    }.items():
        if zero.get(key) == AUTO:
            draft.fill(zero, key, f"zero_optimization.{key}", value)
