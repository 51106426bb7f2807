"""The command as a user meets it: help, exit codes, one sentence per mistake."""

import importlib
import subprocess
import sys
from pathlib import Path
from signal import SIGTERM

import pytest
from safetensors import SafetensorError

from empcause.errors import Interrupted, UserError
from empcause.ops.backends import BACKENDS

cli = importlib.import_module("empcause.cli.main")  # the package exports the function of the same name


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line[:4].isspace() and line[4:5].strip()]
    assert set(cli.COMMANDS) <= set(listed)


HELP = """
import runpy, sys
sys.argv = ["empcause", *sys.argv[1:]]
try:
    runpy.run_module("empcause", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
heavy = {"torch", "transformers", "numpy", "rich", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_waits_for_nothing(command):
    """torch and transformers take seconds to import."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command.split(), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: empcause {command}".rstrip())


def test_info_says_what_runs_here(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BACKENDS)


@pytest.mark.parametrize("arguments", [["respond", "Hello there"], ["chat"]])
def test_missing_models_are_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("empcause: error: ")
    assert "runs/extractor" in shown
    assert shown.count("\n") == 1


def test_empty_turn_is_refused(capsys):
    assert cli.main(["respond", "  "]) == 2
    assert "A turn is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (UserError("The file is not there."), 2, "The file is not there."),
        (
            OSError(28, "No space left on device", "model.safetensors"),
            2,
            "the disk is full",
        ),
        (SafetensorError("Error while serializing: No space left on device (os error 28)"), 2, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (Interrupted("interrupted; 3 are saved.", SIGTERM), 143, "interrupted; 3 are saved."),
    ],
)
def test_failures_become_sentences(failure, code, message, monkeypatch, capsys):
    def fail(_):
        raise failure

    monkeypatch.setattr("empcause.cli.info.run", fail)
    assert cli.main(["info"]) == code
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr("empcause.cli.info.run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_module_and_unknown_option_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "empcause", "train", "extractor", "--lerning_rate", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2
    assert "did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr
