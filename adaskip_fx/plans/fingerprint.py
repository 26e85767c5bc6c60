"""Which model a plan or a profile is for, as a value; `profiles.fingerprint` takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """Which model was measured.

    Attributes:
        digest: 16 hex characters of the architecture; equal for every dtype, set of weights,
            quantization, vocabulary and set of adapters.
        model_type: the configuration's name for the architecture, for messages.
        parameters: number of weights, those of adapters left out; for messages.
        weights: 16 hex characters of a sample of the weights, and of how adapters are set;
            information only, never compared (it changes with the dtype).
    """

    digest: str
    model_type: str
    parameters: int
    weights: str

    def __str__(self) -> str:
        return f"{self.digest} ({self.model_type}, {self.parameters:,} parameters)"
