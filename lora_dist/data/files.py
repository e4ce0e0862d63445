"""Text in local files: which files make a split, a key of their content, and the parts they are read in.

A split yields parts: `.txt` files, which are running text, and tables of rows (JSON, CSV, parquet). Nothing is parsed before its
`parts` are asked for. Called by `sources.py`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList, get_data_patterns
from datasets.exceptions import DatasetsError

from lora_dist.log import UserError

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
EXTENSIONS = " ".join(_BUILDERS)


@dataclass(frozen=True)
class LocalSplit:
    """A split that lies in local files."""

    files: tuple[Path, ...]
    column: str
    option: str
    """what the user set to get these files, for messages"""
    names: tuple[str, ...] = ()
    """of the columns of CSV and TSV files without a header"""

    def content_key(self) -> Any:
        """JSON values that change with the content of the files and with nothing else; where they lie does not matter."""
        return [[_builder_of(path), _file_digest(path), *self.names] for path in self.files]

    def parts(self, scratch: Path) -> Iterator[Path | datasets.Dataset]:
        """Every `.txt` file by itself, and every run of files of another format as one table with the one column `text`.

        Args:
            scratch: folder for converted copies, needed as long as the tables are.

        Raises:
            UserError: for files that do not parse, and for a missing column.
        """
        for builder, group in groupby(self.files, key=_builder_of):
            files = list(group)
            if builder == "text":
                yield from files
                continue
            names = ", ".join(str(path) for path in files)
            try:
                tabs: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if builder == "tsv" else {}
                rows = datasets.load_dataset(
                    "csv" if builder == "tsv" else builder,
                    data_files={"train": [str(path) for path in files]},
                    split="train",
                    cache_dir=str(scratch),
                    **tabs,
                )
            except (DatasetsError, ValueError, OSError) as error:
                cause = first_line(error.__cause__ or error)
                raise UserError(f"{self.option}: {names} cannot be read as {builder} ({cause})") from error
            yield text_column(rows, self.column, names)


def names_files(name: str) -> bool:
    """Whether a name that is no directory means local files: the hub has no commas, no such endings and one slash at most."""
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return "," in name or looks_local or _extension(Path(name)) in _BUILDERS


def is_local(name: str) -> bool:
    """Whether a data set's name is that of a directory or of files."""
    return Path(name).expanduser().exists() or names_files(name)


def _extension(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _builder_of(path: Path) -> str:
    return _BUILDERS[_extension(path)]


def files_split(names: str, column: str, option: str) -> LocalSplit:
    files = tuple(Path(name.strip()).expanduser() for name in names.split(",") if name.strip())
    problems = []
    for path in files:
        if not path.is_file():
            problems.append(f"{option}: found no file {path}, expected existing files, a directory or a hub data set")
        elif _extension(path) not in _BUILDERS or path.name.lower().endswith((".txt.gz", ".parquet.gz")):
            problems.append(f"{option}: {path} has an unknown extension, expected one of {EXTENSIONS}")
    if not files:
        problems.append(f"{option}: found no file name in {names!r}, expected files separated by commas")
    if problems:
        raise UserError(problems)
    return LocalSplit(files, column, option)


def directory_splits(folder: Path, column: str) -> Iterator[tuple[str, LocalSplit]]:
    """Splits as `datasets` sees them in file and folder names (train, valid, validation, dev, test); without any: train."""
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except FileNotFoundError:  # EmptyDatasetError is one
        patterns = {}
    some = False
    for name, split_patterns in patterns.items():
        listed = DataFilesList.from_patterns(split_patterns, base_path=str(folder.resolve()))
        files = tuple(sorted(path for path in map(Path, listed) if _extension(path) in _BUILDERS))
        if files:
            some = True
            yield str(name), LocalSplit(files, column, "data.dataset_name")
    if not some:
        raise UserError(f"data.dataset_name: the directory {folder} has no data files, expected some of {EXTENSIONS}")


def require_contents(split: LocalSplit, noun: str) -> None:
    """Raises UserError for files that are empty or cannot be read.

    Args:
        noun: what they are expected to hold.
    """
    try:
        empty = [path for path in split.files if path.stat().st_size == 0]
    except OSError as error:
        raise UserError(f"{split.option}: cannot read {error.filename} ({error.strerror})") from error
    if empty:
        raise UserError(f"{split.option}: {path} is empty, expected {noun}" for path in empty)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"data.dataset_name: cannot read {path} ({error.strerror})") from error


def text_column(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise UserError(
            f"data.text_column: found no column {column} in {name}, expected one of its columns: {', '.join(rows.column_names)}"
        )
    dtype = getattr(rows.features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise UserError(f"data.text_column: column {column} of {name} holds {dtype or 'nested values'}, expected text")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def first_line(error: BaseException) -> str:
    """What an error says, fit for one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
