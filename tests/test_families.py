"""Every family of transformers that the support table names, against the eager model."""

from __future__ import annotations

import pytest

from adaskip_fx.testing.families import FAMILIES
from tests import support

KNOWN = [name for name, family in FAMILIES.items() if family.known]


@pytest.mark.parametrize("name", KNOWN)
def test_a_family(name: str) -> None:
    """What is compared is exact, and the table says just that."""
    row = support.measure(name)
    table = support.table().get(support.versions())
    if table is not None:  # of other versions there is no table
        assert row == table[name]
