"""Checkpoints: what happens to them when a training is killed or interrupted, when the disk fails, and when they are damaged."""

import json
import os
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from transformers import GPT2Config, GPT2Model
from transformers.utils import logging

from empcause.checkpoints import load_whole
from empcause.errors import Interrupted, UserError
from empcause.outputs import RECORD, read_record, seal
from empcause.training.folder import find_checkpoint
from faults.kinds import Guard, fault
from faults.small_training import At, arguments, in_a_process, killed_at, train, weights

FOLDER = "empcause/training/folder.py"
OUTPUTS = "empcause/outputs.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output folder of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(arguments(folder))
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """The output folder of a training that ended just after its last checkpoint."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    for path in (*whole.glob("checkpoint-*"), whole / RECORD):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal; where the tests run in the background, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def said(caplog):
    """What the training says, also to Python's own logging."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def resume(folder, *callbacks, **options):
    train(arguments(folder, **({"resume_from_checkpoint": "true"} | options)), *callbacks)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        (entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in history if "train_loss" not in entry
    ]


def is_as(folder, whole):
    """Whether a training ended with the same weights, bit for bit, and the same losses and evaluations on the way."""
    return weights(folder) == weights(whole) and losses(folder) == losses(whole)


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@fault(
    Guard(OUTPUTS, "if found != expected:", "if False:"),
    cause="killed at any moment, again and again; files of checkpoints cut, flipped or deleted in between",
    place="training",
    promise="resuming ends in the same weights, losses and evaluations, bit for bit, as a training that nothing disturbed",
)
def test_killed_and_damaged_at_random(whole):
    class Training(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.folder = Path(tempfile.mkdtemp()) / "run"

        def options(self):
            return arguments(self.folder, resume_from_checkpoint="true", save_total_limit=2)

        @rule(moment=st.integers(20, 170))
        def kill(self, moment):
            assert killed_at(self.folder, moment, lambda: train(self.options())) in (0, -signal.SIGKILL)

        @rule(how=st.sampled_from(["cut", "flipped", "deleted"]), number=st.integers(0, 100))
        def damage(self, how, number):
            newest = max(self.folder.glob("checkpoint-*"), default=self.folder / "none", key=lambda path: path.name)
            files = sorted(path for path in newest.glob("*") if path.stat().st_size)
            if files:
                damage(files[number % len(files)], how)

        def teardown(self):
            try:
                train(self.options())
                assert is_as(self.folder, whole)
            finally:
                shutil.rmtree(self.folder.parent)

    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=6,
            stateful_step_count=5,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
        ),
    )


@pytest.mark.parametrize(
    ("name", "how"),
    [("model.safetensors", "cut"), ("optimizer.pt", "flipped"), ("rng_state.pth", "deleted"), (RECORD, "cut")],
)
@fault(
    Guard(OUTPUTS, "if found != expected:", "if False:"),
    Guard(OUTPUTS, 'raise UserError(f"{folder / name} is missing.") from error', "continue"),
    Guard(FOLDER, '            logger.warning(f"{checkpoint} is passed over: {error}")', "            pass"),
    cause="a file of the newest checkpoint is cut short by a loss of power, has a flipped byte, or is missing",
    place="empcause train --resume_from_checkpoint true",
    promise="the training goes on from the checkpoint before it, says so, and ends in the same weights",
)
def test_damaged_newest_checkpoint(whole, stopped, said, name, how):
    damage(stopped / "checkpoint-6" / name, how)
    assert find_checkpoint(arguments(stopped, resume_from_checkpoint="true")) == str(stopped / "checkpoint-4")
    assert re.search(f"checkpoint-6 is passed over: .*checkpoint-6/{name} is", said.text)
    resume(stopped)
    assert is_as(stopped, whole)


@fault(
    Guard(FOLDER, "    if record is None:", "    if False:"),
    cause="killed while a checkpoint was saved: weights and optimiser are there, the state of the random generators is not",
    place="empcause train --resume_from_checkpoint true",
    promise="that checkpoint is known not to be whole; the training goes on from the one before it to the same weights",
)
def test_half_saved_checkpoint(whole, stopped):
    (stopped / "checkpoint-4" / RECORD).unlink()
    (stopped / "checkpoint-4" / "rng_state.pth").unlink()
    shutil.rmtree(stopped / "checkpoint-6")
    resume(stopped, load_best_model_at_end=False)
    assert weights(stopped / "checkpoint-6") == weights(whole / "checkpoint-6")


