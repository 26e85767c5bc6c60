"""Studies on tiny models in memory: statistics by hand, costs and streams against eager models."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from adaskip_fx.api import build
from adaskip_fx.fitting import Fitter, SurrogateSpec
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.testing import Oracle as Hooked
from benchmarks.__main__ import app
from benchmarks.plots import plot
from benchmarks.studies import (
    STUDIES,
    choices,
    domain,
    errors,
    families,
    fits,
    pareto,
    quality,
    recipe,
    similarity,
    stats,
    streams,
    summaries,
    timing,
    transfer,
    window,
    windows,
)
from benchmarks.studies.setup import Options, Subject, Text, read_texts, subject_of
from benchmarks.studies.window_plans import WAYS
from tests.support.command_line import save
from tests.support.compiled_llamas import make_model, profile_of
from tests.support.eager_reference import Oracle, plain_streams
from tests.support.recipe_tokenizers import Letters as AnyText

OPTIONS = Options(samples=2, length=24, alphas=(1.25, 1.5), most=3)


def text(name: str, seed: int, count: int = 200) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return Text(name, f"{name} {seed}", torch.randint(0, 61, (count,), generator=generator))


@pytest.fixture(scope="module")
def subject() -> Subject:
    texts = [text("one", 1), text("two", 2)]
    return subject_of("tiny", make_model("three_layers"), None, texts, OPTIONS, timed=False)


def eager_logits(model: Any, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a prompt, by the oracle."""
    skips = {str(s): "skip" for s in plan.skipped("prefill")}
    factors = {str(s): f for s, f in plan.surrogates.factors.items()}
    return Oracle(model).behave(skips, None, factors).step(ids, DynamicCache())[0]


