"""Examples: which tokens are labels, truncation, chats against transformers' own mask, the cache, and what is said of bad records."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dist.data.encoding import encode_batch, make_encoder
from lora_dist.data.examples import Examples, ExampleSplits, format_of, load_examples
from lora_dist.data.sources import TextSource
from lora_dist.data.templates import load_template
from lora_dist.log import UserError
from tests.data.conftest import build_tokenizer

ALPACA = load_template("alpaca_short")
RECORDS = [
    {"instruction": "Name a lake.", "input": "", "output": "the lake was cold"},
    {"instruction": "Переведи 🙂", "input": "río, 河", "output": "  δύο 🙂🙃 ships\nto sea"},
    {"instruction": "Count", "output": "2"},
]
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{{ m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '</s>' + '\n' }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Where is the lake?"},
    {"role": "assistant", "content": "under stones 🙂 "},
    {"role": "user", "content": "and the sea?"},
    {"role": "assistant", "content": "of salt"},
]


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., ExampleSplits]:
    def load(records: list, kind: str = "alpaca", **changes) -> ExampleSplits:
        (tmp_path / "records.json").write_text(json.dumps(records))
        keep = {key: changes.pop(key) for key in ("max_bad_share", "num_proc") if key in changes}
        options = {
            "max_length": 256,
            "template": ALPACA,
            "special_tokens": "auto",
            "add_eos_token": True,
            "train_on_inputs": False,
        }
        encoder = make_encoder(kind, changes.pop("tokenizer", tokenizer), **{**options, **changes})
        source = TextSource(str(tmp_path / "records.json"))
        return load_examples(source, encoder, **{"max_bad_share": 0.1, **keep}, cache_dir=tmp_path / "cache")

    return load


def answers(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(ids[labels != -100]) for ids, labels in (examples[i] for i in range(len(examples)))]


@pytest.mark.parametrize("adds", ["", "bos", "both"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_labels_are_the_answer_and_the_end(load: Callable[..., ExampleSplits], adds: str, num_proc: int):
    tokenizer = build_tokenizer(adds=adds)
    examples = load(RECORDS, tokenizer=tokenizer, num_proc=num_proc).splits["train"]
    assert answers(examples, tokenizer) == [record["output"] + "</s>" for record in RECORDS]
    for i, record in enumerate(RECORDS):
        text = ALPACA.prompt(record["instruction"], record.get("input")) + record["output"]
        whole = tokenizer(text)["input_ids"]  # with what the tokenizer adds by itself
        assert examples[i][0].tolist() == (whole if adds == "both" else [*whole, tokenizer.eos_token_id])


def test_without_an_end_and_with_the_prompt(load: Callable[..., ExampleSplits], tokenizer: PreTrainedTokenizerBase):
    examples = load(RECORDS, add_eos_token=False).splits["train"]
    assert answers(examples, tokenizer) == [record["output"] for record in RECORDS]
    examples = load(RECORDS, train_on_inputs=True).splits["train"]
    for i in range(3):
        ids, labels = examples[i]
        assert labels[0] == -100 and torch.equal(ids[1:], labels[1:])
    pairs = load([{"prompt": "", "completion": "the sea"}], "prompt_completion").splits["train"]
    ids, labels = pairs[0]
    assert tokenizer.decode(ids) == "the sea</s>" and torch.equal(ids[1:], labels[1:]) and labels[0] == -100


def test_a_token_over_the_boundary_belongs_to_the_answer(load: Callable[..., ExampleSplits], tokenizer: PreTrainedTokenizerBase):
    """Prompt and answer are tokenised in one piece: ` lake` is one token though the prompt ends in its blank."""
    pair = {"prompt": "the ", "completion": "lake was"}
    ids, labels = load([pair], "prompt_completion", add_eos_token=False).splits["train"][0]
    assert ids.tolist() == tokenizer("the lake was")["input_ids"]
    assert tokenizer.decode(labels[labels != -100]) == " lake was"


def test_truncation_is_counted_and_takes_the_end_away(load: Callable[..., ExampleSplits], tokenizer: PreTrainedTokenizerBase):
    records = [{"instruction": "Go", "output": " ".join(["stones"] * 60)}, RECORDS[0]]
    whole = load(records).splits["train"].lengths
    loaded = load(records, max_length=50)
    examples, report = loaded.splits["train"], loaded.reports["train"]
    assert examples.lengths.tolist() == [50, whole[1]]
    assert (report.truncated, report.bad) == (1, 0)
    assert int(examples[0][1][-1]) == tokenizer(" stones")["input_ids"][-1]  # and not the end-of-sequence token
    prompt = len(tokenizer(ALPACA.prompt("Go"))["input_ids"])
    assert report.lost_share == pytest.approx((whole[0] - 50) / (whole[0] - prompt))
    just = load(records[:1], max_length=int(whole[0])).reports["train"]
    assert (just.truncated, just.lost_share) == (0, 0)


def test_bad_records_are_counted_and_named(load: Callable[..., ExampleSplits]):
    records = [*RECORDS * 4, {"instruction": "x"}, {"instruction": "long " * 300, "output": "a"}, "text", *RECORDS]
    loaded = load(records, max_bad_share=0.17)
    report = loaded.reports["train"]
    assert (len(loaded.splits["train"]), report.records, report.bad) == (15, 18, 3)
    assert [number for number, _ in report.named] == [13, 14, 15]
    assert report.named[0][1] == "output: missing"
    assert report.named[1][1].startswith("the prompt has ") and "expected fewer than data.block_size (256)" in report.named[1][1]
    again = load(records, max_bad_share=0.17)
    assert again.from_cache and again.reports == loaded.reports
    with pytest.raises(
        UserError, match=r"found 3 bad records of 18 in the train split \(record 13: output: missing; .*max_bad_share"
    ):
        load(records)
    with pytest.raises(UserError, match=r"found 1 bad records of 1"):
        load(["text"], max_bad_share=0.99)


def test_records_that_are_all_bad_or_not_there(
    load: Callable[..., ExampleSplits], write_text: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(UserError, match=r"found 2 bad records of 2 .*expected 10% at most \(data.max_bad_share\)"):
        load([{"instruction": "a", "output": ["b"]}] * 2)
    source = TextSource(str(write_text("empty.jsonl", "")))
    with pytest.raises(UserError, match=r"empty.jsonl is empty, expected records"):
        format_of(source, tmp_path)


def test_a_prompt_leaves_room_for_one_token_of_the_answer(load: Callable[..., ExampleSplits], tokenizer: PreTrainedTokenizerBase):
    prompt = len(tokenizer(ALPACA.prompt("Name a lake."))["input_ids"])
    assert load(RECORDS[:1], max_length=prompt + 1).splits["train"].lengths.tolist() == [prompt + 1]
    with pytest.raises(UserError, match=f"the prompt has {prompt} tokens, expected fewer than data.block_size"):
        load(RECORDS[:1], max_length=prompt, train_on_inputs=True)


@pytest.mark.parametrize("name", ["stories260K", "wikitext2-llama"])
def test_real_tokenizers(load: Callable[..., ExampleSplits], real_data: Path, name: str):
    """Byte-level BPE, and Llama's with bytes for what it does not know: every character of an answer is learnt, none of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / name)
    examples = load(RECORDS, tokenizer=tokenizer).splits["train"]
    for i, record in enumerate(RECORDS):
        ids, labels = examples[i]
        text = ALPACA.prompt(record["instruction"], record.get("input")) + record["output"]
        assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        first = int((labels != -100).int().argmax())
        assert tokenizer.decode(ids[first:-1]).strip() == record["output"].strip()
        assert tokenizer.decode(ids[:first], skip_special_tokens=True).strip().endswith("### Response:")
        assert torch.equal(ids[first:], labels[first:])


