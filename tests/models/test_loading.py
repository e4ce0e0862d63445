"""Loading: what comes back, and one clear line for everything that can be wrong with a directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as hf_logging

from lora_dist.log import UserError
from lora_dist.models import hub
from lora_dist.models.loading import load_base
from lora_dist.models.sources import fingerprint_model
from tests.tiny import KINDS, tiny_model, tiny_tokenizer, tiny_windows


def _load(path: Path | str, **options: object):  # type: ignore[no-untyped-def]
    return load_base(str(path), progress=False, **options)  # type: ignore[arg-type]


def _refused(path: Path | str, **options: object) -> str:
    """The one line that a directory is refused with."""
    with pytest.raises(UserError) as caught:
        _load(path, **options)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_what_transformers_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tiny_model(kind, dtype=dtype).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = _load(tmp_path)
    ids = tiny_windows(2)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")(ids).logits
    assert base.stored_dtype == dtype == expected.dtype
    assert torch.equal(base.model(ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.config.use_cache is False and base.use_cache is True
    assert (base.source_dir, base.config_from, base.tokenizer_from) == (tmp_path, str(tmp_path), str(tmp_path))
    assert base.tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def test_precision_is_what_was_asked_for_and_the_fingerprint_stays(llama_dir: Path) -> None:
    stored, half = _load(llama_dir), _load(llama_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert stored.fingerprint == half.fingerprint == fingerprint_model(llama_dir, progress=False)
    assert half.stored_dtype == torch.float32


def test_stored_precision_is_the_tensors_not_what_the_config_claims(llama_dir: Path) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert {p.dtype for p in _load(llama_dir).model.parameters()} == {torch.float32}


def test_writing_to_the_model_leaves_its_files_alone(llama_dir: Path) -> None:
    """Weights may be memory maps of the files."""
    base = _load(llama_dir)
    for parameter in base.model.parameters():
        parameter.data.zero_()
    assert fingerprint_model(llama_dir, progress=False) == base.fingerprint


def test_torch_files_load_too(llama_dir: Path) -> None:
    before = _load(llama_dir)
    torch.save(load_file(llama_dir / "model.safetensors"), llama_dir / "pytorch_model.bin")
    (llama_dir / "model.safetensors").unlink()
    after = _load(llama_dir)
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.model(tiny_windows(1)).logits, before.model(tiny_windows(1)).logits)


def test_transformers_keeps_quiet_and_its_settings_stay(llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_base(str(llama_dir))
    out, err = capfd.readouterr()
    assert out == ""
    assert {line.split(":")[0] for line in err.replace("\r", "\n").splitlines() if line} == {"Loading checkpoint shards"}
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_no_such_directory(tmp_path: Path) -> None:
    assert _refused(tmp_path / "gone").startswith(f"model.name_or_path: found no directory {tmp_path / 'gone'}")
    assert "found no directory out/llama2_7b/block_16x16/wanda" in _refused("out/llama2_7b/block_16x16/wanda")
    (tmp_path / "file").write_text("")
    assert "found a file" in _refused(tmp_path / "file")
    (pickle := tmp_path / "pruned_model.bin").write_text("")
    assert _refused(pickle).endswith(f"in Hugging Face format: `lora-dist convert {pickle} OUT` makes one of a pickle")


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "is an empty directory, expected config.json, model.safetensors and a tokenizer" in _refused(tmp_path)


def test_no_weights(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").unlink()
    line = _refused(llama_dir)
    assert "found no weights, looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin" in line


def test_an_adapter_is_not_a_base(llama_dir: Path) -> None:
    (llama_dir / "adapter_config.json").write_text("{}")
    assert "holds an adapter, expected the directory of its base model" in _refused(llama_dir)


def test_config_and_tokenizer_of_another_place(llama_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(llama_dir / "model.safetensors", bare)
    line = _refused(bare)
    assert "has no config.json" in line and "model.config_name" in line
    base = _load(bare, config_name=str(llama_dir))
    assert (base.config_from, base.tokenizer_from) == (str(llama_dir), str(llama_dir))
    assert base.source_dir == bare
    shutil.copy(llama_dir / "config.json", bare)
    line = _refused(bare)
    assert "has no tokenizer (looked for tokenizer.json" in line and "model.config_name" in line
    base = _load(bare, config_name=str(llama_dir))
    assert (base.config_from, base.tokenizer_from) == (str(bare), str(llama_dir))
    own = _load(llama_dir, config_name=str(bare))  # it has both itself
    assert (own.config_from, own.tokenizer_from) == (str(llama_dir), str(llama_dir))


def test_config_name_that_has_neither(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (llama_dir / "tokenizer.json").unlink()
    assert "model.config_name: found no tokenizer in" in _refused(llama_dir, config_name=str(tmp_path / "other"))
    (llama_dir / "config.json").unlink()
    assert "model.config_name: found no config.json in" in _refused(llama_dir, config_name=str(tmp_path / "other"))
    assert "model.config_name: found no directory" in _refused(llama_dir, config_name=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_a_broken_config(llama_dir: Path, text: str) -> None:
    (llama_dir / "config.json").write_text(text)
    assert _refused(llama_dir).startswith(f"model.name_or_path: {llama_dir}: config.json cannot be used (")


def test_a_broken_tokenizer(llama_dir: Path) -> None:
    (llama_dir / "tokenizer.json").write_text("{}")
    assert _refused(llama_dir).startswith(f"model.name_or_path: {llama_dir}: the tokenizer cannot be loaded (")


def test_a_tokenizer_of_another_model(llama_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    tokenizer.save_pretrained(llama_dir)
    assert "model.config_name: the tokenizer" in _refused(llama_dir)


def test_truncated_weights(llama_dir: Path) -> None:
    content = (llama_dir / "model.safetensors").read_bytes()
    (llama_dir / "model.safetensors").write_bytes(content[:-1000])
    assert "model.safetensors: cannot be read as safetensors" in _refused(llama_dir)


def test_missing_tensors_are_not_made_up(llama_dir: Path) -> None:
    file = llama_dir / "model.safetensors"
    tensors = load_file(file)
    gone = [name for name in tensors if "layers.1.mlp" in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file, metadata={"format": "pt"})
    line = _refused(llama_dir)
    assert "3 tensors that LlamaForCausalLM needs are not in the files" in line
    assert all(name in line for name in gone)


def test_config_of_another_size(llama_dir: Path) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    line = _refused(llama_dir)
    assert "6 tensors do not fit the configuration: " in line
    assert "model.layers.0.mlp.down_proj.weight is (32, 40), by config.json (32, 48)" in line


def test_tensors_that_the_model_has_no_use_for_are_reported(llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = llama_dir / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="lora_dist"):
        _load(llama_dir)
    assert "1 tensors in the files are not part of LlamaForCausalLM and were left out: model.layers.0.extra.weight" in caplog.text


def test_a_model_that_is_no_causal_language_model(llama_dir: Path) -> None:
    (llama_dir / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "cannot be loaded as a causal language model" in _refused(llama_dir)


def test_an_attention_kernel_that_is_not_there(llama_dir: Path) -> None:
    assert "no-such-kernel" in _refused(llama_dir, attn_implementation="no-such-kernel")
    assert _load(llama_dir, attn_implementation="eager").model.config._attn_implementation == "eager"


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub's own client: nothing listens on port 9, and nothing is in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    real = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path, endpoint="http://127.0.0.1:9", **k)
    )
    started = time.monotonic()
    line = _refused("meta-llama/Llama-2-7b-hf")
    assert time.monotonic() - started < 10
    assert "model.name_or_path: found no local directory meta-llama/Llama-2-7b-hf" in line
    assert all(word in line for word in ("the hub cannot be reached", "local directory", "HF_ENDPOINT", "HF_TOKEN"))


def test_a_hub_name_is_downloaded_without_torch_files_where_there_are_safetensors(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    offline: list[bool] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None, local_files_only: bool) -> str:
        assert name == "some/model"
        asked.append(allow_patterns)
        offline.append(local_files_only)
        return str(llama_dir)

    monkeypatch.setattr(hub, "snapshot_download", download)
    base = _load("some/model")
    assert (base.source_dir, base.config_from) == (llama_dir, "some/model")
    assert len(asked) == 1 and "*.bin" not in asked[0] and "*.safetensors" in asked[0]
    (llama_dir / "model.safetensors").rename(llama_dir / "elsewhere")
    torch.save({}, llama_dir / "pytorch_model.bin")
    with pytest.raises(UserError):
        _load("some/model")
    assert [("*.bin" in patterns) for patterns in asked] == [False, False, True]
    assert not any(offline)


def test_use_cache_of_the_config_is_remembered(llama_dir: Path) -> None:
    config = LlamaConfig.from_pretrained(llama_dir)
    config.use_cache = False
    config.save_pretrained(llama_dir)
    assert _load(llama_dir).use_cache is False


def test_generation_settings_come_along_with_the_config(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (llama_dir / "model.safetensors").rename(tmp_path / "bare" / "model.safetensors")
    settings = json.loads((llama_dir / "generation_config.json").read_text())
    (llama_dir / "generation_config.json").write_text(json.dumps({**settings, "max_length": 77}))
    assert _load(tmp_path / "bare", config_name=str(llama_dir)).model.generation_config.max_length == 77
    (llama_dir / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be used" in _refused(tmp_path / "bare", config_name=str(llama_dir))
    (llama_dir / "generation_config.json").unlink()
    assert _load(tmp_path / "bare", config_name=str(llama_dir)).model.generation_config.eos_token_id == 2
