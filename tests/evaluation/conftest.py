"""Questions for a tiny tokenizer, which knows ASCII only: eight of each known task, in the hub's own schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = ["river", "stone", "bird", "bridge", "old", "new", "slow", "quick", "home"]
COUNT = 8


def hub_rows(task: str) -> list[dict]:
    """Rows as lm-eval's own tasks read them from the hub."""
    rows = []
    for i in range(COUNT):
        a, b, c = WORDS[i], WORDS[(2 * i + 1) % 9], WORDS[(3 * i + 2) % 9]
        choices = {"text": [f"the {a}", f"a {b} {c}", c], "label": ["A", "B", "C"]}
        rows.append(
            {
                "boolq": {"passage": f"The {a} is {b}.", "question": f"is the {a} {c}", "label": i % 2, "idx": i},
                "piqa": {"goal": f"find the {a}", "sol1": f"look for {b}", "sol2": f"{c} and {a}", "label": i % 2},
                "hellaswag": {
                    "activity_label": a, "ctx_a": f"A {b} [title] goes.", "ctx_b": f"the {c}", "endings": [f"is {a} [step] now.", b, c, a],
                    "label": str(i % 4), "ind": i, "ctx": "", "source_id": "", "split": "val", "split_type": "",
                },
                "winogrande": {"sentence": f"The {a} met the {b} as the _ was {c}.", "option1": a, "option2": b, "answer": str(1 + i % 2)},
                "arc_easy": {"id": str(i), "question": f"What is {a}?", "choices": choices, "answerKey": "ABC"[i % 3]},
                "arc_challenge": {"id": str(i), "question": f"Which is {b}?", "choices": choices, "answerKey": "ABC"[i % 3]},
                "openbookqa": {"id": str(i), "question_stem": f"The {a} is", "choices": choices, "answerKey": "ABC"[i % 3]},
            }[task]
        )  # fmt: skip
    return rows


def write_questions(folder: Path) -> Path:
    """The folder, with a file of each task in it."""
    from lora_dist.evaluation.zeroshot import TASKS

    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hub_rows(task)))
    return folder


@pytest.fixture(scope="session")
def task_data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("tasks"))
