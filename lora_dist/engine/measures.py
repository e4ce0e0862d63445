"""The metrics of a report, one method each, for one loaded model. Called by `report.py`.

Every method is a collective: what fails on one process fails on all, and nothing waits for a process that has given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_dist.adapter import is_adapter_parameter
from lora_dist.arguments import EvalArgs
from lora_dist.data.corpus import Corpus, TokenStream, read_corpus, token_stream
from lora_dist.data.files import EXTENSIONS
from lora_dist.data.sources import TextSource
from lora_dist.engine.evaluate import packed_loss
from lora_dist.engine.open_model import OpenModel
from lora_dist.evaluation.footprint import PeakMemory, count_zeros, densely_adapted, peak_kind, weight_bytes
from lora_dist.evaluation.sliding import StreamScore, Window, count_bytes, count_words, plan_windows, rounds, total, window_losses
from lora_dist.evaluation.speed import SpeedArgs, check_fits, generate_timed, measure_speed, random_prompts
from lora_dist.evaluation.together import main_first, say, together
from lora_dist.evaluation.zeroshot import ZeroShotArgs, zero_shot
from lora_dist.log import UserError
from lora_dist.models.loss import causal_loss_sum
from lora_dist.parallel import World

# The rooms below name options as `lora-dist train` does; here the data set is one of `texts`.
_KEYS = {
    f"set data.dataset_name to local files ({EXTENSIONS}) or a directory": f"name a local file in texts (NAME=FILE, {EXTENSIONS})",
    "data.dataset_name": "texts",
    "data.": "",
}


@dataclass(frozen=True)
class Measures:
    """See the module's docstring."""

    args: EvalArgs
    opened: OpenModel
    context: int
    world: World
    held_before: int | None
    """anonymous memory of the process before the model was loaded"""
    progress: Callable[[int, str], Callable[[], None]]
    """given the number of batches and a label, returns what to call after each"""

    # --- perplexity

    def perplexity(self) -> dict[str, Any]:
        """By text; of one that fails, why."""
        stride = self.args.stride
        if stride is not None and stride > self.context:
            raise UserError(f"stride: found {stride}, expected at most the context of {self.context} tokens")
        found: dict[str, Any] = {}
        if self.args.holdout_windows is not None:
            found[f"{self._dataset_label()} held out"] = self._or_error(self._packed)
        for name, source in self._texts():
            found[name] = self._or_error(partial(self._stream, name, source))
        return found

    def _or_error(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except UserError as error:
            return {"error": say(error.renamed(_KEYS))}
        except Exception as error:  # out of memory, say: the other texts and metrics go on
            return {"error": say(error)}

    def _texts(self) -> list[tuple[str, TextSource | None]]:
        if not self.args.texts and self.args.holdout_windows is not None:
            return []
        if not self.args.texts:
            known = self.args.dataset_name == "wikitext" and self.args.dataset_config_name is None
            return [("wikitext2", None)] if known else [(self._dataset_label(), self._source(self.args.dataset_name))]
        named = [entry.partition("=") for entry in self.args.texts]
        return [(name, self._source(where) if given else None) for name, given, where in named]

    def _source(self, where: str) -> TextSource:
        return TextSource(
            dataset_name=where,
            dataset_config_name=self.args.dataset_config_name,
            text_column=self.args.text_column,
            document_separator=self.args.document_separator,
        )

    def _dataset_label(self) -> str:
        return Path(self.args.dataset_name.split(",")[0]).stem or self.args.dataset_name

    def _packed(self) -> dict[str, Any]:
        """The windows that `lora-dist train` holds out."""
        start = time.perf_counter()
        label = f"{self._dataset_label()} held out"
        result, windows, split = packed_loss(
            self.args, self.opened, self.context, self.world, lambda batches: self.progress(batches, label)
        )
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "word_perplexity": None,
            "bits_per_byte": None,
            "tokens": result.tokens,
            "windows": len(windows),
            "context": self.context,
            "stride": self.context,
            "average": "token",
            "special_tokens": self.args.special_tokens,
            "batch_size": self.args.batch_size,
            "text": f"{self.args.dataset_name}, split {split}, packed windows held out of training by seed {self.args.seed}",
            "windows_sha256": windows.digest,
            "runtime_s": time.perf_counter() - start,
        }

    def _stream(self, name: str, source: TextSource | None) -> dict[str, Any]:
        args, world, start = self.args, self.world, time.perf_counter()
        corpus = main_first(world, lambda: read_corpus(name, source, split=args.split, cache_dir=args.cache_dir))
        if len(set(world.gather(corpus.sha256))) > 1:
            raise UserError(f"texts: {name} is not the same text on all machines, expected copies of one file")

        def planned() -> tuple[TokenStream, list[Window]]:
            stream = token_stream(corpus.text, self.opened.base.tokenizer, args.special_tokens)
            return stream, plan_windows(
                len(stream.ids_N), context=self.context, stride=args.stride, average=args.average, max_samples=args.max_samples
            )

        plan = together(world, planned)
        assert plan is not None
        stream, windows = plan
        tick = self.progress(rounds(windows, args.batch_size, world.size), name)
        share = together(
            world,
            lambda: window_losses(
                self.opened.model,
                stream.ids_N,
                windows,
                batch_size=args.batch_size,
                world=world,
                sharded=self._sharded,
                on_batch=tick,
            ),
        )
        score = total(world.gather(share or []), windows, args.average)
        return {**_text_figures(score, corpus, stream, self.opened.base.tokenizer), **self._stream_conditions(corpus, stream, windows),
                "runtime_s": time.perf_counter() - start}  # fmt: skip

    def _stream_conditions(self, corpus: Corpus, stream: TokenStream, windows: list[Window]) -> dict[str, Any]:
        args = self.args
        rows = "the text as it is" if corpus.joiner is None else f"{corpus.rows:,} rows joined by {corpus.joiner!r}"
        left_out = len(stream.ids_N) - windows[-1].end
        scored = "all" if not left_out else f"{left_out:,} of {len(stream.ids_N):,} tokens at the end left out"
        return {
            "windows": len(windows),
            "context": self.context,
            "stride": args.stride or self.context,
            "average": args.average,
            "max_samples": args.max_samples,
            "batch_size": args.batch_size,
            "special_tokens": {"option": args.special_tokens, "before": stream.prefix, "behind": stream.suffix},
            "joiner": corpus.joiner,
            "rows": corpus.rows,
            "text": f"{corpus.source}{f', split {corpus.split}' if corpus.split else ''}, {rows}, {scored}",
            "text_sha256": corpus.sha256,
            "text_tokens": len(stream.ids_N),
        }

    # --- zero-shot, speed, memory

    def zero_shot(self) -> dict[str, Any]:
        args = self.args
        asked = ZeroShotArgs(
            tasks=tuple(args.tasks),
            task_data=args.task_data,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            context=self.context,
        )
        return zero_shot(
            self.opened.model,
            self.opened.base.tokenizer,
            asked,
            world=self.world,
            sharded=self._sharded,
            progress=self.progress,
        )

    @property
    def _speed_args(self) -> SpeedArgs:
        args = self.args
        return SpeedArgs(args.generation_batch_size, args.prompt_tokens, args.max_new_tokens, args.repetitions)

    @property
    def _sharded(self) -> bool:
        return self.opened.sharded is not None

    def speed(self) -> dict[str, Any]:
        """On rank 0 alone, so that processes do not slow each other; with a sharded model on all."""
        asked, device = self._speed_args, self.world.device
        tick = self.progress(asked.warmup + asked.repetitions, "Speed")
        figures = together(
            self.world,
            lambda: measure_speed(self.opened.model, asked, device=device, on_run=tick),
            only_main=not self._sharded,
        )
        return self.world.broadcast(figures)

    def memory(self) -> dict[str, Any]:
        asked, world, opened = self._speed_args, self.world, self.opened
        check_fits(asked, getattr(opened.model.config, "max_position_embeddings", None))
        vocabulary = opened.model.config.vocab_size

        def work() -> tuple[int | None, int | None]:
            ids_BL = random_prompts(vocabulary, self.args.batch_size, self.context, world.device)
            with PeakMemory(world.device, self.held_before) as evaluating, torch.no_grad():
                causal_loss_sum(opened.model, ids_BL, ids_BL).item()
            prompts_BL = random_prompts(vocabulary, asked.batch_size, asked.prompt_tokens, world.device)
            with PeakMemory(world.device, self.held_before) as generating:
                generate_timed(opened.model, prompts_BL, asked.max_new_tokens)
            return evaluating.peak_bytes, generating.peak_bytes

        peaks = world.gather(together(world, work) or (None, None))
        evaluating, generating = (max((p for p in part if p is not None), default=None) for part in zip(*peaks, strict=True))
        return {
            **self._weights(),
            "peak_evaluating_bytes": evaluating,
            "peak_generating_bytes": generating,
            "peak_of": peak_kind(world.device),
            "batch_size": self.args.batch_size,
            "context": self.context,
            "generation_batch_size": asked.batch_size,
            "prompt_tokens": asked.prompt_tokens,
            "max_new_tokens": asked.max_new_tokens,
        }

    def _weights(self) -> dict[str, Any]:
        """Collective where the model is sharded."""
        opened, found = self.opened, self.opened.found
        # A shared parameter comes once, and where the model is cut, one that is whole on every process counts on rank 0.
        counted = not self._sharded or self.world.is_main
        named = [(name, p) for name, p in opened.model.named_parameters() if counted or hasattr(p, "to_local")]
        parts = [weight_bytes(p for name, p in named if is_adapter_parameter(name) is adapter) for adapter in (False, True)]
        sums = [float(value) for part in parts for value in (part.parameters, part.total, part.nonzero)]
        parameters, base, nonzero, _, adapter, _ = map(int, self.world.sum(sums) if self._sharded else sums)
        block = found.pattern.block if found.pattern is not None and found.pattern.kind == "block" else 16
        figures: dict[str, Any] = {
            "parameters": parameters,
            "weights_bytes": base,
            "weights_nonzero_bytes": nonzero,
            "adapter_bytes": adapter or None,
            "pattern": found.source,
            "pattern_kind": None if found.pattern is None else found.pattern.kind,
            "block": block,
            "zeros_of": "linears of the decoder layers as they are used",
        }
        if self._sharded:  # no process holds whole tiles: what was found when the model was read
            tiles = [] if found.pattern is None else found.pattern.stats()
            zero_tiles, all_tiles = sum(row.pruned_tiles for row in tiles), sum(row.tiles for row in tiles)
            shares = {"zero_weights": found.zero_share, "zero_tiles": zero_tiles / all_tiles if all_tiles else 0.0}
            return {**figures, **shares, "zeros_of": "linears of the decoder layers of the base, by its pattern"}
        dense = frozenset() if opened.masked else densely_adapted(opened.model, opened.linears)
        zeros = count_zeros(opened.linears, block, dense)
        return {**figures, "zero_weights": zeros.share, "zero_tiles": zeros.tile_share}


def _text_figures(score: StreamScore, corpus: Corpus, stream: TokenStream, tokenizer: Any) -> dict[str, Any]:
    """The figures by token, word and byte; words and bytes are those of the text that the scored tokens stand for."""
    if score.scored_to == len(stream.ids_N):
        text = corpus.text
    elif stream.ends_N is not None:
        text = corpus.text[: int(stream.ends_N[score.scored_to - 1])]
    else:
        text = tokenizer.decode(stream.ids_N[: score.scored_to], skip_special_tokens=True)
    words, size = count_words(text), count_bytes(text)
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "word_perplexity": score.per_word(words),
        "bits_per_byte": score.bits_per_byte(size),
        "nll": score.nll,
        "tokens": score.tokens,
        "words": words,
        "bytes": size,
    }
