"""The benchmark workloads on a tiny model: what their numbers say of each other, never how fast.

A check of a result is a function that names the claims the result breaks: none for a result that
was measured, and the very claim for one in which a single number is a thousandth off.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from benchmarks import (
    budget,
    floors,
    generate,
    link,
    models,
    peers,
    plans,
    report,
    speed,
    states,
    window,
)
from benchmarks.__main__ import WORKLOADS, app
from benchmarks.studies import STUDIES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PHASES = ("prefill", "decode")

Document = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Everything on the CPU, where the workloads take the tiny model; one model for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "device", lambda: torch.device("cpu"))
        models.pair.cache_clear()
        yield
    models.pair.cache_clear()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


# What the numbers of a result say of each other.


def _same(broken: set[str], claim: str, value: float, expected: float) -> None:
    if not math.isclose(value, expected, rel_tol=1e-9):
        broken.add(claim)


def _spread(broken: set[str], claim: str, values: Document) -> None:
    ordered = 0 < values["min"] <= values["median"] <= values["max"]
    if len(values) != 4 or values["repeats"] < 1 or not ordered:
        broken.add(claim)


def _parameters(model: Any, skipped: set[Sublayer]) -> tuple[int, int]:
    """Parameters of the sublayers that are kept, and of the head."""
    left_out = tuple(
        f"model.layers.{s.layer}.{'self_attn' if s.kind == 'attention' else 'mlp'}."
        for s in skipped
    )
    counts = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(left_out) and "norm" not in name and "embed_tokens" not in name
    }
    return sum(counts.values()) - counts["lm_head.weight"], counts["lm_head.weight"]


def _floors(model: Any, skipped: set[Sublayer], context: int, batch: int) -> dict[str, float]:
    """Operations of a prompt and bytes of a decode step, from the parameters and the shape."""
    kept, head = _parameters(model, skipped)
    config = model.config
    attention = config.num_hidden_layers - sum(s.kind == "attention" for s in skipped)
    stored = 2 * config.num_key_value_heads * config.head_dim * context  # keys and values
    # Scores and weighted values: 2 x 2 operations a number, for half of the pairs of tokens.
    scores = 4 * config.num_attention_heads * config.head_dim * context * context / 2
    item = {torch.float32: 4, torch.bfloat16: 2}[model.dtype]
    return {
        "prefill": batch * (2 * kept * context + 2 * head + attention * scores),
        "decode": item * (kept + head + batch * attention * stored),
    }


def broken_speed(result: Document, model: Any) -> set[str]:
    broken: set[str] = set()
    layers, batch = model.config.num_hidden_layers, result["batch"]
    sublayers = [Sublayer(i, kind) for i in range(layers) for kind in ("attention", "ffn")]
    top = result["ceilings"]
    for key in ("matrix_flop_per_s", "copy_bytes_per_s"):
        rates = [row[key] for row in result["rows"]]
        if not min(rates) <= top[key] <= max(rates):
            broken.add(key)
    full: Document = {}
    for row in result["rows"]:
        rate = {"prefill": row["matrix_flop_per_s"], "decode": row["copy_bytes_per_s"]}
        if row["skipped"] == 0:
            full = row
        skip = set(models.random_plan(sublayers, row["skipped"]).skipped("decode"))
        stored = layers - sum(s.kind == "attention" for s in skip)
        _same(broken, "kv_layers", row["kv_layers"], stored)
        _same(broken, "kv_share", row["kv_share"], row["kv_layers"] / layers)
        _same(broken, "kv_bytes", row["kv_bytes"] / full["kv_bytes"], row["kv_share"])
        by_hand = _floors(model, skip, row["context"], batch)
        for phase in PHASES:
            took, floor = row[phase]["median"], row[f"{phase}_floor"]
            _spread(broken, f"{phase} spread", row[phase])
            _same(broken, f"{phase}_floor", floor, by_hand[phase] / rate[phase])
            _same(broken, f"{phase}_over_floor", row[f"{phase}_over_floor"], took / floor)
            if row is full:
                continue
            speedup = full[phase]["median"] / took
            promise = full[f"{phase}_floor"] / floor
            _same(broken, f"{phase}_speedup", row[f"{phase}_speedup"], speedup)
            _same(broken, f"{phase}_promise", row[f"{phase}_promise"], promise)
            kept = row[f"{phase}_kept_of_promise"]
            _same(broken, f"{phase}_kept_of_promise", kept, speedup / promise)
    return broken


def broken_plans(result: Document) -> set[str]:
    broken: set[str] = set()
    for key in ("step_ms", "step_with_new_plan_ms"):
        _spread(broken, key, result[key])
    if not 0 < result["link_ms_mean"] <= result["step_with_new_plan_ms"]["max"]:
        broken.add("link_ms_mean")  # linking is a part of the step
    broken |= {key for key in ("new_captures", "new_pieces") if result[key] != 0}
    return broken


def broken_window(result: Document, layers: int) -> set[str]:
    broken: set[str] = set()
    sublayers = [Sublayer(i, kind) for i in range(layers) for kind in ("attention", "ffn")]
    plan = models.random_plan(sublayers, len(sublayers) // 8)
    ffn = layers - sum(s.kind == "ffn" for s in plan.skipped("decode"))
    _same(broken, "probed", result["probed"], ffn)
    for ratio, part, whole in (
        ("probed_over_plain", "probed_step_s", "step_s"),
        ("calibration_over_prompts", "calibration_s", "prompts_s"),
    ):
        _same(broken, ratio, result[ratio], result[part] / result[whole])
    return broken


def broken_generate(result: Document) -> set[str]:
    broken: set[str] = set()
    for kind in ("greedy", "sampling"):
        rate = result["step_s"] / result[kind]["token_s"]
        _same(broken, kind, result[kind]["of_step_rate"], rate)
    return broken


def broken_peers(result: Document, contexts: tuple[int, ...]) -> set[str]:
    broken: set[str] = set()
    expected = [(c, peer) for c in contexts for peer in ("adaskip", "eager", "static")]
    if [(row["context"], row["peer"]) for row in result["rows"]] != expected:
        broken.add("rows")
    for row in result["rows"]:
        for phase in ("decode",) if row["peer"] == "static" else PHASES:
            _spread(broken, f"{row['peer']} {phase}", row[phase])
    return broken


def broken_link(result: Document) -> set[str]:
    broken = {key for key in ("new_captures", "new_pieces") if result[key] != 0}
    _same(broken, "sublayers", result["sublayers"], 2 * result["layers"])
    for phase in PHASES:
        _spread(broken, phase, result["link_ms"][phase])
    return broken


def broken_states(result: Document) -> set[str]:
    broken: set[str] = set()
    _same(broken, "new_captures", result["new_captures"], 1)  # of one edit, made twice
    for name in ("look_us", "short_prompt_ms", "known_state_ms"):
        _spread(broken, name, result[name])
    if result["look_us"]["median"] > 1000 * result["short_prompt_ms"]["median"]:
        broken.add("look_us")  # a look is a part of a prompt
    return broken


def broken_budget(result: Document, layers: int) -> set[str]:
    broken: set[str] = set()
    costs = {(c["phase"], c["context"]): c["seconds"] for c in result["costs"]}
    for row in result["rows"]:
        cost = costs[row["phase"], row["context"]]
        full = cost["rest"] + layers * (cost["attention"] + cost["ffn"])
        skipped = row["attention"] + row["ffn"]
        saved = sum(row[kind] * cost[kind] for kind in ("attention", "ffn"))
        # neighbours are scaled once: as many scales as there are gaps, of which a row says nothing
        times = (full - saved + scales * cost["scale"] for scales in range(1, skipped + 1))
        if not any(math.isclose(row["predicted"], full / t, rel_tol=1e-9) for t in times):
            broken.add("predicted")
        _same(broken, "error", row["error"] + 1, row["predicted"] / row["measured"])
        what, number = row["plan"].split()
        if what == "alpha" and row["predicted"] < float(number) - 0.005:  # three digits
            broken.add("alpha")
        if what == "random" and row["attention"] + row["ffn"] != int(number):
            broken.add("random")
    _same(broken, "worst", result["worst"], max(abs(row["error"]) for row in result["rows"]))
    return broken


def near_miss(result: Document, path: str, change: Callable[[Any], Any]) -> Document:
    """A copy of `result` with the number at `path` changed."""
    result = copy.deepcopy(result)
    *way, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    place: Any = result
    for key in way:
        place = place[key]
    place[last] = change(place[last])
    return result


def _off(value: float) -> float:
    return value * 1.001


def _more(value: float) -> float:
    return value + 1


# Each workload.


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)],
    ids=["batch1", "batch2"],
)
def measured_speed(request: pytest.FixtureRequest) -> Document:
    return speed.measure(batch=request.param, contexts=(32,))


def test_speed(measured_speed: Document) -> None:
    assert set(measured_speed) == {"model", "dtype", "batch", "ceilings", "rows"}
    assert measured_speed["model"] == {"layers": 8, "hidden": 64}
    assert measured_speed["dtype"] == "torch.float32"
    assert [(row["context"], row["skipped"]) for row in measured_speed["rows"]] == [
        *((32, skipped) for skipped in (0, 2, 3, 4))
    ]
    assert broken_speed(measured_speed, models.pair()[0]) == set()
    assert len(speed.summary(measured_speed).splitlines()) == 5


@pytest.mark.parametrize(
    ("path", "change", "claim"),
    [
        *(
            (f"rows/{row}/{phase}_{key}", _off, f"{phase}_{key}")
            for row, keys in (
                ("0", ("floor", "over_floor")),
                ("3", ("floor", "over_floor", "speedup", "promise", "kept_of_promise")),
            )
            for phase in PHASES
            for key in keys
        ),
        ("rows/2/kv_share", _off, "kv_share"),
        ("rows/2/kv_bytes", _off, "kv_bytes"),
        ("rows/2/kv_layers", _more, "kv_layers"),
        ("rows/1/prefill/min", lambda _: math.inf, "prefill spread"),
        ("rows/1/decode/max", lambda _: 0.0, "decode spread"),
        ("rows/1/decode/repeats", lambda _: 0, "decode spread"),
        ("ceilings/matrix_flop_per_s", _off, "matrix_flop_per_s"),
        ("rows/1/matrix_flop_per_s", _off, "prefill_floor"),
        ("ceilings/copy_bytes_per_s", _off, "copy_bytes_per_s"),
        ("rows/1/copy_bytes_per_s", _off, "decode_floor"),
        ("batch", _more, "decode_floor"),
    ],
)
def test_speed_near_miss(
    measured_speed: Document, path: str, change: Callable[[Any], Any], claim: str
) -> None:
    wrong = near_miss(measured_speed, path, change)
    assert claim in broken_speed(wrong, models.pair()[0])


@pytest.mark.slow
def test_floors_of_the_tiny_model_as_numbers() -> None:
    """Written out: width 64, 4 heads of 16, 2 K/V heads, 128 in the FFN, 256 words, 8 layers."""
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    ffn = 3 * 64 * 128
    head = 64 * 256
    skipped = {Sublayer(2, "attention"), Sublayer(3, "ffn"), Sublayer(4, "ffn")}
    kept = 7 * attention + 6 * ffn
    model = models.pair()[0]
    assert _floors(model, skipped, 32, 2) == {
        "prefill": 2 * (2 * kept * 32 + 2 * head + 7 * 2 * 32 * 32 * 64),
        "decode": 4 * (kept + head + 2 * 7 * 32 * (32 + 32)),
    }
    plan = SkipPlan.of(models.pair()[1].adaskip.sublayers, skipped)
    assert floors.prefill_flop(model, plan, 32, 2) == _floors(model, skipped, 32, 2)["prefill"]
    assert floors.decode_bytes(model, plan, 32, 2) == _floors(model, skipped, 32, 2)["decode"]


def _peers() -> Document:
    """Without Inductor, which takes half a minute for what is not ours: one graph, run as it is."""
    original = torch.compile
    modes: list[Document] = []

    def compile_for_the_test(model: Any, **options: Any) -> Any:
        modes.append(options)
        return original(model, backend="eager", fullgraph=options["fullgraph"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_for_the_test)
        result = peers.measure(contexts=(32,))
    assert modes == [{"mode": "reduce-overhead", "fullgraph": True}]
    return result


MEASURE: dict[str, Callable[[], Document]] = {
    "plans": lambda: plans.measure(context=32, repeats=3),
    "window": lambda: window.measure(context=32, prompt=16),
    "generate": lambda: generate.measure(context=32, tokens=4),
    "peers": _peers,
    "link": lambda: link.measure(layers=6, repeats=2),
    "budget": lambda: budget.measure(contexts=(32,), rounds=1),
    "states": lambda: states.measure(repeats=3),
}
#: Measured in `make test`, besides those that the command line runs below.
OFTEN: set[str] = set()


CHECKS: dict[str, Callable[[Document], set[str]]] = {
    "plans": broken_plans,
    "window": lambda result: broken_window(result, 8),
    "generate": broken_generate,
    "peers": lambda result: broken_peers(result, (32,)),
    "link": broken_link,
    "budget": lambda result: broken_budget(result, 8),
    "states": broken_states,
}
KEYS = {
    "plans": {
        *("context", "step_ms", "step_with_new_plan_ms", "link_ms_mean"),
        *("new_captures", "new_pieces", "memory_per_plan_bytes"),
    },
    "window": {
        *("context", "probed", "step_s", "probed_step_s", "probed_over_plain"),
        *("prompt", "prompts_s", "calibration_s", "calibration_over_prompts"),
    },
    "generate": {"context", "tokens", "step_s", "greedy", "sampling"},
    "peers": {"rows"},
    "link": {"layers", "sublayers", "link_ms", "new_captures", "new_pieces"},
    "budget": {"model", "dtype", "rounds", "costs", "rows", "worst"},
    "states": {
        *("layers", "look_us", "short_prompt_ms", "new_state_s"),
        *("known_state_ms", "new_captures"),
    },
}


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in KEYS]
)
def test_workload(name: str) -> None:
    measured = MEASURE[name]()
    assert set(measured) == KEYS[name]
    assert CHECKS[name](measured) == set()


@pytest.mark.parametrize(
    ("name", "path", "change", "claim"),
    [
        ("plans", "step_ms/median", lambda _: math.inf, "step_ms"),
        ("plans", "step_with_new_plan_ms/min", lambda _: math.inf, "step_with_new_plan_ms"),
        ("plans", "link_ms_mean", lambda _: math.inf, "link_ms_mean"),
        ("plans", "new_captures", _more, "new_captures"),
        ("plans", "new_pieces", _more, "new_pieces"),
        ("window", "probed", _more, "probed"),
        ("window", "probed_over_plain", _off, "probed_over_plain"),
        ("window", "step_s", _off, "probed_over_plain"),
        ("window", "calibration_over_prompts", _off, "calibration_over_prompts"),
        ("window", "calibration_s", _off, "calibration_over_prompts"),
        ("generate", "greedy/of_step_rate", _off, "greedy"),
        ("generate", "sampling/token_s", _off, "sampling"),
        ("peers", "rows/1/context", _more, "rows"),
        ("peers", "rows/0/prefill/max", lambda _: 0.0, "adaskip prefill"),
        ("peers", "rows/2/decode/min", lambda _: math.inf, "static decode"),
        ("link", "sublayers", _more, "sublayers"),
        ("link", "link_ms/decode/median", lambda _: math.inf, "decode"),
        ("link", "new_captures", _more, "new_captures"),
        ("link", "new_pieces", _more, "new_pieces"),
        ("budget", "costs/0/seconds/rest", _more, "predicted"),
        ("budget", "rows/0/measured", _off, "error"),
        ("budget", "worst", _off, "worst"),
        ("states", "new_captures", _more, "new_captures"),
        ("states", "look_us/median", lambda _: math.inf, "look_us"),
    ],
)
def test_workload_near_miss(
    name: str,
    path: str,
    change: Callable[[Any], Any],
    claim: str,
) -> None:
    """Of the results that are in the repository, which need not be measured again."""
    assert RECORDED[name](near_miss(recorded(name), path, change)) == {claim}


# The results that are in the repository.


def recorded(name: str) -> Document:
    result: Document = json.loads((RESULTS / f"{name}.json").read_text())
    assert result.pop("workload") == name
    assert set(result.pop("conditions")) == {
        *("device", "threads", "cores", "python", "torch", "transformers")
    }
    return result


@pytest.mark.parametrize("name", ["speed", "speed_batch8"])
def test_recorded_speed_agrees_with_itself(name: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**models.LLAMA_8B)).to(torch.bfloat16)
    result = recorded(name)
    assert broken_speed(result, model) == set()
    wrong = near_miss(result, "rows/3/decode/median", _off)
    assert broken_speed(wrong, model) == {
        *("decode_over_floor", "decode_speedup", "decode_kept_of_promise")
    }


RECORDED: dict[str, Callable[[Document], set[str]]] = {
    **CHECKS,
    "window": lambda result: broken_window(result, 32),
    "peers": lambda result: broken_peers(result, (8192, 32640)),
    "budget": lambda result: broken_budget(result, 32),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_result_agrees_with_itself(name: str) -> None:
    result = recorded(name)
    assert set(result) == KEYS[name]
    assert RECORDED[name](result) == set()


def test_what_is_reported_was_measured_on_a_gpu() -> None:
    """A run on a CPU, of a tiny model, writes to the same folder."""

    def on_gpu(name: str) -> bool:
        conditions = json.loads((RESULTS / f"{name}.json").read_text())["conditions"]
        return str(conditions["device"]).startswith("NVIDIA")

    recorded = [name for name in report.NAMES if (RESULTS / f"{name}.json").exists()]
    assert [name for name in recorded if not on_gpu(name)] == []
    assert not on_gpu("link"), "the near miss: it is of a CPU, and no part of the report"


# The command line.


def test_run_writes_each_workload_with_its_conditions(tmp_path: Path) -> None:
    result = invoke("run", "plans", "generate", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["generate.json", "plans.json"]
    for name in ("plans", "generate"):
        text = (tmp_path / "new" / f"{name}.json").read_text()
        document = json.loads(text)
        assert text == json.dumps(document, indent=1) + "\n"
        assert text in result.output
        assert [*document][:: len(document) - 1] == ["workload", "conditions"]
        assert document["workload"] == name
        assert set(document) == {"workload", "conditions", *KEYS[name]}
        assert CHECKS[name](document) == set()
        assert document["conditions"]["torch"] == str(torch.__version__)


def test_run_prints_a_summary_where_there_is_one(
    tmp_path: Path, measured_speed: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Document] = []

    def measure(**arguments: Any) -> Document:
        asked.append(arguments)
        return measured_speed

    monkeypatch.setattr(speed, "measure", measure)
    result = invoke("run", "speed", "speed_batch8", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert asked == [{}, {"batch": 8, "contexts": None}]
    table = speed.summary(measured_speed)
    assert result.output == f"speed:\n{table}\nspeed_batch8:\n{table}\n"
    for name in ("speed", "speed_batch8"):
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert document["workload"] == name
        assert document["rows"] == measured_speed["rows"]
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    invoke("run", "speed_batch8", "--out", tmp_path)
    assert asked[-1] == {"batch": 8, "contexts": (8192,)}


def test_threads_of_one_workload_do_not_stay_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`link` measures on one thread: its conditions say so, and those after it are not slowed."""
    before = torch.get_num_threads()

    def one_more() -> Document:
        torch.set_num_threads(before + 1)
        return {}

    monkeypatch.setattr(link, "measure", one_more)
    monkeypatch.setattr(plans, "measure", dict)
    assert invoke("run", "link", "plans", "--out", tmp_path).exit_code == 0
    threads = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["conditions"]["threads"]
        for name in ("link", "plans")
    }
    assert threads == {"link": before + 1, "plans": before}
    assert torch.get_num_threads() == before


