"""The same requests, compiled with Inductor: pieces, whole graphs, half precision."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.fitting import DistillConfig, Fitter, Sample, SurrogateSpec, distill
from adaskip_fx.fitting.distillation import _divergence
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.program import Link
from tests.support.compiled_llamas import Entry, assert_same_cache, make_model
from tests.support.eager_reference import Oracle, assert_close, moments

pytestmark = [
    pytest.mark.inductor,
    # Importing Inductor for the first time: torch.utils.mkldnn uses what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler on CPU",
    ),
]

#: float32: fused loops add up in another order. bfloat16: fewer roundings than eager, not none.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


class Inductor(Entry):
    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.model.dtype]


def compiled(link: Link, dtype: torch.dtype = torch.float32) -> Inductor:
    model = make_model("grouped", dtype)
    return Inductor(model, build(model, None, backend="inductor", link=link), Oracle(model))


@pytest.fixture(scope="module")
def pieces() -> Inductor:
    return compiled("pieces")


@pytest.fixture(scope="module", params=["pieces", pytest.param("fused", marks=pytest.mark.slow)])
def bank(request: pytest.FixtureRequest, pieces: Inductor) -> Inductor:
    return pieces if request.param == "pieces" else compiled(request.param)


def a_plan(bank: Entry) -> SkipPlan:
    factors = {"0.attention": 0.8, "1.ffn": 1.25}
    return bank.plan(["0.attention"], ["1.ffn"], factors)


def request(bank: Entry, plan: SkipPlan, steps: tuple[int, ...], seed: int = 0) -> None:
    """The last logits of every step, and K/V at the end, against the oracle."""
    with bank.using(plan), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for number, count in enumerate(steps):
            ids = bank.tokens(1, count, seed + number)
            output = bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
            expected = bank.oracle.step(ids, reference)[:, -1:]
            assert_close(output.logits, expected, bank.tolerance, f"step {number}")
        assert_same_cache(bank, plan, cache, reference)


def counts(bank: Entry) -> tuple[int, int]:
    return bank.runtime.counters.captures, bank.runtime.pieces_compiled


def test_a_request(bank: Inductor) -> None:
    """Prompts of several lengths, chunks, decoded tokens: one graph for each phase."""
    for prompt in (2, 7, 64, 300):
        request(bank, bank.plan(), (prompt, 1, 1, 5, 1), prompt)
    assert bank.runtime.counters.captures == 3


def test_a_plan(bank: Inductor) -> None:
    plan = a_plan(bank)
    request(bank, plan, (9, 1, 1, 4, 1))
    before = counts(bank)
    request(bank, plan, (17, 1, 1, 6, 1))
    assert counts(bank) == before
    with bank.using(plan):
        bank.oracle.factors = {**bank.oracle.factors, "0.attention": 0.8 * 1.01}
        ids = bank.tokens(1, 9)
        with torch.no_grad():
            logits = bank.compiled(ids, logits_to_keep=1).logits
        expected = bank.oracle.step(ids, bank.reference_cache())[:, -1:]
        with pytest.raises(AssertionError, match="relative error"):  # a wrong factor is caught
            assert_close(logits, expected, bank.tolerance)


def test_probes(bank: Inductor) -> None:
    """Float64 sums of the oracle's stream, while decoding under a plan."""
    plan = a_plan(bank)
    with bank.using(plan), bank.probing(plan) as readings, torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for number, count in enumerate((6, 1)):
            ids = bank.tokens(1, count, number)
            bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
            bank.oracle.step(ids, reference)
        streams = bank.oracle.streams
        assert list(streams) == ["0.ffn", "1.attention"]
        for reading, stream in zip(readings[-1], streams.values(), strict=True):
            assert_close(reading.double(), moments(*stream), bank.tolerance)


def test_a_second_plan_compiles_no_piece(pieces: Inductor) -> None:
    bank = pieces
    request(bank, a_plan(bank), (9, 1))
    before = counts(bank)
    for skip in (["1.attention"], ["0.ffn", "1.ffn"], ["0.attention", "0.ffn", "1.ffn"]):
        request(bank, bank.plan(skip, factors=dict.fromkeys(skip, 0.5)), (5, 1))
    assert counts(bank) == before


