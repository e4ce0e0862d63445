"""`lora-dist doctor`: is this machine, with this folder and this environment, ready to train? One line a check, cheap ones first.

A check is a function from `Context` to findings; one that crashes is a failure with the exception's one line. Called by
`cli/doctor.py`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path

from lora_dist.arguments import DoctorArgs
from lora_dist.log import UserError
from lora_dist.operations.doctor.context import Check, Context, existing_folder
from lora_dist.operations.doctor.devices import check_gpus
from lora_dist.operations.doctor.disk import check_disk, check_space
from lora_dist.operations.doctor.environment import check_environment, refuse_launcher
from lora_dist.operations.doctor.machine import check_machine
from lora_dist.operations.doctor.network import check_hub, check_model, check_tracker
from lora_dist.operations.doctor.processes import check_processes
from lora_dist.operations.doctor.report import Finding, Printer, fail, one_line
from lora_dist.operations.doctor.save_time import check_save_time
from lora_dist.operations.doctor.versions import check_versions

CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("versions",), check_versions),
    (("environment",), check_environment),
    (("machine",), check_machine),
    (("gpus",), check_gpus),
    (("disk",), check_disk),
    (("hub",), check_hub),
    (("tracker",), check_tracker),
    (("model",), check_model),
    (("space",), check_space),
    (("save_time",), check_save_time),
    (("collectives", "strategies"), check_processes),
)
"""names for --only, and what they run; in order"""


def run(args: DoctorArgs, env: Mapping[str, str], printer: Printer) -> int:
    """Run the checks and show what they find. Returns the exit code: 0, or 1 where one failed.

    Raises:
        UserError: a file where the run folder is to be, or a start under a launcher.
    """
    start = time.perf_counter()
    refuse_launcher(env)
    context = Context(args, env, existing_folder(Path(args.output_dir)))
    for names, check in CHECKS:
        if args.only and not set(args.only) & set(names):
            continue
        printer.working(names[0])
        with closing(_guarded(names[0], check, context)) as findings:  # also on Ctrl-C: what was started is ended
            for finding in findings:
                printer.show(finding)
                printer.working(names[-1])
    return printer.close(time.perf_counter() - start)


def _guarded(name: str, check: Check, context: Context) -> Generator[Finding, None, None]:
    """A check's findings, and one that failed where the check itself does."""
    findings = check(context)
    with closing(findings):
        while True:
            try:
                finding = next(findings)
            except StopIteration:
                return
            except UserError as error:
                finding = fail(name, error.problems[0], "mend that, or leave this check out with --only")
            except Exception as error:
                finding = fail(
                    name,
                    f"this check itself failed: {one_line(error)}",
                    "lora-dist doctor --only with the other checks; please report it",
                )
            yield finding
