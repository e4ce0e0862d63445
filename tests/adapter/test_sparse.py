"""Training of the kept weights themselves against plain torch: dense weights whose gradients are masked."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_dist.adapter import attach_adapter, count_parameters, layer_update, lora_layers, merge_adapter
from lora_dist.adapter.sparse import SparseFullLinear, gather_kept, kept_places, kept_sum, scatter_kept
from lora_dist.blocks import BlockLinear, BlockMask, ElementMask, Pattern, Scratch, grid, pack
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.parallel import AdamWArgs, Replicated, World
from tests.tiny import VOCABULARY, tiny_model

ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8}
RATES = [1e-2, 3e-3, 1e-3, 1e-2, 1e-3]
CLIP = 0.5


def make_pattern(model, *, dense: tuple[str, ...] = (), elements: tuple[str, ...] = (), empty: tuple[str, ...] = ()) -> Pattern:
    """Prune half of the tiles, or of the elements of each four; layers named `dense` get no mask, of those named `empty` nothing is kept."""
    generator, masks = torch.Generator().manual_seed(3), {}
    for linear in prunable_linears(model):
        leaf = linear.name.rsplit(".", 1)[-1]
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        if leaf in dense:
            continue
        if leaf in elements:
            weight = torch.rand(shape, generator=generator).view(-1, 4)
            keep = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, weight.topk(2, 1).indices, True).view(shape)
            masks[linear.name] = ElementMask.detect(keep.float())
        else:
            kept_PQ = torch.rand(grid(shape, 16), generator=generator) > 0.5
            kept_PQ[0, 0] = True
            masks[linear.name] = BlockMask(kept_PQ & (leaf not in empty), shape, 16)
        linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    return Pattern(masks)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


class Masked:
    """The reference: plain torch on dense weights, their gradients masked."""

    def __init__(self, model, pattern: Pattern):
        self.model = model.requires_grad_(False)
        self.linears = prunable_linears(model)
        self.weights = [linear.module.weight.requires_grad_(True) for linear in self.linears]
        whole = [torch.ones_like(linear.weight_OI, dtype=torch.bool) for linear in self.linears]
        self.masks = [pattern[n.name].expand() if n.name in pattern else w for n, w in zip(self.linears, whole, strict=True)]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, weight_decay=0.0, **ADAMW)

    def step(self, ids, rate: float) -> tuple[float, float]:
        """Loss and gradient norm."""
        self.optimizer.zero_grad()
        loss = loss_of(self.model, ids)
        loss.backward()
        for linear, mask in zip(self.linears, self.masks, strict=True):
            linear.module.weight.grad *= mask.T if linear.transposed else mask
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return float(loss.detach()), float(norm)


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (len(RATES), 2, 16), generator=torch.Generator().manual_seed(0))


def state_bytes(optimizer) -> int:
    return sum(s[key].numel() * s[key].element_size() for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


KINDS = [
    ("llama", {}),  # edge tiles
    ("llama", {"dense": ("o_proj",), "elements": ("v_proj", "up_proj")}),
    ("gpt2", {"elements": ("c_fc",)}),  # weights stored as (I, O), biases
]


@pytest.mark.parametrize("kind,odd", KINDS)
def test_equals_masked_gradients_step_by_step(kind, odd):
    """In float64, so that nothing depends on the order of sums."""
    base = tiny_model(kind).double()
    pattern = make_pattern(base, **odd)
    reference = Masked(copy.deepcopy(base), pattern)
    model = attach_adapter(base, pattern, r=8, lora_alpha=16, adapter_type="sparse_full").double()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    deltas = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(deltas, lr=0.0, weight_decay=0.0, **ADAMW)
    layers = dict(lora_layers(model))
    for rate, ids in zip(RATES, tokens(), strict=True):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(deltas, CLIP)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        expected_loss, expected_norm = reference.step(ids, rate)
        assert expected_norm > CLIP  # or clipping would not be compared
        assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-12)
        assert float(norm) == pytest.approx(expected_norm, rel=1e-10)
        for linear in reference.linears:
            if linear.name in layers:  # else all of it is pruned
                stored = layers[linear.name].get_base_layer().weight
                now = (stored.T if linear.transposed else stored) + layer_update(layers[linear.name])  # float32
                assert torch.allclose(now, linear.weight_OI, rtol=0, atol=1e-7), linear.name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    kept = sum(int(mask.sum()) for mask in reference.masks)
    filled_up = sum(layer.idle_elements("default") for layer in layers.values())
    assert state_bytes(reference.optimizer) == 16 * sum(mask.numel() for mask in reference.masks)
    assert state_bytes(optimizer) == 16 * (kept + filled_up)
    assert count_parameters(model) == (kept, sum(p.numel() for p in reference.model.parameters()))
    merged = merge_adapter(model)
    for linear, expected, mask in zip(prunable_linears(merged), reference.linears, reference.masks, strict=True):
        assert not linear.weight_OI[~mask].any()
        assert torch.allclose(linear.weight_OI, expected.weight_OI, rtol=1e-10, atol=1e-12)


def test_the_strategy_takes_the_same_steps_and_its_state_is_the_kept_share():
    """As a run does it: float32, fused AdamW, clipping by `parallel/`. Widths of whole tiles, so that the share is exact."""
    base = tiny_model("llama")
    for layer in base.model.layers:
        del layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj  # 2.5 tiles
        layer.mlp.forward = lambda x: x
    pattern = make_pattern(base)
    reference = Masked(copy.deepcopy(base), pattern)
    model = attach_adapter(base, pattern, r=8, lora_alpha=16, adapter_type="sparse_full")
    strategy = Replicated(model, World(), adamw=AdamWArgs(ADAMW["betas"], ADAMW["eps"], 0.0), max_grad_norm=CLIP)
    for rate, ids in zip(RATES, tokens(), strict=True):
        strategy.zero_grad()
        loss = loss_of(model, ids)
        strategy.backward(loss, last=True)
        update = strategy.update(rate)
        expected_loss, expected_norm = reference.step(ids, rate)
        assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-4)
        assert update.grad_norm == pytest.approx(expected_norm, rel=1e-3)
    kept, dense = sum(int(mask.sum()) for mask in reference.masks), sum(mask.numel() for mask in reference.masks)
    assert 0.3 < kept / dense < 0.7
    assert state_bytes(strategy.optimizer) / state_bytes(reference.optimizer) == kept / dense


def test_a_small_update_is_not_lost_in_16_bits():
    """A thousand updates, each below half a unit in the last place of the weight: the sum shows, and merging gives the same weight."""
    torch.manual_seed(0)
    base = torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    mask = BlockMask(torch.tensor([[True, False], [False, True]]), (32, 32), 16)
    base.weight.data = torch.where(mask.expand(), torch.tensor(1.0), torch.tensor(0.0)).bfloat16()
    layer = SparseFullLinear(base, "default", mask)
    for _ in range(1000):
        layer.lora_delta["default"].data += 1e-4
    assert torch.finfo(torch.bfloat16).eps / 4 > 1e-4
    x = torch.eye(32, dtype=torch.bfloat16)
    out = layer(x).T
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[mask.expand()], torch.full((512,), 1.1).bfloat16()) and not out[~mask.expand()].any()
    layer.merge()
    assert torch.equal(base(x).T, out)
    layer.unmerge()
    assert torch.equal(layer(x).T, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tiles", "elements", "dense"])
def test_kept_weights_round_trip(kind, dtype):
    torch.manual_seed(1)
    weight = torch.randn(40, 24).to(dtype)
    mask = {
        "tiles": BlockMask(torch.rand(3, 2) > 0.4, (40, 24), 16),
        "elements": ElementMask.detect(torch.rand(40, 24) > 0.5),
        "dense": None,
    }[kind]
    block = mask.block if mask is not None else 1
    pruned = weight if mask is None else weight * mask.expand()
    kept = kept_places(mask)
    values = gather_kept(weight, kept, block)
    assert torch.equal(scatter_kept(values, kept, block, (40, 24)), pruned)
    delta = gather_kept(torch.randn(40, 24), kept, block)
    assert torch.equal(
        kept_sum(pruned, delta, kept, block, (40, 24), False),
        (pruned.float() + scatter_kept(delta, kept, block, (40, 24))).to(dtype),
    )


def test_a_base_that_is_held_as_tiles_trains_alike():
    torch.manual_seed(0)
    dense = torch.nn.Linear(40, 24)
    mask = BlockMask(torch.tensor([[True, False, True], [False, True, True]]), (24, 40), 16)
    dense.weight.data *= mask.expand()
    tiles = BlockLinear(mask, pack(dense.weight.detach(), mask), dense.bias, Scratch())
    x, out = torch.randn(5, 40, requires_grad=True), []
    delta = torch.randn(4, 16, 16)
    for base in (dense, tiles):
        layer = SparseFullLinear(base, "default", mask)
        layer.lora_delta["default"].data.copy_(delta)
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), (x, layer.lora_delta["default"]))
        layer.merge()
        out.append((y, *grads, base(x)))
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))
    assert torch.equal(out[1][0], out[1][3])


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    base = torch.nn.Linear(64, 64)
    layer = SparseFullLinear(base, "default", BlockMask(torch.eye(4, dtype=torch.bool), (64, 64), 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True)).sum()
    own = {base.weight.data_ptr(), layer.lora_delta["default"].data_ptr()}
    assert all(t.numel() < 64 * 64 for t in saved if t.data_ptr() not in own)


def test_a_layer_that_is_pruned_whole_is_left_alone_and_a_base_without_a_pattern_is_refused():
    base = tiny_model("llama")
    pattern = make_pattern(base, empty=("k_proj",))
    model = attach_adapter(base, pattern, r=8, lora_alpha=16, adapter_type="sparse_full")
    names = [name for name, _ in lora_layers(model)]
    assert len(names) == 12 and not any("k_proj" in name for name in names)
    with pytest.raises(UserError, match="train.mode: found sparse_full, but the base has no pattern to keep"):
        attach_adapter(tiny_model("llama"), None, r=8, lora_alpha=16, adapter_type="sparse_full")
