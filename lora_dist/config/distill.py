"""Checks of `train.distill_*`, which are declared with the other options of `train.*`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_dist.config.checks import positive

if TYPE_CHECKING:
    from lora_dist.config.train import TrainArgs


def distill_problems(train: TrainArgs) -> Iterator[str]:
    """What the options say against themselves and each other."""
    yield from positive("train", train, "distill_temperature", "distill_top_k")
    if not 0 <= train.distill_alpha <= 1:
        yield f"train.distill_alpha: found {train.distill_alpha:g}, expected a number from 0 to 1"
    if train.distill_hidden_weight < 0:
        yield f"train.distill_hidden_weight: found {train.distill_hidden_weight:g}, expected 0 or more"
    if train.distill_from is None:
        defaults = type(train).__dataclass_fields__
        for key, field in defaults.items():
            if key.startswith("distill_") and getattr(train, key) != field.default:
                yield f"train.{key}: found {getattr(train, key)} without train.distill_from, expected it too"
        return
    if not train.distill_from:
        yield "train.distill_from: found nothing, expected the directory (or hub name) of the dense model"
    if train.distill_alpha == 0 and train.distill_hidden_weight == 0:
        yield "train.distill_alpha, train.distill_hidden_weight: found 0 and 0, which leave the teacher out, expected one above 0"
    if train.distill_cache is not None and train.distill_hidden_weight > 0:
        yield (
            f"train.distill_hidden_weight: found {train.distill_hidden_weight:g} with train.distill_cache, which keeps no hidden states, "
            "expected 0, or no cache"
        )
    if train.distill_hidden != "last" and train.distill_hidden_weight == 0:
        yield f"train.distill_hidden: found {train.distill_hidden} with train.distill_hidden_weight 0, expected a weight above 0"
    if train.distill_cache is None and train.distill_top_k != type(train).distill_top_k:
        yield f"train.distill_top_k: found {train.distill_top_k} without train.distill_cache, expected it too: a live teacher says all"
