"""The fingerprint follows content only; broken files are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.log import UserError
from lora_dist.models import sources
from lora_dist.models.sources import fingerprint_model, read_facts, weight_files
from tests.tiny import tiny_model


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(3, 2, generator=generator).bfloat16(),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.zeros(0, 4),
        "e.ids": torch.arange(4),
    }


def _save(folder: Path, tensors: dict[str, Tensor], shards: int = 1, kind: str = "safetensors") -> Path:
    """Write tensors in so many files, in either format, with an index where there are several."""
    folder.mkdir(parents=True)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = folder / (f"{stem}{suffix}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}{suffix}")
        part = {name: tensors[name] for name in names[i::shards]}
        weight_map.update(dict.fromkeys(part, file.name))
        save_file(part, file) if kind == "safetensors" else torch.save(part, file)
    if shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _by_hand(tensors: dict[str, Tensor]) -> str:
    """The digest as `Fingerprint` and the design describe it, from whole tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = f"{name} {str(tensor.dtype).split('.')[1]} {'x'.join(map(str, tensor.shape))}\n".encode()
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {hashlib.sha256(head + content).hexdigest()}\n".encode())
    return total.hexdigest()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_files_and_formats_do_not_change_the_fingerprint(tmp_path: Path, kind: str, shards: int) -> None:
    folder = _save(tmp_path / "model", _tensors(), shards, kind)
    assert len(weight_files(folder)) == shards
    assert fingerprint_model(folder, progress=False) == _by_hand(_tensors())


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "gone"])
def test_content_changes_the_fingerprint(tmp_path: Path, change: str) -> None:
    tensors = _tensors()
    if change == "value":
        tensors["a"][6, 4] += 1e-6
    elif change == "name":
        tensors["z"] = tensors.pop("a")
    elif change == "shape":
        tensors["a"] = tensors["a"].view(5, 7)
    elif change == "dtype":
        tensors["a"] = tensors["a"].view(torch.int32)
    else:
        del tensors["a"]
    assert fingerprint_model(_save(tmp_path / "model", tensors), progress=False) != _by_hand(_tensors())


def test_precision_of_loading_does_not_touch_the_fingerprint_but_saving_does(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    model.bfloat16().save_pretrained(tmp_path / "c")
    a, b, c = (read_facts(tmp_path / name, progress=False) for name in "abc")
    assert len(weight_files(tmp_path / "b")) > 1
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert (a.dtype, c.dtype) == (torch.float32, torch.bfloat16)
    assert a.elements == sum(tensor.numel() for tensor in load_file(tmp_path / "a" / "model.safetensors").values())


def test_a_tensor_that_is_read_in_several_chunks_has_the_same_fingerprint(tmp_path: Path) -> None:
    tensors = {**_tensors(), "large": torch.arange(3_000_000, dtype=torch.float32)}
    assert tensors["large"].nbytes > 2 * sources._CHUNK_BYTES
    assert fingerprint_model(_save(tmp_path / "model", tensors, shards=2), progress=False) == _by_hand(tensors)


def test_other_safetensors_beside_the_weights_are_not_part_of_the_model(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", _tensors())
    before = fingerprint_model(folder, progress=False)
    save_file({"mask": torch.ones(3)}, folder / "block_mask.safetensors")
    assert fingerprint_model(folder, progress=False) == before


def test_the_bar_counts_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fingerprint_model(_save(tmp_path / "model", _tensors(), shards=2))
    err = capfd.readouterr().err
    assert "Loading checkpoint shards: 100%|" in err
    assert "| 2/2 [" in err


def test_a_missing_file_of_several(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", _tensors(), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 2 files, 1 of which are missing: model-00002-of-00002.safetensors"):
        weight_files(folder)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": ["a"]}']
)
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        weight_files(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", _tensors(), shards=2)
    part = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(part, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="is in the model twice"):
        fingerprint_model(folder, progress=False)


@pytest.mark.parametrize("kind, name", [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path: Path, kind: str, name: str, keep: float) -> None:
    folder = _save(tmp_path / "model", _tensors(), kind=kind)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(UserError, match=rf"{name}: cannot be read as .*; download or save it again"):
        fingerprint_model(folder, progress=False)


class _Anything:
    pass


@pytest.mark.parametrize("content", [{"a": _Anything()}, [torch.ones(2)], {"a": "text"}])
def test_a_torch_file_with_other_things_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: "):
        fingerprint_model(tmp_path, progress=False)
