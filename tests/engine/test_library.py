"""lora_dist inside transformers' own Trainer: the masked adapter trains, the guard watches, the merged model keeps its zeros."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lora_dist import BlockMask, GuardCallback, GuardError, Pattern, UserError, attach_block_lora
from tests.tiny import tiny_model


class Rows(torch.utils.data.Dataset):
    """Counting sequences, which a model can learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + i) % 90 + 4
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, callback, **changes) -> Trainer:
    arguments = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), save_strategy="no", **{**arguments, **changes}),
        train_dataset=Rows(),
        callbacks=[callback],
    )


def load(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def test_trainer_recovers_a_pruned_model_and_the_merged_one_keeps_its_zeros(tiny_base, tmp_path):
    model = attach_block_lora(load(tiny_base), tiny_base, r=8, lora_alpha=16)
    run = trainer(model, tmp_path / "run", GuardCallback(model, every=5), gradient_checkpointing=True)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    assert Pattern.load(tmp_path / "adapter").digest == Pattern.load(tiny_base).digest
    merged = model.merge_and_unload()
    for name, mask in Pattern.load(tiny_base).items():
        weight = merged.get_submodule(name).weight
        assert not weight[~mask.expand()].any()


def test_the_pattern_is_found_in_the_weights_where_none_is_given(tiny_base):
    found = attach_block_lora(load(tiny_base)).peft_config["default"].pattern
    assert found.digest == Pattern.load(tiny_base).digest


def test_the_callback_stops_a_training_that_writes_to_the_base(tiny_base, tmp_path):
    model = attach_block_lora(load(tiny_base), r=4)
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    name = "model.layers.0.self_attn.q_proj"
    p, q = (~Pattern.load(tiny_base)[name].kept_PQ).nonzero()[0].tolist()

    class Vandal(GuardCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                weight.data[p * 16, q * 16] = 1.0

    with pytest.raises(GuardError, match=rf"at step 4: layer {name}, tile \({p}, {q}\)"):
        trainer(model, tmp_path, Vandal(model, every=1)).train()


def test_a_dense_model_or_a_foreign_pattern_is_refused(tiny_base):
    dense = tiny_model("llama")
    with pytest.raises(UserError, match="no 16x16 tiles of zeros"):
        attach_block_lora(dense)
    pattern = Pattern.load(tiny_base)
    name = next(n for n, m in pattern.items() if m.kept_PQ.any())
    other = Pattern({**pattern, name: BlockMask(torch.zeros_like(pattern[name].kept_PQ), pattern[name].shape, 16)})
    with pytest.raises(GuardError, match=name):
        attach_block_lora(load(tiny_base), other)
