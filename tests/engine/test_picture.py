"""`pattern.json`: its counts and shares against the masks themselves, and what a 7B model's takes."""

from __future__ import annotations

import base64
import time

import numpy as np
import pytest
import torch

from lora_dist.blocks import BlockMask, ElementMask, Pattern
from lora_dist.engine.picture import SIDE, pattern_picture


def _shares(picture: dict) -> np.ndarray:
    kept = np.frombuffer(base64.b64decode(picture["kept"]), np.uint8)
    return kept.reshape(picture["rows"], picture["columns"]) / 255


def test_small_masks_are_drawn_tile_by_tile() -> None:
    torch.manual_seed(0)
    kept_PQ = torch.rand(3, 5) < 0.5
    pattern = Pattern({"model.layers.0.mlp.up_proj": BlockMask(kept_PQ, (40, 80), 16)})  # the last row of tiles is half as high
    content = pattern_picture(pattern)
    linear = content["linears"][0]
    assert np.array_equal(_shares(linear["picture"]), kept_PQ.numpy().astype(float))
    assert (linear["tiles"], linear["kept_tiles"]) == (15, int(kept_PQ.sum()))
    assert content["digest"] == pattern.digest
    assert content["sparsity"] == pytest.approx(pattern.sparsity, abs=1e-12)


def test_large_masks_are_averaged() -> None:
    torch.manual_seed(0)
    kept_PQ = torch.rand(128, 192) < 0.3
    content = pattern_picture(Pattern({"a": BlockMask(kept_PQ, (128 * 16, 192 * 16), 16)}))
    expected = kept_PQ.float().view(64, 2, 64, 3).mean((1, 3)).numpy()
    assert np.abs(_shares(content["linears"][0]["picture"]) - expected).max() <= 0.5 / 255 + 1e-6
    odd = _shares(pattern_picture(Pattern({"a": BlockMask(kept_PQ[:100, :70], (1600, 1120), 16)}))["linears"][0]["picture"])
    assert odd.shape == (SIDE, SIDE)
    assert odd[0, 0] == float(kept_PQ[0, 0])  # 100 rows in 64 fields: the first holds one tile


@pytest.mark.parametrize("width", [256, 250])
def test_element_masks_are_counted_from_their_bits(width: int) -> None:
    torch.manual_seed(0)
    mask = ElementMask.detect((torch.rand(96, width) < 0.4).float())
    linear = pattern_picture(Pattern({"a": mask}))["linears"][0]
    assert linear["sparsity"] == pytest.approx(1 - mask.kept_elements() / (96 * width), abs=1e-12)
    assert linear["tiles"] == 0
    assert _shares(linear["picture"]).mean() == pytest.approx(0.4, abs=0.03)


def test_a_7b_model_takes_seconds() -> None:
    """Seven projections of one of its 32 layers, element by element, the dearest form; tiles are 256 times fewer."""
    torch.manual_seed(0)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    bits = {shape: torch.randint(0, 256, (shape[0] * shape[1] // 8,), dtype=torch.uint8) for shape in set(shapes)}
    pattern = Pattern({f"layers.0.{i}": ElementMask(bits[shape], shape) for i, shape in enumerate(shapes)})
    _ = pattern.digest
    start_s = time.process_time()  # of this process alone: others may be at work
    pattern_picture(pattern)
    assert time.process_time() - start_s < 20  # 0.3 s here; by single elements it would be minutes
