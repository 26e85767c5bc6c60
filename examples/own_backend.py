"""A torch.compile backend of your own behind the passes: this one counts what it is given.

python examples/own_backend.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import adaskip_fx

PIECES: list[Counter[str]] = []


@torch._dynamo.register_backend
def counted(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
    """Run a piece as it is; remember how often it calls what."""
    calls = (n for n in graph.graph.nodes if n.op.startswith("call"))
    PIECES.append(Counter(getattr(n.target, "__name__", str(n.target)) for n in calls))
    return graph.forward


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    fast = adaskip_fx.compile(
        model, plan=adaskip_fx.SkipPlan.of(sublayers(model), []), backend="counted"
    )
    with torch.no_grad():
        for layer in (2, 3):
            skip = [f"{layer}.attention", f"{layer + 1}.ffn"]
            fast.adaskip.plan = adaskip_fx.SkipPlan.of(sublayers(model), skip)
            fast.generate(torch.arange(1, 9).unsqueeze(0), max_new_tokens=4, do_sample=False)
            print(f"skips {', '.join(skip)}: {len(PIECES)} pieces have been compiled")
    for piece in PIECES[:4]:
        print(dict(piece.most_common(3)))


def sublayers(model: LlamaForCausalLM) -> list[adaskip_fx.Sublayer]:
    """Return all sublayers of a Llama: attention and FFN of every layer."""
    layers = range(model.config.num_hidden_layers)
    return [adaskip_fx.Sublayer(i, kind) for i in layers for kind in ("attention", "ffn")]


if __name__ == "__main__":
    main()
