"""A training of a fraction of a second that has what a real one has: dropout, evaluation, checkpoints, an output folder."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from empcause.training.common import PretrainedStageArguments, StageTrainer
from empcause.training.fingerprint import digest
from empcause.training.folder import find_checkpoint, in_output_folder, save_finished

ITEMS = [{"input_ids": [start % 16, start // 2, 3, 1], "labels": [start % 16, start // 2, 3, 1]} for start in range(12)]


@dataclass
class Arguments(PretrainedStageArguments):
    figures: ClassVar = ("loss",)
    higher_is_better: ClassVar = False


class SmallTrainer(StageTrainer):
    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        model.eval()
        with torch.inference_mode():
            return {"loss": float(model(**collate(dataset)).loss)}


def arguments(folder: Path, **options: object) -> Arguments:
    """Six steps of three per epoch, a checkpoint after each second one; the best one ends in `folder`."""
    defaults = dict(
        model_name_or_path="gpt2", per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.6, logging_steps=1,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, save_total_limit=20,
        metric_for_best_model="loss", disable_tqdm=True, use_cpu=True, seed=5,
    )  # fmt: skip
    return Arguments(output_dir=str(folder), **(defaults | options))


def collate(items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Items as one batch."""
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


class Tokenizer:
    """Of a finished model's files, the one that a tokenizer leaves."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@in_output_folder("empcause train generator")
def train(args: Arguments, *callbacks: TrainerCallback, width: int = 8) -> None:
    """What `train_generator` does, with another model and other data."""
    checkpoint = find_checkpoint(args)
    torch.manual_seed(args.seed)
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=width, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
    config.loss_type = "ForCausalLM"
    trainer = SmallTrainer(
        model=GPT2LMHeadModel(config), args=args, train_dataset=ITEMS, eval_dataset=ITEMS[:4], data_collator=collate,
        callbacks=list(callbacks), made_from={"set of training data": digest(ITEMS)},
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a fork: with more threads, sums may be rounded otherwise
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        torch.set_num_threads(threads)
    trainer.processing_class = Tokenizer()
    save_finished(trainer, {"loss": trainer.state.best_metric}, "A model.\n")


def weights(folder: Path) -> bytes:
    """The weights of a finished model or a checkpoint, bit for bit."""
    return (folder / "model.safetensors").read_bytes()


class At(TrainerCallback):
    """Calls a function at the end of a step, before anything of this step is saved."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def start(function: Callable[[], object]) -> int:
    """Run a function in a fork of this process, which costs no import; the fork's number.

    It ends with 0, or with 1 after an exception, which is printed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the pool are not in the fork
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def in_a_process(function: Callable[[], object]) -> int:
    """The exit status of a function in a fork of this process: minus a signal's number, 0 or 1."""
    return os.waitstatus_to_exitcode(os.waitpid(start(function), 0)[1])


def killed_at(folder: Path, moment: int, function: Callable[[], object]) -> int:
    """As `in_a_process`, but SIGKILL ends the process when it opens, makes, renames or removes something in a folder for the
    `moment`-th time."""

    def run() -> None:
        left = moment

        def count(event: str, values: tuple) -> None:
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate") and str(
                values[0]
            ).startswith(str(folder)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        function()

    return in_a_process(run)
