"""Sublayers: what is found in a graph, and what is refused with its place and reason."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from adaskip_passes import UnsupportedError, find_sublayers
from adaskip_passes.analysis.residual_adds import module_path
from adaskip_passes.analysis.residual_branches import ATTENTION_OPERATIONS, ResidualBranch
from tests.support.fx_decoders import (
    BLOCKS,
    Attention,
    Block,
    Decoder,
    Falcon,
    Memory,
    Mlp,
    NeoX,
    Shape,
    Slot,
    arguments,
    shared,
    step,
    trace,
)


def graph_of(model: Decoder, shape: Shape, tokens: int = 7) -> fx.Graph:
    return trace(step, **arguments(model, shape, tokens, 7)).graph.graph


def find(block: type[nn.Module], layers: int = 2, tokens: int = 7) -> tuple[ResidualBranch, ...]:
    shape = Shape(layers=layers)
    return find_sublayers(graph_of(Decoder(shape, block), shape, tokens))


def names(found: Sequence[ResidualBranch]) -> list[str]:
    return [s.name for s in found]


def refusal(block: type[nn.Module], layers: int = 2) -> str:
    """The message with which a decoder of such blocks is refused."""
    with pytest.raises(UnsupportedError) as caught:
        find(block, layers)
    return str(caught.value)


TWO_LAYERS = ["layers_0_attention", "layers_0_ffn", "layers_1_attention", "layers_1_ffn"]


# What is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_every_way_to_join_a_branch(block: str) -> None:
    """And each sublayer's stream is what the sublayer before it made."""
    found = find(BLOCKS[block])
    assert names(found) == TWO_LAYERS
    assert [s.index for s in found] == [0, 1, 2, 3]
    assert [s.layer for s in found] == [0, 0, 1, 1]
    assert [s.stream for s in found[1:]] == [s.add for s in found[:-1]]
    assert found[0].stream.target is functional.embedding
    assert all(s.branch in s.add.all_input_nodes for s in found)


def test_prefill_decode_and_symbolic_lengths_have_the_same() -> None:
    assert names(find(Block, tokens=1)) == TWO_LAYERS
    assert names(shared(Shape()).sublayers) == TWO_LAYERS


