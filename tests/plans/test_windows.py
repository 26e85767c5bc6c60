"""Windows as values: what they say, their files, and where a plan refuses them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx import SkipPlan
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import Action, PlanError
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window, Windows

SUBLAYERS = tuple(Sublayer(n, kind) for n in range(3) for kind in ("attention", "ffn"))
ATTENTION = tuple(s for s in SUBLAYERS if s.kind == "attention")

WINDOWS = st.builds(
    Window, st.integers(1, 40), st.integers(0, 9), st.sets(st.integers(0, 5)).map(tuple)
)
MAPS = st.dictionaries(st.sampled_from(ATTENTION), WINDOWS)


@given(WINDOWS, st.integers(1, 60))
def test_how_many_tokens_are_seen(window: Window, length: int) -> None:
    last = length - 1
    seen = [j for j in range(length) if last - window.tokens < j <= last or j < window.sinks]
    assert window.seen(length) == len(seen)


def test_heads() -> None:
    window = Window(256, 4, (2, 0))
    everything = (0, 2**31 - 1)
    assert window.by_head(4) == [everything, (4, 256), everything, (4, 256)]
    assert str(window) == "window 4+256 (K/V heads 0, 2 full)"
    assert str(Window(7)) == "window 4+7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "a window's tokens are an integer from 1 to 2147483647, got 0"),
        ((True,), "a window's tokens are an integer from 1 to 2147483647, got True"),
        ((4.0,), r"a window's tokens are an integer from 1 to 2147483647, got 4\.0"),
        ((4, -1), "a window's sinks are an integer from 0 to 2147483647, got -1"),
        ((4, 0, (1, 1)), r"full_heads are K/V heads from 0 on, each once, got \[1, 1\]"),
        ((4, 0, (-1,)), r"full_heads are K/V heads from 0 on, each once, got \[-1\]"),
    ],
)
def test_what_is_no_window(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Window(*arguments)


@given(MAPS, MAPS)
def test_files_and_copies(prefill: Any, decode: Any) -> None:
    windows = Windows(prefill, decode)
    assert Windows.from_json(json.loads(json.dumps(windows.to_json()))) == windows
    plan = SkipPlan.of(SUBLAYERS, ["1.ffn"], windows=windows)
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other == plan
        assert other.digest == plan.digest
    assert hash(windows) == hash(Windows(dict(reversed(prefill.items())), decode))
    assert plan.phases_alike == (prefill == decode)


def test_a_saved_plan(tmp_path: Path) -> None:
    windows = Windows.of({"0.attention": Window(16, 2, (1,))}, None)  # type: ignore[dict-item]
    plan = SkipPlan.of(SUBLAYERS, ["1.ffn"], windows=windows)
    plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    data["windows"]["decode"]["0.attention"]["tokens"] = 17
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="digest"):
        SkipPlan.load(tmp_path / "plan.json")
    for damaged in ({"prefill": {}}, {"prefill": {"0.attention": 3}, "decode": {}}, []):
        data["windows"] = damaged
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(PlanError, match="not a valid plan"):
            SkipPlan.load(tmp_path / "plan.json")


def test_a_plan_without_windows_is_as_it_was() -> None:
    """Its file and digests do not say that there are none: files of before are as good."""
    plan = SkipPlan.of(SUBLAYERS, ["1.ffn"])
    assert "windows" not in plan.to_json()
    assert plan.with_windows(Windows()).digest == plan.digest


@given(MAPS, MAPS)
def test_each_window_is_in_the_digests_of_its_phase(prefill: Any, decode: Any) -> None:
    plan = SkipPlan.empty(SUBLAYERS)
    windowed = plan.with_windows(Windows(prefill, decode))
    assert (windowed.digest == plan.digest) == (not prefill and not decode)
    for phase, given_windows in (("prefill", prefill), ("decode", decode)):
        same = windowed.phase_digest(phase) == plan.phase_digest(phase)  # type: ignore[arg-type]
        assert same == (not given_windows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.ffn", r"0\.ffn: a window in prefill, but only attention has one"),
        ("1.attention", r"1\.attention: a window in prefill, where its action is skip; only"),
        ("9.attention", r"9\.attention: unknown sublayer \(windows in prefill\)"),
        ("nothing", "nothing"),
    ],
)
def test_what_has_no_window(name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SkipPlan.of(SUBLAYERS, ["1.attention"], windows=Windows.of([name], Window(4)))  # type: ignore[list-item]


def test_phases_apart() -> None:
    windows = Windows.of(ATTENTION[:1], Window(4))
    plan = SkipPlan.of(SUBLAYERS, ["1.attention"], windows=windows)
    assert decode_only(plan).windows == Windows(decode=windows.decode)
    assert prefill_only(plan).windows == Windows(windows.prefill)
    assert prefill_only(plan, plan).windows == windows
    assert plan.window("prefill", ATTENTION[0]) == Window(4)
    assert plan.window("decode", ATTENTION[1]) is None
    assert plan.action("decode", ATTENTION[0]) is Action.RUN


def test_the_table() -> None:
    windows = Windows({ATTENTION[0]: Window(4, 1)}, {s: Window(8, 1) for s in ATTENTION[:2]})
    plan = SkipPlan.of(SUBLAYERS, ["2.ffn"], windows=windows)
    dot = "\N{MIDDLE DOT}"
    assert str(plan).splitlines() == [
        f"SkipPlan {plan.digest[:8]}: prefill skips 1 of 6 sublayers (1 ffn), decode 1 of 6; "
        "attention has windows in 1 sublayers of prefill, 2 of decode",
        "layer | attention                             | ffn",
        f"    0 | prefill window 1+4, decode window 1+8 | {dot}",
        f"    1 | prefill {dot}, decode window 1+8          | {dot}",
        f"    2 | {dot}                                     | skip",
    ]
