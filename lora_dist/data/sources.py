"""Where text comes from: hub data sets, local directories and local files, each split with a key of its content.

A split yields parts: `.txt` files, which are running text, and tables of rows (JSON, CSV, parquet, hub). Nothing is loaded before
a split's `parts` are asked for, except hub data sets, which `datasets` has to open to say what they contain. Called by `text.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesList, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lora_dist.log import UserError

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_EXTENSIONS = " ".join(_BUILDERS)
_PROBE_TIMEOUT_S = 10.0

_HUB_NAMES = {"wikitext": "Salesforce/wikitext", "c4": "allenai/c4"}
_HUB_CONFIGS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}
# The whole of C4 is 300 GB; Wanda and its followers read the first English shard.
_HUB_FILES = {
    "allenai/c4": {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
}


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


@dataclass(frozen=True)
class LocalSplit:
    """A split that lies in local files."""

    files: tuple[Path, ...]
    column: str
    option: str
    """what the user set to get these files, for messages"""

    def content_key(self) -> Any:
        """JSON values that change with the content of the files and with nothing else; where they lie does not matter."""
        return [[_builder_of(path), _file_digest(path)] for path in self.files]

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
                rows = datasets.load_dataset(
                    builder, data_files={"train": [str(path) for path in files]}, split="train", cache_dir=str(scratch)
                )
            except (DatasetsError, ValueError, OSError) as error:
                cause = _first_line(error.__cause__ or error)
                raise UserError(f"{self.option}: {names} cannot be read as {builder} ({cause})") from error
            yield _text_column(rows, self.column, names)


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub data set, opened by `datasets`."""

    rows: datasets.Dataset
    column: str
    name: str

    def content_key(self) -> Any:
        """The fingerprint `datasets` gave it, which follows from its revision, configuration and files."""
        return ["hub", self.rows._fingerprint]

    def parts(self, scratch: Path) -> Iterator[Path | datasets.Dataset]:
        """One table with the one column `text`."""
        yield _text_column(self.rows, self.column, self.name)


def find_splits(source: TextSource, wanted: Iterable[str]) -> dict[str, LocalSplit | HubSplit]:
    """The wanted splits that the source has, in the order wanted.

    Raises:
        UserError: for what is missing, empty, unreadable or of an unknown format; and if none of the wanted splits is there.
    """
    wanted = tuple(wanted)
    found: dict[str, LocalSplit | HubSplit] = {}
    path = Path(source.dataset_name).expanduser()
    if path.is_dir():
        found.update(_directory_splits(path, source.text_column))
    elif path.is_file() or _names_files(source.dataset_name):
        found["train"] = _files_split(source.dataset_name, source.text_column, "data.dataset_name")
    else:
        found.update(_hub_splits(source, wanted))
    if source.validation_file is not None:
        found["validation"] = _files_split(source.validation_file, source.text_column, "data.validation_file")
    chosen = {name: found[name] for name in wanted if name in found}
    if not chosen:
        names = ", ".join(found) or "none"
        raise UserError(f"data.dataset_name: {source.dataset_name} has the splits {names}, expected {' or '.join(wanted)}")
    for split in chosen.values():
        if isinstance(split, LocalSplit):
            _require_contents(split)
    return chosen


# --- local files --------------------------------------------------------------------------------------------------------


def _names_files(name: str) -> bool:
    """Whether a name that is no directory means local files: the hub has no commas, no such endings and one slash at most."""
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return "," in name or looks_local or _extension(Path(name)) in _BUILDERS


