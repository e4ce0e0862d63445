"""Structured pruning: decoder layers whose query heads, key-value heads and feed-forward widths differ from layer to layer.

Transformers builds every layer alike, from one number each in config.json, and stays so. The widths are therefore read from the
weight files' own headers, which are there whatever tool pruned the model, and the linears of an empty model are replaced before
weights are loaded. Understood is what is built as Llama is: `self_attn.{q,k,v,o}_proj` with one head size throughout, and
`mlp.{gate,up,down}_proj`. Embeddings and the residual width are the configuration's. Called by `loading.py` and `building.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_dist.log import UserError
from lora_dist.models import modeling_uneven
from lora_dist.models.architecture import decoder_layers
from lora_dist.models.modeling_uneven import resize_layer

CONFIG_KEY = "layer_widths"
"""under which config.json records the widths"""
_HEAD_NORMS = {"q_norm", "k_norm", "query_layernorm", "key_layernorm"}
"""norms of one head each, which dropping heads leaves as they are"""
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_TENSOR = re.compile(
    rf"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?:self_attn\.(?P<a>{'|'.join(_ATTENTION)})|mlp\.(?P<m>{'|'.join(_MLP)}))\.(?P<kind>weight|bias)"
)
_AUTO_MAP = {"AutoModelForCausalLM": "modeling_uneven.UnevenForCausalLM"}
"""where plain transformers finds code for these layers, if it is told to trust it"""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerWidths:
    """What each decoder layer has, under transformers' names of the same for a whole model."""

    num_attention_heads: tuple[int, ...]
    num_key_value_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    bias: tuple[str, ...] = ()
    """linears that the files hold a bias of (pruning tools add one to make up for what they took)"""

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, which config.json alone can say."""
        return all(
            len(set(values)) == 1 for values in (self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)
        )

    def record(self) -> dict[str, list[Any]]:
        """As config.json holds it."""
        return {key: list(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            return str(min(values)) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

        return (
            f"{span(self.num_attention_heads)} query heads, {span(self.num_key_value_heads)} key-value heads, feed-forward width "
            f"{span(self.intermediate_size)} in {len(self.intermediate_size)} layers"
        )


def recorded_widths(config: Any) -> LayerWidths | None:
    """What `set_widths` put under `layer_widths`, None if nothing."""
    record = getattr(config, CONFIG_KEY, None)
    return None if record is None else LayerWidths(**{key: tuple(value) for key, value in record.items()})


class NotStructured(Exception):
    """The shapes are not those of structured pruning; the text says why, for the end of another message."""


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_widths(shapes: Shapes, config: Any, *, any_width: bool = False) -> LayerWidths | None:
    """Widths of the layers, where they are not what the configuration says; None where they are, or where there is nothing of
    the kind to be found (another architecture).

    Args:
        shapes: of every tensor in the files, by name.
        config: transformers' configuration.
        any_width: also where all layers are alike; else config.json is taken to belong to another model.

    Raises:
        NotStructured: the shapes differ from the configuration's, but not as structured pruning would have it.
        UserError: the widths recorded in config.json are not those of the files.
    """
    layers = _layers(shapes)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if layers is None or not all(isinstance(getattr(config, key, None), int) for key in keys):
        return None
    hidden, count, heads, width = (int(getattr(config, key)) for key in keys)
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    if len(layers) != count or set(layers) != set(range(count)):  # before anything is made for so many layers as it says
        raise NotStructured(f"the files hold {len(layers)} layers, config.json says {count}")
    alike = LayerWidths((heads,) * count, (kv,) * count, (width,) * count, _biased(shapes))
    as_configured = layers == _expected(alike, hidden, head_size(config))
    found = alike if as_configured else _measure(layers, hidden, head_size(config), _biased(shapes))
    recorded = getattr(config, CONFIG_KEY, None)
    if recorded is not None and recorded != found.record():
        raise UserError(
            f"model.name_or_path: config.json records other {CONFIG_KEY} than the weight files hold ({found}): take config.json from "
            f"where the weights came, or remove {CONFIG_KEY} from it"
        )
    if not as_configured and found.uniform and not any_width:
        said = {key: value[0] for key, value in found.record().items() if key != "bias"}
        raise NotStructured(f"all layers are alike, so config.json can say it: {said}")
    return None if as_configured and not _extra_bias(shapes) else found


def _matches(shapes: Shapes) -> list[tuple[re.Match[str], tuple[int, ...]]]:
    found = [(match, shape) for name, shape in shapes.items() if (match := _TENSOR.fullmatch(name))]
    return found if len({match["prefix"] for match, _ in found}) == 1 else []  # two towers: not a plain decoder


def _layers(shapes: Shapes) -> dict[int, dict[str, tuple[int, ...]]] | None:
    """Shapes of the seven linears of each layer; None if a layer lacks one (fused projections, experts, no gate)."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for match, shape in _matches(shapes):
        if match["kind"] == "weight":
            layers.setdefault(int(match["layer"]), {})[match["a"] or match["m"]] = shape
    whole = layers and all(len(linears) == len(_ATTENTION + _MLP) for linears in layers.values())
    return layers if whole else None


