"""The loss of candidate plans on calibration data, which searching policies need.

One compiled model serves every candidate: a request begins with the candidate's plan, so a
candidate costs a link and its steps, never a capture or a compilation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of

from ..api import build
from ..model.adapted import decoder_in
from ..model.compiled_model import CompiledModel
from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from ..runtime.runtime import Runtime
from ..utils.token_losses import kl_divergence, negative_log_likelihood
from .calibrate import unmasked
from .tokenizer import Tokenizer


class CalibrationLoss:
    """The loss of a plan on texts, on answers to prompts, or on both: an `Evaluator`.

    The loss of a text is the mean over its tokens of KL(full model || plan) of the next token, in
    nats, as the plan's prefill computes it. The loss of a pair of a prompt and an answer is the
    mean over the answer's tokens of their negative log likelihood after the prompt, in nats; where
    the plan's phases differ, the answer is decoded token by token. With `answer_divergence` it is
    the mean over the answer's tokens of KL(full model || plan) instead: then a plan gains nothing
    by better guesses where the full model does not know the answer. The whole loss is the weighted
    sum of the mean over texts and the mean over pairs.

    A plan is judged once for the same number of samples. A loss that is not a number is infinite.

    Attributes:
        runtime: what runs the candidates.
        judged: how many times a plan was judged.
    """

    def __init__(
        self,
        model: Any,
        texts: Sequence[torch.Tensor] = (),
        answers: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        *,
        text_weight: float = 1.0,
        answer_weight: float = 1.0,
        answer_divergence: bool = False,
        backend: str = "inductor",
        memory: int = 2**31,
    ) -> None:
        """Run the full model over the texts, as far as `memory` bytes hold its predictions.

        Args:
            model: a transformers decoder in evaluation mode, or one that is compiled already.
            texts: int64 [1, T] each, of at least two tokens.
            answers: pairs of a prompt [1, T] and an answer [1, A], int64.
            text_weight: weight of the mean loss of texts.
            answer_weight: weight of the mean loss of answers.
            answer_divergence: judge answers by the divergence from the full model.
            backend: inner torch.compile backend, if the model is yet to be compiled.
            memory: bytes on the model's device for the full model's predictions of texts, two for
                each token and word; what does not fit is computed again for every candidate.

        Raises:
            ValueError: neither texts nor answers, or an empty one.
        """
        if not texts and not answers:
            raise ValueError("a loss needs texts or answers to be measured on, got neither")
        compiled = isinstance(decoder_in(model), CompiledModel)
        fast = model if compiled else build(model, None, backend=backend)
        self.runtime: Runtime = runtime_of(fast)
        self.judged = 0
        device = self.runtime.device
        self._texts = [_checked("text", n, ids, 2).to(device) for n, ids in enumerate(texts)]
        self._answers = [
            (_checked("prompt", n, p, 1).to(device), _checked("answer", n, a, 1).to(device))
            for n, (p, a) in enumerate(answers)
        ]
        self._weights = text_weight, answer_weight
        self._full = SkipPlan.empty(self.runtime.sublayers)
        self._kept: list[torch.Tensor] = []
        self._known: dict[tuple[str, int | None], float] = {}
        self._keep(memory)
        self._expected: list[torch.Tensor] = []
        if answer_divergence:
            self._expected = [self._answer_logits(*pair, self._full) for pair in self._answers]

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Tokenizer,
        texts: Iterable[str] = (),
        answers: Iterable[tuple[str, str]] = (),
        max_length: int = 1024,
        **options: Any,
    ) -> CalibrationLoss:
        """Return the loss on texts and answers that are not tokenized yet.

        Args:
            model: as for the constructor.
            tokenizer: the model's.
            texts: each of at least two tokens.
            answers: pairs of a prompt and an answer.
            max_length: tokens after which texts, prompts and answers are cut off.
            options: further arguments of the constructor.

        Raises:
            ValueError: as for the constructor.
        """

        def ids(text: str, **more: Any) -> torch.Tensor:
            options = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
            return unmasked(tokenizer(text, **options, **more))

        pairs = [(ids(prompt), ids(answer, add_special_tokens=False)) for prompt, answer in answers]
        return cls(model, [ids(text) for text in texts], pairs, **options)

    @property
    def kv_heads(self) -> dict[Sublayer, int]:
        """The K/V heads of each attention sublayer that can have any window, for `Windowed`."""
        return self.runtime.graphs.structure.kv_heads

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        """Return the loss of `plan`.

        Args:
            plan: the candidate.
            samples: judge on the first `samples` texts and as many answers; None for all.

        Raises:
            ValueError: `samples` is below 1.
            PlanError: the plan is of another model.
            UnsupportedError: the plan skips what cannot be skipped.
        """
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples!r}")
        key = plan.digest, samples
        if key not in self._known:
            self.judged += 1
            losses = self.text_loss(plan, samples), self.answer_loss(plan, samples)
            total = sum(w * loss for w, loss in zip(self._weights, losses, strict=True))
            self._known[key] = total if math.isfinite(total) else math.inf
        return self._known[key]

    def text_loss(self, plan: SkipPlan, samples: int | None = None) -> float:
        """Return the mean KL to the full model in nats; 0 without texts."""
        count = len(self._texts[:samples])
        return self._of_first(sum(self._divergence(n, plan) for n in range(count)), count)

    def answer_loss(self, plan: SkipPlan, samples: int | None = None) -> float:
        """Return the mean loss of answers in nats; 0 without answers."""
        count = len(self._answers[:samples])
        return self._of_first(sum(self._answer_loss(n, plan) for n in range(count)), count)

    def _of_first(self, total: float, count: int) -> float:
        """Return a mean as rank 0 has it: ranks that rounded otherwise would choose otherwise."""
        mean = total / max(count, 1)
        return self.runtime.ranks.first("a loss on calibration data", lambda: mean)

    @torch.no_grad()
    def _divergence(self, number: int, plan: SkipPlan) -> float:
        ids = self._texts[number]
        kept = number < len(self._kept)
        expected = self._kept[number] if kept else self._logits(ids, self._full)
        return kl_divergence(expected, self._logits(ids, plan)) / ids.shape[1]

    @torch.no_grad()
    def _answer_loss(self, number: int, plan: SkipPlan) -> float:
        prompt, answer = self._answers[number]
        logits = self._answer_logits(prompt, answer, plan)
        if self._expected:
            return kl_divergence(self._expected[number], logits) / answer.shape[1]
        return negative_log_likelihood(logits, answer[0]) / answer.shape[1]

    @torch.no_grad()
    def _answer_logits(
        self, prompt: torch.Tensor, answer: torch.Tensor, plan: SkipPlan
    ) -> torch.Tensor:
        """Return the logits [A, V] that predict an answer, in one step if the phases are alike."""
        count = answer.shape[1]
        cache = self.runtime.new_cache(prompt.shape[1] + count, plan=plan, learn=False)
        if plan.phases_alike and not plan.last_token_full:
            both = torch.cat((prompt, answer[:, :-1]), 1)
            return self.runtime.step(both, None, None, cache, count)[0]
        steps = [self.runtime.step(prompt, None, None, cache, 1)]
        rest = torch.split(answer[:, :-1], 1, 1) if count > 1 else ()
        steps += [self.runtime.step(ids, None, None, cache, 0) for ids in rest]
        return torch.cat(steps, 1)[0]

    def _logits(self, ids: torch.Tensor, plan: SkipPlan) -> torch.Tensor:
        """Return the logits [T, V] of a text [1, T]."""
        cache = self.runtime.new_cache(ids.shape[1], plan=plan, learn=False)
        return self.runtime.step(ids, None, None, cache, 0)[0]

    @torch.no_grad()
    def _keep(self, memory: int) -> None:
        """Keep the full model's predictions of as many texts as `memory` bytes hold."""
        for ids in self._texts:
            logits = self._logits(ids, self._full)
            memory -= 2 * logits.numel()
            if memory < 0:
                return
            wide = logits.dtype.itemsize > 2
            self._kept.append(logits.float().log_softmax(-1).half() if wide else logits)


def _checked(name: str, number: int, ids: torch.Tensor, least: int) -> torch.Tensor:
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
        raise ValueError(
            f"{name} {number} has shape {list(ids.shape)}; expected [1, tokens], at least [1, "
            f"{least}]"
        )
    return ids
