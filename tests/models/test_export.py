"""Saving: round trips through transformers, whole directories or none, and the proof of zeros."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.log import GuardError, UserError
from lora_dist.models import export
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.export import check_output, model_bytes, prove_zeros, save_model
from tests.tiny import KINDS, tiny_model, tiny_tokenizer, tiny_windows


def _pruned(kind: str = "llama", block: int = 16):  # type: ignore[no-untyped-def]
    """A model with half of its tiles zeroed by chance, its pattern, and which linears are transposed."""
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for linear in prunable_linears(model):
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        masks[linear.name] = BlockMask(torch.rand(grid(shape, block), generator=generator) > 0.5, shape, block)
        linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    return model, Pattern(masks), {linear.name for linear in prunable_linears(model) if linear.transposed}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_was_written(tmp_path: Path, kind: str) -> None:
    model, pattern, transposed = _pruned(kind)
    out = save_model(model, tiny_tokenizer(), tmp_path / "deep" / "out", pattern=pattern, extra_files={"notes.json": "{}\n"})
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(tiny_windows(2)).logits, model(tiny_windows(2)).logits)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert Pattern.load(out).digest == pattern.digest
    assert (out / "notes.json").read_text() == "{}\n"
    assert prove_zeros(out, pattern, transposed=transposed) == sum(row.pruned_tiles for row in pattern.stats()) > 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    out = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "out", pattern=_pruned()[1])
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}
    (tmp_path / "folder").mkdir()
    assert out.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_generation_config_that_transformers_loads_but_does_not_save(tmp_path: Path) -> None:
    """As Llama-2's first one: temperature without do_sample."""
    model = tiny_model()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    out = save_model(model, tiny_tokenizer(), tmp_path / "out", pattern=None)
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6
    assert model.generation_config.do_sample is False


def test_an_empty_directory_is_taken_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = save_model(tiny_model(), tiny_tokenizer(), tmp_path / "empty", pattern=None)
    assert (out / "config.json").is_file()
    for attempt in (lambda: check_output(out), lambda: save_model(tiny_model(), tiny_tokenizer(), out, pattern=None)):
        with pytest.raises(UserError, match=r"OUT: .*empty already holds files, expected a new or empty directory"):
            attempt()


def test_check_output_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="OUT: found nothing"):
        check_output("")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"OUT: .*file is a file, expected a directory"):
            check_output(path)


def test_a_disk_with_too_little_room_is_refused_before_the_work(tmp_path: Path) -> None:
    assert model_bytes(tiny_model()) > 4 * 10_000
    with pytest.raises(UserError, match=r"OUT: .* GiB free, the model takes 1048576.00 GiB"):
        check_output(tmp_path / "out", need_bytes=2**50)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/1")  # where root cannot make files either
        if not place.is_dir():
            pytest.skip("runs as root, and there is no /proc to stand for a read-only disk")
    else:
        place = tmp_path / "locked"
        place.mkdir()
        place.chmod(0o500)
    with pytest.raises(UserError, match=r"OUT: .* cannot be written"):
        check_output(place / "out")
    with pytest.raises(UserError, match=r"OUT: .* cannot be written"):
        save_model(tiny_model(), tiny_tokenizer(), place / "out", pattern=None)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel refuses to let a file grow further, as on a full disk
    try:
        with pytest.raises(UserError, match=r"OUT: .*out could not be written .*free space or choose another disk") as caught:
            save_model(tiny_model(), tiny_tokenizer(), tmp_path / "deep" / "out", pattern=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_whatever_happens_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(_folder: Path) -> None:
        raise failure

    monkeypatch.setattr(export, "_flush_all", fail)  # everything is written by then, but under another name
    with pytest.raises(UserError if isinstance(failure, OSError) else type(failure)):
        save_model(tiny_model(), tiny_tokenizer(), tmp_path / "deep" / "out", pattern=None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.saving").mkdir()
    (tmp_path / ".out.saving" / "model.safetensors").write_text("half")
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "out", pattern=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind, name", [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")])
def test_proof_finds_a_single_element(tmp_path: Path, kind: str, name: str) -> None:
    model, pattern, transposed = _pruned(kind)
    out = save_model(model, tiny_tokenizer(), tmp_path / "out", pattern=pattern)
    tensors = load_file(out / "model.safetensors")
    p, q = (~pattern[name].kept_PQ).nonzero()[0].tolist()  # type: ignore[union-attr]
    row, col = 16 * p + 7, 16 * q + 5
    tensors[f"{name}.weight"][(col, row) if kind == "gpt2" else (row, col)] = 1e-30
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuardError, match=rf"layer {name}, tile \({p}, {q}\): found 1e-30, expected exactly 0"):
        prove_zeros(out, pattern, transposed=transposed)


def test_proof_misses_no_layer(tmp_path: Path) -> None:
    model, pattern, _ = _pruned()
    out = save_model(model, tiny_tokenizer(), tmp_path / "out", pattern=pattern)
    renamed = Pattern({**pattern, "model.layers.9.mlp.up_proj": pattern["model.layers.0.mlp.up_proj"]})
    with pytest.raises(GuardError, match=r"layer model.layers.9.mlp.up_proj is in the pattern, but not in the files"):
        prove_zeros(out, renamed)
