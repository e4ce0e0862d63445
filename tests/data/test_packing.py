"""Packed rows and steps of similar lengths: every example once, little padding, the same from (seed, epoch) and any cursor."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lora_dist.data.encoding import make_encoder
from lora_dist.data.examples import Examples, load_examples
from lora_dist.data.loader import StepBatch, StepLoader
from lora_dist.data.packing import PackedExamples, best_fit
from lora_dist.data.sampler import grouped_order
from lora_dist.data.sources import TextSource

LENGTHS = np.random.default_rng(0).integers(3, 60, 500)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """23 pairs of 5 to 60 tokens."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(1)
    pairs = [{"prompt": f"{i} the", "completion": " lake" * int(rng.integers(2, 50))} for i in range(23)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    options = {"max_length": 60, "template": None, "special_tokens": "auto", "add_eos_token": True, "train_on_inputs": False}
    encoder = make_encoder("prompt_completion", tokenizer, **options)
    return load_examples(TextSource(str(folder / "pairs.json")), encoder, max_bad_share=0, cache_dir=folder / "c").splits["train"]


def test_best_fit_puts_every_example_into_one_row():
    members, starts = best_fit(LENGTHS, 100, 3)
    assert sorted(members.tolist()) == list(range(500))
    sums = np.add.reduceat(LENGTHS[members], starts[:-1])
    assert sums.max() <= 100
    assert len(sums) <= -(-LENGTHS.sum() // 100) + 3  # next to no room is left
    again, same = best_fit(LENGTHS, 100, 3), best_fit(LENGTHS, 100, 4)
    assert np.array_equal(members, again[0]) and np.array_equal(starts, again[1])
    assert not np.array_equal(members, same[0])
    assert np.array_equal(best_fit(np.array([4, 4]), 4, 0)[1], [0, 1, 2])


def test_packed_rows_hold_examples_with_positions_of_their_own(examples: Examples):
    packed = PackedExamples(examples, 64, seed=0)
    batch = packed.batch([0, -1, len(packed) - 1])
    assert batch.position_ids_BL is not None
    seen = [examples[int(i)] for i in packed.members(len(packed) - 1)]
    length = sum(len(ids) for ids, _ in seen)
    assert batch.input_ids_BL[2, :length].tolist() == torch.cat([ids for ids, _ in seen]).tolist()
    assert batch.labels_BL[2, :length].tolist() == torch.cat([labels for _, labels in seen]).tolist()
    assert batch.position_ids_BL[2, :length].tolist() == [p for ids, _ in seen for p in range(len(ids))]
    assert not batch.position_ids_BL[2, length:].any() and (batch.labels_BL[2, length:] == -100).all()
    # The first token of an example is no label, or the last one of another would predict it.
    assert (batch.labels_BL[batch.position_ids_BL == 0] == -100).all()
    assert packed.lengths.sum() == examples.lengths.sum() and packed.lengths[-1] == length
    assert packed.fill == pytest.approx(examples.lengths.sum() / (64 * len(packed)))
    assert packed.digest == PackedExamples(examples, 64, seed=0).digest != PackedExamples(examples, 70, seed=0).digest


def loader(rows: Examples | PackedExamples, split: tuple[int, int, int] = (2, 2, 1), rank: int = 0, **options) -> StepLoader:
    micro_batch, accumulation, world = split
    return StepLoader(
        rows, global_batch=micro_batch * accumulation * world, micro_batch=micro_batch, rank=rank, world=world, seed=5, **options
    )


def taken(steps: list[StepBatch]) -> list[list[int]]:
    return [sorted(n for m in step.micro_batches for n in m.windows if n >= 0) for step in steps]


@pytest.mark.parametrize("grouped", [False, True])
def test_samples_of_a_step_do_not_depend_on_the_split(examples: Examples, grouped: bool):
    one = list(islice(loader(examples, group_by_length=grouped), 14))
    for split in [(1, 4, 1), (2, 1, 2), (1, 2, 2)]:
        ranks = [list(islice(loader(examples, split, rank, group_by_length=grouped), 14)) for rank in range(split[2])]
        together = [sorted(n for rank in each for n in rank) for each in zip(*map(taken, ranks), strict=True)]
        assert together == taken(one)
        assert [sum(each) for each in zip(*([s.label_tokens for s in r] for r in ranks), strict=True)] == [
            s.label_tokens for s in one
        ]
    for epoch in range(2):
        assert sorted(n for step in one if step.epoch == epoch for n in taken([step])[0]) == list(range(23))
    for k in (1, 5, 6, 9):
        assert taken(list(islice(loader(examples, group_by_length=grouped).steps_from(one[k].cursor_after), 13 - k))) == taken(
            one[k + 1 :]
        )


def test_padding_is_counted_and_small(examples: Examples):
    many = examples.subset(np.arange(23).repeat(6))

    def padding(*split, **options) -> float:
        steps = list(islice(loader(many, *split, **options), 35))
        for step in steps:
            assert step.tokens == sum(int(many.lengths[n]) for n in taken([step])[0])
            assert step.computed_tokens == sum(m.input_ids_BL.numel() for m in step.micro_batches)
        share = 1 - sum(s.tokens for s in steps) / sum(s.computed_tokens for s in steps)
        assert loader(many, *split, **options).expected_padding() == pytest.approx(share)
        return share

    assert padding(group_by_length=True) < padding() < 0.2
    assert padding((4, 1, 1), group_by_length=True) < 0.4 * padding((4, 1, 1))


def test_rows_of_a_step_are_dealt_by_length(examples: Examples):
    for step in islice(loader(examples), 6):
        lengths = [[examples.lengths[n] for n in m.windows if n >= 0] for m in step.micro_batches]
        flat = [n for row in lengths for n in row]
        assert flat == sorted(flat, reverse=True)
        assert [m.input_ids_BL.shape[1] for m in step.micro_batches] == [max(row) for row in lengths]


def test_grouped_order_is_frozen_and_a_permutation():
    order = grouped_order(LENGTHS, 8, 1, 2)
    assert sorted(order.tolist()) == list(range(500))
    steps = LENGTHS[order][:496].reshape(-1, 8)
    assert (steps.max(1) - steps.min(1)).mean() < 4  # of 57
    assert steps[0].max() == LENGTHS.max()
    assert not np.array_equal(steps.max(1), np.sort(steps.max(1))[::-1])  # in random order
    assert np.array_equal(order, grouped_order(LENGTHS, 8, 1, 2)) and not np.array_equal(order, grouped_order(LENGTHS, 8, 1, 3))
    assert grouped_order(np.arange(12) % 7, 2, 42, 0).tolist() == [6, 8, 11, 0, 3, 1, 5, 2, 10, 9, 4, 7]
    assert grouped_order(np.arange(3), 4, 0, 0).tolist() == [2, 1, 0]


def test_workers_change_nothing(examples: Examples):
    packed = PackedExamples(examples, 64, 0)
    for here, there in zip(islice(loader(packed), 5), islice(loader(packed, num_workers=2), 5), strict=True):
        for a, b in zip(here.micro_batches, there.micro_batches, strict=True):
            assert torch.equal(a.input_ids_BL, b.input_ids_BL) and torch.equal(a.labels_BL, b.labels_BL)
            assert torch.equal(a.position_ids_BL, b.position_ids_BL) and (a.windows, a.dropout_seed) == (
                b.windows,
                b.dropout_seed,
            )