@fault(
    Guard(FOLDER, "        check_checkpoint(Path(wanted), args.load_best_model_at_end)\n", ""),
    Guard(FOLDER, "    if record is not None and record.made_by != CHECKPOINT:", "    if False:"),
    cause="the checkpoint that the user names is damaged, or is the output folder itself",
    place="empcause train --resume_from_checkpoint FOLDER",
    promise="it is refused, by the damaged file's name, and nothing is trained or changed",
)
def test_named_checkpoint_is_damaged(stopped):
    damage(stopped / "checkpoint-4" / "optimizer.pt", "flipped")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"checkpoint-4/optimizer\.pt is not as it was saved"):
        resume(stopped, resume_from_checkpoint=str(stopped / "checkpoint-4"))
    with pytest.raises(UserError, match="is no checkpoint; name one of its folders"):
        find_checkpoint(arguments(stopped, resume_from_checkpoint=str(stopped)))
    del before[stopped / RECORD]
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@fault(
    Guard(FOLDER, "if with_best and best != folder and", "if False and"),
    Guard(FOLDER, "            verify(self.state.best_model_checkpoint)", "            pass"),
    cause="the best checkpoint, older than the last one, is damaged",
    place="training, before it is resumed or while it runs",
    promise="it is never taken for the best: training goes on from before it and makes it anew, to the same weights",
)
def test_best_checkpoint_is_damaged(whole, stopped, when):
    state = json.loads((stopped / "checkpoint-6" / "trainer_state.json").read_text())
    best = stopped / f"checkpoint-{state['best_global_step']}"
    assert best.name in ("checkpoint-2", "checkpoint-4")
    if when == "before":
        damage(best / "model.safetensors", "flipped")
    else:
        shutil.rmtree(stopped / "checkpoint-6")
        with pytest.raises(UserError, match="The best checkpoint is damaged: "):
            resume(stopped, At(6, lambda: damage(best / "model.safetensors", "flipped")))
    resume(stopped)
    assert is_as(stopped, whole)


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
@fault(
    Guard(FOLDER, "weights_only=True, mmap=True", "weights_only=False, mmap=True"),
    cause="a checkpoint from somebody else holds a pickle that runs code",
    place="empcause train --resume_from_checkpoint FOLDER",
    promise="the code does not run; the file is refused by name (training_args.bin is not read at all)",
)
def test_hostile_pickle_in_a_checkpoint(whole, stopped, tmp_path, name):
    checkpoint = stopped / "checkpoint-4"
    torch.save(Hostile(tmp_path / "ran"), checkpoint / name)
    seal(checkpoint, "checkpoint", read_record(checkpoint).about)
    if name == "training_args.bin":
        resume(stopped, resume_from_checkpoint=str(checkpoint))
        assert is_as(stopped, whole)
    else:
        with pytest.raises(UserError, match=f"{name} holds more than numbers"):
            resume(stopped, resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


@fault(
    Guard("empcause/checkpoints.py", "use_safetensors=True, ", ""),
    cause="a model from somebody else has its weights as a pickle that runs code",
    place="--model_name_or_path FOLDER",
    promise="pytorch_model.bin is never read; the model is refused",
)
def test_hostile_pickle_as_a_model(tmp_path):
    folder = tmp_path / "model"
    GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    torch.save(Hostile(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_whole(GPT2Model, folder)
    assert not (tmp_path / "ran").exists()


@fault(
    Guard(FOLDER, "            if folder.is_dir():\n                remove_made(folder)\n", ""),
    Guard(FOLDER, "if path in spare or path not in whole:", "if path in spare:"),
    cause="killed twice while the same checkpoint is saved",
    place="training",
    promise="the next resume goes on to the same weights; nothing of the half checkpoints is left",
)
def test_two_interruptions_at_one_step(whole, stopped):
    def dies_while_saving(step):
        torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        resume(stopped, At(step, lambda: os.kill(os.getpid(), signal.SIGINT)))

    shutil.rmtree(stopped / "checkpoint-6")
    for step in (5, 5, 6):
        assert in_a_process(lambda step=step: dies_while_saving(step)) == -signal.SIGKILL
        assert (stopped / f"checkpoint-{step}" / "model.safetensors").exists()
    (stopped / "checkpoint-6" / "scaler.pt").touch()  # which the resumed training does not write
    resume(stopped)
    assert is_as(stopped, whole)
    assert {path.name for path in stopped.glob("*-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert not (stopped / "checkpoint-6" / "scaler.pt").exists()


@fault(
    Guard(OUTPUTS, "    for path in paths:\n        sync(path)\n", ""),
    Guard(OUTPUTS, "    sync(folder.parent)\n", ""),
    cause="the power goes",
    place="training, just after a checkpoint was saved",
    promise="a checkpoint counts as whole only once all its files are on the disk, and so is its own name",
)
def test_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    train(arguments(tmp_path, max_steps=2))
    names = sorted(f"checkpoint-2/{name}" for name in os.listdir(tmp_path / "checkpoint-2") if name != RECORD)
    first = synced.index(names[0])
    assert synced[first : first + len(names)] == names
    record, folder, parent = synced[first + len(names) : first + len(names) + 3]
    assert record.startswith(f"checkpoint-2/.{RECORD}.")
    assert (folder, parent) == ("checkpoint-2", str(tmp_path))


@pytest.mark.parametrize("cause", ["full", "failing"])
@fault(
    Guard(OUTPUTS, "|unexpected pos .* vs|iostream error", ""),
    Guard(OUTPUTS, ", errno.EIO)", ")"),
    Guard(
        FOLDER,
        "        limit, self.args.save_total_limit = self.args.save_total_limit, None",
        "        limit = self.args.save_total_limit",
    ),
    Guard(
        FOLDER,
        "                    remove_made(folder)\n                    folder.rmdir()",
        "                    pass",
    ),
    Guard(FOLDER, "            self._remove_older(output, folder)", "            pass"),
    cause="the disk is full, or fails when written data are brought to it",
    place="training that keeps one checkpoint, while the next is saved",
    promise="one sentence with the reason and the older checkpoint, which is whole and alone; the same weights when resumed",
)
def test_checkpoint_cannot_be_saved(whole, tmp_path, cause):
    options = {"save_total_limit": 1, "load_best_model_at_end": False}
    last = tmp_path / "run" / "checkpoint-2"

    def fill():
        if (
            cause == "full"
        ):  # a file larger than this cannot be written: torch.save says what it says when the disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        else:
            os.fsync = fail

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("optimizer.pt"):
            raise OSError(5, os.strerror(5))

    def run():
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        with pytest.raises(UserError) as error:
            train(arguments(last.parent, **options), At(4, fill))
        reason = "the disk is full or fails" if cause == "full" else os.strerror(5)
        assert str(error.value).startswith(f"The training stopped ({reason}); {last} is saved, ")

    assert in_a_process(run) == 0
    assert [path.name for path in last.parent.glob("*-*")] == [last.name]
    resume(last.parent, **options)
    assert {path.name for path in last.parent.glob("*-*")} == {"checkpoint-4", "checkpoint-6"}, "the best and the last"
    assert weights(last.parent / "checkpoint-6") == weights(whole / "checkpoint-6")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@fault(
    Guard(FOLDER, "control.should_save = control.should_training_stop = True", "control.should_training_stop = True"),
    Guard(FOLDER, "control.should_evaluate = control.should_save = control.should_log = False", "pass"),
    Guard(FOLDER, "for number in (signal.SIGINT, signal.SIGTERM)}", "for number in ()}"),
    cause="Ctrl-C, or a request to end (SIGTERM)",
    place="training that saves once per epoch, in the middle of one",
    promise="the step ends, a checkpoint is saved, and the message says where; resumed from it, the weights are the same",
)
def test_interrupted_training(tmp_path, number):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    train(arguments(tmp_path / "whole", **options))
    folder = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(arguments(folder, **options), At(4, lambda: os.kill(os.getpid(), number)))
    assert stop.value.signal == number
    assert str(stop.value).startswith(f"interrupted; {folder / 'checkpoint-4'} is saved, ")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    resume(folder, At(4, lambda: pytest.fail("step 4 is trained again")), **options)
    assert is_as(folder, tmp_path / "whole")


@fault(
    Guard(FOLDER, "                raise Interrupted(signal=number)\n", "                return\n"),
    Guard(FOLDER, "                except KeyboardInterrupt as stop:", "                except GeneratorExit as stop:"),
    cause="Ctrl-C twice, or before anything was saved",
    place="training",
    promise="it ends at once, and the message says that nothing was saved",
)
def test_interrupted_twice(tmp_path):
    reached = []

    def press():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)

    with pytest.raises(Interrupted, match="nothing was saved yet"):
        train(arguments(tmp_path / "run"), At(1, press))
    assert not reached
    assert not list(tmp_path.glob("run/checkpoint-*"))


@fault(
    Guard(FOLDER, "if names := missing + load_result.unexpected_keys:", "if names := []:"),
    Guard(FOLDER, 'if "loading state_dict" not in str(error):', "if True:"),
    cause="a whole checkpoint, but of another model",
    place="empcause train --resume_from_checkpoint FOLDER",
    promise="it is refused; no weight stays at its random start",
)
def test_checkpoint_of_another_model(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("empcause.training.common.check_same", lambda *_: None)  # which sees it first, by the options
    checkpoint = str(stopped / "checkpoint-4")
    with pytest.raises(UserError, match="other shapes"):
        train(arguments(tmp_path / "wider", resume_from_checkpoint=checkpoint), width=16)
    from safetensors.torch import load_file, save_file

    tensors = load_file(stopped / "checkpoint-4" / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, stopped / "checkpoint-4" / "model.safetensors", {"format": "pt"})
    seal(stopped / "checkpoint-4", "checkpoint")
    with pytest.raises(UserError, match=r"c_fc\.weight is missing"):
        train(arguments(tmp_path / "fewer", resume_from_checkpoint=checkpoint))
