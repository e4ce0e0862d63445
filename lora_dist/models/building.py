"""A model without weights, for those who fill it themselves: placeholders that a sharded strategy cuts, layers of uneven widths.

Transformers' own loading is used wherever it can be (`loading.py`). Called by `loading.py` and `streaming.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_dist.log import UserError, logger
from lora_dist.models.sources import open_shard, some, stored_shapes, weight_files
from lora_dist.models.uneven import LayerWidths, apply_widths


def build_empty(
    config: Any,
    *,
    dtype: torch.dtype,
    device: str,
    widths: LayerWidths | None,
    trust_remote_code: bool = False,
    classifier: bool = False,
) -> Any:
    """The model of a configuration, its parameters on the meta device, its computed buffers (rotary frequencies) on `device`.

    Args:
        widths: of its layers, where they are uneven.

    Raises:
        UserError: a class that cannot be built without weights, or whose layers cannot have widths of their own.
    """
    with torch.device("meta"):
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if widths is not None:
        apply_widths(model, widths)
    model.tie_weights()
    _compute_buffers(model, torch.device(device))
    return model


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies) are computed, by transformers' own initialisation.

    Parameters are still on the meta device here, so initialising them too costs and changes nothing.
    """
    for name, module in model.named_modules():
        made = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not made:
            continue
        for key, buffer in made.items():
            fill = torch.nan if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device)
        model._init_weights(module)
        for key in made:
            if not bool(torch.isfinite(module._buffers[key]).all()):
                raise UserError(
                    f"model.name_or_path: {type(model).__name__} does not say how to compute its buffer {name}.{key}, which a sharded "
                    "base and layers of uneven widths need; set parallel.strategy ddp, zero1 or zero2, which load the whole model"
                )


def stored_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that files hold, by name."""
    stored = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def match_names(model: Any, source_dir: Path, shapes: Mapping[str, tuple[int, ...]], *, advice: str) -> dict[str, str]:
    """Name in the model -> name in the files: the same, or with or without the model's prefix (as older GPT-2 files).

    Args:
        shapes: of the tensors in the files.
        advice: what to do where a tensor is missing.

    Raises:
        UserError: a tensor that is missing or has another shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    keys, missing, wrong = {}, [], []
    new = getattr(model, "new_head_tensors", ())
    for name, tensor in [*model.named_parameters(), *stored_buffers(model)]:
        if name in new:
            continue
        found = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in shapes), None)
        if found is None:
            missing.append(name)
        elif shapes[found] != tuple(tensor.shape):
            wrong.append(f"{name} is {shapes[found]}, by config.json {tuple(tensor.shape)}")
        else:
            keys[name] = found
    if missing:
        raise UserError(
            f"model.name_or_path: {source_dir}: {len(missing)} tensors that {type(model).__name__} needs are not in the files under "
            f"its names: {some(missing)}; {advice}"
        )
    if wrong:
        raise UserError(
            f"model.name_or_path: {source_dir}: {len(wrong)} tensors do not fit the configuration: {some(wrong)}; check that "
            "config.json belongs to these weights"
        )
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(keys)
    unused = sorted(set(shapes) - set(keys.values()) - tied)
    if unused:
        logger.warning("%s: %d tensors in the files are not used by the model: %s", source_dir, len(unused), some(unused))
    return keys


def fill(model: Any, source_dir: Path, device: str) -> None:
    """Read every weight of a model from `build_empty`, one at a time, in the precision of its placeholder. Raises as `match_names`."""
    shapes = stored_shapes(source_dir)
    names_of: dict[str, list[str]] = {}
    for name, key in match_names(model, source_dir, shapes, advice="check that config.json belongs to these weights").items():
        names_of.setdefault(key, []).append(name)
    parameters = {name for name, _ in model.named_parameters()}
    for file in weight_files(source_dir):
        with open_shard(file) as shard:
            for key in shard.names:
                for name in names_of.get(key, ()):
                    placeholder = model.get_parameter(name) if name in parameters else model.get_buffer(name)
                    set_tensor(model, name, shard.tensor(key).to(device, placeholder.dtype, copy=True))
    model.tie_weights()


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of the model, without copying it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
