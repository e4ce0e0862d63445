"""The tiny-model maker: what it reads, that it learns, that a seed fixes it, and that nothing half-made is left behind."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import tiny_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = {"hidden": 32, "layers": 1, "heads": 2, "vocab_size": 300, "context": 32, "batch_size": 4, "steps": 6, "progress": False}


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    """Return sixty short documents of plain sentences, enough for every split."""
    subjects, verbs, objects = (
        ("the dog", "a bird", "my friend"),
        ("sees", "likes", "follows"),
        ("the tree", "a river", "the house"),
    )
    sentences = [f"{s} {v} {o}." for s, v, o in itertools.product(subjects, verbs, objects)]
    return {f"doc/{i}": "\n\n".join(sentences[i % 9 :] + sentences[: i % 9]) + "\n" for i in range(60)}


@pytest.fixture(scope="module")
def built(documents: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one finished run."""
    out = tmp_path_factory.mktemp("built") / "tiny"
    tiny_model.build(out, documents=documents, **SMALL)
    return out


# --- text ---------------------------------------------------------------------------------------------------------------------


def _stdlib(root: Path) -> Path:
    paragraph = "This paragraph of the module says at some length what the module is for, so that it counts as a document. " * 2
    sources = {
        "b.py": f'"""Second file.\n\n{paragraph}\n\nOnly here: {paragraph}"""\n',
        "a.py": (
            f'"""First file.\n\n{paragraph}"""\n\nclass C:\n    def f(self):\n        """Method."""\n\n\n'
            'def g():\n    """Function."""\n'
        ),
        "broken.py": "def (:\n",
        "raises.py": "raise RuntimeError('this file was imported')\n",
        "test/c.py": f'"""{paragraph} of a test"""\n',
        "site-packages/d.py": f'"""{paragraph} of a library"""\n',
    }
    for name, source in sources.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    return root


def test_docstrings_are_read_in_order_without_importing_and_without_repeats(tmp_path: Path) -> None:
    found = tiny_model.collect_text(_stdlib(tmp_path))
    ours = {name: text for name, text in found.items() if name.startswith("stdlib/")}
    assert list(ours) == ["stdlib/a.py", "stdlib/b.py"]
    first, method, function = (ours["stdlib/a.py"].index(word) for word in ("First", "Method", "Function"))
    assert first < method < function
    assert "\n\nThis paragraph" in ours["stdlib/a.py"]
    assert "\n\nThis paragraph" not in ours["stdlib/b.py"]
    assert "Only here" in ours["stdlib/b.py"]


def test_the_language_reference_is_there(tmp_path: Path) -> None:
    found = tiny_model.collect_text(tmp_path)
    assert all(name.startswith("topics/") for name in found)
    assert sum(map(len, found.values())) > 200_000
    assert found == tiny_model.collect_text(tmp_path)


def test_a_new_document_moves_no_other() -> None:
    documents = {f"doc/{i}": f"text {i}" for i in range(400)}
    split = tiny_model.split_documents(documents)
    assert sorted(text for texts in split.values() for text in texts) == sorted(documents.values())
    assert 5 <= len(split["valid"]) <= 40
    assert 5 <= len(split["test"]) <= 40
    more = tiny_model.split_documents({"another": "another text", **documents})
    assert {name: [text for text in texts if text != "another text"] for name, texts in more.items()} == split


# --- tokenizer ----------------------------------------------------------------------------------------------------------------


