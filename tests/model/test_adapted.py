"""Models of peft's, compiled; each is compared with the eager one, or with one made anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip_fx
from adaskip_fx import SkipPlan, UnsupportedError
from adaskip_fx.api import build
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.capture.adapters import FollowedAdapters
from adaskip_fx.data.reference_text import calibration_samples
from adaskip_fx.kv_cache.saved import SavedCacheError
from adaskip_fx.model.check_model import check_model
from adaskip_fx.testing import assert_equivalent
from tests.support import adapters as made
from tests.support.adapters import IDS, adapted, assert_same, differ, generated, logits, lora
from tests.support.tokenizers import Letters

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers",  # of what peft calls
    "ignore::UserWarning:peft",
)
peft = pytest.importorskip("peft")


def compiled(model: Any) -> Any:
    return build(model, None, backend="eager")


class Followed:
    """A model of peft's, and what was compiled of it."""

    def __init__(self) -> None:
        self.model = adapted()
        self.fast = compiled(self.model)

    def answers(self) -> torch.Tensor:
        """Logits that both give."""
        assert_same(self.fast, self.model)
        return logits(self.model)


@pytest.fixture(scope="module")
def shared() -> Followed:
    """Tests leave it as they found it."""
    return Followed()


def test_a_model_of_peft(shared: Followed) -> None:
    model, fast = shared.model, shared.fast
    before = logits(adapted())
    assert isinstance(fast, peft.PeftModelForCausalLM)
    assert fast.adaskip.sublayers == fast.get_base_model().adaskip.sublayers
    assert_same(fast, model)
    assert generated(fast) == generated(model)
    torch.testing.assert_close(fast(input_ids=IDS, labels=IDS).loss, model(IDS, labels=IDS).loss)
    assert torch.equal(logits(model), before)
    assert differ(before, logits(made.llama()))


def _scaled(model: Any) -> contextlib.AbstractContextManager[None]:
    from peft.helpers import rescale_adapter_scale

    found: contextlib.AbstractContextManager[None] = rescale_adapter_scale(model, 0.3)
    return found


def test_what_is_done_to_the_adapters_of_the_original_is_followed(shared: Followed) -> None:
    both = shared
    model, seen = both.model, [both.answers()]

    def is_new() -> None:
        now = both.answers()
        assert all(differ(now, before) for before in seen)
        seen.append(now)

    def is_again(which: int) -> None:
        torch.testing.assert_close(both.answers(), seen[which], rtol=1e-4, atol=1e-5)

    model.set_adapter("second")
    is_new()
    assert both.fast.active_adapter == "second"
    with model.disable_adapter():
        is_new()
    is_again(1)
    model.merge_adapter()
    is_again(1)
    model.unmerge_adapter()
    model.base_model.set_adapter(["first", "second"])
    is_new()
    with _scaled(model):
        is_new()
    model.set_adapter("first")
    is_again(0)
    captures = both.fast.adaskip.stats().captures
    model.set_adapter("second")
    is_again(1)
    model.set_adapter("first")
    is_again(0)
    assert both.fast.adaskip.stats().captures == captures


