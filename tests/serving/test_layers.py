"""Branches of engines' layers are left out: the algebra, the table, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from adaskip_fx.plans.skip_plan import PlanError
from adaskip_fx.plans.sublayer import Kind
from adaskip_fx.plans.surrogate import Surrogate, SurrogateKind
from adaskip_fx.serving import layer_proof
from adaskip_fx.serving.layer_proof import proven_layout, skip
from adaskip_fx.serving.layouts import KNOWN, LAYOUTS
from adaskip_fx.serving.stand_ins import StreamSurrogate
from tests.support import engine_layers as L
from tests.support.surrogates import surrogate

FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pair": (L.PairLayer, "Llama"),
    "sandwich pair": (L.SandwichPairLayer, "Gemma 2"),
    "plain": (L.PlainLayer, "Llama"),
    "multiplied": (lambda: L.PlainLayer(0.22), "Granite"),
    "post-norm": (L.PostNormLayer, "OLMo 2"),
    "parallel": (L.ParallelLayer, "Cohere"),
}
SERIAL = [name for name in FAMILIES if name != "parallel"]


def stack(name: str, seed: int = 0) -> tuple[list[nn.Module], torch.Tensor]:
    """Three layers of a family, and a stream of five tokens."""
    torch.manual_seed(seed)
    return [FAMILIES[name][0]() for _ in range(3)], torch.randn(5, L.HIDDEN)


def by_hand(s: Surrogate | None) -> L.Replace:
    """What a surrogate makes of a stream, in float64."""
    if s is None:
        return lambda x: x
    t = {n: torch.tensor(v, dtype=torch.float64) for n, v in s.tensors.items()}

    def replaced(x: torch.Tensor) -> torch.Tensor:
        if "factor" in t:
            return t["factor"] * x
        if s.kind == "low_rank":
            return x + x @ t["down"].T @ t["up"].T + t["bias"]
        source = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x + (source if s.kind == "normalized" else x) @ t["weight"].T + t["bias"]

    return replaced


def assert_skipped(
    layers: list[nn.Module], x: torch.Tensor, s: dict[str, Surrogate | None]
) -> None:
    """Layers without those branches compute what the textbook says."""
    served = copy.deepcopy(layers)
    for name, found in s.items():
        number, _, kind = name.partition(".")
        layer = served[int(number)]
        layout = proven_layout(layers[int(number)], L.HIDDEN)
        as_kind: Kind = "attention" if kind == "attention" else "ffn"
        skip(layer, layout, as_kind, found)
    wanted = L.textbook(layers, x, {name: by_hand(found) for name, found in s.items()})
    torch.testing.assert_close(L.run(served, x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_computes_what_the_textbook_says(name: str) -> None:
    assert_skipped(*stack(name), {})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "skipped",
    [("0.attention",), ("0.ffn",), ("0.attention", "0.ffn", "1.attention"), ("1.ffn", "2.ffn")],
    ids="+".join,
)
def test_branches_that_pass_the_stream_on(name: str, skipped: tuple[str, ...]) -> None:
    assert_skipped(*stack(name), dict.fromkeys(skipped))


@pytest.mark.parametrize("name", SERIAL)
@pytest.mark.parametrize("kind", get_args(SurrogateKind))
def test_branches_that_become_a_surrogate(name: str, kind: SurrogateKind) -> None:
    found = [surrogate(kind, seed, L.HIDDEN) for seed in range(3)]
    where = ("0.attention", "1.ffn", "2.attention")  # the first layer has no pair yet
    assert_skipped(*stack(name), dict(zip(where, found, strict=True)))


def test_the_pair_behind_a_skipped_norm() -> None:
    """``norm(h, r)`` becomes ``(0, factor * (h + r))``, and a lone stream ``(factor - 1) * x``."""
    h, r = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
    norm = StreamSurrogate(Surrogate.scale(0.5))
    zeros, stream = norm(h, r)
    assert (zeros.tolist(), stream.tolist()) == ([[0.0, 0.0]], [[2.0, 1.5]])
    assert norm(h).tolist() == [[-0.5, 1.0]]
    assert StreamSurrogate(None)(h, r) == (h, r)
    assert StreamSurrogate(None)(h).tolist() == [[0.0, 0.0]]


@pytest.mark.breaks
def test_a_surrogate_that_forgot_the_residual_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The companion: a stand-in that scales one half of the pair."""
    layers, x = stack("pair")
    becomes = StreamSurrogate.becomes
    monkeypatch.setattr(StreamSurrogate, "becomes", lambda self, x: becomes(self, x) + 0.01)
    with pytest.raises((AssertionError, PlanError)):
        assert_skipped(layers, x, {"1.attention": Surrogate.scale(0.5)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_of_half_precision_stays_so(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    for kind in get_args(SurrogateKind):
        s = surrogate(kind)
        norm = StreamSurrogate(s, dtype=dtype)
        zeros, stream = norm(x, x)
        assert zeros.dtype == stream.dtype == norm(x).dtype == dtype
        wanted = by_hand(s)((x + x).double())
        torch.testing.assert_close(stream.double(), wanted, rtol=0.02, atol=0.05)


def test_tensors_of_surrogates_are_in_no_checkpoint() -> None:
    norm = StreamSurrogate(surrogate("linear"))
    assert not norm.state_dict()
    assert not list(norm.parameters())
    assert dict(norm.named_buffers()).keys() == {"weight", "bias"}


def test_layers_that_unpack_attention_weights() -> None:
    """As transformers' own layers do."""
    layers = [L.PlainLayer(unpacks=True)]
    x = torch.randn(5, L.HIDDEN)
    served = copy.deepcopy(layers)
    layout = proven_layout(layers[0], L.HIDDEN, as_tuple=True)
    skip(served[0], layout, "attention", Surrogate.scale(0.5), as_tuple=True)
    assert isinstance(served[0].self_attn(hidden_states=x), tuple)
    wanted = L.textbook(list(layers), x, {"0.attention": lambda x: 0.5 * x})
    torch.testing.assert_close(L.run(list(served), x).double(), wanted, rtol=1e-5, atol=1e-5)


# The table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_of_each_family(name: str) -> None:
    make, expected = FAMILIES[name]
    layer = make()
    before = dict(layer.named_modules())
    assert proven_layout(layer, L.HIDDEN) is KNOWN[expected]
    assert dict(layer.named_modules()) == before  # it was left as it is


def test_rows_of_the_table_are_sound() -> None:
    assert len(KNOWN) == len(LAYOUTS)
    for layout in LAYOUTS:
        parts = [*layout.attention, *layout.ffn, *layout.others]
        assert len(set(parts)) == len(parts), layout.name  # a module is in one branch
        for kind in get_args(Kind)[:2]:
            assert layout.body(kind) in layout.chain(kind)
        assert bool(layout.others) == layout.parallel


class Other(L.PairLayer):
    """A layer with one module more than any layout has."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = L.Body()


class Doubled(L.PlainLayer):
    """Built like Llama's; it adds its branches twice."""

    def forward(self, hidden_states: Any, positions: Any = None) -> Any:
        twice = 2 * self.self_attn(hidden_states=self.input_layernorm(hidden_states))
        hidden_states = hidden_states + twice
        return hidden_states + 2 * self.mlp(self.post_attention_layernorm(hidden_states))


class Swapped(L.PairLayer):
    """Built like Llama's; it does not hand the stream on."""

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        _, residual = super().forward(positions, hidden_states, residual)
        return residual, residual


class Broken(L.PairLayer):
    """Built like Llama's; it wants what nobody gives."""

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        return hidden_states, positions.shape


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Other, r"its modules \(.*gate\) are those of no known layout \(Llama, Granite, .*\)"),
        (Doubled, "it is built like a Llama layer, and adds its branches in another way"),
        (Swapped, "it is built like a Llama layer, and adds its branches in another way"),
        (Broken, "it is built like a Llama layer, and cannot be run as one .*'shape'"),
    ],
)
def test_a_layer_that_is_not_understood_is_refused(made: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        proven_layout(made(), L.HIDDEN)
    assert str(caught.value).startswith(f"{made.__name__}: no plan can be served with this layer")
    assert "--model-impl transformers" in str(caught.value)


@pytest.mark.breaks
def test_without_the_proof_such_a_layer_would_be_served_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The companion: names alone do not tell `Doubled` from Llama's layer."""
    monkeypatch.setattr(layer_proof, "_computes_by", lambda *_: True)
    layers: list[nn.Module] = [Doubled()]
    skip(layers[0], proven_layout(layers[0], L.HIDDEN), "attention", Surrogate.scale(0.5))
    x = torch.ones(1, L.HIDDEN)
    assert not torch.allclose(layers[0].mlp(x), x)  # still a body
    skip(layers[0], KNOWN["Llama"], "ffn", None)
    assert not torch.allclose(L.run(layers, x), 0.5 * x)


def test_a_surrogate_beside_a_parallel_branch_is_refused() -> None:
    layer = L.ParallelLayer()
    with pytest.raises(PlanError, match=r"a scale surrogate in a layer whose .* are in parallel"):
        skip(layer, KNOWN["Cohere"], "ffn", Surrogate.scale(0.5))
