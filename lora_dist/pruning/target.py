"""What reconstruction aims at where that is the dense model: its linears' outputs, and its residual stream.

    T = y_dense                      for a linear inside a branch (queries, gates, ...)
    T = y + (h_dense - h)            for one whose output is added to the residual stream: its share of what the stream has lost by then

y is the linear's output and h the stream behind it, in the layer that is being pruned, fed by the pruned prefix; y_dense and h_dense are
those of the dense layer fed by the dense prefix, on the same tokens. The linears of a layer are solved stage by stage (those that share an
input are one stage), so that each sees what the ones before it have become.

The stream behind a stage is the layer's output with the outputs of all later linears set to zero. Whether a linear adds to it is found by
trying, not by names: a shift of its output has to shift the stream by exactly as much. With norms behind the branches (Gemma 2) or behind
the sum (BERT) it does not, and such linears aim at y_dense.

Called by `prune.py`. Shapes: T tokens, O/I out/in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import NamedLinear, find_linears
from lora_dist.log import UserError
from lora_dist.pruning.calibration import Calibration
from lora_dist.pruning.gram import Gram, Peers, product, require_seen

SHIFT_TOLERANCE = 0.05
"""of a shift that comes out of the layer; half precision rounds it, a norm behind it changes it altogether"""


@dataclass
class Target:
    """Sums over all tokens of what one linear is to put out, t (O,), and of what it sees, x (I,).

    Attributes:
        cross_OI: float64, sum of t x^T.
        sum_O: float64, sum of t.
        squares_O: float64, sum of t^2.
    """

    cross_OI: Tensor
    sum_O: Tensor
    squares_O: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> Target:
        zeros = torch.zeros(shape[1] + 2, shape[0], dtype=torch.float64, device=device)
        return cls(zeros[2:].T, zeros[0], zeros[1])

    def add(self, target_TO: Tensor, x_TI: Tensor) -> None:
        self.cross_OI += product(target_TO, x_TI)
        self.sum_O += target_TO.sum(0, dtype=torch.float64)
        self.squares_O += target_TO.double().square().sum(0)

    def gather(self, peers: Peers) -> None:
        """Collective: the sums of all processes."""
        if peers.size > 1:
            for part in (self.cross_OI.T, self.sum_O, self.squares_O):
                peers.add(part)


class DenseModel:
    """The dense model beside the one that is being pruned, as far as the layer that is next."""

    def __init__(self, calibration: Calibration):
        self._pruned = calibration
        self._dense = calibration.twin()

    def advance(self, index: int, dense: nn.Module) -> None:
        """Replace the dense hidden states by the outputs of the dense layer."""
        self._dense.advance(index, dense)

    @torch.no_grad()
    def stages(self, index: int, dense: nn.Module, linears: Sequence[NamedLinear]) -> list[list[NamedLinear]]:
        """Collective: linears in the order in which they are run, those that share an input together: [[q, k, v], [o], [gate, up], [down]].

        Raises:
            UserError: if a linear was never run.
        """
        names: list[list[str]] = []
        last: Tensor | None = None

        def note(name: str, x: Tensor) -> None:
            nonlocal last
            if not any(name in stage for stage in names):
                if x is not last:
                    names.append([])
                names[-1].append(name)
            last = x

        twins = _twins(linears, dense)
        hooks = [m.register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0])) for name, m in twins.items()]
        try:
            for _ in self._dense.outputs(index, dense):
                last = None
                if sum(map(len, names)) == len(linears):
                    break
        finally:
            for hook in hooks:
                hook.remove()
        for theirs in self._pruned.peers.gather(names):
            seen = {name for stage in names for name in stage}
            names += [rest for stage in theirs if (rest := [name for name in stage if name not in seen])]
        names = self._pruned.peers.gather(names)[0]
        by_name = {linear.name: linear for linear in linears}
        require_seen([name for name in by_name if not any(name in stage for stage in names)])
        return [[by_name[name] for name in stage] for stage in names]

    @torch.no_grad()
    def aims(
        self, index: int, layer: nn.Module, dense: nn.Module, stages: list[list[NamedLinear]], number: int
    ) -> tuple[Gram, dict[str, Target]]:
        """Collective: what a stage sees, and what each of its linears is to put out, summed over all tokens.

        Args:
            index: the layer's.
            layer: in which all stages before this one are pruned and solved.
            dense: a copy of it as it was.
            stages: from `stages`.
            number: of the stage.

        Raises:
            UserError: a linear that sees other tokens in the dense model than in the pruned one.
        """
        stage = stages[number]
        later = [linear for rest in stages[number + 1 :] for linear in rest]
        adds = self.adds_to_stream(index, dense, stage, later)
        device = self._pruned.device
        gram = Gram.empty(stage[0].weight_OI.shape[1], device)
        shapes = {linear.name: linear.weight_OI.shape for linear in stage}
        targets = {name: Target.empty((shape[0], shape[1]), device) for name, shape in shapes.items()}
        with ExitStack() as stack:
            seen = stack.enter_context(_watched(_twins(stage, layer), _twins(later, layer)))
            wanted = stack.enter_context(_watched(_twins(stage, dense), _twins(later, dense)))
            streams = zip(self._pruned.outputs(index, layer), self._dense.outputs(index, dense), strict=True)
            for stream, dense_stream in streams:
                lost = (dense_stream.float() - stream.float()).flatten(0, -2) if adds else None
                for name in seen.reached(wanted):
                    aim_TO = wanted.outputs[name] if lost is None else seen.outputs[name].float() + lost
                    targets[name].add(aim_TO, seen.inputs[name])
                if stage[0].name in seen.inputs:
                    gram.add(seen.inputs[stage[0].name])
                seen.clear()
                wanted.clear()
        gram.gather(self._pruned.peers)
        for target in targets.values():
            target.gather(self._pruned.peers)
        return gram, targets

    def adds_to_stream(self, index: int, dense: nn.Module, stage: list[NamedLinear], later: list[NamedLinear]) -> bool:
        """Collective: whether a stage is one linear, whose output is added to the residual stream as it is."""
        found = False
        if len(stage) == 1 and self._dense.hidden and stage[0].weight_OI.shape[0] == self._dense.hidden[0].shape[-1]:
            module = _twins(stage, dense)[stage[0].name]
            with _watched({}, _twins(later, dense)):
                plain = next(self._dense.outputs(index, dense)).float()
                size = plain.std()
                shift = size * torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)).to(plain)
                hook = module.register_forward_hook(lambda _m, _args, out: out + shift.to(out.dtype))
                try:
                    moved = next(self._dense.outputs(index, dense)).float() - plain
                finally:
                    hook.remove()
            found = bool((moved - shift).square().mean().sqrt() <= SHIFT_TOLERANCE * size)  # waits for the device
        return self._pruned.peers.gather(found)[0]


def _twins(linears: Sequence[NamedLinear], layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of the same places in another copy of the layer, by the linears' names."""
    if not linears:
        return {}
    inside = {linear.name: linear.module for linear in find_linears(layer)}
    found = {}
    for linear in linears:
        # Names here are full (`model.layers.0.mlp.up_proj`); inside the layer only their end is known.
        place = max((name for name in inside if linear.name.endswith(f".{name}")), key=len)
        found[linear.name] = inside[place]
    return found


