"""The kernel for GPUs: its numbers by Triton's interpreter on the CPU, and that it compiles for a GPU that is not here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which torch brings with CUDA only: pip install triton")

from lora_dist.adapter import masked_product, tiles  # noqa: E402
from lora_dist.adapter.layer import is_factorised, is_fused  # noqa: E402
from lora_dist.adapter.linear import Adapted, adapted_linears  # noqa: E402
from lora_dist.blocks import BlockMask, grid  # noqa: E402

NAME = "lora_dist.adapter.kernel"


def imported(interpret: bool) -> Iterator[ModuleType]:
    """The kernel's module, for the interpreter or the compiler: it is what it is from its import on."""
    before, module = triton.knobs.runtime.interpret, sys.modules.pop(NAME, None)
    triton.knobs.runtime.interpret = interpret
    try:
        yield importlib.import_module(NAME)
    finally:
        triton.knobs.runtime.interpret = before
        sys.modules.pop(NAME)
        if module is not None:
            sys.modules[NAME] = module


@pytest.fixture
def interpreted() -> Iterator[ModuleType]:
    yield from imported(True)


@pytest.fixture
def compiled() -> Iterator[ModuleType]:
    yield from imported(False)


def case(shape, block, rank, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    O, I = shape
    mask = BlockMask(torch.rand(grid(shape, block), generator=generator) > 0.5, shape, block)
    x, g, W = (torch.randn(*size, generator=generator).to(dtype) for size in ((tokens, I), (tokens, O), (O, I)))
    A, B = (torch.randn(*size, generator=generator).mul_(0.3) for size in ((rank, I), (O, rank)))
    return x, g, W, A, B, mask


CASES = [
    ((160, 96), 16, 16, 70),  # a last piece of tokens that is not full
    ((96, 160), 16, 5, 16),  # a rank to fill up
    ((32, 1040), 16, 16, 33),  # more block columns than one step takes, and a last step that is not full
    ((1040, 32), 16, 32, 33),  # more block rows than a program has
    ((64, 128), 32, 16, 20),
    ((128, 64), 64, 64, 20),
]


@pytest.mark.parametrize("shape,block,rank,tokens", CASES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_output_and_gradients_are_those_of_the_other_forms(shape, block, rank, tokens, dtype, tolerance, interpreted):
    x, g, W, A, B, mask = case(shape, block, rank, tokens, dtype)
    found = {}
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        alone = masked_product(*leaves, mask.kept_PQ, block, 0.7, factorised=True, fused=fused)
        form = "kernel" if fused else "beside"
        (y,) = adapted_linears(leaves[0], [Adapted(W, None, *leaves[1:], mask.kept_PQ, block, 0.7, form)])
        found[fused] = [alone, y, *torch.autograd.grad(alone, leaves, g), *torch.autograd.grad(y, leaves, g)]
    for mine, other in zip(found[True], found[False], strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert float((mine.double() - other.double()).norm() / other.double().norm()) < tolerance
    exact = x.double() @ ((B.double() @ A.double()) * mask.expand() * 0.7).T
    assert float((found[True][0].double() - exact).norm() / exact.norm()) < tolerance


def test_sums_over_tokens_are_the_same_each_time(interpreted, monkeypatch):
    """In two programs and more: no atomic additions."""
    monkeypatch.setattr(interpreted, "_PROGRAMS", 3)
    x, g, _, A, B, mask = case((64, 64), 16, 16, 150, torch.float32)
    found = []
    for _ in range(2):
        found.append(tiles.update_gradients(g, x, A, B, mask.kept_PQ, 16, 1.0, None, fused=True))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    reference = tiles.update_gradients(g, x, A, B, mask.kept_PQ, 16, 1.0, None)
    for mine, other in zip(found[0], reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_what_has_no_kernel():
    assert tiles.kernel_fits(16, 1) and tiles.kernel_fits(64, 64)
    assert not tiles.kernel_fits(8, 16) and not tiles.kernel_fits(16, 65)
    x, *_, mask = case((32, 32), 16, 16, 4, torch.float32)
    assert not is_fused("triton", mask, 16, x) and is_factorised("triton", mask, 16, x)  # evaluated on a CPU


@pytest.mark.parametrize("rank,block", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("output,gradient", [(True, False), (True, True), (False, True)])
def test_it_compiles_for_a_gpu(rank, block, output, gradient, compiled):
    """bf16 on a GPU of compute capability 9.0, to machine code; products are on the tensor cores."""
    kernel = compiled.masked_update_kernel
    constants = {**compiled.settings(rank), "R": rank, "b": block, "HAS_Y": output, "HAS_GRADIENT": gradient}
    kinds = {"mask_ptr": "*u8", "dh_ptr": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*bf16") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, {})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": compiled.WARPS})
    assert len(made.asm["cubin"]) > 0 and "mma" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024  # what a multiprocessor of such a GPU has for a program
