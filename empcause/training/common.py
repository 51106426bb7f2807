"""What all trainings share: their options, tokenizers and configurations, and the trainer."""

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames

from empcause.checkpoints import check_model_weights
from empcause.data.batching import EpochBatchSampler, LengthBatchSampler
from empcause.errors import UserError
from empcause.hub import not_found, reach_hub
from empcause.outputs import read_record
from empcause.ranges import NOT_NEGATIVE, Range, check_values
from empcause.training.filling import FilledBatches, FilledDataset
from empcause.training.fingerprint import check_same, fingerprint
from empcause.training.folder import CheckpointedTrainer, save_finished
from empcause.training.settings import OPTIMIZERS, RANGES, REFUSED, WITHOUT_OPTIONS, WITHOUT_WARMUP, WORKING

Item = TypeVar("Item")

# Files in a tokenizer's folder that tell the class of the tokenizer.
_NAMING_FILES = ("tokenizer_config.json", "tokenizer.json", "config.json")


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Options that every training has; the defaults are those settings of the paper's Table 4 that both stages share.

    Early stopping, the plateau scheduler and the choice of the best checkpoint watch `metric_for_best_model`.

    Attributes:
        figures: names of the figures that an evaluation of the stage measures.
        higher_is_better: whether a higher figure is better.
        ranges: allowed range of each numeric option, by its name.
        refused: options that must keep their default, by name, with the reason.

    Raises:
        UserError: a value is out of range, or an option or a combination would not do what it says.
    """

    figures: ClassVar[tuple[str, ...]]
    higher_is_better: ClassVar[bool]
    ranges: ClassVar[dict[str, Range]] = RANGES | {"early_stopping_patience": NOT_NEGATIVE}
    refused: ClassVar[dict[str, str]] = REFUSED

    data: str | None = field(
        default=None,
        metadata={"help": "folder or archive of the data, a corpus' name, or `sample`; default $EMPCAUSE_DATA_DIR"},
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "end after this many evaluations without a better figure; 0: never end early"}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "initial learning rate of the optimiser"})
    lr_scheduler_type: str = field(default="reduce_lr_on_plateau", metadata={"help": "learning rate schedule"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: epoch, steps or no"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: epoch, steps or no"})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "number of checkpoints that are kept, the best one among them"}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "use the best checkpoint as the finished model"}
    )
    logging_steps: float = field(default=20, metadata={"help": "number of optimiser steps between two logged losses"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what an earlier training left in output_dir"}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "without effect: a loss that is not finite ends the training"}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "a resumed run remembers how long it has seen no better figure"}
    )
    greater_is_better: bool | None = field(default=None, metadata={"help": "follows from metric_for_best_model"})
    report_to: str | None = field(
        default="none", metadata={"help": "where losses and figures are logged: none, tensorboard, wandb, ..."}
    )

    def to_json_string(self) -> str:
        """The options as JSON without HTML, links or pictures, because TensorBoard shows it as Markdown."""
        return super().to_json_string().replace("<", r"\u003c").replace("](", r"]\u0028")

    def __post_init__(self) -> None:
        self._check_settings()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise bf16 is refused where there is no GPU
        if self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}  # a copy to the GPU is not waited for
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise UserError(_one_line(error)) from error
        self._check_schedule()
        self._check_strategies()

    def _check_settings(self) -> None:
        """Refuse values out of range, options that would be ignored or have another effect, and unknown figures."""
        check_values(self, self.ranges)
        inherited = {each.name for each in fields(TrainingArguments)}
        for each in fields(self):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            value = getattr(self, each.name)
            if value == default or not (value or default) or each.name not in inherited:
                continue
            if each.name in self.refused:
                raise UserError(f"{each.name} cannot be used here: {self.refused[each.name]}.")
            if each.name not in self.ranges.keys() | WORKING:
                raise UserError(f"{each.name} is newer than this version of empcause; leave it out.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserError(f"max_steps is {self.max_steps}; expected at least 1, or -1 to count epochs instead.")
        if (optimizer := OptimizerNames(self.optim).value) not in OPTIMIZERS:
            raise UserError(f"optim is {optimizer}; those that work here are {', '.join(OPTIMIZERS)}.")
        figure = str(self.metric_for_best_model).removeprefix("eval_")
        if figure not in self.figures:
            raise UserError(f"metric_for_best_model is {figure!r}; expected one of {', '.join(self.figures)}.")
        better = "higher" if self.higher_is_better else "lower"
        if self.greater_is_better not in (None, self.higher_is_better):
            raise UserError(f"greater_is_better is {self.greater_is_better}, but a {better} {figure} is better.")
        self.greater_is_better = self.higher_is_better

    def _check_schedule(self) -> None:
        """Make the schedule watch its figure in the right direction, and refuse options that it does not have."""
        kind, given = SchedulerType(self.lr_scheduler_type).value, self.lr_scheduler_kwargs or {}
        if kind in WITHOUT_WARMUP and self.warmup_steps:
            raise UserError(
                f"lr_scheduler_type {kind} has no warm-up; leave out warmup_steps, or choose linear or cosine."
            )
        if kind in WITHOUT_OPTIONS and given:
            raise UserError(f"lr_scheduler_type {kind} takes no lr_scheduler_kwargs.")
        if kind in ("reduce_lr_on_plateau", "greedy"):
            mode = "max" if self.higher_is_better else "min"
            if given.get("mode", mode) != mode:
                raise UserError(
                    f"lr_scheduler_kwargs: mode is {given['mode']!r}; {self.metric_for_best_model} needs {mode!r}."
                )
            defaults = {"factor": 0.5, "patience": 1} if kind == "reduce_lr_on_plateau" else {}
            self.lr_scheduler_kwargs: Any = {"mode": mode} | defaults | given
        try:
            get_scheduler(kind, torch.optim.SGD([torch.zeros(1)]), 0, 10, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"lr_scheduler_kwargs do not fit lr_scheduler_type {kind}: {_one_line(error)}") from error

    def _check_strategies(self) -> None:
        """Refuse checkpoints from which a run could not be resumed to the same end, and several GPUs in one process."""
        strategies = (self.eval_strategy, self.save_strategy)
        if strategies == ("epoch", "steps"):
            raise UserError(
                "save_strategy steps may save at the end of an epoch before that is evaluated; with eval_strategy epoch "
                "give save_strategy epoch."
            )
        if self.load_best_model_at_end and strategies == ("steps", "steps") and self.eval_steps != self.save_steps:
            raise UserError(
                f"save_steps is {self.save_steps} and eval_steps {self.eval_steps}: the best model may be one that is not "
                "saved; give the same number, or load_best_model_at_end false."
            )
        if self.fp16 and self.device.type == "cpu":
            raise UserError("fp16 needs a GPU and would be ignored; bf16 works on a CPU.")
        if self.n_gpu > 1:
            raise UserError(
                f"There are {self.n_gpu} GPUs; start the command with torchrun, or choose one with CUDA_VISIBLE_DEVICES."
            )


@dataclass
class PretrainedStageArguments(StageTrainingArguments):
    """Options of a stage whose model is one of transformers, pretrained or new, with that model's tokenizer.

    Raises:
        ValueError: the options name no model or no tokenizer, or a folder that does not exist.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "pretrained model to start from, by name or folder; empty: a new model of model_type"},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer, by name or folder; default: that of model_name_or_path"}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "architecture of a new model, e.g. roberta, gpt2, llama"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "sizes of a new model, e.g. n_embd=384,n_layer=6,n_head=6"}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.config_overrides:
            raise ValueError(
                "config_overrides sets the sizes of a new model; leave model_name_or_path empty to make one."
            )
        if not self.model_name_or_path and not self.model_type:
            raise ValueError("give model_name_or_path (a pretrained model) or model_type (a new model).")
        if not self.model_name_or_path and not self.tokenizer_name:
            raise ValueError("a new model needs tokenizer_name, the name or folder of a tokenizer.")
        for name in ("model_name_or_path", "tokenizer_name"):
            _check_local(name, getattr(self, name))
        super().__post_init__()


