"""One table of what is trained and evaluated is behind both commands."""

import dataclasses
import importlib
from dataclasses import dataclass, field

import pytest

from empcause.cli import main, stages

COMMANDS = ("train", "evaluate")


@pytest.mark.parametrize(
    ("stage", "command"),
    [(name, command) for name, stage in stages.STAGES.items() for command in COMMANDS if getattr(stage, command)],
)
def test_what_the_table_names_is_there(stage, command):
    task = getattr(stages.STAGES[stage], command)
    module = importlib.import_module(task.module)
    assert callable(getattr(module, task.function))
    assert "output_dir" in {option.name for option in dataclasses.fields(getattr(module, task.options))}


@dataclass
class Options:
    output_dir: str = field(default="runs/own")
    size: int = field(default=1, metadata={"help": "of the model"})


def work(options):
    return {"figure": float(options.size)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_row_is_all_that_a_stage_needs(command, monkeypatch, capsys):
    task = stages.Task(module=__name__, options="Options", function="work", description="Does it.", result="own thing")
    own = stages.Stage(title="the own one", purpose="a test", recipe="recipes/own.yaml", train=task, evaluate=task)
    monkeypatch.setitem(stages.STAGES, "own", own)
    assert main([command, "own", "--size", "7"]) == 0
    shown = capsys.readouterr().out
    assert "figure" in shown
    assert "7" in shown
    assert "own thing in runs/own" in shown
    with pytest.raises(SystemExit):
        main([command, "own", "--help"])
    shown = capsys.readouterr().out
    assert f"empcause {command} own" in shown
    assert "Does it." in shown
    assert main([command, "other"]) == 2
    assert "own" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, stage in stages.STAGES.items() if stage.evaluate is None])
def test_a_system_without_an_evaluation_of_its_own(name, capsys):
    """The evaluations of the two stages take any system's folder."""
    assert main(["evaluate", name]) == 2
    assert "extractor, generator" in capsys.readouterr().err.replace("'", "")
