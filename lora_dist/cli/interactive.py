"""`lora-dist generate` without a prompt: lines from a terminal or a pipe, each answered as it comes. Called by `cli/generate.py`."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_dist.cli.generate import show
from lora_dist.log import UserError

if TYPE_CHECKING:
    from lora_dist.engine.answer import Answerer
    from lora_dist.engine.prompts import Conversation

HELP = """\
/help          this list
/reset         forget the turns of the conversation so far
/system TEXT   set the system message of the conversation (with --chat); without TEXT: none
/quit          end, as Ctrl-D does
Ctrl-C stops an answer."""


def converse(answerer: Answerer) -> int:
    """Collective: rank 0 reads, all compute, rank 0 writes. The exit code: 2 if a line from a pipe could not be answered.

    Raises:
        UserError: there is neither a terminal nor a line.
    """
    from lora_dist.engine.prompts import Conversation, check_text

    world = answerer.world
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if world.is_main and terminal:
        _tell(f"{_welcome(answerer)} /help lists the commands.")
    session = _Session(answerer, terminal, Conversation(answerer.form) if answerer.form.chat else None)
    read = _reader(terminal)
    lines = failed = 0
    while True:
        try:
            line = world.broadcast(read() if world.is_main else None)
            lines += line is not None
            check_text(line or "", f"line {lines}")
            if line is None or not session.take(line):
                break
        except KeyboardInterrupt:
            if not terminal or world.size > 1:  # the other processes would go on by themselves
                raise
            session.stopped()
        except UserError as error:
            failed += 1
            for problem in error.problems if world.is_main else ():
                _tell(problem)
    if lines == 0 and not terminal:
        raise UserError("prompt: found nothing, expected --prompt TEXT, --prompt_file FILE, or a line on stdin")
    if answerer.args.verbose and world.is_main:
        _tell(f"[{answerer.speed}]")
    return 2 if failed and not terminal else 0


def _welcome(answerer: Answerer) -> str:
    if answerer.form.chat:
        return "A conversation: earlier turns are kept."
    return "Each line is continued." if answerer.form.plain else "Each line is an instruction."


def _tell(text: str) -> None:
    """To stderr: stdout holds the texts only."""
    print(text, file=sys.stderr, flush=True)


def _reader(terminal: bool) -> Callable[[], str | None]:
    """What returns the next line without its end, None at the end of all."""
    if sys.stdin is None:  # closed by whoever started this
        return lambda: None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is one bad line, not the end of all
    if not terminal:
        return lambda: next((line.rstrip("\n") for line in sys.stdin), None)
    with contextlib.suppress(ImportError):  # not everywhere; input() then reads lines without editing
        import readline  # noqa: F401  (input() uses it once it is there)

    def read() -> str | None:
        while True:
            try:
                return input("> ")
            except EOFError:
                _tell("")
                return None
            except KeyboardInterrupt:
                _tell("\n(Ctrl-D or /quit ends)")

    return read


class _Session:
    """What lines do, one after the other."""

    def __init__(self, answerer: Answerer, terminal: bool, conversation: Conversation | None):
        self._answerer, self._terminal, self._conversation = answerer, terminal, conversation

    def take(self, line: str) -> bool:
        """Collective: a command, or a prompt that is answered. False: it ends here."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit" and not rest:
            return False
        if command == "/help" and not rest:
            self._say(HELP)
        elif command == "/reset" and not rest:
            if self._conversation is not None:
                self._conversation.messages.clear()
            self._say(
                "forgotten" if self._conversation is not None else "there is nothing to forget: each line stands for itself"
            )
        elif command == "/system":
            if self._conversation is None:
                raise UserError("/system: found without a conversation, expected --chat on the command line")
            self._conversation.form.system = rest.strip() or None
            self._say("system message set" if rest.strip() else "no system message")
        elif line.strip():
            self._answer(line)
        return True

    def stopped(self) -> None:
        """Ctrl-C: what was said so far stays in the conversation."""
        if self._conversation is not None:
            self._conversation.answered(self._answerer.so_far)
        self._say("\n[stopped]")

    def _answer(self, line: str) -> None:
        answerer, conversation = self._answerer, self._conversation
        answerer.so_far = ""
        before_tokens, before_s = answerer.speed.tokens, answerer.speed.time_s
        if conversation is None:
            show(answerer, answerer.render(line), line if answerer.form.plain and not self._terminal else "")
        else:
            try:
                prompt, dropped = conversation.ask(line, answerer.fits)
                if dropped:
                    self._say(f"(forgot the oldest {dropped} messages: the model's context is {answerer.context} tokens)")
                conversation.answered(show(answerer, prompt, "")[0])
            except UserError:
                conversation.unanswered()
                raise
        if self._terminal:
            tokens, time_s = answerer.speed.tokens - before_tokens, answerer.speed.time_s - before_s
            if time_s:
                self._say(f"[{type(answerer.speed)(tokens, time_s)}]")

    def _say(self, text: str) -> None:
        if self._answerer.world.is_main:
            _tell(text)
