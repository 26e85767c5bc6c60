"""What of a family is supported: every claim checked against the eager model.

``python -m tests.model_support`` measures all families with the installed torch and transformers,
writes its column of ``support.json``, and the table of ``docs/models.md`` that is made of it.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from adaskip_fx.api import build
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.runtime.similarity import measure_prompt
from adaskip_fx.testing import Oracle
from adaskip_passes import UnsupportedError
from tests.support.branch_paths import branches
from tests.support.eager_reference import assert_close, moments
from tests.support.families.all import FAMILIES, tiny_config, tiny_model

COLUMNS = (
    "found",
    "skipped exactly",
    "probed",
    "cache exact",
    "generate exact",
    "sliding window",
    "one prefill graph",
    "padded batch",
    "static cache",
)
YES, NONE, _REFUSED = "yes", "-", "refused: "
FILE = Path(__file__).parent / "support.json"
PAGE = Path(__file__).parents[2] / "docs/models.md"
MARKS = "<!-- families -->", "<!-- end of families -->"
#: Operations are grouped differently, and a scan is summed in another order.
TOLERANCE = 2e-5
PROMPT, NEW = 9, 3


@dataclass(frozen=True)
class Subject:
    """A family's tiny model, the same compiled, and its eager reference."""

    family: str
    model: Any
    compiled: Any
    oracle: Oracle

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = runtime_of(self.compiled)
        return runtime

    def plans(self) -> list[SkipPlan]:
        """Nothing; one of each kind; the first and the last, with factors; an FFN in decode."""
        sublayers = self.runtime.sublayers
        inner = sublayers[len(sublayers) // 3 : -1] or sublayers
        single = {s.kind: s for s in inner}
        ends = sublayers[0], sublayers[-1]
        factors = Surrogates.scale({ends[0]: 0.75, ends[1]: 1.25})
        plans = [
            SkipPlan.empty(sublayers),
            SkipPlan.of(sublayers, ends, surrogates=factors),
            *(SkipPlan.of(sublayers, [s]) for s in single.values()),
        ]
        if "ffn" in single:
            plans.append(SkipPlan.of(sublayers, [], decode_extra=[single["ffn"]]))
        return plans

    def follow(self, plan: SkipPlan) -> None:
        """Have both do what a plan says."""
        self.runtime.plan = plan
        factor = plan.surrogates.factor
        self.oracle.prefill = {str(s): factor(s) for s in plan.skipped("prefill")}
        self.oracle.decode = {str(s): factor(s) for s in plan.skipped("decode")}

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(0, 61, (batch, count), generator=generator)

    def compare(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Caches:
        """A prompt, and its last tokens one by one; the logits of the last of each step."""
        mine, theirs = self.runtime.new_cache(), DynamicCache(config=self.model.config)
        whole = torch.ones_like(ids) if mask is None else mask
        places = (whole.cumsum(-1) - 1).clamp_min(0)
        begin = 0
        for end in range(ids.shape[1] - NEW, ids.shape[1] + 1):
            inputs = {"input_ids": ids[:, begin:end]}
            if mask is not None:
                inputs["attention_mask"] = mask[:, :end]
            if self._has("position_ids"):
                inputs["position_ids"] = places[:, begin:end]
            got, want = (
                self._step(model, inputs, cache)[:, -1]
                for model, cache in ((self.compiled, mine), (self.model, theirs))
            )
            assert_close(got, want, TOLERANCE, f"{self.family}, logits after {end} tokens")
            begin = end
        return Caches(mine, theirs)

    def _step(self, model: Any, inputs: dict[str, Any], cache: Any) -> torch.Tensor:
        more = {"logits_to_keep": 1} if self._has("logits_to_keep") else {}
        with torch.no_grad():
            output = model(**inputs, **more, **{self.runtime.cache_argument: cache})
        logits: torch.Tensor = output.logits
        return logits

    def _has(self, argument: str) -> bool:
        return argument in inspect.signature(type(self.model).forward).parameters


@dataclass(frozen=True)
class Caches:
    """Of the compiled model and of the eager one, after the same tokens."""

    mine: SkipCache
    theirs: DynamicCache

    def assert_equal(self, unused: set[int]) -> None:
        """K/V and states agree, but for layers that store nothing because they are skipped."""
        assert self.mine.lease.buffers is not None
        held = 0
        for i, (spec, layer) in enumerate(zip(self.mine.kept, self.theirs.layers, strict=False)):
            assert not (i in unused and (spec.attends or spec.mixes)), f"layer {i} is stored"
            if spec.attends:
                pairs = ((self.mine.keys[i], layer.keys), (self.mine.values[i], layer.values))
                for kept, expected in pairs:
                    assert kept is not None
                    last = kept[:, :, : self.mine.length][:, :, -expected.shape[2] :]
                    assert_close(last, expected, TOLERANCE, f"layer {i} keys or values")
                    held += kept.nbytes
            for state, tensor in zip(spec.states, self.mine.lease.buffers.states[i], strict=True):
                group = layer.conv_states if state.kind == "conv" else layer.recurrent_states
                assert_close(tensor, group[state.index], TOLERANCE, f"layer {i} {state.kind}")
                held += tensor.nbytes
        assert self.mine.nbytes == held


def subject(family: str) -> Subject:
    """A family's model, compiled without an inner compiler."""
    original = tiny_model(tiny_config(family))
    compiled = build(original, None, backend="eager", static_cache=False)
    model = copy.deepcopy(original)  # on which the oracle may put hooks
    return Subject(family, model, compiled, Oracle(model, branches(family, model)))


def measure(family: str) -> dict[str, str]:
    """The row of a family: for each column YES, NONE, or the reason why not.

    Raises:
        AssertionError: the compiled model computes something else than the eager one.
    """
    try:
        with warnings.catch_warnings():  # 2.11 warns of what is then refused
            warnings.filterwarnings("ignore", message="Dynamo does not know how to trace")
            one = subject(family)
    except UnsupportedError as error:
        return {"found": f"{_REFUSED}{error}"}
    with one.oracle.watching():
        return {column: check(one) for column, check in _CHECKS.items()}


def _found(one: Subject) -> str:
    assert [str(s) for s in one.runtime.sublayers] == list(one.oracle.modules), "found"
    return YES


def _skipped(one: Subject) -> str:
    for plan in one.plans():
        one.follow(plan)
        one.compare(one.tokens(1, PROMPT + NEW))
    return YES


def _probed(one: Subject) -> str:
    one.follow(one.plans()[0])
    ids = one.tokens(1, PROMPT)
    readings = measure_prompt(one.runtime, ids)
    with torch.no_grad():
        one.model(input_ids=ids)
    for name, reading in zip(one.oracle.modules, readings, strict=True):
        expected = moments(*(t.reshape(1, PROMPT, -1) for t in one.oracle.streams[name]))
        assert_close(reading.double(), expected, TOLERANCE, f"moments of {name}")
    return YES


def _cache(one: Subject) -> str:
    for plan in one.plans()[:2]:
        one.follow(plan)
        caches = one.compare(one.tokens(1, PROMPT + NEW))
        runs = {s.layer for s in plan.sublayers if s.kind != "ffn" and s not in plan.prefill}
        layers = {s.layer for s in plan.sublayers}
        caches.assert_equal(unused=layers - runs)
    return YES


def _generate(one: Subject) -> str:
    ids = one.tokens(1, PROMPT)
    one.follow(one.plans()[1])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mine, expected = (m.generate(ids, **options) for m in (one.compiled, one.model))
    assert torch.equal(mine, expected), "generated tokens"
    return YES


def _dynamic(one: Subject) -> str:
    one.follow(one.plans()[0])
    before = one.runtime.counters.captures
    for count in (5, 17, 30):
        one.compare(one.tokens(1, count + NEW))
    return YES if one.runtime.counters.captures == before else "several, by length"


def _window(one: Subject) -> str:
    config = one.model.config
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [w for name in names if isinstance(w := getattr(config, name, None), int)]
    if not any(w < PROMPT for w in windows) or getattr(config, "use_sliding_window", 1) is False:
        return NONE
    return YES  # all that was compared was longer


def _padded(one: Subject) -> str:
    ids = one.tokens(2, PROMPT + NEW)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for plan in one.plans()[:2]:
        one.follow(plan)
        one.compare(ids, mask)
    return YES


def _fixed(one: Subject) -> str:
    one.runtime.static_cache = True
    for plan in one.plans()[:3]:
        one.follow(plan)
        one.compare(one.tokens(1, PROMPT + NEW))
    why = one.runtime.why_no_static_cache
    return f"no: {why.split(':')[0]}" if why else YES


_CHECKS: Mapping[str, Callable[[Subject], str]] = {
    "found": _found,
    "skipped exactly": _skipped,
    "probed": _probed,
    "cache exact": _cache,
    "generate exact": _generate,
    "sliding window": _window,
    "one prefill graph": _dynamic,
    "padded batch": _padded,
    "static cache": _fixed,
}


def versions() -> str:
    """What a column of the table is for."""
    torch_version, of_transformers = (
        ".".join(str(v).split(".")[:2]) for v in (torch.__version__, transformers.__version__)
    )
    return f"torch {torch_version}, transformers {of_transformers}"


def rendered(measured: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """The table for the page: a cell says one thing where all versions agree, else each."""
    columns = COLUMNS[1:]
    supported = [f"| family | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    refused = ["| family | why it is refused |", "|---|---|"]
    names = dict.fromkeys(name for rows in measured.values() for name in rows)
    for name in names:
        found = {v: rows[name]["found"] for v, rows in measured.items() if name in rows}
        if all(f.startswith(_REFUSED) for f in found.values()):
            refused.append(f"| {name} | {_cell(found)} |")
            continue
        cells = (
            _cell({v: rows[name].get(c, NONE) for v, rows in measured.items() if name in rows})
            for c in columns
        )
        supported.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join((*supported, "", *refused))


def _cell(by_version: Mapping[str, str]) -> str:
    said = {version: _short(text) for version, text in by_version.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    of_torch: dict[str, set[str]] = {}
    for version, text in said.items():
        of_torch.setdefault(version.split(",")[0], set()).add(text)
    named = {v if len(of_torch[v.split(",")[0]]) > 1 else v.split(",")[0]: said[v] for v in said}
    return "; ".join(f"{version}: {text}" for version, text in named.items())


def _short(text: str) -> str:
    """The first sentence of a reason, in one line of a table."""
    first = text.removeprefix(_REFUSED).split(". ")[0].removesuffix(".")
    return first.replace("|", "/").replace("<", "").replace(">", "")


def main(names: list[str]) -> None:
    rows = {}
    for name in names or FAMILIES:
        if FAMILIES[name].known:
            rows[name] = measure(name)
            print(name, rows[name], flush=True)
    known = table()
    known.setdefault(versions(), {}).update(rows)
    ordered = {v: {n: known[v][n] for n in FAMILIES if n in known[v]} for v in sorted(known)}
    FILE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    before, (begin, end) = PAGE.read_text(), MARKS
    head, tail = before.partition(begin)[0], before.partition(end)[2]
    PAGE.write_text(f"{head}{begin}\n\n{rendered(ordered)}\n\n{end}{tail}")


def table() -> dict[str, dict[str, dict[str, str]]]:
    """What has been measured: versions, family, column."""
    text = FILE.read_text() if FILE.exists() else "{}"
    measured: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return measured
