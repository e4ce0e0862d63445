"""Labelled sentences and pairs of them: which columns hold them, how they become token ids, and the label of each row.

GLUE's subsets are in `glue.py`. Records lie in the cache that instruction data lies in
(`examples.py`), with `targets.npy` (N,) float64 beside them: the number to predict, or a label's place in the entry's list of labels.
Called by `engine/data.py` and `engine/classify.py`.

Letters for shapes: `N` examples, `B` rows, `L` tokens of a batch's longest row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lora_dist.data.examples import Examples, ExampleSplits
from lora_dist.data.glue import Subset
from lora_dist.data.records import BadRecordError, unpacked
from lora_dist.data.rows import FILLER, IGNORE_LABEL, RowBatch
from lora_dist.data.tokenise import tokenizer_digest
from lora_dist.log import UserError


@dataclass(frozen=True)
class ClassEncoder:
    """How a record becomes token ids and a label: everything but the records that the result depends on."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    subset: Subset
    regression: bool
    token_types: bool = False
    """the model is told which text of a pair a token is from"""

    kind = "classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """that are read"""
        return tuple(name for name in (self.subset.text, self.subset.pair, self.subset.label) if name is not None)

    def key_parts(self) -> dict[str, Any]:
        """JSON values that decide what a record becomes."""
        return {
            "format": self.kind,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "max_length": self.max_length,
            "columns": list(self.columns),
            "pair": self.subset.pair is not None,
            "regression": self.regression,
            **({"token_types": True} if self.token_types else {}),
        }

    def encode_batch(self, batch: Mapping[str, list]) -> dict[str, list]:
        """For `datasets.map`: a row a record, in order; of bad ones the reason and no tokens."""
        targets: list[str] = []
        bad: list[str | None] = []
        texts: list[tuple[str, str | None]] = []
        for record in unpacked(batch):
            try:
                pair, target = self._read(record)
                texts.append(pair)
                targets.append(target)
                bad.append(None)
            except BadRecordError as error:
                targets.append("")
                bad.append(str(error))
        encoded = iter(encode_texts(self.tokenizer, texts, self.max_length, token_types=self.token_types))
        nothing = EncodedText(np.empty(0, np.int64), np.empty(0, np.uint8), False)
        rows = [nothing if reason is not None else next(encoded) for reason in bad]
        return {
            "input_ids": [row.ids for row in rows],
            "labels": [row.types for row in rows],  # the cache's byte a token, where examples keep whether it is a label
            "lost": [0 for _ in rows],
            "answer_tokens": [0 for _ in rows],
            "truncated": [row.truncated for row in rows],
            "bad": bad,
            "target": targets,
        }

    def _read(self, record: Any) -> tuple[tuple[str, str | None], str]:
        if not isinstance(record, Mapping):
            raise BadRecordError("found no object, expected one with the columns " + ", ".join(self.columns))
        first = _sentence(record, self.subset.text)
        second = None if self.subset.pair is None else _sentence(record, self.subset.pair)
        return (first, second), self._target(record.get(self.subset.label))

    def _target(self, value: Any) -> str:
        where = self.subset.label
        if value is None or (isinstance(value, str) and not value.strip()):
            raise BadRecordError(f"{where}: missing")
        if isinstance(value, float) and value.is_integer() and not self.regression:
            value = int(value)
        if isinstance(value, list | dict) or (isinstance(value, float) and not self.regression):
            raise BadRecordError(f"{where}: found {value!r}, expected a whole number or a name")
        text = str(int(value)) if isinstance(value, bool) else str(value).strip()
        if self.regression:
            try:
                if not math.isfinite(float(text)):
                    raise ValueError
            except ValueError:
                raise BadRecordError(f"{where}: found {text[:30]!r}, expected a number") from None
        elif text == "-1":
            raise BadRecordError(f"{where}: found -1, which stands for no label")
        return text


class EncodedText(NamedTuple):
    """A text, or a pair, with the tokenizer's own special tokens."""

    ids: np.ndarray
    """(L,), int64"""
    types: np.ndarray
    """(L,), uint8: 1 for tokens of the second text of a pair, where that is asked for"""
    truncated: bool
    """tokens were cut off, of a pair those of the longer text first"""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str | None]], max_length: int, *, token_types: bool = False
) -> list[EncodedText]:
    """In order. A tokenizer that cannot leave a token of each text raises ValueError."""
    asked: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": token_types, "verbose": False}
    found = []
    for first, second in texts:
        pair = (first,) if second is None else (first, second)
        encoded = tokenizer(*pair, **asked)
        truncated = len(encoded["input_ids"]) > max_length
        if truncated:
            encoded = tokenizer(*pair, truncation=True, max_length=max_length, **asked)
        ids = np.array(encoded["input_ids"], np.int64)
        types = np.array(encoded["token_type_ids"], np.uint8) if token_types else np.zeros(len(ids), np.uint8)
        found.append(EncodedText(ids, types, truncated))
    return found


