"""A frozen plan as a program of torch.export, which runs without transformers' code.

adaskip-fx export plan.json --checkpoint smaller --model MODEL
python examples/torch_export.py smaller smaller.pt2
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocabulary], without a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="that adaskip-fx export --checkpoint wrote")
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--longest", type=int, default=128, help="tokens that it takes at most")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="auto").eval()
    tokens = torch.export.Dim("tokens", min=2, max=options.longest)
    traced = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        exported = torch.export.export(
            Logits(model), (traced,), dynamic_shapes={"input_ids": {1: tokens}}
        )
    torch.export.save(exported, options.out)

    again = torch.export.load(options.out)
    ids = torch.arange(21).unsqueeze(0)  # another length than the one that was traced
    with torch.no_grad():
        difference = (again.module()(ids) - Logits(model)(ids)).abs().max()
    products = sum("linear" in str(node.target) for node in again.graph.nodes)
    print(f"{options.out}: {products} linear layers; the largest difference is {difference:.1e}")


if __name__ == "__main__":
    main()
