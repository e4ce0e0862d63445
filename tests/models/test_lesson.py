"""A teacher's lesson against a plain torch loss on whole logits: values and gradients, whole and cut to the largest probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dist.models import chunked
from lora_dist.models.chunked import ChunkedHead
from lora_dist.models.lesson import Lesson, TopLesson, WholeLesson, largest
from lora_dist.models.loss import causal_loss_sum
from tests.tiny import VOCABULARY, tiny_model, tiny_windows

MIXES = [(0.5, 2.0), (0.3, 1.0), (1.0, 1.5), (0.0, 2.0), (1.0, 1.0)]
H = 24


class Student(nn.Module):
    """A head behind hidden states that are parameters, so that their gradient can be looked at."""

    def __init__(self, hidden_BLH: Tensor, head: nn.Linear, *, chunks: bool):
        super().__init__()
        self.hidden_BLH = nn.Parameter(hidden_BLH.clone())
        self.head = ChunkedHead.of(head) if chunks else head
        if chunks:
            self.head.chunked = True

    def forward(self, **_inputs: Any) -> Any:
        return type("Output", (), {"logits": self.head(self.hidden_BLH)})()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Student and teacher of (3, 20) tokens, of which a row has no labels and others lack some; chunks of a few tokens."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 8 * VOCABULARY * 7)
    generator = torch.Generator().manual_seed(5)
    labels_BL = tiny_windows(3, 20)
    labels_BL[0, :7] = -100
    labels_BL[1] = -100
    heads = []
    for _ in range(2):
        head = nn.Linear(H, VOCABULARY).requires_grad_(False)
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        heads.append(head)
    hidden = [torch.randn(3, 20, H, generator=generator) for _ in range(2)]
    return {"labels": labels_BL, "student": (hidden[0], heads[0]), "teacher": (hidden[1], heads[1])}


def reference(
    given: dict[str, Any], alpha: float, temperature: float, k: int | None = None
) -> tuple[float, float, float, Tensor]:
    """Loss, CE, KL and the gradient of the student's hidden states, in float64. `k`: the others are one outcome more."""
    hidden, head = given["student"]
    hidden_BLH = hidden.double().requires_grad_()
    targets_T = given["labels"][:, 1:].reshape(-1)
    kept = targets_T != -100
    s_NV = F.linear(hidden_BLH, head.weight.double(), head.bias.double())[:, :-1].flatten(0, 1)[kept]
    teacher_hidden, teacher_head = given["teacher"]
    t_NV = F.linear(teacher_hidden.double(), teacher_head.weight.double(), teacher_head.bias.double())[:, :-1].flatten(0, 1)[kept]
    ce = F.cross_entropy(s_NV, targets_T[kept], reduction="sum")
    p, q = (t_NV / temperature).softmax(-1), (s_NV / temperature).softmax(-1)
    if k is not None:
        order = p.argsort(-1, descending=True)
        p, q = p.gather(1, order), q.gather(1, order)
        p, q = (torch.cat([x[:, :k], x[:, k:].sum(1, keepdim=True)], 1) for x in (p, q))
    kl = (p * (p.log() - q.log())).sum()
    loss = (1 - alpha) * ce + alpha * temperature**2 * kl
    loss.backward()
    assert hidden_BLH.grad is not None
    return float(loss), float(ce), float(kl), hidden_BLH.grad


def found(given: dict[str, Any], lesson: Lesson, *, chunks: bool) -> tuple[float, float, float, Tensor]:
    student = Student(*given["student"], chunks=chunks)
    loss = causal_loss_sum(student, given["labels"], given["labels"], lesson=lesson)
    (loss * 0.25).backward()
    assert student.hidden_BLH.grad is not None
    return float(loss), float(lesson.ce), float(lesson.kl), student.hidden_BLH.grad * 4


def compare(expected: tuple[float, float, float, Tensor], got: tuple[float, float, float, Tensor]) -> None:
    assert got[:3] == pytest.approx(expected[:3], rel=1e-6)
    assert float((got[3] - expected[3]).norm()) <= 1e-6 * float(expected[3].norm())
    assert not got[3][1].any() and not got[3][0, :6].any()  # tokens without a label teach nothing


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize(("alpha", "temperature"), MIXES)
def test_loss_and_gradient_are_those_of_whole_logits(
    given: dict[str, Any], alpha: float, temperature: float, chunks: bool
) -> None:
    hidden, head = given["teacher"]
    lesson = WholeLesson(hidden, head.weight, head.bias, alpha, temperature)
    compare(reference(given, alpha, temperature), found(given, lesson, chunks=chunks))