@pytest.mark.slow
def test_threads_on_a_cold_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet, and no kernel is on the disk; torch.compile goes on afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = make_model("one_layer")
    compiled = build(model, None, backend="inductor")

    def logits(batch: int) -> torch.Tensor:
        with torch.no_grad():  # is a thread's own
            got: torch.Tensor = compiled(a_batch(batch), logits_to_keep=1).logits
            return got

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(logits, (1, 2) * 4))
    for batch, got in zip((1, 2) * 4, found, strict=True):
        with torch.no_grad():
            assert_close(got, model(a_batch(batch)).logits[:, -1:], TOLERANCE[torch.float32])
    assert runtime_of(compiled).counters.captures == 2
    assert any(tmp_path.rglob("*.so"))  # what was compiled was not there before
    tensor = torch.rand(8)
    assert_close(torch.compile(torch.sin)(tensor), tensor.sin(), 1e-5)


def a_batch(batch: int) -> torch.Tensor:
    return torch.arange(3, 3 + 9 * batch).reshape(batch, 9)


@pytest.mark.slow
def test_half_precision() -> None:
    bank = compiled("pieces", torch.bfloat16)
    request(bank, a_plan(bank), (7, 1, 1))


def test_generate(pieces: Inductor) -> None:
    bank = pieces
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with bank.using(a_plan(bank)):
        mine = bank.compiled.generate(bank.tokens(1, 9), **options)
        assert torch.equal(mine, bank.oracle.model.generate(bank.tokens(1, 9), **options))


def test_lowered_pieces_compile_and_equal_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: operators of our own inside Inductor's code, on whole buffers."""
    import adaskip_fx.capture.phase_graph as phases
    from adaskip_fx.capture.graph_key import GraphKey
    from adaskip_passes import FuseProjections, PassResult

    lowered: list[str] = []

    class Watching(FuseProjections):
        def __call__(self, module: torch.fx.GraphModule) -> PassResult:
            result = super().__call__(module)
            lowered.extend(str(n.target) for n in module.graph.nodes)
            return result

    lower = phases._lowering

    def lowering(key: GraphKey, name: str) -> tuple[Any, ...]:
        return (Watching(),) if key.static_cache else lower(key, name)

    monkeypatch.setattr(phases, "_lowering", lowering)
    model = make_model("biased")
    made = build(model, None, backend="inductor", static_cache=True)
    bank = Inductor(model, made, Oracle(model))
    for plan in (bank.plan(), a_plan(bank)):
        request(bank, plan, (5, 1, 1, 1))
    assert sum("adaskip.project" in t for t in lowered) >= 5
    assert any("adaskip.attend" in t for t in lowered)


@pytest.mark.slow
def test_a_compiled_refinement_goes_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("three_layers")
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 61, (1, 24), generator=draw) for _ in range(4)]
    fitter = Fitter(model, None, texts)
    plan = SkipPlan.of(fitter.runtime.sublayers, ["0.ffn", "1.attention", "2.ffn"])
    plan = fitter.fit(plan, SurrogateSpec("normalized"))
    samples = [Sample(ids) for ids in texts]
    compiled, compile_with = list[Any](), torch.compile

    def watched(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return compile_with(function, **options)

    monkeypatch.setattr(torch, "compile", watched)
    found = {}
    for inductor in (False, True):
        how = DistillConfig(
            steps=4, learning_rate=3e-3, batch_size=3, eval_interval=2, compiled=inductor
        )
        found[inductor] = distill(fitter, plan, [samples[:3]], samples[3:], how)
        assert (_divergence in compiled) == inductor
    (eager, slow), (fused, quick) = found[False], found[True]
    assert quick.losses == pytest.approx(slow.losses, rel=1e-4)
    for sublayer, one in eager.surrogates.by_sublayer.items():
        for name, tensor in fused.surrogates.by_sublayer[sublayer].tensors.items():
            assert tensor == pytest.approx(one.tensors[name], abs=1e-4)
    assert slow.losses[4] != pytest.approx(slow.losses[0], rel=1e-3)  # companion: it goes somewhere