def test_adapters_come_and_go() -> None:
    both = Followed()
    model, before = both.model, both.answers()
    model.add_adapter("third", lora(target_modules=["v_proj", "q_proj"]))
    model.set_adapter("third")
    made.drawn(model, seed=5)
    added = both.answers()
    assert differ(added, before)
    assert "third" in both.fast.peft_config
    state = {name: 0.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    assert differ(both.answers(), added)
    model.delete_adapter("first")
    both.answers()
    plain = model.merge_and_unload()
    assert not isinstance(plain, peft.PeftModel)
    assert_same(both.fast, plain)


def test_what_is_done_to_the_compiled_model_is_its_own(shared: Followed) -> None:
    both = shared
    fast, before = both.fast, both.answers()
    fast.set_adapter("second")
    other = adapted()
    other.set_adapter("second")
    assert_same(fast, other)
    assert torch.equal(logits(both.model), before)
    with both.model.disable_adapter():
        with pytest.raises(UnsupportedError, match="of the original model was changed"):
            logits(fast)
        fast.base_model.disable_adapter_layers()
        assert_same(fast, made.llama())
        fast.base_model.enable_adapter_layers()
    fast.set_adapter("first")
    assert_same(fast, both.model)
    both.model.set_adapter("second")
    assert_same(fast, other)
    both.model.set_adapter("first")


def test_a_request_keeps_the_adapters_that_it_began_with(shared: Followed) -> None:
    both = shared
    with torch.no_grad():
        begun = both.fast(input_ids=IDS)
    both.model.set_adapter("second")
    name = both.fast.get_base_model()._adaskip.cache_argument
    with torch.no_grad(), pytest.raises(UnsupportedError, match="changed since this request began"):
        both.fast(input_ids=IDS[:, :3], **{name: begun[name]})
    both.model.set_adapter("first")


def test_adapters_that_are_merged_in_the_middle_of_a_request(shared: Followed) -> None:
    """Weights are written; a decode step would add the adapters a second time."""
    both, token = shared, IDS[:, :1]
    name = both.fast.get_base_model()._adaskip.cache_argument
    with torch.no_grad():
        first, second = ({name: m(input_ids=IDS)[name]} for m in (both.fast, both.model))
    both.model.merge_adapter()
    with pytest.raises(UnsupportedError, match="changed since this request began"):
        logits(both.fast, input_ids=token, **first)
    both.answers()
    with pytest.raises(UnsupportedError, match="changed since this request began"):
        logits(both.fast, input_ids=token, **first)
    both.model.unmerge_adapter()
    got, want = (
        logits(m, input_ids=token, **c) for m, c in ((both.fast, first), (both.model, second))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_saved_cache_is_of_the_adapters_that_it_was_made_with(
    shared: Followed, tmp_path: Path
) -> None:
    model, fast, path = shared.model, shared.fast, tmp_path / "prefix"
    name = fast.get_base_model()._adaskip.cache_argument
    whole = logits(fast)
    with torch.no_grad():
        cache = fast(input_ids=IDS[:, :8])[name]
    cache.save(path)
    model.set_adapter("second")
    with pytest.raises(UnsupportedError, match="changed since this request began"):
        cache.save(path)
    with pytest.raises(SavedCacheError, match="with other weights or adapters"):
        fast.adaskip.load_cache(path)
    model.set_adapter("first")
    loaded = fast.adaskip.load_cache(path)
    got = logits(fast, input_ids=IDS[:, 8:], **{name: loaded})
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
    loaded = fast.adaskip.load_cache(path)
    model.set_adapter("second")
    with pytest.raises(UnsupportedError, match="changed since this request began"):
        logits(fast, input_ids=IDS[:, 8:], **{name: loaded})
    model.set_adapter("first")


@pytest.mark.breaks
def test_what_is_not_followed_is_refused(shared: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: nothing else takes over what was done to the original."""
    shared.answers()
    monkeypatch.setattr(FollowedAdapters, "follow", lambda self: False)
    shared.model.set_adapter("second")
    with pytest.raises(UnsupportedError, match="of the original model was changed"):
        logits(shared.fast)
    shared.model.set_adapter("first")


def test_under_a_plan(shared: Followed) -> None:
    plan = SkipPlan.of(shared.fast.adaskip.sublayers, ["1.ffn", "0.attention"])
    assert assert_equivalent(shared.model, plan, decode_steps=1) < 1e-5


def test_calibrated_compiled_and_judged(shared: Followed) -> None:
    """The profile is of the model with its adapters, and fits the model without."""
    model, texts = shared.model, calibration_samples(None, 64, 2)
    profile = adaskip_fx.calibrate(model, Letters(), texts, max_length=64)
    profile.check(made.llama())
    fast = adaskip_fx.compile(model, profile, alpha=1.4, backend="eager")
    assert len(fast.adaskip.plan.prefill) == 1
    loss = CalibrationLoss(fast, [IDS])
    assert loss(fast.adaskip.plan) != loss(SkipPlan.empty(fast.adaskip.sublayers))


# Learned prompts --------------------------------------------------------------------------------


def learned(name: str) -> Any:
    config = getattr(peft, name)
    return config(num_virtual_tokens=3, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "kind",
    ["PromptTuningConfig", pytest.param("PromptEncoderConfig", marks=pytest.mark.slow)],
)
def test_learned_prompts(kind: str) -> None:
    model = adapted(learned(kind), learned(kind))
    with torch.no_grad():
        for parameter in model.prompt_encoder["second"].parameters():
            parameter.mul_(2)
    fast = compiled(model)
    first = logits(model)
    assert_same(fast, model)
    model.set_adapter("second")
    assert_same(fast, model)
    assert differ(logits(model), first)
    with model.disable_adapter():
        assert_same(fast, made.llama())
    with fast.disable_adapter():
        assert_same(fast, made.llama())
    assert_same(fast, model)
    if made.peft_knows_the_cache(model):
        padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        rows = {"input_ids": IDS[:, :8].reshape(2, 4), "attention_mask": padded}
        assert generated(fast, **rows) == generated(model, **rows)
    fast.set_adapter("first")
    model.add_adapter("third", learned(kind))
    model.set_adapter("third")
    with pytest.raises(UnsupportedError, match="learned prompt of the original model was changed"):
        logits(fast)


@pytest.mark.slow
def test_a_learned_prefix_is_for_forward() -> None:
    model = adapted(learned("PrefixTuningConfig"))
    fast = compiled(model)
    torch.testing.assert_close(logits(fast), logits(model), rtol=1e-4, atol=1e-5)
    assert differ(logits(model), logits(made.llama()))
    with pytest.raises(NotImplementedError, match="generate with PREFIX_TUNING is not supported"):
        generated(fast)
    with model.disable_adapter():
        assert generated(fast) == generated(made.llama())


# Kinds of adapters ------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "embeddings and head": lambda: lora(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    ),
    "tokens": lambda: lora(trainable_token_indices=[1, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind: str) -> None:
    model = adapted(KINDS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".first" in name and "lora_" not in name:
                parameter.add_(0.3)
    fast = compiled(model)
    assert_same(fast, model)
    assert differ(logits(model), logits(made.llama()))
    with model.disable_adapter():
        assert_same(fast, made.llama())


def test_dora() -> None:
    """Where its layers cannot be traced, the message says so; merged it is plain weights."""
    model = adapted(lora(use_dora=True))
    before = logits(model)
    refusal = ""
    try:
        assert_same(compiled(model), model)
    except UnsupportedError as error:
        refusal = str(error)
    if refusal:
        assert "has adapters of peft's (DoraLinearVariant), which may be in the way" in refusal
        assert "merge_adapter() on the original model" in refusal
    model.merge_adapter()
    fast = compiled(model)
    torch.testing.assert_close(logits(fast), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adapters_of_the_library_itself() -> None:
    """`add_adapter` of a model of transformers'."""
    from tests.machine.edits import add_adapter

    model = made.llama()
    fast = compiled(model)
    assert_same(fast, model)
    add_adapter(model, "c", ("q_proj",))
    model.eval()
    assert differ(logits(model), logits(made.llama()))
    assert_same(fast, model)
    fast.disable_adapters()
    assert_same(fast, made.llama())


# Refused ----------------------------------------------------------------------------------------


def test_merging_in_the_compiled_model_alone(shared: Followed) -> None:
    words = "shares its weights with the original, so that adapters cannot be merged in it alone"
    for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        with pytest.raises(RuntimeError, match=words):
            getattr(shared.fast, name)()
    layers = shared.fast.base_model
    layers.merge_adapter()
    with pytest.raises(UnsupportedError, match="adapters are merged into weights that the"):
        logits(shared.fast)
    layers.unmerge_adapter()
    shared.answers()


def test_adapters_by_row(shared: Followed) -> None:
    with pytest.raises(NotImplementedError, match="adapter_names= is not supported by adaskip_fx"):
        generated(shared.fast, adapter_names=["second"])
    with pytest.raises(NotImplementedError, match="adapter_names= is not supported by adaskip_fx"):
        logits(shared.fast, adapter_names=["second"])
    shared.answers()


def test_merged_and_disabled(shared: Followed) -> None:
    words = "its adapters are merged and disabled, so that its next forward would write"
    shared.model.merge_adapter()
    with shared.model.disable_adapter():
        with pytest.raises(UnsupportedError, match=words):
            logits(shared.fast)
        with pytest.raises(UnsupportedError, match=words):
            compiled(shared.model)
    shared.answers()
    shared.model.unmerge_adapter()
    shared.answers()


def test_compiled_twice(shared: Followed) -> None:
    with pytest.raises(TypeError, match="this model is compiled already"):
        compiled(shared.fast)


def test_dropout_of_an_adapter() -> None:
    """peft's layers may be in training mode in a model that is not."""
    model = peft.get_peft_model(made.llama(), lora(lora_dropout=0.5))
    with pytest.raises(ValueError, match=r"the model is in training mode; call model.eval\(\)"):
        compiled(model)
    assert check_model(model.eval()) is model.get_base_model()


# Found by review. ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "take_off"),
    [
        ("lm_head", "merge_and_unload"),
        pytest.param("down_proj", "unload", marks=pytest.mark.slow),
        pytest.param("lm_head", "unload", marks=pytest.mark.slow),
        pytest.param("down_proj", "merge_and_unload", marks=pytest.mark.slow),
    ],
)
def test_trained_copies_of_modules_stay_after_the_adapters_went(take_off: str, name: str) -> None:
    base = made.llama()
    model = peft.get_peft_model(
        base, lora(target_modules=["q_proj"], modules_to_save=[name])
    ).eval()
    for path, parameter in model.named_parameters():
        if "modules_to_save" in path:
            parameter.data.normal_(0, 0.3)
    fast = compiled(base)
    assert_same(fast, base)
    getattr(model, take_off)()
    assert_same(fast, base)


def test_what_comes_after_the_adapters_went_is_noticed() -> None:
    base = made.llama()
    model = peft.get_peft_model(base, lora()).eval()
    fast = compiled(base)
    assert_same(fast, base)
    model.unload()
    assert_same(fast, base)
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: out * 3)
    with pytest.raises(RuntimeError, match="of the original model was changed after"):
        logits(fast)


@pytest.mark.slow
def test_hidden_states_at_once_after_an_adapter_came() -> None:
    base = made.llama()
    fast = compiled(base)
    logits(fast)
    peft.get_peft_model(base, lora()).eval()
    want = base(input_ids=IDS, output_hidden_states=True).hidden_states
    got = fast(input_ids=IDS, output_hidden_states=True).hidden_states
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
