"""A model directory with its pruned linears as kept tiles, or one of these dense again: `lora-dist convert MODEL OUT --storage ...`.

Weights are copied tensor by tensor, all other files as they are. The proof: the fingerprint of what was written is MODEL's, so adapters of one
are adapters of the other.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_dist.arguments import ConvertArgs
from lora_dist.blocks import NamedLinear
from lora_dist.engine.pattern import base_pattern
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.block_files import holds_blocks, rewrite
from lora_dist.models.block_storage import require_tiles
from lora_dist.models.export import check_output, staged
from lora_dist.models.loading import open_base
from lora_dist.models.sources import WEIGHT_FILES, read_facts, weight_files
from lora_dist.models.streaming import TensorReader, load_empty


@dataclass(frozen=True)
class StorageReport:
    """What was written."""

    out: Path
    storage: str
    fingerprint: str
    same_fingerprint: bool
    """False where pruned weights were -0.0, which tiles do not hold"""
    bytes_before: int
    bytes_after: int


def convert_storage(args: ConvertArgs) -> StorageReport:
    """Read, write, prove.

    Raises:
        UserError: bad input; nothing is written then.
        GuardError: a pruned tile that is not zero; nothing is left of the directory then.
    """
    source = open_base(args.pickle, config_name=args.config_name, trust_remote_code=args.trust_remote_code)
    folder, blocks = source.source_dir, args.storage == "blocks"
    if holds_blocks(folder) == blocks:
        raise UserError(
            f"storage: found {args.storage}, but {args.pickle} is stored so already; give the other of dense and blocks"
        )
    files = weight_files(folder)
    before = sum(file.stat().st_size for file in files)
    check_output(args.out, need_bytes=0 if blocks else before)
    facts = read_facts(folder)
    base = load_empty(source, facts)
    reader = TensorReader(base.model, folder)

    def read_OI(linear: NamedLinear) -> Tensor:
        weight = reader.whole(f"{linear.name}.weight")
        return weight.T if linear.transposed else weight

    found = base_pattern(base.model, folder, block=args.block, weight_of=read_OI)
    pattern = require_tiles(found.pattern, args.pickle, key="storage")
    transposed = {linear.name for linear in prunable_linears(base.model) if linear.transposed}
    with staged(args.out) as staging:
        _copy_others(folder, staging)
        pattern.save(staging)
        prefix = f"{base.model.base_model_prefix}."
        rewrite(folder, staging, pattern, blocks=blocks, transposed=transposed, prefix=prefix)
        written = read_facts(staging, progress=False)
        after = sum(file.stat().st_size for file in weight_files(staging))
    same = written.fingerprint == facts.fingerprint
    return StorageReport(Path(args.out).expanduser(), args.storage, written.fingerprint, same, before, after)


def _copy_others(folder: Path, out: Path) -> None:
    """Everything in a model directory that is no weights."""
    weights = {file.name for file in weight_files(folder)} | set(WEIGHT_FILES)
    for entry in sorted(folder.iterdir()):
        if entry.name in weights or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name)
        else:
            shutil.copyfile(entry, out / entry.name)
