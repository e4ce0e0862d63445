#!/usr/bin/env python
"""Try the parts that training needs, on a tiny encoder: forward, backward, merge, save and load. Exit code 1 where one fails."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file: the package lies beside this folder


def versions() -> str:
    """Import what is needed."""
    import peft
    import torch
    import transformers

    import lora_dist  # noqa: F401 (that it can be imported is what is tried)

    return f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def train_a_step() -> str:
    """A LoRA on a tiny encoder: counted, and its gradients finite and only its own."""
    import torch
    from lora_linear import count_lora_parameters

    model, ids = _tiny()
    counts = count_lora_parameters(model)
    if counts["trainable"] != counts["lora"] or counts["lora"] == 0:
        raise RuntimeError(f"found {counts['trainable']} trainable parameters, expected the LoRA's {counts['lora']}")
    loss = model(input_ids=ids, labels=torch.tensor([0, 1])).loss
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or not bool(torch.isfinite(p.grad).all())):
            raise RuntimeError(f"found no finite gradient for {name}")
    return f"loss {loss.item():.4f}, {counts['lora']:,} trainable parameters"


def merge_and_compare() -> str:
    """Merged logits are what they were."""
    import torch
    from lora_linear import merge_lora_weights

    model, ids = _tiny()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = merge_lora_weights(model)(input_ids=ids).logits
    difference = float((before - after).abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"merged logits differ by {difference:.1e}, expected at most 1e-4")
    return f"largest difference {difference:.1e}"


def save_and_load() -> str:
    """A saved LoRA gives the same logits on a fresh model."""
    import torch
    from lora_linear import get_lora_state_dict, load_lora_state_dict
    from safetensors.torch import load_file, save_file

    model, ids = _tiny()
    fresh, _ = _tiny(lora_seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_file(get_lora_state_dict(model), f"{folder}/lora.safetensors")
        load_lora_state_dict(fresh, load_file(f"{folder}/lora.safetensors"))
    with torch.no_grad():
        if not torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits):
            raise RuntimeError("logits after loading are not what they were before saving")
    return "equal logits"


def _tiny(lora_seed: int = 0):
    """A 2-layer encoder with a LoRA that is not zero, and token ids."""
    import torch
    from lora_linear import apply_lora_to_model, mark_only_lora_as_trainable
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=2
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    torch.manual_seed(lora_seed)
    apply_lora_to_model(model, ["query", "key", "value", "attention.output.dense"], rank=4, alpha=8)
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model, ids


def main() -> int:
    tests: list[tuple[str, Callable[[], str]]] = [
        ("Libraries", versions), ("Forward and backward", train_a_step), ("Merge", merge_and_compare), ("Save and load", save_and_load),
    ]  # fmt: skip
    failed = 0
    for name, test in tests:
        try:
            print(f"✅ {name}: {test()}")
        except Exception as error:  # whatever is wrong with the installation is what is to be told
            failed += 1
            print(f"❌ {name}: {type(error).__name__}: {error}")
    print("🎉 All tests passed!" if not failed else f"{failed} of {len(tests)} tests failed: see docs/guide.md on installing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
