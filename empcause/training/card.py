"""The model card: what a training writes about the model that it made."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from transformers import TrainingArguments

from empcause.data.origin import Origin
from empcause.text import code, markdown

if TYPE_CHECKING:
    from empcause.training.common import StageTrainer

# Settings of transformers' Trainer that affect the model; the stages' own settings are all shown.
_SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm per_device_train_batch_size "
    "gradient_accumulation_steps label_smoothing_factor bf16 fp16 seed data_seed"
).split()
# Options that are not shown as settings: paths of the machine, and what the card says in its sentences.
_NOT_SETTINGS = {
    "data",
    "model_name_or_path",
    "tokenizer_name",
    "model_type",
    "config_overrides",
    "extractor",
    "reasoner",
    "emotion_lexicon",
    "adjectives",
    "embeddings",
    "overwrite_output_dir",
}


def model_card(
    trainer: "StageTrainer", metrics: Mapping[str, float], title: str, abilities: str, trained_on: str, origin: Origin
) -> str:
    """Write the card of a finished model.

    Args:
        trainer: the trainer after `train`.
        metrics: figures of the final evaluation, by name.
        title: what the model is.
        abilities: sentences about what it does.
        trained_on: how many texts it learned from and was validated on, as a part of a sentence.
        origin: the data that these texts are from.

    Returns:
        Markdown with the front matter that the Hugging Face Hub reads.
    """
    args = trainer.args
    own = [field.name for field in fields(args) if field.name not in TrainingArguments.__dataclass_fields__]
    hidden = _NOT_SETTINGS | ({"per_device_train_batch_size"} if getattr(args, "tokens_per_batch", None) else set())
    settings = {name: getattr(args, name) for name in (*_SETTINGS, *own) if name not in hidden}
    settings["processes"] = args.world_size
    about: dict[str, object] = {"license": origin.licence, "library_name": "empcause"}
    if origin.languages:
        about["language"] = list(origin.languages)
    front = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {title}",
        abilities,
        f"{_start(trainer)} with empcause on {origin.name} ({origin.terms}): {trained_on}. {_length(trainer)}",
        _table("metric on the validation texts", {name: f"{value:.4g}" for name, value in metrics.items()}),
        _table("setting", {name: _value(value) for name, value in settings.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def _start(trainer: "StageTrainer") -> str:
    base = getattr(trainer.args, "model_name_or_path", None)
    if base:
        return f"Fine-tuned from {code(_name(base))}, whose licence applies as well,"
    kind = getattr(trainer.args, "model_type", None) or trainer.model.config.model_type
    return f"Trained from nothing ({kind}, {trainer.model.num_parameters():,} parameters)"


def _name(path: str) -> str:
    """A model's name on the hub, or the name of its folder without the path to it."""
    return Path(path).resolve().name if Path(path).exists() else path


def _length(trainer: "StageTrainer") -> str:
    args, state = trainer.args, trainer.state
    said = f"It trained for {state.global_step:,} optimiser steps ({state.epoch or 0:.3g} epochs)"
    if state.global_step < state.max_steps:
        said += f" of {state.max_steps:,} planned, as the validation {args.metric_for_best_model} no longer got better"
    if args.load_best_model_at_end and state.best_global_step:
        said += f"; the weights are those of step {state.best_global_step:,}, the best of them"
    return f"{said}."


def _value(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else markdown(str(getattr(value, "value", value)))


def _table(what: str, values: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    return f"| {what} | value |\n|---|---|\n{rows}"
