"""Kept weights that are best for what a linear saw: exact least squares, one solve for all rows that keep the same columns.

    minimise  ||V X - T||^2 + c ||V - W||^2   over V that is zero where the mask prunes
    W'_S = W_S + R_S (H_SS + c 1)^-1,   R = T X^T - W0 H,   W0 = W where kept, else 0

H = X^T X over the calibration tokens, S the kept columns, c = damping times the mean of H's diagonal. The target T is W X itself, or comes
with its own sums (`target.py`). For T = W X the second line is W H_S (H_SS)^-1 with the damped H, written as a step from W0, which loses
fewer digits. A linear with a bias is solved for inputs and targets less their means, and its bias follows: b' = mean of T - W' mean of X.

All `b` rows of a block row keep the same columns. Block rows that keep equally many are factorised as one batch; each process takes its
part of them. In float32 a batch whose solution does not fulfil its equations is solved again in float64.

Whatever was asked for, what is written is never worse on these inputs than the weights left alone: the error of each block row is
computed for the weights as rounded, without damping, and a row that gained nothing stays as it was.

Shapes: O/I out/in features, G row groups (block rows; single rows for element masks) of `height` rows, n kept columns, B batch.
Source: the same problem row by row in SparseGPT (arXiv:2301.00774, section 3.1). Called by `prune.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dist.blocks import Mask
from lora_dist.pruning.gram import Alone, Gram, Peers
from lora_dist.pruning.target import Target

WORKSPACE_BYTES = 2**30
"""of the matrices that are factorised at once"""
MAX_RESIDUAL = 1e-3
"""what a float32 solution may leave of its right side; rounding leaves about 1e-6 times the root of the condition"""


@dataclass(frozen=True)
class Solved:
    """One linear, reconstructed.

    Attributes:
        weight_OI: in the dtype of the weight; exactly +0.0 where pruned.
        bias_O: None where there is none.
        error_before, error_after: ||V X - T||^2 over ||T||^2 of the weights left alone and as returned, biases included; of linears with a
            bias, ||T||^2 is what varies about the mean.
        rows_kept_alone: rows left as they were, because solving gained nothing.
        solved_again: row groups that float32 could not solve.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    error_before: float
    error_after: float
    rows_kept_alone: int
    solved_again: int


def row_groups(mask: Mask, device: torch.device) -> tuple[Tensor, int]:
    """Bool (G, I): the kept columns of each group of `height` rows that share them; and that height."""
    kept_OI = mask.expand(device)
    return kept_OI[:: mask.block], mask.block


@torch.no_grad()
def reconstruct(
    weight_OI: Tensor,
    mask: Mask,
    gram: Gram,
    *,
    target: Target | None = None,
    bias_O: Tensor | None = None,
    damping: float = 0.01,
    dtype: torch.dtype | None = None,
    peers: Peers | None = None,
) -> Solved:
    """Collective: the kept weights of one linear, solved.

    Args:
        weight_OI: (O, I), before pruning; any float dtype, which the result is rounded to once.
        mask: of whole tiles or of elements.
        gram: of its inputs, on the device to compute on.
        target: of its outputs, biases included; None: what the linear puts out now.
        bias_O: where the linear has one; it follows then.
        damping: share of the mean of H's diagonal that is added to it.
        dtype: of the factorisations; default: float32 on GPUs, float64 on CPUs.

    Returns:
        New weights and bias, and their errors on the calibration inputs. The arguments stay as they are.
    """
    peers = peers or Alone()
    device = gram.products_II.device
    dtype = dtype or (torch.float32 if device.type == "cuda" else torch.float64)
    fit = Fit.of(weight_OI, gram, target, bias_O, damping)
    kept_GI, height = row_groups(mask, device)
    problem = _Problem(fit, kept_GI, height)
    step_OI, again = problem.steps(dtype, peers)
    rounded_OI = (problem.alone_OI + step_OI).to(weight_OI.dtype).double()
    bias = fit.bias_O
    new_bias = None if bias_O is None else fit.best_bias(rounded_OI).to(bias_O.dtype).double()
    before_O, after_O = fit.errors(problem.alone_OI, bias), fit.errors(rounded_OI, new_bias)
    better_O = _by_group(after_O, height) < _by_group(before_O, height)
    weight = torch.where(better_O[:, None], rounded_OI, problem.alone_OI).to(weight_OI.dtype)
    total = float(fit.squares_O.sum().clamp_min(1e-300))
    untouched_O = problem.solvable.logical_not().repeat_interleave(height)[: len(weight)]
    return Solved(
        weight.masked_fill_(~mask.expand(device), 0.0),
        None if bias_O is None or new_bias is None else torch.where(better_O, new_bias, bias).to(bias_O.dtype),  # type: ignore[arg-type]
        float(before_O.sum()) / total,
        float(torch.where(better_O, after_O, before_O).sum()) / total,
        int((~better_O & ~untouched_O).sum()),
        again,
    )


