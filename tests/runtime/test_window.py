"""The decode window: what is measured, for how long, and what is made of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.profiles.profile import Profile
from adaskip_fx.runtime.window import probed_in_decode
from tests.support.compiled_llamas import SEEDS, Entry, entry, fewer, follow, profile_of
from tests.support.eager_reference import assert_close, moments

SHAPE = "three_layers"
FFN = ("0.ffn", "1.ffn", "2.ffn")


class Watched:
    """AdaSkip that keeps what it was handed."""

    def __init__(self, policy: AdaSkip) -> None:
        self.policy = policy
        self.windows: list[tuple[tuple[str, ...], np.ndarray[Any, Any]]] = []

    @property
    def online(self) -> bool:
        return self.policy.online

    @property
    def window(self) -> int:
        return self.policy.window

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        return self.policy.plan(profile, alpha)

    def online_plan(self, profile: Profile, plan: SkipPlan, window: Any, probed: Any) -> SkipPlan:
        self.windows.append((tuple(map(str, probed)), np.array(window)))
        return self.policy.online_plan(profile, plan, window, probed)


class Reference:
    """The oracle beside a request: its own sums over its own streams, and its own decision."""

    def __init__(
        self,
        bank: Entry,
        plan: SkipPlan,
        similarity: Mapping[str, float],
        policy: AdaSkip,
        stop: Sequence[int] = (),
    ) -> None:
        self.bank, self.plan, self.policy = bank, plan, policy
        self.similarity, self.stop = similarity, torch.tensor(stop, dtype=torch.int64)
        self.cache = bank.reference_cache()
        self.skipped = [str(s) for s in plan.skipped("prefill")]
        self.probed = [n for n in FFN if n not in map(str, plan.skipped("decode"))]
        self.begin_turn()

    def begin_turn(self) -> None:
        self.extra: dict[str, float | None] = {}
        self.sums = {name: torch.zeros(5, dtype=torch.float64) for name in self.probed}
        self.steps = 0
        self.margin = 1.0  # how clear the decision was
        self.ended: torch.Tensor | None = None

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        decoding = self.cache.get_seq_length() > 0 and ids.shape[1] == 1
        if not decoding and self.steps:
            self.begin_turn()
        follow(self.bank.oracle, self.plan)
        self.bank.oracle.decode = {
            **self.bank.oracle.decode,
            **dict.fromkeys(self.extra, "skip"),
        }
        factors = {n: f for n, f in self.extra.items() if f is not None}
        self.bank.oracle.factors = {**self.bank.oracle.factors, **factors}
        logits = self.bank.oracle.step(ids, self.cache)
        if decoding and self.steps < self.policy.window:
            self.measure(ids)
        return logits

    def measure(self, ids: torch.Tensor) -> None:
        ended = torch.isin(ids[:, 0], self.stop)
        self.ended = ended if self.ended is None else self.ended | ended
        for name in self.probed:
            per_row = moments(*self.bank.oracle.streams[name])
            self.sums[name] += per_row[~self.ended].sum(0)
        self.steps += 1
        if self.steps == self.policy.window:
            self.decide()

    def decide(self) -> None:
        if not self.skipped:
            return
        beta = min(self.similarity[n] for n in self.skipped)
        seen = {n: float(s[0] / s[4]) for n, s in self.sums.items() if s[4] > 0}
        self.margin = min((abs(value - beta) for value in seen.values()), default=1.0)
        above = sorted((n for n in seen if seen[n] > beta), key=lambda n: -seen[n])
        # One sublayer keeps running. (Ties are as good as impossible.)
        still_run = 6 - len(set(map(str, self.plan.skipped("decode"))))
        for name in above[: still_run - 1]:
            total = self.sums[name]
            own = float((total[3] / total[2]).sqrt()) if self.policy.variant == "released" else None
            self.extra[name] = own

    def assert_learned(self, plan: SkipPlan) -> None:
        """Skipped in decode on top of the plan: what was decided here, with these factors."""
        before = set(map(str, self.plan.skipped("decode")))
        assert set(map(str, plan.skipped("decode"))) - before == set(self.extra)
        assert plan.phase_digest("prefill") == self.plan.phase_digest("prefill")
        for sublayer in plan.sublayers:
            if (factor := self.extra.get(str(sublayer))) is not None:
                assert plan.surrogates.factor(sublayer) == pytest.approx(factor, rel=1e-5)


def run(
    bank: Entry,
    reference: Reference,
    cache: Any,
    steps: Sequence[torch.Tensor],
    limit: float = 1e-5,
) -> None:
    """Both, step by step; AssertionError where they differ."""
    for number, ids in enumerate(steps):
        with torch.no_grad():
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
        assert_close(logits, reference.step(ids)[:, -1:], limit, f"step {number}")


def tokens(bank: Entry, counts: Sequence[int], seed: int = 0, batch: int = 1) -> list[torch.Tensor]:
    return [bank.tokens(batch, n, seed + i) for i, n in enumerate(counts)]


SIMILARITIES = st.fixed_dictionaries(
    {f"{n}.{k}": st.floats(0, 1, width=16) for n in range(3) for k in ("attention", "ffn")}
)
SKIPS = st.sets(st.sampled_from([f"{n}.{k}" for n in range(3) for k in ("attention", "ffn")]))


@given(SIMILARITIES, SKIPS, st.integers(1, 4), st.sampled_from(["paper", "released"]), SEEDS)
def test_the_learned_plan_is_the_oracles(
    similarity: dict[str, float], skip: set[str], window: int, variant: Any, seed: int
) -> None:
    """Measured on the oracle's own streams; the request goes on under that plan, and is right."""
    assume(len(skip) < 6)
    bank, policy = entry(SHAPE), AdaSkip(window=window, variant=variant)
    profile = profile_of(bank, similarity, dict.fromkeys(FFN, 0.75))
    factors = dict.fromkeys({*skip, *FFN}, 0.75)
    plan = bank.plan(sorted(skip), factors=factors)
    reference = Reference(bank, plan, similarity, policy)
    with bank.using(plan, policy, profile):
        cache = bank.runtime.new_cache()
        run(bank, reference, cache, tokens(bank, (5,) + (1,) * window, seed))
        assume(reference.margin > 1e-4)
        reference.assert_learned(cache.request.decode_plan)
        run(bank, reference, cache, tokens(bank, (1, 1), seed + 9))


