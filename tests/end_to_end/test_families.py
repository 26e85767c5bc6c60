"""Every family of transformers that the support table names, against the eager model."""

from __future__ import annotations

from typing import Any

import pytest

from adaskip_fx.testing import Oracle
from tests.model_support import matrix
from tests.support.families.all import FAMILIES

KNOWN = [name for name, family in FAMILIES.items() if family.known]
#: Those of `make test`: experts, a mixer, refused. Further ones are
#: in `test_metamorphic.py` and, with windows and soft caps, in `tests/capture/test_attention.py`.
OFTEN = frozenset({"mixtral", "mamba", "xlstm"})


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in KNOWN]
)
def test_a_family(name: str) -> None:
    """What is compared is exact, and the table says just that."""
    row = matrix.measure(name)
    table = matrix.table().get(matrix.versions())
    if table is not None:  # of other versions there is no table
        assert row == table[name]


def test_the_readme_shows_the_table() -> None:
    begin, end = matrix.MARKS
    shown = matrix.PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert shown.strip() == matrix.rendered(matrix.table())


def test_a_family_that_differs_between_versions_says_so() -> None:
    row = dict.fromkeys(matrix.COLUMNS, "yes")
    other = {**row, "probed": "no: for a reason. And more"}
    shown = matrix.rendered({"torch 1, x": {"a": row}, "torch 2, x": {"a": other, "b": row}})
    assert "| a | yes | torch 1: yes; torch 2: no: for a reason | yes |" in shown
    assert "| b | yes | yes | yes |" in shown


def test_versions_are_named_as_shortly_as_they_differ() -> None:
    row = dict.fromkeys(matrix.COLUMNS, "yes")
    other = {**row, "probed": "no: for a reason"}
    by_version = {"torch 1, x 1": other, "torch 2, x 1": row, "torch 2, x 2": row}
    shown = matrix.rendered({v: {"a": r} for v, r in by_version.items()})
    assert "| yes | torch 1: no: for a reason; torch 2: yes | yes |" in shown
    shown = matrix.rendered({v: {"a": r} for v, r in {**by_version, "torch 2, x 2": other}.items()})
    said = "torch 1: no: for a reason; torch 2, x 1: yes; torch 2, x 2: no: for a reason"
    assert f"| yes | {said} | yes |" in shown


@pytest.mark.breaks
def test_a_wrong_model_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what is measured can fail."""
    right = Oracle.join

    def wrong(self: Oracle, stream: Any, parts: Any, total: Any) -> Any:
        return right(self, stream, parts, total) * 1.001

    monkeypatch.setattr(Oracle, "join", wrong)
    with pytest.raises(AssertionError, match=r"llama, logits after 9 tokens"):
        matrix.measure("llama")
