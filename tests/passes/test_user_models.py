"""Decoders in nobody's tree, skipped with the passes and torch alone.

It is also how to use `adaskip_passes`: capture a function, cut it, leave sublayers out, link.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from adaskip_passes import (
    PieceCompiler,
    Probe,
    Replacement,
    Skip,
    canonicalize,
    capture,
    find_sublayers,
    link,
    outline,
    run_passes,
)
from adaskip_passes.tracing.capture import Capture

WIDTH, DEPTH, VOCABULARY = 12, 3, 17


class Look(nn.Module):
    """Causal attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class Think(nn.Sequential):
    """An FFN."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


class Step(nn.Module):
    """Pre-norm: each branch reads the stream that the one before has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calm, self.look, self.think = nn.LayerNorm(WIDTH), Look(), Think()

    def forward(self, x: Tensor, without: Collection[str] = ()) -> Tensor:
        if "attention" not in without:
            x = x + self.look(self.calm(x))
        if "ffn" not in without:
            x = x + self.think(self.calm(x))
        return x


class Fork(Step):
    """Parallel: both branches read the same stream."""

    def forward(self, x: Tensor, without: Collection[str] = ()) -> Tensor:
        calm = self.calm(x)
        looked: Tensor | int = 0 if "attention" in without else self.look(calm)
        thought: Tensor | int = 0 if "ffn" in without else self.think(calm)
        return x + (looked + thought)


class Writer(nn.Module):
    """A decoder of either. `without` names sublayers, as "1.ffn", that its source leaves out."""

    def __init__(self, kind: type[Step]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.read = nn.Embedding(VOCABULARY, WIDTH)
        self.steps = nn.ModuleList(kind() for _ in range(DEPTH))
        self.write = nn.Linear(WIDTH, VOCABULARY)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, without: Iterable[str] = ()) -> Tensor:
        x = self.read(ids)
        for i, step in enumerate(self.steps):
            here = [name.split(".")[1] for name in without if name.startswith(f"{i}.")]
            x = step(x, here)
        return self.write(x)


def logits(model: Writer, ids: Tensor) -> tuple[Tensor]:
    """The function that is captured."""
    return (model(ids),)


class Cut:
    """A writer, captured for any length and cut into sublayers."""

    def __init__(self, model: Writer) -> None:
        self.model = model
        ids = torch.zeros(1, 6, dtype=torch.int64)
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            capture(logits, {"model": model, "ids": ids}, self.build)

    def build(self, got: Capture) -> None:
        canonicalize(got.graph)
        self.sublayers = find_sublayers(got.graph.graph)
        self.outer = outline(got.graph, self.sublayers)
        self.compiler = PieceCompiler(got, "eager")
        names = (n.name for n in got.graph.graph.find_nodes(op="placeholder"))
        self.sources = dict(zip(names, got.sources, strict=True))
        self.capture = got

    def names(self) -> list[str]:
        """Two a layer: "0.attention", "0.ffn" and so on."""
        return [f"{s.layer}.{s.kind}" for s in self.sublayers]

    def run(self, outer: fx.GraphModule, ids: Tensor, **more: Any) -> tuple[Tensor, ...]:
        """What a rewritten graph gives for a prompt."""
        program = link(outer, self.compiler)
        names = [n.name for n in outer.graph.find_nodes(op="placeholder")]
        captured = [name for name in names if name not in more]
        bound = self.capture.binder([self.sources[name] for name in captured])
        values = dict(zip(captured, bound({"model": self.model, "ids": ids}), strict=True)) | more
        with torch.no_grad():
            result: tuple[Tensor, ...] = program(*(values[name] for name in names))
        return result


@pytest.fixture(scope="module", params=[Step, Fork])
def cut(request: pytest.FixtureRequest) -> Cut:
    return Cut(Writer(request.param))


PLANS = ((), ("0.attention",), ("1.ffn",), ("0.ffn", "2.attention"), ("1.attention", "1.ffn"))


def without(cut: Cut, plan: Collection[str]) -> fx.GraphModule:
    places = [i for i, name in enumerate(cut.names()) if name in plan]
    return run_passes(cut.outer, (Skip({i: Replacement("nothing", None) for i in places}),))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tokens", [2, 9])
def test_skipping_is_leaving_it_out_of_the_source(
    cut: Cut, plan: Collection[str], tokens: int
) -> None:
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    (got,) = cut.run(without(cut, plan), ids)
    torch.testing.assert_close(got, cut.model(ids, without=plan), rtol=1e-5, atol=1e-6)


def test_leaving_it_out_matters(cut: Cut) -> None:
    """The companion."""
    ids = torch.arange(9).unsqueeze(0)
    (got,) = cut.run(without(cut, ("1.ffn",)), ids)
    for other in ((), ("1.attention",), ("0.ffn",)):
        assert not torch.allclose(got, cut.model(ids, without=other), rtol=1e-3)


def test_all_sublayers_are_found(cut: Cut) -> None:
    assert cut.names() == [f"{i}.{kind}" for i in range(DEPTH) for kind in ("attention", "ffn")]


def test_equal_layers_are_one_piece(cut: Cut) -> None:
    """Three layers, and four things to compile."""
    cut.run(cut.outer, torch.arange(5).unsqueeze(0))
    assert cut.compiler.compiled == 4


def test_probes_read_what_the_source_would(cut: Cut) -> None:
    """The cosine of the stream before and after the last FFN."""
    ids = torch.arange(4, 11).unsqueeze(0)
    last = len(cut.sublayers) - 1
    outer = run_passes(cut.outer, (Probe((last,)),))
    valid = torch.ones(1, 7, dtype=torch.bool)
    *_, moments = cut.run(outer, ids, valid=valid)
    model, seen = cut.model, list[Tensor]()
    handle = model.write.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    model(ids, without=(f"{DEPTH - 1}.ffn",))
    handle.remove()
    after, before = seen
    cosines = functional.cosine_similarity(before, after, dim=-1)
    (cosine, *_) = moments.flatten()
    torch.testing.assert_close(cosine.float(), cosines.sum(), rtol=1e-4, atol=1e-4)