def test_unknown_workload_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "measure", lambda: pytest.fail("it ran"))
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("run", "plans", "sped", "--out", tmp_path / "new")
    assert result.exit_code == 2
    known = ", ".join(sorted([*WORKLOADS, *STUDIES]))
    said = " ".join(result.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert f"'sped' is none of {known}" in said
    assert not (tmp_path / "new").exists()


def test_every_workload_has_its_module() -> None:
    assert list(WORKLOADS) == [
        *("link", "speed", "speed_batch8", "plans", "window", "generate"),
        *("peers", "peers_whole_graph", "cold", "budget", "states", "windows", "imports"),
        *("situations", "tensor_parallel", "lossless", "cpu", "vllm"),
    ]
    for module in WORKLOADS.values():
        files = f"{module}.py", f"{module}/__init__.py"
        assert any((RESULTS.parent / file).is_file() for file in files)


# The report.

CONDITIONS = {
    **{"device": "Some GPU", "threads": 3, "cores": 4, "python": "3.11.7"},
    **{"torch": "2.11.0", "transformers": "5.17.0"},
}
UNDER = "Some GPU, 3 threads on 4 cores, Python 3.11.7, torch 2.11.0, transformers 5.17.0"


def _took(seconds: float) -> Document:
    return {"median": seconds, "min": seconds, "max": seconds, "repeats": 1}


def _situations() -> list[Document]:
    row = {
        **{"situation": "growth", "what": "slowest step", "unit": "ms", "measured": 6.5},
        **{"reference": 4.0, "ratio": 1.625, "of": "difference", "value": 2.5, "target": 5},
        **{"at_least": False, "met": True, "eager_error": None},
    }
    slow = {"of": "ratio", "value": 0.9, "target": 0.95, "at_least": True, "met": False}
    alone = {"of": "measured", "reference": None, "ratio": None, "target": None, "met": None}
    return [row, {**row, **slow}, {**row, **alone}]


def _documents() -> dict[str, Document]:
    full = {
        **{"context": 64, "skipped": 0, "prefill": _took(0.5), "decode": _took(0.008)},
        **{"prefill_over_floor": 1.25, "decode_over_floor": 1.5},
        **{"kv_bytes": 2**31, "kv_share": 1.0},
    }
    less = {
        **{"context": 64, "skipped": 2, "prefill": _took(0.4), "decode": _took(0.004)},
        **{"prefill_over_floor": 1.125, "decode_over_floor": 1.375},
        **{"prefill_speedup": 1.25, "prefill_promise": 1.5, "prefill_kept_of_promise": 0.833},
        **{"decode_speedup": 2.0, "decode_promise": 2.5, "decode_kept_of_promise": 0.8},
        **{"kv_bytes": 2**30, "kv_share": 0.5},
    }
    rows = [
        {"context": 64, "peer": "adaskip", "prefill": _took(0.5), "decode": _took(0.008)},
        {"context": 64, "peer": "static", "decode": _took(0.02)},
        {"context": 128, "peer": "static", "decode": _took(0.02)},
    ]
    new_plan = {"median": 12.5, "min": 10.0, "max": 20.0, "repeats": 9}
    cold = {"layers": 4, "cache": "warm", "capture_s": 1.0, "prompt_s": 2.0, "total_s": 3.25}
    planned = {
        **{"phase": "decode", "context": 64, "plan": "alpha 1.25", "attention": 2, "ffn": 1},
        **{"predicted": 1.25, "measured": 1.2753, "error": -0.02},
    }
    results: dict[str, Document] = {
        "speed": {
            **{"model": {"layers": 4, "hidden": 64}, "dtype": "torch.bfloat16", "batch": 1},
            "ceilings": {"copy_bytes_per_s": 2e12, "matrix_flop_per_s": 5e14},
            "rows": [full, less],
        },
        "peers": {"rows": rows},
        "generate": {
            "context": 64,
            "greedy": {"of_step_rate": 0.99},
            "sampling": {"of_step_rate": 0.96},
        },
        "plans": {
            "step_ms": _took(5.25),
            "step_with_new_plan_ms": new_plan,
            "memory_per_plan_bytes": 2**19,
        },
        "window": {
            **{"probed": 7, "probed_over_plain": 1.01},
            **{"prompt": 16, "calibration_over_prompts": 1.07},
        },
        "cold": {"rows": [cold]},
        "budget": {
            **{"model": {"layers": 4, "hidden": 64}, "dtype": "torch.bfloat16", "worst": 0.0225},
            "rows": [planned],
        },
        "situations": {
            **{"model": {"layers": 4, "hidden": 64}, "dtype": "torch.bfloat16"},
            "rows": [*_situations(), {"situation": "turn", "failed": "ValueError: a|b\nsecond"}],
            "seconds": {"growth": 1.0, "turn": 2.0},
        },
    }
    return {
        name: {"workload": name, **result, "conditions": CONDITIONS}
        for name, result in results.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, document in _documents().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def without_matplotlib(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "matplotlib", None)


def _cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def test_report_shows_every_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    result = invoke("report", "--results", folder)
    assert result.exit_code == 0, result.output
    assert result.stderr == "plots left out: matplotlib is not installed\n"
    heads = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert heads == [
        *("## Speed, batch 1", "## Peers", "## Speed-up, predicted and measured"),
        *("## Situations", "## Single figures"),
    ]
    assert result.stdout.count(UNDER) == 5
    assert "4 layers, hidden size 64, torch.bfloat16" in result.stdout
    assert "2000 GB/s and 500 TFLOP/s" in result.stdout
    assert "the prediction is off by at most 2.2%" in result.stdout
    assert ["decode", "64", "alpha 1.25", "2", "1", "1.250", "1.275", "-2.0%"] in _cells(
        result.stdout
    )
    rows = _cells(result.stdout)
    for expected in (
        "64 0 0.5000 1.250 - - - 8.000 1.500 - - - 2.000 1.000",
        "64 2 0.4000 1.125 1.250 1.500 0.833 4.000 1.375 2.000 2.500 0.800 1.000 0.500",
        "64 adaskip 0.5000 8.000 1.00",
        "64 static - 20.000 2.50",
        "128 static - 20.000 -",
    ):
        assert expected.split() in rows
    step = ["growth", "slowest step", "6.500"]
    for cells in (
        [*step, "4.000", "ms", "1.625", "2.500", "5.00", "yes"],
        [*step, "4.000", "ms", "1.625", "0.900", ">= 0.95", "no"],
        [*step, "-", "ms", "-", "2.500", "-", "-"],
        ["turn", "failed: ValueError: a/b", *["-"] * 7],
    ):
        assert cells in rows
    assert [row for row in rows if len(row) == 2][1:] == [
        ["generate, greedy: share of the step rate (context 64)", "0.990"],
        ["generate, sampling: share of the step rate (context 64)", "0.960"],
        ["pause for a new plan, median of 9, ms", "7.2"],
        ["pause for a new plan, max of 9, ms", "14.8"],
        ["memory per plan, MiB", "0.50"],
        ["step with 7 probes over a step without", "1.010"],
        ["calibration over plain prompts (16 of 16 tokens)", "1.070"],
        [
            "cold start, 4 layers, warm compile cache, s "
            "(capture; to the first prompt; and two tokens)",
            "1.0; 2.0; 3.2",
        ],
    ]


def test_report_leaves_out_what_was_not_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_matplotlib(monkeypatch)
    for name in ("speed", "peers", "cold", "window", "plans", "budget", "situations"):
        (folder / f"{name}.json").unlink()
    result = invoke("report", "--results", folder)
    assert result.exit_code == 0, result.output
    assert len(_cells(result.stdout)) == 3
    assert "Speed" not in result.stdout


def test_figures_of_another_machine_are_a_table_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_matplotlib(monkeypatch)
    other = _documents()["cold"] | {"conditions": CONDITIONS | {"device": "Another GPU"}}
    (folder / "cold.json").write_text(json.dumps(other))
    result = invoke("report", "--results", folder)
    assert result.stdout.count("## Single figures") == 2
    assert UNDER.replace("Some", "Another") in result.stdout


def test_report_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    result = invoke("report", "--results", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: no results in {tmp_path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "speed.json cannot be read"),
        ("[]", "speed.json is not a result of"),
        ('{"workload": "peers"}', "speed.json is not a result of"),
        ('{"workload": "speed"}', "speed.json is not complete: KeyError('conditions')"),
    ],
)
def test_report_of_a_damaged_file(folder: Path, text: str, message: str) -> None:
    (folder / "speed.json").write_text(text)
    result = invoke("report", "--results", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_report_draws(folder: Path) -> None:
    for again in ("one", "two"):
        result = invoke("report", "--results", folder, "--out", folder / again)
        assert result.exit_code == 0, result.output
    written = sorted(p.name for p in (folder / "one").iterdir())
    assert written == ["speed.png", "speed.svg"]
    for name in written:  # nothing of the time or the machine is in a picture
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


def test_another_missing_module_is_not_taken_for_matplotlib(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("report", "--results", folder)
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "matplotlib.figure"
