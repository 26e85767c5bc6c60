"""Heads that forget beside heads that don't: each holds what it reads, and no more.

As in :mod:`tests.kv_cache.test_sliding` memory that is not there reads as NaN. The oracle is an
eager model with a mask for each head.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.kv_cache import regions, retention, sliding
from adaskip_fx.kv_cache.retention import Part, Retained
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from tests.support.compiled_llamas import fewer
from tests.support.cuda_driver import BLOCK, Driver, install_on_cpu
from tests.support.eager_windows import WindowedEager

SPARE, HEADS, LONGEST = 8, 4, 150
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=HEADS,
    vocab_size=50,
    max_position_embeddings=512,
    initializer_range=0.5,
)
torch.manual_seed(0)
MODEL = LlamaForCausalLM(CONFIG).eval()
EAGER = WindowedEager(MODEL)
ATTENTION = [Sublayer(n, "attention") for n in range(2)]
MIXED = {0: Window(9, 3, (1, 3)), 1: Window(5, 0, (0,))}
CLOSE = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture(autouse=True)
def driver() -> Iterator[Driver]:
    with pytest.MonkeyPatch.context() as patch:
        made = install_on_cpu(patch, Driver())
        for module in (retention, sliding):
            patch.setattr(module, "SPARE", SPARE)
        yield made
        gc.collect()
    regions.takes_less_by_head.cache_clear()


@functools.cache
def compiled() -> Any:
    return build(MODEL, None, backend="eager")


def request(
    narrow: Mapping[int, Window] = MIXED, capacity: int = LONGEST, static: bool = True
) -> Any:
    """An empty cache under a plan with these windows."""
    runtime_of(compiled()).static_cache = static
    return compiled().adaskip.new_cache(capacity=capacity, plan=plan(narrow))


def plan(narrow: Mapping[int, Window] = MIXED) -> SkipPlan:
    windows = Windows.of({ATTENTION[n]: w for n, w in narrow.items()})
    return compiled().adaskip.plan.with_windows(windows)


def want(
    ids: torch.Tensor, narrow: Mapping[int, Window] = MIXED, firsts: list[int] | None = None
) -> torch.Tensor:
    seen = {n: (w.sinks, w.tokens, w.full_heads) for n, w in narrow.items()}
    return EAGER.logits(ids, firsts or [0] * len(ids), [seen] * ids.shape[1])


def text(rows: int, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(0, CONFIG.vocab_size, (rows, tokens), generator=draw)


@torch.no_grad()
def feed(cache: Any, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Logits of tokens that come `counts` at a time."""
    parts = torch.split(ids, counts, 1)
    return torch.cat([compiled()(input_ids=p, past_key_values=cache).logits for p in parts], 1)


