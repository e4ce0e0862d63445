"""The reference for structured pruning: what is kept is what was there, the weakest goes, and bad numbers are named."""

from __future__ import annotations

from pathlib import Path

import prune_structured
import pytest
import torch

from lora_dist.log import UserError
from tests.tiny import tiny_model, tiny_tokenizer, tiny_windows


def test_dropping_dead_heads_and_neurons_changes_nothing() -> None:
    """Those whose weights are zero are worth least, and the model computes without them what it computed with them."""
    for kind in ("llama", "qwen2", "qwen3"):
        model = tiny_model(kind)
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight[:, :16] = 0  # both query heads of the first key-value head
            model.model.layers[1].mlp.down_proj.weight[:, 5:12] = 0
            before = model(tiny_windows(2, 12)).logits
            kept = prune_structured.prune(model, kv_heads="1,2", neurons="40,33")
            after = model(tiny_windows(2, 12)).logits
        assert kept == [(1, 40), (2, 33)]
        assert model.model.layers[0].self_attn.q_proj.out_features == 16
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_ratio_drops_that_share_over_all_layers() -> None:
    kept = prune_structured.prune(tiny_model("llama", layers=4), ratio=0.5)
    assert sum(neurons for _, neurons in kept) == 4 * 40 // 2
    assert len({neurons for _, neurons in kept}) > 1


def test_the_command_writes_the_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), str(tmp_path / "out" / "pruned_model.bin"), "--kv_heads", "1,2", "--neurons", "17,33"]
    assert prune_structured.main(argv) == 0
    assert "layer 0: 1 key-value heads, 17 neurons kept" in capsys.readouterr().out
    saved = torch.load(tmp_path / "out" / "pruned_model.bin", weights_only=False)
    assert set(saved) == {"model", "tokenizer"} and saved["model"].config.use_cache is True
    with pytest.raises(UserError, match="kv_heads: found 1,9, expected 2 numbers, one a layer, from 1 to 2"):
        prune_structured.main([*argv[:2], "--kv_heads", "1,9"])
    with pytest.raises(UserError, match="ratio: found 1.0"):
        prune_structured.main([*argv[:2], "--ratio", "1"])