@torch.no_grad()
def hooked_logits(subject: Subject, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a prompt, by hooks on the modules of the eager model."""
    instead = {str(s): one for s, one in plan.surrogates.by_sublayer.items() if s in plan.prefill}
    oracle = Hooked(subject.model, subject.runtime.graphs.structure.modules, prefill=instead)
    with oracle.watching():
        logits: torch.Tensor = subject.model(input_ids=ids).logits[0]
    return logits


def scaled(subject: Subject, *names: str) -> SkipPlan:
    factors = {Sublayer.parse(name): 0.9 for name in names}
    plan = SkipPlan.of(subject.runtime.sublayers, names)
    return plan.with_surrogates(Surrogates.scale(factors))


# Statistics ------------------------------------------------------------------------------------


def test_hit_rate() -> None:
    assert stats.hit_rate({1, 2, 3, 4}, {2, 4, 6}) == 0.5
    assert stats.hit_rate([1], [2]) == 0
    assert stats.hit_rate([], [1]) is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.lists(st.integers(0, 4), min_size=1))
def test_above_counts_pairs(first: list[int], second: list[int]) -> None:
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in first for b in second)
    assert stats.above(first, second) == pytest.approx(won / len(first) / len(second))


def test_rank_correlation() -> None:
    values = np.array([0.1, 0.5, 0.3, 0.9])
    assert stats.rank_correlation(values, np.exp(5 * values)) == pytest.approx(1)
    assert stats.rank_correlation(values, -values) == pytest.approx(-1)
    # Ranks 0 1 2 3 against 0.5 0.5 3 2, by hand: covariance 3.5, squares 5 and 4.5.
    assert stats.rank_correlation([1, 2, 3, 4], [7, 7, 9, 8]) == pytest.approx(
        3.5 / math.sqrt(22.5)
    )


def test_described() -> None:
    found = stats.described([0.0, 1.0, 2.0, 3.0, 4.0])
    assert (found["mean"], found["median"], found["q25"], found["max"]) == (2, 2, 1, 4)
    assert found["std"] == pytest.approx(math.sqrt(2))


# Texts -----------------------------------------------------------------------------------------


def test_halves_share_no_token() -> None:
    counted = Text("n", "", torch.arange(103))
    first, second = (torch.cat(counted.windows(h, 3, 10), 1)[0] for h in ("first", "second"))
    assert first.tolist() == [*range(0, 10), *range(20, 30), *range(40, 50)]
    assert second.tolist() == [*range(51, 61), *range(72, 82), *range(93, 103)]
    assert len(counted.windows("first", 99, 10)) == 5
    assert counted.windows("first", 1, 10)[0].tolist() == [list(range(10))]


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text 'n': a half has 5 tokens, fewer than one window of"):
        Text("n", "", torch.arange(10)).windows("first", 1, 6)
    with pytest.raises(ValueError, match="no text 'x'; there are pydoc, stdlib, mine"):
        read_texts(Options(only=("x",), texts=(("mine", tmp_path),)), None)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8 text"):
        read_texts(Options(only=("bad",), texts=(("bad", bad),)), None)


def test_a_text_says_what_it_was() -> None:
    about = Text("n", "abc", torch.arange(3)).about()
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, of abc
    assert about == {"name": "n", "sha256": known, "tokens": 3}


# Streams and costs, against eager models -------------------------------------------------------


def test_similarity_is_that_of_the_plain_model(subject: Subject) -> None:
    windows = subject.windows(subject.texts[0], "first")
    found = similarity.token_similarity(subject, windows)
    expected = []
    for ids in windows:
        seen = plain_streams(subject.model, ids)
        expected.append([cosine_similarity(a[0].double(), b[0].double()) for a, b in seen.values()])
    both = np.concatenate([torch.stack(e).detach().numpy() for e in expected], axis=1)
    np.testing.assert_allclose(found, both, atol=1e-5)
    profile = subject.profile(subject.texts[0])
    np.testing.assert_allclose(profile.similarity(), both.mean(1), atol=1e-5)


def test_streams_under_a_plan(subject: Subject) -> None:
    """What stands in for a skipped sublayer is handed out; the last stream gives the logits."""
    ids, plan = subject.windows(subject.texts[0], "first")[0], scaled(subject, "1.attention")
    logits, found = streams.prompt_streams(subject.runtime, plan, ids)
    assert len(found) == 7
    torch.testing.assert_close(found[3], 0.9 * found[2])
    head = subject.model.lm_head(subject.model.model.norm(found[-1]))
    torch.testing.assert_close(logits, head, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits[0], eager_logits(subject.model, plan, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_costs_of_prompts(subject: Subject) -> None:
    windows = subject.windows(subject.texts[1], "second")
    empty, plan = SkipPlan.empty(subject.runtime.sublayers), scaled(subject, "1.attention", "2.ffn")
    full, (nothing, skipped) = quality.costs(subject.runtime, [empty, plan], windows)
    assert nothing.against(full) == pytest.approx(
        {"perplexity": full.perplexity, "perplexity_ratio": 1, "kl": 0, "agreement": 1}, abs=1e-6
    )
    losses, divergence, agreed = [0.0, 0.0], 0.0, 0
    for ids in windows:
        both = [eager_logits(subject.model, p, ids)[:-1].double() for p in (empty, plan)]
        for i, logits in enumerate(both):
            losses[i] += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        p, q = (logits.log_softmax(-1) for logits in both)
        divergence += float(kl_div(q, p, reduction="sum", log_target=True))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    tokens = sum(ids.shape[1] - 1 for ids in windows)
    found = skipped.against(full)
    assert full.perplexity == pytest.approx(math.exp(losses[0] / tokens), rel=1e-4)
    assert found["perplexity_ratio"] == pytest.approx(
        math.exp((losses[1] - losses[0]) / tokens), rel=1e-4
    )
    assert found["kl"] == pytest.approx(divergence / tokens, rel=1e-3)
    assert found["kl"] > 0.01
    assert found["agreement"] == agreed / tokens


@pytest.mark.slow
def test_decoding_costs_what_the_same_prompt_does(subject: Subject) -> None:
    """The plan skips the same in both phases, so token by token the logits are the prompt's."""
    (ids, *_) = subject.windows(subject.texts[0], "second")
    plan, count = scaled(subject, "1.attention", "2.ffn"), 5
    full, (found,) = quality.decode_costs(subject.runtime, [plan], [ids], count)
    nll = [
        float(cross_entropy(eager_logits(subject.model, p, ids)[-count - 1 : -1], ids[0, -count:]))
        for p in (SkipPlan.empty(subject.runtime.sublayers), plan)
    ]
    assert full.tokens == found.tokens == count
    assert [c.nll / count for c in (full, found)] == pytest.approx(nll, rel=1e-4)


def test_a_broken_model_has_a_finite_perplexity() -> None:
    cost, full = quality.Cost(tokens=1, nll=1e6), quality.Cost(tokens=1, nll=1.0)
    assert math.isfinite(cost.perplexity)
    assert math.isfinite(cost.against(full)["perplexity_ratio"])


# Similarity and transfer -----------------------------------------------------------------------


def test_by_kind() -> None:
    names = ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    found = similarity.by_kind(
        names, np.array([0.9, 0.5, 0.8, 0.85]), np.array([1, 2, 3, 4.0]), (2,)
    )
    assert found["attention_above_ffn"] == 0.75  # 0.8 is below 0.85
    assert found["kinds"]["ffn"]["std_over_tokens"] == 3
    assert found["kinds"]["attention"]["over_sublayers"]["min"] == 0.8
    assert found["skipped"] == [{"alpha": 2, "attention": 1, "ffn": 1}]


def test_transfer_by_hand() -> None:
    """Of three sublayers that A's first half chooses, B's second half chooses two."""
    entry: Any = SimpleNamespace(sublayers=_six(), model=make_model())
    known = {
        ("a", "first"): profile_of(entry, _similar(0, 1, 2)),
        ("a", "second"): profile_of(entry, _similar(0, 1, 2)),
        ("b", "first"): profile_of(entry, _similar(0, 4, 5)),
        ("b", "second"): profile_of(entry, _similar(1, 2, 5)),
    }
    stub: Any = SimpleNamespace(
        texts=[SimpleNamespace(name="a"), SimpleNamespace(name="b")],
        options=Options(alphas=(2.0,)),
        runtime=SimpleNamespace(sublayers=_six()),
        profile=lambda t, half: known[t.name, half],
    )
    (panel,) = transfer.transfer(stub)["panels"]
    assert panel["title"] == "alpha 2: 3 of 6"
    np.testing.assert_allclose(panel["values"], [[1, 2 / 3], [1 / 3, 1 / 3]])


def _six() -> tuple[Sublayer, ...]:
    return tuple(Sublayer(i, kind) for i in range(3) for kind in ("attention", "ffn"))  # type: ignore[arg-type]


def _similar(*chosen: int) -> dict[str, float]:
    return {str(s): 0.9 if i in chosen else 0.1 for i, s in enumerate(_six())}


@pytest.mark.slow
def test_domain_cells(subject: Subject, tmp_path: Path) -> None:
    """Row: what was calibrated on; column: what was evaluated on."""
    learned, read = subject.texts[1], subject.texts[0]
    windows = subject.windows(learned, "first")
    fitted = Fitter(subject.model, None, windows, max_length=subject.length)
    options = dataclasses.replace(OPTIONS, surrogates=("scale", "linear"))
    result = domain.domain(dataclasses.replace(subject, options=options))
    kinds = [(name, alpha) for name in ("scale", "linear") for alpha in OPTIONS.alphas]
    assert [(p["compensation"], p["alpha"]) for p in result["panels"]] == kinds
    for (name, alpha), panel in zip(kinds, result["panels"], strict=True):
        plan = AdaSkip().plan(subject.profile(learned), alpha)
        if name == "linear":
            plan = fitted.fit(plan, SurrogateSpec("linear"))
        empty = SkipPlan.empty(subject.runtime.sublayers)
        nll = [
            sum(
                float(cross_entropy(hooked_logits(subject, p, ids)[:-1], ids[0, 1:]))
                for ids in subject.windows(read, "second")
            )
            for p in (empty, plan)
        ]
        assert panel["values"][1][0] == pytest.approx(math.exp((nll[1] - nll[0]) / 2), rel=1e-4)
    assert np.array(result["kl"][0]["values"]).shape == (2, 2)
    assert result["panels"][0]["values"] != result["panels"][2]["values"]  # companion
    usual = domain.domain(subject)
    assert [p["values"] for p in usual["panels"]] == [p["values"] for p in result["panels"][:2]]
    assert domain.summary(result).startswith("scale, alpha 1.25: 1 of 6; columns one, two")
    assert draws(("matrix",), result, tmp_path)


def draws(kinds: Sequence[str], result: dict[str, Any], folder: Path) -> bool:
    """Whether a result survives JSON and can be drawn."""
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return all(p.stat().st_size for kind in kinds for p in plot(kind, [path], folder))


# Errors ----------------------------------------------------------------------------------------


def test_growth_of_planted_errors() -> None:
    rows = errors.growth([(3.0, 0.1), (4.0, 0.2)], [(3.0, 0.1), (5.0, 0.5)])
    assert [r["skipped"] for r in rows] == [1, 2]
    assert rows[1]["error"] == rows[1]["error_root"] == 5
    assert rows[1]["error_sum"] == 7
    assert (rows[1]["kl"], rows[1]["kl_sum"]) == (0.5, pytest.approx(0.3))


def planted(parallel: bool) -> Subject:
    """A model whose ffn add constants to the stream, in one direction or in unrelated ones."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)  # so that every token has the same norm
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.fill_(0)
            layer.mlp.down_proj.weight.fill_(0)
            layer.mlp.down_proj.bias.fill_(0)
            layer.mlp.down_proj.bias[0 if parallel else i] = 0.1 * (i + 1)
    options = Options(samples=1, length=20)
    return subject_of("planted", model, None, [text("one", 1)], options, timed=False)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False])
def test_planted_errors_add_up(parallel: bool) -> None:
    """In one direction to their sum, in unrelated ones to the root of the sum of squares."""
    made = planted(parallel)
    order = [Sublayer(i, "ffn") for i in range(3)]
    rows = errors._growth(made, order, fits.SURROGATES["none"])
    constants = [0.1, 0.2, 0.3]
    norm = (
        math.hypot(*([1.0] * 15 + [1.6])) if parallel else math.hypot(*([1.0] * 13), 1.1, 1.2, 1.3)
    )
    for k, row in enumerate(rows, 1):
        alone = [c / norm for c in constants[:k]]
        assert row["error_sum"] == pytest.approx(sum(alone), rel=1e-4)
        assert row["error"] == pytest.approx(
            sum(alone) if parallel else math.hypot(*alone), rel=1e-4
        )
        assert row["error"] == pytest.approx(
            row["error_sum" if parallel else "error_root"], rel=1e-4
        )


@pytest.mark.slow
def test_errors_of_every_compensation(subject: Subject, tmp_path: Path) -> None:
    result = errors.errors(subject)
    assert [(r["compensation"], r["skipped"]) for r in result["rows"]] == [
        (name, k) for name in fits.SURROGATES for k in (1, 2, 3)
    ]
    profile = subject.profile(subject.texts[0])
    named = dict(zip(map(str, profile.sublayers), profile.similarity(), strict=True))
    assert result["order"] == sorted(named, key=lambda s: -named[s])[:3]
    first = result["rows"][0]
    assert first["error"] == pytest.approx(first["error_sum"])
    assert draws(errors.PICTURES, result, tmp_path)
    assert "scale, 3 skipped: error" in errors.summary(result)


# The decode window -----------------------------------------------------------------------------


def test_a_window_against_the_rest_by_hand() -> None:
    """beta is 0.9; the window adds ffn 0 and 1; of the rest 1 and 2 pass."""
    entry: Any = SimpleNamespace(sublayers=_six(), model=make_model())
    profile = profile_of(entry, {**_similar(), "0.attention": 0.9})
    plan = SkipPlan.of(_six(), ["0.attention"])
    probed = tuple(s for s in _six() if s.kind == "ffn")

    def sums(tokens: int, *cosines: float) -> np.ndarray[Any, Any]:
        return np.array([[tokens * c, tokens, tokens, tokens, tokens] for c in cosines])

    early, late = sums(5, 0.95, 0.99, 0.8), sums(10, 0.5, 0.96, 0.97)
    decoded = window.Decoded({5: early, 15: early + late}, probed, profile, plan, 5, 15)
    assert decoded.compare(5, "rest") == {
        **{"hit_rate": 1.0, "precision": 0.5, "recall": 0.5},
        **{"added": 2, "right": 2},
    }
    whole = decoded.compare(5, "whole")  # only ffn 1 and 2 are above 0.9: 0.65, 0.97, 0.913
    assert (whole["precision"], whole["recall"]) == (0.5, 0.5)
    assert decoded.top(early, 2) == {probed[0], probed[1]}
    assert decoded.top(late, 2) == {probed[1], probed[2]}


@pytest.mark.slow
def test_what_the_window_says_is_what_the_policy_learns(subject: Subject) -> None:
    """A request of its own with the real window, on the same sampled tokens."""
    profile = subject.profile(subject.texts[0])
    plan = AdaSkip().plan(profile, 1.5)
    prompt = subject.windows(subject.texts[0], "second")[0]
    decoded = window._decode(subject, profile, plan, prompt, (3, 5), 4)
    assert sorted(decoded.sums) == [3, 5, 9]
    np.testing.assert_allclose(decoded.sums[5][:, 4], 5)
    other = build(subject.model, plan, profile=profile, policy=AdaSkip(window=5), backend="eager")
    cache, generator = other.adaskip.new_cache(), torch.Generator().manual_seed(0)
    logits = runtime_of(other).step(prompt, None, None, cache, 1)
    for _ in range(5):
        token = torch.multinomial(logits[0, -1:].softmax(-1), 1, generator=generator)
        logits = runtime_of(other).step(token, None, None, cache, 1)
    np.testing.assert_allclose(decoded.sums[5], cache.request.window.read(), rtol=1e-5)
    assert decoded.added(decoded.sums[5]) == set(cache.request.decode_plan.decode) - set(
        plan.decode
    )
    assert subject.runtime.policy is None


@pytest.mark.slow
def test_windows_of_all_texts(subject: Subject, tmp_path: Path) -> None:
    result = window.windows(subject, (2, 4), 3)
    assert [(r["text"], r["window"]) for r in result["rows"]] == [
        (t, p) for t in ("one", "two") for p in (2, 4)
    ]
    assert all(0 <= r["hit_rate"] <= 1 and r["requests"] == 2 for r in result["rows"])
    assert result["decoded"] == 7
    assert draws(window.PICTURES, result, tmp_path)
    assert window.summary(result).startswith("one, P = 2: hit rate ")


# Policies against speed ------------------------------------------------------------------------


@pytest.mark.slow
def test_candidates_are_published_then_ours(subject: Subject) -> None:
    refused: list[dict[str, Any]] = []
    unified = next(p for p in choices.POLICIES if p.name == "UnifiedSkip")
    found = pareto.candidates_of(subject, unified, refused)
    assert refused[0]["policy"] == "UnifiedSkip"
    assert "take a smaller alpha" in refused[0]["why"]  # protected, nothing of 3 layers may go
    assert not [about for about, _ in found if about["alpha"] == 1.5]
    ada = next(p for p in choices.POLICIES if p.name == "AdaSkip")
    shown = [(a["compensation"], a["published"]) for a, _ in pareto.candidates_of(subject, ada, [])]
    # With the scale it is the published one.
    assert shown == [("scale", True), ("none", False), ("linear", False)] * 2


@pytest.mark.slow
def test_pareto_points(subject: Subject, tmp_path: Path) -> None:
    result = pareto.pareto(subject, choices.POLICIES[:1])
    for point in result["points"]:
        assert set(point["quality"]) == set(point["speedup"]) == {"prefill", "decode"}
        assert point["quality"]["prefill"] == point["costs"]["prefill"]["perplexity_ratio"]
    assert [p["skipped"] for p in result["points"]] == [1, 1, 1, 2, 2, 2]
    assert [p["name"] for p in result["plans"]] == ["AdaSkip, 1", "AdaSkip, 2"]
    assert draws(pareto.PICTURES, result, tmp_path)
    assert pareto.summary(result).count("\n") == 5


@pytest.mark.slow
def test_a_schedule_is_shown_at_its_ends(subject: Subject) -> None:
    """Anything that has plans and a digest may stand in for one plan."""
    ends = [SkipPlan.empty(_six()), SkipPlan.of(_six(), [], decode_extra=["1.ffn", "2.ffn"])]
    schedule = SimpleNamespace(plans=tuple(ends), digest="d")
    policy = choices.Choice("S", lambda *_: schedule, lambda *_: schedule)
    ((about, plan),) = pareto.candidates_of(subject, policy, [])
    assert (about["published"], plan) == (True, schedule)
    assert [p["name"] for p in pareto.named_plans(about, plan)] == ["S, 2 at first", "S, 2 at last"]


@pytest.mark.slow
def test_speedups_are_ratios_of_medians(subject: Subject) -> None:
    full, fast = timing.Times([1.0, 2.0, 9.0], [0.4]), timing.Times([1.0, 0.5, 1.5], [0.1])
    assert fast.speedup(full) == {"prefill": 2.0, "decode": 4.0}
    plans = [SkipPlan.empty(subject.runtime.sublayers), scaled(subject, "1.ffn")]
    ids = subject.windows(subject.texts[0], "first")[0]
    shapes, step = list[tuple[int, ...]](), Runtime.step

    def watched(self: Runtime, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return step(self, tokens, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "step", watched)
        found = timing.measure_times(subject.runtime, plans, ids, steps=2, rounds=3, rows=4)
    assert [(len(t.prefill), len(t.decode)) for t in found] == [(3, 3), (3, 3)]
    assert all(s > 0 for t in found for s in (*t.prefill, *t.decode))
    length = ids.shape[1]  # of each plan and round: one request to link it, then one that is timed
    prefill, decode = [(4, length)], [(1, length), (1, 1), (1, 1)]
    assert shapes == ([*prefill * 2, *decode * 2]) * 2 * 3


def test_unknown_names() -> None:
    assert list(fits.chosen_surrogates(())) == list(fits.SURROGATES)
    assert list(fits.chosen_surrogates((), ("scale",))) == ["scale"]
    with pytest.raises(ValueError, match="no surrogate 'magic'; this version has none, scale"):
        fits.chosen_surrogates(("magic",))
    assert choices.chosen_policies(()) == choices.POLICIES
    assert [p.name for p in choices.chosen_policies(("D3", "POP"))] == ["D3", "POP"]
    with pytest.raises(ValueError, match="no policy 'Magic'; there are AdaSkip, LLMDrop, Unified"):
        choices.chosen_policies(("Magic",))


@pytest.mark.slow
def test_a_linear_fit_leaves_less_than_a_scale(subject: Subject) -> None:
    """On the very windows that it was fitted on."""
    learned, skip = subject.texts[0], [Sublayer.parse("2.ffn")]
    ids = subject.windows(subject.texts[0], "first")[0]
    plan = SkipPlan.of(subject.runtime.sublayers, skip)
    _, right = streams.prompt_streams(subject.runtime, SkipPlan.empty(plan.sublayers), ids)
    left = {}
    for name, fit in fits.SURROGATES.items():
        made = plan.with_surrogates(fit(subject, learned, skip))
        _, found = streams.prompt_streams(subject.runtime, made, ids)
        left[name] = float(streams.relative_errors(found[-1], right[-1]).square().mean())
    assert left["linear"] < left["diagonal"] < left["none"]


# Summaries -------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of 61 letters."""

    chat_template = None

    def __call__(self, content: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 61 for c in content]}

    def decode(self, ids: Any, **_options: Any) -> str:
        return "".join(chr(61 + int(i)) for i in ids)


