"""A model that is ready to be asked: one prompt as a stream, or a file of prompts shared by the processes. Called by `cli/generate.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_dist.arguments import GenerateArgs
from lora_dist.data.templates import load_template
from lora_dist.engine.open_model import asked_quantisation, open_model, require_language_model
from lora_dist.engine.prompts import Form, Prompt, check_text, read_prompts
from lora_dist.generation import Answer, context_of, encode, generate, room_problems
from lora_dist.parallel import World


@dataclass
class Speed:
    """Tokens that were generated, and the time they took."""

    tokens: int = 0
    time_s: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / self.time_s if self.time_s else 0.0
        return f"{self.tokens:,} tokens, {self.time_s:.1f} s, {rate:.1f} tokens/s"


class Answerer:
    """Collective throughout: under a launcher every process makes the same calls.

    Attributes:
        quantisation: of the base.
        so_far: what was handed on of the latest streamed text, which may have been interrupted.
    """

    def __init__(self, args: GenerateArgs, world: World):
        """Read the prompts' file and the template, then load the model.

        Raises:
            UserError: as `open_model`; a text, template, file or chat template that is not there or not of use.
        """
        for name, text in (("prompt", args.prompt), ("system", args.system)):
            check_text(text or "", name)
        template = load_template(args.prompt_template) if args.prompt_template is not None else None
        self.prompts = read_prompts(Path(args.prompt_file)) if args.prompt_file is not None else []
        self.args, self.world, self.speed = args, world, Speed()
        self.so_far = ""
        self._opened = open_model(
            args.model,
            args.adapter,
            world=world,
            strategy=args.strategy,
            config_name=args.config_name,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            trust_remote_code=args.trust_remote_code,
            quantisation=asked_quantisation(args),
            as_stored=args.as_stored,
            storage=args.storage,
        )
        require_language_model(self._opened, args.model)
        self.quantisation = self._opened.quantisation
        self.form = Form(self._opened.base.tokenizer, template, args.chat, args.system)
        self.context = context_of(self._opened.base.model)

    @property
    def streams(self) -> bool:
        return self.args.stream and self.args.num_beams == 1 and self.args.num_return_sequences == 1

    def fits(self, text: str) -> bool:
        """Whether a text for the model leaves room for its answer."""
        ids = encode(self.form.tokenizer, text, special_tokens=self.form.special_tokens)
        return not any(room_problems([ids], self.context, self.args.max_new_tokens))

    def one(self, text: str, on_text: Callable[[str], object]) -> list[str]:
        """Continue a text. Where `streams`, its pieces are handed on as they are made, on rank 0.

        Raises:
            UserError: it does not fit the context.
        """
        self.so_far = ""

        def piece(text: str) -> None:
            self.so_far += text
            on_text(text)

        streamed = piece if self.streams and self.world.is_main else None
        return [answer.text for answer in self._generate([text], on_text=streamed)]

    def file(self, progress: Callable[[int], Callable[[], object]]) -> tuple[list[str], list[Answer]]:
        """The texts of the file's prompts as the model was given them, and the answers to all.

        Args:
            progress: given the number of batches this process computes, returns what to call after each.
        """
        texts = [self.form.render(prompt, f"prompt_file: prompt {i}") for i, prompt in enumerate(self.prompts, start=1)]
        shared = self.args.strategy == "ddp" and self.world.size > 1
        rank, size = (self.world.rank, self.world.size) if shared else (0, 1)
        batches = -(-len(texts) // self.args.batch_size)
        done = progress(len(range(rank, batches, size)))
        own = self._generate(texts, batch_size=self.args.batch_size, share=(rank, size), on_batch=done)
        answers = [answer for part in self.world.gather(own) for answer in part] if shared else own
        return texts, sorted(answers, key=lambda answer: (answer.prompt, answer.sequence))

    def render(self, text: str) -> str:
        """A text as the model is given it."""
        return self.form.render(Prompt(text))

    def _generate(
        self,
        texts: list[str],
        *,
        batch_size: int = 1,
        share: tuple[int, int] = (0, 1),
        on_text: Callable[[str], object] | None = None,
        on_batch: Callable[[], object] | None = None,
    ) -> list[Answer]:
        start = time.perf_counter()
        answers = generate(
            self._opened.model,
            self.form.tokenizer,
            texts,
            self.args,
            batch_size=batch_size,
            special_tokens=self.form.special_tokens,
            continued=self.form.plain,
            share=share,
            on_text=on_text,
            on_batch=on_batch,
        )
        self.speed.time_s += time.perf_counter() - start
        self.speed.tokens += sum(answer.tokens for answer in answers)
        return answers
