"""The loss of a call with labels is the eager model's; with a plan, that of the oracle.

The eager model is called with the same arguments, and makes its loss itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from adaskip_fx.api import build
from adaskip_fx.model import checked_call, loss
from tests.support.compiled_families import compiled_family
from tests.support.compiled_llamas import entry, make_model
from tests.support.eager_reference import assert_close

FAMILIES = (
    "mamba",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gemma2", "mixtral")),
)
IDS = torch.tensor([[5, 9, 3, 22, 41, 8, 17, 2, 30], [4, 4, 31, 7, 50, 12, 6, 1, 19]])
LEFT = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.arange(3)), torch.tensor(0))
RIGHT = LEFT.flip(1)


def unless_padded(mask: torch.Tensor) -> torch.Tensor:
    return IDS.masked_fill(mask == 0, -100)


CASES: dict[str, dict[str, Any]] = {
    "the mean": {},
    "a sum over a number": {"num_items_in_batch": 5},
    "a sum over a tensor": {"num_items_in_batch": torch.tensor(7)},
    "another value to leave out": {"ignore_index": 4},
    "labels that are shifted": {"shift_labels": IDS.flip(1)},
    "some tokens": {"labels": IDS.masked_fill(IDS % 2 == 0, -100)},
    "padded on the left": {"attention_mask": LEFT, "labels": unless_padded(LEFT)},
    "padded on the right": {"attention_mask": RIGHT, "labels": unless_padded(RIGHT)},
    "padding that counts": {"attention_mask": LEFT},
    "no cache": {"use_cache": False},
    "some logits": {"logits_to_keep": 3, "labels": IDS[:, -3:]},
}


class Pair:
    """A model, and the same compiled."""

    def __init__(self, model: Any, compiled: Any = None) -> None:
        self.model, self.compiled = model, compiled or build(model, None, backend="eager")

    @torch.no_grad()
    def check(self, **arguments: Any) -> None:
        """Compare a call with the eager model's; AssertionError on a difference."""
        given = {"input_ids": IDS, "labels": IDS, **arguments}
        want, got = self.model(**given), self.compiled(**given)
        if isinstance(want, tuple):
            assert [isinstance(x, torch.Tensor) for x in got] == [
                isinstance(x, torch.Tensor) for x in want
            ]
            assert_close(got[1], want[1], 1e-5, "logits")
        one, other = (o[0] if isinstance(o, tuple) else o.loss for o in (got, want))
        assert_close(one, other, 1e-5, "loss")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*compiled_family(request.param))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_models_own(pair: Pair, case: str) -> None:
    pair.check(**CASES[case])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_tuple_begins_with_the_loss(pair: Pair, use_cache: bool) -> None:
    pair.check(return_dict=False, use_cache=use_cache)


def test_without_labels_there_is_none(pair: Pair) -> None:
    for arguments in ({}, {"num_items_in_batch": 5}):
        with torch.no_grad():
            assert pair.compiled(IDS, **arguments).loss is None


def test_labels_of_tokens_after_others(pair: Pair) -> None:
    """Of a further prompt, and of one token, which no label is left of after the shift."""
    caches = [m(IDS[:, :4], use_cache=True) for m in (pair.model, pair.compiled)]
    for first, end in ((4, 8), (8, 9)):
        losses = []
        for model, output in zip((pair.model, pair.compiled), caches, strict=True):
            name = next(n for n in ("cache", "cache_params", "past_key_values") if n in output)
            more = {"labels": IDS[:, first:end], "num_items_in_batch": 3}
            losses.append(model(IDS[:, first:end], **{name: output[name]}, **more).loss)
        assert_close(losses[1].detach(), losses[0].detach(), 1e-5, f"loss of {first} to {end}")


@pytest.mark.parametrize("skipped", [[], ["0.attention"], ["1.ffn", "0.ffn"]], ids=str)
def test_a_plan_has_the_loss_of_what_it_runs(skipped: list[str]) -> None:
    bank = entry("grouped")
    with bank.using(bank.plan(skipped)), torch.no_grad():
        got = bank.compiled(IDS, attention_mask=LEFT, labels=unless_padded(LEFT)).loss
        want = bank.oracle.model(IDS, attention_mask=LEFT, labels=unless_padded(LEFT)).loss
        plain = bank.model(IDS, attention_mask=LEFT, labels=unless_padded(LEFT)).loss
    assert_close(got, want, 1e-5, "loss")
    if skipped:  # the companion: what is skipped is seen in the loss
        with pytest.raises(AssertionError, match="loss: relative error"):
            assert_close(got, plain, 1e-5, "loss")


def test_a_loss_function_of_the_users_own() -> None:
    def squared(logits: Any, labels: Any, vocab_size: int, power: int = 2, **_: Any) -> Any:
        hot = nn.functional.one_hot(labels, vocab_size)
        return (logits.float().softmax(-1) - hot).abs().pow(power).mean()

    model = make_model("one_layer")
    model.loss_function = squared
    pair = Pair(model)
    pair.check()
    pair.check(power=3)


