"""Layers that forget: what is read is held, and what is not held has no memory behind it.

The device is a CPU whose memory is kept by a driver of the tests: whatever has no memory behind it
is NaN, which one read of it would spread to the logits.
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

from adaskip_fx.api import build
from adaskip_fx.kv_cache import mapped_memory, retention, sliding
from adaskip_fx.kv_cache.retention import Part, Retained, Retention
from adaskip_fx.kv_cache.saved import SavedCacheError
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import prefill_only
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_passes.windows.find_attention import Attention
from tests.support.compiled_llamas import fewer, make_model
from tests.support.cuda_driver import Driver, install_on_cpu
from tests.support.eager_windows import WindowedEager
from tests.support.families.all import FAMILIES, tiny_config, tiny_model
from tests.support.families.refused import REFUSED

SPARE = 8
ATTENTION = [Sublayer(n, "attention") for n in range(3)]
NARROW = {0: Window(9, 3), 2: Window(5, 0)}
MODEL = make_model("three_layers")
EAGER = WindowedEager(MODEL)
HEADS = MODEL.config.num_key_value_heads


@pytest.fixture(autouse=True)
def driver() -> Iterator[Driver]:
    with pytest.MonkeyPatch.context() as patch:
        made = install_on_cpu(patch, Driver())
        for module in (retention, sliding):
            patch.setattr(module, "SPARE", SPARE)
        yield made
        gc.collect()


@functools.cache
def compiled(static: bool) -> Any:
    made = build(MODEL, None, backend="eager")
    runtime_of(made).static_cache = static
    return made


def plan(narrow: Mapping[int, Window] = NARROW) -> SkipPlan:
    windows = Windows.of({ATTENTION[n]: w for n, w in narrow.items()})
    return compiled(False).adaskip.plan.with_windows(windows)


def want(ids: torch.Tensor, narrow: Mapping[int, Window] = NARROW) -> torch.Tensor:
    seen = {n: (w.sinks, w.tokens, w.full_heads) for n, w in narrow.items()}
    return EAGER.logits(ids, [0] * len(ids), [seen] * ids.shape[1])


def text(rows: int, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(0, MODEL.config.vocab_size, (rows, tokens), generator=draw)


@torch.no_grad()
def feed(fast: Any, cache: Any, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Logits of tokens that come `counts` at a time."""
    logits = []
    for part in torch.split(ids, counts, 1):
        logits.append(fast(input_ids=part, past_key_values=cache).logits)
        check_pointers(cache)
    return torch.cat(logits, 1)


def check_pointers(cache: Any) -> None:
    """Each range has memory behind its first byte: a driver takes no other pointer for a kernel."""
    memory = cache.lease.buffers.memory
    if memory is not None:
        bases = map(memory.address, range(len(memory.sizes)))
        assert all(mapped_memory.bindings().behind(base) for base in bases)


def gone(cache: Any) -> dict[Part, range]:
    found: dict[Part, range] = cache.lease.buffers.sliding.gone
    return found


def layer(index: int) -> Part:
    return Part(index, 0, HEADS)


@pytest.mark.parametrize("static", [False, True], ids=["views", "static"])
@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_that_is_gone_is_read(driver: Driver, static: bool, rows: int) -> None:
    fast = compiled(static)
    counts = [50, 1, 1, 1, 20, 1, 5, *[1] * 20, 40, 1, 1]
    ids = text(rows, sum(counts))
    cache = fast.adaskip.new_cache(plan=plan())
    torch.testing.assert_close(feed(fast, cache, ids, counts), want(ids), atol=2e-4, rtol=1e-3)
    driver.check()
    stored = cache.length - 1  # the last token had come when it was last looked
    assert gone(cache) == {
        layer(0): range(3, stored - 9 - SPARE),
        layer(2): range(0, stored - 5 - SPARE),
    }


