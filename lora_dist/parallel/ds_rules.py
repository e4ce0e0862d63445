"""What of DeepSpeed's configuration lora-dist does not take over, and why. Tables, read by `ds_config.py` alone."""

from __future__ import annotations

from typing import Any

_PRECISION = "lora-dist computes in half precision its own way: take it out and set train.bf16 or train.fp16"
_DATA = "lora-dist orders and cuts the text itself: take it out"
_BASE = "it rounds the frozen base, which lora-dist keeps as it is: take it out"
_SPLIT = "lora-dist splits data, not layers or sequences: take it out"
_CURVES = "lora-dist writes the curves: take it out, see tracker.report_to and metrics.jsonl"
_NONE = "lora-dist has no such training: take it out"
_ADAM = "it needs DeepSpeed's own Adam, and lora-dist trains with torch's: take it out"

# Sections and switches that are refused where they ask for something (`asks`), by dotted key.
REFUSED_SECTIONS = {
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "msamp": _PRECISION,
    "quantize_training": _NONE,
    "weight_quantization": _BASE,
    "compression_training": _NONE,
    "sparse_attention": _NONE,
    "sparse_gradients": _NONE,
    "progressive_layer_drop": _NONE,
    "eigenvalue": _NONE,
    "elasticity": "a run keeps the number of processes it started with; resume it with another: take it out",
    "graph_harvesting": _NONE,
    "hybrid_engine": _NONE,
    "autotuning": _NONE,
    "nebula": "lora-dist writes its own checkpoints: take it out",
    "curriculum_learning": _DATA,
    "data_efficiency": _DATA,
    "pipeline": _SPLIT,
    "expert_parallel": _SPLIT,
    "compile.deepcompile": "lora-dist does not compile the engine: take it out",
    "zero_optimization.zero_quantized_weights": _BASE,
    "zero_optimization.zero_quantized_nontrainable_weights": _BASE,
    "zero_optimization.zero_quantized_gradients": "it rounds gradients, which lora-dist keeps in float32: take it out",
    "zero_optimization.zeropp_loco_param": "it rounds gradients, which lora-dist keeps in float32: take it out",
    "zero_optimization.mics_shard_size": "use parallel.strategy fsdp2 with parallel.hybrid_shard",
    "zero_optimization.mics_hierarchical_params_gather": "use parallel.strategy fsdp2 with parallel.hybrid_shard",
    "zero_optimization.zenflow": _ADAM,
    "prescale_gradients": "lora-dist undoes DeepSpeed's plain mean of the gradients: take it out",
    "tensorboard": _CURVES,
    "wandb": _CURVES,
    "comet": _CURVES,
    "csv_monitor": _CURVES,
    "zero_optimization.offload_optimizer.super_offload": _ADAM,
}

# Numbers of processes that share one batch: 1 at most.
REFUSED_SIZES = {
    "tensor_parallel.autotp_size": _SPLIT,
    "tensor_parallel.tp_size": _SPLIT,
    "tensor_parallel.tp.tp_size": _SPLIT,
    "sequence_parallel_size": _SPLIT,
}

_FLOAT32 = ("fp32", "float32", "torch.float32", "float")
_KEPT_FLOAT32 = "lora-dist keeps adapter and gradients in float32"

# Values that would change what a step computes: dotted key -> what is accepted, and why nothing else.
REFUSED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_types.grad_accum_dtype": (_FLOAT32, _KEPT_FLOAT32),
    "data_types.param_dtype": (_FLOAT32, _KEPT_FLOAT32),
    "data_types.buffer_dtype": (_FLOAT32, "lora-dist keeps the model's buffers as they are"),
    "communication_data_type": (_FLOAT32, _KEPT_FLOAT32),
    "gradient_predivide_factor": ((1.0,), "lora-dist undoes DeepSpeed's plain mean of the gradients"),
    "gradient_allreduce_op": (("mean",), "lora-dist undoes DeepSpeed's mean"),
    "managed_gradient_accumulation": ((True,), "lora-dist tells the engine which micro-batch is the last"),
    "zero_optimization.compute_grad_norm": ((True,), "lora-dist stops on a gradient norm that is not finite"),
    "zero_optimization.offload_optimizer.ratio": ((1.0,), _ADAM),
}

# Top-level sections that decide nothing in a run of lora-dist, and what does.
NOT_USED = {
    "activation_checkpointing": "train.gradient_checkpointing decides",
    "checkpoint": "lora-dist writes its own checkpoints",
    "data_types": "lora-dist keeps adapter and gradients in float32",
    "dataloader_drop_last": "train.dataloader_drop_last decides",
}


_NOTHING: tuple[Any, ...] = (None, False, 0, -1, "", "auto", [])


def asks(value: Any) -> bool:
    """Whether a section or switch asks for something. `"enabled": false` and an empty section do not, nor does "auto"."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) not in _NOTHING
    return value not in _NOTHING
