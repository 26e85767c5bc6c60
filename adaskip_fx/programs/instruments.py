"""What a program can do besides: record the residual stream, measure whole layers, be trained.

A request carries its instrument (`Runtime.new_cache`), and every program that runs for it has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from adaskip_passes import Tap
from adaskip_passes.infra.pass_base import Pass
from adaskip_passes.transforms.hidden_states import HiddenStates
from adaskip_passes.transforms.probe import ProbeLayers
from adaskip_passes.windows.probe_windows import ProbeWindows

if TYPE_CHECKING:
    from .program import Program


class Instrument:
    """Further passes over a program's graph, and a look at its outputs.

    The base class adds nothing. One instrument may serve many programs.
    """

    #: The passes that run before those of the plan.
    passes: Sequence[Pass] = ()
    #: Whether neighbouring surrogates become one.
    composes: bool = True

    @property
    def key(self) -> Hashable:
        """What identifies its programs: instruments of equal keys share them."""
        return (type(self),)

    def link(self, program: Program, outer: fx.GraphModule) -> Callable[..., Any]:
        """Return a function of the placeholders of a rewritten outer graph."""
        return program.link(outer)

    def run(
        self,
        program: Program,
        arguments: Mapping[str, Any],
        weights: tuple[Any, ...],
        valid: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a program; arguments and result are those of `Program.__call__`."""
        return self.read(program, program.run(arguments, weights, valid))

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and statistics, of all that a program's graph returned."""
        return outputs[0], outputs[1] if program.probed else None


class ResidualRecorder(Instrument):
    """Keeps the residual stream of the last step.

    Attributes:
        streams: Tensors [B, T, H]: before the first sublayer and after each one; empty before a
            step.
    """

    passes = (Tap(),)
    composes = False  # the stream after every sublayer is looked at

    def __init__(self) -> None:
        self.streams: tuple[torch.Tensor, ...] = ()

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the residual stream; return logits and statistics."""
        end = 2 + len(program.captured.sublayers)
        self.streams = outputs[1:end]
        return outputs[0], outputs[end] if program.probed else None


class HiddenStateRecorder(Instrument):
    """Keeps the hidden states of a model, as transformers counts them, of the steps that it sees.

    Of sublayers that do not run the stream is as it is there.
    """

    passes = (HiddenStates(),)
    composes = False  # the stream between layers is looked at

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, ...]] = []

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        """Tensors [B, T, H]: the embeddings, after each layer but the last, and the last normed.

        T are the tokens of all steps since `clear`.
        """
        if len(self._parts) == 1:
            return self._parts[0]
        return tuple(torch.cat(parts, 1) for parts in zip(*self._parts, strict=True))

    def clear(self) -> None:
        """Forget what was recorded."""
        self._parts.clear()

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the hidden states; return logits and statistics."""
        logits, *states = outputs
        statistics = states.pop() if program.probed else None
        self._parts.append(tuple(states))
        return logits, statistics


class LayerProbe(Instrument):
    """Measures whole decoder layers besides the sublayers that the full model's program probes.

    It is for steps that probe at least one sublayer.
    """

    passes = (ProbeLayers(),)

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and the statistics [probed + layers, B, 5]."""
        logits, layers, statistics = outputs
        return logits, torch.cat((statistics, layers))


class WindowProbe(Instrument):
    """Measures windows of K/V heads, besides what `LayerProbe` does, for prompts.

    Attributes:
        reading: Of the last step, float32 [K/V heads, windows, B, 3] as `ProbeWindows` has it; None
            before a step.
    """

    def __init__(self, sublayers: tuple[int, ...], windows: tuple[tuple[int, int], ...]) -> None:
        """Measure `windows`, sinks and tokens each, at positions along the stream."""
        self._probe = ProbeWindows(sublayers, windows)
        self.passes = (ProbeLayers(), self._probe)
        self.reading: torch.Tensor | None = None

    @property
    def key(self) -> Hashable:
        """What identifies its programs."""
        return (type(self), self._probe)

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the reading; return logits and the statistics [probed + layers, B, 5]."""
        logits, layers, self.reading, statistics = outputs
        return logits, torch.cat((statistics, layers))
