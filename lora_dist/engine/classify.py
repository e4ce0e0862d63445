"""Texts -> labels and how sure the classifier is of them. Called by `cli/classify.py` and `scripts/inference_example.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_dist.arguments import ClassifyArgs
from lora_dist.data.classification import encode_texts
from lora_dist.engine.open_model import open_model
from lora_dist.evaluation.classes import class_logits
from lora_dist.log import UserError
from lora_dist.models.heads import takes_token_types
from lora_dist.parallel import World

Text = tuple[str, str | None]


@dataclass(frozen=True)
class Answer:
    """What a text was found to be."""

    label: str
    """its name, or the number that was predicted"""
    confidence: float | None
    """probability of the label; None for a number"""


class Classifier:
    """A classifier ready to answer.

    Raises:
        UserError: what is missing, broken, or no classifier.
    """

    def __init__(self, args: ClassifyArgs, world: World):
        self._args, self._world = args, world
        opened = open_model(args.model, args.adapter, world=world, trust_remote_code=args.trust_remote_code)
        if not opened.base.heads:
            raise UserError(
                f"MODEL: {args.model} is no classifier, expected one, or the base of an adapter trained with model.task_type SEQ_CLS"
            )
        self._model, self._tokenizer = opened.model, opened.base.tokenizer
        self._config = opened.base.model.config
        self._token_types = takes_token_types(opened.base.model, self._tokenizer)
        context = getattr(self._config, "max_position_embeddings", None) or 512
        self.max_length = args.max_length or min(context, self._tokenizer.model_max_length)

    @torch.no_grad()
    def answer(self, texts: Sequence[Text]) -> list[Answer]:
        """In order, a batch at a time."""
        found: list[Answer] = []
        pad = self._config.get_text_config().pad_token_id or 0
        for start in range(0, len(texts), self._args.batch_size):
            chosen = texts[start : start + self._args.batch_size]
            told = self._token_types and any(second is not None for _, second in chosen)
            rows = encode_texts(self._tokenizer, chosen, self.max_length, token_types=told)
            shape = (len(rows), max(1, *(len(row.ids) for row in rows), 1))
            ids_BL, mask_BL, types_BL = (torch.full(shape, value, dtype=torch.int64) for value in (pad, 0, 0))
            for b, row in enumerate(rows):
                ids_BL[b, : len(row.ids)] = torch.from_numpy(row.ids)
                types_BL[b, : len(row.ids)] = torch.from_numpy(row.types)
                mask_BL[b, : max(1, len(row.ids))] = 1
            ids_BL, mask_BL, types_BL = (values.to(self._world.device) for values in (ids_BL, mask_BL, types_BL))
            logits_BC = class_logits(self._model, ids_BL, mask_BL, types_BL if told else None).float().cpu()
            found += [self._answer(logits_C) for logits_C in logits_BC]
        return found

    def _answer(self, logits_C: torch.Tensor) -> Answer:
        if len(logits_C) == 1:
            return Answer(f"{float(logits_C):.4f}", None)
        probabilities_C = logits_C.softmax(0)
        best = int(probabilities_C.argmax())
        return Answer(str(self._config.id2label.get(best, best)), float(probabilities_C[best]))
