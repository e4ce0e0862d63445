"""Adapters through PEFT, masked and not. Importing this package makes PEFT know the masked types (`BLOCK_LORA`, `BLOCK_ADALORA`)."""

from lora_dist.adapter.adalora import (
    ADALORA_TYPE,
    Allocation,
    BlockAdaLoraConfig,
    BlockAdaLoraModel,
    make_allocation,
    split_allocation,
)
from lora_dist.adapter.attach import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_folder,
    adapter_identity,
    adapter_tensors,
    attach_adapter,
    is_masked,
    load_adapter,
    load_adapter_tensors,
    read_adapter_config,
    read_adapter_tensors,
    read_labels,
    read_quantisation,
    save_adapter,
)
from lora_dist.adapter.config import PEFT_TYPE, BlockLoraConfig, BlockLoraModel, PatternConfig, register
from lora_dist.adapter.kinds import ADAPTER_TYPES, adapter_type, describe
from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.principal import asked, is_principal, read_frozen_rank
from lora_dist.adapter.product import masked_delta, masked_product
from lora_dist.adapter.updates import (
    bias_update,
    count_parameters,
    is_adapter_parameter,
    layer_update,
    lora_layers,
    merge_adapter,
    update_outside_mask,
)

register(PEFT_TYPE, BlockLoraConfig, BlockLoraModel)
register(ADALORA_TYPE, BlockAdaLoraConfig, BlockAdaLoraModel)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "ADAPTER_TYPES",
    "PEFT_TYPE",
    "Allocation",
    "BlockAdaLoraConfig",
    "BlockLoraConfig",
    "BlockLoraLinear",
    "BlockLoraModel",
    "PatternConfig",
    "adapter_folder",
    "adapter_identity",
    "adapter_tensors",
    "adapter_type",
    "asked",
    "attach_adapter",
    "bias_update",
    "count_parameters",
    "describe",
    "is_adapter_parameter",
    "is_masked",
    "is_principal",
    "layer_update",
    "load_adapter",
    "load_adapter_tensors",
    "lora_layers",
    "make_allocation",
    "masked_delta",
    "masked_product",
    "merge_adapter",
    "read_adapter_config",
    "read_adapter_tensors",
    "read_frozen_rank",
    "read_labels",
    "read_quantisation",
    "save_adapter",
    "split_allocation",
    "update_outside_mask",
]
