"""Will a run fit, how long will it take, and how is it best started: answered from the configuration alone.

`rehearse.py` builds model and adapter on the meta device and runs a step there (`trace.py`), `memory.py` adds what a strategy holds,
`traffic.py` what it sends, `speed.py` how long that takes, `choice.py` picks, `show.py` says it. Called by `cli/plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_dist.config import RunConfig
from lora_dist.log import UserError
from lora_dist.operations.plan.choice import Hardware, Planner, configured_precision
from lora_dist.operations.plan.memory import GIB
from lora_dist.operations.plan.rehearse import Rehearsal
from lora_dist.operations.plan.show import as_json, shortened, table, verdict
from lora_dist.operations.plan.speed import Rates, measure_rates

__all__ = ["GIB", "Hardware", "Planner", "Rates", "Rehearsal", "layers_to_recompute", "run", "what_fits"]

_FLOPS, _BANDWIDTH = 0.4 * 312e12, 50e9
_OVERHEAD = {True: GIB, False: int(0.7 * GIB)}


def run(
    config: RunConfig,
    train_argv: Sequence[str],
    *,
    processes: int,
    memory: int,
    flops: float | None,
    bandwidth: float | None,
    measure: bool,
    cuda: bool,
    overhead: int | None,
    every: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Lines for the console, and everything for JSON.

    Args:
        train_argv: options of `lora-dist train` that made `config`, for the commands.
        memory, overhead: bytes of a rank; overhead None: a default.
        flops: a second, in bf16; None: a default, or `measure` it here.
        every: show all choices.

    Raises:
        UserError: the model cannot be planned for.
    """
    rehearsal = _rehearsal(config, cuda)
    assumed = flops is None and not measure
    if measure:
        rates = measure_rates(rehearsal.one_layer, rehearsal.length, bandwidth or _BANDWIDTH)
    else:
        rates = Rates(flops or _FLOPS, bandwidth or _BANDWIDTH)
    hardware = Hardware(processes, memory, rates, cuda, _OVERHEAD[cuda] if overhead is None else overhead)
    planner = Planner(config, rehearsal, hardware, length=rehearsal.length)
    plans = planner.all()
    best = planner.best(plans)
    shapes = rehearsal.shapes("bf16")
    lines = [
        f"{config.model.name_or_path}: {sum(p.elements for p in shapes.base) / 1e9:.3f}e9 frozen parameters, "
        f"{sum(p.elements for p in shapes.trainable):,} trained; {planner.global_batch} rows of {rehearsal.length} tokens a step "
        f"on {processes} {'GPUs' if cuda else 'processes'}",
        f"rates: {rates.flops / 1e12:.3g}e12 operations/s in bf16 ({'assumed' if assumed else 'measured' if measure else 'given'}), "
        f"{rates.bandwidth / 1e9:.3g}e9 bytes/s between ranks ({'assumed' if bandwidth is None else 'given'})",
        "",
        table(plans if every else shortened(plans, configured_precision(config))),
        "",
        *verdict(planner, plans, best, train_argv),
    ]
    return lines, as_json(planner, plans, best, train_argv)


def _rehearsal(config: RunConfig, cuda: bool) -> Rehearsal:
    rehearsal = Rehearsal(config, cuda=cuda)
    context = rehearsal.blueprint.context
    if context is not None and config.data.block_size > context:
        raise UserError(f"data.block_size: found {config.data.block_size}, expected at most the model's context of {context}")
    return rehearsal


def what_fits(
    config: RunConfig, *, processes: int, cuda: bool, limit_gib: float, overhead_gib: float = 0.0
) -> list[tuple[str, float]]:
    """Changes of a run that would fit, the smallest first: (flags of `lora-dist train`, predicted GiB a rank). Takes seconds.

    Args:
        processes: of the run.
        limit_gib: what a rank may use; a GPU's memory, or less where others use it too.
        overhead_gib: of it, what the framework takes.

    Raises:
        UserError: the model cannot be planned for.
    """
    hardware = Hardware(processes, int(limit_gib * GIB), Rates(_FLOPS, _BANDWIDTH), cuda, int(overhead_gib * GIB))
    rehearsal = _rehearsal(config, cuda)
    planner = Planner(config, rehearsal, hardware, length=rehearsal.length)
    return planner.remedies(planner.configured())


def layers_to_recompute(config: RunConfig, *, processes: int, cuda: bool, limit_gib: float) -> tuple[int, float] | None:
    """How many of the first decoder layers a run has to recompute to fit, and the GiB a rank needs then; None: all are too few.

    Args: as `what_fits`.

    Raises:
        UserError: the model cannot be planned for.
    """
    hardware = Hardware(processes, int(limit_gib * GIB), Rates(_FLOPS, _BANDWIDTH), cuda, _OVERHEAD[cuda])
    rehearsal = _rehearsal(config, cuda)
    found = Planner(config, rehearsal, hardware, length=rehearsal.length).fewest_layers()
    return None if found is None else (found[0], found[1] / GIB)
