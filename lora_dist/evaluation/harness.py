"""A model as lm-eval sees one, spread over processes. The only file, with `zeroshot.py`, that imports lm-eval.

lm-eval's own `HFLM` gives every process whole questions and pads each batch's logits over the whole vocabulary and length. Here every
process sees all requests, as if it were alone; equal inputs are computed once, batches are made of the longest first, and each process
computes every world-th of them. So a batch is the same for any number of processes, and so is every figure. Logits are computed only
where an answer stands, and turned into log-probabilities in float32.

Letters for shapes: `B` inputs, `L` tokens, `K` positions that are scored, `V` vocabulary, `C` tokens of an answer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from lora_dist.evaluation.together import together
from lora_dist.parallel import World

Progress = Callable[[int], Callable[[], None]]
Answer = tuple[float, bool]
_NO_LIMIT = 10**9
_CONTEXTS = 1024  # encoded contexts that are kept: the choices of a question share theirs


@dataclass
class _Input:
    """One row of a forward pass, and the requests that it answers."""

    tokens: list[int]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)
    """(number of the piece, its tokens)"""

    @property
    def scored(self) -> int:
        """Positions at the end that are needed."""
        return max(len(tokens) for _, tokens in self.answers)


class WorldLM(HFLM):
    """See the module's docstring. To lm-eval it is one process of one.

    Args:
        model: transformers' model, or a PEFT model.
        context: tokens of a question and its answer at most; more are cut off from the left.
        sharded: every forward pass is a collective.
        progress: given the number of batches, returns what to call after each.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, world: World, batch_size: int, context: int, sharded: bool, progress: Progress
    ):
        tokenizer = copy.deepcopy(tokenizer)  # HFLM gives it a padding token
        tokenizer.model_max_length = _NO_LIMIT  # what is too long is cut here, and counted: no warning is needed
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context, backend="causal")
        self._world, self._sharded, self._progress = world, sharded, progress
        forward = getattr(model, "get_base_model", lambda: model)().forward
        self._keeps_logits = "logits_to_keep" in inspect.signature(forward).parameters
        self._encoded = lru_cache(_CONTEXTS)(lambda text: tuple(HFLM.tok_encode(self, text)))
        self.truncated = 0
        """requests cut off from the left since it was last set to 0"""
        self.failed_on_all = False
        """every process knows of the failure that ended the last task"""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is None and not options:
            return list(self._encoded(string))
        return super().tok_encode(string, add_special_tokens, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Collective. Summed log-probability of every request's answer, and whether each token of it is the likeliest."""
        pieces = [(n, *piece) for n, (_, context, answer) in enumerate(requests) for piece in self._pieces(context, answer)]
        inputs = self._inputs([(context, answer) for _, context, answer in pieces])
        size = override_bs or int(self.batch_size)
        batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        try:
            share = together(self._world, lambda: self._share(batches))
        except Exception:
            self.failed_on_all = True
            raise
        answers: dict[int, Answer] = {}
        for part in self._world.gather(share or {}):
            answers |= part
        whole = [(0.0, True)] * len(requests)
        for place, (number, _, _) in enumerate(pieces):
            (logprob, greedy), (so_far, all_greedy) = answers[place], whole[number]
            whole[number] = (so_far + logprob, all_greedy and greedy)
        return whole

    def _pieces(self, context: list[int], answer: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """An answer that is longer than the model's context is scored piece by piece, each of half a context behind what fits in front
        of it; any other as it is. (lm-eval ends with an error there.)"""
        self.truncated += len(context) + len(answer) > self.max_length + 1
        if len(answer) <= self.max_length:
            yield context, answer
            return
        step = max(1, self.max_length // 2)
        for start in range(0, len(answer), step):
            yield [*context, *answer[:start]], answer[start : start + step]

    def _inputs(self, pieces: Sequence[tuple[list[int], list[int]]]) -> list[_Input]:
        """What has to be computed, longest first: pieces that differ in their last token only share a row."""
        rows: dict[tuple[int, ...], _Input] = {}
        for number, (context, answer) in enumerate(pieces):
            tokens = [*context, *answer][-(self.max_length + 1) :][:-1]
            rows.setdefault(tuple(tokens), _Input(tokens)).answers.append((number, answer))
        return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))

    @torch.no_grad()
    def _share(self, batches: Sequence[Sequence[_Input]]) -> dict[int, Answer]:
        """This process's answers by number of the piece."""
        world = self._world
        answers: dict[int, Answer] = {}
        tick = self._progress(-(-len(batches) // world.size))
        for start in range(0, len(batches), world.size):
            number = start + world.rank
            if number < len(batches):
                answers |= self._answers(batches[number])
            elif self._sharded:  # the others' forward passes need this one
                self._answers(batches[-1])
            tick()
        return answers

    def _answers(self, batch: Sequence[_Input]) -> dict[int, Answer]:
        # Padded on the right, where nothing that is scored looks.
        longest = max(len(row.tokens) for row in batch)
        ids_BL = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, row in enumerate(batch):
            ids_BL[place, : len(row.tokens)] = torch.tensor(row.tokens)
        first = min(len(row.tokens) - row.scored for row in batch)
        logits_BKV = self._logits(ids_BL.to(self.device), first)
        numbers, sums, greedy = [], [], []
        for row, logits_KV in zip(batch, logits_BKV, strict=True):
            end = len(row.tokens) - first
            logprobs_KV = logits_KV[end - row.scored : end].float().log_softmax(-1)
            for number, answer in row.answers:
                answer_C = torch.tensor(answer, device=logprobs_KV.device)
                logprobs_CV = logprobs_KV[-len(answer) :]
                numbers.append(number)
                sums.append(logprobs_CV.gather(1, answer_C[:, None]).sum())
                greedy.append((logprobs_CV.argmax(-1) == answer_C).all())
        # One wait for the device a batch.
        return dict(zip(numbers, zip(torch.stack(sums).tolist(), torch.stack(greedy).tolist(), strict=True), strict=True))

    def _logits(self, ids_BL: Tensor, first: int) -> Tensor:
        """Logits (B, K, V) from position `first` on."""
        model: nn.Module = self.model
        if self._keeps_logits:
            return model(ids_BL, use_cache=False, logits_to_keep=ids_BL.shape[1] - first).logits
        return model(ids_BL, use_cache=False).logits[:, first:]
