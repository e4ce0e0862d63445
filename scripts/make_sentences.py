#!/usr/bin/env python
"""Write real sentences in SST-2's format, and train a small BERT on their words for classifiers to start from.

    python scripts/make_sentences.py OUT        # OUT/train.tsv, OUT/dev.tsv, OUT/encoder

The task: ten words in a row, lower case, without punctuation: from a children's story (label 1, TinyStories) or from Wikipedia (label 0,
WikiText-2)? Read from the folder that LORA_DIST_DATA names at run time; the dev split comes from other stories and articles. The encoder
learns to fill in masked words of the training split (no labels), a minute or two on one core.
"""

from __future__ import annotations

import argparse
import os
import random
import re
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

WORDS, VOCABULARY, WIDTH = 10, 4000, 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def snippets(text: str, count: int, draw: random.Random) -> list[str]:
    """`count` runs of words from inside sentences, each once."""
    found: set[str] = set()
    pieces = [
        re.findall(r"[a-z]+", piece)
        for piece in re.split(r"[.!?\n]", text.lower().replace("<unk>", ".").replace("|endoftext|", "."))
    ]
    pieces = [words for words in pieces if len(words) >= WORDS + 2]
    while len(found) < count:
        words = draw.choice(pieces)
        start = draw.randrange(len(words) - WORDS + 1)
        found.add(" ".join(words[start : start + WORDS]))
    return sorted(found)


def write(out: Path, data: Path, train: int, dev: int) -> list[str]:
    """Both splits, halves of each label; returns the training sentences."""
    texts = {
        "train": ((data / "tinystories" / "tinystories_10k.txt"), (data / "wikitext-2" / "train.txt")),
        "dev": ((data / "tinystories" / "tinystories_sample.txt"), (data / "wikitext-2" / "valid.txt")),
    }
    sentences: list[str] = []
    for split, count in (("train", train), ("dev", dev)):
        draw = random.Random(split)
        story, wiki = (snippets(file.read_text(encoding="utf-8"), count // 2, draw) for file in texts[split])
        rows = [(text, 1) for text in story] + [(text, 0) for text in wiki]
        draw.shuffle(rows)
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (out / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if split == "train":
            sentences = [text for text, _ in rows]
    return sentences


def word_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """The most frequent words, in lower case."""
    words = [word for word, _ in Counter(" ".join(sentences).split()).most_common(VOCABULARY - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_max_length=128, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def train_encoder(sentences: list[str], out: Path, steps: int) -> None:
    """Masked-language training: 25% of the words, one learning rate."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sentences)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128,
        )
    )  # fmt: skip
    ids_NL = tokenizer(sentences, padding=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        ids_BL = ids_NL[torch.randint(len(ids_NL), (128,))]
        hidden_BL = (torch.rand(ids_BL.shape) < 0.25) & (ids_BL > len(SPECIAL) - 1)
        labels_BL = ids_BL.masked_fill(~hidden_BL, -100)
        loss = model(input_ids=ids_BL.masked_fill(hidden_BL, tokenizer.mask_token_id), labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: masked-word loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=8000, help="sentences (default 8000)")
    parser.add_argument("--dev", type=int, default=1000, help="sentences (default 1000)")
    parser.add_argument("--steps", type=int, default=400, help="of masked-language training (default 400)")
    flags = parser.parse_args()
    if "LORA_DIST_DATA" not in os.environ:
        parser.error("LORA_DIST_DATA: found nothing, expected the folder with tinystories/ and wikitext-2/")
    flags.out.mkdir(parents=True, exist_ok=True)
    sentences = write(flags.out, Path(os.environ["LORA_DIST_DATA"]), flags.train, flags.dev)
    train_encoder(sentences, flags.out / "encoder", flags.steps)


if __name__ == "__main__":
    main()
