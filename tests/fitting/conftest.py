"""A small model and a fitter on six texts."""

from __future__ import annotations

from typing import Any

import pytest

from adaskip_fx.fitting import Fitter
from tests.support.compiled_llamas import make_model
from tests.support.fits import LIMIT, TEXTS
from tests.support.tokenizers import Letters


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("three_layers")


@pytest.fixture(scope="module")
def fitter(model: Any) -> Fitter:
    return Fitter(model, Letters(), TEXTS, max_length=LIMIT)
