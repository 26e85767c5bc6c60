"""One graph for any number of rows: against the eager model, in any order, and what it costs."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from transformers import DynamicCache

from adaskip_fx.api import build
from adaskip_fx.capture.batch_sizes import BatchSizes
from adaskip_fx.capture.graph_key import GraphKey
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import FuseProjections, Pass, run_passes
from adaskip_passes.decode.fuse_attention import FuseAttention
from adaskip_passes.decode.fuse_experts import FuseExperts
from adaskip_passes.decode.fuse_rotary import FuseRotary
from adaskip_passes.linking import precompile
from adaskip_passes.partition.outer import Piece, piece_of
from tests.support.compiled_llamas import make_model
from tests.support.custom_decoders import OwnConfig, OwnDecoder
from tests.support.families.all import tiny_config, tiny_model

MOST = 9  # rows
#: On a CPU torch's convolution goes another way from 16 rows on, and has a graph for that; beams
#: are two for each row.
CONVOLVED, MOST_CONVOLVED = frozenset({"jamba", "mamba2", "qwen3_next", "falcon_h1"}), 7
PROMPT, MORE = 6, 3
Run = Callable[[Any, torch.Tensor], torch.Tensor]


# Which rows have a graph together --------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "static_tokens", "least", "most"),
    [
        *((1, 0, 1, 1), (2, 0, 2, None), (500, 0, 2, None)),
        *((1, 1, 1, 1), (2, 1, 2, 16), (16, 1, 2, 16), (17, 1, 17, 32), (33, 1, 33, None)),
        *((1, 4, 1, 1), (4, 4, 2, 4), (5, 4, 5, 8), (9, 4, 9, None)),
        *((2, 8, 2, 2), (3, 8, 3, 4), (5, 8, 5, None)),
        *((2, 16, 2, 2), (3, 16, 3, None), (2, 17, 2, None), (2, 32, 2, None)),
    ],
)
def test_rows_have_a_graph_together(
    rows: int, static_tokens: int, least: int, most: int | None
) -> None:
    sizes = BatchSizes.around(rows, static_tokens)
    assert (sizes.least, sizes.most) == (least, most)
    assert least <= sizes.example <= (most or sizes.example)
    assert sizes.vary == (most != least)


def test_a_graph_is_tried_with_two_numbers_of_rows() -> None:
    assert BatchSizes.only(1).checked(1) == (1,)
    assert BatchSizes.around(7).checked(3) == (3, 2)
    assert BatchSizes.around(7).checked(2) == (2, 3)
    assert BatchSizes.around(40, 1).checked(33) == (33, 34)


# Requests --------------------------------------------------------------------------------------


def cache_of(model: Any) -> Any:
    ours = hasattr(model, "adaskip")
    return model.adaskip.new_cache() if ours else DynamicCache(config=model.config)


def steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A prompt, a token, and some tokens: all logits."""
    cache = cache_of(model)
    parts = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1], ids[:, PROMPT + 1 :]
    return torch.cat([model(input_ids=p, past_key_values=cache).logits for p in parts], 1)


def padded_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same of rows of which the first begins with padding; its logits are left out."""
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = cache_of(model)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for begin, end in ((0, PROMPT), (PROMPT, PROMPT + 1)):
        out = model(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=places[:, begin:end],
            past_key_values=cache,
        )
        found.append(out.logits.masked_fill(mask[:, begin:end, None] == 0, 0))
    return torch.cat(found, 1)


def written(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    prompt = ids[:, :PROMPT]
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    tokens: torch.Tensor = model.generate(input_ids=prompt, attention_mask=mask, **options)
    return tokens


KINDS: dict[str, Run] = {
    "steps": steps,
    "padded steps": padded_steps,
    "generate": written,
    "beams": functools.partial(written, num_beams=2),
}
#: Other than Llama: windows, experts, latent attention, states, learned positions, ALiBi.
FAMILIES = {
    "jamba": ("steps", "generate", "beams"),
    "mistral, sliding window": tuple(KINDS),
    "gemma2": tuple(KINDS),
    "mixtral": tuple(KINDS),
    "qwen3_moe": ("steps", "generate"),
    "gpt_oss": ("steps", "padded steps", "generate"),
    "deepseek_v3": tuple(KINDS),
    "mamba2": ("generate", "beams"),
    "qwen3_next": ("steps", "generate"),
    "falcon_h1": ("steps", "generate"),
    "opt": tuple(KINDS),
    "bloom": ("steps", "generate"),
}


def made(family: str, static_cache: bool) -> tuple[Any, Any]:
    model = make_model("grouped") if family == "llama" else tiny_model(tiny_config(family))
    return model, build(model, None, backend="eager", static_cache=static_cache)


@torch.no_grad()
def check(
    family: str, kinds: Sequence[str], static_cache: bool, least: int = 1, seed: int = 0
) -> None:
    """Any rows in any order give the eager model's results, and graphs of few serve all."""
    model, fast = made(family, static_cache)
    draw = random.Random(seed)
    most = MOST_CONVOLVED if family in CONVOLVED else MOST
    order = draw.sample(range(least, most + 1), most + 1 - least)
    first = [least, draw.randint(2, 4)]  # on a static cache three tokens have more kinds of graphs
    first += [draw.randint(5, 6), most] if static_cache else []
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    for kind in kinds:
        run, counted = KINDS[kind], list[tuple[int, int, int]]()
        for rows in (*first, *order):
            ids = torch.randint(3, vocabulary, (rows, PROMPT + 1 + MORE), generator=generator)
            assert_same(run(fast, ids), run(model, ids), f"{family}, {kind} of {rows} rows")
            counted.append(counts(fast))
        assert counted[-1] == counted[len(first) - 1], f"{family}, {kind}: more for other rows"
    assert not runtime_of(fast).counters.one_batch


