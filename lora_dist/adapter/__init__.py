"""Block-masked LoRA as a PEFT method. Importing this package makes PEFT know the adapter type `BLOCK_LORA`."""

from lora_dist.adapter.attach import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_folder,
    adapter_tensors,
    attach_adapter,
    is_masked,
    layer_update,
    load_adapter,
    load_adapter_tensors,
    lora_layers,
    merge_adapter,
    read_adapter_config,
    read_adapter_tensors,
    save_adapter,
    update_outside_mask,
)
from lora_dist.adapter.config import PEFT_TYPE, BlockLoraConfig, BlockLoraModel, register
from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.product import masked_delta, masked_product

register()

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "PEFT_TYPE",
    "BlockLoraConfig",
    "BlockLoraLinear",
    "BlockLoraModel",
    "adapter_folder",
    "adapter_tensors",
    "attach_adapter",
    "is_masked",
    "layer_update",
    "load_adapter",
    "load_adapter_tensors",
    "lora_layers",
    "masked_delta",
    "masked_product",
    "merge_adapter",
    "read_adapter_config",
    "read_adapter_tensors",
    "save_adapter",
    "update_outside_mask",
]