# Chats


def chat_tokenizer(template: str) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_all_turns_of_the_assistant_are_learnt_to_their_ends(load: Callable[..., ExampleSplits]):
    tokenizer = chat_tokenizer(CHATML)
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    examples = load([{"messages": CHAT}, {"conversations": sharegpt}], "chat", tokenizer=tokenizer).splits["train"]
    assert answers(examples, tokenizer) == ["under stones 🙂 </s>of salt</s>"] * 2
    assert examples[0][0].tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_marked_templates_agree_with_transformers(load: Callable[..., ExampleSplits]):
    tokenizer = chat_tokenizer(MARKED)
    examples = load([{"messages": CHAT}], "chat", tokenizer=tokenizer).splits["train"]
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = examples[0]
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != -100).int().tolist() == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) > 10


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does(load: Callable[..., ExampleSplits]):
    tokenizer = chat_tokenizer(FORGETS)
    with pytest.raises(UserError, match="message 1: the chat template renders it otherwise once others follow"):
        load([{"messages": CHAT}], "chat", tokenizer=tokenizer)
    examples = load([{"messages": CHAT[:2]}], "chat", tokenizer=tokenizer).splits["train"]
    assert answers(examples, tokenizer) == ["<think></think>under stones 🙂 </s>"]


def test_tokenizers_that_cannot(load: Callable[..., ExampleSplits], tokenizer: PreTrainedTokenizerBase, monkeypatch):
    with pytest.raises(UserError, match=r"data\.format: found chat, but the tokenizer of .* has no chat template"):
        load([{"messages": CHAT}], "chat")
    with pytest.raises(UserError, match=r"data\.special_tokens: found bos with data\.format chat, expected auto"):
        load([{"messages": CHAT}], "chat", tokenizer=chat_tokenizer(CHATML), special_tokens="bos")
    with pytest.raises(UserError, match=r"data\.add_eos_token: found true"):
        load(RECORDS, tokenizer=build_tokenizer(eos=False))
    slow = build_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(UserError, match="does not say which characters a token covers"):
        load(RECORDS, tokenizer=slow)


