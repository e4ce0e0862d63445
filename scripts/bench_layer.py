#!/usr/bin/env python
"""The block-masked layer: error against the dense formula, and time and memory against plain LoRA and dense-masked BA.

Forms, each with the frozen base product, forward and backward:
    base         the frozen linear alone
    plain        PEFT's own LoRA layer (unmasked)
    own plain    lora_dist's unmasked layer, base and update in one step
    factorised   block-masked, z / u form added to the base's product in one step
    merged       block-masked, one product with W + masked BA (in 16 bits shown only for comparison: it rounds the update away)
    triton       factorised, in one kernel (on a GPU)
    dense        block-masked, masked BA rebuilt in the backward pass, beside the base's product
    masked BA    dense masked delta under autograd, as SQFT, MaskLoRA and PERP compute it: y = x (W + mask . BA)^T

All forms are timed in turn within each round, so a machine that slows down slows them all; medians over rounds, and the ratio to
plain. Memory is what autograd keeps for the backward pass besides parameters. Usage: python scripts/bench_layer.py [--quick] [--shared]
[--device cuda]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from lora_dist.adapter import masked_product
from lora_dist.adapter.layer import factorised_is_cheaper, merged_is_cheaper
from lora_dist.adapter.linear import Adapted, Form, adapted_linears
from lora_dist.blocks import BlockMask, grid

BLOCK = 16
CASES = [  # (dtype, width, tokens, rank)
    ("float32", 512, 2048, 16),
    ("float32", 1024, 1024, 16),
    ("float32", 2048, 1024, 16),
    ("float32", 2048, 1024, 8),
    ("float32", 4096, 512, 16),
    ("bfloat16", 512, 2048, 16),
    ("bfloat16", 1024, 1024, 16),
    ("bfloat16", 2048, 1024, 16),
    ("bfloat16", 4096, 512, 16),
]
ON_GPU = [
    ("bfloat16", 2048, 4096, 16),
    ("bfloat16", 4096, 4096, 8),
    ("bfloat16", 4096, 4096, 16),
    ("bfloat16", 4096, 4096, 32),
    ("bfloat16", 8192, 4096, 16),
]
QUICK = [("float32", 256, 512, 8), ("bfloat16", 256, 512, 8)]


class Case:
    """One shape: inputs, factors and every form as a callable (x) -> y."""

    def __init__(self, dtype: torch.dtype, width: int, tokens: int, rank: int, device: str):
        torch.manual_seed(0)
        self.scale, self.rank, self.dtype = 2.0, rank, dtype
        mask = BlockMask(torch.rand(grid((width, width), BLOCK)) > 0.5, (width, width), BLOCK)
        kept_OI = mask.expand(device)
        self.weight = (torch.randn(width, width, device=device) / width**0.5 * kept_OI).to(dtype)
        self.kept_PQ, self.kept_OI = mask.kept_PQ.to(device), kept_OI
        self.x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        self.A = (torch.randn(rank, width, device=device) / width**0.5).requires_grad_()
        self.B = torch.randn(width, rank, device=device).mul_(0.02).requires_grad_()
        self.g = torch.randn(tokens, width, device=device, dtype=dtype)
        base = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        self.peft = PeftLinear(base, "default", LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank).to(device)
        self.peft.lora_A["default"].weight, self.peft.lora_B["default"].weight = (
            nn.Parameter(self.A.detach()),
            nn.Parameter(self.B.detach()),
        )

    def adapted(self, x: Tensor, *, masked: bool = True, form: Form = "beside") -> Tensor:
        kept_PQ = self.kept_PQ if masked else None
        layer = Adapted(self.weight, None, self.A, self.B, kept_PQ, BLOCK, self.scale, form)
        return adapted_linears(x, [layer])[0]

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def plain(self, x: Tensor) -> Tensor:
        return self.peft(x)

    def own_plain(self, x: Tensor) -> Tensor:
        return self.adapted(x, masked=False)

    def factorised(self, x: Tensor) -> Tensor:
        return self.adapted(x)

    def triton(self, x: Tensor) -> Tensor:
        return self.adapted(x, form="kernel")

    def merged(self, x: Tensor) -> Tensor:
        return self.adapted(x, form="merged")

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + masked_product(x, self.A, self.B, self.kept_PQ, BLOCK, self.scale, factorised=False)

    def masked_ba(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight + (self.B @ self.A) * self.kept_OI * self.scale).to(self.dtype))

    def run(self, form: Callable[[Tensor], Tensor]) -> None:
        self.x.grad = self.A.grad = self.B.grad = None
        form(self.x).backward(self.g)

    def error(self, form: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Relative error of the update and of the worst gradient against the dense formula in float64."""
        x, A, B = (t.detach().double().requires_grad_() for t in (self.x, self.A, self.B))
        exact = x @ ((B @ A) * self.kept_OI * self.scale).T
        exact_grads = torch.autograd.grad(exact, (x, A, B), self.g.double())
        y = form(self.x) - F.linear(self.x, self.weight)
        grads = torch.autograd.grad(form(self.x), (self.x, self.A, self.B), self.g)
        base_dx = self.g.double() @ self.weight.double()
        grads = (grads[0].double() - base_dx, *grads[1:])
        worst = max(float((m.double() - e).norm() / e.norm()) for m, e in zip(grads, exact_grads, strict=True))
        return float((y.detach().double() - exact.detach()).norm() / exact.detach().norm()), worst

    def saved_mib(self, form: Callable[[Tensor], Tensor]) -> float:
        """What autograd holds between forward and backward, parameters, mask and input apart."""
        own = {t.untyped_storage().data_ptr() for t in (self.x, self.weight, self.A, self.B, self.kept_PQ, self.kept_OI)}
        own |= {p.untyped_storage().data_ptr() for p in self.peft.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = form(self.x)
        del y
        return sum(kept.values()) / 2**20


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    case: Case, forms: dict[str, Callable[[Tensor], Tensor]], rounds: int, device: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Median ms a form, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for n in range(rounds + 1):
        for name, form in forms.items():
            synchronise(device)
            start = clock()
            case.run(form)
            synchronise(device)
            if n:  # the first round warms up
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shared", action="store_true", help="for a machine with other work: processor time of one thread")
    args = parser.parse_args()
    clock = time.process_time if args.shared else time.perf_counter
    if args.shared:
        torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {'processor time' if args.shared else 'time'}; "
        f"forward + backward of one layer, medians of {args.rounds}\n"
    )
    print("| dtype, width, tokens, rank | base ms | plain LoRA: PEFT's, own ms | factorised ms | triton ms | merged ms | dense ms "
          "| masked BA ms | auto picks | it over PEFT's plain "
          "| saved MiB: plain, own, factorised, masked BA | errors: update, worst gradient |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, width, tokens, rank in QUICK if args.quick else ON_GPU if args.device == "cuda" else CASES:
        dtype = getattr(torch, name)
        case = Case(dtype, width, tokens, rank, args.device)
        forms = {
            "base": case.base,
            "plain": case.plain,
            "own_plain": case.own_plain,
            "factorised": case.factorised,
            "merged": case.merged,
            "dense": case.dense,
            "masked_ba": case.masked_ba,
        }
        if args.device == "cuda":
            forms["triton"] = case.triton
        ms = measure(case, forms, args.rounds, args.device, clock)
        saved = [case.saved_mib(forms[f]) for f in ("plain", "own_plain", "factorised", "masked_ba")]
        error, worst = case.error(case.factorised)
        merges = dtype == torch.float32 and merged_is_cheaper((width, width), tokens)
        factorises = factorised_is_cheaper((width, width), BLOCK, rank, dtype, args.device)
        picks = "merged" if merges else "factorised" if factorises else "dense"
        print(
            f"| {name}, {width}, {tokens}, {rank} | {ms['base']:.1f} | {ms['plain']:.1f}, {ms['own_plain']:.1f} | {ms['factorised']:.1f} "
            f"| {ms.get('triton', math.nan):.1f} | {ms['merged']:.1f} "
            f"| {ms['dense']:.1f} | {ms['masked_ba']:.1f} | {picks} | {ms[picks] / ms['plain']:.2f} "
            f"| {', '.join(f'{m:.1f}' for m in saved)} | {error:.0e}, {worst:.0e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
