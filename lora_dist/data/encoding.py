"""From a record to token ids and which of them are answers.

The text of an example is tokenised in one piece, and a token belongs to the answer if it covers a character of it: nothing is assumed
about where tokens end. Special tokens that the tokenizer puts around a text by itself are kept; what comes behind the answer is learnt
with it. In a chat every turn of the assistant is an answer, from behind what the template asks it with to the end of its turn.
Called by `examples.py`.

Letters for shapes: `L` tokens of one example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_dist.data.records import FIELDS, BadRecordError, Format, conversation, question_and_answer, require_characters, unpacked
from lora_dist.data.templates import PromptTemplate
from lora_dist.data.tokenise import special_ids, tokenizer_digest
from lora_dist.log import UserError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoder:
    """How records become examples: everything but the records that the result depends on."""

    kind: Format
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """tokens of an example; longer ones are cut at the end"""
    template: PromptTemplate | None
    """alpaca"""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos: int | None
    """put behind the answer unless it is there"""
    train_on_inputs: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """that are read"""
        return FIELDS[self.kind]

    def encode_batch(self, batch: Mapping[str, list]) -> dict[str, list]:
        """As the function of that name."""
        return encode_batch(batch, self)

    def key_parts(self) -> dict[str, Any]:
        """JSON values that decide what a record becomes."""
        chat = self.kind == "chat"
        return {
            "format": self.kind,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "max_length": self.max_length,
            "template": [self.template.prompt_input, self.template.prompt_no_input] if self.template is not None else None,
            "chat_template": [str(self.tokenizer.chat_template), str(self.tokenizer.special_tokens_map)] if chat else None,
            "special": [self.prefix, self.suffix, self.eos],
            "train_on_inputs": self.train_on_inputs,
        }

    def texts(self, record: Any) -> tuple[str, list[Span]]:
        """The text of an example and its answers, in characters.

        Raises:
            BadRecordError: what is wrong with the record.
        """
        if self.kind == "chat":
            text, spans = _rendered(self.tokenizer, *conversation(record))
            require_characters(text, "messages")  # of more than the contents: names, tools
            return text, spans
        question, given, answer = question_and_answer(record, self.kind)
        prompt = question if self.template is None else self.template.prompt(question, given)
        return prompt + answer, [(len(prompt), len(prompt) + len(answer))]

    def finish(self, ids: Sequence[int], offsets_L2: np.ndarray, spans: Sequence[Span]) -> Encoded:
        """Special tokens around, labels beside, and cut to length.

        Raises:
            BadRecordError: no room for a token of the answer.
        """
        answer = np.zeros(len(ids), dtype=bool)
        starts_L, ends_L = offsets_L2[:, 0], offsets_L2[:, 1]
        for start, end in spans:
            # A token of blanks only may cover no character: it stands at its own end.
            answer |= (ends_L > start) & ((starts_L < end) | ((starts_L == ends_L) & (ends_L <= end)))
        behind = list(self.suffix)
        if self.eos is not None and [*ids, *behind][-1:] != [self.eos]:
            behind.append(self.eos)
        ids_L = np.array([*self.prefix, *ids, *behind], dtype=np.int64)
        answer_L = np.concatenate([np.zeros(len(self.prefix), bool), answer, np.ones(len(behind), bool)])
        found, before = int(answer_L.sum()), len(ids_L)
        if not answer.any():
            raise BadRecordError("the answer makes no token")
        ids_L, answer_L = ids_L[: self.max_length], answer_L[: self.max_length].copy()
        answer_L[:1] = False  # the first token follows nothing: it cannot be predicted
        kept = int(answer_L.sum())
        if kept == 0:
            first = int(np.argmax(np.concatenate([np.zeros(len(self.prefix), bool), answer])))
            raise BadRecordError(f"the prompt has {first} tokens, expected fewer than data.block_size ({self.max_length})")
        labels_L = answer_L
        if self.train_on_inputs:
            labels_L = np.ones(len(ids_L), dtype=bool)
            labels_L[0] = False
        return Encoded(ids_L, labels_L, found - kept if before > self.max_length else 0, found, before > self.max_length)


@dataclass(frozen=True)
class Encoded:
    """One example."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    """bool: which tokens are labels; never the first"""
    lost: int
    """tokens of the answer that were cut off"""
    answer_tokens: int
    """before cutting"""
    truncated: bool


def make_encoder(
    kind: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    template: PromptTemplate | None,
    special_tokens: str,
    add_eos_token: bool,
    train_on_inputs: bool,
) -> Encoder:
    """Check that the tokenizer can do what is asked.

    Raises:
        UserError: it cannot.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    problems: list[str] = []
    prefix: list[int] = []
    suffix: list[int] = []
    if not getattr(tokenizer, "is_fast", False):
        problems.append(
            f"data.format: found {kind}, but the tokenizer of {name} ({type(tokenizer).__name__}) does not say which characters a "
            "token covers, expected one with a tokenizer.json, so that it is known where answers begin"
        )
    if kind == "chat":
        if tokenizer.chat_template is None:
            problems.append(
                f"data.format: found chat, but the tokenizer of {name} has no chat template, expected one (chat_template.jinja beside "
                "the tokenizer), a model tuned for chats, or records and data.format of alpaca or prompt_completion"
            )
        eos = None
        if special_tokens != "auto":
            problems.append(
                f"data.special_tokens: found {special_tokens} with data.format chat, expected auto: the chat template has them all"
            )
    else:
        prefix, suffix = special_ids(tokenizer, special_tokens)
        eos = tokenizer.eos_token_id if add_eos_token else None
        if add_eos_token and eos is None:
            problems.append(f"data.add_eos_token: found true, but the tokenizer of {name} has no eos token, expected false")
    if problems:
        raise UserError(problems)
    used = template if kind == "alpaca" else None
    return Encoder(kind, tokenizer, max_length, used, tuple(prefix), tuple(suffix), eos, train_on_inputs)


