"""The dense model that a run learns from: checked by its small files, loaded whole or cut over processes, asked micro-batch by micro-batch.

It is frozen, in eval mode, and holds no gradient; what it says is taken without one. A strategy that shards the base has it cut by
`fully_shard` (under zero3 too: DeepSpeed's engine drives one model). Called by `setup.py`, `distill.py` and `soft_labels.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_dist.blocks import Piece
from lora_dist.config import RunConfig
from lora_dist.engine.base import base_pieces, load_for, require_finite
from lora_dist.engine.cross_entropy import choose_cross_entropy
from lora_dist.engine.packing import require_separate
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers, shard_units
from lora_dist.models.chunked import chunked_head, put_chunked_head
from lora_dist.models.lesson import Lesson, WholeLesson
from lora_dist.models.loading import BaseSource, open_base
from lora_dist.models.packed import forward
from lora_dist.models.quantised import quantisation_of
from lora_dist.models.sources import read_facts
from lora_dist.monitor.console import Console
from lora_dist.parallel import World

Hidden = Literal["last", "layers"]
NAMES = {
    "model.name_or_path": "train.distill_from",
    "model.load_in_4bit": "train.distill_load_in_4bit",
    "this model": "the model of train.distill_from",
}
"""what messages about a base are to say"""


def quantised_teacher_problems(load_in_4bit: bool) -> list[str]:
    """What is missing for it, before anything is loaded."""
    if load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        return ["train.distill_load_in_4bit: found true, but bitsandbytes is not installed: pip install bitsandbytes"]
    return []


def teacher_source(config: RunConfig) -> BaseSource:
    """The small files of the teacher. Raises UserError."""
    train, model = config.train, config.model
    assert train.distill_from is not None
    try:
        return open_base(
            train.distill_from, attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code
        )
    except UserError as error:
        raise error.renamed(NAMES) from error


def check_teacher(config: RunConfig, student: BaseSource) -> None:
    """By small files alone, before gigabytes are read: the teacher knows the same tokens, and as many at once; and it has the hidden states
    that are to be matched.

    Raises:
        UserError: all that is wrong together.
    """
    train = config.train
    if train.distill_from is None:
        return
    teacher = teacher_source(config)
    own, other = student.config.get_text_config(), teacher.config.get_text_config()
    found = f"train.distill_from: found {train.distill_from} with"
    problems = []
    if teacher.head is not None:
        raise UserError(f"{found} a classification head, expected a causal language model")
    if own.vocab_size != other.vocab_size:
        problems.append(f"{found} a vocabulary of {other.vocab_size} tokens, expected {own.vocab_size} as the pruned model has")
    difference = _first_difference(student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab())
    if difference is not None:
        problems.append(f"{found} another tokenizer, expected the pruned model's: {difference}")
    if teacher.context is not None and config.data.block_size > teacher.context:
        problems.append(f"{found} a context of {teacher.context}, expected data.block_size ({config.data.block_size}) or more")
    if train.distill_hidden_weight > 0:
        keys = ["hidden_size"] + (["num_hidden_layers"] if train.distill_hidden == "layers" else [])
        problems += [
            f"{found} {key} {getattr(other, key)}, expected {getattr(own, key)} as the pruned model has, for train.distill_hidden_weight"
            for key in keys
            if getattr(own, key) != getattr(other, key)
        ]
    if train.distill_cache is not None and train.distill_top_k > other.vocab_size:
        problems.append(f"train.distill_top_k: found {train.distill_top_k}, expected the vocabulary's {other.vocab_size} at most")
    if problems:
        raise UserError(problems)


def teacher_fingerprint(config: RunConfig, world: World) -> str:
    """Collective: of its stored tensors, without loading it; the same on all machines. Raises UserError."""
    source = teacher_source(config)
    found = {facts.fingerprint for facts in world.once_per_machine(lambda: read_facts(source.source_dir, progress=world.is_main))}
    if len(found) > 1:
        raise UserError(
            f"train.distill_from: {config.train.distill_from} is not the same on all machines, expected one dense model"
        )
    return found.pop()


def _first_difference(own: dict[str, int], other: dict[str, int]) -> str | None:
    if own == other:
        return None
    for token, number in sorted(own.items(), key=lambda item: item[1]):
        if other.get(token) != number:
            return f"token {token!r} is {number} in the pruned model's, {other.get(token, 'missing')} in this one"
    return f"it has {len(other)} tokens, the pruned model's {len(own)}"


@dataclass(frozen=True)
class Said:
    """What the teacher says of a micro-batch."""

    lesson: Lesson
    states: list[Tensor]
    """hidden states to be matched, (B, L, H) each"""


class Teacher:
    """A loaded teacher.

    Attributes:
        model: the causal language model.
        fingerprint: of its stored tensors.
        chunked: whether its logits are made of its hidden states by its head alone.
    """

    def __init__(self, model: Any, fingerprint: str, *, owner: FSDPModule | None):
        self.model, self.fingerprint, self._owner = model, fingerprint, owner

    @property
    def chunked(self) -> bool:
        head = chunked_head(self.model)
        return head is not None and head.chunked

    @contextmanager
    def asked(
        self,
        ids_BL: Tensor,
        positions_BL: Tensor | None,
        *,
        chunked: bool,
        alpha: float,
        temperature: float,
        hidden: Hidden | None,
    ) -> Iterator[Said]:
        """Within: what it says of these tokens. Collective where it is cut.

        Args:
            chunked: have its head's weight ready, whole, instead of its logits.
            hidden: states to be matched.
        """
        head = chunked_head(self.model) if chunked else None
        with torch.no_grad(), hidden_states(self.model, hidden) as states:
            if head is None:
                lesson = WholeLesson(forward(self.model, ids_BL, positions_BL), None, None, alpha, temperature)
            else:
                with head.listening() as heard:
                    forward(self.model, ids_BL, positions_BL)
                lesson = WholeLesson(heard[0], head.weight, head.bias, alpha, temperature)
        try:
            yield Said(lesson, states)
        finally:
            self.settle()

    @torch.no_grad()
    def logits(self, ids_BL: Tensor, positions_BL: Tensor | None) -> Tensor:
        """(B, L, V). Collective where it is cut."""
        found = forward(self.model, ids_BL, positions_BL)
        self.settle()
        return found

    def settle(self) -> None:
        """Let go of the head's weight, where it is cut."""
        if self._owner is not None:
            self._owner.reshard()


