"""Classifiers of every family: a head that the files lack is new and seeded, anything else that is missing an error."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.heads import HeadSpec
from lora_dist.models.loading import load_base
from tests.classes import encoder_base

FAMILIES = {
    "bert": {"classifier", "bert.pooler"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier"},
    "modernbert": {"head", "classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "llama": {"score"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_head_of_a_family_is_found(kind, tmp_path):
    folder = encoder_base(tmp_path / "base", kind, pruned=False)
    bases = [load_base(str(folder), head=HeadSpec(3, seed=seed), progress=False) for seed in (1, 1, 2)]
    assert set(bases[0].heads) == FAMILIES[kind]
    linears = {linear.name for linear in prunable_linears(bases[0].model)}
    assert linears and not any(name.startswith(f"{head}.") or name == head for name in linears for head in FAMILIES[kind])
    states = [base.model.state_dict() for base in bases]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert drawn and all(any(name.startswith(f"{head}.") for head in FAMILIES[kind]) for name in drawn)


def test_what_is_missing_beside_the_head_is_an_error(tmp_path):
    folder = encoder_base(tmp_path / "base", pruned=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors that BertForSequenceClassification needs are not in the files"):
        load_base(str(folder), head=HeadSpec(2), progress=False)
