"""Adapters through PEFT, masked and not. Importing this package makes PEFT know the masked types (`BLOCK_LORA`, `BLOCK_ADALORA`,
`BLOCK_FULL`)."""

from lora_dist.adapter.adalora import (
    ADALORA_TYPE,
    Allocation,
    BlockAdaLoraConfig,
    BlockAdaLoraModel,
    make_allocation,
    split_allocation,
)
from lora_dist.adapter.attach import (
    adapter_tensors,
    attach_adapter,
    count_parameters,
    is_masked,
    load_adapter,
    load_adapter_tensors,
    read_adapter_tensors,
    save_adapter,
)
from lora_dist.adapter.config import PEFT_TYPE, BlockLoraConfig, BlockLoraModel, PatternConfig, register
from lora_dist.adapter.folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_folder,
    adapter_identity,
    read_adapter_config,
    read_labels,
    read_quantisation,
)
from lora_dist.adapter.kinds import ADAPTER_TYPES, adapter_type, describe
from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.principal import asked, frozen_elements, is_principal, read_frozen_rank
from lora_dist.adapter.product import masked_delta, masked_product
from lora_dist.adapter.sparse import SPARSE_TYPE, SparseFullConfig, SparseFullModel
from lora_dist.adapter.updates import (
    bias_update,
    compute_beside,
    is_adapter_parameter,
    layer_update,
    lora_layers,
    merge_adapter,
    update_norms,
    update_outside_mask,
)
from lora_dist.adapter.whole import whole_layers

register(PEFT_TYPE, BlockLoraConfig, BlockLoraModel)
register(ADALORA_TYPE, BlockAdaLoraConfig, BlockAdaLoraModel)
register(SPARSE_TYPE, SparseFullConfig, SparseFullModel)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "ADAPTER_TYPES",
    "PEFT_TYPE",
    "SPARSE_TYPE",
    "Allocation",
    "BlockAdaLoraConfig",
    "BlockLoraConfig",
    "BlockLoraLinear",
    "BlockLoraModel",
    "PatternConfig",
    "SparseFullConfig",
    "adapter_folder",
    "adapter_identity",
    "adapter_tensors",
    "adapter_type",
    "asked",
    "attach_adapter",
    "bias_update",
    "compute_beside",
    "count_parameters",
    "describe",
    "frozen_elements",
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
    "update_norms",
    "update_outside_mask",
    "whole_layers",
]
