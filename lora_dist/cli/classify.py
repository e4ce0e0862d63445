"""`lora-dist classify MODEL`: a text, a file of texts, or one after the other from a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dist.arguments import ClassifyArgs
from lora_dist.cli.options import Verb, names, parse
from lora_dist.log import UserError

if TYPE_CHECKING:
    from lora_dist.engine.classify import Answer, Text


def main(argv: Sequence[str]) -> int:
    args = parse(ClassifyArgs, argv, Verb("lora-dist classify", ClassifyArgs.__doc__ or "", positionals=("model",)))
    texts = None if args.file is None else _read(args.file)
    from lora_dist.engine.classify import Classifier
    from lora_dist.parallel import close_world, init_world

    world = init_world(device=args.device)
    try:
        with names(model_name_or_path="MODEL"):
            classifier = Classifier(args, world)
        if args.text is not None:
            texts = [(args.text, args.text_pair)]
        if texts is not None:
            for answer in classifier.answer(texts):
                print(line(answer))
            return 0
        for text in _typed():
            print(line(classifier.answer([text])[0]), flush=True)
        return 0
    finally:
        close_world()


def line(answer: Answer) -> str:
    """`positive\t0.9731`; of a number, the number."""
    return answer.label if answer.confidence is None else f"{answer.label}\t{answer.confidence:.4f}"


def _read(file: str) -> list[Text]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file: {file} cannot be read ({error})") from error
    texts = [_text(each) for each in lines if each.strip()]
    if not texts:
        raise UserError(f"file: {file} holds no text, expected one a line")
    return texts


def _text(each: str) -> Text:
    first, tab, second = each.partition("\t")
    return first, second if tab else None


def _typed() -> Iterator[Text]:
    """Until the end of input or `quit`."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        each = sys.stdin.readline()
        if not each or each.strip() in ("quit", "exit"):
            return
        if each.strip():
            yield _text(each.rstrip("\n"))
