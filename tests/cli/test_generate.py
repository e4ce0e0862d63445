"""`lora-dist generate` as a user calls it: a prompt, files of every kind, lines from a pipe, a terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_dist.__main__ import main
from lora_dist.arguments import GenerateArgs, SamplingArgs
from lora_dist.engine.answer import Answerer
from lora_dist.engine.prompts import Conversation, Form, Prompt, read_prompts
from lora_dist.generation import generate
from lora_dist.log import UserError
from lora_dist.models.loading import load_base
from lora_dist.parallel import World
from tests.runs import ROOT, command, environment
from tests.tiny import CONTEXT, tiny_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
RECORDS = [
    "a text",
    {"instruction": "go", "input": ""},
    {"instruction": "count", "input": "to two", "output": "one, two"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]},
]


@pytest.fixture(scope="module")
def chatty(tiny_base, tmp_path_factory) -> Path:
    """The small pruned base with a chat template in its tokenizer."""
    folder = tmp_path_factory.mktemp("chatty") / "base"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def expected(base: Path, *prompts: str, special_tokens: bool = True, **sampling) -> list[str]:
    """What the model says by itself, computed beside the command."""
    loaded = load_base(str(base), progress=False)
    sampling.setdefault("max_new_tokens", 8)
    options = SamplingArgs(**sampling)
    return [a.text for a in generate(loaded.model, loaded.tokenizer, prompts, options, special_tokens=special_tokens)]


def call(*argv: object, capsys) -> tuple[int, str, str]:
    code = main(["generate", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_prompt_is_shown_with_its_text_streamed_or_not(tiny_base, capsys):
    (text,) = expected(tiny_base, "the old bird")
    for options in ((), ("--stream", "false"), ("--verbose",)):
        code, out, err = call(tiny_base, "--prompt", "the old bird", "--max_new_tokens=8", *options, capsys=capsys)
        assert (code, out) == (0, f"the old bird{text}\n"), options
        assert ("tokens/s]" in err) == ("--verbose" in options)


def test_several_texts_of_a_prompt(tiny_base, capsys):
    wanted = expected(tiny_base, "a", num_beams=3, num_return_sequences=2)
    code, out, _ = call(tiny_base, "--prompt=a", "--num_beams=3", "--num_return_sequences=2", "--max_new_tokens=8", capsys=capsys)
    assert code == 0 and out == "".join(f"a{text}\n" for text in wanted)


def test_a_text_file_one_prompt_a_line(tiny_base, tmp_path, capsys):
    prompts = ["the river", "a", "old bridges and then", "home"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n")
    wanted = expected(tiny_base, *prompts)
    out_file = tmp_path / "out.jsonl"
    asked = [tiny_base, "--prompt_file", tmp_path / "p.txt", "--max_new_tokens=8", "--batch_size=3"]
    code, out, err = call(*asked, "--output", out_file, capsys=capsys)
    assert code == 0 and out == "" and "4 texts written" in err
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [row["text"] for row in rows] == wanted and [row["prompt"] for row in rows] == prompts
    assert [(row["index"], row["sequence"]) for row in rows] == [(i, 0) for i in range(4)] and rows[0]["tokens"] == 8
    code, out, _ = call(*asked, capsys=capsys)
    assert out == "".join(f"{p}{t}\n" for p, t in zip(prompts, wanted, strict=True))


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_json_files_of_texts_records_and_chats(kind, tmp_path):
    file = tmp_path / ("p.json" if kind == "list" else "p.jsonl")
    file.write_text(json.dumps(RECORDS, indent=1) if kind == "list" else "\n".join(map(json.dumps, RECORDS)))
    text, go, count, chat, shared = read_prompts(file)
    assert text == Prompt("a text") and go == Prompt("go", "") and count == Prompt("count", "to two")
    assert chat.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "hi"})  # the answer is left out
    assert [m["role"] for m in shared.messages] == ["user", "assistant", "user"]


def test_records_go_through_the_template_and_chats_through_the_tokenizers(chatty, tmp_path, capsys):
    from lora_dist.data.templates import load_template

    alpaca = load_template("alpaca")
    assert Form(None, alpaca).render(Prompt("count", "to two")) == alpaca.prompt("count", "to two")
    assert Form(None, alpaca).render(Prompt("go", "")) == alpaca.prompt("go")
    form = Form(load_base(str(chatty), progress=False).tokenizer, chat=True, system="S")
    assert form.render(Prompt("hi")) == "<s>S<u>hi<a>"
    messages = ({"role": "system", "content": "other"}, {"role": "user", "content": "hi"})
    assert form.render(Prompt(messages=messages)) == "<s>other<u>hi<a>"
    assert form.render(Prompt("count", "to two")) == "<s>S<u>count\n\nto two<a>"
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORDS[3]))
    code, out, _ = call(chatty, "--prompt_file", tmp_path / "p.jsonl", "--chat", "--max_new_tokens=8", capsys=capsys)
    assert code == 0 and out.rstrip("\n") == expected(chatty, "<s>s<u>hi<a>", special_tokens=False)[0]


@pytest.mark.parametrize(
    "argv,problem",
    [
        (["--prompt=a", "--prompt_file=b.txt"], "prompt, prompt_file: found both"),
        (["--prompt=a", "--output=o.jsonl"], "output: found without prompt_file"),
        (["--prompt=a", "--chat", "--prompt_template=alpaca"], "chat, prompt_template: found both"),
        (["--prompt=a", "--prompt_template=none"], "generate: prompt_template: found no template none, expected one of "),
        (["--prompt=a", "--system=s"], "system: found without chat"),
        (["--prompt=a", "--chat"], "chat: found a tokenizer without a chat template"),
        (["--prompt=a", "--top_p=0.5"], "top_p: found 0.5 without do_sample"),
        (["--prompt_file=nowhere.txt"], "prompt_file: nowhere.txt cannot be read (No such file"),
        (["--prompt_file={}/p.csv"], "p.csv has an unknown extension, expected .txt, .json or .jsonl"),
        (["--prompt_file={}/empty.txt"], "empty.txt holds no prompt"),
        (["--prompt_file={}/broken.jsonl"], "broken.jsonl, line 2: is not JSON"),
        (["--prompt_file={}/number.json"], "number.json, item 1: found int, expected a text, instruction"),
        (["--prompt_file={}/record.json"], "prompt 1: found an instruction, expected --prompt_template"),
        (["--prompt_file={}/chat.json"], "prompt 1: found a conversation, expected --chat"),
        (
            ["--prompt_file={}/long.txt", "--max_new_tokens=8"],
            "prompt 2 of 70 tokens, expected at most 0: the model's context is 64",
        ),
        (["--prompt=a", "--max_new_tokens=64"], "max_new_tokens: found 64 after a prompt of 1 tokens, expected at most 63"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ",
)
def test_what_cannot_be_answered_is_said_in_one_line(argv, problem, tiny_base, tmp_path, capsys):
    files = {
        "p.csv": "a", "empty.txt": "\n\n", "broken.jsonl": '"a"\n{', "number.json": "[3]", "record.json": '[{"instruction": "i"}]',
        "chat.json": '[[{"role": "user", "content": "c"}]]', "long.txt": "a\n" + "x" * 70,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, out, err = call(tiny_base, *(part.format(tmp_path) for part in argv), capsys=capsys)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("lora-dist generate: ") and problem in last
    assert err.count("lora-dist generate: ") == 1


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capsys):
    code, _, err = call("nowhere", "--prompt_file=p.txt", "--output", tmp_path / "no" / "o.jsonl", capsys=capsys)
    assert code == 2 and "output: " in err and "nowhere" not in err


@pytest.fixture
def pipe(monkeypatch, capsys):
    """Exit code, stdout and lines of stderr with some lines on stdin."""

    def run(base: Path, lines: str, *argv: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, out, err = call(base, "--max_new_tokens=8", *argv, capsys=capsys)
        return code, out, err.splitlines()

    return run


def test_lines_from_a_pipe_are_answered_one_by_one(chatty, pipe):
    """A conversation with commands, a line that does not fit, and turns that are forgotten to make room."""
    room = "y" * (CONTEXT - 8 - len("<u><a>"))
    code, out, lines = pipe(
        chatty, f"hi\n/system S\nho\n/reset\n/quitter\n{'x' * 60}\n{room}\n/quit\nnever\n", "--chat", "--verbose"
    )
    first = expected(chatty, "<u>hi<a>", special_tokens=False)[0]
    second = expected(chatty, f"<s>S<u>hi<a>{first}<u>ho<a>", special_tokens=False)[0]
    third = expected(chatty, "<s>S<u>/quitter<a>", special_tokens=False)[0]
    assert out == f"{first}\n{second}\n{third}\n"
    assert code == 2  # two lines could not be answered, even with all earlier turns forgotten
    assert "system message set" in lines and "forgotten" in lines and "tokens/s]" in lines[-1]
    assert sum("the model's context is 64" in line and "expected at most" in line for line in lines) == 2


def test_plain_lines_and_nothing_at_all(tiny_base, pipe):
    wanted = expected(tiny_base, "the river", "a")
    code, out, _ = pipe(tiny_base, "the river\n\na\n")
    assert code == 0 and out == f"the river{wanted[0]}\na{wanted[1]}\n"
    code, out, lines = pipe(tiny_base, "")
    assert code == 2 and lines[-1].startswith("lora-dist generate: prompt: found nothing, expected --prompt TEXT")


def test_oldest_turns_are_forgotten_until_the_rest_fits(chatty):
    answerer = Answerer(GenerateArgs(model=str(chatty), chat=True, max_new_tokens=20), World())
    conversation = Conversation(answerer.form)
    dropped = []
    for turn in range(4):
        prompt, n = conversation.ask(f"question {turn}", answerer.fits)
        dropped.append(n)
        conversation.answered("answer")
        assert answerer.fits(prompt) and prompt.endswith(f"<u>question {turn}<a>")
    assert dropped == [0, 0, 2, 2] and prompt == "<u>question 2<a>answer<u>question 3<a>"
    with pytest.raises(UserError, match="the model's context is 64"):
        answerer.one(conversation.ask("x" * 60, answerer.fits)[0], print)


def read_until(terminal: int, wanted: str, timeout_s: float = 60) -> str:
    """Everything the program shows until `wanted` comes."""
    shown, deadline = "", time.monotonic() + timeout_s
    while wanted not in shown:
        readable, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, shown
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError as error:  # the program has ended
            raise AssertionError(shown) from error
    return shown


def test_a_terminal_streams_stops_at_ctrl_c_and_ends_at_ctrl_d(tiny_base):
    """In a real terminal. Whether the answer is over when Ctrl-C comes is chance: both are to end at the next prompt."""
    ours, theirs = pty.openpty()
    argv = command(1, "generate", str(tiny_base), "--max_new_tokens=62")
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment(TERM="dumb"), start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, "> ")
        os.write(ours, b"/help\n")
        assert "Ctrl-C stops an answer" in read_until(ours, "stops an answer.")
        os.write(ours, b"a\n")
        assert "tokens/s]" in read_until(ours, "tokens/s]")
        os.write(ours, b"a\n")
        read_until(ours, "a\r\n")
        os.write(ours, b"\x03")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            os.write(ours, b"\x15\x04")  # Ctrl-U first; a terminal that is just changing its mode may lose or keep a key
            readable, _, _ = select.select([ours], [], [], 0.5)
            if readable:
                with contextlib.suppress(OSError):  # the program has ended
                    os.read(ours, 4096)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_keeps_what_was_said_so_far(chatty, monkeypatch, capsys):
    from lora_dist.cli import interactive

    answerer = Answerer(GenerateArgs(model=str(chatty), chat=True, max_new_tokens=30), World())
    conversation, pieces = Conversation(answerer.form), []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    session = interactive._Session(answerer, True, conversation)
    monkeypatch.setattr("lora_dist.cli.generate.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.take("hi")
    session.stopped()
    said = conversation.messages[-1]
    assert said == {"role": "assistant", "content": "".join(pieces)} and len(pieces) == 3
    assert expected(chatty, "<u>hi<a>", special_tokens=False, max_new_tokens=30)[0].startswith(said["content"])
    session.stopped()  # at a moment when nothing is being said
    assert len(conversation.messages) == 2 and "[stopped]" in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_share_the_prompts_of_a_file(tiny_base, tmp_path):
    """The same file as one process writes, drawn texts included."""
    prompts = ["the river", "a", "old bridges and then", "home", "x"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    written = {}
    for processes, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        out = tmp_path / f"{processes}-{strategy}.jsonl"
        asked = ["generate", str(tiny_base), "--prompt_file", str(tmp_path / "p.txt"), "--output", str(out), "--batch_size=2"]
        asked += ["--do_sample", "--max_new_tokens=12", "--device=cpu", f"--strategy={strategy}"]
        done = subprocess.run(command(processes, *asked), capture_output=True, text=True, cwd=ROOT, env=environment())
        assert done.returncode == 0, done.stderr
        written[processes, strategy] = out.read_text()
    assert written[1, "ddp"] == written[2, "ddp"] == written[2, "fsdp2"] and written[1, "ddp"].count("\n") == 5