def promised(rows: int, tokens: int, narrow: Mapping[int, Window]) -> int:
    """Bytes of what windows show, counted token by token, in blocks that hold any of them."""
    token, held = rows * (CONFIG.hidden_size // CONFIG.num_attention_heads) * 4, 0
    for layer in range(CONFIG.num_hidden_layers):
        for head in range(HEADS):
            window = narrow.get(layer)
            full = window is None or head in window.full_heads
            blocks = {
                byte // BLOCK
                for t in range(tokens)
                if full or t < window.sinks or t >= tokens - window.tokens - SPARE  # type: ignore[union-attr]
                for byte in (t * token, (t + 1) * token - 1)
            }
            held += 2 * BLOCK * len(blocks | {0})  # a range keeps its first block
    return held


@pytest.mark.parametrize(
    "static", [pytest.param(False, marks=pytest.mark.slow), True], ids=["views", "static"]
)
def test_each_head_holds_what_it_reads(driver: Driver, static: bool) -> None:
    """Chunks, turns, drafts of 17 tokens and steps give what eager gives, in the promised room."""
    counts = [40, 1, 17, *[1] * 15, 40, 17, *[1] * 20]
    ids = text(2, sum(counts))
    cache = request(static=static)
    torch.testing.assert_close(feed(cache, ids, counts), want(ids), **CLOSE)
    driver.check()
    buffers, stored = cache.lease.buffers, cache.length - 1
    assert buffers.by_head
    apart = 2 * buffers.room * CONFIG.head_dim
    assert buffers.keys[0].stride(1) > apart, "no graph is for heads that touch"
    gone = {Part(0, h, 1): (3, stored - 9 - SPARE) for h in (0, 2)}
    gone |= {Part(1, h, 1): (0, stored - 5 - SPARE) for h in (1, 2, 3)}
    assert buffers.sliding.gone.keys() == gone.keys()
    for part, (first, last) in gone.items():
        found = buffers.sliding.gone[part]
        assert found.start == first
        assert last - 2 < found.stop <= last, "a block has two tokens"
    room = promised(2, buffers.capacity, MIXED)  # (of full heads there is memory ahead)
    assert promised(2, cache.length, MIXED) <= cache.nbytes <= room + 2 * 5 * BLOCK


@pytest.mark.breaks
def test_the_companion_a_head_that_is_taken_for_another_is_noticed() -> None:
    cache = request()
    with pytest.MonkeyPatch.context() as patch:
        of = Part.of
        patch.setattr(Part, "of", lambda self, held: of(self._replace(first=3 - self.first), held))
        logits = feed(cache, text(1, 120), [90, *[1] * 30])
    assert not torch.isfinite(logits[:, -1]).all()


@pytest.mark.slow
@fewer(1)
@given(st.data())
def test_any_heads_cuts_crops_copies_and_rows(data: st.DataObject) -> None:
    some = st.sets(st.integers(0, HEADS - 1), min_size=1, max_size=HEADS - 1)
    narrow = {
        n: Window(data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5)), tuple(heads))
        for n, heads in enumerate(data.draw(st.tuples(some, some | st.just(set(range(HEADS))))))
    }
    ids, at = text(2, 90), 0
    wanted = want(ids, narrow)
    cache = request(narrow, static=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.sampled_from([1, 1, 1, 17, 40]))
        if at + count > 90:
            break
        logits = feed(cache, ids[:, at : at + count], [count])
        torch.testing.assert_close(logits, wanted[:, at : at + count], **CLOSE)
        at += count
        event = data.draw(st.sampled_from(["nothing", "crop", "copy", "rows", "reset"]))
        if event == "crop":
            back = data.draw(st.integers(0, min(SPARE, at - 1)))
            if back:
                cache.crop(-back)
            at -= back
        elif event == "copy":
            cache = copy.deepcopy(cache)
        elif event == "rows":
            order = torch.tensor(data.draw(st.permutations([0, 1])))
            cache.reorder_cache(order)
            ids, wanted = ids[order], wanted[order]
        elif event == "reset":
            cache.reset()
            at = 0


def test_a_choice_of_heads_is_a_link() -> None:
    """Graphs by head are captured once, whichever heads of whichever layers forget."""
    ids, counted = text(1, 130), []
    choices = [{0: Window(9, 3, (2,))}, {1: Window(4, 0, (0, 1, 3))}, MIXED]
    for narrow in choices:
        cache = request(narrow)
        got = feed(cache, ids, [110, 1, 17, 1, 1])
        torch.testing.assert_close(got, want(ids, narrow), **CLOSE)
        assert cache.lease.buffers.by_head
        assert "130 tokens stored head by head," in str(compiled().adaskip)
        runtime = runtime_of(compiled())
        counted.append((runtime.counters.captures, runtime.pieces_compiled))
        del cache
    assert counted[1:] == counted[:1] * 2


