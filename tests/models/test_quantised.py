"""Quantised bases: zeros stay zeros, the values are bitsandbytes' own, and the guard sees what changes in packed data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_dist import gemm
from lora_dist.blocks import BlockMask, Guard, NamedLinear, Pattern, Piece, grid
from lora_dist.engine.base import base_pieces, load_for, quantised_weights
from lora_dist.log import GuardError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.padded import PaddedLinear4bit
from lora_dist.models.quantised import (
    Quantisation,
    _empty_layer,
    _quantise_into,
    _unpacked,
    codes,
    dequantised,
    dequantised_OI,
    pack_4bit,
    prove,
    quantised_layers,
)
from lora_dist.parallel import World
from tests.tiny import tiny_model, tiny_tokenizer

bnb = pytest.importorskip("bitsandbytes")

ALL = [
    Quantisation(4),
    Quantisation(4, double=False),
    Quantisation(4, "fp4"),
    Quantisation(4, "fp4", double=False),
    Quantisation(8),
]


def pruned_weight(shape: tuple[int, int] = (96, 160), seed: int = 0) -> tuple[torch.Tensor, BlockMask]:
    """Half of its tiles pruned, and the first rows all of them: blocks of 64 that are zero throughout."""
    generator = torch.Generator().manual_seed(seed)
    kept_PQ = torch.rand(grid(shape, 16), generator=generator) > 0.5
    kept_PQ[:2] = False
    mask = BlockMask(kept_PQ, shape, 16)
    return torch.randn(shape, generator=generator).mul_(0.05).masked_fill_(~mask.expand(), 0.0), mask


@pytest.mark.parametrize("quantisation", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pruned_weights_are_exactly_zero_after_dequantising(quantisation, dtype):
    weight_OI, mask = pruned_weight()
    found = dequantised(weight_OI.to(dtype), quantisation, mask)
    assert bool((found[~mask.expand()] == 0).all())
    kept = mask.expand()
    error = float((found - weight_OI)[kept].norm() / weight_OI[kept].norm())
    assert 0 < error < {4: 0.15, 8: 0.02}[quantisation.bits]


@pytest.mark.parametrize("width", [8, 32, 40, 64, 96, 160, 192, 224, 688, 1056])
def test_any_width_comes_back(width):
    """bitsandbytes 0.50 on CPU gives blocks that cross rows of a multiple of 16 back under another block's scale."""
    weight_OI = torch.randn(48, width, generator=torch.Generator().manual_seed(0))
    for quantisation in ALL:
        found = dequantised(weight_OI, quantisation, None)
        assert float((found - weight_OI).norm() / weight_OI.norm()) < {4: 0.14, 8: 0.01}[quantisation.bits]


def test_a_device_that_gives_back_other_values_is_noticed():
    weight_OI = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    found_OI = dequantised(weight_OI, Quantisation(4), None)
    prove("layer", weight_OI, found_OI, None, Quantisation(4))
    with pytest.raises(GuardError, match="layer layer: bitsandbytes gives back weights that are wrong by up to"):
        prove("layer", weight_OI, found_OI.roll(1, 0), None, Quantisation(4))


@pytest.mark.parametrize("double", [True, False])
def test_kept_weights_are_what_bitsandbytes_makes_of_them(double):
    weight_OI, mask = pruned_weight()
    weight_OI, mask = weight_OI[:, :128], BlockMask(mask.kept_PQ[:, :8], (96, 128), 16)
    packed, state = bnb.functional.quantize_4bit(weight_OI, blocksize=64, compress_statistics=double, quant_type="nf4")
    reference = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantised(weight_OI, Quantisation(4, "nf4", double), mask), reference)


def test_a_code_that_the_device_chose_badly_for_zeros_is_put_right():
    """A block of zeros has no scale: what a device writes for 0 / 0 is its own affair. With a mask, pruned codes are written."""
    weight_OI, mask = pruned_weight((96, 128))
    noisy = weight_OI + 1e-3  # as if the device had made codes of something out of the zeros
    packed, state = pack_4bit(noisy, Quantisation(4), torch.uint8, ~mask.expand())
    zero = int((state.code == 0).nonzero()[0])
    assert bool((_unpacked(packed).view(weight_OI.shape)[~mask.expand()] == zero).all())
    assert bool((bnb.functional.dequantize_4bit(packed, state)[~mask.expand()] == 0).all())


