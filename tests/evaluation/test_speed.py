"""Speed of generation: figures of a model whose every token takes a known time, and of a real one."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_dist.evaluation.speed import SpeedArgs, generate_timed, measure_speed, percentile, random_prompts
from lora_dist.log import UserError
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Metronome:
    """Answers `generate` as transformers does: the first token after 60 ms, further ones after 10 ms, every tenth after 40 ms."""

    config = SimpleNamespace(vocab_size=50, max_position_embeddings=64)

    def __init__(self):
        self.calls = []

    def generate(self, input_ids, stopping_criteria, max_new_tokens, **options):
        self.calls.append({"shape": tuple(input_ids.shape), "max_new_tokens": max_new_tokens, **options})
        for number in range(max_new_tokens):
            time.sleep(0.060 if number == 0 else 0.040 if number % 10 == 0 else 0.010)
            stopping_criteria(input_ids, None)


def test_every_figure_of_a_known_rhythm():
    model = Metronome()
    found = measure_speed(model, SpeedArgs(batch_size=2, prompt_tokens=8, max_new_tokens=21, repetitions=3, warmup=1), device=CPU)
    assert len(model.calls) == 4 and all(call["shape"] == (2, 8) for call in model.calls)
    first, rest = found["first_token_latency_s"], 18 * 0.010 + 2 * 0.040
    assert 0.060 <= first["min"] <= first["median"] <= first["max"] < 0.120
    assert found["prefill_tokens_per_s"]["median"] == pytest.approx(16 / first["median"])
    assert 0.5 * 2 * 20 / rest < found["decode_tokens_per_s"]["median"] <= 2 * 20 / rest
    between = found["inter_token_latency_s"]
    assert 0.010 <= between["p50"] < 0.030 and 0.040 <= between["p95"] < 0.080 and between["tokens"] == 60
    assert {found[key] for key in ("repetitions", "warmup", "batch_size")} == {3, 1, 2}


def test_generation_is_greedy_and_of_forced_length():
    model = tiny_model()
    prompts_BL = random_prompts(model.config.vocab_size, 2, 8, CPU)
    assert torch.equal(prompts_BL, random_prompts(model.config.vocab_size, 2, 8, CPU))
    model.generation_config.eos_token_id = list(range(64))  # half of the vocabulary would end it
    times_s = generate_timed(model, prompts_BL, 20)
    assert len(times_s) == 20 and times_s == sorted(times_s)


def test_too_long_a_generation_is_refused():
    with pytest.raises(UserError, match="prompt_tokens, max_new_tokens: found 60 and 8, expected at most 64 together"):
        measure_speed(Metronome(), SpeedArgs(prompt_tokens=60, max_new_tokens=8), device=CPU)


def test_percentiles_are_numpys():
    values = sorted(torch.rand(37, generator=torch.Generator().manual_seed(1)).tolist())
    for percent in (0, 50, 95, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