def test_a_message_that_the_template_refuses_is_a_bad_record():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    options = {"max_length": 64, "template": None, "special_tokens": "auto", "add_eos_token": True, "train_on_inputs": False}
    row = encode_batch({"messages": [CHAT]}, make_encoder("chat", tokenizer, **options))
    assert row["bad"] == ["the chat template does not take it (roles must alternate)"]


# Reading


def test_batches_are_filled_up_on_the_right(load: Callable[..., ExampleSplits]):
    examples = load(RECORDS).splits["train"]
    batch = examples.batch([2, -1, 0])
    ids, labels = examples[2]
    assert batch.input_ids_BL.shape == (3, max(len(ids), len(examples[0][0])))
    assert batch.input_ids_BL[0, : len(ids)].tolist() == ids.tolist() and not batch.input_ids_BL[0, len(ids) :].any()
    assert batch.labels_BL[0].tolist() == labels.tolist() + [-100] * (batch.labels_BL.shape[1] - len(ids))
    assert not batch.input_ids_BL[1].any() and (batch.labels_BL[1] == -100).all()
    assert batch.tokens == len(ids) + len(examples[0][0]) and batch.position_ids_BL is None
    assert examples.batch([-1]).input_ids_BL.shape == (1, 2)


def test_subsets_pickles_and_digests(load: Callable[..., ExampleSplits]):
    examples = load(RECORDS).splits["train"]
    part = examples.subset(np.array([2, 0])).subset(np.array([1]))
    assert torch.equal(part[0][0], examples[0][0]) and len(part) == 1
    assert part.digest == examples.take(1).digest != examples.digest
    again = pickle.loads(pickle.dumps(examples.subset(np.array([1]))))
    assert torch.equal(again[0][1], examples[1][1])
    assert examples.by_length().lengths.tolist() == sorted(examples.lengths.tolist(), reverse=True)
    assert load(RECORDS, train_on_inputs=True).splits["train"].digest != examples.digest  # labels count


def test_a_damaged_entry_is_rebuilt(load: Callable[..., ExampleSplits], tmp_path: Path):
    digest = load(RECORDS).splits["train"].digest
    (file,) = (tmp_path / "cache").glob("*/labels.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = load(RECORDS)
    assert not again.from_cache and again.splits["train"].digest == digest


def test_half_a_character_anywhere_in_a_chat_is_a_bad_record(load: Callable[..., ExampleSplits]):
    named = CHATML.replace("m['role'] +", "m['role'] + (m['name'] or '') +")
    bad = [{"role": "user", "content": "hi", "name": "\ud800"}, CHAT[1]]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = named
    records = [{"messages": CHAT}] * 20 + [{"messages": bad}, {"messages": [{"role": ["user"], "content": "hi"}, CHAT[1]]}]
    report = load(records, "chat", template=None, tokenizer=tokenizer).reports["train"]
    assert [number for number, _ in report.named] == [21, 22] and "half of a character" in report.named[0][1]


def test_the_format_is_seen_in_files(tmp_path: Path, write_text: Callable[..., Path]):
    source = TextSource(str(write_text("a.jsonl", json.dumps({"prompt": "a", "completion": "b"}))))
    assert format_of(source, tmp_path) == "prompt_completion"
    with pytest.raises(UserError, match=r"data\.format: .* has the columns body, expected instruction and output"):
        format_of(TextSource(str(write_text("b.csv", "body\nx\n"))), tmp_path)
