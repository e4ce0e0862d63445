"""Loss and metrics of a classifier over labelled rows, spread over all processes; metrics are scikit-learn's and scipy's.

Called by `engine/task.py`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_dist.data.rows import RowBatch
from lora_dist.evaluation.perplexity import EvalResult
from lora_dist.models.loss import class_losses
from lora_dist.parallel import World


@dataclass(frozen=True)
class ClassResult(EvalResult):
    """One evaluation; `loss` is the mean over rows, `tokens` the number of rows."""

    metrics: Mapping[str, float] = field(default_factory=dict)


def class_logits(
    model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, types_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, C), or (B, 1) of a number to predict. `types_BL`: which text of a pair a token is from; None: the model is not told."""
    types = {} if types_BL is None else {"token_type_ids": types_BL}
    return model(input_ids=ids_BL, attention_mask=mask_BL, **types).logits


@torch.no_grad()
def evaluate_classes(
    model: nn.Module,
    batches: Iterable[RowBatch],
    *,
    world: World,
    samples: int,
    metrics: Sequence[str],
    on_batch: Callable[[], None] | None = None,
) -> ClassResult:
    """Mean loss and metrics of `model` over `batches`, this rank's; the same number on every rank. Collective at its end.

    The model's train/eval mode is restored.
    """
    was_training = model.training
    model.eval()
    start, steps = time.perf_counter(), 0
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    try:
        for batch in batches:
            assert batch.attention_mask_BL is not None and batch.targets_B is not None and batch.weights_B is not None
            types_BL = None if batch.token_types_BL is None else batch.token_types_BL.to(world.device)
            logits_BC = class_logits(
                model, batch.input_ids_BL.to(world.device), batch.attention_mask_BL.to(world.device), types_BL
            )
            targets_B = batch.targets_B.to(world.device)
            predicted_B = logits_BC.squeeze(-1).float() if targets_B.is_floating_point() else logits_BC.argmax(-1)
            real = batch.weights_B.numpy() > 0
            found = (class_losses(logits_BC, targets_B).double(), predicted_B, targets_B)
            seen.append(tuple(values.cpu().numpy()[real] for values in found))  # type: ignore[arg-type]
            steps += 1
            if on_batch is not None:
                on_batch()
        everywhere = world.gather(seen)
    finally:
        model.train(was_training)
    in_order = [part for parts in zip(*everywhere, strict=True) for part in parts]  # every rank makes as many batches
    losses_N, predicted_N, targets_N = (np.concatenate(columns) for columns in zip(*in_order, strict=True))
    figures = {name: measure(name, targets_N, predicted_N) for name in metrics}
    count = len(targets_N)
    return ClassResult(float(losses_N.sum()) / count, count, samples, steps, time.perf_counter() - start, figures)


def measure(name: str, targets_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """A metric by its name. F1 is of label 1 where there are two labels, as GLUE has it, else the mean over labels; a correlation
    with predictions that are all equal is 0."""
    from scipy.stats import ConstantInputWarning, pearsonr, spearmanr  # two seconds that other runs do without
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    two = max(targets_N.max(), predicted_N.max()) <= 1
    measures: dict[str, Callable[..., Any]] = {
        "accuracy": accuracy_score,
        "matthews_correlation": matthews_corrcoef,
        "f1": lambda a, b: f1_score(a, b, average="binary" if two else "macro", zero_division=0.0),
        "pearson": lambda a, b: pearsonr(a, b).statistic,
        "spearmanr": lambda a, b: spearmanr(a, b).statistic,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        value = float(measures[name](targets_N, predicted_N))
    return value if np.isfinite(value) else 0.0
