"""What a run trains and evaluates on, put together from `data.*`: windows of text, examples, or packed rows of them.

Called by `engine/setup.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from lora_dist.config import RunConfig, weights_of
from lora_dist.data.classification import ClassEncoder, ClassRows, balanced_weights, class_rows
from lora_dist.data.encoding import make_encoder
from lora_dist.data.examples import ExampleSplits, format_of, load_examples
from lora_dist.data.files import LocalSplit, is_local
from lora_dist.data.glue import Subset, missing_columns, subset_of
from lora_dist.data.packing import PackedExamples
from lora_dist.data.records import Format, columns_of, first_row
from lora_dist.data.rows import Rows
from lora_dist.data.sources import TextSource, cache_root, find_splits, require_source
from lora_dist.data.templates import load_template
from lora_dist.data.text import hold_out, load_windows
from lora_dist.engine.task import CausalTask, ClassTask, Task
from lora_dist.log import UserError
from lora_dist.models.heads import HeadSpec, takes_token_types
from lora_dist.models.loading import LoadedBase
from lora_dist.monitor.console import Console
from lora_dist.parallel import World

Kind = Format | Literal["text", "classification"]

_SOURCE_KEYS = "data.dataset_name, data.dataset_config_name, data.validation_file, data.train_split, data.validation_split"
_END_KEYS = "data.block_size, data.holdout_windows, train.eval_strategy, model.config_name"
_TEXT_KEYS = f"data.format, {_SOURCE_KEYS}, data.text_column, data.document_separator, data.special_tokens, {_END_KEYS}"
_EXAMPLE_KEYS = (
    f"data.format, {_SOURCE_KEYS}, data.prompt_template, data.train_on_inputs, data.add_eos_token, data.special_tokens, {_END_KEYS}, "
    "data.packing, data.packing_length"
)
_NO_HEADER = " (files without a header: data.column_names names their columns)"
_CLASS_KEYS = f"{_SOURCE_KEYS}, data.text_column, data.text_pair_column, data.label_column, train.class_weights, {_END_KEYS}"


@dataclass(frozen=True)
class RunData:
    """Rows to train and to evaluate on."""

    train: Rows
    evaluation: Rows | None
    """never packed; None: no evaluation is asked for"""
    noun: str
    """what the rows to train on are"""
    content_keys: str
    """the options that they follow from, their number apart"""
    task: Task
    teacher: str | None = None
    """fingerprint of the model that is learnt from as well"""


def run_data(config: RunConfig, world: World, console: Console, base: LoadedBase, kind: Kind) -> RunData:
    """Rows for training and evaluation, cut to the sizes asked for. Collective.

    Args:
        kind: as `data_kind` found it.

    Raises:
        UserError: data that is missing, unusable or does not fit the options.
    """
    data = config.data
    console.loading_data(data.dataset_name, data.dataset_config_name)
    if kind == "text":
        if data.format == "auto":
            console.note("data.format auto: the rows are text")
        return _windows(config, world, console, base, _source(config))
    if kind == "classification":
        return _classes(config, world, console, base)
    return _examples(config, world, console, base, _source(config), kind)


def data_kind(config: RunConfig, world: World) -> Kind:
    """What the rows are; and what is wrong with the data that can be told without a model, before one is loaded. Collective.

    Raises:
        UserError: data.format auto and rows of no known format, options that they do not go with, a template that is not there.
    """
    data, kind = config.data, config.data.format
    with world.main_first():
        if kind == "auto":
            kind = format_of(_source(config), data.cache_dir)
        elif kind == "classification":
            _refuse_for_labels(config)
            _class_source(config)
        else:
            require_source(_source(config), data.cache_dir, noun="text" if kind == "text" else "records")
    if kind == "text":
        asked = {"data.packing": data.packing, "data.train_on_inputs": data.train_on_inputs}
        asked["train.group_by_length"] = config.train.group_by_length
        problems = [
            f"{key}: found true, but {data.dataset_name} holds text, expected examples" for key, on in asked.items() if on
        ]
        if problems:
            raise UserError(problems)
    if kind == "alpaca":
        load_template(data.prompt_template)
    return kind


def _source(config: RunConfig) -> TextSource:
    data = config.data
    return TextSource(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        validation_file=data.validation_file,
        text_column=data.text_column or "text",
        document_separator=data.document_separator,
        column_names=tuple(name.strip() for name in data.column_names.split(",")) if data.column_names else (),
        train_split=data.train_split,
        validation_split=data.validation_split or _validation_split(config),
    )


def _windows(config: RunConfig, world: World, console: Console, base: LoadedBase, source: TextSource) -> RunData:
    data, train = config.data, config.train
    with world.main_first():
        loaded = load_windows(
            source,
            base.tokenizer,
            context_length=data.block_size,
            special_tokens=data.special_tokens,
            num_proc=data.preprocessing_num_workers,
            cache_dir=data.cache_dir,
        )
    _require_train(data.dataset_name, list(loaded.splits))
    training, evaluation = loaded.splits["train"], loaded.splits.get("validation")
    if train.eval_strategy != "no" and evaluation is None:
        training, evaluation = hold_out(training, data.holdout_windows, train.seed)
    if data.max_train_samples is not None:
        training = training.take(data.max_train_samples)
    if evaluation is not None and data.max_eval_samples is not None:
        evaluation = evaluation.take(data.max_eval_samples)
    _tell_loaded(config, console, len(training), len(evaluation) if evaluation is not None else 0, loaded.from_cache)
    return RunData(training, None if train.eval_strategy == "no" else evaluation, "windows", _TEXT_KEYS, CausalTask())


def _examples(config: RunConfig, world: World, console: Console, base: LoadedBase, source: TextSource, kind: Format) -> RunData:
    data, train = config.data, config.train
    encoder = make_encoder(
        kind,
        base.tokenizer,
        max_length=data.block_size,
        template=load_template(data.prompt_template) if kind == "alpaca" else None,
        special_tokens=data.special_tokens,
        add_eos_token=data.add_eos_token,
        train_on_inputs=data.train_on_inputs,
    )
    with world.main_first():
        loaded = load_examples(
            source,
            encoder,
            max_bad_share=data.max_bad_share,
            num_proc=data.preprocessing_num_workers,
            cache_dir=data.cache_dir,
        )
    _require_train(data.dataset_name, list(loaded.splits))
    training, evaluation = loaded.splits["train"], loaded.splits.get("validation")
    if train.eval_strategy != "no" and evaluation is None:
        training, evaluation = hold_out(training, data.holdout_windows, train.seed, noun="examples")
    if data.max_train_samples is not None:
        training = training.take(data.max_train_samples)
    if evaluation is not None and data.max_eval_samples is not None:
        evaluation = evaluation.take(data.max_eval_samples)
    _tell_loaded(config, console, len(training), len(evaluation) if evaluation is not None else 0, loaded.from_cache)
    console.examples(
        encoder.kind,
        by_columns=data.format == "auto",
        template=encoder.template.name if encoder.template is not None else None,
        answers_only=not encoder.train_on_inputs,
    )
    _tell_records(console, data.block_size, loaded)
    scored = None if train.eval_strategy == "no" or evaluation is None else evaluation.by_length()
    if not data.packing:
        return RunData(training, scored, "examples", _EXAMPLE_KEYS, CausalTask())
    packed = PackedExamples(training, data.packing_length or data.block_size, train.seed)
    console.packed(examples=len(training), rows=len(packed), capacity=packed.capacity, fill=packed.fill)
    return RunData(packed, scored, "packed rows", _EXAMPLE_KEYS, CausalTask())


def subset_for(config: RunConfig, columns: Collection[str] = ()) -> Subset:
    """Columns, labels and metrics, as asked for or as GLUE has them, in files with these columns."""
    data, count = config.data, config.model.num_labels
    return subset_of(
        data.dataset_name,
        data.dataset_config_name,
        text=data.text_column,
        pair=data.text_pair_column,
        label=data.label_column,
        regression=count == 1,
        binary=count == 2,
        columns=columns,
    )


def _class_source(config: RunConfig) -> tuple[TextSource, Subset]:
    """Where labelled texts are, and the columns to read of them.

    Raises:
        UserError: no such data; local files that do not have the columns.
    """
    source, subset = _source(config), subset_for(config)
    splits = find_splits(source, ("train", "validation"), cache_root(config.data.cache_dir) / "hub", noun="records")
    local = {name: split for name, split in splits.items() if isinstance(split, LocalSplit)}
    if not local:
        return source, subset  # the hub's: read when it is loaded, from the cache where there is one
    row = first_row(next(iter(local.values()))) if subset.no_header and not source.column_names else []
    if row and len(row) == len(subset.no_header) and subset.text not in row:
        source = dataclasses.replace(source, column_names=subset.no_header)
        local = {name: dataclasses.replace(split, names=subset.no_header) for name, split in local.items()}
    columns = {name: columns_of(split) for name, split in local.items()}
    subset = subset_for(config, next(iter(columns.values())))
    where = {name: f"the {name} split of {config.data.dataset_name}" for name in columns}
    if "validation" in where and config.data.validation_file is not None:
        where["validation"] = config.data.validation_file
    problems = [problem for name, found in columns.items() for problem in missing_columns(subset, sorted(found), where[name])]
    headed = (
        any(file.suffix.lower() in (".csv", ".tsv") for split in local.values() for file in split.files)
        and not source.column_names
    )
    if problems:
        raise UserError([each + (_NO_HEADER if headed else "") for each in problems])
    return source, subset


def _validation_split(config: RunConfig) -> str:
    """The subset's own, of a hub data set."""
    data = config.data
    if data.format != "classification" or is_local(data.dataset_name) or data.validation_file is not None:
        return "validation"
    return subset_for(config).validation


