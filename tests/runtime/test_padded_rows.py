"""Rows that begin with padding, and steps of a few tokens, on a static cache against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from adaskip_fx.api import build
from adaskip_fx.kv_cache.padding import Padding
from adaskip_fx.model import checked_arguments
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.runtime.checking import CheckError
from tests.capture.test_attention import FAMILIES, make
from tests.support.compiled_llamas import fixed, make_model
from tests.support.eager_reference import assert_close

COUNTS = (3, 0, 5)
#: New tokens of each step: prompts, turns, drafts, decoding.
STEPS = (9, 1, 1, 4, 1, 7, 2, 1, 13, 1)


def model_of(name: str) -> Any:
    return make(name) if name in FAMILIES else make_model(name)


def follow(model: Any, compiled: Any, counts: tuple[int, ...], steps: tuple[int, ...]) -> Any:
    """Both read the same padded rows; the logits of every new token are compared."""
    cache, theirs = compiled.adaskip.new_cache(), DynamicCache()
    rows, total = len(counts), 0
    generator = torch.Generator().manual_seed(3)
    first = torch.tensor(counts)
    with torch.no_grad():
        for step, tokens in enumerate(steps):
            ids = torch.randint(0, 61, (rows, tokens), generator=generator)
            order = torch.arange(total, total + tokens).expand(rows, tokens)
            total += tokens
            mask = (torch.arange(total) >= first.unsqueeze(1)).long()
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (order - first.unsqueeze(1)).clamp_min(0),
            }
            got = compiled(**inputs, past_key_values=cache).logits
            want = model(**inputs, past_key_values=theirs).logits
            real = mask[:, -tokens:].bool()
            assert_close(got[real], want[real], 1e-4, f"step {step}")
    return cache


@pytest.mark.parametrize(
    "name", ["grouped", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "mistral"))]
)
def test_padded_rows_are_as_in_eager(name: str) -> None:
    model = model_of(name)
    compiled = build(model_of(name), None, backend="eager", static_cache=True)
    cache = follow(model, compiled, COUNTS, STEPS)
    runtime = runtime_of(compiled)
    assert runtime.why_no_static_cache is None
    assert set(cache.lease.buffers.steps) == {1, 4, 8, 16}
    masked = {key.phase for key in _keys(runtime) if key.masked}
    assert masked == set(), "also with soft caps"
    assert runtime.runner.packed.why_not is None


def _keys(runtime: Any) -> list[Any]:
    return [key for state in runtime.graphs.states.known for key in state.captures]


def under(bank: Any) -> torch.Tensor:
    """The logits of padded rows under a plan, packed, in drafts and decoded; as the oracle's."""
    cache, theirs, logits, total = bank.runtime.new_cache(), bank.reference_cache(), [], 0
    first = torch.tensor(COUNTS).unsqueeze(1)
    with torch.no_grad():
        for step, tokens in enumerate((9, 1, 4, 1)):
            ids, total = bank.tokens(len(COUNTS), tokens, step), total + tokens
            columns = torch.arange(total)
            mask = (columns >= first).long()
            place = (columns - first).clamp_min(0)[:, -tokens:]
            given = {"attention_mask": mask, "position_ids": place}
            got = bank.compiled(ids, past_key_values=cache, **given).logits
            want = bank.oracle.step(ids, theirs, **given)
            real = mask[:, -tokens:].bool()
            assert_close(got[real], want[real], 1e-4, f"step {step}")
            logits.append(got[real])
    return torch.cat(logits)


def test_padded_rows_under_one_plan_after_another() -> None:
    """Packed prompts and static steps of one plan are no other plan's."""
    bank = fixed("grouped")
    seen = []
    for plan in (
        bank.plan(),
        bank.plan(["1.attention"], factors={"1.attention": 1.5}),
        bank.plan(["0.ffn"]),
        bank.plan(),
    ):
        with bank.using(plan):
            seen.append(under(bank))
    assert torch.equal(seen[0], seen[3])
    for other in seen[1:3]:  # the near miss: a plan that is left out of a key gives the first's
        assert float((other - seen[0]).abs().max()) > 1e-2


