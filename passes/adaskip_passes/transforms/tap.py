"""Hand out the residual stream, to see where two computations part.

Before::                                    After::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ...)
    x_2 = self.layers_0_ffn(x_1, ...)           x_2 = self.layers_0_ffn(x_1, ...)
    return (logits,)                            return (logits, h, x_1, x_2)

Legal because nothing else changes. Run it first: what a later pass puts in place of a sublayer is
then what is handed out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..partition.outline import stream_after, sublayer_calls


@dataclass(frozen=True)
class Tap:
    """Pass: return the stream before the first sublayer and after every one, as last outputs."""

    def __call__(self, outer: fx.GraphModule) -> None:
        calls = [call for _, call in sorted(sublayer_calls(outer.graph).items())]
        output = outer.graph.output_node()
        (results,) = output.args
        assert isinstance(results, tuple | list)
        output.args = ((*results, calls[0].args[0], *map(stream_after, calls)),)
