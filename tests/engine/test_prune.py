"""`prune_model` end to end on small models: what it writes, prints and refuses."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_dist.arguments import PruneArgs
from lora_dist.blocks import BlockMask, Pattern
from lora_dist.engine import prune
from lora_dist.engine.prune import PruneResult, prune_model
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.sources import fingerprint_model
from tests.tiny import CONTEXT, KINDS, tiny_model, tiny_tokenizer, tiny_windows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 windows of 64 characters."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} bottles of {'beer' if i % 3 else 'milk'} on the wall.\n" for i in range(80)))
    return file


def _dense(folder: Path, kind: str = "llama", **options: Any) -> Path:
    tiny_model(kind, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _prune(tmp_path: Path, text: Path, **options: Any) -> PruneResult:
    settings: dict[str, Any] = {
        "calibration": str(text),
        "block": 8,
        "nsamples": 10,
        "device": "cpu",
        "cache_dir": str(tmp_path / "cache"),
    }
    return prune_model(PruneArgs(**{**settings, "out": str(tmp_path / "out"), **options}), progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written(tmp_path: Path, text: Path, kind: str) -> None:
    dense = _dense(tmp_path / "dense", kind, dtype=torch.bfloat16)
    result = _prune(tmp_path, text, model=str(dense))
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype="auto")
    assert model.dtype == torch.bfloat16  # as stored
    assert model.config.use_cache is True
    before = {
        linear.name: linear.weight_OI for linear in prunable_linears(AutoModelForCausalLM.from_pretrained(dense, dtype="auto"))
    }
    stored = Pattern.load(result.out)
    assert stored.digest == result.pattern.digest
    tiles = pruned = 0
    for linear in prunable_linears(model):
        mask = stored[linear.name]
        assert isinstance(mask, BlockMask)
        kept_OI = mask.expand()
        assert not linear.weight_OI[~kept_OI].view(torch.int16).any()
        assert torch.equal(linear.weight_OI[kept_OI], before[linear.name][kept_OI])
        tiles += mask.kept_PQ.numel()
        pruned += int((~mask.kept_PQ).sum())
        assert (~mask.kept_PQ).sum() == math.floor(0.5 * mask.kept_PQ.numel())
    assert (result.tiles, result.pruned_tiles) == (tiles, pruned)
    assert result.windows == 10 and result.seqlen == CONTEXT
    assert result.base_fingerprint == fingerprint_model(dense, progress=False)


def test_the_report_beside_it(tmp_path: Path, text: Path) -> None:
    dense = _dense(tmp_path / "dense")
    result = _prune(tmp_path, text, model=str(dense), sparsity=0.4, select="row", seqlen=32)
    report = json.loads((result.out / "pruning.json").read_text())
    assert report["settings"]["sparsity"] == 0.4 and report["settings"]["select"] == "row"
    assert report["sparsity"] == result.pattern.sparsity
    assert report["pruned_tiles"] == result.pruned_tiles
    assert report["pattern_digest"] == result.pattern.digest
    assert report["base_fingerprint"] == fingerprint_model(dense, progress=False)
    assert report["calibration"] == {"windows": 10, "seqlen": 32, "digest": result.calibration_digest}
    assert set(report["versions"]) == {"lora_dist", "torch", "transformers"}


def test_the_same_again_gives_the_same_and_the_seed_chooses_windows(tmp_path: Path, text: Path) -> None:
    dense = str(_dense(tmp_path / "dense"))
    results = [
        _prune(tmp_path, text, model=dense, out=str(tmp_path / name), seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    files = [load_file(result.out / "model.safetensors") for result in results]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert results[0].calibration_digest == results[1].calibration_digest != results[2].calibration_digest


def test_own_windows(tmp_path: Path, text: Path) -> None:
    windows_NL = tiny_windows(5)
    dense = str(_dense(tmp_path / "dense"))
    args = PruneArgs(model=dense, out=str(tmp_path / "out"), block=8, device="cpu", calibration="no such text is read")
    result = prune_model(args, windows_NL=windows_NL, progress=False)
    assert (result.windows, result.seqlen) == (5, windows_NL.shape[1])
    assert result.calibration_digest == hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reconstruction_of_a_half_precision_model(
    tmp_path: Path, text: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read back: pruned tiles exactly zero, kept weights moved, in the stored precision, and the errors in report and table."""
    dense = _dense(tmp_path / "dense", kind, dtype=torch.bfloat16)
    result = _prune(tmp_path, text, model=str(dense), reconstruct=True, score="obs", damping=0.02)
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    report = json.loads((result.out / "pruning.json").read_text())["reconstruction"]
    assert report["damping"] == 0.02
    for linear, old in zip(prunable_linears(model), prunable_linears(before), strict=True):
        kept_OI = result.pattern[linear.name].expand()
        assert linear.weight_OI.dtype == torch.bfloat16
        assert not linear.weight_OI[~kept_OI].view(torch.int16).any()
        assert not torch.equal(linear.weight_OI[kept_OI], old.weight_OI[kept_OI])
        assert 0 < report["linears"][linear.name]["error_after"] < report["linears"][linear.name]["error_before"]
    table = capsys.readouterr().out.split("kept weights as they were > solved\n")[1].splitlines()
    first = next(iter(report["linears"].values()))
    assert f"{first['error_before']:.3f} > {first['error_after']:.3f}" in table[1]
    assert len({len(line) for line in table[:3]}) == 1


