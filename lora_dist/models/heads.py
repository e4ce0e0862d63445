"""The classification head of a model: which modules it is, and its first values where the files have none.

Called by `loading.py`, `streaming.py` and `engine/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PROBLEMS = {True: "regression", False: "single_label_classification"}
"""transformers' problem_type, by whether a number is predicted"""


@dataclass(frozen=True)
class HeadSpec:
    """The head that a base is to have."""

    num_labels: int | None = None
    """None: what the configuration says"""
    seed: int = 0
    """of the values of a head that the files do not have"""
    names: tuple[str, ...] = ()
    """labels by number, where they are known already"""


def configure_head(config: Any, head: HeadSpec, tokenizer: Any) -> None:
    """Write the number of labels and the padding token into a configuration that is to be loaded."""
    if head.num_labels is not None and head.num_labels != config.num_labels:
        config.num_labels = head.num_labels
    if head.names:
        config.id2label = dict(enumerate(head.names))
        config.label2id = {name: number for number, name in enumerate(head.names)}
    if config.num_labels == 1:
        config.problem_type = PROBLEMS[True]
    if config.get_text_config().pad_token_id is None:
        # A classifier on a decoder finds a row's last token by it, and refuses rows otherwise.
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        config.get_text_config().pad_token_id = config.pad_token_id = pad


def head_modules(model: nn.Module, missing: Iterable[str] = ()) -> list[str]:
    """Names of what stands on the backbone, and of a pooler in it whose tensors are `missing` in the files, as after masked-language
    training; these are trained whole."""
    backbone = str(getattr(model, "base_model_prefix", ""))
    names = [name for name, module in model.named_children() if name != backbone and any(True for _ in module.parameters())]
    pooler = f"{backbone}.pooler"
    return [*names, *([pooler] if any(name.startswith(f"{pooler}.") for name in missing) else [])]


def label_counts(config: Any, found: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> dict[str, int]:
    """Of tensors whose shape is not the configuration's: those that are for another number of labels, and which.

    Args:
        found: name, shape in the files, shape by the configuration.
    """
    return {
        name: int(stored[0])
        for name, stored, shape in found
        if len(stored) == len(shape) and list(stored[1:]) == list(shape[1:]) and shape[:1] == (config.num_labels,)
    }


def takes_token_types(model: Any, tokenizer: Any) -> bool:
    """Whether a model tells the two texts of a pair apart by token_type_ids, as BERT does, and the tokenizer gives them."""
    return (
        (getattr(model.config, "type_vocab_size", None) or 0) > 1
        and "token_type_ids" in inspect.signature(model.forward).parameters
        and "token_type_ids" in tokenizer.model_input_names
    )


@torch.no_grad()
def start_head(model: Any, missing: Iterable[str], seed: int) -> None:
    """First values of the tensors that the files do not have, the same whatever was drawn before: normal weights, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    std = float(getattr(model.config, "initializer_range", None) or 0.02)
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:  # a norm's scale
            parameter.fill_(1.0)
        else:
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype))
