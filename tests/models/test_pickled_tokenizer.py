"""Tokenizers out of pickles: the same tokens and settings from what today's and older versions kept, and nothing read from a path."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lora_dist.log import UserError
from lora_dist.models.legacy import Inert, read_inert
from lora_dist.models.pickled_tokenizer import SAMPLE, rebuild_tokenizer
from tests.tiny import tiny_tokenizer

HERE = Path("model.bin")


def inert(path: str, state: Any) -> Inert:
    made = type(path.rpartition(".")[2], (Inert,), {"path": path, "__slots__": ()})()
    made.state = state
    return made


def test_a_fast_one_of_today(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<unk>"
    torch.save({"tokenizer": tokenizer}, tmp_path / "t.bin")
    rebuilt = rebuild_tokenizer(read_inert(tmp_path / "t.bin")["tokenizer"], HERE)
    assert type(rebuilt) is PreTrainedTokenizerFast and len(rebuilt) == len(tokenizer)
    assert rebuilt(SAMPLE).input_ids == tokenizer(SAMPLE).input_ids
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "padding_side", "chat_template"):
        assert getattr(rebuilt, name) == getattr(tokenizer, name), name


def test_a_fast_one_of_version_4() -> None:
    """Special tokens in attributes of their own, as AddedToken."""
    json_bytes = tiny_tokenizer()._tokenizer.to_str().encode()
    state = {
        "_tokenizer": inert("tokenizers.Tokenizer", json_bytes),
        "_bos_token": inert("tokenizers.AddedToken", {"content": "<s>", "lstrip": False}),
        "_eos_token": "</s>",
        "_additional_special_tokens": [inert("tokenizers.AddedToken", {"content": "!"})],
        "init_kwargs": {"name_or_path": "/etc", "model_max_length": 33, "tokenizer_file": "/etc/passwd"},
        "vocab_file": "/etc/passwd",
    }
    rebuilt = rebuild_tokenizer(inert("transformers.models.llama.tokenization_llama_fast.LlamaTokenizerFast", state), HERE)
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id, rebuilt.model_max_length) == (1, 2, 33)
    assert "!" in rebuilt.all_special_tokens
    assert rebuilt(SAMPLE).input_ids == tiny_tokenizer()(SAMPLE).input_ids
    assert "passwd" not in str(rebuilt.init_kwargs)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "holds Thing as tokenizer"),
        ({"vocab_file": "/etc/passwd"}, "without a vocabulary of its own"),
        ({"_tokenizer": inert("tokenizers.Tokenizer", b"{}")}, "cannot be rebuilt"),
        (
            {"sp_model_proto": b"no model"},
            "cannot be rebuilt" if find_spec("sentencepiece") else "needs the sentencepiece package",
        ),
    ],
)
def test_what_cannot_be_rebuilt_says_how_to_go_on(state: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"{reason}.*--tokenizer DIR"):
        rebuild_tokenizer(inert("a.Thing", state), HERE)
    with pytest.raises(UserError, match="holds no tokenizer"):
        rebuild_tokenizer(None, HERE)


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="sentencepiece is not installed")
def test_a_slow_one_from_its_sentencepiece_model(tmp_path: Path, tiny_text: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(tiny_text), model_prefix=str(tmp_path / "m"), vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False,
    )  # fmt: skip
    model = (tmp_path / "m.model").read_bytes()
    state = {"sp_model": None, "sp_model_proto": model, "add_bos_token": True, "_bos_token": "<s>", "vocab_file": "/nowhere"}
    rebuilt = rebuild_tokenizer(inert("transformers.models.llama.tokenization_llama.LlamaTokenizer", state), HERE)
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode("the old bridge sings 7")
    assert rebuilt("the old bridge sings 7").input_ids == [1, *expected]