@pytest.mark.breaks
def test_padding_that_is_not_told_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: every row begins with its first token."""
    whole = Padding.of

    def forgetful(mask: torch.Tensor) -> Padding | None:
        found = whole(mask)
        assert found is not None
        return Padding(torch.zeros_like(found.first), found.counts)

    model, _ = packing()
    monkeypatch.setattr(Padding, "of", forgetful)
    with pytest.raises(AssertionError, match="step 1"):
        follow(model, COMPILED[0], COUNTS, STEPS)


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 2), (4,), (0, 0, 7, 7)])
@pytest.mark.parametrize("keep", [0, 1, 2, 6, 40])
def test_packed_prompts(counts: tuple[int, ...], keep: int) -> None:
    """One graph for any number of rows; logits are those of eager where there is a token."""
    model, bank = packing()
    before = bank.stats().captures
    first, rows, tokens = torch.tensor(counts), len(counts), 8
    ids = torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(keep))
    mask = (torch.arange(tokens) >= first.unsqueeze(1)).long()
    position = (torch.arange(tokens) - first.unsqueeze(1)).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        got = COMPILED[0](**inputs, logits_to_keep=keep)
        theirs = model(**inputs)
    want = theirs.logits[:, -keep if keep else 0 :]
    real = mask[:, -want.shape[1] :].bool()
    assert_close(got.logits[real], want[real], 1e-4)
    assert not got.logits[~real].any()
    assert bank.stats().captures - before <= 1
    for layer, same in zip(got.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for mine, other in ((layer.keys, same.keys), (layer.values, same.values)):
            kept = mask.bool().unsqueeze(1).expand(other.shape[:3])
            assert_close(mine[kept], other[kept], 1e-4)
            assert mine.isfinite().all()


COMPILED: list[Any] = []


def packing() -> tuple[Any, Any]:
    """One model and compiled one for all examples, so that captures are counted over them."""
    if not COMPILED:
        COMPILED[:] = [
            build(make_model("grouped"), None, backend="eager", static_cache=True),
            make_model("grouped"),
        ]
    return COMPILED[1], COMPILED[0].adaskip


def test_indices_of_packed_prompts() -> None:
    model, _ = packing()
    ids = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(8) >= torch.tensor(COUNTS).unsqueeze(1)).long()
    position = (torch.arange(8) - torch.tensor(COUNTS).unsqueeze(1)).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    keep = torch.tensor([7, 5, 5, -1])
    with torch.no_grad():
        got = COMPILED[0](**inputs, logits_to_keep=keep).logits
        assert_close(got, model(**inputs).logits[:, keep], 1e-4)


@pytest.mark.breaks
def test_packed_rows_that_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: the graph's own check finds it, and prompts run with a mask."""
    from adaskip_fx.capture import attention

    monkeypatch.setattr(
        attention, "attend_packed", lambda q, k, v, o, s: attention.attend_causal(q, k, v, s)
    )
    model = model_of("grouped")
    compiled = build(model_of("grouped"), None, backend="eager", static_cache=True)
    follow(model, compiled, COUNTS, (9, 1))
    why = runtime_of(compiled).runner.packed.why_not
    assert why is not None
    assert "does not tell packed rows apart" in why


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 8, 16, 17, 31, 32, 33])
def test_drafts_are_taken_back(tokens: int) -> None:
    """A step of any few tokens, taken back in part, is as if only the rest had been there."""
    model, _ = packing()
    compiled = COMPILED[0]
    generator = torch.Generator().manual_seed(tokens)
    cache, text = compiled.adaskip.new_cache(), torch.randint(0, 61, (1, 6), generator=generator)
    with torch.no_grad():
        compiled(text, past_key_values=cache)
        for kept in (0, 1, tokens // 2, tokens):
            new = torch.randint(0, 61, (1, tokens), generator=generator)
            got = compiled(new, past_key_values=cache).logits
            whole = torch.cat((text, new), 1)
            assert_close(got, model(whole).logits[:, -tokens:], 1e-4, f"{kept} kept")
            cache.keep_first(text.shape[1] + kept)
            text = whole[:, : text.shape[1] + kept]
            one = torch.randint(0, 61, (1, 1), generator=generator)
            got = compiled(one, past_key_values=cache).logits
            text = torch.cat((text, one), 1)
            assert_close(got, model(text).logits[:, -1:], 1e-4, f"after {kept} kept")


def test_turns_are_prompts_of_any_length() -> None:
    """Where the last token's logits alone are wanted there is one graph, and no size of its own."""
    model = make_model("grouped")
    compiled = build(make_model("grouped"), None, backend="eager", static_cache=True)
    generator, cache, theirs = torch.Generator().manual_seed(1), None, DynamicCache()
    with torch.no_grad():
        for tokens in (6, 3, 5, 8, 20):
            ids = torch.randint(0, 61, (1, tokens), generator=generator)
            cache = cache or compiled.adaskip.new_cache()
            got = compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            assert_close(got, model(ids, past_key_values=theirs).logits[:, -1:], 1e-4)
    assert compiled.adaskip.stats().captures == 2
    assert cache is not None
    assert not cache.lease.buffers.steps


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 1, 0]], [[0, 1, 0, 1]], [[0, 0, 0, 0]], [[1, 1, 1, 1], [1, 0, 1, 1]]],
)
def test_other_masks_are_no_padding_at_the_left(mask: list[list[int]]) -> None:
    assert Padding.of(torch.tensor(mask)) is None


