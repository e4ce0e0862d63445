"""Adapters and models to a hub in miniature, in processes of their own: the endpoint is read when the libraries are imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load

from lora_dist.__main__ import main
from lora_dist.arguments import PushArgs
from lora_dist.blocks import Pattern
from lora_dist.engine.push import plan_push
from lora_dist.log import UserError
from tests.runs import environment, options
from tests.upload_hub import upload_hub

VERBS = """
import contextlib, io, json, os, sys
from lora_dist.__main__ import main

ended = []
for token, argv in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    ended.append((code, out.getvalue(), err.getvalue()))
print("ENDED", json.dumps(ended))
"""


@pytest.fixture(scope="module")
def pushed(tiny_base, tiny_text, tmp_path_factory):
    """A run that ends with a push; its merged model, pushed after a first try was broken off; two pushes that are not allowed."""
    folder = tmp_path_factory.mktemp("push")
    train = options(tiny_base, tiny_text, folder / "run", max_steps=4, save_steps=2, push_to_hub=True, hub_private=True)
    push = ["push", str(folder / "merged"), "--hub_model_id=lab/tiny", "--base_model=lab/tiny-pruned"]
    commands = [
        ("hf_write", ["train", *train]),
        ("hf_write", ["merge", str(tiny_base), str(folder / "run"), str(folder / "merged")]),
        ("hf_write", push),
        ("hf_write", push),
        ("hf_read", push),
        ("hf_write", [*push, "--hub_private"]),
    ]
    with upload_hub() as hub:
        hub.break_put = ("lab/tiny", 2)
        env = environment(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        done = subprocess.run(
            [sys.executable, "-c", VERBS, json.dumps(commands)], env=env, capture_output=True, text=True, timeout=300
        )
    assert "ENDED" in done.stdout, done.stdout + done.stderr
    ended = json.loads(done.stdout.rsplit("ENDED", 1)[1])
    assert [code for code, _, _ in ended[:2]] == [0, 0], ended
    names = ("train", "merge", "broken", "again", "read_only", "public")
    return {"hub": hub, "folder": folder, **dict(zip(names, ended, strict=True))}


def card(content):
    _, header, text = content.decode().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_run_ends_with_its_adapter_on_the_hub_and_no_path_of_this_machine(pushed, tiny_base):
    assert "Pushed to" in pushed["train"][1]
    repo = pushed["hub"].repos["me/run"]
    assert repo["private"]
    files, pattern = repo["files"], Pattern.load(tiny_base)
    assert {"adapter_config.json", "adapter_model.safetensors", "block_mask.safetensors", "README.md", "tokenizer.json"} <= set(
        files
    )
    assert not any(name.startswith(("checkpoint", "run", "status", "train.log")) for name in files)
    run = pushed["folder"] / "run"
    assert files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert not any(str(place).encode() in content for content in files.values() for place in (tiny_base, run))
    header, text = card(files["README.md"])
    assert header["library_name"] == "peft" and {"lora_dist", "block-sparse"} <= set(header["tags"])
    final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"final"' in line][-1]
    assert pattern.digest in text and f"{pattern.sparsity:.2%}" in text and f"{final['perplexity']:.4g}" in text
    assert json.loads((run / "adapter_config.json").read_text())["base_fingerprint"] in text


def test_an_upload_that_was_broken_off_goes_on_and_is_one_commit(pushed):
    code, _, err = pushed["broken"]
    assert code == 2 and "the repository is as it was: go on with lora-dist push" in err and "Traceback" not in err
    assert pushed["again"][0] == 0
    hub, merged = pushed["hub"], pushed["folder"] / "merged"
    repo = hub.repos["lab/tiny"]
    assert len(repo["commits"]) == 1 and not repo["private"]
    # two files of weights: what arrived the first time was not sent again, and the one commit came last
    events = hub.events[hub.events.index(("commit", "me/run")) + 1 :]
    assert [kind for kind, _ in events] in (["put", "broken", "put", "commit"], ["broken", "put", "put", "commit"])
    broken = next(oid for kind, oid in events if kind == "broken")
    assert [oid for kind, oid in events if kind == "put"].count(broken) == 1
    assert repo["files"]["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert load(repo["files"]["block_mask.safetensors"])
    header, text = card(repo["files"]["README.md"])
    assert header["base_model"] == "lab/tiny-pruned" and "exactly 0.0" in text and "merge.json" not in repo["files"]


def test_what_the_hub_does_not_allow_is_said_in_one_line(pushed):
    code, _, err = pushed["read_only"]
    assert code == 2 and "does not let us write to lab/tiny" in err and "HF_TOKEN" in err and "Traceback" not in err
    code, _, err = pushed["public"]
    assert code == 2 and "is public already, and a private one is asked for" in err


def test_a_dry_run_shows_files_and_card_and_needs_no_hub(pushed, capsys, tmp_path):
    merged = pushed["folder"] / "merged"
    assert main(["push", str(merged), "--hub_model_id=lab/tiny", "--dry_run"]) == 0
    out = capsys.readouterr().out
    plan = plan_push(PushArgs(folder=str(merged), hub_model_id="lab/tiny"))
    assert all(name in out for name in plan.files) and "Would upload" in out and plan.files["README.md"].decode() in out
    assert str(merged.parent) not in plan.files["README.md"].decode()
    for argv, problem in (
        (["push", str(tmp_path), "--hub_model_id=lab/tiny"], "neither adapter_config.json nor config.json"),
        (["push", str(tmp_path / "no"), "--hub_model_id=lab/tiny"], "found no directory"),
        (["push", str(merged), "--hub_model_id=a/b/c"], "hub_model_id: found 'a/b/c', expected OWNER/NAME"),
        (["push", str(merged)], "hub_model_id: found nothing"),
    ):
        assert main(argv) == 2
        assert problem in capsys.readouterr().err


def test_a_card_of_ones_own_is_kept(pushed, tmp_path):
    shutil.copytree(pushed["folder"] / "merged", tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine")
    plan = plan_push(PushArgs(folder=str(tmp_path / "m"), hub_model_id="lab/tiny"))
    assert plan.files["README.md"] == tmp_path / "m" / "README.md" and "README.md is taken from the folder" in plan.notes
    (tmp_path / "m" / "merge.json").write_text("{")
    with pytest.raises(UserError, match=r"merge.json cannot be read"):
        plan_push(PushArgs(folder=str(tmp_path / "m"), hub_model_id="lab/tiny"))


@pytest.mark.parametrize(
    ("config", "called"),
    [
        ({"peft_type": "BLOCK_LORA", "use_dora": True}, "A DoRA adapter for `base`"),
        ({"peft_type": "BLOCK_ADALORA"}, "An AdaLoRA adapter for `base`"),
        ({"peft_type": "IA3"}, "An IA3 adapter for `base`"),
    ],
)
def test_a_card_names_the_adapter_how_the_base_was_held_and_the_labels(config, called, tiny_base, tmp_path):
    """IA3's files are PEFT's own: nothing else is to be imported for them."""
    named = {"base_model_name_or_path": "base", "task_type": "SEQ_CLS", **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    (tmp_path / "base_quantization.json").write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    labels = {"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}, "problem_type": None}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    Pattern.load(tiny_base).save(tmp_path)
    (tmp_path / "training_log.txt").write_text("of scripts/train_lora_basic.py, with paths of this machine")
    files = plan_push(PushArgs(folder=str(tmp_path), hub_model_id="lab/tiny")).files
    assert "training_log.txt" not in files
    text = card(files["README.md"])[1]
    assert called in text and "| base in training | quantised, NF4" in text and "num_labels=3)" in text
    assert ("import lora_dist" in text) == (config["peft_type"] != "IA3")
