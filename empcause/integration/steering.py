"""Steering: `steer` biases the attention of any transformers model that runs with attn_implementation="empcause".

While a model is steered, a few methods of this one object are replaced. The decoder's `forward` passes the causes on to the
attention layers. It is replaced because every call goes through it, whoever makes the call: a LoRA adapter,
DistributedDataParallel, a compiled model. `generate` and two methods that it calls are replaced because they alone know how
`generate` repeats rows for beams, how much of the prompt has been read, and which calls of the model belong to the prompt.
"""

import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from empcause.integration.attention import Witness


@contextmanager
def steer(model: nn.Module, cause_probs: Tensor | ArrayLike, gamma: float = 1.0) -> Iterator[None]:
    """Make a model attend more to some tokens while the context lasts, without subclassing it.

    Attention layer l of L multiplies its probabilities by `1 + gamma * (l / L) * cause_probs` and renormalises them. The causes
    belong to the tokens of the input, that is, of a call of the model or of `generate`, padding included. Keys that were in the
    cache before the input have cause 0, and so have tokens that are read later through the same cache, generated ones included.
    `generate` repeats a prompt's causes for its beams and returned sequences; gradient checkpointing recomputes with the same
    causes.

    Steering applies to calls made in this thread or asyncio task and in those that inherit its context: tasks started inside,
    and `Thread(target=contextvars.copy_context().run, args=(model.generate, ...))`. Other threads and tasks may steer the same
    model with their own causes at the same time; if they call it without steering it, the call raises. A call of `generate` that
    began inside the context is steered to its end. Calls for other inputs during `generate` are not steered: those of an
    assistant model, of the negative prompt of guidance_scale, and of a logits processor.

    Args:
        model: a model that runs with `attn_implementation="empcause"`, or a wrapper of one (PEFT, `torch.compile`, accelerate,
            `.module`).
        cause_probs: `[batch or 1, tokens]`, one finite number per token of the input, with `1 + gamma * cause_probs >= 0`. A
            token with a number above 0 is attended to more, one below 0 less; -1 removes it in a layer of strength 1. A tensor
            or array must have a floating-point dtype or bool (integers are refused because they look like token ids). It is
            copied; gradients flow into a tensor.
        gamma: the factor of the strength, finite; 0 changes nothing.

    Raises:
        ValueError: on entry, if the model has another attention implementation or is an encoder-decoder, if the causes or gamma
            have a wrong shape or value, or if the model is steered already; in calls inside, if the causes do not match the rows
            or tokens of the input, or if this way to generate cannot be steered.
        RuntimeError: in a call from a thread or task that does not inherit the context; in a call inside, if the model did not
            pass the causes on to all of its attention layers; at the end of the context, if no call was steered.
    """
    steering = _Steering(_owner(model), cause_probs, gamma)
    if any(other.open and other.decoder is steering.decoder for other in _STEERINGS.get()):
        raise ValueError("steer is used inside steer for the same model; add up the causes and steer once.")
    with _replaced_methods(steering.model, steering.decoder):
        _STEERINGS.set((*_STEERINGS.get(), steering))
        try:
            yield
        finally:
            steering.open = False
            _STEERINGS.set(tuple(other for other in _STEERINGS.get() if other is not steering))
    if not steering.called:
        raise RuntimeError(
            f"Nothing was steered: no call reached {type(steering.decoder).__name__} inside the context, in its thread or task."
        )
    steering.check_values()


