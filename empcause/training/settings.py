"""Which of transformers' TrainingArguments work for the two stages, in which range, and which are refused for which reason.

Every field is in exactly one of the tables RANGES, WORKING and REFUSED. A field that a newer version of transformers adds is in
none of them, and is refused until it has been examined.
"""

from empcause.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, Range

_BELOW_ONE = Range(0, 1, without_high=True)

# These work as transformers documents them, within their range; None is accepted where the field allows it.
RANGES = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": _BELOW_ONE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "torch_empty_cache_steps": COUNT,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
}

# Optimisers of torch and transformers whose whole state is saved in a checkpoint.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")

# Schedules without a warm-up, and schedules without options.
WITHOUT_WARMUP = ("reduce_lr_on_plateau", "greedy", "constant")
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
# Schedules that do not depend on the number of steps, so that a run may be made longer.
ENDLESS = ("reduce_lr_on_plateau", "constant", "constant_with_warmup", "inverse_sqrt")

# These work as transformers documents them, or do not affect what is trained.
WORKING = frozenset(
    "output_dir max_steps lr_scheduler_type lr_scheduler_kwargs optim bf16 fp16 tf32 "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode use_cache "
    "logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "eval_strategy eval_on_start save_only_model save_strategy save_on_each_node load_best_model_at_end "
    "metric_for_best_model greater_is_better full_determinism use_cpu dataloader_drop_last dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_multiprocessing_context ddp_find_unused_parameters ddp_broadcast_buffers "
    "ddp_backend debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank".split()
)

_FIGURES = "the stages evaluate by figures of their own over the whole validation set"
_PUBLISHING = "training publishes nothing; upload the finished folder with `hf upload`"
_SHARDING = (
    "sharded training is not tested, because accelerate does not shard models (FSDP2) on a CPU; on several GPUs start the "
    "command with torchrun, which gives each GPU a whole model"
)
_PRECISION = "evaluation has the precision of the training; give bf16 or fp16"
_GROUPING = "batches always hold texts of similar length"
_KERNELS = "Liger's kernels do not know these models"

# These must keep their default, for the given reason.
REFUSED = {
    "prediction_loss_only": _FIGURES,
    "eval_do_concat_batches": _FIGURES,
    "eval_use_gather_object": _FIGURES,
    "eval_accumulation_steps": _FIGURES,
    "include_for_metrics": _FIGURES,
    "batch_eval_metrics": _FIGURES,
    "label_names": _FIGURES,
    "do_predict": "this command trains; `empcause evaluate` measures a finished model",
    "fp16_full_eval": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "average_tokens_across_devices": "all tokens of a step count alike, on whichever device they are",
    "auto_find_batch_size": "a run must be repeatable; give a smaller per_device_train_batch_size",
    "train_sampling_strategy": _GROUPING,
    "length_column_name": _GROUPING,
    "remove_unused_columns": "batches hold what the model reads and nothing else",
    "dataloader_in_order": "the order of batches decides the result",
    "accelerator_config": "it would change the batches",
    "ignore_data_skip": "a resumed run would see some texts twice and others never",
    "restore_callback_states_from_checkpoint": "a resumed run would forget how long it has seen no better figure",
    "optim_args": f"the optimisers that work here ({', '.join(OPTIMIZERS)}) take none",
    "optim_target_modules": f"the optimisers that work here ({', '.join(OPTIMIZERS)}) take none",
    "use_liger_kernel": _KERNELS,
    "liger_kernel_config": _KERNELS,
    "ddp_static_graph": "batches with and without cause labels have different graphs",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "parallelism_config": _SHARDING,
    "enable_jit_checkpoint": "a run that is interrupted saves a checkpoint without it",
    "push_to_hub": _PUBLISHING,
    "hub_token": _PUBLISHING,
    "hub_private_repo": _PUBLISHING,
    "hub_model_id": _PUBLISHING,
    "hub_strategy": _PUBLISHING,
    "hub_always_push": _PUBLISHING,
    "hub_revision": _PUBLISHING,
}
