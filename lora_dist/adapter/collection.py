"""Several adapters of one base, side by side in a folder: list, add, switch, combine, delete.

    DIR/adapters.json   {"base_fingerprint", "pattern_digest", "active"}
    DIR/NAME/           one adapter, as `train` writes it

Every change is made under a name with a dot in front and renamed, `adapters.json` last, so that a reader finds the folder as it was or
as it is to be. Called by `cli/adapters.py`; `adapter_folder` in `adapter/attach.py` finds the active one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.adapter.config import PatternConfig
from lora_dist.adapter.folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COLLECTION_FILE,
    QUANTISATION_FILE,
    adapter_identity,
    read_adapter_config,
    read_quantisation,
)
from lora_dist.adapter.kinds import adapter_type, describe
from lora_dist.blocks import Pattern
from lora_dist.log import GuardError, UserError
from lora_dist.process import flush

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass
class Collection:
    """What `adapters.json` says. Empty strings where no adapter has named a base or a pattern yet."""

    base_fingerprint: str = ""
    pattern_digest: str = ""
    active: str = ""

    @classmethod
    def read(cls, folder: Path) -> Collection:
        """Raises UserError where it cannot be read."""
        try:
            return cls(**json.loads((folder / COLLECTION_FILE).read_text()))
        except FileNotFoundError as error:
            raise UserError(f"DIR: found no {COLLECTION_FILE} in {folder}, expected a folder that adapters add made") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"DIR: {folder / COLLECTION_FILE} cannot be read ({error})") from error

    def write(self, folder: Path) -> None:
        staged = folder / f".{COLLECTION_FILE}"
        staged.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        flush(staged)
        os.replace(staged, folder / COLLECTION_FILE)
        flush(folder)


def list_adapters(folder: Path) -> list[tuple[str, str, bool]]:
    """(name, description, active) of every adapter in a collection, by name."""
    collection = Collection.read(folder)
    names = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}") if not file.parent.name.startswith("."))
    return [(name, describe(read_adapter_config(folder / name)), name == collection.active) for name in names]


def add_adapter(folder: Path, name: str, source: Path) -> None:
    """Copy an adapter in; the first one makes the folder and becomes the active one.

    Raises:
        UserError: a name that is taken or no name, not an adapter.
        GuardError: an adapter of another base or pattern than those beside it.
    """
    collection = Collection.read(folder) if (folder / COLLECTION_FILE).is_file() else Collection()
    _check_new(folder, name)
    config = read_adapter_config(source)
    if not (source / ADAPTER_FILE).is_file():
        raise UserError(f"FOLDER: found no {ADAPTER_FILE} in {source}, expected a folder that train wrote")
    fingerprint, pattern = adapter_identity(source, config)
    digest = pattern.digest if pattern is not None else ""
    for what, here, theirs in (
        ("base", collection.base_fingerprint, fingerprint),
        ("pattern", collection.pattern_digest, digest),
    ):
        if here and theirs and here != theirs:
            raise GuardError(
                f"FOLDER: {source} is of {what} {theirs[:12]}, expected {here[:12]}, that of the adapters in {folder}"
            )
    files = [path for path in source.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors")]

    def fill(staged: Path) -> None:
        for file in files:
            shutil.copyfile(file, staged / file.name)

    _publish(folder, name, fill)
    collection.base_fingerprint = collection.base_fingerprint or fingerprint
    collection.pattern_digest = collection.pattern_digest or digest
    collection.active = collection.active or name
    collection.write(folder)


def switch_adapter(folder: Path, name: str) -> None:
    """Make another adapter the active one. Raises UserError for a name that is not there."""
    collection = Collection.read(folder)
    _check_there(folder, name)
    collection.active = name
    collection.write(folder)


def delete_adapter(folder: Path, name: str) -> None:
    """Remove an adapter.

    Raises:
        UserError: a name that is not there, or the active one while there are others.
    """
    collection = Collection.read(folder)
    _check_there(folder, name)
    if collection.active == name:
        others = [other for other, _, _ in list_adapters(folder) if other != name]
        if others:
            raise UserError(f"NAME: {name} is the active adapter, expected another one: switch to {others[0]} first")
        collection.active = ""
        collection.write(folder)
    doomed = folder / f".{name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    (folder / name).rename(doomed)
    flush(folder)
    shutil.rmtree(doomed)


def merge_weighted(folder: Path, new: str, weights: Mapping[str, float], combination_type: str) -> None:
    """Add a LoRA that is a weighted sum of others, as PEFT's `add_weighted_adapter` makes it, without their base.

    `cat` puts the factors side by side: exactly the sum of the updates, its rank the sum of the ranks. `svd` is the best
    approximation of that sum at the largest rank, before the mask is put on it. `linear` adds up factors: rough, as in PEFT.

    Raises:
        UserError: adapters that are not there, or not all LoRAs of the same form, targets and (for linear) rank.
    """
    Collection.read(folder)
    _check_new(folder, new)
    for name in weights:
        _check_there(folder, name)
    configs: dict[str, Any] = {name: read_adapter_config(folder / name) for name in weights}
    for name, config in configs.items():
        if adapter_type(config) != "lora" or getattr(config, "modules_to_save", None):
            head = (
                f" with modules trained whole ({', '.join(sorted(set(config.modules_to_save)))})"
                if config.modules_to_save
                else ""
            )
            raise UserError(f"NAME: {name} is {describe(config)}{head}, expected a LoRA alone: only the updates of LoRAs add up")
    held = [read_quantisation(folder / name) for name in weights]
    if any(each != held[0] for each in held):
        quantised = [name for name, each in zip(weights, held, strict=True) if each is not None]
        raise UserError(
            f"NAME: found {', '.join(quantised)} trained on a quantised base, and others of a base that was held otherwise, expected all "
            "alike: each corrects the weights that it was trained on"
        )
    masked = {isinstance(config, PatternConfig) for config in configs.values()}
    if len(masked) > 1:
        raise UserError("NAME: found masked and plain LoRAs together, expected all of one form: a sum has one mask or none")
    ranks = {config.r for config in configs.values()}
    if combination_type == "linear" and len(ranks) > 1:
        raise UserError(f"combination_type: found linear with ranks {sorted(ranks)}, expected equal ranks, or cat or svd")
    tensors = {name: load_file(str(folder / name / ADAPTER_FILE)) for name in weights}
    first = next(iter(tensors.values()))
    odd = [name for name, found in tensors.items() if found.keys() != first.keys()]
    if odd:
        raise UserError(f"NAME: {odd[0]} has other target modules than {next(iter(tensors))}, expected the same")
    pattern = next(iter(configs.values())).pattern if masked == {True} else None
    scaled = {name: weight * _scaling(configs[name]) for name, weight in weights.items()}
    rank = sum(config.r for config in configs.values()) if combination_type == "cat" else max(ranks)
    combined: dict[str, Tensor] = {}
    for key_A in (key for key in first if key.endswith("lora_A.weight")):
        key_B = key_A.replace("lora_A", "lora_B")
        pairs = [(scaled[name], found[key_A].float(), found[key_B].float()) for name, found in tensors.items()]
        layer = key_A.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        combined[key_A], combined[key_B] = _combine(pairs, combination_type, rank, pattern, layer)

    def fill(staged: Path) -> None:
        config = configs[next(iter(configs))]
        config.r = config.lora_alpha = rank
        config.use_rslora = False
        config.save_pretrained(str(staged))
        if held[0] is not None:
            (staged / QUANTISATION_FILE).write_text(json.dumps(held[0], indent=2), encoding="utf-8")
        save_file(combined, str(staged / ADAPTER_FILE), metadata={"format": "pt"})
        (staged / ADAPTER_FILE).chmod((staged / ADAPTER_CONFIG).stat().st_mode)

    _publish(folder, new, fill)


def _scaling(config: LoraConfig) -> float:
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def _combine(
    pairs: list[tuple[float, Tensor, Tensor]], how: str, rank: int, pattern: Pattern | None, layer: str
) -> tuple[Tensor, Tensor]:
    """(A_RI, B_OR) of one layer, from (weight times scale, A_RI, B_OR) of each adapter."""
    if how == "cat":
        return torch.cat([w * A for w, A, _ in pairs]).contiguous(), torch.cat([B for _, _, B in pairs], dim=1).contiguous()
    if how == "linear":  # PEFT: the root of the weight on each factor, its sign on one
        A_RI = torch.stack([abs(w) ** 0.5 * A for w, A, _ in pairs]).sum(0)
        return A_RI, torch.stack([(1 if w > 0 else -1) * abs(w) ** 0.5 * B for w, _, B in pairs]).sum(0)
    delta_OI = torch.stack([w * (B @ A) for w, A, B in pairs]).sum(0)
    if pattern is not None and layer in pattern:
        delta_OI = delta_OI.masked_fill(~pattern[layer].expand(), 0.0)
    U, S, Vh = torch.linalg.svd(delta_OI, full_matrices=False)
    return Vh[:rank].contiguous(), (U[:, :rank] * S[:rank]).contiguous()


def _publish(folder: Path, name: str, fill: Any) -> None:
    """Let `fill` write an adapter, and give it its name once it is on the disk."""
    staged = folder / f".{name}.new"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        fill(staged)
        for file in staged.iterdir():
            flush(file)
        staged.rename(folder / name)
        flush(folder)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise UserError(f"DIR: {folder} could not be written ({error}); nothing was added") from error


def _check_new(folder: Path, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"NAME: found {name!r}, expected letters, digits, and _ . - behind the first")
    if os.path.lexists(folder / name):
        raise UserError(f"NAME: {folder / name} is there already, expected a new name; adapters delete removes it")


def _check_there(folder: Path, name: str) -> None:
    if not _NAME.fullmatch(name) or not (folder / name / ADAPTER_CONFIG).is_file():
        names = ", ".join(found for found, _, _ in list_adapters(folder)) or "none"
        raise UserError(f"NAME: found no adapter {name} in {folder}, there are: {names}")
