"""Instruction records that a model of characters can learn something of, and the template they fit a context of 64 tokens with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = ("river", "stone", "bird", "bridge", "home", "old")


def write_instructions(folder: Path, count: int = 60) -> tuple[Path, Path]:
    """Alpaca-format records, two of them bad, two too long; and a template. Returns both files."""
    records: list[object] = []
    for i in range(count):
        words = [WORDS[(i + j * (i % 3 + 1)) % 6] for j in range(1 + i % 4)]
        record = {"instruction": f"say {i % 7}", "input": " ".join(words[:1]) if i % 2 else "", "output": " ".join(words)}
        records.append(record)
    records[5] = {"instruction": "say"}
    records[9] = {"instruction": "say", "output": 3}
    records[20] = {"instruction": "say", "input": "", "output": "stone " * 20}
    records[21] = {"instruction": "say", "input": "", "output": "bird " * 20}
    template = {"prompt_input": "Q {instruction}, {input}\nA:", "prompt_no_input": "Q {instruction}\nA:", "response_split": "A:"}
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "short.json").write_text(json.dumps(template))
    return folder / "records.json", folder / "short.json"


def transformers_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, max_length: int, rows: list[int] | None = None
) -> float:
    """Mean loss of the answers' tokens, by `model(input_ids, labels)` on one usable record after the other."""
    total, count = 0.0, 0
    records = [record for record in json.loads(file.read_text()) if isinstance(record.get("output"), str)]
    for record in records if rows is None else [records[i] for i in rows]:
        given = f", {record['input']}" if record["input"] else ""
        prompt = tokenizer(f"Q {record['instruction']}{given}\nA:")["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id])[:max_length]
        labels = ids.clone()
        labels[: len(prompt)] = -100
        tokens = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids[None], labels=labels[None]).loss) * tokens
        count += tokens
    return total / count
