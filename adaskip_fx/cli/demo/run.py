"""The demo itself: calibrate, fit, compile, ask, time. It prints nothing but its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaskip_fx.model.handle import runtime_of

from ... import api
from ...calibration.calibrate import calibrate
from ...data.reference_text import Passkey, Texts, demo_texts
from ...evaluation.evaluate import evaluate
from ...evaluation.examples import Generate, Predict
from ...evaluation.execution_check import watched
from ...evaluation.result import TaskResult
from ...evaluation.task import FixedTask
from ...fitting import Fitter, SurrogateSpec
from ...measurement.bench import StepTimes, plan_clocks, time_links, time_steps
from ...plans.decisions import plans_of
from ...plans.skip_plan import SkipPlan
from ...policies import AdaSkip
from ...profiles.profile import Profile
from ...runtime.runtime import Runtime
from ...utils.progress import Steps
from ..bench import conditions
from ..json_views import profile_json

_CALIBRATION = (6, 1024)  # samples, and tokens of each
_HELD_OUT = (2, 768)  # windows, and tokens of each
_PROMPTS, _PROMPT_TOKENS = 5, 2000  # texts with a pass key, and the least number of tokens of each
_NEW_TOKENS = 32  # more than the decode window
_ROUNDS = 3  # of timing
_SEED = 0  # of the texts; nothing else is drawn
_LINKS = 5  # new plans to link when timing that


@dataclass(frozen=True)
class DemoResult:
    """Everything that a demo measured.

    Attributes:
        conditions: model, machine, versions and options.
        seconds: of each step of the demo.
        profile: what calibration measured.
        plan: what prefill skips.
        learned: the distinct decode plans that requests learned in their windows.
        passkeys: what was asked for.
        results: of the model `as_is`, `skipped` and `fitted`: the task passkey, and of the latter
            two perplexity, compared with the model as it is.
        times: of prompts and decode steps.
        counts: captures, pieces compiled and programs linked by the skipped model, in the end.
        link_seconds: for each of several new plans.
        pieces_for_new_plans: compiled while linking them.
    """

    conditions: Mapping[str, Any]
    seconds: Mapping[str, float]
    profile: Profile
    plan: SkipPlan
    learned: tuple[SkipPlan, ...]
    passkeys: tuple[Passkey, ...]
    results: Mapping[str, Mapping[str, TaskResult]]
    times: tuple[StepTimes, ...]
    counts: Mapping[str, int]
    link_seconds: tuple[float, ...]
    pieces_for_new_plans: int

    def to_json(self) -> dict[str, Any]:
        """Return one JSON-compatible object; times in seconds, storage in bytes."""
        return {
            "conditions": dict(self.conditions),
            "seconds": dict(self.seconds),
            "profile": profile_json(self.profile),
            "plan": self.plan.to_json(),
            "learned": [plan.to_json() for plan in self.learned],
            "passkeys": [{"key": p.key, "depth": p.depth} for p in self.passkeys],
            "results": {
                name: {task: result.to_json() for task, result in found.items()}
                for name, found in self.results.items()
            },
            "times": [time.to_json() for time in self.times],
            "counts": dict(self.counts),
            "new_plans": {
                "link_seconds": list(self.link_seconds),
                "pieces_compiled": self.pieces_for_new_plans,
            },
        }


def run_demo(
    model: Any,
    tokenizer: Any,
    steps: Steps,
    *,
    alpha: float = 1.2,
    backend: str = "inductor",
    name: str = "",
) -> DemoResult:
    """Measure a model as it is and with AdaSkip's plan, quality and times.

    The plan is run twice: with AdaSkip's factors and FFN sublayers added online, and with linear
    maps of the normalized stream that are fitted on the calibration texts, without.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        steps: shows and times what is being done.
        alpha: acceleration ratio.
        backend: inner torch.compile backend.
        name: of the model, for the result.
    """
    texts = _texts(tokenizer)
    with steps.step("calibrate") as advance:
        profile = calibrate(model, tokenizer, texts.calibration, _CALIBRATION[1], progress=advance)
    with steps.step("fit linear maps"):
        fitted = _fit(model, tokenizer, texts, AdaSkip().plan(profile, alpha))
    models = {"as_is": model}
    for key, plan in (("skipped", None), ("fitted", fitted)):
        with steps.step(f"compile: {key}"):
            models[key] = api.compile(model, profile, alpha, plan=plan, backend=backend)
            models[key].adaskip.warmup(max(len(p.ids) for p in texts.passkeys) + _NEW_TOKENS)
    runtime: Runtime = runtime_of(models["skipped"])
    skipping = plans_of(runtime.plan)[0]
    with watched(models["skipped"]) as watch:
        results = {key: _evaluated(key, models, tokenizer, texts, steps) for key in models}
    assert watch is not None
    with steps.step("time prompts and decode steps") as advance:
        plans = {"nothing skipped": SkipPlan.empty(profile.sublayers), "skipped": skipping}
        clocks = plan_clocks(models["skipped"], plans, eager=model)
        clocks |= plan_clocks(models["fitted"], {"fitted": fitted})
        times = time_steps(clocks, [_PROMPT_TOKENS], _ROUNDS, advance)
    with steps.step("link new plans"):
        links, pieces = time_links(runtime, _LINKS)
    about = conditions(models["skipped"], name, 1, _ROUNDS)
    return DemoResult(
        conditions={**about, "alpha": alpha, **_sizes(texts)},
        seconds=dict(steps.seconds),
        profile=profile,
        plan=skipping,
        learned=tuple(p for p in watch.plans if p != skipping),
        passkeys=texts.passkeys,
        results=results,
        times=times,
        counts=_counts(runtime),
        link_seconds=links,
        pieces_for_new_plans=pieces,
    )


def _fit(model: Any, tokenizer: Any, texts: Texts, plan: SkipPlan) -> SkipPlan:
    fitter = Fitter(model, tokenizer, texts.calibration, max_length=_CALIBRATION[1])
    return fitter.fit_independently(plan, SurrogateSpec("normalized"))


def _texts(tokenizer: Any) -> Texts:
    return demo_texts(
        tokenizer,
        calibration=_CALIBRATION,
        prompts=_PROMPTS,
        prompt_tokens=_PROMPT_TOKENS,
        held_out=_HELD_OUT,
        seed=_SEED,
    )


def _evaluated(
    name: str, models: Mapping[str, Any], tokenizer: Any, texts: Texts, steps: Steps
) -> dict[str, TaskResult]:
    """Ask one of the models for the pass keys; one that skips predicts held-out text as well."""
    asked = [Generate(p.ids, (p.key,), "contains", _NEW_TOKENS) for p in texts.passkeys]
    windows = [Predict(window) for window in texts.held_out]
    tasks = [(FixedTask("passkey", "contains", asked), None)]
    if name != "as_is":
        tasks.append((FixedTask("perplexity", "perplexity", windows), models["as_is"]))
    found = {}
    for task, full in tasks:
        with steps.step(f"evaluate: {name.replace('_', ' ')}, {task.name}") as advance:
            done = evaluate(models[name], tokenizer, [task], reference=full, progress=advance)
        found[task.name] = done.results[0]
    return found


def _counts(runtime: Runtime) -> dict[str, int]:
    counters, pieces = runtime.counters, runtime.pieces_compiled
    return {"captures": counters.captures, "pieces": pieces, "links": counters.links}


def _sizes(texts: Texts) -> dict[str, Any]:
    """Return how much was measured, for the conditions."""
    return {
        "seed": _SEED,
        "prompt_tokens": [len(p.ids) for p in texts.passkeys],
        "new_tokens": _NEW_TOKENS,
        "calibration_samples": len(texts.calibration),
        "calibration_tokens": _CALIBRATION[1],
        "held_out_tokens": [len(w) for w in texts.held_out],
        "decoding": "greedy",
    }
