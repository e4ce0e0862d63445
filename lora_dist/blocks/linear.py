"""A named linear and the (O, I) view of its weight, whichever way round it is stored. Crosses rooms as a plain value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lora_dist.blocks.block_linear import BlockLinear


@dataclass(frozen=True)
class NamedLinear:
    """One linear of a model.

    Attributes:
        name: module name in the base model.
        module: `nn.Linear`, or GPT-2's `Conv1D`, which stores its weight as (I, O).
        transposed: whether the weight is stored as (I, O).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight_OI(self) -> Tensor:
        """The weight without gradient, as (O, I); a view, so writing to it writes the model. Of kept tiles a copy, unpacked."""
        if isinstance(self.module, BlockLinear):
            return self.module.dense_OI()
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()


def is_transposed(module: nn.Module) -> bool | None:
    """True for `Conv1D`, False for `nn.Linear`, None for anything that is no linear."""
    if isinstance(module, nn.Linear):
        return False
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    return None


def find_linears(root: nn.Module, prefix: str = "") -> list[NamedLinear]:
    """All linears below `root`, in module order, named with `prefix` in front."""
    found = []
    for name, module in root.named_modules(prefix=prefix):
        transposed = is_transposed(module)
        if transposed is not None:
            found.append(NamedLinear(name, module, transposed))
    return found
