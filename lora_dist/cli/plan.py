"""`lora-dist plan CONFIG --gpus 8 --gpu_memory 80GB [TRAIN-OPTIONS]`: will it fit, how fast, and how is it started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import PlanArgs
from lora_dist.arguments.planning import size
from lora_dist.cli import train
from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError

VERB = Verb("lora-dist plan", PlanArgs.__doc__ or "", positionals=("config",))
_PLACEHOLDERS = {"train.output_dir": "out/run", "data.dataset_name": "text.txt"}
"""options without which nothing can be trained, and everything planned"""


def main(argv: Sequence[str]) -> int:
    own, of_train = split(argv)
    if any(token in ("-h", "--help") for token in own):
        parse(PlanArgs, ["--help"], VERB)
    args, config = _parse(own, of_train)
    from lora_dist.operations.plan import run

    lines, found = run(
        config,
        of_train,
        processes=args.gpus,
        memory=size(args.gpu_memory) or 0,
        flops=args.gpu_flops,
        bandwidth=args.bandwidth,
        measure=args.measure,
        cuda=args.device == "cuda",
        overhead=None if args.overhead is None else size(args.overhead),
        every=args.all,
    )
    if args.json is not None:
        try:
            Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"json: {args.json} cannot be written ({error.strerror}), expected a file in an existing folder"
            ) from error
    print("\n".join(lines))
    return 0 if found["best"] is not None else 1


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own options, and those of `lora-dist train`: the configuration, and everything else that is not this command's."""
    own: list[str] = []
    of_train: list[str] = []
    fields = {f.name: f.type for f in dataclasses.fields(PlanArgs)}
    tokens, named = list(argv), False
    while tokens:
        token = tokens.pop(0)
        name, given, _ = token.removeprefix("--").partition("=")
        follows = bool(tokens) and not tokens[0].startswith("--")
        if token in ("-h", "--help"):
            own.append(token)
        elif token.startswith("--") and name.replace("-", "_") in fields and name != "config":
            own.append(token)
            switch = fields[name.replace("-", "_")] == "bool" and follows and tokens[0].lower() not in ("true", "false")
            if not given and follows and not switch:
                own.append(tokens.pop(0))
        elif not token.startswith("--") and not given and not named:
            named = True
            own.append(token)
            of_train = ["--config", token, *of_train]
        else:
            of_train.append(token)
            if token.startswith("--") and not given and follows:
                of_train.append(tokens.pop(0))
    return own, of_train


def _parse(own: list[str], of_train: list[str]) -> tuple[PlanArgs, RunConfig]:
    """Both, with all problems together."""
    problems: list[str] = []
    args, config = PlanArgs(), RunConfig()
    try:
        args = parse(PlanArgs, own, VERB)
    except UserError as error:
        problems += error.problems
    try:
        config = parse(RunConfig, of_train, train.VERB)
    except UserError as error:
        missing = [key for key in _PLACEHOLDERS if any(line.startswith(f"{key}: found nothing") for line in error.problems)]
        try:
            config = parse(RunConfig, [*of_train, *(f"--{key}={_PLACEHOLDERS[key]}" for key in missing)], train.VERB)
        except UserError as rest:
            problems += rest.problems
    if problems:
        raise UserError(problems)
    return args, config
