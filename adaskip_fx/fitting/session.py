"""What the steps of a recipe share: one compiled model, texts to learn from and to judge by."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from adaskip_fx.calibration.calibrate import tokenize
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import Greedy
from adaskip_fx.profiles.profile import Profile

from .distillation import DistillConfig, refine
from .fitter import Fitter
from .precision import allow_tf32
from .retrieval_prompts import retrieval_samples
from .search_fits import SurrogateFitter
from .spec import SurrogateSpec
from .synthetic_text import laid_out, pack, write_texts
from .weighted_sample import Sample

#: texts, or token ids int64 [1, T], of several kinds by name
Kinds = Mapping[str, Sequence[str | torch.Tensor]]
Tokens = dict[str, list[torch.Tensor]]
Say = Callable[[str], None]

OWN = ("own", "own, ends apart")
_DOCUMENT = 640  # tokens that a model writes in one go: small ones lose the thread
_SEARCHED = 2  # texts of each kind that a search fits on
_FITTED = 24  # of each kind that a closed form is fitted on: more would change it little
_JUDGES = 1  # held-out texts of each kind that a search judges by
_JUDGED = 2048  # tokens of them
_ASKED = 2  # answers that it judges by
_OWN_TURNS = 3  # in a refinement for one of the texts that were given, of each kind of own ones
_WORSE = math.log(1.04)  # nats a token that all decode extras together may cost


class FittingSession:
    """Texts and a compiled model, for plans of one model.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: by kind; of each every fifth, and at least one of two, is held out.
        own: samples that the model writes itself.
        tokens: of a sample at most.
        seed: of all that is drawn.
        backend: inner torch.compile backend.
        say: told what is being done.

    Attributes:
        learned, held_out: token ids int64 [1, T], by kind: to learn from, and to judge by.
        fitter: on all that there is to learn from.
        loss: judges plans on what is held out.

    ValueError for no texts, or a kind of which there is but one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Kinds,
        *,
        own: int = 0,
        tokens: int = 2048,
        seed: int = 0,
        backend: str = "eager",
        say: Say = lambda _: None,
    ) -> None:
        self.tokenizer, self.tokens, self.seed, self.say = tokenizer, tokens, seed, say
        given = {
            kind: [_ids(model, tokenizer, text, tokens) for text in some]
            for kind, some in texts.items()
        }
        if not given or any(len(some) < 2 for some in given.values()):
            raise ValueError("give at least two texts of each kind: one is held out to judge by")
        first = {kind: some[:1] for kind, some in given.items()}
        base = Fitter(model, tokenizer, first, max_length=tokens, backend=backend, together=64)
        if own:
            say(f"write {own} samples of {tokens:,} tokens")
            given |= self._written(base, own)
        self.learned, self.held_out = _parted(given)
        self.fitter = base.on(self.learned)
        judges = [t[:, :_JUDGED] for some in self.held_out.values() for t in some[:_JUDGES]]
        self.loss = CalibrationLoss(
            base.runtime.model, judges, self._questions(), answer_weight=0.1
        )

    def searched(
        self, profile: Profile, alpha: float, rung: SurrogateSpec, shortlist: int | None = None
    ) -> tuple[SkipPlan, ...]:
        """The plans of a greedy search, from none skipped to as many as `alpha` says."""
        self.say("search")
        few = self._few(_SEARCHED)
        never = frozenset(self.fitter.runtime.graphs.structure.unskippable)
        greedy = Greedy(self.loss, SurrogateFitter(few, rung), never=never, shortlist=shortlist)
        with allow_tf32():
            return greedy.plans(profile, alpha)

    def fitted(self, plan: SkipPlan, rung: SurrogateSpec, in_order: bool = True) -> SkipPlan:
        """The plan with surrogates of a rung, fitted in its order, or each as if it were alone."""
        some = self._few(_FITTED)
        self.say(f"fit {len(plan.prefill)} surrogates on {some.tokens:,} tokens")
        bare = plan.with_surrogates(Surrogates())
        return some.fit(bare, rung) if in_order else some.alone(bare, rung)

    def refined(self, plan: SkipPlan, steps: int) -> SkipPlan:
        """Surrogates refined on texts of all kinds and on prompts that hide something."""
        given = [t for kind, some in self.learned.items() if kind not in OWN for t in some]
        groups = [given, *(self.learned[kind] for kind in OWN if kind in self.learned)]
        asked = self._asked(self.learned, max(8, len(self.fitter.samples) // 2), 4, self.seed + 2)
        held = [Sample(t) for some in self.held_out.values() for t in some[:2]]
        held += self._asked(self.held_out, 2, 4, self.seed + 3)
        samples = [[Sample(ids) for ids in some] for some in groups]
        turns = [samples[0], asked, *samples[1:] * _OWN_TURNS]
        how = DistillConfig(steps=steps, every=max(1, steps // 10), seed=self.seed)
        plan, seen = refine(self._few(_FITTED), plan, turns, held, how)
        best = min(seen.losses.values())
        self.say(
            f"refined: KL of held-out samples from {seen.losses[0]:.4f} to {best:.4f} nats a "
            f"token, at step {seen.step} of {steps}"
        )
        return plan

    def with_extras(self, plan: SkipPlan, rung: SurrogateSpec) -> SkipPlan:
        """Surrogates for the ffn sublayers that decoding may add without losing much.

        From the one that costs the least, as long as all together cost at most 4% of perplexity.
        """
        beside = self._few(_SEARCHED).beside(plan, rung)
        most = self.loss.text_loss(plan) + _WORSE
        alone = {s: self.loss.text_loss(_and(plan, beside, [s])) for s in beside.by_sublayer}
        allowed: list[Sublayer] = []
        for sublayer in sorted(alone, key=lambda s: (alone[s], s)):
            if self.loss.text_loss(_and(plan, beside, [*allowed, sublayer])) > most:
                break
            allowed.append(sublayer)
        self.say(f"decoding may add {len(allowed)} ffn sublayers")
        chosen = Surrogates({s: beside.by_sublayer[s] for s in allowed})
        return plan.with_surrogates(plan.surrogates.merged(chosen))

    def _few(self, most: int) -> Fitter:
        """On at most so many texts of each kind."""
        return self.fitter.on({kind: some[:most] for kind, some in self.learned.items()})

    def _written(self, base: Fitter, own: int) -> Tokens:
        """Samples of texts that the model writes: half in a row, half with their ends apart."""
        length = min(_DOCUMENT, self.tokens)
        count = -(-own * self.tokens // length) + 2
        rows = 512 if base.runtime.device.type == "cuda" else 16
        texts = write_texts(base.runtime, self.tokenizer, count, length, batch=rows, seed=self.seed)
        drawn = random.Random(self.seed)
        texts = [self._laid_out(text, drawn) for text in texts]
        half = len(texts) // 2
        plain = pack(texts[:half], self.tokens)
        apart = pack(texts[half:], self.tokens, interleaved=True, seed=self.seed)
        return {n: some for n, some in zip(OWN, (plain, apart), strict=True) if len(some) > 1}

    def _laid_out(self, text: torch.Tensor, drawn: random.Random) -> torch.Tensor:
        if not hasattr(self.tokenizer, "decode"):
            return text
        words = laid_out(self.tokenizer.decode(text[0]), drawn)
        ids = self.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.as_tensor(ids).to(text.device)

    def _asked(
        self, texts: Tokens, count: int, most: int, seed: int, longest: int | None = None
    ) -> list[Sample]:
        sources = [t for some in texts.values() for t in some]
        tokens = min(longest or self.tokens, self.tokens, max(t.shape[1] for t in sources))
        return retrieval_samples(self.tokenizer, sources, count, tokens, most=most, seed=seed)

    def _questions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prompts [1, T] that hide something and ask for it, and the answers [1, A]."""
        samples = self._asked(self.held_out, _ASKED, 1, self.seed + 1, _JUDGED)
        places = [_answer_at(sample) for sample in samples]
        return [(s.ids[:, :at], s.ids[:, at:]) for s, at in zip(samples, places, strict=True)]


def _ids(model: Any, tokenizer: Any, text: str | torch.Tensor, longest: int) -> torch.Tensor:
    if isinstance(text, str):
        text = tokenize(model, tokenizer, [text], longest)[0]
    return text[:, :longest].to(model.device)


def _parted(texts: Tokens) -> tuple[Tokens, Tokens]:
    """To learn from, and every fifth to judge by: the last of each five, or of fewer."""
    held = {k: some[4::5] or some[-1:] for k, some in texts.items()}
    taken = {id(t) for t in chain(*held.values())}
    return {k: [t for t in some if id(t) not in taken] for k, some in texts.items()}, held


def _answer_at(sample: Sample) -> int:
    """Where the answer of a sample that asks once begins."""
    shares = sample.shares
    return int((shares > 1.5 * shares.min()).nonzero()[0]) + 1


def _and(plan: SkipPlan, beside: Surrogates, more: Sequence[Sublayer]) -> SkipPlan:
    """The plan with more sublayers skipped, in prefill as well, where they can be judged."""
    added = Surrogates({s: beside.by_sublayer[s] for s in more})
    skip = (*plan.prefill, *more)
    return SkipPlan.of(plan.sublayers, skip, surrogates=plan.surrogates.merged(added))
