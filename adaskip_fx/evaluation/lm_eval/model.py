r"""A model of EleutherAI's lm-evaluation-harness that skips sublayers.

    adaskip-lm-eval --model adaskip \
        --model_args pretrained=MODEL,profile=PROFILE,alpha=1.2 --tasks lambada_openai

The harness finds models in a registry that its own package fills, so the command of this package
registers ``adaskip`` and then calls the harness's; all its options are the harness's. In Python it
is enough to import this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from adaskip_fx.api import compile
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.model.load import usable_backend
from adaskip_fx.plans.decision_files import load_decision
from adaskip_fx.plans.decisions import Decision

from ..execution_check import Watch, watched
from ..result import decision_json

_LOGGER = logging.getLogger(__name__)


@register_model("adaskip")
class AdaSkipLM(HFLM):
    """The harness's Hugging Face model, compiled by :func:`adaskip_fx.compile`.

    Every step of the compiled model is checked against the plan; what really ran is in the
    harness's results, under ``config`` and ``adaskip``. Requests of a kind that runs none of the
    steps in which the plan leaves something out (likelihoods under a plan for decoding alone) are
    refused with `NotMeasuredError`, which ends the evaluation.
    """

    def __init__(
        self,
        pretrained: Any,
        profile: str | None = None,
        alpha: float = 1.2,
        plan: str | Path | Decision | None = None,
        inner_backend: str = "inductor",
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Load the model as the harness does, then compile it.

        Args:
            pretrained: a folder, a name on the hub, or a model.
            profile: folder that ``calibrate`` wrote.
            alpha: acceleration ratio.
            plan: a plan or other decision, or the path of one, instead of what AdaSkip would skip.
            inner_backend: inner torch.compile backend; ``eager`` where it is Inductor and there
                is no C++ compiler. (``backend`` is the harness's, and something else.)
            device: CUDA where there is one when None.
            options: of the harness's ``hf`` model: ``gguf_file``, ``dtype``, ``batch_size`` ...

        Raises:
            ValueError: neither a profile nor a plan, or a model that is split over devices.
        """
        if profile is None and plan is None:
            raise ValueError(
                "the model adaskip needs profile=FOLDER or plan=FILE in --model_args; for the "
                "model as it is use --model hf"
            )
        if options.get("parallelize") or options.get("tp_plan"):
            raise ValueError("the model adaskip runs on one device; leave out parallelize, tp_plan")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, device=device, **options)
        chosen = load_decision(Path(plan)) if isinstance(plan, str | Path) else plan
        usable, reason = usable_backend(inner_backend, self._model.device)
        if reason is not None:
            _LOGGER.warning(reason)
        self._model: Any = compile(self._model, profile, float(alpha), plan=chosen, backend=usable)
        self._watch = Watch(runtime_of(self._model))
        runtime_of(self._model).observer = self._watch

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return what the harness computes, under the plan."""
        with self._measured("loglikelihood"):
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return what the harness computes, under the plan."""
        with self._measured("loglikelihood_rolling"):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the harness computes, under the plan."""
        with self._measured("generate_until"):
            found: list[str] = super().generate_until(requests, disable_tqdm)
        return found

    @contextmanager
    def _measured(self, kind: str) -> Iterator[None]:
        """Refuse what runs inside of the block if it was the full model."""
        with watched(self._model) as watch:
            yield
        if watch is not None:
            watch.check_measured(f"the harness's {kind} requests")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records of a model, with the plan and what ran of it.

        Raises:
            SkipPathError: no step was run.
        """
        decision = decision_json(self._model.adaskip.plan)
        about = {"plan": decision, "ran": self._watch.read().to_json()}
        return {**super().get_model_info(), "adaskip": about}
