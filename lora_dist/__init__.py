"""Bring block-pruned language models back with LoRA, every pruned tile still exactly zero.

    from lora_dist import attach_block_lora, GuardCallback, Guard, Pattern, BlockLoraConfig, load_adapter

`import lora_dist` is enough for `PeftModel.from_pretrained(base, folder)` to understand masked adapters, and costs next to nothing:
names are loaded when first used, and PEFT (seconds to import) is told of the adapter type when, and only if, it is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dist.adapter import BlockLoraConfig, load_adapter, merge_adapter
    from lora_dist.blocks import BlockMask, ElementMask, Guard, Pattern
    from lora_dist.engine.library import GuardCallback, attach_block_lora
    from lora_dist.log import GuardError, UserError

_HOME = {
    "BlockLoraConfig": "lora_dist.adapter",
    "BlockMask": "lora_dist.blocks",
    "ElementMask": "lora_dist.blocks",
    "Guard": "lora_dist.blocks",
    "GuardCallback": "lora_dist.engine.library",
    "GuardError": "lora_dist.log",
    "Pattern": "lora_dist.blocks",
    "UserError": "lora_dist.log",
    "attach_block_lora": "lora_dist.engine.library",
    "load_adapter": "lora_dist.adapter",
    "merge_adapter": "lora_dist.adapter",
}

__all__ = [
    "BlockLoraConfig",
    "BlockMask",
    "ElementMask",
    "Guard",
    "GuardCallback",
    "GuardError",
    "Pattern",
    "UserError",
    "attach_block_lora",
    "load_adapter",
    "merge_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module lora_dist has no attribute {name}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _Around(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Has a module imported as usual, but within a context."""

    def __init__(self, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._name, self._context = name, context
        self._loader: importlib.abc.Loader | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        with self._context():
            self._loader.exec_module(module)


@contextmanager
def _compile_when_called() -> Iterator[None]:
    """bitsandbytes hands functions to `torch.compile` while it is imported, which imports the compiler, seconds long, for functions that
    hardly a run calls. Within, `torch.compile` is one that compiles at the first call."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


@contextmanager
def _tell_peft() -> Iterator[None]:
    """Register the adapter type, which importing `lora_dist.adapter` does, once PEFT is there."""
    yield
    importlib.import_module("lora_dist.adapter")


if "peft" in sys.modules:
    importlib.import_module("lora_dist.adapter")
else:
    sys.meta_path.insert(0, _Around("peft", _tell_peft))
sys.meta_path.insert(0, _Around("bitsandbytes.backends.default.ops", _compile_when_called))