def test_a_budget_for_the_whole_model(tmp_path: Path, text: Path) -> None:
    result = _prune(tmp_path, text, model=str(_dense(tmp_path / "dense")), select="global", score="magnitude", sparsity=0.4)
    assert result.pruned_tiles == math.floor(0.4 * result.tiles)
    shares = {round(1 - mask.kept_elements() / (mask.shape[0] * mask.shape[1]), 3) for mask in result.pattern.values()}
    assert len(shares) > 3
    damages = json.loads((result.out / "pruning.json").read_text())["damages"]
    assert damages.keys() == set(result.pattern) and all(0 < damage < 1 for damage in damages.values())


@pytest.mark.parametrize("stored_mask", [True, False])
def test_a_given_pattern_is_kept_and_reconstructed_from_the_dense_model(tmp_path: Path, text: Path, stored_mask: bool) -> None:
    dense = str(_dense(tmp_path / "dense"))
    pruned = _prune(tmp_path, text, model=dense, out=str(tmp_path / "pruned"), score="magnitude", sparsity=0.3)
    if not stored_mask:
        (pruned.out / "block_mask.safetensors").unlink()
    result = _prune(tmp_path, text, model=dense, from_pruned=str(pruned.out))
    assert result.pattern.digest == pruned.pattern.digest
    assert all(one.error_after < one.error_before for one in result.reconstructions.values())
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", result.out)]
    name = "model.layers.0.self_attn.q_proj.weight"
    kept_OI = result.pattern[name.removesuffix(".weight")].expand()
    assert not torch.equal(weights[0][name][kept_OI], weights[1][name][kept_OI])
    assert not weights[1][name][~kept_OI].any()


def test_patterns_of_other_models_and_none(tmp_path: Path, text: Path) -> None:
    dense = str(_dense(tmp_path / "dense"))
    other = _prune(tmp_path, text, model=str(_dense(tmp_path / "gpt2", "gpt2")), out=str(tmp_path / "other"), score="random")
    (line,) = _refused(tmp_path, text, model=dense, from_pruned=str(other.out))
    assert "layer transformer.h.0.attn.c_attn has a mask of (96, 32), the model has no such linear" in line
    (line,) = _refused(tmp_path, text, model=dense, from_pruned=dense)
    assert line == f"from_pruned: {dense} has no pattern: no mask file, and no 8x8 tiles of zeros (block)"
    (line,) = _refused(tmp_path, text, model=dense, from_pruned=str(tmp_path / "gone"))
    assert line.startswith("from_pruned: found no directory")


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_scores_without_text_read_none(tmp_path: Path, score: str) -> None:
    result = _prune(tmp_path, tmp_path / "there is no such file.txt", model=str(_dense(tmp_path / "dense")), score=score)
    assert (result.windows, result.calibration_digest) == (0, None)
    assert result.tile_sparsity > 0.45