def test_what_is_short_lies_token_by_token_and_moves_when_it_grows() -> None:
    narrow = {0: Window(250, 0, (1,))}
    ids, cache, logits, lies = text(1, 300), request(narrow, 0), [], []
    for part in torch.split(ids, [40, 1, 230, *[1] * 29], 1):
        logits.append(feed(cache, part, [part.shape[1]]))
        lies.append(cache.lease.buffers.by_head)
    torch.testing.assert_close(torch.cat(logits, 1), want(ids, narrow), **CLOSE)
    assert not lies[0]
    assert lies[-1]
    assert lies == sorted(lies), "it never goes back"


def test_padded_rows_and_shown_heads_forget_nothing() -> None:
    ids, firsts = text(2, 100), [0, 30]
    mask = (torch.arange(100) >= torch.tensor(firsts).unsqueeze(1)).long()
    cache = request()
    for begin, end in ((0, 98), (98, 99), (99, 100)):
        positions = (torch.arange(begin, end) - torch.tensor(firsts).unsqueeze(1)).clamp_min(0)
        given = {"attention_mask": mask[:, :end], "position_ids": positions}
        with torch.no_grad():
            logits = compiled()(input_ids=ids[:, begin:end], past_key_values=cache, **given).logits
    wanted = want(ids, firsts=firsts)
    torch.testing.assert_close(logits[:, -1], wanted[:, -1], **CLOSE)
    assert cache.lease.buffers.by_head
    assert not cache.lease.buffers.sliding.gone
    other = request()
    feed(other, ids[:1, :60], [60])
    shown = other.layers[0].keys.clone()
    feed(other, ids[:1, 60:], [1] * 40)
    assert torch.equal(other.layers[0].keys[:, :, :60], shown)


@pytest.mark.parametrize("there", ["by head", "token by token"])
def test_saved_and_loaded(tmp_path: Path, there: str) -> None:
    """A file says which heads hold what, and goes on where no memory can be let go."""
    ids, path = text(1, 130), tmp_path / "prefix"
    cache = request()
    feed(cache, ids[:, :110], [100, *[1] * 10])
    cache.save(path)
    with pytest.MonkeyPatch.context() as patch:
        if there != "by head":
            patch.setattr("adaskip_fx.kv_cache.growing_memory.is_available", lambda device: False)
        loaded = compiled().adaskip.load_cache(path, plan=plan())
        assert loaded.lease.buffers.by_head == (there == "by head")
        assert loaded.lease.buffers.sliding.gone == cache.lease.buffers.sliding.gone != {}
        got = feed(loaded, ids[:, 110:], [12, *[1] * 8])
        torch.testing.assert_close(got, want(ids)[:, 110:], **CLOSE)


def test_refusals() -> None:
    """By head as by layer: what is gone cannot be seen again."""
    cache = request()
    feed(cache, text(1, 110), [100, *[1] * 10])
    with pytest.raises(NotImplementedError, match="cannot go back to 60 tokens: layer 0 sees a"):
        cache.crop(-50)
    with pytest.raises(NotImplementedError, match="layer 1's keys and values cannot be shown"):
        _ = cache.layers[1].keys
    for wider in (
        {0: Window(9, 3, (1, 2, 3))},
        {0: Window(10, 3, (1, 3))},
        {0: Window(9, 3, (0,))},
    ):
        with pytest.raises(PlanError, match=r"0\.attention sees more under this plan than under"):
            cache.request.decode_with(plan({**MIXED, **wider}))
    cache.request.decode_with(plan({**MIXED, 0: Window(4, 3, (3,))}))


def test_where_heads_cannot_lie_apart() -> None:
    """On several ranks, and where an attention counts other heads than are stored."""
    graphs = runtime_of(compiled()).graphs
    alone = graphs.structure
    assert alone._held((None, Retained(1, 2)), graphs.specs[0]) == ()
    assert graphs.retention([plan()])[1] == (None, *[Retained(0, 5)] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alone, "_shares", {})
        assert graphs.retention([plan({0: Window(5, 1, (2,)), 1: Window(5, 1)})]) == (
            *((),),
            (Retained(1, 5),) * HEADS,
        )
