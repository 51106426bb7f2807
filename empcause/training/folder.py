"""The output folder of a training: who may train there, its checkpoints, and the finished model."""

import json
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from empcause.checkpoints import weight_files
from empcause.errors import Interrupted, UserError
from empcause.files import sync
from empcause.outputs import (
    CHECKPOINT,
    RECORD,
    Record,
    check_ours,
    claim,
    read_record,
    remove_made,
    seal,
    verify,
    why_not_written,
    working_in,
    write_record,
)

if TYPE_CHECKING:
    from empcause.training.common import StageTrainer, StageTrainingArguments

logger = logging.get_logger(__name__)

Training = TypeVar("Training", bound=Callable[..., Any])

STATE = "trainer_state.json"
STAGING = ".saving"
SHARED = "give a folder on a file system that they share"
RESUME = "`empcause train` with --resume_from_checkpoint true"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Names of everything that a training writes into its folder.
_WRITTEN = re.compile(
    r"checkpoint-\d+|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|README\.md|metrics\.json|"
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|trainer_state)\.json|"
    r"chat_template\.jinja|merges\.txt|vocab\.txt"
)


def in_output_folder(made_by: str) -> Callable[[Training], Training]:
    """Decorate a training, so that no other process works in its output folder and an early end says what is saved.

    Args:
        made_by: the command, for the folder's record.

    The decorated function also raises:
        UserError: another process trains there; the folder holds something else, or an earlier training and neither
            `resume_from_checkpoint` nor `overwrite_output_dir` is given; the disk is full.
        Interrupted: Ctrl-C or SIGTERM.
    """

    def decorate(train: Training) -> Training:
        @wraps(train)
        def run(args: "StageTrainingArguments", *others: Any, **options: Any) -> Any:
            if not args.should_save:  # one of several processes writes
                return train(args, *others, **options)
            folder = Path(str(args.output_dir))
            with working_in(folder):
                _check_free(args, folder, made_by)
                try:
                    return train(args, *others, **options)
                except KeyboardInterrupt as stop:
                    number = getattr(stop, "signal", signal.SIGINT)
                    raise Interrupted(f"interrupted; {_what_is_saved(folder)}.", number) from stop
                except (OSError, RuntimeError, SafetensorError) as error:
                    if (reason := why_not_written(error)) is None:
                        raise
                    raise UserError(f"The training stopped ({reason}); {_what_is_saved(folder)}.") from error

        return cast(Training, run)

    return decorate


def _check_free(args: "StageTrainingArguments", folder: Path, made_by: str) -> None:
    """Refuse a folder in which something would be overwritten that this command did not make, or was not told to overwrite."""
    wanted = _wanted(args)
    if wanted and args.overwrite_output_dir:
        raise UserError("resume_from_checkpoint goes on from what overwrite_output_dir removes; give one of them.")
    # The user may have put a checkpoint here to resume from it.
    brought = [path.name for path in _checkpoints(folder) if wanted and (path / RECORD).exists()]
    record = check_ours(folder, made_by, _WRITTEN, brought)
    found = any(map(_WRITTEN.fullmatch, os.listdir(folder)))
    if args.overwrite_output_dir:
        for name in ("model_name_or_path", "tokenizer_name", "extractor"):
            if (value := getattr(args, name, None)) and Path(value).resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{name} is in output_dir, where overwrite_output_dir removes it; choose another folder."
                )
    elif found and not (wanted == "true" or (wanted and Path(wanted).resolve().parent == folder.resolve())):
        raise UserError(
            f"output_dir {folder} has an earlier training; --resume_from_checkpoint true goes on with it, "
            "--overwrite_output_dir true removes it."
        )
    write_record(folder, record)


def _wanted(args: "StageTrainingArguments") -> str | None:
    """What to resume from: a folder, "true" or None."""
    wanted = str(args.resume_from_checkpoint or "false")
    return {"true": "true", "false": None}.get(wanted.lower(), wanted)


def _what_is_saved(folder: Path) -> str:
    saved = [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / RECORD).exists()]
    return f"{saved[-1]} is saved, and {RESUME} goes on from there" if saved else "nothing was saved yet"


