"""The model card of what is pushed: base, pattern, adapter, data, figures, out of the files that the verbs left. Called by `push.py`.

Every line is read from a file; what no file says is left out. Local paths are named by their last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from lora_dist.adapter import read_labels, read_quantisation
from lora_dist.blocks import MASK_FILE, Pattern
from lora_dist.log import UserError
from lora_dist.models.onnx_export import ONNX_FILE
from lora_dist.models.quantised import Quantisation
from lora_dist.state import CONFIG, METRICS

_ADAPTER, _MERGE, _PRUNING, _EXPORT = "adapter_config.json", "merge.json", "pruning.json", "export.json"


@dataclass
class Facts:
    """What the files in and around a folder say."""

    kind: str
    """adapter, merged model, pruned model, ONNX model or model"""
    base: str
    """hub name, or the last part of a local path; empty: unknown"""
    base_on_hub: bool
    task: str
    """the hub's pipeline tag"""
    adapter: Mapping[str, Any] | None = None
    pattern: Pattern | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    """sections of run_config.yaml"""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    proofs: list[str] = field(default_factory=list)
    trained_on: str = ""
    """how the base was quantised in training; empty: it was not"""
    num_labels: int | None = None
    """of a classifier's adapter"""


def gather_facts(folder: Path, base_model: str | None) -> Facts:
    """Read a folder that train, merge, prune or export wrote.

    Args:
        base_model: the base's name on the hub, where the user gives it.

    Raises:
        UserError: no adapter and no model, or a file that is broken.
    """
    adapter, config = _json(folder / _ADAPTER), _json(folder / "config.json")
    if not adapter and not config:
        raise UserError(
            f"FOLDER: found neither {_ADAPTER} nor config.json in {folder}, expected what train, merge or prune wrote"
        )
    merge, export, pruning = _json(folder / _MERGE), _json(folder / _EXPORT), _json(folder / _PRUNING).get("settings", {})
    run = _run_folder(folder, merge.get("adapter") or export.get("options", {}).get("adapter"))
    named = (
        base_model
        or adapter.get("base_model_name_or_path")
        or merge.get("base")
        or export.get("options", {}).get("model")
        or pruning.get("model")
        or ""
    )
    on_hub = bool(base_model) or (
        bool(named) and not Path(named).exists() and named.count("/") <= 1 and not named.startswith(".")
    )
    kind = (
        "adapter" if adapter else "ONNX model" if (folder / ONNX_FILE).is_file() else "merged model" if merge else "pruned model"
        if (folder / MASK_FILE).is_file() else "model"
    )  # fmt: skip
    classifies = adapter.get("task_type") == "SEQ_CLS" or "SequenceClassification" in "".join(config.get("architectures") or [])
    facts = Facts(
        kind,
        named if on_hub else Path(named).name,
        on_hub,
        "text-classification" if classifies else "text-generation",
        adapter or None,
        Pattern.load(folder) if (folder / MASK_FILE).is_file() else None,
        (_yaml(run / CONFIG) if run else {}),
        (_lines(run / METRICS) if run else []),
        pruning,
    )
    quantised = read_quantisation(folder)
    facts.trained_on = (
        str(Quantisation.from_dict(quantised)) if quantised else (merge.get("quantised") or {}).get("quantisation", "")
    )
    facts.num_labels = (read_labels(folder) or {}).get("num_labels")
    if merge and facts.pattern is not None:
        facts.proofs.append(f"merged: {merge['zero_tiles']:,} pruned tiles found exactly 0.0 in the written files")
    if merge:
        facts.proofs.append(f"merged logits differ from the adapter's by {merge['logits_error']:.1e} of the largest")
    if export:
        facts.proofs.append(f"onnxruntime's logits differ from torch's by {export['proof']['logits_error']:.1e} of the largest")
    return facts


def model_card(facts: Facts, repo_id: str) -> str:
    """README.md of the repository: YAML for the hub, and Markdown."""
    tags = (
        ["lora_dist"]
        + (["block-sparse"] if facts.pattern is not None else [])
        + ([_adapter_name(facts.adapter).lower()] if facts.adapter else [])
    )
    header = ModelCardData(
        base_model=facts.base if facts.base_on_hub else None,
        library_name="peft" if facts.adapter else "onnx" if facts.kind == "ONNX model" else "transformers",
        pipeline_tag=facts.task,
        tags=tags,
        datasets=_hub_data(facts.run),
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(facts))
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {repo_id.split('/')[-1]}",
        _summary(facts),
        f"| | |\n|---|---|\n{rows}" if rows else "",
        _figures(facts),
        "\n".join(f"- {proof}" for proof in facts.proofs),
        f"## Use\n\n```python\n{_usage(facts, repo_id)}\n```",
        f"Made with lora_dist {version('lora_dist')}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: Facts) -> str:
    name = _adapter_name(facts.adapter or {})
    what = f"{'An' if name[0] in 'AI' else 'A'} {name} adapter" if facts.kind == "adapter" else f"A {facts.kind}"
    if facts.kind == "merged model":
        what = "A model with its adapter merged"
    of = f" for `{facts.base}`" if facts.base and facts.kind == "adapter" else f" of `{facts.base}`" if facts.base else ""
    if facts.pattern is None:
        return f"{what}{of}."
    tiles = f", in whole {facts.pattern.block}x{facts.pattern.block} tiles" if facts.pattern.kind == "block" else ""
    kept = "the update is exactly zero there" if facts.kind == "adapter" else "each of these is exactly 0.0"
    return f"{what}{of}. {facts.pattern.sparsity:.1%} of the weights of the pruned linears are zero{tiles}; {kept}."