def _sentence(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise BadRecordError(f"{name}: missing")
    if not isinstance(value, str):
        raise BadRecordError(f"{name}: found {type(value).__name__}, expected a text")
    if not value.strip():
        raise BadRecordError(f"{name}: empty")
    return value


# --- labels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set are called, by number; no names for a number to predict."""

    names: tuple[str, ...]
    numbered: bool
    """the data holds numbers, not names"""

    def number(self, text: str) -> int:
        """Of a label as it stands in the data. Raises ValueError for one that is none."""
        if not self.numbered and text not in self.names:
            raise ValueError(text)
        number = int(text) if self.numbered else self.names.index(text)
        if not 0 <= number < len(self.names):
            raise ValueError(text)
        return number


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def find_labels(found: Sequence[str], subset: Subset, num_labels: int) -> Labels:
    """Labels by number and name.

    Args:
        found: labels as they stand in the training data, each once.
        num_labels: classes that the head tells apart.

    Raises:
        UserError: more labels than classes, or numbers that are none of theirs.
    """
    numbered = all(text.isdecimal() for text in found)
    if numbered:
        highest = max(map(int, found))
        if highest >= num_labels:
            raise UserError(
                f"model.num_labels: found {num_labels}, but data.label_column {subset.label} has the label {highest}, expected "
                f"{highest + 1} classes or more"
            )
        names = subset.labels if len(subset.labels) == num_labels else tuple(f"LABEL_{i}" for i in range(num_labels))
        return Labels(names, True)
    if set(found) <= set(subset.labels) and len(subset.labels) == num_labels:
        return Labels(subset.labels, False)
    if len(found) > num_labels:
        raise UserError(
            f"model.num_labels: found {num_labels}, but data.label_column {subset.label} has {len(found)} labels "
            f"({', '.join(sorted(found)[:8])}), expected as many classes"
            + (", or 1 to predict a number" if all(map(_is_number, found)) else "")
        )
    return Labels((*sorted(found), *(f"LABEL_{i}" for i in range(len(found), num_labels))), False)


class ClassRows:
    """Examples with a target each, side by side with an attention mask. Rows for a loader (`rows.py`), picklable.

    Args:
        targets_N: label numbers (int64) or numbers to predict (float32), by example.
        weights_N: what each counts in the loss.
        pad: token id that rows are filled up with.
        token_types: batches say which text of a pair a token is from.
    """

    def __init__(
        self,
        examples: Examples,
        targets_N: np.ndarray,
        weights_N: np.ndarray | None = None,
        *,
        pad: int = 0,
        token_types: bool = False,
    ):
        self._examples, self.targets_N, self._pad, self._token_types = examples, targets_N, pad, token_types
        self._weights_N = np.ones(len(targets_N), np.float32) if weights_N is None else weights_N

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (N,), int64."""
        return self._examples.lengths

    @property
    def digest(self) -> str:
        """sha256 of token ids, targets and weights."""
        digest = hashlib.sha256(f"classes {self._examples.digest}\n".encode())
        for values in (self.targets_N.astype("<f8"), self._weights_N.astype("<f4")):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def weighted(self, weights: Sequence[float] | None) -> ClassRows:
        """The same, each counting as its class does; None: as it is."""
        if weights is None:
            return self
        return self._like(self._examples, self.targets_N, np.asarray(weights, np.float32)[self.targets_N])

    def subset(self, rows: np.ndarray) -> ClassRows:
        """The examples at these positions, in this order."""
        return self._like(self._examples.subset(rows), self.targets_N[rows], self._weights_N[rows])

    def _like(self, examples: Examples, targets_N: np.ndarray, weights_N: np.ndarray) -> ClassRows:
        return ClassRows(examples, targets_N, weights_N, pad=self._pad, token_types=self._token_types)

    def take(self, n: int) -> ClassRows:
        """The first n examples, or all if there are fewer."""
        return self if n >= len(self) else self.subset(np.arange(n))

    def by_length(self) -> ClassRows:
        """The same from the longest to the shortest."""
        return self.subset(np.argsort(-self.lengths, kind="stable"))

    def batch(self, rows: Sequence[int] | np.ndarray) -> RowBatch:
        """Examples (len(rows), L) filled up on the right; filler rows count nothing, and attend to one token."""
        read = self._examples.batch(rows)
        lengths = [0 if row == FILLER else int(self.lengths[row]) for row in rows]
        mask_BL = (torch.arange(read.input_ids_BL.shape[1]) < torch.tensor(lengths)[:, None].clamp(min=1)).long()
        ids_BL = torch.where(mask_BL.bool(), read.input_ids_BL, self._pad)
        numbers = np.asarray(rows)
        real = numbers != FILLER
        targets_B = torch.from_numpy(np.where(real, self.targets_N[np.maximum(numbers, 0)], 0).astype(self.targets_N.dtype))
        weights_B = torch.from_numpy(np.where(real, self._weights_N[np.maximum(numbers, 0)], 0).astype(np.float32))
        labels_BL = torch.full_like(ids_BL, IGNORE_LABEL)
        types_BL = (read.labels_BL != IGNORE_LABEL).long() if self._token_types else None
        return RowBatch(ids_BL, labels_BL, None, read.tokens, mask_BL, targets_B, weights_B, types_BL)


def class_rows(
    loaded: ExampleSplits, encoder: ClassEncoder, num_labels: int, pad: int
) -> tuple[dict[str, ClassRows], Labels | None]:
    """Rows of each split, and the labels; None where a number is predicted.

    Raises:
        UserError: labels that do not fit the head, or that the training data does not have.
    """
    form: Any = {"pad": pad, "token_types": encoder.token_types}
    if encoder.regression:
        return {
            name: ClassRows(examples, loaded.target_numbers[name].astype(np.float32), **form)
            for name, examples in loaded.splits.items()
        }, None
    first = next(iter(loaded.splits))
    labels = find_labels(loaded.target_names[first], encoder.subset, num_labels)
    rows = {}
    for name, examples in loaded.splits.items():
        try:
            numbers = np.array([labels.number(text) for text in loaded.target_names[name]], np.int64)
        except ValueError as error:
            raise UserError(
                f"data.label_column: the {name} split has a label that is none of {', '.join(labels.names)} ({error}), expected the "
                f"labels of the {first} split"
            ) from None
        rows[name] = ClassRows(examples, numbers[loaded.target_numbers[name].astype(np.int64)], **form)
    return rows, labels


def balanced_weights(targets_N: np.ndarray, num_labels: int) -> list[float]:
    """n / (classes * count), as scikit-learn's `balanced`; 0 for a class that does not occur."""
    counts = np.bincount(targets_N, minlength=num_labels)
    return [float(len(targets_N) / (num_labels * count)) if count else 0.0 for count in counts]