def test_what_a_mask_says() -> None:
    padding = Padding.of(torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert padding is not None
    assert padding.counts == (2, 0)
    assert padding.first.tolist() == [2, 0]
    assert padding.any
    assert padding.says(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    for other in ([[0, 0, 1, 1], [1, 1, 0, 1]], [[0, 1, 1, 1], [1, 1, 1, 1]], [[0, 0], [1, 1]]):
        assert not padding.says(torch.tensor(other))
    assert not padding.says(torch.tensor([[0, 0, 1, 1]]))
    nothing = Padding.of(torch.ones(2, 5, dtype=torch.bool))
    assert nothing is not None
    assert not nothing.any


def test_generate_reads_a_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next steps' masks are the last one and ones: there is nothing in them to wait for."""
    model, _ = packing()
    of, read = Padding.of, []

    def counting(mask: torch.Tensor) -> Padding | None:
        read.append(mask.shape[1])
        return of(mask)

    monkeypatch.setattr(Padding, "of", counting)
    ids = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(8) >= torch.tensor(COUNTS).unsqueeze(1)).long()
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    got = COMPILED[0].generate(ids, **options)
    assert read == [8]
    assert torch.equal(got, model.generate(ids, **options))


def test_masks_in_a_loop_of_ones_own_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: somebody may have changed one, in place as well."""
    model, _ = packing()
    ids = torch.randint(0, 61, (1, 6), generator=torch.Generator().manual_seed(7))
    cache, theirs = COMPILED[0].adaskip.new_cache(), DynamicCache()
    mask, holes = torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)
    with torch.no_grad():
        for compiled, past in ((COMPILED[0], cache), (model, theirs)):
            compiled(ids, attention_mask=mask, past_key_values=past)
        COMPILED[0](ids[:, :1], attention_mask=holes, past_key_values=cache)
        cache.keep_first(6)
        holes[0, 2] = 0
        place = torch.tensor([[6]])
        got, want = (
            compiled(
                ids[:, :1], attention_mask=holes, position_ids=place, past_key_values=past
            ).logits
            for compiled, past in ((COMPILED[0], cache), (model, theirs))
        )
    assert_close(got, want, 1e-4)


def follow_changes(model: Any, compiled: Any) -> None:
    """A loop of one's own whose mask is another at the fourth step, and as before at the sixth."""
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(9))
    cache, theirs = compiled.adaskip.new_cache(), DynamicCache()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = torch.tensor([[2], [0]])
    with torch.no_grad():
        for step in range(9):
            new = ids[:, :5] if not step else ids[:, 4 + step : 5 + step]
            stored = 5 + step
            whole = torch.cat((mask, torch.ones(2, step, dtype=torch.int64)), 1)
            if step in (4, 5):
                whole[1, 3] = 0
            order = torch.arange(stored - new.shape[1], stored)
            inputs = {"attention_mask": whole, "position_ids": (order - first).clamp_min(0)}
            got, want = (
                one(new, past_key_values=past, **inputs).logits[:, -1]
                for one, past in ((compiled, cache), (model, theirs))
            )
            assert_close(got, want, 1e-4, f"step {step}")


