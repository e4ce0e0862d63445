"""Prompts -> text against step-by-step argmax and transformers' own results: batches, streams, every sampling option, contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lora_dist.arguments import SamplingArgs
from lora_dist.generation import end_tokens, generate, pad_left
from lora_dist.log import UserError
from tests.tiny import CONTEXT, KINDS, tiny_model, tiny_tokenizer

PROMPTS = ["The river", "a", "Old bridges and then slowly", "x y z", "home"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer))


def texts(model, tokenizer, prompts, sampling, **options):
    return [answer.text for answer in generate(model, tokenizer, prompts, sampling, **options)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_text_equals_step_by_step_argmax(kind, tokenizer):
    model = tiny_model(kind, vocab_size=len(tokenizer))
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(10):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    answers = generate(model, tokenizer, ["The river", "The river"], SamplingArgs(max_new_tokens=10))
    assert [a.text for a in answers] == [expected, expected] and answers[1].tokens == ids.shape[1] - start
    assert texts(model, tokenizer, ["The river"], SamplingArgs(max_new_tokens=10, use_cache=False)) == [expected]


def metaspace_tokenizer():
    """As sentencepiece's are read: a word begins with its space, which decoding drops at the start of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", "</s>", *(f"\u2581{word}" for word in ("the", "river", "runs", "old", "bridges", "é", "stay")), "s", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_prompt_and_text_together_are_the_whole_also_where_words_begin_with_their_space():
    tokenizer = metaspace_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    for prompt in ("the", "the river", "old bridges stay"):
        pieces: list[str] = []
        sampling = SamplingArgs(max_new_tokens=7, do_sample=True, seed=len(prompt))
        (answer,) = generate(model, tokenizer, [prompt], sampling, on_text=pieces.append)
        torch.manual_seed(sampling.seed)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=7, do_sample=True, pad_token_id=1, eos_token_id=end_tokens(model, tokenizer))
        expected = tokenizer.decode(whole[0], skip_special_tokens=True)
        assert prompt + answer.text == expected and "".join(pieces) == answer.text
        alone = texts(model, tokenizer, [prompt], sampling, continued=False)
        assert alone == [answer.text.removeprefix(" ")]
    assert any(" " in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unlike_prompts_equals_one_by_one(kind, tokenizer):
    model = tiny_model(kind, vocab_size=len(tokenizer))
    for sampling in (SamplingArgs(max_new_tokens=12), SamplingArgs(max_new_tokens=8, num_beams=3, num_return_sequences=2)):
        alone = generate(model, tokenizer, PROMPTS, sampling)
        assert generate(model, tokenizer, PROMPTS, sampling, batch_size=4) == alone
        assert [(a.prompt, a.sequence) for a in alone] == [(p, s) for p in range(5) for s in range(sampling.num_return_sequences)]
    assert len({a.text for a in alone}) > 3


def test_rows_that_end_early_are_cut_at_their_end(tokenizer):
    """A third of all tokens end a text, so that rows of a batch end at different places."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(4, 99, 3))
    sampling = SamplingArgs(max_new_tokens=30)
    alone, batch = (generate(model, tokenizer, PROMPTS, sampling, batch_size=n) for n in (1, 5))
    assert alone == batch and len({a.tokens for a in alone}) > 2 and min(a.tokens for a in alone) < 30
    longer = generate(model, tokenizer, PROMPTS, replace(sampling, min_new_tokens=25), batch_size=5)
    assert all(a.tokens >= 25 for a in longer)


def test_all_ends_of_the_model_and_the_tokenizers_own_count(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(model, tokenizer) == [2, 5, 7]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [2]


def test_draws_follow_their_seed_and_not_the_other_processes(llama, tokenizer):
    sampling = SamplingArgs(max_new_tokens=20, do_sample=True, temperature=2.0)
    first, again, other = (texts(llama, tokenizer, ["a"], replace(sampling, seed=s))[0] for s in (1, 1, 2))
    assert first == again != other
    whole = generate(llama, tokenizer, PROMPTS, sampling, batch_size=2)
    shared = [generate(llama, tokenizer, PROMPTS, sampling, batch_size=2, share=(rank, 2)) for rank in (0, 1)]
    assert sorted(shared[0] + shared[1], key=lambda a: a.prompt) == whole and shared[0] and shared[1]
    several = texts(llama, tokenizer, ["a"], replace(sampling, num_return_sequences=3))
    assert len(set(several)) == 3


OPTIONS = [
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "top_p": 0.2},
    {"do_sample": True, "top_k": 2},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "min_p": 0.6},
    {"do_sample": True, "typical_p": 0.2},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4},
    {"stop_strings": ["e"]},
    {"min_new_tokens": 24},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: list(o)[-1])
def test_every_option_does_what_transformers_does_with_it(options, llama, tokenizer):
    """The same call of transformers as reference, and another text than without the option."""
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    torch.manual_seed(3)
    plain = {
        "max_new_tokens": 24,
        "top_k": 50,
        "do_sample": False,
        "tokenizer": tokenizer,
        "pad_token_id": 2,
        "eos_token_id": [2],
    }
    out = llama.generate(ids, attention_mask=torch.ones_like(ids), **{**plain, **options})
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts(llama, tokenizer, ["The river"], SamplingArgs(max_new_tokens=24, seed=3, **options)) == [expected]


@pytest.mark.parametrize("sampling", [SamplingArgs(max_new_tokens=2), SamplingArgs(max_new_tokens=2, do_sample=True, top_p=0.9)])
def test_transformers_has_nothing_to_object(sampling, llama, tokenizer, caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()  # it tells things once
    generate(llama, tokenizer, ["a", "abc"], sampling, batch_size=2)
    assert not caplog.records


def test_a_generation_config_beside_the_model_does_not_decide_unseen(llama, tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3)
    sampling = SamplingArgs(max_new_tokens=12)
    assert texts(model, tokenizer, PROMPTS, sampling) == texts(llama, tokenizer, PROMPTS, sampling)


def test_the_pieces_of_a_stream_are_the_text(llama, tokenizer):
    pieces: list[str] = []
    text = texts(llama, tokenizer, ["The river"], SamplingArgs(max_new_tokens=24), on_text=pieces.append)[0]
    assert "".join(pieces) == text and len(pieces) > 10


@pytest.mark.parametrize("continued", [True, False])
def test_a_stream_hands_on_whole_characters_only(continued):
    """A tokenizer of bytes: one character takes up to four tokens, and none is shown broken."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from lora_dist.generation import _Pieces

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text, pieces = " Ünï 石\nстена 🪨 end", []
    streamer = _Pieces(tokenizer, pieces.append, continued)
    streamer.put(torch.tensor([tokenizer("стен")["input_ids"]]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == list(text if continued else text[1:])  # an answer by itself begins with no space


def test_special_tokens_behind_a_prompt_are_not_continued(llama, tokenizer):
    from tokenizers import processors

    closing = tiny_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert closing("a")["input_ids"][-1] == 2
    expected = texts(llama, tokenizer, ["<s>a"], SamplingArgs(max_new_tokens=8), special_tokens=False)
    assert texts(llama, closing, ["a"], SamplingArgs(max_new_tokens=8)) == expected
    assert texts(llama, closing, ["<s>a"], SamplingArgs(max_new_tokens=8), special_tokens=False) == expected


def test_padding_is_on_the_left_and_masked():
    ids_BL, mask_BL = pad_left([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert ids_BL.tolist() == [[5, 6, 7], [0, 0, 8]] and mask_BL.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_more_tokens_than_the_context_holds_are_refused(llama, tokenizer):
    gpt2 = tiny_model("gpt2", vocab_size=len(tokenizer))
    with pytest.raises(
        UserError, match=f"max_new_tokens: found {CONTEXT} after a prompt of 5 tokens, expected at most {CONTEXT - 5}"
    ):
        generate(gpt2, tokenizer, ["abcde"], SamplingArgs(max_new_tokens=CONTEXT))
    with pytest.raises(UserError, match="prompt: found an empty one"):
        generate(llama, tokenizer, [""], SamplingArgs(max_new_tokens=2))
    with pytest.raises(UserError) as caught:
        generate(llama, tokenizer, ["ab", "x" * 60, "", *["y" * 63] * 5], SamplingArgs(max_new_tokens=10))
    assert len(caught.value.problems) == 6 and "prompt 2 of 60 tokens, expected at most 4" in caught.value.problems[0]
    assert caught.value.problems[1].startswith("prompt 3: found an empty one") and caught.value.problems[-1] == "and 2 more"


@pytest.mark.parametrize(
    "values,problem",
    [
        ({"temperature": 0.5}, "temperature: found 0.5 without do_sample"),
        ({"top_k": 3}, "top_k: found 3 without do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
        ({"num_return_sequences": 2}, "num_return_sequences: found 2 with 1 beams"),
        ({"min_new_tokens": 65}, "min_new_tokens: found 65, expected at most max_new_tokens"),
        ({"do_sample": True, "min_p": 1.5}, "min_p: found 1.5"),
        ({"num_beams": 0}, "num_beams: found 0, expected 1 or more"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(values, problem):
    (line,) = SamplingArgs(**values).problems()
    assert line.startswith(problem)
