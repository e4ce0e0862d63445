"""Windows of every kind of source against a few independent lines: tokenise, concatenate, cut."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_dist.data import text as text_module
from lora_dist.data import tokenise
from lora_dist.data.text import TextSource, Windows, WindowSplits, load_windows
from lora_dist.log import UserError
from tests.data.conftest import build_tokenizer, prose

L = 16
WriteText = Callable[[str, str], Path]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., WindowSplits]:
    """load_windows into a cache of the test's own, from a source given by its fields."""

    def call(name: object, context_length: int = L, use: PreTrainedTokenizerFast = tokenizer, **options) -> WindowSplits:
        fields = {key: options.pop(key) for key in list(options) if key in TextSource.__dataclass_fields__}
        options = {"cache_dir": tmp_path / "cache", **options}
        return load_windows(TextSource(str(name), **fields), use, context_length=context_length, **options)

    return call


def ids_of(tokenizer: PreTrainedTokenizerFast, *texts: str, left: tuple = (), right: tuple = ()) -> list[int]:
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return list(chain.from_iterable([*left, *ids, *right] for ids in encoded))


def assert_windows(windows: Windows, ids: list[int], length: int = L) -> None:
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    assert [row.tolist() for row in windows] == rows
    assert rows


# --- running text -------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_running_text(load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast):
    text = "".join(prose(400))
    found = load(write_text("a.txt", text))
    assert list(found.splits) == ["train"]
    assert not found.from_cache
    assert_windows(found.splits["train"], ids_of(tokenizer, text))


def test_chunks_are_cut_at_line_ends(
    load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    """Many chunks and read blocks, and the tokens are still those of the whole text (a line never joins the next one here)."""
    monkeypatch.setattr(tokenise, "CHUNK_LINES", 7)
    monkeypatch.setattr(tokenise, "_READ_CHARS", 100)
    lines = [line for line in prose(200) if line != "\n"]
    text = "".join(lines) + "the last line has no end, but a \f form feed"
    assert_windows(load(write_text("a.txt", text)).splits["train"], ids_of(tokenizer, text))
    both = load(write_text("b.txt", text), special_tokens="both").splits["train"]
    assert_windows(both, ids_of(tokenizer, text, left=(0,), right=(1,)))


def test_line_ends_of_other_systems_and_byte_order_marks(load: Callable, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    text = "".join(prose(60))
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert_windows(load(tmp_path / "dos.txt").splits["train"], ids_of(tokenizer, text))


def test_rows_that_keep_their_line_breaks_are_running_text(load: Callable, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    """As in wikitext, where a blank line is an empty row."""
    rows = ["", " = Title = \n", "", *prose(100, seed=1)]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "rows.parquet")
    found = load(tmp_path / "rows.parquet", special_tokens="bos")
    assert_windows(found.splits["train"], ids_of(tokenizer, "".join(rows), left=(0,)))


def test_processes_change_nothing(load: Callable, write_text: WriteText, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tokenise, "CHUNK_LINES", 50)
    path = write_text("a.txt", "".join(prose(400)))
    one = load(path, special_tokens="both", num_proc=1)
    two = load(path, special_tokens="both", num_proc=2, cache_dir=tmp_path / "other")
    assert not two.from_cache
    assert one.splits["train"].digest == two.splits["train"].digest


def test_small_texts_are_left_to_one_process(monkeypatch: pytest.MonkeyPatch):
    assert text_module.processes_for(1 << 20) == 1
    monkeypatch.setattr(text_module.os, "sched_getaffinity", lambda _: set(range(64)))
    assert text_module.processes_for(1 << 30) == 8


# --- documents ----------------------------------------------------------------------------------------------------------


def test_a_separator_splits_files_into_documents(
    load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenise, "_READ_CHARS", 64)  # separators straddle the blocks
    documents = ["".join(prose(6, seed)).strip() for seed in range(20)]
    text = "\n<|end|>\n".join(["", *documents[:9], "  \n", *documents[9:]])
    found = load(write_text("a.txt", text), document_separator="<|end|>", special_tokens="both")
    assert_windows(found.splits["train"], ids_of(tokenizer, *documents, left=(0,), right=(1,)))


def test_a_separator_of_several_lines(load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast):
    documents = ["one\ntwo three four five", "six seven\neight nine ten eleven", "twelve"]
    found = load(write_text("a.txt", "\n\n\n".join(documents)), document_separator="\n\n\n", special_tokens="eos")
    assert_windows(found.splits["train"], ids_of(tokenizer, *documents, right=(1,)))


def test_a_separator_that_never_occurs_is_mentioned(
    load: Callable, write_text: WriteText, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("lora_dist"), "propagate", True)
    load(write_text("a.txt", "".join(prose(50))), document_separator="<|no|>")
    assert "data.document_separator: '<|no|>' does not occur in" in caplog.text


def write_rows(path: Path, rows: list[str | None], column: str) -> Path:
    table = datasets.Dataset.from_dict({"id": list(range(len(rows))), column: rows})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_list()))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_list()).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_rows_of_tables_are_documents(load: Callable, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, column: str):
    documents = ["".join(prose(4, seed)).strip() for seed in range(12)]
    path = write_rows(tmp_path / name, [documents[0], "  ", None, *documents[1:]], column)
    found = load(path, text_column=column, special_tokens="bos")
    assert_windows(found.splits["train"], ids_of(tokenizer, *documents, left=(0,)))


