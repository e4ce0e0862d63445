#!/usr/bin/env python
"""Make a small English language model from nothing but Python itself: text, tokenizer and weights, in about a minute and a half.

    python scripts/tiny_model.py OUT [--steps 450] [--hidden 192] [--layers 4] [--seed 0]

The text is what every Python carries: the language reference of `help()` (`pydoc_data.topics`) and the docstrings of the
standard library, read from its source files without importing them; about 2 MB. A byte-level BPE tokenizer and a Llama of 2
million parameters are trained on it, in float32, so that any CPU gives about the same model. OUT becomes a Hugging Face
directory with `train.txt`, `valid.txt` and `test.txt` (documents separated by `<|endoftext|>`) and `tiny_model.json` (what was
done and how good it is) beside the model. It appears whole or not at all.

Called by the demo and by tests, which need a model with something to lose when it is pruned; a random one has nothing.
Letters for shapes: N windows, M windows of one step, T tokens of a window.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPLITS = ("train", "valid", "test")
MIN_DOCUMENT_CHARS = 200
"""Shorter documents teach little and, held out, would be measured mostly on their first words."""
HELD_OUT_SHARE = 0.05
"""Of the documents, for each of valid and test."""
# Not libraries but programs, test suites and what was installed later: they differ from machine to machine.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "distutils",
    "ensurepip",
    "__pycache__",
}


# --- text ---------------------------------------------------------------------------------------------------------------------


def collect_text(stdlib: Path | None = None) -> dict[str, str]:
    """Collect the English text that this Python carries, as documents by name.

    A document is one topic of the language reference, or the docstrings of one source file in their order. A paragraph that
    occurred in an earlier document is left out, so that none is both trained and measured on.

    Args:
        stdlib: folder of the standard library; default: this interpreter's.

    Returns:
        name -> text, sorted by name, topics first; the same on every run of the same Python.
    """
    from pydoc_data.topics import topics

    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    raw = {f"topics/{name}": text for name, text in sorted(topics.items())}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if not _SKIPPED_FOLDERS.intersection(name.parts[:-1]) and name.parts[0] != "pydoc_data":
            raw[f"stdlib/{name.as_posix()}"] = "\n\n".join(_docstrings(path))

    seen: set[str] = set()
    documents = {}
    for name, text in raw.items():
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.rstrip())
        document = "\n\n".join(paragraphs).strip("\n") + "\n"
        if len(document) >= MIN_DOCUMENT_CHARS:
            documents[name] = document
    return documents


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file in the order of its lines; nothing of a file that this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.isascii():  # the few others hold lone surrogates or samples of other alphabets
            yield inspect.cleandoc(docstring)


def split_documents(documents: Mapping[str, str]) -> dict[str, list[str]]:
    """Share documents out over train, valid and test by a digest of their names, so that one more document moves no other."""
    split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for name, text in documents.items():
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        split["valid" if draw < HELD_OUT_SHARE else "test" if draw < 2 * HELD_OUT_SHARE else "train"].append(text)
    return split


# --- tokenizer ----------------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Like Llama's, it puts BOS before a text and leaves EOS to whoever ends a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded, so no unknown token
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int) -> torch.Tensor:
    """Turn documents into windows: `BOS document EOS` one after another, cut every `context` tokens; the remainder is dropped.

    Returns:
        ids_NT, int64.

    Raises:
        ValueError: if the texts fill no window.
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts))["input_ids"]:
        stream += ids
        stream.append(tokenizer.eos_token_id)
    count = len(stream) // context
    if count == 0:
        raise ValueError(f"the text has {len(stream)} tokens, expected at least one window of context={context}")
    return torch.tensor(stream[: count * context]).view(count, context)