@fewer(1)
@given(st.data())
def test_any_cuts_crops_copies_and_rows(data: st.DataObject) -> None:
    """Also in other rows, by a copy, and after tokens were taken back."""
    fast = compiled(data.draw(st.booleans(), label="static"))
    narrow = {
        n: Window(data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5)))
        for n in data.draw(st.sets(st.integers(0, 2)))
    }
    ids = text(2, 90)
    wanted, cache, at = want(ids, narrow), fast.adaskip.new_cache(plan=plan(narrow)), 0
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.one_of(st.just(1), st.integers(1, 40)))
        if at + count > 90:
            break
        with torch.no_grad():
            logits = fast(input_ids=ids[:, at : at + count], past_key_values=cache).logits
        torch.testing.assert_close(logits, wanted[:, at : at + count], atol=2e-4, rtol=1e-3)
        check_pointers(cache)
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


def test_the_companion_a_window_wider_than_what_is_held_is_noticed() -> None:
    """Memory is let go: with less held than windows see, logits are no numbers."""

    def too_much(self: Retained, length: int) -> range:
        return range(self.first, max(self.first, length - self.last + 4))

    cache = compiled(True).adaskip.new_cache(plan=plan())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retained, "gone", too_much)
        logits = feed(compiled(True), cache, text(1, 200), [150, *[1] * 50])
    assert not torch.isfinite(logits[:, -1]).all()


def test_memory_is_what_windows_need(driver: Driver) -> None:
    """Two of three layers see 14 tokens at most: after 500 they hold that and some pieces."""
    ids = text(1, 500)
    windowed, full = (compiled(True).adaskip.new_cache(plan=p) for p in (plan(), plan({})))
    for cache in (windowed, full):
        feed(compiled(True), cache, ids, [400, *[1] * 100])
    sizes = [b for _, b in windowed.lease.buffers.sliding._ranges[layer(0)]]
    of_layer = full.nbytes / 3
    most = sum(size * (3 + 9 + SPARE) + 3 * 64 + size for size in sizes)
    assert windowed.nbytes <= of_layer + 2 * most
    assert windowed.nbytes < 0.45 * full.nbytes


def test_the_next_request_has_all_of_it(driver: Driver) -> None:
    """Buffers go on to a request with other windows, or none; a short one maps nothing anew."""
    ids, pool = text(1, 120), runtime_of(compiled(True)).buffer_pool
    used = set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "keep", True)
        for narrow in (NARROW, {}, {1: Window(7, 1)}, NARROW):
            cache = compiled(True).adaskip.new_cache(plan=plan(narrow))
            got = feed(compiled(True), cache, ids, [100, *[1] * 20])
            torch.testing.assert_close(got, want(ids, narrow), atol=2e-4, rtol=1e-3)
            assert set(gone(cache)) == set(map(layer, narrow))
            driver.check()
            used.add(id(cache.lease.buffers))
            del cache
        every = plan(dict.fromkeys(range(3), Window(7, 1)))
        mapped = []
        for _ in range(3):
            cache = compiled(True).adaskip.new_cache(plan=every)
            feed(compiled(True), cache, ids[:, :20], [20])
            used.add(id(cache.lease.buffers))
            mapped.append(driver.next)
            del cache
        assert mapped[1] == mapped[2]
        pool.clear()
    assert len(used) == 1


def test_tokens_taken_back_stay_gone() -> None:
    """After a crop less would be let go; what went before is not held, and no copy has it."""
    ids = text(1, 260)
    cache = compiled(False).adaskip.new_cache(plan=plan())
    feed(compiled(False), cache, ids[:, :201], [200, 1])
    before = gone(cache)
    cache.crop(-SPARE)
    at = cache.length
    feed(compiled(False), cache, ids[:, at : at + 40], [40])
    assert gone(cache) == before, "not less than before"
    twin = copy.deepcopy(cache)
    got = feed(compiled(False), twin, ids[:, at + 40 :], [1] * (260 - at - 40))
    torch.testing.assert_close(got, want(ids)[:, at + 40 :], atol=2e-4, rtol=1e-3)
    with pytest.raises(NotImplementedError, match="this cache cannot go back to"):
        cache.crop(-50)


