"""Compiled models on a GPU."""

from __future__ import annotations

import dataclasses

import torch

from adaskip_fx.api import build
from tests.support.compiled_llamas import Entry, make_model
from tests.support.eager_reference import Oracle

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}


@dataclasses.dataclass(frozen=True, eq=False)
class OnGpu(Entry):
    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.model.dtype]

    def tokens(self, batch: int, count: int, seed: int = 0) -> torch.Tensor:
        return super().tokens(batch, count, seed).cuda()

    @property
    def recorded(self) -> int:
        recorder = self.runtime.runner.static._recorder
        assert recorder is not None
        return recorder.recorded


def on_gpu(
    shape: str = "grouped", dtype: torch.dtype = torch.float32, backend: str = "eager"
) -> OnGpu:
    model = make_model(shape, dtype).cuda()
    return OnGpu(model, build(model, None, backend=backend), Oracle(model))
