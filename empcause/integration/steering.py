"""Steering any model of transformers that runs with attn_implementation="empcause"."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def steer(model: PreTrainedModel, cause_probs: Tensor, gamma: float = 1.0) -> Iterator[None]:
    """Make a model attend more to some tokens while the context lasts, without subclassing it.

    Every attention layer l of L multiplies its probabilities by `1 + gamma * (l / L) * cause_probs` and renormalises. It
    holds for calls of the model, `generate` (beams repeat the causes; generated tokens have 0), and for gradient
    checkpointing, whose recomputation gets the same causes.

    Args:
        model: runs with `attn_implementation="empcause"`.
        cause_probs: `[batch or 1, tokens]` floating, one value per token of the input, padding included; above 0 attends
            more, below 0 less, -1 with strength 1 removes the token. Finite, `1 + gamma * cause_probs >= 0`.
        gamma: factor of the strength; 0 changes nothing.

    Raises:
        ValueError: another attention implementation, wrong shape or values, or steering inside steering.
        RuntimeError: the model did not hand the causes to all of its attention layers.
    """
    _check(model, cause_probs, gamma)
    witness: set[int] = set()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "cause_probs" in kwargs:
            raise ValueError("cause_probs is given by the call already, or steer is used inside steer.")
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        batch = cause_probs.shape[0] if tokens is None else tokens.shape[0]
        expanded = cause_probs.to(model.device)
        if cause_probs.shape[0] not in (1, batch):
            if batch % cause_probs.shape[0]:
                raise ValueError(f"cause_probs has {cause_probs.shape[0]} rows, the model's input {batch}.")
            expanded = expanded.repeat_interleave(batch // cause_probs.shape[0], dim=0)  # beams
        witness.clear()
        return args, kwargs | {"cause_probs": expanded, "cause_gamma": gamma, "cause_witness": witness}

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        layers = model.config.get_text_config().num_hidden_layers
        if len(witness) != layers:
            raise RuntimeError(
                f"{type(module).__name__} handed cause_probs to {len(witness)} of its {layers} layers: it cannot be steered."
            )

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(model: PreTrainedModel, cause_probs: Tensor, gamma: float) -> None:
    implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if implementation != "empcause":
        raise ValueError(
            f"The model runs with attn_implementation={implementation!r}, which would ignore the causes; "
            'load it with attn_implementation="empcause", or call model.set_attn_implementation("empcause").'
        )
    if cause_probs.dim() != 2 or not cause_probs.is_floating_point():
        raise ValueError(
            f"cause_probs must be floating [batch, tokens], not {cause_probs.dtype} {list(cause_probs.shape)}."
        )
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be a finite number, not {gamma!r}.")
    if cause_probs.is_cpu and not (cause_probs.isfinite().all() and (1 + gamma * cause_probs >= -1e-6).all()):
        raise ValueError("cause_probs must be finite with 1 + gamma * cause_probs >= 0.")
