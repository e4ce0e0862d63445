"""Pickles: hostile ones do nothing and are named, allowed ones are read without building anything, and those written are plain."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from lora_dist.log import UserError
from lora_dist.models.allowed import is_allowed
from lora_dist.models.legacy import Inert, read_inert, read_trusted, save_pickled
from lora_dist.models.pickled import understand
from tests.models.pickles import Evil, call, text, torch_file
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def refuse(path: Path, marker: Path) -> str:
    """Open with and without understanding; nothing may run."""
    with pytest.raises(UserError) as caught:
        understand(read_inert(path), path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_hostile_pickle_would_run_if_it_were_opened(tmp_path: Path, marker: Path) -> None:
    torch.save(Evil(marker), tmp_path / "evil.bin")
    read_trusted(tmp_path / "evil.bin")
    assert marker.exists()


@pytest.mark.parametrize("place", ["root", "model", "config", "module", "hook", "tokenizer"])
def test_a_command_anywhere_in_it_does_nothing_and_is_named(tmp_path: Path, marker: Path, place: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    saved: Any = {"model": model, "tokenizer": tokenizer}
    if place == "root":
        saved = Evil(marker)
    elif place == "model":
        saved["model"] = Evil(marker)
    elif place == "config":
        model.config.extra = {"deep": [Evil(marker)]}
    elif place == "module":
        model.model.layers[1].mlp.extra = Evil(marker)
    elif place == "hook":
        model.model._forward_hooks[0] = Evil(marker)
    else:
        saved["tokenizer"] = Evil(marker)
    torch.save(saved, tmp_path / "evil.bin")
    message = refuse(tmp_path / "evil.bin", marker)
    assert "posix.system" in message and "--trust_pickle" in message


HOSTILE = [
    "os:system", "posix:system", "builtins:eval", "builtins:getattr", "builtins:__import__", "subprocess:Popen", "runpy:run_path",
    "torch.nn.modules:os.system", "torch.nn.modules.linear:math.sqrt", "torch.nn.modules.linear:init.torch.hub.load",
    "torch.nn.modules.module:OrderedDict", "torch.nn.modules.utils:consume_prefix_in_state_dict_if_present", "torch:load",
    "torch.hub:load", "torch.jit:load", "torch.jit._script:ScriptModule", "torch.serialization:load", "torch._dynamo:optimize",
    "torch.fx.graph_module:GraphModule",
    "transformers.models.auto.modeling_auto:AutoModelForCausalLM", "transformers.models.auto.tokenization_auto:AutoTokenizer",
    "transformers.models.llama.modeling_llama:Callable", "transformers.models.llama.modeling_llama:LlamaModel.from_pretrained",
    "transformers.models.llama.modeling_llama:ACT2FN", "transformers.dynamic_module_utils:get_class_from_dynamic_module",
    "transformers.utils.import_utils:_LazyModule", "transformers.trainer:Trainer", "peft.peft_model:PeftModel",
    "numpy.core.multiarray:_reconstruct",
    "__builtin__:eval", "copy_reg:_reconstructor", "lora_dist.models.legacy:read_trusted",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_outside_of_the_list_are_refused_by_name(tmp_path: Path, marker: Path, name: str) -> None:
    path = torch_file(tmp_path / "evil.bin", call(name, f"touch {marker}"))
    message = refuse(path, marker)
    module, _, attribute = name.partition(":")
    known_as = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    assert f"{known_as}.{attribute}" in message


def test_every_name_is_listed(tmp_path: Path, marker: Path) -> None:
    code = b"\x80\x02cos\nsystem\ncbuiltins\neval\ncbuiltins\nexec\ncthing.of.mine\nThing\n\x85."
    message = refuse(torch_file(tmp_path / "evil.bin", code), marker)
    assert "builtins.eval, builtins.exec, os.system, thing.of.mine.Thing" in message


@pytest.mark.parametrize(
    "code",
    [
        b"(S'touch MARKER'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",  # STACK_GLOBAL, protocol 4
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02Pnothing\n.",  # PERSID
        b"\x80\x02" + b"(" * 10,
        b"",
        b"\xff" * 40,
    ],
)
def test_other_pickle_operations_are_not_run(tmp_path: Path, marker: Path, code: bytes) -> None:
    path = torch_file(tmp_path / "evil.bin", code.replace(b"MARKER", bytes(marker)))
    assert "without running" in refuse(path, marker)


def _old_format(path: Path, evil: Evil) -> None:
    torch.save({"model": evil}, path, _use_new_zipfile_serialization=False)


def _tar(path: Path, evil: Evil) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(evil)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _truncated(path: Path, evil: Evil) -> None:
    torch.save({"model": tiny_model("llama"), "tokenizer": evil}, path)
    path.write_bytes(path.read_bytes()[:-2000])


def _script(path: Path, evil: Evil) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


FILES: dict[str, tuple[Callable[[Path, Evil], Any], str]] = {
    "legacy": (_old_format, "torch before version 1.6"),
    "tar": (_tar, "a tar archive"),
    "truncated": (_truncated, "truncated or damaged"),
    "bare": (lambda path, evil: path.write_bytes(pickle.dumps(evil)), "a bare pickle"),
    "script": (_script, "a TorchScript program"),
    "zip": (lambda path, evil: path.write_bytes(b"PK\x05\x06" + bytes(18)), "no torch file"),
    "text": (lambda path, evil: path.write_text("import os"), "no torch file"),
    "empty": (lambda path, evil: path.write_bytes(b""), "an empty file"),
    "missing": (lambda path, evil: None, "no such file"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", FILES)
def test_files_of_another_kind_are_named_and_not_opened(tmp_path: Path, marker: Path, kind: str) -> None:
    make, named = FILES[kind]
    path = tmp_path / "model.bin"
    make(path, Evil(marker))
    assert named in refuse(path, marker)


@pytest.mark.parametrize("read", [read_inert, read_trusted])
def test_a_flipped_byte_in_a_tensor_is_found_by_its_checksum(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path, weights = tmp_path / "model.bin", torch.rand(100, 100)
    torch.save({"model": {"weight": weights, "other": torch.zeros(2)}}, path)
    assert torch.equal(read(path)["model"]["weight"], weights)
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.bin: is damaged: model/data/0 in it does not match its checksum"):
        read(path)


def test_a_file_saved_without_checksums_is_read_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_inert(tmp_path / "model.bin")["weight"].tolist() == [1, 1, 1]
    assert "without checksums" in caplog.text


def test_allowed_classes_are_not_built_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allowed class would do with arguments and state of an attacker's choice never matters."""
    path = tmp_path / "model.bin"
    torch.save({"model": tiny_model("llama"), "tokenizer": tiny_tokenizer()}, path)
    touched: list[str] = []
    for kind in (nn.Module, nn.Linear, PreTrainedTokenizerFast, type(tiny_model("llama").config)):
        for method in ("__init__", "__setstate__"):
            note = f"{kind.__name__}.{method}"
            monkeypatch.setattr(kind, method, lambda *a, note=note, **k: touched.append(note), raising=False)
    loaded = read_inert(path)
    assert touched == []
    assert isinstance(loaded["model"], Inert) and type(loaded["model"]).path.endswith("LlamaForCausalLM")


