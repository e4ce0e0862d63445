"""A pickled model -> a directory of safetensors, once, with proof that both compute the same. `lora-dist convert PICKLE OUT`.

The proof: every tensor read back from the written files is the pickle's, bit for bit; and, where the classes in the pickle are still
those of this transformers, the logits of the pickled module as it was against those of the directory as any verb loads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lora_dist.arguments import ConvertArgs
from lora_dist.engine.merge import MAX_LOGITS_ERROR, probe_logits, probe_tokens, relative_difference
from lora_dist.engine.pattern import base_pattern
from lora_dist.log import GuardError, UserError
from lora_dist.models.block_storage import require_tiles
from lora_dist.models.export import check_output, model_bytes, save_model
from lora_dist.models.hub import resolve
from lora_dist.models.legacy import globals_of, read_inert, read_trusted
from lora_dist.models.loading import load_base, load_tokenizer
from lora_dist.models.pickled import CannotRun, Pickled, build, nan_tensors, read_config, revive, understand
from lora_dist.models.pickled_tokenizer import SAMPLE, rebuild_tokenizer
from lora_dist.models.sources import open_shard, some, weight_files

REPORT_FILE = "convert.json"
ROUNDED = 2**-7
"""relative: more than bfloat16 rounds by"""


@dataclass(frozen=True)
class ConvertReport:
    """What was found, and what was proven."""

    out: Path
    what: str
    """contents of the pickle, in words"""
    widths: str
    """of the layers, in words, where structured pruning made them uneven"""
    zero_share: float
    """share of exactly zero weights in the decoder's linears"""
    pattern_digest: str | None
    """of the pattern of pruned tiles that was stored"""
    tensors: int
    """each found in the files, bit for bit"""
    logits_error: float | None
    """largest |directory - pickled module| logit over the largest; None where the module cannot run"""
    cannot_run: str
    """why"""
    other_tokens: str
    """what AutoTokenizer makes of the written tokenizer, where that is not the same; transformers overrules some directories' choice"""


def convert(args: ConvertArgs) -> ConvertReport:
    """Read, rebuild, write, prove; prints what was found and proven.

    Raises:
        UserError: bad input; a pickle that names what is not on the allow-list. Nothing is written then.
        GuardError: the directory does not hold, or does not compute, what the pickle does; nothing is left of it then.
    """
    problems = list(args.problems())
    if problems:
        raise UserError(problems)
    path = Path(args.pickle).expanduser()
    check_output(args.out)
    found = _read(path, args.trust_pickle)
    print(f"Found {found.what} in {path}")
    broken = nan_tensors(found.tensors)
    if broken:
        raise UserError(
            f"{path}: found NaN in {len(broken)} of its tensors, with which a model computes nothing else: {some(broken)}"
        )
    config = _config(found, path, args.config_name)
    tokenizer = _tokenizer(found, path, args)
    model, widths = build(found, config, path)
    if widths is not None:
        print(f"Layers pruned to widths of their own: {widths}")
    check_output(args.out, need_bytes=model_bytes(model))
    _check_vocabulary(model, tokenizer, path)
    pattern_found = base_pattern(model, None, block=args.block)
    # Of single elements alone, what is kept is in the weights.
    pattern = pattern_found.pattern if pattern_found.pattern is not None and pattern_found.pattern.block > 1 else None
    report: list[ConvertReport] = []

    def prove(staging: Path) -> Mapping[str, str]:
        compared = _compare_tensors(found.tensors, staging, args.out)
        error, cannot_run = _compare_logits(found, config, staging)
        done = ConvertReport(
            out=Path(args.out).expanduser(),
            what=found.what,
            widths=str(widths or ""),
            zero_share=pattern_found.zero_share,
            pattern_digest=pattern.digest if pattern else None,
            tensors=compared,
            logits_error=error,
            cannot_run=cannot_run,
            other_tokens=_compare_tokens(tokenizer, staging),
        )
        report.append(done)
        return {REPORT_FILE: _record(path, args, done)}

    if args.storage == "blocks":
        require_tiles(pattern, args.pickle, key="storage")
    save_model(model, tokenizer, args.out, pattern=pattern, prove=prove, storage=args.storage)
    _say(report[0])
    return report[0]


