"""`lora-dist export`: a model, merged with an adapter where one is given, as ONNX. Called by `cli/export.py`."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora_dist.adapter import compute_beside, merge_adapter
from lora_dist.arguments import ExportArgs
from lora_dist.blocks import Guard
from lora_dist.engine.merge import check_logits, probe_logits, probe_tokens, relative_difference
from lora_dist.engine.open_model import open_model
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.export import check_output
from lora_dist.models.onnx_export import OnnxProof, export_onnx, require_onnx
from lora_dist.parallel import World

REPORT = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what was proven."""

    out: Path
    proof: OnnxProof
    pattern_digest: str | None
    merged_error: float | None
    """largest |merged - adapter| logit over the largest, float32; None without an adapter"""


def export(args: ExportArgs) -> ExportReport:
    """Merge, export, prove; one process, on the CPU.

    Raises:
        UserError: bad input, or a model that cannot be exported.
        GuardError: logits or zeros are not kept; nothing is left in OUT.
    """
    require_onnx()
    check_output(args.out)
    opened = open_model(
        args.model,
        args.adapter,
        world=World(),
        config_name=args.config_name,
        dtype=torch.float32,
        trust_remote_code=args.trust_remote_code,
        dequantise=True,  # an adapter of a quantised base is merged into what it was trained on, as `merge` does
    )
    pattern, model, merged_error = opened.found.pattern, opened.model, None
    transposed = {linear.name for linear in opened.linears if linear.transposed}
    if args.adapter is not None:
        if pattern is not None and not opened.masked:
            if not args.densify:
                raise UserError(
                    f"adapter: found an unmasked update for a base with {pattern.sparsity:.0%} pruned weights, whose pattern merging it "
                    "would destroy, expected a masked one; --densify merges all of it, lora-dist merge --project keeps the pattern"
                )
            pattern = None
        ids_BL = probe_tokens(opened.base.model, torch.device("cpu"))
        compute_beside(opened.model)
        before = probe_logits(opened.model, ids_BL)
        model = merge_adapter(opened.model)
        merged_error = relative_difference(probe_logits(model, ids_BL), before)
        check_logits(merged_error, project=None)
        Guard(dict(model.named_parameters()), pattern, transposed=transposed, when="after merging")
    model.config.use_cache = opened.base.use_cache
    proof = export_onnx(
        model,
        opened.base.tokenizer,
        args.out,
        pattern=pattern,
        weights_OI={linear.name: linear.weight_OI.detach() for linear in prunable_linears(model)},
        opset=args.opset,
        tolerance=args.tolerance,
        texts={},
    )
    report = ExportReport(Path(args.out), proof, pattern.digest if pattern else None, merged_error)
    try:
        (report.out / REPORT).write_text(
            json.dumps({**asdict(report), "out": args.out, "options": asdict(args)}, indent=1) + "\n"
        )
    except OSError as error:
        shutil.rmtree(report.out)
        raise UserError(f"OUT: {args.out} could not be written ({error.strerror}); free space or choose another disk") from error
    return report
