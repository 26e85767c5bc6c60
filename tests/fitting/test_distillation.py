"""Distillation against KL by hooks, and what a step does to a surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.fitting import DistillConfig, Fitter, Sample, SurrogateSpec, distill
from adaskip_fx.fitting.distillation import _Loss
from adaskip_fx.fitting.training import Training
from adaskip_fx.fitting.whitening import whitenings
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.runtime.oracle import Oracle
from adaskip_fx.testing import assert_equivalent
from tests.support.fits import LIMIT, SKIPPED, TEXTS
from tests.support.tokenizers import Letters


def kl(model: Any, modules: Any, skips: dict[str, Any], text: str) -> float:
    ids = Letters()(text, truncation=True, max_length=LIMIT, return_tensors="pt")["input_ids"]
    logits = []
    for skipped in ({}, skips):
        oracle = Oracle(model, modules, prefill=skipped)
        with oracle.watching(), torch.no_grad():
            logits.append(model(input_ids=ids).logits[0].double())
    p, q = (one.log_softmax(-1) for one in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def samples(fitter: Fitter) -> list[Sample]:
    return [Sample(ids) for ids in fitter.samples]


@pytest.mark.parametrize(
    "spec",
    [SurrogateSpec("low_rank", rank=2), SurrogateSpec("normalized"), SurrogateSpec("diagonal")],
)
def test_distillation_brings_predictions_nearer(
    model: Any, fitter: Fitter, spec: SurrogateSpec
) -> None:
    runtime = fitter.runtime
    plan = fitter.fit(SkipPlan.of(runtime.sublayers, SKIPPED), spec)
    config = DistillConfig(steps=20, learning_rate=5e-3, batch_size=1, eval_interval=5)
    one = samples(fitter)[:1]
    distilled, seen = distill(fitter, plan, [one], one, config)
    assert seen.best_step > 0
    assert set(seen.losses) == {0, 5, 10, 15, 20}
    assert (distilled.prefill, distilled.decode) == (plan.prefill, plan.decode)
    for each, loss in ((plan, seen.losses[0]), (distilled, min(seen.losses.values()))):
        skips = {str(s): c for s, c in each.surrogates.by_sublayer.items()}
        assert kl(model, runtime.graphs.structure.modules, skips, TEXTS[0]) == pytest.approx(
            loss, rel=1e-3
        )
    assert min(seen.losses.values()) < 0.95 * seen.losses[0]
    assert all(p.grad is None for p in model.parameters())
    assert_equivalent(model, distilled)


def test_a_step_moves_a_map_in_all_directions_alike_and_a_bias_in_all_elements(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED[:1]), SurrogateSpec("normalized")
    )
    one = samples(fitter)[:1]
    config = DistillConfig(steps=1, learning_rate=1e-3, batch_size=1)
    gradients = dict[str, torch.Tensor]()
    whole = torch.autograd.grad

    def watched(loss: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        found = whole(loss, parameters)
        gradients.update(
            {"weight" if p.ndim == 2 else "bias": s for p, s in zip(parameters, found, strict=True)}
        )
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    moved, _ = distill(fitter, plan, [one], one, config)
    (skipped,) = plan.prefill
    whitening = whitenings(fitter, plan)[skipped]
    before, after = (p.surrogates.by_sublayer[skipped].tensors for p in (plan, moved))
    change = {name: torch.tensor(after[name] - before[name]) for name in before}
    step = change["weight"].double() @ torch.linalg.inv(whitening.root.double()) / whitening.size
    sizes = torch.linalg.svdvals(step)
    full = (
        0.2 * sizes.numel() ** 0.5 * config.learning_rate / (1 + 0.05)
    )  # as large as a step of Adam
    assert sizes.max() < 1.3 * full
    assert sizes.median() > 0.7 * full
    bias = change["bias"].double() / whitening.size
    assert bias.numpy() == pytest.approx(
        -gradients["bias"].sign() * config.learning_rate / 1.05, rel=1e-2
    )
    steep = torch.linalg.svdvals(gradients["weight"].double())
    assert steep.max() > 10 * steep.median()  # companion: the gradient itself is not alike


def test_weights_say_which_tokens_matter(fitter: Fitter) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec("low_rank", rank=2)
    )
    ids = fitter.samples[0]
    last = torch.zeros(ids.shape[1])
    last[-1] = 3.0
    config = DistillConfig(steps=6, learning_rate=2e-2, batch_size=1, eval_interval=6)
    whole, _ = distill(fitter, plan, [[Sample(ids)]], [Sample(ids)], config)
    one, seen = distill(fitter, plan, [[Sample(ids, last)]], [Sample(ids, last)], config)
    assert seen.losses[6] < seen.losses[0]
    assert one != whole


def test_what_held_out_texts_like_best_is_kept(fitter: Fitter) -> None:
    plan = fitter.fit(SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec())
    config = DistillConfig(steps=2, learning_rate=10.0, eval_interval=1)
    known = samples(fitter)
    same, seen = distill(fitter, plan, [known[:1], known[1:2]], known[2:4], config)
    assert seen.best_step == 0
    assert seen.losses[2] > seen.losses[0]
    assert same == plan


def test_samples_of_a_step_go_together_and_alone_where_there_is_no_room(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec("low_rank", rank=2)
    )
    known = samples(fitter)
    cut = [Sample(k.ids[:, :30]) for k in known[:3]] + [Sample(known[3].ids[:, :20])]
    config = DistillConfig(steps=3, learning_rate=1e-3, batch_size=4, eval_interval=3)
    seen = list[tuple[int, int]]()
    whole = _Loss.__call__

    def watched(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        seen.append((len(some), some[0].ids.shape[1]))
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", watched)
    together, _ = distill(fitter, plan, [cut], cut[:1], config)
    assert (3, 30) in seen
    assert (1, 20) in seen

    def crowded(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        if len(some) > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", crowded)
    alone, _ = distill(fitter, plan, [cut], cut[:1], config)
    for sublayer, one in together.surrogates.by_sublayer.items():
        for name, tensor in alone.surrogates.by_sublayer[sublayer].tensors.items():
            assert tensor == pytest.approx(one.tensors[name], abs=1e-5)
    assert together != plan  # companion: something was learned

    def full(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        if torch.is_grad_enabled() and seen:
            raise torch.OutOfMemoryError("no room at all")
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        distill(fitter, plan, [cut], cut[:1], config)


def test_what_cannot_be_distilled(fitter: Fitter) -> None:
    plan = SkipPlan.of(fitter.runtime.sublayers, SKIPPED)
    known = samples(fitter)
    with pytest.raises(ValueError, match="the plan has no surrogate to distil into; fit one first"):
        distill(fitter, plan, [known], known)
    with pytest.raises(ValueError, match="distillation needs samples to descend on and samples"):
        distill(fitter, plan, [known], [])
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        DistillConfig(learning_rate=0)


def test_trainings_share_programs_and_nothing_that_they_learn(fitter: Fitter) -> None:
    runtime, ids = fitter.runtime, fitter.samples[0][:, :12]
    plan = fitter.fit(SkipPlan.of(runtime.sublayers, SKIPPED), SurrogateSpec("diagonal"))
    trainings = [Training.of(plan, {}, runtime.device) for _ in range(2)]

    def logits(training: Training) -> torch.Tensor:
        cache = runtime.new_cache(plan=plan, learn=False, instrument=training)
        return runtime.step(ids, None, None, cache, 0).detach()

    first = logits(trainings[0])
    links = runtime.counters.links
    for change in trainings[1].parameters:
        change.data.add_(0.05)
    other = logits(trainings[1])
    assert runtime.counters.links == links, "the same program"
    assert not torch.allclose(other, first, rtol=1e-3)
    assert torch.equal(logits(trainings[0]), first)
    assert trainings[0].surrogates() == plan.surrogates
    assert trainings[1].surrogates() != plan.surrogates
    assert Training({}, compiled=True).key != trainings[0].key


@pytest.mark.slow
def test_distillation_of_attention_that_sees_windows() -> None:
    """The model's own, and a plan's: gradients flow through both, and the loss is the plan's."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        sliding_window=9,
    )
    mistral = MistralForCausalLM(config).eval()
    for parameter in mistral.parameters():
        parameter.data.mul_(8) if parameter.dim() > 1 else None
    fitter = Fitter(mistral, Letters(), TEXTS, max_length=LIMIT)
    sublayers = fitter.runtime.sublayers
    plan = fitter.fit(SkipPlan.of(sublayers, ["1.ffn"]), SurrogateSpec("diagonal"))
    windowed = plan.with_windows(Windows.of(sublayers[:1], Window(4, 0, (1,))))
    config_ = DistillConfig(steps=10, learning_rate=5e-3, batch_size=1, eval_interval=5)
    one = samples(fitter)[:1]
    for each in (plan, windowed):
        distilled, seen = distill(fitter, each, [one], one, config_)
        assert min(seen.losses.values()) < seen.losses[0]
        assert distilled.windows == each.windows
        loss = CalibrationLoss(mistral, [one[0].ids], backend="eager")
        assert loss(distilled) == pytest.approx(min(seen.losses.values()), rel=1e-3)
    with pytest.raises(ValueError, match="cannot be fitted for a plan with windows in prefill yet"):
        fitter.fit(windowed)