def top(given: dict[str, Any], k: int, alpha: float, temperature: float, dtype: torch.dtype = torch.float32) -> TopLesson:
    hidden, head = given["teacher"]
    logits_NV = head(hidden)[:, :-1].flatten(0, 1)[given["labels"][:, 1:].reshape(-1) != -100]
    index_NK, log_p_NK, log_rest_N = largest(logits_NV, k, temperature)
    return TopLesson(index_NK, log_p_NK.to(dtype), log_rest_N, alpha, temperature)


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
@pytest.mark.parametrize(("alpha", "temperature"), MIXES)
def test_of_the_largest_the_rest_is_one_outcome(
    given: dict[str, Any], alpha: float, temperature: float, k: int, chunks: bool
) -> None:
    compare(reference(given, alpha, temperature, k), found(given, top(given, k, alpha, temperature), chunks=chunks))


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize(("alpha", "temperature"), MIXES)
def test_all_of_the_vocabulary_is_the_whole_lesson(given: dict[str, Any], alpha: float, temperature: float, chunks: bool) -> None:
    compare(reference(given, alpha, temperature), found(given, top(given, VOCABULARY, alpha, temperature), chunks=chunks))


def test_fewer_outcomes_never_diverge_more(given: dict[str, Any]) -> None:
    divergences = [found(given, top(given, k, 1.0, 1.0), chunks=True)[2] for k in (1, 4, 16, 64, VOCABULARY)]
    assert divergences == sorted(divergences) and divergences[0] < 0.9 * divergences[-1]


def test_half_precision_on_disk_moves_no_logit_as_a_whole(given: dict[str, Any]) -> None:
    """Probabilities that do not add up to 1 would push all logits the same way: gradients by logits add up to 0."""
    lesson = top(given, 8, 1.0, 1.0, torch.float16)
    n = len(lesson._index_NK)
    logits_NV = torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(1))
    gradient_NV = logits_NV.softmax(-1)
    lesson.take(0, logits_NV, gradient_NV, 1.0)
    assert float(gradient_NV.sum(1).abs().max()) < 1e-6


def test_a_teacher_that_is_the_student_has_nothing_to_teach(given: dict[str, Any]) -> None:
    hidden, head = given["student"]
    _, _, kl, gradient = found(given, WholeLesson(hidden, head.weight, head.bias, 1.0, 2.0), chunks=True)
    assert abs(kl) < 1e-4 and float(gradient.norm()) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(given: dict[str, Any], dtype: torch.dtype, temperature: float) -> None:
    expected = reference(given, 0.5, temperature)
    for name in ("student", "teacher"):
        hidden, head = given[name]
        given[name] = (hidden.to(dtype), head.to(dtype))
    lesson = WholeLesson(*[given["teacher"][0], given["teacher"][1].weight, given["teacher"][1].bias], 0.5, temperature)
    got = found(given, lesson, chunks=True)
    assert got[:3] == pytest.approx(expected[:3], rel=5e-3)
    assert float((got[3].double() - expected[3]).norm()) <= 0.02 * float(expected[3].norm())


def test_a_lesson_without_label_tokens(given: dict[str, Any]) -> None:
    hidden, head = given["teacher"]
    given["labels"][:] = -100
    loss, ce, kl, gradient = found(given, WholeLesson(hidden, head.weight, head.bias, 0.5, 2.0), chunks=True)
    assert (loss, ce, kl) == (0, 0, 0) and not gradient.any()


def test_nothing_as_large_as_the_logits_is_kept() -> None:
    """Of a whole model: neither the student's logits nor the teacher's."""
    model, ids_BL = tiny_model("llama"), tiny_windows(3, 20)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert chunked.put_chunked_head(model)
    model.lm_head.chunked = True
    hidden_BLH = torch.randn(3, 20, 32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.ndim and tensor.shape[-1] == VOCABULARY else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lesson = WholeLesson(hidden_BLH, model.lm_head.weight, None, 0.5, 2.0)
        causal_loss_sum(model, ids_BL, ids_BL, lesson=lesson).backward()
    assert kept and max(kept) == 0 and math.isfinite(float(lesson.kl))


def test_a_listening_head_makes_no_logits() -> None:
    model, ids_BL = tiny_model("llama"), tiny_windows(2, 9)
    assert chunked.put_chunked_head(model)
    expected = model(ids_BL, output_hidden_states=True).hidden_states[-1]
    with model.lm_head.listening() as heard:
        assert model(ids_BL).logits.shape == (2, 9, 1)
    assert len(heard) == 1 and torch.equal(heard[0], expected)
    assert model(ids_BL).logits.shape == (2, 9, VOCABULARY)