# One case, looked at closely --------------------------------------------------------------------

LOW = {**dict.fromkeys([f"{n}.attention" for n in range(3)], 0.9), **dict.fromkeys(FFN, 0.9)}
BASE = ("1.attention",)


class Case:
    """A request whose window adds something but not everything."""

    def __init__(self, window: int = 3, variant: Any = "paper", stop: Sequence[int] = ()) -> None:
        self.bank = entry(SHAPE)
        self.policy = AdaSkip(window=window, variant=variant)
        self.similarity = {**LOW, "1.attention": 0.7}
        self.profile = profile_of(self.bank, self.similarity, dict.fromkeys(FFN, 1.25))
        self.plan = self.bank.plan(BASE, factors=dict.fromkeys((*BASE, *FFN), 1.25))
        self.stop = stop
        self.watched = Watched(self.policy)

    def using(self) -> Any:
        return self.bank.using(self.plan, self.watched, self.profile)

    def request(self) -> tuple[Any, Reference]:
        stop = torch.tensor(self.stop) if self.stop else None
        cache = self.bank.runtime.new_cache(stop_tokens=stop)
        return cache, Reference(self.bank, self.plan, self.similarity, self.policy, self.stop)

    def assert_windows(self, *expected: Reference) -> None:
        """What the policy was handed, compared with the references' sums."""
        assert len(self.watched.windows) == len(expected)
        for (probed, window), reference in zip(self.watched.windows, expected, strict=True):
            assert list(probed) == reference.probed
            sums = torch.stack([reference.sums[n] for n in reference.probed])
            for column in range(5):
                assert_close(torch.from_numpy(window)[:, column], sums[:, column], 1e-5)


def test_something_is_learned() -> None:
    """So that the tests below say something."""
    case = Case()
    with case.using():
        cache, reference = case.request()
        run(case.bank, reference, cache, tokens(case.bank, (6, 1, 1, 1)))
        case.assert_windows(reference)
    assert 0 < len(reference.extra) < 3
    reference.assert_learned(cache.request.decode_plan)