def _extension(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _builder_of(path: Path) -> str:
    return _BUILDERS[_extension(path)]


def _files_split(names: str, column: str, option: str) -> LocalSplit:
    files = tuple(Path(name.strip()).expanduser() for name in names.split(",") if name.strip())
    problems = []
    for path in files:
        if not path.is_file():
            problems.append(f"{option}: found no file {path}, expected existing files, a directory or a hub data set")
        elif _extension(path) not in _BUILDERS or path.name.lower().endswith((".txt.gz", ".parquet.gz")):
            problems.append(f"{option}: {path} has an unknown extension, expected one of {_EXTENSIONS}")
    if not files:
        problems.append(f"{option}: found no file name in {names!r}, expected files separated by commas")
    if problems:
        raise UserError(problems)
    return LocalSplit(files, column, option)


def _directory_splits(folder: Path, column: str) -> Iterator[tuple[str, LocalSplit]]:
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
        raise UserError(f"data.dataset_name: the directory {folder} has no data files, expected some of {_EXTENSIONS}")


def _require_contents(split: LocalSplit) -> None:
    try:
        empty = [path for path in split.files if path.stat().st_size == 0]
    except OSError as error:
        raise UserError(f"{split.option}: cannot read {error.filename} ({error.strerror})") from error
    if empty:
        raise UserError(f"{split.option}: {path} is empty, expected text" for path in empty)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"data.dataset_name: cannot read {path} ({error.strerror})") from error


def _text_column(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise UserError(
            f"data.text_column: found no column {column} in {name}, expected one of its columns: {', '.join(rows.column_names)}"
        )
    dtype = getattr(rows.features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise UserError(f"data.text_column: column {column} of {name} holds {dtype or 'nested values'}, expected text")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


# --- the hub --------------------------------------------------------------------------------------------------------------


def _hub_splits(source: TextSource, wanted: tuple[str, ...]) -> dict[str, HubSplit]:
    repo = _HUB_NAMES.get(source.dataset_name, source.dataset_name)
    files = _HUB_FILES.get(repo)
    options: dict[str, Any] = {}
    if files is not None:
        # The card's split sizes are those of all files, so they are not checked.
        chosen = {split: name for split, name in files.items() if split in wanted}
        options = {"data_files": chosen or files, "verification_mode": "no_checks"}
    else:
        options = {"name": source.dataset_config_name or _HUB_CONFIGS.get(repo)}
    if not _in_local_cache(repo):
        _probe_hub(repo, source.dataset_name)
    try:
        loaded = datasets.load_dataset(repo, **options)
    except DatasetNotFoundError as error:
        raise _hub_error(source.dataset_name, _first_line(error)) from error
    except DatasetGenerationError as error:
        raise _hub_error(source.dataset_name, _first_line(error.__cause__ or error)) from error
    except ValueError as error:  # an unknown or missing configuration
        raise UserError(
            f"data.dataset_config_name: found {options.get('name')} for {source.dataset_name}: {_one_line(error)}"
        ) from error
    except (DatasetsError, OSError) as error:  # connection and HTTP errors are OSErrors
        raise _hub_error(source.dataset_name, _first_line(error)) from error
    return {str(split): HubSplit(rows, source.text_column, repo) for split, rows in loaded.items()}


def _in_local_cache(repo: str) -> bool:
    """Whether `datasets` holds a prepared copy, which it falls back on when the hub cannot be reached."""
    *owner, name = repo.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(name)])
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _probe_hub(repo: str, name: str) -> None:
    """One question that fails within seconds: `datasets` itself retries for half a minute before it gives up."""
    try:
        HfApi().dataset_info(repo, timeout=_PROBE_TIMEOUT_S)
    except GatedRepoError as error:
        raise _hub_error(name, "it is gated: accept its conditions on its page and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise _hub_error(name, "no such data set, or a private one") from error
    except Exception as error:  # the client's transport errors have no common public base, and each means the same here
        raise _hub_error(name, f"the hub cannot be reached ({_first_line(error)})") from error


def _hub_error(name: str, reason: str) -> UserError:
    return UserError(
        f"data.dataset_name: found no local file or directory {name} and could not load it from the hub: {reason.rstrip('.')}. "
        f"Set data.dataset_name to local files ({_EXTENSIONS}) or a directory, HF_ENDPOINT to a mirror that can be reached, "
        "or HF_TOKEN if the data set is gated or private"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