def _checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, whole or not, by step."""
    found = {match: path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()}
    return [path for match, path in sorted(found.items(), key=lambda item: int(item[0][1]))]


def find_checkpoint(args: "StageTrainingArguments") -> str | None:
    """Find the checkpoint to resume from: the named folder, or the newest whole one in output_dir (if told `true`), or None.

    In output_dir, a checkpoint that is not whole, or whose best checkpoint is not, is passed over with a warning.

    Raises:
        UserError: the named checkpoint is missing or not whole, or the processes of a training find different ones.
    """
    found = _find(args)
    if _wanted(args) is not None and len(set(gather_object([found and Path(found).name]))) > 1:
        raise UserError(f"The processes find different checkpoints to go on from; {SHARED}.")
    return found


def _find(args: "StageTrainingArguments") -> str | None:
    """Find the checkpoint to resume from, as this process sees the file system."""
    wanted = _wanted(args)
    if wanted is None:
        return None
    if wanted != "true":
        check_checkpoint(Path(wanted), args.load_best_model_at_end)
        return wanted
    folder = Path(str(args.output_dir))
    for checkpoint in reversed(_checkpoints(folder) if folder.is_dir() else []):
        try:
            check_checkpoint(checkpoint, args.load_best_model_at_end)
            return str(checkpoint)
        except UserError as error:
            logger.warning(f"{checkpoint} is passed over: {error}")
    logger.warning(f"{folder} has no checkpoint to go on from: the training starts at its beginning.")
    return None


def check_checkpoint(folder: Path, with_best: bool) -> None:
    """Check that a training can resume from a checkpoint: it is as it was saved, and reading it runs no code.

    Args:
        folder: folder of the checkpoint.
        with_best: whether the best checkpoint until then is needed too.

    Raises:
        UserError: the checkpoint, or the best checkpoint that it names, is missing, damaged or unsafe to read.
    """
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: the folder {folder} does not exist.")
    record = read_record(folder)
    if record is not None and record.made_by != CHECKPOINT:
        raise UserError(
            f"{folder} is no checkpoint; name one of its folders checkpoint-*, or give true for the last one."
        )
    if record is None:
        raise UserError(f"{folder} has no {RECORD}: its saving was cut short.")
    verify(folder)
    weight_files(folder)
    if not (folder / "scheduler.pt").exists():
        raise UserError(f"{folder} has weights alone (save_only_model); a training cannot go on from it.")
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{file} holds more than numbers, and reading it could run code; it is not read."
            ) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(f"{file} is damaged.") from error
    try:
        best = json.loads((folder / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / STATE} is damaged.") from error
    best = _beside(folder, best or folder.name)
    if with_best and best != folder and verify(best) is None:
        raise UserError(f"the best checkpoint until then, {best}, is missing or was cut short.")


def _beside(folder: Path, best: str) -> Path:
    """Path of the best checkpoint, which lies beside the others even if the output folder was moved."""
    return folder.parent / Path(best).name


class _Stop(TrainerCallback):
    """Ends a training at a first Ctrl-C or SIGTERM after the current step, with a checkpoint; at a second one, at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals until the block ends. In other threads than the main one, Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # this is a data-loading worker, which the trainer ends
                return
            if self.signal is not None:
                raise Interrupted(signal=number)
            self.signal = number
            os.write(
                2, b"\nInterrupted: the current step ends, then a checkpoint is saved. Once more to leave at once.\n"
            )

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after a signal. Several processes get it at different times, but stop at the same step."""
        stops = self.signal is not None
        if args.world_size > 1:
            one = torch.tensor(int(stops), device=args.device)
            distributed.all_reduce(one, distributed.ReduceOp.MAX)
            if one.item() and not stops:
                self.signal = signal.SIGTERM
            stops = bool(one)
        if stops:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip the evaluation when a training stops within an epoch: the resumed training evaluates at the epoch's end."""
        if self.signal is not None and state.epoch % 1 != 0:
            control.should_evaluate = control.should_save = control.should_log = False


