"""Where text comes from: a hub data set, a local directory or local files, in splits. Called by `text.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from lora_dist.data.files import LocalSplit, directory_splits, files_split, is_local, require_contents
from lora_dist.data.hub import HubSplit, hub_splits
from lora_dist.log import UserError


@dataclass(frozen=True)
class TextSource:
    """What the user asked for, as in the options of the same names under `data.`."""

    dataset_name: str
    """hub name, local directory, or comma-separated local files .txt .json .jsonl .csv .parquet (JSON and CSV also as .gz)"""
    dataset_config_name: str | None = None
    """configuration of a hub data set; wikitext: wikitext-2-raw-v1 if None; c4 has none and ignores it"""
    validation_file: str | None = None
    """comma-separated local files that are the validation split, whatever the data set has"""
    text_column: str = "text"
    """column of JSON, CSV, parquet and hub rows"""
    document_separator: str | None = None
    """splits running text into documents"""
    column_names: tuple[str, ...] = ()
    """of CSV and TSV files without a header"""
    train_split: str = "train"
    validation_split: str = "validation"
    """what a hub data set or directory calls them"""


def find_splits(
    source: TextSource, wanted: Iterable[str], records: Path, *, noun: str = "text"
) -> dict[str, LocalSplit | HubSplit]:
    """The wanted splits that the source has, in the order wanted.

    Args:
        source: the data set.
        wanted: split names.
        records: folder to note hub revisions in.
        noun: what files are expected to hold, for messages.

    Raises:
        UserError: for what is missing, empty, unreadable or of an unknown format; and if none of the wanted splits is there.
    """
    wanted = tuple(wanted)
    found: dict[str, LocalSplit | HubSplit] = {}
    path = Path(source.dataset_name).expanduser()
    if path.is_dir():
        found.update(directory_splits(path, source.text_column))
    elif is_local(source.dataset_name):
        found["train"] = files_split(source.dataset_name, source.text_column, "data.dataset_name")
    else:
        found.update(hub_splits(source.dataset_name, source.dataset_config_name, source.text_column, wanted, records))
    for name, asked in (("train", source.train_split), ("validation", source.validation_split)):
        if asked != name and asked not in found:
            raise UserError(f"data.{name}_split: found {asked}, expected one of {source.dataset_name}: {', '.join(found)}")
        if asked != name:
            found[name] = found[asked]
    if source.validation_file is not None:
        found["validation"] = files_split(source.validation_file, source.text_column, "data.validation_file")
    chosen = {name: found[name] for name in wanted if name in found}
    if not chosen:
        names = ", ".join(found) or "none"
        raise UserError(f"data.dataset_name: {source.dataset_name} has the splits {names}, expected {' or '.join(wanted)}")
    for name, split in chosen.items():
        if isinstance(split, LocalSplit):
            require_contents(split, noun)
            if source.column_names:
                chosen[name] = dataclasses.replace(split, names=source.column_names)
    return chosen


def cache_root(cache_dir: str | Path | None) -> Path:
    """Where tokens and notes on hub revisions are kept: `cache_dir`, or `lora_dist/` in the Hugging Face cache."""
    return Path(cache_dir).expanduser() if cache_dir is not None else Path(constants.HF_HOME) / "lora_dist"


def require_source(source: TextSource, cache_dir: str | Path | None, *, noun: str = "text") -> None:
    """What `find_splits` would raise for the splits to train and evaluate on, before a model is loaded."""
    find_splits(source, ("train", "validation"), cache_root(cache_dir) / "hub", noun=noun)
