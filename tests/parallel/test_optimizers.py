"""Which AdamW moves what: LoRA+ groups against PEFT's, bitsandbytes' state by name and back bit for bit, refusals before loading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_dist.log import UserError
from lora_dist.parallel import AdamWArgs, Replicated, World
from lora_dist.parallel.optimizers import make_optimizer, parameter_groups

pytest.importorskip("bitsandbytes")


def args(kind: str = "adamw_torch", ratio: float | None = None, weight_decay: float = 0.0) -> AdamWArgs:
    return AdamWArgs((0.9, 0.999), 1e-8, weight_decay, kind, ratio)


def lora(width: int = 96, rank: int = 64) -> nn.Module:
    """A plain LoRA of PEFT on two linears; its matrices hold more than the 4,096 elements from which state is in 8 bits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    return get_peft_model(layers, LoraConfig(r=rank, target_modules=["0", "2"], init_lora_weights=False))


def steps(strategy: Replicated, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        strategy.zero_grad()
        strategy.backward((strategy.module(x) - x).square().mean(), last=True)
        assert strategy.update(1e-2).applied


def test_loraplus_groups_are_pefts():
    from peft.optimizers import create_loraplus_optimizer

    model = lora()
    model.base_model.model[0].bias.requires_grad_(True)
    names = {p: n for n, p in model.named_parameters()}
    reference = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    mine = make_optimizer(trainable, args(ratio=16.0, weight_decay=0.1))

    def rules(optimizer: torch.optim.Optimizer, rate: float) -> dict[str, tuple[float, float]]:
        return {
            names[p]: (group.get("rate_factor", group["lr"] / rate), group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    found = rules(mine, 1.0)
    assert found == {name: pytest.approx(rule) for name, rule in rules(reference, 1e-3).items()}
    assert set(found.values()) == {(1.0, 0.1), (16.0, 0.1), (16.0, 0.0)}


def test_loraplus_multiplies_the_rate_of_lora_b_alone():
    """AdamW's first step is the rate times the gradient's sign, so displacements tell the rates."""
    model = lora()
    strategy = Replicated(model, World(), adamw=args(ratio=4.0))
    before = {n: p.detach().clone() for n, p in strategy.trainable.items()}
    steps(strategy, 0, 1)
    moved = {n: float((p.detach() - before[n]).abs().median()) for n, p in strategy.trainable.items()}
    assert {n: round(m / 1e-2, 2) for n, m in moved.items()} == {n: 4.0 if "lora_B" in n else 1.0 for n in moved}


def test_loraplus_needs_a_lora_b():
    with pytest.raises(UserError, match="train.loraplus_lr_ratio: found 4, but this adapter has no lora_B"):
        parameter_groups({"head.weight": nn.Parameter(torch.ones(2, 2))}, args(ratio=4.0))


def test_one_group_without_loraplus():
    trainable = {"a": nn.Parameter(torch.ones(2)), "lora_B": nn.Parameter(torch.ones(2, 2))}
    assert len(parameter_groups(trainable, args())) == 1


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_taken_out_by_name_and_put_back_goes_on_bit_for_bit(kind):
    whole = Replicated(lora(), World(), adamw=args(kind, ratio=2.0))
    steps(whole, 0, 6)
    first = Replicated(lora(), World(), adamw=args(kind, ratio=2.0))
    steps(first, 0, 3)
    trained, state = first.trainable_tensors(), first.optimizer_tensors()
    assert {name.rsplit(".", 1)[0] for name in state} == set(trained)
    dtypes = {name.rsplit(".", 1)[1]: tensor.dtype for name, tensor in state.items()}
    if kind.endswith("8bit"):
        assert dtypes["state1"] == dtypes["state2"] == torch.uint8 and dtypes["absmax1"] == torch.float32
    resumed = Replicated(lora(), World(), adamw=args(kind, ratio=2.0))
    resumed.load_trainable(trained)
    resumed.load_optimizer_tensors(state)
    steps(resumed, 3, 6)
    assert all(torch.equal(p, resumed.trainable[n]) for n, p in whole.trainable.items())
    assert all(torch.equal(tensor, resumed.optimizer_tensors()[n]) for n, tensor in whole.optimizer_tensors().items())


def test_8bit_state_is_a_quarter_and_trains_as_32bit_does():
    torch_adam, bnb_adam = (Replicated(lora(), World(), adamw=args(kind)) for kind in ("adamw_torch", "adamw_8bit"))
    for strategy in (torch_adam, bnb_adam):
        steps(strategy, 0, 20)
    sizes = [
        sum(tensor.numel() * tensor.element_size() for tensor in strategy.optimizer_tensors().values())
        for strategy in (torch_adam, bnb_adam)
    ]
    assert 3.5 < sizes[0] / sizes[1] < 4
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(99))
    losses = [float((strategy.module(x) - x).square().mean()) for strategy in (torch_adam, bnb_adam)]
    start = float((lora()(x) - x).square().mean())
    assert losses[1] < 0.9 * start and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("adamw_torch", "adamw_8bit", "found adamw_8bit, but the checkpoint was written with an AdamW of torch"),
        ("adamw_8bit", "adamw_torch", "found adamw_torch, but the checkpoint was written with an AdamW of bitsandbytes"),
        ("paged_adamw_32bit", "adamw_8bit", "state state1 is of torch.float32, this optimizer's of torch.uint8"),
    ],
)
def test_state_of_another_optimizer_is_refused(written, read, message):
    first = Replicated(lora(), World(), adamw=args(written))
    steps(first, 0, 1)
    with pytest.raises(UserError, match=message):
        Replicated(lora(), World(), adamw=args(read)).load_optimizer_tensors(first.optimizer_tensors())
