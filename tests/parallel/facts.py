"""What a run says of itself to the checks of DeepSpeed's JSON, for tests to vary."""

from lora_dist.parallel.ds_config import RunFacts

FACTS = RunFacts(
    micro_batch=2,
    accumulation=4,
    world_size=3,
    max_grad_norm=0.5,
    bf16=False,
    fp16=False,
    learning_rate=1e-4,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=10,
    max_steps=100,
    hidden_size=64,
)
