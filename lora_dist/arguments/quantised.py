"""How a base is held, for the verbs that open one. Names are transformers' `BitsAndBytesConfig`'s, as in `config/model.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass
class QuantisedArgs:
    """By default as the adapter was trained: its folder remembers."""

    load_in_4bit: bool = False
    """Hold the linears of the decoder layers in 4 bits; default: as the adapter's base was in training."""
    load_in_8bit: bool = False
    """Hold them in int8."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Numbers that 4 bits stand for; with load_in_4bit."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the blocks too; with load_in_4bit."""
    as_stored: bool = False
    """Hold the base as it is stored, though the adapter was trained on a quantised one."""
    storage: Literal["dense", "blocks"] = "dense"
    """blocks: hold only the kept tiles of a pruned model's linears."""

    def problems(self) -> Iterator[str]:
        """Contradictions, one line each."""
        asked = [name for name in ("load_in_4bit", "load_in_8bit", "as_stored") if getattr(self, name)]
        if len(asked) > 1:
            yield f"{', '.join(asked)}: found together, expected one at most"
        if self.storage == "blocks" and self.load_in_8bit:
            yield "storage: found blocks with load_in_8bit, expected dense: int8 has a scale a row, which tiles cut"
        if not self.load_in_4bit and (self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant) != ("nf4", True):
            yield "bnb_4bit_quant_type, bnb_4bit_use_double_quant: found without load_in_4bit, expected it too"
