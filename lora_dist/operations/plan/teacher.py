"""What a dense model that is learnt from (`train.distill_from`) adds to a plan: its weights, what it says of a micro-batch, its forward pass.

Called by `choice.py`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from lora_dist.config import RunConfig
from lora_dist.log import UserError
from lora_dist.models.architecture import matrix_elements, prunable_linears
from lora_dist.models.blueprint import read_blueprint
from lora_dist.operations.plan.memory import SHARDED, Layout
from lora_dist.operations.plan.quantised import QuantisedLinear


class PlannedTeacher:
    """By its configuration alone.

    Raises:
        UserError: no configuration of a model there.
    """

    def __init__(self, config: RunConfig):
        train, model = config.train, config.model
        assert train.distill_from is not None
        self._in_4bit = train.distill_load_in_4bit
        self._matched = 0 if train.distill_hidden_weight == 0 else 1
        try:
            self._blueprint = read_blueprint(
                train.distill_from,
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )
        except UserError as error:
            raise error.renamed({"model.name_or_path": "train.distill_from"}) from error
        if self._matched and train.distill_hidden == "layers":
            self._matched = self._blueprint.layers

    @cached_property
    def _model(self) -> Any:
        return self._blueprint.build(torch.bfloat16)

    @cached_property
    def _parameters(self) -> list[tuple[tuple[int, ...], float]]:
        """Shape and bytes an element, 0 for those that the computing precision says."""
        model = self._model
        packed = {}
        if self._in_4bit:
            packed = {
                id(linear.module.weight): QuantisedLinear(linear, 4).held_bytes(True) / linear.weight_OI.numel()
                for linear in prunable_linears(model)
            }
        return [(tuple(p.shape), packed.get(id(p), 0.0)) for p in model.parameters()]

    def bytes(self, layout: Layout, element_bytes: int, *, tokens: int) -> int:
        """Held on a rank while a micro-batch's loss is computed.

        Args:
            element_bytes: of the precision that is computed in.
            tokens: of the micro-batch.
        """
        cut = layout.strategy in SHARDED
        n = (layout.shards or layout.processes) if cut else 1
        total = 0.0
        for shape, packed in self._parameters:
            rows, row = (shape or (1,))[0], torch.Size(shape[1:]).numel()
            total += -(-rows // n) * row * (packed or element_bytes)
        hidden = int(self._blueprint.config.get_text_config().hidden_size)
        if cut:
            total += self._blueprint.vocabulary * hidden * element_bytes  # its head, whole while chunks are made
        return int(total) + tokens * hidden * element_bytes * (1 + self._matched)

    def flops_a_token(self, length: int) -> float:
        """Of its forward pass, the head included; attention counted with its mask."""
        text = self._blueprint.config.get_text_config()
        width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * int(
            text.num_attention_heads
        )
        return 2.0 * matrix_elements(self._model) + 2.0 * length * width * self._blueprint.layers
