#!/usr/bin/env python
"""Time and memory of pruning with reconstruction at the shapes of a large model, from the pieces of one matrix, measured.

    python scripts/measure_reconstruction.py                       # 4096 x 4096, half of the 16x16 tiles kept
    python scripts/measure_reconstruction.py --device cuda --batch 8

Three pieces are run at full width: the products of inputs of some tokens, the solves of some block rows, and one removal of the obs
score for some block rows. What a whole model of Llama-2-7B's shape takes is then counted from these, in operations of each kind. CPU times
are the process's own (so other work on the machine matters little), on as many threads as torch has; GPU times are the clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lora_dist.blocks import BlockMask
from lora_dist.pruning import Gram, reconstruct, removals

LAYERS, WIDTH, INNER = 32, 4096, 11008
LINEARS = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
INPUTS = [WIDTH, WIDTH, WIDTH, INNER]
"""q k v share one, gate and up another"""
TOKENS = 128 * 2048
GIB = 2**30


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the second call."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def problem(features: int, rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Gram, Tensor]:
    """Weight of some rows, sums over more tokens than features, and a micro-batch of inputs."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(tokens, features, generator=generator).to(device)
    gram = Gram.empty(features, device)
    gram.add(x_TI)
    gram.products_II.diagonal().add_(float(tokens))
    return torch.randn(rows, features, generator=generator).to(device), gram, x_TI


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=WIDTH, help="width of the measured input (default 4096)")
    parser.add_argument("--tokens", type=int, default=512, help="of the measured products (default 512)")
    parser.add_argument("--batch", type=int, default=1, help="block rows of the measured solves and removals (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    device, I, block = torch.device(args.device), args.features, 16
    weight_OI, gram, x_TI = problem(I, args.batch * block, args.tokens, device)
    kept_PQ = torch.rand(args.batch, I // block, generator=torch.Generator().manual_seed(1)).argsort(1) < I // block // 2
    mask = BlockMask(kept_PQ, (len(weight_OI), I), block)
    products_s = timed(device, lambda: Gram.empty(I, device).add(x_TI))
    solve_s = timed(device, lambda: reconstruct(weight_OI, mask, gram))
    prepare_s = timed(device, lambda: removals(weight_OI, gram.products_II, block, most=0))
    removal_s = timed(device, lambda: removals(weight_OI, gram.products_II, block, most=2)) - prepare_s
    peak = f", peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if device.type == "cuda" else ""
    rates = {
        "products": 2 * args.tokens * I**2 / products_s,
        "solves": args.batch * (I / 2) ** 3 / 3 / solve_s,
        "removals": args.batch * 2 * 2 * block * I**2 / removal_s,
    }
    print(f"{args.device}, {torch.get_num_threads()} threads, width {I}{peak}")
    print(f"  products of {args.tokens} tokens: {products_s:.2f} s ({rates['products'] / 1e9:.1f} GFLOP/s)")
    print(
        f"  {args.batch} block rows solved, half of the tiles kept: {solve_s:.2f} s, errors included ({rates['solves'] / 1e9:.1f} GFLOP/s)"
    )
    print(f"  2 removals from {args.batch} block rows: {removal_s:.2f} s ({rates['removals'] / 1e9:.1f} GFLOP/s)")
    report(rates)
    return 0


def report(rates: dict[str, float]) -> None:
    """The whole model, counted."""
    products = LAYERS * sum(2 * TOKENS * I**2 for I in INPUTS)
    crosses = LAYERS * sum(2 * TOKENS * O * I for O, I in LINEARS)
    solves = LAYERS * sum(O / 16 * (I / 2) ** 3 / 3 for O, I in LINEARS)
    # Removal m of a row of Q tiles touches (Q - m)^2 of the Q^2 tiles of its inverse, in steps of a quarter: about 0.4 Q at full width.
    greedy = LAYERS * sum(0.4 * (I / 16) * 2 * 16 * I**2 * (O / 16) for O, I in LINEARS)
    print(f"Llama-2-7B's shape, {TOKENS:,} calibration tokens, one process:")
    for name, operations, rate in (
        ("products of inputs (target same)", products, rates["products"]),
        ("and of targets (target dense)", crosses, rates["products"]),
        ("solves, half of the tiles kept", solves, rates["solves"]),
        ("removals, score obs", greedy, rates["removals"]),
    ):
        print(f"  {name}: {operations:.1e} operations, {operations / rate / 3600:.2f} h at the measured rate")
    sums, workspace = 8 * INNER**2, 3 * 8 * (INNER / 2) ** 2
    print(
        f"  memory beside one layer and the hidden states: {sums / GIB:.2f} GiB for the widest input's sums, "
        f"{max(1.0, workspace / GIB):.2f} GiB to factorise in; score obs {3 * 8 * INNER**2 / GIB:.2f} GiB for the widest block row; "
        f"target dense {8 * WIDTH * INNER / GIB:.2f} GiB a target"
    )


if __name__ == "__main__":
    raise SystemExit(main())
