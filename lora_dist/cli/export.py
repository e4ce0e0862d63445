"""`lora-dist export MODEL OUT`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import ExportArgs
from lora_dist.cli.options import Verb, names, parse


def main(argv: Sequence[str]) -> int:
    args = parse(ExportArgs, argv, Verb("lora-dist export", ExportArgs.__doc__ or "", positionals=("model", "out")))
    from lora_dist.engine.export import export

    with names(model_name_or_path="MODEL", model_config_name="config_name"):
        report = export(args)
    proof = report.proof
    if report.merged_error is not None:
        print(f"✅ Merged: logits differ from the adapter's by {report.merged_error:.1e} of the largest")
    print(f"✅ Logits, onnxruntime against torch: largest difference {proof.logits_error:.1e} of the largest logit, in 3 shapes")
    if report.pattern_digest:
        print(
            f"✅ Pattern kept: all {proof.zero_tiles:,} pruned tiles are exactly 0.0 in the graph (digest {report.pattern_digest[:12]})"
        )
    print(
        f"ONNX model (opset {proof.opset}, inputs {', '.join(proof.inputs)}, {proof.file_bytes / 2**20:,.1f} MiB) saved in {report.out}"
    )
    return 0
