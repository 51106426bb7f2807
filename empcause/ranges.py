"""Allowed values of the fields of options and configurations, and the function that checks them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from empcause.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, both included.

    Attributes:
        low, high: the ends of the range.
        without_low, without_high: whether that end itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'above' if self.without_low else 'of at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.without_high else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "that is finite"


POSITIVE = Range(0, without_low=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
SHARE = Range(0, 1)
SEED = Range(0, 2**32 - 1)


def check_values(options: Any, ranges: Mapping[str, Range]) -> None:
    """Check the fields of a dataclass: numbers against their range, strings against their choices.

    A field annotated with `int` takes whole numbers only; None is accepted if the annotation allows it. The choices are those of
    a `Literal` annotation or of `metadata["choices"]`.

    Args:
        options: an instance of the dataclass.
        ranges: the range of each numeric field, by its name.

    Raises:
        UserError: a value lies outside, or is none of the choices.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        allowed = get_args(field.type) or (field.type,)
        # HfArgumentParser removes None from the types of fields, so a default of None shows that it is allowed.
        if value is None and (NoneType in allowed or field.default is None):
            continue
        if field.name in ranges:
            kind, number = ("a number", Real) if float in allowed else ("a whole number", Integral)
            if isinstance(value, bool) or not isinstance(value, number) or value not in ranges[field.name]:
                raise UserError(f"{field.name} is {value!r}; expected {kind} {ranges[field.name]}.")
        choices = allowed if get_origin(field.type) is Literal else field.metadata.get("choices")
        if choices and value not in choices:
            raise UserError(f"{field.name} is {value!r}; expected one of {', '.join(map(str, choices))}.")