def same(reference: str, summary: str) -> float:
    """The share of letters at their place."""
    return sum(a == b for a, b in zip(reference, summary, strict=False)) / max(len(reference), 1)


@pytest.mark.slow
def test_summaries_are_scored_against_the_full_models_own(tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    options = Options(samples=2, length=96, alphas=(1.0, 2.0), plans=(("mine", saved),))
    texts = [text("one", 1, 600)]
    made = subject_of("tiny", make_model("three_layers"), Letters(), texts, options, timed=False)
    scaled(made, "1.ffn").save(saved)
    result = summaries.summaries(made, same, tokens=6)
    nothing, same_again, half, fitted, mine = result["points"]
    kinds = [point["compensation"] for point in result["points"]]
    assert kinds == ["scale", "normalized", "scale", "normalized", "scale"]
    assert (mine["policy"], mine["skipped"]) == ("mine", 1)
    assert same_again["quality"] == nothing["quality"]
    assert fitted["skipped"] == half["skipped"]
    assert fitted["examples"] != half["examples"]
    assert (nothing["skipped"], nothing["quality"], nothing["rouge_l_loss"]) == (0, 1, 0)
    assert nothing["agreement"] == 1
    assert half["agreement"] < 1
    assert half["skipped"] == 3
    assert half["quality"] < 1
    assert half["quality"] == pytest.approx(
        np.mean(
            [same(a, b) for a, b in zip(result["full_examples"], half["examples"], strict=True)]
        )
    )
    assert "no gold summaries" in result["reference"]
    assert draws(summaries.PICTURES, result, tmp_path)
    assert "AdaSkip (3 skipped, normalized): ROUGE-L " in summaries.summary(result)
    assert made.runtime.policy is None


def test_rouge_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(ValueError, match="rouge-score, which is not installed"):
        summaries.rouge_l()


# Families --------------------------------------------------------------------------------------

SMALL = families.Size(layers=2, hidden=16, heads=2, steps=40, batch=4, context=32)


@pytest.mark.slow
def test_training_learns_and_is_the_same_again() -> None:
    content = torch.tensor([list(b"abcdefgh" * 100)]).flatten()
    config, learned = families._configs(SMALL)["qwen3"], Text("t", "", content)
    cpu = torch.device("cpu")
    model, losses = families.train("qwen3", config, learned, SMALL, 0, cpu)
    assert losses[-1] < 0.9 * losses[0]
    assert not model.training
    assert families.train("qwen3", config, learned, SMALL, 0, cpu)[1] == losses
    assert families.train("qwen3", config, learned, SMALL, 1, cpu)[1] != losses


@pytest.mark.slow
def test_families_say_what_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = {"gpt_neox": families._configs(SMALL)["gpt_neox"]}
    monkeypatch.setattr(families, "_configs", lambda size: configs)
    options = Options(samples=1, length=32, alphas=(4 / 3,))
    result = {**families._SAID, **families.families(options, SMALL, torch.device("cpu"))}
    (row,) = result["skipping"]
    assert (row["family"], row["skipped"], len(row["random_perplexity_ratios"])) == (
        "gpt_neox",
        1,
        5,
    )
    assert result["models"][0]["type"] == "gpt_neox"
    assert result["rows"][0]["family"] == "gpt_neox"
    said = families.summary(result)
    assert "no package ships another trained decoder" in said
    share = result["rows"][0]["attention_above_ffn"]
    assert f"gpt_neox: attention is more similar than FFN in {share:.2f} of all pairs" in said
    without = [
        {k: v for k, v in row.items() if k != "attention_above_ffn"} for row in result["rows"]
    ]
    assert "of all pairs" not in families.summary({**result, "rows": without})  # as of a Mamba
    assert draws(families.PICTURES, result, tmp_path)


# The command -----------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["run", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_a_study_from_the_command_line(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "letters.txt").write_text("the quick brown fox. " * 40)
    (tmp_path / "digits").write_text("0123456789 " * 80)
    arguments = (
        *("study_transfer", "--model", model, "--device", "cpu", "--out", tmp_path / "out"),
        *("--data", tmp_path / "texts", "--text", f"digits={tmp_path / 'digits'}"),
        *("--only", "letters", "--only", "digits"),
        *("--samples", 2, "--length", 64, "--alpha", 4 / 3),
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "study_transfer.json").read_text())
    assert [t["name"] for t in written["texts"]] == ["letters", "digits"]
    assert all(len(t["sha256"]) == 64 for t in written["texts"])
    assert (written["seed"], written["windows"]) == (0, {"a_half": 2, "tokens": 64})
    assert {"torch", "transformers", "device"} <= set(written["conditions"])
    assert written["panels"][0]["title"] == "alpha 1.33333: 1 of 4"
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"study_transfer.{ext}" for ext in ("json", "png", "svg")]

    again = CliRunner().invoke(app, ["studies", "--results", str(tmp_path / "out")])
    assert again.exit_code == 0
    assert again.output.startswith("study_transfer: ")
    assert "alpha 1.33333: 1 of 4; columns letters, digits" in again.output
    assert invoke(*arguments, "--label", "again").exit_code == 0
    assert (tmp_path / "out" / "study_transfer-again.svg").is_file()
    both = CliRunner().invoke(app, ["studies", "--results", str(tmp_path / "out")])
    heads = [line.split(":")[0] for line in both.output.splitlines() if line.startswith("study_")]
    assert heads == ["study_transfer", "study_transfer-again"]
    none = CliRunner().invoke(app, ["studies", "--results", str(tmp_path)])
    assert none.exit_code == 1
    assert f"error: no study in {tmp_path}" in none.output


