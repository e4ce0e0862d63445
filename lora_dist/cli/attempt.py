"""What `launch/slurm.sbatch` asks before and after each attempt. Not a verb: nobody but the script calls it.

begin TRAIN-OPTIONS...                                  checks them; prints the file of this attempt in the run folder
end FILE EXIT-CODE MAX-REQUEUES MAX-IDLE RETRY-FAILED   prints `requeue` or `exit N`; why on stderr
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_dist.cli import train
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.operations.attempts import Limits, begin, conclude


def main(argv: Sequence[str]) -> int:
    if argv[0] == "begin":
        config = parse(RunConfig, argv[1:], train.VERB)
        job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
        if array:
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        print(begin(Path(config.train.output_dir), job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)))
        return 0
    file, exit_code, requeues, idle, retry_failed = argv[1:]
    verdict = conclude(Path(file), int(exit_code), Limits(int(requeues), int(idle), retry_failed == "1"))
    print(f"slurm.sbatch: {verdict.text}", file=sys.stderr)
    print("requeue" if verdict.requeue else f"exit {verdict.exit_code}")
    return 0
