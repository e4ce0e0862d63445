"""A decoder whose layers have numbers of heads and feed-forward widths of their own, as structured pruning leaves them.

Stands beside the weights it is for, where it needs torch and transformers only:
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. `config.layer_widths` says the widths, a list of each, one
number a layer. Written there by `export.py`, with the model's own family for Llama; `resize_layer` is called by `uneven.py` as well.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM


def resize_layer(layer: Any, heads: int, kv_heads: int, width: int, bias: list[str]) -> None:
    """Give a decoder layer these widths: new linears, without weights of value, on the device and in the precision of the old.

    Args:
        heads: query heads.
        width: of the feed-forward part.
        bias: linears that have one, whatever the family's have.
    """
    attention, mlp = layer.self_attn, layer.mlp
    rows, kv_rows = heads * attention.head_dim, kv_heads * attention.head_dim
    for part, name, inputs, outputs in (
        (attention, "q_proj", None, rows),
        (attention, "k_proj", None, kv_rows),
        (attention, "v_proj", None, kv_rows),
        (attention, "o_proj", rows, None),
        (mlp, "gate_proj", None, width),
        (mlp, "up_proj", None, width),
        (mlp, "down_proj", width, None),
    ):
        old = getattr(part, name)
        new = nn.Linear(
            old.in_features if inputs is None else inputs,
            old.out_features if outputs is None else outputs,
            bias=old.bias is not None or name in bias,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        setattr(part, name, new)
    attention.num_key_value_groups = heads // kv_heads
    for name, value in (("num_heads", heads), ("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if hasattr(attention, name):  # of families that reshape by them
            setattr(attention, name, value)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


class UnevenForCausalLM(LlamaForCausalLM):
    """The family's model, its layers resized."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widths = config.layer_widths
        for i, layer in enumerate(self.model.layers):
            heads, kv_heads = widths["num_attention_heads"][i], widths["num_key_value_heads"][i]
            resize_layer(layer, heads, kv_heads, widths["intermediate_size"][i], widths["bias"])
