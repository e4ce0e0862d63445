"""Module -> ONNX directory, whole or none: the graph, what onnxruntime makes of it, and the zeros in the file itself.

torch's own exporter writes the graph, batch and sequence left free; configuration, tokenizer and pattern go beside it. Called by
`engine/export.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockMask, Pattern
from lora_dist.log import GuardError, UserError
from lora_dist.models.export import save_configurations, staged, write_rest
from lora_dist.models.loading import quiet_transformers

ONNX_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_SHAPES = ((1, 1), (2, 17), (3, 64))
"""batches and sequences that logits are compared on; none is the shape that was traced"""
_TRACED = (2, 9)
_INLINE_BYTES = 1 << 30
"""larger models keep their weights in model.onnx.data: a protobuf ends at 2 GiB"""


@dataclass(frozen=True)
class OnnxProof:
    """What was found in the written file."""

    logits_error: float
    """largest |onnxruntime - torch| logit over the largest |torch| logit, float32, padding left out"""
    zero_tiles: int
    """pruned tiles (elements, for an element mask) found exactly 0.0"""
    inputs: tuple[str, ...]
    opset: int
    file_bytes: int
    """of graph and weights"""


def require_onnx() -> None:
    """Raises UserError where a package is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"format: onnx needs {', '.join(missing)}, which is not installed: pip install 'lora-dist[onnx]'")


class _Logits(nn.Module):
    """Positional inputs -> logits, which is what the exporter traces."""

    def __init__(self, model: Any, inputs: tuple[str, ...]):
        super().__init__()
        self.model, self.inputs = model, inputs
        self.uses_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, *tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        if self.uses_cache:
            given["use_cache"] = False
        logits: Tensor = self.model(**given).logits
        return logits


def export_onnx(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    pattern: Pattern | None,
    weights_OI: Mapping[str, Tensor],
    opset: int | None,
    tolerance: float,
    texts: Mapping[str, str],
) -> OnnxProof:
    """Write and check a model, float32, on the CPU.

    Args:
        model: of transformers, in eval mode.
        pattern: that its weights have, by module name.
        weights_OI: of the pruned linears, by module name.
        texts: further files by name.

    Raises:
        UserError: it cannot be exported, `out` cannot be written, or a package is missing; nothing is left then.
        GuardError: logits differ by more than `tolerance`, or a pruned tile is not zero.
    """
    require_onnx()
    asked = inspect.signature(model.forward).parameters
    inputs = tuple(
        name for name in _INPUTS if name in asked and (name != "token_type_ids" or name in tokenizer.model_input_names)
    )
    logits = _Logits(model, inputs).eval()
    with staged(out) as folder:
        used_opset = _write(logits, folder / ONNX_FILE, opset)
        error = _compare(logits, folder / ONNX_FILE)
        if error > tolerance:
            raise GuardError(
                f"guard after export: onnxruntime's logits differ from torch's by {error:.1e} of the largest, expected at most "
                f"{tolerance:.0e}; nothing was written"
            )
        zeros = 0 if pattern is None else _prove_zeros(folder / ONNX_FILE, weights_OI, pattern)
        size = sum(file.stat().st_size for file in folder.glob(f"{ONNX_FILE}*"))
        save_configurations(model, folder)
        write_rest(model.config, tokenizer, folder, pattern, texts)
    return OnnxProof(error, zeros, inputs, used_opset, size)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that it looked for and of its own deprecations, none of which users can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _batch(logits: _Logits, rows: int, length: int) -> tuple[Tensor, ...]:
    """Random tokens; the last of several rows ends in padding, its second half."""
    vocabulary = logits.model.get_input_embeddings().num_embeddings
    ids_BL = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask_BL = torch.ones_like(ids_BL)
    if rows > 1:
        mask_BL[-1, (length + 1) // 2 :] = 0
    types_BL = torch.zeros_like(ids_BL)
    if (getattr(logits.model.config, "type_vocab_size", None) or 0) > 1:
        types_BL[:, (length + 1) // 2 :] = 1  # pairs of texts
    return (ids_BL, mask_BL, types_BL)[: len(logits.inputs)]


def _write(logits: _Logits, file: Path, opset: int | None) -> int:
    """Returns the operator set that was used."""
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=_context(logits.model))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                logits,
                _batch(logits, *_TRACED),
                dynamo=True,
                dynamic_shapes=(({0: batch, 1: sequence},) * len(logits.inputs),),
                input_names=list(logits.inputs),
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # where in which file of this machine each came from
            weights = sum(p.numel() * p.element_size() for p in logits.parameters())
            program.save(str(file), external_data=weights > _INLINE_BYTES)
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise UserError(
            f"MODEL: {type(logits.model).__name__} cannot be written as ONNX by torch {torch.__version__} ({reason})"
        ) from error
    return int(program.model.opset_imports[""])


def _context(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


@torch.no_grad()
def _compare(logits: _Logits, file: Path) -> float:
    """Largest difference over all shapes, of what is not padding, over the largest logit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, length in _SHAPES:
        batch = _batch(logits, rows, min(length, _context(logits.model)))
        expected = logits(*batch).float()
        found = session.run(["logits"], {name: tensor.numpy() for name, tensor in zip(logits.inputs, batch, strict=True)})[0]
        difference = (torch.from_numpy(found) - expected).abs()
        if expected.dim() == 3:
            difference, expected = difference[batch[1].bool()], expected[batch[1].bool()]
        worst = max(worst, float(difference.max() / expected.abs().max().clamp_min(1e-30)))
    return worst


def _prove_zeros(file: Path, weights_OI: Mapping[str, Tensor], pattern: Pattern) -> int:
    """Pruned tiles in the file's own weights. The exporter turns weights around and gives them names of its own, so they are found by
    their content: each has to be there to the bit, one way round or the other.

    Raises:
        GuardError: a layer's weight that is not in the file, or a pruned tile that is not zero.
    """
    import onnx
    from onnx import numpy_helper

    held: dict[str, Tensor] = {}
    for initializer in onnx.load(str(file)).graph.initializer:
        if len(initializer.dims) == 2:
            weight = torch.from_numpy(np.array(numpy_helper.to_array(initializer)))
            held[_digest(weight)] = weight
    zeros = 0
    for name, mask in pattern.items():
        weight_OI = weights_OI[name]
        same, turned = held.get(_digest(weight_OI)), held.get(_digest(weight_OI.T))
        found = same if same is not None else turned.T if turned is not None else None
        if found is None:
            raise GuardError(f"guard after export: the weight of layer {name} is not in the graph as it is in the model")
        violation = mask.first_violation(found)
        if violation is not None:
            raise GuardError("guard after export: " + violation[0].describe(name, mask.kind, violation[1]))
        zeros += int((~mask.kept_PQ).sum()) if isinstance(mask, BlockMask) else found.numel() - mask.kept_elements()
    return zeros


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + weight.contiguous().numpy().tobytes()).hexdigest()
