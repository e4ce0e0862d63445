"""Options of the verbs that write or show a model directory: prune, merge, convert, inspect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass
class PruneArgs:
    """Zero the least important tiles of a model's decoder layers; writes a model directory with the pattern beside it."""

    model: str = ""
    """Directory or hub name of the model to prune."""
    out: str = ""
    """Directory to write; must not exist or be empty."""
    sparsity: float = 0.5
    """Share of the tiles of each matrix (each row, or the model: select) to drop, rounded down to whole tiles."""
    block: int = 16
    """Side of a tile."""
    score: Literal["wanda", "energy", "obs", "magnitude", "random"] = "wanda"
    """What a tile is worth: the sum of |W| * ||x|| (wanda; x from the calibration text), of their squares (energy), of |W| (magnitude), what
    reconstruction loses without it, tile by tile (obs), or random."""
    select: Literal["matrix", "row", "global"] = "matrix"
    """Drop the lowest tiles of a whole matrix, the same number in each row of tiles, or (global) more from matrices that the model's output
    is found to need less."""
    reconstruct: bool = False
    """Solve for the kept weights: the least squares of each linear's outputs on the calibration text."""
    target: Literal["dense", "same"] = "dense"
    """What reconstruction aims at: what brings each layer nearest to the dense model's (dense; runs both), or the unpruned linear's outputs
    on the inputs that pruned layers give it (same; a fifth of the passes)."""
    damping: float = 0.01
    """Added to the diagonal of the inputs' products in reconstruction, as a share of its mean: more keeps weights nearer to what they were."""
    from_pruned: str | None = None
    """Directory of a pruned version of MODEL: take its pattern, and reconstruct from MODEL; sparsity, score and select play no part."""
    nsamples: int = 128
    """Calibration windows, chosen at random by seed."""
    seqlen: int | None = None
    """Tokens a calibration window; default: the model's context, 2048 at most."""
    calibration: str = "c4"
    """Calibration text: hub name, directory, or files (comma-separated .txt .json .jsonl .csv .parquet)."""
    calibration_config: str | None = None
    """Configuration of a hub data set, such as wikitext-2-raw-v1."""
    text_column: str = "text"
    """Column that holds the text in JSON, CSV and parquet."""
    document_separator: str | None = None
    """Text that separates documents inside .txt files, such as <|endoftext|>."""
    special_tokens: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Special tokens put around each document; auto: what the tokenizer itself adds."""
    seed: int = 0
    """Seed of the choice of windows, and of the random score."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute and save in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where layers are computed, one at a time; auto: the GPU if there is one."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""
    cache_dir: str | None = None
    """Where tokenised text is kept; default: lora_dist/ in the Hugging Face cache."""

    def problems(self) -> Iterator[str]:
        """Every value that is out of range, one line each."""
        for name in ("model", "out"):
            if not getattr(self, name):
                yield f"{name.upper()}: found nothing, expected lora-dist prune MODEL OUT"
        if not 0 <= self.sparsity < 1:
            yield f"sparsity: found {self.sparsity}, expected a number from 0 up to but not including 1"
        if self.seed >= 2**63:
            yield f"seed: found {self.seed}, expected a number below 2**63"
        for name, least in (("block", 1), ("nsamples", 1), ("seqlen", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name}: found {value}, expected {least} or more"
        sees_text = self.reconstruct or self.from_pruned or self.select == "global" or self.score in ("wanda", "energy", "obs")
        if sees_text and not self.calibration:
            yield "calibration: found nothing, expected a hub name, a directory or files (score=magnitude needs no text)"
        if not 0 <= self.damping < math.inf:
            yield f"damping: found {self.damping}, expected a number from 0"
        if self.score == "obs" and not (self.reconstruct or self.from_pruned):
            yield "score: found obs without reconstruct, expected --reconstruct: it counts on kept weights that make up for what goes"
        if self.score == "obs" and self.damping == 0 and not self.from_pruned:
            yield "damping: found 0 with score obs, expected more than 0: dependent inputs have no inverse"


@dataclass
class MergeArgs:
    """Add an adapter to its base; the result is an ordinary model directory with every pruned tile exactly zero."""

    base: str = ""
    """Directory of the pruned base that the adapter was trained on."""
    adapter: str = ""
    """Folder that train wrote."""
    out: str = ""
    """Directory to write; must not exist or be empty."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the merged weights; auto keeps the base's (half precision rounds the update)."""
    project: bool = False
    """Plain LoRA on a pruned base: merge, then set pruned tiles back to zero; keeps the pattern, throws part of the update away."""
    densify: bool = False
    """Plain LoRA on a pruned base: merge all of it; the model is dense afterwards."""
    into: Literal["dequantised", "original"] = "dequantised"
    """Adapter of a quantised base: merge into the weights that it was trained on, de-quantised, or into those that are stored."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the base has none of its own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    storage: Literal["dense", "blocks"] = "dense"
    """How OUT is written: dense, as transformers reads it, or blocks: only the kept tiles of the pruned linears (lora-dist reads both)."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the base."""

    def problems(self) -> Iterator[str]:
        for name in ("base", "adapter", "out"):
            if not getattr(self, name):
                yield f"{name.upper()}: found nothing, expected lora-dist merge BASE ADAPTER OUT"
        if self.project and self.densify:
            yield "project, densify: found both, expected one at most"
        if self.storage == "blocks" and self.densify:
            yield "storage: found blocks with densify, which leaves no pruned tiles, expected dense"


@dataclass
class ExportArgs:
    """Write a model as ONNX for onnxruntime; with an adapter, merged first. Batch and sequence stay free; no key-value cache."""

    model: str = ""
    """Directory (or hub name) of a model in Hugging Face format."""
    out: str = ""
    """Directory to write; must not exist or be empty."""
    adapter: str | None = None
    """Folder that train wrote, to be merged into the model on the way."""
    opset: int | None = None
    """ONNX operator set; default: what torch's exporter recommends."""
    tolerance: float = 1e-4
    """Largest difference of onnxruntime's logits to torch's, over the largest logit, both in float32; above it nothing is written."""
    densify: bool = False
    """Plain LoRA on a pruned base: merge all of it; the model is dense afterwards."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        for name in ("model", "out"):
            if not getattr(self, name):
                yield f"{name.upper()}: found nothing, expected lora-dist export MODEL OUT"
        if self.opset is not None and self.opset < 18:
            yield f"opset: found {self.opset}, expected 18 or more"
        if not 0 < self.tolerance < 1:
            yield f"tolerance: found {self.tolerance}, expected a number between 0 and 1"
        if self.densify and self.adapter is None:
            yield "densify: found without adapter, expected an adapter to merge"


@dataclass
class ConvertArgs:
    """Turn a pickled model, as pruning tools write it, into a directory of safetensors (nothing in the pickle is run); or a model directory
    into one that holds the kept tiles of its pruned linears only, and back."""

    pickle: str = ""
    """File that holds {'model', 'tokenizer'}, a model, or a state dict, written by torch.save; or a model directory."""
    out: str = ""
    """Directory to write; must not exist or be empty."""
    trust_pickle: bool = False
    """Open a pickle that names classes outside of the allow-list; code in it runs."""
    tokenizer: str | None = None
    """Directory or hub name to take the tokenizer from, where the pickle has none that can be rebuilt."""
    config_name: str | None = None
    """Directory or hub name to take the configuration from: needed by a state dict."""
    block: int = 16
    """Tile side to look for; a pattern of pruned tiles is stored beside the weights."""
    storage: Literal["dense", "blocks"] = "dense"
    """How OUT is written: dense, as transformers reads it, or blocks: only the kept tiles of the pruned linears (lora-dist reads both)."""
    trust_remote_code: bool = False
    """Of a model directory: run model code that comes with it."""

    def problems(self) -> Iterator[str]:
        for name in ("pickle", "out"):
            if not getattr(self, name):
                yield f"{name.upper()}: found nothing, expected lora-dist convert PICKLE OUT"
        if self.block < 1:
            yield f"block: found {self.block}, expected 1 or more"


@dataclass
class InspectArgs:
    """Show a model's or an adapter's pattern, layer by layer, and what is wrong with it."""

    path: str = ""
    """Model directory, adapter folder, checkpoint folder or mask file."""
    block: int = 16
    """Tile side to look for where no mask is stored."""
    summary: bool = False
    """Totals only, no line a layer."""

    def problems(self) -> Iterator[str]:
        if not self.path:
            yield "PATH: found nothing, expected a model directory, an adapter folder or a mask file"
        if self.block < 1:
            yield f"block: found {self.block}, expected 1 or more"