class _Steering:
    """The state of one `with steer(...)` context.

    Attributes:
        model: the model whose `generate` is steered.
        decoder: the module whose `forward` is steered: the model itself or a part of it.
        causes: `[batch or 1, tokens]`, fp32, or fp64 for a model in fp64.
        open: True until the context ends.
        called: whether a call of the model or of `generate` has been made inside the context.
        starts: for every cache that a steered call has filled, the index of the first key that belongs to the input.
    """

    def __init__(self, model: PreTrainedModel, cause_probs: Tensor | ArrayLike, gamma: float) -> None:
        decoder = model.get_decoder()
        self.model, self.decoder, self.gamma = model, decoder, gamma
        self.open, self.called = True, False
        self.starts: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()
        if model.config.is_encoder_decoder or decoder.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: causes would weight the decoder's own tokens, not the input; "
                "steer a decoder-only model."
            )
        self.check_implementation()
        if not isinstance(gamma, Real) or not math.isfinite(gamma):
            raise ValueError(f"gamma must be a finite number, not {gamma!r}.")
        # The kernels take fp32. Converted here, the causes need not be converted by every layer.
        dtype = torch.float64 if decoder.dtype == torch.float64 else torch.float32
        self.causes: Tensor = _tensor(cause_probs).to(dtype)
        causes = self.causes.detach()
        self._right: Tensor = (causes.isfinite() & (1 + gamma * causes >= -1e-6)).all()
        if self._right.is_cpu:
            self.check_values()

    def check_implementation(self) -> None:
        """Refuse another attention implementation.

        It is checked on entry and in every call, because `set_attn_implementation` can change it in between.
        """
        found = self.decoder.config._attn_implementation
        if found != "empcause":
            raise ValueError(
                f"The model runs with attn_implementation={found!r}, which would ignore the causes; "
                'load it with attn_implementation="empcause", or call model.set_attn_implementation("empcause").'
            )

    def check_values(self) -> None:
        """Refuse causes that are not finite or make a weight negative.

        For causes on a GPU this is called at the end of the context only, because reading the result waits for the device.
        """
        if not self._right:
            raise ValueError("cause_probs must be finite with 1 + gamma * cause_probs >= 0.")

    def check_input(self, rows: int, tokens: int) -> None:
        """Refuse causes that do not have one row (or one in all) per row of the input and one column per token."""
        if self.causes.shape[0] not in (1, rows) or self.causes.shape[1] != tokens:
            raise ValueError(
                f"cause_probs is {list(self.causes.shape)} [batch or 1, tokens], but the input is {[rows, tokens]}: every row "
                "and token of the input needs its value, padding included."
            )

    def keywords(self, causes: Tensor, ranges: dict[int, int]) -> dict[str, Any]:
        """Return the keyword arguments that the model passes on to its attention layers, with a fresh witness.

        Args:
            causes: `[batch or 1, keys]`, from `_fit`.
            ranges: the keys of the call, from `_key_ranges`.
        """
        return {"cause_probs": causes, "cause_gamma": self.gamma, "cause_witness": _Witness(self.decoder, ranges)}

    def in_direct_call(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments to add to a call of the decoder that is made outside of `generate`.

        Args:
            args, kwargs: the arguments of the call.
        """
        self.called = True
        self.check_implementation()
        names = inspect.signature(self.decoder.forward).parameters if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        _check_free(given)
        tokens = _tokens(given)
        cache = _cache(given)
        past = _filled(cache)
        rows, length = tokens.shape[:2]
        start = self.starts.get(cache) if cache is not None else None
        if start is None or past <= start:
            self.check_input(rows, length)
            start = past
        elif self.causes.shape[0] not in (1, rows):
            self.check_input(rows, self.causes.shape[1])
        if cache is not None:
            self.starts[cache] = start
        self.causes = self.causes.to(tokens.device)
        ranges = _key_ranges(cache, length)
        return self.keywords(_fit(self.causes, start, ranges), ranges)

    def after_direct_call(self, witness: "_Witness", output: Any) -> None:
        """Check that the causes arrived at all layers, and remember a cache that the model created in this call."""
        witness.check()
        for part in output.values() if isinstance(output, Mapping) else output:
            if isinstance(part, Cache):
                self.starts.setdefault(part, 0)


@dataclass(eq=False)
class _Generation:
    """The state of one call of `generate` of a steered model.

    Attributes:
        steering: the steering that applies to the call.
        causes: `[rows or 1, tokens]`, the rows repeated as `generate` repeats those of the prompt.
        rows: the number of rows of every call of the model: the batch times beams or returned sequences.
        tokens: the number of tokens of the prompt.
        begun: whether the model has read the prompt, or its first part.
        start: the position of the prompt's first token among the keys: above 0 if it is read into a filled cache.
        ranges: the keys of the last call, from `_key_ranges`.
        fitted: the causes of these keys, which do not change from step to step with a static cache.
        witness: the witness of the last call of the model, None before the first.
    """

    steering: _Steering
    causes: Tensor | None = None
    rows: int = 0
    tokens: int = 0
    begun: bool = False
    start: int = 0
    ranges: dict[int, int] | None = None
    fitted: Tensor | None = None
    witness: "_Witness | None" = None

    def expand(self, size: int, prompt: Tensor) -> None:
        """Set the causes from the prompt `[batch, tokens, ...]`, each of whose rows `generate` repeats `size` times."""
        if self.causes is not None:  # This is the inner `generate` of a draft.
            return
        rows, self.tokens = prompt.shape[:2]
        self.steering.check_input(rows, self.tokens)
        self.rows = rows * size
        causes = self.steering.causes
        self.causes = causes.repeat_interleave(size, dim=0) if causes.shape[0] > 1 else causes

    def step(self, input_length: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments to add to the next call of the model.

        Args:
            input_length: the number of tokens that `generate` has so far.
            inputs: the inputs that `generate` has prepared for the call.
        """
        self.check()
        steering = self.steering
        steering.check_implementation()
        _check_free(inputs)
        tokens = _tokens(inputs)
        assert self.causes is not None
        if tokens.shape[0] != self.rows:
            raise ValueError(
                f"generate calls the model with {tokens.shape[0]} rows for {self.rows}: it cannot be steered."
            )
        self.causes = self.causes.to(tokens.device)
        cache, length = _cache(inputs), tokens.shape[1]
        if not self.begun:
            self.begun = True
            if past := _filled(cache):
                # The prompt is either all that the cache and the input hold together, or the input alone.
                self.start = past + length - self.tokens
                if input_length != self.tokens or self.start not in (0, past):
                    raise ValueError("prefill_chunk_size with a filled cache cannot be steered; leave it out.")
            if cache is not None:
                steering.starts[cache] = self.start
        ranges = _key_ranges(cache, length)
        if ranges != self.ranges:
            self.ranges, self.fitted = ranges, _fit(self.causes, self.start, ranges)
        assert self.fitted is not None
        keywords = steering.keywords(self.fitted, ranges)
        self.witness = keywords["cause_witness"]
        return keywords

    @contextmanager
    def draft(self) -> Iterator[None]:
        """Steer the calls of an inner `generate` that drafts tokens, without taking them for the reading of the prompt."""
        begun, self.begun = self.begun, True
        try:
            yield
        finally:
            self.begun = begun

    def check(self) -> None:
        """Check that the causes arrived at all layers in the last call of the model, if there was one."""
        if self.witness is not None:
            self.witness.check()


class _Witness(Witness):
    """Checks that the causes of one call arrived at all layers."""

    def __init__(self, decoder: PreTrainedModel, ranges: dict[int, int]) -> None:
        super().__init__(ranges)
        self.model, self.number = type(decoder).__name__, decoder.config.num_hidden_layers

    def check(self) -> None:
        """Check what the layers have recorded.

        Raises:
            RuntimeError: the causes did not arrive at all layers.
        """
        if len(self.layers) != self.number:
            raise RuntimeError(
                f"{self.model} handed cause_probs to {len(self.layers)} of its {self.number} layers: it cannot be steered."
            )


_STEERINGS: ContextVar[tuple[_Steering, ...]] = ContextVar("empcause_steerings", default=())
_GENERATION: ContextVar[_Generation | None] = ContextVar("empcause_generation", default=None)


class _Method:
    """The object that replaces a method of a module while the model is steered.

    Copies and pickles of the model get the original method instead (`__reduce__`).

    Attributes:
        holders: the number of open contexts that need the replacement; with 0 the original method is called.
        own: the attribute of this name on the instance before the replacement, None if the method is the class's.
    """

    holders = 0

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self.own = vars(module).get(name)  # accelerate replaces methods on the instance, too.
        functools.update_wrapper(self, getattr(module, name), updated=())
        self.module, self.replacement = module, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.holders:  # Another tool has wrapped this object and keeps it after steering has ended.
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        return self.replacement(self.module, self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return operator.itemgetter(0), ((self.__wrapped__,),)  # type: ignore[attr-defined]


# The replacements that are in place now, by module and name of the method.
_REPLACED: dict[tuple[nn.Module, str], _Method] = {}
_LOCK = threading.Lock()


@contextmanager
def _replaced_methods(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Replace the methods that steering needs while the context lasts."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(decoder, "forward", _forward))
        if isinstance(model, GenerationMixin):
            for name, replacement in _GENERATING.items():
                stack.enter_context(_replaced(model, name, replacement))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one module until the last of the contexts that replace it has ended."""
    with _LOCK:
        method = _REPLACED.get((module, name)) or _Method(module, name, replacement)
        if not method.holders:
            _REPLACED[module, name] = method
            setattr(module, name, method)
        method.holders += 1
    try:
        yield
    finally:
        with _LOCK:
            method.holders -= 1
            if not method.holders:
                del _REPLACED[module, name]
                if vars(module).get(name) is method:
                    delattr(module, name)
                    if method.own is not None:
                        setattr(module, name, method.own)


def _steering(module: nn.Module) -> _Steering:
    """Return the steering of a model or decoder that applies in this thread or task.

    Raises:
        RuntimeError: it is steered only by other threads or tasks.
    """
    for steering in _STEERINGS.get():
        if steering.open and (module is steering.model or module is steering.decoder):
            return steering
    raise RuntimeError(
        f"{type(module).__name__} is being steered by another thread or task, whose context this call does not inherit; "
        "start the thread with Thread(target=contextvars.copy_context().run, args=(model.generate, ...)), or call the "
        "model when steering has ended."
    )


def _forward(decoder: nn.Module, unsteered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replacement of the decoder's `forward`; `unsteered` is the original, here and in the functions below."""
    if "cause_witness" in kwargs:  # `_prepare` has added the causes to this step of `generate`.
        return unsteered(*args, **kwargs)
    steering, keywords = _direct_call(decoder, args, kwargs)
    if steering is None:
        return unsteered(*args, **kwargs)
    output = unsteered(*args, **kwargs | keywords)
    _after_direct_call(steering, keywords, output)
    return output


# This function and the next are not compiled, because what they decide depends on state that changes from call to call.
@torch.compiler.disable(
    reason="steer decides in every call which causes apply; compile without fullgraph=True, or let generate compile its steps "
    '(cache_implementation="static" with a compile_config)'
)
def _direct_call(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[_Steering | None, dict[str, Any]]:
    """Return the steering of a call that `generate` has not prepared and the keyword arguments to add; None if it has none."""
    generation = _GENERATION.get()
    if generation is not None and generation.steering.decoder is decoder:
        if generation.witness is None:
            raise RuntimeError(
                "generate calls the model with inputs that it did not prepare with prepare_inputs_for_generation: "
                "it cannot be steered."
            )
        # The call is for another prompt: guidance_scale's negative prompt, or a logits processor's input.
        return None, {}
    steering = _steering(decoder)
    return steering, steering.in_direct_call(args, kwargs)


@torch.compiler.disable
def _after_direct_call(steering: _Steering, keywords: dict[str, Any], output: Any) -> None:
    steering.after_direct_call(keywords["cause_witness"], output)


def _generate(model: PreTrainedModel, unsteered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replacement of `generate`."""
    generation = _GENERATION.get()
    if generation is not None and generation.steering.model is model:  # the model drafts for itself
        with generation.draft():
            return unsteered(*args, **kwargs)
    try:
        steering = _steering(model)
    except RuntimeError:
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()  # Otherwise its reader would wait for ever.
        raise
    steering.called = True
    if type(model).generate is not GenerationMixin.generate or kwargs.get("custom_generate") is not None:
        raise ValueError(
            f"{type(model).__name__} generates in a way of its own, which cannot be steered; call transformers' generate "
            "without custom_generate, or the model itself."
        )
    with _replaced_methods(steering.model, steering.decoder):  # to its end, even if the context ends earlier
        generation = _Generation(steering)
        token = _GENERATION.set(generation)
        try:
            output = unsteered(*args, **kwargs)
        finally:
            _GENERATION.reset(token)
        generation.check()
        return output


def _expand(model: PreTrainedModel, unsteered: Callable[..., Any], **kwargs: Any) -> Any:
    """Replacement of `_expand_inputs_for_generation`, which repeats the rows of the prompt."""
    generation = _GENERATION.get()
    if generation is not None and generation.steering.model is model:
        generation.expand(kwargs["expand_size"], _tokens(kwargs))
    return unsteered(**kwargs)


def _prepare(
    model: PreTrainedModel, unsteered: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Replacement of `prepare_inputs_for_generation`, which makes the inputs of every step."""
    inputs = unsteered(input_ids, *args, **kwargs)
    generation = _GENERATION.get()
    if generation is None or generation.steering.model is not model:
        return inputs
    return inputs | generation.step(_tokens(kwargs | {"input_ids": input_ids}).shape[1], inputs)


def _refuse(model: PreTrainedModel, unsteered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replacement of methods that would call the model in an order that is not known here."""
    raise ValueError(
        "Continuous batching and decoding methods from the Hub cannot be steered; call generate with a batch of prompts."
    )


# The replacements of the methods of a model that generates.
_GENERATING: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "_expand_inputs_for_generation": _expand,
    "prepare_inputs_for_generation": _prepare,
    "init_continuous_batching": _refuse,
    "load_custom_generate": _refuse,
}


def _owner(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that is meant: `model` itself, or the only one inside a wrapper.

    Raises:
        ValueError: it is not a module, or does not hold exactly one transformers model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"steer takes a model, not {type(model).__name__}.")
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} models of transformers; steer the one that is meant."
        )
    return found[0]


def _tensor(cause_probs: Tensor | ArrayLike) -> Tensor:
    """Return a floating copy `[batch, tokens]` of the causes, through which gradients flow.

    Raises:
        ValueError: they are not numbers of this shape, or are integers in a tensor or array.
    """
    plain = isinstance(cause_probs, list | tuple)
    try:
        causes = torch.as_tensor(cause_probs, dtype=torch.float32 if plain else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cause_probs must be [batch, tokens] of numbers: {error}") from error
    if causes.dtype == torch.bool:
        causes = causes.float()
    if causes.dim() != 2 or not causes.is_floating_point():
        raise ValueError(f"cause_probs must be floating [batch, tokens], not {causes.dtype} {list(causes.shape)}.")
    return causes.clone()


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Return the embeddings or token ids that a call reads, `[rows, tokens, ...]`."""
    found = next((inputs[name] for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None), None)
    if found is None:
        raise ValueError("A call of a steered model needs input_ids or inputs_embeds.")
    return found


def _cache(inputs: Mapping[str, Any]) -> Cache | None:
    """Return the cache of a call, if it has one."""
    cache = next((inputs[name] for name in ("cache", "past_key_values") if inputs.get(name) is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"The number of keys in a cache of type {type(cache).__name__} is not known: the call cannot be steered."
        )
    return cache


def _filled(cache: Cache | None) -> int:
    """Return the number of keys in a cache. A static cache counts them on its device, which is waited for."""
    return 0 if cache is None else int(cache.get_seq_length())


def _key_ranges(cache: Cache | None, tokens: int) -> dict[int, int]:
    """Return which keys the layers see in the next call of a model, without waiting for a device.

    Args:
        cache: the cache that the call reads and fills, if it has one.
        tokens: the number of tokens of the call.

    Returns:
        By the number of keys of a layer, empty slots of a static cache included, the position of the first one. In most models
        all layers have the same keys. A layer with a sliding window has dropped the keys before its first one; layers with
        equally many keys have dropped equally many.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    return dict(layer.get_mask_sizes(tokens) for layer in layers) or {tokens: 0}


def _fit(causes: Tensor, start: int, ranges: dict[int, int]) -> Tensor:
    """Return the causes of the keys of all layers, or those of all positions if the layers have different keys.

    Args:
        causes: `[rows, n]`, the causes of the keys at the n positions from `start` on; all other keys have 0.
        start: the position of the first key that has a cause.
        ranges: the keys of the layers, from `_key_ranges`.
    """
    first = min(ranges.values()) if len(ranges) == 1 else 0
    end = max(position + keys for keys, position in ranges.items())
    if first > start:
        causes, start = causes[:, first - start :], first
    # Negative padding cuts off the causes of tokens that have not been read yet.
    before, after = start - first, end - start - causes.shape[1]
    return nn.functional.pad(causes, (before, after)) if before or after else causes


def _check_free(inputs: Mapping[str, Any]) -> None:
    """Refuse a call that has causes of its own or attends to an encoder's states."""
    if inputs.get("cause_probs") is not None:
        raise ValueError("cause_probs is given by the call already; leave it out, or call the model outside of steer.")
    if inputs.get("encoder_hidden_states") is not None:
        raise ValueError(
            "Attention to encoder_hidden_states cannot be steered: the causes belong to the model's own tokens."
        )
