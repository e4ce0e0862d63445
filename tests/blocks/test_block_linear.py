"""A linear of kept tiles against `nn.Linear` with the zeros: to the bit, forward and backward, whatever the mask and the shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_dist.blocks import (
    BlockLinear,
    BlockMask,
    Guard,
    Pattern,
    Piece,
    Scratch,
    find_linears,
    grid,
    pack,
    pack_range,
    rows_of_range,
)
from lora_dist.log import GuardError


def pair(shape, block, density, *, dtype=torch.float32, bias=True, scratch=None, seed=0) -> tuple[nn.Linear, BlockLinear]:
    """The same weight as it is and as kept tiles."""
    generator = torch.Generator().manual_seed(seed)
    mask = BlockMask(torch.rand(grid(shape, block), generator=generator) < density, shape, block)
    dense = nn.Linear(shape[1], shape[0], bias=bias).to(dtype).requires_grad_(False)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(shape, generator=generator)).masked_fill_(~mask.expand(), 0.0)
    return dense, BlockLinear(mask, pack(dense.weight, mask), dense.bias, scratch or Scratch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "block"), [((64, 96), 16), ((40, 72), 16), ((5, 33), 16), ((24, 16), 8), ((70, 3), 32)])
def test_output_and_gradient_are_those_of_the_dense_linear(shape, block, density, dtype):
    dense, tiles = pair(shape, block, density, dtype=dtype)
    assert tiles.values.numel() == max(1, int(tiles.mask.kept_PQ.sum())) * block**2 and not tiles.values.requires_grad
    assert torch.equal(tiles.dense_OI(), dense.weight)
    x = torch.randn(2, 7, shape[1]).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = dense(a), tiles(b)
    assert torch.equal(y, z)
    g = torch.randn_like(y)
    y.backward(g)
    z.backward(g)
    assert torch.equal(a.grad, b.grad)


def test_layers_take_turns_in_one_scratch():
    """Larger, smaller and other patterns in between leave nothing behind, nor does inference mode; the backward pass unpacks again."""
    scratch, shapes = Scratch(), [(48, 64), (64, 48), (96, 64)]
    pairs = [pair(shape, 16, 0.5, scratch=scratch, seed=i) for i, shape in enumerate(shapes)]
    with torch.inference_mode():
        for dense, tiles in pairs:
            x = torch.randn(3, dense.in_features)
            assert torch.equal(tiles(x), dense(x))
    x, grads, outputs = torch.randn(4, 64), [], []
    for which in (0, 1):
        leaf = x.clone().requires_grad_()
        outputs.append(nn.Sequential(*(layers[which] for layers in pairs))(leaf))
        outputs[-1].square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*outputs) and torch.equal(*grads)
    assert sum(held.numel() for held in scratch._held.values()) == 96 * 64


def test_the_backward_pass_keeps_nothing_of_the_weights_size():
    _, tiles = pair((64, 64), 16, 0.5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        tiles(torch.randn(3, 64, requires_grad=True))
    assert saved == [tuple(tiles.values.shape)]


def test_checkpointed_and_copied_it_is_the_same():
    dense, tiles = pair((64, 64), 16, 0.5)
    again = copy.deepcopy(tiles)
    grads = []
    x = torch.randn(3, 64)
    for layer in (dense, again):
        leaf = x.clone().requires_grad_()
        checkpoint(layer, leaf, use_reentrant=False).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and again.scratch is not tiles.scratch


def test_bias_that_is_trained_gets_its_gradient():
    dense, tiles = pair((64, 64), 16, 0.5)
    x = torch.randn(2, 3, 64)
    found = []
    for layer in (dense, tiles):
        layer.bias.requires_grad_(True).grad = None
        layer(x).square().sum().backward()
        found.append(layer.bias.grad)
    assert torch.allclose(*found, rtol=1e-6)


def test_on_the_meta_device_it_has_shapes():
    _, tiles = pair((40, 72), 16, 0.5)
    x = torch.empty(2, 7, 72, device="meta", requires_grad=True)
    y = tiles.to("meta")(x)
    assert y.shape == (2, 7, 40)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(64, 96), (40, 72)])
def test_ranges_of_tiles_are_packed_from_their_rows_only(shape):
    dense, tiles = pair(shape, 16, 0.4)
    count = len(tiles.values)
    for start in range(count):
        for stop in (start, start + 1, count):
            top, bottom = rows_of_range(tiles.mask, start, stop)
            found = pack_range(dense.weight[top:bottom], tiles.mask, start, stop, first_row=top)
            assert torch.equal(found, tiles.values[start:stop])


def test_it_is_found_among_the_linears():
    dense, tiles = pair((40, 72), 16, 0.5)
    (found,) = find_linears(nn.Sequential(tiles))
    assert not found.transposed and torch.equal(found.weight_OI, dense.weight)


def guarded() -> tuple[BlockLinear, Guard]:
    _, tiles = pair((64, 96), 16, 0.5)
    base = {"m.values": tiles.values, "m.first_rows": Piece.whole(tiles.first_rows)}
    return tiles, Guard(base, Pattern({"m": tiles.mask}), tiles={"m": lambda: tiles.first_rows})


def test_the_guard_catches_a_flipped_value_and_a_tile_in_another_place():
    tiles, guard = guarded()
    guard.check_all("at step 1")
    tiles.values.data[3, 2, 1] += 1e-3
    with pytest.raises(GuardError, match="guard at step 2: frozen parameter m.values changed"):
        guard.check("at step 2")
    tiles, guard = guarded()
    p, q = tiles.mask.kept_PQ.nonzero()[1].tolist()
    tiles.first_rows[1] += 1
    with pytest.raises(GuardError, match=rf"guard at step 3: layer m, tile \({p}, {q}\): is put in another place"):
        guard.check_pattern("at step 3")


def test_the_guard_refuses_tiles_of_another_mask():
    tiles, _ = guarded()
    other = BlockMask.full((64, 96), 16)
    other.kept_PQ[0, 0] = False
    with pytest.raises(GuardError, match=r"layer m: found \d+ tiles, expected 23 as in the pattern"):
        Guard({"m.values": tiles.values}, Pattern({"m": other}), tiles={"m": lambda: tiles.first_rows})