@pytest.fixture(params=["llama", "gpt2"])
def base_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pruned model; GPT-2 stores its weights as (I, O) and has biases."""
    model, tokenizer, masks = tiny_model(request.param), tiny_tokenizer(), {}
    for i, linear in enumerate(prunable_linears(model)):
        O, I = linear.weight_OI.shape
        masks[linear.name] = BlockMask(torch.rand(grid((O, I), 16), generator=torch.Generator().manual_seed(i)) > 0.5, (O, I), 16)
        linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    Pattern(masks).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [128, 160])
def test_4_bit_products_on_a_processor_without_16_bit_ones(dtype, width, monkeypatch):
    """Output and gradient are those of the weight that the layer stands for, whichever way they are computed."""
    weight_OI, _ = pruned_weight((96, width))
    layer = quantised_layer(weight_OI, dtype)
    exact_OI = dequantised_OI(layer).double()
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(3, 7, n, generator=generator).to(dtype) for n in (width, 96))
    for emulated in (True, False):
        monkeypatch.setattr(gemm, "EMULATED", (dtype,) if emulated else ())
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        assert y.dtype == leaf.grad.dtype == dtype and y.shape == g.shape
        for found, exact in ((y, x.double() @ exact_OI.T), (leaf.grad, g.double() @ exact_OI)):
            assert float((found.double() - exact).norm() / exact.norm()) < 1e-2


def quantised_layer(weight_OI: torch.Tensor, dtype: torch.dtype) -> PaddedLinear4bit:
    """As a base has it."""
    linear = NamedLinear("", torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta"), False)
    layer = _empty_layer(linear, Quantisation(4), dtype, torch.uint8)
    _quantise_into(layer, weight_OI, Quantisation(4), None)
    return layer


@pytest.mark.parametrize("quantisation", [Quantisation(4), Quantisation(8)], ids=str)
def test_a_quantised_base_computes_what_its_dequantised_copy_does(base_dir, quantisation):
    """Its fingerprint and pattern are those of the stored weights; head, embedding and norms are not quantised."""
    plain = load_for(World(), str(base_dir), sharded=False, block=16)
    quantised = load_for(World(), str(base_dir), sharded=False, block=16, quantisation=quantisation)
    copy = load_for(World(), str(base_dir), sharded=False, block=16, quantisation=quantisation, dequantise=True)
    assert plain.base.fingerprint == quantised.base.fingerprint == copy.base.fingerprint
    assert plain.found.pattern.digest == quantised.found.pattern.digest == copy.found.pattern.digest
    layers = dict(quantised_layers(quantised.base.model))
    originals = {linear.name: linear for linear in prunable_linears(plain.base.model)}
    assert layers.keys() == originals.keys() and not dict(quantised_layers(copy.base.model))
    for linear in prunable_linears(copy.base.model):
        assert torch.equal(linear.weight_OI, dequantised_OI(layers[linear.name]))
        original_OI = originals[linear.name].weight_OI
        assert not original_OI.any() or not torch.equal(linear.weight_OI, original_OI)
    others = {n: p for n, p in plain.base.model.named_parameters() if n.removesuffix(".weight") not in layers}
    found = dict(quantised.base.model.named_parameters())
    assert all(torch.equal(found[n], p) for n, p in others.items())
    ids_BL = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    for layer in layers.values():
        layer.train()  # int8 quantises the layers' inputs too, except in training on CPU
    with torch.no_grad():
        logits = [opened.base.model(ids_BL).logits for opened in (quantised, copy, plain)]
    scale = float(logits[1].abs().max())
    assert float((logits[0] - logits[1]).abs().max()) / scale < 1e-5
    assert float((logits[0] - logits[2]).abs().max()) / scale > 1e-3


@pytest.mark.parametrize("quantisation", [Quantisation(4), Quantisation(8)], ids=str)
def test_the_guard_sees_changes_of_packed_data_and_of_scales(base_dir, quantisation):
    opened = load_for(World(), str(base_dir), sharded=False, block=16, quantisation=quantisation)
    model, pattern = opened.base.model, opened.found.pattern
    pieces = base_pieces(model, Piece.whole)

    def guard() -> Guard:
        return Guard(pieces, pattern, codes=quantised_weights(model, pieces))

    watching = guard()
    watching.check_all("now")
    name, layer = next(iter(quantised_layers(model)))
    flat = layer.weight.data.view(-1)
    width = layer.in_features + (layer.padding if quantisation.bits == 4 else 0)

    def place(kept: bool) -> int:
        row, column = (pattern[name].expand() == kept).nonzero()[0].tolist()
        return (row * width + column) // (2 if quantisation.bits == 4 else 1)

    at = place(kept=False)  # tiles begin at even columns: the high half of a byte
    before = flat[at].clone()
    flat[at] ^= 0x50
    for attempt in (guard, lambda: watching.check("at step 3")):
        with pytest.raises(GuardError, match=rf"layer {name}, tile \(.*expected exactly 0"):
            attempt()
    flat[at] = before
    watching.check_all("again")
    kept = place(kept=True)
    flat[kept] ^= 1
    with pytest.raises(GuardError, match=f"{name}.weight changed since"):
        watching.check_all("at the end")
    flat[kept] ^= 1
    scales = layer.quant_state.absmax if quantisation.bits == 4 else layer.weight.SCB
    scales[0] += 1
    with pytest.raises(GuardError, match=f"{name}.weight.(absmax|SCB) changed since"):
        watching.check_all("at the end")


@pytest.mark.parametrize("width", [80, 128])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_pieces_of_packed_data_tell_the_zeros_of_their_part(storage, width):
    """As a sharded strategy cuts them: by rows of packed data, which do not end where rows of the weight do."""
    weight_OI, mask = pruned_weight((50, width))
    packed, state = pack_4bit(weight_OI, Quantisation(4), storage, ~mask.expand())
    layer = PaddedLinear4bit(width, 50, bias=False)
    layer.quant_state = state
    parts = torch.chunk(packed, 3)
    found = [codes(layer, Piece(part, tuple(packed.shape), i * len(parts[0]))) for i, part in enumerate(parts)]
    together = torch.cat([piece.tensor.reshape(-1) for piece in found]).view(50, width)
    assert torch.equal(together == 0, bnb.functional.dequantize_4bit(packed, state)[:, :width] == 0)
    starts = [sum(piece.tensor.numel() for piece in found[:i]) for i in range(3)]
    assert [piece.start for piece in found] == starts and all(piece.shape == (50, width) for piece in found)
    whole = codes(layer, Piece.whole(packed))
    assert torch.equal(whole.tensor, together) and whole.start == 0
