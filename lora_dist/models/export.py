"""Module -> Hugging Face directory: a whole one or none, and proof of the pattern in what was written.

Everything goes to a hidden sibling of the final name, is flushed to disk, and is renamed once. Called by `engine/prune.py`,
`engine/merge.py`, `engine/convert.py` and `onnx_export.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_dist.blocks import BlockMask, Pattern
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.block_files import rewrite
from lora_dist.models.loading import quiet_transformers
from lora_dist.models.sources import open_shard, weight_files
from lora_dist.models.uneven import remote_code
from lora_dist.process import flush

_GIB = 2**30


def model_bytes(model: nn.Module) -> int:
    """Bytes that the model's tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def check_output(path: str | Path, *, need_bytes: int = 0) -> Path:
    """Whether a model can be written here; leaves nothing behind. For the start of a command, before hours of work.

    Args:
        path: directory to be made; it may exist if it is empty.
        need_bytes: room that the disk must have.

    Raises:
        UserError: it holds something, is a file, cannot be written, or the disk has too little room.
    """
    out = Path(path).expanduser()
    if not str(path):
        raise UserError("OUT: found nothing, expected the directory to write the model to")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"OUT: {out} already holds files, expected a new or empty directory; choose another or move it aside")
    existing = out
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"OUT: {existing} is a file, expected a directory")
    try:  # by trying: root may write anywhere by permissions, but not on a read-only or full disk
        with tempfile.TemporaryFile(dir=out.parent if out.exists() else existing) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise UserError(f"OUT: {existing} cannot be written ({error.strerror}); choose another place or free space") from error
    free = shutil.disk_usage(existing).free
    if need_bytes > free:
        raise UserError(
            f"OUT: {existing} has {free / _GIB:.2f} GiB free, the model takes {need_bytes / _GIB:.2f} GiB; "
            "free space or choose another disk"
        )
    return out


def save_model(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    pattern: Pattern | None,
    extra_files: Mapping[str, str] | None = None,
    prove: Callable[[Path], Mapping[str, str]] | None = None,
    storage: str = "dense",
) -> Path:
    """Write model, tokenizer, pattern and notes as one directory that transformers' `from_pretrained` reads, if it is dense.

    Args:
        out_dir: must not exist, or be empty.
        pattern: written beside the weights as block_mask.safetensors.
        extra_files: text by file name.
        prove: looks at what was written before it gets its name, and returns more such files; where it raises, nothing is left.
        storage: dense, or blocks, with a pattern of whole tiles: only the kept ones.

    Raises:
        UserError: out_dir holds something, or the disk is full or read-only; nothing is left of this call then.
    """
    with staged(out_dir) as staging:
        with quiet_transformers(), _savable_generation(model):
            model.save_pretrained(str(staging))
        write_rest(model.config, tokenizer, staging, pattern, extra_files or {})
        transposed = {linear.name for linear in prunable_linears(model) if linear.transposed} if storage == "blocks" else set()
        _store(staging, storage, pattern, model, transposed)
        if prove is not None:
            _write_texts(staging, prove(staging))
    return Path(out_dir).expanduser()


MAX_SHARD = "2GB"
"""of a model that is gathered piece by piece: as much as the writing process holds at once"""


