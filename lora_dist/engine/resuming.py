"""Going on from a checkpoint: that base, pattern, precision and data are those it was trained on, and the state it was left in.

Called by `setup.py`.
"""

from __future__ import annotations

from lora_dist.adapter import Allocation, read_quantisation, split_allocation
from lora_dist.engine.batch import BatchPlan
from lora_dist.engine.checkpoint import Checkpoint, Identity
from lora_dist.engine.data import RunData
from lora_dist.log import GuardError, UserError
from lora_dist.models.loading import LoadedBase
from lora_dist.models.quantised import Quantisation
from lora_dist.parallel import Strategy
from lora_dist.state import TrainState


def check_quantisation(checkpoint: Checkpoint, base: LoadedBase) -> None:
    """The base is held as it was: its values are part of what was trained on."""
    now = getattr(base.model.config, "quantization_config", None)
    described = [
        "none" if config is None else str(Quantisation.from_dict(config))
        for config in (read_quantisation(checkpoint.adapter), now)
    ]
    if described[0] != described[1]:
        raise GuardError(
            f"model.load_in_4bit, model.load_in_8bit, model.storage: the base's quantisation was {described[0]} when {checkpoint.path.name} was "
            f"written, found {described[1]}: set them as they were"
        )


def check_identity(checkpoint: Checkpoint, now: Identity) -> None:
    """The base and the pattern are those that the checkpoint was trained on."""
    then = checkpoint.identity
    if then.base_fingerprint != now.base_fingerprint:
        raise GuardError(
            f"model.name_or_path: the base changed since {checkpoint.path.name} was written (fingerprint {then.base_fingerprint[:12]}, "
            f"found {now.base_fingerprint[:12]}); give the base it was trained on"
        )
    if then.pattern_digest != now.pattern_digest:
        described = [(d[:12] if d else "none (plain LoRA)") for d in (then.pattern_digest, now.pattern_digest)]
        raise GuardError(
            f"adapter.mask, adapter.block: the pattern changed since {checkpoint.path.name} was written (digest {described[0]}, "
            f"found {described[1]}); set them as they were"
        )


def resume_state(
    checkpoint: Checkpoint,
    fresh: TrainState,
    strategy: Strategy,
    data: RunData,
    batch: BatchPlan,
    allocation: Allocation | None,
) -> TrainState:
    """The checkpoint's state, with the optimizer put back."""
    state = checkpoint.state
    written = f"when {checkpoint.path.name} was written"
    source = "text" if data.noun == "windows" else "records"
    if state.seed != fresh.seed:
        raise UserError(f"train.seed: found {fresh.seed}, expected {state.seed} as {written}: the order of the data would change")
    if state.num_samples != fresh.num_samples:
        raise UserError(
            f"{data.content_keys}, data.max_train_samples: found {fresh.num_samples} training {data.noun}, expected {state.num_samples} as "
            f"{written}: the order of the data would change; set back what was changed of these, of the {source} or of the tokenizer"
        )
    if state.data_digest != fresh.data_digest:
        raise UserError(
            f"{data.content_keys}: found as many training {data.noun} as {written} ({state.num_samples}), but not the same content, expected "
            f"the same {source}, tokenizer and packing; set back what was changed of these, of the {source} or of the tokenizer"
        )
    if None not in (state.teacher, fresh.teacher) and state.teacher != fresh.teacher:
        raise UserError(
            f"train.distill_from: found a model of fingerprint {str(fresh.teacher)[:12]}, expected {str(state.teacher)[:12]} as {written}: "
            "another teacher's lessons would go on in the middle; leave it out, or give the same"
        )
    if state.group_by_length != fresh.group_by_length:
        raise UserError(
            f"train.group_by_length: found {str(fresh.group_by_length).lower()}, expected {str(state.group_by_length).lower()} as "
            f"{written}: the order of the data would change"
        )
    if state.group_by_length and state.global_batch != batch.global_batch:
        raise UserError(
            f"train.global_batch_size: found {batch.global_batch} {data.noun} a step with train.group_by_length, expected "
            f"{state.global_batch} as {written}: the order of the data would change"
        )
    state.teacher = fresh.teacher
    optimizer, ranks = split_allocation(checkpoint.optimizer)
    strategy.load_optimizer_tensors(optimizer)
    if allocation is not None:
        allocation.load(ranks)
    return state
