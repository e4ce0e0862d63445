"""Hugging Face directory -> frozen base, tokenizer and fingerprint.

Three steps, so that each can run where it is needed: `open_base` reads the small files, `sources.read_facts` every tensor once (one
process a machine is enough), and `load_whole` makes the model (`streaming.load_empty`: one without weights, to be filled piece by
piece). `load_base` is all three. Whatever is wrong with the directory is found before gigabytes are read where that is possible,
and nothing is made up: transformers fills tensors that a checkpoint lacks with random numbers and warns; here that is an error.
Called by `engine/`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as hf_logging

from lora_dist.log import UserError, logger
from lora_dist.models.block_files import holds_blocks
from lora_dist.models.building import build_empty, fill
from lora_dist.models.heads import HeadSpec, configure_head, head_modules, label_counts, start_head
from lora_dist.models.hub import resolve
from lora_dist.models.sources import SourceFacts, read_facts, some, stored_shapes, weight_files
from lora_dist.models.uneven import LayerWidths, NotStructured, find_widths

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MODEL_KEY, _CONFIG_KEY = "model.name_or_path", "model.config_name"


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base, ready for an adapter, evaluation or pruning."""

    model: Any
    """transformers' causal language model: no gradients, eval mode, no key-value cache"""
    tokenizer: Any
    source_dir: Path
    """where its tensors were read (of a hub name: the folder it was downloaded to)"""
    fingerprint: str
    """digest of the source tensors; precision, device and file layout do not change it"""
    config_from: str
    """directory or hub name that the configuration came from"""
    tokenizer_from: str
    """directory or hub name that the tokenizer came from"""
    stored_dtype: torch.dtype
    """precision that most of the source tensors are stored in"""
    use_cache: bool
    """what the model's configuration said before it was turned off"""
    heads: tuple[str, ...] = ()
    """modules of a classification head, which are trained whole"""
    labels_before: int | None = None
    """labels of a head in the files that a new one took the place of, since another number is asked for"""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn transformers' own bars and warnings off, and those of what it imports on the way (saving imports DeepSpeed, where it is
    installed, which looks for a GPU); what users need to know is said by the caller."""
    verbosity, bars, disabled = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), logging.root.manager.disable
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True)
class BaseSource:
    """A model directory whose small files have been read, and none of its weights."""

    source_dir: Path
    config: Any
    """transformers' configuration"""
    tokenizer: Any
    generation: GenerationConfig | None
    """where it is not the directory's own"""
    config_from: str
    tokenizer_from: str
    trust_remote_code: bool
    widths: LayerWidths | None = None
    """of the decoder layers, where structured pruning made them uneven"""
    misfit: str = ""
    """why shapes that differ from the configuration's are not structured pruning"""
    head: HeadSpec | None = None
    """of a classifier; None: a causal language model"""

    @property
    def context(self) -> int | None:
        """Tokens the model was made for, where its configuration says so."""
        return getattr(self.config, "max_position_embeddings", None)


def open_base(
    name_or_path: str,
    *,
    config_name: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    head: HeadSpec | None = None,
) -> BaseSource:
    """Find a model and read its configuration and tokenizer. Arguments and errors as `load_base`."""
    source_dir = resolve(name_or_path, _MODEL_KEY, code=trust_remote_code)
    _require_model(source_dir, name_or_path)
    config_from = _config_source(source_dir, name_or_path, config_name)
    tokenizer_from = _tokenizer_source(source_dir, name_or_path, config_name, trust_remote_code)
    config = load_config(config_from, attn_implementation, trust_remote_code)
    tokenizer = load_tokenizer(tokenizer_from.folder, tokenizer_from.name, trust_remote_code=trust_remote_code)
    if head is None and _is(config, "ForSequenceClassification"):
        head = HeadSpec()
    if head is not None:
        configure_head(config, head, tokenizer)
    own = head is not None or config_from.folder == source_dir
    generation = None if own else generation_config((source_dir, config_from.folder), config)
    widths, misfit = None, ""
    try:
        widths = find_widths(stored_shapes(source_dir), config)
    except NotStructured as reason:  # part of the error that loading the weights is going to be
        misfit = str(reason)
    return BaseSource(
        source_dir, config, tokenizer, generation, config_from.name, tokenizer_from.name, trust_remote_code, widths, misfit, head
    )