# --- special tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", ["", "bos", "eos", "both"])
def test_auto_is_what_the_tokenizer_adds(load: Callable, write_text: WriteText, adds: str):
    use = build_tokenizer(adds=adds)
    text = "".join(prose(60))
    expected = use(text)["input_ids"]
    assert (expected[0] == 0, expected[-1] == 1) == (adds in ("bos", "both"), adds in ("eos", "both"))
    assert_windows(load(write_text("a.txt", text), use=use).splits["train"], expected)


@pytest.mark.parametrize(
    ("mode", "left", "right"), [("bos", (0,), ()), ("eos", (), (1,)), ("both", (0,), (1,)), ("none", (), ())]
)
def test_modes_go_before_what_the_tokenizer_adds(load: Callable, write_text: WriteText, mode: str, left: tuple, right: tuple):
    use = build_tokenizer(adds="both")
    documents = ["".join(prose(6, seed)).strip() for seed in range(9)]
    path = write_text("a.txt", "|||".join(documents))
    found = load(path, use=use, document_separator="|||", special_tokens=mode)
    assert_windows(found.splits["train"], ids_of(use, *documents, left=left, right=right))


@pytest.mark.parametrize(("mode", "missing"), [("bos", "bos"), ("both", "eos"), ("eos", "eos")])
def test_a_token_the_tokenizer_does_not_have(load: Callable, write_text: WriteText, mode: str, missing: str):
    use = build_tokenizer(bos=missing != "bos", eos=missing != "eos")
    with pytest.raises(UserError, match=rf"data\.special_tokens: found {mode}, but the tokenizer has no {missing} token"):
        load(write_text("a.txt", "".join(prose(50))), use=use, special_tokens=mode)


# --- splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["valid.txt", "validation.txt", "dev.txt", "wiki.valid.txt"])
def test_a_directory_has_splits_by_file_name(
    load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast, valid: str
):
    texts = {"train.txt": "".join(prose(60)), valid: "".join(prose(50, 1)), "test.txt": "".join(prose(40, 2)), "README.md": "no"}
    for name, text in texts.items():
        path = write_text(f"set/{name}", text)
    found = load(path.parent, splits=("test", "validation", "train"))
    assert list(found.splits) == ["test", "validation", "train"]
    for split, name in {"train": "train.txt", "validation": valid, "test": "test.txt"}.items():
        assert_windows(found.splits[split], ids_of(tokenizer, texts[name]))
    assert list(load(path.parent).splits) == ["train", "validation"]