def head_for(config: RunConfig) -> HeadSpec | None:
    """The head of a classifier; None for a causal language model."""
    if config.model.task_type != "SEQ_CLS":
        return None
    subset = subset_for(config)
    known = len(subset.labels) or (1 if "pearson" in subset.metrics else None)
    return HeadSpec(config.model.num_labels or known, config.train.seed)


def _classes(config: RunConfig, world: World, console: Console, base: LoadedBase) -> RunData:
    data, train, model = config.data, config.train, base.model.config
    source, subset = _class_source(config)
    regression = model.num_labels == 1
    pairs = subset.pair is not None and takes_token_types(base.model, base.tokenizer)
    encoder = ClassEncoder(base.tokenizer, data.block_size, subset, regression, token_types=pairs)
    with world.main_first():
        loaded = load_examples(
            source,
            encoder,
            max_bad_share=data.max_bad_share,
            num_proc=data.preprocessing_num_workers,
            cache_dir=data.cache_dir,
        )
    _require_train(data.dataset_name, list(loaded.splits))
    rows, labels = class_rows(loaded, encoder, model.num_labels, model.get_text_config().pad_token_id or 0)
    if labels is not None:
        model.id2label = dict(enumerate(labels.names))
        model.label2id = {name: number for number, name in enumerate(labels.names)}
    training, evaluation = rows["train"], rows.get("validation")
    if train.eval_strategy != "no" and evaluation is None:
        training, evaluation = hold_out(training, data.holdout_windows, train.seed, noun="examples")
    if data.max_train_samples is not None:
        training = training.take(data.max_train_samples)
    if evaluation is not None and data.max_eval_samples is not None:
        evaluation = evaluation.take(data.max_eval_samples)
    unseen = [] if labels is None else [name for i, name in enumerate(labels.names) if not (training.targets_N == i).any()]
    if unseen:
        console.warning(
            f"data.label_column: no example to train on has the label {', '.join(unseen)}: the model will not learn it"
        )
    training = training.weighted(_class_weights(train.class_weights, training, model.num_labels))
    _tell_loaded(config, console, len(training), len(evaluation) if evaluation is not None else 0, loaded.from_cache)
    _tell_records(console, data.block_size, loaded, answers=False)
    metrics, best = _measures(train.metric_for_best_model, subset, model.num_labels)
    scored = None if train.eval_strategy == "no" or evaluation is None else evaluation.by_length()
    return RunData(training, scored, "examples", _CLASS_KEYS, ClassTask(metrics, best))


