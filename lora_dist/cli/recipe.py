"""`lora-dist recipe FILE.yaml`: prune, train, merge and evaluate in stages, resumable at any of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import EvalArgs, MergeArgs, PruneArgs, RecipeArgs
from lora_dist.cli import train
from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError
from lora_dist.operations.recipe import Stage, is_done, read_recipe, run_stage, summary

VERBS: dict[str, tuple[type, Verb]] = {
    "prune": (PruneArgs, Verb("lora-dist prune", "", positionals=("model", "out"))),
    "train": (RunConfig, train.VERB),
    "merge": (MergeArgs, Verb("lora-dist merge", "", positionals=("base", "adapter", "out"))),
    "eval": (EvalArgs, Verb("lora-dist eval", "", positionals=("model",))),
}


def main(argv: Sequence[str]) -> int:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise UserError(f"recipe: found {started} processes by a launcher, expected one: its key processes says how many train")
    args = parse(RecipeArgs, argv, Verb("lora-dist recipe", RecipeArgs.__doc__ or "", positionals=("file",)))
    stages = read_recipe(Path(args.file))
    _check(stages)
    done = [is_done(stage) for stage in stages]
    if False in done and True in done[done.index(False) :]:
        late = stages[done.index(False) + done[done.index(False) :].index(True)]
        raise UserError(
            f"{late.name}: is done, but {stages[done.index(False)].name} before it is not; remove {late.folder} to do it again"
        )
    for number, (stage, skipped) in enumerate(zip(stages, done, strict=True), start=1):
        head = f"Stage {number}/{len(stages)}, {stage.name}"
        if skipped:
            print(f"{head}: done before", flush=True)
            continue
        print(f"{head}: lora-dist {shlex.join(stage.argv)}", flush=True)
        if args.dry_run:
            continue
        code = run_stage(stage)
        if code:
            print(f"{head}: ended with exit code {code}; the same command goes on from here", flush=True)
            return code
    if not args.dry_run:
        print("\n".join(["", "Recipe complete", *summary(stages)]), flush=True)
    return 0


def _check(stages: Sequence[Stage]) -> None:
    """Every stage's options, before the first of them runs. Raises UserError with all problems, each with its stage's name."""
    problems = []
    for stage in stages:
        cls, verb = VERBS[stage.verb]
        try:
            parse(cls, stage.argv[1:], verb)
        except UserError as error:
            problems += [f"{stage.name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