def test_a_directory_without_split_names_is_training_text(
    load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast
):
    texts = ["".join(prose(30, seed)) for seed in range(2)]
    write_text("set/one.txt", texts[0])
    path = write_text("set/two.txt", texts[1])
    found = load(path.parent, special_tokens="bos")
    assert list(found.splits) == ["train"]
    assert_windows(found.splits["train"], ids_of(tokenizer, *texts, left=(0,)))  # one document a file


def test_files_of_several_kinds_and_a_validation_file(
    load: Callable, write_text: WriteText, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    texts = ["".join(prose(30, seed)) for seed in range(3)]
    first, held = write_text("one.txt", texts[0]), write_text("held.txt", texts[2])
    second = write_rows(tmp_path / "two.jsonl", ["some document", "and one more of them"], "text")
    found = load(f"{first}, {second}", validation_file=str(held), special_tokens="eos")
    expected = ids_of(tokenizer, texts[0], "some document", "and one more of them", right=(1,))
    assert_windows(found.splits["train"], expected)
    assert_windows(found.splits["validation"], ids_of(tokenizer, texts[2], right=(1,)))


def test_a_validation_file_goes_before_the_split_of_the_data_set(
    load: Callable, write_text: WriteText, tokenizer: PreTrainedTokenizerFast
):
    write_text("set/valid.txt", "".join(prose(40, 1)))
    path = write_text("set/train.txt", "".join(prose(40)))
    held = write_text("held.txt", "".join(prose(40, 2)))
    found = load(path.parent, validation_file=str(held))
    assert_windows(found.splits["validation"], ids_of(tokenizer, "".join(prose(40, 2))))


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_goes_by_content_not_by_path(load: Callable, write_text: WriteText, tmp_path: Path):
    text = "".join(prose(80))
    first = load(write_text("a.txt", text))
    again = load(write_text("elsewhere/b.txt", text))
    assert again.from_cache
    assert again.splits["train"].digest == first.splits["train"].digest
    changed = load(write_text("a.txt", text.replace("lake", "lamp", 1)))  # the same path, size and almost the same time
    assert not changed.from_cache
    assert changed.splits["train"].digest != first.splits["train"].digest
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_everything_that_changes_the_windows_changes_the_entry(load: Callable, write_text: WriteText):
    path = write_text("a.txt", "".join(prose(80)))
    load(path)
    others = [
        {"context_length": L + 1},
        {"special_tokens": "eos"},
        {"document_separator": "."},
        {"use": build_tokenizer(adds="bos")},
    ]
    for options in others:
        assert not load(path, **options).from_cache
        assert load(path, **options).from_cache


def test_a_tokenizer_is_the_same_after_use(load: Callable, write_text: WriteText):
    path, use = write_text("a.txt", "".join(prose(80))), build_tokenizer()
    load(path, use=use)
    use.backend_tokenizer.enable_truncation(9)
    assert load(path, use=use).from_cache


def test_a_damaged_entry_is_rebuilt(
    load: Callable, write_text: WriteText, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("lora_dist"), "propagate", True)
    path = write_text("a.txt", "".join(prose(80)))
    before = load(path).splits["train"].digest
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "windows.npy").write_bytes(b"half of a f")
    shutil.copytree(entry, tmp_path / "cache" / f".{entry.name}.x.tmp")  # and another writer was killed
    rebuilt = load(path)
    assert not rebuilt.from_cache
    assert rebuilt.splits["train"].digest == before
    assert f"cache entry {entry} is damaged" in caplog.text
    assert load(path).from_cache


# --- errors -------------------------------------------------------------------------------------------------------------


