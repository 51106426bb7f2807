"""What both stages share: models from a folder or from nothing, the Trainer's habits, the finished model's folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from empcause.checkpoints import check_weights
from empcause.data.batching import LengthBatchSampler
from empcause.errors import UserError
from empcause.hub import not_found, reach_hub
from empcause.training.folder import CheckpointedTrainer, save_finished

# Files of a tokenizer's folder that say of which class it is.
_NAMING_FILES = ("tokenizer_config.json", "tokenizer.json", "config.json")


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Options that both stages have, with the settings of the paper's Table 4 that both share.

    `metric_for_best_model` is what early stopping, the plateau scheduler and the choice of the best checkpoint watch.
    """

    data: str | None = field(
        default=None, metadata={"help": "folder or archive of the data, or `sample`; default $EMPCAUSE_DATA_DIR"}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "pretrained model, by name or folder; empty: from nothing, see model_type"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, if it is not the model's own"})
    model_type: str | None = field(
        default=None, metadata={"help": "architecture of a model made from nothing, e.g. roberta, gpt2, llama"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "its sizes, e.g. n_embd=384,n_layer=6,n_head=6"}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "evaluations without a better figure before training ends; 0: never"}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "initial learning rate of AdamW"})
    lr_scheduler_type: str = field(default="reduce_lr_on_plateau", metadata={"help": "learning rate schedule"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: epoch, steps or no"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: epoch, steps or no"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, the best among them"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "end with the best checkpoint"})
    logging_steps: float = field(default=20, metadata={"help": "steps between two logged losses"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what an earlier training left in output_dir"}
    )
    report_to: str | None = field(default="none", metadata={"help": "none, tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        if self.model_name_or_path and self.config_overrides:
            raise ValueError("config_overrides shapes a model made from nothing; leave model_name_or_path empty.")
        if not self.model_name_or_path and not self.model_type:
            raise ValueError("give model_name_or_path (a pretrained model) or model_type (one made from nothing).")
        if not self.model_name_or_path and not self.tokenizer_name:
            raise ValueError("a model made from nothing needs tokenizer_name.")
        for name in ("model_name_or_path", "tokenizer_name"):
            _check_local(name, getattr(self, name))
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and not self.lr_scheduler_kwargs:
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs: Any = {"mode": mode, "factor": 0.5, "patience": 1}
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise bf16 is refused where there is no GPU
        super().__post_init__()


def _check_local(name: str, value: str | None) -> None:
    """A value that looks like a path must exist; anything else is a name on the model hub."""
    if value and (value.startswith((".", "/", "~")) or value.count("/") > 1) and not Path(value).expanduser().exists():
        raise ValueError(f"{name} {value!r} does not exist.")


def load_tokenizer(args: StageTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name.

    Raises:
        UserError: it cannot be found or has no character offsets.
    """
    name = args.tokenizer_name or args.model_name_or_path
    assert name is not None
    # A folder with nothing but a vocabulary does not say whose it is; then it is that of the architecture asked for.
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


def load_config(args: StageTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the named model, or of a new one of `model_type` with `config_overrides`.

    Raises:
        UserError: unknown model, type or key.
    """
    if args.model_name_or_path:
        reach_hub(args.model_name_or_path)
        try:
            config = AutoConfig.from_pretrained(args.model_name_or_path)
        except (OSError, ValueError) as error:
            raise not_found("model", args.model_name_or_path, error) from error
        if Path(args.model_name_or_path).is_dir():
            check_weights(args.model_name_or_path)
        return config
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(args.model_type, vocab_size=len(tokenizer), **ids)
        config.update_from_string(args.config_overrides or "")
    except ValueError as error:
        raise UserError(f"Cannot make a model of type {args.model_type!r}: {_one_line(error)}") from error
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class StageTrainer(CheckpointedTrainer):
    """The Trainer with length-bucketed batches, and early stopping as the options say.

    Args:
        lengths: tokens per training item.
        phases: index sets trained one after another within an epoch.
        **kwargs: see `transformers.Trainer`.
    """

    def __init__(self, *, lengths: Sequence[int], phases: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batches = LengthBatchSampler(
            lengths, self.args.per_device_train_batch_size, self.args.data_seed or self.args.seed, phases
        )
        if self.args.early_stopping_patience and self.args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def get_train_dataloader(self) -> DataLoader:
        """Batches of similar length in a repeatable order."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def report_evaluation(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Log figures of an evaluation under `prefix_` and tell the callbacks, as `Trainer.evaluate` does."""
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named


def finish(trainer: StageTrainer, metrics: dict[str, float], card: str) -> dict[str, float]:
    """Save the model with `save_pretrained`, its tokenizer, metrics, training history and model card.

    Args:
        trainer: after `train`; holds the best model.
        metrics: figures of the final evaluation.
        card: text of the model card.

    Returns:
        `metrics`.
    """
    if trainer.is_world_process_zero():
        save_finished(trainer, metrics, card)
    return metrics


def set_environment() -> None:
    """Fast tokenizers fork-safe, before any worker starts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