@contextmanager
def hidden_states(model: Any, which: Hidden | None) -> Iterator[list[Tensor]]:
    """Within: the hidden states (B, L, H) of a forward pass come into the list, those that the head is given or every layer's.

    Hooks that are gone behind the block: what gradient checkpointing computes again is not heard again.
    """
    states: list[Tensor] = []

    def behind(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0])

    handles: list[Any] = []
    if which == "layers":
        handles = [layer.register_forward_hook(behind) for layer in decoder_layers(model)[1]]
    elif which == "last":
        handles = [model.get_output_embeddings().register_forward_pre_hook(before)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def load_teacher(config: RunConfig, world: World, console: Console, *, sharded: bool, dtype: torch.dtype, rows: int) -> Teacher:
    """Collective. Load it, and find out on the model itself what it allows.

    Args:
        sharded: cut it over the processes.
        dtype: precision to hold it and compute in.
        rows: of a micro-batch.

    Raises:
        UserError: something is missing or broken; what the run's options ask for cannot be had.
    """
    try:
        return _load(config, world, console, sharded=sharded, dtype=dtype, rows=rows)
    except UserError as error:
        raise error.renamed(NAMES) from error


def _load(config: RunConfig, world: World, console: Console, *, sharded: bool, dtype: torch.dtype, rows: int) -> Teacher:
    train, model = config.train, config.model
    assert train.distill_from is not None
    opened = load_for(
        world,
        train.distill_from,
        sharded=sharded,
        block=config.adapter.block,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        quantisation=quantisation_of(train.distill_load_in_4bit, False),
    )
    root: Any = opened.base.model
    owner: FSDPModule | None = None
    piece: Callable[[nn.Parameter], Piece] = Piece.whole
    if train.cross_entropy != "logits":
        put_chunked_head(root)
    if sharded:
        from lora_dist.parallel.fully_sharded import FullySharded

        cut = FullySharded(
            root, root, shard_units(root), world, reader=opened.reader, adamw=None, hybrid=config.parallel.hybrid_shard
        )
        cut.check_in_force()
        piece, owner = cut.piece, _keep_head(root)
    require_finite(world, base_pieces(root, piece))
    vocab_size = root.config.get_text_config().vocab_size
    reason = choose_cross_entropy(root, world, train.cross_entropy, vocab_size=vocab_size, key="train.cross_entropy")
    if reason is not None:
        console.note(f"train.distill_from: from whole logits ({reason})")
    if config.data.packing:
        kernel = root.config._attn_implementation
        length = config.data.block_size
        require_separate(root, world, vocab_size=vocab_size, max_length=length, rows=rows, kernel=kernel)
    teacher = Teacher(root, opened.base.fingerprint, owner=owner)
    teacher.settle()
    held = "NF4" if train.distill_load_in_4bit else str(dtype).removeprefix("torch.")
    where = f"cut over {world.size} processes" if sharded else "whole on each process"
    console.note(f"learning from {train.distill_from} as well ({held}, {where})")
    return teacher


def _keep_head(root: Any) -> FSDPModule:
    """The unit that holds the head's weight, told to keep it whole behind a forward pass: the student's chunks are going to need it."""
    head: Any = root.get_output_embeddings()
    owner = head if isinstance(head, FSDPModule) else root
    assert isinstance(owner, FSDPModule)
    owner.set_reshard_after_forward(False, recurse=False)
    return owner
