"""Options of every verb but train: name, type, default, help line and check, as in `config.py`.

Plain dataclasses without heavy imports, so that help and bad input are answered at once. Read by `cli/`, used by `engine/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PruneArgs:
    """Zero the least important tiles of a model's decoder layers; writes a model directory with the pattern beside it."""

    model: str = ""
    """Directory or hub name of the model to prune."""
    out: str = ""
    """Directory to write; must not exist or be empty."""
    sparsity: float = 0.5
    """Share of the tiles of each matrix to drop, rounded down to whole tiles."""
    block: int = 16
    """Side of a tile."""
    score: Literal["wanda", "magnitude", "random"] = "wanda"
    """What a tile is worth: the sum of |W| * ||x|| (wanda; x from the calibration text), of |W| (magnitude), or random."""
    select: Literal["matrix", "row"] = "matrix"
    """Drop the lowest tiles of a whole matrix, or the same number in each row of tiles."""
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
        if self.score == "wanda" and not self.calibration:
            yield "calibration: found nothing, expected a hub name, a directory or files (score=magnitude needs no text)"


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
    config_name: str | None = None
    """Where to take config and tokenizer from if the base has none of its own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
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


@dataclass
class EvalArgs:
    """Loss and perplexity of a model on text, token-weighted over windows of the context length."""

    model: str = ""
    """Directory (or hub name) of the model."""
    adapter: str | None = None
    """Adapter folder to put on it."""
    dataset_name: str = "wikitext"
    """Hub name, local directory, or local files (comma-separated)."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    split: str = "test"
    """Split to evaluate; single files are one split, whatever its name."""
    text_column: str = "text"
    """Column that holds the text in JSON, CSV and parquet."""
    document_separator: str | None = None
    """Text that separates documents inside .txt files."""
    special_tokens: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Special tokens put around each document."""
    block_size: int | None = None
    """Context length in tokens; default: the model's, 2048 at most."""
    holdout_windows: int | None = None
    """Evaluate only the windows that train holds out of this data set: its data.holdout_windows (and --seed its train.seed)."""
    seed: int = 42
    """Seed of the held-out windows."""
    max_samples: int | None = None
    """Use at most this many windows."""
    batch_size: int = 8
    """Windows a process holds at once."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: GPUs if there are any."""
    cache_dir: str | None = None
    """Where tokenised text is kept."""
    bands: list[float] = field(default_factory=lambda: [7.0, 10.0, 50.0])
    """Perplexities up to which a model is called ideal, good and fair; the defaults are for Llama-2-7B on WikiText-2."""
    output: str | None = None
    """JSON file to write the figures to."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        for name in ("block_size", "max_samples", "batch_size", "holdout_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if len(self.bands) != 3 or sorted(self.bands) != self.bands:
            yield f"bands: found {self.bands}, expected three rising numbers"


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


@dataclass
class GenerateArgs:
    """Continue a prompt with a base, an adapter or a merged model."""

    model: str = ""
    """Directory (or hub name) of the model."""
    prompt: str = ""
    """Text to continue."""
    adapter: str | None = None
    """Adapter folder to put on the model."""
    max_new_tokens: int = 64
    """Tokens to add at most."""
    do_sample: bool = False
    """Draw from the distribution; off: the likeliest token each time."""
    temperature: float = 1.0
    """Flattens (above 1) or sharpens the distribution; with do_sample."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share; with do_sample."""
    top_k: int = 50
    """Draw from this many likeliest tokens; with do_sample."""
    seed: int = 0
    """Seed of the draws."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        if not self.prompt:
            yield "prompt: found nothing, expected a text"
        for name in ("max_new_tokens", "temperature", "top_k"):
            if getattr(self, name) <= 0:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0"
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if not 0 < self.top_p <= 1:
            yield f"top_p: found {self.top_p}, expected a number above 0 and at most 1"


@dataclass
class RendezvousArgs:
    """Hold the meeting point of elastic runs, on a machine that outlives any of theirs, until it is stopped."""

    port: int = 29400
    """Port to listen on, at all addresses of this machine; 0: one that is free, which is printed."""

    def problems(self) -> Iterator[str]:
        if not 0 <= self.port < 65536:
            yield f"port: found {self.port}, expected a number from 0 to 65535"


@dataclass
class DoctorArgs:
    """Examine this machine before a run: versions, GPUs, disk, network, collectives and strategies tried for real; with remedies."""

    output_dir: str = "."
    """Run folder whose disk is tried; need not exist yet. Nothing stays in it."""
    model: str = ""
    """Model directory (or hub name) to work out the size of a checkpoint from."""
    r: int = 8
    """Rank of the adapter, for the same."""
    processes: int | None = None
    """Processes to start; default: one a GPU, 2 without."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run collectives and strategies; auto: GPUs if there are any."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collectives to try; auto: nccl and gloo on GPUs, gloo on CPUs."""
    grace_s: float = 30.0
    """Seconds between the warning and the end of a run; torchrun and Slurm leave 30."""
    offline: bool = False
    """Ask neither hub nor tracker."""
    timeout_s: float = 120.0
    """Seconds without progress after which processes count as hung."""
    only: list[
        Literal[
            "versions", "environment", "machine", "gpus", "disk", "hub", "tracker", "model", "space", "save_time", "collectives",
            "strategies",
        ]
    ] = field(default_factory=list)  # fmt: skip
    """Leave out all checks but these (comma-separated)."""
    json: bool = False
    """One JSON object a line instead of text; the last holds the counts."""

    def problems(self) -> Iterator[str]:
        for name in ("r", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        for name in ("grace_s", "timeout_s"):
            if not getattr(self, name) > 0:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0"
        if not self.output_dir:
            yield "output_dir: found nothing, expected a folder"
        if self.backend == "nccl" and self.device == "cpu":
            yield "backend: found nccl with device cpu, expected gloo, or another device"


@dataclass
class SubmitArgs:
    """Check a training run and queue it under Slurm, to be requeued until it is complete. Options are sbatch's where it has them;
    --config FILE and what follows `--` are those of lora-dist train."""

    nodes: str = "1"
    """Nodes: a number, or MIN-MAX for as many as there are."""
    gpus_per_node: int | None = None
    """GPUs of each node."""
    ntasks_per_node: int | None = None
    """Processes on each node; default: gpus_per_node, else 1."""
    cpus_per_task: int | None = None
    """CPU cores of each process."""
    mem: str | None = None
    """Memory of each node, such as 64G."""
    time: str | None = None
    """Time limit of one attempt: minutes, HH:MM:SS or D-HH:MM; default: the partition's."""
    partition: str | None = None
    """Partition to run in."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    array: str | None = None
    """Tasks of a job array, such as 0-3%2; {task} in an option's value stands for the task's number, and train.output_dir needs it."""
    sweep: str | None = None
    """File whose line N has further options for the array's task N; default of array with it: all lines."""
    job_name: str | None = None
    """Name in the queue; default: that of the run folder."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: srun starts one torchrun a node; srun: srun starts every process."""
    sbatch_args: str = ""
    """Further options for sbatch, in one text."""
    requeue: bool = True
    """Queue the job again when it is preempted, out of time or without a node; off: it ends there."""
    max_requeues: int = 100
    """How often at most."""
    signal_s: int = 120
    """Seconds before the time limit at which the run is asked to save and stop (Slurm may be up to 60 s early)."""
    dry_run: bool = False
    """Write the job and show it, but do not queue it."""

    def problems(self) -> Iterator[str]:
        """Every value that is out of range, one line each."""
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes):
            yield f"nodes: found {self.nodes}, expected a number from 1 up or MIN-MAX"
        for name in ("gpus_per_node", "ntasks_per_node", "cpus_per_task", "signal_s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        if self.max_requeues < 0:
            yield f"max_requeues: found {self.max_requeues}, expected 0 or more"
        if self.array is not None and not re.fullmatch(r"\d+([-,:]\d+)*(%\d+)?", self.array):
            yield f"array: found {self.array}, expected task numbers such as 0-3, 1,4 or 0-9%2"
        if self.time is not None and not re.fullmatch(r"\d+(-\d+)?(:\d+){0,2}", self.time):
            yield f"time: found {self.time}, expected minutes, HH:MM:SS or D-HH:MM"
        for name in ("mem", "partition", "account", "qos", "job_name"):
            if re.search(r"[\s'\"]", getattr(self, name) or ""):
                yield f"{name}: found {getattr(self, name)}, expected a word without spaces or quotes"
        if "\n" in self.sbatch_args:
            yield "sbatch_args: found several lines, expected one"
