"""Prune a model: model, calibration text and pruning put together, and what was written proven. `lora-dist prune MODEL OUT`.

With several processes each runs its part of the calibration windows and solves its part of the block rows; rank 0 prints and writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_dist.arguments import PruneArgs
from lora_dist.blocks import BlockMask, Pattern
from lora_dist.data.sampler import stable_permutation
from lora_dist.data.sources import TextSource
from lora_dist.data.text import load_windows
from lora_dist.engine.pattern import pattern_of
from lora_dist.engine.prune_tables import error_table, pattern_table
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers, prunable_linears
from lora_dist.models.export import check_output, model_bytes, prove_zeros, save_model
from lora_dist.models.loading import LoadedBase, load_base
from lora_dist.parallel import World
from lora_dist.pruning import Pruned, PruneSettings, Reconstruction, capture, prune_layers

REPORT_FILE = "pruning.json"
MAX_SEQLEN = 2048
"""calibration context of models that have more, as in Wanda and SparseGPT"""
NOTABLE_GAP = 0.02
"""distance between requested and reached sparsity that is worth a line"""

# The data room names its options as `lora-dist train` does; here they are called otherwise.
_DATA_KEYS = {
    "data.dataset_name": "calibration",
    "data.dataset_config_name": "calibration_config",
    "data.block_size": "seqlen",
    "data.text_column": "text_column",
    "data.document_separator": "document_separator",
    "data.special_tokens": "special_tokens",
    "data.cache_dir": "cache_dir",
    "model.name_or_path": "MODEL",
    "model.config_name": "config_name",
}


@dataclass(frozen=True)
class PruneResult:
    """What was done."""

    out: Path
    pattern: Pattern
    tiles: int
    pruned_tiles: int
    """each of them found exactly zero in the written files"""
    windows: int
    """calibration windows used; 0 for scores that need none"""
    seqlen: int
    calibration_digest: str | None
    """sha256 of the calibration windows' token ids"""
    base_fingerprint: str
    """of the model that was pruned"""
    reconstructions: dict[str, Reconstruction]
    """by linear; empty where nothing was reconstructed"""
    damages: dict[str, float]
    """by linear, as measured for select global"""
    time_s: float

    @property
    def sparsity(self) -> float:
        """Share of the decoder linears' weights that are pruned."""
        return self.pattern.sparsity

    @property
    def tile_sparsity(self) -> float:
        """Share of the tiles that are pruned."""
        return self.pruned_tiles / self.tiles


def prune_model(
    args: PruneArgs, world: World | None = None, *, windows_NL: Tensor | None = None, progress: bool = True
) -> PruneResult:
    """Collective. Prune, save, prove; rank 0 prints a table of the layers.

    Args:
        world: the processes that prune together; `args.device` is what it was made with. None: this one, on that device.
        windows_NL: int64 (N, L) calibration windows to use instead of `args.calibration` (for callers with their own text).
        progress: show bars.

    Raises:
        UserError: bad input, all problems of the options together; nothing is written then.
        GuardError: a pruned tile that is not zero in the written files, which are removed then.
    """
    problems = list(args.problems())
    if problems:
        raise UserError(problems)
    world = world or World(device=_device(args.device))
    progress = progress and world.is_main
    world.on_main(lambda: check_output(args.out))
    started = time.perf_counter()
    settings = PruneSettings(
        args.sparsity,
        args.block,
        args.score,
        args.select,
        args.seed,
        reconstruct=args.reconstruct or bool(args.from_pruned),
        damping=args.damping,
        target=args.target,
    )
    try:
        with world.main_first():
            base = load_base(
                args.model,
                config_name=args.config_name,
                dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
                trust_remote_code=args.trust_remote_code,
                progress=progress,
            )
        world.on_main(lambda: check_output(args.out, need_bytes=model_bytes(base.model)))
        prefix, layers = decoder_layers(base.model)
        given = pattern_of(args.from_pruned, base.model, block=args.block) if args.from_pruned else None
        if not settings.sees_text:
            windows_NL = None
        elif windows_NL is None:
            with world.main_first():
                windows_NL = _calibration_windows(args, base, world)
    except UserError as error:
        raise error.renamed(_DATA_KEYS) from error
    calibration = None
    if windows_NL is not None:
        if world.is_main:
            print(f"Calibration: {len(windows_NL)} windows of {windows_NL.shape[1]} tokens from {args.calibration}")
        calibration = capture(base.model, layers, windows_NL, device=world.device, peers=world)
    with tqdm(total=len(layers), desc="Pruning layers", disable=not progress, dynamic_ncols=True) as bar:
        done = prune_layers(layers, prefix, settings, calibration, given=given, on_layer=lambda _index, _done: _tick(bar))
    result = _result(args, done, windows_NL, base, time.perf_counter() - started)
    if world.is_main:
        _print_tables(args, base, done, result, prefix)
    zeros = world.on_main(lambda: _write(base, result, args))
    if world.is_main:
        unit = "tiles" if result.pattern.kind == "block" else "tiles and elements"
        print(
            f"✅ All {zeros:,} pruned {unit} are exactly 0.0 in {result.out} (sparsity {result.sparsity:.2%}, pattern "
            f"{result.pattern.digest[:12]}, {result.time_s:.1f} s)"
        )
    return result


