"""Every family that is compared with its eager model, in the order of the table in the docs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adaskip_fx.testing.families import Family, tiny_model
from tests.support.families.dense import DENSE
from tests.support.families.experts import EXPERTS
from tests.support.families.mixers import MIXERS
from tests.support.families.refused import REFUSED

__all__ = ["FAMILIES", "tiny_config", "tiny_model"]

FAMILIES: Mapping[str, Family] = MappingProxyType({**DENSE, **EXPERTS, **MIXERS, **REFUSED})


def tiny_config(family: str, **changes: Any) -> Any:
    """Return a tiny configuration of a family; `changes` replace settings of the table."""
    return FAMILIES[family].config(**changes)
