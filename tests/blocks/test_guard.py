"""The guard finds what was changed, names it, and stays quiet otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from random import Random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.blocks import BlockMask, ElementMask, Guard, Pattern, Piece, grid
from lora_dist.blocks.guard import CHUNK_WORDS
from lora_dist.blocks.rectangles import rectangles
from lora_dist.log import GuardError


def base_and_pattern(dtype=torch.float32, shape=(128, 96)):
    generator = torch.Generator().manual_seed(1)
    base, masks = {}, {}
    for name in ("layers.0.q", "layers.1.q"):
        mask = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
        base[f"{name}.weight"] = torch.randn(shape, generator=generator).masked_fill_(~mask.expand(), 0).to(dtype)
        masks[name] = mask
    base["norm.weight"] = torch.ones(7, dtype=dtype)  # 7 elements: no whole number of 8-byte words
    return base, Pattern(masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untouched_base_passes_every_check(dtype):
    base, pattern = base_and_pattern(dtype)
    guard = Guard(base, pattern)
    for step in range(5):
        guard.check(f"at step {step}")
    guard.check_all("at the end")


def test_a_pruned_tile_that_moves_is_named():
    base, pattern = base_and_pattern()
    guard = Guard(base, pattern)
    p, q = (~pattern["layers.1.q"].kept_PQ).nonzero()[0].tolist()
    base["layers.1.q.weight"][p * 16 + 3, q * 16 + 5] = 1e-30
    with pytest.raises(GuardError, match=rf"guard at step 7: layer layers.1.q, tile \({p}, {q}\)"):
        guard.check("at step 7")


def test_a_base_that_is_not_pruned_where_its_mask_says_so_is_refused_at_load():
    base, pattern = base_and_pattern()
    base["layers.0.q.weight"] += 1
    with pytest.raises(GuardError, match="guard at load: layer layers.0.q"):
        Guard(base, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_bit_of_a_kept_weight_is_seen_by_the_whole_check(dtype):
    base, pattern = base_and_pattern(dtype)
    guard = Guard(base, pattern)
    integers = base["layers.0.q.weight"].view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    kept = pattern["layers.0.q"].expand().reshape(-1).nonzero().view(-1)
    for i in kept[:: max(1, len(kept) // 50)].tolist():
        integers[i] ^= 1
        with pytest.raises(GuardError, match=r"layers.0.q.weight changed"):
            guard.check_all("at the end")
        integers[i] ^= 1
    guard.check_all("at the end")
    base["norm.weight"][6] = 2  # the word that was padded
    with pytest.raises(GuardError, match=r"norm.weight changed"):
        guard.check_all("at the end")


def test_the_sample_rotates_through_the_whole_base():
    big = {"big": torch.randn(CHUNK_WORDS * 2 * 5)}  # five chunks of float32
    guard = Guard(big, None, sample_chunks=2)
    big["big"][-1] += 1
    seen = []
    for step in range(3):
        try:
            guard.check(f"at step {step}")
        except GuardError:
            seen.append(step)
    assert seen == [2]  # chunks 0-1, 2-3, then 4-0


def test_transposed_and_wrapped_names_are_found():
    base, pattern = base_and_pattern()
    wrapped = {
        "layers.0.q.base_layer.weight": base["layers.0.q.weight"].T.contiguous(),
        "layers.1.q.weight": base["layers.1.q.weight"],
    }
    guard = Guard(wrapped, pattern, transposed={"layers.0.q"})
    p, q = (~pattern["layers.0.q"].kept_PQ).nonzero()[0].tolist()
    wrapped["layers.0.q.base_layer.weight"][q * 16, p * 16] = 5
    with pytest.raises(GuardError, match=rf"layers.0.q, tile \({p}, {q}\): found 5"):
        guard.check_pattern("now")
    with pytest.raises(GuardError, match="in the pattern, but not in the base"):
        Guard({}, pattern)
    with pytest.raises(GuardError, match="found a weight of"):
        Guard(wrapped, pattern)


def test_element_patterns_are_guarded_too():
    weight = torch.randn(20, 20) * (torch.rand(20, 20) > 0.5)
    guard = Guard({"l.weight": weight}, Pattern({"l": ElementMask.detect(weight)}))
    row, col = (weight == 0).nonzero()[0].tolist()
    weight[row, col] = 1
    with pytest.raises(GuardError, match=rf"layer l, element \({row}, {col}\)"):
        guard.check("at step 1")


@dataclass
class Cut:
    """A pruned weight whose pieces are views of it, so that what is written to it is written to them."""

    stored: torch.Tensor
    """(O, I), or (I, O) where transposed"""
    pruned_OI: torch.Tensor
    """bool, made by plain loops"""
    mask: BlockMask | ElementMask
    transposed: bool
    pieces: list[Piece]

    def guards(self) -> list[Guard]:
        transposed = ["l"] if self.transposed else []
        return [Guard({"l.weight": piece}, Pattern({"l": self.mask}), transposed=transposed) for piece in self.pieces]

    def place(self, out: int, inn: int) -> int:
        """Number of an element in the order of storage."""
        return inn * self.mask.shape[0] + out if self.transposed else out * self.mask.shape[1] + inn

    def holds(self, piece: Piece, out: int, inn: int) -> bool:
        return piece.start <= self.place(out, inn) < piece.start + piece.tensor.numel()

    def set(self, out: int, inn: int, value: float) -> None:
        self.stored.view(-1)[self.place(out, inn)] = value


def a_cut(seed: int, kind: str, transposed: bool, rows: bool) -> Cut:
    """Random shape, tiles and pattern with something kept and something pruned, cut at random into 1 to 5 pieces."""
    random = Random(f"{seed} {kind} {transposed} {rows}")
    O, I = shape = random.randint(2, 40), random.randint(2, 40)
    b = 1 if kind == "element" else random.choice([b for b in (1, 2, 3, 5, 8, 16, 33) if b < max(shape)])
    P, Q = grid(shape, b)
    kept = [random.random() < random.choice([0.1, 0.5, 0.9]) for _ in range(P * Q)]
    kept[:2] = [True, False]
    random.shuffle(kept)
    pruned_OI = torch.tensor([[not kept[o // b * Q + i // b] for i in range(I)] for o in range(O)])
    dtype = random.choice([torch.float32, torch.bfloat16])
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).masked_fill_(pruned_OI, 0).to(dtype)
    mask = ElementMask.detect(weight_OI) if kind == "element" else BlockMask(torch.tensor(kept).view(P, Q), shape, b)
    stored = (weight_OI.T if transposed else weight_OI).contiguous()
    count = random.randint(1, 5)
    if rows:
        sizes = [chunk.numel() for chunk in stored.chunk(count)]
        edges = [0, *accumulate(sizes), *[O * I] * (count - len(sizes))]  # chunk() gives fewer where the rows are few
    else:
        edges = sorted([0, *[random.randint(0, O * I) for _ in range(count - 1)], O * I])
    pieces = [Piece(stored.view(-1)[start:stop], tuple(stored.shape), start) for start, stop in pairwise(edges)]
    return Cut(stored, pruned_OI, mask, transposed, pieces)


def complaint(call, when="now") -> str:
    """The message of a check, without its beginning; empty where it found nothing."""
    try:
        call(when)
    except GuardError as error:
        return str(error).removeprefix(f"guard {when}: ")
    return ""


every_way = pytest.mark.parametrize(
    "kind, transposed, rows", list(product(["block", "element"], [False, True], [False, True]))
)  # rows: cut between rows of what is stored, else anywhere


@every_way
def test_every_piece_of_a_clean_base_passes(kind, transposed, rows):
    for seed in range(40):
        for guard in a_cut(seed, kind, transposed, rows).guards():
            guard.check("at step 1")
            guard.check_all("at the end")


@every_way
def test_the_piece_that_holds_a_changed_pruned_element_names_its_tile_and_no_other_piece_complains(kind, transposed, rows):
    for seed in range(40):
        cut, random = a_cut(seed, kind, transposed, rows), Random(seed)
        guards, b = cut.guards(), cut.mask.block
        place = "tile" if kind == "block" else "element"
        o, i = random.choice(cut.pruned_OI.nonzero().tolist())
        cut.set(o, i, 0.5)
        expected = f"layer l, {place} ({o // b}, {i // b}): found 0.5, expected exactly 0"
        found = [complaint(guard.check_pattern) for guard in guards]
        assert found == [expected if cut.holds(piece, o, i) else "" for piece in cut.pieces], seed
        assert sum(map(bool, found)) == 1


@every_way
def test_a_piece_names_the_first_of_its_tiles_and_counts_each_once(kind, transposed, rows):
    for seed in range(40):
        cut, random = a_cut(seed, kind, transposed, rows), Random(seed)
        guards, b = cut.guards(), cut.mask.block
        changed = random.choices(cut.pruned_OI.nonzero().tolist(), k=random.randint(2, 30))
        values = {(o // b, i // b): random.randint(1, 100) for o, i in changed}  # one a tile: of its elements any may be named
        for o, i in changed:
            cut.set(o, i, values[o // b, i // b])
        place = "tile" if kind == "block" else "element"
        for piece, guard in zip(cut.pieces, guards, strict=True):
            tiles = sorted({(o // b, i // b) for o, i in changed if cut.holds(piece, o, i)})
            where = "this layer" if piece.tensor.numel() == cut.stored.numel() else "this process's part of the layer"
            expected = f"layer l, {place} {tiles[0]}: found {values[tiles[0]]}, expected exactly 0" if tiles else ""
            if len(tiles) > 1:
                expected += f" ({len(tiles)} such {place}s in {where})"
            assert complaint(guard.check_pattern) == expected, seed
            with pytest.raises(GuardError, match="guard at load") if tiles else nullcontext():
                Guard({"l.weight": piece}, Pattern({"l": cut.mask}), transposed={"l"} if transposed else ())


def test_the_value_named_is_of_the_tile_named():
    mask = BlockMask(torch.arange(16).view(16, 1) == 15, (64, 4), 4)
    stored_IO = torch.zeros(4, 64)
    guard = Guard({"l.weight": Piece(stored_IO.view(-1)[20:], (4, 64), 20)}, Pattern({"l": mask}), transposed={"l"})
    stored_IO[0, 30] = 2  # in the piece's first row, which begins below the tile that is named
    stored_IO[1, 0] = 3
    expected = "layer l, tile (0, 0): found 3, expected exactly 0 (2 such tiles in this process's part of the layer)"
    assert complaint(guard.check_pattern) == expected


@every_way
def test_a_changed_kept_element_is_found_in_the_piece_that_holds_it(kind, transposed, rows):
    for seed in range(40):
        cut = a_cut(seed, kind, transposed, rows)
        guards = cut.guards()
        o, i = Random(seed).choice((~cut.pruned_OI).nonzero().tolist())
        cut.stored.view(-1)[cut.place(o, i)] += 1
        for piece, guard in zip(cut.pieces, guards, strict=True):
            guard.check_pattern("now")
            expected = "frozen parameter l.weight changed since the run began" if cut.holds(piece, o, i) else ""
            assert complaint(guard.check_all) == expected, seed


@pytest.mark.parametrize(
    "mask", [BlockMask(torch.tensor([[True], [False]]), (32, 16), 16), ElementMask.detect(torch.eye(32, 16))]
)
def test_a_process_that_holds_nothing_of_a_weight_has_nothing_to_check(mask):
    nothing = {"l.weight": Piece(torch.empty(0), (32, 16), 512), "norm.weight": Piece(torch.empty(0), (7,))}
    guard = Guard(nothing, Pattern({"l": mask}))
    guard.check("at step 1")
    guard.check_all("at the end")


def test_rectangles_are_views_that_hold_every_element_once():
    for seed in range(100):
        cut = a_cut(seed, "block", seed % 2 == 1, rows=seed % 4 > 1)
        numbers = torch.arange(cut.stored.numel()).view(cut.stored.shape)
        numbers_OI = numbers.T if cut.transposed else numbers
        for piece in cut.pieces:
            held = Piece(numbers.view(-1)[piece.start : piece.start + piece.tensor.numel()], piece.shape, piece.start)
            parts = rectangles(held, cut.transposed)
            assert len(parts) <= (1 if seed % 4 > 1 else 3)
            for part in parts:
                (o, i), (rows, columns) = part.at, part.weight_OI.shape
                assert torch.equal(part.weight_OI, numbers_OI[o : o + rows, i : i + columns])
                assert part.weight_OI.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
            together = [part.weight_OI.reshape(-1) for part in parts] or [held.tensor]
            assert torch.equal(torch.cat(together).sort().values, held.tensor)


def test_a_piece_of_another_weight_is_refused():
    mask = BlockMask(torch.tensor([[True], [False]]), (32, 16), 16)
    with pytest.raises(GuardError, match=r"found a weight of \(16, 32\), expected \(32, 16\)"):
        Guard({"l.weight": Piece(torch.zeros(32), (16, 32))}, Pattern({"l": mask}))
    with pytest.raises(ValueError, match="found elements 500 to 532"):
        Guard({"l.weight": Piece(torch.zeros(32), (32, 16), 500)}, Pattern({"l": mask}))


def test_a_whole_weight_need_not_be_contiguous():
    base, pattern = base_and_pattern()
    base = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in base.items()}
    guard = Guard(base, pattern)
    guard.check_all("at step 1")
    p, q = (~pattern["layers.1.q"].kept_PQ).nonzero()[-1].tolist()
    base["layers.1.q.weight"][p * 16, q * 16] = 2
    assert complaint(guard.check_pattern) == f"layer layers.1.q, tile ({p}, {q}): found 2, expected exactly 0"


class Reads(TorchDispatchMode):
    """Counts the values that Python waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_check_without_a_finding_waits_for_the_device_once():
    base, pattern = base_and_pattern()
    base["e.weight"] = torch.eye(40)
    pattern = Pattern({**pattern, "e": ElementMask.detect(base["e.weight"])})
    pieces = {name: Piece(tensor.view(-1)[5:-3], tuple(tensor.shape), 5) for name, tensor in base.items() if tensor.ndim == 2}
    for held in (base, pieces):
        guard = Guard(held, pattern)
        with Reads() as reads:
            guard.check_pattern("now")
        assert reads.count == 1
