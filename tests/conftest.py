"""What tests of several rooms share: where real data lies, and a small pruned model with its text on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run what takes longest (tests marked `long`)")
    parser.addoption("--matrix", action="store_true", help="also run all pairs of strategies (tests marked `matrix`)")
    parser.addoption("--cluster", action="store_true", help="also run the tests on a real Slurm (marked `cluster`)")
    parser.addoption("--cluster-figures", metavar="FILE", help="write what each fault on the Slurm cost to this file, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for. Of several marks the first counts: `--matrix` runs a `long` file's `matrix` tests."""
    left_out = []
    for item in items:
        mark = next((name for name in ("cluster", "matrix", "long") if item.get_closest_marker(name)), None)
        if mark is not None and not config.getoption(f"--{mark}"):
            left_out.append(item)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left_behind() -> Iterator[None]:
    """A launcher's variables that a test leaves set would make later ones join processes that are not there."""
    yield
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and texts: `LORA_DIST_DATA`, by default shared/data beside the project."""
    folder = Path(os.environ.get("LORA_DIST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LORA_DIST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with half of its 16x16 tiles pruned at random, stored mask and tokenizer beside it."""
    from lora_dist.blocks import BlockMask, Pattern, grid
    from lora_dist.models.architecture import prunable_linears
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    generator = torch.Generator().manual_seed(7)
    masks = {}
    for linear in prunable_linears(model):
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        mask = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
        linear.weight_OI.masked_fill_(~mask.expand(), 0.0)
        masks[linear.name] = mask
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Pattern(masks).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 kB of sentences that a small model can learn something of."""
    words = [
        "the",
        "a",
        "river",
        "stone",
        "bird",
        "sings",
        "flows",
        "under",
        "over",
        "old",
        "new",
        "bridge",
        "and",
        "then",
        "slowly",
        "quickly",
        "home",
    ]
    generator = torch.Generator().manual_seed(11)
    lines = []
    for _ in range(900):
        picks = torch.randint(len(words), (8,), generator=generator).tolist()
        lines.append(" ".join(words[i] for i in picks) + ".")
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n")
    return file