def test_another_window_is_caught() -> None:
    """The companions: one token more, and another threshold, learn something else or see it."""
    case = Case()
    with case.using():
        cache, reference = case.request()
        reference.policy = AdaSkip(window=4)
        run(case.bank, reference, cache, tokens(case.bank, (6, 1, 1, 1)))
        with pytest.raises(AssertionError):
            reference.assert_learned(cache.request.decode_plan)
        with pytest.raises(AssertionError, match="step"):
            run(case.bank, reference, cache, tokens(case.bank, (1, 1), 5))


def probed_steps(case: Case, counts: Sequence[int], cache: Any) -> list[int]:
    """How many sublayers each step measured."""
    runtime, seen = case.bank.runtime, list[int]()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(runtime, "observer", lambda program, *_: seen.append(len(program.probed)))
        for ids in tokens(case.bank, counts):
            case.bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
    return seen


def test_probes_run_only_while_the_window_is_open() -> None:
    case = Case()
    with case.using():
        cache, _ = case.request()
        assert probed_steps(case, (6, 1, 1, 1, 1, 1), cache) == [0, 3, 3, 3, 0, 0]
        assert cache.request.window.steps == 3
        assert len(case.watched.windows) == 1, "one decision for a request"
        assert probed_steps(case, (4, 1, 1, 1, 1), cache) == [0, 3, 3, 3, 0]
        assert len(case.watched.windows) == 2, "and one for each turn"


def test_only_ffn_that_run_are_measured() -> None:
    case = Case()
    case.plan = case.bank.plan((*BASE, "0.ffn"), ("2.ffn",))
    with case.using():
        cache, reference = case.request()
        assert probed_steps(case, (6, 1, 1, 1), cache) == [0, 1, 1, 1]
    assert case.watched.windows[0][0] == ("1.ffn",) == tuple(reference.probed)


def test_a_request_that_is_not_to_learn() -> None:
    """In any turn, and also once it has been given another plan to decode with."""
    case = Case()
    with case.using():
        cache = case.bank.runtime.new_cache(learn=False)
        assert probed_steps(case, (6, 1, 1, 4, 1), cache) == [0] * 5
        learning = case.bank.runtime.new_cache()
        assert probed_steps(case, (6, 1), learning)[1] > 0  # the companion
        running = probed_in_decode(case.plan)[0]
        other = case.plan.with_decode_extra([running])
        learning.request.decode_with(other)
        assert probed_steps(case, (1, 1, 1, 1), learning) == [0] * 4
        assert learning.request.decode_plan == other
    assert case.watched.windows == []


@pytest.mark.parametrize("reason", ["no policy", "offline", "nothing skipped", "no ffn runs"])
def test_nothing_is_measured_when_nothing_can_be_learned(reason: str) -> None:
    case = Case()
    if reason == "offline":
        case.watched = Watched(AdaSkip(window=3, online=False))
    elif reason == "nothing skipped":
        case.plan = case.bank.plan()
    elif reason == "no ffn runs":
        case.plan = case.bank.plan(FFN)
    policy = None if reason == "no policy" else case.watched
    with case.bank.using(case.plan, policy, case.profile):
        cache = case.bank.runtime.new_cache()
        assert probed_steps(case, (6, 1, 1, 1, 1), cache) == [0] * 5
        assert cache.request.window is None
        assert cache.request.decode_plan == case.plan
    assert case.watched.windows == []


def test_a_fresh_window_for_every_request_and_turn() -> None:
    case = Case()
    with case.using():
        first, one = case.request()
        run(case.bank, one, first, tokens(case.bank, (6, 1, 1, 1, 1)))
        case.assert_windows(one)
        one_sums = {n: s.clone() for n, s in one.sums.items()}
        run(case.bank, one, first, tokens(case.bank, (4, 1, 1), 20))  # the next turn, half way
        assert first.request.decode_plan == case.plan
        second, two = case.request()
        run(case.bank, two, second, tokens(case.bank, (3, 1, 1, 1), 40))
        run(case.bank, one, first, tokens(case.bank, (1, 1), 60))
        one.assert_learned(first.request.decode_plan)
        two.assert_learned(second.request.decode_plan)
        turns = one.sums
        del case.watched.windows[0]
        case.assert_windows(two, one)
    assert not any(torch.allclose(one_sums[n], turns[n]) for n in one_sums)


