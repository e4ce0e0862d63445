"""Prompts -> text, with a base, an adapter or a merged model alike: greedy, sampled or with beams, in batches or as a stream.

`generate` is called by `engine/answer.py`. Shape letters: B prompts (times texts a prompt), L tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lora_dist.arguments import SamplingArgs
from lora_dist.log import UserError

MAX_NAMED = 5
"""prompts that a message names"""
_WINDOW = 32  # tokens of a prompt that decide how the next one is decoded, and many more


@dataclass(frozen=True)
class Answer:
    """One text that was made."""

    prompt: int
    """index of its prompt"""
    sequence: int
    """which of the prompt's texts, from 0"""
    text: str
    """without the prompt"""
    tokens: int
    """generated, the one that ends the text included"""


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt that is to be continued: with the tokens the tokenizer puts before a text, without those it puts behind.

    Args:
        special_tokens: off for a text that contains them already, as chat templates do.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    bare: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    behind = len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id and ids[-1:] != bare[-1:]
    return ids[:-1] if behind else ids


def context_of(model: Any) -> int | None:
    """Tokens that the model was made for, where its configuration says so."""
    return getattr(model.config, "max_position_embeddings", None)


def room_problems(prompts: Sequence[Sequence[int]], limit: int | None, max_new_tokens: int) -> Iterator[str]:
    """What keeps prompts (token ids) from being continued, one line each: empty, or too long for the context."""
    for number, ids in enumerate(prompts, start=1):
        which = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if not ids:
            yield f"{which}: found an empty one for a tokenizer without a start token, expected some text"
        elif limit is not None and len(ids) + max_new_tokens > limit:
            yield (
                f"max_new_tokens: found {max_new_tokens} after a {which} of {len(ids)} tokens, expected at most "
                f"{max(0, limit - len(ids))}: the model's context is {limit}"
            )


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: SamplingArgs | None = None,
    *,
    batch_size: int = 1,
    special_tokens: bool = True,
    continued: bool = True,
    share: tuple[int, int] = (0, 1),
    on_text: Callable[[str], object] | None = None,
    on_batch: Callable[[], object] | None = None,
) -> list[Answer]:
    """Continue each prompt; the texts in the order of the prompts.

    Prompts of like length make a batch, padded on the left and masked there, so that a prompt's likeliest text does not depend on its
    neighbours. Draws do: each batch starts from the seed and its number, whatever was computed before or on which process.

    Args:
        special_tokens: see `encode`.
        continued: the texts go on where their prompts end, so that prompt and text together are the whole; off for answers that stand
            for themselves, which begin without a space.
        share: (k, n): compute only every n-th batch, from the k-th on; together n processes give what one gives.
        on_text: given each new piece of the text of a single prompt, whole characters; not with several beams or texts.
        on_batch: called after each batch.

    Raises:
        UserError: prompts that are empty or do not fit the context, before anything is computed.
    """
    sampling = sampling or SamplingArgs()
    encoded = [encode(tokenizer, prompt, special_tokens=special_tokens) for prompt in prompts]
    problems = list(room_problems(encoded, context_of(model), sampling.max_new_tokens))
    if problems:
        more = [f"and {len(problems) - MAX_NAMED} more"] if len(problems) > MAX_NAMED else []
        raise UserError(problems[:MAX_NAMED] + more)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: list[Answer] = []
    for number in range(share[0], -(-len(order) // batch_size), share[1]):
        members = order[number * batch_size : (number + 1) * batch_size]
        torch.manual_seed((sampling.seed + number) % 2**63)
        answers += _batch(model, tokenizer, {i: encoded[i] for i in members}, sampling, on_text, continued)
        if on_batch is not None:
            on_batch()
    return sorted(answers, key=lambda answer: (answer.prompt, answer.sequence))


def _batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[int, list[int]],
    sampling: SamplingArgs,
    on_text: Callable[[str], object] | None,
    continued: bool,
) -> Iterator[Answer]:
    """Continue some prompts, by index, at once."""
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    ids_BL, mask_BL = pad_left(list(prompts.values()), pad, next(model.parameters()).device)
    streamer = None if on_text is None else _Pieces(tokenizer, on_text, continued)
    out_BL = model.generate(
        input_ids=ids_BL, attention_mask=mask_BL, pad_token_id=pad, eos_token_id=ends or None, streamer=streamer,
        **_options(sampling, tokenizer),
    )  # fmt: skip
    for row, new_L in enumerate(out_BL[:, ids_BL.shape[1] :].tolist()):  # waits for the device
        length = next((i + 1 for i, token in enumerate(new_L) if token in ends), len(new_L))
        which, sequence = divmod(row, sampling.num_return_sequences)
        index = list(prompts)[which]
        text = _text_behind(tokenizer, prompts[index] if continued else [], new_L[:length])
        yield Answer(index, sequence, text, length)


def _text_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens behind a prompt's; without a prompt, the text that they are by themselves, which begins with no space.

    Decoded alone, the tokens of sentencepiece's kind lose the space that they begin with, and those of byte-level BPE keep it.
    """
    if not prompt:
        alone: str = tokenizer.decode(new, skip_special_tokens=True)
        return alone.removeprefix(" ")
    before = list(prompt[-_WINDOW:])
    start: str = tokenizer.decode(before, skip_special_tokens=True)
    both: str = tokenizer.decode([*before, *new], skip_special_tokens=True)
    if both.startswith(start):
        return both[len(start) :]
    return both[len(start.rstrip()) :]  # some tokenizers clean up a blank before a full stop


def _options(sampling: SamplingArgs, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For transformers' `generate`. All are given, so that a generation_config.json beside the model does not decide unseen."""
    options = {name: value for name, value in vars(sampling).items() if name in SamplingArgs.__dataclass_fields__}
    del options["seed"]
    stops = options.pop("stop_strings")
    if not sampling.do_sample:
        del options["min_p"]  # transformers warns of any value, its own default being none
    return options | ({"stop_strings": stops, "tokenizer": tokenizer} if stops else {})


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: those of the model's generation configuration (some have several), and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, L), int64."""
    length = max(map(len, rows))
    ids_BL = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BL, mask_BL


class _Pieces(BaseStreamer):
    """Hands on what each token adds to the text, so that the pieces together are the text that decoding all tokens gives.

    transformers' own `TextStreamer` decodes lines apart, which loses a space where a tokenizer drops it at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object], continued: bool):
        self._tokenizer, self._on_text, self._continued = tokenizer, on_text, continued
        self._prompt: list[int] = []
        self._tokens: list[int] = []
        self._shown = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token at a time. Waits for the device."""
        if self._prompt_seen:
            self._tokens += value.flatten().tolist()
            self._hand_on(self._text().rstrip("\ufffd"))  # the rest of the character is still to come
        elif self._continued:
            self._prompt = value.flatten().tolist()[-_WINDOW:]
        self._prompt_seen = True

    def end(self) -> None:
        self._hand_on(self._text())

    def _text(self) -> str:
        return _text_behind(self._tokenizer, self._prompt, self._tokens)

    def _hand_on(self, text: str) -> None:
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
