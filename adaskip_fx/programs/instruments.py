"""Measure whole decoder layers beside their sublayers."""

from __future__ import annotations

from typing import Any

import torch

from adaskip_passes.transforms.probe import ProbeLayers

from .program import Program


class LayerProgram(Program):
    """A program of the full model that measures every layer, after the sublayers it is to probe."""

    first_passes = (ProbeLayers(),)

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Logits, and the moments [probed + layers, B, 5]."""
        logits, layers, moments = super().run(*arguments)
        return logits, torch.cat((moments, layers))
