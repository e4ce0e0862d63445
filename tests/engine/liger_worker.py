"""Losses and adapter gradients with and without Liger's kernels, computed on a CPU by Triton's interpreter, as JSON; `test_liger.py` starts it.

TRITON_INTERPRET=1 python -m tests.engine.liger_worker KIND ...
"""

from __future__ import annotations

import json
import sys
from typing import Any

import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import interpreter

from lora_dist.adapter import attach_adapter
from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.engine.adapting import use_liger_kernel
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.chunked import chunked_head, put_chunked_head
from lora_dist.models.loss import causal_loss_sum
from tests.tiny import tiny_model, tiny_windows


def complete_the_interpreter() -> None:
    """It hands floats over as Python's, where Liger asks them for another dtype, and has no `rsqrt` of CUDA's library."""
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)


def adapted(kind: str, *, liger: bool) -> Any:
    """Masked LoRA on every linear, the loss by chunks, in the order in which a run puts them on."""
    base = tiny_model(kind)
    if liger:
        use_liger_kernel(base)
    assert put_chunked_head(base)
    masks, generator = {}, torch.Generator().manual_seed(0)
    for linear in prunable_linears(base):
        shape = tuple(linear.module.weight.shape)
        masks[linear.name] = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
    model = attach_adapter(base, Pattern(masks), r=4, lora_alpha=8, lora_dropout=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    head = chunked_head(model)
    assert head is not None
    head.chunked = True
    return model


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    ids_BL = tiny_windows(2, 12)
    loss = causal_loss_sum(model, ids_BL, ids_BL)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> int:
    complete_the_interpreter()
    kinds = sys.argv[1:]
    expected = {kind: loss_and_gradients(adapted(kind, liger=False)) for kind in kinds}  # before anything is replaced
    found = {}
    for kind in kinds:
        model = adapted(kind, liger=True)
        names = {module.forward.__func__.__qualname__ for module in model.modules()}
        names.add(sys.modules[type(model.get_base_model()).__module__].apply_rotary_pos_emb.__qualname__)
        loss, gradients = loss_and_gradients(model)
        then, before = expected[kind]
        assert gradients.keys() == before.keys() and gradients
        worst = max(float((gradients[name] - g).norm() / g.norm()) for name, g in before.items() if g.norm() > 0)
        found[kind] = {
            "kernels": sorted(name for name in names if "liger" in name.lower()),
            "loss": abs(loss / then - 1),
            "gradient": worst,
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