def load_base(
    name_or_path: str,
    *,
    config_name: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    progress: bool = True,
    head: HeadSpec | None = None,
) -> LoadedBase:
    """Load a causal language model or a classifier, frozen, with its tokenizer.

    Args:
        name_or_path: directory or hub name.
        config_name: directory or hub name to take the configuration or the tokenizer from where the model has none of its own.
        dtype: precision to hold it in; None keeps the one it is stored in.
        attn_implementation: attention kernel, as transformers names it; None lets transformers choose.
        trust_remote_code: run model code that comes with the model.
        device: where to put it.
        progress: show a bar, `Loading checkpoint shards`.
        head: of a classifier; None loads a causal language model.

    Raises:
        UserError: something is missing, broken, or does not fit together.
    """
    source = open_base(
        name_or_path,
        config_name=config_name,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        head=head,
    )
    return load_whole(source, read_facts(source.source_dir, progress=progress), dtype=dtype, device=device)


def load_whole(source: BaseSource, facts: SourceFacts, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedBase:
    """The model of an opened directory with all its weights. Arguments and errors as `load_base`."""
    if holds_blocks(source.source_dir):  # which transformers does not read
        from lora_dist.models.streaming import TensorReader, fill_from, load_empty

        base = load_empty(source, facts, dtype=dtype, device=device)
        reader = TensorReader(base.model, source.source_dir)
        reader.fill_buffers(base.model)
        fill_from(base.model, reader)
        return base
    if source.widths is None:
        return frozen(_load_model(source, dtype or facts.dtype, device), source, facts)
    with quiet_transformers():
        model = build_empty(
            source.config,
            dtype=dtype or facts.dtype,
            device=device,
            widths=source.widths,
            trust_remote_code=source.trust_remote_code,
        )
    fill(model, source.source_dir, device)
    model.generation_config = source.generation or generation_config((source.source_dir,), source.config)
    return frozen(model, source, facts)


@dataclass(frozen=True)
class Place:
    """A directory, and what the user called it."""

    folder: Path
    name: str


def _require_model(source_dir: Path, name: str) -> None:
    if (source_dir / "adapter_config.json").is_file():
        raise UserError(f"{_MODEL_KEY}: {name} holds an adapter, expected the directory of its base model")
    if not any(source_dir.iterdir()):
        raise UserError(f"{_MODEL_KEY}: {name} is an empty directory, expected config.json, model.safetensors and a tokenizer")
    weight_files(source_dir)


def _config_source(source_dir: Path, name: str, config_name: str | None) -> Place:
    if (source_dir / "config.json").is_file():
        return Place(source_dir, name)
    if config_name is None:
        raise UserError(
            f"{_MODEL_KEY}: {name} has no config.json; give the model that it was made from as {_CONFIG_KEY} (--config_name)"
        )
    folder = resolve(config_name, _CONFIG_KEY, weights=False)
    if not (folder / "config.json").is_file():
        raise UserError(f"{_CONFIG_KEY}: found no config.json in {config_name} either, which {name} needs")
    return Place(folder, config_name)


def _tokenizer_source(source_dir: Path, name: str, config_name: str | None, trust_remote_code: bool) -> Place:
    # Code that comes with a model may read a vocabulary under any name.
    looked_for = TOKENIZER_FILES + (("tokenizer_config.json",) if trust_remote_code else ())

    def has_tokenizer(folder: Path) -> bool:
        return any((folder / file).is_file() for file in looked_for)

    if has_tokenizer(source_dir):
        return Place(source_dir, name)
    if config_name is None:
        raise UserError(
            f"{_MODEL_KEY}: {name} has no tokenizer (looked for {', '.join(looked_for)}); give the model that it was made "
            f"from as {_CONFIG_KEY} (--config_name)"
        )
    folder = resolve(config_name, _CONFIG_KEY, weights=False)
    if not has_tokenizer(folder):
        raise UserError(f"{_CONFIG_KEY}: found no tokenizer in {config_name} either (looked for {', '.join(looked_for)})")
    return Place(folder, config_name)


def _line(error: Exception) -> str:
    """An error's text as one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_config(place: Place, attn_implementation: str | None, trust_remote_code: bool) -> Any:
    """transformers' configuration of a directory. Raises UserError where config.json cannot be used."""
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                str(place.folder), trust_remote_code=trust_remote_code, local_files_only=True, **extra
            )
    except Exception as error:  # a broken file fails in the JSON reader, the configuration class or its field checks
        raise UserError(f"{_MODEL_KEY}: {place.name}: config.json cannot be used ({_line(error)})") from error


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory that the user called `name`.

    Raises:
        UserError: files that are missing or broken.
    """
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain `Exception` for a file it cannot read
        raise UserError(f"{_MODEL_KEY}: {name}: the tokenizer cannot be loaded ({_line(error)})") from error


def generation_config(folders: Sequence[Path], config: Any) -> GenerationConfig:
    """What transformers would look for in a directory that has no config.json, and fail (5.23: a TypeError)."""
    for folder in folders:
        if (folder / "generation_config.json").is_file():
            try:
                return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{folder}: generation_config.json cannot be used ({_line(error)})") from error
    return GenerationConfig.from_model_config(config)


def _load_model(source: BaseSource, dtype: torch.dtype, device: str) -> Any:
    # Straight to an accelerator: several processes of one machine must not hold a copy each in its memory.
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    auto: Any
    auto, extra = AutoModelForCausalLM, {"generation_config": source.generation}
    if source.head is not None:
        auto, extra = AutoModelForSequenceClassification, {}
    elif _is(source.config, "ForMaskedLM"):
        auto, extra = AutoModelForMaskedLM, {}
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                str(source.source_dir),
                config=source.config,
                **extra,
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the names come back, and are an error below
                **placed,
            )
    except (OSError, ValueError, ImportError) as error:
        key = "model.attn_implementation" if "attn_implementation" in str(error) else _MODEL_KEY
        raise UserError(
            f"{key}: {source.source_dir}: cannot be loaded as {_KINDS[source.head is not None]} ({_line(error)})"
        ) from error
    if source.head is not None:
        replaced = label_counts(source.config, [(n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"]])
        new = missing_head(model, {*info["missing_keys"], *replaced})
        info["missing_keys"] = set(info["missing_keys"]) - new
        info["mismatched_keys"] = {entry for entry in info["mismatched_keys"] if entry[0] not in new}
        start_head(model, new, source.head.seed)
        model.new_head_tensors = tuple(sorted(new))
        model.labels_before = next((count for name, count in replaced.items() if name in new), None)
    _require_fit(source, type(model).__name__, info)
    return model


def _is(config: Any, ending: str) -> bool:
    """Whether the class that a directory was saved from is of a kind."""
    return any(name.endswith(ending) for name in config.architectures or ())


_KINDS = {False: "a causal language model", True: "a sequence classifier"}


def missing_head(model: Any, missing: set[str]) -> set[str]:
    """Those of the missing tensors that are a head's, which a base need not have."""
    heads = head_modules(model, missing)
    return {name for name in missing if any(name.startswith(f"{head}.") for head in heads)}


