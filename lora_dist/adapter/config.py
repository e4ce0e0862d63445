"""Configs of adapters that respect a pattern, saved so that plain PEFT refuses them: `PatternConfig`, and `BlockLoraConfig` for LoRA
and (`use_dora`) DoRA; AdaLoRA's is in `adapter/adalora.py`.

Plain PEFT ignores keys that it does not know and would load a masked adapter as a dense one, silently wrong. So masked adapters
carry a `peft_type` of their own, such as `BLOCK_LORA`, which loads once `lora_dist` is imported. The mask file travels with the
config: `save_pretrained` writes it, `from_pretrained` reads it and proves its digest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download
from peft import LoraConfig, LoraModel, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.whole import TrainsWhole
from lora_dist.blocks import MASK_FILE, Pattern, block_layers
from lora_dist.log import GuardError

PEFT_TYPE = "BLOCK_LORA"

_SUPPORTED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights", "task_type", "peft_type",
    "use_dora", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "runtime_config",
    "pattern_digest", "base_fingerprint", "form",
}  # fmt: skip


@dataclass
class PatternConfig(LoraConfig):
    """`peft.LoraConfig`, or a class derived from it, with a pattern. Not used by itself.

    Fields of its own are saved in `adapter_config.json`; the pattern itself goes to `block_mask.safetensors` beside it.
    """

    pattern_digest: str = field(default="", metadata={"help": "Digest of the pattern that the update respects."})
    base_fingerprint: str = field(default="", metadata={"help": "Fingerprint of the base that it was trained on."})
    form: str = field(default="auto", metadata={"help": "factorised, triton, dense or auto: how the update is computed."})
    whole_parameters: list[str] = field(
        default_factory=list, metadata={"help": "Parameters of the base that are trained whole beside it, as deltas."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pattern: Pattern | None = None
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        defaults = {f.name: f for f in dataclasses.fields(LoraConfig)}
        changed = []
        for name, f in defaults.items():
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if name not in _SUPPORTED and getattr(self, name) != default and getattr(self, name):
                changed.append(name)
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            changed.append(f"init_lora_weights={self.init_lora_weights!r} (it rewrites the base)")
        if changed:
            raise ValueError(
                f"block-masked LoRA does not support {', '.join(changed)}: leave out, or use plain LoRA (mask: none)"
            )

    @property
    def pattern(self) -> Pattern:
        """The pattern; raises ValueError where none was attached."""
        if self._pattern is None:
            raise ValueError(
                f"{type(self).__name__} has no pattern: use lora_dist.attach_block_lora or config.with_pattern(pattern)"
            )
        return self._pattern

    def with_pattern(self, pattern: Pattern) -> Self:
        """Attach the pattern to respect (in place) and note its digest.

        Raises:
            GuardError: if this config was saved with another pattern.
        """
        if self.pattern_digest and self.pattern_digest != pattern.digest:
            raise GuardError(
                f"adapter: its config names pattern {self.pattern_digest[:12]}, the mask found is {pattern.digest[:12]}: "
                "they do not belong together"
            )
        self._pattern, self.pattern_digest = pattern, pattern.digest
        return self

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets sorted, so that the same adapter is the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        self.pattern.save(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            return config.with_pattern(Pattern.load(folder))
        hub_kwargs = cls._split_kwargs(kwargs)[0]
        mask_file = hf_hub_download(str(pretrained_model_name_or_path), MASK_FILE, subfolder=subfolder, **hub_kwargs)
        return config.with_pattern(Pattern.load(mask_file))


@dataclass
class BlockLoraConfig(PatternConfig):
    """`peft.LoraConfig` with a pattern; with `use_dora` the scaled rows are those of W + masked update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._register_custom_module({nn.Linear: BlockLoraLinear, Conv1D: BlockLoraLinear})


def _ordinary(config: PeftConfig) -> bool:
    """Whether it is LoRA without any of PEFT's variants."""
    if type(config) is not LoraConfig or config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        return False
    default = LoraConfig()
    others = (f.name for f in dataclasses.fields(config) if f.name not in _SUPPORTED)
    return all(getattr(config, name) == getattr(default, name) for name in others)


def with_own_layers(config: PeftConfig, model: Any, *, frozen: bool = False) -> PeftConfig:
    """`config` for `model`: what PEFT's own layers cannot train, or not as fast, gets this project's, in memory only; the files stay plain. That
    is LoRA with frozen factors; DoRA on a base that does not hold its weights as they are: PEFT asks int8 for scales that the layer holds
    elsewhere by then, 4-bit weights for columns that fill rows up (`models/padded.py`), and kept tiles for a matrix; and ordinary LoRA on
    weights that are not quantised (`linear.py`)."""
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    packed = quantised or bool(block_layers(model))
    ordinary = not quantised and _ordinary(config)
    if (frozen or ordinary or (packed and getattr(config, "use_dora", False))) and not isinstance(config, PatternConfig):
        config._register_custom_module({nn.Linear: BlockLoraLinear, Conv1D: BlockLoraLinear})
    return config


class BlockLoraModel(TrainsWhole, LoraModel):
    """PEFT's LoRA tuner, under the name that masked adapters are saved with."""


def register(peft_type: str, config: type[PatternConfig], tuner: type[LoraModel]) -> None:
    """Make PEFT know a masked type. PEFT's own registration wants a member of its enum and a prefix of its own, so the maps are
    filled here; the keys' prefix stays `lora_`, as in any LoRA file. Called when `lora_dist.adapter` is imported."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = "lora_"