class CheckpointedTrainer(Trainer):
    """transformers' Trainer whose checkpoints are whole or known not to be, and which saves one when it is interrupted.

    Attributes:
        about: what a checkpoint's record says about its training, for a resumed one to compare (`read_record(...).about`).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.about: Mapping[str, Any] = {}
        self._stop = _Stop()
        self.add_callback(self._stop)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does, but keep older checkpoints until a new one is whole, and stop at a signal.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.should_save and self.args.overwrite_output_dir and (record := read_record(folder)) is not None:
            remove_made(folder)
            write_record(folder, Record(record.made_by))
        # The Trainer would remove older checkpoints before the new one is on the disk.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._save_total_limit = limit
        try:
            with self._stop.listening():
                result = super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self._stop.signal is not None:
            raise Interrupted(signal=self._stop.signal)
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            claim(output, folder.name)
            if folder.is_dir():
                remove_made(folder)
        self.accelerator.wait_for_everyone()  # what other processes write there must not be removed
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._check_shared(folder)
                seal(folder, CHECKPOINT, self.about)
        except BaseException:
            if self.args.should_save and folder.is_dir():
                with suppress(OSError):
                    remove_made(folder)
                    folder.rmdir()
            raise
        if self.args.should_save:
            self._remove_older(output, folder)
        self.accelerator.wait_for_everyone()  # another process must not read a checkpoint that has no record yet

    def _check_shared(self, folder: Path) -> None:
        """Refuse a checkpoint that lacks a process' random state, because that process wrote it to another node's disk."""
        if self.args.world_size == 1 or self.args.save_only_model:
            return
        if any(not (folder / f"rng_state_{rank}.pth").exists() for rank in range(self.args.world_size)):
            raise UserError(f"output_dir {self.args.output_dir} is not the same folder on all nodes; {SHARED}.")

    def _remove_older(self, output: Path, newest: Path) -> None:
        """Keep at most `save_total_limit` checkpoints, the newest and the best among them, and none that is incomplete."""
        made = (read_record(output) or Record("")).files
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        older = [path for path in _checkpoints(output) if path.name in made and path.name not in kept]
        whole = [path for path in older if (path / RECORD).exists()]
        limit = self._save_total_limit
        spare = whole[: max(0, len(whole) + len(kept) - limit)] if limit and limit > 0 else []
        for path in older:
            if path in spare or path not in whole:
                remove_made(path)
                with suppress(OSError):  # where something else is in it
                    path.rmdir()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise UserError(f"{resume_from_checkpoint} is of another model: its weights have other shapes.") from error

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(*args, **kwargs)
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)  # the output folder may have been moved
        return result

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", ()))
        missing = [name for name in load_result.missing_keys if name not in tied]
        if names := missing + load_result.unexpected_keys:
            raise UserError(
                f"The checkpoint is of another model: {names[0]} is {'missing' if missing else 'not a weight of this one'}."
            )

    def _load_best_model(self) -> None:
        if self._stop.signal is not None:
            return  # the training goes on later
        try:
            verify(self.state.best_model_checkpoint)
        except UserError as error:
            raise UserError(f"The best checkpoint is damaged: {str(error)[:-1]}; {RESUME} makes it anew.") from error
        super()._load_best_model()


def save_finished(trainer: "StageTrainer", metrics: Mapping[str, float], card: str) -> None:
    """Write the finished model, its tokenizer, training history, `metrics.json` and model card to the output folder.

    They are written to a folder inside it first, so that an earlier model stays until the new one is whole.

    Args:
        trainer: the trainer after `train`, with the best model.
        metrics: figures of the final evaluation.
        card: text of the model card, in Markdown.

    Raises:
        OSError, SafetensorError: the disk is full or fails.
    """
    folder = Path(str(trainer.args.output_dir))
    staging = folder / STAGING
    claim(folder, STAGING)
    staging.mkdir(exist_ok=True)
    remove_made(staging)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(staging)
    trainer.processing_class.save_pretrained(staging)
    trainer.state.save_to_json(str(staging / STATE))
    (staging / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (staging / "README.md").write_text(card, encoding="utf-8")
    seal(staging, "model")
    new, old = read_record(staging), read_record(folder)
    assert new is not None
    assert old is not None
    write_record(folder, Record(old.made_by, old.files | new.files, dict(trainer.about)))
    for name in new.files:
        (staging / name).replace(folder / name)
    (staging / RECORD).unlink()
    staging.rmdir()
    sync(folder)
