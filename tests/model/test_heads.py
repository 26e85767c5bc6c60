"""Heads that give no logits of tokens: what the eager model gives; with a plan, the oracle.

The head is the model's own code, so what can go wrong is what it is handed, and how.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import adaskip_fx
from adaskip_fx import SkipPlan, UnsupportedError
from adaskip_fx.api import build
from adaskip_fx.model import heads
from adaskip_fx.model.handle import runtime_of
from tests.support.eager_reference import SKIP, Oracle, assert_close
from tests.support.tokenizers import Letters

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = torch.tensor([[5, 9, 3, 22, 41, 8, 17, 2, 30], [4, 4, 31, 7, 50, 12, 6, 1, 19]])
LEFT = torch.ones(2, 9, dtype=torch.int64)
LEFT[0, :3] = 0
TEXTS = ("A head reads what a decoder makes of a text.", "It gives a score, or a label.")


def make(name: str) -> Any:
    """A tiny model of a class of transformers'; its config is found by its family's name."""
    torch.manual_seed(0)
    family = next(k for k in ("Llama", "GPT2") if name.startswith(k))
    config = {**GPT2, "pad_token_id": 0, "num_labels": 3} if family == "GPT2" else SHAPE
    kind = getattr(transformers, f"{family}Config")
    made = kind(**config, bos_token_id=1, eos_token_id=1)
    return getattr(transformers, name)(made).eval().requires_grad_(False)


CLASSIFIER = "LlamaForSequenceClassification"
MODELS = (
    "LlamaForTokenClassification",
    pytest.param(CLASSIFIER, marks=pytest.mark.slow),  # which all else here is about
    pytest.param("LlamaForQuestionAnswering", marks=pytest.mark.slow),
    pytest.param("GPT2ForSequenceClassification", marks=pytest.mark.slow),
)
CASES: dict[str, dict[str, Any]] = {
    "ids": {},
    "padded on the left": {"input_ids": IDS * LEFT, "attention_mask": LEFT},
    "padded on the right": {"input_ids": IDS * LEFT.flip(1), "attention_mask": LEFT.flip(1)},
    "hidden states": {"output_hidden_states": True},
    "labels": {"labels": torch.tensor([0, 2])},
    "positions": {"position_ids": torch.arange(9).expand(2, 9) + 3, "use_cache": False},
}
LABELS = {
    "LlamaForTokenClassification": {"labels": torch.tensor([[0, 1, 2] * 3] * 2)},
    "LlamaForQuestionAnswering": {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([4, 8]),
    },
}


@functools.cache
def compiled_pair(name: str) -> tuple[Any, Any]:
    model = make(name)
    return model, build(model, None, backend="eager")


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return compiled_pair(request.param)


@torch.no_grad()
def check(eager: Any, compiled: Any, **arguments: Any) -> None:
    """Compare all tensors of two outputs; AssertionError on a difference."""
    given = {"input_ids": IDS, **arguments}
    want, got = eager(**given), compiled(**given)
    if isinstance(want, tuple):
        tensors = [v for v in want if isinstance(v, torch.Tensor)]  # (it also gives a cache)
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(tensors, got, strict=True))]
    else:
        assert type(got) is type(want)
        pairs = [(k, v, got[k]) for k, v in want.items() if isinstance(v, torch.Tensor)]
        states = zip(want.hidden_states or (), got.hidden_states or (), strict=True)
        pairs += [(f"state {i}", a, b) for i, (a, b) in enumerate(states)]
    assert pairs
    mask = given.get("attention_mask")
    for name, expected, found in pairs:
        each = expected.dim() > 1 and expected.shape[1] == IDS.shape[1] and mask is not None
        real = mask.bool() if each else ...  # (the padding's own say nothing)
        assert_close(found[real], expected[real], 1e-5, name)


def test_outputs_and_the_loss_are_the_models_own(pair: tuple[Any, Any]) -> None:
    check(*pair)
    check(*pair, return_dict=False)
    labels = LABELS.get(type(pair[0]).__name__, {"labels": torch.tensor([0, 2])})
    check(*pair, **labels)
    check(*pair, **labels, **CASES["padded on the right"])


@pytest.fixture
def classifier() -> tuple[Any, Any]:
    return compiled_pair(CLASSIFIER)


def test_embeddings(classifier: tuple[Any, Any]) -> None:
    embedded = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    check(*classifier, input_ids=None, inputs_embeds=embedded)


@pytest.mark.slow
def test_a_reward_of_one_label_in_another_dtype() -> None:
    model = make(CLASSIFIER)
    model.score = nn.Linear(32, 1, bias=False)
    model = model.to(torch.float64).eval()
    check(model, build(model, None, backend="eager"))


@pytest.mark.parametrize("case", CASES)
def test_under_a_plan_outputs_are_the_oracles(classifier: tuple[Any, Any], case: str) -> None:
    model, compiled = classifier
    check(model, compiled, **CASES[case])
    names, before = ["0.ffn", "1.attention"], compiled.adaskip.plan
    compiled.adaskip.plan = SkipPlan.of(before.sublayers, names)
    oracle = Oracle(model).behave(dict.fromkeys(names, SKIP))
    try:
        check(oracle.model, compiled, **CASES[case])
        with pytest.raises(AssertionError, match="relative error"):  # the companion
            check(model, compiled, **CASES[case])
    finally:
        compiled.adaskip.plan = before


def test_calibrate_then_compile(tmp_path: Any) -> None:
    model = make(CLASSIFIER)
    profile = adaskip_fx.calibrate(model, Letters(), TEXTS)
    profile.save(tmp_path / "profile")
    compiled: Any = adaskip_fx.compile(model, tmp_path / "profile", alpha=1.4, backend="eager")
    plan = compiled.adaskip.plan
    assert len(plan.prefill) == 1
    skipped = SkipPlan.of(plan.sublayers, [str(s) for s in plan.prefill])
    compiled.adaskip.plan = skipped  # without its factors, which the oracle has not
    oracle = Oracle(model).behave({str(s): SKIP for s in plan.prefill})
    check(oracle.model, compiled)


def test_the_original_is_left_alone_and_followed() -> None:
    model = make(CLASSIFIER)
    before, vars_before = copy.deepcopy(model.state_dict()), dict(vars(model.model))
    compiled: Any = build(model, None, backend="eager")
    check(model, compiled)
    assert vars(model.model) == vars_before
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.score.weight = nn.Parameter(torch.randn(3, 32), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight.mul_(2)
    check(model, compiled)


def test_nothing_is_kept_of_a_text(classifier: tuple[Any, Any]) -> None:
    _, compiled = classifier
    assert compiled(IDS).past_key_values is None
    assert compiled.adaskip.stats().cache_bytes == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"past_key_values": True},
            r"whose head gives no logits of tokens .* pass all",
        ),
        ({"use_cache": True}, r"forward\(use_cache=...\) of a model .* and returns no cache"),
        (
            {"output_attentions": True},
            r"forward\(output_attentions=...\) .*attn_implementation='eager'",
        ),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}, "begin again"),
    ],
    ids=["a cache", "a cache to come", "attentions", "packed"],
)
def test_refusals(classifier: tuple[Any, Any], given: dict[str, Any], words: str) -> None:
    _, compiled = classifier
    if "past_key_values" in given:
        name = runtime_of(compiled).cache_argument
        given = {name: transformers.DynamicCache()}
    with pytest.raises(NotImplementedError, match=words):
        compiled(IDS, **given)


def test_gradients_are_none_and_training_is_refused(classifier: tuple[Any, Any]) -> None:
    model, compiled = classifier
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            assert not compiled(IDS).logits.requires_grad
        compiled.train()
        with pytest.raises(RuntimeError, match="for inference only"):
            compiled(IDS)
    finally:
        model.requires_grad_(False)
        compiled.eval()


class ReadsMore(transformers.LlamaForSequenceClassification):  # type: ignore[misc]
    """A head that reads what a decoder does not give when it is compiled."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        output = self.model(input_ids, **kwargs)
        keys = output[1].layers[0].keys.mean()
        logits = self.score(output[0])[:, -1] + keys
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def test_a_head_that_reads_more_is_refused() -> None:
    model = ReadsMore(make(CLASSIFIER).config).eval()
    with pytest.raises(UnsupportedError, match="the head of ReadsMore does not run on its decoder"):
        build(model, None, backend="eager")


