"""Prompts -> text, with and without an adapter, against transformers' own greedy decoding; contexts that are too short."""

from __future__ import annotations

import pytest
import torch

from lora_dist.generation import generate
from lora_dist.log import UserError
from tests.tiny import CONTEXT, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_text_equals_step_by_step_argmax(kind):
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer))
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(10):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, tokenizer, ["The river", "The river"], max_new_tokens=10) == [expected, expected]


def test_sampling_follows_its_seed():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    texts = [generate(model, tokenizer, ["a"], max_new_tokens=20, do_sample=True, temperature=2.0, seed=s)[0] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_more_tokens_than_the_context_holds_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        UserError, match=f"max_new_tokens: found {CONTEXT} after a prompt of 5 tokens, expected at most {CONTEXT - 5}"
    ):
        generate(tiny_model("gpt2", vocab_size=len(tokenizer)), tokenizer, ["abcde"], max_new_tokens=CONTEXT)
    with pytest.raises(UserError, match="prompt: found an empty one"):
        generate(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, [""], max_new_tokens=2)
