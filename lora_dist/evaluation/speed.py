"""How fast a model generates: time to the first token, and from token to token.

    prefill_tokens_per_s     prompt tokens of the whole batch / time to the first token
    decode_tokens_per_s      (new tokens - 1) x batch / time from the first token to the last
    first_token_latency_s    from the call of `generate` to the first new token
    inter_token_latency_s    from one token to the next: p50 and p95 over all tokens of all repetitions

Greedy, by transformers' own `generate` with its key-value cache, of forced length, on random prompts of one length: what is timed is
what a user of `generate` waits for, its own Python included. Repetitions behind a warm-up; median, least and most of them. Called by
`engine/report.py`, on one process only. Letters for shapes: `B` prompts, `L` tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from lora_dist.log import UserError


@dataclass(frozen=True)
class SpeedArgs:
    """What is timed."""

    batch_size: int = 1
    prompt_tokens: int = 128
    max_new_tokens: int = 64
    repetitions: int = 5
    warmup: int = 1


class _Stopwatch(StoppingCriteria):
    """Notes the time behind every token, once the device has made it."""

    def __init__(self, device: torch.device):
        self._device = device
        self.times_s: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # waits for the device: the token is not there before
        self.times_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def check_fits(args: SpeedArgs, limit: int | None) -> None:
    """Raises:
    UserError: prompt and new tokens are more than the model's context.
    """
    if limit is not None and args.prompt_tokens + args.max_new_tokens > limit:
        raise UserError(
            f"prompt_tokens, max_new_tokens: found {args.prompt_tokens} and {args.max_new_tokens}, expected at most {limit} together: "
            "that is the model's context"
        )


def random_prompts(vocab_size: int, batch_size: int, prompt_tokens: int, device: torch.device) -> Tensor:
    """Token ids (B, L), the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch_size, prompt_tokens), generator=generator).to(device)


@torch.no_grad()
def generate_timed(model: Any, prompts_BL: Tensor, max_new_tokens: int) -> list[float]:
    """Generate; seconds from the call to each new token."""
    stopwatch = _Stopwatch(prompts_BL.device)
    start = time.perf_counter()
    model.generate(
        input_ids=prompts_BL,
        attention_mask=torch.ones_like(prompts_BL),
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([stopwatch]),
    )
    return [moment - start for moment in stopwatch.times_s]


def measure_speed(
    model: Any, args: SpeedArgs, *, device: torch.device, on_run: Callable[[], None] | None = None
) -> dict[str, Any]:
    """The figures above as plain values, with how they were obtained.

    Args:
        on_run: called after each repetition, warm-up included.

    Raises:
        UserError: the model's context is too short.
    """
    check_fits(args, getattr(model.config, "max_position_embeddings", None))
    prompts_BL = random_prompts(model.config.vocab_size, args.batch_size, args.prompt_tokens, device)
    runs: list[list[float]] = []
    for number in range(args.warmup + args.repetitions):
        times_s = generate_timed(model, prompts_BL, args.max_new_tokens)
        assert len(times_s) == args.max_new_tokens, f"{len(times_s)} tokens of {args.max_new_tokens}"
        if number >= args.warmup:
            runs.append(times_s)
        if on_run is not None:
            on_run()
    steps_s = sorted(after - before for times_s in runs for before, after in pairwise(times_s))
    decoded = args.batch_size * (args.max_new_tokens - 1)
    return {
        "prefill_tokens_per_s": _spread([prompts_BL.numel() / times_s[0] for times_s in runs]),
        "decode_tokens_per_s": _spread([decoded / (times_s[-1] - times_s[0]) for times_s in runs]),
        "first_token_latency_s": _spread([times_s[0] for times_s in runs]),
        "inter_token_latency_s": {"p50": percentile(steps_s, 50), "p95": percentile(steps_s, 95), "tokens": len(steps_s)},
        "batch_size": args.batch_size,
        "prompt_tokens": args.prompt_tokens,
        "max_new_tokens": args.max_new_tokens,
        "repetitions": args.repetitions,
        "warmup": args.warmup,
        "threads": torch.get_num_threads(),
        "decoding": "greedy, length forced, key-value cache, transformers' generate",
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of rising values, between neighbours by linear interpolation, as numpy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)