def test_paths_are_those_of_the_modules() -> None:
    assert [s.path for s in find(Block)] == [
        "layers.0.self_attn",
        "layers.0.mlp",
        "layers.1.self_attn",
        "layers.1.mlp",
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_as_many_as_the_model_has(layers: int) -> None:
    assert len(find(Block, layers)) == 2 * layers


class Bare(nn.Module):
    """Sublayers whose modules say nothing about what they do."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.one, self.two = self.parts(shape)

    def parts(self, shape: Shape) -> tuple[nn.Module, nn.Module]:
        return Attention(shape), Mlp(shape)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.one(x, table, slot, start)
        return x + self.two(x)


class Reversed(Bare):
    """The FFN comes first."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.two(x)
        return x + self.one(x, table, slot, start)


def test_kinds_follow_from_effects_without_names() -> None:
    assert names(find(Bare)) == TWO_LAYERS
    assert [s.kind for s in find(Reversed)] == ["ffn", "attention"] * 2


class ByHand(Attention):
    """Attention written out: no operator to recognise, but it stores keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, slot: Slot, start: int) -> Tensor:
        return functional.softmax(q @ k.transpose(-1, -2), -1) @ v


class Cacheless(Attention):
    """The other half: the operator, and no cache."""

    def store(self, slot: Slot, k: Tensor, v: Tensor) -> None:
        return None


@pytest.mark.parametrize("attention", [ByHand, Cacheless])
def test_either_the_cache_or_the_operator_makes_it_attention(attention: type[Attention]) -> None:
    class Unnamed(Bare):
        def parts(self, shape: Shape) -> tuple[nn.Module, nn.Module]:
            return attention(shape), Mlp(shape)

    assert names(find(Unnamed)) == TWO_LAYERS


class State(nn.Module):
    """A state-space layer in miniature: its state is overwritten, nothing attends."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.into = nn.Linear(shape.hidden, shape.hidden // shape.heads)
        self.back = nn.Linear(shape.hidden // shape.heads, shape.hidden)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        state = slot.keys[:, 0, 0] + self.into(x).sum(1)
        slot.keys[:, 0, 0].copy_(state)
        return self.back(torch.tanh(state)).unsqueeze(1).expand_as(x)


def test_a_state_write_in_a_module_named_mixer_is_a_mixer() -> None:
    class Mamba(Bare):
        def __init__(self, shape: Shape) -> None:
            super().__init__(shape)
            self.mamba = State(shape)

        def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
            return x + self.mamba(x, table, slot, start)

    assert names(find(Mamba)) == ["layers_0_mixer", "layers_1_mixer"]


def test_a_router_with_softmax_is_no_attention() -> None:
    found = find(BLOCKS["Routed"])
    assert any(n.target is functional.softmax for n in found[0].add.graph.nodes)
    assert names(found) == TWO_LAYERS


class SharedExpert(Mlp):
    """DeepSeek: routed and shared experts are two terms of one sum."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shared_experts = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared_experts(x)


def test_two_terms_of_one_module_are_one_branch() -> None:
    class Experts(Block):
        ffn = SharedExpert

    assert [s.path for s in find(Experts)][1] == "layers.0.mlp"


# False friends ---------------------------------------------------------------------------------


class Cubic(nn.Module):
    """The add of a tanh GELU, as if it were a decoder layer."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + 0.044715 * torch.pow(x, 3.0)


def cubic_layer(shape: Shape) -> nn.Module:
    return Cubic()


def test_an_add_inside_a_branch_is_no_sublayer() -> None:
    """Though on the stream the same add is one: what tells them apart is the chain."""
    assert names(find(BLOCKS["Gelu"])) == TWO_LAYERS
    shape = Shape()
    on_stream = find_sublayers(graph_of(Decoder(shape, cubic_layer), shape))
    assert names(on_stream) == ["layers_0_ffn", "layers_1_ffn"]


class Deep(Mlp):
    """An FFN with a longer chain of residual adds than a decoder of one layer has."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        for _ in range(4):
            h = h + torch.tanh(h)
        return self.down(h)


class DeepFfn(Block):
    ffn = Deep


def test_a_longer_chain_inside_a_branch_is_not_taken_silently() -> None:
    assert refusal(DeepFfn, 1).startswith("attention at layers.0.self_attn lies outside every")
    assert names(find(DeepFfn, 3))[-1] == "layers_2_ffn"


class Weighted(Block):
    """``torch.add(x, branch, alpha=2)`` is another function of the stream."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.add(x, branch, alpha=2)


def test_a_weighted_add_is_not_taken_for_a_residual() -> None:
    assert refusal(Weighted).startswith("no residual stream found")


# What is refused -------------------------------------------------------------------------------


class Plain(Block):
    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch


def test_no_residual() -> None:
    assert refusal(Plain) == (
        "no residual stream found: no add in the graph has one operand that is an ancestor of the "
        "other. Only decoders made of x + f(x) sublayers can be skipped."
    )


class CalledFfn(Bare):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.mlp = Attention(shape)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.mlp(x, table, slot, start)


class CalledAttention(Bare):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.self_attn = Mlp(shape)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.self_attn(x)


class CalledMixer(Bare):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.mamba = Attention(shape)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.mamba(x, table, slot, start)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (CalledFfn, "layers.0.mlp: its name says ffn, but it writes to a cache, which says atten"),
        (CalledAttention, "layers.0.self_attn: its name says attention, but it has no effect, wh"),
    ],
)
def test_a_name_that_contradicts_what_is_done(block: type[nn.Module], says: str) -> None:
    message = refusal(block)
    assert message.startswith(says)
    assert message.endswith("It is refused because skipping the wrong kind corrupts the KV cache.")


