"""A base without weights, and its weights piece by piece: so that no process ever holds a whole base that is to be sharded.

`load_empty` builds the model on the meta device and gives every parameter a placeholder of its true shape that takes no memory
(one zero, expanded). The strategy then cuts each placeholder, and `TensorReader` reads just the rows that are this process's.
Called by `engine/open_base.py` for strategies that shard the base.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_dist.log import UserError
from lora_dist.models.building import build_empty, match_names, set_tensor, stored_buffers
from lora_dist.models.heads import head_modules, label_counts, start_head
from lora_dist.models.loading import BaseSource, LoadedBase, frozen, generation_config, missing_head, quiet_transformers
from lora_dist.models.shards import Shard
from lora_dist.models.sources import SourceFacts, open_shard, stored_shapes, weight_files


def load_empty(source: BaseSource, facts: SourceFacts, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedBase:
    """The model of an opened directory with placeholders for weights.

    Args:
        dtype: precision to hold it in; None keeps the one it is stored in.
        device: where it is going to be.

    Raises:
        UserError: a class that cannot be built without weights.
    """
    with quiet_transformers():
        model = build_empty(
            source.config,
            dtype=dtype or facts.dtype,
            device=device,
            widths=source.widths,
            trust_remote_code=source.trust_remote_code,
            classifier=source.head is not None,
        )
    if source.head is None:
        model.generation_config = source.generation or generation_config((source.source_dir,), source.config)
    _place(model, torch.device(device))
    if source.head is not None:
        _place_head(model, source, torch.device(device))
    return frozen(model, source, facts)


def _place(model: nn.Module, device: torch.device) -> None:
    """Replace meta parameters by placeholders; what was tied stays tied."""
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in placed:
                zero = torch.zeros((), dtype=parameter.dtype, device=device)
                placed[parameter] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
            module._parameters[key] = placed[parameter]


def _place_head(model: Any, source: BaseSource, device: torch.device) -> None:
    """A head is small, and trained whole: real tensors, from the files or new."""
    assert source.head is not None
    shapes = stored_shapes(source.source_dir)
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_parameters()}
    missing = {name for name in names if name not in shapes and name.removeprefix(prefix) not in shapes}
    wrong = [(n, shapes[n], tuple(model.get_parameter(n).shape)) for n in sorted(names & shapes.keys())]
    replaced = label_counts(source.config, [(n, stored, shape) for n, stored, shape in wrong if stored != shape])
    new = missing_head(model, missing | replaced.keys())
    model.labels_before = next((count for name, count in replaced.items() if name in new), None)
    model.new_head_tensors = tuple(sorted(new))
    reader = TensorReader(model, source.source_dir)
    for name in names:
        if any(name.startswith(f"{head}.") for head in head_modules(model, new)):
            placeholder = model.get_parameter(name)
            value = torch.zeros_like(placeholder) if name in new else reader.whole(name).to(device, placeholder.dtype)
            set_tensor(model, name, value.contiguous())
    start_head(model, new, source.head.seed)


class TensorReader:
    """Reads a model's tensors from the safetensors files of its directory, whole or a range of rows, one at a time.

    Args:
        model: from `load_empty`, before an adapter is put on it: names and shapes are the base's own.

    Raises:
        UserError: files in another format, or a tensor that is missing or has another shape.
    """

    def __init__(self, model: nn.Module, source_dir: Path):
        self._open = ExitStack()
        where: dict[str, Shard] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(source_dir):
            if file.suffix != ".safetensors":
                raise UserError(
                    f"model.name_or_path: {source_dir} holds {file.name}, expected safetensors, which a sharded, quantised or "
                    "block-stored base is read from piece by piece; save the model with transformers' save_pretrained"
                )
            shard = self._open.enter_context(open_shard(file))
            where |= dict.fromkeys(shard.names, shard)
            shapes |= {key: shard.shape(key) for key in shard.names}
        advice = "check config.json, or set parallel.strategy ddp, which loads through transformers"
        self._keys = match_names(model, source_dir, shapes, advice=advice)
        self._where = where

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter's first dimension, on CPU, in the precision it is stored in."""
        key = self._keys[name]
        return self._where[key].rows(key, start, stop)

    def tiles(self, name: str, start: int, stop: int) -> Tensor | None:
        """Tiles [start, stop) of a weight, on CPU, where the files hold tiles of it."""
        key = self._keys[name]
        shard = self._where[key]
        return shard.tiles(key, start, stop) if shard.tiles is not None and key in shard.tiled else None

    def whole(self, name: str) -> Tensor:
        """A parameter, on CPU, in the precision it is stored in."""
        key = self._keys[name]
        return self._where[key].tensor(key)

    def fill_quantised(self, unit: nn.Module) -> None:
        """Nothing: no layer is quantised (`quantised.py`)."""

    def fill_buffers(self, model: nn.Module) -> None:
        """Buffers that the files hold; there are few, and every process needs them whole."""
        for name, buffer in stored_buffers(model):
            buffer.copy_(self.whole(name))


class WholeReader(Protocol):
    """What `fill_from` asks."""

    def __contains__(self, name: object) -> bool: ...

    def whole(self, name: str) -> Tensor: ...


def fill_from(model: Any, reader: WholeReader) -> None:
    """Read every parameter that `reader` knows, one at a time, in the precision and on the device of its placeholder."""
    for name, parameter in list(model.named_parameters()):
        if name in reader:
            set_tensor(model, name, reader.whole(name).to(parameter.device, parameter.dtype, copy=True))
    model.tie_weights()
