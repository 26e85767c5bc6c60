"""Return the residual stream, to see where two computations part.

Before::                                    After::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ...)
    x_2 = self.layers_0_ffn(x_1, ...)           x_2 = self.layers_0_ffn(x_1, ...)
    return (logits,)                            return (logits, h, x_1, x_2)

Legal because nothing else changes. Run it first: what a later pass puts in place of a sublayer is
then among the results.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..partition.outer import stream_after, sublayer_calls


@dataclass(frozen=True)
class Tap(Pass):
    """Pass over an outer graph: return the stream before the first sublayer and after every one.

    They are the last outputs, each [batch, tokens, hidden]. Its changes are streams.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Append the outputs; see :class:`Pass`."""
        calls = [call for _, call in sorted(sublayer_calls(graph_module.graph).items())]
        output = graph_module.graph.output_node()
        (results,) = output.args
        assert isinstance(results, tuple | list)
        output.args = ((*results, calls[0].args[0], *map(stream_after, calls)),)
        return PassResult(graph_module, 1 + len(calls))
