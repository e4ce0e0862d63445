"""The tensors of a model directory as they lie on disk, without building a model; and their fingerprint.

Read tensor by tensor from memory maps, so memory is one tensor's. The fingerprint covers names, dtypes, shapes and bytes: how
tensors are spread over files, and whether these are safetensors, kept tiles or torch files, makes no difference. Called by `loading.py`
(which reads the base), `export.py` (which proves what was written) and `engine/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lora_dist.blocks import Fingerprint
from lora_dist.log import UserError
from lora_dist.models.legacy import load_tensors
from lora_dist.models.shards import BLOCK_PREFIX, Shard, block_shard, is_block_file, plain_shard

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    f"{BLOCK_PREFIX}.safetensors", f"{BLOCK_PREFIX}.safetensors.index.json",
)  # fmt: skip
"""looked for in this order, as transformers does; the last two are this project's own"""
_CHUNK_BYTES = 1 << 22


def weight_files(source_dir: Path) -> list[Path]:
    """The files that hold the model's tensors.

    Raises:
        UserError: if there are none, or the index names files that are not there.
    """
    for name in WEIGHT_FILES:
        file = source_dir / name
        if not file.is_file():
            continue
        if not name.endswith(".json"):
            return [file]
        shards = [source_dir / shard for shard in sorted(set(_index(file).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(
                f"{source_dir}: {name} names {len(shards)} files, {len(missing)} of which are missing: {some(missing)}"
            )
        return shards
    raise UserError(f"{source_dir}: found no weights, looked for {', '.join(WEIGHT_FILES)}")


def _index(file: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read as an index of weights ({type(error).__name__}: {error})") from error
    outside = [shard for shard in names.values() if Path(shard).name != shard]
    if not names or outside:
        raise UserError(f"{file}: expected names of files beside it, found {some(outside) or 'nothing'}")
    return names


def some(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@contextmanager
def open_shard(file: Path) -> Iterator[Shard]:
    """Open one file of weights.

    Raises:
        UserError: if it is broken (a truncated download, for example).
    """
    if file.suffix != ".safetensors":
        tensors = load_tensors(file)
        yield Shard(
            list(tensors),
            tensors.__getitem__,
            lambda name: tuple(tensors[name].shape),
            lambda name, start, stop: tensors[name][start:stop],
        )
        return
    try:
        with safe_open(str(file), "pt") as handle:
            yield block_shard(handle, file) if is_block_file(file) else plain_shard(handle)
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "no file"
        raise UserError(f"{file}: cannot be read as safetensors ({error}; {size}); download or save it again") from error


def stored_shapes(source_dir: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the directory by name, from the files' headers. Raises UserError if files are missing or broken."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(source_dir):
        with open_shard(file) as shard:
            shapes |= {name: shard.shape(name) for name in shard.names}
    return shapes


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, ..., whichever file format the tensor is from."""
    return str(dtype).removeprefix("torch.")


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


@dataclass(frozen=True)
class SourceFacts:
    """What reading all tensors once tells."""

    fingerprint: str
    dtype: torch.dtype
    """that most floating-point elements are stored in"""
    elements: int


def read_facts(source_dir: Path, *, progress: bool = True) -> SourceFacts:
    """Read every tensor once, hashing several at a time (hashing releases the interpreter's lock).

    Args:
        progress: show a bar over the files, `Loading checkpoint shards`.

    Raises:
        UserError: if files are missing or broken, or a tensor is in two of them.
    """
    files = weight_files(source_dir)
    fingerprint = Fingerprint()
    elements: dict[torch.dtype, int] = {}
    bar = tqdm(total=len(files), desc="Loading checkpoint shards", disable=not progress, dynamic_ncols=True)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file in files:
            with open_shard(file) as shard:

                def hash_one(name: str, shard: Shard = shard, file: Path = file) -> tuple[torch.dtype, int]:
                    tensor = shard.tensor(name)
                    try:
                        fingerprint.add(name, dtype_name(tensor.dtype), tensor.shape, _chunks(tensor))
                    except ValueError as error:
                        raise UserError(f"{file}: {error}") from error
                    return tensor.dtype, tensor.numel()

                tasks = [pool.submit(hash_one, name) for name in shard.names]
                wait(tasks)  # also when one fails: the file must not be closed under the others
                for dtype, numel in (task.result() for task in tasks):
                    elements[dtype] = elements.get(dtype, 0) + numel
            bar.update()
    floating = {dtype: n for dtype, n in elements.items() if dtype.is_floating_point}
    if not floating:
        raise UserError(f"{source_dir}: found no floating-point tensors in {some([file.name for file in files])}")
    return SourceFacts(fingerprint.hexdigest(), max(floating, key=lambda dtype: floating[dtype]), sum(elements.values()))


def fingerprint_model(source_dir: Path, *, progress: bool = True) -> str:
    """Digest of the directory's tensors (design section 4): names, dtypes, shapes, contents. Raises as `read_facts`."""
    return read_facts(source_dir, progress=progress).fingerprint
