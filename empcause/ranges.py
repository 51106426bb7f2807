"""Which values the fields of options and configurations may have, and one check of them."""

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
        low, high: the ends.
        without_low, without_high: leave that end itself out.
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

    A field annotated with `int` takes whole numbers alone, and None passes where the annotation allows it. Choices are those
    of `metadata["choices"]` or of a `Literal` annotation.

    Args:
        options: the dataclass's instance.
        ranges: range by name of the field.

    Raises:
        UserError: a value lies outside, or is none of the choices.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        allowed = get_args(field.type) or (field.type,)
        # HfArgumentParser takes None out of the types of fields.
        if value is None and (NoneType in allowed or field.default is None):
            continue
        if field.name in ranges:
            kind, number = ("a number", Real) if float in allowed else ("a whole number", Integral)
            if isinstance(value, bool) or not isinstance(value, number) or value not in ranges[field.name]:
                raise UserError(f"{field.name} is {value!r}; expected {kind} {ranges[field.name]}.")
        choices = allowed if get_origin(field.type) is Literal else field.metadata.get("choices")
        if choices and value not in choices:
            raise UserError(f"{field.name} is {value!r}; expected one of {', '.join(map(str, choices))}.")
