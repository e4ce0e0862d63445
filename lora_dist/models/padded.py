"""bitsandbytes' 4-bit linear with every row of the weight in blocks of its own.

bitsandbytes 0.50 takes rows whose width is a multiple of 16 for whole blocks of 64 on CPUs with AVX-512: where they are not, weights
come back under another block's scale, wrong by a third. So rows are filled up with zeros to whole blocks, and inputs too; the
product is the same on every device. Imported by `quantised.py` where a base is quantised; needs bitsandbytes.
"""

from __future__ import annotations

import bitsandbytes as bnb
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""weights that share a scale, as in QLoRA"""


class PaddedLinear4bit(bnb.nn.Linear4bit):
    """`Linear4bit` whose `quant_state` is of shape (O, I filled up to whole blocks); `in_features` is the weight's own width."""

    @property
    def padding(self) -> int:
        """Columns of zeros behind a row."""
        return -self.in_features % BLOCK

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (0, self.padding)) if self.padding else x)
