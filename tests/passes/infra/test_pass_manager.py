"""The pass manager: the one place that copies, lints, times, dumps and diffs, at every level."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx

import adaskip_passes
from adaskip_passes import Probe, Replacement, Skip, Tap, UnsupportedError, link, run_passes
from adaskip_passes.infra import pass_manager as pipeline_module
from adaskip_passes.infra.graph_module import text
from adaskip_passes.infra.pass_base import Pass, PassResult
from adaskip_passes.infra.pass_manager import Step
from adaskip_passes.partition.outer import PIECE, piece_of
from tests.support.fx_decoders import Shape, arguments, call, shared
from tests.support.fx_reference import Instead, eager

SKIP = Skip({1: Replacement("nothing", "scale")})


@dataclass(frozen=True)
class Raises(Pass):
    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        raise UnsupportedError("not this one")


@dataclass(frozen=True)
class CallsAStranger(Pass):
    """Leaves a call of something that is not a piece."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        call = graph_module.graph.find_nodes(op="call_module")[1]
        del call.meta[PIECE]
        return PassResult(graph_module, 1)


@dataclass(frozen=True)
class Misorders(Pass):
    """Leaves a node that uses a value before it is made."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        calls = graph_module.graph.find_nodes(op="call_module")
        calls[-1].append(calls[1])
        return PassResult(graph_module, 1)


@dataclass(frozen=True)
class Records(Pass):
    seen: list[str]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.seen.append(text(graph_module))
        return PassResult(graph_module, 0)


def test_the_original_stays_as_it_is() -> None:
    outer = shared(Shape()).outer
    before, modules = str(outer.graph), set(dict(outer.named_modules()))
    changed = run_passes(outer, (SKIP, Probe((0, 2))))
    assert text(changed) != text(outer)
    assert str(outer.graph) == before
    assert set(dict(outer.named_modules())) == modules


def test_pieces_are_shared_and_not_copied() -> None:
    outer = shared(Shape()).outer
    changed = run_passes(outer, ())
    before, after = (
        [piece_of(n) for n in g.graph.find_nodes(op="call_module")] for g in (outer, changed)
    )
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert changed.graph is not outer.graph


def test_passes_run_in_order_on_one_copy() -> None:
    outer = shared(Shape()).outer
    seen: list[str] = []
    changed = run_passes(outer, (Records(seen), SKIP, Records(seen), Probe((0,)), Records(seen)))
    assert seen[0] == text(outer)
    assert "scale_1 = scale(x_1" in seen[1]
    assert "probe_0" not in seen[1]
    assert seen[2] == text(changed)


def test_watching_gives_a_step_for_each_pass() -> None:
    outer = shared(Shape()).outer
    steps: list[Step] = []
    changed = run_passes(outer, (SKIP, Probe((0,))), steps.append)
    assert [s.name for s in steps] == ["Skip", "Probe"]
    assert steps[0].before == text(outer)
    assert steps[0].after == steps[1].before
    assert steps[1].after == text(changed)
    assert [s.changes for s in steps] == [1, 1]
    assert all(s.seconds >= 0 for s in steps)


def test_a_step_shows_what_changed() -> None:
    steps: list[Step] = []
    run_passes(shared(Shape()).outer, (SKIP,), steps.append)
    assert steps[0].diff() == (
        "--- before\n"
        "+++ Skip\n"
        "@@ -1,7 +1,7 @@\n"
        " x, table = prologue(+5 inputs)\n"
        " x_1 = layers_0_attention(x, table, +7 inputs)\n"
        "-x_2 = layers_0_ffn(x_1, +6 inputs)\n"
        "-x_3 = layers_1_attention(x_2, table, +7 inputs)\n"
        "+scale_1 = scale(x_1, factor_1, +1 inputs)\n"
        "+x_3 = layers_1_attention(scale_1, table, +7 inputs)\n"
        " x_4 = layers_1_ffn(x_3, +6 inputs)\n"
        " epilogue = epilogue(x_4, +3 inputs)\n"
        " return (epilogue,)"
    )
    assert replace(steps[0], after=steps[0].before).diff() == ""


def test_nobody_watching_no_text_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fx.GraphModule] = []

    def counting(outer: fx.GraphModule) -> str:
        made.append(outer)
        return ""

    monkeypatch.setattr(pipeline_module, "text", counting)
    run_passes(shared(Shape()).outer, (SKIP, Probe((0,))))
    assert made == []
    run_passes(shared(Shape()).outer, (SKIP, Probe((0,))), lambda step: None)
    assert len(made) == 4


def test_exceptions_of_a_pass_come_out() -> None:
    with pytest.raises(UnsupportedError, match=r"^not this one$"):
        run_passes(shared(Shape()).outer, (Raises(),))


def test_a_call_of_something_else_is_found() -> None:
    with pytest.raises(RuntimeError, match=r"^x_1 calls layers_0_attention, which is not a piece$"):
        run_passes(shared(Shape()).outer, (CallsAStranger(),))


def test_a_misordered_graph_is_found() -> None:
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        run_passes(shared(Shape()).outer, (Misorders(),))


def test_every_pass_is_checked_and_not_only_the_last() -> None:
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="which is not a piece"):
        run_passes(shared(Shape()).outer, (CallsAStranger(), Records(seen)))
    assert seen == []


@dataclass(frozen=True)
class Doubles(Pass):
    """Adds what is returned to itself."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        output = graph_module.graph.output_node()
        (result,) = output.args
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.add, (result, result)),)
        return PassResult(graph_module, 1)


