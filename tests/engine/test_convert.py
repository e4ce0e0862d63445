"""Converting pickles: whole, structured, block-sparse, old and bare; what is proven, what is refused, and what a second call does."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import prune_structured
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_dist.__main__ import main
from lora_dist.arguments import ConvertArgs
from lora_dist.blocks import MASK_FILE, Pattern
from lora_dist.engine.convert import _compare_tensors, convert, converted
from lora_dist.log import GuardError, UserError
from lora_dist.models.legacy import save_pickled
from lora_dist.models.loading import load_base
from tests.models.pickles import Evil, old_llama
from tests.runs import options, run
from tests.tiny import tiny_model, tiny_tokenizer, tiny_windows

HEADS, NEURONS = "1,2", "17,33"


def structured(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model with layers of different widths."""
    model = tiny_model(kind, **changes)
    prune_structured.prune(model, kv_heads=HEADS, neurons=NEURONS)
    return model


def ids() -> Tensor:
    return tiny_windows(2, 20)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result = model(ids(), use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


@pytest.fixture
def pickle(tmp_path: Path) -> Path:
    return save_pickled(structured(), tiny_tokenizer(), tmp_path / "HGSP" / "pruned_model.bin")


def _convert(path: Path, out: Path, **changes: Any) -> Any:
    return convert(ConvertArgs(str(path), str(out), **changes))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_structured_model_computes_the_same_after_conversion(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_pickled(structured(kind), tiny_tokenizer(), tmp_path / "pruned_model.bin")
    report = _convert(path, tmp_path / "out")
    assert report.logits_error == 0 and not report.cannot_run
    assert torch.equal(logits(load_base(str(tmp_path / "out"), progress=False).model), logits(structured(kind)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_widths"] == {
        "num_attention_heads": [2, 4],
        "num_key_value_heads": [1, 2],
        "intermediate_size": [17, 33],
        "bias": ["q_proj", "k_proj", "v_proj"] if kind == "qwen2" else [],
    }
    assert config["head_dim"] == 8 and config["num_attention_heads"] == 4
    text = "Hello, world"
    if kind == "qwen2":  # whose tokenizer class AutoTokenizer decides on by itself, whatever the directory says
        assert "AutoTokenizer reads" in capsys.readouterr().out
        return
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tiny_tokenizer()(text).input_ids


def test_widths_that_all_layers_share_need_only_config_json(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    prune_structured.prune(model, kv_heads="1,1", neurons="24,24")
    report = _convert(save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin"), tmp_path / "out")
    assert report.logits_error == 0  # although the cast rounded the pickled module's rotary frequencies
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.bfloat16 and torch.equal(logits(plain), logits(model))
    assert "layer_widths" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_block_pattern_is_stored(tmp_path: Path, tiny_base: Path) -> None:
    base = load_base(str(tiny_base), progress=False)
    report = _convert(save_pickled(base.model, base.tokenizer, tmp_path / "m.bin"), tmp_path / "out")
    assert report.pattern_digest is not None and (tmp_path / "out" / MASK_FILE).exists()
    assert Pattern.load(tmp_path / "out").differences(Pattern.load(tiny_base)) is None
    assert report.zero_share == pytest.approx(Pattern.load(tiny_base).sparsity, abs=1e-3)


def test_a_pickle_of_an_old_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are gone, stored rotary frequencies, rope_theta and rope_scaling as they were."""
    path, today = old_llama(tmp_path / "old.bin", monkeypatch)
    report = _convert(path, tmp_path / "out")
    assert "LlamaSdpaAttention" in report.cannot_run and report.logits_error is None
    assert report.tensors == len(today.state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"].items() >= {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}.items()
    assert "a_key_of_then" not in config
    converted_logits = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(converted_logits, logits(today))
    assert not torch.equal(converted_logits, logits(tiny_model("llama")))


def test_a_head_that_is_tied_and_one_that_only_says_so(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny_model("llama")
        model.config.tie_word_embeddings = True
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        out = tmp_path / f"out{tied}"
        _convert(save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin"), out)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("shape", ["model", "state", "wrapped state"])
def test_bare_models_and_state_dicts(tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = structured()
    model.save_pretrained(tmp_path / "family")
    tiny_tokenizer().save_pretrained(tmp_path / "family")
    saved = {"model": model, "state": model.state_dict(), "wrapped state": {"model": model.state_dict()}}[shape]
    torch.save(saved, tmp_path / "m.bin")
    with pytest.raises(UserError, match="holds no tokenizer" if shape == "model" else r"--config_name"):
        _convert(tmp_path / "m.bin", tmp_path / "out")
    place = {"tokenizer" if shape == "model" else "config_name": str(tmp_path / "family")}
    _convert(tmp_path / "m.bin", tmp_path / "out", **place)
    found = "a model (LlamaForCausalLM" if shape == "model" else "a state dict of 21 tensors"
    assert found in capsys.readouterr().out
    assert torch.equal(logits(load_base(str(tmp_path / "out"), progress=False).model), logits(model))


def test_the_whole_workflow_of_a_structured_model(pickle: Path, tmp_path: Path, tiny_text: Path) -> None:
    """Convert, train, merge, pickle, reload, generate with the cache as without."""
    base = converted(pickle)
    assert base == pickle.with_suffix("")
    assert main(["train", *options(base, tiny_text, tmp_path / "run", max_steps=4, seed=3)]) == 0
    assert main(["merge", str(base), str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = load_base(str(tmp_path / "merged"), progress=False)
    assert not torch.allclose(logits(merged.model), logits(structured()), atol=1e-3)
    assert merged.model.model.layers[0].self_attn.q_proj.out_features == 16
    again = converted(save_pickled(merged.model, merged.tokenizer, tmp_path / "tuned.bin"))
    assert torch.equal(logits(load_base(str(again), progress=False).model), logits(merged.model))
    whole = torch.load(tmp_path / "tuned.bin", weights_only=False)["model"]
    cached = whole.generate(ids()[:, :6], max_new_tokens=10, do_sample=False, use_cache=True)
    assert torch.equal(cached, whole.generate(ids()[:, :6], max_new_tokens=10, do_sample=False, use_cache=False))
    assert main(["inspect", str(base), "--summary"]) == 0


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_sharded_strategies_train_uneven_layers_alike(pickle: Path, tmp_path: Path, tiny_text: Path, strategy: str) -> None:
    from tests.runs import adapter, largest_relative_difference, losses

    base = converted(pickle)
    for name, processes in (("ddp", 1), (strategy, 2)):
        out = tmp_path / name
        run(processes, "train", *options(base, tiny_text, out, max_steps=4, global_batch_size=4, parallel__strategy=name))
    one, two = losses(tmp_path / "ddp"), losses(tmp_path / strategy)
    assert one.keys() == two.keys() and all(abs(one[step] - two[step]) < 1e-5 for step in one)
    assert largest_relative_difference(adapter(tmp_path / "ddp"), adapter(tmp_path / strategy)) < 1e-4


# --- a second call, and what is refused ---------------------------------------------------------------------------------------


def test_a_pickle_is_converted_once(pickle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = converted(pickle)
    first = (folder / "convert.json").stat().st_mtime_ns
    capsys.readouterr()
    assert converted(pickle) == folder
    assert (folder / "convert.json").stat().st_mtime_ns == first and capsys.readouterr().out == ""
    save_pickled(tiny_model("llama", seed=5), tiny_tokenizer(), pickle)
    with pytest.raises(UserError, match="sha256 differs.*move .*pruned_model away"):
        converted(pickle)


def test_a_directory_that_came_otherwise_is_used_if_it_holds_the_same(pickle: Path) -> None:
    folder = converted(pickle)
    (folder / "convert.json").unlink()
    assert converted(pickle) == folder
    other = tiny_model("llama", seed=5)
    shutil.rmtree(folder)
    other.save_pretrained(folder)
    with pytest.raises(UserError, match="holds another model"):
        converted(pickle)


def test_where_the_folder_cannot_be_written_another_is_used(pickle: Path, tmp_path: Path) -> None:
    pickle.with_suffix("").write_text("in the way")
    assert converted(pickle, fallback=tmp_path / "else" / "where") == tmp_path / "else" / "where"
    with pytest.raises(UserError, match="OUT"):
        converted(pickle)


def test_the_command_refuses_a_hostile_pickle_and_opens_it_when_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "m.bin"
    model = structured()
    model.config.extra = Evil(marker)
    torch.save({"model": model, "tokenizer": tiny_tokenizer()}, path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "posix.system" in capfd.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()
    assert main(["convert", str(path), str(tmp_path / "out"), "--trust_pickle"]) == 0
    assert marker.exists() and "--trust_pickle" in capfd.readouterr().out
    assert torch.equal(logits(load_base(str(tmp_path / "out"), progress=False).model), logits(structured()))
    assert json.loads((tmp_path / "out" / "convert.json").read_text())["trusted"] is True


def test_a_module_that_computes_something_else_is_not_published(tmp_path: Path) -> None:
    """Its own attributes say other than its configuration: the proof finds it."""
    model = structured()
    model.model.layers[0].self_attn.scaling = 3.0
    with pytest.raises(GuardError, match="logits of the written directory differ"):
        _convert(save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin"), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


def test_what_holds_nan_is_refused_and_named(tmp_path: Path) -> None:
    model = structured()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"m\.bin: found NaN in 1 of its tensors, .*: model\.layers\.0\.mlp\.up_proj\.weight$"):
        _convert(tmp_path / "m.bin", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


@pytest.mark.parametrize("value,same", [(float("nan"), True), (-0.0, False), (1.0, False)])
def test_tensors_are_compared_bit_for_bit_under_the_name_asked_for(tmp_path: Path, value: float, same: bool) -> None:
    """Also by what compares otherwise as numbers: NaN with itself, 0.0 with -0.0."""
    stored = torch.tensor([float("nan") if same else 0.0, 2.0])
    save_file({"w": stored}, tmp_path / "model.safetensors")
    expected = {"w": torch.tensor([value, 2.0])}
    if same:
        assert _compare_tensors(expected, tmp_path, "OUT") == 1
        return
    with pytest.raises(GuardError, match="^OUT: w is not the pickle's$"):
        _compare_tensors(expected, tmp_path, "OUT")


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_more_layers_than_there_are_weights_for_are_not_built(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    model.config.num_hidden_layers = 10**7
    save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin")
    started = time.monotonic()
    with pytest.raises(UserError, match="holds weights of 2 layers, its configuration says 10000000; give another"):
        _convert(tmp_path / "m.bin", tmp_path / "out")
    assert time.monotonic() - started < 20


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = structured()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 20, bias=False)
    with pytest.raises(UserError, match=r"layer 1 has up_proj \(20, 32\) for \(33, 32\)"):
        _convert(save_pickled(model, tiny_tokenizer(), tmp_path / "m.bin"), tmp_path / "out")


def test_a_whole_gpt2_computes_the_same_after_conversion(tmp_path: Path) -> None:
    path = save_pickled(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "pruned_model.bin")
    assert _convert(path, tmp_path / "out").logits_error == 0
    assert torch.equal(logits(load_base(str(tmp_path / "out"), progress=False).model), logits(tiny_model("gpt2")))