def test_a_mask_in_the_middle_of_a_request_keeps_all() -> None:
    """Rows of a second turn are padded: the first turn was not, and nothing had gone yet."""
    ids = text(2, 130)
    cache = compiled(False).adaskip.new_cache(plan=plan())
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, 100:105] = 0
    with torch.no_grad():
        compiled(False)(input_ids=ids[:, :100], past_key_values=cache)
        step = {"input_ids": ids[:, 100:120], "attention_mask": mask}
        logits = compiled(False)(**step, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert not gone(cache)
    torch.testing.assert_close(logits[:1], want(ids[:1, :120])[:, 100:], atol=2e-4, rtol=1e-3)


def test_what_is_shown_stays() -> None:
    ids = text(1, 160)
    cache = compiled(True).adaskip.new_cache(plan=plan())
    feed(compiled(True), cache, ids[:, :120], [120])
    shown = cache.layers[0].keys
    before = shown.clone()
    feed(compiled(True), cache, ids[:, 120:], [1] * 40)
    assert torch.equal(shown, before)
    assert not gone(cache)


def test_a_window_that_shows_all_maps_what_there_is() -> None:
    ids = text(1, 10)
    held = []
    for narrow in ({}, dict.fromkeys(range(3), Window(2**31 - 1, 0))):
        cache = compiled(False).adaskip.new_cache(plan=plan(narrow))
        feed(compiled(False), cache, ids, [10])
        held.append(cache.nbytes)
    assert held[1] <= held[0]


#: In `make test` one that makes its masks itself, in two kinds of layers.
KINDS = sorted({*FAMILIES} - {*REFUSED})


@pytest.mark.parametrize(
    "name",
    [n if n == "llama4" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS],
)
def test_no_family_reads_what_is_gone(driver: Driver, name: str) -> None:
    """Whatever computes their attention; also where one token was taken back."""
    if not FAMILIES[name].known:
        pytest.skip("not in this version of transformers")
    fast = build(tiny_model(tiny_config(name)), None, backend="eager")
    runtime = runtime_of(fast)
    known = runtime.graphs.structure.attention.items()
    narrow = {
        s: Window(4, 2 if a.sees == "everything" else 0)
        for s, a in known
        if isinstance(a, Attention)
    }
    if not narrow:
        pytest.skip("its attention has no windows")
    plan = fast.adaskip.plan.with_windows(Windows.of(narrow))
    ids = torch.randint(0, 50, (2, 150), generator=torch.Generator().manual_seed(1))
    for static in (False, True):
        runtime.static_cache = static
        cache = fast.adaskip.new_cache(plan=plan)
        logits = feed(fast, cache, ids[:, :125], [80, 1, 20, 1, 5, *[1] * 18])
        assert logits.isfinite().all()
        if not cache.stateful:
            cache.crop(-1)
        twin = copy.deepcopy(cache)
        assert feed(fast, twin, ids[:, 125:], [20, *[1] * 5]).isfinite().all()
        driver.check()


def test_padded_rows_forget_nothing() -> None:
    ids, firsts = text(2, 80), [0, 30]
    mask = (torch.arange(80) >= torch.tensor(firsts).unsqueeze(1)).long()
    cache = compiled(False).adaskip.new_cache(plan=plan())
    with torch.no_grad():
        for end in (70, *range(71, 81)):
            begin = cache.length
            positions = (torch.arange(begin, end) - torch.tensor(firsts).unsqueeze(1)).clamp_min(0)
            logits = compiled(False)(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions,
                past_key_values=cache,
            ).logits
    seen = {n: (w.sinks, w.tokens, w.full_heads) for n, w in NARROW.items()}
    wanted = EAGER.logits(ids, firsts, [seen] * 80)
    torch.testing.assert_close(logits[:, -1], wanted[:, -1], atol=2e-4, rtol=1e-3)
    assert not gone(cache)


def test_what_is_held(tmp_path: Path) -> None:
    """By plan: everything that any phase, head or plan of the request sees."""
    held = runtime_of(compiled(False)).graphs.retention
    full_head = plan({0: Window(9, 3, (0,))})
    assert held([plan()]) == every(Retained(3, 9), None, Retained(0, 5))
    assert held([full_head]) == ((None, Retained(3, 9)), (), ())
    assert held([full_head, plan({0: Window(4, 5)})]) == ((None, Retained(5, 9)), (), ())
    assert held([full_head, plan({0: Window(4, 5, (1,))})]) == every(None, None, None)
    assert held([prefill_only(plan())]) == every(None, None, None)
    wider = plan({0: Window(30, 1), 1: Window(4)})
    assert held([plan(), wider]) == every(Retained(3, 30), None, None)
    skipped = SkipPlan.of(plan().sublayers, ["2.attention"])
    of_first = skipped.with_windows(Windows.of([ATTENTION[0]], Window(6, 2)))
    assert held([of_first]) == every(Retained(2, 6), None, None)


def every(*layers: Retained | None) -> Retention:
    """What is held where all heads of a layer hold the same."""
    return tuple(() if kept is None else (kept,) * HEADS for kept in layers)


def test_refusals(tmp_path: Path) -> None:
    ids = text(1, 100)
    cache = compiled(False).adaskip.new_cache(plan=plan())
    feed(compiled(False), cache, ids, [90, *[1] * 10])
    message = (
        r"cannot go back to 50 tokens: layer 0 sees a window of 9, and its tokens 3 to 81 are not "
        "held any more; begin the request again"
    )
    with pytest.raises(NotImplementedError, match=message):
        cache.crop(-50)
    with pytest.raises(NotImplementedError, match="layer 2's keys and values cannot be shown"):
        _ = cache.layers[2].keys
    assert cache.layers[1].keys.shape[2] == 100
    mask = torch.ones(1, 101, dtype=torch.int64)
    mask[0, 4] = 0
    with torch.no_grad(), pytest.raises(NotImplementedError, match="has forgotten what its"):
        compiled(False)(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
    with pytest.raises(PlanError, match=r"0\.attention sees more under this plan than under the"):
        cache.request.decode_with(plan({0: Window(10, 3), 2: Window(5, 0)}))
    cache.request.decode_with(plan({**NARROW, 0: Window(4, 1), 1: Window(2)}))
    cache.crop(-5)
    feed(compiled(False), cache, ids, [1] * 100)


def test_a_schedule_holds_what_its_widest_plan_sees() -> None:
    wide = {0: Window(20, 3), 2: Window(5, 0)}
    prompt = plan(wide)
    narrow = SkipPlan(
        prompt.sublayers,
        {},
        {},
        windows=Windows(prompt.windows.prefill, plan().windows.decode),
    )
    cache = compiled(False).adaskip.new_cache(plan=Schedule(((0, prompt), (5, narrow))))
    assert cache.retention == every(Retained(3, 20), None, Retained(0, 5))


@pytest.mark.parametrize("there", ["the same device", "one without such memory"])
def test_saved_and_loaded(tmp_path: Path, there: str) -> None:
    ids, path = text(1, 130), tmp_path / "prefix"
    cache = compiled(False).adaskip.new_cache(plan=plan())
    feed(compiled(False), cache, ids[:, :110], [100, *[1] * 10])
    cache.save(path)
    with pytest.MonkeyPatch.context() as patch:
        if there != "the same device":
            patch.setattr("adaskip_fx.kv_cache.growing_memory.is_available", lambda device: False)
        loaded = compiled(False).adaskip.load_cache(path, plan=plan())
        assert gone(loaded) == gone(cache) != {}
        got = feed(compiled(False), loaded, ids[:, 110:], [12, *[1] * 8])
        torch.testing.assert_close(got, want(ids)[:, 110:], atol=2e-4, rtol=1e-3)
        with pytest.raises(SavedCacheError, match="made under plan"):
            compiled(False).adaskip.load_cache(path, plan=plan({}))
        full = SkipPlan(plan().sublayers, {}, {}, windows=Windows(plan().windows.prefill, {}))
        message = r"tokens 3 to \d+ of layer 0 were let go, which a plan of this request may read"
        with pytest.raises(SavedCacheError, match=message):
            compiled(False).adaskip.load_cache(path, plan=Schedule(((0, plan()), (5, full))))