def test_the_table(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _prune(tmp_path, text, model=str(_dense(tmp_path / "dense", layers=3)), block=16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Calibration: 10 windows of {CONTEXT} tokens from {text}"
    table = [line.split() for line in lines[1:7]]
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert table[0] == ["layer", "tiles", "pruned", "sparsity", *linears]
    assert table[1] == ["32x32", "16x32", "16x32", "32x32", "40x32", "40x32", "32x40"]
    # tiles: q 4, k 2, v 2, o 4, gate 6, up 6, down 6; half of each
    assert [row[:2] for row in table[2:]] == [["0", "15/30"], ["1", "15/30"], ["2", "15/30"], ["total", "45/90"]]
    assert [row[3:7] for row in table[2:]] == [["50.0%"] * 4] * 4
    assert lines[-1].startswith("✅ All 45 pruned tiles are exactly 0.0 in ")
    assert len({len(line) for line in lines[1:7]}) == 1


def test_the_table_of_gpt2_tells_its_two_c_proj_apart(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _prune(tmp_path, text, model=str(_dense(tmp_path / "dense", "gpt2")))
    header = next(line for line in capsys.readouterr().out.splitlines() if "tiles pruned" in line)
    assert header.split()[4:] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_sparsity_that_whole_tiles_do_not_reach_is_said(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _prune(tmp_path, text, model=str(_dense(tmp_path / "dense")), block=16, select="row", sparsity=0.4)
    assert result.pruned_tiles == 2 * 2  # only down_proj has 3 tiles a row: 1 of them in each of 2 rows, in 2 layers
    assert "Note: 6.7% of the tiles are pruned, 40.0% was asked for: counts are rounded down" in capsys.readouterr().out


def test_fewer_windows_than_asked_for_are_all_used_and_it_is_said(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _prune(tmp_path, text, model=str(_dense(tmp_path / "dense")), nsamples=5000)
    assert 20 < result.windows < 100
    assert f"has {result.windows} windows of {CONTEXT} tokens, 5000 were asked for: using all" in capsys.readouterr().out


def test_config_and_tokenizer_of_another_place(tmp_path: Path, text: Path) -> None:
    dense = _dense(tmp_path / "dense")
    (tmp_path / "bare").mkdir()
    (dense / "model.safetensors").rename(tmp_path / "bare" / "model.safetensors")
    result = _prune(tmp_path, text, model=str(tmp_path / "bare"), config_name=str(dense))
    assert json.loads((result.out / "pruning.json").read_text())["config_from"] == str(dense)
    AutoModelForCausalLM.from_pretrained(result.out)


def _refused(tmp_path: Path, text: Path, **options: Any) -> list[str]:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        _prune(tmp_path, text, **options)
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == [
        p for p in before if "cache" not in p.parts
    ]
    return caught.value.problems


def test_all_bad_options_are_reported_together(tmp_path: Path, text: Path) -> None:
    problems = _refused(tmp_path, text, sparsity=1.0, block=0, nsamples=0, seqlen=1, seed=-1)
    assert [line.split(":")[0] for line in problems] == ["MODEL", "sparsity", "block", "nsamples", "seqlen", "seed"]
    assert problems[1] == "sparsity: found 1.0, expected a number from 0 up to but not including 1"
    problems = _refused(tmp_path, text, model="m", score="obs", damping=-1.0)
    assert problems == [
        "damping: found -1.0, expected a number from 0",
        "score: found obs without reconstruct, expected --reconstruct: it counts on kept weights that make up for what goes",
    ]
    (problem,) = _refused(tmp_path, text, model="m", score="obs", damping=0.0, reconstruct=True)
    assert problem.startswith("damping: found 0 with score obs, expected more than 0")
    (problem,) = _refused(tmp_path, text, model="m", score="magnitude", reconstruct=True, calibration="")
    assert problem.startswith("calibration: found nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, text: Path) -> None:
    assert _refused(tmp_path, text, model="m", device="cuda") == ["device: found cuda, but torch sees no GPU; set cpu or auto"]


def test_bad_places_and_texts(tmp_path: Path, text: Path) -> None:
    dense = str(_dense(tmp_path / "dense"))
    (tmp_path / "short.txt").write_text("short")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": str(tmp_path / "gone")}, "MODEL: found no directory"),
        ({"model": dense, "out": dense}, f"OUT: {dense} already holds files"),
        ({"model": dense, "seqlen": 65}, "seqlen: found 65, expected at most the model's context of 64"),
        ({"model": dense, "calibration": str(tmp_path / "gone.txt")}, "calibration: found no file"),
        ({"model": dense, "calibration": str(tmp_path / "short.txt")}, "seqlen: found 5 tokens"),
    ]
    for options, expected in cases:
        (line,) = _refused(tmp_path, text, **options)
        assert line.startswith(expected), line


def test_a_model_that_is_not_finite_on_the_text(tmp_path: Path, text: Path) -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (line,) = _refused(tmp_path, text, model=str(tmp_path / "dense"))
    assert "layer model.layers.1.self_attn.o_proj, tile (0, 0): found a score of nan" in line


def test_a_tile_that_is_not_zero_on_disk_removes_what_was_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = str(_dense(tmp_path / "dense"))
    real = prune.save_model

    def save_spoilt(model: Any, *args: Any, pattern: Pattern, **options: Any) -> Path:
        linear = prunable_linears(model)[0]
        mask = pattern[linear.name]
        linear.weight_OI[~mask.expand()] = 1e-9
        return real(model, *args, pattern=pattern, **options)

    monkeypatch.setattr(prune, "save_model", save_spoilt)
    with pytest.raises(
        GuardError, match=r"layer model.layers.0.self_attn.q_proj, tile \(\d, \d\): found 1e-09, expected exactly 0"
    ):
        _prune(tmp_path, text, model=dense)
    assert not (tmp_path / "out").exists()
