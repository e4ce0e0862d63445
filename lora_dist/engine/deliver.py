"""Beside a finished run's adapter: the merged model as a directory and as one pickled file, for who wants a whole model.

    OUT/pruned_model/       safetensors, as `lora-dist merge` writes it
    OUT/pruned_model.bin    {'model', 'tokenizer'}, as `torch.load(path, weights_only=False)` reads it

Each appears whole or not at all, and takes the place of an older one. Called by `scripts/finetune_lora.py`.
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import torch

from lora_dist.arguments import MergeArgs
from lora_dist.engine.merge import MergeReport, merge
from lora_dist.log import UserError
from lora_dist.models.legacy import save_pickled
from lora_dist.models.loading import load_base
from lora_dist.parallel import World
from lora_dist.process import flush

MODEL, PICKLE = "pruned_model", "pruned_model.bin"


def deliver(
    base: str,
    adapter: Path,
    out: Path,
    world: World,
    *,
    sharded: bool = False,
    densify: bool = False,
    config_name: str | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Collective. Merge `adapter` into `base` and write both forms to `out`.

    Args:
        sharded: the base does not fit one process: all merge together, else rank 0 merges in its memory and the others wait.
        densify: plain LoRA on a pruned base gives the pattern up.

    Raises:
        UserError, GuardError: as `merge`; the disk is full or read-only. What was there before is kept then.
    """
    gc.collect()  # the model that was trained
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    staging = out / f".{MODEL}.new"
    world.on_main(lambda: shutil.rmtree(staging, ignore_errors=True))  # of an attempt that was killed here
    args = MergeArgs(
        base=base, adapter=str(adapter), out=str(staging), densify=densify, config_name=config_name,
        strategy="fsdp2" if sharded else "ddp", trust_remote_code=trust_remote_code,
    )  # fmt: skip
    report = merge(args, world) if sharded else world.on_main(lambda: merge(args, World()))
    world.on_main(lambda: _publish(staging, out, trust_remote_code))
    return report


def _publish(staging: Path, out: Path, trust_remote_code: bool) -> None:
    """Give the merged model its name, and pickle it."""
    final, older = out / MODEL, out / f".{MODEL}.old"
    try:
        proof = json.loads((staging / "merge.json").read_text())
        (staging / "merge.json").write_text(json.dumps(proof | {"out": str(final)}, indent=1))
        shutil.rmtree(older, ignore_errors=True)
        if final.exists():
            final.rename(older)
        staging.rename(final)
        flush(out)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"train.output_dir: {out} could not be written ({error}); adapter and checkpoints are whole: free space and resume"
        ) from error
    loaded = load_base(str(final), trust_remote_code=trust_remote_code, progress=False)
    loaded.model.config.use_cache = loaded.use_cache
    loaded.model.requires_grad_(True)  # an ordinary model again
    save_pickled(loaded.model, loaded.tokenizer, out / PICKLE)