def _measures(asked: str | None, subset: Subset, num_labels: int) -> tuple[tuple[str, ...], str]:
    """What an evaluation measures beside its loss, and what the best adapter is chosen by."""
    regression, metrics = num_labels == 1, subset.metrics
    if regression != ("pearson" in metrics):
        metrics = ("pearson", "spearmanr") if regression else ("accuracy",)
    best = asked or metrics[0]
    if best == "eval_loss":
        return metrics, best
    if (best in ("pearson", "spearmanr")) != regression:
        raise UserError(
            f"train.metric_for_best_model: found {best} with {num_labels} labels, expected eval_loss or one of {', '.join(metrics)}"
        )
    return tuple(dict.fromkeys((*metrics, best))), best


def _refuse_for_labels(config: RunConfig) -> None:
    """What does not go with the number of labels, where that is known without the model.

    Raises:
        UserError: a metric or class weights of another number.
    """
    head = head_for(config)
    if head is not None and head.num_labels is not None:
        _measures(config.train.metric_for_best_model, subset_for(config), head.num_labels)
        _check_weights(config.train.class_weights, head.num_labels)


def _check_weights(asked: str, num_labels: int) -> None:
    weights = weights_of(asked) if asked not in ("none", "balanced") else None
    if num_labels == 1 and asked != "none":
        raise UserError(f"train.class_weights: found {asked}, but a number is predicted, expected none")
    if weights is not None and len(weights) != num_labels:
        raise UserError(f"train.class_weights: found {len(weights)} numbers, expected {num_labels}, one a label")


def _class_weights(asked: str, rows: ClassRows, num_labels: int) -> list[float] | None:
    """What each label counts; None: alike."""
    _check_weights(asked, num_labels)
    if asked == "none":
        return None
    return balanced_weights(rows.targets_N, num_labels) if asked == "balanced" else weights_of(asked)


def _require_train(name: str, splits: list[str]) -> None:
    if "train" not in splits:
        raise UserError(f"data.dataset_name: {name} has no train split, found {', '.join(splits)}")


def _tell_loaded(config: RunConfig, console: Console, train: int, evaluation: int, from_cache: bool) -> None:
    data = config.data
    console.data_loaded(
        data.dataset_name, train=train, evaluation=evaluation, from_cache=from_cache, wanted_train=data.max_train_samples
    )


def _tell_records(console: Console, max_length: int, loaded: ExampleSplits, *, answers: bool = True) -> None:
    for split, report in loaded.reports.items():
        console.records(
            split if len(loaded.reports) > 1 else None,
            records=report.records,
            bad=report.bad,
            first_bad=report.first_bad(),
            truncated=report.truncated,
            max_length=max_length,
            lost_share=report.lost_share if answers else None,
        )
