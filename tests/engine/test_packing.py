"""The start-up proof that packed examples do not see each other, on models that keep them apart and on models that do not."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from lora_dist.engine.packing import require_separate
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.tiny import VOCABULARY, tiny_model


def check(model: torch.nn.Module, rows: int = 2, max_length: int = 64) -> None:
    require_separate(model, World(), vocab_size=VOCABULARY, max_length=max_length, rows=rows, kernel="sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-sliding", "qwen3", "gpt2"])
def test_models_that_keep_them_apart(kind: str, dtype: torch.dtype):
    model = tiny_model(kind, dtype=dtype).train()
    check(model)
    check(model, rows=1, max_length=5)
    assert model.training


class Mixes(torch.nn.Module):
    """Takes positions, and attends across them."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.model = tiny_model("llama", dtype=dtype)

    def forward(self, input_ids, position_ids=None, **rest):
        mask = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_them(dtype: torch.dtype):
    with pytest.raises(
        UserError, match=r"data\.packing: found true, but this model does not keep examples apart with sdpa attention"
    ):
        check(Mixes(dtype))


def test_opt_counts_positions_itself():
    with pytest.raises(UserError, match=r"is 0\.\d+ nats a token off where it shares a row"):
        check(tiny_model("opt"))


def test_alibi_has_no_positions_to_start_anew():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UserError, match=r"data\.packing"):
        check(model)
