"""What the linears of a decoder layer see: hidden states of the calibration text, one layer at a time.

    capture    run the model up to its first decoder layer and keep that layer's inputs; no decoder layer is computed
    norms      run one layer over all windows and sum the squares of each linear's input columns
    grams      the same, and sum all products of input columns, for reconstruction
    advance    run one layer over all windows and put its outputs in place of its inputs

So memory is the hidden states of all windows (tokens x width), one layer's activations for one micro-batch, and one float64
vector (for `grams` a matrix) a distinct input. Called by `pruning/prune.py`.

Layers get their arguments from the model itself: during `capture` every decoder layer is replaced by a stub that notes what the
model passes to it (rotary tables, masks: per layer, since sliding and full attention may alternate) and hands the hidden
states on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import NamedLinear
from lora_dist.log import UserError
from lora_dist.pruning.gram import Alone, Gram, GramSums, Peers, require_seen

MICRO_BATCH_TOKENS = 4096
"""tokens a layer computes at once, or one window if that is longer"""


@dataclass
class _Call:
    """What a model passes to one of its layers, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> _Call:
        return _Call(_to(self.args, device), _to(self.kwargs, device))


def _to(value: Any, device: torch.device) -> Any:
    """Tensors inside nested tuples, lists and dicts, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _to(v, device) for key, v in value.items()}
    return value


@dataclass
class Calibration:
    """Inputs of the next layer to be pruned.

    Attributes:
        hidden: one (B, L, D) tensor a micro-batch, replaced layer by layer.
        calls: what layer `i` gets besides them, by micro-batch size (the last micro-batch may be smaller).
        device: where layers are computed.
        peers: the processes, each of which has a part of the micro-batches.
    """

    device: torch.device
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[dict[int, _Call]] = field(default_factory=list)
    peers: Peers = field(default_factory=Alone)

    @property
    def tokens(self) -> int:
        return sum(h.shape[0] * h.shape[1] for h in self.hidden)

    def twin(self, micro_batches: int | None = None) -> Calibration:
        """The same inputs, or the first micro-batches of this process, to be led through other layers."""
        return Calibration(self.device, self.hidden[:micro_batches], self.calls, self.peers)

    def outputs(self, index: int, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs (B, L, D) of layer `index`, micro-batch by micro-batch."""
        calls = {size: call.to(self.device) for size, call in self.calls[index].items()}
        for hidden in self.hidden:
            call = calls[hidden.shape[0]]
            out = layer(hidden, *call.args, **call.kwargs)
            yield out if isinstance(out, Tensor) else out[0]  # model code older than transformers 5 returns tuples

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of `layer`."""
        for i, out in enumerate(self.outputs(index, layer)):
            self.hidden[i] = out

    @torch.no_grad()
    def norms(self, index: int, layer: nn.Module, linears: list[NamedLinear]) -> dict[str, Tensor]:
        """Collective: ||x_I||_2 of every linear's input columns over all tokens: float32 (I,) by name.

        Raises:
            UserError: if a linear was never run.
        """
        squares = SquareSums(linears, self.device)
        self._watch(squares, index, layer)
        return squares.norms(self.peers)

    @torch.no_grad()
    def grams(self, index: int, layer: nn.Module, linears: list[NamedLinear]) -> dict[str, Gram]:
        """Collective: sums over all tokens of every linear's input and its products, by name; an input that several share is one object.

        Raises:
            UserError: if a linear was never run.
        """
        sums = GramSums(linears, self.device)
        self._watch(sums, index, layer)
        return sums.grams(self.peers)

    def _watch(self, sums: SquareSums | GramSums, index: int, layer: nn.Module) -> None:
        with sums.watching():
            for _ in self.outputs(index, layer):
                sums.next_batch()


class SquareSums:
    """Sums of squares of linears' input columns, in float64; an input shared by several linears is summed once."""

    def __init__(self, linears: list[NamedLinear], device: torch.device):
        self._linears, self._device = linears, device
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        """the newest input and its sums: q, k and v get the same tensor object"""

    def next_batch(self) -> None:
        """Forget the newest input, so that it is neither held nor mistaken for another."""
        self._last = None

    def _add(self, name: str, x: Tensor) -> None:
        if self._last is None or self._last[0] is not x:
            # The norm accumulates in float32 whatever the dtype, and makes no float32 copy of x.
            columns = torch.linalg.vector_norm(x.detach().flatten(0, -2), dim=0, dtype=torch.float32).double().square()
            self._last = (x, columns)
        columns = self._last[1]
        self._sums[name] = self._sums[name] + columns if name in self._sums else columns

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            linear.module.register_forward_pre_hook(lambda _module, args, name=linear.name: self._add(name, args[0]))
            for linear in self._linears
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def norms(self, peers: Peers) -> dict[str, Tensor]:
        """Collective: the roots of the sums of all processes."""
        seen = set().union(*peers.gather(set(self._sums)))
        require_seen([linear.name for linear in self._linears if linear.name not in seen])
        norms = {}
        for linear in self._linears:
            total = self._sums.get(linear.name)
            if total is None or peers.size > 1:  # linears that share an input share the tensor
                zeros = torch.zeros(linear.weight_OI.shape[1], dtype=torch.float64, device=self._device)
                total = zeros if total is None else zeros + total
                peers.add(total)
            norms[linear.name] = total.sqrt().float()
        return norms