def counts(fast: Any) -> tuple[int, int, int]:
    stats = fast.adaskip.stats()
    return stats.captures, stats.pieces_compiled, stats.links


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not got.is_floating_point():
        assert torch.equal(got, expected), what
        return
    assert got.shape == expected.shape, what
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"{what}: logits are off by {error:.1e}"


@pytest.mark.parametrize(
    ("kinds", "static_cache", "least"),
    [
        pytest.param(("steps", "padded steps"), False, 2, id="views"),
        pytest.param(("generate", "beams"), True, 1, id="static"),
        pytest.param(tuple(KINDS), False, 1, id="views, all", marks=pytest.mark.slow),
        pytest.param(tuple(KINDS), True, 1, id="static, all", marks=pytest.mark.slow),
    ],
)
def test_any_rows_of_a_llama(kinds: Sequence[str], static_cache: bool, least: int) -> None:
    check("llama", kinds, static_cache, least)


@pytest.mark.parametrize("static_cache", [False, True], ids=["views", "static"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_any_rows_of_a_family(family: str, static_cache: bool) -> None:
    check(family, FAMILIES[family], static_cache)


# Models for which rows are no symbol -----------------------------------------------------------


class ByRow(OwnDecoder):
    """A model whose code goes through its rows one by one."""

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = super().run(x, cache)
        return torch.stack([logits[row] * (1 + row) for row in range(x.shape[0])])


@torch.no_grad()
def test_code_that_needs_its_rows_has_a_graph_for_each() -> None:
    """The near miss: such a graph is captured, counted, and right for its rows alone."""
    torch.manual_seed(0)
    model = ByRow(OwnConfig()).eval()
    fast = build(model, None, backend="eager")
    counters = runtime_of(fast).counters
    ids = torch.randint(0, 31, (3, PROMPT), generator=torch.Generator().manual_seed(0))

    def check_rows(rows: int) -> None:
        got, expected = (m(input_ids=ids[:rows]).logits for m in (fast, model))
        assert_same(got, expected, f"{rows} rows")

    before = counters.captures
    check_rows(2)
    assert (counters.captures - before, counters.one_batch) == (1, 1)
    check_rows(3)
    check_rows(2)
    assert (counters.captures - before, counters.one_batch) == (2, 1)


# Pieces as they are lowered for a GPU ----------------------------------------------------------

LOWERING = FuseProjections(), FuseAttention(), FuseRotary()


def pieces_of(fast: Any, rows: int) -> list[Piece]:
    """The pieces of a decode step of so many rows."""
    plain = GraphKey.plain("decode", torch.bfloat16, torch.device("cpu"))
    key = replace(plain, batch=BatchSizes.around(rows, 1), static_tokens=1)
    calls = runtime_of(fast).graphs.capture(key).outer.graph.find_nodes(op="call_module")
    return [piece for piece in map(piece_of, calls) if piece is not None]


def lowered(fast: Any, rows: int) -> dict[str, Counter[str]]:
    """How often each operator of ours is called in a decode step's pieces, by piece."""
    found = {}
    for piece in pieces_of(fast, rows):
        graph = fx.Graph()
        graph.output(graph.graph_copy(piece.module.graph, {}))
        module = run_passes(fx.GraphModule(piece.module, graph), LOWERING, copy=False)
        found[piece.name] = Counter(n.target.name() for n in module.graph.nodes if _is_ours(n))
    return found


def _is_ours(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "adaskip"


def test_pieces_of_any_rows_are_fused() -> None:
    """Rows that our kernels take are fused as a fixed number is; more are not projected so."""
    fast = build(make_model("one_layer", torch.bfloat16), None, backend="eager")
    pieces = lowered(fast, 3)
    attention = {"adaskip::project": 2, "adaskip::normalize": 1, "adaskip::store_and_attend": 1}
    assert pieces["layers_0_attention"] == attention
    assert pieces["layers_0_ffn"] == {"adaskip::project": 2, "adaskip::normalize": 1}
    assert lowered(fast, 33)["layers_0_attention"] == {"adaskip::store_and_attend": 1}


def test_no_pass_settles_how_many_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pieces of a GPU's steps are lowered; a router's scores have a symbol of rows."""

    def lowering(key: GraphKey, backend: str) -> tuple[Pass, ...]:
        return (*LOWERING, FuseExperts()) if key.static_cache else ()

    monkeypatch.setattr("adaskip_fx.capture.phase_graph._lowering", lowering)
    model = tiny_model(tiny_config("mixtral", num_hidden_layers=1))
    fast = build(model, None, backend="eager", static_cache=True)
    for rows in (4, 5):
        ids = torch.randint(3, 60, (rows, PROMPT))
        cache, theirs = fast(ids[:, :-1]).past_key_values, model(ids[:, :-1]).past_key_values
        got = fast(ids[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids[:, -1:], past_key_values=theirs).logits)
    (state,) = runtime_of(fast).graphs.states.known
    assert [len(state.captures[key]) for key in state.captures if key.static_cache] == [1]


def test_few_numbers_of_rows_are_foreseen() -> None:
    """Where any number may come, kernels of the fewest are compiled ahead, and no others."""
    fast = build(make_model("one_layer", torch.bfloat16), None, backend="eager")
    counts = {}
    for rows in (3, 33):
        piece = next(p for p in pieces_of(fast, rows) if p.name == "layers_0_attention")
        (attend,) = (n for n in piece.module.graph.nodes if "attend" in str(n.target))
        queries = attend.args[0].meta["example_value"]
        counts[rows] = [some[0].shape[0] for some in precompile._of_rows([queries])]
    assert counts == {3: [2, 4, 8, 16], 33: [33]}
