"""The marks of the fault tests: enough kinds, guards that stand where they are said to, a table that is up to date."""

import ast

import pytest

from faults.kinds import kinds
from faults.table import DOCUMENT, with_table

KINDS = list(kinds())


def test_no_kind_is_there_twice():
    described = [(kind.cause, kind.place, kind.promise) for kind in KINDS]
    assert len(set(described)) == len(described)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.test.split("::")[1])
def test_a_guard_stands_where_it_is_said_to(kind):
    for guard in kind.guards:
        text = guard.removed()
        if guard.path.endswith(".py"):
            ast.parse(text)


def test_the_document_has_the_table_of_these_tests():
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == with_table(document), "run `make fault-table`"