def _by_group(values_O: Tensor, height: int) -> Tensor:
    """(O,): each row gets the sum over its group."""
    groups = torch.nn.functional.pad(values_O, (0, -len(values_O) % height)).view(-1, height).sum(1)
    return groups.repeat_interleave(height)[: len(values_O)]


@dataclass
class Fit:
    """The least-squares problem of one linear without a mask, in float64; about the means where there is a bias.

    Attributes:
        weight_OI: W.
        products_II: H.
        gap_OI: T X^T - W H; None where T = W X.
        floor_O: ||W X - T||^2 of each row.
        squares_O: ||T||^2 of each row.
        added: c.
        bias_O, mean_O, mean_I, tokens: for the bias; means of targets and inputs. `bias_O` is None where there is none.
    """

    weight_OI: Tensor
    products_II: Tensor
    gap_OI: Tensor | None
    floor_O: Tensor
    squares_O: Tensor
    added: float
    bias_O: Tensor | None
    mean_O: Tensor
    mean_I: Tensor
    tokens: float

    @classmethod
    def of(cls, weight_OI: Tensor, gram: Gram, target: Target | None, bias_O: Tensor | None, damping: float) -> Fit:
        """Arguments as of `reconstruct`."""
        about = gram if bias_O is None else gram.centred()
        H = about.products_II
        W = weight_OI.to(H.device, torch.float64)
        bias = None if bias_O is None else bias_O.to(H.device, torch.float64)
        products_OI = W @ H
        energy_O = (products_OI * W).sum(1).clamp_min(0)
        added = damping * float(H.diagonal().mean())
        if target is None:
            mean_O = W @ gram.mean_I + (0 if bias is None else bias)
            return cls(W, H, None, torch.zeros_like(energy_O), energy_O, added, bias, mean_O, gram.mean_I, gram.tokens)
        mean_O = target.sum_O / gram.tokens
        cross_OI, squares_O = target.cross_OI, target.squares_O
        if bias is not None:
            cross_OI = cross_OI.addr(target.sum_O, gram.mean_I, alpha=-1)
            squares_O = (squares_O - gram.tokens * mean_O.square()).clamp_min(0)
        floor_O = (squares_O - 2 * (cross_OI * W).sum(1) + energy_O).clamp_min(0)
        return cls(W, H, cross_OI - products_OI, floor_O, squares_O, added, bias, mean_O, gram.mean_I, gram.tokens)

    def best_bias(self, trial_OI: Tensor) -> Tensor:
        return self.mean_O - trial_OI @ self.mean_I

    def errors(self, trial_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """||V X + b - T||^2 of each row, without damping."""
        off_OI = trial_OI - self.weight_OI
        errors_O = self.floor_O + ((off_OI @ self.products_II) * off_OI).sum(1)
        if self.gap_OI is not None:
            errors_O -= 2 * (self.gap_OI * off_OI).sum(1)
        if bias_O is not None:
            errors_O += self.tokens * (bias_O - self.best_bias(trial_OI)).square()
        return errors_O.clamp_min(0)

    def unmasked(self) -> Tensor:
        """The best weights if all were kept, damped: W + gap (H + c 1)^-1, (O, I)."""
        if self.gap_OI is None:
            return self.weight_OI
        damped_II = self.products_II + self.added * torch.eye(
            len(self.products_II), dtype=torch.float64, device=self.gap_OI.device
        )
        return self.weight_OI + torch.linalg.solve(damped_II, self.gap_OI.T).T


@dataclass
class _Problem:
    """The same with a mask, row group by row group."""

    fit: Fit
    kept_GI: Tensor
    height: int

    def __post_init__(self) -> None:
        fit = self.fit
        kept_OI = self.kept_GI.repeat_interleave(self.height, 0)[: len(fit.weight_OI)]
        self.alone_OI = fit.weight_OI * kept_OI
        counts_G = self.kept_GI.sum(1)
        self.solvable = counts_G > 0
        if fit.gap_OI is None:
            self.solvable &= counts_G < self.kept_GI.shape[1]

    def steps(self, dtype: torch.dtype, peers: Peers) -> tuple[Tensor, int]:
        """Collective: W' - W0, (O, I); and how many row groups were solved again in float64."""
        fit = self.fit
        step_OI = torch.zeros_like(fit.weight_OI)
        again = torch.zeros(1, dtype=torch.float64, device=step_OI.device)
        for groups in self._batches(dtype, peers):
            columns_Bn = self.kept_GI[groups].nonzero()[:, 1].view(len(groups), -1)
            rows_Bh, real_Bh = self._rows(groups)
            right_BhI = (fit.weight_OI - self.alone_OI)[rows_Bh] @ fit.products_II
            if fit.gap_OI is not None:
                right_BhI += fit.gap_OI[rows_Bh]
            right_BhI *= real_Bh[..., None]
            right_Bhn = right_BhI.gather(2, columns_Bn[:, None].expand(-1, self.height, -1))
            solution_Bhn, doubled = self._solve(columns_Bn, right_Bhn, dtype)
            again += doubled
            whole_BhI = torch.zeros_like(right_BhI).scatter_(2, columns_Bn[:, None].expand_as(solution_Bhn), solution_Bhn)
            step_OI[rows_Bh[real_Bh]] = whole_BhI[real_Bh]
        if peers.size > 1:
            peers.add(step_OI)
            peers.add(again)
        return step_OI, int(again)

    def _rows(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of each group (B, h), those beyond the last row replaced by row 0; and which are real."""
        rows_Bh = groups[:, None] * self.height + torch.arange(self.height, device=groups.device)
        real_Bh = rows_Bh < len(self.alone_OI)
        return rows_Bh * real_Bh, real_Bh

    def _batches(self, dtype: torch.dtype, peers: Peers) -> Iterator[Tensor]:
        """This process's row groups that there is something to solve for, in batches that keep equally many columns."""
        counts_G = self.kept_GI.sum(1)
        order = torch.argsort(counts_G, stable=True)
        order = order[self.solvable[order]]
        mine = order[peers.rank :: peers.size]
        for count in counts_G[mine].unique().tolist():
            alike = mine[counts_G[mine] == count]
            # the matrix, its factor and one copy
            most = max(1, WORKSPACE_BYTES // (3 * count * max(count, self.height) * dtype.itemsize))
            yield from alike.split(most)

    def _solve(self, columns_Bn: Tensor, right_Bhn: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """right (H_SS + c 1)^-1 in float64, and how many of them took float64 to find."""
        solution_Bhn, good_B = self._factorised(columns_Bn, right_Bhn, dtype)
        bad = (~good_B).nonzero()[:, 0]  # waits for the device
        for i in [[index] for index in bad.tolist()]:
            solution_Bhn[i], fine = self._factorised(columns_Bn[i], right_Bhn[i], torch.float64)
            if not fine:  # dependent inputs and no damping: the shortest of the best steps
                solution_Bhn[i] = right_Bhn[i] @ torch.linalg.pinv(self._matrices(columns_Bn[i], torch.float64), hermitian=True)
        return solution_Bhn, len(bad) if dtype != torch.float64 else 0

    def _matrices(self, columns_Bn: Tensor, dtype: torch.dtype) -> Tensor:
        """H_SS + c 1."""
        matrix_Bnn = self.fit.products_II[columns_Bn[:, :, None], columns_Bn[:, None, :]].to(dtype)
        matrix_Bnn.diagonal(dim1=1, dim2=2).add_(self.fit.added)
        return matrix_Bnn

    def _factorised(self, columns_Bn: Tensor, right_Bhn: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The solution, and which of the batch fulfil their equations."""
        matrix_Bnn = self._matrices(columns_Bn, dtype)
        factor_Bnn, info_B = torch.linalg.cholesky_ex(matrix_Bnn)
        right_Bnh = right_Bhn.transpose(1, 2).to(dtype)
        solution_Bnh = torch.cholesky_solve(right_Bnh, factor_Bnn)
        left_B = torch.linalg.vector_norm(matrix_Bnn @ solution_Bnh - right_Bnh, dim=(1, 2))
        good_B = (info_B == 0) & (left_B <= MAX_RESIDUAL * torch.linalg.vector_norm(right_Bnh, dim=(1, 2)))
        return solution_Bnh.transpose(1, 2).double(), good_B
