"""`lora-dist report RUN...`: one HTML page of one run or several, and its charts as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import ReportArgs
from lora_dist.cli.options import Verb, parse


def main(argv: Sequence[str]) -> int:
    args = parse(ReportArgs, argv, Verb("lora-dist report", ReportArgs.__doc__ or "", rest="runs"))
    from lora_dist.monitor.report import write_report
    from lora_dist.monitor.runs import read_runs

    found = read_runs(args.runs)
    output = Path(args.output) if args.output else _default_output(Path(args.runs[0]), several=len(found) > 1)
    files = write_report(
        found, output, title=args.title, bands=args.bands, measured=Path(args.evaluation) if args.evaluation else None
    )
    for run in found:
        for gap in run.gaps:
            print(f"ℹ️  {run.name}: {gap}")
    print(f"✅ {files[0]} and {len(files) - 1} PNG files beside it")
    return 0


def _default_output(run: Path, *, several: bool) -> Path:
    name = "report.html"
    return Path(name) if several else (run if run.is_dir() else run.parent) / name