def _check_local(name: str, value: str | None) -> None:
    """Refuse a value that looks like a path and does not exist; anything else is a name on the model hub."""
    if value and (value.startswith((".", "/", "~")) or value.count("/") > 1) and not Path(value).expanduser().exists():
        raise ValueError(f"{name} {value!r} does not exist.")


def load_tokenizer(args: PretrainedStageArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the options name.

    Raises:
        UserError: it cannot be found, or it gives no character offsets.
    """
    name = args.tokenizer_name or args.model_name_or_path
    assert name is not None
    # A folder that holds a vocabulary alone does not tell the class of its tokenizer; then it is that of `model_type`.
    unnamed = Path(name).is_dir() and not any((Path(name) / file).exists() for file in _NAMING_FILES)
    options = {"tokenizer_type": args.model_type} if unnamed and args.model_type else {}
    reach_hub(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise not_found("tokenizer", name, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer {name!r} has no fast version; character offsets are needed.")
    return tokenizer


def load_config(args: PretrainedStageArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Load the configuration of the named model, or make one of `model_type` with `config_overrides`.

    Args:
        args: the options.
        tokenizer: gives a new configuration the size of the vocabulary and the ids of special tokens.

    Raises:
        UserError: the model, the type or a key is unknown, or the named folder has no whole weights.
    """
    if args.model_name_or_path:
        reach_hub(args.model_name_or_path)
        try:
            config = AutoConfig.from_pretrained(args.model_name_or_path)
        except (OSError, ValueError) as error:
            raise not_found("model", args.model_name_or_path, error) from error
        if Path(args.model_name_or_path).is_dir():
            check_model_weights(args.model_name_or_path)
        return config
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(args.model_type, vocab_size=len(tokenizer), **ids)
        config.update_from_string(args.config_overrides or "")
    except ValueError as error:
        raise UserError(f"Cannot make a model of type {args.model_type!r}: {_one_line(error)}") from error
    return config


def draw_samples(items: Sequence[Item], number: int | None, seed: int) -> Sequence[Item]:
    """Draw `number` items in an order that the seed decides; for None, or where there are not more, they stay as they are."""
    if number is None or number >= len(items):
        return items
    chosen = np.random.default_rng(seed).permutation(len(items))[:number]
    return [items[index] for index in chosen]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class StageTrainer(CheckpointedTrainer):
    """transformers' Trainer with batches of its own, early stopping, and runs that resume to the same result.

    Args:
        made_from: digests of everything but the options that the result depends on, by name.
        phases: index sets of training items that are trained one after another within an epoch.
        **kwargs: arguments of `transformers.Trainer`; every training item has `input_ids`.

    Raises:
        UserError: transformers refuses the options, or `dataloader_drop_last` leaves no batch.
    """

    def __init__(
        self, *, made_from: Mapping[str, str | None], phases: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> None:
        try:
            super().__init__(**kwargs)
        except (ValueError, ImportError) as error:
            raise UserError(_one_line(error)) from error
        args = self.args
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(f"FSDP and DeepSpeed cannot be used here: {REFUSED['fsdp']}.")
        self.batches = self.make_batches(
            [len(item["input_ids"]) for item in self.train_dataset],
            args.seed if args.data_seed is None else args.data_seed,
            phases,
        )
        if not len(self.batches):
            raise UserError(
                f"There is no batch to train on: {len(self.train_dataset)} texts, per_device_train_batch_size "
                f"{args.per_device_train_batch_size}, dataloader_drop_last {args.dataloader_drop_last}."
            )
        if args.early_stopping_patience and args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.add_callback(_Progress(self.batches))
        self._losses = Losses(args.device)
        self.about = fingerprint(self, made_from)

    def make_batches(
        self, lengths: Sequence[int], seed: int, phases: Sequence[Sequence[int]] | None
    ) -> EpochBatchSampler:
        """Make the sampler of the training batches: of texts of similar length.

        Args:
            lengths: number of tokens of each training item.
            seed: seed of the batches' order.
            phases: index sets of training items that are trained one after another; None is one phase.
        """
        args = self.args
        size = args.per_device_train_batch_size
        return LengthBatchSampler(lengths, size, seed, phases, args.dataloader_drop_last)

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:  # type: ignore[override]
        """Train from the beginning, or continue from a checkpoint; if it is one of the end of a run, it is not trained further.

        Args:
            resume_from_checkpoint: folder of the checkpoint, or None.

        Raises:
            UserError: the checkpoint belongs to another training, or lies beyond the end of this one.
        """
        if resume_from_checkpoint is None:
            if self.args.world_size > 1:
                # With one seed, all processes would drop out the same elements.
                torch.manual_seed(self.args.seed + self.args.process_index)
            return super().train()
        record = read_record(resume_from_checkpoint)
        check_same(resume_from_checkpoint, record.about if record else {}, self.about)
        self.args.eval_on_start = False  # the figure at the start is in the history already
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
        epochs, steps, *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if state.global_step > max_steps:
            raise UserError(
                f"{resume_from_checkpoint} is beyond the end of this run, step {max_steps}; let it train longer."
            )
        best = f"checkpoint-{state.best_global_step}"
        if (
            self.args.load_best_model_at_end
            and state.best_global_step
            and Path(str(state.best_model_checkpoint)).name != best
        ):
            raise UserError(f"The best model until then was not saved as {best}; give load_best_model_at_end false.")
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        patience = self.args.early_stopping_patience or math.inf
        if state.global_step < max_steps and stopping.get("early_stopping_patience_counter", 0) < patience:
            return super().train(resume_from_checkpoint)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._init_training_state(max_steps, steps, epochs, resume_from_checkpoint, None)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, math.nan, {})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the forward and the backward pass of one batch.

        Returns:
            The loss, 0-d.

        Raises:
            UserError: the loss is not finite, or on a GPU that of the batch before, because nobody waits for this one there.
        """
        loss = super().training_step(*args, **kwargs)
        step = self._losses.find_diverged(loss, self.state.global_step)
        if step is not None:
            raise self._diverged("the loss", step)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the stage's figures, log them under the prefix, and tell the callbacks as `Trainer.evaluate` does.

        Returns:
            The figures by their prefixed names.

        Raises:
            UserError: a weight or a figure is not finite.
        """
        self._require_finite_parameters()
        metrics = self.measure(self.accelerator.unwrap_model(self.model), eval_dataset or self.eval_dataset)
        if not all(map(math.isfinite, metrics.values())):
            raise self._diverged("a figure of the evaluation", self.state.global_step)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure the figures that the stage's options name in `figures`, on a validation set."""
        raise NotImplementedError

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._require_finite_parameters()
        super()._save_checkpoint(*args, **kwargs)

    def _require_finite_parameters(self) -> None:
        if not all(weights.isfinite().all() for weights in self.model.parameters()):
            raise self._diverged("a weight", self.state.global_step)

    def _diverged(self, what: str, step: int) -> UserError:
        return UserError(
            f"The training diverged: {what} is not finite at step {step}. Give a lower learning_rate or "
            f"max_grad_norm; checkpoints in {self.args.output_dir} are from before."
        )

    def get_train_dataloader(self) -> DataLoader:
        """A loader of this process's share of the sampler's batches, in a repeatable order."""
        args = self.args
        loader = DataLoader(
            FilledDataset(self.train_dataset),
            batch_sampler=FilledBatches(self.batches, args.world_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            generator=torch.Generator(),  # the workers' seeds are not drawn from the numbers that dropout uses
        )
        return self.accelerator.prepare(loader)


class Losses:
    """Finds losses that are not finite.

    A GPU works on a batch while the next one is prepared, which looking at a loss at once would end. There the loss is copied,
    and the copy is read when the work of the next batch has been queued.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: deque[tuple[torch.Tensor, torch.Event | None, int]] = deque()

    def find_diverged(self, loss: torch.Tensor, step: int) -> int | None:
        """Return the step of a loss that is not finite: this one's on a CPU, that of the loss before on a GPU; else None.

        Args:
            loss: the loss of a batch, 0-d.
            step: the optimiser step of this batch.
        """
        finite, copied = torch.isfinite(loss).to("cpu", non_blocking=True), None
        on_cpu = self._device.type == "cpu"
        if not on_cpu:
            copied = torch.Event(self._device)
            copied.record()
        self._copies.append((finite, copied, step))
        if not on_cpu and len(self._copies) == 1:
            return None
        finite, copied, step = self._copies.popleft()
        if copied is not None:
            copied.synchronize()
        return None if finite else step


class _Progress(TrainerCallback):
    """Tells the sampler the epoch, and makes a resumed run log, evaluate and save when its own options say."""

    def __init__(self, batches: EpochBatchSampler) -> None:
        self.batches = batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.set_epoch(int(state.epoch or 0))


def finish(trainer: StageTrainer, metrics: dict[str, float], card: str) -> dict[str, float]:
    """Save the model with `save_pretrained`, its tokenizer, metrics, training history and model card.

    Args:
        trainer: the trainer after `train`, with the best model.
        metrics: figures of the final evaluation.
        card: text of the model card.

    Returns:
        `metrics`.

    Raises:
        OSError, SafetensorError: the disk is full or fails.
    """
    if trainer.is_world_process_zero():
        save_finished(trainer, metrics, card)
    return metrics


def set_environment() -> None:
    """Make fast tokenizers safe for the forked workers of a data loader; call it before any worker starts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