def _biased(shapes: Shapes) -> tuple[str, ...]:
    names = {match["a"] or match["m"] for match, _ in _matches(shapes) if match["kind"] == "bias"}
    return tuple(name for name in _ATTENTION + _MLP if name in names)


def _extra_bias(shapes: Shapes) -> bool:
    """A bias that no family has without saying so in its configuration; those of q, k and v are Qwen2's."""
    return bool({"o_proj", "down_proj"} & set(_biased(shapes)))


def _expected(widths: LayerWidths, hidden: int, size: int) -> dict[int, dict[str, tuple[int, ...]]]:
    rows = zip(widths.num_attention_heads, widths.num_key_value_heads, widths.intermediate_size, strict=True)
    return {
        i: {
            "q_proj": (heads * size, hidden), "k_proj": (kv * size, hidden), "v_proj": (kv * size, hidden),
            "o_proj": (hidden, heads * size), "gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width),
        }
        for i, (heads, kv, width) in enumerate(rows)
    }  # fmt: skip


def _measure(layers: Mapping[int, Mapping[str, tuple[int, ...]]], hidden: int, size: int, bias: tuple[str, ...]) -> LayerWidths:
    """The widths that these shapes say, which must say them consistently."""
    ordered = [layers[i] for i in range(len(layers))]
    widths = LayerWidths(
        tuple(layer["q_proj"][0] // size for layer in ordered),
        tuple(layer["k_proj"][0] // size for layer in ordered),
        tuple(layer["gate_proj"][0] for layer in ordered),
        bias,
    )
    for i, expected in _expected(widths, hidden, size).items():
        wrong = [f"{name} {layers[i][name]} for {shape}" for name, shape in expected.items() if layers[i][name] != shape]
        heads, kv = widths.num_attention_heads[i], widths.num_key_value_heads[i]
        if wrong:
            raise NotStructured(f"layer {i} has {', '.join(wrong)}, with heads of {size} and a residual width of {hidden}")
        if not heads or not kv or not widths.intermediate_size[i]:
            raise NotStructured(f"layer {i} has nothing left in attention or feed-forward")
        if heads % kv:
            raise NotStructured(f"layer {i} has {heads} query heads for {kv} key-value heads, expected a multiple")
    return widths


def set_widths(config: Any, widths: LayerWidths) -> None:
    """Put widths into a configuration: as its own numbers where all layers are alike, else under `layer_widths`."""
    config.head_dim = head_size(config)  # no longer follows from the residual width and the heads
    if widths.uniform:
        config.num_attention_heads = widths.num_attention_heads[0]
        config.num_key_value_heads = widths.num_key_value_heads[0]
        config.intermediate_size = widths.intermediate_size[0]
    if not widths.uniform or {"o_proj", "down_proj"} & set(widths.bias):
        setattr(config, CONFIG_KEY, widths.record())
        if not getattr(config, "auto_map", None):
            config.auto_map = dict(_AUTO_MAP)


def apply_widths(model: Any, widths: LayerWidths) -> None:
    """Replace the linears of a model's decoder layers by ones of these widths, on the device and in the precision of the old ones;
    their weights are not set. Best on the meta device.

    Raises:
        UserError: layers that are not built as Llama's.
    """
    layers: Any = decoder_layers(model)[1]
    for i, layer in enumerate(layers):
        attention: Any = getattr(layer, "self_attn", None)
        mlp: Any = getattr(layer, "mlp", None)
        strange = _strange(attention, _ATTENTION, _HEAD_NORMS, getattr(attention, "head_dim", None)) + _strange(
            mlp, _MLP, set(), None
        )
        if strange:
            raise UserError(
                f"model.name_or_path: layer {i} has widths of its own, but {type(model).__name__} is not built as Llama is: found "
                f"{', '.join(strange)}; structured pruning is understood where a layer has self_attn.{{q,k,v,o}}_proj and "
                "mlp.{gate,up,down}_proj and nothing else that grows with their widths"
            )
        heads, kv_heads, width = widths.num_attention_heads[i], widths.num_key_value_heads[i], widths.intermediate_size[i]
        resize_layer(layer, heads, kv_heads, width, list(widths.bias))
    set_widths(model.config, widths)


def _strange(part: Any, linears: tuple[str, ...], norms: set[str], size: int | None) -> list[str]:
    """What keeps a layer's part from being understood."""
    if part is None:
        return [f"no part with {linears[0]}"]
    found = [f"no linear {name}" for name in linears if type(getattr(part, name, None)) is not nn.Linear]
    for name, parameter in part.named_parameters():
        owner = name.split(".")[0]
        if owner not in linears and not (owner in norms and tuple(parameter.shape) == (size,)):
            found.append(f"{name} of shape {tuple(parameter.shape)}")
    return found


def remote_code(config: Any) -> tuple[str, str] | None:
    """Name and text of the file that plain transformers needs beside weights of uneven layers, None for any other model."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if getattr(config, "auto_map", None) != _AUTO_MAP or not isinstance(family, str):
        return None
    file = Path(modeling_uneven.__file__)
    return file.name, file.read_text(encoding="utf-8").replace("LlamaForCausalLM", family)