def test_chunks_of_a_prompt_are_no_turns() -> None:
    case = Case()
    with case.using():
        cache, reference = case.request()
        run(case.bank, reference, cache, tokens(case.bank, (6, 3, 2, 1, 1, 1, 1)))
        case.assert_windows(reference)
        reference.assert_learned(cache.request.decode_plan)


@fewer(3)
@given(st.lists(st.integers(0, 1), min_size=8, max_size=14), SEEDS)
def test_interleaved_requests_keep_their_windows_apart(order: list[int], seed: int) -> None:
    case = Case()
    with case.using():
        live = [case.request() for _ in range(2)]
        for number, (cache, reference) in enumerate(live):
            run(case.bank, reference, cache, tokens(case.bank, (4 + number,), seed + number))
        for position, number in enumerate(order):
            cache, reference = live[number]
            run(case.bank, reference, cache, tokens(case.bank, (1,), seed + 100 + position))
        for number, (cache, reference) in enumerate(live):
            assert cache.request.window is None or cache.request.window.steps == min(
                3, order.count(number)
            )
            if order.count(number) >= 3:
                reference.assert_learned(cache.request.decode_plan)


def test_a_copied_request_goes_on_from_the_window_it_had() -> None:
    case = Case()
    with case.using():
        cache, reference = case.request()
        run(case.bank, reference, cache, tokens(case.bank, (6, 1, 1)))
        twin, twin_reference = copy.deepcopy(cache), copy.deepcopy(reference.cache)
        sums = {n: s.clone() for n, s in reference.sums.items()}
        run(case.bank, reference, cache, tokens(case.bank, (1, 1), 30))
        reference.assert_learned(cache.request.decode_plan)
        assert twin.request.window.steps == 2
        reference.cache, reference.sums, reference.steps, reference.extra = (
            twin_reference,
            sums,
            2,
            {},
        )
        run(case.bank, reference, twin, tokens(case.bank, (1, 1), 50))
        reference.assert_learned(twin.request.decode_plan)


# Batches ----------------------------------------------------------------------------------------


def test_finished_rows_count_for_nothing() -> None:
    """From the step that is fed the end token on; a row that never ends counts to the last."""
    case = Case(window=4, stop=(7,))
    with case.using():
        cache, reference = case.request()
        steps = [case.bank.tokens(2, 5)]
        # 59 stands for padding after the end: it is not a stop token here, the row has ended
        for row in ([11, 12], [7, 13], [59, 14], [59, 15], [59, 16]):
            steps.append(torch.tensor(row).unsqueeze(1))
        run(case.bank, reference, cache, steps)
        case.assert_windows(reference)
        reference.assert_learned(cache.request.decode_plan)
    assert case.watched.windows[0][1][:, 4].tolist() == [5.0] * 3  # 1 + 4 rows


def test_a_row_that_counts_though_finished_is_caught() -> None:
    """The companion."""
    case = Case(window=3, stop=(7,))
    with case.using():
        cache, reference = case.request()
        reference.stop = torch.tensor([8])
        steps = [case.bank.tokens(2, 5)]
        steps += [torch.tensor(row).unsqueeze(1) for row in ([11, 12], [7, 13], [59, 14])]
        run(case.bank, reference, cache, steps, limit=1.0)
        with pytest.raises(AssertionError):
            case.assert_windows(reference)


def test_all_rows_finished_is_no_evidence() -> None:
    case = Case(stop=(7,))
    with case.using():
        cache, reference = case.request()
        end = torch.tensor([[7]])
        run(case.bank, reference, cache, [case.bank.tokens(1, 5), end, end, end])
        assert cache.request.decode_plan == case.plan
    assert case.watched.windows[0][1].tolist() == [[0.0] * 5] * 3


def test_the_next_turn_begins_with_no_row_finished() -> None:
    case = Case(stop=(7,))
    with case.using():
        cache, reference = case.request()
        steps = [*tokens(case.bank, (5, 1), batch=2), torch.tensor([[7], [9]])]
        run(case.bank, reference, cache, [*steps, *tokens(case.bank, (3,), 9, batch=2)])
        later = [torch.tensor([[n], [n + 1]]) for n in (10, 20, 30)]
        run(case.bank, reference, cache, later)
        reference.assert_learned(cache.request.decode_plan)
    assert case.watched.windows[-1][1][:, 4].tolist() == [6.0] * 3


