"""Command line and YAML -> configuration: precedence, types, and every problem in one go."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB, without_launcher_flags
from lora_dist.config import RunConfig
from lora_dist.log import UserError

NEEDED = ["--model.name_or_path", "m", "--data.dataset_name", "d", "--train.output_dir", "o"]


def read(*argv: str) -> RunConfig:
    return parse(RunConfig, [*NEEDED, *argv], VERB)


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(RunConfig, argv, VERB)
    return caught.value.problems


def test_defaults_then_yaml_then_command_line_whatever_their_order(tmp_path):
    file, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text("train:\n  learning_rate: 1e-3\n  seed: 1\n  max_steps: 5\n")
    second.write_text("train: {seed: 2}\nadapter: {target_modules: [q_proj]}\n")
    config = read("--train.max_steps", "9", "--config", str(file), "--config", str(second))
    assert (config.train.learning_rate, config.train.seed, config.train.max_steps) == (1e-3, 2, 9)
    assert config.adapter.target_modules == ["q_proj"] and config.adapter.r == 8


@pytest.mark.parametrize("form", [["--train.bf16"], ["--train.bf16", "true"], ["--train.bf16=True"], ["train.bf16=true"]])
def test_switches_may_be_written_in_the_usual_ways(form):
    assert read(*form, "--train.seed", "3").train.bf16 is True


def test_lists_may_be_separated_by_commas():
    for form in ("q_proj,v_proj", "[q_proj, v_proj]"):
        assert read("--adapter.target_modules", form).adapter.target_modules == ["q_proj", "v_proj"]


def test_aliases():
    assert read("--resume", "auto").train.resume_from_checkpoint == "auto"


@pytest.mark.parametrize("form", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "-1"]])
def test_a_rank_from_the_launcher_is_left_out_where_the_environment_has_it(form, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = ["--train.seed", "3", *form, "--train.bf16"]
    assert without_launcher_flags(argv) == argv
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert without_launcher_flags(argv) == ["--train.seed", "3", "--train.bf16"]


@pytest.mark.parametrize("after", [[], ["--train.seed", "3"], ["train.seed=3"]])
def test_a_bare_deepspeed_switch_says_nothing(after):
    config = read(*without_launcher_flags(["--deepspeed", *after]))
    assert config.parallel.ds_config is None and config.train.seed == (3 if after else 42)


@pytest.mark.parametrize(
    "form", [["--deepspeed", "z.json"], ["--deepspeed=z.json"], ["--deepspeed", "--deepspeed_config", "z.json"]]
)
def test_deepspeeds_json_may_be_given_as_in_its_own_and_hugging_faces_examples(form, tmp_path):
    file = tmp_path / "z.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    argv = [word.replace("z.json", str(file)) for word in form]
    assert read(*without_launcher_flags(argv)).parallel.ds_config == str(file)


def test_all_problems_are_reported_together_with_the_nearest_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  learnin_rate: 1\n  bf16: maybe\nadaptor: {r: 3}\n")
    found = problems(
        *NEEDED, "--config", str(file), "--train.max_steps", "x", "--adapter.r", "0", "--seed", "1", "--adapter.mask", "bloc"
    )
    text = "\n".join(found)
    assert "train.learnin_rate: unknown key, did you mean train.learning_rate?" in text
    assert "train.bf16: found 'maybe', expected true or false" in text
    assert "adaptor.r: unknown key, did you mean adapter.r?" in text
    assert "train.max_steps: found 'x', expected a whole number" in text
    assert "adapter.r: found 0, expected a number above 0" in text
    assert "seed: unknown key, did you mean train.seed?" in text
    assert "adapter.mask: found 'bloc', expected one of auto, block, element, none" in text
    assert len(found) == 7


def test_missing_values_and_strays():
    found = "\n".join(problems("--train.seed", "--model.name_or_path", "m", "stray"))
    assert "train.seed: found no value" in found and "stray: found a value without an option" in found
    assert "data.dataset_name: found nothing" in found and "train.output_dir: found nothing" in found


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--train.bf16", "--train.fp16"], "train.bf16, train.fp16"),
        (["--train.save_total_limit", "1"], "save_total_limit"),
        (["--train.eval_strategy", "no", "--train.early_stopping_patience", "2"], "early_stopping_patience"),
        (["--train.save_strategy", "no"], "load_best_model_at_end"),
        (["--adapter.lora_dropout", "1"], "lora_dropout"),
        (["--data.block_size", "1"], "block_size"),
        (["--train.learning_rate", "-1"], "learning_rate"),
    ],
)
def test_values_out_of_range_or_in_contradiction(argv, words):
    found = problems(*NEEDED, *argv)
    assert len(found) == 1 and words in found[0] and ("found" in found[0] or "needs" in found[0])


@pytest.mark.parametrize("content,words", [("- 1\n", "expected sections"), ("a: [\n", "is not YAML"), (None, "cannot be read")])
def test_broken_config_files(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content)
    assert words in problems(*NEEDED, "--config", str(file))[0]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lora_dist", *argv], capture_output=True, text=True)


def test_print_config_reads_back_to_the_same(tmp_path):
    done = run("train", *NEEDED, "--train.learning_rate", "3e-4", "--print_config")
    assert done.returncode == 0
    file = tmp_path / "c.yaml"
    file.write_text(done.stdout)
    assert yaml.safe_load(done.stdout)["train"]["learning_rate"] == 3e-4
    assert parse(RunConfig, ["--config", str(file)], VERB) == read("--train.learning_rate", "3e-4")


def test_the_command_exits_with_2_and_one_line_a_problem():
    done = run("train", "--train.seeed", "1", *NEEDED)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["lora-dist train: train.seeed: unknown key, did you mean train.seed?"]
    done = run("trian")
    assert done.returncode == 2 and "did you mean train?" in done.stderr


@pytest.mark.parametrize("verb", ["prune", "train", "eval", "merge", "generate", "inspect"])
def test_help_explains_every_option(verb):
    done = run(verb, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: lora-dist {verb}")
    assert "default" in done.stdout
    listed = run()
    assert verb in listed.stdout
