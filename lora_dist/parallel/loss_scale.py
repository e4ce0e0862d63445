"""The dynamic loss scale of fp16, as torch's `GradScaler` moves it, but told of an overflow instead of looking for it itself.

All strategies share it: each knows the global gradient norm anyway, whose being finite on every process is the same question.
"""

from __future__ import annotations

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
MIN_SCALE = 1.0
"""below this, overflow is no longer the scale's fault"""


class LossScale:
    """Halved at an overflow (that step is skipped), doubled after 2,000 good steps in a row.

    Attributes:
        scale: what the loss is multiplied by.
        good_steps: since the last change.
    """

    def __init__(self, scale: float = INITIAL_SCALE, good_steps: int = 0):
        self.scale, self.good_steps = scale, good_steps

    def update(self, *, overflow: bool) -> None:
        if overflow:
            self.scale, self.good_steps = self.scale * 0.5, 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2.0, 0

    @property
    def exhausted(self) -> bool:
        return self.scale < MIN_SCALE
