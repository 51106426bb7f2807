"""The check that decides which models run with attn_implementation="empcause".

It compares a small random model of the class with the same model on eager attention. `python -m empcause.integration` runs the
check on every causal language model of transformers and writes the table that `classes` reads.
"""

import copy
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.masking_utils import eager_mask

from empcause.errors import UserError
from empcause.integration.attention import layer_strength
from empcause.integration.classes import admit, collecting
from empcause.integration.steering import steer

# A model with at most this number of parameters is checked with its own configuration, a larger one with a reduced one.
SMALL = 20_000_000
VOCABULARY, TOKENS = 99, 11
# Tolerance for rounding differences between two implementations, relative to the largest absolute value.
TOLERANCE = 2e-4

_OWN_CODE = "does not reach its attention, which is code of its own"
# Sizes of a small configuration, by the names that the model families use for them.
_SIZES: dict[str, int] = {
    name: size
    for names, size in (
        ("vocab_size", VOCABULARY),
        ("pad_token_id", 0),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("hidden_size d_model n_embd dim embedding_size emb_dim", 64),
        ("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim", 48),
        ("moe_intermediate_size shared_expert_intermediate_size", 48),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", 2),
        ("num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads", 4),
        ("num_key_value_heads num_kv_heads", 2),
        ("head_dim", 16),
        ("rotary_dim", 8),
        ("qk_nope_head_dim qk_rope_head_dim v_head_dim q_lora_rank kv_lora_rank", 16),
        ("qk_head_dim", 32),
        ("max_position_embeddings n_positions n_ctx", 128),
        ("num_experts num_local_experts n_routed_experts", 4),
        ("num_experts_per_tok", 2),
    )
    for name in names.split()
}
# Additional settings that some families need, by model type.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
}


