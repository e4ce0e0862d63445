"""The guard finds what was changed, names it, and stays quiet otherwise."""

from __future__ import annotations

import pytest
import torch

from lora_dist.blocks import BlockMask, ElementMask, Guard, Pattern, grid
from lora_dist.blocks.guard import CHUNK_WORDS
from lora_dist.log import GuardError


def base_and_pattern(dtype=torch.float32, shape=(128, 96)):
    generator = torch.Generator().manual_seed(1)
    base, masks = {}, {}
    for name in ("layers.0.q", "layers.1.q"):
        mask = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
        base[f"{name}.weight"] = torch.randn(shape, generator=generator).masked_fill_(~mask.expand(), 0).to(dtype)
        masks[name] = mask
    base["norm.weight"] = torch.ones(7, dtype=dtype)  # 7 elements: no whole number of 8-byte words
    return base, Pattern(masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_base_passes_every_check(dtype):
    base, pattern = base_and_pattern(dtype)
    guard = Guard(base, pattern)
    for step in range(5):
        guard.check(f"at step {step}")
    guard.check_all("at the end")


def test_a_pruned_tile_that_moves_is_named():
    base, pattern = base_and_pattern()
    guard = Guard(base, pattern)
    p, q = (~pattern["layers.1.q"].kept_PQ).nonzero()[0].tolist()
    base["layers.1.q.weight"][p * 16 + 3, q * 16 + 5] = 1e-30
    with pytest.raises(GuardError, match=rf"guard at step 7: layer layers.1.q, tile \({p}, {q}\)"):
        guard.check("at step 7")


def test_a_base_that_is_not_pruned_where_its_mask_says_so_is_refused_at_load():
    base, pattern = base_and_pattern()
    base["layers.0.q.weight"] += 1
    with pytest.raises(GuardError, match="guard at load: layer layers.0.q"):
        Guard(base, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_bit_of_a_kept_weight_is_seen_by_the_whole_check(dtype):
    base, pattern = base_and_pattern(dtype)
    guard = Guard(base, pattern)
    integers = base["layers.0.q.weight"].view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    kept = pattern["layers.0.q"].expand().reshape(-1).nonzero().view(-1)
    for i in kept[:: max(1, len(kept) // 50)].tolist():
        integers[i] ^= 1
        with pytest.raises(GuardError, match=r"layers.0.q.weight changed"):
            guard.check_all("at the end")
        integers[i] ^= 1
    guard.check_all("at the end")
    base["norm.weight"][6] = 2  # the word that was padded
    with pytest.raises(GuardError, match=r"norm.weight changed"):
        guard.check_all("at the end")


def test_the_sample_rotates_through_the_whole_base():
    big = {"big": torch.randn(CHUNK_WORDS * 2 * 5)}  # five chunks of float32
    guard = Guard(big, None, sample_chunks=2)
    big["big"][-1] += 1
    seen = []
    for step in range(3):
        try:
            guard.check(f"at step {step}")
        except GuardError:
            seen.append(step)
    assert seen == [2]  # chunks 0-1, 2-3, then 4-0


def test_transposed_and_wrapped_names_are_found():
    base, pattern = base_and_pattern()
    wrapped = {
        "layers.0.q.base_layer.weight": base["layers.0.q.weight"].T.contiguous(),
        "layers.1.q.weight": base["layers.1.q.weight"],
    }
    guard = Guard(wrapped, pattern, transposed={"layers.0.q"})
    p, q = (~pattern["layers.0.q"].kept_PQ).nonzero()[0].tolist()
    wrapped["layers.0.q.base_layer.weight"][q * 16, p * 16] = 5
    with pytest.raises(GuardError, match=rf"layers.0.q, tile \({p}, {q}\): found 5"):
        guard.check_pattern("now")
    with pytest.raises(GuardError, match="in the pattern, but not in the base"):
        Guard({}, pattern)
    with pytest.raises(GuardError, match="found a weight of"):
        Guard(wrapped, pattern)


def test_element_patterns_are_guarded_too():
    weight = torch.randn(20, 20) * (torch.rand(20, 20) > 0.5)
    guard = Guard({"l.weight": weight}, Pattern({"l": ElementMask.detect(weight)}))
    row, col = (weight == 0).nonzero()[0].tolist()
    weight[row, col] = 1
    with pytest.raises(GuardError, match=rf"layer l, element \({row}, {col}\)"):
        guard.check("at step 1")