def _result(args: PruneArgs, done: Pruned, windows_NL: Tensor | None, base: LoadedBase, time_s: float) -> PruneResult:
    stats = done.pattern.stats()
    return PruneResult(
        out=Path(args.out).expanduser(),
        pattern=done.pattern,
        tiles=sum(row.tiles for row in stats),
        pruned_tiles=sum(row.pruned_tiles for row in stats),
        windows=0 if windows_NL is None else len(windows_NL),
        seqlen=0 if windows_NL is None else windows_NL.shape[1],
        calibration_digest=None if windows_NL is None else hashlib.sha256(windows_NL.numpy().astype("<i8").tobytes()).hexdigest(),
        base_fingerprint=base.fingerprint,
        reconstructions=done.reconstructions,
        damages=done.damages,
        time_s=time_s,
    )


def _print_tables(args: PruneArgs, base: LoadedBase, done: Pruned, result: PruneResult, prefix: str) -> None:
    print(pattern_table(result.pattern, [linear.name for linear in prunable_linears(base.model)], prefix))
    if not args.from_pruned and abs(result.tile_sparsity - args.sparsity) > NOTABLE_GAP:
        print(
            f"Note: {result.tile_sparsity:.1%} of the tiles are pruned, {args.sparsity:.1%} was asked for: counts are rounded "
            "down to whole tiles, and these matrices have few"
        )
    if done.reconstructions:
        print(
            "Reconstruction: relative error of each linear's outputs on the calibration inputs, kept weights as they were > solved"
        )
        print(error_table(done.reconstructions, prefix))


def _calibration_windows(args: PruneArgs, base: LoadedBase, world: World) -> Tensor:
    """`nsamples` windows of the calibration text, chosen by seed: int64 (N, L).

    Raises:
        UserError: text that is missing or too short, windows longer than the model's context.
    """
    limit = getattr(base.model.config, "max_position_embeddings", None)
    seqlen = args.seqlen or min(limit or MAX_SEQLEN, MAX_SEQLEN)
    if limit is not None and seqlen > limit:
        raise UserError(f"seqlen: found {seqlen}, expected at most the model's context of {limit}")
    source = TextSource(
        dataset_name=args.calibration,
        dataset_config_name=args.calibration_config,
        text_column=args.text_column,
        document_separator=args.document_separator,
    )
    windows = load_windows(
        source,
        base.tokenizer,
        context_length=seqlen,
        special_tokens=args.special_tokens,
        splits=("train",),
        cache_dir=args.cache_dir,
    ).splits["train"]
    if len(windows) < args.nsamples and world.is_main:
        print(
            f"Note: the calibration text has {len(windows)} windows of {seqlen} tokens, {args.nsamples} were asked for: using all"
        )
    chosen = stable_permutation(len(windows), "calibration", args.seed)[: args.nsamples]
    return torch.stack([windows[int(i)] for i in chosen])


def _tick(bar: Any) -> None:
    bar.update()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found cuda, but torch sees no GPU; set cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _write(base: LoadedBase, result: PruneResult, args: PruneArgs) -> int:
    """Save, read again, prove; how many pruned tiles (elements, for element masks) were found zero."""
    base.model.config.use_cache = base.use_cache
    settings = {key: value for key, value in dataclasses.asdict(args).items() if key != "cache_dir"}
    report: dict[str, Any] = {
        "format": "lora_dist.pruning",
        "version": 1,
        "settings": settings,
        "sparsity": result.sparsity,
        "tile_sparsity": result.tile_sparsity,
        "tiles": result.tiles,
        "pruned_tiles": result.pruned_tiles,
        "pattern_digest": result.pattern.digest,
        "base_fingerprint": base.fingerprint,
        "config_from": base.config_from,
        "tokenizer_from": base.tokenizer_from,
        "calibration": {"windows": result.windows, "seqlen": result.seqlen, "digest": result.calibration_digest},
        "reconstruction": None if not result.reconstructions else _reconstruction_report(args, result),
        "damages": result.damages or None,
        "time_s": round(result.time_s, 1),
        "versions": {name: version(name) for name in ("lora_dist", "torch", "transformers")},
    }
    transposed = {linear.name for linear in prunable_linears(base.model) if linear.transposed}
    text = json.dumps(report, indent=1) + "\n"
    save_model(base.model, base.tokenizer, args.out, pattern=result.pattern, extra_files={REPORT_FILE: text})
    try:
        zeros = prove_zeros(result.out, result.pattern, transposed=transposed)
    except UserError:
        shutil.rmtree(result.out)  # this call made it
        raise
    if all(isinstance(mask, BlockMask) for mask in result.pattern.values()):
        assert zeros == result.pruned_tiles, f"{zeros} tiles proven zero of {result.pruned_tiles}"
    return zeros


def _reconstruction_report(args: PruneArgs, result: PruneResult) -> dict[str, Any]:
    return {
        "damping": args.damping,
        "target": args.target,
        "linears": {name: dataclasses.asdict(done) for name, done in result.reconstructions.items()},
    }
