"""Put an adapter on a base, take its tensors off it, and read it back: the only place that talks to `PeftModel`.

Called by `engine/setup.py`, `engine/merge.py` and `engine/library.py`. Names of tensors in files are PEFT's own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dist.adapter.config import PEFT_TYPE, BlockLoraConfig
from lora_dist.blocks import MASK_FILE, Pattern, find_linears
from lora_dist.log import GuardError, UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def check_target_modules(model: nn.Module, target_modules: Sequence[str]) -> None:
    """Every name must match a linear of the model.

    Raises:
        UserError: naming those that match nothing, and what would.
    """
    if list(target_modules) == ["all-linear"]:
        return
    _refuse_tied_head(model, target_modules)
    names = [linear.name for linear in find_linears(model)]
    unmatched = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
        raise UserError(
            f"adapter.target_modules: {', '.join(unmatched)} match no linear of this model, expected some of "
            f"{', '.join(leaves)}, or all-linear"
        )


def _refuse_tied_head(model: nn.Module, target_modules: Sequence[str]) -> None:
    """A head that shares its weight with the embedding cannot be merged: the update would change the embedding as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return
    tied = [n for n, module in model.named_modules() if module is head or module is embedding]
    hit = [t for t in target_modules if any(n == t or n.endswith(f".{t}") for n in tied)]
    if hit:
        raise UserError(
            f"adapter.target_modules: {', '.join(hit)} shares its weight with the embedding (tie_word_embeddings), so an update of "
            "it could not be merged; leave it out"
        )


