"""`lora-dist generate MODEL --prompt TEXT`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import GenerateArgs
from lora_dist.cli.options import Verb, names, parse


def main(argv: Sequence[str]) -> int:
    args = parse(GenerateArgs, argv, Verb("lora-dist generate", GenerateArgs.__doc__ or "", positionals=("model",)))
    import torch

    from lora_dist.engine.open_model import open_model
    from lora_dist.generation import generate
    from lora_dist.parallel import close_world, init_world

    world = init_world(device=args.device, always=args.strategy != "ddp")
    try:
        with names(model_name_or_path="MODEL", model_config_name="config_name"):
            opened = open_model(
                args.model,
                args.adapter,
                world=world,
                strategy=args.strategy,
                config_name=args.config_name,
                dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
                trust_remote_code=args.trust_remote_code,
            )
        texts = generate(  # all processes go through the same steps: same prompt, same seed
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
        if world.is_main:
            print(args.prompt + texts[0])
        return 0
    finally:
        close_world()
