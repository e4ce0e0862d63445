"""A model from its config.json alone, on the meta device: every shape, no weight. A directory with weights serves as well; of these only
a mask and the widths that structured pruning left are read.

Called by `operations/plan/`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_dist.blocks import MASK_FILE, Pattern
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers
from lora_dist.models.building import build_empty
from lora_dist.models.heads import HeadSpec, configure_head, head_modules
from lora_dist.models.hub import resolve
from lora_dist.models.loading import Place, load_config, quiet_transformers
from lora_dist.models.sources import WEIGHT_FILES, stored_shapes
from lora_dist.models.uneven import LayerWidths, NotStructured, find_widths

_KEY = "model.name_or_path"


@dataclass(frozen=True)
class Blueprint:
    """What a model directory says without its weights."""

    name: str
    config: Any
    """transformers' configuration"""
    widths: LayerWidths | None
    """of layers that structured pruning made uneven"""
    pattern: Pattern | None
    """where a mask lies beside the configuration"""
    head: HeadSpec | None
    trust_remote_code: bool

    @property
    def context(self) -> int | None:
        """Tokens the model was made for."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def shortable(self) -> bool:
        """Whether fewer layers are the same model with fewer layers: all are alike."""
        return self.widths is None and getattr(self.config, "num_hidden_groups", None) is None

    def build(self, dtype: torch.dtype, *, layers: int | None = None) -> Any:
        """The frozen model, all of it on the meta device.

        Args:
            layers: so many of its layers; None: all.

        Raises:
            UserError: a class that cannot be built without weights.
        """
        config = copy.deepcopy(self.config)
        if layers is not None:
            config.num_hidden_layers = layers
            kinds = getattr(config, "layer_types", None)
            if kinds is not None:
                config.layer_types = kinds[:layers]
        with quiet_transformers():
            model = build_empty(
                config,
                dtype=dtype,
                device="cpu",
                widths=self.widths,
                trust_remote_code=self.trust_remote_code,
                classifier=self.head is not None,
            ).to("meta")
        model.tie_weights()
        model.requires_grad_(False)
        model.config.use_cache = False
        return model

    def heads(self, model: Any) -> list[str]:
        """Modules of a classifier that are trained whole."""
        return head_modules(model) if self.head is not None else []


def read_blueprint(
    name_or_path: str,
    *,
    config_name: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    classifier: bool = False,
    num_labels: int | None = None,
) -> Blueprint:
    """Read the small files of a directory or hub name.

    Args:
        classifier: it gets a classification head, of `num_labels` labels (None: as many as its configuration says).

    Raises:
        UserError: no configuration there, or one that cannot be used.
    """
    source = config_name or name_or_path
    folder = resolve(source, _KEY, weights=False, code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise UserError(f"{_KEY}: found no config.json in {source}, expected one, or model.config_name")
    # Flash attention keeps what torch's own kernels keep, and need not be installed to be planned for.
    kernel = "sdpa" if attn_implementation and "flash" in attn_implementation else attn_implementation
    config = load_config(Place(folder, source), kernel, trust_remote_code)
    head = HeadSpec(num_labels=num_labels) if classifier else None
    if head is not None:
        configure_head(config, head, SimpleNamespace(pad_token_id=None, eos_token_id=None))
    weights = Path(name_or_path).expanduser()
    return Blueprint(name_or_path, config, _widths(weights, config), _pattern(weights), head, trust_remote_code)


def _widths(folder: Path, config: Any) -> LayerWidths | None:
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        return None
    try:
        return find_widths(stored_shapes(folder), config)
    except NotStructured as reason:
        raise UserError(f"{_KEY}: {folder}: the weights do not fit config.json ({reason})") from reason


def _pattern(folder: Path) -> Pattern | None:
    return Pattern.load(folder) if (folder / MASK_FILE).is_file() else None


def layers_of(model: Any) -> list[Any]:
    """The repeated layers."""
    return list(decoder_layers(model)[1])
