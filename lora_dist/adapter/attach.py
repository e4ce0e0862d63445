"""Put an adapter on a base, take its tensors off it, and read it back: the only place that talks to `PeftModel`.

Called by `engine/setup.py`, `engine/merge.py` and `engine/library.py`. Names of tensors in files are PEFT's own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dist.adapter.config import PatternConfig, with_own_layers
from lora_dist.adapter.dora import base_weight
from lora_dist.adapter.folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    BASE_FILE,
    LABELS_FILE,
    QUANTISATION_FILE,
    adapter_identity,
    read_adapter_config,
)
from lora_dist.adapter.kinds import make_config, respects_pattern
from lora_dist.adapter.principal import doubled, file_metadata, frozen_elements, is_principal, start_from_principal
from lora_dist.adapter.siblings import link_siblings
from lora_dist.adapter.updates import lora_layers
from lora_dist.adapter.whole import find_whole_parameters, put_whole_layers
from lora_dist.blocks import MASK_FILE, Pattern, find_linears
from lora_dist.log import GuardError, UserError


def check_target_modules(
    model: nn.Module, target_modules: Sequence[str], *, key: str = "adapter.target_modules", whole: Sequence[str] = ()
) -> None:
    """Every name must match a linear of the model.

    Args:
        whole: modules that are trained whole, and get no adapter.

    Raises:
        UserError: naming those that match nothing, and what would.
    """
    if list(target_modules) == ["all-linear"]:
        return
    _refuse_tied_head(model, target_modules)
    names = [n.name for n in find_linears(model) if not any(n.name == w or n.name.startswith(f"{w}.") for w in whole)]
    unmatched = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
        raise UserError(
            f"{key}: {', '.join(unmatched)} match no linear of this model, expected some of {', '.join(leaves)}, or all-linear"
            + (f" (trained whole anyway: {', '.join(whole)})" if whole else "")
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
    adapter_type: str = "lora",
    init_lora_weights: bool | str = True,
    adalora: Mapping[str, Any] | None = None,
    feedforward_modules: Sequence[str] = (),
    weight_OI: Callable[[str], Tensor] | None = None,
    task_type: str = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
    whole_modules: Sequence[str] = (),
    bias: str = "none",
) -> PeftModel:
    """Wrap `model` with a new adapter, float32, its base frozen.

    Args:
        pattern: what the update must respect; None for a stock PEFT adapter. IA3 respects any and is a stock one always.
        form: factorised, triton, dense or auto; how a masked update is computed.
        adapter_type: lora, dora, adalora, ia3, or sparse_full (`sparse.py`), which needs a pattern.
        init_lora_weights: true or gaussian, where `lora_B` is zero; pissa or pissa_niter_N (`principal.py`). All start from the base.
        adalora: PEFT's fields of that name, those that are not at their defaults.
        feedforward_modules: of IA3; empty takes what PEFT knows for this architecture, `none` none.
        weight_OI: reads a base weight by its linear's name, where the model holds placeholders only.
        modules_to_save: the head of a classifier: trained whole beside the adapter, as PEFT does it, and saved with it.
        whole_modules, bias: what else is trained whole (`whole.py`), beside a masked adapter; bias is none, lora_only or all.

    Returns:
        The PEFT model; `lora_A` drawn from torch's global generator.

    Raises:
        UserError: target modules that match nothing; unmasked DoRA on a base with rows of zeros.
    """
    check_target_modules(model, target_modules, whole=modules_to_save)
    if feedforward_modules and list(feedforward_modules) != ["none"]:
        check_target_modules(model, feedforward_modules, key="adapter.feedforward_modules")
    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    common: dict[str, Any] = {"target_modules": targets, "task_type": task_type}
    if modules_to_save:
        common["modules_to_save"] = list(modules_to_save)
    lora: dict[str, Any] = {
        "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "use_rslora": use_rslora, "init_lora_weights": init_lora_weights
    }  # fmt: skip
    config = make_config(
        model,
        adapter_type,
        pattern,
        common,
        lora=doubled(lora) if is_principal(init_lora_weights) else lora,
        adalora=adalora or {},
        feedforward_modules=feedforward_modules,
        form=form,
        base_fingerprint=base_fingerprint,
    )
    with _without_pefts_own_warnings():
        wrapped = get_peft_model(model, with_own_layers(config, model, frozen=is_principal(init_lora_weights)))
    link_siblings(wrapped)
    if whole_modules or bias != "none":
        _train_whole(wrapped, whole_modules, bias, pattern)
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)  # AdaLoRA's count of ranks, which PEFT makes trainable where the base is not on a CPU
    if isinstance(config, IA3Config) and targets == "all-linear":
        # PEFT has put every linear's own name for all-linear, and reads such a file only if these are names from among them.
        config.feedforward_modules = {name for name, layer in lora_layers(wrapped) if layer.is_feedforward}
    if adapter_type == "dora":
        _start_magnitudes(wrapped, weight_OI, masked=pattern is not None)
    if is_principal(init_lora_weights):
        start_from_principal(wrapped, str(init_lora_weights), weight_OI)
    return wrapped


def _train_whole(model: PeftModel, names: Sequence[str], bias: str, pattern: Pattern | None) -> None:
    config = model.peft_config["default"]
    if not isinstance(config, PatternConfig):
        raise UserError(
            "adapter.modules_to_save, adapter.bias: found with an adapter that respects no pattern, whose files are plain PEFT, expected a "
            "pruned base with adapter.mask auto, block or element, and adapter.type lora, dora or adalora, or train.mode sparse_full"
        )
    adapted, base = [name for name, _ in lora_layers(model)], model.get_base_model()
    config.whole_parameters = find_whole_parameters(base, names, bias, adapted=adapted, pattern=pattern)
    put_whole_layers(base, "default", config.whole_parameters, trained=True)


@torch.no_grad()
def _start_magnitudes(model: PeftModel, weight_OI: Callable[[str], Tensor] | None, *, masked: bool) -> None:
    """DoRA starts from the row norms of the base: read them where the model has placeholders only.

    Raises:
        UserError: a row of zeros under PEFT's own DoRA, which divides by its norm.
    """
    for name, layer in lora_layers(model):
        magnitude = layer.lora_magnitude_vector["default"].weight
        if weight_OI is None and masked:
            continue
        if weight_OI is not None:
            weight = weight_OI(name)
        else:
            weight = base_weight(layer.get_base_layer())
            weight = weight.T if layer.fan_in_fan_out else weight
        norm_O = torch.linalg.vector_norm(weight.float(), dim=1)
        magnitude.copy_(torch.where(norm_O > 0, norm_O, torch.ones_like(norm_O)) if masked else norm_O)
        if not masked and not norm_O.is_meta and not bool((norm_O > 0).all()):
            raise UserError(
                f"adapter.type: found dora with adapter.mask none, but row {int((norm_O > 0).long().argmin())} of {name} is all zeros and "
                "DoRA divides by its norm: set adapter.mask auto, or another type"
            )


def adapter_tensors(model: PeftModel, full: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT saves them with, on CPU.

    Args:
        full: full tensors by parameter name, where the model itself holds shards; None reads the model.
    """
    state = get_peft_model_state_dict(model, state_dict=None if full is None else dict(full), save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def save_adapter(
    model: PeftModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    pattern: Pattern | None = None,
    base_fingerprint: str = "",
) -> list[Path]:
    """Write config, tensors and (masked) the pattern into `folder`, as PEFT would. Returns the files, in that order.

    Args:
        pattern, base_fingerprint: of the base, written beside an IA3 adapter, which keeps any pattern; masked configs carry their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    save_file(dict(tensors), str(folder / ADAPTER_FILE), metadata=file_metadata(model))
    quantised = getattr(model.get_base_model().config, "quantization_config", None)
    if quantised is not None:
        (folder / QUANTISATION_FILE).write_text(json.dumps(quantised, indent=2), encoding="utf-8")
    if config.task_type == "SEQ_CLS":
        base = model.get_base_model().config
        labels = {"num_labels": base.num_labels, "id2label": base.id2label, "problem_type": base.problem_type}
        (folder / LABELS_FILE).write_text(json.dumps(labels, indent=2), encoding="utf-8")
    mode = (folder / ADAPTER_CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)  # safetensors makes its files readable for their owner only
    files = [folder / ADAPTER_CONFIG, folder / ADAPTER_FILE]
    if isinstance(config, IA3Config):
        if pattern is not None:
            pattern.save(folder)
        (folder / BASE_FILE).write_text(json.dumps({"base_fingerprint": base_fingerprint}))
        return [*files, folder / BASE_FILE, *([folder / MASK_FILE] if pattern is not None else [])]
    return [*files, folder / MASK_FILE] if isinstance(config, PatternConfig) else files


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
    trained_on, trained_with = adapter_identity(folder, config)
    if base_fingerprint and trained_on and base_fingerprint != trained_on:
        raise GuardError(
            f"adapter: {folder} was trained on base {trained_on[:12]}, the base given is {base_fingerprint[:12]}: "
            "give the base it was trained on"
        )
    if trained_with is not None:
        difference = pattern.differences(trained_with) if pattern is not None else None
        if difference:
            raise GuardError(f"adapter: {folder} has another pattern than the base: {difference}")
    try:
        with _without_pefts_own_warnings():
            loaded = PeftModel.from_pretrained(model, str(folder), config=with_own_layers(config, model))
    except (RuntimeError, OSError, SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"adapter: {folder} does not load on this base: {str(error).splitlines()[0]}") from error
    saved = load_file(str(Path(folder) / ADAPTER_FILE))
    problems = _mismatches({name: tensor.shape for name, tensor in adapter_tensors(loaded).items()}, saved)
    if problems:
        raise UserError(f"adapter: {folder} does not fit this base: {problems[0]} ({len(problems)} such)")
    link_siblings(loaded)
    return loaded


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(trained, all), what is trained whole counted once: PEFT keeps the frozen original beside it. Of factors half of which are frozen
    (`principal.py`), the half that is trained; of deltas on weights (`sparse.py`, `whole.py`), the weights."""
    trained, total = model.get_nb_trainable_parameters()
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    twice = sum(p.numel() for wrapper in wrappers for p in wrapper.original_module.parameters())
    twice += sum(p.numel() for name, p in model.named_parameters() if ".lora_delta." in name or ".lora_whole_" in name)
    return trained - frozen_elements(model), total - twice


def is_masked(model: PeftModel) -> bool:
    """Whether the model's adapter keeps the zeros of its base."""
    return respects_pattern(model.peft_config["default"])