def test_a_graph_that_runs_as_python_has_new_code() -> None:
    graph_module = fx.symbolic_trace(lambda x: -x)
    changed = run_passes(graph_module, (Doubles(), Doubles()))
    assert changed(torch.ones(1)).item() == -4.0
    assert graph_module(torch.ones(1)).item() == -1.0


def test_without_a_copy_the_module_itself_is_changed() -> None:
    graph_module = fx.symbolic_trace(lambda x: -x)
    assert run_passes(graph_module, (Doubles(),), copy=False) is graph_module
    assert graph_module(torch.ones(1)).item() == -2.0


@dataclass(frozen=True)
class SaysNothing(Pass):
    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return None  # type: ignore[return-value]


def test_a_pass_that_returns_something_else_is_refused() -> None:
    message = r"^SaysNothing returned NoneType; a pass returns PassResult\(graph_module, changes\)$"
    with pytest.raises(TypeError, match=message):
        run_passes(shared(Shape()).outer, (SaysNothing(),))


@pytest.mark.parametrize(("changes", "modified"), [(0, False), (1, True), (2, True)])
def test_a_result_says_whether_something_changed(changes: int, modified: bool) -> None:
    assert PassResult(fx.symbolic_trace(lambda x: -x), changes).modified is modified


def passes_of_the_package() -> set[type[Pass]]:
    for module in pkgutil.walk_packages(adaskip_passes.__path__, "adaskip_passes."):
        if "triton_kernels" not in module.name:  # which need Triton
            importlib.import_module(module.name)
    return {c for c in Pass.__subclasses__() if c.__module__.startswith("adaskip_passes")}


def test_every_rewrite_has_the_one_interface() -> None:
    found = passes_of_the_package()
    assert {c.__name__ for c in found} == {
        "AbsorbLatent",
        "DifferentiableSums",
        "DropCacheWrites",
        "EliminateDeadCode",
        "Expand",
        "FuseAttention",
        "FuseExperts",
        "FuseHeadNorms",
        "FuseRankSums",
        "FuseRotary",
        "HiddenStates",
        "FuseProjections",
        "InnerValues",
        "PlainAttention",
        "PlainExperts",
        "Probe",
        "ProbeLayers",
        "ProbeWindows",
        "Residue",
        "SerializeBranches",
        "Skip",
        "Tap",
        "Unflatten",
        "Upcast",
        "WindowAttention",
        "WriteOutExperts",
        "WriteOutProducts",
        "WriteOutShortSums",
    }
    for kind in found:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        assert (kind.__doc__ or "").startswith("Pass over "), kind
    assert Skip().name == "Skip"
    with pytest.raises(FrozenInstanceError):
        Skip().replacements = {}  # type: ignore[misc]


def test_text_hides_captured_inputs_and_shows_added_ones() -> None:
    lines = text(run_passes(shared(Shape()).outer, (SKIP,))).splitlines()
    assert lines[2] == "scale_1 = scale(x_1, factor_1, +1 inputs)"
    assert not any("weight" in line or "slots" in line for line in lines)


def test_text_has_results_in_the_order_of_their_places() -> None:
    """Also when there are more than ten."""
    outer = run_passes(shared(Shape()).outer, ())
    (prologue,) = (n for n in outer.graph.nodes if n.name == "prologue")
    last = max(prologue.users)
    for place in range(2, 12):
        with outer.graph.inserting_after(last):
            last = outer.graph.call_function(last.target, (prologue, place))  # type: ignore[arg-type]
        last.name = f"value_{place}"
    shown = text(outer).splitlines()[0].removesuffix(" = prologue(+5 inputs)")
    assert shown.split(", ") == ["x", "table", *(f"value_{i}" for i in range(2, 12))]


# Tap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [{}, {1: Replacement("nothing", "scale")}])
def test_a_tap_hands_out_the_stream(skipped: dict[int, Replacement]) -> None:
    """Before the first sublayer and after each: also what a pass after it has put in its place."""
    got = shared(Shape())
    outer = run_passes(got.outer, (Tap(), Skip(skipped)))
    args, again = (arguments(got.model, got.shape) for _ in range(2))
    factors = {f"factor_{i}": torch.tensor(0.75) for i in skipped}
    logits, *streams = call(link(outer, got.compiler), got, outer.graph, args, factors)
    expected: list[Tensor] = []
    assert torch.equal(logits, eager(again, dict.fromkeys(skipped, Instead(0.75)), expected))
    assert len(streams) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(streams, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(streams))


def test_passes_in_any_order_of_sublayers() -> None:
    """Skipping one sublayer and then another, the other way round, or both at once."""
    outer = shared(Shape()).outer
    how = Replacement("nothing", "scale")
    orders = ((Skip({1: how}), Skip({2: how})), (Skip({2: how}), Skip({1: how})))
    texts = {text(run_passes(outer, passes)) for passes in (*orders, (Skip({1: how, 2: how}),))}
    assert len(texts) == 1
    assert texts != {text(run_passes(outer, (Skip({1: how}),)))}