def test_bad_texts_on_the_command_line(tmp_path: Path) -> None:
    result = invoke("study_transfer", "--text", "novel", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--text 'novel': write NAME=PATH" in result.output
    result = invoke("study_transfer", "--text", "a=/nowhere.txt", "--out", tmp_path)
    assert "/nowhere.txt: no such file" in result.output


def test_every_study_has_its_module() -> None:
    import importlib

    for name, place in STUDIES.items():
        module = importlib.import_module(f"benchmarks.{place}")
        assert name == f"study_{place.split('.')[1]}"
        assert module.PICTURES
        assert callable(module.measure)
        assert callable(module.summary)


@pytest.mark.slow
def test_every_policy_gives_points(tmp_path: Path) -> None:
    """Whole layers, schedules, searches and prompts alone; what is refused is told."""
    texts = [text("one", 1), text("two", 2)]
    options = dataclasses.replace(OPTIONS, alphas=(4 / 3,), surrogates=("scale",))
    model = make_model("four_layers")
    made = subject_of("tiny", model, None, texts, options, timed=False)
    result = pareto.pareto(made, choices.POLICIES)
    named = {p["policy"] for p in result["points"]} | {p["policy"] for p in result["refused"]}
    assert {p.name for p in choices.POLICIES} <= named
    by_name = {p["policy"]: p for p in result["points"] if p["published"]}
    schedule = by_name["SkipDecode"]
    assert schedule["quality"]["prefill"] == pytest.approx(1)  # prompts run in full
    assert schedule["costs"]["decode"]["kl"] > 1e-3
    in_prompts = by_name["POP"]
    assert in_prompts["quality"]["prefill"] == in_prompts["quality"]["decode"]
    assert in_prompts["costs"]["prefill"]["kl"] > in_prompts["costs"]["decode"]["kl"]
    assert by_name["Greedy"]["skipped"] == by_name["Evolve"]["skipped"] == 2
    assert draws(pareto.PICTURES, result, tmp_path)


@pytest.mark.slow
def test_a_saved_plan_is_a_point_too(subject: Subject, tmp_path: Path) -> None:
    plan = scaled(subject, "1.ffn")
    plan.save(tmp_path / "plan.json")
    options = dataclasses.replace(subject.options, plans=(("mine", tmp_path / "plan.json"),))
    result = pareto.pareto(dataclasses.replace(subject, options=options), ())
    (point,) = result["points"]
    assert (point["policy"], point["compensation"], point["skipped"]) == ("mine", "scale", 1)
    assert point["plan"] == plan.digest
    (shown,) = result["plans"]
    assert shown["name"] == "mine, 1"
    ids = subject.texts[-1].windows("second", 2, 24)
    logits = [(eager_logits(subject.model, plan, w), w) for w in ids]
    nll = [cross_entropy(found[:-1], w[0, 1:]) for found, w in logits]
    wanted = float(torch.stack(nll).mean())
    assert math.log(point["costs"]["prefill"]["perplexity"]) == pytest.approx(wanted, rel=1e-4)


# The recipe. -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_is_judged_on_what_it_has_not_seen(tmp_path: Path) -> None:
    texts = [text(name, seed, 2000) for seed, name in enumerate(("one", "two", "three"))]
    options = dataclasses.replace(OPTIONS, samples=2, length=400, alphas=(1.25,), keep=tmp_path)
    model = make_model("three_layers")
    made = subject_of("tiny", model, AnyText(), texts, options, timed=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, "_Judge", Judge)
        result = recipe.recipe(made)
    assert result["calibrated_on"] == ["one", "two"]
    methods = ("AdaSkip", "AdaSkip, linear", "searched, fitted", "searched, refined")
    named = [(row["method"], row["skipped"]) for row in result["rows"]]
    assert named == [(name, 1) for name in (*methods, "searched, refined, extras")]
    by_method = {row["method"]: row for row in result["rows"]}
    assert by_method["AdaSkip"]["plan"] == by_method["AdaSkip, linear"]["plan"]
    assert by_method["searched, fitted"]["plan"] == by_method["searched, refined"]["plan"]
    for row in result["rows"]:
        assert set(row["texts"]) == {"one", "two", "three"}
    full = result["full"]["texts"]["three"]
    assert full["perplexity_ratio"] == 1.0
    ids = texts[2].windows("second", 2, 400)
    empty = SkipPlan.empty(made.runtime.sublayers)
    nll = [cross_entropy(eager_logits(model, empty, w)[:-1], w[0, 1:]) for w in ids]
    assert math.log(full["perplexity"]) == pytest.approx(float(torch.stack(nll).mean()), rel=1e-4)
    assert [extra["method"] for extra in result["extras"]] == ["searched, refined, extras"]
    refined = SkipPlan.load(tmp_path / "searched_refined_1.json")
    assert [str(s) for s in refined.prefill] == by_method["searched, refined"]["plan"]
    assert refined.surrogates.kinds == "normalized"
    lines = recipe.summary(result).splitlines()
    assert lines[0].startswith("calibrated on one, two; passkeys of the model: 1.000")
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert plot("plans", [tmp_path / "r.json"], tmp_path, "r")


class Judge(recipe._Judge):
    """Passkeys are a task of their own, tested elsewhere, and too long for a tiny model."""

    def _found(self, plan: SkipPlan | None) -> float:
        return 1.0


# Windows. --------------------------------------------------------------------------------------


def test_windows_are_chosen_on_what_is_not_read(tmp_path: Path) -> None:
    texts = [text(name, seed, 2000) for seed, name in enumerate(("one", "two", "three"))]
    (tmp_path / "kept").mkdir()
    options = dataclasses.replace(OPTIONS, samples=1, length=400, keep=tmp_path / "kept")
    model = make_model("three_layers")
    made = subject_of("tiny", model, AnyText(), texts, options, timed=False)
    asked = list[SkipPlan]()

    def answers(self: Any, plan: SkipPlan) -> dict[str, Any]:
        asked.append(plan)
        return {"passkey": {"mean": 0.5, "difference": 0.0, "standard_error": None}}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows._Judge, "_answers", answers)
        result = windows.windows(made, (0.3, 0.6))
        saved = sorted((tmp_path / "kept").glob("heads_forward_*.json"))
        given = tuple(("forward", path) for path in reversed(saved))
        options = dataclasses.replace(options, keep=None, plans=given)
        again = windows.windows(dataclasses.replace(made, options=options))
        other = dataclasses.replace(options, plans=(("of another", tmp_path / "other.json"),))
        SkipPlan.empty(made.runtime.sublayers[:2]).save(tmp_path / "other.json")
        with pytest.raises(ValueError, match=r"other\.json is not a plan of this model"):
            windows.windows(dataclasses.replace(made, options=other))
    found = [row for row in result["rows"] if row["way"] == "heads, forward"]
    assert [row["plan"] for row in again["rows"]] == [row["plan"] for row in found]
    assert [row["texts"] for row in again["rows"]] == [row["texts"] for row in found]
    assert all(row["share"] >= 0.3 for row in again["rows"])
    assert again["rows"][1]["share"] >= 0.6
    assert again["maps"][0]["heads"] == result["maps"][0]["heads"]
    asked = asked[: 1 + len(result["rows"])]
    assert result["calibrated_on"] == ["one", "two"]
    assert result["window"] == {"tokens": 25, "sinks": 4, "full_heads": []}
    ways = [*WAYS, "profile alone", "attention skipped"]
    assert [(r["way"], r["share"]) for r in result["rows"]] == [
        (way, share) for way in ways for share in (0.3, 0.6)
    ]
    heads = {str(s): n for s, n in made.compiled.adaskip.kv_heads.items()}
    for row in result["rows"]:
        assert set(row["texts"]) == {"three"}
        plan = row["plan"]
        if row["way"] == "attention skipped":
            assert len(plan["decode"]) == round(row["share"] * 3)
            continue
        narrow = {s: heads[s] - len(w["full_heads"]) for s, w in plan["windows"]["decode"].items()}
        read = 400 * sum(heads.values()) - sum(narrow.values()) * (400 - 29)
        assert read <= (1 - row["share"]) * 400 * sum(heads.values()) + 1e-6
        (order,) = (m["order"] for m in result["maps"] if m["name"] == row["way"])
        first = order[: len(narrow)] if "layers" in row["way"] else order[: sum(narrow.values())]
        assert {name for name, _ in first} == set(narrow)
    assert len(asked) == 1 + len(result["rows"])
    full = result["full"]["texts"]["three"]
    empty, nll = SkipPlan.empty(made.runtime.sublayers), 0.0
    for half in ("first", "second"):  # nothing was chosen on either
        (ids,) = texts[2].windows(half, 1, 400)
        nll += float(cross_entropy(eager_logits(model, empty, ids)[:-1], ids[0, 1:])) / 2
    assert math.log(full["perplexity"]) == pytest.approx(nll, rel=1e-4)
    assert len(windows.summary(result).splitlines()) == 1 + len(result["rows"])
    (tmp_path / "w.json").write_text(json.dumps(result))
    assert plot("heads", [tmp_path / "w.json"], tmp_path, "w")
