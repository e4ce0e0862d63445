"""Prompts -> text, with a base, an adapter or a merged model alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_dist.log import UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt; the texts without the prompts. Options as in transformers' `GenerationConfig`.

    Prompts are run one by one, so that none is changed by the padding of another.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = []
    for prompt in prompts:
        ids_1L = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        if ids_1L.shape[1] == 0:
            raise UserError("prompt: found an empty one for a tokenizer without a start token, expected some text")
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and ids_1L.shape[1] + max_new_tokens > limit:
            raise UserError(
                f"max_new_tokens: found {max_new_tokens} after a prompt of {ids_1L.shape[1]} tokens, expected at most "
                f"{max(0, limit - ids_1L.shape[1])}: the model's context is {limit}"
            )
        out_1L = model.generate(  # type: ignore[operator]
            input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=max_new_tokens, do_sample=do_sample,
            pad_token_id=pad, use_cache=True, **sampling,
        )  # fmt: skip
        texts.append(tokenizer.decode(out_1L[0, ids_1L.shape[1] :], skip_special_tokens=True))
    return texts