# --- model --------------------------------------------------------------------------------------------------------------------


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 4,
    intermediate: int | None = None,
    max_context: int = 1024,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Build a small Llama with tied embeddings, initialised by `seed`.

    Args:
        intermediate: width of the MLP; default 8/3 of `hidden`, rounded up to whole 16-wide blocks.

    Raises:
        ValueError: if a width is no multiple of 16 (tiles would be cut), or heads do not divide `hidden`.
    """
    intermediate = intermediate or 16 * math.ceil(hidden * 8 / 3 / 16)
    for name, width in (("hidden", hidden), ("intermediate", intermediate)):
        if width <= 0 or width % 16:
            raise ValueError(f"{name}: found {width}, expected a multiple of 16 (whole 16x16 blocks)")
    if heads <= 0 or hidden % (2 * heads):
        raise ValueError(f"heads: found {heads}, expected a number that divides hidden={hidden} into even parts")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class Training(NamedTuple):
    """What a training run did."""

    steps: int
    tokens: int
    loss: float
    """mean of the last steps, at most 20"""
    time_s: float


class Float32Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, with Nesterov momentum and no decay. torch.optim.Muon iterates in bfloat16, which takes a
    CPU without such products 24 times as long."""

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Near U V^T of the matrix's singular value decomposition, by Newton-Schulz iterations with Jordan's coefficients."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, iterations).T
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def train_model(
    model: LlamaForCausalLM,
    ids_NT: torch.Tensor,
    steps: int = 450,
    batch_size: int = 4,
    learning_rate: float = 0.003,
    matrix_learning_rate: float = 0.02,
    seed: int = 0,
    limit_s: float = math.inf,
    progress: bool = True,
) -> Training:
    """Train on windows in an order given by `seed`; the same weights come out on every run of the same machine.

    Matrices inside the layers are trained by Muon, the rest by AdamW: tried at width 256 over the same 350
    thousand tokens, that gave perplexity 106 where AdamW alone gave 273. The rate is warmed up, held, and let down to zero over
    the last 60%.

    Args:
        limit_s: on a machine too slow for all steps, let the rate down earlier and end at about this time. Only then does the
            result depend on the clock.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        Float32Muon(matrices, lr=matrix_learning_rate),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warm_up = min(20, steps // 5)

    def rate(step: int) -> float:
        done = max(step / steps, (time.monotonic() - start) / limit_s)
        return min((step + 1) / (warm_up + 1), (1 - done) / 0.6, 1.0)

    generator = torch.Generator().manual_seed(seed)
    order_N = torch.empty(0, dtype=torch.int64)
    losses: list[float] = []
    model.train()
    start = time.monotonic()
    with tqdm(total=steps, desc="Training", unit="step", disable=not progress) as bar:
        while len(losses) < steps and (factor := rate(len(losses))) > 0:
            while len(order_N) < batch_size:
                order_N = torch.cat([order_N, torch.randperm(len(ids_NT), generator=generator)])
            ids_MT, order_N = ids_NT[order_N[:batch_size]], order_N[batch_size:]
            for optimizer, peak in zip(optimizers, (matrix_learning_rate, learning_rate), strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
            loss = model(input_ids=ids_MT, labels=ids_MT, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    last = losses[-20:]
    return Training(len(losses), len(losses) * batch_size * ids_NT.shape[1], sum(last) / len(last), time.monotonic() - start)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids_NT: torch.Tensor, batch_size: int = 16) -> float:
    """Return the exponential of the mean loss over all predicted tokens (each window's first token is predicted by nothing)."""
    was_training = model.training
    model.eval()
    loss_sum, count = 0.0, 0
    for ids_MT in ids_NT.split(batch_size):
        predicted = ids_MT.numel() - len(ids_MT)
        loss_sum += model(input_ids=ids_MT, labels=ids_MT, use_cache=False).loss.item() * predicted
        count += predicted
    model.train(was_training)
    return math.exp(loss_sum / count)


# --- all of it ----------------------------------------------------------------------------------------------------------------


def build(
    out: Path,
    steps: int = 450,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 4,
    vocab_size: int = 2048,
    context: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    limit_s: float = 150.0,
    progress: bool = True,
    documents: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Collect text, train tokenizer and model, and write all of it to `out`, which appears whole or not at all.

    Args:
        documents: text by name instead of what `collect_text` finds.

    Returns:
        what `tiny_model.json` says: sizes, times and perplexities.

    Raises:
        ValueError: if `out` exists, or sizes do not fit.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already, expected a new folder; move it away or name another")

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    start = time.monotonic()
    say("Collecting the text that this Python carries...")
    documents = collect_text() if documents is None else documents
    split = split_documents(documents)
    chars = {name: sum(map(len, texts)) for name, texts in split.items()}
    say(f"  {len(documents)} documents, {sum(chars.values()):,} characters; training a tokenizer on them...")
    tokenizer = make_tokenizer(split["train"], vocab_size)
    windows = {name: encode(tokenizer, texts, context) for name, texts in split.items()}
    model = make_model(tokenizer, hidden, layers, heads, max_context=max(1024, context), seed=seed)
    parameters = model.num_parameters()
    say(f"  {len(tokenizer):,} tokens of vocabulary, {windows['train'].numel():,} tokens to train on")
    say(f"Training a Llama of {parameters:,} parameters for {steps} steps of {batch_size} x {context} tokens...")
    training = train_model(model, windows["train"], steps, batch_size, seed=seed, limit_s=limit_s, progress=progress)
    if training.steps < steps:
        say(f"  this machine is slow or busy: stopped after {training.steps} of {steps} steps, at {limit_s:.0f} s (--limit-s)")
    facts = {
        "parameters": parameters,
        "hidden": hidden,
        "layers": layers,
        "vocab_size": len(tokenizer),
        "context": context,
        "seed": seed,
        "documents": {name: len(texts) for name, texts in split.items()},
        "chars": chars,
        "tokens": {name: ids_NT.numel() for name, ids_NT in windows.items()},
        "steps": training.steps,
        "trained_tokens": training.tokens,
        "train_loss": training.loss,
        "train_time_s": training.time_s,
        "perplexity": {name: perplexity(model, windows[name]) for name in ("valid", "test")},
        "time_s": time.monotonic() - start,
    }
    _publish(out, model, tokenizer, split, facts)
    return facts


def _publish(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    split: Mapping[str, list[str]],
    facts: Mapping[str, Any],
) -> None:
    """Write beside `out` and rename, so that a killed run leaves no half model under the name that others look for."""
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed while writing
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, texts in split.items():
        (partial / f"{name}.txt").write_text(f"{EOS}\n".join(texts), encoding="utf-8")
    (partial / "tiny_model.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.rename(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the model is there, 2 when something given has to be changed first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--steps", type=int, default=450, help="training steps (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=192, help="width, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the tokenizer (default: %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens in a training window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and order (default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=150.0, help="end training early after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--quiet", dest="progress", action="store_false", help="print the result only")
    options = vars(parser.parse_args(argv))
    disable_progress_bar()  # of saving one file
    try:
        facts = build(**options)
    except (ValueError, OSError) as error:
        print(f"tiny_model: {error}", file=sys.stderr)
        return 2
    measured = facts["perplexity"]
    print(
        f"{options['out']}: {facts['parameters']:,} parameters, perplexity {measured['valid']:.2f} on valid.txt"
        f" and {measured['test']:.2f} on test.txt, {facts['time_s']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
