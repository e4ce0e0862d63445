"""What one training step allocates: the real forward and backward pass of the real model, on the meta device, every tensor counted.

No formula of an architecture is needed: layers, adapters and losses are those that training runs, so what they save for the backward
pass and what they need on the way is seen as it is. Things that the meta device does otherwise than a CPU or a GPU are put right:
attention takes the memory of torch's fused kernels (no T x T), dropout keeps what the device's own does, and questions about values
(is anything padded? which labels count? all) are answered beforehand. Called by `rehearse.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_dist import gemm

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_CODE_BYTES = 650_000
"""oneDNN on a CPU writes a kernel for every shape of a bfloat16 product, and keeps it (docs/plan.md)"""
_PACKED_BYTES = 6 * 2**20
"""what a thread of MKL keeps to copy the operands of its products into; measured, 1 to 6 MiB (docs/plan.md)"""

Phase = Literal["layers", "head"]
"""layers: anything up to the last layer's output, and its backward pass; head: what stands on it, logits and loss"""


@dataclass(frozen=True)
class Peak:
    """Bytes that live at the moment when most do."""

    total: int = 0
    logits: int = 0
    """of them, tensors as wide as the vocabulary"""
    gathered: int = 0
    """of them, parameters that are whole for the moment"""


class _Count:
    """Bytes that live now, and the peak of every phase under every way of gathering.

    Args:
        ways: names.
    """

    def __init__(self, ways: Iterable[str]):
        self.live = self.logits = 0
        self.gathered = dict.fromkeys(ways, 0)
        self.phase: Phase = "layers"
        self.peaks: dict[str, dict[Phase, Peak]] = {way: {"layers": Peak(), "head": Peak()} for way in self.gathered}

    def note(self) -> None:
        for way, gathered in self.gathered.items():
            peaks = self.peaks[way]
            if self.live + gathered > peaks[self.phase].total:
                peaks[self.phase] = Peak(self.live + gathered, self.logits, gathered)


class _Allocations(TorchDispatchMode):
    """Counts the storages of what operations return, until they are freed.

    Args:
        known: tensors that live already.
        answer: to every question about a value.
        cuda: no products of a CPU.
    """

    def __init__(self, count: _Count, known: Iterable[Tensor], vocabulary: int, answer: bool, cuda: bool):
        super().__init__()
        self._cuda, self._kernels = cuda, set[Any]()
        self._count, self._vocabulary, self._answer = count, vocabulary, answer
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer
        if func in _PRODUCTS and not self._cuda:
            self._note_kernel(*args[-2:])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor)
        return result

    def _note_kernel(self, a: Tensor, b: Tensor) -> None:
        """What a CPU's libraries keep from the first product (of a kind) on."""
        if b.dtype == torch.bfloat16 and b.dtype not in gemm.EMULATED:
            kernel: Any = tuple((each.shape, each.stride()) for each in (a, b))
            size = _CODE_BYTES
        else:
            kernel, size = b.dtype, _PACKED_BYTES
        if kernel not in self._kernels:
            self._kernels.add(kernel)
            self._count.live += size

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        wide = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size, wide))
        self._count.live += size
        self._count.logits += size if wide else 0
        self._count.note()

    def _drop(self, key: int, size: int, wide: bool) -> None:
        del self._alive[key]
        self._count.live -= size
        self._count.logits -= size if wide else 0


class _Attention(torch.autograd.Function):
    """What torch's fused kernels keep: inputs, output and one number a row of scores."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
        B, H, L, _ = q_BHLD.shape
        out = torch.empty((B, L, H, v_BGLD.shape[-1]), dtype=q_BHLD.dtype, device="meta").transpose(1, 2)
        logsumexp_BHL = torch.empty((B, H, L), dtype=torch.float32, device="meta")
        added = None if mask is None else torch.empty(mask.shape, dtype=q_BHLD.dtype, device="meta")
        ctx.save_for_backward(q_BHLD, k_BGLD, v_BGLD, out, logsumexp_BHL, added)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _FusedDropout(torch.autograd.Function):
    """A GPU's dropout keeps one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device="meta"))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


class _SavingLinear(torch.autograd.Function):
    """DeepSpeed's linear in stage 3: keeps its input as well, also where the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        product = x @ weight_OI.t()
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        g, flat = gradients[0], gradients[0].reshape(-1, gradients[0].shape[-1])
        return (
            g @ weight_OI if need_x else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            flat.sum(0) if need_bias else None,
        )


class _GroupedProduct(torch.autograd.Function):
    """Products of a mixture's experts, each with its own rows, which the meta device has in bfloat16 alone. Rows are kept for the gradient
    of the weights only."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight_EIO)
        ctx.rows, ctx.dtype = x_TI.shape, x_TI.dtype
        return torch.empty((x_TI.shape[0], weight_EIO.shape[-1]), dtype=x_TI.dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight = ctx.needs_input_grad
        dx = torch.empty(ctx.rows, dtype=ctx.dtype, device="meta") if need_x else None
        return dx, torch.empty_like(ctx.saved_tensors[1]) if need_weight else None


_GROUPED = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}