def _adapter_name(adapter: Mapping[str, Any]) -> str:
    """LoRA, DoRA, AdaLoRA, IA3 or what is trained without an adapter, by its config."""
    kind = str(adapter.get("peft_type", "")).removeprefix("BLOCK_")
    names = {"ADALORA": "AdaLoRA", "IA3": "IA3", "FULL": "sparse full fine-tuning"}
    return "DoRA" if adapter.get("use_dora") else names.get(kind, "LoRA")


def _numbers_of(adapter: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a config says how large an update may be."""
    return () if adapter.get("peft_type") == "BLOCK_FULL" else ("r", "lora_alpha", "lora_dropout")


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.base:
        yield "base", f"`{facts.base}`"
    adapter, pattern = facts.adapter or {}, facts.pattern
    if adapter.get("base_fingerprint"):
        yield "base fingerprint", f"`{adapter['base_fingerprint']}`"
    if pattern is not None:
        yield "pattern digest", f"`{pattern.digest}`"
        yield "pattern", f"{pattern.kind}, {f'tile {pattern.block}, ' if pattern.kind == 'block' else ''}{len(pattern)} linears"
        yield "sparsity", f"{pattern.sparsity:.2%}"
    if facts.pruning:
        yield (
            "pruned by",
            ", ".join(f"{key} {facts.pruning[key]}" for key in ("score", "select", "sparsity") if key in facts.pruning),
        )
    if adapter:
        targets = adapter.get("target_modules")
        yield (
            "adapter",
            ", ".join(
                [str(adapter.get("peft_type"))]
                + [f"{key} {adapter[key]}" for key in _numbers_of(adapter) if adapter.get(key) is not None]
            ),
        )
        if adapter.get("whole_parameters"):
            yield "trained whole", f"{len(adapter['whole_parameters'])} tensors of the base"
        yield "target modules", ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    if facts.trained_on:
        yield "base in training", f"quantised, {facts.trained_on}"
    yield from _training(facts.run)


def _training(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data, train = run.get("data", {}), run.get("train", {})
    if data.get("dataset_name"):
        names = [Path(part).name if Path(part).exists() else part for part in str(data["dataset_name"]).split(",")]
        yield "data", ", ".join(names) + (f" ({data['dataset_config_name']})" if data.get("dataset_config_name") else "")
        yield "context", f"{data['block_size']} tokens"
    if train:
        length = f"{train['max_steps']} steps" if train["max_steps"] > 0 else f"{train['num_train_epochs']:g} epochs"
        precision = "bf16" if train["bf16"] else "fp16" if train["fp16"] else "fp32"
        yield (
            "training",
            f"{length}, AdamW, rate {train['learning_rate']:g}, {train['lr_scheduler_type']}, {precision}, seed {train['seed']}",
        )


_FIGURES = {"eval_loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "f1": "F1", "matthews_correlation": "Matthews correlation",
            "pearson": "Pearson correlation", "spearmanr": "Spearman correlation"}  # fmt: skip


def _figures(facts: Facts) -> str:
    """Held-out figures before and after training."""
    evaluations = [m for m in facts.metrics if m.get("event") == "eval"]
    final = next((m for m in reversed(facts.metrics) if m.get("event") == "final"), None)
    if final is None:
        return ""
    before = evaluations[0] if evaluations and evaluations[0].get("step") == 0 else {}
    lines = ["| held-out data | before training | after |", "|---|---|---|"]
    for key, name in _FIGURES.items():
        if isinstance(final.get(key), int | float):
            start = f"{before[key]:.4g}" if isinstance(before.get(key), int | float) else ""
            lines.append(f"| {name} | {start} | {final[key]:.4g} |")
    return "\n".join(lines)


def _usage(facts: Facts, repo_id: str) -> str:
    auto = "AutoModelForSequenceClassification" if facts.task == "text-classification" else "AutoModelForCausalLM"
    if facts.kind == "ONNX model":
        return (
            "import onnxruntime\nfrom huggingface_hub import snapshot_download\n\n"
            f'session = onnxruntime.InferenceSession(snapshot_download("{repo_id}") + "/{ONNX_FILE}")'
        )
    labels = f", num_labels={facts.num_labels}" if facts.num_labels is not None else ""
    load = f'from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained("{{}}"{labels})\n'
    if not facts.adapter:
        return load.format(repo_id) + f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")'
    masked = facts.pattern is not None and _adapter_name(facts.adapter) != "IA3"  # whose files are PEFT's own
    needs = "import lora_dist  # without it, peft refuses an adapter that has a mask\n" if masked else ""
    base = facts.base if facts.base_on_hub else "THE_BASE"
    return f'{needs}from peft import PeftModel\n{load.format(base)}model = PeftModel.from_pretrained(model, "{repo_id}")'


def _hub_data(run: Mapping[str, Any]) -> list[str] | None:
    name = str(run.get("data", {}).get("dataset_name") or "")
    return [name] if name and not Path(name.split(",")[0]).exists() and name.count("/") <= 1 and "." not in name else None


def _run_folder(folder: Path, adapter: str | None) -> Path | None:
    """The run that a folder is of: itself, the one above (adapter_subfolder), or the one whose adapter was merged."""
    candidates = [folder, folder.parent, *([Path(adapter), Path(adapter).parent] if adapter else [])]
    return next((place for place in candidates if (place / CONFIG).is_file()), None)


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"FOLDER: {file} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(read, dict):
        raise UserError(f"FOLDER: {file} holds {type(read).__name__}, expected an object")
    return read


def _yaml(file: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"FOLDER: {file} cannot be read ({str(error).splitlines()[0]})") from error
    return read if isinstance(read, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"FOLDER: {file} cannot be read ({str(error).splitlines()[0]})") from error