@contextmanager
def _without_pefts_own_warnings() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 a question under a name that is to go; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def attach_adapter(
    model: nn.Module,
    pattern: Pattern | None,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    use_rslora: bool = False,
    form: str = "auto",
    base_fingerprint: str = "",
) -> PeftModel:
    """Wrap `model` with a new adapter, float32, its base frozen.

    Args:
        pattern: what the update must respect; None for plain LoRA (a stock PEFT adapter).
        form: factorised, dense or auto; how a masked update is computed.

    Returns:
        The PEFT model; `lora_A` drawn from torch's global generator, `lora_B` zero.

    Raises:
        UserError: target modules that match nothing.
    """
    check_target_modules(model, target_modules)
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    common: dict[str, Any] = {
        "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": targets, "use_rslora": use_rslora,
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if pattern is None:
        # PEFT asks for the flag where the base stores weights as (I, O), and warns otherwise.
        transposed = any(linear.transposed for linear in find_linears(model))
        config = LoraConfig(**common, fan_in_fan_out=transposed)
    else:
        config = BlockLoraConfig(**common, form=form, base_fingerprint=base_fingerprint).with_pattern(pattern)
    with _without_pefts_own_warnings():
        return get_peft_model(model, config)


def adapter_tensors(model: PeftModel, full: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT saves them with, on CPU.

    Args:
        full: full tensors by parameter name, where the model itself holds shards; None reads the model.
    """
    state = get_peft_model_state_dict(model, state_dict=None if full is None else dict(full), save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def save_adapter(model: PeftModel, folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write config, tensors and (masked) the pattern into `folder`, as PEFT would. Returns the files, in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    save_file(dict(tensors), str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    mode = (folder / ADAPTER_CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors makes its files readable for their owner only
    files = [folder / ADAPTER_CONFIG, folder / ADAPTER_FILE]
    return [*files, folder / MASK_FILE] if config.peft_type == PEFT_TYPE else files


def read_adapter_tensors(model: PeftModel, folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Saved tensors of the adapter that `model` has, by parameter name.

    Args:
        shapes: full shapes of the trainable parameters by name; the model itself may hold shards.

    Raises:
        UserError: file missing or unreadable, or its tensors are not exactly the adapter's (names and shapes).
    """
    file = Path(folder) / ADAPTER_FILE
    try:
        saved = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: {file} cannot be read ({error})") from error
    names = list(shapes)
    numbered = get_peft_model_state_dict(  # PEFT's names for these parameters, whatever its rules
        model, state_dict={name: torch.tensor(i) for i, name in enumerate(names)}, save_embedding_layers=False
    )
    by_file_name = {file_name: names[int(number)] for file_name, number in numbered.items()}
    problems = _mismatches({file_name: shapes[name] for file_name, name in by_file_name.items()}, saved)
    if problems:
        raise UserError(f"adapter: {file} does not fit this run's adapter: {problems[0]} ({len(problems)} such); check adapter.*")
    return {name: saved[file_name] for file_name, name in by_file_name.items()}


@torch.no_grad()
def load_adapter_tensors(model: PeftModel, folder: Path) -> None:
    """Read saved tensors into the adapter that `model` already has, whole. Raises as `read_adapter_tensors`."""
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in read_adapter_tensors(model, folder, {name: p.shape for name, p in live.items()}).items():
        live[name].copy_(tensor)


def _mismatches(live: Mapping[str, torch.Size], saved: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing in the file" for name in live if name not in saved]
    unknown = [f"{name} is unknown to the model" for name in saved if name not in live]
    shapes = [
        f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(live[name])}"
        for name in live
        if name in saved and saved[name].shape != live[name]
    ]
    return missing + unknown + shapes


def adapter_folder(folder: str | Path) -> Path:
    """Where an adapter lies that is named by its own folder, by a checkpoint, or by a run that keeps it in a folder below."""
    below = [file.parent for file in Path(folder).glob(f"*/{ADAPTER_CONFIG}")]
    return below[0] if len(below) == 1 and not (Path(folder) / ADAPTER_CONFIG).is_file() else Path(folder)


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """The config in an adapter folder.

    Raises:
        UserError: no such folder or file, or a kind of adapter that is not LoRA.
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
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter: {folder} is of type {config.peft_type}, expected LORA or {PEFT_TYPE}")
    return config


def load_adapter(model: nn.Module, folder: str | Path, *, base_fingerprint: str | None, pattern: Pattern | None) -> PeftModel:
    """Put a saved adapter on the base it was trained on.

    Args:
        base_fingerprint: of the base at hand; None skips the comparison (a base that is not on disk).
        pattern: of the base at hand, to compare a masked adapter's with.

    Raises:
        UserError: nothing there, or not an adapter.
        GuardError: an adapter of another base or pattern.
    """
    config = read_adapter_config(folder)
    if isinstance(config, BlockLoraConfig):
        if base_fingerprint and config.base_fingerprint and base_fingerprint != config.base_fingerprint:
            raise GuardError(
                f"adapter: {folder} was trained on base {config.base_fingerprint[:12]}, the base given is {base_fingerprint[:12]}: "
                "give the base it was trained on"
            )
        difference = pattern.differences(config.pattern) if pattern is not None else None
        if difference:
            raise GuardError(f"adapter: {folder} has another pattern than the base: {difference}")
    try:
        with _without_pefts_own_warnings():
            loaded = PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, OSError, SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"adapter: {folder} does not load on this base: {str(error).splitlines()[0]}") from error
    saved = load_file(str(Path(folder) / ADAPTER_FILE))
    problems = _mismatches({name: tensor.shape for name, tensor in adapter_tensors(loaded).items()}, saved)
    if problems:
        raise UserError(f"adapter: {folder} does not fit this base: {problems[0]} ({len(problems)} such)")
    return loaded


def is_masked(model: PeftModel) -> bool:
    """Whether the model's adapter respects a pattern."""
    return isinstance(model.peft_config["default"], BlockLoraConfig)


def update_outside_mask(updates: Iterable[tuple[str, Tensor]], pattern: Pattern) -> float:
    """Share of a plain adapter's squared update that falls on pruned weights, 0 to 1: what `--project` would throw away.

    Args:
        updates: (name in the base, delta_OI) of every adapted linear.
    """
    lost = total = 0.0
    for name, delta_OI in updates:
        total += float(delta_OI.square().sum())
        if name in pattern:
            lost += float(delta_OI[~pattern[name].expand(delta_OI.device)].square().sum())
    return lost / total if total else 0.0


def layer_update(layer: Any) -> Tensor:
    """delta_OI of one adapted linear, float32."""
    delta = layer.get_delta_weight("default").detach().float()
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def lora_layers(model: PeftModel) -> Iterable[tuple[str, Any]]:
    """(name in the base, layer) of every linear that carries the adapter."""
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield name.removeprefix(prefix), module


def merge_adapter(model: PeftModel) -> nn.Module:
    """Add the update to the base weights and return the bare base, all of it in the base's own dtype."""
    with torch.no_grad():
        merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, nn.Module)
    return merged