def test_generate_tells_which_tokens_end_a_row() -> None:
    """Replayed on the oracle: the rows that generate has finished are not in the window."""
    case = Case(window=6)
    ids = case.bank.tokens(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with case.using():
        free = case.bank.compiled.generate(ids, **options)
        stop = next(int(t) for t in free[0, 7:10] if t not in free[1])
        pad = next(t for t in range(60) if t not in free)
        case.watched.windows.clear()
        ended = case.bank.compiled.generate(ids, eos_token_id=stop, pad_token_id=pad, **options)
        _, reference = case.request()
        reference.stop = torch.tensor([stop])
        reference.step(ids)
        for column in range(6, 6 + 6):
            reference.step(ended[:, column : column + 1])
        case.assert_windows(reference)
    assert (ended[0] == pad).any()
    assert case.watched.windows[0][1][0, 4] < 12


def test_generate_on_a_cache_that_was_reset_knows_the_end_tokens() -> None:
    case = Case(window=6)
    ids = case.bank.tokens(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with case.using():
        free = case.bank.compiled.generate(ids, **options)
        stop = next(int(t) for t in free[0, 7:10] if t not in free[1])
        pad = next(t for t in range(60) if t not in free)
        options = {**options, "eos_token_id": stop, "pad_token_id": pad}
        case.watched.windows.clear()
        cache = case.bank.runtime.new_cache()
        for _ in range(2):
            case.bank.compiled.generate(ids, past_key_values=cache, **options)
            cache.reset()
    first, second = (window for _, window in case.watched.windows)
    assert first[0, 4] < 12
    assert second.tolist() == first.tolist()


# The whole of it --------------------------------------------------------------------------------


def test_compile_and_generate_learn_online() -> None:
    """Through the public call: a profile, an alpha, a policy; tokens as the oracle's loop."""
    bank = entry("grouped")
    similarity = {"0.attention": 0.4, "0.ffn": 0.1, "1.attention": 0.2, "1.ffn": 0.3}
    made = profile_of(bank, similarity, {"0.attention": 0.9, "0.ffn": 1.1, "1.ffn": 1.2})
    profile = Profile(made.sublayers, made.statistics, fingerprint(bank.model), {}, {})
    policy = AdaSkip(window=3)
    compiled = adaskip_fx.compile(bank.model, profile, 1.2, policy=policy, backend="eager")
    plan = compiled.adaskip.plan
    assert [str(s) for s in plan.skipped("prefill")] == ["0.attention"]  # 4 (1 - 1/1.2) + 1/2
    assert plan == policy.plan(profile, 1.2)
    reference = Reference(bank, plan, similarity, policy)
    reference.probed = ["0.ffn", "1.ffn"]
    reference.begin_turn()
    ids = bank.tokens(1, 7)
    result = compiled.generate(
        ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    said = ids
    try:
        for step in range(12):
            logits = reference.step(said if step == 0 else said[:, -1:])
            said = torch.cat([said, logits[:, -1].argmax(-1, keepdim=True)], 1)
    finally:
        bank.oracle.behave({})
    assert torch.equal(result.sequences, said)
    learned = result.past_key_values.request.decode_plan
    reference.assert_learned(learned)
    assert reference.extra
    assert compiled.adaskip.plan == plan, "the next request begins with the offline plan"


def test_an_explicit_plan_learns_nothing() -> None:
    bank = entry("one_layer")
    plan = bank.plan(["0.attention"])
    compiled = adaskip_fx.compile(bank.model, None, plan=plan, backend="eager")
    assert compiled.adaskip.policy is None
    assert compiled.adaskip.plan == plan


# Bad input in the middle of a request -----------------------------------------------------------


def test_a_refused_step_keeps_what_was_learned() -> None:
    """A chunk with another number of rows is refused: the request goes on as before."""
    case = Case()
    with case.using():
        cache, reference = case.request()
        run(case.bank, reference, cache, tokens(case.bank, (6, 1, 1, 1)))
        learned = cache.request.decode_plan
        assert learned != case.plan
        with pytest.raises(ValueError, match="holds a batch of 1"), torch.no_grad():
            case.bank.compiled(case.bank.tokens(2, 3), past_key_values=cache)
        assert cache.request.decode_plan == learned
        run(case.bank, reference, cache, tokens(case.bank, (1,), 70))
