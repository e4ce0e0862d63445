"""`lora-dist generate MODEL`: a prompt, a file of prompts, or one after the other from a terminal or a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dist.arguments import GenerateArgs
from lora_dist.cli.options import Verb, names, parse
from lora_dist.log import UserError

if TYPE_CHECKING:
    from lora_dist.engine.answer import Answerer

IDLE_S = 7 * 24 * 3600.0
"""how long the other processes wait for somebody at a terminal to type"""


def main(argv: Sequence[str]) -> int:
    args = parse(GenerateArgs, argv, Verb("lora-dist generate", GenerateArgs.__doc__ or "", positionals=("model",)))
    if args.output is not None:
        try:
            Path(args.output).open("a").close()  # found out before the model is loaded, not after hours
        except OSError as error:
            raise UserError(f"output: {args.output} cannot be written ({error.strerror})") from error
    from lora_dist.engine.answer import Answerer
    from lora_dist.parallel import close_world, init_world

    world = init_world(device=args.device, always=args.strategy != "ddp", timeout_s=IDLE_S)
    try:
        with names(model_name_or_path="MODEL", model_config_name="config_name", data_prompt_template="prompt_template"):
            answerer = Answerer(args, world)
        if answerer.quantisation is not None and world.is_main:
            asked = args.load_in_4bit or args.load_in_8bit
            print(f"[base in {answerer.quantisation}{'' if asked else ', as the adapter was trained'}]", file=sys.stderr)
        if args.prompt_file is not None:
            return _file(answerer)
        if args.prompt is not None:
            return _prompt(answerer, args.prompt)
        from lora_dist.cli.interactive import converse

        return converse(answerer)
    finally:
        close_world()


def write(text: str) -> None:
    """To stdout at once, for streams."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show(answerer: Answerer, prompt: str, before: str) -> list[str]:
    """Collective: the answers to a text for the model, on rank 0's stdout with `before` before each; returns them."""
    main = answerer.world.is_main
    if not answerer.streams:
        texts = answerer.one(prompt, write)
        if main:
            write("".join(f"{before}{text}\n" for text in texts))
        return texts
    started = False

    def piece(text: str) -> None:
        nonlocal started
        write(text if started else before + text)  # not before the prompt is known to be of use
        started = True

    texts = answerer.one(prompt, piece)
    if main:
        write("\n" if started else f"{before}\n")
    return texts


def _prompt(answerer: Answerer, prompt: str) -> int:
    show(answerer, answerer.render(prompt), prompt if answerer.form.plain else "")
    _tell_speed(answerer)
    return 0


def _file(answerer: Answerer) -> int:
    from lora_dist.monitor.console import Console, ProgressBar

    bars: list[ProgressBar] = []

    def progress(batches: int) -> Callable[[], None]:
        bars.append(Console(enabled=answerer.world.is_main and sys.stderr.isatty()).bar(batches, "Generating"))
        return bars[0].update

    texts, answers = answerer.file(progress)
    bars[0].close()
    if not answerer.world.is_main:
        return 0
    if answerer.args.output is None:
        for answer in answers:
            write((texts[answer.prompt] if answerer.form.plain else "") + answer.text + "\n")
    else:
        lines = [
            {"index": a.prompt, "sequence": a.sequence, "prompt": texts[a.prompt], "text": a.text, "tokens": a.tokens}
            for a in answers
        ]
        Path(answerer.args.output).write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
        print(f"{len(answers):,} texts written to {answerer.args.output}", file=sys.stderr)
    _tell_speed(answerer)
    return 0


def _tell_speed(answerer: Answerer) -> None:
    if answerer.args.verbose and answerer.world.is_main:
        print(f"[{answerer.speed}]", file=sys.stderr)