def check_model(model: PreTrainedModel | type[PreTrainedModel]) -> None:
    """Check that models of a class run with attn_implementation="empcause", and admit the class in this process.

    A small random model with the same options must have the logits and gradients of eager attention with padding on either
    side, and its scores in `generate`. Later tokens must not change the logits of earlier ones. Causes must reach all attention
    layers and have the effect there that the paper's formula gives.

    Args:
        model: a causal language model, or its class. Only the class and the configuration are used, so the model may have been
            loaded with any attention implementation; `set_attn_implementation("empcause")` works afterwards.

    Raises:
        UserError: the model does not run, and how it differs; or no small model of this class can be made.
    """
    cls: Any = model if isinstance(model, type) else type(model)
    if not issubclass(cls, PreTrainedModel) or not cls.can_generate() or cls.config_class is None:
        raise UserError(f"check_model takes a causal language model of transformers or its class, not {cls.__name__}.")
    if isinstance(model, PreTrainedModel) and model.num_parameters() <= SMALL:
        config = copy.deepcopy(model.config)
    else:
        config = small_config(cls.config_class() if isinstance(model, type) else model.config)
    with collecting() as classes:
        reason = find_fault(cls, config)
    if reason is not None:
        raise UserError(
            f'attn_implementation="empcause" does not run {cls.__name__}: it {reason}; load it with "eager" or "sdpa".'
        )
    admit(classes)


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration with the same options but small sizes and few layers: two, or one of each layer type."""
    given = {
        name: value for name, value in config.to_diff_dict().items() if name not in ("transformers_version", "dtype")
    }
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(given.items()):
        if isinstance(value, list) and len(value) == layers:
            del given[name]  # The list has one entry per layer; the new configuration makes its own.
    sizes: dict[str, Any] = {name: size for name, size in _SIZES.items() if isinstance(_get(config, name), int)}
    if isinstance(getattr(type(config), "head_dim", None), property):
        sizes.pop("head_dim", None)
    elif hasattr(config, "head_dim"):
        sizes["head_dim"] = _SIZES["head_dim"]  # Its default None means hidden_size / num_heads, the same size.
    if "qk_rope_head_dim" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # Multi-head latent attention has no groups.
    sizes |= _SPECIAL.get(config.model_type, {})
    kinds = list(dict.fromkeys(_get(config, "layer_types") or ()))
    if len(kinds) > 1:
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    if isinstance(_get(config, "is_decoder"), bool):
        sizes["is_decoder"] = True
    for name, sub in ((name, _get(config, name)) for name in config.sub_configs):
        if isinstance(sub, PreTrainedConfig):
            sizes[name] = small_config(sub).to_dict()
    return type(config)(**given | sizes)


def _get(config: PreTrainedConfig, name: str) -> Any:
    """Return an attribute, or None where it is missing or cannot be read because it differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def find_fault(cls: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Return how a model of this class differs with attn_implementation="empcause", or None if it runs as it should.

    The answer is a clause whose subject is the implementation, for example "reaches 1 of its 2 layers".

    Raises:
        UserError: the model does not work with eager attention either.
    """
    try:
        eager = _make(cls, config, "eager")
        inputs = _inputs(eager)
        expected = {name: _logits_and_gradients(eager, batch) for name, batch in inputs.items()}
        scores = _scores(eager, inputs["left-padded"])
    except Exception as error:
        raise UserError(
            f"No small {cls.__name__} can be made and run with eager attention ({one_line(error)}); call check_model "
            f"with a model of this class that has at most {SMALL:,} parameters, which is checked as it is."
        ) from error
    calls: list[Any] = []
    try:
        with _witnessed(calls):
            ours = _make(cls, config, "empcause")
            ours.load_state_dict(eager.state_dict())
            return _fault_in_calls(eager, ours, inputs, expected, scores, calls)
    except UserError as error:
        return str(error).removeprefix('attn_implementation="empcause" ').split(";")[0].rstrip(".")
    except Exception as error:
        return _OWN_CODE if not calls else f"fails ({one_line(error)})"


def _fault_in_calls(
    eager: PreTrainedModel,
    ours: PreTrainedModel,
    inputs: dict[str, dict[str, Tensor]],
    expected: dict[str, tuple[Tensor, Tensor]],
    scores: Tensor,
    calls: list[Any],
) -> str | None:
    """Return the first fault in logits, gradients, generation, causality or steering, as `find_fault` words it.

    Args:
        eager, ours: models with the same parameters on eager attention and on "empcause".
        inputs: batches by name, from `_inputs`.
        expected: by name of the batch, the eager model's logits and gradients.
        scores: the eager model's scores in `generate`.
        calls: the attention modules that have called the attention function; it grows with every call.
    """
    for name, batch in inputs.items():
        made = _logits_and_gradients(ours, batch)
        if not calls:
            return _OWN_CODE
        for what, mine, theirs in zip(("logits", "gradients"), made, expected[name], strict=True):
            if (fault := _differ(mine, theirs)) is not None:
                return f"gives {what} that differ from eager attention's ({name}: {fault})"
    reached = {getattr(module, "layer_idx", None) for module in calls}
    if len(reached) != (layers := ours.config.get_text_config().num_hidden_layers):
        return f"reaches {len(reached)} of its {layers} layers"
    if (fault := _differ(_scores(ours, inputs["left-padded"]), scores)) is not None:
        return f"gives scores in generate that differ from eager attention's ({fault})"
    tokens = inputs["plain"]["input_ids"]
    changed = tokens.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        plain, later = ours(tokens).logits, ours(changed).logits
    if (fault := _differ(later[:, :-1], plain[:, :-1])) is not None:
        return f"lets later tokens change the logits of earlier ones ({fault})"
    return _fault_in_steering(eager, ours, inputs, plain.flatten(0, 1))


def _fault_in_steering(
    eager: PreTrainedModel, ours: PreTrainedModel, inputs: dict[str, dict[str, Tensor]], plain: Tensor
) -> str | None:
    """Return how steered logits differ from the paper's formula; `plain` are the logits `[N, vocabulary]` without causes."""
    for name, batch in inputs.items():
        causes = torch.rand(batch["input_ids"].shape)
        with torch.no_grad(), steer(ours, causes, gamma=2.0):
            steered = _real(ours(**batch).logits, batch)
        with torch.no_grad(), _formula(eager, causes, gamma=2.0):
            expected = _real(eager(**batch).logits, batch)
        if (fault := _differ(steered, expected)) is not None:
            return f"does not do what causes ask for ({name}: {fault})"
        if name == "plain" and _differ(steered, plain) is None:
            return "lets causes have no effect"
    return None


def _make(cls: type[PreTrainedModel], config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    """Return a random fp32 model in evaluation mode, with weights large enough that its attention is far from uniform.

    Raises:
        ValueError: it would have more than `SMALL` parameters.
    """
    set_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls._from_config(copy.deepcopy(config)).parameters())
    if size > SMALL:
        raise ValueError(f"it has {size:,} parameters")
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise if parameter.dim() > 1 else parameter + 0.05 * noise)
    return model


