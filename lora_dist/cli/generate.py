"""`lora-dist generate MODEL --prompt TEXT`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_dist.cli.options import Verb, names, parse


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
        if not 0 < self.top_p <= 1:
            yield f"top_p: found {self.top_p}, expected a number above 0 and at most 1"


def main(argv: Sequence[str]) -> int:
    args = parse(GenerateArgs, argv, Verb("lora-dist generate", GenerateArgs.__doc__ or "", positionals=("model",)))
    import torch

    from lora_dist.engine.open_model import open_model
    from lora_dist.generation import generate
    from lora_dist.parallel import init_world

    with names(model_name_or_path="MODEL", model_config_name="config_name"):
        opened = open_model(
            args.model,
            args.adapter,
            config_name=args.config_name,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            device=str(init_world(device=args.device).device),
            trust_remote_code=args.trust_remote_code,
        )
    texts = generate(
        opened.model,
        opened.base.tokenizer,
        [args.prompt],
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    print(args.prompt + texts[0])
    return 0