def test_attention_may_be_called_a_mixer() -> None:
    """Nemotron-H calls all its branches so; what it does decides."""
    assert names(find(CalledMixer)) == ["layers_0_attention", "layers_1_attention"]


class Cohere(Block):
    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.attend(x, table, slot, start) + self.feed(x)


@pytest.mark.parametrize("block", [NeoX, Falcon])
@pytest.mark.parametrize("layers", [1, 2])
def test_parallel_branches_in_one_expression(block: type[nn.Module], layers: int) -> None:
    assert refusal(block, layers) == (
        "layer 0 adds two branches (layers.0.mlp, layers.0.self_attn) to the residual stream in "
        "one expression, and they cannot be taken one after the other: both have effects, or the "
        "stream is overwritten and read again."
    )


def test_parallel_branches_added_one_by_one() -> None:
    assert refusal(Cohere) == (
        "2 chains of 1 residual adds are equally long, ending at layers.0, layers.1; which one is "
        "the residual stream cannot be told (add in layers.0 changes what the first gives before "
        "the next begins, and is no residual add)."
    )


class Scaled(Block):
    """The stream is scaled after each layer (Gemma 4's layer_scalar)."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.attend(x, table, slot, start)
        x = x + self.feed(x)
        x *= 0.5
        return x


def test_a_stream_that_is_scaled_between_layers() -> None:
    assert refusal(Scaled) == (
        "2 chains of 2 residual adds are equally long, ending at layers.0, layers.1; which one is "
        "the residual stream cannot be told (imul in layers.0 changes what the first gives before "
        "the next begins, and is no residual add)."
    )


class Towers(Decoder):
    """Two streams of equal depth."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.layers
        x, y = self.embed(ids), torch.tanh(self.embed(ids))
        for layer in layers:
            x, y = x + layer.feed(x), y + layer.feed(y)
        return self.head(x * y)


def test_two_streams() -> None:
    shape = Shape()
    graph = graph_of(Towers(shape), shape)
    with pytest.raises(
        UnsupportedError,
        match=r"2 chains of 2 .* equally long, ending at .*which one .* cannot be told\.$",
    ):
        find_sublayers(graph)


class AttendsAtTheEnd(Decoder):
    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.layers
        x = self.embed(ids)
        for layer in layers:
            x = x + layer.feed(x)
        return self.head(functional.scaled_dot_product_attention(x, x, x))


def test_attention_outside_the_stream() -> None:
    shape = Shape()
    graph = graph_of(AttendsAtTheEnd(shape), shape)
    with pytest.raises(UnsupportedError) as caught:
        find_sublayers(graph)
    place, _, reason = str(caught.value).partition(" lies outside every residual sublayer")
    assert place.startswith("attention at ")
    assert reason == " that was found, so the residual stream was not understood."


class Numberless(Decoder):
    """A decoder whose layers are attributes, not members of a list."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.first = Mlp(shape)

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.first(x))


def test_layers_without_a_number() -> None:
    shape = Shape()
    graph = graph_of(Numberless(shape), shape)
    with pytest.raises(
        UnsupportedError,
        match=r"sublayer 0 of the residual stream has no layer number in its module path "
        r"\(first.*\); put decoder layers into a ModuleList\.",
    ):
        find_sublayers(graph)


class TwoFfns(Block):
    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.feed(x)
        return x + self.mlp(self.norm1(x))


def test_two_sublayers_of_a_kind_in_one_layer() -> None:
    assert refusal(TwoFfns) == (
        "layer 0 has two ffn sublayers (layers.0.mlp, layers.0.mlp); a plan could not name one of "
        "them."
    )


class Repeating(Decoder):
    """ALBERT: one layer, run twice."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            x = self.layers[0](x, self.table(0, ids.shape[1]), memory.slots[0], 0)
        return self.head(self.norm(x))


def test_a_layer_that_runs_twice() -> None:
    shape = Shape(layers=1)
    graph = graph_of(Repeating(shape), shape)
    with pytest.raises(UnsupportedError, match="layer 0 has two attention sublayers"):
        find_sublayers(graph)


