"""Options of generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from lora_dist.arguments.quantised import QuantisedArgs


@dataclass
class SamplingArgs:
    """How text is made; names and meanings are those of transformers' `GenerationConfig`. Handed to `generation.py`."""

    max_new_tokens: int = 64
    """Tokens to add at most."""
    min_new_tokens: int = 0
    """Tokens to add at least, before an end of text may come."""
    do_sample: bool = False
    """Draw from the distribution; off: the likeliest token each time."""
    temperature: float = 1.0
    """Flattens (above 1) or sharpens the distribution; with do_sample."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share; with do_sample."""
    top_k: int = 50
    """Draw from this many likeliest tokens, 0: from all; with do_sample."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability; with do_sample."""
    typical_p: float = 1.0
    """Draw from the most typical tokens that make up this share; with do_sample."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that stand there already; above 1 against repetition."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens comes twice; 0: they may."""
    num_beams: int = 1
    """Beams to search; 1: none."""
    num_return_sequences: int = 1
    """Texts for each prompt; needs do_sample, or as many beams."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end the answer, which ends with them (comma-separated, or a JSON list)."""
    seed: int = 0
    """Seed of the draws."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens; off: compute them anew for each, slower and with less memory."""

    def problems(self) -> Iterator[str]:
        """Every value that is out of range or has no effect, one line each."""
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("num_return_sequences", 1)):
            if getattr(self, name) < least:
                yield f"{name}: found {getattr(self, name)}, expected {least} or more"
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0"
        for name in ("min_new_tokens", "top_k", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                yield f"{name}: found {getattr(self, name)}, expected 0 or more"
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0 and at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"min_p: found {self.min_p}, expected a number from 0 to 1"
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if self.min_new_tokens > self.max_new_tokens:
            yield f"min_new_tokens: found {self.min_new_tokens}, expected at most max_new_tokens ({self.max_new_tokens})"
        if not self.do_sample:
            defaults = {f.name: f.default for f in fields(SamplingArgs)}
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                if getattr(self, name) != defaults[name]:
                    yield f"{name}: found {getattr(self, name)} without do_sample, where it has no effect; add --do_sample"
            if self.num_return_sequences > max(1, self.num_beams):
                yield (
                    f"num_return_sequences: found {self.num_return_sequences} with {self.num_beams} beams, which would be the same "
                    f"text again; add --do_sample, or --num_beams {self.num_return_sequences}"
                )


@dataclass
class _Opened:
    """Which model to use. A base of `GenerateArgs`, so that help lists it first."""

    model: str = ""
    """Directory (or hub name) of the model."""
    adapter: str | None = None
    """Adapter folder to put on the model."""
    prompt: str | None = None
    """Text to continue; without this and prompt_file: one a line from the terminal or a pipe."""
    prompt_file: str | None = None
    """Prompts: one a line (.txt), or a JSON list or JSON lines of texts, Alpaca records (instruction, input) or chats (messages)."""
    output: str | None = None
    """File to write the results of prompt_file to, one JSON object a line; default: the texts alone, to stdout."""
    prompt_template: str | None = None
    """Take prompts as instructions, and put them into this template: alpaca, the name of a file in templates/, or a path."""
    chat: bool = False
    """Take prompts as turns of a conversation, in the tokenizer's chat template; earlier turns are kept."""
    system: str | None = None
    """System message of the conversation; with chat."""


@dataclass
class GenerateArgs(SamplingArgs, QuantisedArgs, _Opened):
    """Continue prompts, follow instructions or chat, with a base, a pruned or a merged model, or an adapter on one."""

    batch_size: int = 8
    """Prompts of a file that are computed at once, padded on the left."""
    stream: bool = True
    """Show the text of a single prompt while it is made (not with several beams or texts); the text is the same."""
    verbose: bool = False
    """Say tokens a second at the end, on stderr; always said on a terminal."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process and shares a file's prompts, fsdp2 holds a part of it on each."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        """Every value that is out of range or contradicts another, one line each."""
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        if self.prompt is not None and self.prompt_file is not None:
            yield "prompt, prompt_file: found both, expected one at most"
        if self.output is not None and self.prompt_file is None:
            yield "output: found without prompt_file, expected a file of prompts beside it"
        if self.chat and self.prompt_template is not None:
            yield "chat, prompt_template: found both, expected one at most"
        if self.system is not None and not self.chat:
            yield "system: found without chat, expected --chat beside it"
        if self.batch_size < 1:
            yield f"batch_size: found {self.batch_size}, expected 1 or more"
        yield from QuantisedArgs.problems(self)
        yield from SamplingArgs.problems(self)
