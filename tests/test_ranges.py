"""Ranges and choices that a dataclass of options declares."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from empcause.errors import UserError
from empcause.ranges import COUNT, SHARE, Range, check_values


@dataclass
class Options:
    count: int = 3
    limit: int | None = None
    share: float = 0.5
    factor: float = 1.0
    scope: Literal["all", "last"] = "all"
    form: str = field(default="mean", metadata={"choices": ["mean", "sum"]})

    def __post_init__(self) -> None:
        below = Range(0, 2, without_low=True, without_high=True)
        check_values(self, {"count": COUNT, "limit": COUNT, "share": SHARE, "factor": below})


def test_what_lies_inside_passes():
    Options()
    Options(count=np.int64(1), limit=7, share=1, factor=np.float32(1.5), scope="last", form="sum")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; expected a whole number of at least 1."),
        ({"count": 1.5}, "count is 1.5; expected a whole number of at least 1."),
        ({"count": True}, "count is True; expected a whole number of at least 1."),
        ({"count": None}, "count is None; expected a whole number of at least 1."),
        ({"limit": -1}, "limit is -1; expected a whole number of at least 1."),
        ({"share": 1.01}, "share is 1.01; expected a number of at least 0 and at most 1."),
        ({"share": math.nan}, "share is nan; expected a number of at least 0 and at most 1."),
        ({"share": "much"}, "share is 'much'; expected a number of at least 0 and at most 1."),
        ({"factor": 0.0}, "factor is 0.0; expected a number above 0 and below 2."),
        ({"factor": 2}, "factor is 2; expected a number above 0 and below 2."),
        ({"factor": math.inf}, "factor is inf; expected a number above 0 and below 2."),
        ({"scope": "first"}, "scope is 'first'; expected one of all, last."),
        ({"form": None}, "form is None; expected one of mean, sum."),
    ],
)
def test_what_lies_outside_is_refused_by_name(values, message):
    with pytest.raises(UserError) as error:
        Options(**values)
    assert str(error.value) == message
