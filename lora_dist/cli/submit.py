"""`lora-dist submit --config FILE --nodes 2 ... -- TRAIN-OPTIONS`: check a training run, and queue it under Slurm."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import SubmitArgs
from lora_dist.cli import train
from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError

VERB = Verb("lora-dist submit", SubmitArgs.__doc__ or "")


def main(argv: Sequence[str]) -> int:
    from lora_dist.operations.submit import describe, folder_problems, queue, read_sweep, write_job

    own, of_train = split(argv)
    misplaced = [token.partition("=")[0] for token in own if _is_of_train(token)]
    if misplaced:
        raise UserError(
            f"{misplaced[0]}: found before --, expected behind it, where options of lora-dist train stand: "
            f"lora-dist submit ... -- --{misplaced[0].removeprefix('--')} VALUE"
        )
    if any(token in ("-h", "--help") for token in own):
        parse(SubmitArgs, ["--help"], VERB)
    problems: list[str] = []
    args, config, lines = SubmitArgs(), None, []
    try:
        args = parse(SubmitArgs, own, VERB)
    except UserError as error:
        problems += error.problems
    try:
        config = parse(RunConfig, of_train, train.VERB)
    except UserError as error:
        problems += error.problems
    if args.sweep is not None:
        try:
            lines = read_sweep(Path(args.sweep))
        except UserError as error:
            problems += error.problems
    for number, words in enumerate(lines, start=1):
        try:
            parse(RunConfig, [*of_train, *words], train.VERB)
        except UserError as error:
            problems += [f"sweep: line {number}: {line}" for line in error.problems if line not in problems]
    values = dataclasses.asdict(config) if config is not None else {}
    if config is not None:
        problems += folder_problems(values, args)
    if problems:
        raise UserError(problems)
    job = write_job(args, values, python=sys.executable, directory=Path.cwd(), tasks=len(lines) or None, argv=["submit", *argv])
    if args.dry_run:
        print(f"not queued: {job.script}\n\n{job.script.read_text()}", end="")
        return 0
    print("\n".join(describe(job, queue(job), array=args.array is not None or bool(lines))))
    return 0


def _is_of_train(token: str) -> bool:
    """Whether this is an option of `lora-dist train`, under its own name or a short one, and not of this command."""
    sections = "|".join(f.name for f in dataclasses.fields(RunConfig))
    own = {f.name for f in dataclasses.fields(SubmitArgs)}
    short = "|".join(name for name in train.VERB.aliases if name not in own)
    return re.match(rf"--(({sections})\.|({short})(=|$))|({sections})\.\w+=", token) is not None


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own options, and those of `lora-dist train`: every `--config`, and what follows `--`."""
    own, of_train = list(argv), []
    if "--" in own:
        place = own.index("--")
        own, of_train = own[:place], own[place + 1 :]
    files: list[str] = []
    rest: list[str] = []
    while own:
        token = own.pop(0)
        if token == "--config" and own:
            files += [token, own.pop(0)]
        elif token.startswith("--config="):
            files.append(token)
        elif token.replace("-", "_") == "__sbatch_args" and own:
            rest.append(f"{token}={own.pop(0)}")  # its value begins with -- as well
        else:
            rest.append(token)
    return rest, [*files, *of_train]
