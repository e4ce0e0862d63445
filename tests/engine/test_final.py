"""What a run says to do next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_dist.config import AdapterArgs, DataArgs, ModelArgs, RunConfig
from lora_dist.engine.final import next_steps


@pytest.mark.parametrize(
    "kind,pattern,of_the_base,label,end",
    [
        ("lora", "some", "some", "2. Merge it, pattern kept:", ""),
        ("lora", None, None, "2. Merge it:", ""),
        ("lora", None, "some", "2. Merge it:", " --densify   (unmasked: the pattern is lost)"),
        ("ia3", None, "some", "2. Merge it, pattern kept:", ""),
    ],
)
def test_a_pattern_is_kept_where_there_is_one(kind, pattern, of_the_base, label, end):
    config = RunConfig(model=ModelArgs("base"), data=DataArgs("d.txt"), adapter=AdapterArgs(type=kind))
    parts: Any = SimpleNamespace(
        config=config, output_dir=Path("run"), pattern=pattern, guard=SimpleNamespace(pattern=of_the_base)
    )
    assert next_steps(parts)[-1] == f"{label}  lora-dist merge base run run/merged{end}"
