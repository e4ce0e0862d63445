"""The loss of a batch equals transformers' own on each of its examples alone: padded, packed and grouped, for every architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lora_dist.data.examples import side_by_side
from lora_dist.data.rows import RowBatch
from lora_dist.models.loss import causal_loss_sum
from tests.tiny import VOCABULARY, tiny_model

KINDS = ("llama", "qwen2", "qwen3", "mistral", "qwen2-sliding", "gpt2")  # mistral and qwen2-sliding: windows of 8 tokens
LENGTHS = (21, 5, 17, 2, 13, 9)


def make_examples() -> list[tuple]:
    """Ids and labels of examples, the first half of each no label."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        found.append((ids.numpy(), labels.numpy()))
    return found


def reference(model: PreTrainedModel) -> tuple[float, int]:
    """Sum over label tokens, by `model(input_ids, labels)` on one example after the other; and their number."""
    total, count = 0.0, 0
    for ids, labels in make_examples():
        tokens = int((labels[1:] != -100).sum())
        loss = model(input_ids=torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None]).loss
        total, count = total + float(loss) * tokens, count + tokens
    return total, count


def batches() -> dict[str, list[RowBatch]]:
    """The same examples side by side, in rows of several, and sorted by length."""
    examples = make_examples()
    by_length = sorted(examples, key=lambda example: -len(example[0]))
    return {
        "padded": [side_by_side([[example] for example in examples] + [None], packed=False)],
        "packed": [side_by_side([examples[:3], None, examples[3:]], packed=True)],
        "grouped": [side_by_side([[example] for example in by_length[i : i + 2]], packed=False) for i in (0, 2, 4)],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_transformers_own_on_single_examples(kind: str, attention: str):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected, tokens = reference(model)
        mixed = batches()["packed"][0]
        for name, each in batches().items():
            found = sum(float(causal_loss_sum(model, b.input_ids_BL, b.labels_BL, b.position_ids_BL)) for b in each)
            assert sum(int((b.labels_BL[:, 1:] != -100).sum()) for b in each) == tokens
            assert found / tokens == pytest.approx(expected / tokens, abs=1e-5), name
        # Without positions the examples of a row see each other, and the figure is another: the comparison can fail.
        assert abs(float(causal_loss_sum(model, mixed.input_ids_BL, mixed.labels_BL)) - expected) / tokens > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_gradients_too(kind: str, checkpointing: bool):
    """Packed under gradient checkpointing, against the sum over single examples."""
    model = tiny_model(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    total = torch.zeros(())
    for ids, labels in make_examples():
        count = int((labels[1:] != -100).sum())
        total = total + model(input_ids=torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None]).loss * count
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    (packed,) = batches()["packed"]
    causal_loss_sum(model, packed.input_ids_BL, packed.labels_BL, packed.position_ids_BL).backward()
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()) + 1e-6, name
