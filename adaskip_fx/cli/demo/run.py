"""The demo itself: calibrate, compile, ask, compare. It prints nothing but its progress."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

import adaskip_fx
from adaskip_fx.fitting import Fitter, SurrogateSpec
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decisions import plans_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.profiles.profile import Profile
from adaskip_fx.utils.progress import Steps

from ...data.reference_text import Texts, demo_texts
from .measure import ask, compare, counts, link_new_plans
from .result import CONTENDERS, Answer, Contender, DemoResult, Options

_WINDOW = AdaSkip().window


def make_texts(tokenizer: Any, options: Options) -> Texts:
    """The texts that `options` ask for."""
    return demo_texts(
        tokenizer,
        calibration=options.calibration,
        prompts=options.prompts,
        prompt_tokens=options.prompt_tokens,
        held_out=options.held_out,
        seed=options.seed,
    )


def run_demo(
    model: Any, tokenizer: Any, texts: Texts, options: Options, steps: Steps, name: str = ""
) -> DemoResult:
    """Measure a model as it is, in the pipeline with an empty plan, and with AdaSkip's plan.

    The latter twice: with AdaSkip's factors and FFN sublayers added online, and with linear maps of
    the normalized stream that are fitted on the calibration texts, without.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: see `make_texts`.
        options: how much to measure.
        steps: shows and times what is being done.
        name: of the model, for the result.

    Raises:
        ValueError: `new_tokens` is too small for the decode window to close, or alpha is wrong.
    """
    _check(options)
    with steps.step("calibrate") as advance:
        profile = adaskip_fx.calibrate(
            model, tokenizer, texts.calibration, options.calibration[1], progress=advance
        )
    with steps.step("fit linear maps"):
        fitter = Fitter(model, tokenizer, texts.calibration, max_length=options.calibration[1])
        fitted = fitter.fit_independently(
            AdaSkip().plan(profile, options.alpha), SurrogateSpec("normalized")
        )
    plans = {"empty_plan": SkipPlan.empty(profile.sublayers), "fitted": fitted}
    models = _warm(model, profile, plans, texts, options, steps)
    runtime = runtime_of(models["skipped"])
    after_warmup = counts(runtime)
    contenders, learned = _ask_all(models, tokenizer, texts, options, steps)
    after_answers = counts(runtime)
    with steps.step("compare on held-out text"):
        quality = {n: compare(model, models[n], texts.held_out) for n in ("skipped", "fitted")}
    with steps.step("link new plans"):
        link_seconds, new_pieces = link_new_plans(runtime, options.link_repeats)
    return DemoResult(
        conditions=conditions(model, texts, options, name),
        seconds=dict(steps.seconds),
        profile=profile,
        plan=plans_of(runtime.plan)[0],
        learned=learned,
        contenders=contenders,
        quality=quality,
        after_warmup=after_warmup,
        after_answers=after_answers,
        at_end=counts(runtime),
        link_seconds=link_seconds,
        pieces_for_new_plans=new_pieces,
    )


def _check(options: Options) -> None:
    if options.new_tokens < _WINDOW + 4:
        raise ValueError(
            f"{options.new_tokens} new tokens are too few: the decode window takes {_WINDOW}, "
            "and some must follow"
        )


def _warm(
    model: Any,
    profile: Profile,
    plans: dict[str, SkipPlan],
    texts: Texts,
    options: Options,
    steps: Steps,
) -> dict[str, Any]:
    """The contenders, ready to answer without anything left to capture or compile."""
    longest = max(len(p.ids) for p in texts.passkeys) + options.new_tokens
    found = {"as_is": model}
    with steps.step("compile with skipping, and warm up"):
        found["skipped"] = adaskip_fx.compile(
            model, profile, options.alpha, backend=options.backend
        )
        found["skipped"].adaskip.warmup(longest)
    for name, plan in plans.items():
        with steps.step(f"compile with the {name.removesuffix('_plan')} plan, and warm up"):
            found[name] = adaskip_fx.compile(model, profile, plan=plan, backend=options.backend)
            found[name].adaskip.warmup(longest)
    with steps.step("warm up the model as is"):
        ids = torch.tensor([texts.passkeys[0].ids[:64]], device=model.device)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
    return {name: found[name] for name in CONTENDERS}


def _ask_all(
    models: dict[str, Any], tokenizer: Any, texts: Texts, options: Options, steps: Steps
) -> tuple[dict[str, Contender], tuple[SkipPlan, ...]]:
    """Every contender's answer to every text, and the plans that the skipped model learned."""
    names = list(models)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    learned: list[SkipPlan] = []
    total = len(names) * len(texts.passkeys)
    with steps.step(f"ask for {len(texts.passkeys)} pass keys, four ways") as advance:
        for number, passkey in enumerate(texts.passkeys):
            # Each goes first in turn, so that none has the warmer machine.
            for i in range(len(names)):
                name = names[(number + i) % len(names)]
                advance(number * len(names) + i, total)
                answer, plan = ask(models[name], tokenizer, passkey, options.new_tokens)
                answers[name].append(answer)
                if name == "skipped" and plan is not None:
                    learned.append(plan)
        advance(total, total)
    return {n: Contender(tuple(answers[n]), _WINDOW) for n in names}, tuple(learned)


def conditions(model: Any, texts: Texts, options: Options, name: str) -> dict[str, Any]:
    """What the numbers depend on, JSON-compatible."""
    device = model.device
    cuda = device.type == "cuda"
    return {
        "model": name or type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "backend": options.backend,
        "alpha": options.alpha,
        "seed": options.seed,
        "prompt_tokens": [len(p.ids) for p in texts.passkeys],
        "new_tokens": options.new_tokens,
        "calibration_samples": len(texts.calibration),
        "calibration_tokens": options.calibration[1],
        "held_out_tokens": [len(w) for w in texts.held_out],
        "batch_size": 1,
        "decoding": "greedy",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "adaskip_fx": adaskip_fx.__version__,
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
