"""Steering any model of transformers that runs with attn_implementation="empcause".

While a model is steered, a few of its methods are replaced, on this one model. Its decoder's `forward` hands the causes on to
the attention layers: every call passes there, whoever makes it (a LoRA adapter, DistributedDataParallel, a compiled model).
`generate` and two methods that it calls say which rows it repeats for beams, how much of the prompt has been read, and which
calls of the model are its own.
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
from transformers import Cache, GenerationMixin, PreTrainedModel

from empcause.integration.attention import Witness


@contextmanager
def steer(model: nn.Module, cause_probs: Tensor | ArrayLike, gamma: float = 1.0) -> Iterator[None]:
    """Make a model attend more to some tokens while the context lasts, without subclassing it.

    Every attention layer l of L multiplies its probabilities by `1 + gamma * (l / L) * cause_probs` and renormalises. The causes
    belong to the tokens of the input: the tokens that a call of the model or of `generate` is given, padding included. Keys
    that are in the cache before have 0, and so have tokens that are read through the same cache later, generated ones among
    them. Beams and several answers per prompt repeat their prompt's causes; gradient checkpointing recomputes with the same.

    It holds for calls made in this thread or task, and in those that inherit its context: tasks started inside, and
    `Thread(target=contextvars.copy_context().run, args=(model.generate, ...))`. Others may steer the same model with causes of
    their own at the same time; a call of theirs that is not steered raises. A call of `generate` that began inside is steered to
    its end. What is called for other inputs during `generate` is not steered: an assistant model, the other prompt of
    guidance_scale, a logits processor's own calls.

    Args:
        model: runs with `attn_implementation="empcause"`, or wraps such a model (PEFT, `torch.compile`, accelerate, `.module`).
        cause_probs: `[batch or 1, tokens]` of numbers, one per token of the input; above 0 attends more, below 0 less, -1 with
            strength 1 removes the token. Finite, `1 + gamma * cause_probs >= 0`. A tensor or array holds floating-point
            numbers or booleans (whole numbers look like token ids); gradients flow into a tensor. It is copied.
        gamma: factor of the strength; 0 changes nothing.

    Raises:
        ValueError: another attention implementation, an encoder-decoder, wrong shape or values, or steering inside steering; in
            calls inside, rows or tokens that the causes do not match, and ways to generate that cannot be steered.
        RuntimeError: a call from a thread or task outside; the model did not hand the causes to all of its attention layers; at
            the end, nothing has been steered.
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
    """One use of `steer`.

    Attributes:
        model: whose `generate` is steered.
        decoder: whose calls are steered; it is the model, or part of it.
        causes: `[rows, tokens]`.
        open: inside the context.
        called: a call has come.
        starts: for every cache that this steering has filled, the number of keys before the input that has the causes.
    """

    def __init__(self, model: PreTrainedModel, cause_probs: Tensor | ArrayLike, gamma: float) -> None:
        decoder = model.get_decoder()
        self.model, self.decoder, self.gamma = model, decoder, gamma
        self.open, self.called = True, False
        self.starts: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()
        if model.config.is_encoder_decoder or decoder.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: causes would weigh the decoder's own tokens, not the input; "
                "steer a decoder-only model."
            )
        self.check_implementation()
        if not isinstance(gamma, Real) or not math.isfinite(gamma):
            raise ValueError(f"gamma must be a finite number, not {gamma!r}.")
        self.causes: Tensor = _tensor(cause_probs)
        causes = self.causes.detach()
        self._right: Tensor = (causes.isfinite() & (1 + gamma * causes >= -1e-6)).all()
        if self._right.is_cpu:
            self.check_values()

    def check_implementation(self) -> None:
        """At the beginning and at every call: it can be set anew."""
        found = self.decoder.config._attn_implementation
        if found != "empcause":
            raise ValueError(
                f"The model runs with attn_implementation={found!r}, which would ignore the causes; "
                'load it with attn_implementation="empcause", or call model.set_attn_implementation("empcause").'
            )

    def check_values(self) -> None:
        """On a GPU at the end of the context alone, since it waits for the device."""
        if not self._right:
            raise ValueError("cause_probs must be finite with 1 + gamma * cause_probs >= 0.")

    def check_input(self, rows: int, tokens: int) -> None:
        """Refuse causes of another shape than the input that they belong to."""
        if self.causes.shape[0] not in (1, rows) or self.causes.shape[1] != tokens:
            raise ValueError(
                f"cause_probs is {list(self.causes.shape)} [batch or 1, tokens], but the input is {[rows, tokens]}: every row "
                "and token of the input needs its value, padding included."
            )

    def keywords(self, causes: Tensor) -> dict[str, Any]:
        """What the attention layers are given."""
        return {"cause_probs": causes, "cause_gamma": self.gamma, "cause_witness": _Witness(self.decoder)}

    def in_direct_call(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What to add to a call of the decoder that is no part of `generate`."""
        self.called = True
        self.check_implementation()
        names = inspect.signature(self.decoder.forward).parameters if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        _check_free(given)
        tokens = _tokens(given)
        cache, past = _cache(given)
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
        keywords = self.keywords(nn.functional.pad(self.causes, (start, 0))[:, : past + length])
        keywords["cause_witness"].expect(cache, past + length)
        return keywords

    def after_direct_call(self, witness: "_Witness", output: Any) -> None:
        """Check that the causes arrived, and know a cache that the model has made itself."""
        witness.check()
        for part in output.values() if isinstance(output, Mapping) else output:
            if isinstance(part, Cache):
                self.starts.setdefault(part, 0)


@dataclass(eq=False)
class _Generation:
    """One call of `generate` of a steered model.

    Attributes:
        steering: what it is steered by.
        causes: `[rows or 1, tokens]`, the rows repeated as `generate` repeats them; later with the keys before the prompt.
        rows: in every call of the model.
        tokens: of the prompt.
        read: how many of them have been read.
        witness: of the last call of the model.
    """

    steering: _Steering
    causes: Tensor | None = None
    rows: int = 0
    tokens: int = 0
    read: int = 0
    witness: "_Witness | None" = None

    def expand(self, size: int, prompt: Tensor) -> None:
        """Take the prompt `[batch, tokens]` and how often its rows are repeated."""
        if self.causes is not None:  # a draft
            return
        rows, self.tokens = prompt.shape[:2]
        self.steering.check_input(rows, self.tokens)
        self.rows = rows * size
        causes = self.steering.causes
        self.causes = causes.repeat_interleave(size, dim=0) if causes.shape[0] > 1 else causes

    def step(self, input_length: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """What to add to the inputs of the next call of the model."""
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
        if self.read >= self.tokens:
            keywords = steering.keywords(self.causes)
        else:
            length = tokens.shape[1]
            cache, past = _cache(inputs)
            if past and not self.read:
                # The prompt is all that the cache and the input hold, or the input alone.
                start = past + length - self.tokens
                if input_length != self.tokens or start not in (0, past):
                    raise ValueError("prefill_chunk_size with a filled cache cannot be steered; leave it out.")
                self.causes = nn.functional.pad(self.causes, (start, 0))
                self.read = self.tokens
            else:
                self.read += length
            if cache is not None:
                steering.starts[cache] = self.causes.shape[1] - self.tokens
            keywords = steering.keywords(self.causes[:, : past + length])
            keywords["cause_witness"].expect(cache, past + length)
        self.witness = keywords["cause_witness"]
        return keywords

    @contextmanager
    def draft(self) -> Iterator[None]:
        """What is generated inside reads the prompt anew, and does not count."""
        read, self.read = self.read, self.tokens
        try:
            yield
        finally:
            self.read = read

    def check(self) -> None:
        """Whether the causes arrived in the last call of the model."""
        if self.witness is not None:
            self.witness.check()


class _Witness(Witness):
    """Whether the causes arrived at all layers of one call, and at the keys that they belong to."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.layers = type(decoder).__name__, decoder.config.num_hidden_layers
        self.expected: int | None = None

    def expect(self, cache: Cache | None, keys: int) -> None:
        """Take how many keys there must be; a static cache has more than are filled."""
        self.expected = None if cache is not None and cache.is_compileable else keys

    def check(self) -> None:
        if len(self.keys) != self.layers:
            raise RuntimeError(
                f"{self.model} handed cause_probs to {len(self.keys)} of its {self.layers} layers: it cannot be steered."
            )
        if self.expected is not None and (found := set(self.keys.values())) != {self.expected}:
            raise RuntimeError(
                f"{self.model} attends to {max(found)} keys where cache and input hold {self.expected}: "
                "which of them are the input's is not known, and it cannot be steered."
            )


_STEERINGS: ContextVar[tuple[_Steering, ...]] = ContextVar("empcause_steerings", default=())
_GENERATION: ContextVar[_Generation | None] = ContextVar("empcause_generation", default=None)


class _Method:
    """What stands on a model in place of a method while it is steered; copies and pickles of the model have the method itself."""

    holders = 0

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self.own = vars(module).get(name)  # accelerate replaces methods, too
        functools.update_wrapper(self, getattr(module, name), updated=())
        self.module, self.replacement = module, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.holders:  # something else has taken hold of it
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        return self.replacement(self.module, self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return operator.itemgetter(0), ((self.__wrapped__,),)  # type: ignore[attr-defined]


# The methods that are replaced now, and by what.
_REPLACED: dict[tuple[nn.Module, str], _Method] = {}
_LOCK = threading.Lock()


@contextmanager
def _replaced_methods(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_replaced(decoder, "forward", _forward))
        if isinstance(model, GenerationMixin):
            for name, replacement in _GENERATING.items():
                stack.enter_context(_replaced(model, name, replacement))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object as long as anybody wants it."""
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
    """What a call of a model that somebody steers is steered by.

    Raises:
        RuntimeError: the caller does not steer it.
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
    if "cause_witness" in kwargs:  # a step of `generate`
        return unsteered(*args, **kwargs)
    steering, keywords = _direct_call(decoder, args, kwargs)
    if steering is None:
        return unsteered(*args, **kwargs)
    output = unsteered(*args, **kwargs | keywords)
    _after_direct_call(steering, keywords, output)
    return output


# What these decide changes from call to call: compiled code leaves it to them.
@torch.compiler.disable
def _direct_call(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[_Steering | None, dict[str, Any]]:
    generation = _GENERATION.get()
    if generation is not None and generation.steering.decoder is decoder:
        if generation.witness is None:
            raise RuntimeError(
                "generate calls the model with inputs that it did not prepare itself: it cannot be steered."
            )
        return None, {}  # for another prompt
    steering = _steering(decoder)
    return steering, steering.in_direct_call(args, kwargs)


@torch.compiler.disable
def _after_direct_call(steering: _Steering, keywords: dict[str, Any], output: Any) -> None:
    steering.after_direct_call(keywords["cause_witness"], output)


def _generate(model: PreTrainedModel, unsteered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    generation = _GENERATION.get()
    if generation is not None and generation.steering.model is model:  # the model drafts for itself
        with generation.draft():
            return unsteered(*args, **kwargs)
    try:
        steering = _steering(model)
    except RuntimeError:
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()  # who reads it would wait for ever
        raise
    steering.called = True
    if type(model).generate is not GenerationMixin.generate or kwargs.get("custom_generate") is not None:
        raise ValueError(
            f"{type(model).__name__} generates in a way of its own, which cannot be steered; call generate of transformers "
            "without custom_generate, or the model itself."
        )
    with _replaced_methods(steering.model, steering.decoder):  # to its end, if the context ends before
        generation = _Generation(steering)
        token = _GENERATION.set(generation)
        try:
            output = unsteered(*args, **kwargs)
        finally:
            _GENERATION.reset(token)
        generation.check()
        return output


def _expand(model: PreTrainedModel, unsteered: Callable[..., Any], **kwargs: Any) -> Any:
    generation = _GENERATION.get()
    if generation is not None and generation.steering.model is model:
        generation.expand(kwargs["expand_size"], _tokens(kwargs))
    return unsteered(**kwargs)


def _prepare(
    model: PreTrainedModel, unsteered: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    inputs = unsteered(input_ids, *args, **kwargs)
    generation = _GENERATION.get()
    if generation is None or generation.steering.model is not model:
        return inputs
    return inputs | generation.step(_tokens(kwargs | {"input_ids": input_ids}).shape[1], inputs)


def _refuse(model: PreTrainedModel, unsteered: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "Continuous batching and decoding methods from the Hub cannot be steered; call generate with a batch of prompts."
    )


# Methods of a model that generates.
_GENERATING: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "_expand_inputs_for_generation": _expand,
    "prepare_inputs_for_generation": _prepare,
    "init_continuous_batching": _refuse,
    "load_custom_generate": _refuse,
}


def _owner(model: nn.Module) -> PreTrainedModel:
    """The model of transformers that is meant: itself, or the one inside a wrapper."""
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
    """A copy of the causes, floating."""
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
    """What a model reads, `[rows, tokens, ...]`."""
    found = next((inputs[name] for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None), None)
    if found is None:
        raise ValueError("A model that is steered needs input_ids or inputs_embeds.")
    return found


def _cache(inputs: Mapping[str, Any]) -> tuple[Cache | None, int]:
    """The cache of a call, and how many keys are in it."""
    cache = next((inputs[name] for name in ("cache", "past_key_values") if inputs.get(name) is not None), None)
    if cache is None:
        return None, 0
    if not isinstance(cache, Cache):
        raise ValueError(
            f"How many keys are in a cache of type {type(cache).__name__} is not known: it cannot be steered."
        )
    return cache, int(cache.get_seq_length())


def _check_free(inputs: Mapping[str, Any]) -> None:
    if inputs.get("cause_probs") is not None:
        raise ValueError("cause_probs is given by the call already; leave it out, or do without steer.")
    if inputs.get("encoder_hidden_states") is not None:
        raise ValueError(
            "Attention to encoder_hidden_states cannot be steered: the causes belong to the model's own tokens."
        )