class _Seen:
    """Newest inputs and outputs of linears by name, as (tokens, features)."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, out: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0].flatten(0, -2), out.flatten(0, -2)

        return note

    def reached(self, other: _Seen) -> list[str]:
        """Names of the linears that were run.

        Raises:
            UserError: one of them saw other tokens in the other copy of the layer.
        """
        for name in self.outputs.keys() | other.outputs.keys():
            mine, theirs = (one.outputs[name].shape if name in one.outputs else (0,) for one in (self, other))
            if mine != theirs:
                raise UserError(
                    f"layer {name}: sees {mine[0]} tokens behind pruned layers and {theirs[0]} in the dense model (a routed expert?), so the "
                    "dense model's outputs are no target for it; set target same"
                )
        return list(self.outputs)

    def clear(self) -> None:
        self.inputs.clear()
        self.outputs.clear()


@contextmanager
def _watched(linears: dict[str, nn.Module], silent: dict[str, nn.Module]) -> Iterator[_Seen]:
    """Note what these linears see and put out; the silent ones put out zeros."""
    seen = _Seen()
    hooks = [module.register_forward_hook(seen.hook(name)) for name, module in linears.items()]
    hooks += [module.register_forward_hook(lambda _m, _args, out: torch.zeros_like(out)) for module in silent.values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
