"""Which models run with attn_implementation="empcause": those in a committed table, and those that `check_model` admits.

Two classes of a model are looked up: that of its configuration, when the implementation is chosen and when masks are made, and
that of its attention modules, when attention is computed.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from empcause.errors import UserError

TABLE = Path(__file__).parent / "model_classes.json"

_table = json.loads(TABLE.read_text(encoding="utf-8"))
_runs: set[str] = {name for entry in _table["runs"].values() for name in entry["configs"] + entry["attention"]}
_reasons: dict[str, str] = {
    name: f"does not run {model}: it {entry['reason']}"
    for model, entry in _table["refused"].items()
    for name in entry["configs"]
}
# Classes that were found in the table or admitted by `check_model`. They are kept because every attention layer asks.
_admitted: set[type] = set()
_checking: ContextVar[set[type] | None] = ContextVar("checking", default=None)


def name_of(cls: type) -> str:
    """Return a class's name in the table: its module and its qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def admit(classes: Iterable[type]) -> None:
    """Let configurations and attention modules of these classes run in this process."""
    _admitted.update(classes)


@contextmanager
def collecting() -> Iterator[set[type]]:
    """Let every class run in this thread while the context lasts, and yield the set of the classes that `require` was given."""
    seen: set[type] = set()
    token = _checking.set(seen)
    try:
        yield seen
    finally:
        _checking.reset(token)


def require(asked: object, derived: bool = False) -> None:
    """Refuse a configuration or an attention module whose class has not been checked.

    Args:
        asked: the configuration or module.
        derived: whether a class that inherits from a checked class is accepted.

    Raises:
        UserError: the class is not admitted. The message gives the reason if the table has one, otherwise what to do instead,
            for example the call that checks the class.
    """
    cls = type(asked)
    # The compiler cannot trace `_look_up`. If a model's first call is compiled, its attention modules are not in `_admitted` yet.
    if cls not in _admitted and not (torch.compiler.is_compiling() and name_of(cls) in _runs):
        _look_up(asked, derived)


def _look_up(asked: object, derived: bool) -> None:
    """Admit the class of `asked` if the table or `collecting` allows it, otherwise raise as `require` describes."""
    cls = type(asked)
    seen = _checking.get()
    if seen is not None:
        seen.add(cls)
        return
    for ancestor in cls.__mro__ if derived else (cls,):
        name = name_of(ancestor)
        if ancestor in _admitted or name in _runs:
            _admitted.add(cls)
            return
        if name in _reasons:
            raise UserError(f'attn_implementation="empcause" {_reasons[name]}; load it with "eager" or "sdpa".')
    if getattr(asked, "is_encoder_decoder", False):
        raise UserError(
            f'attn_implementation="empcause" has not been checked with models of {cls.__name__}, which have an encoder and a '
            'decoder, and the check takes only causal LMs; load it with "eager" or "sdpa".'
        )
    if "text_config" in getattr(cls, "sub_configs", ()):
        raise UserError(
            f'attn_implementation="empcause" has not been checked with all parts of models of {cls.__name__}; give it to the '
            'text model alone: attn_implementation={"text_config": "empcause"}.'
        )
    raise UserError(
        f'attn_implementation="empcause" has not been checked with models of {cls.__name__}: load the model with "eager" '
        "and call empcause.check_model(model), which checks a small one of its class and admits it, then "
        'model.set_attn_implementation("empcause").'
    )


def refuse_unchecked_models() -> None:
    """Make transformers call `require` when "empcause" is chosen for a model, before the model is built or loaded."""
    original: Callable[..., str] = PreTrainedModel.get_correct_attn_implementation

    @wraps(original)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == "empcause":
            require(self.config, derived=True)
        return original(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
