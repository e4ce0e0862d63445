"""Where the task definitions beside this file get their questions: files in the folder that the metadata key `task_data` names.

lm-eval imports this by its path. The definitions also work without lora_dist's evaluation:

    lm_eval --include_path lora_dist/evaluation/tasks --tasks local_boolq --metadata '{"task_data": "DIR"}' --model hf ...
"""

from __future__ import annotations

from typing import Any

from lora_dist.data.choices import load_questions


def questions(task_data: str = "", questions_of: str = "", **_other_metadata: Any) -> dict[str, Any]:
    """The splits of a task: validation only.

    Args:
        task_data: folder, from lm-eval's metadata.
        questions_of: the task, from the definition's `dataset_kwargs`.
    """
    return {"validation": load_questions(questions_of, task_data)}
