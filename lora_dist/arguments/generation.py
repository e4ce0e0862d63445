"""Options of generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass
class GenerateArgs:
    """Continue a prompt with a base, an adapter or a merged model."""

    model: str = ""
    """Directory (or hub name) of the model."""
    prompt: str = ""
    """Text to continue."""
    adapter: str | None = None
    """Adapter folder to put on the model."""
    max_new_tokens: int = 64
    """Tokens to add at most."""
    do_sample: bool = False
    """Draw from the distribution; off: the likeliest token each time."""
    temperature: float = 1.0
    """Flattens (above 1) or sharpens the distribution; with do_sample."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share; with do_sample."""
    top_k: int = 50
    """Draw from this many likeliest tokens; with do_sample."""
    seed: int = 0
    """Seed of the draws."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        if not self.prompt:
            yield "prompt: found nothing, expected a text"
        for name in ("max_new_tokens", "temperature", "top_k"):
            if getattr(self, name) <= 0:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0"
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if not 0 < self.top_p <= 1:
            yield f"top_p: found {self.top_p}, expected a number above 0 and at most 1"
