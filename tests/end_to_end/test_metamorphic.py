"""What must hold between runs of one compiled model, whatever its architecture.

A structure of each kind by default; with HYPOTHESIS_PROFILE=soak every family.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_fx.capture.state import Since
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.runtime.inputs import Inputs
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.runtime.similarity import measure_prompt
from adaskip_fx.testing import assert_equivalent
from adaskip_fx.testing.equivalence import compiled_for, relative_error
from adaskip_passes import Replacement, Skip, run_passes
from adaskip_passes.infra.graph_module import text
from tests.model_support import matrix
from tests.support.branch_paths import OTHERWISE, Branches
from tests.support.compiled_llamas import fewer
from tests.support.custom_decoders import OwnDecoder, OwnLayer, own
from tests.support.families.all import FAMILIES, tiny_config, tiny_model

KINDS = {
    "llama": "one after the other",
    "gemma2": "norms on both sides, a window, a soft cap",
    "gpt_neox": "in parallel",
    "mixtral": "experts",
    "mamba": "mixers alone",
    "lfm2": "mixers between attention",
}


def _is_supported(name: str) -> bool:
    rows = (measured.get(name, {}) for measured in matrix.table().values())
    return any(row.get("found") == matrix.YES for row in rows)


NAMES = [n for n in FAMILIES if FAMILIES[n].known and _is_supported(n)]
SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
if not SOAK:
    NAMES = [n for n in NAMES if n in KINDS]
#: Kinds of `make test`; those left out are in `test_families.py` there.
OFTEN = ("llama",)
TOLERANCE = 2e-5


def _marked(names: list[str]) -> list[Any]:
    return [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in names]


families = pytest.mark.parametrize("family", _marked(NAMES))
#: What property tests draw from; more of them take captures, not only examples.
DRAWN = NAMES if settings().max_examples > 20 else [n for n in NAMES if n in OFTEN]


@functools.cache
def model_of(family: str) -> Any:
    return tiny_model(tiny_config(family))


def runtime_for(family: str) -> Runtime:
    runtime: Runtime = runtime_of(compiled_for(model_of(family)))
    return runtime


def tokens(family: str, batch: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model_of(family).get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (batch, count), generator=generator)


def two(runtime: Runtime) -> SkipPlan:
    """A plan without the second sublayer and the last."""
    chosen = [runtime.sublayers[1], runtime.sublayers[-1]]
    return SkipPlan.of(runtime.sublayers, chosen, surrogates=Surrogates.scale({chosen[0]: 0.75}))


def run(
    runtime: Runtime, plan: SkipPlan, ids: torch.Tensor, ends: list[int], padding: int = 0
) -> list[torch.Tensor]:
    """The last logits of each piece of a sequence; the pieces end at `ends`."""
    cache = runtime.new_cache(plan=plan)
    mask = None
    if padding:
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
    logits = []
    for begin, end in itertools.pairwise([0, *ends]):
        seen = mask[:, :end] if mask is not None else None
        logits.append(runtime.step(ids[:, begin:end], seen, None, cache, 1)[:, -1])
    return logits


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return relative_error(got, expected) <= tolerance


# Order ------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(parent=fewer(4))
@given(st.data())
def test_the_order_of_skipping_is_irrelevant(data: st.DataObject) -> None:
    """One pass a sublayer, in any order, is one pass for all: the same program, line by line."""
    family = data.draw(st.sampled_from(NAMES), "family")
    runtime = runtime_for(family)
    outer = runtime.graphs._kept.all()[0].outer
    replaced = Replacement("nothing", "scale")
    last = len(runtime.sublayers) - 1  # so many, since one must run
    some = st.sets(st.integers(0, last), min_size=2, max_size=last)
    chosen = data.draw(some, "skipped")
    one_by_one = [Skip({i: replaced}) for i in data.draw(st.permutations(sorted(chosen)), "order")]
    at_once = Skip(dict.fromkeys(chosen, replaced))
    assert text(run_passes(outer, one_by_one)) == text(run_passes(outer, (at_once,)))
    sublayers = [runtime.sublayers[i] for i in chosen]
    plans = {SkipPlan.of(runtime.sublayers, order).digest for order in (sublayers, sublayers[::-1])}
    assert len(plans) == 1


# Modules removed from the source ------------------------------------------------------------------


def without_layer(model: Any, path: str, index: int) -> Any:
    """The eager model with a layer taken out of its list, and those behind it counted anew."""
    cut = copy.deepcopy(model)
    layers = cut.get_submodule(path)
    del layers[index]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    config = cut.config
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list):
            setattr(config, name, [k for i, k in enumerate(kinds) if i != index])
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, len(layers))
            break
    return cut


#: Where a layer's number decides what is in it, or its modules are shared with another one.
NOT_REMOVABLE = {"zamba2", "jamba", "bamba", "nemotron_h", "gpt_neo", "kimi_linear", "llama4"}


@pytest.mark.parametrize("family", _marked([n for n in NAMES if n not in NOT_REMOVABLE]))
def test_a_skipped_layer_is_one_that_the_source_does_not_have(family: str) -> None:
    model, runtime = model_of(family), runtime_for(family)
    path = OTHERWISE.get(family, Branches()).layers
    layers = len(model.get_submodule(path))
    ids = tokens(family, 1, 10)
    attending = {s.layer for s in runtime.sublayers if s.kind == "attention"}
    for index in {1, layers - 1} - (attending if len(attending) == 1 else set()):
        shorter = without_layer(model, path, index)
        gone = [s for s in runtime.sublayers if s.layer == index]
        for plan, alike in ((gone, True), (gone[1:], False)):
            *_, got = run(runtime, SkipPlan.of(runtime.sublayers, plan), ids, [9, 10])
            expected = _last(shorter, runtime.cache_argument, ids)
            assert close(got, expected, 1e-4) == alike, f"layer {index} {plan}"


@torch.no_grad()
def _last(model: Any, cache_argument: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, decoded after the others."""
    cache = model(input_ids=ids[:, :-1], use_cache=True)[cache_argument]
    more = {cache_argument: cache, "use_cache": True}
    logits: torch.Tensor = model(input_ids=ids[:, -1:], **more).logits
    return logits[:, -1]


