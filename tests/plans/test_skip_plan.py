"""Skip plans and surrogates: what is accepted, what identifies them, what survives a crash."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.plans.skip_plan import Action, Kind, Phase, PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import NO_SURROGATES, Surrogates
from adaskip_fx.plans.windows import NO_WINDOWS

PROPERTY = settings(deadline=None)  # a shared machine may stall


def model(layers: int) -> tuple[Sublayer, ...]:
    kinds: tuple[Kind, ...] = ("attention", "ffn")
    return tuple(Sublayer(n, kind) for n in range(layers) for kind in kinds)


def sub(text: str) -> Sublayer:
    return Sublayer.parse(text)


def scale(**factors: float) -> Surrogates:
    """scale(ffn1=0.9) gives sublayer 1.ffn that factor."""
    named = {Sublayer(int(key.removeprefix("ffn")), "ffn"): f for key, f in factors.items()}
    return Surrogates.scale(named)


FACTORS = st.floats(min_value=1e-4, max_value=1e4)


@st.composite
def plans(draw: st.DrawFn) -> SkipPlan:
    sublayers = model(draw(st.integers(1, 4)))
    some = st.lists(st.sampled_from(sublayers), unique=True)
    skip = draw(some.filter(lambda chosen: len(chosen) < len(sublayers)))
    free = [s for s in sublayers if s.kind == "ffn" and s not in skip]
    room = len(sublayers) - len(skip) - 1
    extra = draw(st.lists(st.sampled_from(free), unique=True, max_size=room)) if free else []
    factors = draw(st.dictionaries(st.sampled_from(sublayers), FACTORS))
    surrogates = Surrogates.scale(factors) if factors else NO_SURROGATES
    return SkipPlan.of(sublayers, skip, decode_extra=extra, surrogates=surrogates)


# Sublayer --------------------------------------------------------------------------------------


def test_sublayer_text() -> None:
    assert str(Sublayer(3, "attention")) == "3.attention"
    assert sub("12.mixer") == Sublayer(12, "mixer")
    assert sorted([sub("1.attention"), sub("0.ffn"), sub("0.attention")])[1] == sub("0.ffn")


@given(st.integers(0, 10**6), st.sampled_from(["attention", "ffn", "mixer"]))
def test_sublayer_text_round_trip(layer: int, kind: Kind) -> None:
    assert sub(str(Sublayer(layer, kind))) == Sublayer(layer, kind)


@pytest.mark.parametrize(
    "text", ["", "3", "3.", ".ffn", "3.mlp", "-1.ffn", "3.ffn ", "3.ffn\n", "٣.ffn", "03.ffn"]
)
def test_sublayer_text_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a sublayer: write LAYER") as caught:
        sub(text)
    assert repr(text) in str(caught.value)


def test_sublayer_values_refused() -> None:
    with pytest.raises(ValueError, match="no such sublayer: layer -1"):
        Sublayer(-1, "ffn")
    with pytest.raises(ValueError, match="kind 'mlp'"):
        Sublayer(0, cast(Kind, "mlp"))


# Surrogates ------------------------------------------------------------------------------------


def test_compensation_is_a_value() -> None:
    one = Surrogates.scale({sub("0.ffn"): 0.5, sub("1.ffn"): 2})
    two = Surrogates.scale({sub("1.ffn"): cast(float, np.float32(2)), sub("0.ffn"): 0.5})
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest == two.digest
    assert one != Surrogates.scale({sub("0.ffn"): 0.5})
    assert one.factor(sub("1.ffn")) == 2.0
    assert one.factor(sub("1.attention")) is None
    assert NO_SURROGATES.factor(sub("0.ffn")) is None


def test_compensation_cannot_be_changed() -> None:
    given_factors = {sub("0.ffn"): 0.5}
    surrogates = Surrogates.scale(given_factors)
    given_factors[sub("0.ffn")] = 7.0
    assert surrogates.factor(sub("0.ffn")) == 0.5
    with pytest.raises(TypeError):
        surrogates.factors[sub("0.ffn")] = 1.0  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        surrogates.by_sublayer = {}  # type: ignore[misc]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.5, "0.9", None, 1j])
def test_factor_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"scale factor of 3\.ffn must be finite and positive"):
        Surrogates.scale({sub("1.ffn"): 1.0, sub("3.ffn"): bad})


@pytest.mark.parametrize("bad", [0.9e-4, 1.1e4, 7.6e33])
def test_a_factor_that_no_sublayer_has(bad: float) -> None:
    """Made by hand or in a file: the plan would drown the stream, or erase it."""
    Surrogates.scale({sub("1.ffn"): 1e-4, sub("3.ffn"): 1e4})
    words = r"scale factor of 3\.ffn is .*; no sublayer can be replaced by one outside of"
    with pytest.raises(ValueError, match=words):
        Surrogates.scale({sub("3.ffn"): bad})


def test_with_factors_adds_and_replaces() -> None:
    one = scale(ffn0=0.5, ffn1=0.6)
    assert one.with_factors({sub("1.ffn"): 0.7, sub("2.ffn"): 0.8}) == scale(
        ffn0=0.5, ffn1=0.7, ffn2=0.8
    )
    assert one == scale(ffn0=0.5, ffn1=0.6)
    assert NO_SURROGATES.with_factors({}) is NO_SURROGATES
    assert NO_SURROGATES.with_factors({sub("0.ffn"): 0.5}) == scale(ffn0=0.5)


@PROPERTY
@given(st.dictionaries(st.sampled_from(model(3)), FACTORS))
def test_compensation_survives_json_exactly(factors: dict[Sublayer, float]) -> None:
    one = Surrogates.scale(factors)
    assert Surrogates.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "surrogates must be an object"),
        ([], "surrogates must be an object"),
        ({"0.ffn": 0.5}, "surrogates must be an object"),
        ({"0.mlp": {"kind": "scale", "factor": 0.5}}, "'0.mlp' is not a sublayer"),
        ({"0.ffn": {"kind": "scale"}}, "scale factor of 0.ffn must be finite and positive"),
        ({"0.ffn": {"kind": "linear", "digest": "0" * 16}}, "the tensors of 0.ffn"),
        ({"0.ffn": {}}, "the tensors of 0.ffn's surrogate are not in its file"),
    ],
)
def test_compensation_json_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Surrogates.from_json(data)


def test_neighbouring_floats_have_other_digests() -> None:
    assert scale(ffn0=0.1).digest != scale(ffn0=math.nextafter(0.1, 1)).digest


# Construction ----------------------------------------------------------------------------------


def test_of_skips_in_both_phases_and_extras_in_decode() -> None:
    plan = SkipPlan.of(
        model(3), ["2.attention", sub("0.ffn"), "2.attention"], decode_extra=iter(["1.ffn"])
    )
    assert plan.skipped("prefill") == (sub("0.ffn"), sub("2.attention"))
    assert plan.skipped("decode") == (sub("0.ffn"), sub("1.ffn"), sub("2.attention"))
    assert plan.action("prefill", sub("1.ffn")) is Action.RUN
    assert plan.action("decode", sub("1.ffn")) is Action.SKIP


def test_of_refuses_text_that_names_nothing() -> None:
    with pytest.raises(PlanError, match=r"'2\.mlp' is not a sublayer"):
        SkipPlan.of(model(3), ["2.mlp"])


def test_run_entries_are_dropped() -> None:
    everything = dict.fromkeys(model(2), Action.RUN)
    assert SkipPlan(model(2), everything, everything) == SkipPlan.empty(model(2))
    assert SkipPlan(model(2), everything, {}).prefill == {}


def test_plan_is_a_value() -> None:
    one = SkipPlan.of(model(3), ["0.ffn", "1.ffn"], surrogates=scale(ffn0=0.9))
    two = SkipPlan.of(list(model(3)), ["1.ffn", "0.ffn"], surrogates=scale(ffn0=0.9))
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two, SkipPlan.of(model(3), ["0.ffn"])}) == 2
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one
        assert other.digest == one.digest


def test_plan_cannot_be_changed() -> None:
    prefill = {sub("0.ffn"): Action.SKIP}
    plan = SkipPlan(model(2), prefill, prefill)
    prefill[sub("1.ffn")] = Action.SKIP
    assert plan.skipped("prefill") == (sub("0.ffn"),)
    with pytest.raises(TypeError):
        plan.decode[sub("1.ffn")] = Action.SKIP  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.decode = {}  # type: ignore[misc]


# Validation ------------------------------------------------------------------------------------

RUN, SKIP, KV = Action.RUN, Action.SKIP, Action.KV_ONLY

# Every pair (prefill, decode) that leaves a usable cache, written out.
LEGAL: dict[Kind, set[tuple[Action, Action]]] = {
    "attention": {(RUN, RUN), (RUN, KV), (KV, RUN), (KV, KV), (SKIP, SKIP)},
    "mixer": {(RUN, RUN), (RUN, KV), (KV, RUN), (KV, KV), (SKIP, SKIP)},
    "ffn": {(RUN, RUN), (RUN, SKIP), (SKIP, RUN), (SKIP, SKIP)},
}


@pytest.mark.parametrize("kind", ["attention", "mixer", "ffn"])
@pytest.mark.parametrize("pair", [*itertools.product(Action, Action)])
def test_pairs_of_actions(kind: Kind, pair: tuple[Action, Action]) -> None:
    target, other = Sublayer(1, kind), Sublayer(0, kind)

    def build() -> SkipPlan:
        return SkipPlan((other, target), {target: pair[0]}, {target: pair[1]})

    if pair in LEGAL[kind]:
        assert (build().action("prefill", target), build().action("decode", target)) == pair
        return
    with pytest.raises(PlanError, match=rf"^1\.{kind}: "):
        build()


def test_messages_say_why_and_what_to_do() -> None:
    attention, ffn = sub("1.attention"), sub("1.ffn")
    with pytest.raises(PlanError, match="skip in prefill but run in decode: it has no K/V of the"):
        SkipPlan(model(2), {attention: SKIP}, {})
    with pytest.raises(PlanError, match="run in prefill but skip in decode: its K/V would have ho"):
        SkipPlan(model(2), {}, {attention: SKIP})
    with pytest.raises(PlanError, match="kv_only in prefill, but an ffn has no K/V; skip it"):
        SkipPlan(model(2), {ffn: KV}, {})


def test_unknown_sublayers_are_refused() -> None:
    where = r"the model has 4, 0\.attention to 1\.ffn"
    with pytest.raises(PlanError, match=rf"^2\.ffn: unknown sublayer \(prefill\); {where}"):
        SkipPlan.of(model(2), ["2.ffn"])
    with pytest.raises(PlanError, match=r"^2\.ffn: unknown sublayer \(decode\)"):
        SkipPlan.of(model(2), [], decode_extra=["2.ffn"])
    with pytest.raises(PlanError, match=r"^9\.ffn: unknown sublayer \(surrogates\)"):
        SkipPlan.of(model(2), [], surrogates=scale(ffn9=0.9))
    with pytest.raises(PlanError, match=r"^2\.ffn: unknown"):
        SkipPlan.empty(model(2)).action("decode", sub("2.ffn"))


def test_duplicates_and_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^0\.ffn: listed more than once"):
        SkipPlan.empty([*model(2), sub("0.ffn")])
    with pytest.raises(PlanError, match="got none"):
        SkipPlan.empty([])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_something_must_run(phase: Phase) -> None:
    ffn = [sub("0.ffn"), sub("1.ffn")]
    actions = dict.fromkeys(ffn, SKIP)
    SkipPlan((*ffn, sub("1.attention")), actions, actions)  # near miss: one runs
    with pytest.raises(PlanError, match=f"nothing runs in {phase}: all 2 sublayers"):
        SkipPlan(tuple(ffn), **{"prefill": {}, "decode": {}, phase: actions})  # type: ignore[arg-type]


def test_kv_only_alone_does_not_count_as_running() -> None:
    attention = (sub("0.attention"), sub("1.attention"))
    with pytest.raises(PlanError, match="nothing runs in decode"):
        SkipPlan(attention, {}, dict.fromkeys(attention, KV))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^0\.ffn: unknown action 'drop', use one of run, skip"):
        SkipPlan(model(1), {sub("0.ffn"): cast(Action, "drop")}, {})
    with pytest.raises(ValueError, match="unknown phase 'extend': use 'prefill' or 'decode'"):
        SkipPlan.empty(model(1)).skipped(cast(Phase, "extend"))
    with pytest.raises(ValueError, match="unknown phase 'extend'"):
        SkipPlan.empty(model(1)).phase_digest(cast(Phase, "extend"))


# Extras of decode ------------------------------------------------------------------------------


def test_decode_extra() -> None:
    plan = SkipPlan.of(model(3), ["0.ffn"], surrogates=scale(ffn0=0.9, ffn1=0.8))
    more = plan.with_decode_extra([sub("2.ffn"), sub("1.ffn")], {sub("2.ffn"): 0.7})
    assert more == SkipPlan.of(
        model(3),
        ["0.ffn"],
        decode_extra=["1.ffn", "2.ffn"],
        surrogates=scale(ffn0=0.9, ffn1=0.8, ffn2=0.7),
    )
    assert plan.skipped("decode") == (sub("0.ffn"),)
    assert plan.with_decode_extra([]) == plan
    assert plan.with_decode_extra([sub("0.ffn")]) == plan
    assert more.with_decode_extra([sub("2.ffn")], {sub("2.ffn"): 0.7}) == more


def test_decode_extra_refused() -> None:
    plan = SkipPlan.of(model(3), ["0.ffn"], surrogates=scale(ffn0=0.9))
    with pytest.raises(PlanError, match=r"^1\.attention: run in prefill but skip in decode"):
        plan.with_decode_extra([sub("1.attention")])
    with pytest.raises(PlanError, match=r"^7\.ffn: unknown"):
        plan.with_decode_extra([sub("7.ffn")])
    with pytest.raises(PlanError, match=r"^2\.ffn: a factor was given, but it is no extra"):
        plan.with_decode_extra([sub("1.ffn")], {sub("2.ffn"): 0.5})
    with pytest.raises(PlanError, match=r"^0\.ffn: a factor was given"):  # prefill would change
        plan.with_decode_extra([sub("0.ffn")], {sub("0.ffn"): 0.5})


@PROPERTY
@given(plans(), st.data())
def test_decode_extra_leaves_prefill_alone(plan: SkipPlan, data: st.DataObject) -> None:
    runs = [s for s in plan.sublayers if s not in plan.decode]
    free = [s for s in runs if s.kind == "ffn" and s not in plan.prefill]
    extra = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
    if len(extra) == len(runs):
        extra.pop()
    more = plan.with_decode_extra(extra, dict.fromkeys(extra, 0.123))
    assert more.phase_digest("prefill") == plan.phase_digest("prefill")
    assert (more.phase_digest("decode") == plan.phase_digest("decode")) == (not extra)
    assert set(more.skipped("decode")) == set(plan.skipped("decode")) | set(extra)


# Digests ---------------------------------------------------------------------------------------


def sha(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_digest_written_out() -> None:
    """The digests are part of the file format: this is what they are taken over."""
    plan = SkipPlan.of(model(1), ["0.ffn"], surrogates=Surrogates.scale({sub("0.ffn"): 0.75}))
    factor = {"factor": {"float": "0x1.8000000000000p-1"}}
    surrogate = sha({"kind": "scale", "tensors": factor})
    surrogates = sha({"0.ffn": surrogate})
    assert plan.surrogates.digest == surrogates
    actions = {"prefill": {"0.ffn": "skip"}, "decode": {"0.ffn": "skip"}}
    names = ["0.attention", "0.ffn"]
    assert plan.digest == sha({"sublayers": names, **actions, "compensation": surrogates})
    assert plan.phase_digest("decode") == sha(
        {
            "phase": "decode",
            "actions": [["0.attention", "run"], ["0.ffn", "skip"]],
            "stand_ins": {"0.ffn": surrogate},
        }
    )


@PROPERTY
@given(plans(), st.randoms(use_true_random=False))
def test_digest_does_not_depend_on_order(plan: SkipPlan, random: Any) -> None:
    def shuffled(mapping: Any) -> dict[Any, Any]:
        items = list(mapping.items())
        random.shuffle(items)
        return dict(items)

    factors = shuffled(plan.surrogates.factors)
    surrogates = Surrogates.scale(factors) if factors else NO_SURROGATES
    again = SkipPlan(plan.sublayers, shuffled(plan.prefill), shuffled(plan.decode), surrogates)
    assert again.digest == plan.digest
    assert again == plan
    assert str(again) == str(plan)


@PROPERTY
@given(plans(), plans())
def test_digest_tells_plans_apart(one: SkipPlan, two: SkipPlan) -> None:
    assert (one == two) == (one.digest == two.digest)


@PROPERTY
@given(plans(), plans(), st.sampled_from(["prefill", "decode"]))
def test_phase_digest_is_what_a_program_depends_on(
    one: SkipPlan, two: SkipPlan, phase: Phase
) -> None:
    def content(plan: SkipPlan) -> Any:
        changed = plan.prefill if phase == "prefill" else plan.decode
        return [
            (s, plan.action(phase, s), plan.surrogates.factor(s) if s in changed else None)
            for s in plan.sublayers
        ]

    equal = one.phase_digest(phase) == two.phase_digest(phase)
    assert (content(one) == content(two)) == equal


def test_phase_digest_near_misses() -> None:
    def build(*extra: str, **factors: float) -> SkipPlan:
        surrogates = scale(**factors) if factors else NO_SURROGATES
        return SkipPlan.of(model(3), ["0.ffn"], decode_extra=extra, surrogates=surrogates)

    one = build("1.ffn", ffn0=0.9, ffn1=0.8)
    unused = build("1.ffn", ffn0=0.9, ffn1=0.8, ffn2=0.7)
    assert unused.digest != one.digest
    for phase in ("prefill", "decode"):  # the factor of a sublayer that runs changes no program
        assert unused.phase_digest(phase) == one.phase_digest(phase)
    other = build("1.ffn", ffn0=0.9, ffn1=0.81)
    assert other.phase_digest("prefill") == one.phase_digest("prefill")
    assert other.phase_digest("decode") != one.phase_digest("decode")
    assert build(ffn0=0.9).phase_digest("prefill") != build(ffn0=0.91).phase_digest("prefill")
    assert build(ffn0=1.0).phase_digest("prefill") != build().phase_digest("prefill")
    assert build().phase_digest("prefill") != build().phase_digest("decode")
    scaled_nothing = SkipPlan.of(model(3), [], surrogates=scale(ffn0=0.9))
    empty = SkipPlan.empty(model(3))
    assert scaled_nothing.phase_digest("decode") == empty.phase_digest("decode")
    assert SkipPlan.empty(model(2)).phase_digest("decode") != empty.phase_digest("decode")


# Files -----------------------------------------------------------------------------------------


@PROPERTY
@given(plans())
def test_save_and_load(plan: SkipPlan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan.save(path)
        assert SkipPlan.load(str(path)) == plan
        assert os.listdir(folder) == ["plan.json"]


def test_kv_only_survives_a_file(tmp_path: Path) -> None:
    plan = SkipPlan(model(2), {sub("0.attention"): KV}, {sub("1.attention"): KV})
    plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == plan


def saved(path: Path) -> dict[str, Any]:
    plan = SkipPlan.of(
        model(2), ["0.ffn"], decode_extra=["1.ffn"], surrogates=scale(ffn0=0.5, ffn1=0.75)
    )
    plan.save(path)
    return cast(dict[str, Any], json.loads(path.read_text()))


def test_file_format(tmp_path: Path) -> None:
    data = saved(tmp_path / "plan.json")
    assert len(data.pop("digest")) == 16
    assert data == {
        "schema": 2,
        "sublayers": ["0.attention", "0.ffn", "1.attention", "1.ffn"],
        "prefill": {"0.ffn": "skip"},
        "decode": {"0.ffn": "skip", "1.ffn": "skip"},
        "compensation": {
            "0.ffn": {"kind": "scale", "factor": 0.5},
            "1.ffn": {"kind": "scale", "factor": 0.75},
        },
        "tensors": None,
    }


MODEL = Fingerprint("0123456789abcdef", "llama", 7, "f" * 16)


def test_a_file_says_which_model_it_is_for(tmp_path: Path) -> None:
    plan = SkipPlan.of(model(2), ["0.ffn"], surrogates=scale(ffn0=0.5)).with_fingerprint(MODEL)
    plan.save(tmp_path / "plan.json")
    loaded = SkipPlan.load(tmp_path / "plan.json")
    assert loaded.fingerprint == MODEL
    assert json.loads((tmp_path / "plan.json").read_text())["fingerprint"]["model_type"] == "llama"
    for kept in (
        pickle.loads(pickle.dumps(plan)),
        plan.with_decode_extra([sub("1.ffn")]),
        plan.with_surrogates(NO_SURROGATES),
        plan.with_windows(NO_WINDOWS),
        plan | SkipPlan.of(model(2), ["1.ffn"]),
    ):
        assert kept.fingerprint == MODEL


def test_which_model_it_is_for_is_no_part_of_a_plan() -> None:
    plan = SkipPlan.of(model(2), ["0.ffn"])
    other = plan.with_fingerprint(MODEL)
    assert (other, other.digest, hash(other)) == (plan, plan.digest, hash(plan))
    assert other.phase_digest("decode") == plan.phase_digest("decode")


EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(schema=3), r"schema 3 is newer than this version reads \(2\); upgrade"),
    (lambda d: d.update(schema=1), "unknown schema 1; build the plan again"),
    (lambda d: d.update(schema=0), "unknown schema 0; build the plan again"),
    (lambda d: d.update(schema="1"), "no schema number"),
    (lambda d: d.pop("schema"), "no schema number"),
    (lambda d: d.pop("decode"), "missing decode; build the plan again and save it"),
    (lambda d: (d.pop("digest"), d.pop("prefill")), "missing digest, prefill"),
    (lambda d: d["decode"].pop("1.ffn"), "edited after it was saved"),
    (lambda d: d["decode"].update({"1.attention": "kv_only"}), "edited after it was saved"),
    (lambda d: d["compensation"]["0.ffn"].update(factor=0.51), "edited after it was saved"),
    (lambda d: d.update(digest="0" * 16), "edited after it was saved"),
    (lambda d: d["compensation"]["0.ffn"].update(factor=-1), r"not a valid plan \(scale fac"),
    (lambda d: d["compensation"]["0.ffn"].update(kind="linear"), "the tensors of 0"),
    (lambda d: d.update(tensors="../other.safetensors"), "is not the name of a file of surrogates"),
    (lambda d: d["decode"].update({"0.attention": "skip"}), r"not a valid plan \(0\.attention: ru"),
    (lambda d: d["prefill"].update({"0.mlp": "skip"}), r"not a valid plan \('0\.mlp' is not a sub"),
    (lambda d: d["prefill"].update({"0.ffn": ["skip"]}), "not a valid plan"),
    (lambda d: d.update(prefill=["0.ffn"]), "not a valid plan"),
    (lambda d: d.update(sublayers=7), "not a valid plan"),
    (lambda d: d.update(fingerprint=[]), "not a valid plan"),
    (lambda d: d.update(fingerprint={"digest": "0" * 16}), "not a valid plan .*weights"),
    (lambda d: d.update(sublayers=[7]), "not a valid plan"),
    (lambda d: d.update(compensation=None), r"not a valid plan \(surrogates must be"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_bad_files_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    data = saved(path)
    path.write_text(json.dumps(data))
    SkipPlan.load(path)  # near miss: the same file, only laid out in another way
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        SkipPlan.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    saved(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(PlanError, match="truncated or not JSON"):
            SkipPlan.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"[]", b"3"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"not JSON|no schema number"):
        SkipPlan.load(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file; check the path, or build the plan again"):
        SkipPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"cannot be read \(Is a directory\)"):
        SkipPlan.load(tmp_path)


class Crash(BaseException):
    """Not an Exception, so that nothing in between can take it for an ordinary error."""


class HalfWritten:
    """A file whose write stops in the middle when the fault falls on it."""

    def __init__(self, file: Any, step: Callable[[], None]) -> None:
        self.file, self.step = file, step

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        try:
            self.step()
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)


@contextmanager
def fault(at: int, error: BaseException, *, dead: bool) -> Iterator[list[str]]:
    """Raise `error` at call number `at` into the system; when `dead`, at every later one too."""
    calls: list[str] = []

    def step(name: str) -> None:
        calls.append(name)
        if len(calls) - 1 == at or (dead and len(calls) - 1 > at):
            raise error

    def wrap(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            result = real(*args, **kwargs)
            return HalfWritten(result, lambda: step("write")) if name == "open" else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", wrap("open", builtins.open))
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls


@pytest.mark.parametrize("dead", [True, False])
def test_a_crash_while_saving_leaves_a_whole_plan(tmp_path: Path, dead: bool) -> None:
    old, new = SkipPlan.of(model(2), ["0.ffn"]), SkipPlan.of(model(2), ["1.ffn", "1.attention"])
    error = Crash() if dead else OSError("disk full")
    found: list[SkipPlan] = []
    for at in itertools.count():
        path = tmp_path / str(at) / "plan.json"
        path.parent.mkdir()
        old.save(path)
        try:
            with fault(at, error, dead=dead) as calls:
                new.save(path)
            finished = True
        except (Crash, OSError):
            finished = False
        found.append(SkipPlan.load(path))
        assert found[-1] in (old, new)
        assert not finished or found[-1] == new
        assert dead or os.listdir(path.parent) == ["plan.json"]  # it cleaned up
        if finished and len(calls) <= at:
            break
    assert calls == ["open", "write", "fsync", "replace", "fsync"]
    assert found == [old, old, old, old, new, new]


# Text ------------------------------------------------------------------------------------------


def test_table() -> None:
    both = {sub("0.ffn"): SKIP, sub("1.attention"): SKIP}
    decode = {**both, sub("1.ffn"): SKIP, sub("0.attention"): KV}
    plan = SkipPlan(model(3), both, decode, scale(ffn0=0.9874, ffn1=1.25))
    assert str(plan).splitlines() == [
        f"SkipPlan {plan.digest[:8]}: prefill skips 2 of 6 sublayers (1 attention, 1 ffn), "
        "decode 3 of 6",
        "layer | attention                 | ffn",
        "    0 | prefill ·, decode kv only | skip ×0.987",  # noqa: RUF001
        "    1 | skip                      | prefill ·, decode skip ×1.250",  # noqa: RUF001
        "    2 | ·                         | ·",
    ]


def test_table_of_a_hybrid_that_skips_nothing() -> None:
    plan = SkipPlan.empty([sub("0.mixer"), sub("1.attention"), sub("1.ffn"), sub("10.mixer")])
    assert str(plan).splitlines() == [
        f"SkipPlan {plan.digest[:8]}: prefill skips 0 of 4 sublayers, decode 0 of 4",
        "layer | attention | ffn | mixer",
        "    0 |           |     | ·",
        "    1 | ·         | ·   |",
        "   10 |           |     | ·",
    ]