def test_a_head_that_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = heads._decode

    def flipped(*given: Any) -> Any:
        output = inner(*given)
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    monkeypatch.setattr(heads, "_decode", flipped)
    with pytest.raises(UnsupportedError, match="does not give what the model gives"):
        build(make(CLASSIFIER), None, backend="eager")


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_adapters_that_came_are_in_the_head_at_once() -> None:
    peft = pytest.importorskip("peft")
    eager = make("LlamaForSequenceClassification")
    compiled = build(eager, None, backend="eager")
    ids = torch.randint(2, 60, (2, 9))
    compiled(ids)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(eager, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    with torch.no_grad():
        assert_close(compiled(ids).logits, adapted(input_ids=ids).logits, 1e-4, "scores")


def test_padded_batches_run_without_their_padding(classifier: tuple[Any, Any]) -> None:
    eager, compiled = classifier
    ids = torch.randint(2, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    check(eager, compiled, input_ids=ids * mask, attention_mask=mask)
    assert runtime_of(compiled).runner.packed.why_not is None


def test_models_that_read_no_text_or_all_of_it_are_refused() -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    size["num_hidden_layers"] = 2
    image = transformers.ViTConfig(**size, image_size=8, patch_size=4)
    with pytest.raises(TypeError, match="ViTForImageClassification takes pixel_values, no text"):
        build(transformers.ViTForImageClassification(image).eval(), None, backend="eager")
    text = transformers.ModernBertConfig(
        **size, vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1
    )
    text.sep_token_id = 2
    encoder = transformers.ModernBertForSequenceClassification(text).eval()
    with pytest.raises(TypeError, match="is an encoder: its tokens see those after them"):
        build(encoder, None, backend="eager")


def test_what_the_head_reads_is_watched() -> None:
    eager = make("LlamaForSequenceClassification")
    compiled = build(eager, None, backend="eager")
    ids = torch.randint(2, 29, (2, 9))
    compiled(ids)
    eager.config.pad_token_id = 30
    with pytest.raises(RuntimeError, match=r"config\.pad_token_id.* was changed after"):
        compiled(ids)
    compiled.config.pad_token_id = 30
    check(eager, compiled, input_ids=ids)
    eager.model.layers[0].remark = "the near miss: what is captured does not read it"
    check(eager, compiled, input_ids=ids)