@pytest.mark.parametrize("name", ["transformers.models.llama.tokenization_llama:LlamaTokenizer", "tokenizers:Tokenizer"])
def test_a_path_given_to_a_tokenizer_is_not_opened(tmp_path: Path, marker: Path, name: str) -> None:
    loaded = read_inert(torch_file(tmp_path / "model.bin", call(name, str(marker))))
    assert isinstance(loaded, Inert) and loaded.arguments == (str(marker),)


def test_a_module_that_holds_itself_is_refused(tmp_path: Path, marker: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp._modules["again"] = model.model
    torch.save({"model": model}, tmp_path / "model.bin")
    assert "nested more than" in refuse(tmp_path / "model.bin", marker)


def test_damaged_modules_are_refused(tmp_path: Path, marker: Path) -> None:
    # A Linear whose state is {"_modules": "text"}
    code = b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}" + text("_modules") + text("no dictionary") + b"sb."
    assert "damaged" in refuse(torch_file(tmp_path / "model.bin", code), marker)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ([1, 2], "holds list"),
        ({"epoch": 3, "optimizer": {}}, "a dictionary of epoch, optimizer"),
        ({"model": None}, "holds NoneType under 'model'"),
        ({}, "a dictionary of nothing"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, marker: Path, saved: Any, said: str) -> None:
    torch.save(saved, tmp_path / "model.bin")
    assert said in refuse(tmp_path / "model.bin", marker)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("torch.nn.modules.linear.Linear", True),
        ("torch.nn.modules.container.ModuleList", True),
        ("torch.nn.modules.linear.Nothing", False),
        ("torch.nn.modules.module._IncompatibleKeys", False),
        ("transformers.models.llama.modeling_llama.LlamaSdpaAttention", True),  # gone, and inert
        ("transformers.models.llama.modeling_llama.LlamaAttention", True),
        ("transformers.models.llama.modeling_llama.Cache", False),
        ("transformers.models.llama.modeling_mistral.MistralAttention", False),
        ("transformers.models.llama.configuration_llama.LlamaConfig", True),
        ("transformers.models.clip.modeling_clip.CLIPModel", False),  # no decoder
        ("transformers.activations.SiLUActivation", True),
        ("transformers.activations.ClassInstantier", False),
        ("transformers.models.llama.tokenization_llama.LlamaTokenizer", True),
        ("collections.namedtuple", False),
    ],
)
def test_the_list(name: str, allowed: bool) -> None:
    assert is_allowed(name) is allowed


# --- writing ------------------------------------------------------------------------------------------------------------------

READER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lora_dist":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
saved = torch.load(sys.argv[1], weights_only=False)
assert set(saved) == {"model", "tokenizer"} and not saved["model"]._forward_hooks
torch.save(saved["model"](torch.tensor([[1, 5, 9, 4]])).logits, sys.argv[2])
"""


@pytest.mark.long
def test_a_python_without_this_project_opens_what_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.register_forward_hook(lambda *_: None)
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    model.model.layers[0].forward = model.model.layers[0].forward  # as accelerate leaves it
    logits = model(torch.tensor([[1, 5, 9, 4]])).logits
    out = save_pickled(model, tiny_tokenizer(), tmp_path / "new" / "model.bin")
    assert [file.name for file in out.parent.iterdir()] == ["model.bin"]
    assert len(model._forward_hooks) == 1  # the caller's model is as it was
    script = tmp_path / "read.py"
    script.write_text(READER)
    run = f"import sys; sys.path[:0] = {sys.path[1:]!r}; exec(open({str(script)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", run, out, tmp_path / "logits"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), logits)


def test_what_cannot_be_pickled_for_others_is_refused(tmp_path: Path) -> None:
    from lora_dist.adapter import attach_adapter

    model = attach_adapter(tiny_model("llama"), None, r=2, lora_alpha=4, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"peft.*merge it first"):
        save_pickled(model, tiny_tokenizer(), tmp_path / "model.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_pickled(tiny_model("llama"), tiny_tokenizer(), tmp_path / "file" / "model.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
