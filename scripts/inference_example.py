#!/usr/bin/env python
"""Label texts with the adapter that train_lora_basic.py wrote: typed ones, a few examples, or one text.

The base is named in the adapter's folder; `--model` gives another place for it. Prints label and confidence.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import ClassifyArgs
from lora_dist.log import UserError

EXAMPLES = (
    "This movie was absolutely fantastic!",
    "Terrible film, complete waste of time.",
    "The acting was okay but the plot was confusing.",
    "A masterpiece from beginning to end.",
)


def _model_of(adapter: Path) -> str:
    """The base that a run's folder names, or that an adapter by itself does (of a collection the active one)."""
    from lora_dist.adapter import adapter_folder, read_adapter_config

    file = adapter / "run_config.yaml"
    try:
        return str(yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["name_or_path"])
    except FileNotFoundError:
        named = read_adapter_config(adapter_folder(adapter)).base_model_name_or_path
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"adapter: {file} does not name the base ({error}), expected --model DIR") from error
    if not named:
        raise UserError(f"adapter: {adapter} does not name the base, expected --model DIR")
    return str(named)


def run(argv: list[str]) -> int:
    """Answer, in one of three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("interactive", "demo", "text"), default="interactive")
    parser.add_argument("--text", help="with --mode text")
    parser.add_argument("--adapter", default="output", help="folder that train_lora_basic.py wrote (default output)")
    parser.add_argument("--model", help="base model (default: the one that the adapter was trained on)")
    flags = parser.parse_args(argv)
    if (flags.mode == "text") != (flags.text is not None):
        raise UserError(f'text: found {flags.text!r} with --mode {flags.mode}, expected --mode text --text "..."')
    model = flags.model or _model_of(Path(flags.adapter))
    from lora_dist.engine.classify import Classifier
    from lora_dist.parallel import World

    classifier = Classifier(ClassifyArgs(model, flags.adapter), World())

    def show(text: str) -> None:
        answer = classifier.answer([(text, None)])[0]
        sure = "" if answer.confidence is None else f" (confidence: {answer.confidence:.2%})"
        print(f"Text: {text}\n  Prediction: {answer.label}{sure}", flush=True)

    for text in [flags.text] if flags.mode == "text" else EXAMPLES if flags.mode == "demo" else _typed():
        show(text)
    return 0


def _typed():
    print("Type a text, or quit:", flush=True)
    for line in sys.stdin:
        if line.strip() in ("quit", "exit", "q"):
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(run_reporting("inference_example.py", lambda: run(sys.argv[1:])))
