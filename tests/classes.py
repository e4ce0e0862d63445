"""Labelled sentences and encoders small enough to be made on the spot. Plain functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.models.architecture import prunable_linears

GOOD, BAD = ("fine", "warm", "lovely", "bright"), ("dull", "cold", "awful", "grim")
FILLING = ("the", "film", "was", "a", "very", "river", "story", "and", "its", "end")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,  # 2.5 tiles of 16
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, [CLS] and [SEP] around."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *GOOD, *BAD, *FILLING))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def encoder_base(folder: Path, kind: str = "bert", *, pruned: bool = True, head: bool = False, **sizes: Any) -> Path:
    """A 2-layer encoder without a classification head unless asked for, half of its tiles pruned, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SIZES, **sizes})
    auto = AutoModelForSequenceClassification if head or kind in ("llama", "gpt2") else AutoModelForMaskedLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if pruned:
        generator, masks = torch.Generator().manual_seed(1), {}  # a seed that leaves a way from words to logits
        for linear in prunable_linears(model):
            shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
            mask = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
            linear.weight_OI.masked_fill_(~mask.expand(), 0.0)
            masks[linear.name] = mask
        Pattern(masks).save(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def taught_base(folder: Path) -> Path:
    """An `encoder_base`, not pruned, trained to tell `sentences` apart, its classifier then turned round:
    always wrong before training, and soon right."""
    encoder_base(folder, head=True, pruned=False)
    torch.manual_seed(0)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), word_tokenizer()
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=5e-3), sentences(512, seed=9)
    for step in range(64):
        batch = rows[step % 32 * 16 :][:16]
        encoded = tokenizer([row["sentence"] for row in batch], padding=True, return_tensors="pt")
        model(**encoded, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.classifier.weight.data.neg_()
    model.classifier.bias.data.neg_()
    model.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Reviews of unlike lengths whose label, 0 or 1, is in one of their words."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...], n: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (n,), generator=generator).tolist()]

    rows = []
    for _ in range(count):
        label = int(torch.randint(2, (), generator=generator))
        before, after = torch.randint(1, 7, (2,), generator=generator).tolist()
        words = [*pick(FILLING, before), *pick(GOOD if label else BAD, 1), *pick(FILLING, after)]
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def write_sentences(file: Path, rows: list[dict[str, Any]]) -> Path:
    """TSV, CSV or JSONL, by the name."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    cut = "\t" if file.suffix == ".tsv" else ","
    file.write_text("".join(cut.join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)]))
    return file