def _inputs(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Return the batches that are compared, by name: without padding, left-padded and right-padded."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(3, min(vocabulary, VOCABULARY) - 1, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    masks = {name: torch.ones_like(tokens) for name in ("left-padded", "right-padded")}
    masks["left-padded"][0, :4] = 0
    masks["right-padded"][1, -3:] = 0
    padded = {name: {"input_ids": tokens, "attention_mask": mask} for name, mask in masks.items()}
    return {"plain": {"input_ids": tokens}} | padded


def _real(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the states `[N, ...]` of the tokens that are not padding."""
    return states[batch["attention_mask"].bool()] if "attention_mask" in batch else states.flatten(0, 1)


def _logits_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits `[N, vocabulary]` of the tokens that are not padding, and the gradients of all parameters `[P]`.

    The gradient of each parameter is divided by its largest absolute value, so that small gradients count, too; those below a
    thousandth of the largest gradient of all are divided by that thousandth, because they may be rounding errors.
    """
    logits = _real(model(**batch).logits, batch)
    model.zero_grad()
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    relative = [gradient.flatten() / gradient.abs().max().clamp(min=1e-3 * largest) for gradient in gradients]
    return logits.detach(), torch.cat(relative)


def _scores(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of three steps of greedy generation, `[3, B, vocabulary]`."""
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    made = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits)


def _differ(ours: Tensor, expected: Tensor) -> str | None:
    """Return in words how two tensors differ, or None if they are equal within `TOLERANCE`."""
    if ours.shape != expected.shape:
        return f"{list(ours.shape)} instead of {list(expected.shape)}"
    apart, scale = float((ours - expected).abs().max()), float(expected.abs().max())
    return None if apart <= TOLERANCE * scale else f"by {apart:.2g}, where the largest is {scale:.2g}"


def one_line(error: BaseException) -> str:
    """Return an exception's type and message as one line of at most 160 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160)


@contextmanager
def _witnessed(calls: list[Any]) -> Iterator[None]:
    """Append each module that calls the attention function "empcause" to `calls` while the context lasts."""
    attention: Callable = AttentionInterface._global_mapping["empcause"]

    def witness(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return attention(module, *args, **kwargs)

    AttentionInterface.register("empcause", witness)
    try:
        yield
    finally:
        AttentionInterface.register("empcause", attention)


@contextmanager
def _formula(model: PreTrainedModel, causes: Tensor, gamma: float) -> Iterator[None]:
    """Replace a model's attention by the paper's equations 14 to 18, written out, while the context lasts."""

    def formula(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        probabilities = (query @ key.transpose(-1, -2) * scaling + attention_mask).softmax(-1)
        biased = probabilities * (1 + layer_strength(module, gamma) * causes[:, None, None])
        return (biased / biased.sum(-1, keepdim=True) @ value).transpose(1, 2).contiguous(), None

    name = "empcause_formula"
    AttentionInterface.register(name, formula)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]
