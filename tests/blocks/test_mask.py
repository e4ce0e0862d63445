"""Masks, the pattern file and the fingerprint, against plain loops."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.blocks import BlockMask, ElementMask, Fingerprint, Pattern, detect_pattern, grid, pack_bits, unpack_bits
from lora_dist.log import GuardError, UserError

SHAPES = [(64, 48), (70, 50), (16, 16), (5, 100)]
BLOCKS = [8, 16, 32]


def pruned_weight(shape: tuple[int, int], block: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the (P, Q) mask that its tiles were zeroed by, made by a plain loop."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    P, Q = grid(shape, block)
    kept = torch.rand(P, Q, generator=generator) > 0.5
    for p in range(P):
        for q in range(Q):
            if not kept[p, q]:
                weight[p * block : (p + 1) * block, q * block : (q + 1) * block] = 0
    return weight, kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_detects_the_tiles_that_were_zeroed(shape, block):
    weight, kept = pruned_weight(shape, block)
    mask = BlockMask.detect(weight, block)
    assert torch.equal(mask.kept_PQ, kept)
    assert torch.equal(mask.expand(), weight != 0)
    assert mask.kept_elements() == int((weight != 0).sum())
    assert torch.equal(BlockMask.from_packed(mask.packed(), shape, block).kept_PQ, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_negative_zero_is_zero_and_nan_is_not(dtype):
    weight = torch.zeros(32, 32, dtype=dtype)
    weight[0, 0] = -0.0
    assert not BlockMask.detect(weight, 16).kept_PQ.any()
    weight[17, 3] = float("nan")
    assert BlockMask.detect(weight, 16).kept_PQ.tolist() == [[False, False], [True, False]]


def test_a_kept_tile_of_zeros_is_no_violation_but_a_pruned_one_with_a_value_is():
    weight = torch.zeros(32, 32)
    mask = BlockMask(torch.tensor([[True, False], [False, True]]), (32, 32), 16)
    assert mask.first_violation(weight) is None
    weight[20, 5] = 0.25
    violation, count = mask.first_violation(weight)
    assert (violation.row, violation.col, violation.value, count) == (1, 0, 0.25, 1)


@pytest.mark.parametrize("block", [1, 3, 16, 100])
def test_a_rectangle_is_held_against_the_tiles_that_it_touches(block):
    generator = torch.Generator().manual_seed(block)
    masks = [BlockMask.detect(pruned_weight((37, 29), block)[0], block), ElementMask.detect(pruned_weight((37, 29), 1)[0])]
    for mask in masks:
        b, pruned = mask.block, ~mask.expand()
        for _ in range(50):
            (top, bottom), (left, right) = (sorted(torch.randperm(n + 1, generator=generator)[:2].tolist()) for n in (37, 29))
            weight = torch.randn(bottom - top, right - left, generator=generator)
            weight[torch.rand(weight.shape, generator=generator) < 0.9] = 0
            bad = {(top + i, left + j) for i, j in weight.nonzero().tolist() if pruned[top + i, left + j]}
            found = mask.zeros_violated(weight, (top, left)).nonzero()
            assert {(top // b + p, left // b + q) for p, q in found.tolist()} == {(o // b, i // b) for o, i in bad}


@pytest.mark.parametrize("mask", [BlockMask.full((32, 16), 16), ElementMask.detect(torch.eye(32, 16))])
def test_a_weight_of_another_shape_is_refused(mask):
    with pytest.raises(ValueError, match=r"found shape \(16, 16\), expected \(32, 16\)"):
        mask.first_violation(torch.zeros(16, 16))


def test_bits_survive_packing_and_match_numpy():
    bits = torch.rand(37, generator=torch.Generator().manual_seed(3)) > 0.5
    packed = pack_bits(bits)
    assert packed.numel() == 5
    assert torch.equal(unpack_bits(packed, 37), bits)
    import numpy as np

    assert packed.tolist() == np.packbits(bits.numpy()).tolist()


def test_element_mask_keeps_what_is_not_zero():
    weight = torch.randn(9, 13) * (torch.rand(9, 13) > 0.5)
    mask = ElementMask.detect(weight)
    assert torch.equal(mask.expand(), weight != 0)
    weight[torch.nonzero(~mask.expand())[0, 0], torch.nonzero(~mask.expand())[0, 1]] = 1.0
    assert mask.first_violation(weight) is not None


def a_pattern() -> Pattern:
    masks = {"b": BlockMask(pruned_weight((70, 50), 16)[1], (70, 50), 16)}
    masks["a"] = ElementMask.detect(pruned_weight((20, 30), 8)[0])
    return Pattern(masks)


def test_pattern_file_round_trip_keeps_digest_and_masks(tmp_path):
    pattern = a_pattern()
    file = pattern.save(tmp_path)
    loaded = Pattern.load(tmp_path)
    assert loaded.digest == pattern.digest and list(loaded) == ["a", "b"]
    assert loaded.kind == "element" and loaded.block == 16
    assert torch.equal(loaded["b"].expand(), pattern["b"].expand())
    assert file.stat().st_size < 2000  # bits, not bytes


def test_pattern_digest_depends_on_every_part():
    pattern = a_pattern()
    kept = pattern["b"].kept_PQ.clone()
    kept[2, 1] = ~kept[2, 1]
    changed = Pattern({**pattern, "b": BlockMask(kept, (70, 50), 16)})
    renamed = Pattern({"c": pattern["b"], "a": pattern["a"]})
    assert len({pattern.digest, changed.digest, renamed.digest}) == 3
    assert "layer b, tile (2, 1)" in pattern.differences(changed)
    assert pattern.differences(renamed) == "layer b: in one pattern only"
    assert pattern.differences(a_pattern()) is None


def test_damaged_pattern_files_are_refused(tmp_path):
    pattern = a_pattern()
    file = pattern.save(tmp_path)
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors["b"][0] ^= 1
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(GuardError, match="damaged"):
        Pattern.load(tmp_path)
    save_file(tensors, file, metadata={**metadata, "version": "99"})
    with pytest.raises(UserError, match="version 99"):
        Pattern.load(tmp_path)
    save_file(tensors, file, metadata={**metadata, "layers": json.dumps({"zzz": {"kind": "block", "shape": [1, 1], "block": 1}})})
    with pytest.raises(UserError, match="cannot be read"):
        Pattern.load(tmp_path)
    file.write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        Pattern.load(tmp_path)
    with pytest.raises(UserError, match="found no file"):
        Pattern.load(tmp_path / "nowhere")


def test_statistics_count_edge_tiles_by_what_they_hold():
    weight = torch.ones(24, 24)
    weight[16:, 16:] = 0  # the 8x8 corner of a 24x24 matrix with 16x16 tiles
    pattern = detect_pattern([("layer", weight)], "block", 16)
    row = pattern.stats()[0]
    assert (row.tiles, row.pruned_tiles, row.kept_elements) == (4, 1, 24 * 24 - 64)
    assert pattern.sparsity == pytest.approx(64 / 576)


def test_fingerprint_is_free_of_order_and_chunking_and_sees_every_part():
    def digest(*tensors):
        fingerprint = Fingerprint()
        for tensor in tensors:
            fingerprint.add(*tensor)
        return fingerprint.hexdigest()

    a, b = ("a", "F32", [2, 2], [b"12", b"34"]), ("b", "F32", [4], [b"5678"])
    assert digest(a, b) == digest(b, ("a", "F32", [2, 2], [b"1234"]))
    others = [
        ("a", "F32", [4], [b"1234"]),
        ("a", "BF16", [2, 2], [b"1234"]),
        ("c", "F32", [2, 2], [b"1234"]),
        ("a", "F32", [2, 2], [b"1235"]),
    ]
    assert len({digest(other, b) for other in [a, *others]}) == 5
    with pytest.raises(ValueError, match="twice"):
        digest(a, a)
