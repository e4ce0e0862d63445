"""PiSSA (arXiv 2404.02948) on a base that never changes: LoRA that starts from the principal factors of the weights.

PiSSA takes s B0 A0, the largest r singular values of W with their vectors, out of the base and trains it as the adapter. Here the
base stays as it is stored, and its guard with it, so B0 A0 is taken off in the adapter instead:

    dW = s mask . (B A - B0 A0) = s mask . [B, -B0] [A; A0]

an ordinary LoRA of rank 2r whose second half is frozen: `BlockLoraLinear` gives it zeros as gradients, so AdamW leaves it alone. What is
saved, in checkpoints too, is that LoRA with all its factors; plain PEFT loads and merges it where it is unmasked. The files say in their
metadata how many of the ranks are frozen, which a resumed run needs. Called by `adapter/attach.py` and `engine/adapting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_dist.adapter.dora import base_weight
from lora_dist.adapter.sparse import SparseFullLinear
from lora_dist.adapter.updates import lora_layers
from lora_dist.log import UserError

FROZEN_KEY = "frozen_rank"
"""in the metadata of an adapter's file"""


def is_principal(init_lora_weights: bool | str) -> bool:
    """Whether it asks for PiSSA: `pissa`, or `pissa_niter_N` for a fast approximate decomposition of N iterations."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa")


def doubled(lora: dict[str, Any]) -> dict[str, Any]:
    """PEFT's options of a LoRA of twice the rank and the same scale, whose factors are set afterwards."""
    factor = math.sqrt(2) if lora["use_rslora"] else 2
    return {**lora, "r": 2 * lora["r"], "lora_alpha": lora["lora_alpha"] * factor, "init_lora_weights": True}


def asked(config: Any, frozen: int) -> tuple[int, float]:
    """(r, lora_alpha) as they were asked for, of a saved adapter's config. Inverse of `doubled` where ranks are frozen."""
    if not frozen:
        return config.r, config.lora_alpha
    return config.r - frozen, float(f"{config.lora_alpha / (math.sqrt(2) if config.use_rslora else 2):.9g}")


@torch.no_grad()
def start_from_principal(model: PeftModel, init_lora_weights: str, weight_OI: Callable[[str], Tensor] | None) -> None:
    """Set the factors of a new adapter of `doubled` options, in this project's own layers, and freeze their second half. Waits for the device.

    Args:
        init_lora_weights: see `is_principal`.
        weight_OI: reads a base weight by its linear's name, where the model holds placeholders only.
    """
    for name, layer in lora_layers(model):
        A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if weight_OI is not None:
            weight = weight_OI(name)
        else:
            stored = base_weight(layer.get_base_layer())
            weight = stored.T if layer.fan_in_fan_out else stored
        rank = A_RI.shape[0] // 2
        model.frozen_rank = rank
        A0, B0 = _principal(weight.to(A_RI.device, torch.float32), rank, layer.scaling["default"], init_lora_weights)
        found = len(A0)  # a narrow weight has fewer: the other ranks start as in any LoRA
        for start, sign in ((0, 1), (rank, -1)):
            A_RI[start : start + found] = A0
            B_OR[:, start : start + found] = sign * B0
        layer.lora_frozen["default"] = rank


def _principal(weight_OI: Tensor, rank: int, scale: float, init_lora_weights: str) -> tuple[Tensor, Tensor]:
    """A0 (k, I) and B0 (O, k), k = min(rank, O, I): scale * B0 A0 is the best approximation of the weight of that rank."""
    rank = min(rank, *weight_OI.shape)
    if init_lora_weights == "pissa":
        U, S, Vh = torch.linalg.svd(weight_OI, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        U, S, V = torch.svd_lowrank(weight_OI, q=rank, niter=int(init_lora_weights.removeprefix("pissa_niter_")))
    root = (S / scale).sqrt()
    return root[:, None] * V.T, U * root


def frozen_elements(model: nn.Module) -> int:
    """Elements of what is trained that never move, on all processes together: of factors, and of deltas (`sparse.py`) at edge tiles."""
    return sum(layer.idle_elements("default") for _, layer in lora_layers(model) if isinstance(layer, SparseFullLinear)) + sum(
        layer.lora_frozen["default"] * (layer.lora_A["default"].in_features + layer.lora_B["default"].out_features)
        for _, layer in lora_layers(model)
        if "default" in getattr(layer, "lora_frozen", {})
    )


def file_metadata(model: PeftModel) -> dict[str, str]:
    """Of the safetensors file that the model's adapter is saved in."""
    frozen = getattr(model, "frozen_rank", 0)
    return {"format": "pt", FROZEN_KEY: str(frozen)} if frozen else {"format": "pt"}


def read_frozen_rank(file: Path) -> int:
    """How many of the ranks of a saved adapter are frozen; 0 where it did not start from principal factors.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with safe_open(str(file), "pt") as handle:
            return int((handle.metadata() or {}).get(FROZEN_KEY, 0))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"adapter: {file} cannot be read ({error})") from error