class WithoutThinking(OwnLayer):
    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        return x + self.mixing(x, cache)


class WithoutMixing(OwnLayer):
    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        return x + self.thinking(x)


@pytest.mark.parametrize(
    ("kind", "layer"), [("ffn", WithoutThinking), ("attention", WithoutMixing)]
)
def test_a_skipped_sublayer_is_one_that_the_source_does_not_have(
    kind: str, layer: type[OwnLayer]
) -> None:
    model = own(OwnDecoder)
    runtime: Runtime = runtime_of(compiled_for(model))
    shorter = copy.deepcopy(model)
    shorter.blocks[1].__class__ = layer
    (gone,) = (s for s in runtime.sublayers if str(s) == f"1.{kind}")
    ids = torch.randint(0, 31, (1, 10), generator=torch.Generator().manual_seed(0))
    *_, got = run(runtime, SkipPlan.of(runtime.sublayers, [gone]), ids, [9, 10])
    with torch.no_grad():
        expected = shorter(input_ids=ids).logits[:, -1]
        assert not close(model(input_ids=ids).logits[:, -1], expected, 1e-2)
    assert close(got, expected, 1e-5)


# Probes -----------------------------------------------------------------------------------------


@families
def test_probes_agree_up_to_the_first_skipped_sublayer(family: str) -> None:
    """And not behind it: it has changed the stream."""
    runtime, ids = runtime_for(family), tokens(family, 2, 9)
    sublayers = runtime.sublayers
    full = measure_prompt(runtime, ids)
    first = len(sublayers) // 2
    plan = SkipPlan.of(sublayers, sublayers[first : first + 1])
    kept = tuple(s for s in sublayers if s != sublayers[first])
    cache = runtime.new_cache(plan=plan)
    cache.request.since = Since.of(runtime.graphs.states.look())
    _, readings = runtime.runner.run("prefill", cache.request, plan, kept, Inputs(ids), cache, 1)
    assert readings is not None
    assert torch.equal(readings[:first], full[:first])
    behind, were = readings[first:], full[first + 1 :]
    assert not any(close(a, b, 1e-4) for a, b in zip(behind, were, strict=True))


# Pieces of a prompt -----------------------------------------------------------------------------

#: Their scan begins anew with each piece of more than one token, in transformers as well.
RESTARTING = {"mamba", "falcon_mamba", "jamba"}


@settings(parent=fewer(2))
@given(st.data())
def test_a_prompt_in_pieces_is_the_prompt(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from([n for n in DRAWN if n not in RESTARTING]), "family")
    runtime, ids = runtime_for(family), tokens(family, 1, 14)
    plan = data.draw(st.sampled_from([SkipPlan.empty(runtime.sublayers), two(runtime)]), "plan")
    cuts = data.draw(st.sets(st.integers(2, 13)), "cuts")
    *_, whole = run(runtime, plan, ids, [14])
    *_, pieces = run(runtime, plan, ids, [*sorted(cuts), 14])
    assert close(pieces, whole)


@pytest.mark.parametrize("family", [n for n in NAMES if n in RESTARTING])
@torch.no_grad()
def test_scans_that_begin_anew_do_so_in_the_source(family: str) -> None:
    """The companion: why these are left out above, and that ours is as theirs."""
    model, runtime, ids = model_of(family), runtime_for(family), tokens(family, 1, 14)
    name = runtime.cache_argument
    cache = model(input_ids=ids[:, :9], use_cache=True)[name]
    pieces = model(input_ids=ids[:, 9:], use_cache=True, **{name: cache}).logits[:, -1]
    assert not close(model(input_ids=ids).logits[:, -1], pieces, 1e-3)
    *_, ours = run(runtime, SkipPlan.empty(runtime.sublayers), ids, [9, 14])
    assert close(ours, pieces)


# Rows of a batch ---------------------------------------------------------------------------------


@families
def test_a_row_of_a_batch_is_the_row_alone(family: str) -> None:
    runtime, ids = runtime_for(family), tokens(family, 3, 10)
    plan = two(runtime)
    together = run(runtime, plan, ids, [8, 9, 10])
    for row in range(3):
        alone = run(runtime, plan, ids[row : row + 1], [8, 9, 10])
        for a, b in zip(together, alone, strict=True):
            assert close(a[row], b[0])
        other = run(runtime, plan, ids[row - 1 : row] if row else ids[2:], [8, 9, 10])
        assert not close(together[0][row], other[0][0], 1e-2)


# Other dtypes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [n for n in NAMES if n in ("llama", "mamba") or SOAK])
def test_another_dtype_is_captured_anew_and_right(family: str) -> None:
    model = tiny_model(tiny_config(family)).bfloat16()
    compiled = compiled_for(model)
    assert_equivalent(model, decode_steps=1)
    before = runtime_of(compiled).counters.captures
    model.float()
    assert assert_equivalent(model, two(runtime_of(compiled)), decode_steps=1) < 1e-5
    assert compiled_for(model) is compiled
    assert runtime_of(compiled).counters.captures == before + 2