def converted(
    pickle: str | Path,
    *,
    out: str | Path | None = None,
    fallback: str | Path | None = None,
    trust_pickle: bool = False,
    tokenizer: str | None = None,
    config_name: str | None = None,
) -> Path:
    """The directory that a pickle was converted to, converting it now if that has not been done.

    Args:
        out: where; default: beside the pickle, under its name without the ending.
        fallback: where to, if that place cannot be written.

    Raises:
        UserError: as `convert`; or the directory that is there is of another pickle.
    """
    path = Path(pickle).expanduser()
    folder = Path(out).expanduser() if out is not None else path.with_suffix("")
    if folder == path:
        folder = path.with_name(f"{path.name}_model")
    places = [folder] if fallback is None else [folder, Path(fallback).expanduser()]
    for place in places:
        if place.is_dir() and any(place.iterdir()):
            _require_same(path, place, trust_pickle)
            return place
    if fallback is not None and not _writable(folder):
        folder = places[-1]
    args = ConvertArgs(str(path), str(folder), trust_pickle, tokenizer, config_name)
    return convert(args).out


def _writable(folder: Path) -> bool:
    try:
        check_output(folder)
    except UserError:
        return False
    return True


def _require_same(path: Path, folder: Path, trust_pickle: bool) -> None:
    """Raises UserError unless the directory holds this pickle's model."""
    report = folder / REPORT_FILE
    advice = f"move {folder} away to convert again, or give the directory itself as the model"
    if report.is_file():
        try:
            noted = json.loads(report.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{report}: cannot be read ({type(error).__name__}: {error}); {advice}") from error
        if noted != _sha256(path):
            raise UserError(f"{path}: is not the file that {folder} was converted from (its sha256 differs); {advice}")
        return
    try:  # a directory that came otherwise, such as the one written beside a finished run's pickle
        _compare_tensors(_read(path, trust_pickle).tensors, folder, folder)
    except GuardError as difference:
        raise UserError(f"{path}: {folder} is there and holds another model ({difference}); {advice}") from difference


def _read(path: Path, trust_pickle: bool) -> Pickled:
    if trust_pickle:
        print(f"⚠️  --trust_pickle: opening {path} runs whatever code it holds")
    try:
        return understand(read_trusted(path) if trust_pickle else read_inert(path), path)
    except RecursionError as error:
        raise UserError(f"{path}: is nested beyond all reason; it was not converted") from error


def _config(found: Pickled, path: Path, config_name: str | None) -> Any:
    if config_name is None:
        if found.module is None:
            raise UserError(f"{path}: holds {found.what}; give the directory of its configuration with --config_name")
        return read_config(found, path)
    folder = resolve(config_name, "model.config_name", weights=False)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.config_name: {config_name}: config.json cannot be used ({error})") from error


def _tokenizer(found: Pickled, path: Path, args: ConvertArgs) -> Any:
    place = args.tokenizer or (args.config_name if found.tokenizer is None else None)
    if place is None:
        return rebuild_tokenizer(found.tokenizer, path)
    return load_tokenizer(resolve(place, "tokenizer", weights=False), place)


def _check_vocabulary(model: Any, tokenizer: Any, path: Path) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: give the tokenizer that belongs to "
            "the model with --tokenizer"
        )


