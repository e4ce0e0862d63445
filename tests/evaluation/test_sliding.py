"""Perplexity by sliding windows against few-line loops of transformers alone: the perplexity guide's, and Wanda's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.data.corpus import read_corpus, token_stream
from lora_dist.data.sources import TextSource
from lora_dist.evaluation.sliding import count_words, plan_windows, total, window_losses
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.tiny import tiny_model, tiny_windows

IDS_N = tiny_windows(1, 533)[0]


def ours(model, ids_N, *, processes=1, batch_size=4, context, stride=None, average="token", max_samples=None):
    windows = plan_windows(len(ids_N), context=context, stride=stride, average=average, max_samples=max_samples)
    worlds = [World(rank=rank, size=processes) for rank in range(processes)]
    shares = [window_losses(model, ids_N.numpy(), windows, batch_size=batch_size, world=world) for world in worlds]
    assert all(shares)
    return total(shares, windows, average)


@torch.no_grad()
def guide(model, ids_N, context, stride):
    """The loop of transformers' perplexity guide."""
    nll, tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids_N), stride):
        end = min(begin + context, len(ids_N))
        input_ids = ids_N[None, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, : -(end - previous)] = -100
        scored = int((target_ids[:, 1:] != -100).sum())
        if scored:
            nll += float(model(input_ids, labels=target_ids).loss.double()) * scored
        tokens, previous = tokens + scored, end
        if end == len(ids_N):
            break
    return nll / tokens, tokens


@torch.no_grad()
def wanda(model, ids_N, context):
    """Mean over whole windows of transformers' own loss."""
    windows = [ids_N[None, i * context : (i + 1) * context] for i in range(len(ids_N) // context)]
    return sum(float(model(ids, labels=ids).loss.double()) for ids in windows) / len(windows)


@pytest.mark.parametrize(("context", "stride"), [(32, None), (32, 16), (32, 5), (64, 64), (41, 41), (64, 1)])
def test_the_loss_is_that_of_the_perplexity_guide(context, stride):
    model = tiny_model()
    score = ours(model, IDS_N, context=context, stride=stride)
    loss, tokens = guide(model, IDS_N, context, stride or context)
    assert score.tokens == tokens
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_windows_average_is_wandas_and_leaves_out_the_tail():
    model = tiny_model()
    score = ours(model, IDS_N, context=32, average="window")
    assert score.windows == len(IDS_N) // 32 and score.scored_to == 512
    assert score.loss == pytest.approx(wanda(model, IDS_N, 32), rel=1e-6)
    assert ours(model, IDS_N, context=32).loss != pytest.approx(score.loss, rel=1e-6)
    assert ours(model, IDS_N, context=32, average="window", max_samples=3).loss == pytest.approx(
        wanda(model, IDS_N[:96], 32), rel=1e-6
    )


@pytest.mark.parametrize("stride", [None, 7])
def test_any_number_of_processes_gives_the_same_digits(stride):
    model = tiny_model()
    alone = ours(model, IDS_N, context=32, stride=stride)
    for processes in (2, 3):
        assert ours(model, IDS_N, context=32, stride=stride, processes=processes) == alone


def test_a_process_without_a_batch_takes_part_in_sharded_passes():
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    windows = plan_windows(96, context=32)  # 3 windows, one batch
    assert window_losses(model, IDS_N.numpy(), windows, batch_size=4, world=World(rank=1, size=2), sharded=True) == []
    assert len(passes) == 1


def test_every_token_but_the_first_is_scored_once():
    scored = [token for w in plan_windows(533, context=32, stride=11) for token in range(w.scored_from, w.end)]
    assert scored == list(range(1, 533))
    first_of_window = set(range(0, 533, 32))
    scored = [token for w in plan_windows(533, context=32) for token in range(w.scored_from, w.end)]
    assert scored == [token for token in range(533) if token not in first_of_window]
    assert [w.end for w in plan_windows(65, context=32)] == [32, 64]  # a last window of one token scores nothing


def test_too_short_a_text_is_refused():
    with pytest.raises(UserError, match="block_size: found a text of 31 tokens, expected 32 or more"):
        plan_windows(31, context=32, average="window")
    with pytest.raises(UserError, match="found a text of 1 tokens, expected 2"):
        plan_windows(1, context=32)


def test_words_are_counted_as_lm_eval_does():
    from lm_eval.api.task import Task

    for text in ("one two", " one\n\ntwo  three\t", "", "a\u00a0b"):
        assert count_words(text) == Task.count_words(text)


def test_stories260k_on_wikitext2(data_dir):
    """Real model, real text, the joining of the published tables: equal to a loop that shares no code."""
    folder = data_dir / "stories260K"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    corpus = read_corpus("wikitext2", TextSource(str(data_dir / "wikitext-2" / "test.txt")))
    lines = (data_dir / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert corpus.text == "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    part = corpus.text[:6000]
    ids_N = torch.tensor(tokenizer(part)["input_ids"])
    np.testing.assert_array_equal(token_stream(part, tokenizer).ids_N, ids_N.numpy())
    for stride in (None, 200):
        score = ours(model, ids_N, context=256, stride=stride)
        assert score.loss == pytest.approx(guide(model, ids_N, 256, stride or 256)[0], rel=1e-6)
    assert ours(model, ids_N, context=256, average="window").loss == pytest.approx(wanda(model, ids_N, 256), rel=1e-6)