def test_an_evaluation_by_trainer(tmp_path: Path) -> None:
    model = make_model("grouped")
    rows = [{"input_ids": IDS[i, :n].tolist()} for i, n in ((0, 9), (1, 5), (1, 9), (0, 2))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
        mask = [[int(i < len(r["input_ids"])) for i in range(longest)] for r in batch]
        labels = torch.tensor(ids).masked_fill(torch.tensor(mask) == 0, -100)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": labels,
        }

    found = []
    for one in (model, build(model, None, backend="eager")):
        options = TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            per_device_eval_batch_size=2,
            disable_tqdm=True,
        )
        trainer = Trainer(model=one, args=options, eval_dataset=rows, data_collator=collate)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# What is refused --------------------------------------------------------------------------------


class Smoothed(LlamaForCausalLM):  # type: ignore[misc]
    """Makes a loss of its own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            logits, wanted = output.logits[:, :-1].transpose(1, 2), labels[:, 1:]
            output.loss = nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1)
        return output


class Heedless(LlamaForCausalLM):  # type: ignore[misc]
    """Its loss knows of no number of items."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, labels=labels, **kwargs)


class Unlabelled(LlamaForCausalLM):  # type: ignore[misc]
    """Has no labels."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):  # type: ignore[no-untyped-def]
        return super().forward(
            input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )


def of_class(kind: Callable[..., Any]) -> Any:
    plain = make_model("one_layer")
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


_OTHERS = "is not what its loss_function makes of its logits and labels.*call the original model"


def test_a_loss_that_is_made_in_another_way_is_refused() -> None:
    pair = Pair(of_class(Smoothed))
    with pytest.raises(NotImplementedError, match=f"the loss of Smoothed {_OTHERS}"):
        pair.check()
    with torch.no_grad():
        assert pair.compiled(IDS).loss is None


def test_an_argument_that_the_model_does_not_hand_on_is_refused() -> None:
    pair = Pair(of_class(Heedless))
    pair.check()
    with pytest.raises(NotImplementedError, match=f"the loss of Heedless {_OTHERS}"):
        pair.check(num_items_in_batch=5)


def test_a_forward_without_labels_says_so_itself() -> None:
    pair = Pair(of_class(Unlabelled))
    for model in (pair.model, pair.compiled):
        with torch.no_grad(), pytest.raises(TypeError, match="unexpected keyword argument 'labels"):
            model(IDS, labels=IDS)


def test_a_loss_that_fails_leaves_the_cache_as_it_was() -> None:
    bank = entry("grouped")
    with bank.using(), torch.no_grad():
        cache = bank.compiled(IDS[:, :4]).past_key_values
        with pytest.raises(ValueError, match="Expected input batch_size"):
            bank.compiled(IDS[:, 4:], labels=IDS, past_key_values=cache)
        assert cache.get_seq_length() == 4
        got = bank.compiled(IDS[:, 4:], past_key_values=cache).logits
        assert_close(got, bank.model(IDS).logits[:, 4:], 1e-5, "logits")


def test_a_loss_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion of the proof on a few tokens: it compares."""
    monkeypatch.setattr(loss, "loss_of", lambda model, logits, labels, given: logits.mean())
    with pytest.raises(NotImplementedError, match=f"the loss of LlamaForCausalLM {_OTHERS}"):
        Pair(make_model("one_layer")).check()


def test_gradients_end_at_a_compiled_model(caplog: pytest.LogCaptureFixture) -> None:
    bank = entry("grouped")
    assert torch.is_grad_enabled()
    assert any(p.requires_grad for p in bank.compiled.parameters())
    checked_call._say_detached.cache_clear()
    with bank.using(), caplog.at_level(logging.WARNING, logger="adaskip_fx"):
        for _ in range(2):
            output = bank.compiled(IDS, labels=IDS)
    assert not output.loss.requires_grad
    assert not output.logits.requires_grad
    assert_close(output.loss, bank.model(IDS, labels=IDS).loss.detach(), 1e-5, "loss")
    said = [r.getMessage() for r in caplog.records if "gradients" in r.getMessage()]
    assert len(said) == 1
    assert "what it returns is detached, as if under torch.no_grad()" in said[0]


def test_weights_that_torch_func_has_wrapped_are_refused() -> None:
    bank = entry("grouped")
    with bank.using():
        bank.compiled(IDS)  # what it needs is captured

        def total(weight: torch.Tensor) -> torch.Tensor:
            wrapped = {"lm_head.weight": weight}
            logits: torch.Tensor = torch.func.functional_call(bank.compiled, wrapped, (IDS,)).logits
            return logits.sum()

        with pytest.raises(NotImplementedError, match="a captured graph cannot be transformed"):
            torch.func.grad(total)(bank.model.lm_head.weight.detach())