def test_what_a_user_can_mend_is_said_in_a_line(load: Callable, write_text: WriteText, tmp_path: Path):
    good = write_text("good.txt", "".join(prose(50)))
    rows = write_rows(tmp_path / "rows.jsonl", ["a"] * 50, "body")
    (tmp_path / "set").mkdir()
    (tmp_path / "latin.txt").write_bytes("caf\xe9 \n".encode("latin-1") * 50)
    cases = [
        ((tmp_path / "no.txt",), {}, r"data\.dataset_name: found no file .*no\.txt, expected existing files"),
        ((f"{good},{tmp_path}/no.txt",), {}, r"data\.dataset_name: found no file .*no\.txt"),
        ((good,), {"validation_file": "no.txt"}, r"data\.validation_file: found no file no\.txt"),
        ((write_text("a.docx", "x"),), {}, r"data\.dataset_name: .*a\.docx has an unknown extension, expected one of \.txt"),
        ((write_text("empty.txt", ""),), {}, r"data\.dataset_name: .*empty\.txt is empty"),
        ((good,), {"validation_file": str(tmp_path / "empty.txt")}, r"data\.validation_file: .*empty\.txt is empty"),
        ((tmp_path / "set",), {}, r"data\.dataset_name: the directory .*set has no data files, expected some of \.txt"),
        ((rows,), {}, r"data\.text_column: found no column text in .*rows\.jsonl, expected one of its columns: id, body"),
        ((rows,), {"text_column": "id"}, r"data\.text_column: column id of .*rows\.jsonl holds int64, expected text"),
        ((write_text("bad.json", '{"text": '),), {}, r"data\.dataset_name: .*bad\.json cannot be read as json"),
        ((tmp_path / "latin.txt",), {}, r"data\.dataset_name: .*latin\.txt is not UTF-8 text"),
        ((good,), {"splits": ("test",)}, r"data\.dataset_name: .*good\.txt has the splits train, expected test"),
        ((good,), {"document_separator": ""}, r"data\.document_separator: found an empty text"),
        ((good, 100_000), {}, r"data\.block_size: found \d+ tokens in the train split, expected 100000 or more"),
        ((write_text("blank.txt", "  "), 64), {"document_separator": "|"}, r"data\.block_size: found 0 tokens"),
        ((write_text("mark.txt", "\ufeff"),), {}, r"data\.block_size: found 0 tokens"),
        ((write_rows(tmp_path / "blank.jsonl", [" ", None, ""], "text"),), {}, r"data\.block_size: found 0 tokens"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load(*arguments, **options)
        assert all("\n" not in problem for problem in caught.value.problems)
    assert not list((tmp_path / "cache").glob(".*"))


def test_every_missing_file_is_reported(load: Callable):
    with pytest.raises(UserError) as caught:
        load("one.txt,two.csv")
    assert len(caught.value.problems) == 2


def test_a_long_text_is_no_reason_to_warn(load: Callable, write_text: WriteText, caplog: pytest.LogCaptureFixture):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load(write_text("a.txt", "".join(prose(300))))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "sequence length is longer" not in caplog.text


# --- real texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["stories260K", "wikitext2-llama"])
def test_real_running_text(load: Callable, write_text: WriteText, real_data: Path, model: str):
    """WikiText-2 as one text: exact for byte-level BPE; Llama's tokenizer adds a space mark at each chunk of 1,000 lines."""
    use = AutoTokenizer.from_pretrained(real_data / model)
    text = "".join((real_data / "wikitext-2" / "test.txt").read_text(encoding="utf-8").splitlines(keepends=True)[:1100])
    windows = load(write_text("wiki.txt", text), 256, use=use).splits["train"]
    expected = use(text, verbose=False)["input_ids"]
    ids = windows.gather(range(len(windows))).flatten().tolist()
    assert len(windows) == len(expected) // 256
    if model == "wikitext2-llama":
        assert ids == expected[: len(ids)]
        return
    lines = text.splitlines(keepends=True)
    boundary = len(use("".join(lines[:1000]), verbose=False)["input_ids"])
    assert ids[:boundary] == expected[:boundary]
    assert ids[boundary + 1 :] == expected[boundary : len(ids) - 1]


def test_real_stories(load: Callable, write_text: WriteText, real_data: Path):
    use = AutoTokenizer.from_pretrained(real_data / "stories260K")
    text = (real_data / "tinystories" / "tinystories_10k.txt").read_text(encoding="utf-8")[:200_000]
    windows = load(write_text("stories.txt", text), 256, use=use, document_separator="<|endoftext|>").splits["train"]
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    assert len(stories) > 100
    assert_windows(windows, list(chain.from_iterable(use(story, verbose=False)["input_ids"] for story in stories)), 256)
