"""Hub data sets from a hub in miniature, in a process of their own: the endpoint is read when the libraries are imported."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.conftest import build_tokenizer, fake_hub, prose

REPO = Path(__file__).parents[2]
LOAD = """
import json, sys, time
from transformers import PreTrainedTokenizerFast
from lora_dist.data.text import TextSource, load_windows
from lora_dist.log import UserError

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
answers = []
for name, config in json.loads(sys.argv[2]):
    start = time.perf_counter()
    try:
        found = load_windows(TextSource(name, config), tokenizer, context_length=8)
        splits = {split: windows.gather(range(len(windows))).flatten().tolist() for split, windows in found.splits.items()}
        answers.append({"splits": splits, "from_cache": found.from_cache})
    except UserError as error:
        answers.append({"error": str(error)})
    answers[-1]["time_s"] = time.perf_counter() - start
print(json.dumps(answers))
"""
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-v1
  data_files: [{split: train, path: wikitext-103-v1/train-*}]
- config_name: wikitext-2-raw-v1
  data_files: [{split: train, path: wikitext-2-raw-v1/train-*}, {split: validation, path: wikitext-2-raw-v1/validation-*}]
---
"""
C4_CARD = """---
configs:
- config_name: realnewslike
  data_files: [{split: train, path: realnewslike/c4-train.*.json.gz}]
- config_name: en
  data_files: [{split: train, path: en/c4-train.*.json.gz}, {split: validation, path: en/c4-validation.*.json.gz}]
dataset_info:
- config_name: en
  splits: [{name: train, num_bytes: 828589, num_examples: 364868892}, {name: validation, num_bytes: 8, num_examples: 364608}]
---
"""
ROWS = {"train": ["", " = A = \n", "", *prose(40)], "validation": prose(20, seed=1)}
DOCUMENTS = {split: [f"{split} document {i}" for i in range(30)] for split in ("train", "validation")}


def parquet(rows: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), buffer)
    return buffer.getvalue()


def json_gz(rows: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": row, "url": "u"}) + "\n" for row in rows).encode(), mtime=0)


REPOS = {
    "Salesforce/wikitext": {
        "README.md": WIKITEXT_CARD.encode(),
        "wikitext-103-v1/train-00000-of-00001.parquet": parquet(["not this one"]),
        **{f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in ROWS.items()},
    },
    "allenai/c4": {
        "README.md": C4_CARD.encode(),
        "en/c4-train.00000-of-01024.json.gz": json_gz(DOCUMENTS["train"]),
        "en/c4-train.00001-of-01024.json.gz": json_gz(["not this one"]),
        "en/c4-validation.00000-of-00008.json.gz": json_gz(DOCUMENTS["validation"]),
        "en/c4-validation.00001-of-00008.json.gz": json_gz(["not this one"]),
        "realnewslike/c4-train.00000-of-00512.json.gz": json_gz(["not this one"]),
    },
    "some/gated": "GatedRepo",
}


def ask(folder: Path, endpoint: str, *names: tuple[str, str | None]) -> list[dict]:
    """Loads data sets in a fresh process, whose caches lie in the folder and last from call to call."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPO)}
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(key, None)
    command = [sys.executable, "-c", LOAD, str(folder / "tokenizer"), json.dumps(names)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of each data set, with the hub there and without it."""
    folder = tmp_path_factory.mktemp("hub")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    online = [
        ("wikitext", None),
        ("c4", None),
        ("c4", "wikitext-2-raw-v1"),
        ("wikitext", "nope"),
        ("some/gated", None),
        ("no/such", None),
    ]
    with fake_hub(REPOS) as endpoint:
        found = ask(folder, endpoint, *online)
    assert (folder / "home" / "lora_dist").is_dir()
    # The hub is gone by now, as on a compute node without network.
    offline = ask(folder, endpoint, ("wikitext", None), ("c4", None), ("never/seen", None))
    names = ["wikitext", "c4", "c4 with a config", "unknown config", "gated", "missing"]
    return dict(zip([*names, "wikitext offline", "c4 offline", "unreachable"], found + offline, strict=True))


def packed(ids: list[int]) -> list[int]:
    return ids[: len(ids) // 8 * 8]


def test_wikitext_is_running_text_of_the_small_raw_config(answers: dict[str, dict]):
    tokenizer = build_tokenizer()
    for split, rows in ROWS.items():
        assert answers["wikitext"]["splits"][split] == packed(tokenizer("".join(rows), verbose=False)["input_ids"])


@pytest.mark.parametrize("name", ["c4", "c4 with a config"])
def test_c4_is_the_first_english_shards_and_needs_no_config(answers: dict[str, dict], name: str):
    tokenizer = build_tokenizer()
    for split, rows in DOCUMENTS.items():
        assert answers[name]["splits"][split] == packed([token for row in rows for token in tokenizer(row)["input_ids"]])
    assert answers[name]["from_cache"] == (name != "c4")


def test_an_unknown_config_is_answered_with_those_there_are(answers: dict[str, dict]):
    error = answers["unknown config"]["error"]
    assert error.startswith("data.dataset_config_name: found nope for wikitext: BuilderConfig 'nope' not found")
    assert "wikitext-2-raw-v1" in error


@pytest.mark.parametrize("name", ["wikitext", "c4"])
def test_a_node_without_network_finds_the_windows_made_elsewhere(answers: dict[str, dict], name: str):
    assert answers[f"{name} offline"]["from_cache"]
    assert answers[f"{name} offline"]["splits"] == answers[name]["splits"]
    assert answers[f"{name} offline"]["time_s"] < 10


@pytest.mark.parametrize(
    ("name", "reason"), [("gated", "it is gated"), ("missing", "no such data set"), ("unreachable", "hub cannot be reached")]
)
def test_what_cannot_be_loaded_is_said_within_seconds(answers: dict[str, dict], name: str, reason: str):
    error = answers[name]["error"]
    assert error.startswith("data.dataset_name: found no local file or directory ")
    assert reason in error
    assert all(remedy in error for remedy in ("local files (.txt", "HF_ENDPOINT", "HF_TOKEN"))
    assert "\n" not in error
    assert answers[name]["time_s"] < 10
