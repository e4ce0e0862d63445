"""What the plan says a rank holds, against what ranks hold: counted on the wrapped models of real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dist.config import RunConfig
from lora_dist.operations.plan import Rehearsal
from lora_dist.operations.plan.memory import Layout, held
from tests.distributed.group import WorkerGroup
from tests.runs import options

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    group = WorkerGroup(2, tmp_path_factory.mktemp("plan"))
    yield group
    group.close()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero1", marks=pytest.mark.long), "zero2", "zero3"])
def test_a_rank_holds_what_is_planned(pair: WorkerGroup, tiny_base: Path, tiny_text: Path, tmp_path: Path, strategy: str) -> None:
    def argv(steps: int, **more: object) -> list[str]:
        common = {"parallel__strategy": strategy, "max_steps": steps, "eval_strategy": "no", "load_best_model_at_end": "false"}
        return options(tiny_base, tiny_text, tmp_path / "run", **common, **more)

    facts = pair.run(*argv(1)).facts
    if strategy.startswith("zero"):  # resumed, the optimizer has its state when the model is looked at
        facts = pair.run(*argv(2, resume_from_checkpoint="auto")).facts
    config = RunConfig()
    config.model.name_or_path, config.data.block_size = str(tiny_base), 32
    shapes = Rehearsal(config, cuda=False).shapes("fp32")
    planned = held(shapes, Layout(strategy, 2))
    whole_too = sum(p.bytes for p in shapes.base if p.elements < 10 * shapes.hidden) if strategy == "zero3" else 0
    trained = sum(p.elements for p in shapes.trainable)
    own = trained if strategy == "ddp" else -(-trained // 2)
    for fact in facts:
        assert fact["trainable"] == len(shapes.trainable) and fact["frozen"] == len(shapes.base)
        assert fact["base_bytes"] == pytest.approx(planned.base - whole_too, rel=0.01)
        if strategy.startswith("zero"):
            assert fact["state_elements"] == pytest.approx(own, rel=0.05)  # DeepSpeed fills up to whole numbers a rank
            assert planned.optimizer == 12 * own
        else:
            assert fact["trainable_elements"] == pytest.approx(own, rel=0.02)
            assert planned.optimizer == pytest.approx(8 * own, rel=0.01)
