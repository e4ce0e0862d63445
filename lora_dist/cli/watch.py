"""`lora-dist watch RUN`: follow a run in the terminal. Ends when the run does, with its exit code; Ctrl-C ends the watching alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import WatchArgs
from lora_dist.cli.options import Verb, parse
from lora_dist.log import EXIT_HUNG, EXIT_STOPPED, UserError

EXIT_CODES = {"completed": 0, "stopped": EXIT_STOPPED, "failed": 1, "hung": EXIT_HUNG}


def main(argv: Sequence[str]) -> int:
    args = parse(WatchArgs, argv, Verb("lora-dist watch", WatchArgs.__doc__ or "", positionals=("run",)))
    try:
        from rich.console import Console

        from lora_dist.monitor.watch import picture, watch
    except ImportError as error:
        raise UserError(f"watch: {error.name} is not installed; pip install 'lora_dist[report]'") from error
    console = Console(highlight=False)
    once = args.once or not console.is_terminal or console.is_dumb_terminal
    try:
        state = watch(Path(args.run), console, once=once, interval_s=args.interval_s)
        code = 0 if once else EXIT_CODES[state]
    except KeyboardInterrupt:
        code = 0
    if args.svg is not None:
        Path(args.svg).write_text(picture(Path(args.run)), encoding="utf-8")
    return code
