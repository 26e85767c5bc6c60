"""A compiled model follows its own Python state, and the original's tensors; nothing is ignored.

`tests/machine/test_state_machine.py` draws sequences of such changes; here is what each of them
costs, and what is said.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_fx.api import build
from adaskip_fx.capture import states
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import make_model
from tests.support.eager_reference import assert_close

IDS = torch.arange(3, 15).unsqueeze(0)
TOKEN = IDS[:, :1]
RAN: list[str] = []


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A model and the same compiled; each test's own."""
    return _made()


@pytest.fixture(scope="module")
def kept() -> tuple[Any, Any]:
    """One for all tests that take back what they change and count no captures."""
    return _made()


def _made() -> tuple[Any, Any]:
    model = make_model("one_layer").requires_grad_(False)
    return model, build(model, None, backend="eager")


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        got: torch.Tensor = model(ids, logits_to_keep=1, **more).logits
        return got


def captures(compiled: Any) -> int:
    count: int = runtime_of(compiled).counters.captures
    return count


def doubled(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return 2 * out


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor)
    return other


def recording(module: nn.Module, args: Any, out: torch.Tensor) -> None:
    RAN.append(type(module).__name__)


@contextmanager
def set_to(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# The compiled model's own state ------------------------------------------------------------------


def test_going_back_and_forth_costs_one_capture_each(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    reference = copy.deepcopy(model)
    before = captures(compiled)
    for _ in range(3):
        assert_close(logits(compiled), logits(reference), 1e-5)
        for each in (compiled, reference):
            each.model.norm.variance_epsilon = 1.0
        assert_close(logits(compiled), logits(reference), 1e-5)
        for each in (compiled, reference):
            each.model.norm.variance_epsilon = model.model.norm.variance_epsilon
    assert captures(compiled) == before + 1
    assert_close(logits(model), logits(compiled), 1e-5)


def test_a_hook_that_is_registered_again_is_the_same_state(pair: tuple[Any, Any]) -> None:
    """As whoever puts a hook on for each turn does."""
    _, compiled = pair
    hook = compiled.model.norm.register_forward_hook(doubled)
    cache = compiled(IDS, use_cache=True).past_key_values
    logits(compiled)
    before = captures(compiled)
    for _ in range(2):
        hook.remove()
        hook = compiled.model.norm.register_forward_hook(doubled)
        logits(compiled)
    assert captures(compiled) == before
    compiled(IDS, past_key_values=cache)  # a further prompt of the same request
    assert cache.get_seq_length() == 2 * IDS.shape[1]


@pytest.mark.slow
def test_states_that_were_used_longest_ago_are_let_go(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_MOST_STATES", 2)
    _, compiled = pair
    norm = compiled.model.norm
    begin, first = captures(compiled), norm.variance_epsilon
    for i in (1, 2):
        norm.variance_epsilon = i / 10
        logits(compiled)
    assert captures(compiled) == begin + 2
    norm.variance_epsilon = 0.1
    logits(compiled)
    assert captures(compiled) == begin + 2
    norm.variance_epsilon = first
    logits(compiled)
    assert captures(compiled) == begin + 3


def test_what_nothing_reads_costs_nothing(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    before = captures(compiled)
    compiled.my_notes = "a"
    model.model.layers[0].counter = 1
    compiled.generation_config.max_new_tokens = 3
    logits(compiled)
    compiled.my_notes = "b"
    logits(compiled)
    assert captures(compiled) == before


def test_a_class_that_is_given_another_forward(
    kept: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries do that exchange kernels; both models are of that class."""
    model, compiled = kept
    kind = type(model.model.norm)
    plain = logits(model)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 0.5 * forward(self, x))
    changed = logits(model)
    assert not torch.allclose(plain, changed)
    with pytest.raises(
        UnsupportedError, match=r"RMSNorm.forward of the original model was changed"
    ):
        logits(compiled)
    monkeypatch.undo()
    assert_close(logits(compiled), plain, 1e-5)


@pytest.mark.slow
def test_weights_that_were_tied() -> None:
    model = make_model("tied").requires_grad_(False)
    compiled = build(model, None, backend="eager")
    reference = copy.deepcopy(model)
    weight = nn.Parameter(0.5 * model.lm_head.weight.detach(), requires_grad=False)
    compiled.lm_head.weight = reference.lm_head.weight = weight
    assert_close(logits(compiled), logits(reference), 1e-5)
    with pytest.raises(AssertionError):
        assert_close(logits(compiled), logits(model), 1e-5)


def test_effects_are_refused_before_they_happen(kept: tuple[Any, Any]) -> None:
    _, compiled = kept
    handle = compiled.model.layers[0].mlp.register_forward_hook(recording)
    RAN.clear()
    with pytest.raises(
        UnsupportedError, match=r"forward changes .*\.test_states\.RAN while it runs"
    ):
        logits(compiled)
    assert RAN == []
    handle.remove()
    logits(compiled)


@pytest.mark.slow
def test_layers_that_are_put_back_are_known_again_with_other_code() -> None:
    """`del` gives a list of layers another dictionary, and it is given one again."""
    model = make_model("grouped").requires_grad_(False)
    compiled, reference = build(model, None, backend="eager"), copy.deepcopy(model)
    layers = compiled.model.layers
    whole = layers._modules.copy()
    del layers[-1]
    with pytest.raises(UnsupportedError, match="has 2 now"):
        logits(compiled)
    layers._modules = whole
    for each in (compiled, reference):
        each.model.norm.variance_epsilon = 1.0
    assert_close(logits(compiled), logits(reference), 1e-5)


@pytest.mark.slow
def test_fewer_layers_are_another_model() -> None:
    model = make_model("grouped").requires_grad_(False)
    compiled = build(model, None, backend="eager")
    del compiled.model.layers[-1]
    with pytest.raises(
        UnsupportedError, match="had 4 sublayers when it was compiled and has 2 now"
    ):
        logits(compiled)


# The original's ----------------------------------------------------------------------------------


def _assign(model: Any) -> None:
    state = {k: 1.25 * v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _frequencies(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.5


@pytest.mark.parametrize(
    "change",
    [
        _assign,
        pytest.param(_frequencies, marks=pytest.mark.slow),
        lambda m: m.to(torch.bfloat16),
    ],
)
def test_tensors_replaced_on_the_original_are_followed(
    pair: tuple[Any, Any], change: Callable[[Any], Any]
) -> None:
    model, compiled = pair
    before = logits(model)
    change(model)
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    assert_close(logits(compiled), logits(model), tolerance)
    assert not torch.allclose(logits(model).float(), before)


def test_a_tensor_that_is_the_compiled_models_own_is_kept(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    mine = nn.Parameter(0.5 * model.lm_head.weight.detach(), requires_grad=False)
    compiled.lm_head.weight = mine
    model.lm_head.weight = nn.Parameter(3.0 * mine.detach(), requires_grad=False)
    logits(compiled)
    assert compiled.lm_head.weight is mine


@pytest.mark.slow
def test_weights_that_nobody_has_any_more_are_freed(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    compiled.model.norm.variance_epsilon = 1.0  # two states
    logits(compiled)
    old = weakref.ref(model.lm_head.weight)
    model.lm_head.weight = nn.Parameter(2.0 * model.lm_head.weight.detach(), requires_grad=False)
    logits(compiled)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda m: set_to(m.model.norm, "variance_epsilon", 1.0), "model.norm.variance_epsilon"),
        (lambda m: set_to(m.model.layers[0].mlp, "act_fn", nn.ReLU()), "layers.0.mlp.act_fn"),
        (lambda m: set_to(m.config, "use_cache", False), "config.use_cache"),
    ],
)
def test_python_changed_on_the_original_alone_is_refused(
    kept: tuple[Any, Any], change: Callable[[Any], Any], path: str
) -> None:
    model, compiled = kept
    with change(model), pytest.raises(UnsupportedError) as caught:
        logits(compiled)
    assert f"{path} of the original model was changed after LlamaForCausalLM was" in str(
        caught.value
    )
    assert "do the same to both, undo it, or compile again" in str(caught.value)
    assert_close(logits(compiled), logits(model), 1e-5)


@pytest.mark.slow
def test_a_change_of_both_is_one_of_the_compiled_model(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    before = logits(model)
    for each in (model, compiled):
        each.model.norm.variance_epsilon = 1.0
        each.model.layers[0].mlp.register_forward_hook(doubled)
        each.model.layers[0].mlp.act_fn = nn.Sequential(nn.Hardtanh(-0.1, 0.2), nn.Identity())
    assert_close(logits(compiled), logits(model), 1e-5)
    assert not torch.allclose(logits(model), before)


def test_modules_of_a_class_that_hold_other_values_are_no_change_of_both(
    pair: tuple[Any, Any],
) -> None:
    for each, high in zip(pair, (0.2, 0.3), strict=True):
        each.model.layers[0].mlp.act_fn = nn.Hardtanh(-0.1, high)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.act_fn of the original model was"):
        logits(pair[1])


@pytest.mark.slow
def test_modules_that_refer_back_to_whoever_holds_them_are_compared(pair: tuple[Any, Any]) -> None:
    for each in pair:
        each.model.layers[0].mlp.act_fn = nn.Hardtanh(-0.1, 0.2)
        each.model.layers[0].mlp.act_fn.also = [each.model.layers[0].mlp.act_fn]
    assert_close(logits(pair[1]), logits(pair[0]), 1e-5)


@pytest.mark.slow
def test_branches_exchanged_on_both_may_have_weights_of_their_own(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    for each in (model, compiled):
        each.model.layers[0].mlp = scaled(each.model.layers[0].mlp, 0.5)
    assert_close(logits(compiled), logits(model), 1e-5)
    compiled.model.layers[0].mlp = scaled(compiled.model.layers[0].mlp, 3.0)
    assert not torch.allclose(logits(compiled), logits(model), 1e-3)  # the compiled one's own


def test_a_branch_exchanged_for_one_of_its_class_is_a_change(pair: tuple[Any, Any]) -> None:
    """The companion: modules of other weights are not the same where one has the old ones."""
    model, compiled = pair
    model.model.layers[0].mlp = scaled(model.model.layers[0].mlp, 0.5)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp of the original model was changed"):
        logits(compiled)


@pytest.mark.slow
def test_what_counts_is_how_the_original_was_compiled(pair: tuple[Any, Any]) -> None:
    """Not what both were in between: either may go back first, whether a request came or not."""
    model, compiled = pair
    before, first = logits(model), model.model.norm.variance_epsilon
    for each in (model, compiled):
        each.model.norm.variance_epsilon = 1.0
    assert_close(logits(compiled), logits(model), 1e-5)
    model.model.norm.variance_epsilon = first  # the compiled model's own from now on
    assert not torch.allclose(logits(compiled), before)
    for each, value in ((model, 1.0), (compiled, first)):
        each.model.norm.variance_epsilon = value
    with pytest.raises(UnsupportedError, match=r"norm.variance_epsilon of the original model was"):
        logits(compiled)
    model.model.norm.variance_epsilon = first
    assert_close(logits(compiled), before, 1e-5)


def test_what_each_model_has_for_itself(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    before, count = logits(compiled), captures(compiled)
    model.train()
    model.requires_grad_(True)
    model.set_attn_implementation("eager")
    assert torch.equal(logits(compiled), before)
    assert captures(compiled) == count


# A request keeps the state it began with ---------------------------------------------------------


@torch.no_grad()
def test_decoding_does_not_look_and_a_further_prompt_refuses(
    kept: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compiled = kept
    reference = copy.deepcopy(model)
    cache = compiled(IDS).past_key_values
    theirs = reference(IDS).past_key_values
    for _ in range(2):
        got = compiled(TOKEN, past_key_values=cache).logits
        want = reference(TOKEN, past_key_values=theirs).logits
    handle = compiled.model.layers[0].mlp.register_forward_hook(doubled)
    got = compiled(TOKEN, past_key_values=cache).logits
    want = reference(TOKEN, past_key_values=theirs).logits
    assert_close(got, want, 1e-5)
    words = r"was changed since this request began \(model.layers.0.mlp._forward_hooks"
    length = cache.get_seq_length()
    with pytest.raises(UnsupportedError, match=words):
        compiled(IDS, past_key_values=cache)
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    with pytest.raises(UnsupportedError, match=words):
        compiled(TOKEN, past_key_values=cache)
    monkeypatch.delenv("ADASKIP_CHECK")
    assert cache.get_seq_length() == length
    handle.remove()
    got = compiled(IDS, past_key_values=cache).logits
    assert_close(got, reference(IDS, past_key_values=theirs).logits, 1e-5)


@torch.no_grad()
def test_a_graph_that_is_needed_first_after_a_change_is_refused(pair: tuple[Any, Any]) -> None:
    """Decode is captured at its first step: what would be captured now is another state."""
    _, compiled = pair
    cache = compiled(IDS).past_key_values
    words = r"began \(model.norm.variance_epsilon\)"
    changed = set_to(compiled.model.norm, "variance_epsilon", 1.0)
    with changed, pytest.raises(UnsupportedError, match=words):
        compiled(TOKEN, past_key_values=cache)
    compiled(TOKEN, past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1] + 1


@pytest.mark.slow
def test_a_cache_that_was_made_before_a_change(pair: tuple[Any, Any]) -> None:
    """A request begins with its first call, not when its cache is made."""
    model, compiled = pair
    cache = compiled.adaskip.new_cache()
    model.to(torch.bfloat16)
    got = logits(compiled, past_key_values=cache)
    assert cache.dtype == torch.bfloat16
    assert_close(got, logits(model), 2e-2)


# Threads, and what is around a call --------------------------------------------------------------


@pytest.mark.traced
def test_threads_on_a_cold_model_capture_each_graph_once() -> None:
    model = make_model("one_layer").requires_grad_(False)
    compiled = build(model, None, backend="eager")
    before, options = captures(compiled), {"max_new_tokens": 4, "do_sample": False}
    prompts = [torch.randint(0, 60, (1, 4 + i), device="cpu") for i in range(8)]
    want = [model.generate(ids, **options) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda ids: compiled.generate(ids, **options), prompts))
    assert all(map(torch.equal, got, want))
    # prompts of generate want the last token's logits, as the first capture's; and decode
    assert captures(compiled) == before + 1


@pytest.mark.slow
def test_defaults_of_torch_are_part_of_a_graph(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    want, before = logits(model), captures(compiled)
    with torch.device("meta"):
        assert_close(logits(compiled), want, 1e-5)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(logits(compiled), logits(model), 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert captures(compiled) == before + 2


def test_torch_compile_leaves_a_compiled_model_alone(kept: tuple[Any, Any]) -> None:
    model, compiled = kept
    around = torch.compile(compiled, backend="eager")
    two = torch.cat([IDS, IDS])
    assert_close(logits(around), logits(model), 1e-5)
    assert_close(logits(around, two), logits(model, two), 1e-5)
