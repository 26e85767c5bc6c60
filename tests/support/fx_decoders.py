"""Tiny decoders in plain torch, and captures of them that all tests of a process share.

Each has a ``ModuleList`` of blocks, a rotary table that all layers share, and K/V buffers and
counters of its own that attention writes in place. The classes of blocks differ in how a branch
joins the residual stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from adaskip_passes import PieceCompiler, canonicalize, capture, find_sublayers, outline
from adaskip_passes.analysis.residual_branches import ResidualBranch
from adaskip_passes.tracing.capture import Capture

ROOM = 48  # tokens that a K/V buffer holds


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny decoder; `block` is the name of a class in `BLOCKS`."""

    layers: int = 2
    hidden: int = 8
    heads: int = 2
    vocab: int = 11
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    block: str = "Block"
    batch: int = 2


class Slot:
    """One layer's storage: keys and values [batch, heads, ROOM, dim], and how many are filled."""

    def __init__(self, shape: Shape) -> None:
        size = (shape.batch, shape.heads, ROOM, shape.hidden // shape.heads)
        self.keys = torch.zeros(size, dtype=shape.dtype)
        self.values = torch.zeros(size, dtype=shape.dtype)
        self.count = torch.zeros(1, dtype=torch.int64)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.count


class Memory:
    """The storage of all layers; `filled` is as long as what is stored after the step."""

    def __init__(self, shape: Shape, filled: int) -> None:
        self.slots = [Slot(shape) for _ in range(shape.layers)]
        self.filled = torch.empty(filled, dtype=torch.int8)

    def tensors(self) -> list[Tensor]:
        return [t for slot in self.slots for t in slot.tensors()]


class Norm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape.hidden) + 0.5)
        self.eps = shape.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


class Attention(nn.Module):
    """Causal attention [batch, tokens, hidden] that stores its keys and values in place."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, dim]."""
        batch, tokens, hidden = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q * table, k * table, v

    def store(self, slot: Slot, k: Tensor, v: Tensor) -> None:
        """Append to a slot and count, as a static cache does."""
        tokens = k.shape[2]
        where = slot.count + torch.arange(tokens)
        slot.keys.index_copy_(2, where, k)
        slot.values.index_copy_(2, where, v)
        slot.count.add_(tokens)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, slot: Slot, start: int) -> Tensor:
        """A prompt attends to itself, a single token to all that is stored."""
        if q.shape[2] > 1:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        keys, values = slot.keys.narrow(2, 0, start + 1), slot.values.narrow(2, 0, start + 1)
        return functional.scaled_dot_product_attention(q, keys, values)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        q, k, v = self.project(x, table)
        self.store(slot, k, v)
        return self.out(self.mix(q, k, v, slot, start).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.hidden)
        self.down = nn.Linear(2 * shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.up(x)))


