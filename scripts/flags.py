"""Tables of a guide's flags -> options of `lora-dist train`. Shared by `finetune_lm.py` and `finetune_lora.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

Values = Mapping[str, tuple[str, str | None, str]]
"""flag -> (key of lora-dist train, default of the guide, help)"""
Switches = Mapping[str, tuple[str, str]]
"""flag -> (key, help); on when it is named, off when it is not"""


def switch(text: str) -> str:
    """The value of a switch that is given one."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text}, expected true or false")
    return text.lower()


def add_switch(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(f"--{flag}", nargs="?", const="true", default="false", type=switch, help=text)


def make_parser(description: str | None, values: Values, switches: Switches) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for flag, (key, default, text) in values.items():
        parser.add_argument(f"--{flag}", default=default, help=f"{text} ({key}; default {default})")
    for flag, (key, text) in switches.items():
        add_switch(parser, flag, f"{text} ({key})")
    return parser


def to_options(flags: argparse.Namespace, values: Values, switches: Switches) -> list[str]:
    """`--key=value` of every flag that has a value."""
    options = []
    for flag, (key, _, _) in values.items():
        value = getattr(flags, flag)
        if value is not None:
            options.append(f"--{key}={value}")
    return options + [f"--{key}={getattr(flags, flag)}" for flag, (key, _) in switches.items()]
