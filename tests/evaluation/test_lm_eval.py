"""The model of lm-evaluation-harness, on tasks in memory, beside the harness's own model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaskip_fx.calibration.calibrate import calibrate
from adaskip_fx.evaluation.execution_check import NotMeasuredError, SkipPathError
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from tests.support.toy_models import SUBLAYERS, compiled, tiny_llama, tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the harness's own

PLAN = SkipPlan.of(SUBLAYERS, ["0.attention"], decode_extra=["1.ffn"])
DOCUMENTS = [
    {"text": "one and two make", "answer": " three", "wrong": " four"},
    {"text": "a much longer question than the one before it", "answer": " b", "wrong": " c"},
    {"text": "x", "answer": " yz", "wrong": " zy"},
]


def task(kind: str) -> Any:
    """A task of the harness whose documents are in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    common = {
        "task": f"toy_{kind}",
        "output_type": kind,
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCUMENTS)},
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    if kind == "multiple_choice":
        more: dict[str, Any] = {
            "doc_to_choice": ["{{answer}}", "{{wrong}}"],
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **metric}],
        }
    else:
        more = {
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "exact_match", **metric}],
            "generation_kwargs": {"max_gen_toks": 5, "until": ["\n"], "do_sample": False},
        }
    return ConfigurableTask(config={**common, **more})


def ask(model: Any, kind: str) -> list[Any]:
    """What a model answers, in the documents' order."""
    from lm_eval.evaluator import evaluate

    given = {f"toy_{kind}": task(kind)}
    results: Any = evaluate(model, given, bootstrap_iters=0, verbosity="ERROR")
    samples = results["samples"][f"toy_{kind}"]
    return [s["resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]


@pytest.fixture
def own() -> Iterator[Any]:
    """The harness's own model around a model that is already compiled with `PLAN`."""
    from lm_eval.models.huggingface import HFLM

    with compiled().using("0.attention", decode_extra=["1.ffn"]) as fast:
        yield HFLM(pretrained=fast, tokenizer=tokenizer())


def adaskip(plan: SkipPlan = PLAN, **options: Any) -> Any:
    from lm_eval.api.registry import get_model

    from adaskip_fx.evaluation.lm_eval import model

    made = get_model("adaskip")  # as the harness finds it
    assert made is model.AdaSkipLM
    return made(
        pretrained=tiny_llama(), tokenizer=tokenizer(), plan=plan, inner_backend="eager", **options
    )


@pytest.mark.slow
def test_both_kinds_of_requests(own: Any) -> None:
    model = adaskip()
    for kind, decoded in (("multiple_choice", 0), ("generate_until", 12)):
        assert ask(model, kind) == ask(own, kind)
        about = model.get_model_info()["adaskip"]
        assert about["plan"]["digest"] == PLAN.digest
        assert about["ran"]["prefill"]["skipped_fraction"] == 0.25
        assert about["ran"]["decode"]["steps"] == decoded
        json.dumps(about)
    assert about["ran"]["decode"]["skipped_fraction"] == 0.5


@pytest.mark.slow
def test_likelihoods_under_a_plan_for_decoding_are_refused() -> None:
    """By kind of request, whatever the others of the same evaluation do."""
    model = adaskip(SkipPlan.of(SUBLAYERS, [], decode_extra=["1.ffn"]))
    assert ask(model, "generate_until")
    with pytest.raises(NotMeasuredError) as caught:
        ask(model, "multiple_choice")
    text = str(caught.value)
    assert "the harness's loglikelihood requests ran" in text
    assert "0 decode steps, and nothing was left out in any of them: the plan leaves out" in text
    assert "leaves out 1.ffn in decode. What was measured is the full model." in text
    request = SimpleNamespace(args=("some text of which the likelihood is asked",))
    with pytest.raises(NotMeasuredError, match="the harness's loglikelihood_rolling requests ran"):
        model.loglikelihood_rolling([request], disable_tqdm=True)
    assert model.get_model_info()["adaskip"]["ran"]["decode"]["skipped_fraction"] == 0.25


@pytest.mark.slow
def test_another_plan_gives_other_answers(own: Any) -> None:
    full = adaskip(SkipPlan.empty(SUBLAYERS))
    assert ask(full, "multiple_choice") != ask(own, "multiple_choice")


@pytest.mark.slow
def test_from_a_folder_as_the_command_line_gives_it(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    import adaskip_fx.evaluation.lm_eval.model  # noqa: F401  # registers it

    tiny = tiny_llama()
    tiny.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    profile = calibrate(tiny, tokenizer(), ["a text to learn from, and more of it"])
    profile.save(tmp_path / "learned")
    PLAN.save(tmp_path / "plan.json")
    for given, plan in (
        (f"profile={tmp_path}/learned,alpha=1.5", AdaSkip().plan(profile, 1.5)),
        (f"plan={tmp_path}/plan.json", PLAN),
    ):
        arguments = f"pretrained={tmp_path}/model,inner_backend=eager,{given}"
        model = get_model("adaskip").create_from_arg_string(arguments, {"device": None})
        assert model.model.adaskip.plan == plan
        assert (model.model.adaskip.policy is None) == (plan is PLAN)
    request = SimpleNamespace(args=("some text", " more"))
    ((likelihood, greedy),) = model.loglikelihood([request], disable_tqdm=True)
    assert likelihood < 0
    assert not greedy
    assert model.get_model_info()["adaskip"]["ran"]["prefill"]["steps"] == 1


def test_what_it_refuses() -> None:
    from adaskip_fx.evaluation.lm_eval.model import AdaSkipLM

    with pytest.raises(ValueError, match=r"needs profile=FOLDER or plan=FILE in --model_args"):
        AdaSkipLM("model")
    with pytest.raises(ValueError, match="runs on one device; leave out parallelize"):
        AdaSkipLM("model", plan="plan", parallelize=True)
    model = adaskip()
    with pytest.raises(SkipPathError, match="no step of the compiled model was seen"):
        model.get_model_info()


@pytest.mark.slow
def test_the_command_knows_the_model_and_says_what_is_missing() -> None:
    code = (
        "import sys\n"
        "import lm_eval.__main__ as harness\n"
        "from lm_eval.api.registry import model_registry\n"
        "from adaskip_fx.evaluation.lm_eval import command\n"
        "harness.cli_evaluate = lambda: print('adaskip' in model_registry)\n"
        "print('adaskip' in model_registry)\n"
        "command.main()\n"
        "for name in [n for n in sys.modules if n.startswith('lm_eval')]:\n"
        "    sys.modules[name] = None\n"
        "command.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: lm_eval is not installed. Run: pip install 'adaskip-fx[lm-eval]'"
