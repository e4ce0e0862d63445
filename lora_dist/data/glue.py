"""GLUE's subsets: their columns on the hub and in their own files, labels and metrics; and the columns of other labelled data.

Called by `classification.py` and `engine/data.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from lora_dist.data.files import is_local
from lora_dist.log import UserError


@dataclass(frozen=True)
class Subset:
    """A task: its columns, what is measured, and its labels."""

    text: str
    pair: str | None
    label: str = "label"
    labels: tuple[str, ...] = ()
    """names in the order of their numbers; none for a number to predict"""
    metrics: tuple[str, ...] = ("accuracy",)
    """the first chooses the best model"""
    validation: str = "validation"
    """split to evaluate on"""
    own_files: tuple[str, str | None, str] | None = None
    """text, pair and label column in GLUE's own files, where they are not the hub's"""
    no_header: tuple[str, ...] = ()
    """columns of GLUE's own files, where these do not name them"""


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": Subset("sentence", None, labels=("unacceptable", "acceptable"), metrics=("matthews_correlation", "accuracy"),
        no_header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Subset("sentence", None, labels=("negative", "positive")),
    "mrpc": Subset(
        "sentence1", "sentence2", labels=("not_equivalent", "equivalent"), metrics=("f1", "accuracy"),
        own_files=("#1 String", "#2 String", "Quality"),
    ),
    "qqp": Subset(
        "question1", "question2", labels=("not_duplicate", "duplicate"), metrics=("f1", "accuracy"),
        own_files=("question1", "question2", "is_duplicate"),
    ),
    "stsb": Subset(
        "sentence1", "sentence2", metrics=("pearson", "spearmanr"), own_files=("sentence1", "sentence2", "score"),
    ),
    "mnli": Subset(
        "premise", "hypothesis", labels=("entailment", "neutral", "contradiction"), validation="validation_matched",
        own_files=("sentence1", "sentence2", "gold_label"),
    ),
    "qnli": Subset("question", "sentence", labels=_ENTAILMENT),
    "rte": Subset("sentence1", "sentence2", labels=_ENTAILMENT),
    "wnli": Subset("sentence1", "sentence2", labels=("not_entailment", "entailment")),
}  # fmt: skip
"""of the hub's `glue`; files of one's own may be given as one, too"""
HUB_NAMES = ("glue", "nyu-mll/glue")


def subset_of(
    dataset_name: str,
    config_name: str | None,
    *,
    text: str | None,
    pair: str | None,
    label: str | None,
    regression: bool,
    binary: bool,
    columns: Collection[str] = (),
) -> Subset:
    """GLUE's own columns, or the ones that are named.

    Args:
        regression: a number is predicted, where the table does not say.
        columns: of the files, where they are at hand: GLUE's own have other names than the hub's.

    Raises:
        UserError: a subset that GLUE does not have.
    """
    if config_name not in GLUE and (dataset_name in HUB_NAMES or (config_name and is_local(dataset_name))):
        raise UserError(
            f"data.dataset_config_name: found {config_name} with {dataset_name}, expected one of GLUE's subsets: {', '.join(GLUE)}"
            + ("; or none, for files of another kind" if dataset_name not in HUB_NAMES else "")
        )
    known = GLUE.get(config_name or "") if dataset_name in HUB_NAMES or is_local(dataset_name) else None
    if known is not None:
        own = known.own_files
        if own is not None and {name for name in own if name is not None} <= set(columns):
            known = dataclasses.replace(known, text=own[0], pair=own[1], label=own[2])
        return dataclasses.replace(known, text=text or known.text, pair=pair or known.pair, label=label or known.label)
    metrics = ("pearson", "spearmanr") if regression else ("accuracy", "f1") if binary else ("accuracy",)
    return Subset(text or "sentence", pair, label or "label", metrics=metrics)


def missing_columns(subset: Subset, columns: Collection[str], where: str) -> list[str]:
    """A line for each column that is read and that the records do not have."""
    read = {"data.text_column": subset.text, "data.text_pair_column": subset.pair, "data.label_column": subset.label}
    found = ", ".join(map(str, columns))
    return [
        f"{key}: found no column {name} in {where}, expected one of its columns: {found}"
        for key, name in read.items()
        if name is not None and name not in columns
    ]
