"""Every way to start a run that is to be had, the cheapest that fits, and what would make it fit where none does. Called by `cli/plan.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_dist.config import RunConfig
from lora_dist.operations.plan.memory import GIB, Layout, Memory, Rehearsed, at_peak
from lora_dist.operations.plan.rehearse import PRECISIONS, compute_dtype
from lora_dist.operations.plan.speed import Rates, step_time_s
from lora_dist.operations.plan.teacher import PlannedTeacher
from lora_dist.operations.plan.traffic import Traffic, traffic

QUANTISED = ("int8", "nf4")
_LAYOUTS: tuple[dict[str, object], ...] = (
    {"strategy": "ddp"},
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "zero2", "offload_optimizer": True},
    {"strategy": "fsdp2"},
    {"strategy": "zero3"},
    {"strategy": "zero3", "offload_optimizer": True, "offload_param": True},
)


@dataclass(frozen=True)
class Hardware:
    """What there is."""

    processes: int
    memory: int
    """bytes a rank may use"""
    rates: Rates
    cuda: bool = True
    overhead: int = 0
    """bytes that the framework takes of them"""


@dataclass(frozen=True)
class Choice:
    """One way to start the run."""

    layout: Layout
    precision: str
    checkpointing: bool
    micro_batch: int
    accumulation: int
    eval_batch: int
    """0: nothing is evaluated"""
    layers: int | None = None
    """how many of the first decoder layers checkpointing recomputes; None: all"""

    def recomputed(self, layers: int) -> float:
        """Share of so many layers that is computed again."""
        if not self.checkpointing:
            return 0.0
        return 1.0 if self.layers is None else min(1.0, self.layers / layers)


@dataclass(frozen=True)
class Plan:
    """What a choice costs."""

    choice: Choice
    memory: Memory
    sent: Traffic
    step_time_s: float
    tokens_per_s: float
    """over all ranks"""
    fits: bool


class Planner:
    """Works out choices for one run on some hardware.

    Args:
        rehearsed: the run's model.
        length: tokens of a row.
    """

    def __init__(self, config: RunConfig, rehearsed: Rehearsed, hardware: Hardware, *, length: int):
        self._config, self._rehearsed, self.hardware, self._length = config, rehearsed, hardware, length
        train = config.train
        live = train.distill_from is not None and train.distill_cache is None
        self._teacher = PlannedTeacher(config) if live else None
        product = train.per_device_train_batch_size * train.gradient_accumulation_steps * hardware.processes
        self.global_batch = train.global_batch_size or product

    def work_out(self, choice: Choice) -> Plan:
        """Its memory, traffic and time."""
        shapes = self._rehearsed.shapes(choice.precision)
        recomputed = choice.recomputed(shapes.layers)
        memory = at_peak(
            self._rehearsed,
            choice.layout,
            choice.precision,
            checkpointing=recomputed,
            rows=choice.micro_batch,
            eval_rows=choice.eval_batch,
            overhead=self.hardware.overhead,
        )
        sent = traffic(shapes, choice.layout, accumulation=choice.accumulation, checkpointing=recomputed)
        time_s = step_time_s(
            shapes,
            choice.layout,
            choice.precision,
            sent,
            self.hardware.rates,
            tokens=choice.micro_batch * choice.accumulation * self._length,
            length=self._length,
            checkpointing=recomputed,
        )
        if self._teacher is not None:
            element_bytes, tokens = compute_dtype(choice.precision).itemsize, choice.micro_batch * self._length
            memory = replace(memory, teacher=self._teacher.bytes(choice.layout, element_bytes, tokens=tokens))
            flops = tokens * choice.accumulation * self._teacher.flops_a_token(self._length)
            time_s += flops / self.hardware.rates.of(choice.precision)
        tokens_per_s = self.global_batch * self._length / time_s
        return Plan(choice, memory, sent, time_s, tokens_per_s, memory.total <= self.hardware.memory)

    def configured(self) -> Choice:
        """As the configuration has it."""
        config, train = self._config, self._config.train
        strategy = config.parallel.strategy if config.parallel.strategy != "auto" else "ddp"
        layout = self._layout(
            strategy=strategy,
            offload_optimizer=config.parallel.offload_optimizer in ("cpu", "nvme"),
            offload_param=config.parallel.offload_param == "cpu",
        )
        rows, rounds = self._split(train.per_device_train_batch_size)
        layers = train.gradient_checkpointing_layers
        again = int(layers) if layers.isdigit() else None
        now = Choice(layout, configured_precision(config), train.gradient_checkpointing, rows, rounds, self._eval_batch(), again)
        if layers != "auto":
            return now
        fewest = self._fewest_layers(now)
        return replace(now, layers=self._rehearsed.shapes(now.precision).layers if fewest is None else fewest[0])

    def all(self) -> list[Plan]:
        """Every choice of strategy, precision and checkpointing, each with the largest micro-batch that fits (1 where none does)."""
        found = []
        for layout in self.layouts():
            for precision in PRECISIONS:
                if refusal(self._config, layout, precision) is None:
                    found += [self._largest(layout, precision, checkpointing) for checkpointing in (False, True)]
        return found

    def layouts(self) -> Iterator[Layout]:
        for fields in _LAYOUTS:
            if self.hardware.processes > 1 or fields["strategy"] == "ddp" or "offload_param" in fields:
                yield self._layout(**fields)

    def best(self, plans: Sequence[Plan]) -> Plan | None:
        """The fastest that fits in the configured precision; else in half precision; else in any. None: nothing fits.

        What is equally fast to 1% is decided by simplicity: fewer parts, no checkpointing, the smaller micro-batch.
        """
        mine = configured_precision(self._config)
        for precisions in ((mine,), ("bf16",), ("fp16",), QUANTISED):
            fitting = [p for p in plans if p.fits and p.choice.precision in precisions]
            if fitting:
                fastest = max(p.tokens_per_s for p in fitting)
                near = [p for p in fitting if p.tokens_per_s >= 0.99 * fastest]
                order = [layout.name for layout in self.layouts()]
                return min(near, key=lambda p: (order.index(p.choice.layout.name), p.choice.checkpointing, p.memory.total))
        return None

    def remedies(self, now: Choice, *, limit: int | None = None) -> list[tuple[str, float]]:
        """Changes of `now` that fit, the smallest change first: (flags of `lora-dist train`, predicted GiB).

        Args:
            limit: bytes a rank may use; None: the hardware's.
        """
        limit = self.hardware.memory if limit is None else limit
        found = []
        for changed in self._changes(now):
            total = self.work_out(changed).memory.total
            if total <= limit:
                found.append((" ".join(flags(changed, now)), total / GIB))
        return found

    def fewest_layers(self) -> tuple[int, int] | None:
        """Of the configured choice: how many of the first decoder layers have to be recomputed to fit, and bytes a rank then; None: all of them
        are too few."""
        return self._fewest_layers(replace(self.configured(), checkpointing=True))

    def _fewest_layers(self, now: Choice) -> tuple[int, int] | None:
        for layers in range(self._rehearsed.shapes(now.precision).layers + 1):
            total = self.work_out(replace(now, layers=layers)).memory.total
            if total <= self.hardware.memory:
                return layers, total
        return None

    def _changes(self, now: Choice) -> Iterator[Choice]:
        small = replace(now, eval_batch=min(now.eval_batch, 1))
        half = self._with_rows(small, max(1, now.micro_batch // 2))
        one = self._with_rows(small, 1)
        again = replace(small, checkpointing=True, layers=None)
        steps = [small, half, again, self._with_rows(again, max(1, now.micro_batch // 2)), one, self._with_rows(again, 1)]
        steps += [replace(c, precision="bf16") for c in (small, one, again, self._with_rows(again, 1)) if now.precision == "fp32"]
        least = self._with_rows(again, 1)
        bf16 = replace(least, precision="bf16" if now.precision == "fp32" else now.precision)
        steps += [replace(bf16, layout=layout) for layout in self.layouts()]
        steps += [replace(least, precision=precision) for precision in ("int8", "nf4")]
        seen = [now]
        for each in steps:
            if each not in seen and refusal(self._config, each.layout, each.precision) is None:
                seen.append(each)
                yield each

    def _layout(self, **fields: object) -> Layout:
        hybrid = self._config.parallel.hybrid_shard and fields["strategy"] == "fsdp2"
        shared = {
            "processes": self.hardware.processes,
            "optim": self._config.train.optim,
            "adalora": self._config.adapter.type == "adalora",
            "cuda": self.hardware.cuda,
            "shards": min(8, self.hardware.processes) if hybrid else None,
        }
        return Layout(**(shared | fields))  # type: ignore[arg-type]

    def _split(self, rows: int) -> tuple[int, int]:
        """Micro-batch and accumulation that keep the global batch, as `engine/batch.py` has it."""
        rounds = -(-self.global_batch // (rows * self.hardware.processes))
        return -(-self.global_batch // (rounds * self.hardware.processes)), rounds

    def _with_rows(self, choice: Choice, rows: int) -> Choice:
        micro, rounds = self._split(rows)
        return replace(choice, micro_batch=micro, accumulation=rounds)

    def _eval_batch(self) -> int:
        return 0 if self._config.train.eval_strategy == "no" else self._config.train.per_device_eval_batch_size

    def _largest(self, layout: Layout, precision: str, checkpointing: bool) -> Plan:
        rows, found = 1, None
        most = -(-self.global_batch // self.hardware.processes)
        while True:
            micro, rounds = self._split(min(rows, most))
            plan = self.work_out(Choice(layout, precision, checkpointing, micro, rounds, self._eval_batch()))
            if not plan.fits and found is None and self._eval_batch() > 1:
                plan = self.work_out(replace(plan.choice, eval_batch=1))
            if found is not None and not plan.fits:
                return found
            found = plan
            if not plan.fits or rows >= most:
                return found
            rows *= 2


def configured_precision(config: RunConfig) -> str:
    """What the base is held in by the configuration."""
    model, train = config.model, config.train
    if model.load_in_4bit or model.load_in_8bit:
        return "nf4" if model.load_in_4bit else "int8"
    if model.dtype != "auto":
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[model.dtype]
    return "bf16" if train.bf16 else "fp16" if train.fp16 else "fp32"


def refusal(config: RunConfig, layout: Layout, precision: str) -> str | None:
    """Why training would refuse this combination (`engine/wrap.py` and `engine/adapting.py` say it with the keys to change)."""
    strategy, kind, train = layout.strategy, config.adapter_kind, config.train
    if precision in QUANTISED and kind == "sparse_full":
        return "quantised weights cannot be trained"
    if precision in QUANTISED and (strategy == "zero3" or (strategy == "fsdp2" and precision == "int8")):
        return "a quantised base cannot be cut so"
    if precision == "int8" and config.model.storage == "blocks":
        return "int8 has a scale a row, which tiles cut"
    if train.optim != "adamw_torch" and strategy != "ddp":
        return "bitsandbytes' optimizers keep their state whole"
    if train.loraplus_lr_ratio is not None and strategy.startswith("zero"):
        return "DeepSpeed has one rate"
    if (kind == "adalora" and strategy != "ddp") or (kind == "dora" and strategy == "zero3"):
        return f"{kind} needs parameters whole"
    return None


def flags(choice: Choice, now: Choice | None = None) -> list[str]:
    """Options of `lora-dist train` that make this choice; with `now`, only what differs from it."""
    layout, found = choice.layout, []
    if now is None or layout.name != now.layout.name:
        found.append(f"--parallel.strategy {layout.strategy}")
        for key in ("offload_optimizer", "offload_param"):
            if getattr(layout, key) or (now is not None and getattr(now.layout, key)):
                found.append(f"--parallel.{key} {'cpu' if getattr(layout, key) else 'none'}")
    if now is None or choice.precision != now.precision:
        found += _PRECISION_FLAGS[choice.precision]
    if now is not None and choice.layers != now.layers:
        found.append(f"--train.gradient_checkpointing_layers {'all' if choice.layers is None else choice.layers}")
    if now is None or choice.checkpointing != now.checkpointing:
        found.append(f"--train.gradient_checkpointing {str(choice.checkpointing).lower()}")
    if now is None or choice.micro_batch != now.micro_batch or choice.accumulation != now.accumulation:
        found.append(f"--train.per_device_train_batch_size {choice.micro_batch}")
        found.append(f"--train.gradient_accumulation_steps {choice.accumulation}")
    if choice.eval_batch and (now is None or choice.eval_batch != now.eval_batch):
        found.append(f"--train.per_device_eval_batch_size {choice.eval_batch}")
    return found


_PLAIN = ["--model.load_in_4bit false", "--model.load_in_8bit false"]
_PRECISION_FLAGS = {
    "fp32": ["--train.bf16 false", "--train.fp16 false", *_PLAIN],
    "bf16": ["--train.bf16 true", "--train.fp16 false", *_PLAIN],
    "fp16": ["--train.bf16 false", "--train.fp16 true", *_PLAIN],
    "int8": ["--train.bf16 true", "--train.fp16 false", "--model.load_in_8bit true", "--model.load_in_4bit false"],
    "nf4": ["--train.bf16 true", "--train.fp16 false", "--model.load_in_4bit true", "--model.load_in_8bit false"],
}