class GeluMlp(Mlp):
    """Its tanh GELU, written out, has an add of the residual kind: ``h + 0.044715 * h**3``."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        inner = h + 0.044715 * torch.pow(h, 3.0)
        return self.down(0.5 * h * (1.0 + torch.tanh(0.7978845608 * inner)))


class RoutedMlp(nn.Module):
    """Two experts, mixed by the softmax of a router."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.hidden, 2, bias=False)
        self.experts = nn.ModuleList(Mlp(shape) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = functional.softmax(self.router(x), dim=-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1)
        return (mixed * weights.unsqueeze(-2)).sum(-1)


class Block(nn.Module):
    """Pre-norm: ``x + f(norm(x))``, twice."""

    attention: type[nn.Module] = Attention
    ffn: type[nn.Module] = Mlp

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(shape), Norm(shape)
        self.self_attn, self.mlp = self.attention(shape), self.ffn(shape)

    def attend(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        """The branch that attention adds to the stream."""
        return self.self_attn(self.norm1(x), table, slot, start)

    def feed(self, x: Tensor) -> Tensor:
        """The branch that the FFN adds to the stream."""
        return self.mlp(self.norm2(x))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = self.join(x, self.attend(x, table, slot, start))
        return self.join(x, self.feed(x))


class BranchFirst(Block):
    """GPT-2."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch + x


class InPlace(Block):
    """The stream is written in place."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        x += branch
        return x


class BranchInPlace(Block):
    """The branch is written in place."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch.add_(x)


class TorchAdd(Block):
    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.add(x, branch)


class PostNorm(Block):
    """OLMo2: the norm is in the branch, after the operator."""

    def attend(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return self.norm1(self.self_attn(x, table, slot, start))

    def feed(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))


class Sandwich(Block):
    """Gemma2: a norm before and one after."""

    def feed(self, x: Tensor) -> Tensor:
        return self.norm1(self.mlp(self.norm2(x)))


class Dropped(Block):
    """Phi-3: dropout around the branch."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + functional.dropout(branch, 0.1, self.training)


class Multiplied(Block):
    """Granite: the branch is multiplied before it is added."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch * 0.22


class Gelu(Block):
    ffn = GeluMlp


class Routed(Block):
    ffn = RoutedMlp


BLOCKS: Mapping[str, type[Block]] = MappingProxyType(
    {
        block.__name__: block
        for block in (
            Block,
            BranchFirst,
            InPlace,
            BranchInPlace,
            TorchAdd,
            PostNorm,
            Sandwich,
            Dropped,
            Multiplied,
            Gelu,
            Routed,
        )
    }
)


class NeoX(Block):
    """Attention and FFN in parallel, added to each other first; two norms."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        attended = self.attend(x, table, slot, start)
        return self.feed(x) + attended + x


class Falcon(Block):
    """In parallel: the FFN's result is overwritten by the sum of branches; a dropout around it."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        branches = self.feed(x)
        branches += self.attend(x, table, slot, start)
        return x + functional.dropout(branches, 0.1, self.training)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head; weights from a fixed seed."""

    def __init__(self, shape: Shape, block: Callable[[Shape], nn.Module] | None = None) -> None:
        super().__init__()
        make = block or BLOCKS[shape.block]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.embed = nn.Embedding(shape.vocab, shape.hidden)
            self.layers = nn.ModuleList(make(shape) for _ in range(shape.layers))
            self.norm = Norm(shape)
            self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
            self.register_buffer("frequencies", torch.rand(shape.hidden // shape.heads))
        self.to(shape.dtype).eval().requires_grad_(False)

    def table(self, start: int, tokens: int) -> Tensor:
        """What every layer multiplies queries and keys by, [tokens, dim]."""
        positions = torch.arange(start, start + tokens).unsqueeze(1)
        frequencies = self.get_buffer("frequencies")
        return torch.cos(positions * frequencies.float()).to(frequencies.dtype)

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        tokens = ids.shape[1]
        start = memory.filled.shape[0] - tokens
        x = self.embed(ids)
        table = self.table(start, tokens)
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x, table, slot, start)
        return self.head(self.norm(x))


def step(model: Decoder, ids: Tensor, memory: Memory) -> tuple[Tensor]:
    """The function that is captured: logits [batch, tokens, vocabulary]."""
    return (model(ids, memory),)


@dataclass(frozen=True)
class Cut:
    """A captured decoder, cut into pieces."""

    shape: Shape
    model: Decoder
    capture: Capture
    sublayers: tuple[ResidualBranch, ...]
    outer: fx.GraphModule
    compiler: PieceCompiler


#: Small enough to be captured by every run of the tests: depths, widths, dtypes, ways to add.
SHAPES: Sequence[Shape] = (
    Shape(layers=1),
    Shape(layers=2),
    Shape(layers=3, hidden=12, heads=3, vocab=7, batch=1),
    Shape(layers=4, hidden=4, heads=1),
    Shape(layers=2, hidden=16, dtype=torch.bfloat16),
    Shape(layers=2, block="PostNorm"),
    Shape(layers=2, block="BranchFirst"),
    Shape(layers=1, block="Gelu"),
)


def arguments(
    model: nn.Module, shape: Shape, tokens: int = 7, filled: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `step`; K/V of tokens before these are made up. Equal calls, equal tensors."""
    past = (tokens if filled is None else filled) - tokens
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, shape.vocab, (shape.batch, tokens), generator=source)
    memory = Memory(shape, past + tokens)
    for slot in memory.slots:
        slot.count.fill_(past)
        for buffer in (slot.keys, slot.values):
            made_up = torch.randn(buffer.shape, generator=source).to(buffer.dtype)
            buffer[:, :, :past] = made_up[:, :, :past]
    return {"model": model, "ids": ids, "memory": memory}


def mark_lengths(args: Mapping[str, Any]) -> None:
    """Make the lengths in `step`'s arguments symbolic."""
    for tensor, dim in ((args["ids"], 1), (args["memory"].filled, 0)):
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def trace(function: Callable[..., Any], **args: Any) -> Capture:
    """Capture a function, and nothing else."""
    with torch.no_grad():
        return capture(function, args, lambda captured: captured)


def cut(
    model: Decoder, shape: Shape, tokens: int = 7, filled: int | None = None, backend: str = "eager"
) -> Cut:
    """Capture a decoder with symbolic lengths and outline it."""
    args = arguments(model, shape, tokens, filled)
    mark_lengths(args)

    def build(got: Capture) -> Cut:
        canonicalize(got.graph)
        found = find_sublayers(got.graph.graph)
        outer = outline(got.graph, found)
        return Cut(shape, model, got, found, outer, PieceCompiler(got, backend))

    with torch.no_grad():
        return capture(step, args, build)


def cut_block(block: type[nn.Module], layers: int = 2, **sizes: Any) -> Cut:
    """The same, of a decoder of blocks that a test wrote."""
    shape = Shape(layers=layers, **sizes)
    return cut(Decoder(shape, block), shape)


@functools.cache
def shared(shape: Shape, tokens: int = 7, filled: int | None = None) -> Cut:
    """One capture for the whole process."""
    return cut(Decoder(shape), shape, tokens, filled)


def bind(
    got: Cut, graph: fx.Graph, args: Mapping[str, Any], extra: Mapping[str, Tensor] | None = None
) -> list[Any]:
    """The values of `graph`'s placeholders: `extra` by name, the rest by what was captured."""
    named = dict(extra or {})
    captured = got.capture.graph.graph.find_nodes(op="placeholder")
    source = {n.name: s for n, s in zip(captured, got.capture.sources, strict=True)}
    names = [n.name for n in graph.find_nodes(op="placeholder")]
    found = got.capture.binder([source[n] for n in names if n not in named])(args)
    values = iter(found)
    return [named.pop(n) if n in named else next(values) for n in names]


def call(
    function: Callable[..., Any],
    got: Cut,
    graph: fx.Graph,
    args: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> Any:
    """What a program with the placeholders of `graph` returns for `step`'s arguments."""
    with torch.no_grad():
        return function(*bind(got, graph, args, extra))