def test_any_text_survives_the_tokenizer(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    assert len(tokenizer) == 300
    text = "the dog sees  a river.\n\tÜber 漢字 → 🎉"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_windows_hold_the_documents_one_after_another(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    texts = ["the dog likes a river.", "a bird sees the tree."]
    expected = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    ids_NT = tiny_model.encode(tokenizer, texts, context=4)
    assert ids_NT.shape == (len(expected) // 4, 4)
    assert ids_NT.flatten().tolist() == expected[: ids_NT.numel()]
    with pytest.raises(ValueError, match="context=1000"):
        tiny_model.encode(tokenizer, texts, context=1000)


# --- model --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"), [({"hidden": 40}, "hidden: found 40"), ({"hidden": 32, "heads": 3}, "heads: found 3")]
)
def test_sizes_that_do_not_fit_are_refused(documents: dict[str, str], sizes: dict[str, int], message: str) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    with pytest.raises(ValueError, match=message):
        tiny_model.make_model(tokenizer, **sizes)


def test_the_default_model_is_of_whole_tiles_and_2_to_5_million_parameters(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    model = tiny_model.make_model(tokenizer)
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(size % 16 == 0 for linear in linears for size in linear.weight.shape)
    with_full_vocabulary = model.num_parameters() + (2048 - 300) * model.config.hidden_size
    assert 2e6 < with_full_vocabulary < 5e6


def test_training_learns(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    ids_NT = tiny_model.encode(tokenizer, list(documents.values()), context=32)
    model = tiny_model.make_model(tokenizer, hidden=32, layers=1, heads=2)
    before = tiny_model.perplexity(model, ids_NT)
    assert before == pytest.approx(300, rel=0.2)  # knows nothing: every token alike
    training = tiny_model.train_model(model, ids_NT, steps=60, batch_size=4, progress=False)
    assert (training.steps, training.tokens) == (60, 60 * 4 * 32)
    assert tiny_model.perplexity(model, ids_NT) < 8


def test_perplexity_is_that_of_the_plain_formula(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    ids_NT = tiny_model.encode(tokenizer, list(documents.values()), context=32)[:5]
    model = tiny_model.make_model(tokenizer, hidden=32, layers=1, heads=2)
    with torch.no_grad():
        logits = model(input_ids=ids_NT).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten())
    assert tiny_model.perplexity(model, ids_NT, batch_size=2) == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_a_slow_machine_ends_early(documents: dict[str, str]) -> None:
    tokenizer = tiny_model.make_tokenizer(list(documents.values()), vocab_size=300)
    ids_NT = tiny_model.encode(tokenizer, list(documents.values()), context=32)
    model = tiny_model.make_model(tokenizer, hidden=32, layers=1, heads=2)
    training = tiny_model.train_model(model, ids_NT, steps=1_000_000, batch_size=1, limit_s=0.5, progress=False)
    assert 0 < training.steps < 10_000
    assert training.time_s < 5


# --- all of it ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_loads_and_says_what_it_is(built: Path) -> None:
    facts = json.loads((built / "tiny_model.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert facts["parameters"] == model.num_parameters()
    assert model.dtype == torch.float32
    assert (tokenizer.bos_token, tokenizer.eos_token) == (tiny_model.BOS, tiny_model.EOS)
    texts = (built / "valid.txt").read_text().split(f"{tiny_model.EOS}\n")
    assert len(texts) == facts["documents"]["valid"]
    ids_NT = tiny_model.encode(tokenizer, texts, context=32)
    assert tiny_model.perplexity(model, ids_NT) == pytest.approx(facts["perplexity"]["valid"], rel=1e-5)


def test_a_seed_fixes_every_weight(documents: dict[str, str], built: Path, tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "again", documents=documents, **SMALL)
    tiny_model.build(tmp_path / "other", documents=documents, **SMALL, seed=1)
    weights = {path: (path / "model.safetensors").read_bytes() for path in (built, tmp_path / "again", tmp_path / "other")}
    assert weights[built] == weights[tmp_path / "again"]
    assert weights[built] != weights[tmp_path / "other"]


def test_a_run_that_fails_while_writing_leaves_no_model(
    documents: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model.PreTrainedTokenizerFast, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            tiny_model.build(tmp_path / "tiny", documents=documents, **SMALL)
    assert not (tmp_path / "tiny").exists()
    tiny_model.build(tmp_path / "tiny", documents=documents, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_command_refuses_what_is_there(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    assert tiny_model.main([str(built)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tiny_model: {built}: exists already")
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_the_command_passes_every_option_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def build(**options: object) -> dict[str, object]:
        seen.update(options)
        return {"parameters": 1234567, "perplexity": {"valid": 70.0, "test": 71.0}, "time_s": 90.0}

    monkeypatch.setattr(tiny_model, "build", build)
    numbers = {"steps": 3, "hidden": 48, "layers": 2, "heads": 3, "vocab_size": 400, "context": 64, "batch_size": 5, "seed": 7}
    arguments = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert tiny_model.main([str(tmp_path / "x"), *arguments, "--limit-s", "9", "--quiet"]) == 0
    assert seen == {"out": tmp_path / "x", **numbers, "limit_s": 9.0, "progress": False}
    assert "1,234,567 parameters, perplexity 70.00" in capsys.readouterr().out
