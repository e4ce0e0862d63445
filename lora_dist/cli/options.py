"""Command lines and YAML files -> typed dataclasses, with every problem reported together.

Values come from defaults < YAML (`--config FILE`, repeatable) < command line (`--train.learning_rate 1e-4`, `--train.bf16`,
`train.max_steps=10`). jsonargparse turns texts into types, writes the help from the attribute docstrings, and prints the
configuration; here the settings are taken one by one, so that one wrong key does not hide the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from lora_dist.log import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Verb:
    """How a command line is read.

    Attributes:
        prog: what the help calls the command.
        positionals: fields that are given without a name, in order.
        rest: a field of texts that takes all that is given without a name after those.
        sections: the dataclass holds one dataclass a section (`--train.seed`), else plain fields (`--seed`).
        aliases: short names for keys.
    """

    prog: str
    description: str
    positionals: tuple[str, ...] = ()
    rest: str | None = None
    sections: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)


def parse(cls: type[C], argv: Sequence[str], verb: Verb) -> C:
    """Read `argv` into `cls`. Prints and exits for `--help` and `--print_config`.

    Raises:
        UserError: unknown or ill-typed keys (with the nearest name) and values that the class's own `problems()` refuses,
            all together.
    """
    if any(token in ("-h", "--help") for token in argv):
        print(_help(_parser(cls, verb), verb))
        raise SystemExit(0)
    print_config = "--print_config" in argv
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value, is_text in _settings([t for t in argv if t != "--print_config"], cls, verb, problems):
        problem = _check(cls, key, value, is_text, values)
        if problem:
            problems.append(problem)
    config = _instantiate(cls, values, verb.sections)
    if print_config:
        if problems:
            raise UserError(problems)
        values_by_name = dataclasses.asdict(config)  # type: ignore[call-overload]
        print(yaml.safe_dump(values_by_name, sort_keys=False), end="")
        raise SystemExit(0)
    own_problems = getattr(config, "problems", lambda: ())()
    # A key that could not be read still has its default: what that default lacks is not a second problem.
    read_wrong = {line.split(":")[0] for line in problems}
    if "config" in read_wrong:  # nor is what a file that could not be read would have said
        own_problems = ()
    problems += [line for line in own_problems if not set(line.split(":")[0].split(", ")) & read_wrong]
    if problems:
        raise UserError(problems)
    return config


@contextmanager
def names(**own: str) -> Iterator[None]:
    """Rooms below name options as `lora-dist train` does; within this block their errors name this command's own.

    Args:
        own: what `model_name_or_path`, `model_config_name`, `data_prompt_template` and so on are called here.
    """
    try:
        yield
    except UserError as error:
        raise error.renamed({key.replace("_", ".", 1): name for key, name in own.items()}) from error


def _parser(cls: type, verb: Verb) -> ArgumentParser:
    # A plain dataclass's docstring becomes the title of its options; only sections need a description beside theirs.
    description = verb.description if verb.sections else None
    parser = ArgumentParser(prog=verb.prog, description=description, exit_on_error=False, default_env=False)
    if verb.sections:
        for f in dataclasses.fields(cls):
            parser.add_class_arguments(f.default_factory, f.name)
    else:
        parser.add_class_arguments(cls)
    return parser


def _help(parser: ArgumentParser, verb: Verb) -> str:
    text = parser.format_help()
    named = [*(p.upper() for p in verb.positionals), *([f"{verb.rest.upper().removesuffix('S')} ..."] if verb.rest else [])]
    usage = f"usage: {verb.prog} {' '.join(named)}".rstrip() + " [OPTION ...]\n"
    body = text[text.index("\n\n") :]
    for name in verb.positionals:  # the same width, so that the columns stay
        flag = f"  --{name} {name.upper()}"
        body = body.replace(flag, f"  {name.upper()}".ljust(len(flag)), 1)
    body = body.replace(" (type: str, default: )", "").replace(" (type:\n                        str, default: )", "")
    if verb.sections:
        usage += "\nvalues: defaults < --config FILE.yaml (repeatable) < options; --print_config prints the result and exits\n"
    if verb.aliases:
        usage += "short names: " + ", ".join(f"--{short} = --{key}" for short, key in verb.aliases.items()) + "\n"
    # jsonargparse offers a file for a whole section as well; --config does that here.
    body = re.sub(r"\n  --\w+ CONFIG\s+Path to a configuration file\.", "", body)
    return re.sub(r"\n{3,}", "\n\n", usage + body)


def _keys(cls: type, sections: bool) -> dict[str, Any]:
    """Dotted key -> type."""
    hints = typing.get_type_hints(cls)
    if not sections:
        return hints
    return {f"{section}.{name}": hint for section, sub in hints.items() for name, hint in typing.get_type_hints(sub).items()}


def _settings(argv: Sequence[str], cls: type, verb: Verb, problems: list[str]) -> Iterator[tuple[str, Any, bool]]:
    """(key, value, is text from the command line): YAML files first, then options, whatever their order in `argv`."""
    keys = _keys(cls, verb.sections)
    from_files: list[tuple[str, Any, bool]] = []
    options: list[tuple[str, Any, bool]] = []
    positionals = list(verb.positionals)
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") and not _OVERRIDE.match(token):
            if positionals:
                options.append((positionals.pop(0), token, True))
            elif verb.rest is not None:
                rest.append(token)
            else:
                problems.append(f"{token}: found a value without an option before it, expected --key value")
            continue
        name, given, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        name = verb.aliases.get(name, name)
        if not given:
            takes_next = bool(tokens) and not tokens[0].startswith("--")
            if keys.get(name) is bool and not (takes_next and tokens[0].lower() in ("true", "false")):
                value = "true"
            elif takes_next:
                value = tokens.pop(0)
            else:
                problems.append(_unknown(name, keys) if name not in keys and name != "config" else f"{name}: found no value")
                continue
        if name == "config" and verb.sections:
            from_files.extend(_from_file(Path(value), problems))
        else:
            options.append((name, value, True))
    if verb.rest is not None and rest:
        options.append((verb.rest, rest, False))
    for key, value, is_text in [*from_files, *options]:
        if key in keys:
            yield key, value, is_text
        else:
            problems.append(_unknown(key, keys))


def _from_file(file: Path, problems: list[str]) -> Iterator[tuple[str, Any, bool]]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"config: {file} cannot be read ({error.strerror})")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"config: {file} is not YAML ({' '.join(str(error).split())})")
        return
    if not isinstance(data, dict):
        problems.append(f"config: {file} holds {type(data).__name__}, expected sections with keys (--print_config shows them)")
        return
    for section, content in data.items():
        if isinstance(content, dict):
            for key, value in content.items():
                yield f"{section}.{key}", value, False
        else:
            yield str(section), content, False


def _unknown(key: str, keys: Mapping[str, Any]) -> str:
    section, _, leaf = key.rpartition(".")
    in_section = {name.rsplit(".", 1)[-1]: name for name in keys if name.rpartition(".")[0] == section}
    anywhere = {name.rsplit(".", 1)[-1]: name for name in keys}
    for leaves in (in_section, anywhere):
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
        if near:
            return f"{key}: unknown key, did you mean {leaves[near[0]]}?"
    return f"{key}: unknown key; --help lists them"


def _check(cls: type, key: str, value: Any, is_text: bool, values: dict[str, Any]) -> str | None:
    """Convert one setting into `values`, or say what is wrong with it. By a parser of its own: one with all options looks at all."""
    hint = _keys(cls, "." in key)[key]
    if typing.get_origin(hint) is list and isinstance(value, str) and not value.startswith("["):
        value, is_text = [part.strip() for part in value.split(",") if part.strip()], False
    if hint in (float, int) and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        is_text = True
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=hint)
    try:
        parsed = parser.parse_args([f"--value={value}"]) if is_text else parser.parse_object({"value": value})
    except (argparse.ArgumentError, SystemExit):
        return f"{key}: found {value!r}, expected {describe_type(hint)}"
    values[key] = parsed["value"]
    return None


def describe_type(hint: Any) -> str:
    """A type as a user would name it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else describe_type(a) for a in args)
    if origin is list:
        return f"a list of {describe_type(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))


def _instantiate(cls: type[C], values: Mapping[str, Any], sections: bool) -> C:
    """Build the dataclass (and its sections) from converted values; the rest keeps its defaults."""
    if not sections:
        return cls(**values)
    content: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        content.setdefault(section, {})[name] = value
    hints = typing.get_type_hints(cls)
    return cls(**{section: hints[section](**fields) for section, fields in content.items()})