class DeviceKernels(TorchFunctionMode):
    """Puts those above in the place of what the meta device would do.

    Args:
        cuda: a GPU's dropout, else a CPU's.
        saving_linear: DeepSpeed's linear, of stage 3.
    """

    def __init__(self, cuda: bool, saving_linear: bool = False):
        super().__init__()
        self.cuda, self._saving_linear = cuda, saving_linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)) | kwargs
            if self.cuda or not given.get("dropout_p"):  # on CPUs, dropout of scores is done on all T x T of them, as on meta
                return _Attention.apply(given["query"], given["key"], given["value"], given.get("attn_mask"))
        if func in _GROUPED:
            return _GroupedProduct.apply(*args[:2])
        if func is Tensor.nonzero:
            return torch.empty((args[0].numel(), args[0].ndim), dtype=torch.long, device="meta")
        if func is torch.softmax and "out" in kwargs and kwargs.get("dtype", args[0].dtype) != args[0].dtype:
            if not (
                self.cuda and args[0].dtype == torch.float16
            ):  # else the whole input is made anew in the other precision first
                return func(args[0].to(kwargs["dtype"]), *args[1:], **kwargs)
        if func is F.linear and self._saving_linear:
            x, weight, *bias = args
            return _SavingLinear.apply(x, weight, bias[0] if bias else kwargs.get("bias"))
        if func is F.dropout and self.cuda:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            if given.get("training", True) and given.get("p", 0.5) > 0:
                return _FusedDropout.apply(given["input"])
            return given["input"]
        return func(*args, **kwargs)


class _Gathering:
    """Adds the bytes of a module's parameters for as long as a sharded strategy holds them whole: through its forward pass, and from the
    gradient of its output to that of its input. What a checkpointed layer gathers to compute again stays until then: `fully_shard` does
    not cut it again, and under zero3 what checkpointing saves for the backward pass holds the whole weights.

    Args:
        way: its name.
        sizes: bytes by module.
    """

    def __init__(self, count: _Count, way: str, sizes: dict[nn.Module, int]):
        self._count, self._way, self._sizes = count, way, sizes
        self._held: set[nn.Module] = set()
        self.backward = False

    def hooks(self) -> Iterator[Any]:
        for module in self._sizes:
            yield module.register_forward_pre_hook(self._enter)
            yield module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hold(module)
        if not self.backward and inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self._let_go(module))

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.backward:
            return
        self._let_go(module)
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda _: self._hold(module))

    def _hold(self, module: nn.Module) -> None:
        if module not in self._held:
            self._held.add(module)
            self._count.gathered[self._way] += self._sizes[module]
            self._count.note()

    def _let_go(self, module: nn.Module) -> None:
        if module in self._held:
            self._held.remove(module)
            self._count.gathered[self._way] -= self._sizes[module]


class _Phases:
    """Says which phase it is, by the last layer's forward and backward pass."""

    def __init__(self, count: _Count):
        self._count, self.backward = count, False

    def hooks(self, layers: list[nn.Module]) -> Iterator[Any]:
        yield layers[-1].register_forward_hook(self._after)

    def _after(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.backward:
            return
        self._count.phase = "head"
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(self._back)

    def _back(self, _gradient: Tensor) -> None:
        self._count.phase = "layers"


def trace(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    layers: list[nn.Module],
    vocabulary: int,
    train: bool,
    padded: bool,
    kernels: DeviceKernels,
    gathered: Mapping[str, dict[nn.Module, int]],
) -> dict[str, dict[Phase, Peak]]:
    """Peaks of one forward pass, and backward pass in training, of a model on the meta device; by way of gathering and phase.

    Args:
        loss: the forward pass, on inputs made beforehand.
        layers: the repeated ones.
        padded: whether rows have padding, or several examples: what attention masks are made for.
        gathered: by name of a way, bytes by module that a sharded strategy makes whole when it is its turn; none of them is one too.
    """
    count = _Count(gathered)
    gatherings = [_Gathering(count, way, sizes) for way, sizes in gathered.items()]
    phases = _Phases(count)
    # Gradients lie in buffers of their own: what is added to them is freed at once.
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    known = [t for p in model.parameters() for t in (p, p.grad) if t is not None] + list(model.buffers())
    hooks = [*(hook for each in gatherings for hook in each.hooks()), *phases.hooks(layers)]
    with _hooked(hooks), torch.set_grad_enabled(train), kernels, gemm.meta_is("cuda" if kernels.cuda else "cpu"):
        # Autograd works in this thread, where these modes are in force.
        with torch.autograd.set_multithreading_enabled(False), _Allocations(count, known, vocabulary, not padded, kernels.cuda):
            total = loss()
            if train:
                phases.backward = True
                for each in gatherings:
                    each.backward = True
                (total / 2.0).backward()
    return count.peaks


@torch.no_grad()
def gives_out_as_computed(model: Any, head: nn.Module, kernels: DeviceKernels) -> bool:
    """Whether a model's logits are what its head gave, with nothing done to them behind it; the model is on the meta device."""
    computed: list[Tensor] = []
    ids_BL = torch.zeros((1, 2), dtype=torch.long, device="meta")
    with _hooked([head.register_forward_hook(lambda _module, _inputs, output: computed.append(output))]):
        with kernels, _Allocations(_Count([]), [], 0, True, True):
            logits = model(input_ids=ids_BL, use_cache=False).logits
    return logits is computed[0]


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
