"""A recipe and the command line fill one dataclass, by the same rules and with clear refusals."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from empcause.cli.options import parse_options
from empcause.errors import UserError


@dataclass
class Options(TrainingArguments):
    output_dir: str | None = field(default="runs/test", metadata={"help": "where it goes"})
    gamma: float = field(default=1.0, metadata={"help": "strength of the bias"})
    extractor: str | None = field(default=None, metadata={"help": "folder of the extractor"})
    interleave: bool = field(default=False, metadata={"help": "mix the batches"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, not {self.gamma}")


def parse(*arguments: str) -> Options:
    return parse_options(Options, arguments, prog="empcause train test", description="A test.")


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_recipe_then_command_line(tmp_path):
    path = recipe(tmp_path, "learning_rate: 2e-5\ngamma: 0.5\nmax_steps: 7\ninterleave: true\nextractor: null\n")
    options = parse("--config", path, "--gamma", "2")
    assert (options.learning_rate, options.gamma, options.max_steps) == (2e-5, 2.0, 7)
    assert options.interleave is True
    assert options.extractor is None
    assert options.output_dir == "runs/test"
    assert parse(f"--config={path}").gamma == 0.5


def test_a_value_is_what_is_written_and_null_is_none(tmp_path):
    options = parse("--config", recipe(tmp_path, "extractor: no\nsave_strategy: no\noutput_dir: null\nseed: 010\n"))
    assert (options.extractor, options.save_strategy, options.seed) == ("no", "no", 10)
    assert options.output_dir != "runs/test"
    assert parse("--config", recipe(tmp_path, "extractor: off\n"), "--extractor", "a").extractor == "a"


def test_what_is_no_recipe(tmp_path):
    (tmp_path / "large").write_bytes(b"# " + b"x" * 2**21)
    (tmp_path / "bytes").write_bytes(b"gamma: \xff")
    for name, message in (("", "Is a directory"), ("large", "more than 1,048,576 bytes"), ("bytes", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            parse("--config", str(tmp_path / name))


def test_nested_and_empty_recipes(tmp_path):
    options = parse(
        "--config", recipe(tmp_path, "eval_strategy: epoch\nlr_scheduler_kwargs: {factor: 0.5, mode: max}\n")
    )
    assert options.lr_scheduler_kwargs == {"factor": 0.5, "mode": "max"}
    assert parse("--config", recipe(tmp_path, "")).gamma == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", r"unknown key 'lerning_rate'; did you mean learning_rate\?"),
        ("- gamma", "must be a list of `key: value` lines, not a list"),
        ("gamma: [", "is not valid YAML"),
        ("gamma: much", "invalid float value: 'much'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("gamma: 1\nseed: 2\ngamma: 3", "has the key 'gamma' twice"),
        ("gamma: null", "gamma has no value"),
        ("{[1]: 2}", "unknown key"),
        ("gamma: [[1]]", "a list of plain values is expected"),
        ("[" * 3000, "is not valid YAML"),
        ("gamma: *missing", "is not valid YAML"),
        ("gamma: -1", "gamma must not be negative"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse("--config", recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gama", "1"], r"no option --gama; did you mean --gamma\?"),
        (["--zzzzqqqq"], r"no option --zzzzqqqq\.$"),
        (["oops"], "does not know what to do with 'oops'"),
        (["--config"], "--config needs the path"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read: No such file"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--eval_strategy", "daily"], "invalid choice: 'daily'"),
    ],
)
def test_bad_command_lines_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


def test_help_shows_own_options_first_and_hides_the_rare(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert shown.index("--gamma") < shown.index("--learning_rate")
    assert "--fsdp" not in shown
    with pytest.raises(SystemExit):
        parse("--help_all")
    assert "--fsdp" in capsys.readouterr().out
