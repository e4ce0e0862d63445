"""Text on the hub: open a data set through `datasets`, and go on without the hub where that is possible.

The revision of a data set and its splits are noted beside the cached windows. So a node that cannot reach the hub finds the
windows that were made where it could be reached, and one question is enough to learn that nothing changed. Called by
`sources.py`.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lora_dist.data.files import EXTENSIONS, first_line, text_column
from lora_dist.data.windows import entry_key
from lora_dist.log import UserError, logger

_PROBE_TIMEOUT_S = 10.0
_NAMES = {"wikitext": "Salesforce/wikitext", "glue": "nyu-mll/glue", "c4": "allenai/c4", "ptb": "ptb-text-only/ptb_text_only"}
_CONFIGS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}
# The whole of C4 is 300 GB; Wanda and its followers read the first English shard of each split.
_C4 = "allenai/c4"
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
# Penn Treebank on the hub is a script, which no longer loads; the hub keeps its rows as parquet on a branch of its own.
_PTB = "ptb-text-only/ptb_text_only"
_PTB_FILES = {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")}


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub data set; loaded when its parts are asked for."""

    name: str
    column: str
    identity: tuple[str, ...]
    """repository, revision, configuration, files and split: what the content follows from"""
    load: Callable[[], datasets.DatasetDict] = field(repr=False)

    def content_key(self) -> Any:
        """JSON values that change with the content of the split."""
        return ["hub", *self.identity]

    def parts(self, scratch: Path) -> Iterator[Path | datasets.Dataset]:
        """One table with the one column `text`; `scratch` is not needed, `datasets` keeps its own copy.

        Raises:
            UserError: if the data set cannot be loaded, or has no such column.
        """
        yield text_column(self.load()[self.name], self.column, self.identity[0])


def hub_splits(name: str, config: str | None, column: str, wanted: tuple[str, ...], records: Path) -> dict[str, HubSplit]:
    """All splits of a hub data set; of c4 the wanted ones.

    Args:
        name: as the user gave it; `wikitext`, `c4` and `ptb` are known by their short names.
        config: configuration; wikitext: wikitext-2-raw-v1 if None; c4 always reads its first English shards, ptb has one only.
        column: column that holds the text.
        wanted: split names.
        records: folder to note revisions in.

    Raises:
        UserError: if there is no such data set or configuration, it is gated, or the hub cannot be reached.
    """
    repo = _NAMES.get(name, name)
    options: dict[str, Any] = {"name": config or _CONFIGS.get(repo)}
    if repo == _C4:
        files = {split: file for split, file in _C4_FILES.items() if split in wanted} or _C4_FILES
        # The card's split sizes are those of all files, so they are not to be checked.
        options = {"name": "en", "data_files": files, "verification_mode": "no_checks"}
    elif repo == _PTB:
        options = {"revision": "refs/convert/parquet", "data_files": _PTB_FILES}
    record_path = records / f"{entry_key({'repo': repo, 'options': options})}.json"
    record = _read_record(record_path)
    load = functools.cache(functools.partial(_load, repo, name, options))
    revision = _hub_revision(repo, name, options.get("revision"), has_copy=record is not None or _in_local_cache(repo))
    if record is None or revision not in (None, record["revision"]):
        loaded = load()
        record = {"revision": revision or loaded[next(iter(loaded))]._fingerprint, "splits": [str(split) for split in loaded]}
        if revision is not None:
            _write_record(record_path, record)
    chosen = json.dumps(options, sort_keys=True)
    return {s: HubSplit(s, column, (repo, record["revision"], chosen, s), load) for s in record["splits"]}


def require_reachable(repo: str) -> None:
    """Raises:
    UserError: within seconds, if nothing is kept of a data set and the hub cannot be reached, does not have it, or gates it.
    """
    _hub_revision(repo, repo, None, has_copy=_in_local_cache(repo))


def _hub_revision(repo: str, name: str, branch: str | None, has_copy: bool) -> str | None:
    """The data set's newest revision, or None if the hub cannot be reached but something was kept from it.

    One question that fails within seconds: `datasets` itself retries for half a minute before it gives up.
    """
    try:
        return HfApi().dataset_info(repo, revision=branch, timeout=_PROBE_TIMEOUT_S).sha
    except GatedRepoError as error:
        raise _hub_error(name, "it is gated, and its conditions have to be accepted on its page") from error
    except RepositoryNotFoundError as error:
        raise _hub_error(name, "there is no such data set, or it is private") from error
    except Exception as error:  # the client's transport errors have no common public base, and each means the same here
        if not has_copy:
            raise _hub_error(name, f"the hub cannot be reached, {first_line(error)}") from error
        logger.warning("the hub cannot be reached (%s): going on with what was kept of %s", first_line(error), repo)
        return None


def _load(repo: str, name: str, options: dict[str, Any]) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(repo, **options)
    except DatasetNotFoundError as error:
        raise _hub_error(name, first_line(error)) from error
    except DatasetGenerationError as error:
        raise _hub_error(name, first_line(error.__cause__ or error)) from error
    except ValueError as error:  # an unknown or a missing configuration
        message = " ".join(str(error).split())
        raise UserError(f"data.dataset_config_name: found {options.get('name')} for {name}: {message}") from error
    except (DatasetsError, OSError) as error:  # connection and HTTP errors are OSErrors
        raise _hub_error(name, first_line(error)) from error


def _in_local_cache(repo: str) -> bool:
    """Whether `datasets` holds a prepared copy, which it falls back on when the hub cannot be reached."""
    *owner, name = repo.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(name)])
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _hub_error(name: str, reason: str) -> UserError:
    return UserError(
        f"data.dataset_name: found no local file or directory {name}, and it could not be loaded from the hub ({reason}): "
        f"set data.dataset_name to local files ({EXTENSIONS}) or a directory, HF_ENDPOINT to a mirror that can be reached, "
        "or HF_TOKEN if the data set is gated or private"
    )


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["revision"] and record["splits"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(record, file)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {path} ({error.strerror}), expected a writable folder") from error