def _compare_tensors(expected: Mapping[str, Tensor], folder: Path, shown: str | Path) -> int:
    """Compare every tensor in the files with the pickle's, bit for bit. Returns how many there are.

    Args:
        shown: what messages call the folder.

    Raises:
        GuardError: one differs, or only one of both has it (tied ones may stand once in the files).
    """
    seen: set[str] = set()
    pointers = {name: tensor.data_ptr() for name, tensor in expected.items()}
    for file in weight_files(folder):
        with open_shard(file) as shard:
            for name in shard.names:
                tensor = shard.tensor(name)
                if name not in expected or not _same_bits(tensor, expected[name]):
                    raise GuardError(f"{shown}: {name} is not the pickle's")
                seen.add(name)
    written = {pointers[name] for name in seen}
    missing = [name for name in expected if name not in seen and pointers[name] not in written]
    if missing:
        raise GuardError(f"{shown}: {len(missing)} tensors of the pickle are not in the files, first {missing[0]}")
    return len(seen)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in dtype, shape and bits: NaN equals itself, and 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _compare_logits(found: Pickled, config: Any, folder: Path) -> tuple[float | None, str]:
    """(difference, "") of the pickled module and the directory; (None, why) where the module cannot run.

    Raises:
        GuardError: they differ.
    """
    if found.module is None:
        return None, "the pickle holds no module"
    after = load_base(str(folder), progress=False).model
    ids_BL = probe_tokens(after, torch.device("cpu"))
    try:
        before = _runnable(found, config, after)
        logits = probe_logits(before, ids_BL)
    except CannotRun as reason:
        return None, str(reason)
    except Exception as error:  # a module of another version may lack anything
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    difference = relative_difference(probe_logits(after, ids_BL), logits)
    if not difference <= MAX_LOGITS_ERROR:  # also where it is not a number
        raise GuardError(
            f"guard: logits of the written directory differ from the pickled module's by {difference:.1e} of the largest"
        )
    return difference, ""


def _compare_tokens(tokenizer: Any, folder: Path) -> str:
    """The class that reads the written tokenizer with other results than it had, empty if there is none."""
    read = load_tokenizer(folder, str(folder))
    same = read(SAMPLE).input_ids == tokenizer(SAMPLE).input_ids and len(read) == len(tokenizer)
    return "" if same else type(read).__name__


def _runnable(found: Pickled, config: Any, after: Any) -> nn.Module:
    """The pickled module. Computed buffers (rotary frequencies) that a cast to half precision rounded along with the weights are
    taken from `after`: transformers keeps them in float32, and what the rounding did is no part of the model."""
    if isinstance(found.module, nn.Module):  # opened with --trust_pickle
        return found.module.eval()
    before = revive(found, config, after.config._attn_implementation)
    exact = dict(after.named_buffers())
    for name, buffer in before.named_buffers():
        path, _, leaf = name.rpartition(".")
        whole = exact.get(name)
        if whole is None or whole.dtype != torch.float32 or buffer.dtype not in (torch.float16, torch.bfloat16):
            continue
        if whole.shape == buffer.shape and torch.allclose(buffer.float(), whole, rtol=ROUNDED, atol=1e-7):
            before.get_submodule(path)._buffers[leaf] = whole
    return before


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(path: Path, args: ConvertArgs, report: ConvertReport) -> str:
    values = {
        "format": "lora_dist.convert",
        "version": 1,
        "pickle": path.name,
        "sha256": _sha256(path),
        "found": report.what,
        "classes": globals_of(path),
        "trusted": args.trust_pickle,
        "tokenizer_from": args.tokenizer,
        "config_from": args.config_name,
        "widths": report.widths or None,
        "zero_share": report.zero_share,
        "pattern_digest": report.pattern_digest,
        "proof": {
            "tensors_equal": report.tensors,
            "logits_error": report.logits_error,
            "module_cannot_run": report.cannot_run or None,
            "tokens_equal": not report.other_tokens,
        },
        "versions": {name: version(name) for name in ("lora_dist", "torch", "transformers")},
    }
    return json.dumps(values, indent=1) + "\n"


def _say(report: ConvertReport) -> None:
    if report.pattern_digest:
        print(f"Pattern of pruned tiles stored beside the weights (digest {report.pattern_digest[:12]})")
    print(f"{report.zero_share:.1%} of the weights of its decoder layers are zero")
    print(f"✅ All {report.tensors:,} tensors in {report.out} are the pickle's, bit for bit")
    if report.logits_error is None:
        print(f"⚠️  The pickled module itself cannot run ({report.cannot_run}), so logits were not compared")
    else:
        print(f"✅ Logits, directory against pickled module: largest difference {report.logits_error:.1e} of the largest logit")
    if report.other_tokens:
        print(
            f"⚠️  AutoTokenizer reads the tokenizer in {report.out} as {report.other_tokens}, which gives other tokens than the pickled "
            "one: compare with the tokenizer of the model it was made from (--tokenizer DIR)"
        )
    print(f"Model saved in {report.out}")
