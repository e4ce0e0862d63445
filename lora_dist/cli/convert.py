"""`lora-dist convert PICKLE OUT`, `lora-dist convert MODEL OUT --storage blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import ConvertArgs
from lora_dist.cli.options import Verb, names, parse


def main(argv: Sequence[str]) -> int:
    args = parse(ConvertArgs, argv, Verb("lora-dist convert", ConvertArgs.__doc__ or "", positionals=("pickle", "out")))
    if Path(args.pickle).expanduser().is_dir():
        return storage(args)
    from lora_dist.engine.convert import convert

    with names(model_name_or_path="PICKLE", model_config_name="config_name"):
        convert(args)
    return 0


def storage(args: ConvertArgs) -> int:
    """A model directory, written in the other way."""
    from lora_dist.engine.storage import convert_storage

    with names(model_name_or_path="MODEL", model_config_name="config_name"):
        report = convert_storage(args)
    size = f"{report.bytes_after / 2**20:,.1f} MiB of weights, before {report.bytes_before / 2**20:,.1f}"
    if report.same_fingerprint:
        print(f"✅ Every tensor read back is the one in {args.pickle} (fingerprint {report.fingerprint[:12]})")
    else:
        print(
            f"⚠️  {args.pickle} has pruned weights of -0.0, which are 0.0 in {report.out}: to an adapter they are different bases (fingerprint "
            f"{report.fingerprint[:12]})"
        )
    print(f"Model saved in {report.out} ({report.storage}: {size})")
    return 0
