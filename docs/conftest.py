"""Runs the pages' code: every block of Python, in the order of its page, on a tiny model.

What the pages call `model`, `tokenizer`, `texts`, `inputs` and `profile` is made here, and pieces
are run as they are instead of being compiled by Inductor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import adaskip_fx
from adaskip_fx.api import compile as compile_
from tests.support.command_line import make_model, make_tokenizer


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("page"))
    with pytest.MonkeyPatch.context() as patch:
        assert compile_.__kwdefaults__ is not None
        patch.setitem(compile_.__kwdefaults__, "backend", "eager")
        yield
    os.chdir(before)


def _names(namespace: dict[str, Any]) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    texts = ["the quick brown fox jumps over the lazy dog " * 4, "pack my box with five jugs " * 6]
    namespace |= {
        "model": model,
        "tokenizer": tokenizer,
        "texts": texts,
        "sources": texts[::-1],
        "inputs": {"input_ids": torch.arange(3, 12).unsqueeze(0)},
        "profile": adaskip_fx.calibrate(model, tokenizer, texts, max_length=64),
    }


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    fixtures=["page"],
    setup=_names,
).pytest()