# Streams that change on the way ----------------------------------------------------------------


class Narrow(Block):
    """A bfloat16 embedding whose stream is float32 from the first add on."""

    def attend(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return super().attend(x.to(self.norm1.weight.dtype), table, slot, start)

    def feed(self, x: Tensor) -> Tensor:
        return super().feed(x.to(self.norm2.weight.dtype))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x.float() + branch.float()


class Flattened(Block):
    """OPT: the FFN adds to the stream as [batch * tokens, hidden]."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.attend(x, table, slot, start)
        batch, tokens, hidden = x.shape
        flat = x.reshape(batch * tokens, hidden)
        return (flat + self.feed(flat)).view(batch, tokens, hidden)


@pytest.mark.parametrize(("block", "sizes"), [(Narrow, {"dtype": torch.bfloat16}), (Flattened, {})])
def test_a_sublayer_gives_the_kind_of_stream_that_it_took(
    block: type[nn.Module], sizes: dict[str, Any]
) -> None:
    """Otherwise handing the stream on in its place gives later pieces another shape or dtype."""
    shape = Shape(**sizes)
    model = Decoder(shape, block)
    model.head.float()
    graph = graph_of(model, shape)
    try:
        found = find_sublayers(graph)
    except UnsupportedError:
        return
    for s in found:
        before, after = s.stream.meta["example_value"], s.add.meta["example_value"]
        assert (before.shape, before.dtype) == (after.shape, after.dtype), s.path


# Module paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['model']._modules['layers']._modules['0']._modules['mlp']", "layers.0.mlp"),
        ("L['self'].model.layers[3].self_attn", "layers.3.self_attn"),
        ("L['model'].model.layers[11].mlp.act_fn", "layers.11.mlp.act_fn"),
        ("L['self']._modules['model']._modules['layers']._modules['2']", "layers.2"),
        ("L['args'][0].model.layers[11].mlp", "model.layers.11.mlp"),
    ],
)
def test_module_paths(raw: str, path: str) -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", nn.Module), "inner": (raw, nn.Module)}
    assert module_path(node).endswith(path)
    assert module_path(graph.placeholder("y")) == ""


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers 5.24 does it for the old names of arguments."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapped


class DecoratedDecoder(Decoder):
    forward = decorated(Decoder.forward)


def compiled_graph(model: Decoder, shape: Shape) -> fx.Graph:
    """What `torch.compile(model)` hands a backend; its frame is the model's own forward."""
    graphs = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    args = arguments(model, shape)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(args["ids"], args["memory"])
    (graph,) = graphs
    return graph


def test_a_decorated_forward_has_the_same_paths() -> None:
    """Its first argument is the model, so that every source begins with the number 0."""
    shape = Shape(layers=2)
    plain = compiled_graph(Decoder(shape, Block), shape)
    wrapped = compiled_graph(DecoratedDecoder(shape, Block), shape)
    stacks = (n.meta["nn_module_stack"] for n in wrapped.nodes if "nn_module_stack" in n.meta)
    assert all(raw.startswith("L['args'][0]") for stack in stacks for raw, _ in stack.values())
    assert [module_path(n) for n in wrapped.nodes] == [module_path(n) for n in plain.nodes]
    assert names(find_sublayers(wrapped)) == TWO_LAYERS
    assert [s.path for s in find_sublayers(wrapped)] == [s.path for s in find_sublayers(plain)]


def test_every_operator_of_attention_is_known_as_one() -> None:
    """A layer that reads another's keys and values stores none: its operator says what it is."""
    importlib.import_module("adaskip_passes.windows")
    names = ("attend", "attend_causal", "attend_packed", "attend_windowed")
    for name in (*names, "attend_packed_windowed", "attend_masked_windowed"):
        assert hasattr(torch.ops.adaskip, name), name
        assert f"{name}.default" in ATTENTION_OPERATIONS