def plan_shards(tensors: Mapping[str, Tensor]) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Which file gets which tensors, and the index for them, None for a single file. Shapes and dtypes are enough (meta tensors)."""
    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename} if plan.is_sharded else None
    return {file: list(names) for file, names in plan.filename_to_tensors.items()}, index


class StreamedModel:
    """Writes a model whose tensors come file by file; the directory appears whole, or not at all.

    Args:
        out_dir: must not exist, or be empty.

    Raises:
        UserError: out_dir holds something, or the disk is full or read-only.
    """

    def __init__(self, out_dir: str | Path):
        self.out = Path(out_dir).expanduser()
        self._stack = ExitStack()
        self._staging = self._stack.enter_context(staged(out_dir))

    def add(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file of weights."""
        with self._closed_on_failure():
            save_file(dict(tensors), str(self._staging / file), metadata={"format": "pt"})

    def finish(
        self,
        model: Any,
        tokenizer: Any,
        index: Mapping[str, Any] | None,
        pattern: Pattern | None,
        *,
        storage: str = "dense",
        transposed: Collection[str] = (),
    ) -> None:
        """Write what is not weights (of the model: its configurations), and publish.

        Args:
            storage: as `save_model`.
            transposed: with blocks: linears whose weight is stored as (I, O).
        """
        with self._closed_on_failure():
            save_configurations(model, self._staging)
            if index is not None:
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (self._staging / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            write_rest(model.config, tokenizer, self._staging, pattern, {})
            _store(self._staging, storage, pattern, model, transposed)
        self._stack.close()

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not self._stack.__exit__(type(error), error, error.__traceback__):
                raise


@contextmanager
def staged(out_dir: str | Path) -> Iterator[Path]:
    """A hidden sibling to write into; renamed to `out_dir` at the end, removed if anything fails."""
    out = check_output(out_dir)
    made = [parent for parent in out.parents if not parent.exists()]  # nearest first
    staging = out.parent / f".{out.name}.saving"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed while it wrote
        staging.mkdir(parents=True)
        yield staging
        _flush_all(staging)
        os.rename(staging, out)  # takes the place of an empty directory too
        flush(out.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(
                f"OUT: {out} could not be written ({error}); nothing was left there: free space or choose another disk"
            ) from error
        raise


def save_configurations(model: Any, folder: Path) -> None:
    """The model's configuration, and the one of its generation where it has one."""
    with quiet_transformers(), _savable_generation(model):
        model.config.save_pretrained(str(folder))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(str(folder))


def write_rest(config: Any, tokenizer: Any, folder: Path, pattern: Pattern | None, extra_files: Mapping[str, str]) -> None:
    """Tokenizer, pattern, code of uneven layers and notes, beside config and weights."""
    code = remote_code(config)
    if code is not None:
        extra_files = {**extra_files, code[0]: code[1]}
    with quiet_transformers():
        tokenizer.save_pretrained(str(folder))
    if pattern is not None:
        pattern.save(folder)
    _write_texts(folder, extra_files)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors makes its files readable for their owner only


def _store(folder: Path, storage: str, pattern: Pattern | None, model: Any, transposed: Collection[str]) -> None:
    """Put the weights that were written dense into their form."""
    if storage == "dense":
        return
    if pattern is None:
        raise ValueError("storage: found blocks without a pattern, expected one of whole tiles")
    rewrite(folder, folder, pattern, blocks=True, transposed=transposed, prefix=f"{model.base_model_prefix}.")


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def _savable_generation(model: Any) -> Iterator[None]:
    """Let a generation configuration pass that transformers loads but refuses to save (temperature without do_sample).

    Llama-2's own is of this kind. What it sets is only read when sampling, so sampling is what it means.
    """
    generation = getattr(model, "generation_config", None)
    sampled = None if generation is None else generation.do_sample
    if generation is not None and not sampled:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True
    try:
        yield
    finally:
        if generation is not None:
            generation.do_sample = sampled


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def prove_zeros(source_dir: Path, pattern: Pattern, *, transposed: Collection[str] = ()) -> int:
    """Read the written files again and check that every pruned tile is exactly zero.

    Args:
        pattern: masks by module name.
        transposed: module names whose weight is stored as (I, O).

    Returns:
        Pruned tiles (elements, for element masks) that were found zero.

    Raises:
        GuardError: naming layer and tile, or a layer of the pattern that is not in the files.
    """
    left = dict(pattern)
    zeros = 0
    for file in weight_files(source_dir):
        with open_shard(file) as shard:
            for name in shard.names:
                module = name.removesuffix(".weight")
                mask = left.pop(module, None) if name.endswith(".weight") else None
                if mask is None:
                    continue
                weight = shard.tensor(name)
                weight_OI = weight.T if module in transposed else weight
                violation = mask.first_violation(weight_OI)
                if violation is not None:
                    raise GuardError(f"{file}: " + violation[0].describe(module, mask.kind, violation[1]))
                pruned_elements = weight_OI.numel() - mask.kept_elements()
                zeros += int((~mask.kept_PQ).sum()) if isinstance(mask, BlockMask) else pruned_elements
    if left:
        raise GuardError(f"{source_dir}: layer {next(iter(left))} is in the pattern, but not in the files ({len(left)} such)")
    return zeros