def encode_batch(batch: Mapping[str, list], encoder: Encoder) -> dict[str, list]:
    """For `datasets.map`: a row a record, in order; of bad ones the reason and no tokens."""
    rows: list[Encoded | str] = []
    texts: list[str] = []
    spans: list[list[Span]] = []
    for record in unpacked(batch):
        try:
            text, found = encoder.texts(record)
            texts.append(text)
            spans.append(found)
            rows.append("")
        except BadRecordError as error:
            rows.append(str(error))
    usable = [i for i, row in enumerate(rows) if not row]
    if texts:
        # verbose=False: what is longer than the model's context is cut here.
        encoded = encoder.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for number, i in enumerate(usable):
            offsets_L2 = np.array(encoded["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
            try:
                rows[i] = encoder.finish(encoded["input_ids"][number], offsets_L2, spans[number])
            except BadRecordError as error:
                rows[i] = str(error)
    good = [row if isinstance(row, Encoded) else None for row in rows]
    no_ids, no_labels = np.empty(0, np.int64), np.empty(0, np.uint8)
    return {
        "input_ids": [no_ids if row is None else row.ids_L for row in good],
        "labels": [no_labels if row is None else row.labels_L.astype(np.uint8) for row in good],
        "lost": [0 if row is None else row.lost for row in good],
        "answer_tokens": [0 if row is None else row.answer_tokens for row in good],
        "truncated": [row is not None and row.truncated for row in good],
        "bad": [row if isinstance(row, str) else None for row in rows],
    }


# --- chats ----------------------------------------------------------------------------------------------------------------


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[Span]]:
    """A chat as text, and the turns of the assistant in it."""
    template = tokenizer.get_chat_template(tools=tools)

    def render(count: int, *, asks: bool = False, marked: bool = False) -> tuple[str, list[Span]]:
        try:
            given = json.loads(json.dumps(messages[:count]))  # a copy: some templates change the messages they are given
            texts, spans = render_jinja_template(
                [given],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=asks,
                **tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates are programs of their own: jinja2's errors, and any other
            raise BadRecordError(f"the chat template does not take it ({' '.join(str(error).split())[:200]})") from error
        return texts[0], [(start, end) for start, end in (spans[0] if marked else ())]

    if _MARKER.search(template):
        return render(len(messages), marked=True)
    whole, _ = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(i, asks=True)[0] if i else ""
        until = whole if i + 1 == len(messages) else render(i + 1)[0]
        if not (whole.startswith(before) and whole.startswith(until) and len(before) < len(until)):
            raise BadRecordError(
                f"message {i}: the chat template renders it otherwise once others follow, so where it begins and ends cannot be told "
                "(expected a template with {% generation %}, or records of one answer)"
            )
        spans.append((len(before), _end_of_turn(whole, len(before), len(until), tokenizer)))
    return whole, spans


def _end_of_turn(text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Without the blanks behind a special token that ends the turn: nothing is generated behind it."""
    turn = text[start:end].rstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(
        tokenizer.all_special_tokens
    )
    return start + len(turn) if turn.endswith(tuple(special)) else end