class _Stub(nn.Module):
    """Stands in for a decoder layer: notes its arguments, returns the hidden states."""

    def __init__(self, layer: nn.Module, as_tuple: bool):
        super().__init__()
        self._stands_for = [layer]  # in a list, so that it is no submodule
        self._as_tuple = as_tuple
        self.calls: dict[int, _Call] = {}
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models read a property of the layer, such as attention_type
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.hidden = hidden
        self.calls.setdefault(hidden.shape[0], _Call(rest, kwargs))
        return (hidden,) if self._as_tuple else hidden


@contextmanager
def _stubs(layers: nn.ModuleList, as_tuple: bool) -> Iterator[list[_Stub]]:
    """Every layer replaced by a stub, for the length of the `with`."""
    originals = list(layers)
    stubs = [_Stub(layer, as_tuple) for layer in originals]
    try:
        for i, stub in enumerate(stubs):
            layers[i] = stub
        yield stubs
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: nn.ModuleList,
    windows_NL: Tensor,
    *,
    device: torch.device | None = None,
    peers: Peers | None = None,
) -> Calibration:
    """Inputs of the first decoder layer for all calibration windows, or for this process's part of them.

    Args:
        model: the whole model, in eval mode; computed on its own device.
        layers: its decoder layers, as they are in the model.
        windows_NL: int64 (N, L): N windows of L tokens, no padding.
        device: where the hidden states are kept and layers will be computed; default: the model's.
        peers: the processes that calibrate together; each takes every `size`-th micro-batch, so that these are what one process has.

    Returns:
        The hidden states and each layer's other arguments.

    Raises:
        UserError: a model whose layers return more than hidden states, such as DeBERTa.
    """
    own = next(model.parameters()).device
    calibration = Calibration(device or own, peers=peers or Alone())
    batch = max(1, MICRO_BATCH_TOKENS // windows_NL.shape[1])
    as_tuple = _returns_tuples(model, layers, windows_NL[:1, :2].to(own))
    with _stubs(layers, as_tuple) as stubs:
        for ids in windows_NL.split(batch)[calibration.peers.rank :: calibration.peers.size]:
            try:
                _base(model)(input_ids=ids.to(own), use_cache=False)  # without lm_head: nobody reads the logits
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"score: found wanda, but {type(model).__name__} cannot be calibrated layer by layer (its code wants more of a layer than "
                    "hidden states), expected magnitude"
                ) from error
            hidden = stubs[0].hidden
            assert hidden is not None
            calibration.hidden.append(hidden.to(calibration.device))
        calibration.calls = [stub.calls for stub in stubs]
    return calibration


def _base(model: nn.Module) -> nn.Module:
    """The model without its language-model head (transformers' `base_model`; a model without one is its own)."""
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return base


def _returns_tuples(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> bool:
    """Whether the model's code takes the first item of what a layer returns (as before transformers 5), found by trying."""
    with _stubs(layers, as_tuple=True) as stubs:
        try:
            _base(model)(input_ids=ids, use_cache=False)
        except (TypeError, AttributeError, RuntimeError, ValueError):
            return False
        return isinstance(stubs[-1].hidden, Tensor)
