"""Everything that the result of a training depends on: saved with every checkpoint, and compared before one is resumed."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from empcause.errors import UserError
from empcause.training.settings import ENDLESS, REFUSED

if TYPE_CHECKING:
    from empcause.training.common import StageTrainer

# Options that may differ in a resumed run. Some name a file whose content is compared instead; the others decide where a run
# works, what it shows and what it keeps, but not what it learns. Of these, the batch size of evaluation, checkpointed
# activations, compilation and the device change results within rounding.
_FREE = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint data model_name_or_path tokenizer_name model_type config_overrides "
    "extractor reasoner emotion_lexicon adjectives embeddings "
    "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica "
    "log_on_each_node disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id debug "
    "skip_memory_metrics include_num_input_tokens_seen save_strategy save_steps save_total_limit save_only_model "
    "save_on_each_node load_best_model_at_end use_cache "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context do_train do_eval local_rank use_cpu eval_on_start full_determinism "
    "per_device_eval_batch_size torch_empty_cache_steps activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout".split()
)

# Fields of a configuration that do not affect the model, or whose effect on the training items is compared instead.
_INCIDENTAL = (
    *("transformers_version", "_name_or_path", "architectures", "use_cache", "dtype"),
    *("emotion_words", "adjectives", "ranking", "fill", "ranking_seed"),
)


def digest(items: Iterable[Any]) -> str:
    """SHA-256 over the `repr` of items, as "sha256:" and hexadecimal digits."""
    found = hashlib.sha256()
    for item in items:
        found.update(repr(item).encode() + b"\n")
    return f"sha256:{found.hexdigest()}"


def fingerprint(trainer: "StageTrainer", made_from: Mapping[str, str | None]) -> dict[str, Any]:
    """Collect everything that the result of a training depends on, as values that JSON can hold.

    Args:
        trainer: the trainer before `train`.
        made_from: digests of the data and models that the options name.
    """
    args = trainer.args
    free = _FREE | REFUSED.keys()
    if args.lr_scheduler_type in ENDLESS and not 0 < args.warmup_steps < 1 and not 0 < (args.eval_steps or 0) < 1:
        free |= {"num_train_epochs", "max_steps"}  # a run may be made longer
    values = {
        "type of model": trainer.model.config.model_type,
        "version of empcause": version("empcause"),
        "number of processes": args.world_size,
        **{name: value for name, value in args.to_dict().items() if name not in free},
        **{f"the model's {name}": value for name, value in _flat(trainer.model.config.to_diff_dict())},
        **made_from,
    }
    return json.loads(json.dumps(values, default=str))


def check_same(checkpoint: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another training.

    Args:
        checkpoint: folder of the checkpoint, for the message.
        old: the fingerprint that was saved with it.
        new: the fingerprint of the run that would resume.

    Raises:
        UserError: the fingerprints differ.
    """
    if not old:
        raise UserError(f"{checkpoint} does not say how it was trained; start anew in another output_dir.")
    for name in {**new, **old}:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if str(before).startswith("sha256:") or str(now).startswith("sha256:"):
            raise UserError(
                f"{checkpoint} was trained with another {name}; give the same, or start in another output_dir."
            )
        raise UserError(
            f"{checkpoint} was trained with {name} {before}, this run has {now}; give the same value, or start in another "
            "output_dir."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in _INCIDENTAL:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