def test_a_mask_is_read_while_its_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last one said is supposed; a step on a wrong supposition is done again."""
    model, _ = packing()
    monkeypatch.setattr(runtime_of(COMPILED[0]), "ahead", True)
    follow_changes(model, COMPILED[0])


def test_a_checked_step_supposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be compared with what the mask really says."""
    model, _ = packing()
    monkeypatch.setattr(runtime_of(COMPILED[0]), "ahead", True)
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    follow_changes(model, COMPILED[0])


@pytest.mark.breaks
def test_a_supposed_step_would_fail_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    model, _ = packing()
    runtime = runtime_of(COMPILED[0])
    monkeypatch.setattr(runtime, "ahead", True)
    monkeypatch.setattr(runtime, "may_suppose", runtime.may_run_ahead)
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    with pytest.raises(CheckError):
        follow_changes(model, COMPILED[0])


@pytest.mark.breaks
def test_a_wrong_supposition_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    model, _ = packing()
    monkeypatch.setattr(runtime_of(COMPILED[0]), "ahead", True)
    monkeypatch.setattr("adaskip_fx.kv_cache.padding.Answer.__bool__", lambda _: True)
    with pytest.raises(AssertionError, match="step 4"):
        follow_changes(model, COMPILED[0])


def test_holes_are_said_to_be_slow_once(caplog: pytest.LogCaptureFixture) -> None:
    packing()
    checked_arguments._say_once.cache_clear()
    ids = torch.randint(0, 61, (1, 6), generator=torch.Generator().manual_seed(8))
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        for _ in range(3):
            COMPILED[0](ids, attention_mask=mask)
    said = [r.message for r in caplog.records if "have holes" in r.message]
    assert said == [
        "rows of this batch are padded on the right, or have holes; they run with a mask, which is "
        "slower than padding on the left"
    ]


@pytest.mark.parametrize("family", ["gptj", pytest.param("bloom", marks=pytest.mark.slow)])
def test_attention_that_reads_all_of_a_buffer_has_zeros_there(family: str) -> None:
    """Code that makes masks of its own multiplies with every key, filled or not."""
    from tests.support.families.all import tiny_config, tiny_model

    model = tiny_model(tiny_config(family, num_hidden_layers=1))
    compiled = build(model, None, backend="eager", static_cache=True)
    cache, runtime = compiled.adaskip.new_cache(), runtime_of(compiled)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want, done = model(ids, use_cache=False).logits, 0
        for tokens in (9, 1, 1, 4, 1):
            got = compiled(ids[:, done : done + tokens], past_key_values=cache).logits
            assert_close(got, want[:, done : done + tokens], 1e-4, f"after {done}")
            done += tokens
    assert runtime.why_no_static_cache is None
    buffers = cache.lease.buffers
    assert buffers.whole
    assert buffers.memory is None
    assert not buffers.keys[0][:, :, done + 8 :].any()
    padded = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    with torch.no_grad():  # such code knows nothing of a table: rows that are padded have a mask
        fresh = compiled.adaskip.new_cache()
        compiled(ids[:, :2], attention_mask=padded["attention_mask"][:, :2], past_key_values=fresh)
        compiled(ids[:, 2:3], **padded, past_key_values=fresh)
    assert any(key.masked and key.phase == "decode" for key in _keys(runtime))
