"""A corpus as one text: rows joined as the published tables do, from the hub and from files alike."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lora_dist.data.corpus import read_corpus, token_stream
from lora_dist.data.sources import TextSource
from lora_dist.log import UserError
from tests.data.conftest import build_tokenizer, fake_hub

REPO = Path(__file__).parents[2]
WIKITEXT = ["", " = Title = \n", "", " One line .\n", " Another one , a little longer .\n", ""]
SENTENCES = ["no it was n't black monday", "but while the new york stock exchange did n't fall apart", "some circuit breakers"]
DOCUMENTS = [f"document {i}\n\nwith two paragraphs" for i in range(1200)]
EXPECTED = {"wikitext2": "\n\n".join(WIKITEXT), "ptb": " ".join(SENTENCES), "c4": " ".join(DOCUMENTS[:1100])}


def test_local_files_give_the_text_that_the_hub_has(write_text) -> None:
    lines = "".join(row or " \n" for row in WIKITEXT)  # as in wiki.test.raw
    wikitext = read_corpus("wikitext2", TextSource(str(write_text("wiki.test.raw.txt", lines))))
    ptb = read_corpus("ptb", TextSource(str(write_text("ptb.test.txt", "".join(f" {s} \n" for s in SENTENCES)))))
    documents = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)
    c4 = read_corpus("c4", TextSource(str(write_text("c4.jsonl", documents))))
    assert {"wikitext2": wikitext.text, "ptb": ptb.text, "c4": c4.text} == EXPECTED
    assert (wikitext.rows, ptb.rows, c4.rows) == (6, 3, 1100)
    assert ptb.joiner == " " and ptb.sha256 == hashlib.sha256(EXPECTED["ptb"].encode()).hexdigest()
    for column in ("sentence", "text"):  # the hub's column, or the one that such files usually have
        rows = "".join(json.dumps({column: s}) + "\n" for s in SENTENCES)
        assert read_corpus("ptb", TextSource(str(write_text(f"{column}.jsonl", rows)))).text == EXPECTED["ptb"]


def test_any_other_text(write_text) -> None:
    running = read_corpus("mine", TextSource(str(write_text("a.txt", "one\n\n two\n"))))
    assert (running.text, running.joiner, running.rows) == ("one\n\n two\n", None, 1)
    parts = TextSource(str(write_text("b.txt", "one\n<|end|>\n two\n<|end|>\n")), document_separator="<|end|>")
    documents = read_corpus("mine", parts)
    assert (documents.text, documents.joiner) == ("one\n\ntwo", "\n\n")
    rows = read_corpus("mine", TextSource(str(write_text("c.jsonl", '{"body": "one"}\n{"body": "two"}\n')), text_column="body"))
    assert (rows.text, rows.joiner) == ("one\n\ntwo", "\n\n")
    kept = read_corpus("mine", TextSource(str(write_text("d.jsonl", '{"text": "one\\n"}\n{"text": ""}\n{"text": "two\\n"}\n'))))
    assert (kept.text, kept.joiner) == ("one\ntwo\n", None)


def test_what_cannot_be_read_is_said(write_text, tmp_path) -> None:
    with pytest.raises(UserError, match="found nosuch, expected wikitext2, ptb, c4, or NAME=FILE"):
        read_corpus("nosuch", None)
    with pytest.raises(UserError, match="holds no text"):
        read_corpus("mine", TextSource(str(write_text("blank.txt", " \n \n"))))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_corpus("mine", TextSource(str(tmp_path / "latin.txt")))


def test_the_stream_is_what_the_tokenizer_makes_of_the_whole_text() -> None:
    tokenizer, text = build_tokenizer(), "one two three\n\nfour five"
    stream = token_stream(text, tokenizer)
    assert stream.ids_N.tolist() == tokenizer(text)["input_ids"]
    assert stream.ends_N is not None and stream.ends_N[-1] == len(text) and (np.diff(stream.ends_N) >= 0).all()
    both = token_stream(text, tokenizer, "both")
    assert both.ids_N.tolist() == [
        tokenizer.bos_token_id,
        *tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_known_corpora_come_from_the_hub(tmp_path) -> None:
    """Penn Treebank is a script there, and its rows lie on the hub's parquet branch."""

    def parquet(column: str, rows: list[str]) -> bytes:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), buffer)
        return buffer.getvalue()

    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files: [{split: test, path: wikitext-2-raw-v1/test-*}]\n---\n"
    repos = {
        "Salesforce/wikitext": {
            "README.md": card.encode(),
            "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet("text", WIKITEXT),
        },
        "ptb-text-only/ptb_text_only": {
            f"penn_treebank/{split}/0000.parquet": parquet("sentence", SENTENCES if split == "test" else ["not this one"])
            for split in ("train", "validation", "test")
        },
        "allenai/c4": {
            "README.md": b"---\nconfigs:\n- config_name: en\n  data_files: [{split: validation, path: en/c4-validation.*.json.gz}]\n---\n",
            "en/c4-validation.00000-of-00008.json.gz": gzip.compress(
                "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS).encode(), mtime=0
            ),
        },
    }
    code = "import json; from lora_dist.data.corpus import read_corpus\n"
    code += "print(json.dumps({name: read_corpus(name, None).text for name in ('wikitext2', 'ptb', 'c4')}))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(key, None)
    with fake_hub(repos) as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "HF_ENDPOINT": endpoint},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == EXPECTED
