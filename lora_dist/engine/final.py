"""What a run leaves at its end: the final adapter and the tokenizer, and what to do with them. Called by `engine/loop.py`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_dist.adapter import adapter_tensors, save_adapter
from lora_dist.engine.checkpoint import adapter_problem
from lora_dist.engine.folder import publish_files
from lora_dist.engine.setup import Parts


def final_folder(parts: Parts) -> Path:
    """Where the final adapter goes."""
    return parts.output_dir / parts.config.train.adapter_subfolder


def write_final(parts: Parts, trained: Mapping[str, Tensor], norms: Mapping[str, float]) -> None:
    """Rank 0 only. Each file appears whole, in place of an older one.

    Args:
        trained: the adapter's tensors, whole.
        norms: of the live adapter, which what was written has to have.

    Raises:
        UserError: full or read-only disk, or files that are not what was trained.
    """
    folder, console = final_folder(parts), parts.console
    console.saving(folder)
    publish_files(
        folder,
        lambda staged: save_adapter(
            parts.model,
            staged,
            adapter_tensors(parts.model, trained),
            pattern=parts.pattern,
            base_fingerprint=parts.identity.base_fingerprint,
        ),
        lambda staged: adapter_problem(staged, norms),
    )
    console.saved_files(folder / "adapter_config.json", folder / "adapter_model.safetensors")
    publish_files(folder, lambda staged: parts.base.tokenizer.save_pretrained(str(staged)))
    console.tokenizer_saved(folder / "tokenizer_config.json")


def next_steps(parts: Parts) -> list[str]:
    """Commands for the console."""
    base, adapter = shlex.quote(parts.config.model.name_or_path), shlex.quote(str(final_folder(parts)))
    merged = shlex.quote(str(parts.output_dir / "merged"))
    data = parts.config.data
    if data.format == "classification":
        use = ["1. Ask the fine-tuned classifier:", f'   lora-dist classify {base} --adapter {adapter} --text "..."']
    elif data.format == "text":
        use = [
            "1. Evaluate the fine-tuned model:",
            f"   LORA_WEIGHTS={adapter} PRUNED_MODEL={base} ./scripts/evaluate_lora_block.sh",
        ]
    else:
        form = f"--prompt_template {shlex.quote(data.prompt_template)}" + (
            "   (--chat for chats)" if data.format == "auto" else ""
        )
        use = [
            "1. Ask the fine-tuned model:",
            f"   lora-dist generate {base} --adapter {adapter} {'--chat' if data.format == 'chat' else form}",
        ]
    scales = parts.config.adapter.type == "ia3"  # keeps every zero by itself
    pattern_lost = parts.pattern is None and parts.guard.pattern is not None and not scales
    kept = ", pattern kept" if parts.guard.pattern is not None and not pattern_lost else ""
    merge = f"2. Merge it{kept}:  lora-dist merge {base} {adapter} {merged}"
    if pattern_lost:
        merge += " --densify   (unmasked: the pattern is lost)"
    return [*use, merge]
