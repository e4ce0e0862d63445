#!/usr/bin/env python
"""Make instruction data in Alpaca's format: `make_instructions.py OUT.json --records 2000 --seed 0`.

Records of small tasks (reverse words, count, sort, copy, name digits in several scripts, go on with a list, ...) with and without
inputs, with short and long answers, in several scripts, so that documentation and tests have something that can be learnt and checked.
The same arguments give the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

WORDS = [
    "river", "stone", "bird", "bridge", "night", "morning", "winter", "garden", "window", "letter", "road", "village",
    "market", "forest", "island", "harbour", "music", "silver", "copper", "lantern", "meadow", "orchard", "captain",
    "doctor", "farmer", "teacher", "painter", "sailor", "engine", "valley", "mountain", "desert", "ocean", "thunder",
    "shadow", "mirror", "candle",
]  # fmt: skip
NAMES = ["Anna", "Omar", "Liu", "Sofia", "Ivan", "Maria", "Kofi", "Yuki", "José", "Zoë"]
DIGITS = {
    "English": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "German": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "Russian": ["ноль", "один", "два", "три", "четыре", "пять", "шесть", "семь", "восемь", "девять"],
    "Greek": ["μηδέν", "ένα", "δύο", "τρία", "τέσσερα", "πέντε", "έξι", "επτά", "οκτώ", "εννέα"],
    "Chinese": ["零", "一", "二", "三", "四", "五", "六", "七", "八", "九"],
    "Hindi": ["शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ"],
    "Arabic": ["صفر", "واحد", "اثنان", "ثلاثة", "أربعة", "خمسة", "ستة", "سبعة", "ثمانية", "تسعة"],
}  # fmt: skip
LISTS = {
    "the days of the week": [
        "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
    ],
    "the months": [
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ],
    "the letters of the Greek alphabet": [
        "α", "β", "γ", "δ", "ε", "ζ", "η", "θ", "ι", "κ", "λ", "μ", "ν", "ξ", "ο", "π", "ρ", "σ", "τ", "υ", "φ", "χ", "ψ",
        "ω",
    ],
    "the days of the week in Japanese": [
        "月曜日", "火曜日", "水曜日", "木曜日", "金曜日", "土曜日", "日曜日",
    ],
}  # fmt: skip

Record = dict[str, str]


def _record(instruction: str, given: str, output: str) -> Record:
    return {"instruction": instruction, "input": given, "output": output}


def _words(draw: random.Random, least: int, most: int) -> list[str]:
    return draw.choices(WORDS, k=draw.randint(least, most))


def reverse(draw: random.Random) -> Record:
    words = _words(draw, 2, 6)
    return _record("Write the words in reverse order.", " ".join(words), " ".join(reversed(words)))


def count(draw: random.Random) -> Record:
    words = _words(draw, 2, 9)
    return _record("Count the words.", " ".join(words), f"There are {DIGITS['English'][len(words)]} words.")


def sort(draw: random.Random) -> Record:
    words = _words(draw, 3, 7)
    return _record("Sort the words by the alphabet.", ", ".join(words), ", ".join(sorted(words)))


def copy(draw: random.Random) -> Record:
    text = " ".join(_words(draw, 3, 8))
    return _record("Repeat the text.", text, text)


def digits(draw: random.Random) -> Record:
    language = draw.choice(list(DIGITS))
    numbers = draw.choices(range(10), k=draw.randint(2, 5))
    return _record(
        f"Write the digits as words in {language}.", " ".join(map(str, numbers)), " ".join(DIGITS[language][n] for n in numbers)
    )


def continue_list(draw: random.Random) -> Record:
    """No input: the whole question is in the instruction."""
    name = draw.choice(list(LISTS))
    items = LISTS[name]
    start, given, more = draw.randrange(len(items)), draw.randint(1, 3), draw.randint(1, 3)
    text = [items[(start + i) % len(items)] for i in range(given + more)]
    return _record(f"Go on with {name}, {more} more: {', '.join(text[:given])}", "", ", ".join(text[given:]))


def add(draw: random.Random) -> Record:
    a, b = draw.randint(0, 20), draw.randint(0, 20)
    return _record(f"What is {a} plus {b}?", "", f"{a} plus {b} is {a + b}.")


def greet(draw: random.Random) -> Record:
    name, place = draw.choice(NAMES), draw.choice(WORDS)
    return _record(f"Greet {name}, who comes from the {place}.", "", f"Welcome, {name}! How was the way from the {place}?")


def numbered(draw: random.Random) -> Record:
    """A long answer, of several lines."""
    words = _words(draw, 6, 14)
    lines = [f"{i}. The {word} has {len(word)} letters." for i, word in enumerate(words, start=1)]
    return _record("Number the words, and say how many letters each has.", " ".join(words), "\n".join(lines))


TASKS: tuple[Callable[[random.Random], Record], ...] = (
    reverse, count, sort, copy, digits, continue_list, add, greet, numbered,
)  # fmt: skip


def make_records(count_: int, seed: int) -> list[Record]:
    """The tasks in turn, each with what the seed draws."""
    draw = random.Random(seed)
    return [TASKS[i % len(TASKS)](draw) for i in range(count_)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT.json", help="file to write")
    parser.add_argument("--records", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default 0)")
    args = parser.parse_args(argv)
    records = make_records(args.records, args.seed)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"make_instructions.py: {args.out} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{len(records):,} records written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
