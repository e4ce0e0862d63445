"""Multiple-choice questions: every schema of a task comes out as the same question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_dist.arguments.evaluation import ZERO_SHOT_TASKS
from lora_dist.data.choices import FILES, load_questions, question_file
from lora_dist.evaluation.zeroshot import TASKS
from lora_dist.log import UserError

# Of each task one question in the hub's schema, and the same in the other one.
QUESTIONS = {
    "boolq": (
        {"passage": "Ice floats.", "question": "does ice float", "label": 1},
        {"query": "Passage: Ice floats.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1},
    ),
    "piqa": (
        {"goal": "dry a cup", "sol1": "use a towel", "sol2": "use soup", "label": 0},
        {"query": "Question: dry a cup\n", "choices": ["use a towel", "use soup"], "gold": 0},
    ),
    "arc_easy": (
        {"question": "What is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow"], "gold": 1},
    ),
    "openbookqa": (
        {"question_stem": "Fire is", "choices": {"text": ["hot", "wet"], "label": ["A", "B"]}, "answerKey": "A"},
        {"query": "Fire is", "choices": ["hot", "wet"], "gold": 0},
    ),
    "winogrande": (
        {"sentence": "The cup fell off the shelf because the _ was wet.", "option1": "cup", "option2": "shelf", "answer": "2"},
        {
            "context_options": [f"The cup fell off the shelf because the {what}" for what in ("cup", "shelf")],
            "continuation": "was wet.",
            "gold": 1,
        },
    ),
}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("task", QUESTIONS)
def test_both_schemas_are_the_same_question(task, tmp_path):
    write(tmp_path, f"{FILES[task][-1]}_val.jsonl", list(QUESTIONS[task]))
    hub, other = load_questions(task, tmp_path).to_list()
    assert hub == other


def test_a_list_in_one_json_file_is_read_too(tmp_path):
    (tmp_path / "PIQA.json").write_text(json.dumps(list(QUESTIONS["piqa"])))
    assert len(load_questions("piqa", tmp_path)) == 2


def test_the_known_tasks_are_the_same_everywhere():
    assert set(ZERO_SHOT_TASKS) == set(TASKS) == set(FILES)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match=r"task_data: found none in .* for boolq, expected one file boolq\*"):
        question_file(tmp_path, "boolq")
    write(tmp_path, "boolq.jsonl", [QUESTIONS["boolq"][0], {"passage": "p"}])
    with pytest.raises(UserError, match=r"row 2 \(passage\) is no question of boolq"):
        load_questions("boolq", tmp_path)
    write(tmp_path, "piqa.jsonl", [{**QUESTIONS["piqa"][1], "gold": 2}])
    with pytest.raises(UserError, match="gold 2 of 2 choices"):
        load_questions("piqa", tmp_path)
    write(tmp_path, "boolq_2.jsonl", [])
    with pytest.raises(UserError, match="found boolq.jsonl, boolq_2.jsonl"):
        question_file(tmp_path, "boolq")
    (tmp_path / "hellaswag.jsonl").write_text("{no json\n")
    with pytest.raises(UserError, match="hellaswag.jsonl cannot be read as jsonl"):
        load_questions("hellaswag", tmp_path)


def test_the_real_files_are_read_whole(data_dir):
    counts = {task: len(load_questions(task, data_dir / "multiple-choice")) for task in FILES}
    assert counts == {
        "boolq": 3270, "piqa": 1838, "hellaswag": 1000, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500,
    }  # fmt: skip
