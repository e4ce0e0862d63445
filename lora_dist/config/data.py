"""`data.*`: what is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_dist.config.checks import fraction, positive


@dataclass
class DataArgs:
    """The text that is trained and evaluated on."""

    dataset_name: str = ""
    """Hub name, local directory, or local files (comma-separated .txt .json .jsonl .csv .tsv .parquet)."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set, such as wikitext-2-raw-v1."""
    validation_file: str | None = None
    """Local files to evaluate on, where the data set has no validation split of its own."""
    text_column: str | None = None
    """Column that holds the text in JSON, CSV and parquet; default: text; of classification the GLUE subset's, else sentence."""
    column_names: str | None = None
    """Examples in .csv and .tsv files without a header: names of their columns, comma-separated, such as source,label,mark,sentence."""
    train_split: str = "train"
    """Examples of a hub data set or directory: name of the split to train on."""
    validation_split: str | None = None
    """Likewise of the split to evaluate on; default: validation (of GLUE's mnli validation_matched)."""
    text_pair_column: str | None = None
    """classification: column of the second text; default: the GLUE subset's, else none."""
    label_column: str | None = None
    """classification: column of labels, numbers or names; default: label."""
    document_separator: str | None = None
    """Text that separates documents inside .txt files, such as <|endoftext|>; without one, a file is running text."""
    format: Literal["text", "auto", "alpaca", "chat", "prompt_completion", "classification"] = "text"
    """What a row is: text, packed into windows; or an example: alpaca (instruction, input, output), chat (messages, or ShareGPT's
    conversations, through the tokenizer's chat template), prompt_completion; auto: by the columns.
    classification: labelled sentences or pairs (model.task_type SEQ_CLS)."""
    prompt_template: str = "alpaca"
    """alpaca: the template instructions are put in: templates/NAME.json in the working directory, else the package's, or a path."""
    train_on_inputs: bool = False
    """Examples: count the loss on the prompt as well, not on the answer only."""
    add_eos_token: bool = True
    """Examples: the tokenizer's end-of-sequence token behind the answer, to be learnt; chat templates have their own."""
    packing: bool = False
    """Examples: several in one row, which do not attend to each other; no padding work."""
    packing_length: int | None = None
    """Tokens of a packed row; default: block_size."""
    max_bad_share: float = 0.1
    """Examples: stop if more than this share of the records cannot be used; fewer are named and left out."""
    special_tokens: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Special tokens put around each document; auto: what the tokenizer itself adds."""
    block_size: int = 1024
    """Context length in tokens: of a window of text, or of the longest example (the pruning tile is adapter.block)."""
    max_train_samples: int | None = None
    """Use at most this many windows or examples for training."""
    max_eval_samples: int | None = None
    """Use at most this many windows or examples for evaluation."""
    holdout_windows: int = 128
    """Windows or examples held out at random for evaluation where there is no validation split."""
    preprocessing_num_workers: int | None = None
    """Processes that tokenise; default: the cores, 8 at most."""
    dataloader_num_workers: int = 0
    """Processes that load batches ahead of the step; windows are read from a memory map, so 0 is usually enough."""
    cache_dir: str | None = None
    """Where tokenised text is kept; default: lora_dist/ in the Hugging Face cache."""

    def problems(self) -> Iterator[str]:
        if not self.dataset_name:
            yield "data.dataset_name: found nothing, expected a hub name, a directory or files"
        yield from positive(
            "data", self, "max_train_samples", "max_eval_samples", "preprocessing_num_workers", "holdout_windows", "packing_length",
        )  # fmt: skip
        yield from fraction("data", self, "max_bad_share")
        if self.block_size < 2:
            yield f"data.block_size: found {self.block_size}, expected a context of 2 tokens or more"
        if self.dataloader_num_workers < 0:
            yield f"data.dataloader_num_workers: found {self.dataloader_num_workers}, expected 0 or more"
        for key in ("text_pair_column", "label_column"):
            if getattr(self, key) is not None and self.format != "classification":
                yield f"data.{key}: found with data.format {self.format}, expected classification"
        if self.format == "text":
            for key, default in (("column_names", None), ("train_split", "train"), ("validation_split", None)):
                if getattr(self, key) != default:
                    yield f"data.{key}: found {getattr(self, key)} with data.format text, expected a format of examples"
        names = [name.strip() for name in (self.column_names or "a").split(",")]
        if not all(names) or len(set(names)) < len(names):
            yield f"data.column_names: found {self.column_names}, expected names that differ, separated by commas"
        if self.format == "classification" and (self.packing or self.train_on_inputs):
            yield "data.packing, data.train_on_inputs: found true with data.format classification, expected neither"
        for key in ("packing", "train_on_inputs"):
            if self.format == "text" and getattr(self, key):
                yield f"data.{key}: found true with data.format text, which is learnt whole, expected auto or a format of examples"
        if self.packing_length is not None and not (self.packing and self.packing_length >= self.block_size):
            yield (
                f"data.packing_length: found {self.packing_length}, expected data.packing, and data.block_size ({self.block_size}) "
                "or more: a row holds the longest example"
            )
