"""Losses without logits: values and gradients of the stock loss, nothing of the vocabulary's size kept, and when they are not to be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from lora_dist.engine.cross_entropy import choose_cross_entropy
from lora_dist.log import UserError
from lora_dist.models import chunked
from lora_dist.models.chunked import ChunkedHead, chunked_head, put_chunked_head
from lora_dist.models.loss import causal_loss_sum
from lora_dist.parallel import World
from tests.tiny import KINDS, VOCABULARY, tiny_model, tiny_windows


def labelled() -> tuple[Tensor, Tensor]:
    """(3, 20) ids, and labels of which a row has none and others lack some."""
    ids_BL = tiny_windows(3, 20)
    labels_BL = ids_BL.clone()
    labels_BL[0, :7] = -100
    labels_BL[1] = -100
    return ids_BL, labels_BL


def tuned(kind: str, dtype: torch.dtype, *, chunks: bool) -> Any:
    model = tiny_model(kind, dtype=dtype)
    if chunks:
        assert put_chunked_head(model)
    found = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for parameter in found.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    if chunks:
        head = chunked_head(found)
        assert head is not None
        head.chunked = True
    return found.eval()


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    loss = causal_loss_sum(model, *labelled())
    (loss * 0.01).backward()
    return float(loss.detach()), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_logits(kind: str, dtype: torch.dtype, tolerance: float, monkeypatch: Any) -> None:
    bytes_ = (2 if dtype == torch.float32 else 4) * VOCABULARY * 7  # 7 tokens: several chunks, the last one smaller
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", bytes_)
    expected, grads = loss_and_gradients(tuned(kind, dtype, chunks=False))
    found, chunked_grads = loss_and_gradients(tuned(kind, dtype, chunks=True))
    assert found == pytest.approx(expected, rel=tolerance / 10)
    assert grads.keys() == chunked_grads.keys() and grads
    for name, gradient in grads.items():
        assert float((chunked_grads[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize(
    ("dtype", "lesson", "rows"),
    [(torch.float32, False, 256), (torch.float32, True, 64), (torch.bfloat16, False, 128), (torch.bfloat16, True, 64)],
)
def test_a_chunk_is_what_its_bytes_have_room_for(dtype: torch.dtype, lesson: bool, rows: int) -> None:
    assert chunked.chunk_rows(torch.empty(1000, 1, dtype=dtype), 32000, 2**24, lesson=lesson) == rows
    assert chunked.chunk_rows(torch.empty(50, 1, dtype=dtype), 32000, 2**24, lesson=lesson) == 50
    assert chunked.chunk_rows(torch.empty(50, 1, dtype=dtype), 2**25, 2**24, lesson=lesson) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_targets_that_are_all_but_impossible_keep_their_loss(bias: bool) -> None:
    """Shares of exp(-200) are zero in float32; the loss is 200 or so, beside tokens whose share is near one."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, bias=bias).requires_grad_(False)
    with torch.no_grad():
        head.weight.mul_(100)
    made = ChunkedHead.of(head)
    made.chunked, made.chunk_bytes = True, 2 * 4 * 40 * 5
    hidden_BLH = torch.randn(2, 13, 8, requires_grad=True)
    logits_BLV = torch.nn.functional.linear(hidden_BLH, head.weight, head.bias)
    labels_BL = torch.cat([torch.zeros(2, 1).long(), logits_BLV[:, :-1].argmin(-1)], dim=1)
    labels_BL[:, 3] = logits_BLV[:, 2].argmax(-1)
    each = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="none")
    assert each.max() > 200 and each.min() < 1e-3
    expected = torch.autograd.grad(each.sum(), hidden_BLH)[0]
    with made.scoring(labels_BL):
        total = made(hidden_BLH)
    torch.testing.assert_close(total, each.detach().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, hidden_BLH)[0], expected, rtol=1e-5, atol=1e-4)


def test_nothing_as_large_as_the_logits_is_kept() -> None:
    ids_BL, labels_BL = labelled()

    def largest(*, chunks: bool) -> int:
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim and tensor.shape[-1] == VOCABULARY:
                kept.append(tensor.numel())
            return tensor

        model = tuned("llama", torch.float32, chunks=chunks)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            causal_loss_sum(model, ids_BL, labels_BL).backward()
        return max(kept, default=0)

    assert largest(chunks=False) >= 3 * 19 * VOCABULARY
    assert largest(chunks=True) == 0


def test_a_batch_without_labels_gives_zero_and_no_gradient() -> None:
    model = tuned("llama", torch.float32, chunks=True)
    ids_BL = tiny_windows(2, 8)
    loss = causal_loss_sum(model, ids_BL, torch.full_like(ids_BL, -100))
    loss.backward()
    assert float(loss) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_logits_are_what_they_were_elsewhere_and_a_tie_holds() -> None:
    model = tiny_model("opt")
    expected = model(tiny_windows(1, 9)).logits
    assert put_chunked_head(model)
    assert isinstance(model.lm_head, ChunkedHead) and model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(tiny_windows(1, 9)).logits, expected)
    assert chunked_head(model) is None  # its weights are not frozen
    model.requires_grad_(False)
    head = chunked_head(model)
    assert head is not None
    head.chunked = True
    causal_loss_sum(model, tiny_windows(1, 9), tiny_windows(1, 9))
    assert torch.equal(model(tiny_windows(1, 9)).logits, expected)


def capped(kind: str) -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=3.0)).eval()
    del sizes["head_dim"]
    return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)).eval()


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_logits_that_are_changed_behind_the_head_are_noticed(kind: str) -> None:
    model = capped(kind).requires_grad_(False)
    assert put_chunked_head(model)
    expected = float(causal_loss_sum(model, *labelled()))
    reason = choose_cross_entropy(model, World(), "auto", vocab_size=VOCABULARY, key="train.cross_entropy")
    assert reason is not None and "changed behind the head" in reason
    assert float(causal_loss_sum(model, *labelled())) == expected
    with pytest.raises(UserError, match=r"train\.cross_entropy: found chunked.*expected auto or logits"):
        choose_cross_entropy(model, World(), "chunked", vocab_size=VOCABULARY, key="train.cross_entropy")


@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_trained_head_needs_its_logits(trained: dict[str, list[str]]) -> None:
    model = tiny_model("llama")
    put_chunked_head(model)
    found = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj"], **trained}))
    reason = choose_cross_entropy(found, World(), "auto", vocab_size=VOCABULARY, key="train.cross_entropy")
    assert reason is not None and "trained" in reason
    causal_loss_sum(found, *labelled()).backward()
    assert any("lm_head" in name and p.grad is not None and p.grad.any() for name, p in found.named_parameters())


def test_auto_takes_chunks_where_it_may() -> None:
    model = tuned("llama", torch.float32, chunks=True)
    head = chunked_head(model)
    assert head is not None
    head.chunked = False
    assert choose_cross_entropy(model, World(), "logits", vocab_size=VOCABULARY, key="k") is None and not head.chunked
    assert choose_cross_entropy(model, World(), "auto", vocab_size=VOCABULARY, key="k") is None and head.chunked