def _require_fit(source: BaseSource, class_name: str, info: dict[str, Any]) -> None:
    """Every tensor of the model came from the files, with the shape that the configuration says."""
    source_dir, problems = source.source_dir, []
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        problems.append(
            f"{_MODEL_KEY}: {source_dir}: {len(missing)} tensors that {class_name} needs are not in the files: {some(missing)}"
        )
    if info["mismatched_keys"]:
        wrong = [
            f"{name} is {tuple(found)}, by config.json {tuple(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        why = f" (not structured pruning: {source.misfit})" if source.misfit else ""
        problems.append(f"{_MODEL_KEY}: {source_dir}: {len(wrong)} tensors do not fit the configuration: {some(wrong)}{why}")
    if problems:
        problems[-1] += "; check that config.json belongs to these weights (model.config_name, if it was taken from there)"
        raise UserError(problems)
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning(
            "%s: %d tensors in the files are not part of %s and were left out: %s",
            source_dir,
            len(unused),
            class_name,
            some(unused),
        )


def frozen(model: Any, source: BaseSource, facts: SourceFacts) -> LoadedBase:
    """The model of a directory, made ready: no gradients, eval mode, no key-value cache.

    Raises:
        UserError: the tokenizer has more tokens than the model's embedding has rows.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(source.tokenizer) > rows:
        raise UserError(
            f"{_CONFIG_KEY}: the tokenizer of {source.tokenizer_from} has {len(source.tokenizer)} tokens, the model's embedding "
            f"{rows} rows: give the tokenizer that belongs to the model"
        )
    use_cache = bool(getattr(model.config, "use_cache", False))
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    return LoadedBase(
        model,
        source.tokenizer,
        source.source_dir,
        facts.fingerprint,
        source.config_from,
        source.tokenizer_from,
        facts.dtype,
        use_cache,
        tuple(head_modules(model, getattr(model, "new_head_tensors", ()))) if source.head is not None else (),
        getattr(model, "labels_before", None),
    )
