"""What lies in an adapter's folder: the names of its files, and the readers of all but its tensors.

Called by `adapter/attach.py`, `adapter/collection.py` and `engine/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_dist.adapter.config import PatternConfig
from lora_dist.adapter.kinds import ADAPTER_TYPES
from lora_dist.blocks import MASK_FILE, Pattern
from lora_dist.log import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
COLLECTION_FILE = "adapters.json"
"""of a folder with several adapters (`adapter/collection.py`)"""
BASE_FILE = "base.json"
"""names the base of an IA3 adapter, whose config is PEFT's own and has no room for it"""
LABELS_FILE = "labels.json"
"""of a classifier: what transformers keeps of its labels in a config.json"""
QUANTISATION_FILE = "base_quantization.json"
"""how the base was quantised that the adapter was trained on, as transformers writes it into a config.json"""


def adapter_folder(folder: str | Path) -> Path:
    """Where an adapter lies that is named by its own folder, by a checkpoint, by a run that keeps it in a folder below, or by a folder of
    several, of which it is the active one.

    Raises:
        UserError: a folder of several whose file cannot be read, or none of which is active.
    """
    if (Path(folder) / COLLECTION_FILE).is_file():
        try:
            active = json.loads((Path(folder) / COLLECTION_FILE).read_text())["active"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"adapter: {folder}/{COLLECTION_FILE} cannot be read ({type(error).__name__}: {error})") from error
        if not active:
            raise UserError(f"adapter: {folder} has no active adapter, expected one: lora-dist adapters switch {folder} NAME")
        return Path(folder) / active
    below = [file.parent for file in Path(folder).glob(f"*/{ADAPTER_CONFIG}")]
    return below[0] if len(below) == 1 and not (Path(folder) / ADAPTER_CONFIG).is_file() else Path(folder)


def read_quantisation(folder: str | Path) -> dict[str, Any] | None:
    """How the base of the adapter in `folder` was quantised in training; None where it was not.

    Raises:
        UserError: a file that cannot be read.
    """
    file = Path(folder) / QUANTISATION_FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"adapter: {file} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"adapter: {file} holds {type(found).__name__}, expected how a base is quantised")
    return found


def read_labels(folder: str | Path) -> dict[str, Any] | None:
    """num_labels, id2label and problem_type of a classifier's adapter; None where it is none.

    Raises:
        UserError: a file that cannot be read.
    """
    file = Path(folder) / LABELS_FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {int(number): str(name) for number, name in found["id2label"].items()}
        return {"num_labels": int(found["num_labels"]), "id2label": names, "problem_type": found.get("problem_type")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"adapter: {file} cannot be read ({type(error).__name__}: {error})") from error


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """The config in an adapter folder.

    Raises:
        UserError: no such folder or file, or a kind of adapter that is not among `ADAPTER_TYPES`.
    """
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise UserError(f"adapter: found no {ADAPTER_CONFIG} in {folder}, expected a folder that train wrote")
    try:
        peft_type = json.loads((Path(folder) / ADAPTER_CONFIG).read_text()).get("peft_type")
        # Of its own class: PeftConfig's reader would leave the pattern behind.
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(str(folder))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"adapter: {folder}/{ADAPTER_CONFIG} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(config, LoraConfig | IA3Config):
        raise UserError(f"adapter: {folder} is of type {config.peft_type}, expected one of {', '.join(ADAPTER_TYPES)}")
    return config


def adapter_identity(folder: str | Path, config: PeftConfig) -> tuple[str, Pattern | None]:
    """(fingerprint, pattern) of the base that an adapter names as its own; empty and None where it names none.

    Raises:
        UserError: files that cannot be read.
    """
    if isinstance(config, PatternConfig):
        return config.base_fingerprint, config.pattern
    if not isinstance(config, IA3Config) or not (Path(folder) / BASE_FILE).is_file():
        return "", None
    try:
        fingerprint = json.loads((Path(folder) / BASE_FILE).read_text())["base_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter: {folder}/{BASE_FILE} cannot be read ({type(error).__name__}: {error})") from error
    return fingerprint, Pattern.load(folder) if (Path(folder) / MASK_FILE).is_file() else None
